"""A run of GRPO on random weights: short questions, a few tokens, a reward that random text earns unequally."""

from qwen3f.stages.configs import grpo_config
from tests.stages import toy_chats

LENGTH, NEW = 192, 6
MOE = toy_chats.MOE | {"router_balance": "global_exact"}  # other values depend on how rows are cut
SMALL = toy_chats.SMALL  # of 300 ids, of which the tokenizer has 266


def write_data(root):
    for kind, more in (("dense", {}), ("moe", MOE), ("reward", {"scalar_head": True})):
        toy_chats.write_weights(root / kind, SMALL | more)


def make_config(root, kind="dense", **changes):
    """Four steps in float64: four prompts of the shortest kind, four completions each, two micro-batches at least."""
    c = grpo_config("nano")
    c.dtype, c.device = "float64", "cpu"
    c.model.update(SMALL | (MOE if kind == "moe" else {}))
    c.init_from = str(root / kind)
    c.rewards = "tests.rl.toy_rewards:small_letters=1,length=0.1"
    c.data.update(kinds="sequence", difficulties="1", problems=200, cache=str(root / "cache"))
    c.update(steps=4, batch_size=4, microbatches=2, seq_len=LENGTH, log_every=1)
    c.rollout.update(samples=4, max_new_tokens=NEW)
    c.judge.processes = 1
    c.schedule.update(kind="constant", peak_lr=1e-2, warmup=0)
    c.eval.update(every=2, batch_size=8, questions=4, max_new_tokens=NEW)
    c.checkpoint.update(every=2, keep=0)
    c.update_from_flattened_dict(changes)
    return c
