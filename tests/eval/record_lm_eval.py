"""Records what lm_eval 0.4.13 says of a tiny model and of given answers, on the rows of benchmark_rows.py.

    pip install --target L lm_eval==0.4.13 math-verify==0.9.0 antlr4-python3-runtime==4.11.0
    PYTHONPATH=L:. python -m tests.eval.record_lm_eval    (rewrites tests/eval/fixtures/lm_eval.json)

Use an environment of its own: lm_eval needs other versions of packages than our tests may have installed. The model is
that of tests.eval.tiny_model, whose weights depend on the seed alone. It is exported, and lm_eval's HFLM opens it.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import evaluate as hf_evaluate
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from tests.eval import benchmark_rows, given_answers, tiny_model

FIXTURE = Path(__file__).parent / "fixtures" / "lm_eval.json"
TASKS = Path(lm_eval.__file__).parent / "tasks"
YAML = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "mmlu": "mmlu/default/mmlu_{}.yaml",
    "math": "minerva_math/minerva_math_algebra.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "triviaqa": "triviaqa/default.yaml",
    "humaneval": "humaneval/humaneval.yaml",
}
SHOTS = {"mmlu": (0, 5), "gsm8k": (0, 5), "math": (4,), "arc_challenge": (0, 3), "hellaswag": (0, 2),
         "winogrande": (0, 2), "triviaqa": (0, 2), "humaneval": (0,)}  # fmt: skip


def config_of(name, group, root):
    path = TASKS / YAML[name].format(group)
    config = load_yaml(path)
    files = {split: str(root / name / f"{split}.jsonl") for split in benchmark_rows.SPLITS[name]}
    if group:  # each group is a task of its own, with its rows only
        column = "subject" if name == "mmlu" else "type"
        for split, file in files.items():
            rows = [row for row in benchmark_rows.SPLITS[name][split] if row[column] == group]
            files[split] = file.replace(".jsonl", f".{group.replace(' ', '')}.jsonl")
            Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    if "train" not in files:
        config["training_split"] = None
    if config["output_type"] == "generate_until":
        config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": tiny_model.NEW_TOKENS}
    for key in ("include", "tag", "task_alias"):
        config.pop(key, None)
    return config


def task_of(name, group, shots, root):
    task = ConfigurableTask(config={**config_of(name, group, root), "num_fewshot": shots})
    task.set_fewshot_seed(1234)
    return task


def asked(task, lm, limit=None, chat=False):
    """Each document's requests, answers and metrics."""
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": lm.apply_chat_template}
    task.build_all_requests(limit=limit, **(options if chat else {}))
    kind = task.instances[0].request_type
    answers = getattr(lm, kind)(task.instances, disable_tqdm=True)
    for instance, answer in zip(task.instances, answers):
        instance.resps.append(answer)
    task.apply_filters()
    out = []
    for number in sorted({instance.doc_id for instance in task.instances}):
        own = [instance for instance in task.instances if instance.doc_id == number]
        record = {"requests": [list(instance.args[: 1 if kind == "generate_until" else 2]) for instance in own]}
        record["answers"] = [instance.resps[0] for instance in own]
        metrics = {}
        for name in own[0].filtered_resps:
            found = task.process_results(own[0].doc, [instance.filtered_resps[name] for instance in own])
            metrics[name] = {key: float(value) for key, value in found.items()}
        out.append({**record, "metrics": metrics})
    return out


def scores_of_given(task, texts):
    """The metrics of each text as the answer to each document. Not for humaneval, which would run programs."""
    out = []
    for number, doc in enumerate(task.eval_docs):
        rows = []
        for text in texts(number):
            instance = Instance("generate_until", doc, ("", {}), 0, metadata=(task.config.task, number, 1))
            instance.resps.append(text)
            task._instances = [instance]
            task.apply_filters()
            metrics = {}
            for name, answer in instance.filtered_resps.items():
                metrics[name] = {k: float(v) for k, v in task.process_results(doc, [answer]).items()}
            rows.append({"text": text, "metrics": metrics})
        out.append(rows)
    return out


def requests(pairs):
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def main():
    code_eval = SimpleNamespace(compute=lambda **_: ({"pass@1": 0.0}, {}))
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(hf_evaluate, "load", return_value=code_eval):
        root = Path(folder)
        benchmark_rows.write(root / "rows")
        lm = HFLM(pretrained=tiny_model.export(root / "hf"), dtype="float32", device="cpu", batch_size=2)
        short = HFLM(pretrained=str(root / "hf"), dtype="float32", device="cpu", batch_size=2, max_length=24)
        out = {"versions": {"lm_eval": lm_eval.__version__}, "tasks": {}, "chat": {}, "given": {}}
        for name, counts in SHOTS.items():
            groups = {"mmlu": benchmark_rows.SUBJECTS, "math": benchmark_rows.KINDS}.get(name, ("",))
            for shots in counts:
                runs = {group: asked(task_of(name, group, shots, root / "rows"), lm) for group in groups}
                out["tasks"][f"{name}/{shots}"] = runs
        for name in ("arc_challenge", "mmlu", "winogrande"):
            group = benchmark_rows.SUBJECTS[0] if name == "mmlu" else ""
            out["chat"][name] = asked(task_of(name, group, 2, root / "rows"), lm, chat=True)
        for name, texts in given_answers.GENERATED.items():
            group = benchmark_rows.KINDS[0] if name == "math" else ""
            out["given"][name] = scores_of_given(task_of(name, group, 0 if name != "math" else 4, root / "rows"), texts)
        out["pairs"] = {"full": lm.loglikelihood(requests(given_answers.PAIRS), disable_tqdm=True),
                        "short": short.loglikelihood(requests(given_answers.PAIRS), disable_tqdm=True)}  # fmt: skip
        documents = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in given_answers.DOCUMENTS]
        out["rolling"] = short.loglikelihood_rolling(documents, disable_tqdm=True)
    FIXTURE.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    print(f"{FIXTURE}: {FIXTURE.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
