"""The evaluation bench asks both sides the same, and both answer alike."""

import importlib.util
import json
import os

from qwen3f.bench import evaluation

ARGUMENTS = (
    "--device=cpu --preset=nano --subjects=2 --questions=5 --letters=16 --peer_batches=2 --prompts=2 --new=3 --shots=2"
)


def test_questions_are_in_subjects_with_prefixes():
    asked = evaluation.mmlu(3, 11, 40)
    assert len(asked) == 11
    subjects = {one["context"].rpartition("\n\n")[0] for one in asked}
    assert len(subjects) == 3
    for prefix in subjects:
        assert prefix.startswith("The following are multiple choice questions (with answers) about ")
        assert prefix.count("Answer: ") == 5
    assert all(one["context"].endswith("\nAnswer:") and len(one["choices"]) == 4 for one in asked)
    assert len({one["context"] for one in asked}) == 11


def test_both_sides_agree(capsys, monkeypatch):
    """If lm_eval is installed. If not, its rows say so."""
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    assert evaluation.main([*ARGUMENTS.split(), "--answer_batches=2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]
    assert [row["who"] for row in rows] == ["qwen3f", "lm_eval HFLM"] * 2
    ours, theirs, our_answers, their_answers = rows
    assert ours["questions_s"] > 0
    assert 0 < ours["computed"] < 0.5  # of the tokens of four sequences a question; prefixes are computed once
    assert our_answers["tokens_s"] > 0
    if importlib.util.find_spec("lm_eval"):
        assert theirs["difference"] < 1e-4
        assert their_answers["same"] == 1
    else:
        assert theirs["note"] == their_answers["note"] == "lm_eval not installed"
