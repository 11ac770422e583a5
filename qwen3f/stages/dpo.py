"""Direct preference optimisation: makes the better of two answers likelier, without a reward model (Rafailov et al.
2023, arXiv:2305.18290).

A row holds whole pairs; the loss is the mean over the pairs of the whole batch. The log-probabilities of the reference
come from a file that is computed once, or from its weights in memory: see preference.reference.

N pairs · B rows · T places of a row · S documents, P pairs of a row at most
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor

from qwen3f.data.chat.corpus import ChatCorpus
from qwen3f.data.chat.kinds import check_chosen, check_thinking
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.pairs.corpus import PairLayout
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.on_ranks import check_cache
from qwen3f.preference.corpus import check_pairs, open_pairs, shown
from qwen3f.preference.evaluate import make_evaluator
from qwen3f.preference.passes import evaluation_outputs, log_ratios
from qwen3f.preference.prompts import held_out, prompt_ids, task_of
from qwen3f.preference.reference import (
    Live,
    check_reference,
    check_vocabulary,
    find_reference,
    with_log_probs,
)
from qwen3f.preference.rows import count_pairs, counted, join_pairs, split_pairs, sums_of
from qwen3f.preference.sampling import SamplerOptions
from qwen3f.preference.wins import Asked, Wins
from qwen3f.train.next_steps import ASK, EXPORT
from qwen3f.train.objective import Batch, Figures, Objective, check_model
from qwen3f.train.setup import Setup, at_least
from qwen3f.train.stage import Run, Stage

REPORTS = (
    "kl", "chosen_log_prob", "rejected_log_prob", "chosen_reward", "rejected_reward", "reward_margin", "accuracy"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DPO:
    """The loss of preference pairs.

    Attributes:
      loss: one of LOSSES.
      beta: β, positive; larger values hold the policy closer to the reference.
      label_smoothing: ε, the assumed share of pairs with the wrong order; for cdpo, robust and exo_pair.
      sft_weight: weight of an added term, the mean of −log π over the better answer's tokens (RPO: Pang et al. 2024,
        arXiv:2404.19733). Each answer counts alike; TRL's "sft" differs, it is a mean over the tokens of the batch.
      router_losses: add the router losses of a mixture of experts, as in pretraining.

    Raises UserError for values that cannot work.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    router_losses: bool = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"--config.dpo.loss={self.loss}: write one of {', '.join(LOSSES)}")
        if not 0 < self.beta < math.inf:
            raise UserError(f"--config.dpo.beta={self.beta}: write a positive number")
        if not 0 <= self.sft_weight < math.inf:
            raise UserError(f"--config.dpo.sft_weight={self.sft_weight}: write 0 or a positive number")
        smoothed = self.loss in SMOOTHED
        low_ok = self.label_smoothing > 0 if self.loss == "exo_pair" else self.label_smoothing >= 0
        if not (low_ok and self.label_smoothing < 0.5):
            raise UserError(
                f"--config.dpo.label_smoothing={self.label_smoothing} with --config.dpo.loss={self.loss}: write a "
                f"share below 0.5{' and above 0' if self.loss == 'exo_pair' else ''}"
            )
        if self.label_smoothing and not smoothed:
            raise UserError(
                f"--config.dpo.label_smoothing={self.label_smoothing} does nothing to --config.dpo.loss={self.loss}: "
                f"write --config.dpo.label_smoothing=0, or one of {', '.join(SMOOTHED)} as --config.dpo.loss"
            )


class Answers(NamedTuple):
    """Tensors of one shape, over an answer's tokens: Σ log π, Σ (log π − log π_ref), and the number of tokens (≥ 1)."""

    log_prob: Tensor
    log_ratio: Tensor
    length: Tensor


def _sigmoid(c: Answers, r: Answers, h: DPO) -> Tensor:
    return F.softplus(-h.beta * (c.log_ratio - r.log_ratio))


