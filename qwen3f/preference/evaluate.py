"""Evaluates the ranking of held-out pairs: accuracy, margin, calibration.

P pairs · S documents of a row at most
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3f.data.packing.pair_dataset import PairDataset
from qwen3f.errors import TrainingError
from qwen3f.params import Params
from qwen3f.preference.passes import Values, passes
from qwen3f.preference.rows import has_pair, split_pairs
from qwen3f.train.stage import Evaluator, Interrupted, Run

BINS = 10


def ranking(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """Metrics from the values [P] of the better and the worse answers, P ≥ 1.

    loss: mean −log σ(margin), in nats per pair. accuracy: share of pairs whose better answer has the higher value;
    equal values count as wrong. margin: mean of chosen − rejected. calibration: expected calibration error (Guo et al.
    2017, arXiv:1706.04599, eq. 3), over BINS equal bins, of σ(|margin|) as the probability that the answer with the
    higher value is the better one.

    Raises TrainingError for values that are not finite.
    """
    margin = (chosen - rejected).double()
    if bad := int((~torch.isfinite(margin)).sum()):
        raise TrainingError(
            f"{bad} of {len(margin)} held-out pairs have a value that is not finite; start again from a checkpoint "
            "before it, with a lower --config.schedule.peak_lr"
        )
    right, confidence = (margin > 0).double(), torch.sigmoid(margin.abs())
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, place, right - confidence)
    return {
        "loss": F.softplus(-margin).mean().item(),
        "accuracy": right.mean().item(),
        "margin": margin.mean().item(),
        "calibration": gaps.abs().sum().item() / len(margin),
    }


def make_evaluator(run: Run, heldout: Mapping[str, PairDataset], values: Values, scale: float = 1.0) -> Evaluator:
    """Evaluates `ranking` on held-out pairs, over all, and for several sources also each: "accuracy/NAME".

    values: (params, batch) -> [B, S], a value for each document. scale: multiplies the values.
    """
    config = run.setup.config.eval

    def of_source(params: Params, dataset: PairDataset) -> tuple[Tensor, Tensor]:
        found = [], []
        for batch, documents in passes(run, dataset, config.max_rows, lambda own: values(params, own)):
            if run.stopping():
                raise Interrupted
            there = has_pair(batch)
            for side, of_side in zip(found, split_pairs(scale * documents)):
                side.append(of_side[there])
        return torch.cat(found[0]), torch.cat(found[1])

    def evaluate(params: Params) -> dict[str, float]:
        each = {name: of_source(params, dataset) for name, dataset in heldout.items()}
        if not each:
            return {}
        out = ranking(*(torch.cat(side) for side in zip(*each.values())))
        for name, sides in each.items() if len(each) > 1 else ():
            out |= {f"{what}/{name}": value for what, value in ranking(*sides).items()}
        return out

    return Evaluator(config.every, evaluate, say)


def say(values: Mapping[str, float]) -> str:
    if not values:
        return "no held-out pair"
    parts = [f"{100 * value:.1f}% ({name})" for name, value in values.items() if name.startswith("accuracy/")]
    head = (
        f"held-out pairs: accuracy {100 * values['accuracy']:.1f}%, margin {values['margin']:.4f}, loss "
        f"{values['loss']:.4f}, calibration error {values['calibration']:.4f}"
    )
    return f"{head}; accuracy {', '.join(parts)}" if parts else head
