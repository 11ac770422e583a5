"""Default configuration of each stage: the keys of every training run and the stage's own. Imports no torch."""

from ml_collections import ConfigDict

from qwen3f.train.defaults import run_config


def pretrain_config(preset: str) -> ConfigDict:
    config = run_config(preset, "pretrain")
    # Adjusted base frequency (Xiong et al. 2023, arXiv:2309.16039). True: raise the rotary base and the context of
    # init_from's model to those of config.model, where they are lower. False: keep those of init_from.
    config.abf = False
    _text(config.data)
    config.eval.max_docs = 0  # held-out documents to use; 0: all
    config.eval.compare_gzip = False  # at the end, also print the bits a byte of gzip -9 on the held-out text
    config.context_warmup = ConfigDict()
    config.context_warmup.length = 0  # during this warmup attention sees only this many tokens back; 0: no warmup
    config.context_warmup.steps = 0.5  # length of the warmup: below 1 a share of config.steps, else a number of steps
    config.sample = _sample()
    return config


def _text(data: ConfigDict) -> None:
    """The text of pretraining and its packing. Without data.tokenizer the run takes the tokenizer of init_from; without
    that too it trains one of model.vocab_size tokens."""
    # embedded: Python's standard library; reasoning: generated problems; files@DIR: .txt, .jsonl, .json, .parquet,
    # .arrow; or the name of a data set (qwen3f.data.sources.adapters.registry) with a local copy, NAME@DIR. Several of
    # them with weights: embedded=0.7,reasoning=0.3
    data.mixture = "embedded"
    data.root = ""  # DIR for mixture=files
    data.text_key = "text"  # field of .jsonl and .json, column of .parquet and .arrow
    data.holdout = 0.05  # share of the documents kept for validation
    data.max_samples = 0  # use at most this many documents of each source; 0: all
    # t multiplies each weight in the mixture by (tokens of the source)^(1/t): 1 samples in proportion to weight times
    # size, larger values come nearer to the weights as written. 0: weights as written.
    data.temperature = 0.0
    # Read a source at most this many times, then drop it from the mixture: 4, or reasoning=4,fineweb=1; "": no limit.
    data.max_epochs = ""
    # Share of tokens by the length of their document, such as long=0.75,medium=0.25. long: more than seq_len / 2
    # tokens; medium: more than seq_len / 8; short: the rest. "": documents of all lengths alike.
    data.length_mix = ""
    data.packing = "concat"  # concat: concatenate documents and cut rows; best_fit: whole documents, with padding
    data.long_documents = "cut"  # packing=best_fit: cut documents that are longer than seq_len, or drop them
    data.streaming = False  # True: read documents while training, also from the Hub; False: build a token cache first
    data.shuffle_buffer = 0  # streaming=True: shuffle blocks of this many documents; 0: no shuffling
    data.reset_positions = True  # positions restart at each document
    data.cross_documents = False  # attention may look into earlier documents of the row


def _sample() -> ConfigDict:
    """Text that the model writes at the end of a run."""
    sample = ConfigDict()
    sample.prompts = ("import ", "def main(", "The ")  # the model continues these
    sample.tokens = 64  # tokens to generate for each prompt; 0: no samples
    sample.temperature = 0.7
    return sample


def sft_config(preset: str) -> ConfigDict:
    config = run_config(preset, "sft")
    _chat_template(config)
    _chats(config.data)
    config.eval.max_rows = 256  # measure the loss on this many held-out rows of each source; 0: all
    config.eval.task = "reasoning"  # evaluations answer held-out questions of this task, greedily; "": none
    config.eval.questions = 256  # number of these questions, of the kinds and difficulties in config.data; 0: none
    config.eval.modes = "thinking"  # modes of the answers: thinking, plain, or thinking,plain
    config.eval.max_new_tokens = 256
    config.show_samples = 3  # print this many samples at the start, with the trained tokens marked
    return config


def _chat_template(config: ConfigDict) -> None:
    """The format of chats."""
    # hybrid, instruct-2507, thinking-2507 or coder (qwen3f/data/chat/kinds.py). "": recognise it by the template stored
    # with the tokenizer; hybrid if there is none.
    config.chat_template = ""


