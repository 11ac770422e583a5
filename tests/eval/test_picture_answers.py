"""Answers about held-out pictures, for the report."""

from qwen3f import params, presets
from qwen3f.data.multimodal.dataset import VisualDataConfig, prepare_visual
from qwen3f.data.multimodal.tokenizer import trained_tokenizer
from qwen3f.eval import picture_answers


def test_there_is_room_for_the_longest_question(tmp_path, monkeypatch):
    cfg = presets.get("nano_vl")
    data = VisualDataConfig(
        mixture="images", pictures=400, min_pixels=64 * 64, max_pixels=96 * 96, patches=512, images=4
    )
    tokenizer = trained_tokenizer(data, cfg.vocab_size, tmp_path)
    [held] = prepare_visual(data, 256, tokenizer, cfg).heldout.values()
    asked = picture_answers.chosen(held, 3)
    monkeypatch.setattr(picture_answers, "_CACHE", 1)  # tokens: shorter than any question
    lines = picture_answers.answer_chosen(cfg, params.init_params(cfg, seed=0), tokenizer, held, asked)
    assert len(lines) == len(asked) > 1
    assert all(line["prompt"] and line["gold"] and line["pictures"] for line in lines)
