"""Rejection sampling: several answers to each question. The right ones become chats to fine-tune on, or the best and
the worst become a pair for DPO.

`own_answers` says what a row is. Question i's answer k has the random stream i · samples + k, so a run that was killed
and resumed gets the same answers as one that was not.
"""

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ml_collections import ConfigDict
from tqdm import tqdm

from qwen3f.config import ModelConfig
from qwen3f.data.chat.corpus import ChatDataConfig, generated_problems
from qwen3f.data.chat.corpus import check as check_data
from qwen3f.data.chat.kinds import check_thinking
from qwen3f.data.chat.recognise import check_chat_tokenizer
from qwen3f.data.chat.template import encode_chat
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.eval.answers import Answer, AnswerOptions, answers_of, make_engine
from qwen3f.eval.own_answers import CHOOSERS, COUNTS, Chosen
from qwen3f.files import user_path, write_atomically
from qwen3f.infer.sampling import SamplingParams
from qwen3f.interop import source
from qwen3f.interop.history import never_saw_chats, pretrained_only
from qwen3f.strict_json import read_object
from qwen3f.tasks.registry import open_text_task
from qwen3f.tasks.task import Question, Task
from qwen3f.train.choices import find_device, find_dtype
from qwen3f.train.lock import NAME as LOCK
from qwen3f.train.lock import held

SAMPLES, SUMMARY = "samples.jsonl", "rejection_summary.json"

_FREE = ("stage", "out", "questions", "batch_size", "device")  # may change when a run resumes
_DATA = ("kinds", "difficulties", "problems", "problem_seed")
_DIGITS = 16  # of the weights' fingerprint, kept and shown


@dataclasses.dataclass
class Progress:
    """What has been sampled so far; read from and written to the summary file.

    Attributes:
      settings: those that the samples depend on.
      bytes: valid length of samples.jsonl; a killed run may have written more after it.
      counts: as a chooser gives them, over all questions. groups: the same for each name in Question.group.
    """

    settings: dict[str, Any]
    bytes: int = 0
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    groups: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)

    def add(self, question: Question, counts: Counter[str]) -> None:
        for counter in (self.counts, *(self.groups.setdefault(name, Counter()) for name in question.group)):
            counter.update(counts)

    def summary(self) -> dict[str, Any]:
        """Plain JSON."""
        groups = {name: {key: found[key] for key in COUNTS} for name, found in sorted(self.groups.items())}
        counts = {key: self.counts[key] for key in COUNTS}
        return {"counts": counts, "groups": groups, "bytes": self.bytes, "settings": self.settings}

    def as_json(self) -> bytes:
        return (json.dumps(self.summary(), indent=2, ensure_ascii=False) + "\n").encode()


def run(config: ConfigDict, workdir: Path, progress: bool = True) -> dict[str, Any]:
    """Sample as `config` says into config.out, resuming what is there; returns the summary. The workdir is not used.

    Raises UserError, with nothing changed, for what cannot run: a key that is missing or wrong, a directory that holds
    something else or samples by other settings, and as qwen3f.interop.source does.
    """
    task = _check(config)
    place = source.pinned(config.init_from)
    cfg = source.read_model_config(place)
    tokenizer = load_tokenizer(source.tokenizer_path(place), config.chat_template)
    check_thinking(check_chat_tokenizer(tokenizer), True)
    if never_saw_chats(place):
        print(pretrained_only(config.init_from), file=sys.stderr, flush=True)
    questions = list(islice(task.questions("train"), config.questions or None))
    _check_lengths(config, cfg, tokenizer, questions)
    device = find_device(config.device)
    dtype = find_dtype(config.dtype, device)
    out = user_path(config.out, "config.out")
    chosen = {f"data.{key}": value for key, value in config.data.items()} | config.to_dict()
    settings = {key: value for key, value in chosen.items() if key not in (*_FREE, "data")}
    with held(out, "--config.out"):
        # another model may have been written to the same place since
        weights = source.weights_digest(place)[:_DIGITS]
        done = _progress(out, {**settings, "init_from": place, "weights": weights})
        if done.counts["questions"] < len(questions):
            params = source.read_params(place, cfg, device, dtype)
            options = AnswerOptions(config.max_new_tokens, config.temperature, config.seed, 0, config.batch_size)

            engine = make_engine(cfg, params, tokenizer, options)

            def ask(prompts: Sequence[str], first: int) -> Iterator[Answer]:
                return answers_of(engine, prompts, True, dataclasses.replace(options, first=first))

            _sample(config, questions, partial(CHOOSERS[config.rows], task, config.keep), ask, done, out, progress)
        print("\n".join(_describe(config, done)), flush=True)
    return done.summary()


def _check(config: ConfigDict) -> Task:
    """The task of config.task, with the problems of config.data. Raises UserError for keys that cannot work."""
    for key in ("init_from", "out"):
        if not config[key]:
            raise UserError(f"--config.{key} is missing; write --config.{key}=DIR")
    if config.rows not in CHOOSERS:
        raise UserError(f"--config.rows={config.rows}: write {' or '.join(CHOOSERS)}")
    for key, low in (("questions", 0), ("samples", 1), ("keep", 0), ("max_new_tokens", 1), ("batch_size", 1)):
        if config[key] < low:
            raise UserError(f"--config.{key} must be at least {low}, got {config[key]}")
    try:
        SamplingParams(temperature=config.temperature)
    except UserError as error:
        raise UserError(f"--config.temperature: {error}") from None
    if config.rows == "pairs" and config.samples < 2:
        raise UserError(f"--config.samples={config.samples}: a pair is of two answers; write 2 or more")
    if config.samples > 1 and not config.temperature:
        raise UserError(f"--config.samples={config.samples} would all be the same: write --config.temperature=0.6")
    data = ChatDataConfig(**{key: config.data[key] for key in _DATA})
    check_data(data)
    return open_text_task(config.task, "--config.task", generated_problems(data, [config.task]))


