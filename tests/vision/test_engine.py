"""Answers to prompts with images. The engine's answers equal those of the model without a cache, however prompts are
cut into chunks and pages, and whatever other requests are answered at the same time."""

import random

import pytest
import torch

from qwen3f import model
from qwen3f.errors import UserError
from qwen3f.infer.engine import Engine, EngineOptions
from qwen3f.infer.pictures import Pictures, vision_ids
from qwen3f.infer.sampling import SamplingParams
from qwen3f.params import init_params
from tests.vision.hf_vl import IMAGE, MOE, from_hf, hf_model, our_batch, row, their_arguments, vl_config

NEW = 6


def make(**changes):
    cfg = vl_config(**changes)
    hf = hf_model(cfg, dtype=torch.float64)
    return cfg, from_hf(cfg, {name: leaf.detach() for name, leaf in hf.named_parameters()}), hf


def prompts(cfg, kinds):
    """(rows, their batch, the Pictures of each row or None). Each row must end with text."""
    rows = [row(random.Random(number), kind) for number, kind in enumerate(kinds)]
    batch = our_batch(cfg, rows, torch.float64)
    found = []
    for number, r in enumerate(rows):
        grids = [grid for _, grid in r.seen]
        count = sum(t * h * w for t, h, w in grids)
        found.append(Pictures(batch["pixel_values"][number, :count], torch.tensor(grids)) if grids else None)
    return rows, batch, found


@torch.no_grad()
def greedy(cfg, p, prompt, pictures):
    """The greedy answer, by a pass over all tokens, without a cache, for each new one. Vision ids are never chosen."""
    tokens = list(prompt)
    for _ in range(NEW):
        batch = {"tokens": torch.tensor([tokens])}
        if pictures is not None:
            batch |= {"pixel_values": pictures.pixels[None], "grids": pictures.grids[None]}
        logits = model.apply(cfg, p, batch).logits[0, -1]
        logits[list(vision_ids(cfg))] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def answers(engine, rows, pictures):
    asked = [engine.request(r.tokens, NEW, pictures=seen) for r, seen in zip(rows, pictures)]
    done = engine.submit(asked)
    engine.run(done)
    return [one.tokens[len(r.tokens) :] for one, r in zip(done, rows)]


# cut: chunks begin and end inside images; pages have four tokens, and there are so few that rows are preempted
WAYS = {"whole": ({}, EngineOptions()), "cut": ({"max_tokens": 60}, EngineOptions(rows=3, chunk=5, page_size=4))}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("changes", [{}, MOE, {"vision_deepstack_mode": "vit_fuse"}], ids=["dense", "moe", "vit_fuse"])
def test_the_engine_equals_the_model_without_a_cache(changes, way):
    room, options = WAYS[way]
    cfg = vl_config(**changes)
    if "vision_deepstack_mode" in changes:
        p = init_params(cfg.replace(initializer_range=0.3), 0, dtype=torch.float64)
    else:
        cfg, p, _ = make(**changes)
    rows, _, pictures = prompts(cfg, ["tit", "t", "it", "iit", "tit"])
    expected = [greedy(cfg, p, r.tokens, seen) for r, seen in zip(rows, pictures)]
    assert answers(Engine(cfg, p, options=options, **room), rows, pictures) == expected


def test_greedy_decoding_equals_transformers_with_its_cache():
    cfg, p, hf = make()
    rows, batch, pictures = prompts(cfg, ["tit", "titt", "vt"])
    banned = [[token] for token in vision_ids(cfg)]
    got = answers(Engine(cfg, p), rows, pictures)
    for number, (r, answer) in enumerate(zip(rows, got)):
        hf.model.rope_deltas = None
        arguments = their_arguments(r, batch, number) | {"use_cache": True}
        out = hf.generate(**arguments, max_new_tokens=NEW, do_sample=False, bad_words_ids=banned, pad_token_id=0)
        assert out[0, len(r.tokens) :].tolist() == answer


def test_pages_are_shared_by_the_same_pixels_alone():
    """A prompt with the same words must reuse the first one's pages if its pixels are the same, and only then."""
    cfg, p, _ = make()
    rows, _, (pictures, _) = prompts(cfg, ["titt", "t"])
    other = Pictures(pictures.pixels.roll(1, 0) + 1, pictures.grids)
    engine = Engine(cfg, p, options=EngineOptions(page_size=2))
    looks = []
    tower = engine._device._sight._tower
    engine._device._sight._tower = lambda *args: looks.append(1) or tower(*args)
    for seen, count in ((pictures, 1), (other, 2), (pictures, 2)):
        assert answers(engine, rows[:1], [seen]) == [greedy(cfg, p, rows[0].tokens, seen)]
        assert len(looks) == count  # the third finds the first one's pages


