"""Makes a step's batch from prompts: completions, rewards, advantages, rows, and log-probs of old and reference policy.

All ranks have all completions and make the same decisions; at the end each takes its own share of the packed rows.

N prompts · G completions of each · R rows of this rank · T places
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.pictures import Pictures
from qwen3f.params import EMBED, Params
from qwen3f.processes.world import World
from qwen3f.rl.advantages import combine_rewards, tells_nothing
from qwen3f.rl.correction import entropy_threshold, high_entropy, importance_weights, sampler_kl
from qwen3f.rl.judge import MODEL, Judge, Judged
from qwen3f.rl.packing import Document, own_rows, pack_updates
from qwen3f.rl.questions import Asked
from qwen3f.rl.rewards import HIGHEST, Sample
from qwen3f.rl.rollout import Rollout, Sampler
from qwen3f.rl.sight import Sight
from qwen3f.train.stage import Batch, More
from sharding.axes import Axes

Outputs = Callable[[Params, Batch], Tensor]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a step's batch.

    Attributes:
      baseline, scale, combine: as for advantages.combine_rewards.
      draws: batches of prompts that a step may draw, until it has as many groups with different rewards as a batch has
        prompts. Only these groups are trained on. 1: draw one batch and train on all of it.
      mask_truncated: leave completions that did not end out of the loss; their rewards still count in their group.
      correction, low, high: as for correction.importance_weights.
      top_entropy: train only on this share of the tokens, those with the highest entropy; 1: all.
      trust_sampler: take the sampler's log-probs as those of the old policy. The trainer's own are then not computed,
        unless something else needs them.
      seq_len: T. rows: rows of a micro-batch on a rank. updates: optimizer updates of a step. least_parts:
        micro-batches of an update, at least.
      thinking: whether the prompts let the model think. begun: the beginning of the answer that the prompts already
        hold, such as "<think>".
      sight: how images become patches; None for a model without images.
    """

    baseline: str
    scale: str
    combine: str
    draws: int
    mask_truncated: bool
    correction: str
    low: float
    high: float
    top_entropy: float
    trust_sampler: bool
    seq_len: int
    rows: int
    updates: int
    least_parts: int
    thinking: bool
    begun: str = ""
    sight: Sight | None = None


@dataclasses.dataclass
class Group:
    """A prompt with its completions.

    place: of the prompt in the data order. rewards: name -> a number for each completion. total, advantages: float64
    [G]. pictures: of the prompt.
    """

    place: int
    asked: Asked
    rollouts: list[Rollout]
    samples: list[Sample]
    rewards: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    total: Tensor | None = None
    advantages: Tensor | None = None
    pictures: Pictures | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The completions of a step.

    groups: all groups that were sampled. trained: the groups that the step trains on. draws: batches of prompts that
    were drawn. failures: reason -> number of completions. seconds: for sampling, and for judging.
    """

    groups: list[Group]
    trained: list[Group]
    draws: int
    failures: dict[str, int]
    seconds: tuple[float, float]


def draw(batch: Batch, more: More, asked: Sequence[Asked], tools: "Tools", options: Options) -> Drawn:
    """Samples and judges completions. Raises UserError if no completion of a batch could be judged."""
    groups: list[Group] = []
    seconds, failures = [0.0, 0.0], dict[str, int]()
    wanted, draws, kept = 0, 0, list[Group]()
    while True:
        draws += 1
        fresh = _asked(batch, asked, tools.world)
        wanted = wanted or len(fresh)
        began = time.perf_counter()
        _sample(fresh, tools, options)
        sampled = time.perf_counter()
        for why, count in _judge(fresh, tools).items():
            failures[why] = failures.get(why, 0) + count
        seconds[0] += sampled - began
        seconds[1] += time.perf_counter() - sampled
        groups += fresh
        _advantages(groups, tools.weights, options)
        kept = [group for group in groups if not tells_nothing(group.total[None]).item()]
        if len(kept) >= wanted or draws >= options.draws:
            break
        batch = more()
    trained = kept if options.draws > 1 and kept else groups
    return Drawn(groups, trained, draws, failures, (seconds[0], seconds[1]))


@dataclasses.dataclass(frozen=True)
class ModelReward:
    """The reward of a reward model. scores: scores documents of ids, each a prompt with its completion. All ranks pass
    the same documents and get all scores."""

    weight: float
    scores: Callable[[Sequence[Sequence[int]]], list[float]]


@dataclasses.dataclass(frozen=True)
class Tools:
    """Objects with side effects: the policy's sampler, the judge for this rank's share, the ranks, a reward model."""

    sampler: Sampler
    judge: Judge
    tokenizer: Tokenizer
    world: World
    axes: Axes
    model: ModelReward | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights of the rewards, in the order of Group.rewards."""
        return (*self.judge.weights, *((self.model.weight,) if self.model else ()))


