"""The default configuration of any training run: the keys that `--config.…` may override, with their meaning.

Keys that only some stages have are in qwen3f/stages/configs.py.
"""

from ml_collections import ConfigDict, FieldReference, config_dict

from qwen3f import presets


def run_config(preset: str, stage: str) -> ConfigDict:
    """Defaults for training `preset`; experiments override some of them. qwen3f.train.setup checks the values."""
    config = ConfigDict()
    config.stage = stage  # a file of qwen3f/stages, or the import path of your own module
    config.model = _model(preset)
    config.mesh = ""  # axes and sizes, e.g. dp8,tp2,pp4; the size -1 (dp-1) takes all remaining devices; "": one device
    config.restarts = 0  # how often launch.py restarts all its ranks, from the last checkpoint, after a rank is lost
    config.plan = False  # do not train: print the mesh's placements, memory, collectives and time; needs no device
    # The card that config.plan and config.microbatches=0 calculate for: h100 or h200 (qwen3f/plan/hardware.py), with
    # changed numbers as in h100,node=4. auto: the card of this machine; a plan on a machine without one takes h100.
    config.hardware = "auto"
    config.fsdp = ConfigDict()
    config.fsdp.enabled = True  # shard parameters and optimizer state over dp, ep and cp; False: replicate them
    config.fsdp.shard_size = 0  # shard each parameter over this many ranks and replicate beyond; 0: all of dp, ep, cp
    config.fsdp.reduce = "compute"  # dtype in which gradients are summed over ranks: compute (config.dtype) or float32
    config.fsdp.reshard = True  # selective recomputation: gather weights again in the backward pass; False: keep them
    config.pipeline = ConfigDict()
    config.pipeline.schedule = "1f1b"  # 1f1b, interleaved, zero_bubble or zbv
    config.pipeline.stages = 1  # stages per rank of pp: 1 for 1f1b, 2 for zbv, any number for the others
    config.pipeline.layers = 0  # layers of every stage but the last, which holds the rest and the head; 0: equal stages
    config.device = "auto"  # auto, cpu or cuda; auto: cuda if there is a card
    config.dtype = "auto"  # dtype of forward and backward pass; auto: bfloat16 on cuda, float32 on cpu
    config.compile = "auto"  # off, block (one transformer block) or step (one graph); auto: block on cuda, off on cpu
    # auto, sdpa, flash or reference. invariant: a token's result does not depend on the rest of the batch, bit for bit;
    # for RL (slow, uncompiled).
    config.attention = "auto"
    config.seed = 0
    config.steps = 10_000
    config.batch_size = 64  # rows per step, over all devices
    # Equal parts (micro-batches) of a step's batch, which run one after the other. 0: the fewest that fit the card's
    # memory; with pp at least four per rank of pp, if there are enough rows (qwen3f/train/microbatches.py).
    config.microbatches = 0
    config.seq_len = 4096  # tokens per row
    config.nonfinite_skips = 0  # skip the updates of this many steps whose loss or gradient is not finite; then stop
    # A loss spike sends the run back to the last checkpoint; it then skips the data until after the spike.
    config.spike = ConfigDict()
    config.spike.threshold = 0.0  # a loss this many robust deviations above the running median is a spike; 0: no check
    config.spike.window = 64  # number of last losses that the median is computed from
    config.spike.rollbacks = 3  # the run may go back this often; the next spike ends it
    # If a step with its evaluation and save takes more seconds, print all stacks and end the run; 0: off.
    config.watchdog = 0.0
    config.collective_timeout = 600.0  # seconds that a rank on CUDA waits for the others in a collective
    config.log_every = 10  # steps
    # Take model, weights and tokenizer from here: a workdir, its checkpoints/N, or a Hugging Face directory. Its model
    # replaces config.model, except for keys set on the command line (qwen3f/train/inherit.py).
    config.init_from = ""
    config.resume = config_dict.placeholder(int)  # go back to this step of the workdir, once; default: the last one
    config.wandb = "off"  # off, offline or online
    config.report = True  # write report.html in the workdir, updated at evaluations and at the end
    config.data = _data()
    config.optimizer = _optimizer()
    config.schedule = _schedule()
    config.eval = _eval()
    config.checkpoint = _checkpoint()
    return config


