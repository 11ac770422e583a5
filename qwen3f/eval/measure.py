"""Ask a model a benchmark's questions and score its answers: one record for each question."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3f.data.chat.kinds import TemplateKind
from qwen3f.data.chat.recognise import opening
from qwen3f.errors import UserError
from qwen3f.eval.benchmarks.benchmark import Benchmark
from qwen3f.eval.benchmarks.items import Asked
from qwen3f.eval.evaluator import Evaluator
from qwen3f.eval.generation import Sampling, cut, write
from qwen3f.eval.prompts import FORMS, is_chat, prompts, template_of
from qwen3f.eval.statistics import Estimate, estimate
from qwen3f.vision.preprocess import MAX_PIXELS, MIN_PIXELS

METRICS = ("harness", "official")
MOST_SAMPLES = 10**5  # answers to a question
PIXELS = ("min_pixels", "max_pixels")  # settings that only benchmarks with pictures have
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the scores, apart from the model and the questions.

    Attributes:
        prompt: raw or chat. thinking: in chats, whether the model may think first; if not, the prompt ends with an
            empty thinking block.
        shots: few-shot examples; None: the benchmark's own number. max_new_tokens: of an answer; 0: the benchmark's
            own.
        samples: answers to each question: for pass@k of programs; of other benchmarks their mean counts.
        temperature, top_p, seed: of the sampler.
        min_pixels, max_pixels: pictures are scaled to a size between these.
        metrics: harness, or official: the authors' own definition, where it differs.
    """

    prompt: str = "raw"
    thinking: bool = False
    shots: int | None = None
    max_new_tokens: int = 0
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    metrics: str = "harness"
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS

    def check(self, benchmark: Benchmark, vision: bool = False) -> None:
        """Raises UserError for values that are wrong or do not go together. vision: whether the model sees images."""
        for key, allowed in (("prompt", FORMS), ("metrics", METRICS)):
            if getattr(self, key) not in allowed:
                raise UserError(f"--config.{key}={getattr(self, key)!r}: write {' or '.join(allowed)}")
        for key, low in (("max_new_tokens", 0), ("samples", 1), ("temperature", 0)):
            if getattr(self, key) < low:
                raise UserError(f"--config.{key}={getattr(self, key)}: write at least {low}")
        if self.shots is not None and self.shots < 0:
            raise UserError(f"--config.shots={self.shots}: write at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--config.top_p={self.top_p}: write a share above 0, 1 at most")
        if self.samples > MOST_SAMPLES:
            raise UserError(f"--config.samples={self.samples}: write {MOST_SAMPLES:,} or less")
        if self.samples > 1 and not self.temperature:
            raise UserError(f"--config.samples={self.samples} would all be the same: write --config.temperature=0.8")
        if self.thinking and self.prompt == "raw" and not benchmark.task:
            raise UserError("--config.thinking=True needs --config.prompt=chat")
        if self.thinking and benchmark.generation is None:
            raise UserError(
                f"--config.thinking=True: {benchmark.name} scores choices right after the prompt, which leaves no room "
                "for a thought; write --config.thinking=False"
            )
        benchmark.ready()
        if benchmark.vision and not vision:
            raise UserError(f"{benchmark.name} asks about images, and this model cannot see; name another benchmark")

    def tokens(self, benchmark: Benchmark) -> int:
        """New tokens at most; 0 where choices are scored."""
        if benchmark.generation is None:
            return 0
        return self.max_new_tokens or benchmark.generation.max_new_tokens


def question(benchmark: Benchmark, asked: Asked, settings: Settings, kind: TemplateKind) -> Record:
    """The part of a record that describes the question, plain JSON.

    Keys: "number", "name", "group", "question", "prompt", "gold"; if choices are scored also "choices" and
    "continuations"; if it has a picture also "image", the picture's digest.

    "question" is the item's own prompt, without examples and chat form; "prompt" is what the model reads. kind: of the
    chat template. Raises UserError as `prompts`.
    """
    item, read = asked.item, prompts(benchmark, asked, settings.prompt, settings.thinking, kind)
    said = {
        "number": asked.number,
        "name": item.name,
        "group": item.group,
        "question": item.prompt,
        "prompt": read[0] if len(read) == 1 else read,
        "gold": item.gold,
    }
    if benchmark.generation is None:
        said |= {"choices": item.choices, "continuations": item.continuations or item.choices}
    if benchmark.vision:
        said |= {"image": item.image.digest()}
    return json.loads(json.dumps(said))  # lists for tuples, as a file has them


