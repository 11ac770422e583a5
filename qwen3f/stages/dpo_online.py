"""Online DPO: the policy answers each prompt several times, a judge ranks the answers, and the best and the worst
become a training pair (Guo et al. 2024, arXiv:2402.04792).

The loss is that of `dpo`; the reference's weights stay in memory. A prompt whose answers the judge ranks equal teaches
nothing: it is left out and counted, and the step draws further prompts until it has enough pairs.

R rows of a step over all ranks · T places of a row
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen3f.data.chat.kinds import check_chosen, check_thinking
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.loader import Share
from qwen3f.data.packing.concat import IGNORED_TARGET, Example
from qwen3f.data.sampler import example_index
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.on_ranks import check_cache
from qwen3f.preference.corpus import open_tokenizer
from qwen3f.preference.judges import Judge, RewardModel, check_reward_model, rule_judge, task_judge
from qwen3f.preference.online_rows import NewPair, best_and_worst, pack
from qwen3f.preference.prompts import fitting, held_out, prompt_ids, task_of
from qwen3f.preference.reference import Live, check_reference, check_vocabulary, find_reference, microbatch_rows
from qwen3f.preference.sampling import Sampler, SamplerOptions
from qwen3f.preference.wins import Asked, Wins, quality
from qwen3f.stages.dpo import make_objective, read_hyper
from qwen3f.tasks.task import Question, Task
from qwen3f.train.next_steps import ASK, EXPORT
from qwen3f.train.objective import check_model
from qwen3f.train.readings import number
from qwen3f.train.setup import Setup, at_least
from qwen3f.train.stage import Batch, More, Run, Stage
from qwen3f.train.state import TrainState
from sharding.pipeline.cut import Pipeline


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Questions as a Loader's dataset. Its examples are placeholders: Rollouts.prepare makes the rows."""

    questions: tuple[Question, ...]

    def __len__(self) -> int:
        return len(self.questions)

    def order(self, places: np.ndarray, seed: int) -> np.ndarray:
        """The questions at `places` of the shuffled, endless order."""
        return example_index(places, len(self), seed)

    def __getitem__(self, i: int) -> Example:
        nothing = np.zeros(1, np.int64)
        return {"tokens": nothing, "targets": nothing + IGNORED_TARGET, "loss_weights": np.zeros(1, np.float32)}


def check(setup: Setup) -> None:
    """Raises UserError for settings in online, dpo, data and eval that cannot run."""
    config = setup.config
    check_model(setup.model, make_objective(read_hyper(config)))
    _task(setup)
    for key, low in (("samples", 2), ("max_new_tokens", 1), ("rounds", 1), ("rows", 1), ("cache_tokens", 0)):
        at_least(config, f"online.{key}", low)
    at_least(config, "eval.questions", 0)
    check_chosen(config.chat_template, [config.online.thinking], "--config.online.thinking")
    if not 0 < config.online.fill <= 1:
        raise UserError(f"--config.online.fill={config.online.fill}: write a share of batch_size above 0, at most 1")
    if config.online.judge == "reward_model":
        check_reward_model(config.online.reward_model, setup, "--config.online.reward_model")
    elif config.online.reward_model:
        raise UserError(
            f"--config.online.reward_model={config.online.reward_model}: --config.online.judge={config.online.judge} "
            "does not use it; write --config.online.judge=reward_model, or leave it out"
        )
    if config.dpo.reference:
        check_vocabulary(config.dpo.reference, setup)
    if 2 * config.online.max_new_tokens >= config.seq_len:
        raise UserError(
            f"--config.seq_len={config.seq_len} has no room for a prompt and two answers of "
            f"--config.online.max_new_tokens={config.online.max_new_tokens}: raise seq_len or lower max_new_tokens"
        )


