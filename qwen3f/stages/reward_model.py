"""A reward model: the policy's backbone with a scalar head, trained to score the better of two answers higher.

The score of an answer is read at its last token, by position. Bradley–Terry (Ouyang et al. 2022, arXiv:2203.02155, eq.
1), with margins (Touvron et al. 2023, arXiv:2307.09288, eq. 2) and a centring term (Eisenstein et al. 2023,
arXiv:2312.09244) by configuration.

N pairs · B rows · T places of a row · S documents, P pairs of a row at most
"""

import dataclasses
import functools
import math
import shlex
from collections.abc import Callable

import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor

from qwen3f.data.pairs.corpus import PairLayout
from qwen3f.errors import UserError
from qwen3f.params import Params
from qwen3f.preference.corpus import check_pairs, open_pairs, shown
from qwen3f.preference.evaluate import make_evaluator
from qwen3f.preference.passes import evaluation_outputs
from qwen3f.preference.rows import count_pairs, join_pairs, scores_at_ends, split_pairs, sums_of
from qwen3f.train.objective import Batch, Figures, Objective, check_model
from qwen3f.train.setup import Setup
from qwen3f.train.stage import Run, Stage

REPORTS = ("chosen_score", "rejected_score", "score_margin", "accuracy")


@dataclasses.dataclass(frozen=True)
class RewardLoss:
    """
    Attributes:
      margin: times each pair's own margin (of rated data the difference of the ratings, else 1), by which the better
        score must lead; 0: none.
      centre: weight of the squared sum of both scores, which keeps scores around 0; 0: none.

    Raises UserError for values that cannot work.
    """

    margin: float = 0.0
    centre: float = 0.0

    def __post_init__(self) -> None:
        for name in ("margin", "centre"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--config.reward_model.{name}={getattr(self, name)}: write 0 or a positive number")


def pair_costs(
    chosen: Tensor, rejected: Tensor, margins: Tensor | float = 0.0, centre: float = 0.0
) -> tuple[Tensor, Figures]:
    """(cost of each pair, figures of the same shape without a gradient), from the scores. accuracy: of equals 0."""
    costs = F.softplus(rejected - chosen + margins)
    if centre:
        costs = costs + centre * (chosen + rejected) ** 2
    better, worse = chosen.detach(), rejected.detach()
    return costs, {
        "chosen_score": better,
        "rejected_score": worse,
        "score_margin": better - worse,
        "accuracy": (better > worse).to(better.dtype),
    }


def pairwise_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | float = 0.0, centre: float = 0.0
) -> tuple[Tensor, Figures]:
    """(mean loss, means of the figures) over the scores [N] of better and worse answers; 0 of none. As in TRL 1.16."""
    costs, figures = pair_costs(chosen, rejected, margins, centre)
    count = max(1, len(chosen))
    return costs.sum() / count, {name: values.sum() / count for name, values in figures.items()}


def make_objective(hyper: RewardLoss) -> Objective:
    """The loss of packed pairs, whose loss_weights are 1 at each document's last place and 0 elsewhere.

    With a margin the batch has margins [B, T]: a pair's own, at the last place of its better answer, 0 elsewhere.
    """

    def document(scores_BS: Tensor, rows: Batch) -> tuple[Tensor, Figures]:
        chosen, rejected = split_pairs(scores_BS)
        margins = 0.0
        if hyper.margin:
            margins = hyper.margin * split_pairs(sums_of(rows["margins"].to(scores_BS.dtype), rows))[0]
        costs, figures = pair_costs(chosen, rejected, margins, hyper.centre)
        size = scores_BS.shape[1]
        return join_pairs(costs, size), {name: join_pairs(x, size) for name, x in figures.items()}

    return Objective("scores", None, document, count_pairs, REPORTS)


def read_hyper(config: ConfigDict) -> RewardLoss:
    """The RewardLoss of config.reward_model. Raises UserError."""
    return RewardLoss(config.reward_model.margin, config.reward_model.centre)


def score(outputs: Callable[[Params, Batch], Tensor], params: Params, batch: Batch) -> Tensor:
    """[B, S]: the score of each document, read at its last place; 0 where a row has no such document.

    A document ends where its segment does, whatever its ids are: padding may have any id, on either side.

    Args:
      outputs: train.outputs.make_outputs of the model with output="scores"; any mesh.
      params, batch: as for `outputs`. The batch holds each document whole, its last token among tokens.
    """
    return scores_at_ends(outputs(params, batch), batch)


def check(setup: Setup) -> None:
    """Raises UserError for what of reward_model, data and eval cannot run."""
    check_model(setup.model, make_objective(read_hyper(setup.config)))
    check_pairs(setup)


def make(run: Run) -> Stage:
    setup, hyper = run.setup, read_hyper(run.setup.config)
    layout = PairLayout(setup.config.seq_len, scored=True, margins=hyper.margin > 0)
    tokenizer, corpus = open_pairs(run, layout)
    outputs = evaluation_outputs(setup, "scores")
    return Stage(
        tokenizer=tokenizer,
        dataset=corpus.train,
        objective=make_objective(hyper),
        evaluators={"val": make_evaluator(run, corpus.heldout, functools.partial(score, outputs))},
        figures=lambda batch: {"padding": corpus.train_metrics(batch)["padding"]},
        lines=tuple(corpus.describe()),
        samples=shown(setup, corpus, tokenizer),
        next=(_next(setup.config),),
    )


def _next(config: ConfigDict) -> str:
    """Reinforcement of the model that this one came from, by this one's scores."""
    policy = shlex.quote(config.init_from or "W").replace("{", "{{").replace("}", "}}")
    return (
        f"--config experiments/grpo.py:PRESET --config.init_from={policy} --config.rewards=reward_model "
        "--config.judge.reward_model={workdir} --workdir {workdir}-grpo"
    )
