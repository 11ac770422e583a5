"""Rows of the benchmarks in the schemas of their data sets, made here, and local copies of them in several layouts.

Shared by the tests and by what records other programs' answers on the same rows.
"""

import json

import pyarrow
import pyarrow.parquet

NAMES = ("Ada", "Ben", "Cleo", "Dov", "Eli", "Fay", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "drums", "eggs", "forks")
PLACES = ("Rome", "Lima", "Oslo", "Cairo", "Quito")


def gsm8k(count, start=0):
    out = []
    for i in range(start, start + count):
        a, b, who, what = 7 * i + 3, 5 * i + 11, NAMES[i % 8], THINGS[i % 6]
        steps = f"{who} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} {what}.\n#### {a + b:,}"
        out.append({"question": f"{who} has {a} {what} and buys {b}. How many {what} is that?", "answer": steps})
    return out


def mmlu(subject, count, start=0):
    out = []
    for i in range(start, start + count):
        choices = [f"{PLACES[(i + j) % 5]}, {10 * j + i}" for j in range(4)]
        question = f" Which place comes {'first' if i % 2 else 'last'} in the {subject} of {NAMES[i % 8]}, year {i}? "
        out.append({"question": question, "subject": subject, "choices": choices, "answer": (3 * i + 1) % 4})
    return out


def math(kind, count):
    answers = [
        r"\frac{3}{4}",
        "12",
        r"\sqrt{5}",
        "1,000",
        "(2,3)",
        r"90^\circ",
        r"\text{even}",
        "x^2+1",
        "6\\text{ cm}",
    ]
    return [
        {
            "problem": f"Find the {kind} number {i} of ${NAMES[i % 8]}_{i}$.",
            "level": f"Level {i % 5 + 1}",
            "type": kind,
            "solution": f"By rule {i}, the answer is $\\boxed{{{answers[i % len(answers)]}}}$.",
        }
        for i in range(count)
    ]


def arc(count, start=0):
    out = []
    for i in range(start, start + count):
        options = 3 + i % 3
        labels = [str(j + 1) for j in range(options)] if i % 4 == 3 else list("ABCDE"[:options])
        texts = [f"{THINGS[(i + j) % 6]} of {'very ' * (j % 3)}{PLACES[j % 5]}" for j in range(options)]
        question = f"What does {NAMES[i % 8]} see in the year {1900 + i}, when it rains?"
        out.append(
            {
                "id": f"q{i}",
                "question": question,
                "choices": {"text": texts, "label": labels},
                "answerKey": labels[i % 3],
            }
        )
    return out


def hellaswag(count, start=0):
    out = []
    for i in range(start, start + count):
        endings = [f"{'slowly ' * j}takes the  {THINGS[(i + j) % 6]} [substeps] home." for j in range(4)]
        first = f"[header] How to carry {THINGS[i % 6]} [title] Pick   them up. [step] {NAMES[i % 8]} bends down."
        second = "the man in É. town" if i % 3 else ""
        out.append(
            {"ind": i, "activity_label": "Carrying things", "ctx_a": first, "ctx_b": second, "ctx": f"{first} {second}",
             "endings": endings, "source_id": f"w~{i}", "split": "val", "split_type": "indomain", "label": str(i % 4)}
        )  # fmt: skip
    return out


def winogrande(count, start=0):
    out = []
    for i in range(start, start + count):
        a, b = NAMES[i % 8], NAMES[(i + 3) % 8]
        sentence = f"{a} asked {b} for {THINGS[i % 6]} because _ had {'none' if i % 2 else 'many of them'}  left."
        out.append({"sentence": sentence, "option1": a, "option2": b, "answer": str(i % 2 + 1)})
    return out


def triviaqa(count, start=0):
    out = []
    for i in range(start, start + count):
        place = PLACES[i % 5]
        aliases = [place, f"The {place}", f"{place} (city)", f"{place.upper()}-on-sea"]
        answer = {"aliases": aliases, "normalized_aliases": [x.lower() for x in aliases], "value": place, "type": "x"}
        out.append({"question": f"Where did {NAMES[i % 8]} sell {i} {THINGS[i % 6]}", "question_id": f"t{i}",
                    "question_source": "made", "answer": answer})  # fmt: skip
    return out


def humaneval(count):
    return [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def add_{i}(x: int) -> int:\n    """Add {i}.\n    >>> add_{i}(1)\n    {i + 1}\n    """\n',
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n    assert candidate(-2) == {i - 2}\n",
            "entry_point": f"add_{i}",
        }
        for i in range(count)
    ]


SUBJECTS = ("abstract_algebra", "world_religions")
KINDS = ("Algebra", "Counting & Probability")

SPLITS = {
    "gsm8k": {"train": gsm8k(12, 100), "test": gsm8k(6)},
    "mmlu": {
        "dev": [row for subject in SUBJECTS for row in mmlu(subject, 5, 50)],
        "test": [row for subject in SUBJECTS for row in mmlu(subject, 4)],
    },
    "math": {"test": [row for kind in KINDS for row in math(kind, 3)]},
    "arc_challenge": {"train": arc(9, 40), "test": arc(6)},
    "hellaswag": {"train": hellaswag(9, 40), "validation": hellaswag(5)},
    "winogrande": {"train": winogrande(9, 40), "validation": winogrande(6)},
    "triviaqa": {"train": triviaqa(9, 40), "validation": triviaqa(5)},
    "humaneval": {"test": humaneval(3)},
}


def write(root, layout="jsonl"):
    """Write local copies of all below `root`: JSON lines, parquet named as on the Hub, or what save_to_disk writes."""
    for name, splits in SPLITS.items():
        place = root / name
        place.mkdir(parents=True)
        if layout == "save_to_disk":
            import datasets  # takes seconds to import

            datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(str(place))
            continue
        for split, rows in splits.items():
            if layout == "parquet":
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), place / f"{split}-00000-of-00001.parquet")
            else:
                (place / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
