"""Supervised fine-tuning: next-token prediction of the assistant's tokens, in packed chats.

The long-CoT cold start and the fusion of thinking modes (Qwen3 technical report, arXiv:2505.09388, §4.1 and §4.3) both
use this stage, with different data. The loss is the mean over the supervised tokens of the whole batch: all
micro-batches of all ranks.
"""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from qwen3f.data.chat.corpus import ChatCorpus, ChatDataConfig, generated_problems, prepare_chats
from qwen3f.data.chat.corpus import check as check_data
from qwen3f.data.chat.heldout import measured_rows
from qwen3f.data.chat.kinds import check_chosen, check_thinking
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.chat.report import render_samples
from qwen3f.data.loader import Indexed, Share, build_batch
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.eval.answers import AnswerOptions, answer_on_ranks, kept, mark, parse_modes, prompt_ids, shares
from qwen3f.eval.heldout import batches_of_one_shape
from qwen3f.infer.text_request import check_length
from qwen3f.params import Params
from qwen3f.tasks.registry import open_text_task
from qwen3f.tasks.task import Question, Task
from qwen3f.train.microbatches import evaluation_parts
from qwen3f.train.next_steps import ASK
from qwen3f.train.objective import NEXT_TOKEN, check_model
from qwen3f.train.outputs import make_eval_step
from qwen3f.train.restore import check_tokenizer, find_tokenizer
from qwen3f.train.setup import Setup, at_least
from qwen3f.train.stage import Evaluator, Interrupted, Run, Stage
from sharding.state import whole_params

_NEXT = (
    ASK,
    "--config experiments/rejection_sample.py --config.init_from={workdir} --config.out={workdir}-samples",
    "--config experiments/sft_fusion.py:{preset} --config.init_from={workdir} --workdir {workdir}-fusion",
)


def check(setup: Setup) -> None:
    """Raises UserError for settings in data, eval and show_samples that cannot run."""
    config = setup.config
    check_model(setup.model, NEXT_TOKEN)
    check_data(_data_config(setup))
    for key in ("eval.max_rows", "eval.questions", "show_samples"):
        at_least(config, key, 0)
    at_least(config, "eval.max_new_tokens", 1)
    modes = parse_modes(config.eval.modes)
    check_chosen(config.chat_template, [mode == "thinking" for mode in modes if _asks(setup)])
    if config.eval.task:
        open_text_task(config.eval.task, "--config.eval.task")


def make(run: Run) -> Stage:
    setup, config = run.setup, run.setup.config
    place = find_tokenizer(setup, run.workdir)
    if not place:
        raise UserError(
            "fine-tuning needs the tokenizer that the model was pretrained with: write --config.init_from=W, or "
            "--config.data.tokenizer=PATH"
        )
    tokenizer = load_tokenizer(place, config.chat_template)
    for mode in parse_modes(config.eval.modes) if _asks(setup) else ():
        check_thinking(kind_of(tokenizer), mode == "thinking")
    check_tokenizer(tokenizer, setup.model)
    corpus = prepare_chats(_data_config(setup), config.seq_len, tokenizer, run.progress)
    return Stage(
        tokenizer=tokenizer,
        dataset=corpus.train,
        check_covers=lambda examples: corpus.check_covers(examples, config.seed),
        objective=NEXT_TOKEN,
        evaluators={"val": _evaluator(run, corpus, tokenizer)},
        figures=corpus.train_metrics,
        lines=tuple(corpus.describe()),
        samples=_shown(setup, corpus, tokenizer),
        next=_NEXT,
    )


def _data_config(setup: Setup) -> ChatDataConfig:
    fields = {field.name for field in dataclasses.fields(ChatDataConfig)}
    return ChatDataConfig(**{key: value for key, value in setup.config.data.items() if key in fields})


def _asks(setup: Setup) -> bool:
    return bool(setup.config.eval.task and setup.config.eval.questions)


def _shown(setup: Setup, corpus: ChatCorpus, tokenizer: Tokenizer) -> tuple[str, ...]:
    """A few samples of the first rows, with the trained tokens marked."""
    count, seed = setup.config.show_samples, setup.config.seed
    rows = np.arange(min(count, setup.config.batch_size))
    if not len(rows):
        return ()
    batch = build_batch(corpus.train, 0, rows, seed, setup.model.vocab_size)
    return tuple(render_samples(batch, tokenizer, count))


