"""Small pairs, and the configurations of runs on them with the random weights of `toy_chats`."""

from qwen3f.stages.configs import dpo_config, dpo_online_config, reward_model_config
from tests.data.chat.conversations import answer, user
from tests.data.sources.adapters.real_rows import write
from tests.stages import toy_chats
from tests.stages.toy_chats import LENGTH, MOE, SMALL


def pair_rows():
    """Pairs of one or two turns, with and without thoughts. One pair is too long for a row."""
    rows = []
    for n in range(60):
        before = [user(f"h{n}"), answer("c")] if n % 5 == 0 else []
        thought = "t" * (n % 4 + 1) if n % 3 == 0 else None
        asked = [*before, user(f"q{n}")]
        chosen, rejected = answer("a" * (n % 7 + 1), thought), answer("b" * (n % 5 + 1), thought)
        rows.append({"chosen": [*asked, chosen], "rejected": [*asked, rejected], "margin": 1 + n % 3})
    asked = [user("z")]
    return [*rows, {"chosen": [*asked, answer("w" * 200)], "rejected": [*asked, answer("v")]}]


def write_data(root):
    write(pair_rows(), root / "pairs" / "x.jsonl")
    for kind, more in (("dense", {}), ("moe", MOE), ("reward", {"scalar_head": True})):
        toy_chats.write_weights(root / kind, SMALL | more)


def make_config(root, stage="dpo", kind="dense", **changes):
    """Four steps in float64 on what `write_data` wrote into `root`, and on generated pairs."""
    c = (reward_model_config if stage == "reward_model" else dpo_config)("nano")
    c.dtype, c.device = "float64", "cpu"
    c.model.update(SMALL | (MOE if kind == "moe" else {}))
    c.init_from = str(root / kind)
    c.data.update(mixture=f"pairs@{root}/pairs=0.7,boxed-or-not-plain=0.3", cache=str(root / "cache"), num_threads=1)
    c.data.update(problems=150, difficulties="1", kinds="arithmetic,sequence")
    c.update(steps=4, batch_size=8, microbatches=2, seq_len=2 * LENGTH, log_every=1, show_samples=0)
    c.schedule.update(kind="constant", peak_lr=1e-2, warmup=0)
    c.eval.update(every=2, batch_size=8)
    c.checkpoint.update(every=2, keep=0)
    c.update_from_flattened_dict(changes)
    return c


def online_config(root, kind="dense", **changes):
    """Four steps in float64. Random weights write answers of at most 24 tokens, most of which do not end."""
    c = dpo_online_config("nano")
    c.dtype, c.device = "float64", "cpu"
    c.model.update(SMALL | (MOE if kind == "moe" else {}))
    c.init_from = str(root / kind)
    c.data.update(problems=150, difficulties="1", kinds="arithmetic,sequence")
    c.update(steps=4, batch_size=8, microbatches=2, seq_len=2 * LENGTH, log_every=1)
    c.schedule.update(kind="constant", peak_lr=1e-2, warmup=0)
    c.online.update(max_new_tokens=24, samples=4, judge="rule", thinking=False)
    c.eval.update(every=2, batch_size=8, questions=4)
    c.checkpoint.update(every=2, keep=0)
    c.update_from_flattened_dict(changes)
    return c
