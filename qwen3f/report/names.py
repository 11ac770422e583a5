"""What names in a log mean, in words for someone who sees them for the first time. A new metric is a line in METRICS."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Better = Literal["higher", "lower", ""]


@dataclasses.dataclass(frozen=True)
class Meaning:
    """title: short. meaning: a sentence. unit: of the values; "share" for one between 0 and 1, shown as percent."""

    title: str
    meaning: str
    unit: str = ""
    better: Better = ""


M = Meaning
METRICS: dict[str, Meaning] = {
    # every stage
    "loss": M("training loss", "How wrong the model's predictions are on what it trains on.", "nats a token", "lower"),
    "grad_norm": M("gradient norm", "Length of the gradient before clipping; a jump means a step out of the ordinary."),
    "grad_norm_clipped": M("gradient norm, clipped", "Length of the gradient that the update used."),
    "lr": M("learning rate", "How far an update moves the weights; the schedule sets it."),
    "tokens_per_sec": M("tokens a second", "Training speed: places of rows, padding included.", "tokens/s", "higher"),
    "mfu": M("MFU", "Model FLOPs utilisation: useful arithmetic as a share of the device's peak.", "share", "higher"),
    "tokens_seen": M("tokens seen", "Predicted tokens since the stage began.", "tokens"),
    "peak_memory_gib": M("peak memory", "Most memory of the card in use so far.", "GiB", "lower"),
    "withheld": M("withheld updates", "Updates that were not made because they were not finite.", "", "lower"),
    "padding": M("padding", "Share of places in rows that hold nothing.", "share", "lower"),
    "supervised": M("supervised places", "Share of places whose next token is trained.", "share"),
    "visual": M("picture places", "Share of places that stand for a part of a picture.", "share"),
    "patches": M("patches used", "Share of a row's room for picture patches that is filled.", "share"),
    "left_out": M("left out", "Documents that a stream has left out so far, by reason.", "documents", "lower"),
    # experts
    "aux_loss": M("balancing loss", "Pushes routers to use all experts; with an even load it is the number of experts a token takes.", "", "lower"),
    "router_z_loss": M("router z-loss", "Keeps the routers' logits small.", "", "lower"),
    "load_entropy": M("load entropy", "Evenness of the experts' load; ln of their number if even.", "nats", "higher"),
    "load_max_violation": M("fullest expert", "By how much the fullest expert of any layer exceeds its even share: 1 is twice as much.", "", "lower"),
    "load_mean_violation": M("mean unevenness", "Mean distance of an expert's load from its even share: 0 is even.", "", "lower"),
    "dropped_share": M("dropped choices", "Share of expert choices that were dropped because the expert was full.", "share", "lower"),
    # held-out, general
    "val_loss": M("held-out loss", "How wrong the predictions are on data that is never trained on.", "nats a token", "lower"),
    "val_bpb": M("bits a byte", "Bits needed for a byte of held-out text; independent of the tokenizer.", "bits", "lower"),
    "val_accuracy": M("right answers", "Share of held-out questions answered right.", "share", "higher"),
    "val_well_formed": M("well-formed answers", "Share of answers in the asked form: one thought, then an answer; or an answer alone.", "share", "higher"),
    "val_exact": M("right answers about pictures", "Share of held-out questions about pictures whose answer is right to the letter.", "share", "higher"),
    "val_blind": M("with other pictures", "The same questions with the pictures exchanged: what guessing reaches.", "share"),
    "val_majority": M("most frequent answer", "What always giving a topic's most frequent answer would reach.", "share"),
    "bench": M("benchmark", "Score in a benchmark.", "share", "higher"),
    # preferences
    "accuracy": M("pairs ranked right", "Share of the step's pairs whose better answer has the higher value.", "share", "higher"),
    "val_margin": M("held-out margin", "By how much better answers are valued above worse ones.", "", "higher"),
    "val_calibration": M("calibration error", "How far the model's confidence is from how often it is right.", "share", "lower"),
    "reward_margin": M("reward margin", "By how much better answers' implicit reward exceeds worse ones'.", "", "higher"),
    "chosen_reward": M("reward of better answers", "beta times the log-ratio to the reference.", "", "higher"),
    "rejected_reward": M("reward of worse answers", "beta times the log-ratio to the reference.", "", "lower"),
    "chosen_log_prob": M("log-probability of better answers", "Of whole answers; it may fall while the margin grows.", "nats"),
    "rejected_log_prob": M("log-probability of worse answers", "Of whole answers.", "nats"),
    "score_margin": M("score margin", "By how much better answers' score exceeds worse ones'.", "", "higher"),
    "chosen_score": M("score of better answers", "Mean of the step's pairs."),
    "rejected_score": M("score of worse answers", "Mean of the step's pairs."),
    "answers_wins": M("wins against the reference", "Share of held-out questions answered better than the model it started from; equals count half.", "share", "higher"),
    "answers_accuracy": M("right answers", "Share of held-out questions answered right.", "share", "higher"),
    "answers_well_formed": M("well-formed answers", "Share of held-out answers in the asked form.", "share", "higher"),
    "answers_tokens": M("tokens an answer", "Mean length of held-out answers.", "tokens"),
    "asked": M("prompts asked", "Prompts of a step.", "prompts"),
    "ties": M("prompts without a pair", "Share of prompts whose answers were all alike, so that nothing was learnt.", "share", "lower"),
    "ended": M("answers that ended", "Share of answers that ended by themselves.", "share", "higher"),
    "answer_tokens": M("tokens an answer", "Mean length of the step's answers.", "tokens"),
    # reinforcement
    "reward": M("reward", "Mean reward of the step's answers; the rules of config.rewards give it.", "", "higher"),
    "unjudged": M("unjudged", "Share of answers whose reward failed.", "share", "lower"),
    "groups": M("prompts", "Prompts that were sampled in a step.", "prompts"),
    "groups_wasted": M("prompts without a difference", "Share of prompts whose answers all have one reward, so that they teach nothing.", "share", "lower"),
    "groups_all_best": M("prompts solved by all", "Share of prompts whose answers all have the highest reward.", "share"),
    "draws": M("draws", "Batches of prompts drawn for a step.", "batches"),
    "completion_tokens": M("mean length", "Tokens an answer, mean.", "tokens"),
    "completion_tokens_max": M("longest", "Tokens of the step's longest answer.", "tokens"),
    "truncated": M("cut off", "Share of answers that did not end before the limit.", "share", "lower"),
    "kl": M("distance to the start", "Estimated KL divergence from the model it is held to.", "nats"),
    "sampler_kl": M("sampler to trainer", "KL between the log-probabilities of the engine that samples and of the trainer.", "nats", "lower"),
    "sampler_gap": M("largest sampler gap", "Largest difference of a log-probability between engine and trainer.", "nats", "lower"),
    "correction": M("correction", "Mean weight that corrects for the engine's difference; 1 is none."),
    "entropy": M("entropy", "How undecided the model is about the next token; near 0 it has stopped exploring.", "nats"),
    "clip_low": M("clipped below", "Share of tokens whose ratio hit the lower bound.", "share"),
    "clip_high": M("clipped above", "Share of tokens whose ratio hit the upper bound.", "share"),
    "ratio_gap": M("ratio gap", "Mean distance of the policy ratio from 1 within the step."),
    "moved": M("moved within a step", "Estimated KL of the policy from that which sampled.", "nats"),
    "rollout_seconds": M("sampling", "Seconds of a step spent on writing answers.", "s", "lower"),
    "reward_seconds": M("judging", "Seconds of a step spent on judging them.", "s", "lower"),
    "update_seconds": M("updating", "Seconds of a step spent on the update.", "s", "lower"),
    "rollout_tokens_per_sec": M("sampling speed", "Tokens a second while sampling.", "tokens/s", "higher"),
    "update_tokens_per_sec": M("update speed", "Tokens a second of the update alone.", "tokens/s", "higher"),
    # what a pipeline measures of every stage's model, on the same questions
    "reasoning_thinking": M("right answers, thinking first", "Share of held-out problems answered right by a model that thinks first.", "share", "higher"),
    "reasoning_plain": M("right answers, at once", "Share of held-out problems answered right without a thought.", "share", "higher"),
}  # fmt: skip

# In these stages a name means something else.
OF_STAGE: dict[tuple[str, str], Meaning] = {
    ("grpo", "loss"): M("policy loss", "What an update lowers: advantages times log-probabilities. It has no trend to look for; the reward does."),
    ("grpo", "tokens_per_sec"): M("tokens a second", "Tokens trained in a second of the whole step, sampling included.", "tokens/s", "higher"),
    ("dpo", "loss"): M("preference loss", "How wrong the ranking of pairs is.", "nats a pair", "lower"),
    ("dpo_online", "loss"): M("preference loss", "How wrong the ranking of the model's own answers is.", "nats a pair", "lower"),
    ("reward_model", "loss"): M("ranking loss", "How wrong the scores rank pairs.", "nats a pair", "lower"),
    ("dpo", "val_loss"): M("held-out loss", "The same of pairs that are never trained on.", "nats a pair", "lower"),
    ("reward_model", "val_loss"): M("held-out loss", "The same of pairs that are never trained on.", "nats a pair", "lower"),
    ("dpo", "val_accuracy"): M("held-out pairs ranked right", "Share of pairs that are never trained on.", "share", "higher"),
    ("reward_model", "val_accuracy"): M("held-out pairs ranked right", "Share of pairs that are never trained on.", "share", "higher"),
    ("dpo_online", "val_wins"): M("wins against the reference", "Share of held-out questions answered better than the model it started from; equals count half.", "share", "higher"),
    ("dpo_online", "val_tokens"): M("tokens an answer", "Mean length of held-out answers.", "tokens"),
}  # fmt: skip
MODES = {"thinking": "thinking first", "plain": "at once"}


def find(name: str, stage: str = "") -> Meaning | None:
    """Of a logged name; "/GROUP" and "_MODE" behind a known one are said in its title. None for an unknown one."""
    base, _, group = name.partition("/")
    if base.startswith("bench_"):
        return dataclasses.replace(METRICS["bench"], title=f"{base.removeprefix('bench_')}: {group}")
    mode = ""
    if (known := _known(base, stage)) is None:
        base, _, mode = base.rpartition("_")
        if mode not in MODES or (known := _known(base, stage)) is None:
            return None
    title = ", ".join(filter(None, (known.title, MODES.get(mode), group)))
    return dataclasses.replace(known, title=title)


def _known(base: str, stage: str) -> Meaning | None:
    return OF_STAGE.get((stage, base)) or METRICS.get(base)


PURPOSES = {
    "sft": "Fine-tuning: the model learns to answer questions from worked examples.",
    "reward_model": "A reward model: it learns to score answers from pairs of a better and a worse one.",
    "dpo": "Preference training: of two answers to a question the better one becomes likelier.",
    "dpo_online": "Online preference training: the model learns from the best and the worst of its own answers.",
    "grpo": "Reinforcement learning: the model tries each question several times and learns from what was right.",
    "multimodal": "Training on pictures: the model learns to answer questions about images.",
}


def purpose_of(config: Mapping[str, Any]) -> str:
    """What a run is for, in a sentence."""
    kind = str(config.get("stage", ""))
    if kind == "pretrain":
        begun = "goes on learning" if config.get("init_from") else "learns"
        return f"Pretraining: the model {begun} to predict the next token of text."
    return PURPOSES.get(kind, f"A stage of its own: {kind}." if kind else "A training run.")
