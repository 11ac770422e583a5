"""Calls in processes that can be killed: results, failures, deadlines, and nothing that is left behind."""

import os
import signal
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3f.processes import killable as killable_module
from qwen3f.processes.killable import Killable

HERE = "tests.processes.test_killable"


def double(x):
    return 2 * x


def act(name, x=0):
    """Several functions as one, for `map`."""
    return globals()[name](x) if name == "double" else globals()[name]()


def naps():
    time.sleep(0.4)
    return 1


def here():
    return os.getpid()


def fails():
    raise ValueError("no")


def hangs():
    while True:
        time.sleep(1)


def spins(path):
    open(path, "w").close()
    while True:
        pass


def dies():
    os._exit(3)


def no_json():
    return object()


def long():
    return "x" * (2 << 20)


def loaded():
    return "tests.processes.slow_to_load" in sys.modules


def starts_a_child():
    if (pid := os.fork()) == 0:
        time.sleep(600)
    return pid


@pytest.fixture(scope="module")
def killable():
    with Killable(2, 2.0) as found:
        yield found


def test_results_in_order(killable):
    for count in (0, 1, 20, 300):
        outcomes = killable.map(f"{HERE}:double", [{"x": n} for n in range(count)])
        assert [outcome.value for outcome in outcomes] == [2 * n for n in range(count)]


FAILURES = {
    "fails": "ValueError: no",
    "hangs": "took longer than 2 s",
    "dies": "its process ended: exit code 3",
    "no_json": "its result is not JSON",
    "long": "more than 1,048,576 bytes",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_costs_its_own_call_alone(name, killable):
    """Also the others of its batch, of which 40 calls in two processes have several."""
    calls = [{"name": name} if n in (3, 4, 39) else {"name": "double", "x": n} for n in range(40)]
    for n, outcome in enumerate(killable.map(f"{HERE}:act", calls)):
        if n in (3, 4, 39):
            assert outcome.value is None
            assert FAILURES[name] in outcome.failure
        else:
            assert (outcome.value, outcome.failure) == (2 * n, "")
    assert FAILURES[name] in killable.call(f"{HERE}:act", name=name).failure
    assert killable.call(f"{HERE}:double", x=1).value == 2


def test_a_function_that_is_not_there_fails_every_call(killable):
    outcomes = killable.map(f"{HERE}:missing", [{}] * 20)
    assert all("AttributeError" in outcome.failure for outcome in outcomes)
    assert killable.map("no.such:thing", [{}])[0].failure.startswith("ModuleNotFoundError")


def test_every_call_of_a_batch_has_its_own_deadline(monkeypatch):
    monkeypatch.setattr(killable_module, "_batches", lambda numbers, count, most: [numbers])
    with Killable(1, 1.0) as one:
        assert [outcome.value for outcome in one.map(f"{HERE}:naps", [{}] * 4)] == [1] * 4


@given(numbers=st.lists(st.integers(), max_size=300), count=st.integers(1, 16), most=st.integers(1, 20))
def test_batches(numbers, count, most):
    batches = list(killable_module._batches(numbers, count, most))
    assert [number for batch in batches for number in batch] == numbers
    sizes = [len(batch) for batch in batches]
    assert all(1 <= size <= most for size in sizes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-min(count, len(numbers)) :] == [1] * min(count, len(numbers))


def test_a_call_that_fails_keeps_its_process():
    with Killable(1, 10.0) as one:
        first = one.call(f"{HERE}:here").value
        assert one.call(f"{HERE}:fails").failure
        assert one.call(f"{HERE}:here").value == first


def test_what_is_loaded_first_is_no_part_of_the_deadline():
    with Killable(1, 1.0) as one:
        assert not one.call(f"{HERE}:loaded").value
        assert one.call(f"{HERE}:loaded", ["tests.processes.slow_to_load"]).value
        assert one.map(f"{HERE}:double", [{"x": 2}], ["tests.processes.slow_to_load", "no.such"])[0].value == 4


def test_an_import_that_takes_too_long_is_named(monkeypatch):
    monkeypatch.setattr(killable_module, "START_SECONDS", 1.0)
    with Killable(1, 9.0) as one:
        failure = one.call(f"{HERE}:here", ["tests.processes.slow_to_load"]).failure
    assert failure == "took longer than 1 s to start and import"


def test_what_a_killed_process_had_started_ends_with_it():
    with Killable(1, 2.0) as one:
        child = one.call(f"{HERE}:starts_a_child").value
        assert one.call(f"{HERE}:hangs").failure
    deadline = time.monotonic() + 20
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(child)


def test_processes_that_die_between_calls_leave_no_descriptors():
    with Killable(1, 10.0) as one:
        counts = []
        for _ in range(3):
            os.kill(one.call(f"{HERE}:here").value, signal.SIGKILL)
            (child,) = one._children
            child._process.wait()
            counts.append(len(os.listdir("/proc/self/fd")))
        assert counts == counts[:1] * 3


def test_the_answer_of_a_call_that_was_interrupted_is_not_the_next_ones(monkeypatch):
    def interrupted(child, until):
        raise KeyboardInterrupt

    with Killable(1, 10.0) as one:
        with monkeypatch.context() as patch:
            patch.setattr(killable_module._Child, "_line", interrupted)
            with pytest.raises(KeyboardInterrupt):
                one.call(f"{HERE}:double", x=1)
        assert one.call(f"{HERE}:double", x=2).value == 4


def test_a_call_under_way_ends_with_its_parent(tmp_path):
    """When a parent is killed, the kernel closes the pipe. A call under way gets no other sign.

    The test closes the pipe, as the kernel would.
    """
    found, begun = [], tmp_path / "begun"
    with Killable(1, 600.0) as one:
        call = threading.Thread(target=lambda: found.append(one.call(f"{HERE}:spins", path=str(begun))))
        call.start()
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (child,) = one._children
        child._process.stdin.close()
        call.join(20)
        assert not _lives(child._process.pid)
        one.close()  # ends a process that is still alive
        call.join()
    assert found[0].failure == "its process ended: exit code -9"


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_threads_share_it(killable):
    found = []

    def one(n):
        found.append(killable.call(f"{HERE}:double", x=n).value)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 2, 4, 6, 8, 10]
