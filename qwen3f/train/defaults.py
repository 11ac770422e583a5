"""The default configuration of any training run: the keys that `--config.…` may override, with their meaning.

What a stage has beside them is in qwen3f/stages/configs.py.
"""

from ml_collections import ConfigDict, FieldReference, config_dict

from qwen3f import presets


def run_config(preset: str, stage: str) -> ConfigDict:
    """Defaults for training `preset`; experiments change what differs. See qwen3f.train.setup for the rules."""
    config = ConfigDict()
    config.stage = stage  # a file of qwen3f/stages, or the import path of one's own
    config.model = _model(preset)
    config.mesh = ""  # axes and sizes, e.g. dp8,tp2,pp4; dp-1: as many as there are devices for; "": one device
    config.restarts = 0  # how often launch.py starts all its ranks again after one is lost, from the last checkpoint
    config.plan = False  # only say what the mesh would do: placements, memory, collectives, time; needs no device
    # The cards that a plan and microbatches=0 are for: h100 or h200 (qwen3f/plan/hardware.py), changes as h100,node=4.
    # auto: this machine's; for a plan without one h100.
    config.hardware = "auto"
    config.fsdp = ConfigDict()
    config.fsdp.enabled = True  # cut parameters and optimizer over the axes that cut the tokens, else replicate them
    config.fsdp.shard_size = 0  # ranks that a parameter is cut over, replicated over the others; 0: all of them
    config.fsdp.reduce = "compute"  # gradients are summed over ranks in the dtype of the forward pass, or in float32
    config.fsdp.reshard = True  # gather weights again where selective recomputation passes, instead of keeping them
    config.pipeline = ConfigDict()
    config.pipeline.schedule = "1f1b"  # 1f1b, interleaved, zero_bubble or zbv
    config.pipeline.stages = 1  # of a pipeline rank: 1 for 1f1b, 2 for zbv, any number for the others
    config.pipeline.layers = 0  # of each stage but the last, which has the head too and holds what is left; 0: equal
    config.device = "auto"  # cuda when there is one, else cpu
    config.dtype = "auto"  # of the forward and backward pass: bfloat16 on cuda, float32 on cpu; master weights: float32
    config.compile = "auto"  # off, block (one transformer block) or step (one graph); auto: block on cuda, off on cpu
    # auto, sdpa, flash or reference; invariant: a token gets the same bits in any batch, for RL (slow, uncompiled)
    config.attention = "auto"
    config.seed = 0
    config.steps = 10_000
    config.batch_size = 64  # rows of a step, over all devices
    # Parts that a step's batch is cut into, one after the other. 0: chosen (qwen3f/train/microbatches.py), the fewest
    # that fit the card, under pp those that keep its ranks at work.
    config.microbatches = 0
    config.seq_len = 4096
    config.nonfinite_skips = 0  # steps with a loss or gradient that is not finite to pass over, before one ends the run
    config.spike = ConfigDict()  # a loss far above those before: back to the last checkpoint, on behind the data since
    config.spike.threshold = 0.0  # robust deviations above the running median, such as 10; 0: no such check
    config.spike.window = 64  # losses that the median is of
    config.spike.rollbacks = 3  # in a run, before a spike ends it
    config.watchdog = 0.0  # seconds a step, with its evaluation and save, may take before the run ends with all stacks
    config.collective_timeout = 600.0  # seconds that ranks on CUDA wait for another one in a collective
    config.log_every = 10
    # A workdir, its checkpoints/N or a Hugging Face directory: its model (config.model but for what the command line
    # sets, see qwen3f/train/inherit.py), weights and tokenizer.
    config.init_from = ""
    config.resume = config_dict.placeholder(int)  # a step of this workdir to go back to, once; default: the last
    config.wandb = "off"  # off, offline or online
    config.report = True  # keep report.html in the workdir, written anew at evaluations and at the end
    config.data = _data()
    config.optimizer = _optimizer()
    config.schedule = _schedule()
    config.eval = _eval()
    config.checkpoint = _checkpoint()
    return config


