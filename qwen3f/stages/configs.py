"""Each stage's default configuration: the keys of every run, and a section with its own. Imports no torch."""

from ml_collections import ConfigDict

from qwen3f.train.defaults import run_config


def pretrain_config(preset: str) -> ConfigDict:
    config = run_config(preset, "pretrain")
    # Adjusted base frequency (Xiong et al. 2023, arXiv:2309.16039): init_from's weights with a lower rotary base or a
    # shorter context than config.model go on with config.model's. False: with theirs.
    config.abf = False
    _text(config.data)
    config.eval.max_docs = 0  # held-out documents to use; 0: all
    config.eval.compare_gzip = False  # also say what gzip -9 needs for the held-out text
    config.context_warmup = ConfigDict()
    config.context_warmup.length = 0  # tokens that attention may look back over at first; 0: no such warmup
    config.context_warmup.steps = 0.5  # how long: below 1 a share of the steps, else a number of steps
    config.sample = _sample()
    return config


def _text(data: ConfigDict) -> None:
    """What pretraining reads, and how it becomes rows. Without data.tokenizer one of model.vocab_size is trained."""
    # embedded: Python's standard library; reasoning: generated problems; files@DIR: .txt, .jsonl, .json, .parquet,
    # .arrow; or the name of a data set (qwen3f.data.sources.adapters.registry) with a local copy, NAME@DIR. Several of
    # them with weights: embedded=0.7,reasoning=0.3
    data.mixture = "embedded"
    data.root = ""  # DIR for mixture=files
    data.text_key = "text"  # field of .jsonl and .json, column of .parquet and .arrow
    data.holdout = 0.05  # share of the documents kept for validation
    data.max_samples = 0  # documents of each source to use, at most; 0: all
    data.temperature = 0.0  # t: weights times tokens^(1/t), so 1 is in proportion to the sizes; 0: as written
    data.max_epochs = ""  # readings of a source before it is dropped: 4, or reasoning=4,fineweb=1; "": no limit
    data.length_mix = ""  # shares of documents by length, long=0.75,medium=0.25: over seq_len / 2, over / 8
    data.packing = "concat"  # concatenate and cut, or best_fit: whole documents, with padding
    data.long_documents = "cut"  # or drop: best_fit's documents that are longer than seq_len
    data.streaming = False  # documents as they are read, also from the Hub; False: from a cache of tokens
    data.shuffle_buffer = 0  # documents of a stream that are shuffled together
    data.reset_positions = True  # positions restart at each document
    data.cross_documents = False  # attention may look into the documents before


def _sample() -> ConfigDict:
    """Text at the end of a run."""
    sample = ConfigDict()
    sample.prompts = ("import ", "def main(", "The ")  # continued at the end of the run
    sample.tokens = 64
    sample.temperature = 0.7
    return sample


def sft_config(preset: str) -> ConfigDict:
    config = run_config(preset, "sft")
    _chat_template(config)
    _chats(config.data)
    config.eval.max_rows = 256  # held-out rows of each source for the loss; 0: all
    config.eval.task = "reasoning"  # whose held-out questions are answered, greedily; "": none
    config.eval.questions = 256  # so many of them, of the kinds and difficulties that data names
    config.eval.modes = "thinking"  # in which they are answered: thinking, plain, or thinking,plain
    config.eval.max_new_tokens = 256
    config.show_samples = 3  # samples that are shown at the start, with what is trained marked
    return config


def _chat_template(config: ConfigDict) -> None:
    """The format of chats."""
    # hybrid, instruct-2507, thinking-2507 or coder (qwen3f/data/chat/kinds.py); "": that of the template beside the
    # tokenizer, without one hybrid.
    config.chat_template = ""


