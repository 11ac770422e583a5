"""The reference's log-probabilities equal transformers'. A file of them is never read for settings that change them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.preference.reference import file_of, find_reference
from qwen3f.processes.world import ALONE
from qwen3f.stages import dpo
from qwen3f.train import loop
from qwen3f.train.setup import make_setup
from qwen3f.train.stage import Run
from tests.data.tokenizers.small_bpe import small_tokenizer_json
from tests.model.hf_params import Widen
from tests.stages import toy_pairs
from tests.train.runs import metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("reference")
    toy_pairs.write_data(place)
    return place


def configured(root, tmp_path, **changes):
    usual = {"data.mixture": f"pairs@{root}/pairs", "data.cache": str(tmp_path / "cache"), "steps": 1, "eval.every": 0}
    return toy_pairs.make_config(root, **usual | changes)


def files(tmp_path):
    return {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("reference-*.npy")}


def test_the_numbers_are_those_of_transformers(root, tmp_path):
    """float64, 1e-10, one document at a time. Tokens that are not trained have 0."""
    setup = make_setup(configured(root, tmp_path))
    run = Run(setup, tmp_path, ALONE, False, lambda: False)
    made = dpo.make(run)
    done = made.complete(made)
    part = done.dataset
    with Widen(), torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "dense", dtype=torch.float64)
        for document in part.rows.document[::9]:
            start, stop = (int(x) for x in part.cache.doc_offsets[document : document + 2])
            ids = torch.from_numpy(part.cache.read(start, stop).astype(np.int64))
            found = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            trained = torch.from_numpy(part.cache.read_trained(start + 1, stop).copy())
            own = torch.from_numpy(np.array(part.ref_logprobs.read(start + 1, stop)))
            assert (torch.where(trained, found, 0) - own).abs().max() <= 1e-10
    assert done.dataset.order(np.arange(9), 0).tolist() == made.dataset.order(np.arange(9), 0).tolist()


def test_files_are_made_once_and_read_from_then_on(root, tmp_path, capsys):
    loop.run(configured(root, tmp_path), tmp_path / "a", progress=False)
    assert capsys.readouterr().out.count("log-probabilities written to") == 2
    before = files(tmp_path)
    loop.run(configured(root, tmp_path), tmp_path / "b", progress=False)
    assert capsys.readouterr().out.count("log-probabilities from") == 2
    assert files(tmp_path) == before
    assert [line["loss"] for line in metrics(tmp_path / "a")] == [line["loss"] for line in metrics(tmp_path / "b")]


def test_another_model_tokenizer_length_or_dtype_is_another_file(root, tmp_path):
    setup = make_setup(configured(root, tmp_path))
    run = Run(setup, tmp_path, ALONE, False, lambda: False)
    reference, part = find_reference(run), dpo.make(run).dataset
    other = shutil.copytree(root / "dense", tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    elsewhere = dataclasses.replace(part.cache, path=part.cache.path.with_name("tokens-of-another-tokenizer"))
    usual = (reference, part.cache, 256, torch.float64)
    variants = [
        (dataclasses.replace(reference, digest=source.weights_digest(str(other))), *usual[1:]),
        (dataclasses.replace(reference, cfg=reference.cfg.replace(rope_theta=5e5)), *usual[1:]),
        (reference, elsewhere, *usual[2:]),
        (*usual[:2], 128, torch.float64),
        (*usual[:3], torch.float32),
    ]
    assert len({file_of(*usual), *(file_of(*v) for v in variants)}) == 6
    assert source.weights_digest(str(root / "dense")) == reference.digest


def test_another_tokenizer_tokenises_and_computes_anew(root, tmp_path):
    loop.run(configured(root, tmp_path), tmp_path / "a", progress=False)
    before = files(tmp_path)
    (tmp_path / "tok").mkdir()
    content = json.dumps(small_tokenizer_json(), ensure_ascii=False)
    content = content.replace('the"', 'tha"').replace('["th", "e"]', '["th", "a"]')  # another merge
    (tmp_path / "tok" / "tokenizer.json").write_text(content)
    loop.run(configured(root, tmp_path, **{"data.tokenizer": str(tmp_path / "tok")}), tmp_path / "b", progress=False)
    assert len(files(tmp_path)) == 2 * len(before)


def test_a_damaged_file_is_named(root, tmp_path):
    loop.run(configured(root, tmp_path), tmp_path / "a", progress=False)
    path = next((tmp_path / "cache").glob("reference-*.npy"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{path.name} .*: delete it, to have it made again"):
        loop.run(configured(root, tmp_path), tmp_path / "b", progress=False)


def test_a_run_goes_on_with_the_reference_that_it_began_with(root, tmp_path):
    """init_from is a workdir that has trained further since. Its new weights are another reference: refused."""
    base = configured(root, tmp_path)
    loop.run(base, tmp_path / "base", progress=False)
    config = configured(root, tmp_path, init_from=str(tmp_path / "base"))
    loop.run(config, tmp_path / "run", progress=False)
    base.steps = 2
    loop.run(base, tmp_path / "base", progress=False)
    config.steps = 2
    with pytest.raises(UserError, match="has other weights than the reference that this run began with"):
        loop.run(config, tmp_path / "run", progress=False)
    config.dpo.reference = str(tmp_path / "base" / "checkpoints" / "1")
    loop.run(config, tmp_path / "run", progress=False)
    assert metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dpo.reference_log_probs": "mean"}, "reference_log_probs='mean' is unknown; use one of cached, live"),
        ({"init_from": ""}, "write --config.init_from=W"),
        ({"dpo.reference": "reward"}, "has a scalar head, the policy a vocabulary of 300: name a model that writes"),
        ({"eval.questions": -1}, "config.eval.questions must be at least 0"),
        ({"eval.questions": 3, "eval.task": "x"}, "config.eval.task=x: there is no such task"),
        (
            {"eval.questions": 3, "eval.max_new_tokens": 2048},
            "eval.questions=3 of reasoning: none of 3 prompts leaves room",
        ),
        (
            {"eval.questions": 3, "eval.cache_tokens": 32},
            "config.eval.cache_tokens=32 has no room for the longest prompt",
        ),
        ({"model.scalar_head": True}, "scalar_head=True does not go with a stage that trains on log_probs"),
    ],
)
def test_what_cannot_be_a_reference_is_refused(changes, words, root, tmp_path):
    if changes.get("dpo.reference"):
        changes = {"dpo.reference": str(root / "reward")}
    with pytest.raises(UserError, match=words):
        loop.run(configured(root, tmp_path, **changes), tmp_path / "x", progress=False)
    assert not list((tmp_path / "x").glob("checkpoints/*"))


def test_a_disk_that_fails_is_named(root, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen3f.preference.reference.new_column", full)
    with pytest.raises(UserError, match="could not be written .*reference_log_probs=live"):
        loop.run(configured(root, tmp_path), tmp_path / "x", progress=False)