def _asked(batch: Batch, asked: Sequence[Asked], world: World) -> list[Group]:
    """The groups of a batch of all ranks, sorted by place, without completions."""
    pairs = list(zip(batch["index"].tolist(), batch["question"].tolist()))
    everywhere = {place: number for told in world.gather(pairs) for place, number in told}
    return [Group(place, asked[number], [], []) for place, number in sorted(everywhere.items())]


def _sample(groups: list[Group], tools: Tools, options: Options) -> None:
    if options.sight is not None:
        for group in groups:
            group.pictures = options.sight.look(group.asked.question.images)
    prompts, places = [group.asked.ids for group in groups], [group.place for group in groups]
    rollouts = tools.sampler(prompts, places, [group.pictures for group in groups])
    for group, given in zip(groups, rollouts, strict=True):
        group.rollouts = given
        group.samples = [_seen(group.asked, one, tools, options) for one in given]


def _seen(asked: Asked, rollout: Rollout, tools: Tools, options: Options) -> Sample:
    ids = rollout.ids[:-1] if rollout.ended else rollout.ids
    return Sample(
        task=asked.name,
        prompt=asked.question.prompt,
        gold=asked.question.gold,
        text=options.begun + tools.tokenizer.decode(list(ids)),
        ended=rollout.ended,
        thinking=options.thinking,
        tokens=len(rollout.ids),
        longest=tools.sampler.options.max_new_tokens,
    )


def _judge(groups: list[Group], tools: Tools) -> dict[str, int]:
    """Sets the rewards of all groups; returns why rewards failed. Each rank judges its share. The reward model's reward
    comes last."""
    samples = [sample for group in groups for sample in group.samples]
    mine = range(tools.world.rank, len(samples), tools.world.size)
    found = tools.judge([samples[i] for i in mine])
    told = tools.world.gather([found.values, found.failures])
    values = {name: [0.0] * len(samples) for name in tools.judge.names}
    failures: dict[str, int] = {}
    for rank, (theirs, why) in enumerate(told):
        for name in tools.judge.names:
            values[name][rank :: tools.world.size] = theirs[name]
        for reason, count in why.items():
            failures[reason] = failures.get(reason, 0) + count
    if tools.model is not None:
        values[MODEL] = tools.model.scores([[*g.asked.ids, *one.ids] for g in groups for one in g.rollouts])
    _check_some(Judged(values, failures), len(samples))
    place = 0
    for group in groups:
        size = len(group.samples)
        group.rewards = {name: values[name][place : place + size] for name in values}
        place += size
    return failures


def _check_some(found: Judged, samples: int) -> None:
    unjudged = np.isnan(np.array(list(found.values.values()))).any(0)
    if unjudged.all():
        why = "; ".join(f"{reason} ({count} times)" for reason, count in sorted(found.failures.items())[:3])
        raise UserError(
            f"none of {samples} completions could be judged, so there is nothing to learn from: {why}. A reward of "
            "--config.rewards takes a Sample and returns a number, or None where it cannot judge"
        )


def _advantages(groups: list[Group], weights: Sequence[float], options: Options) -> None:
    """Sets the advantages of all groups at once, since scale="batch" needs them all."""
    names = list(groups[0].rewards)
    rewards = torch.tensor([[group.rewards[name] for group in groups] for name in names], dtype=torch.float64)
    total, advantages = combine_rewards(rewards, weights, options.combine, options.baseline, options.scale)
    for group, own, advantage in zip(groups, total, advantages):
        group.total, group.advantages = own, advantage


# -- rows --------------------------------------------------------------------------------------------------------------


def documents(groups: Sequence[Group], mask_truncated: bool) -> list[list[Document]]:
    """The completions of each group as documents, in order."""
    return [
        [
            Document(group.asked.ids, one.ids, one.logprobs, advantage, one.ended or not mask_truncated, group.pictures)
            for one, advantage in zip(group.rollouts, group.advantages.tolist())
        ]
        for group in groups
    ]