def _chats(data: ConfigDict) -> None:
    """What is trained on; see qwen3f.data.chat.corpus."""
    # reasoning, reasoning-plain: generated problems, with and without their working; chats@DIR: files of messages; or a
    # data set's name (qwen3f.data.sources.adapters.registry), with @DIR for a local copy. Several with weights:
    # reasoning=0.7,reasoning-plain=0.3
    data.mixture = "reasoning"
    data.root = ""  # the directory of the one source
    data.kinds = ""  # of generated problems, arithmetic,logic; "": all
    data.difficulties = ""  # of generated problems, 1,2; "": all
    data.problems = 32_768  # that are generated, both splits together
    data.problem_seed = 0
    data.turns = "last"  # a sample for each answer, its prompt as inference renders it; or all, in one sequence
    data.switches = 0.0  # share of samples that say their mode, by /think or /no_think
    data.judge = ""  # keep only answers that this task calls right: reasoning
    data.long_chats = "drop"  # of samples longer than seq_len: drop, cut_end (behind the last answer that fits), error
    data.on_bad_row = "error"  # or skip, counted
    data.max_samples = 0  # of each source, at most; 0: all
    data.max_heldout = 1000  # held-out samples of each source, at most
    data.temperature = 0.0  # t: weights times tokens^(1/t), so 1 is in proportion to the sizes; 0: as written
    data.max_epochs = ""  # readings of a source before it is dropped: 4, or reasoning=4; "": no limit


def reward_model_config(preset: str) -> ConfigDict:
    config = _preference_config(preset, "reward_model")
    config.model.scalar_head = True
    config.reward_model = ConfigDict()
    config.reward_model.margin = 0.0  # times a pair's own margin (of ratings, else 1): the lead it must have
    config.reward_model.centre = 0.0  # weight of the squared sum of both scores, which keeps them around 0: 0.01
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val_accuracy", "max"
    return config


def dpo_config(preset: str) -> ConfigDict:
    config = _preference_config(preset, "dpo")
    config.dpo = _dpo()
    # cached: computed once, kept in data.cache; live: the reference's weights stay in memory, beside the policy's
    config.dpo.reference_log_probs = "cached"
    config.eval.task = "reasoning"  # whose held-out questions are answered, greedily, and compared with the reference
    config.eval.questions = 0  # so many of them; 0: none
    config.eval.thinking = True  # whether they ask for a thought
    config.eval.max_new_tokens = 256
    config.eval.cache_tokens = 65_536  # room for keys and values while answering, on a rank; 0: what a device has free
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val_accuracy", "max"
    return config


def dpo_online_config(preset: str) -> ConfigDict:
    config = run_config(preset, "dpo_online")
    _chat_template(config)
    config.data.kinds = ""  # of generated problems, arithmetic,logic; "": all
    config.data.difficulties = ""  # of generated problems, 1,2; "": all
    config.data.problems = 32_768  # that are generated, both splits together
    config.data.problem_seed = 0
    config.dpo = _dpo()
    online = config.online = ConfigDict()
    online.task = "reasoning"  # whose prompts are answered
    online.thinking = True  # whether they ask for a thought
    online.samples = 4  # answers to each prompt: the best and the worst are a pair
    online.temperature = 0.9
    online.max_new_tokens = 256  # an answer that has not ended there is worse than any that has
    # task: its judge, right or wrong; rule: right, then well formed, then short; reward_model
    online.judge = "task"
    online.reward_model = ""  # a workdir, its checkpoints/N or a Hugging Face directory
    online.fill = 0.5  # share of batch_size in pairs that a step waits for, asking further prompts
    online.rounds = 8  # of prompts that a step asks, at most
    online.rows = 256  # answers at a time on a rank
    online.cache_tokens = 65_536  # room for keys and values while answering, on a rank; 0: what a device has free
    config.eval.questions = 128  # held-out questions that are answered, greedily; 0: none
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val_wins", "max"
    return config