def _chats(data: ConfigDict) -> None:
    """The training data; see qwen3f.data.chat.corpus."""
    # reasoning, reasoning-plain: generated problems, with and without their working; chats@DIR: files of messages; or a
    # data set's name (qwen3f.data.sources.adapters.registry), with @DIR for a local copy. Several with weights:
    # reasoning=0.7,reasoning-plain=0.3
    data.mixture = "reasoning"
    data.root = ""  # directory of the source, if the mixture is one source without @DIR
    data.kinds = ""  # kinds of generated problems, such as arithmetic,logic; "": all
    data.difficulties = ""  # difficulties of generated problems, such as 1,2; "": all
    data.problems = 32_768  # number of problems to generate, training and held-out together
    data.problem_seed = 0
    # last: one sample for each answer, with its prompt as inference renders it. all: one sample for a whole chat, with
    # all of its answers.
    data.turns = "last"
    data.switches = 0.0  # share of the samples that name their mode by /think or /no_think
    data.judge = ""  # keep only answers that this task calls right, such as reasoning; "": keep all
    # What to do with samples longer than seq_len: drop, error, or cut_end (cut after the last answer that fits).
    data.long_chats = "drop"
    data.on_bad_row = "error"  # a row that cannot be used: error, or skip (the skipped rows are counted)
    data.max_samples = 0  # use at most this many samples of each source; 0: all
    data.max_heldout = 1000  # use at most this many held-out samples of each source
    data.temperature = 0.0  # as in pretraining (_text above); 0: weights as written; 1: weight times size
    data.max_epochs = ""  # read a source at most this many times: 4, or reasoning=4; "": no limit


def reward_model_config(preset: str) -> ConfigDict:
    config = _preference_config(preset, "reward_model")
    config.model.scalar_head = True
    config.reward_model = ConfigDict()
    # The better score must lead by this times the pair's own margin: the difference of its ratings, or 1 without them.
    config.reward_model.margin = 0.0
    # Weight of (score of the better + score of the worse)² in the loss, which keeps scores near 0. Try 0.01.
    config.reward_model.centre = 0.0
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val_accuracy", "max"
    return config


def dpo_config(preset: str) -> ConfigDict:
    config = _preference_config(preset, "dpo")
    config.dpo = _dpo()
    # cached: compute the reference's log-probabilities once and store them in data.cache. live: keep the reference's
    # weights in memory beside the policy's.
    config.dpo.reference_log_probs = "cached"
    # Evaluations answer held-out questions of this task, greedily, and compare the answers with the reference's.
    config.eval.task = "reasoning"
    config.eval.questions = 0  # number of these questions; 0: none
    config.eval.thinking = True  # let the model think before it answers them
    config.eval.max_new_tokens = 256
    config.eval.cache_tokens = 65_536  # tokens of the KV cache for these, on each rank; 0: as many as fit, see Engine
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
    online.task = "reasoning"  # the task that gives the prompts
    online.thinking = True  # let the model think before it answers
    online.samples = 4  # answers to each prompt; the best and the worst become a pair
    online.temperature = 0.9
    online.max_new_tokens = 256  # a longer answer is cut off, and ranks below every answer that ended
    # task: right answers rank above wrong ones, by the task's judge. rule: right, then well formed, then short.
    # reward_model: by the scores of online.reward_model.
    online.judge = "task"
    online.reward_model = ""  # a workdir, its checkpoints/N or a Hugging Face directory
    # A step draws batches of prompts until it has fill * batch_size pairs, but at most online.rounds batches in all.
    online.fill = 0.5
    online.rounds = 8
    online.rows = 256  # answers that a rank generates at a time
    online.cache_tokens = 65_536  # tokens of the KV cache while generating, on each rank; 0: as many as fit, see Engine
    config.eval.questions = 128  # evaluations answer this many held-out questions, greedily; 0: none
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val_wins", "max"
    return config


def _dpo() -> ConfigDict:
    dpo = ConfigDict()
    # sigmoid, sigmoid_norm (log-ratios divided by the length), hinge, ipo, cdpo, robust, exo_pair, nca_pair, bco_pair,
    # sppo_hard, apo_zero, apo_down
    dpo.loss = "sigmoid"
    dpo.beta = 0.1  # larger values hold the policy closer to the reference
    dpo.label_smoothing = 0.0  # assumed share of pairs with the wrong order; for loss=cdpo, robust and exo_pair
    dpo.sft_weight = 0.0  # weight of the better answers' next-token loss, which is added
    # Mixture of experts: add the router losses, by model.router_aux_loss_coef and model.router_z_loss_coef.
    dpo.router_losses = False
    dpo.reference = ""  # a workdir, its checkpoints/N or a Hugging Face directory; "": init_from
    return dpo


