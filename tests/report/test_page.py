"""The page: what it shows, what it must never contain, and that its file stays small."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from qwen3f.errors import UserError
from qwen3f.report.overview import rows_of
from qwen3f.report.page import render
from qwen3f.report.picture import write_picture
from qwen3f.report.read import read
from qwen3f.report.write import write_report
from tests.report.places import HOSTILE, write_lines, write_pipeline, write_run

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects what tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.words, self.headings = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def page_of(place):
    return Page(write_report(place).read_text())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    runs = [write_run(root / name, stage=stage) for name, stage in (("s1", "pretrain"), ("sft", "sft"), ("rl", "grpo"))]
    return write_pipeline(root / "P", runs)


def test_a_pipeline_has_its_stages_with_before_and_after(pipeline):
    page = page_of(pipeline)
    for said in ("trained in 3 stages", "1. s1", "2. sft", "3. rl", "9.4% (4.4 to 19.0%) → 18.8% (11.1 to 30.0%)",
                 "held-out loss, text: 3 → 1.5", "no gain that 64 questions can show", "3 min 0 s"):  # fmt: skip
        assert said in page.text, said


def test_a_stage_that_is_done_and_was_never_asked_has_no_dot_to_wait_for(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("s1", "s2", "s3")]
    place = write_pipeline(tmp_path / "P", runs)
    told = json.loads((place / "pipeline.json").read_text())
    del told["stages"][0]["measures"]["reasoning_thinking"]
    del told["stages"][2]["measures"]["reasoning_thinking"]
    told["stages"][2]["status"] = "running"
    (place / "pipeline.json").write_text(json.dumps(told))
    rows = rows_of(read(place), "reasoning_thinking")
    assert [(name, before is not None, after is not None) for name, before, after in rows] == [
        ("s2", False, True),
        ("s3", True, False),
    ]


def test_a_stage_that_is_left_out_and_one_with_weights_of_its_own_say_so(tmp_path):
    place = write_pipeline(tmp_path / "P", [write_run(tmp_path / name) for name in ("s1", "rl", "dpo")])
    told = json.loads((place / "pipeline.json").read_text())
    shutil.rmtree(place / "02_rl")
    told["stages"][1] |= {"status": "skipped", "from": None, "measures": {}, "seconds": 0.0, "steps": 0}
    told["stages"][2] |= {"from": None, "init_from": "/of/W/checkpoints/40"}
    (place / "pipeline.json").write_text(json.dumps(told))
    page = page_of(place)
    assert re.search(r"rl ?skipped ?left out ?dpo ?from W, step 40; done", page.text)
    assert "2. rl Learns something. experiments/x.py:nano; skipped" in page.text
    assert "from nothing" in page.text.partition("rl")[0]
    assert "from nothing" not in page.text.partition("2. rl")[2]
    for said in ("time not known", "not measured yet", "not yet"):
        assert said not in page.text


@pytest.mark.parametrize("single", [False, True])
def test_headings_come_in_order_ids_are_unique_and_pictures_have_words(pipeline, single):
    page = page_of(pipeline / "02_sft" if single else pipeline)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(page.headings))
    assert len(page.ids) == len(set(page.ids))
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-labelledby"] in page.ids
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        for name in ("href", "xlink:href"):
            if attributes.get(name, "").startswith("#"):
                assert attributes[name][1:] in page.ids


def test_nothing_comes_from_elsewhere_and_nothing_runs(pipeline):
    text = write_report(pipeline).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!#|data:image/png;base64,)", text)
    assert set(re.findall(r"https?://[^\"'<> ]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not [
        tag for tag, attributes in Page(text).tags if tag == "script" or any(a.startswith("on") for a in attributes)
    ]


def test_what_a_run_wrote_is_text_wherever_it_stands(tmp_path):
    run = write_run(tmp_path / "W", text=HOSTILE, stage=HOSTILE, init_from=HOSTILE)
    sample = {"place": 0, "prompt": HOSTILE, "text": HOSTILE, "reward": 1.0, "gold": HOSTILE}
    write_lines(run / "samples" / "step-00000030.jsonl", [sample])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", [line | {HOSTILE: 1.0, f"val_accuracy/{HOSTILE}": 1.0, f"reward/{HOSTILE}": 2.0}
                                        for line in lines])  # fmt: skip
    (run / "config.json").write_text(json.dumps({"stage": "grpo", "steps": 1, HOSTILE: HOSTILE, "init_from": HOSTILE}))
    place = write_pipeline(tmp_path / "P", [run], names=[HOSTILE])
    told = json.loads((place / "pipeline.json").read_text())
    told["stages"][0] |= {"purpose": HOSTILE, "error": HOSTILE, "status": HOSTILE, "overrides": {HOSTILE: HOSTILE}}
    (place / "pipeline.json").write_text(json.dumps(told | {"preset": HOSTILE, "seed": HOSTILE}))
    for where in (place, run):
        page = page_of(where)
        assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object"}
        assert all("onerror" not in attributes for _, attributes in page.tags)
        assert "{{ 7 * 7 }}" in page.text  # not rendered as a template
        assert "<script>alert(1)</script>" in page.text


def test_a_run_that_has_not_reached_its_steps_is_not_said_to_be_running(tmp_path):
    run = write_run(tmp_path / "W", stage="grpo")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"steps": 10**6}))
    text = page_of(run).text
    assert "of 1,000,000 steps so far" in text
    assert "in training" not in text


def test_an_unknown_metric_is_listed(tmp_path):
    run = write_run(tmp_path / "W")
    lines = [json.loads(line) | {"my_own_number": 3.25} for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", lines)
    assert re.search(r"my_own_number ?Not described here ?3.25 ?3.25 ?3.25 ?3.25", page_of(run).text)


@pytest.mark.parametrize("gone", ["config.json", "run.json", "answers", "metrics.jsonl"])
def test_a_missing_or_broken_file_is_no_reason_to_fail(tmp_path, gone):
    run = write_run(tmp_path / "W")
    path = run / gone
    if path.is_dir():
        (path / "step-00000030.jsonl").write_text('{"half')
    else:
        path.unlink()
    page_of(run)
    if not path.is_dir() and gone != "metrics.jsonl":
        path.write_text("{")
        assert f"{gone} cannot be read" in page_of(run).text


@pytest.mark.parametrize(
    "told", [{}, {"stages": 3}, {"stages": [3, {}, {"name": 1, "measures": {"a": {"value": "x"}}}]}]
)
def test_a_pipeline_that_says_little_has_a_page(tmp_path, told):
    (tmp_path / "pipeline.json").write_text(json.dumps(told))
    page_of(tmp_path)


RECORD = {
    "lines": ["3 documents, 1 dropped"], "sessions": [{"start": 0, "step": 30, "seconds": 9.5}],
    "command": ["launch.py"], "mesh": {"dp": 2}, "placement": [{"path": "embed", "shape": [8], "cuts": {"dp": 0}}],
    "expert_load": {"step": 30, "shares": [[0.25, 0.75]]},
}  # fmt: skip


@pytest.mark.parametrize("damage, section", [
    ({}, ""), ({"command": None}, "Machine"), ({"sessions": [{"seconds": None}]}, "Machine"),
    ({"peak_flops": "x"}, "Machine"), ({"machine": {"card": "H200", "card_memory": None}}, "Machine"),
    ({"placement": -1}, "Mesh and placement"), ({"placement": [{"cuts": [1]}]}, "Mesh and placement"),
    ({"mesh": {"dp": [2]}}, ""), ({"mesh": {"dp": "x", "tp": "y"}}, "The mesh"),
    ({"expert_load": {"step": None, "shares": [[1.0]]}}, "Experts"), ({"expert_load": {"shares": [["a"]]}}, "Experts"),
    ({"expert_load": {"shares": [[1e308, 1e308]]}}, "Experts"),
])  # fmt: skip
def test_a_damaged_record_costs_one_section_and_that_is_said(tmp_path, damage, section):
    run = write_run(tmp_path / "W")
    (run / "run.json").write_text(json.dumps(RECORD | damage))
    text = page_of(run).text
    assert "3 documents, 1 dropped" in text
    said = re.findall(r"([\w ,]+) cannot be shown: ", text)
    assert len(said) == bool(section)
    assert all(section in one for one in said)


@pytest.mark.parametrize("damage", [
    {"workdir": "01_W\0"}, {"workdir": "x" * 5000}, {"name": "\ud800 $a$b$"}, {"from": "."}, {"seconds": 1e308},
    {"measures": {"reasoning_thinking": {"value": 1e308, "low": 0, "high": 1e308, "n": 10**400}}},
])  # fmt: skip
def test_a_damaged_pipeline_has_a_page_and_a_picture(tmp_path, damage):
    place = write_pipeline(tmp_path / "P", [write_run(tmp_path / name) for name in "VW"])
    told = json.loads((place / "pipeline.json").read_text())
    told["stages"][0] |= damage
    (place / "pipeline.json").write_text(json.dumps(told))
    page = page_of(place)
    assert "2. W" in page.text
    assert "cannot be shown" not in page.text
    assert write_picture(place, tmp_path / "x.svg").stat().st_size


@pytest.mark.parametrize("key, values", [
    ("loss", (1.0, 1.7e308)), ("loss", (-1.7e308, 1.7e308)), ("grad_norm", (1e308, 1.0)), ("reward/$a$b$", (1.0, 2.0)),
    ("val_accuracy", (1e308, 0.5)), ("loss", (10**400, 1.0)),
])  # fmt: skip
def test_any_numbers_and_names_are_drawn(tmp_path, key, values):
    run = write_run(tmp_path / "W", stage="grpo")
    write_lines(run / "metrics.jsonl", [{"step": step, key: value} for step, value in enumerate(values, 1)])
    text = page_of(run).text
    assert "cannot be shown" not in text


def verdict_of(run):
    return re.search(r'<p class="verdict">(.*?)</p>', write_report(run).read_text())[1]


@pytest.mark.parametrize("stage, key, values, words", [
    ("grpo", "val_accuracy", (0.1, 0.9), "Changed since step 1, without an interval that could call it a gain "
                                         "or a loss: right answers."),
    ("dpo_online", "val_wins", (0.5, 0.75), "Changed since step 1, without an interval"),
    ("pretrain", "val_loss", (2.5, 2.5), "Unchanged since step 1: held-out loss."),
    ("pretrain", "val_loss", (2.5, 2.0), "Better since step 1: held-out loss."),
])  # fmt: skip
def test_where_nothing_has_an_interval_none_is_spoken_of(tmp_path, stage, key, values, words):
    run = write_run(tmp_path / "W", stage=stage)
    write_lines(run / "metrics.jsonl", [{"step": step, key: value} for step, value in enumerate(values, 1)])
    assert verdict_of(run).startswith(words)


def test_a_directory_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="has neither pipeline.json nor a run's config.json"):
        read(tmp_path)
    (tmp_path / "pipeline.json").write_text("[]")
    with pytest.raises(UserError, match=r"pipeline\.json holds a JSON list"):
        read(tmp_path)


def test_a_page_of_nine_long_stages_stays_below_two_megabytes_and_says_that_curves_are_thinned(tmp_path):
    write_run(tmp_path / "W", steps=5000)
    place = write_pipeline(tmp_path / "P", [tmp_path / "W"] * 9, names=[f"stage_{i}" for i in range(9)])
    text = render(read(place))
    assert len(text.encode()) < 2_000_000
    assert "Each point is the mean of 17 logged values; the band spans the lowest and the highest." in text


def test_a_stage_outside_of_the_pipelines_directory_is_not_read(tmp_path):
    secret = write_run(tmp_path / "secret", text="secret words")
    place = write_pipeline(tmp_path / "P", [secret])
    told = json.loads((place / "pipeline.json").read_text())
    told["stages"][0]["workdir"] = "../secret"
    (place / "pipeline.json").write_text(json.dumps(told))
    assert "secret words" not in page_of(place).text
