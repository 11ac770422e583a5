"""short_pauses() freezes what is alive when settle() is called: the garbage collector skips it until the end."""

import gc
import weakref

import pytest

from qwen3f.train.guards.gc import short_pauses


class Node:
    def __init__(self):
        self.itself = self


def test_what_is_there_is_left_out_until_the_end():
    garbage, kept = weakref.ref(Node()), Node()
    with short_pauses() as settle:
        settle()
        assert garbage() is None
        assert gc.get_freeze_count() > 0
        assert kept.itself is kept
        assert all(x is not kept for x in gc.get_objects())
        kept = weakref.ref(kept)
        gc.collect()
        assert kept() is not None  # a cycle that was alive at settle()
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert kept() is None


def test_an_error_ends_it_too():
    def fail():
        with short_pauses() as settle:
            settle()
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert gc.get_freeze_count() == 0