def _preference_config(preset: str, stage: str) -> ConfigDict:
    config = run_config(preset, stage)
    _chat_template(config)
    _pairs(config.data)
    config.eval.max_rows = 256  # evaluate on this many held-out rows of each source; 0: all
    config.show_samples = 2  # print this many answers at the start; the two of a pair follow each other
    return config


def _pairs(data: ConfigDict) -> None:
    """The training data; see qwen3f.data.pairs.corpus."""
    # right-or-wrong, boxed-or-not, short-or-padded: answers to generated problems, where a rule decides which is
    # better; a name with -plain: answers without working. pairs@DIR: files of pairs of chats. Or the name of a
    # data set with @DIR. Several with weights, as here.
    data.mixture = "right-or-wrong=0.4,boxed-or-not=0.3,short-or-padded=0.3"
    data.root = ""  # directory of the source, if the mixture is one source without @DIR
    data.kinds = ""  # kinds of generated problems, such as arithmetic,logic; "": all
    data.difficulties = ""  # difficulties of generated problems, such as 1,2; "": all
    data.problems = 32_768  # number of problems to generate, training and held-out together
    data.problem_seed = 0
    data.long_pairs = "drop"  # what to do with pairs that do not fit into a row of seq_len: drop, or error
    data.on_bad_row = "error"  # a row that cannot be used: error, or skip (the skipped rows are counted)
    data.max_samples = 0  # use at most this many pairs of each source; 0: all
    data.max_heldout = 1000  # use at most this many held-out pairs of each source
    data.temperature = 0.0  # as in pretraining (_text above); 0: weights as written; 1: weight times size
    data.max_epochs = ""  # read a source at most this many times: 4, or pairs=4; "": no limit


def grpo_config(preset: str) -> ConfigDict:
    config = run_config(preset, "grpo")
    _chat_template(config)
    # reasoning, procedures, code, gsm8k[@DIR], math[@DIR]; visual, for a model with a vision tower on one device.
    # Several with weights: reasoning=0.7,code=0.3
    config.tasks = "reasoning"
    # NAME=WEIGHT,…: a reward of qwen3f/rl/rewards.py, your own module:function, or reward_model (the model that
    # judge.reward_model names)
    config.rewards = "correct=1"
    config.sandbox = "auto"  # for tasks=code: auto, bubblewrap, landlock; none: no sandbox (qwen3f/sandbox/tiers.py)
    config.batch_size = 16  # prompts of a step
    config.updates = 1  # split the completions of a step into this many parts, with one optimizer update for each
    config.microbatches = 1  # micro-batches of an update, at least; rollout.microbatch_rows decides how many there are
    data = config.data
    data.kinds = ""  # kinds of generated problems, such as arithmetic,logic; "": all
    data.difficulties = ""  # difficulties of generated problems, such as 1,2; "": all
    data.problems = 32_768  # number of problems to generate, training and held-out together
    data.problem_seed = 0
    data.max_samples = 0  # use at most this many questions of each task; 0: all
    _generated_pictures(data)  # for tasks=visual
    config.rollout = _rollout()
    config.advantages = ConfigDict()  # qwen3f/rl/advantages.py
    config.advantages.baseline = "mean"  # subtract the mean reward of the group, or (leave_one_out) of its others
    config.advantages.scale = "none"  # group or batch: divide by the standard deviation of its rewards; none: do not
    config.advantages.combine = "sum_then_normalize"  # for several rewards; or normalize_then_sum
    config.grpo = _grpo()
    config.judge = ConfigDict()
    config.judge.processes = 2  # judging processes on each rank
    config.judge.reward_model = ""  # a workdir, its checkpoints/N or a Hugging Face directory
    config.judge.deadline = 20.0  # seconds that one reward of one completion may take before it counts as failed
    config.samples = ConfigDict()
    config.samples.keep = 200  # keep the completions of this many steps in samples/, the last ones; 0: all
    config.samples.show = 3  # completions that TensorBoard gets at each logged step
    config.eval.questions = 256  # held-out questions of an evaluation, all tasks together; 0: none
    config.eval.max_new_tokens = 512
    config.eval.temperature = 0.0  # 0: greedy
    config.schedule.kind = "constant"
    config.schedule.warmup = 0.05
    config.checkpoint.best_metric, config.checkpoint.best_mode = "val_accuracy", "max"
    return config


