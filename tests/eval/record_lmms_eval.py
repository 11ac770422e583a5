"""Records the scores that lmms_eval 0.7.3 gives to the answers of vision_answers.py.

    pip install --no-deps --target L lmms_eval==0.7.3 loguru
    PYTHONPATH=L:. python -m tests.eval.record_lmms_eval    (rewrites tests/eval/fixtures/lmms_eval.json)

--no-deps: its requirements would bring torchvision, which changes transformers' default image processor. So only the
modules with the metrics are imported, and mocks replace what these modules import.
"""

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

from tests.eval import vision_answers

FIXTURE = Path(__file__).parent / "fixtures" / "lmms_eval.json"
FILES = {name: f"tasks/{name}/utils.py" for name in ("vqav2", "textvqa", "chartqa")} | {"docvqa": "api/metrics.py"}
ABSENT = ("evaluate", "sacrebleu", "sklearn", "sklearn.metrics", "lmms_eval.api.registry", "loguru")


def package(name):
    module = ModuleType(name)
    module.__path__ = [str(PLACE / name.partition(".")[2].replace(".", "/"))]
    return module


PLACE = Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0])


def load():
    """The four modules with metrics, without running lmms_eval/__init__.py."""
    stubs = {name: mock.MagicMock() for name in ABSENT}
    stubs["lmms_eval.api.registry"].register_metric = lambda **_: lambda f: f
    stubs["lmms_eval.api.registry"].register_aggregation = lambda *_: lambda f: f
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.tasks", "lmms_eval.tasks._task_utils")
    stubs |= {name: package(name) for name in names} | {"lmms_eval.tasks._task_utils.file_utils": mock.MagicMock()}
    with mock.patch.dict(sys.modules, stubs):
        tasks = {}
        for name, file in FILES.items():
            spec = importlib.util.spec_from_file_location(f"recorded_{name}", PLACE / file)
            tasks[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(tasks[name])
    return tasks


def people(answers):
    return {"question_id": 0, "answers": answers}


def main():
    m = load()
    score = {
        "vqav2": lambda gold, x: m["vqav2"].vqav2_process_results(people(gold), [x])["exact_match"],
        "textvqa": lambda gold, x: m["textvqa"].textvqa_process_results(people(gold), [x])["exact_match"],
        "docvqa": lambda gold, x: m["docvqa"].anls(gold, [x])["anls"],
        "chartqa": lambda gold, x: m["chartqa"].relaxed_correctness(x, gold),
    }
    out = {}
    for name, cases in vision_answers.CASES.items():
        out[name] = [float(score[name](copy.deepcopy(gold), answer)) for gold, answer in cases()]
    FIXTURE.write_text(json.dumps(out) + "\n")
    print({name: (len(values), sum(values), len(set(values))) for name, values in out.items()}, file=sys.stderr)


if __name__ == "__main__":
    main()