def _model(preset: str) -> ConfigDict:
    """Of init_from's weights, where there are any, in place of the preset: see qwen3f/train/inherit.py."""
    # tuples and placeholders: lists and None can't be set on the command line
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in presets.get(preset).to_dict().items()}
    model = ConfigDict(values)
    if model.rope_scaling is None:
        model.rope_scaling = no_scaling()
    return model


def no_scaling() -> FieldReference:
    """None, in whose place the command line may set {'rope_type': 'yarn', …}."""
    return config_dict.placeholder(object)


def _data() -> ConfigDict:
    """What every stage's data has; the rest is in the stage's own keys."""
    data = ConfigDict()
    data.workers = 0  # processes that build batches or tokenise, beside the loader's thread
    data.cache = ""  # where tokenizers and tokens are kept; default $XDG_CACHE_HOME/qwen3f
    data.num_threads = 2  # that tokenise
    data.tokenizer = ""  # a sentencepiece .model or a directory with Qwen's; default: the run's own, else init_from's
    return data


def _optimizer() -> ConfigDict:
    """The update."""
    optimizer = ConfigDict()
    optimizer.kind = "adamw"  # adamw, or muon: Muon for matrices and an untied head, AdamW for the rest
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0  # 0: no clipping
    # PATTERN=FACTOR,…: what the learning rate of matching paths is multiplied by, the first that matches counts; 0
    # freezes them. E.g. model\.embed_tokens\..*=0,.*norm.*=0.1
    optimizer.rates = ""
    optimizer.momentum = 0.95  # muon only
    optimizer.update_rms = 0.2  # muon only: of an update, relative to the learning rate
    optimizer.iterations = 5  # muon only: Newton–Schulz, 1 … 20
    return optimizer


def _schedule() -> ConfigDict:
    """The learning rate over the run."""
    schedule = ConfigDict()
    schedule.kind = "cosine"  # cosine, wsd or constant
    schedule.peak_lr = 3e-4
    schedule.min_ratio = 0.1  # of peak_lr, where the decay ends
    schedule.warmup = 0.01  # below 1 a share of the steps, else a number of steps
    schedule.decay = 0.1  # wsd only; likewise
    schedule.decay_shape = "linear"  # wsd only: linear or cosine
    return schedule


def _eval() -> ConfigDict:
    """When the stage's evaluations run, and on how many rows at once."""
    evaluation = ConfigDict()
    evaluation.every = 500  # steps; 0: only at the end
    evaluation.batch_size = 16
    evaluation.benchmarks = ""  # asked too: reasoning, or of experiments/eval.py's; several with commas
    evaluation.benchmark_root = ""  # of their local copies, as data.root in experiments/eval.py
    evaluation.benchmark_questions = 128  # of each, at most, evenly from all
    evaluation.benchmark_prompt = "raw"  # or chat
    evaluation.benchmark_tokens = 0  # of an answer; 0: the benchmark's own number
    return evaluation


def _checkpoint() -> ConfigDict:
    """What is saved, and when."""
    checkpoint = ConfigDict()
    checkpoint.every = 1000  # steps; 0: only at the end
    checkpoint.keep = 2  # last ones kept; 0: all
    checkpoint.keep_every = 0  # those of steps that are a multiple of this are kept for good; 0: none
    checkpoint.keep_best = 0  # so many with the best best_metric are kept, of those at steps that measured it
    checkpoint.best_metric = "val_loss"
    checkpoint.best_mode = "min"  # or max
    # orbax, or dcp (torch.distributed.checkpoint; for trusted checkpoints only: a part of them is a pickle). Runs with
    # dcp open both.
    checkpoint.backend = "orbax"
    checkpoint.cast = False  # convert what was saved in another floating-point dtype than this run's
    checkpoint.timeout = 1800.0  # seconds that writing one may take before on_failure decides; 0: no limit
    checkpoint.asynchronous = True
    checkpoint.on_failure = "stop"  # when one can't be written (disk full, hung): stop, or go_on without it
    return checkpoint
