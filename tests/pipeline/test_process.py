"""Commands that run at the same time: errors, signals, threads."""

import os
import signal
import sys
import time

from qwen3f.pipeline.process import Command, Signals

WAITS = "import time; time.sleep(60)"
FAILS = "import sys, time; time.sleep(0.3); sys.exit('error: it is broken')"
# creates a file once it can be stopped, then counts the signals that arrive within half a second
COUNTS = """
import signal, sys, time
came = []
signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
open(sys.argv[1], "w").close()
while not came:
    time.sleep(0.01)
time.sleep(0.5)
open(sys.argv[1], "w").write(str(len(came)))
"""


def python(text, *words):
    return Command([sys.executable, "-c", text, *map(str, words)])


def test_the_first_command_that_fails_ends_the_others():
    began = time.monotonic()
    with Signals().caught() as signals:
        assert signals.run(python(WAITS), python(FAILS), python(WAITS)) == (1, 1, "it is broken")
    assert time.monotonic() - began < 30


def test_a_signal_reaches_every_command_once(tmp_path):
    places = [tmp_path / name for name in "ab"]

    def stop_once_both_wait():
        if all(place.exists() for place in places) and not signals.name:
            os.kill(os.getpid(), signal.SIGTERM)

    with Signals().caught() as signals:
        assert signals.run(*(python(COUNTS, place) for place in places), meanwhile=stop_once_both_wait) is None
    assert signals.name == "SIGTERM"
    assert [place.read_text() for place in places] == ["1", "1"]


def test_commands_share_the_cores_unless_the_user_says_how_many_threads(tmp_path, monkeypatch):
    says = "import os, sys; open(sys.argv[1], 'w').write(os.environ.get('OMP_NUM_THREADS', 'unset'))"
    places = [tmp_path / name for name in "ab"]
    for given, together in (("3", "3"), ("", str(max(1, len(os.sched_getaffinity(0)) // 2)))):
        monkeypatch.setenv("OMP_NUM_THREADS", given) if given else monkeypatch.delenv("OMP_NUM_THREADS")
        with Signals().caught() as signals:
            signals.run(*(python(says, place) for place in places))
            assert [place.read_text() for place in places] == [together] * 2
            signals.run(python(says, places[0]))
        assert places[0].read_text() == (given or "unset")
