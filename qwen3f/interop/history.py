"""What a model was trained on before, as far as the runs that made it say."""

from qwen3f.checkpoint.checkpointer import Checkpointer
from qwen3f.errors import UserError
from qwen3f.interop import source
from qwen3f.train import workdir as W


def never_saw_chats(place: str) -> bool:
    """Whether the model at `place` (as config.init_from) comes only from runs of pretraining, the first from scratch.

    False also if that can't be known: for a Hugging Face directory, a custom stage, or a run whose own init_from is
    gone.
    """
    seen: set[str] = set()
    while place not in seen:
        seen.add(place)
        try:
            config = _config(place)
        except UserError:
            return False
        if config.get("stage") != "pretrain":
            return False
        place = config.get("init_from", "")
        if not place:
            return True
    return False


def pretrained_only(place: str) -> str:
    """The line to print when such a model is used in chats."""
    return (
        f"config.init_from={place} was only pretrained, on text, and never saw a chat: expect no answers; "
        "experiments/sft_cold_start.py teaches it"
    )


def _config(place: str) -> dict[str, object]:
    """The configuration of the run at `place`, from its checkpoint; {} for a Hugging Face directory."""
    directory, is_hf, step = source.locate(place)
    if is_hf:
        return {}
    with Checkpointer(directory / W.CHECKPOINTS, every=0, keep=0) as checkpoints:
        step = checkpoints.latest() if step is None else step
        return {} if step is None else checkpoints.read_meta(step).get("config", {})
