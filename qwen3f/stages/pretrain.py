"""Pretraining: next-token prediction on packed text. Attention may see a shorter context at first (context_warmup)."""

import shlex

import torch
from torch import Tensor

from qwen3f.config import ModelConfig
from qwen3f.data.corpus import Corpus, DataConfig, gzip_bits_per_byte, prepare
from qwen3f.data.corpus import check as check_data
from qwen3f.data.loader import Share
from qwen3f.data.packing.concat import limit_context
from qwen3f.errors import UserError
from qwen3f.eval.heldout import HeldOut, evaluate
from qwen3f.infer.engine import Engine
from qwen3f.infer.sampling import SamplingParams
from qwen3f.params import Params
from qwen3f.train.logger import Logger
from qwen3f.train.microbatches import evaluation_parts
from qwen3f.train.objective import NEXT_TOKEN, check_model
from qwen3f.train.optimizer import AdamW
from qwen3f.train.outputs import make_eval_step
from qwen3f.train.readings import number
from qwen3f.train.restore import check_tokenizer, find_tokenizer
from qwen3f.train.schedule import Schedule
from qwen3f.train.setup import Setup, at_least, share_of_steps
from qwen3f.train.stage import Batch, Evaluator, Interrupted, More, Run, Stage
from qwen3f.train.state import TrainState
from qwen3f.train.step import StepOptions, TrainStep
from qwen3f.train.step import make_train_step as make_step
from sharding.state import local_shards, whole_params


def make_train_step(cfg: ModelConfig, optimizer: AdamW, schedule: Schedule, **options: object) -> TrainStep:
    """The training step, step(state, batch) -> (state, metrics), without a run. options: fields of StepOptions."""
    return make_step(cfg, NEXT_TOKEN, StepOptions(optimizer, schedule, **options))


def check(setup: Setup) -> None:
    """Raises UserError for settings in context_warmup, sample and data that cannot run."""
    config = setup.config
    check_model(setup.model, NEXT_TOKEN)
    for key in ("context_warmup.length", "sample.tokens", "eval.max_docs"):
        at_least(config, key, 0)
    if config.context_warmup.length and config.data.cross_documents:
        raise UserError("config.context_warmup.length has no effect with config.data.cross_documents=True; choose one")
    _warmup_steps(setup)
    check_data(_data_config(setup, ""))


def make(run: Run) -> Stage:
    setup, config = run.setup, run.setup.config
    corpus = prepare(_data_config(setup, find_tokenizer(setup, run.workdir)), config.seq_len, run.progress)
    check_tokenizer(corpus.tokenizer, setup.model)
    warmup = _warmup_steps(setup)

    def prepare_batch(state: TrainState, batch: Batch, more: More) -> Batch:
        if not warmup:
            return batch
        limited = limit_context(batch, config.context_warmup.length)["segments"]
        # torch.where chooses on the device: reading the step on the host would wait for the step before
        return {**batch, "segments": torch.where(local_shards(state.step) < warmup, limited, batch["segments"])}

    def finish(state: TrainState, logger: Logger) -> None:
        if config.eval.compare_gzip and run.world.main:
            bits = gzip_bits_per_byte(corpus.sources.values(), config.eval.max_docs)
            logger.write(f"gzip -9 on the same held-out text: {bits:.4f} bits a byte")
        if config.sample.tokens and config.sample.prompts:
            params = whole_params(setup.model, state.params, setup.layout, setup.compute_dtype)
            if run.world.main:
                _samples(setup, corpus, params, number(state.step), logger)

    return Stage(
        tokenizer=corpus.tokenizer,
        dataset=corpus.train,
        check_covers=lambda examples: corpus.check_covers(examples, config.seed),
        objective=NEXT_TOKEN,
        evaluators={"val": _evaluator(run, corpus)},
        prepare=prepare_batch,
        finish=finish,
        figures=corpus.train_metrics,
        lines=tuple(corpus.describe()),
        cross_documents=config.data.cross_documents,
        next=_next(setup),
    )


def _next(setup: Setup) -> tuple[str, ...]:
    """Commands to run next: generate, the next pretraining stage as far as the configuration shows it, fine-tuning."""
    config = setup.config
    prompt = shlex.quote(next(iter(config.sample.prompts), "The ")).replace("{", "{{").replace("}", "}}")
    stages = () if config.data.length_mix else ("s3",) if config.init_from else ("s2",)
    return (
        f"--config experiments/generate.py --config.init_from={{workdir}} --config.chat=False --config.prompt={prompt}",
        *(
            f"--config experiments/pretrain_{s}.py:{{preset}} --config.init_from={{workdir}} --workdir {{workdir}}-{s}"
            for s in stages
        ),
        "--config experiments/sft_cold_start.py:{preset} --config.init_from={workdir} --workdir {workdir}-sft",
    )


def _data_config(setup: Setup, tokenizer: str) -> DataConfig:
    options = setup.config.data.to_dict() | {"tokenizer": tokenizer}
    return DataConfig(vocab_size=setup.model.vocab_size, **options)


def _warmup_steps(setup: Setup) -> int:
    return share_of_steps(setup.config, "context_warmup.steps") if setup.config.context_warmup.length else 0


def _evaluator(run: Run, corpus: Corpus) -> Evaluator:
    """Evaluates loss and bits a byte on the held-out text."""
    setup, config = run.setup, run.setup.config
    eval_step = make_eval_step(
        setup.model,
        compute_dtype=setup.compute_dtype,
        execution=setup.execution,
        cross_documents=config.data.cross_documents,
        microbatches=evaluation_parts(config.eval.batch_size, setup.microbatches, setup.layout.axes),
        layout=setup.layout,
    )

    def step(params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        if run.stopping():
            raise Interrupted
        return eval_step(params, batch)

    options = HeldOut(
        seq_len=config.seq_len,
        batch_size=config.eval.batch_size,
        vocab_size=setup.model.vocab_size,
        max_docs=config.eval.max_docs,
        device=setup.device,
        share=Share(*setup.layout.axes.rows),
    )

    def say(values: dict[str, float]) -> str:
        return f"held-out loss {values['loss']:.4f}, {values['bpb']:.4f} bits a byte"

    return Evaluator(config.eval.every, lambda params: evaluate(step, params, corpus.heldout, options), say)


def _samples(setup: Setup, corpus: Corpus, params: Params, step: int, logger: Logger) -> None:
    """Continue each prompt and log the text. params: whole tensors, not shards."""
    options, tokenizer = setup.config.sample, corpus.tokenizer
    prompts = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in options.prompts]
    room = sum(len(ids) + options.tokens for ids in prompts) + 64 * len(prompts)
    engine = Engine(setup.model, params, max_tokens=room, seed=setup.config.seed, tokenizer=tokenizer)
    sampling = SamplingParams(temperature=options.temperature)
    for one in engine.generate(prompts, sampling, max_new_tokens=options.tokens, stop_ids=()):
        text = tokenizer.decode([*prompts[one.prompt_index], *one.ids])
        logger.text(step, f"sample/{one.prompt_index}", text)
        logger.write(f"--- sample {one.prompt_index}\n{text}")
