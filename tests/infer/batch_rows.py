"""Rows of a batch file, and how they are written and read."""

import json

ROWS = [
    *({"prompt": f"What is é{i}?", "max_new_tokens": 1 + i % 9} for i in range(12)),
    {"prompt": "T", "chat": False, "temperature": 1.0, "id": {"name": "é"}},
    {"prompt": "What is é7?", "thinking": False, "seed": 3, "id": 0},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é8?"}], "stop": ["e"]},
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