def _dpo() -> ConfigDict:
    dpo = ConfigDict()
    # sigmoid, sigmoid_norm (by length), hinge, ipo, cdpo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero,
    # apo_down
    dpo.loss = "sigmoid"
    dpo.beta = 0.1  # how strongly the policy is held to the reference
    dpo.label_smoothing = 0.0  # share of pairs that are taken to be the wrong way round: cdpo, robust, exo_pair
    dpo.sft_weight = 0.0  # of next-token prediction of the better answers, which is added
    dpo.router_losses = False  # add a mixture's, by model.router_aux_loss_coef and router_z_loss_coef
    dpo.reference = ""  # a workdir, its checkpoints/N or a Hugging Face directory; "": init_from
    return dpo


def _preference_config(preset: str, stage: str) -> ConfigDict:
    config = run_config(preset, stage)
    _chat_template(config)
    _pairs(config.data)
    config.eval.max_rows = 256  # held-out rows of each source; 0: all
    config.show_samples = 2  # answers that are shown at the start: those of a pair are neighbours
    return config


def _pairs(data: ConfigDict) -> None:
    """What is trained on; see qwen3f.data.pairs.corpus."""
    # right-or-wrong, boxed-or-not, short-or-padded: answers to generated problems, better by rule, each with -plain for
    # answers without working; pairs@DIR: files of pairs of chats; or a data set's name with @DIR. Several with weights
    data.mixture = "right-or-wrong=0.4,boxed-or-not=0.3,short-or-padded=0.3"
    data.root = ""  # the directory of the one source
    data.kinds = ""  # of generated problems, arithmetic,logic; "": all
    data.difficulties = ""  # of generated problems, 1,2; "": all
    data.problems = 32_768  # that are generated, both splits together
    data.problem_seed = 0
    data.long_pairs = "drop"  # of pairs that do not fit into a row of seq_len: drop, or error
    data.on_bad_row = "error"  # or skip, counted
    data.max_samples = 0  # pairs of each source, at most; 0: all
    data.max_heldout = 1000  # held-out pairs of each source, at most
    data.temperature = 0.0  # t: weights times tokens^(1/t), so 1 is in proportion to the sizes; 0: as written
    data.max_epochs = ""  # readings of a source before it is dropped: 4, or pairs=4; "": no limit


def grpo_config(preset: str) -> ConfigDict:
    config = run_config(preset, "grpo")
    _chat_template(config)
    # reasoning, code, gsm8k[@DIR], math[@DIR]; visual, of a model with a tower on one device. Several with weights:
    # reasoning=0.7,code=0.3
    config.tasks = "reasoning"
    # by name with weights: of qwen3f/rl/rewards.py, module:function, or reward_model, which judge.reward_model names
    config.rewards = "correct=1"
    config.sandbox = "auto"  # for code: auto, bubblewrap, landlock; none: without one (qwen3f/sandbox/tiers.py)
    config.batch_size = 16  # prompts of a step
    config.updates = 1  # of the optimizer for a step's completions, which are cut into so many parts
    config.microbatches = 1  # of an update, at least; how many there are is up to rollout.microbatch_rows
    data = config.data
    data.kinds = ""  # of generated problems, arithmetic,logic; "": all
    data.difficulties = ""  # of generated problems, 1,2; "": all
    data.problems = 32_768  # that are generated, both splits together
    data.problem_seed = 0
    data.max_samples = 0  # questions of each task, at most; 0: all
    _generated_pictures(data)  # of the task visual
    config.rollout = _rollout()
    config.advantages = ConfigDict()  # qwen3f/rl/advantages.py
    config.advantages.baseline = "mean"  # or leave_one_out
    config.advantages.scale = "none"  # group, batch, or none: centred alone
    config.advantages.combine = "sum_then_normalize"  # of several rewards, or normalize_then_sum
    config.grpo = _grpo()
    config.judge = ConfigDict()
    config.judge.processes = 2  # that judge, on each rank
    config.judge.reward_model = ""  # a workdir, its checkpoints/N or a Hugging Face directory
    config.judge.deadline = 20.0  # seconds of one reward of one completion, before it counts as failed
    config.samples = ConfigDict()
    config.samples.keep = 200  # steps whose completions stay in samples/; 0: all
    config.samples.show = 3  # completions of a logged step in TensorBoard
    config.eval.questions = 256  # held-out ones, of all tasks together; 0: none
    config.eval.max_new_tokens = 512
    config.eval.temperature = 0.0  # 0: greedy
    config.schedule.kind = "constant"
    config.schedule.warmup = 0.05
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val_accuracy", "max"
    return config