def _rollout() -> ConfigDict:
    """How completions are sampled, and which of them are trained on; see qwen3f/rl/prepare.py."""
    rollout = ConfigDict()
    rollout.samples = 8  # completions of each prompt
    rollout.max_new_tokens = 512
    rollout.temperature = 1.0  # of sampling; the loss uses log-probabilities at this temperature too
    rollout.thinking = True  # let the model think before it answers
    rollout.rows = 256  # completions that a rank generates at a time
    rollout.cache_tokens = 131_072  # tokens of the KV cache while sampling, on each rank; 0: as many as fit, see Engine
    rollout.microbatch_rows = 1  # rows of seq_len in a micro-batch, on each rank
    # A prompt whose completions all get the same reward teaches nothing. A step may draw up to this many batches of
    # prompts to replace such prompts. 1: draw one batch and train on all of it.
    rollout.draws = 1
    rollout.mask_truncated = False  # leave completions that did not end out of the loss
    # Who computes the log-probabilities of the old policy. trainer: the trainer, in a pass of its own. sampler: the
    # generation engine. auto: the engine, if attention=invariant and the first step shows that both agree bit for bit;
    # else the trainer.
    rollout.old_logprobs = "auto"
    # Weights for the ratio of trainer to sampler probabilities, per token or per sequence: token_truncate and
    # sequence_truncate cap it at correction_high; token_mask and sequence_mask drop tokens outside low … high; or none.
    rollout.correction = "none"
    rollout.correction_low = 0.0  # lower bound, for the two masks only
    rollout.correction_high = 2.0
    rollout.top_entropy = 1.0  # train only on this share of the tokens, those with the highest entropy; 1: all
    return rollout


def _grpo() -> ConfigDict:
    """The loss; see qwen3f.rl.policy.GRPO."""
    grpo = ConfigDict()
    grpo.loss = "dapo"  # grpo, dr_grpo, dapo, bnpo, cispo, sapo, gspo, luspo or vespo
    grpo.clip_low = 0.2  # clip the ratio of new to old policy at 1 - clip_low
    grpo.clip_high = 0.28  # and at 1 + clip_high
    grpo.dual_clip = 0.0  # cap of the ratio where the advantage is negative, such as 3; 0: none
    grpo.cispo_cap = 5.0  # loss=cispo: largest weight of a token
    grpo.sapo_temperatures = (1.0, 1.05)  # loss=sapo: for positive advantages, and for the others
    grpo.kl_coef = 0.0  # weight of the KL to the weights of init_from; 0: no reference model
    grpo.kl = "k3"  # estimator of the KL: k1, k2 or k3
    grpo.kl_ratio = True  # multiply the KL estimate by the ratio of new to old policy
    # Mixture of experts: add the router losses, by model.router_aux_loss_coef and model.router_z_loss_coef.
    grpo.router_losses = False
    return grpo


def multimodal_config(preset: str) -> ConfigDict:
    config = run_config(preset, "multimodal")
    _chat_template(config)
    _pictures(config.data)
    config.eval.max_rows = 256  # measure loss and answers on this many held-out rows of each source; 0: all
    return config


def _generated_pictures(data: ConfigDict) -> None:
    """Generated pictures, and the size of any picture."""
    data.pictures = 16_384  # number of pictures to generate, training and held-out together
    data.picture_seed = 0
    data.min_side = 64  # shortest and longest side of a generated picture, in pixels
    data.max_side = 128
    data.picture_kinds = ""  # some of shapes,bar,line,pie,text; "": all
    data.min_pixels = 65_536  # every picture is scaled to have at least this many pixels,
    data.max_pixels = 16_777_216  # and at most this many


def _pictures(data: ConfigDict) -> None:
    """The training data; see qwen3f.data.multimodal.dataset."""
    # images, captions: questions about generated pictures, and descriptions of them. chats@DIR,
    # llava-instruct-150k@DIR: files. Or a text source of sft. Several with weights, which are shares of the rows:
    # images=0.5,captions=0.5
    data.mixture = "images"
    _generated_pictures(data)
    data.problems = 4_096  # number of problems to generate, if the mixture has generated problems
    data.patches = 16_384  # patches that a row can hold; a chat with more is left out
    data.images = 16  # pictures that a row can hold; a video counts as one
    data.turns = "last"  # last: one sample for each answer; all: one sample for a whole chat
    data.on_bad_row = "error"  # a row that cannot be used: error, or skip (the skipped rows are counted)
    data.max_samples = 0  # use at most this many samples of each source; 0: all
    data.max_heldout = 1000  # use at most this many held-out samples of each source