def _check_lengths(config: ConfigDict, cfg: ModelConfig, tokenizer: Tokenizer, questions: Sequence[Question]) -> None:
    if not questions:
        raise UserError(
            f"--config.task={config.task} has no question to train on; write a larger --config.data.problems"
        )
    messages = [{"role": "user", "content": max((question.prompt for question in questions), key=len)}]
    room = cfg.max_position_embeddings - len(encode_chat(tokenizer, messages, add_generation_prompt=True))
    if config.max_new_tokens > room:
        raise UserError(
            f"--config.max_new_tokens={config.max_new_tokens} after the longest question exceeds the model's "
            f"{cfg.max_position_embeddings} positions; write {room} or less"
        )


def _progress(out: Path, settings: dict[str, Any]) -> Progress:
    """The progress of the run in `out`; an empty one if `out` is empty.

    Raises UserError if `out` holds other files, damaged ones, or samples by other settings.
    """
    path, samples = out / SUMMARY, out / SAMPLES
    if not path.exists():
        if others := sorted(x.name for x in out.iterdir() if x.name != LOCK):
            raise UserError(
                f"--config.out={out} holds {others[0]}, but no {SUMMARY} of a run that could be resumed: name a "
                "directory that is empty or does not exist"
            )
        return Progress(settings)
    there = read_object(path)
    try:
        groups = {name: Counter(found) for name, found in there["groups"].items()}
        done = Progress(there["settings"], int(there["bytes"]), Counter(there["counts"]), groups)
        differing = [key for key in settings if done.settings.get(key) != settings[key]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not what this program writes: put it back, or choose another --config.out"
        ) from error
    if differing:
        key = differing[0]
        name = key if key == "weights" else f"--config.{key}"
        raise UserError(
            f"--config.out={out} holds samples by other settings: {name} was {done.settings.get(key)!r}, and is now "
            f"{settings[key]!r}; choose another --config.out, or set it back"
        )
    if done.bytes > (samples.stat().st_size if samples.exists() else 0):
        raise UserError(f"{samples} is shorter than {path} says: put it back, or choose another --config.out")
    return done


def _sample(
    config: ConfigDict,
    questions: Sequence[Question],
    chooser: Callable[[Question, Sequence[Answer]], Chosen],
    ask: Callable[[Sequence[str], int], Iterator[Answer]],
    done: Progress,
    out: Path,
    progress: bool,
) -> None:
    """Ask the remaining questions; `done` and the files grow by about a batch of answers at a time.

    chooser: a question and its answers -> rows and counts. ask: prompts, and the random stream of the first one, ->
    their answers.
    """
    each, count = config.samples, max(1, config.batch_size // config.samples)
    try:
        write_atomically(out / SUMMARY, done.as_json())  # first: samples.jsonl without a summary belongs to no run
        with (
            (out / SAMPLES).open("r+b" if (out / SAMPLES).exists() else "w+b") as file,
            tqdm(desc="answers", total=len(questions) * each, file=sys.stderr, disable=not progress) as bar,
        ):
            file.truncate(done.bytes)  # drop what a killed run wrote after its last summary
            file.seek(done.bytes)
            bar.update(done.counts["asked"])
            for first in range(done.counts["questions"], len(questions), count):
                part = questions[first : first + count]
                answers = ask([question.prompt for question in part for _ in range(each)], first * each)
                for question in part:
                    rows, counts = chooser(question, list(islice(answers, each)))
                    _append(file, rows)
                    done.add(question, counts)
                    bar.update(each)
                file.flush()
                os.fsync(file.fileno())
                done.bytes = file.tell()
                bar.set_postfix(kept=done.counts["kept"])
                write_atomically(out / SUMMARY, done.as_json())
    except OSError as error:
        raise UserError(
            f"--config.out={out} cannot be written ({error.strerror or error}): fix that and write the same command "
            "again; it resumes"
        ) from error


def _append(file: BinaryIO, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _describe(config: ConfigDict, done: Progress) -> list[str]:
    n, samples = done.counts, Path(config.out) / SAMPLES
    lines = [
        f"{n['asked']:,} answers to {n['questions']:,} questions: {n['right']:,} right, {n['wrong']:,} wrong, "
        f"{n['not_ended']:,} not ended, {n['unjudged']:,} not to be judged",
        f"{n['kept']:,} pairs of a better and a worse answer; {n['questions'] - n['solved']:,} questions have no pair, "
        f"as no answer is better; {n['malformed']:,} malformed answers"
        if config.rows == "pairs"
        else f"of the right ones {n['kept']:,} kept, to {n['solved']:,} questions; {n['repeated']:,} repeated, "
        f"{n['surplus']:,} beyond --config.keep={config.keep}, {n['malformed']:,} malformed",
    ]
    for name, found in sorted(done.groups.items()):
        share = found["right"] / max(1, found["asked"])
        lines.append(f"{name}: {share:.1%} of {found['asked']:,} right, {found['kept']:,} kept")
    what = "experiments/dpo.py trains" if config.rows == "pairs" else "fine-tune"
    use = f"{what} on it by --config.data.mixture={config.rows}@{config.out}" if n["kept"] else "nothing to train on"
    return [*lines, f"{samples}: {use}"]
