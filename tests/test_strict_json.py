"""JSON files from others: a key that is there twice is named, and found quickly."""

import time

import pytest

from qwen3f.errors import UserError
from qwen3f.strict_json import read_object


@pytest.mark.parametrize("text, key", [('{"a": 1, "b": 2, "b": 3}', "b"), ('{"x": [{"c": 1, "d": 2, "c": 1}]}', "c")])
def test_a_key_that_is_there_twice_is_named(text, key, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"x.json has the key '{key}' twice"):
        read_object(tmp_path / "x.json")


def test_the_last_of_many_keys_twice_is_found_at_once(tmp_path):
    """In one pass: comparing each key with all the others would take seconds."""
    keys = [f"k{n}" for n in range(30_000)]
    (tmp_path / "x.json").write_text("{" + ",".join(f'"{key}":1' for key in [*keys, keys[-1]]) + "}")
    began = time.process_time()
    with pytest.raises(UserError, match=f"has the key '{keys[-1]}' twice"):
        read_object(tmp_path / "x.json")
    assert time.process_time() - began < 1