def test_features_are_not_kept_behind_the_pictures_last_token():
    """A row drops its image features once it has no use for them, also if it is cancelled earlier. Otherwise a caller
    who keeps the rows of a thousand questions would keep all their features."""
    cfg, p, _ = make()
    rows, _, pictures = prompts(cfg, ["titt", "titt"])
    engine = Engine(cfg, p, options=EngineOptions(chunk=2, page_size=2))
    done = engine.submit([engine.request(r.tokens, NEW, pictures=seen) for r, seen in zip(rows, pictures)])
    most = 0
    while not done[0].finish_reason:
        engine.step()
        most = max(most, sum(row.features is not None for row in done))
        assert done[0].features is None or not done[0].answered
    assert most
    again = engine.submit(
        [engine.request(rows[0].tokens, NEW, pictures=Pictures(pictures[0].pixels + 1, pictures[0].grids))]
    )
    while again[0].features is None:
        engine.step()
    engine.cancel(again)
    assert again[0].features is None


def test_new_weights_look_again():
    cfg, p, _ = make()
    rows, _, pictures = prompts(cfg, ["tit"])
    engine = Engine(cfg, p)
    answers(engine, rows, pictures)
    new = {path: leaf * 1.1 for path, leaf in p.items()}
    engine.update(new)
    assert answers(engine, rows, pictures) == [greedy(cfg, new, rows[0].tokens, pictures[0])]


@pytest.mark.gpu
def test_on_cuda_answers_equal_the_cpus():
    """By graphs, where positions behind a picture are smaller than places in the row. Another order of summation rarely
    changes a close choice: at most one answer of twelve."""
    cfg = vl_config()
    p = init_params(cfg.replace(initializer_range=0.3), 0)
    rows, _, seen = prompts(cfg, ["tit", "t", "it", "iit", "vt", "titt"] * 2)
    pictures = [one and Pictures(one.pixels.float(), one.grids) for one in seen]
    expected = answers(Engine(cfg, p), rows, pictures)
    on_cuda = Engine(cfg, {path: leaf.cuda() for path, leaf in p.items()})
    found = answers(on_cuda, rows, pictures)
    assert on_cuda._device._graphs is not None
    assert sum(a == b for a, b in zip(found, expected)) >= 11


def test_vision_ids_are_never_drawn():
    cfg, p, _ = make(tie_word_embeddings=True)
    engine = Engine(cfg, p, seed=3)
    out = engine.generate([[1, 2, 3]] * 40, SamplingParams(temperature=30.0), max_new_tokens=30)
    drawn = {token for one in out for token in one.ids}
    assert len(drawn) > 80
    assert not drawn & set(vision_ids(cfg))


def test_prompts_that_cannot_be_answered():
    cfg, p, _ = make()
    rows, _, (pictures,) = prompts(cfg, ["tit"])
    engine = Engine(cfg, p)
    for prompt, seen, words in (
        ([1, IMAGE, 2], None, "row 0 has 1 placeholders .* for 0 features"),
        ([*rows[0].tokens[:-4], IMAGE], pictures, "placeholders"),
        ([1, 2], pictures, "row 0 has 0 placeholders"),
        ([IMAGE], Pictures(torch.zeros(4, 24), torch.tensor([[1, 2, 2]])), "ends within an image"),
        ([IMAGE, 1], Pictures(torch.zeros(5, 24), torch.tensor([[1, 2, 2]])), "5 patches are given"),
        ([IMAGE, 1], Pictures(torch.zeros(4, 22), torch.tensor([[1, 2, 2]])), "patches of 22 values, .* takes 24"),
        ([IMAGE, 1], Pictures(torch.zeros(4, 24), torch.tensor([1, 2, 2])), r"and grids \[3\]; give"),
        ([IMAGE, 1], Pictures(torch.zeros(1, 4, 24), torch.tensor([[1, 2, 2]])), r"pixels \[1, 4, 24\] and"),
    ):
        with pytest.raises(UserError, match=words):
            engine.submit([engine.request(prompt, 3, pictures=seen)])
    text = cfg.replace(vision_enabled=False)
    from qwen3f.params import init_params

    with pytest.raises(UserError, match="no vision tower"):
        Engine(text, init_params(text, 0)).request([1, 2], 3, pictures=pictures)
