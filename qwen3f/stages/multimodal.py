"""Training on chats with pictures: next-token prediction of the assistant's tokens, with text chats mixed in.

Qwen3-VL (arXiv:2511.21631, §3) first trains its mergers alone, then everything. config.optimizer.rates
(qwen3f.train.optimizer) sets which parts learn, and how fast, by patterns of parameter paths, such as TOWER and ALIGNER
below.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from qwen3f.data.chat.heldout import measured_rows
from qwen3f.data.corpus import cache_directory
from qwen3f.data.multimodal.dataset import Document, VisualCorpus, VisualDataConfig, VisualDataset, prepare_visual
from qwen3f.data.multimodal.dataset import check as check_data
from qwen3f.data.multimodal.tokenizer import trained_tokenizer
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.eval.exact import make_exact
from qwen3f.eval.heldout import batches_of_one_shape
from qwen3f.eval.picture_answers import answer_chosen, chosen
from qwen3f.params import Params
from qwen3f.stages.sft import make_heldout_loss
from qwen3f.train.next_steps import ASK_PICTURE, EXPORT
from qwen3f.train.objective import NEXT_TOKEN, check_model
from qwen3f.train.restore import check_tokenizer, find_tokenizer
from qwen3f.train.setup import Setup, at_least
from qwen3f.train.stage import Evaluator, Interrupted, Run, Stage

# Patterns for config.optimizer.rates: the vision tower, and the mergers that turn its output into tokens (also those
# of DeepStack).
TOWER = r"model\.visual\.(patch_embed|pos_embed|blocks|deepstack_fusion_list)\..*"
ALIGNER = r"model\.visual\.(merger|deepstack_merger_list)\..*"


def check(setup: Setup) -> None:
    """Raises UserError for settings in data and eval that cannot run."""
    check_model(setup.model, NEXT_TOKEN)
    if setup.execution.invariant:
        raise UserError("config.attention=invariant is for text, not for images; write --config.attention=auto")
    check_data(_data_config(setup), setup.config.seq_len, setup.model)
    at_least(setup.config, "eval.max_rows", 0)


def make(run: Run) -> Stage:
    setup, config = run.setup, run.setup.config
    data, place = _data_config(setup), find_tokenizer(setup, run.workdir)
    if place:
        tokenizer = load_tokenizer(place, config.chat_template)
    else:
        tokenizer = trained_tokenizer(data, setup.model.vocab_size, cache_directory(config.data.cache))
        tokenizer.chat_template = config.chat_template
    check_tokenizer(tokenizer, setup.model)
    corpus = prepare_visual(data, config.seq_len, tokenizer, setup.model)
    return Stage(
        tokenizer=tokenizer,
        dataset=corpus.train,
        objective=NEXT_TOKEN,
        evaluators={"val": _evaluator(run, corpus, tokenizer)},
        figures=_figures,
        lines=tuple(corpus.describe()),
        next=(ASK_PICTURE, EXPORT),
    )


def _data_config(setup: Setup) -> VisualDataConfig:
    fields = {field.name for field in dataclasses.fields(VisualDataConfig)}
    return VisualDataConfig(**{key: value for key, value in setup.config.data.items() if key in fields})


def _figures(batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Metrics of a batch: shares of its places that are padding, supervised, and visual tokens; share of its patch
    places that are used."""
    patches = batch["grids"].prod(-1).sum(1).float() / batch["pixel_values"].shape[1]
    return {
        "padding": (batch["segments"] == 0).float().mean().item(),
        "supervised": (batch["loss_weights"] > 0).float().mean().item(),
        "visual": (batch["visual_index"] > 0).float().mean().item(),
        "patches": patches.mean().item(),
    }


def _evaluator(run: Run, corpus: VisualCorpus, tokenizer: Tokenizer) -> Evaluator:
    """Evaluates "loss" on held-out chats, by source; on one device also the answers, over all questions and by topic.

    "exact": share of answers that greedy decoding gives to the letter. "blind": the same with the pictures of other
    rows. "majority": the share that always answering a topic's most frequent answer would reach.
    """
    evaluate = make_heldout_loss(run, corpus.heldout)
    asks = run.world.size == 1 and corpus.heldout
    answered = _make_answered(run, corpus) if asks else lambda params: ({}, [])
    lines: list[dict[str, Any]] = []

    def validate(params: Params) -> dict[str, float]:
        own_words = _in_own_words(run, corpus, tokenizer, params) if asks else []
        values, marked = answered(params)
        lines[:] = own_words + marked
        return {**evaluate(params), **values}

    def say(values: Mapping[str, float]) -> str:
        parts = [f"held-out loss {values['loss']:.4f}"] if "loss" in values else []
        parts += [f"{name} {100 * values[name]:.1f}%" for name in ("exact", "blind", "majority") if name in values]
        for name in (name for name in values if name.startswith("exact/")):
            topic = name.removeprefix("exact/")
            right, *guessed = (100 * values[f"{which}/{topic}"] for which in ("exact", "blind", "majority"))
            parts.append("{} {:.1f}% (blind {:.1f}%, majority {:.1f}%)".format(topic, right, *guessed))
        return ", ".join(parts)

    return Evaluator(run.setup.config.eval.every, validate, say, lambda: lines)