def _sigmoid_norm(c: Answers, r: Answers, h: DPO) -> Tensor:
    return F.softplus(-h.beta * (c.log_ratio / c.length - r.log_ratio / r.length))


def _hinge(c: Answers, r: Answers, h: DPO) -> Tensor:
    return torch.relu(1 - h.beta * (c.log_ratio - r.log_ratio))


def _ipo(c: Answers, r: Answers, h: DPO) -> Tensor:
    """Azar et al. 2023, arXiv:2310.12036, eq. 17, with means over an answer's tokens, as its authors advised TRL."""
    return (c.log_ratio / c.length - r.log_ratio / r.length - 1 / (2 * h.beta)) ** 2


def _cdpo(c: Answers, r: Answers, h: DPO) -> Tensor:
    """Mitchell 2023, "A note on DPO with noisy preferences"."""
    z, e = h.beta * (c.log_ratio - r.log_ratio), h.label_smoothing
    return (1 - e) * F.softplus(-z) + e * F.softplus(z)


def _robust(c: Answers, r: Answers, h: DPO) -> Tensor:
    """Chowdhury et al. 2024, arXiv:2403.00409: unbiased if a share ε of the pairs has the wrong order."""
    z, e = h.beta * (c.log_ratio - r.log_ratio), h.label_smoothing
    return ((1 - e) * F.softplus(-z) - e * F.softplus(z)) / (1 - 2 * e)


def _exo_pair(c: Answers, r: Answers, h: DPO) -> Tensor:
    """Ji et al. 2024, arXiv:2402.00856, eq. 16."""
    z, e = h.beta * (c.log_ratio - r.log_ratio), h.label_smoothing
    better, worse = F.logsigmoid(z), F.logsigmoid(-z)
    return better.exp() * (better - math.log1p(-e)) + worse.exp() * (worse - math.log(e))


def _nca_pair(c: Answers, r: Answers, h: DPO) -> Tensor:
    """Chen et al. 2024, arXiv:2402.05369."""
    a, b = h.beta * c.log_ratio, h.beta * r.log_ratio
    return F.softplus(-a) + 0.5 * F.softplus(a) + 0.5 * F.softplus(b)


def _bco_pair(c: Answers, r: Answers, h: DPO) -> Tensor:
    """Jung et al. 2024, arXiv:2404.04656, without its shift of rewards, as in TRL."""
    return F.softplus(-h.beta * c.log_ratio) + F.softplus(h.beta * r.log_ratio)


def _sppo_hard(c: Answers, r: Answers, h: DPO) -> Tensor:
    """Wu et al. 2024, arXiv:2405.00675, eq. 4.7, with a win probability of 1 for the better answer."""
    return (c.log_ratio - 0.5 / h.beta) ** 2 + (r.log_ratio + 0.5 / h.beta) ** 2


def _apo_zero(c: Answers, r: Answers, h: DPO) -> Tensor:
    """D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7: for data whose better answers beat the policy's own."""
    return torch.sigmoid(-h.beta * c.log_ratio) + torch.sigmoid(h.beta * r.log_ratio)


def _apo_down(c: Answers, r: Answers, h: DPO) -> Tensor:
    """The same paper, eq. 8: for data whose better answers are worse than the policy's own."""
    return torch.sigmoid(h.beta * c.log_ratio) + torch.sigmoid(-h.beta * (c.log_ratio - r.log_ratio))