def _evaluator(run: Run, corpus: ChatCorpus, tokenizer: Tokenizer) -> Evaluator:
    """Evaluates the loss on held-out chats ("loss", and "loss/NAME" if there are several sources) and the answers to
    held-out questions."""
    config, evaluate, asks = run.setup.config, make_heldout_loss(run, corpus.heldout), _asks(run.setup)
    questions = _questions(run.setup) if asks else (None, ())
    told = [question.prompt for question in questions[1]]
    for mode in parse_modes(config.eval.modes) if asks else ():
        longest = max(map(len, prompt_ids(tokenizer, told, mode == "thinking")))
        check_length(run.setup.model, longest, config.eval.max_new_tokens, "--config.eval.max_new_tokens")
    answers: list[dict[str, Any]] = []

    def validate(params: Params) -> dict[str, float]:
        values = evaluate(params)
        if not asks:
            return values
        answered, answers[:] = _answered(run, tokenizer, params, *questions)
        return {**values, **answered}

    def say(values: Mapping[str, float]) -> str:
        parts = [f"held-out loss {values['loss']:.4f}"] if "loss" in values else []
        parts += [f"{name} {100 * values[name]:.1f}%" for name in values if name.partition("/")[0] != "loss"]
        return ", ".join(parts)

    return Evaluator(config.eval.every, validate, say, lambda: answers)


def make_heldout_loss(run: Run, heldout: Mapping[str, Indexed]) -> Callable[[Params], dict[str, float]]:
    """evaluate(params) -> {"loss": nats per supervised token of the held-out split, "loss/NAME": the same by source}.

    "loss/NAME" is only there for several sources.
    """
    setup, config = run.setup, run.setup.config
    rows, axes = config.eval.batch_size, setup.layout.axes
    eval_step = make_eval_step(
        setup.model,
        compute_dtype=setup.compute_dtype,
        execution=setup.execution,
        microbatches=evaluation_parts(rows, setup.microbatches, axes),
        layout=setup.layout,
    )
    own = torch.from_numpy(Share(*axes.rows).rows(rows))

    def evaluate(params: Params) -> dict[str, float]:
        sums = {}
        for name, dataset in heldout.items():
            nats, weight = (torch.zeros((), dtype=torch.float64, device=setup.device) for _ in range(2))
            measured = measured_rows(dataset, config.eval.max_rows)
            for batch in batches_of_one_shape((dataset[i] for i in measured), rows):
                if run.stopping():
                    raise Interrupted
                found = eval_step(params, {key: x[own].to(setup.device) for key, x in batch.items()})
                nats, weight = nats + found[0], weight + found[1]
            sums[name] = nats.item(), weight.item()
        if not sums:
            return {}
        totals = [sum(pair[i] for pair in sums.values()) for i in (0, 1)]
        each = {f"loss/{name}": nats / max(weight, 1) for name, (nats, weight) in sums.items()}
        return {"loss": totals[0] / max(totals[1], 1), **(each if len(each) > 1 else {})}

    return evaluate


def _questions(setup: Setup) -> tuple[Task, tuple[Question, ...]]:
    """The task, and the first held-out questions of the kinds and difficulties that are trained on."""
    trained, default = generated_problems(_data_config(setup)), ReasoningSource()
    asked = dataclasses.replace(trained, seed=default.seed, num_problems=default.num_problems)
    task = open_text_task(setup.config.eval.task, "--config.eval.task", asked)
    questions = tuple(islice(task.questions("heldout"), setup.config.eval.questions))
    if not questions:
        raise UserError(f"--config.eval.task={task.name} has no held-out question; write --config.eval.questions=0")
    return task, questions


def _answered(
    run: Run, tokenizer: Tokenizer, params: Params, task: Task | None, questions: tuple[Question, ...]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(shares of right and well-formed answers, the answers as logger.answers takes them).

    Names of the second mode's shares end in "_MODE".
    """
    setup, config = run.setup, run.setup.config
    cfg = dataclasses.replace(setup.model, gradient_checkpointing="none")
    compute = whole_params(setup.model, params, setup.layout, setup.compute_dtype)
    options = AnswerOptions(config.eval.max_new_tokens)
    prompts = [question.prompt for question in questions]

    def go_on() -> None:
        if run.stopping():
            raise Interrupted

    values: dict[str, float] = {}
    lines: list[dict[str, Any]] = []
    for number, mode in enumerate(parse_modes(config.eval.modes)):
        thinking = mode == "thinking"
        given = answer_on_ranks(run.world, cfg, compute, tokenizer, prompts, thinking, options, go_on)
        marked = mark(task, questions, given, thinking)
        lines += kept(marked, mode)
        for name, value in shares(marked).items():
            what, slash, group = name.partition("/")
            values[name if number == 0 else f"{what}_{mode}{slash}{group}"] = value
    return values, lines