def measure(ev: Evaluator, benchmark: Benchmark, asked: Sequence[Asked], settings: Settings) -> list[Record]:
    """One record for each question, plain JSON: the keys of `question`, "metrics", "truncated".

    If choices are scored, also "loglikelihoods" and "alike". If answers are written, also "outputs" (as written; if the
    prompt ends with "<think>", that comes first), "answers" (as judged) and "ended".
    """
    kind = template_of(benchmark, settings.prompt, ev.tokenizer)
    said = [question(benchmark, one, settings, kind) for one in asked]
    if benchmark.generation is None:
        found = _choose(ev, benchmark, said, settings)
    else:
        found = _answer(ev, benchmark, asked, said, settings)
    return [{**one, **more} for one, more in zip(said, found)]


def _choose(ev: Evaluator, benchmark: Benchmark, said: Sequence[Record], settings: Settings) -> list[Record]:
    questions = [
        {
            "context": one["prompt"],
            "choices": one["choices"],
            "continuations": one["continuations"],
            "answer": one["gold"],
            "delimiter": " " if settings.prompt == "raw" else "",
        }
        for one in said
    ]
    return [
        {
            "loglikelihoods": list(found.log_probs),
            "metrics": {name: found.marks[name] for name in benchmark.metrics},
            "truncated": found.truncated,
            "alike": found.alike,
        }
        for found in ev.choices(questions)
    ]


def _answer(
    ev: Evaluator, benchmark: Benchmark, asked: Sequence[Asked], said: Sequence[Record], settings: Settings
) -> list[Record]:
    how, numbers = benchmark.generation, [one.number for one in asked]
    sampling = Sampling(
        settings.tokens(benchmark),
        **{key: getattr(settings, key) for key in ("samples", "temperature", "top_p", "seed", *PIXELS)},
    )
    images = [one.item.image for one in asked] if benchmark.vision else ()
    score = benchmark.official if settings.metrics == "official" and benchmark.official else benchmark.score
    as_chat = settings.prompt == "chat" and how.chat is not None
    until, out = () if as_chat else how.until, []
    ends = () if settings.thinking else until  # a thought may contain these texts
    begun = opening(ev.tokenizer) if is_chat(benchmark, settings.prompt) else ""
    for one, written in zip(asked, write(ev, [each["prompt"] for each in said], sampling, numbers, ends, images)):
        texts = [begun + w.text for w in written]
        # a task's judge removes the thinking itself, as in its rewards
        answers = [text if benchmark.task else cut(text, until, settings.thinking) or "" for text in texts]
        if as_chat:
            answers = [how.chat(one.item, text) for text in answers]
        if benchmark.together:
            marks = [score(one.item, answers)]
        else:
            # in a task, an answer that did not end is wrong, as in training; the harness judges it as it stands
            wrong = dict.fromkeys(benchmark.metrics, 0.0)
            marks = [
                wrong if benchmark.task and not w.ended else score(one.item, [text])
                for w, text in zip(written, answers, strict=True)
            ]
        out.append(
            {
                "outputs": texts,
                "answers": answers,
                "metrics": {name: sum(mark[name] for mark in marks) / len(marks) for name in marks[0]},
                "ended": [w.ended for w in written],
                "truncated": written[0].truncated,
            }
        )
    return out


def estimates(records: Sequence[Record]) -> dict[str, Estimate]:
    """metric -> its Estimate over all records; there must be at least one."""
    return {name: estimate([record["metrics"][name] for record in records]) for name in records[0]["metrics"]}


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """{"metrics", "groups": {group: metrics}, "questions", "truncated", "alike", "ended"}, plain JSON."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    counts = Counter()
    for record in records:
        counts["truncated"] += record["truncated"]
        counts["alike"] += record.get("alike", False)
        counts["answers"] += len(record.get("ended", ()))
        counts["ended"] += sum(record.get("ended", ()))
    by_group = {group: _plain(estimates(some)) for group, some in groups.items()} if len(groups) > 1 else {}
    names = ("truncated", "alike", "answers", "ended")
    return {
        "metrics": _plain(estimates(records)),
        "groups": by_group,
        "questions": len(records),
        **{name: counts[name] for name in names},
    }


def _plain(found: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: dataclasses.asdict(one) for name, one in found.items()}
