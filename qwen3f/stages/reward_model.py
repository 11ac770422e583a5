"""A reward model: the policy's backbone with a scalar head, trained to score the better of two answers higher.

The score of an answer is the head's output at the answer's last token. The loss is Bradley–Terry (Ouyang et al. 2022,
arXiv:2203.02155, eq. 1). Configuration can add margins (Touvron et al. 2023, arXiv:2307.09288, eq. 2) and a centring
term (Eisenstein et al. 2023, arXiv:2312.09244).

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
    """The loss of a reward model.

    Attributes:
      margin: the better score must lead by `margin` times the pair's own margin. That is the difference of the ratings
        in rated data, else 1. 0: no margin.
      centre: weight of (chosen score + rejected score)², which keeps scores near 0; 0: no such term.

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
    """(cost of each pair, metrics of the same shape without a gradient), from scores of any shape.

    accuracy: 1 where the chosen score is higher; equal scores count as 0.
    """
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
    """(mean loss, means of the metrics) over N pairs, from their scores [N]; 0 without pairs. As in TRL 1.16."""
    costs, figures = pair_costs(chosen, rejected, margins, centre)
    count = max(1, len(chosen))
    return costs.sum() / count, {name: values.sum() / count for name, values in figures.items()}


def make_objective(hyper: RewardLoss) -> Objective:
    """The loss over packed pairs. loss_weights [B, T] must be 1 at each document's last place and 0 elsewhere.

    With hyper.margin the batch also has margins [B, T]: each pair's own margin at the last place of its better answer,
    0 elsewhere.
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

    A document ends where its segment id ends. Token ids do not matter, so padding may have any id, on either side.

    Args:
      outputs: what train.outputs.make_outputs gives for output="scores", on any mesh.
      params, batch: arguments of `outputs`. The batch must hold each document whole, its last token included.
    """
    return scores_at_ends(outputs(params, batch), batch)


def check(setup: Setup) -> None:
    """Raises UserError for settings in reward_model, data and eval that cannot run."""
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
        next=_next(setup.config),
    )


def _next(config: ConfigDict) -> tuple[str, ...]:
    """The command to run next: reinforcement of the model that this run started from, by this run's scores."""
    if not config.init_from:
        return ()
    policy = shlex.quote(config.init_from).replace("{", "{{").replace("}", "}}")
    return (
        f"--config experiments/grpo.py:{{preset}} --config.init_from={policy} --config.rewards=reward_model "
        "--config.judge.reward_model={workdir} --workdir {workdir}-grpo",
    )