def make(run: Run) -> Stage:
    setup, config = run.setup, run.setup.config
    if not (config.init_from or config.dpo.reference):
        raise UserError("online DPO holds the policy to the model that it starts from: write --config.init_from=W")
    tokenizer, task, online = open_tokenizer(run), _task(setup), config.online
    check_thinking(kind_of(tokenizer), online.thinking, "--config.online.thinking")
    questions, long = fitting(tokenizer, tuple(task.questions("train")), config.online.thinking, _room(setup))
    if not questions:
        raise UserError(f"--config.online.task={task.name}: none of {long} prompts fits; raise --config.seq_len")
    if online.cache_tokens < _room(setup) + online.max_new_tokens:  # else the cache holds the longest prompt that fits
        prompts = (prompt_ids(tokenizer, question, online.thinking) for question in questions)
        check_cache(prompts, online.max_new_tokens, online.cache_tokens, "--config.online.cache_tokens")
    left_out = f"; {long:,} are too long and left out" if long else ""
    return Stage(
        tokenizer=tokenizer,
        dataset=Prompts(questions),
        objective=make_objective(read_hyper(config)),
        lines=(f"data: {task.name}, {len(questions):,} prompts to answer{left_out}",),
        microbatch_rows=microbatch_rows(setup),
        complete=lambda stage: _complete(run, stage, tokenizer, task),
        next=(ASK, EXPORT),
    )


def _complete(run: Run, stage: Stage, tokenizer: Tokenizer, task: Task) -> Stage:
    """`stage` with the weights of the reference and of a reward model, and what needs them."""
    config, reference = run.setup.config, find_reference(run)
    live, memory = Live(run, reference), {"reference": reference.digest}
    online = config.online
    options = SamplerOptions(online.max_new_tokens, online.cache_tokens, "config.online.cache_tokens", online.rows)
    rollouts = Rollouts(
        run, stage.dataset, tokenizer, Sampler(run, run.setup.model, tokenizer, options), _judge(run, task), live
    )
    thinking, room = online.thinking, _room(run.setup)
    questions, lines = held_out(tokenizer, task, config.eval.questions, thinking, room)
    wins = Wins(run, tokenizer, Asked(task, questions, thinking, options), lambda: (live.cfg, live.params))
    return dataclasses.replace(
        stage,
        prepare=rollouts.prepare,
        evaluators={"val": wins.evaluator()} if questions else {},
        figures=lambda batch: rollouts.figures,
        lines=(*stage.lines, f"reference: {reference.place}, with its weights in memory", *lines),
        save=lambda: memory,
        load=lambda before: check_reference(before, memory, reference.place, "--config.dpo.reference"),
    )


def _judge(run: Run, task: Task) -> Judge:
    config = run.setup.config.online
    if config.judge == "reward_model":
        return RewardModel(run, config.reward_model, "--config.online.reward_model").judge
    if config.judge == "task":
        return task_judge(task)
    return rule_judge(lambda question, answer: quality(task, question, answer, config.thinking))


def _task(setup: Setup) -> Task:
    return task_of(setup.config.online.task, "--config.online.task", setup.config.data)


def _room(setup: Setup) -> int:
    """Length in tokens of the longest prompt such that two copies of it, each with an answer, fit into a row."""
    return setup.config.seq_len // 2 - setup.config.online.max_new_tokens + 1


