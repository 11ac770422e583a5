"""HumanEval (Chen et al. 2021, arXiv:2107.03374): functions to be completed, judged by running their tests.

Source: openai/openai_humaneval, split test (164 rows). Columns: task_id, prompt, canonical_solution, test, entry_point;
no examples. Prompt: the function's head and docstring as they stand; an answer ends before the next class, function,
comment, condition or print at a line's beginning. Metric: pass@k of n samples a problem by the unbiased formula,
1 − C(n − c, k) / C(n, k) for c that pass (equation 1). Programs run in qwen3f.sandbox alone.

In a chat, the prompt asks for the function in words. The last block of Python in the answer that defines the function
counts, else the last block; no other block is added to it, as evalplus adds none. A method of a class is not the
function: the tests call it by its name. This form is our own: the harness's humaneval_instruct begins the answer
itself, which leaves no room to think.
"""

import importlib
import math
import os
import re
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from qwen3f.data.sources.adapters.rows import Row, text_of
from qwen3f.errors import UserError
from qwen3f.eval.benchmarks.benchmark import Benchmark, Generation, Item, Shots
from qwen3f.tasks.fences import defines, program

KS = (1, 10, 100)
_INDENT = "    "  # of the bodies in all prompts
_IMPORT = r"from[ \t]+__future__[ \t]+import[ \t]+[^\n()\\;]*\n"
_FUTURE, _FUTURES = re.compile(f"^{_IMPORT}", re.MULTILINE), re.compile(f"(?:{_IMPORT})*")


def read(row: Row) -> Item:
    prompt = text_of(row, "prompt")
    gold = {"prompt": prompt, "test": text_of(row, "test"), "entry_point": text_of(row, "entry_point")}
    words = "Write a solution to the following problem and make sure that it passes the tests:"
    chat = f"{words}\n```python\n{prompt}\n```\n"
    return Item(f"{row.name} ({row.values['task_id']})", prompt, gold, chat_prompt=chat)


def from_chat(item: Item, answer: str) -> str:
    """The code of a chat answer that makes a program after the prompt: a new definition of the function, or its
    body."""
    name = item.gold["entry_point"]
    block = program(answer, name, unclosed=True)  # a block cut off by max_new_tokens may still pass
    code = answer if block is None else block
    imports, code = "".join(_FUTURE.findall(code)), _FUTURE.sub("", code)
    return imports + (f"\n{textwrap.dedent(code)}" if defines(code, name) else _as_body(code))


def _as_body(code: str) -> str:
    """The lines indented as the body of a function: the first line of code gets that indent, the others with it."""
    first = re.search(r"^([ \t]*)[^\s#]", code, re.MULTILINE)
    indent = first[1] if first else ""
    if indent == _INDENT:
        return code
    return textwrap.indent(re.sub(f"^{indent}", "", code, flags=re.MULTILINE), _INDENT)


def _program(prompt: str, answer: str) -> str:
    """Prompt and answer as one program. Imports from __future__ at the answer's beginning move to the top, as Python
    demands; elsewhere they stay, and the program fails, as in the harness."""
    imports = _FUTURES.match(answer)[0]
    return imports + prompt + answer[len(imports) :]


def score(item: Item, answers: Sequence[str]) -> dict[str, float]:
    from qwen3f.sandbox import run_tests  # here: only this function needs it

    gold = item.gold

    def passes(answer: str) -> bool:
        return bool(run_tests(_program(gold["prompt"], answer), gold["test"], gold["entry_point"]).passed)

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # each waits for a process of its own
        passed = sum(threads.map(passes, answers))
    return {f"pass@{k}": pass_at_k(len(answers), passed, k) for k in KS if k <= len(answers)}


def ready() -> None:
    """Raises UserError where there is no sandbox: a model's programs run nowhere else."""
    try:
        importlib.import_module("qwen3f.sandbox")
    except ImportError as error:
        raise UserError(f"humaneval runs programs in qwen3f.sandbox, which cannot be imported: {error}") from error


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that at least one of k answers passes, drawn from `samples` of which `passed` pass; unbiased."""
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


HUMANEVAL = Benchmark(
    name="humaneval",
    hub_id="openai/openai_humaneval",
    columns=("task_id", "prompt", "test", "entry_point"),
    read=read,
    metrics=("pass@1",),
    shots=Shots(most=0),
    generation=Generation(until=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), max_new_tokens=1024, chat=from_chat),
    score=score,
    together=True,
    ready=ready,
)
