"""Reinforcement learning with verifiable rewards: GRPO and its relatives (DeepSeekMath, arXiv:2402.03300).

In a step the policy answers each prompt of a batch several times; rules judge the answers; and the policy is trained on
them, each with its advantage over the other answers to its prompt. Losses: qwen3f/rl/policy.py. How a batch is made:
qwen3f/rl/prepare.py.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qwen3f.data.chat.kinds import check_chosen, check_thinking
from qwen3f.data.chat.recognise import kind_of, opening
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.eval.answers import Answer, kept, mark, shares
from qwen3f.infer.on_ranks import check_cache
from qwen3f.infer.text_request import check_length
from qwen3f.params import Params
from qwen3f.preference.judges import RewardModel, check_reward_model
from qwen3f.preference.reference import check_reference, find_weights
from qwen3f.rl import prepare as R
from qwen3f.rl.correction import check_mode
from qwen3f.rl.judge import MODEL, Judge, parse_rewards
from qwen3f.rl.policy import GRPO, make_objective, policy_loss
from qwen3f.rl.questions import Questions, ask, encode, first_questions
from qwen3f.rl.rollout import RolloutOptions, Sampler
from qwen3f.rl.samples import write_samples
from qwen3f.rl.sight import Sight
from qwen3f.rl.tasks import find_sight, find_tasks
from qwen3f.sandbox.tiers import find_tier, preferred
from qwen3f.tasks.code import CodeTask
from qwen3f.tasks.task import Question, Task
from qwen3f.terminal import printable
from qwen3f.train.metrics import flops_per_token, peak_flops
from qwen3f.train.next_steps import ASK, ASK_PICTURE, EXPORT
from qwen3f.train.objective import check_model
from qwen3f.train.outputs import make_outputs
from qwen3f.train.readings import number
from qwen3f.train.restore import check_tokenizer, find_tokenizer, initial_weights
from qwen3f.train.setup import Setup
from qwen3f.train.stage import Batch, Evaluator, Interrupted, More, Run, Stage
from qwen3f.train.state import TrainState
from sharding.state import whole_params

__all__ = ["GRPO", "check", "make", "policy_loss"]

MODEL_FLAG = "--config.judge.reward_model"
APART = 2e-3  # rounding never reaches this KL between sampler and trainer; a larger one shows a wrong forward pass
SHOWN_REASONS = 3  # reasons of failed rewards in the line of a step


def check(setup: Setup) -> None:
    """Raises UserError for what cannot run."""
    config, rollout = setup.config, setup.config.rollout
    hyper = find_hyper(setup)
    check_model(setup.model, make_objective(hyper))
    if config.updates > config.batch_size:
        raise UserError(
            f"--config.updates={config.updates}: each needs a prompt of its own, and a step has "
            f"--config.batch_size={config.batch_size}; lower updates or raise batch_size"
        )
    if not 0 < rollout.top_entropy <= 1:
        raise UserError(f"--config.rollout.top_entropy={rollout.top_entropy} must lie in (0, 1], 1 for all tokens")
    check_mode(rollout.correction, rollout.correction_low, rollout.correction_high)
    if hyper.loss == "vespo" and (rollout.correction != "none" or rollout.top_entropy < 1):
        raise UserError("--config.grpo.loss=vespo is not linear in its advantages: write "
                        "--config.rollout.correction=none and --config.rollout.top_entropy=1")  # fmt: skip
    if rollout.old_logprobs == "sampler" and rollout.correction != "none":
        raise UserError(
            f"--config.rollout.old_logprobs=sampler and --config.rollout.correction={rollout.correction} would count "
            "the ratio of trainer and sampler twice; write --config.rollout.old_logprobs=trainer, or "
            "--config.rollout.correction=none"
        )
    if rollout.max_new_tokens >= config.seq_len:
        raise UserError(
            f"--config.rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in rows of "
            f"--config.seq_len={config.seq_len}; lower max_new_tokens or raise seq_len"
        )
    if not config.judge.deadline > 0:
        raise UserError(f"--config.judge.deadline={config.judge.deadline}: write seconds for a reward, such as 20")
    check_chosen(config.chat_template, [rollout.thinking], "--config.rollout.thinking")
    _check_pipeline(setup)
    _check_rewards(setup)
    find_tasks(setup)
    if not config.init_from:
        raise UserError(
            "reinforcement learning needs a model that can already answer: write --config.init_from=W, where W is a "
            "workdir of fine-tuning or a Hugging Face directory"
        )


def _check_pipeline(setup: Setup) -> None:
    """An update has a multiple of setup.microbatches, as many as the answers need. Interleaved schedules run some of
    these numbers only if all are multiples of pp (Pipeline.check)."""
    pp, parts, schedule = setup.layout.axes.pp.size, setup.microbatches, setup.layout.pipeline.schedule
    if pp > 1 and schedule in ("interleaved", "zero_bubble") and parts % pp:
        raise UserError(
            f"--config.microbatches={parts}: an update has a multiple of it, as many as its answers need, and "
            f"--config.pipeline.schedule={schedule} on pp{pp} runs only multiples of {pp}; write "
            f"--config.microbatches={-(-parts // pp) * pp}"
        )


def _check_rewards(setup: Setup) -> None:
    config = setup.config
    if MODEL in parse_rewards(config.rewards):
        check_reward_model(config.judge.reward_model, setup, MODEL_FLAG)
    elif config.judge.reward_model:
        raise UserError(
            f"{MODEL_FLAG}={config.judge.reward_model}: --config.rewards does not use it; write "
            f"--config.rewards=…,{MODEL}=1, or leave {MODEL_FLAG} out"
        )


def find_hyper(setup: Setup) -> GRPO:
    """The loss that config.grpo describes. Raises UserError as GRPO does."""
    fields = setup.config.grpo.to_dict()
    fields["sapo_temperatures"] = tuple(fields["sapo_temperatures"])
    return GRPO(**fields, longest=setup.config.rollout.max_new_tokens)


def make(run: Run) -> Stage:
    setup, config = run.setup, run.setup.config
    tokenizer = load_tokenizer(find_tokenizer(setup, run.workdir), config.chat_template)
    check_tokenizer(tokenizer, setup.model)
    rollout = config.rollout
    check_thinking(kind_of(tokenizer), rollout.thinking, "--config.rollout.thinking")
    tasks = find_tasks(setup)
    if any(isinstance(task, CodeTask) for _, task, _ in tasks):
        find_tier(config.sandbox)
    longest = min(config.seq_len, setup.model.max_position_embeddings) - rollout.max_new_tokens
    sight = find_sight(setup, tasks)
    questions = ask(tasks, tokenizer, rollout.thinking, longest, config.data.max_samples, sight)
    prompts = (one.ids for one in questions.asked)
    check_cache(prompts, rollout.max_new_tokens, rollout.cache_tokens, "--config.rollout.cache_tokens")
    sampling = RolloutOptions(
        rollout.samples, rollout.max_new_tokens, rollout.temperature, rollout.rows, config.seed, rollout.cache_tokens
    )
    by_rule = parse_rewards(config.rewards)
    of_model = by_rule.pop(MODEL, None)
    tools = R.Tools(
        Sampler(setup.model, tokenizer, setup.execution, run.world, sampling),
        Judge(by_rule, config.judge.processes, config.judge.deadline),
        tokenizer,
        run.world,
        setup.layout.axes,
    )  # fmt: skip
    options = _options(setup, tokenizer, sight)
    steps = Steps(run, tools, questions, options)
    hyper = find_hyper(setup)

    def complete(stage: Stage) -> Stage:
        if of_model is not None:
            steps.ask_model(R.ModelReward(of_model, RewardModel(run, config.judge.reward_model, MODEL_FLAG).scores))
        return _with_memory(run, stage) if hyper.kl_coef else stage

    return Stage(
        tokenizer=tokenizer,
        dataset=questions.order,
        objective=make_objective(hyper, num_ids=tokenizer.vocab_size),
        evaluators={"val": _evaluator(run, tools, tasks, options)} if config.eval.questions else {},
        prepare=steps,
        finish=lambda state, logger: tools.judge.close(),
        figures=steps.figures,
        texts=steps.texts,
        lines=tuple(_lines(setup, hyper, questions)),
        updates=config.updates,
        microbatch_rows=rollout.microbatch_rows,
        complete=complete,
        next=(ASK_PICTURE if options.sight else ASK, EXPORT),
    )


def _with_memory(run: Run, stage: Stage) -> Stage:
    """`stage`, which stores a digest of the KL reference's weights in checkpoints and checks it on resume."""
    place, digest = find_weights(run, run.setup.config.init_from, "config.init_from")
    memory = {"reference": digest}
    return dataclasses.replace(
        stage,
        save=lambda: memory,
        load=lambda before: check_reference(before, memory, place, "--config.init_from"),
    )


