"""Splits of pictures are disjoint by what is drawn, and hold no picture twice."""

import json
from collections import Counter

from qwen3f.data.sources.images import KINDS, pictures, source


def test_splits_are_disjoint_and_without_repetitions_over_seeds():
    drawn = {"train": set(), "heldout": set()}
    pixels = {"train": set(), "heldout": set()}
    for seed, count in ((0, 2500), (1, 1000)):
        total = 0
        counts = Counter()
        for split in drawn:
            found = list(pictures(split, seed, count, holdout=0.2, max_side=96, counts=counts))
            of_seed = {item.parameters for item in found}
            assert len(of_seed) == len(found)
            total += len(found)
            drawn[split] |= of_seed
            pixels[split] |= {(item.image.size, item.image.tobytes()) for item in found}
        assert total + counts["repeated_pictures"] == count
        assert counts["repeated_pictures"] < 0.01 * count
    assert not drawn["train"] & drawn["heldout"]
    assert not pixels["train"] & pixels["heldout"]  # no image is in both splits under two descriptions
    share = len(drawn["heldout"]) / sum(map(len, drawn.values()))
    assert 0.166 < share < 0.234  # 0.2 within 5 standard deviations, for 3,500 pictures


def test_kinds_take_turns():
    found = list(pictures("train", count=20, holdout=0.0, max_side=80))
    assert [json.loads(item.parameters)["kind"] for item in found] == list(KINDS) * 4
    assert list(pictures("heldout", count=20, holdout=0.0)) == []
    assert [item.kind for item in pictures("train", count=3, holdout=0.0, kinds=("pie",))] == ["pie"] * 3


def test_a_picture_that_comes_again_stays_in_its_split(monkeypatch):
    known = list(pictures("train", count=20, holdout=0.0, max_side=80))
    monkeypatch.setattr(source, "picture", lambda kind, seed, index, *sides: known[index % 20])
    counts = Counter()
    splits = [list(pictures(s, count=100, holdout=0.5, kinds=("any",), counts=counts)) for s in ("train", "heldout")]
    assert sorted(item.parameters for split in splits for item in split) == sorted(item.parameters for item in known)
    assert all(splits)
    assert counts == {"repeated_pictures": 80}
