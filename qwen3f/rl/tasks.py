"""The tasks of config.tasks: generated problems, data sets, code, and pictures for a model with a vision tower."""

from ml_collections import ConfigDict

from qwen3f.data.chat.corpus import ChatDataConfig, generated_problems
from qwen3f.data.mixture import parse_weights
from qwen3f.data.multimodal.dataset import drawing
from qwen3f.data.sources.reasoning import ReasoningSource
from qwen3f.errors import UserError
from qwen3f.rl.sight import Sight
from qwen3f.tasks.registry import open_text_task
from qwen3f.tasks.task import Task
from qwen3f.tasks.visual import VisualTask
from qwen3f.train.setup import Setup
from qwen3f.vision.preprocess import check_limits, token_side

VISUAL = "visual"


def find_tasks(setup: Setup) -> list[tuple[str, Task, float]]:
    """(name, task, weight) of config.tasks. config.data sets the kinds and difficulties of generated problems."""
    data = setup.config.data
    fields = {key: data[key] for key in ("kinds", "difficulties", "problems", "problem_seed")}
    weights = parse_weights(setup.config.tasks, "--config.tasks")
    problems = generated_problems(ChatDataConfig(**fields), [name for name, _ in weights])
    return [(name, _open(setup, name, problems), weight) for name, weight in weights]


def _open(setup: Setup, name: str, problems: ReasoningSource | None) -> Task:
    if name != VISUAL:
        return open_text_task(name, "--config.tasks", problems)
    config, cfg, judge = setup.config, setup.model, setup.config.judge.reward_model
    if not cfg.vision_enabled:
        raise UserError(
            "--config.tasks=visual asks about pictures, and the run's model has no vision tower; write "
            "--config.model.vision_enabled=True, with --config.init_from=W of a model that sees, or another task"
        )
    alone = setup.layout.axes.shape.size == 1
    for fits, flag in (
        (alone, "mesh"),
        (not setup.execution.invariant, "attention"),
        (not judge, "judge.reward_model"),
    ):
        if not fits:
            raise UserError(
                "--config.tasks=visual runs on one device, without config.attention=invariant and reward models; leave "
                f"--config.{flag} out, or write another task"
            )
    check_limits(token_side(cfg), config.data.min_pixels, config.data.max_pixels, "--config.data.")
    return drawn_task(config.data)


def drawn_task(data: ConfigDict) -> VisualTask:
    """The task about the pictures that this config.data describes. Raises UserError as `drawing`."""
    drawn = drawing(data)
    return VisualTask(drawn.kinds, drawn.seed, drawn.count, drawn.min_side, drawn.max_side)


def find_sight(setup: Setup, tasks: list[tuple[str, Task, float]]) -> Sight | None:
    """The Sight for questions about images, or None if no task has images."""
    data = setup.config.data
    return Sight(setup.model, data.min_pixels, data.max_pixels) if any(name == VISUAL for name, *_ in tasks) else None