def _options(setup: Setup, tokenizer: Tokenizer, sight: Sight | None) -> R.Options:
    config, rollout = setup.config, setup.config.rollout
    return R.Options(
        **config.advantages.to_dict(),
        draws=rollout.draws,
        mask_truncated=rollout.mask_truncated,
        correction=rollout.correction,
        low=rollout.correction_low,
        high=rollout.correction_high,
        top_entropy=rollout.top_entropy,
        trust_sampler=rollout.old_logprobs == "sampler",
        seq_len=config.seq_len,
        rows=rollout.microbatch_rows,
        updates=config.updates,
        least_parts=setup.microbatches,
        thinking=rollout.thinking,
        begun=opening(tokenizer),
        sight=sight,
    )


def _lines(setup: Setup, hyper: GRPO, questions: Questions) -> list[str]:
    config = setup.config
    out = [f"questions: {len(questions.asked):,} to train on, of {config.tasks}; rewards: {config.rewards}"]
    if questions.too_long:
        out.append(f"{questions.too_long:,} questions were left out: their prompts leave no room for a completion")
    if config.rollout.samples == 1:
        out.append(
            "--config.rollout.samples=1: a completion has no others to be compared with, so every advantage is 0"
        )
    if hyper.loss == "bnpo":
        out.append("--config.grpo.loss=bnpo: here the mean is over the whole update, so it equals dapo")
    return out


