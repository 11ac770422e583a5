"""Rows of a batch file that cannot be used: each is named by file and line, or counted."""

import json

import pytest

from qwen3f.errors import UserError
from tests.infer.batch_rows import ROWS, write

_DEEP = "[" * 70 + "]" * 70
BAD = [
    (f'{{"prompt": "a", "tools": [{{"name": "t", "x": {_DEEP}}}]}}', "tools 0 is nested more than 64 levels deep"),
    (f'{{"prompt": "a", "id": {_DEEP}}}', '"id" is nested more than 64'),
    (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": '
        '[{"name": "f", "arguments": {"a": NaN}}]}, {"role": "user", "content": "b"}]}',
        '"messages" holds a number that JSON cannot write',
    ),
    ("{", "the line is not JSON"),
    ("[1]", "the line is a JSON list"),
    ('"x"', "the line is a JSON str"),
    ("{}", 'write either "prompt" or "messages"'),
    ('{"prompt": "a", "messages": []}', 'write either "prompt" or "messages"'),
    ('{"prompt": ""}', '"prompt" must be a text that is not empty'),
    ('{"prompt": 3}', '"prompt" must be a text'),
    ('{"prompt": "\\ud800"}', "Character 0 of the text is the lone surrogate"),
    ('{"prompt": "a", "id": "\\ud800"}', "lone surrogate"),
    ('{"prompt": "a", "id": [NaN]}', '"id" holds a number that JSON cannot write'),
    ('{"prompt": "a", "id": 1e999}', '"id" holds a number that JSON cannot write'),
    ('{"prompt": "a", "stop": ["\\ud800"]}', "stop: Character 0 .* lone surrogate"),
    ('{"prompt": "a", "temprature": 1}', "the field 'temprature' is unknown"),
    ('{"prompt": "a", "temperature": -1}', "temperature must be 0"),
    ('{"prompt": "a", "tools": {"name": "t"}}', "tools must be a list of objects"),
    ('{"prompt": "a", "tools": ["t"]}', "tools 0 is a str"),
    ('{"prompt": "a", "tools": [{"name": "t", "x": NaN}]}', "tools holds a number"),
    (r'{"prompt": "a", "tools": [{"name": "\ud800"}]}', "lone surrogate"),
    ('{"prompt": "a", "tools": [{"name": "t"}], "chat": false}', "tools needs the chat format"),
    ('{"prompt": "a", "temperature": NaN}', "temperature must be a number"),
    (f'{{"prompt": "a", "temperature": 1{"0" * 400}}}', "temperature must be a number"),
    ('{"prompt": "a", "top_k": 5.0}', "top_k must be a whole number"),
    ('{"prompt": "a", "seed": [1]}', "seed must be a whole number"),
    ('{"prompt": "a", "seed": 1.5}', "seed must be a whole number"),
    ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens must be at least 1"),
    ('{"prompt": "a", "stop": "x"}', "stop must be a list of texts"),
    ('{"prompt": "a", "thinking": false, "thinking_budget": 4}', "thinking_budget needs"),
    ('{"messages": []}', "A chat needs a list"),
    ('{"messages": [{"role": "user"}]}', "Message 0 has no content"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "end with the user's"),
    ('{"messages": [{"role": "user", "content": "a"}], "chat": false}', "messages need the chat format"),
]


@pytest.mark.parametrize("line, words", BAD)
def test_a_bad_row_is_named_by_file_and_line(answer, tmp_path, line, words, monkeypatch):
    monkeypatch.setattr("qwen3f.interop.source.read_params", None)
    write(tmp_path / "in.jsonl", [ROWS[0], "", line])
    with pytest.raises(UserError, match=rf"in\.jsonl:3: .*{words}"):
        answer()
    assert not (tmp_path / "out.jsonl").exists()


def test_lines_that_are_not_utf8_or_too_long_are_bad_rows(answer, tmp_path, monkeypatch):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "\xe9"}\n')  # a byte order mark at the start is ignored
    with pytest.raises(UserError, match=r"in\.jsonl:2: the line is not UTF-8"):
        answer()
    monkeypatch.setenv("QWEN3F_MAX_ROW_BYTES", "100")
    write(file, [ROWS[0], json.dumps({"prompt": "a" * 500}), ROWS[1]])
    with pytest.raises(UserError, match=r"in\.jsonl:2: the line is over the limit of 100 bytes"):
        answer()
    assert answer(on_bad_row="skip")[0].answered == 2


def test_bad_rows_are_counted_by_choice(answer, tmp_path, capsys):
    long = {"prompt": "word " * 300}  # too long, which shows only when it is tokenised
    write(
        tmp_path / "in.jsonl",
        [ROWS[0], *(line for line, _ in BAD), long, ROWS[1], {"prompt": "a", "max_new_tokens": 250}],
    )
    summary, lines = answer(on_bad_row="skip")
    assert [line["row"] for line in lines] == [0, len(BAD) + 2]
    assert summary.bad == len(BAD) + 2
    assert f"; {len(BAD) + 2} bad rows left out" in capsys.readouterr().err
