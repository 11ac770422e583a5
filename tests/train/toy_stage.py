"""A custom stage and its experiment. Neighbouring documents form a pair; training makes the first one likelier.

python launch.py --config tests/train/toy_stage.py --config.mesh=dp2 --workdir W
"""

import numpy as np
import torch
import torch.nn.functional as F

from qwen3f.stages.configs import pretrain_config
from qwen3f.train.objective import Objective, has_document
from qwen3f.train.outputs import make_outputs
from qwen3f.train.readings import number
from qwen3f.train.stage import Evaluator, Stage

VOCAB, LENGTH = 300, 16


class Pairs:
    """Rows of four documents of random ids, of lengths that differ from row to row; the first 32 are trained on."""

    def __len__(self):
        return 64

    def order(self, places, seed):
        return (np.asarray(places) * 5 + seed) % 32

    def __getitem__(self, i):
        rand = np.random.default_rng(i)
        segments = np.repeat([1, 2, 3, 4, 0], [3, 2 + i % 3, 4, 3, 4 - i % 3]).astype(np.int32)
        ids, real = rand.integers(0, VOCAB, LENGTH + 1), segments > 0
        targets = np.where(real, ids[1:], -100)
        return {"tokens": ids[:-1], "targets": targets, "loss_weights": real.astype(np.float32), "segments": segments}


class NoText:
    """A tokenizer for ids that stand for no text."""

    chat_template = "hybrid"

    def save(self, place):
        place.mkdir()


def check(setup):
    pass


def make(run):
    setup = run.setup
    scores = setup.model.scalar_head
    output = "scores" if scores else "log_probs"
    outputs = make_outputs(setup.model, setup.execution, setup.layout, output=output, compute_dtype=setup.compute_dtype)
    held_out = {key: torch.from_numpy(np.stack([Pairs()[i][key] for i in range(32, 40)])) for key in Pairs()[0]}

    def preference(sums, rows):
        margin = F.pad(sums, (0, 1))[:, :-1] - F.pad(sums, (0, 1))[:, 1:]
        first = has_document(rows).cumsum(1) % 2 == 1  # documents 1, 3, …; absent ones do not count anyway
        return torch.where(first, F.softplus(-margin), 0), {"margin": torch.where(first, margin, 0)}

    def likelihood(params):
        rank, ranks = setup.layout.axes.rows
        mine = {key: x.chunk(ranks)[rank].to(setup.device) for key, x in held_out.items()}
        return {"log_prob": sum(dict(run.world.gather([rank, outputs(params, mine).sum().item()])).values())}

    def prepare(state, batch, more):  # every other step leaves its first examples unused
        return more() if number(state.step) % 2 else batch

    objective = Objective(
        output,
        token=None if scores else lambda log_probs, batch: (log_probs, {"entropy": batch["entropy"]}),
        document=preference,
        count=lambda rows: has_document(rows).sum() / 2,
        reports=("margin",) if scores else ("entropy", "margin"),
        entropy=not scores,
    )
    return Stage(NoText(), Pairs(), objective, {"held": Evaluator(2, likelihood)}, prepare)


def get_config(kind="dense"):
    c = pretrain_config("nano")
    c.stage, c.dtype, c.device = "tests.train.toy_stage", "float64", "cpu"
    c.model.update(vocab_size=VOCAB, num_hidden_layers=2, hidden_size=32, intermediate_size=48, head_dim=16)
    if kind == "moe":
        c.model.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, router_aux_loss_coef=0.05)
    if kind == "frozen":
        c.optimizer.rates = r"model\.embed_tokens\.weight=0,.*\.mlp\..*=0,.*norm\.weight=0.5"
    c.model.scalar_head = kind == "scores"
    c.update(steps=6, batch_size=8, microbatches=2, seq_len=LENGTH, log_every=1)
    c.checkpoint.update(every=2, keep=0)
    c.schedule.update(kind="constant", peak_lr=1e-2, warmup=0)
    return c