class Steps:
    """Stage.prepare: makes the batch of each step. Keeps the metrics of the steps since they were last read."""

    def __init__(self, run: Run, tools: R.Tools, questions: Questions, options: R.Options) -> None:
        setup = run.setup
        self._run, self._tools, self._questions, self._options = run, tools, questions, options
        fields = self._fields = {
            "compute_dtype": setup.compute_dtype,
            "layout": setup.layout,
            "num_ids": tools.tokenizer.vocab_size,
        }
        entropy = make_outputs(setup.model, setup.execution, output="entropy", **fields)
        self._log_probs = R.LogProbs(
            make_outputs(setup.model, setup.execution, **fields),
            self._reference() if setup.config.grpo.kl_coef else None,
            entropy if options.top_entropy < 1 else None,
        )
        self._history: list[dict[str, float]] = []
        self._shown: list[str] = []
        self._first = True
        self._tokens, self._began, self._prepared = 0, 0.0, 0.0

    def __call__(self, state: TrainState, batch: Batch, more: More) -> Batch:
        """The step's batch. Raises UserError if no completion could be judged."""
        setup, given = self._run.setup, 1
        self._began = time.perf_counter()

        def draw_more() -> Batch:
            nonlocal given
            given += 1
            return more()

        self._tools.sampler.update(whole_params(setup.model, state.params, setup.layout, setup.compute_dtype))
        with preferred(setup.config.sandbox):
            drawn = R.draw(batch, draw_more, self._questions.asked, self._tools, self._options)
        temperature = setup.config.rollout.temperature
        pad = self._tools.tokenizer.pad_id
        rows = R.make_rows(drawn.trained, pad, setup.layout.axes, self._options, temperature)
        rows = {key: value.to(setup.device) for key, value in rows.items()}
        gaps = R.compare(rows, state.params, self._log_probs, self._tools, self._options)
        if self._first:
            self._agree(number(state.step) + 1, gaps)
        step = number(state.step) + 1
        if gaps.get("sampler_kl", 0.0) > APART and self._run.world.main:
            kl, gap = gaps["sampler_kl"], gaps["sampler_gap"]
            words = f"sampler and trainer disagree: KL {kl:.2g} (bf16 has about 1e-4), {gap:.3g} at the worst token"
            print(f"step {step}: {words}; the policy did not sample all answers", file=sys.stderr, flush=True)
        self._record(step, drawn, gaps, rows)
        consumed = torch.tensor(given * setup.config.batch_size, dtype=torch.int64, device=setup.device)
        self._prepared = time.perf_counter()
        return {**rows, "consumed": consumed}

    def ask_model(self, model: R.ModelReward) -> None:
        """From now on, use the scores of `model` as a reward."""
        self._tools = dataclasses.replace(self._tools, model=model)

    def figures(self, batch: Batch) -> dict[str, float]:
        """Means over the steps since the last call."""
        now, history, self._history = time.perf_counter(), self._history, []
        if not history:
            return {}
        setup = self._run.setup
        names = {name: [one[name] for one in history if name in one] for one in history for name in one}
        means = {name: sum(values) / len(values) for name, values in names.items()}
        speed = self._tokens / (now - self._began)  # of the last step, counting the tokens that it trained on
        flops = flops_per_token(setup.model, setup.config.seq_len)
        peak = peak_flops(setup.device) * self._run.world.size
        update = now - self._prepared
        of_update = self._tokens / update
        return {
            **means,
            "tokens_per_sec": speed,
            "mfu": speed * flops / peak,
            "update_seconds": update,
            "update_tokens_per_sec": of_update,
        }

    def texts(self) -> list[str]:
        return self._shown

    def _record(self, step: int, drawn: R.Drawn, gaps: dict[str, float], rows: Batch) -> None:
        config, world = self._run.setup.config, self._run.world
        ranks = self._run.setup.layout.axes.rows[1]
        real = world.gather((rows["segments"] != 0).sum().item())
        self._tokens = sum(real) * ranks // world.size  # world.size / ranks ranks hold the same rows
        padding = 1 - self._tokens / (rows["segments"].numel() * ranks)
        self._history.append({**R.figures(drawn), **gaps, "padding": padding})
        if not world.main:
            return
        kept = R.lines(step, drawn)
        write_samples(self._run.workdir, step, kept, config.samples.keep)
        self._shown = [_shown(line) for line in kept[: config.samples.show]]
        if drawn.failures:
            worst = sorted(drawn.failures.items(), key=lambda pair: -pair[1])[:SHOWN_REASONS]
            reasons = "; ".join(f"{printable(why)} ({n} times)" for why, n in worst)
            print(f"step {step}: rewards failed: {reasons}", flush=True)

    def _agree(self, step: int, gaps: dict[str, float]) -> None:
        """After a process's first comparison: print how closely sampler and trainer agree, and decide whose
        log-probabilities are those of the old policy from now on."""
        setup, self._first = self._run.setup, False
        gap = gaps.get("sampler_gap")
        corrected = self._options.correction != "none"  # the correction already applies the ratio of the two
        if setup.config.rollout.old_logprobs == "auto" and setup.execution.invariant and gap == 0 and not corrected:
            self._options = dataclasses.replace(self._options, trust_sampler=True)
        whose = "sampler" if self._options.trust_sampler else "trainer"
        if self._run.world.main:
            same = "were not compared" if gap is None else f"agree {'bit for bit' if gap == 0 else f'to {gap:.3g}'}"
            print(f"step {step}: log-probs of sampler and trainer {same}; old_logprobs: the {whose}'s", flush=True)

    def _reference(self) -> Callable[[Batch], Tensor]:
        """log_probs(rows) of the frozen policy that the run began with. Its weights stay in memory; the state's are
        never used, so a resumed run has the same reference."""
        run, setup = self._run, self._run.setup
        outputs = make_outputs(setup.model, setup.execution, **self._fields)
        weights = {k: p.to(setup.compute_dtype) for k, p in initial_weights(setup, run.world).items()}
        return lambda rows: outputs(weights, rows)


