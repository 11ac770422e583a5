"""A few rows of every data set in its real schema, all columns, written for the tests; and files made of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet


def _web(text: str, n: int) -> dict:
    return {
        "text": text,
        "id": f"<urn:uuid:{n}>",
        "dump": "CC-MAIN-2013-20",
        "url": f"http://example.org/{n}",
        "date": "2013-05-18T05:48:54Z",
        "file_path": "s3://commoncrawl/x.warc.gz",
        "language": "en",
        "language_score": 0.97,
        "token_count": len(text.split()),
    }


def _completion(model: str, response: str, ratings: Sequence[str], overall: float) -> dict:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    kinds = {"helpfulness", "truthfulness"}
    return {
        "annotations": {
            aspect: {"Rating": rating, "Rationale": "Because."}
            | ({"Type": ["1"], "Rationale For Rating": "So."} if aspect in kinds else {})
            for aspect, rating in zip(aspects, ratings)
        },
        "custom_system_prompt": "As an AI assistant, be honest.",
        "critique": "Fine.",
        "fine-grained_score": 4.0,
        "model": model,
        "overall_score": overall,
        "principle": "honesty",
        "response": response,
    }


def _preference(instruction: str, completions: list[dict]) -> dict:
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": [completion["model"] for completion in completions],
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def _hermes(turns: list[tuple[str, str]], system: str | None = None) -> dict:
    return {
        "custom_instruction": None,
        "topic": None,
        "model_name": None,
        "model": None,
        "skip_prompt_formatting": False,
        "category": "orca",
        "conversations": [{"from": who, "value": text, "weight": None} for who, text in turns],
        "views": None,
        "language": None,
        "id": None,
        "title": None,
        "idx": None,
        "hash": None,
        "avatarUrl": None,
        "system_prompt": system,
        "source": "airoboros2.2",
    }


def _numina(problem: str, solution: str) -> dict:
    messages = [{"content": problem, "role": "user"}, {"content": solution, "role": "assistant"}]
    return {"source": "cn_k12", "problem": problem, "solution": solution, "messages": messages}


ROWS: dict[str, list[dict]] = {
    "fineweb": [_web("The sea is wide.\nShips sail.", 1), _web("Größe zählt 大", 2), _web("three", 3)],
    "slimpajama": [
        {"text": "def f():\n    return 1\n", "meta": {"redpajama_set_name": "RedPajamaGithub"}},
        {"text": "A page.", "meta": {"redpajama_set_name": "RedPajamaC4"}},
    ],
    "open-web-math": [
        {
            "url": "http://m.org",
            "text": "Let $x^2 = 4$.",
            "date": "2016-05-01 02:00:00",
            "metadata": '{"extraction": {}}',
        },
        {"url": "http://n.org", "text": "Then $x = 2$.", "date": "2016-05-02 02:00:00", "metadata": "{}"},
    ],
    "proof-pile-2-arxiv": [
        {"text": "\\section{Intro} We prove.", "meta": {"timestamp": "2019", "yymm": "1901", "arxiv_id": "1901.1"}},
    ],
    "proof-pile-2-algebraic-stack": [
        {"text": "theorem a : 1 = 1 := rfl", "meta": {"size": 24, "ext": "lean", "lang": "Lean"}},
    ],
    "pg19": [
        {
            "short_book_title": "A Book by Someone",
            "publication_date": 1887,
            "url": "http://www.gutenberg.org/ebooks/1",
            "text": "CHAPTER I.\n\n" + "It was late. " * 30,
        },
    ],
    "openmathinstruct-2": [
        {
            "problem": "What is $2 + 3$?",
            "generated_solution": "Adding gives $2 + 3 = 5$.\n\nSo $\\boxed{5}$.",
            "expected_answer": "5",
            "problem_source": "augmented_gsm8k",
        },
        {
            "problem": "Halve 1.",
            "generated_solution": "\n$\\boxed{\\frac{1}{2}}$\n",
            "expected_answer": "\\frac{1}{2}",
            "problem_source": "math",
        },
    ],
    "numinamath-cot": [
        _numina("Solve $x^2=4$, $x>0$.", "Roots are $\\pm 2$, so \\boxed{ 3 - 1 } that is $\\boxed{\\{2\\}}$."),
        _numina("Prove that 1 = 1.", "It is so by reflexivity."),
        _numina("Double 4.", "It is $\\boxed{8}$"),
    ],
    "ultrachat": [
        {
            "prompt": "Hi there",
            "prompt_id": "a" * 64,
            "messages": [
                {"content": "Hi there", "role": "user"},
                {"content": "Hello!", "role": "assistant"},
                {"content": "And the weather?", "role": "user"},
                {"content": "Sunny.\nWarm.", "role": "assistant"},
            ],
        },
        {
            "prompt": "Bye",
            "prompt_id": "b" * 64,
            "messages": [{"content": "Bye", "role": "user"}, {"content": "the end", "role": "assistant"}],
        },
    ],
    "openhermes-2.5": [
        _hermes([("human", "Name a bird."), ("gpt", "A robin.")]),
        _hermes([("system", "Be brief."), ("human", "Why?"), ("gpt", "So."), ("human", "Really?"), ("gpt", "Yes.")]),
        _hermes([("human", "Hello"), ("gpt", "Hi."), ("human", "Still there?")]),
        _hermes([("human", "Who?"), ("gpt", "Me.")], system="You are Ann."),
        _hermes([("system", ""), ("human", "One?"), ("gpt", "1")], system=""),
    ],
    "gsm8k": [
        {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
        {"question": "A lot?", "answer": "1000*1234=<<1000*1234=1234000>>1,234,000\n#### 1,234,000"},
    ],
    "math": [
        {
            "problem": "Find $x$.",
            "level": "Level 3",
            "type": "Algebra",
            "solution": "First \\boxed{1}. No: $x = \\boxed{\\frac{1}{\\sqrt{2}}}.$",
        },
        {"problem": "Draw.", "level": "Level 1", "type": "Geometry", "solution": "See the figure."},
    ],
    "ultrafeedback": [
        _preference(
            "Say hi.",
            [
                _completion("a", "Hm.", ["2", "3", "N/A", "4"], 8.0),  # mean 3
                _completion("b", "Hi!", ["5", "5", "5", "4"], 7.0),  # 4.75, the best
                _completion("c", "Go away.", ["1", "2", "1", "3"], 10.0),  # 1.75, the worst
                _completion("d", "Hi there!", ["5", "5", "4", "5"], 9.0),  # 4.75 too, listed later
            ],
        ),
        _preference("Tie.", [_completion("a", "x", ["3", "3", "3", "3"], 1.0), _completion("b", "y", ["3"] * 4, 9.0)]),
        _preference("One.", [_completion("a", "x", ["3"] * 4, 1.0), _completion("b", "y", ["N/A"] * 4, 9.0)]),
        _preference("Two?", [_completion("a", "No.", ["1"] * 4, 1.0), _completion("b", "2", ["2"] * 4, 1.0)]),
    ],
    "llava-instruct-150k": [
        {
            "id": "000000033471",
            "image": "000000033471.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat colour is it?"},
                {"from": "gpt", "value": "Red."},
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes."},
            ],
        },
        {
            "id": "2",
            "image": "deep/2.png",
            "conversations": [{"from": "human", "value": "Describe.\n<image>"}, {"from": "gpt", "value": "Blue."}],
        },
    ],
}


def write(rows: Sequence[dict], path: Path, chunk: int = 2) -> Path:
    """The rows as a file; its suffix chooses the format. Row groups and batches hold `chunk` rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    name = path.name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=chunk)
    elif name.endswith(".arrow"):
        table = pyarrow.Table.from_pylist(list(rows))
        new = pyarrow.ipc.new_file if "file" in name else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=chunk)
    elif name.endswith(".json"):
        path.write_text(json.dumps(list(rows), ensure_ascii=False, indent=1))
    elif name.endswith(".jsonl"):
        path.write_bytes(lines)
    else:  # .jsonl.gz or .jsonl.zst
        with pyarrow.output_stream(str(path), compression="gzip" if name.endswith(".gz") else "zstd") as sink:
            sink.write(lines)
    return path
