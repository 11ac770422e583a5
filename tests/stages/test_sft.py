"""Supervised fine-tuning: packing and meshes change no number, a run that was killed resumes, frozen parts stay."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.data.chat.corpus import ChatDataConfig, prepare_chats
from qwen3f.data.chat.examples import chat_example, chat_tokens
from qwen3f.errors import UserError
from qwen3f.interop import hf, source
from qwen3f.params import EMBED
from qwen3f.processes.world import open_world
from qwen3f.train import loop
from qwen3f.train.objective import NEXT_TOKEN
from qwen3f.train.optimizer import AdamW
from qwen3f.train.schedule import Schedule
from qwen3f.train.state import from_params
from qwen3f.train.step import StepOptions, make_train_step
from sharding.mesh import parse_mesh
from tests.model.hf_params import Widen, from_hf, hf_model, small_config
from tests.sharding.worlds import run_processes
from tests.stages import toy_chats
from tests.train.runs import assert_same_bits, final_state, metrics, pretrain_model

NUMBERS = ("loss", "aux_loss", "grad_norm", "tokens_seen")
TWO = {"dp2": "dense", "tp2": "dense", "cp2": "dense", "pp2": "dense", "ep2": "moe"}
FOUR = {"dp2,tp2": "dense"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("sft")
    toy_chats.write_data(place)
    return place


@pytest.fixture(scope="module")
def alone(root):
    """kind -> the numbers of one device."""
    found = {}
    for kind in ("dense", "moe"):
        loop.run(toy_chats.make_config(root, kind), root / "alone" / kind, progress=False)
        found[kind] = learned(root / "alone" / kind)
    return found


def learned(workdir):
    return [[line[name] for name in (*NUMBERS, *heldout(line)) if name in line] for line in metrics(workdir)]


def heldout(line):
    """The names of the held-out losses: of all rows, and of each source."""
    return [name for name in line if name.startswith("val_loss")]


def same(got, expected, what):
    """To 1e-10: float64, and only sums are in another order. The last line has the held-out losses too."""
    assert len(got) == len(expected) == 4
    experts = "ep" in str(what)
    assert len(got[-1]) == len(NUMBERS) - (not experts) + 3  # val_loss, and that of each of two sources
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-10, abs=1e-10), what


# -- packing -----------------------------------------------------------------------------------------------------------


def stacked(examples):
    return {key: torch.from_numpy(np.stack([one[key] for one in examples])) for key in examples[0] if key != "index"}


def test_packed_loss_and_gradients_are_those_of_the_conversations_apart(root):
    """float64. To 1e-12 of our step with one conversation in each row. To 1e-10 of transformers with one conversation
    at a time, neither cut nor padded.

    Gradients are read from the first moment after one step without clipping, which is (1 − b1) times the gradient.
    """
    tokenizer = toy_chats.small_tokenizer(root / "small")
    cfg = small_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)
    data = ChatDataConfig(mixture=f"chats@{root}/thinking", cache=str(root / "cache"), num_threads=1)
    corpus = prepare_chats(data, 160, tokenizer, progress=False)
    (part,) = corpus.parts
    packed = stacked([part[i] for i in range(len(part))])
    assert packed["segments"].max() >= 3
    samples = list(next(iter(corpus.sources.values())).documents("train"))
    chats = [chat_tokens(tokenizer, s.messages, s.tools, enable_thinking=s.enable_thinking) for s in samples]
    ends = [max(i for i, bit in enumerate(trained) if bit) + 1 for _, trained in chats]  # <|im_end|>
    chats = [(ids[:end], trained[:end]) for (ids, trained), end in zip(chats, ends)]
    examples = [chat_example(*chat, 160, tokenizer.pad_id) for chat in chats]
    kept = [chat for chat, one in zip(chats, examples) if one is not None]
    assert len(kept) == len(chats) - 1  # one is too long for a row
    assert len(packed["tokens"]) < len(kept)
    separate = stacked([one for one in examples if one is not None])

    with Widen():
        hers = hf_model(cfg, dtype=torch.float64)
        total = sum(sum(trained[1:]) for _, trained in kept)
        nats = 0.0
        for ids, trained in kept:
            log_probs = hers(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            nll = -log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            nats = nats + nll[torch.tensor(trained[1:])].sum() / total
        nats.backward()
    start = from_hf(cfg, {name: leaf.detach() for name, leaf in hers.named_parameters()})
    theirs = from_hf(cfg, {name: leaf.grad for name, leaf in hers.named_parameters()})

    hyper = AdamW(b1=0.5, clip_norm=0)
    step = make_train_step(cfg, NEXT_TOKEN, StepOptions(hyper, Schedule("constant", 1e-3, 1)))
    results = [step(from_params(cfg, start, 0, hyper), batch) for batch in (packed, separate)]
    one, apart = ((found["loss"].item(), state.opt.m) for state, found in results)
    assert one[0] == pytest.approx(apart[0], rel=1e-12)
    assert one[0] == pytest.approx(nats.item(), rel=1e-10)
    assert results[0][1]["tokens"] == results[1][1]["tokens"] == total
    for path, moment in one[1].items():
        assert (moment - apart[1][path]).norm() <= 1e-12 * apart[1][path].norm(), path
        assert (2 * moment - theirs[path]).norm() <= 1e-10 * theirs[path].norm(), path


# -- micro-batches and meshes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4, 8])
def test_any_cut_into_micro_batches(parts, root, alone, tmp_path):
    loop.run(toy_chats.make_config(root, microbatches=parts), tmp_path, progress=False)
    same(learned(tmp_path), alone["dense"], parts)


def on_ranks(rank, meshes, root, folder):
    for mesh, kind in meshes.items():
        config = toy_chats.make_config(Path(root), kind, mesh=mesh)
        loop.run(ConfigDict(config), Path(folder) / mesh, False, open_world(parse_mesh(mesh), "cpu", rank))


@pytest.mark.parametrize("meshes, ranks", [(TWO, 2), (FOUR, 4)], ids=["two", "four"])
def test_every_mesh(meshes, ranks, root, alone, tmp_path):
    run_processes(on_ranks, ranks, meshes, str(root), str(tmp_path))
    for mesh, kind in meshes.items():
        same(learned(tmp_path / mesh), alone[kind], mesh)


# -- a run that ends early ---------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def watched(batches, dies_at=None):
    """A make_step that stores each step's batch in `batches`, and raises Killed before step `dies_at`."""

    def make_step(*args):
        step = make_train_step(*args)

        def wrapped(state, batch):
            if int(state.step) + 1 == dies_at:
                raise Killed
            batches[int(state.step) + 1] = {key: value.clone() for key, value in batch.items()}
            return step(state, batch)

        return wrapped

    return make_step