def _in_own_words(run: Run, corpus: VisualCorpus, tokenizer: Tokenizer, params: Params) -> list[dict[str, Any]]:
    """A few held-out questions with their pictures and the model's answers, for the report."""
    setup, lines = run.setup, []
    compute = {path: leaf.to(setup.compute_dtype) for path, leaf in params.items()}
    for dataset in corpus.heldout.values():
        if documents := chosen(dataset):
            lines += answer_chosen(setup.model, compute, tokenizer, dataset, documents, setup.execution)
    return lines


def _make_answered(run: Run, corpus: VisualCorpus) -> Callable[[Params], tuple[dict[str, float], list[dict[str, Any]]]]:
    """answered(params) -> ({"exact", "exact/TOPIC", "blind", …} over held-out rows that have topics, the marks of
    "exact" as logger.answers takes them)."""
    setup, config = run.setup, run.setup.config
    exact = make_exact(setup.model, setup.execution)
    rows = config.eval.batch_size

    def marks(dataset: VisualDataset, params: Params, blind: bool) -> dict[str, list[float]]:
        found: dict[str, list[float]] = defaultdict(list)
        measured = measured_rows(dataset, config.eval.max_rows)
        for number, batch in enumerate(batches_of_one_shape((dataset[i] for i in measured), rows)):
            if run.stopping():
                raise Interrupted
            if blind:
                batch = _with_other_pictures(batch)
            right = exact(params, {key: x.to(setup.device) for key, x in batch.items()}).tolist()
            for of_row, i in zip(right, measured[number * rows :]):
                for segment, chat in enumerate(dataset.members(i)):
                    found[chat.group].append(float(of_row[segment]))
        return found

    def answered(params: Params) -> tuple[dict[str, float], list[dict[str, Any]]]:
        compute = {path: leaf.to(setup.compute_dtype) for path, leaf in params.items()}
        values, lines = {}, []
        for dataset in corpus.heldout.values():
            if any(chat.group for chat in dataset.documents):
                seen, blind = (marks(dataset, compute, how) for how in (False, True))
                measured = (chat for i in measured_rows(dataset, config.eval.max_rows) for chat in dataset.members(i))
                for name, found in (("exact", seen), ("blind", blind), ("majority", _majority(measured))):
                    values[name] = _mean(found)
                    values |= {f"{name}/{topic}": sum(of) / len(of) for topic, of in sorted(found.items())}
                every = (one for found in seen.values() for one in found)
                lines += [{"mode": "exact", "number": i, "mark": one} for i, one in enumerate(every)]
        return values, lines

    return answered


def _with_other_pictures(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same batch with exchanged pictures: rolls the used patches of all rows by half; the grids stay."""
    used = torch.arange(batch["pixel_values"].shape[1]) < batch["grids"].prod(-1).sum(1)[:, None]
    patches = batch["pixel_values"][used]
    shuffled = batch["pixel_values"].clone()
    shuffled[used] = patches.roll(len(patches) // 2 + 1, 0)
    return {**batch, "pixel_values": shuffled}


def _mean(marks: Mapping[str, list[float]]) -> float:
    every = [mark for found in marks.values() for mark in found]
    return sum(every) / max(1, len(every))


def _majority(chats: Iterable[Document]) -> dict[str, list[float]]:
    """By topic, a mark for each question: 1 if the topic's most frequent answer is right for it, else 0. Unordered."""
    answers: dict[str, Counter[bytes]] = defaultdict(Counter)
    for chat in chats:
        answers[chat.group][chat.ids[chat.trained].tobytes()] += 1
    return {
        topic: [1.0] * (most := max(found.values())) + [0.0] * (found.total() - most)
        for topic, found in answers.items()
    }
