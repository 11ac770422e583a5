"""Positions equal transformers' exactly, for each document of a packed row; counts that do not fit are refused."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3_vl import modeling_qwen3_vl

from qwen3f import model, params, presets
from qwen3f.config import ModelConfig
from qwen3f.errors import UserError
from qwen3f.model.rope import rope_tables
from qwen3f.vision.mrope import check_patches, next_position, places_of, position_ids, visual_index

IMAGE, VIDEO, BEGIN, END = 90, 91, 92, 93
IDS = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), (90, 91, 92, 93)))
CFG = ModelConfig(vision_enabled=True, vocab_size=97, **IDS)


class Theirs:
    """A stub with the parts of transformers' model that its method get_rope_index uses."""

    get_vision_position_ids = modeling_qwen3_vl.Qwen3VLModel.get_vision_position_ids
    get_rope_index = modeling_qwen3_vl.Qwen3VLModel.get_rope_index

    def __init__(self):
        self.config = modeling_qwen3_vl.Qwen3VLConfig()


def words(rand, least=0, most=6):
    return [rand.randrange(80) for _ in range(rand.randint(least, most))]


def document(rand, pieces):
    """A random document, with text before, between and after its images and videos: (tokens, all grids in order, grids
    of images, grids of videos)."""
    tokens, grids, images, videos = words(rand), [], [], []
    for _ in range(pieces):
        h, w = 2 * rand.randint(1, 4), 2 * rand.randint(1, 4)
        if rand.random() < 0.5:
            tokens += [BEGIN, *[IMAGE] * (h * w // 4), END]
            images.append((1, h, w))
            grids.append((1, h, w))
        else:
            t = rand.randint(1, 3)
            for _ in range(t):
                tokens += [*words(rand, 1), BEGIN, *[VIDEO] * (h * w // 4), END]
            videos.append((t, h, w))
            grids.append((t, h, w))
        tokens += words(rand)
    return tokens or [1], grids, images, videos


def expected(tokens, images, videos):
    ids = torch.tensor([tokens])
    kinds = torch.where(ids == IMAGE, 1, 0) + torch.where(ids == VIDEO, 2, 0)
    grids = [torch.tensor(g) if g else None for g in (images, videos)]
    positions, delta = Theirs().get_rope_index(ids, kinds, *grids)
    return positions[:, 0], delta.item()


def padded(grids, n):
    return torch.tensor([*grids, *[(0, 0, 0)] * (n - len(grids))]).view(-1, 3)


@pytest.mark.parametrize("seed", range(30))
def test_positions_are_exact(seed):
    rand = random.Random(seed)
    tokens, grids, images, videos = document(rand, rand.randint(0, 4))
    positions, delta = expected(tokens, images, videos)
    got = position_ids(torch.tensor([tokens]), padded(grids, 6)[None], CFG)
    assert torch.equal(got[0], positions)
    assert next_position(got).item() == delta + len(tokens)
    assert (got <= torch.arange(len(tokens))).all()  # the engine's tables of angles are as long as a row
    assert delta <= 0


@pytest.mark.parametrize("seed", range(10))
def test_packed_documents_restart(seed):
    rand = random.Random(seed)
    rows = [[document(rand, rand.randint(0, 2)) for _ in range(3)] for _ in range(2)]
    length = max(sum(len(d[0]) for d in row) for row in rows) + 3
    tokens, segments = torch.zeros(2, length, dtype=torch.int64), torch.zeros(2, length, dtype=torch.int32)
    want = torch.full((2, 3, length), -1)
    grids = []
    for i, row in enumerate(rows):
        at = 0
        for number, (ids, _, images, videos) in enumerate(row, 1):
            tokens[i, at : at + len(ids)], segments[i, at : at + len(ids)] = torch.tensor(ids), number
            want[i, :, at : at + len(ids)] = expected(ids, images, videos)[0]
            at += len(ids)
        grids.append(padded([g for d in row for g in d[1]], 8))
    got = position_ids(tokens, torch.stack(grids), CFG, segments)
    known = (segments != 0)[:, None].expand_as(got)
    assert torch.equal(got[known], want[known])


GRIDS = st.sampled_from([(0, 0, 0)]) | st.tuples(*[st.integers(1, 3)] * 3)


@given(st.integers(0, 3).flatmap(lambda n: st.lists(st.lists(GRIDS, min_size=n, max_size=n), min_size=1, max_size=3)))
def test_places_are_counted(rows):
    """Each item of each row against a loop over images, frames and places. Items before and after all have none."""
    items = torch.arange(-2, 3 * 27 + 2)
    got = places_of(items.expand(len(rows), -1), torch.tensor(rows).view(len(rows), -1, 3))
    for number, grids in enumerate(rows):
        known = []
        for image, (t, h, w) in enumerate(grids):
            start = len(known)
            known += [(image, start, frame, local, h, w, True) for frame in range(t) for local in range(h * w)]
        for item, *place in zip(items.tolist(), *(field[number].tolist() for field in got)):
            if 0 <= item < len(known):
                assert tuple(place) == known[item]
            else:
                assert place[-3:] == [1, 1, False]


def test_visual_index_counts_features_of_a_row():
    tokens = torch.tensor([[1, IMAGE, IMAGE, 2, VIDEO, 3], [4, 5, IMAGE, 6, 7, 8]])
    assert visual_index(tokens, CFG).tolist() == [[0, 1, 2, 0, 3, 0], [0, 0, 1, 0, 0, 0]]


def test_images_that_touch_come_one_after_the_other():
    got = position_ids(torch.tensor([[1, *[IMAGE] * 3, 2]]), torch.tensor([[[1, 2, 2], [1, 2, 4]]]), CFG)
    assert got[0].tolist() == [[0, 1, 2, 2, 4], [0, 1, 2, 2, 4], [0, 1, 2, 3, 4]]


def test_counts_are_checked_row_by_row():
    """The total of the batch fits, but the number of each row does not."""
    tokens = torch.tensor([[IMAGE, 1], [IMAGE, IMAGE]])
    grids = torch.tensor([[[1, 2, 4]], [[1, 2, 2]]])
    with pytest.raises(UserError, match="row 0 has 1 placeholders .* for 2 features"):
        position_ids(tokens, grids, CFG)
    with pytest.raises(UserError, match="row 0 has 1 placeholders .* for 0 features"):
        position_ids(tokens[:, :1], torch.zeros(2, 1, 3, dtype=torch.int64), CFG)
    for grid in ([1, 2, 3], [1, 3, 2], [-1, 2, 2]):
        with pytest.raises(UserError, match="multiples of 2"):
            position_ids(torch.tensor([[IMAGE]]), torch.tensor([[grid]]), CFG)


def test_a_row_has_the_patches_that_its_grids_name():
    """Otherwise a row would see patches of the next one."""
    check_patches(torch.tensor([[[1, 4, 4]], [[0, 0, 0]]]), torch.zeros(2, 16, 5))
    with pytest.raises(UserError, match="row 1 has 32 patches by its grids, but pixel_values has only 16 in a"):
        check_patches(torch.tensor([[[1, 4, 4]], [[1, 4, 8]]]), torch.zeros(2, 16, 5))
    cfg = presets.get("nano_vl")
    tokens = torch.full((2, 24), cfg.image_token_id)
    tokens[:, 8:] = 300
    batch = {"tokens": tokens, "pixel_values": torch.zeros(2, 16, cfg.vision_patch_values)}
    with pytest.raises(UserError, match="row 0 has 32 patches"):
        model.apply(cfg, params.init_params(cfg, seed=0), {**batch, "grids": torch.tensor([[[1, 4, 8]]] * 2)})


@pytest.mark.parametrize("head_dim, section", [(128, (24, 20, 20)), (16, (4, 2, 2)), (16, (2, 3, 3)), (24, (4, 4, 4))])
def test_interleaved_tables_are_transformers(head_dim, section):
    """Angles are float32. At positions of hundreds, the rounding of one product changes cos and sin by 2e-5."""
    cfg = CFG.replace(head_dim=head_dim, mrope_section=section, rope_theta=5e6)
    text = modeling_qwen3_vl.Qwen3VLTextConfig(
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": list(section)},
    )
    positions = torch.randint(0, 300, (2, 3, 11), generator=torch.Generator().manual_seed(0))
    theirs = modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding(text)
    for got, want in zip(rope_tables(cfg, positions, torch.float32), theirs(torch.zeros(1), positions.transpose(0, 1))):
        torch.testing.assert_close(got, want[..., : head_dim // 2], rtol=0, atol=2e-5)
    words = positions[:, :1].expand(2, 3, 11)
    for got, want in zip(rope_tables(cfg, words, torch.float32), rope_tables(cfg, positions[:, 0], torch.float32)):
        assert torch.equal(got, want)
