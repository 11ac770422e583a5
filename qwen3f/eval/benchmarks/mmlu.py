"""MMLU (Hendrycks et al. 2021, arXiv:2009.03300): 57 subjects, four choices, the letter is scored.

Source: cais/mmlu, configuration `all` (or a folder a subject), split test (14,042 rows), examples from dev (5 a
subject). Columns: question, subject, choices (4 texts), answer (0 to 3).
Prompt: a header that names the subject, a blank line; question, "A. …" to "D. …", "Answer:". Metric: acc over all
questions, so subjects count by their size. The harness leaves the number of examples open; here it is 5, the paper's,
the first ones of the subject.
"""

from qwen3f.data.sources.adapters.rows import Row, RowFault, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Item, Shots, integer, texts

LETTERS = ("A", "B", "C", "D")


def read(row: Row) -> Item:
    choices = texts(row, "choices", row.values["choices"], len(LETTERS))
    if len(choices) != len(LETTERS):
        raise RowFault("invalid_rows", f"{row.name} has {len(choices)} choices: write 4.")
    answer = integer(row, "answer", len(LETTERS))
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices))
    prompt = f"{text_of(row, 'question').strip()}\n{listed}Answer:"
    return Item(row.name, prompt, answer, (prompt, LETTERS[answer]), choices=LETTERS, group=text_of(row, "subject"))


def header(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


MMLU = Benchmark(
    name="mmlu",
    hub_id="cais/mmlu",
    configs=("all",),
    folder="all",
    columns=("question", "subject", "choices", "answer"),
    read=read,
    metrics=("acc",),
    shots=Shots(5, "dev", "first"),
    description=header,
)
