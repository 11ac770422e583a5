"""The benchmarks by name."""

import difflib

from qwen3f.data.sources.reasoning import FAMILIES
from qwen3f.errors import UserError
from qwen3f.eval.benchmarks.arc import ARC_CHALLENGE
from qwen3f.eval.benchmarks.benchmark import Benchmark
from qwen3f.eval.benchmarks.chartqa import CHARTQA
from qwen3f.eval.benchmarks.docvqa import DOCVQA
from qwen3f.eval.benchmarks.gsm8k import GSM8K
from qwen3f.eval.benchmarks.hellaswag import HELLASWAG
from qwen3f.eval.benchmarks.humaneval import HUMANEVAL
from qwen3f.eval.benchmarks.math import MATH
from qwen3f.eval.benchmarks.mmlu import MMLU
from qwen3f.eval.benchmarks.tasks import task_benchmark
from qwen3f.eval.benchmarks.textvqa import TEXTVQA
from qwen3f.eval.benchmarks.triviaqa import TRIVIAQA
from qwen3f.eval.benchmarks.vqav2 import VQAV2
from qwen3f.eval.benchmarks.winogrande import WINOGRANDE
from qwen3f.tasks.registry import open_text_task

TEXT = (MMLU, GSM8K, MATH, HUMANEVAL, ARC_CHALLENGE, HELLASWAG, WINOGRANDE, TRIVIAQA)
VISION = (VQAV2, TEXTVQA, DOCVQA, CHARTQA)
_NAMED = {one.name: one for one in (*TEXT, *VISION)}
_TASKS = tuple(FAMILIES)


def parse_benchmarks(text: str, flag: str) -> list[tuple[Benchmark, str]]:
    """ "gsm8k,mmlu@DIR" -> [(benchmark, directory or "")]. Raises UserError for unknown or repeated names, for an empty
    text, and for a directory after a benchmark of generated problems.

    flag: the flag with this text, for the message.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, at, directory = part.partition("@")
        if at and not directory:
            raise UserError(f"{flag}={text}: {part!r} names no directory after the @; write {name}@DIR")
        benchmark = _find(name, flag)
        if directory and benchmark.task:
            raise UserError(f"{flag}={text}: {name} is generated and reads no directory; write {name} alone")
        found.append((benchmark, directory))
    if not found:
        raise UserError(f"{flag} is empty; write one or more of {', '.join((*_NAMED, *_TASKS))}")
    names = [one.name for one, _ in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{flag}={text} names {repeated[0]} twice; write it once")
    return found


def _find(name: str, flag: str) -> Benchmark:
    if name in _TASKS:
        return task_benchmark(open_text_task(name, flag))
    if name not in _NAMED:
        near = difflib.get_close_matches(name, (*_NAMED, *_TASKS), n=1)
        hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join((*_NAMED, *_TASKS))}"
        raise UserError(f"{flag}: there is no benchmark {name!r}; {hint}")
    return _NAMED[name]