def _rollout() -> ConfigDict:
    """What is sampled, and what of it is trained on; see qwen3f/rl/prepare.py."""
    rollout = ConfigDict()
    rollout.samples = 8  # completions of a prompt
    rollout.max_new_tokens = 512
    rollout.temperature = 1.0  # trained at, too
    rollout.thinking = True
    rollout.rows = 256  # completions at a time on a rank
    rollout.cache_tokens = 131_072  # room for keys and values while sampling, on a rank; 0: what a device has free
    rollout.microbatch_rows = 1  # rows of seq_len in a micro-batch on a rank
    rollout.draws = 1  # batches of prompts that a step may draw to replace groups without a difference; 1: keep those
    rollout.mask_truncated = False  # completions that did not end count in no loss
    # trainer: computed anew; sampler: the engine's own; auto: the engine's with attention=invariant, where the first
    # step has found them to be the trainer's bit for bit
    rollout.old_logprobs = "auto"
    rollout.correction = "none"  # between sampler and trainer: token_ or sequence_, truncate or mask
    rollout.correction_low = 0.0  # of the masks
    rollout.correction_high = 2.0
    rollout.top_entropy = 1.0  # share of the tokens, those of the highest entropy, that are trained on
    return rollout


def _grpo() -> ConfigDict:
    """The loss; see qwen3f.rl.policy.GRPO."""
    grpo = ConfigDict()
    grpo.loss = "dapo"  # grpo, dr_grpo, dapo, bnpo, cispo, sapo, gspo, luspo or vespo
    grpo.clip_low = 0.2
    grpo.clip_high = 0.28
    grpo.dual_clip = 0.0  # bound of the ratio where the advantage is negative, such as 3; 0: none
    grpo.cispo_cap = 5.0
    grpo.sapo_temperatures = (1.0, 1.05)
    grpo.kl_coef = 0.0  # of the KL to the weights of init_from; 0: no reference
    grpo.kl = "k3"  # its estimate: k1, k2 or k3
    grpo.kl_ratio = True  # times the ratio
    grpo.router_losses = False  # add a mixture's, by model.router_aux_loss_coef and router_z_loss_coef
    return grpo


def multimodal_config(preset: str) -> ConfigDict:
    config = run_config(preset, "multimodal")
    _chat_template(config)
    _pictures(config.data)
    config.eval.max_rows = 256  # held-out rows of each source for the loss and for answers; 0: all
    return config


def _generated_pictures(data: ConfigDict) -> None:
    data.pictures = 16_384  # that are generated, both splits together
    data.picture_seed = 0
    data.min_side = 64  # pixels of their sides
    data.max_side = 128
    data.picture_kinds = ""  # shapes,bar,line,pie,text; "": all
    data.min_pixels = 65_536  # pictures are scaled to lie between
    data.max_pixels = 16_777_216


def _pictures(data: ConfigDict) -> None:
    """What is trained on; see qwen3f.data.multimodal.dataset."""
    # images, captions: generated pictures; chats@DIR, llava-instruct-150k@DIR: files; others as sft's, without
    # pictures. Several with weights, which share out rows: images=0.5,captions=0.5
    data.mixture = "images"
    _generated_pictures(data)
    data.problems = 4_096  # of generated problems, where the mixture has them
    data.patches = 16_384  # room of a row for patches; a longer chat is left out
    data.images = 16  # and for pictures; a video is one
    data.turns = "last"  # a sample for each answer, or all, in one
    data.on_bad_row = "error"  # or skip, counted
    data.max_samples = 0  # of each source, at most; 0: all
    data.max_heldout = 1000