LOSSES: dict[str, Callable[[Answers, Answers, DPO], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "hinge": _hinge,
    "ipo": _ipo,
    "cdpo": _cdpo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
SMOOTHED = ("cdpo", "robust", "exo_pair")
BY_LENGTH = ("ipo", "sigmoid_norm")


def pair_costs(chosen: Answers, rejected: Answers, hyper: DPO) -> tuple[Tensor, Figures]:
    """(cost of each pair, metrics of the same shape without a gradient). Formulas are those of TRL 1.16, except cdpo.

    A reward is β · (log π − log π_ref). accuracy: 1 where the better answer has the higher reward; 0 where they are
    equal.
    """
    costs = LOSSES[hyper.loss](chosen, rejected, hyper)
    if hyper.sft_weight:
        costs = costs - hyper.sft_weight * chosen.log_prob / chosen.length
    better, worse = hyper.beta * chosen.log_ratio.detach(), hyper.beta * rejected.log_ratio.detach()
    return costs, {
        "chosen_log_prob": chosen.log_prob.detach(),
        "rejected_log_prob": rejected.log_prob.detach(),
        "chosen_reward": better,
        "rejected_reward": worse,
        "reward_margin": better - worse,
        "accuracy": (better > worse).to(better.dtype),
    }


def preference_loss(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    hyper: DPO,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Figures]:
    """(mean loss, means of the metrics of `pair_costs`) over N pairs; 0 without pairs.

    Args:
      chosen_logp, rejected_logp: [N], log π summed over each answer.
      ref_chosen, ref_rejected: [N], the same for the reference.
      lengths: (chosen [N], rejected [N]), numbers of tokens of the answers; 0 counts as 1.
    Raises ValueError if lengths is None and the loss needs it.
    """
    if lengths is None:
        if hyper.loss in BY_LENGTH or hyper.sft_weight:
            raise ValueError(f"loss={hyper.loss} with sft_weight={hyper.sft_weight} needs the answers' lengths")
        lengths = torch.ones_like(chosen_logp), torch.ones_like(rejected_logp)
    costs, figures = pair_costs(
        Answers(chosen_logp, chosen_logp - ref_chosen, lengths[0].clamp(min=1)),
        Answers(rejected_logp, rejected_logp - ref_rejected, lengths[1].clamp(min=1)),
        hyper,
    )
    count = max(1, len(chosen_logp))
    return costs.sum() / count, {name: values.sum() / count for name, values in figures.items()}


def make_objective(hyper: DPO) -> Objective:
    """The loss over packed pairs; the batch has ref_logprobs [B, T].

    Its metrics are those of `pair_costs`, and kl: ½ Σ (log π − log π_ref)² over the tokens of an answer, averaged over
    the two answers. If the policy wrote the answers, kl estimates KL(π, π_ref) (Schulman 2020, "Approximating KL
    divergence", k2). For other answers it is only a distance that is never negative.
    """

    def token(log_probs: Tensor, batch: Batch) -> tuple[Tensor, Figures]:
        log_ratio = log_probs - batch["ref_logprobs"].to(log_probs.dtype)
        return log_ratio, {"kl": log_ratio.detach() ** 2 / 4}

    def document(log_ratio_BS: Tensor, rows: Batch) -> tuple[Tensor, Figures]:
        chosen, rejected = answers_of(log_ratio_BS, rows)
        costs, figures = pair_costs(chosen, rejected, hyper)
        size = log_ratio_BS.shape[1]
        return join_pairs(costs, size), {name: join_pairs(x, size) for name, x in figures.items()}

    return Objective("log_probs", token, document, count_pairs, REPORTS, router_losses=hyper.router_losses)


def answers_of(log_ratio_BS: Tensor, rows: Batch) -> tuple[Answers, Answers]:
    """The better and the worse answers, tensors [B, P], from the sums of log-ratios over documents [B, S]."""
    weights = counted(rows)
    reference = sums_of((weights * rows["ref_logprobs"]).to(log_ratio_BS.dtype), rows)
    lengths = sums_of((weights != 0).to(log_ratio_BS.dtype), rows)
    of_chosen, of_rejected = zip(*map(split_pairs, (log_ratio_BS + reference, log_ratio_BS, lengths)))
    chosen, rejected = (Answers(*x[:2], x[2].clamp(min=1)) for x in (of_chosen, of_rejected))
    return chosen, rejected


def read_hyper(config: ConfigDict) -> DPO:
    """The DPO of config.dpo. Raises UserError."""
    names = [field.name for field in dataclasses.fields(DPO)]
    return DPO(**{name: config.dpo[name] for name in names})


def check(setup: Setup) -> None:
    """Raises UserError for settings in dpo, data and eval that cannot run."""
    config, hyper = setup.config, read_hyper(setup.config)
    check_model(setup.model, make_objective(hyper))
    check_pairs(setup)
    if config.dpo.reference:
        check_vocabulary(config.dpo.reference, setup)
    for key, low in (("questions", 0), ("max_new_tokens", 1), ("cache_tokens", 0)):
        at_least(config, f"eval.{key}", low)
    if config.eval.questions:
        task_of(config.eval.task, "--config.eval.task", config.data)
    modes = [config.eval.thinking] if config.eval.questions else []
    check_chosen(config.chat_template, modes, "--config.eval.thinking")


def make(run: Run) -> Stage:
    setup, hyper = run.setup, read_hyper(run.setup.config)
    if not (setup.config.init_from or setup.config.dpo.reference):
        raise UserError("DPO holds the policy to the model that it starts from: write --config.init_from=W")
    tokenizer, corpus = open_pairs(run, PairLayout(setup.config.seq_len))
    return Stage(
        tokenizer=tokenizer,
        dataset=corpus.train,
        objective=make_objective(hyper),
        figures=corpus.train_metrics,
        lines=tuple(corpus.describe()),
        samples=shown(setup, corpus, tokenizer),
        complete=lambda stage: _with_reference(run, stage, corpus, hyper),
        next=(ASK, EXPORT),
    )


def _asked(run: Run, tokenizer: Tokenizer) -> tuple[Asked | None, list[str]]:
    """(the held-out questions of each evaluation, or None; lines to print about them)."""
    config = run.setup.config
    if not config.eval.questions:
        return None, []
    check_thinking(kind_of(tokenizer), config.eval.thinking, "--config.eval.thinking")
    task = task_of(config.eval.task, "--config.eval.task", config.data)
    room = run.setup.model.max_position_embeddings - config.eval.max_new_tokens
    questions, lines = held_out(tokenizer, task, config.eval.questions, config.eval.thinking, room)
    prompts = [prompt_ids(tokenizer, question, config.eval.thinking) for question in questions]
    check_cache(prompts, config.eval.max_new_tokens, config.eval.cache_tokens, "--config.eval.cache_tokens")
    options = SamplerOptions(config.eval.max_new_tokens, config.eval.cache_tokens, "config.eval.cache_tokens")
    return Asked(task, questions, config.eval.thinking, options), lines


def _with_reference(run: Run, stage: Stage, corpus: ChatCorpus, hyper: DPO) -> Stage:
    """`stage` with the reference (its log-probabilities in the rows, or its weights in memory) and the evaluators."""
    asked, said = _asked(run, stage.tokenizer)
    reference = find_reference(run)
    values = log_ratios(evaluation_outputs(run.setup, "log_probs"))
    changes: dict[str, Any] = {}
    if run.setup.config.dpo.reference_log_probs == "live":
        live = Live(run, reference)
        values = live.before(values)
        changes["prepare"] = lambda state, batch, more: live.add_to(batch)
        lines = [f"reference: {reference.place}, with its weights in memory"]
    else:
        corpus, lines = with_log_probs(run, reference, corpus)
    memory = {"reference": reference.digest}
    evaluators = {"val": make_evaluator(run, corpus.heldout, values, hyper.beta)}
    if asked:
        wins = Wins(run, stage.tokenizer, asked, lambda: (reference.cfg, reference.params(run)))
        evaluators["answers"] = wins.evaluator()
    return dataclasses.replace(
        stage,
        dataset=corpus.train,
        evaluators=evaluators,
        lines=(*stage.lines, *lines, *said),
        save=lambda: memory,
        load=lambda before: check_reference(before, memory, reference.place, "--config.dpo.reference"),
        **changes,
    )