def test_a_killed_run_goes_on_with_the_same_batches_and_numbers(root, alone, tmp_path):
    """The run dies before step 4 and resumes from the checkpoint of step 2, bit for bit like an uninterrupted run."""
    config, whole, first, second = toy_chats.make_config(root), {}, {}, {}
    loop.run(config, tmp_path / "whole", False, make_step=watched(whole))
    with pytest.raises(Killed):
        loop.run(config, tmp_path / "cut", False, make_step=watched(first, 4))
    assert metrics(tmp_path / "cut")[-1]["step"] == 3
    loop.run(config, tmp_path / "cut", False, make_step=watched(second))
    assert (list(first), list(second), list(whole)) == ([1, 2, 3], [3, 4], [1, 2, 3, 4])
    for number, batch in (*first.items(), *second.items()):
        assert batch.keys() == whole[number].keys()
        assert all(torch.equal(value, whole[number][key]) for key, value in batch.items()), number
    assert_same_bits(final_state(config, tmp_path / "cut", 4), final_state(config, tmp_path / "whole", 4))
    same(learned(tmp_path / "whole"), alone["dense"], "whole")
    again = {line["step"]: line for line in metrics(tmp_path / "cut")}  # step 3's second line replaces the first
    for line in metrics(tmp_path / "whole"):
        for name in ("loss", "grad_norm", "val_loss", "padding", "supervised"):
            assert again[line["step"]].get(name) == line.get(name), name


# -- frozen parts ------------------------------------------------------------------------------------------------------


def test_frozen_parts_stay_without_moments_and_rates_are_kept_on_resume(root, tmp_path):
    config = toy_chats.make_config(root, **{"optimizer.rates": r"model\.embed_tokens\..*=0,.*norm.*=0.1"})
    loop.run(config, tmp_path, progress=False)
    with Checkpointer(tmp_path / "checkpoints", 0, 0) as checkpoints:
        tree = checkpoints.read_tree(4)
        ends = [name for name in tree if name[-1] == EMBED]
        assert ends == [("params", EMBED)]
    trained = source.read_params(str(tmp_path), pretrain_model(config), "cpu")
    began = hf.load_pretrained(root / "dense", torch.float32)[1]
    moved = {path: (trained[path] - began[path]).abs().max().item() for path in began}
    assert moved[EMBED] == 0
    norms = [path for path in moved if "norm" in path]
    assert norms
    # four steps of Adam move a weight by about the rate each: 1e-2, and for norms a tenth of it
    assert all(0 < moved[path] < 0.005 for path in norms)
    assert all(moved[path] > 0.01 for path in moved if path != EMBED and path not in norms)

    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    config.optimizer.rates = ".*norm.*=0"
    with pytest.raises(UserError, match=r"optimizer\.rates is model.*=0\.1, this run's is \.\*norm\.\*=0; choose"):
        loop.run(config, tmp_path, progress=False)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    config.optimizer.rates, config.steps = r"model\.embed_tokens\..*=0", 5  # other rates, the same frozen parts
    loop.run(config, tmp_path, progress=False)
    assert metrics(tmp_path)[-1]["step"] == 5