def _shown(line: Mapping[str, object]) -> str:
    parts = ", ".join(f"{name} {value}" for name, value in line["rewards"].items())
    return f"{line['prompt']}\n---\n{line['text']}\n--- {parts}; advantage {line['advantage']:.3f}"


def _evaluator(run: Run, tools: R.Tools, tasks: list[tuple[str, Task, float]], options: R.Options) -> Evaluator:
    """Evaluates "accuracy" and "well_formed" on held-out answers; for several tasks also "accuracy/TASK" for each."""
    setup, config = run.setup, run.setup.config
    asked: list[tuple[str, Task, tuple[Question, ...]]] = [
        (name, task, first_questions(task, "heldout", max(1, config.eval.questions // len(tasks))))
        for name, task, _ in tasks
    ]
    thinking, begun, sight = options.thinking, options.begun, options.sight
    lines: list[dict[str, Any]] = []
    every, new_tokens = [question for *_, questions in asked for question in questions], config.eval.max_new_tokens
    ids = [encode(tools.tokenizer, question, thinking, sight) for question in every]
    check_length(setup.model, max(map(len, ids)), new_tokens, "--config.eval.max_new_tokens")
    check_cache(ids, new_tokens, config.rollout.cache_tokens, "--config.rollout.cache_tokens")
    shown = None if sight is None else [sight.look(question.images) for question in every]

    def validate(params: Params) -> dict[str, float]:
        if run.stopping():
            raise Interrupted
        tools.sampler.update(whole_params(setup.model, params, setup.layout, setup.compute_dtype))
        given = tools.sampler.answers(ids, config.eval.temperature, new_tokens, shown)
        texts = [begun + tools.tokenizer.decode(list(one.ids[:-1] if one.ended else one.ids)) for one in given]
        answers = [Answer(text, one.ended) for text, one in zip(texts, given)]
        with preferred(config.sandbox):
            found, lines[:] = _marks(asked, answers, thinking) if run.world.main else ({}, [])
        return run.world.first(found if run.world.main else None)

    def say(values: Mapping[str, float]) -> str:
        return "held-out " + ", ".join(f"{name} {100 * value:.1f}%" for name, value in values.items())

    return Evaluator(config.eval.every, validate, say, lambda: lines)


def _marks(
    asked: list[tuple[str, Task, tuple[Question, ...]]], answers: list[Answer], thinking: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(metrics to log, the answers as logger.answers takes them)."""
    sums, place, each = dict[str, list[float]](), 0, dict[str, float]()
    lines: list[dict[str, Any]] = []
    for name, task, questions in asked:
        marked = mark(task, questions, answers[place : place + len(questions)], thinking)
        place += len(questions)
        lines += kept(marked, "thinking" if thinking else "plain")
        for key, value in shares(marked).items():
            what, _, group = key.partition("/")
            if not group:
                sums.setdefault(key, []).append(value)
            if len(asked) > 1 and not group:
                each[f"{what}/{name.partition('@')[0]}"] = value
            elif group and len(asked) == 1:
                each[key] = value
    return {name: sum(values) / len(values) for name, values in sums.items()} | each, lines
