"""Sources of chats: file formats, data sets by name, one split for each question, the judge, and counts of rows that
are left out.
"""

import json
import shutil
from collections import Counter

import pytest

from qwen3f.data.chat.kinds import INSTRUCT, THINKING
from qwen3f.data.chat.samples import Sample
from qwen3f.data.chat.sources import open_chats
from qwen3f.data.chat.template import split_thought
from qwen3f.data.sources.adapters.registry import names
from qwen3f.data.sources.documents import HOLDOUT, is_heldout
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.errors import UserError
from qwen3f.tasks.reasoning import ReasoningTask
from tests.data.chat.conversations import TOOLS, answer, call, tool, user
from tests.data.sources.adapters.real_rows import ROWS, write

PROBLEMS = ReasoningSource(num_problems=300)
CHATS = [
    {"messages": [user(f"q{n}"), answer(f"a{n}", "t" if n % 2 else None), user("more"), answer(f"b{n}")]}
    for n in range(40)
]


def _open(name, **options):
    return open_chats(name, "", PROBLEMS, **options)


def _both(source, counts=None):
    return [sample for split in ("train", "heldout") for sample in source.documents(split, counts)]


@pytest.mark.parametrize("file", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.json", "x.parquet", "x.arrow"])
def test_chats_of_every_form_of_file(file, tmp_path):
    write(CHATS, tmp_path / file)
    source = _open(f"chats@{tmp_path}")
    found = _both(source)
    assert len(found) == 80
    assert {sample.messages[0]["content"] for sample in found} == {f"q{n}" for n in range(40)}
    assert {len(sample.messages) for sample in found} == {2, 4}
    first = next(sample for sample in found if sample.messages[0]["content"] == "q1")
    assert split_thought(first.messages[1]) == ("t", "a1")
    assert first.name == f"{tmp_path / file}:2"
    assert len(_both(_open(f"chats@{tmp_path}", turns="all"))) == 40


@pytest.mark.parametrize("file", ["x.jsonl", "x.parquet", "x.arrow"])
def test_a_calls_arguments_and_a_tools_parameters_are_its_own_in_every_form_of_file(file, tmp_path):
    """Tables give each record the fields of all other records, as nulls. These nulls must not appear in a chat."""
    tools = [{"name": "f", "parameters": {"x": "number"}}, {"name": "g", "parameters": {"y": "string"}}]
    rows = [
        {"messages": [user("q"), answer("", None, [call(name, {key: 1})])], "tools": [tool]}
        for name, key, tool in zip("fg", "xy", tools)
    ]
    write(rows, tmp_path / file)
    found = _both(_open(f"chats@{tmp_path}"))
    assert [json.loads(json.dumps(sample.tools)) for sample in found] == [row["tools"] for row in rows]
    assert ['"arguments": {"x": 1}}' in found[0].text, '"arguments": {"y": 1}}' in found[1].text] == [True, True]
    assert "null" not in found[0].text + found[1].text


def test_files_that_are_left_out_are_counted(tmp_path):
    write(CHATS, tmp_path / "train.jsonl")
    for name in ("test.jsonl", "more.jsonl", "notes.md", ".hidden"):
        (tmp_path / name).write_text("{}\n")
    assert _open(f"chats@{tmp_path}").other_files() == dict.fromkeys(("of test", "of no split", ".md", "hidden"), 1)
    assert _open("reasoning").other_files() == {}


def test_tools_and_modes_of_a_row(tmp_path):
    messages = [user("q"), answer("", "t", [call("f", {"x": 1})]), tool("1"), answer("a")]
    write(
        [{"messages": messages, "tools": TOOLS}, {"messages": CHATS[0]["messages"], "enable_thinking": True}],
        tmp_path / "x.jsonl",
    )
    found = _both(_open(f"chats@{tmp_path}"))
    assert sorted((len(s.messages), s.tools is not None, s.enable_thinking) for s in found) == [
        (2, False, True),
        (2, True, True),
        (4, False, True),
        (4, True, False),
    ]


def test_a_question_is_held_out_wherever_it_stands(tmp_path):
    """A question is in the task's split whether it is generated, read from a file or has a switch."""
    heldout = {question.prompt for question in ReasoningTask(num_problems=300).questions("heldout")}
    train = {question.prompt for question in ReasoningTask(num_problems=300).questions("train")}
    for name in ("reasoning", "reasoning-plain"):
        assert {s.messages[0]["content"] for s in _open(name).documents("heldout")} == heldout
        assert {s.messages[0]["content"] for s in _open(name).documents("train")} == train
    rows = [{"messages": [user(f"{question} /no_think"), answer("a")]} for question in sorted(heldout | train)]
    write(rows, tmp_path / "x.jsonl")
    found = {s.messages[0]["content"] for s in _open(f"chats@{tmp_path}").documents("heldout")}
    assert found == {f"{question} /no_think" for question in heldout}
    assert len(heldout) > 5


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_question_with_a_switch_among_its_words_is_in_the_split_of_the_question(at, tmp_path):
    asked = [f"Question {n}: what is it?" for n in range(400)]
    switched = [" ".join([*words[:at], "/no_think", *words[at:]]) for words in map(str.split, asked)]
    found = []
    for name, questions in (("plain", asked), ("switched", switched)):
        write([{"messages": [user(question), answer("a")]} for question in questions], tmp_path / name / "x.jsonl")
        held = _open(f"chats@{tmp_path / name}").documents("heldout")
        found.append([sample.name.rpartition(":")[2] for sample in held])
    assert found[0] == found[1]
    assert len(found[0]) > 5


@pytest.mark.parametrize("options", [{}, {"turns": "all"}, {"switches": 0.5}, {"kind": INSTRUCT}, {"kind": THINKING}])
@pytest.mark.parametrize(
    "messages",
    [
        [user("q"), answer("a", "t\ud800"), user("r"), answer("b")],
        [user("<tool_response>1</tool_response>"), answer("a")],
        [user("<tool_response>1</tool_response>"), answer("a"), user("q"), answer("b")],
    ],
)
def test_rows_that_cannot_be_written_are_skipped_with_the_other_bad_ones(messages, options, tmp_path, tokenizer):
    plain = [{"messages": [user(f"q{n}"), answer("a")]} for n in range(5)]
    lines = [json.dumps(row) for row in (*plain, {"messages": messages})]  # escapes half a surrogate pair
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    counts = Counter()
    found = _both(_open(f"chats@{tmp_path}", on_bad_row="skip", **options), counts)
    assert len(Sample.tokenise(found, tokenizer, 1)[0]) == 5
    assert counts == {"invalid_rows": 2}  # one row, counted once for each split
    with pytest.raises(UserError, match="x.jsonl:6"):
        _both(_open(f"chats@{tmp_path}", **options))


def test_generated_problems_think_or_answer_at_once():
    thinking, plain = list(_open("reasoning").documents("train")), list(_open("reasoning-plain").documents("train"))
    assert len(thinking) == len(plain) > 250
    for long, short in zip(thinking, plain):
        assert long.messages[0] == short.messages[0]
        assert split_thought(long.messages[1])[0]
        assert split_thought(short.messages[1]) == ("", long.messages[1]["content"])
        assert (long.enable_thinking, short.enable_thinking) == (True, False)
    switched = list(_open("reasoning-plain", switches=1.0).documents("train"))
    assert all(sample.messages[0]["content"].endswith(" /no_think") and sample.enable_thinking for sample in switched)


@pytest.mark.parametrize("name", names("sft"))
def test_the_data_sets_by_name(name, tmp_path):
    write(ROWS[name], tmp_path / "train.parquet")
    if name == "ultrachat":
        shutil.move(tmp_path / "train.parquet", tmp_path / "train_sft-0.parquet")
    counts = Counter()
    source = _open(f"{name}@{tmp_path}")
    found = _both(source, counts)
    assert len({sample.name for sample in found}) == len(ROWS[name]) - counts.total() // 2  # both splits count a row
    plain = name in ("ultrachat", "openhermes-2.5")
    for sample in found:
        thought, content = split_thought(sample.messages[-1])
        assert bool(thought) is not plain
        assert content
    assert _open(f"{name}@{tmp_path}", on_bad_row="skip").fingerprint("train") != source.fingerprint("train")


def test_the_judge_keeps_right_answers_and_counts_the_rest(tmp_path):
    def row(number, text, gold):
        return {"messages": [user(f"q{number}"), answer(text, "t")], **({} if gold is None else {"answer": gold})}

    rows = [row(0, r"\boxed{4}", "4"), row(1, r"\boxed{5}", "4"), row(2, "4", "4"), row(3, r"\boxed{4}", None)]
    write(rows, tmp_path / "x.jsonl")
    counts = Counter()
    source = _open(f"chats@{tmp_path}", task=ReasoningTask())
    assert [sample.messages[0]["content"] for sample in source.documents("train", counts)] == ["q0"]
    assert counts == {"wrong_answers": 2, "no_answer": 1}
    assert len(_both(_open("reasoning", task=ReasoningTask()))) == len(_both(_open("reasoning")))

    class Undecided(ReasoningTask):
        def judge(self, answer_text, gold):
            return None

    counts.clear()
    assert list(_open(f"chats@{tmp_path}", task=Undecided()).documents("train", counts)) == []
    assert counts == {"unjudged": 3, "no_answer": 1}


def test_worked_solutions_are_judged_not_the_answer_that_repeats_the_gold(tmp_path):
    rows = [dict(ROWS["openmathinstruct-2"][0]), dict(ROWS["openmathinstruct-2"][0])]
    rows[1] |= {"problem": "What is $3 + 3$?", "expected_answer": "6"}  # its solution says 5
    write(rows, tmp_path / "train.jsonl")
    counts = Counter()
    found = _both(_open(f"openmathinstruct-2@{tmp_path}", task=ReasoningTask()), counts)
    assert [sample.messages[0]["content"] for sample in found] == ["What is $2 + 3$?"]
    assert counts == {"wrong_answers": 2}  # one row, counted once for each split


def test_bad_rows_are_an_error_with_file_and_row_or_counted(tmp_path):
    rows = [
        *CHATS[:3],
        {"messages": [user("q"), user("r")]},
        {"messages": [user("q /no_think"), answer("a", "t")]},
        {"x": 1},
    ]
    file = write(rows, tmp_path / "x.jsonl")
    file.write_text(file.read_text() + "{broken\n")
    with pytest.raises(
        UserError, match=r"x.jsonl:4: Message 1 .* 'user' after 'user'.* \(--config.data.on_bad_row=skip"
    ):
        list(_open(f"chats@{tmp_path}").documents("train"))
    counts = Counter()
    skipping = _open(f"chats@{tmp_path}", on_bad_row="skip")
    found = list(skipping.documents("train", counts))
    assert {sample.name for sample in found} <= {f"{file}:{n}" for n in (1, 2, 3)}
    assert counts == {"roles_out_of_order": 1, "misplaced_thoughts": 1, "missing_columns": 1, "invalid_rows": 1}


def test_fingerprint_follows_files_and_settings(tmp_path):
    write(CHATS, tmp_path / "x.jsonl")
    base = _open(f"chats@{tmp_path}")
    others = [
        _open(f"chats@{tmp_path}", turns="all"),
        _open(f"chats@{tmp_path}", switches=0.5),
        _open(f"chats@{tmp_path}", task=ReasoningTask()),
        _open(f"chats@{tmp_path}", on_bad_row="skip"),
        _open("reasoning"),
        _open("reasoning-plain"),
        open_chats("reasoning", "", ReasoningSource(num_problems=301)),
        _open("ultrachat"),
        _open("openhermes-2.5"),
    ]
    prints = [source.fingerprint("train") for source in (base, *others)] + [base.fingerprint("heldout")]
    write(CHATS[1:], tmp_path / "y.jsonl")
    prints.append(base.fingerprint("train"))
    assert len(set(prints)) == len(prints) == 12


@pytest.mark.parametrize(
    "name, root, message",
    [
        ("chats", "", "must name one directory: write chats@DIR"),
        ("chats@{}/absent", "", "There is no directory .*absent for chats"),
        ("chats@{}", "{}", "must name one directory"),
        ("chats@{}", "", "No .*jsonl.* file lies below"),
        (
            "reasonning",
            "",
            "Unknown source 'reasonning' in --config.data.mixture: write one of reasoning, reasoning-plain",
        ),
        ("fineweb@{}", "", "Unknown source 'fineweb@.*' in --config.data.mixture"),
        ("openai/gsm8k", "", "is for grpo, not sft"),
        ("ultrachat@{}/absent", "", "There is no directory"),
    ],
)
def test_names_that_open_nothing(name, root, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_chats(name.format(tmp_path), root.format(tmp_path), PROBLEMS)


def test_the_share_that_is_held_out():
    assert HOLDOUT == 0.05  # another share would change the split of every stage
    assert is_heldout(b"Compute 1 + 1.", 1.0)