def make_rows(groups: Sequence[Group], pad_id: int, axes: Axes, options: Options, temperature: float) -> Batch:
    """This rank's rows as CPU tensors [R, T], with sampler_logprobs. Every rank gets the same number of rows."""
    rank, ranks = axes.rows
    multiple = ranks * options.rows * options.least_parts
    shape = options.updates, options.seq_len, multiple, pad_id
    cfg = None if options.sight is None else options.sight.cfg
    packed = pack_updates(documents(groups, options.mask_truncated), *shape, cfg)
    rows = {key: torch.from_numpy(value) for key, value in own_rows(packed, rank, ranks).items()}
    if temperature != 1:
        rows["temperature"] = torch.full_like(rows["loss_weights"], temperature)
    return rows


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Functions on this rank's rows, each giving [R, T].

    trainer: log-probs of the targets. reference: those of the frozen policy, or None. entropy: of the predictions, or
    None.
    """

    trainer: Outputs
    reference: Callable[[Batch], Tensor] | None
    entropy: Outputs | None


def compare(rows: Batch, params: Params, log_probs: LogProbs, tools: Tools, options: Options) -> dict[str, float]:
    """Adds old_logprobs, ref_logprobs and the corrected advantages to `rows`, and removes sampler_logprobs.

    Returns how much the log-probs of sampler and trainer differ, over all ranks: their KL, the largest difference, and
    the mean weight of the correction. Returns {} if the trainer's log-probs were not computed (options.trust_sampler).
    """
    sampler = rows.pop("sampler_logprobs")
    counts = rows["loss_weights"] != 0
    if log_probs.reference is not None:
        rows["ref_logprobs"] = torch.where(counts, log_probs.reference(rows), 0.0)
    if options.trust_sampler and options.correction == "none" and log_probs.entropy is None:
        rows["old_logprobs"] = sampler.to(torch.promote_types(params[EMBED].dtype, torch.float32))
        return {}
    trainer = log_probs.trainer(params, rows)
    sampler = sampler.to(trainer)
    gap = torch.where(counts, trainer - sampler, 0.0)
    rows["old_logprobs"] = torch.where(counts, sampler if options.trust_sampler else trainer, 0.0)
    weights = importance_weights(gap, counts, rows["segments"], options.correction, options.low, options.high)
    if log_probs.entropy is not None:
        entropy = log_probs.entropy(params, rows)
        threshold = entropy_threshold(_everywhere(entropy[counts], tools), options.top_entropy)
        weights = weights * high_entropy(entropy, counts, threshold)
    rows["advantages"] = (rows["advantages"].to(trainer) * weights).to(torch.float32)
    own = [counts.sum().item(), sampler_kl(gap)[counts].sum().item(), weights[counts].sum().item()]
    told = [one for one in tools.world.gather([*own, gap.abs().max().item(), _first_of_row(tools.axes)]) if one[-1]]
    total = max(1, sum(one[0] for one in told))
    return {
        "sampler_kl": sum(one[1] for one in told) / total,
        "sampler_gap": max(one[3] for one in told),
        "correction": sum(one[2] for one in told) / total,
    }


def _first_of_row(axes: Axes) -> bool:
    """Whether this rank is the first one of the ranks that have the same rows."""
    return all(axes[name].index == 0 for name in ("cp", "tp", "pp"))


def _everywhere(values: Tensor, tools: Tools) -> Tensor:
    """The values of the rows of all ranks, concatenated."""
    own = values.double().cpu().numpy().tobytes() if _first_of_row(tools.axes) else b""
    told = b"".join(tools.world.gather_bytes(own))
    return torch.frombuffer(bytearray(told), dtype=torch.float64) if told else torch.zeros(0, dtype=torch.float64)


# -- what is logged ----------------------------------------------------------------------------------------------------


def figures(drawn: Drawn) -> dict[str, float]:
    """Metrics of a step's completions; the same on every rank, except the times."""
    samples = [sample for group in drawn.groups for sample in group.samples]
    total = torch.stack([group.total for group in drawn.groups])
    tokens = [sample.tokens for sample in samples]
    flat = [group for group in drawn.groups if tells_nothing(group.total[None]).item()]
    rewards = {name: np.array([group.rewards[name] for group in drawn.groups]) for name in drawn.groups[0].rewards}
    best = {name: max(np.nanmax(values), HIGHEST.get(name, -np.inf)) for name, values in rewards.items()}
    right = [group for group in drawn.groups if _all_best(group, best)]
    return {
        "reward": total.nanmean().item(),
        **{f"reward/{name}": float(np.nanmean(values)) for name, values in rewards.items() if len(rewards) > 1},
        "unjudged": total.isnan().double().mean().item(),
        "groups": float(len(drawn.groups)),
        "groups_wasted": len(flat) / len(drawn.groups),
        "groups_all_best": len(right) / len(drawn.groups),
        "draws": float(drawn.draws),
        "completion_tokens": float(np.mean(tokens)),
        "completion_tokens_max": float(max(tokens)),
        "truncated": 1 - float(np.mean([sample.ended for sample in samples])),
        "rollout_tokens_per_sec": sum(tokens) / max(drawn.seconds[0], 1e-9),
        "rollout_seconds": drawn.seconds[0],
        "reward_seconds": drawn.seconds[1],
    }


def _all_best(group: Group, best: Mapping[str, float]) -> bool:
    """Whether all judged completions have the highest value of each reward; False if none was judged."""
    judged = ~group.total.isnan().numpy()
    return bool(judged.any()) and all((np.array(group.rewards[name])[judged] == best[name]).all() for name in best)


def lines(step: int, drawn: Drawn) -> list[dict[str, Any]]:
    """A line for samples/ for each completion."""
    out = []
    trained = {group.place for group in drawn.trained}
    for group in drawn.groups:
        for number, (sample, total, advantage) in enumerate(
            zip(group.samples, group.total.tolist(), group.advantages.tolist())
        ):
            rewards = {name: values[number] for name, values in group.rewards.items()}
            head = {"step": step, "place": group.place, "sample": number}
            tail = {"rewards": rewards, "reward": total, "advantage": advantage, "trained": group.place in trained}
            out.append({**head, **dataclasses.asdict(sample), **tail})
    return out