class Rollouts:
    """Makes rows of pairs from prompts. Every rank finds the same pairs and takes its share of the rows.

    Attributes:
      figures: metrics of the last step. asked: number of prompts. ties: share of the prompts that gave no pair. reward:
        mean reward. ended: share of answers that ended. answer_tokens: mean length of an answer. rollout_seconds,
        reward_seconds: time for generating and for judging.
    """

    def __init__(
        self, run: Run, prompts: Prompts, tokenizer: Tokenizer, sampler: Sampler, judge: Judge, live: Live
    ) -> None:
        self._run, self._prompts, self._tokenizer = run, prompts, tokenizer
        self._sampler, self._judge, self._live = sampler, judge, live
        self.figures: dict[str, float] = {}

    def prepare(self, state: TrainState, batch: Batch, more: More) -> Batch:
        """The step's rows, from the prompts of `batch` and of further batches from `more`."""
        config, pairs, seen = self._run.setup.config, [], Counter()
        for round_ in range(config.online.rounds):
            if round_:
                batch = more()
            pairs += self._answered(state, batch, round_, seen)
            if len(pairs) >= config.online.fill * config.batch_size:
                break
        if not pairs:
            raise UserError(
                f"step {number(state.step) + 1}: --config.online.judge={config.online.judge} ranks all answers equal "
                f"for each of {seen['asked']} prompts; raise --config.online.samples or --config.online.temperature, "
                "or write another --config.online.judge"
            )
        self.figures = {
            "asked": float(seen["asked"]),
            "ties": 1 - len(pairs) / seen["asked"],
            "reward": seen["reward"] / seen["judged"],
            "ended": seen["ended"] / seen["answers"],
            "answer_tokens": seen["tokens"] / seen["answers"],
            "rollout_seconds": seen["rollout_seconds"],
            "reward_seconds": seen["reward_seconds"],
        }
        return self._live.add_to(self._rows(pairs))

    def _answered(self, state: TrainState, batch: Batch, round_: int, seen: Counter[str]) -> list[NewPair]:
        config = self._run.setup.config
        places = np.array(sorted({place for own in self._run.world.gather(batch["index"].tolist()) for place in own}))
        questions = [self._prompts.questions[i] for i in self._prompts.order(places, config.seed).tolist()]
        prompts = [prompt_ids(self._tokenizer, question, config.online.thinking) for question in questions]
        # The key depends on the step, so a resumed run samples the same answers.
        key = (config.seed, "online", number(state.step), round_)
        began = time.perf_counter()
        answers = self._sampler.answers(state.params, prompts, config.online.samples, config.online.temperature, *key)
        written = time.perf_counter()
        rewards = self._judge(questions, prompts, answers)
        seen.update(rollout_seconds=written - began, reward_seconds=time.perf_counter() - written)
        flat = [answer for own in answers for answer in own]
        seen.update(asked=len(prompts), answers=len(flat), ended=sum(a.ended for a in flat))
        told = [reward for own in rewards for reward in own if reward is not None]
        seen.update(tokens=sum(len(a.ids) for a in flat), reward=sum(told), judged=len(told))
        found = []
        for prompt, own, values in zip(prompts, answers, rewards, strict=True):
            if chosen := best_and_worst(own, values):
                found.append(NewPair(prompt, *(own[i].ids for i in chosen)))
        return found

    def _rows(self, pairs: Sequence[NewPair]) -> dict[str, Tensor]:
        """This rank's rows: whole micro-batches, the same number on all ranks, which the pipeline schedule can run."""
        setup = self._run.setup
        place, rows = setup.layout.axes.rows, microbatch_rows(setup)
        batch = pack(pairs, setup.config.seq_len, place[1] * rows, self._tokenizer.pad_id)
        parts = len(batch["tokens"]) // (place[1] * rows)
        enough = _runnable(setup.layout.pipeline, setup.layout.axes.pp.size, parts)
        if enough > parts:
            batch = pack(pairs, setup.config.seq_len, place[1] * rows * enough, self._tokenizer.pad_id)
        own = torch.from_numpy(Share(*place, enough).rows(len(batch["tokens"])))
        return {key: x[own].to(setup.device) for key, x in batch.items()}


def _runnable(pipeline: Pipeline, ranks: int, parts: int) -> int:
    """The smallest number of micro-batches, at least `parts`, that the pipeline schedule can run."""
    while ranks > 1:
        try:
            pipeline.check(ranks, parts)
            break
        except UserError:
            parts += 1
    return max(parts, ranks)
