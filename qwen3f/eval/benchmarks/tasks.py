"""A task of qwen3f.tasks as a benchmark: its held-out questions as chats, judged by the task."""

from collections.abc import Sequence

from qwen3f.eval.benchmarks.benchmark import Benchmark, Generation, Item, Shots
from qwen3f.tasks.task import Task


def task_benchmark(task: Task) -> Benchmark:
    """Metric: accuracy. An answer that the task cannot judge counts as wrong; so does one that did not end."""

    def score(item: Item, answers: Sequence[str]) -> dict[str, float]:
        return {"accuracy": float(task.judge(answers[0], item.gold) or 0.0)}

    return Benchmark(
        name=task.name,
        hub_id="",
        columns=(),
        split="heldout",
        read=lambda row: Item(row.name, row.values["prompt"], row.values["gold"], group=row.values["group"]),
        metrics=("accuracy",),
        shots=Shots(most=0),
        generation=Generation(),
        score=score,
        task=task,
    )
