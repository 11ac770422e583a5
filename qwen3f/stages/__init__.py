"""The training stages, one file each; qwen3f/train/stage.py says what a stage defines. Imports no torch."""

from pathlib import Path


def names() -> list[str]:
    """Values of config.stage; it may also be the import path of your own module."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "configs"))