def _model(preset: str) -> ConfigDict:
    """The preset's model. With config.init_from, the model of those weights replaces it (qwen3f/train/inherit.py)."""
    # tuples and placeholders, because lists and None can't be set on the command line
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in presets.get(preset).to_dict().items()}
    model = ConfigDict(values)
    if model.rope_scaling is None:
        model.rope_scaling = no_scaling()
    return model


def no_scaling() -> FieldReference:
    """A placeholder with the value None, so that the command line can set a dict such as {'rope_type': 'yarn', …}."""
    return config_dict.placeholder(object)


def _data() -> ConfigDict:
    """The data keys that every stage has; a stage adds its own."""
    data = ConfigDict()
    data.workers = 0  # additional processes that build batches or tokenise; 0: threads of this process do it
    data.cache = ""  # directory for tokenizers and tokenised text; default $XDG_CACHE_HOME/qwen3f
    data.num_threads = 2  # threads that tokenise, in each process
    # A sentencepiece .model, or a directory with Qwen's tokenizer. Default: the one in the workdir, else init_from's.
    # Without either, pretrain and multimodal train one on the data; the other stages need one.
    data.tokenizer = ""
    return data


def _optimizer() -> ConfigDict:
    """The optimizer."""
    optimizer = ConfigDict()
    optimizer.kind = "adamw"  # adamw, or muon: Muon for matrices and an untied head, AdamW for the rest
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0  # scale gradients down to this global norm; 0: no clipping
    # PATTERN=FACTOR,…: multiplies the learning rate of parameters whose whole path matches the regular expression. The
    # first match counts; 0 freezes the parameter. E.g. model\.embed_tokens\..*=0,.*norm.*=0.1
    optimizer.rates = ""
    optimizer.momentum = 0.95  # muon only
    optimizer.update_rms = 0.2  # muon only: root mean square of an update, relative to the learning rate
    optimizer.iterations = 5  # muon only: Newton–Schulz iterations, 1 to 20
    return optimizer


def _schedule() -> ConfigDict:
    """The learning rate over the run."""
    schedule = ConfigDict()
    schedule.kind = "cosine"  # cosine, wsd or constant
    schedule.peak_lr = 3e-4
    schedule.min_ratio = 0.1  # the decay ends at min_ratio · peak_lr
    schedule.warmup = 0.01  # below 1: share of config.steps; else: number of steps
    schedule.decay = 0.1  # wsd only: length of the decay at the end; share or number, as warmup
    schedule.decay_shape = "linear"  # wsd only: linear or cosine
    return schedule


def _eval() -> ConfigDict:
    """When evaluations run, and on what."""
    evaluation = ConfigDict()
    evaluation.every = 500  # steps; 0: only at the end
    evaluation.batch_size = 16  # rows per evaluation batch, over all devices
    evaluation.benchmarks = ""  # benchmarks at evaluations: reasoning, or names as in experiments/eval.py; several: a,b
    evaluation.benchmark_root = ""  # directory of their local copies, as data.root in experiments/eval.py
    evaluation.benchmark_questions = 128  # at most this many questions per benchmark, spread evenly over all
    evaluation.benchmark_prompt = "raw"  # raw or chat
    evaluation.benchmark_tokens = 0  # maximum tokens per answer; 0: the benchmark's own number
    return evaluation


def _checkpoint() -> ConfigDict:
    """When checkpoints are saved, and which are kept."""
    checkpoint = ConfigDict()
    checkpoint.every = 1000  # steps; 0: only at the end
    checkpoint.keep = 2  # keep this many of the latest checkpoints; 0: keep all
    checkpoint.keep_every = 0  # also keep the checkpoints of steps that are a multiple of this; 0: none
    checkpoint.keep_best = 0  # also keep this many with the best best_metric, among the steps that measured it
    checkpoint.best_metric = "val_loss"  # a name in metrics.jsonl
    checkpoint.best_mode = "min"  # min: a lower metric is better; max: a higher one
    # orbax, or dcp (torch.distributed.checkpoint). dcp checkpoints contain a pickle, which can run code: open only
    # those that you trust. A run with dcp can read both formats.
    checkpoint.backend = "orbax"
    checkpoint.cast = False  # allow resuming from another floating-point dtype: convert the tensors
    checkpoint.timeout = 1800.0  # seconds that writing a checkpoint may take; then on_failure applies; 0: no limit
    checkpoint.asynchronous = True  # write in the background while training continues
    checkpoint.on_failure = "stop"  # if a checkpoint can't be written (disk full, hung): stop, or go_on without it
    return checkpoint
