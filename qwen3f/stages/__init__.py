"""The training stages, one a file: what each says is in qwen3f/train/stage.py. Importing this imports no torch."""

from pathlib import Path


def names() -> list[str]:
    """What config.stage may be, beside the import path of a module of one's own."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "configs"))
