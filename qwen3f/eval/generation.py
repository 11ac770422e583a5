"""Answers written by the model, cut as the harness cuts them."""

import dataclasses
from collections.abc import Sequence

from qwen3f.errors import UserError
from qwen3f.eval.benchmarks.pictures import Picture
from qwen3f.eval.evaluator import Evaluator
from qwen3f.infer.engine import Engine
from qwen3f.infer.pictures import Pictures
from qwen3f.infer.sampling import SamplingParams
from qwen3f.tasks.answer_text import after_thinking
from qwen3f.vision.preprocess import MAX_PIXELS, MIN_PIXELS, image_patches, merged_tokens

PICTURES = 16  # decoded at a time: a page of a document may take a hundred megabytes


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled. samples: answers to each prompt. temperature: 0 is greedy. seed: of the random numbers.
    min_pixels, max_pixels: pictures are scaled to a size between these."""

    max_new_tokens: int
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class Written:
    """text: without the stop token. ended: by a stop token or a text of `until`. truncated: the prompt was cut."""

    text: str
    ended: bool
    truncated: bool


def write(
    ev: Evaluator,
    prompts: Sequence[str],
    sampling: Sampling,
    numbers: Sequence[int],
    until: Sequence[str] = (),
    images: Sequence[Picture] = (),
) -> list[list[Written]]:
    """`samples` answers to each prompt, in order. numbers: the prompts' numbers, which decide their random streams.

    until: texts that end an answer; the answer includes them. images: one picture for each prompt, which stands at its
    <|image_pad|>; () for prompts without pictures. A prompt that leaves no room for max_new_tokens is cut on its left,
    as in the harness; a prompt with a picture is not cut. Raises UserError if max_new_tokens leave no room for a
    prompt, or too little for one with its picture; for a picture that cannot be read; and for logits that are not
    finite.
    """
    room, tokenizer = ev.cfg.max_position_embeddings - sampling.max_new_tokens, ev.tokenizer
    if room < 1:
        raise UserError(
            f"--config.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt in the model's "
            f"{ev.cfg.max_position_embeddings} positions; write less"
        )
    whole = [tokenizer.encode(prompt, allow_special=True) for prompt in prompts]
    # the engine's KV cache takes most of the GPU's memory, so the engine lives no longer than this call
    engine = Engine(ev.cfg, ev.params, seed=sampling.seed, execution=ev.execution, tokenizer=tokenizer)
    out: list[list[Written]] = [[] for _ in prompts]
    size = PICTURES if images else max(1, len(prompts))
    for first in range(0, len(prompts), size):
        asked, seen = whole[first : first + size], None
        if images:
            shown = [
                _shown(ev, *pair, room, sampling) for pair in zip(asked, images[first : first + size], strict=True)
            ]
            asked, seen = [ids for ids, _ in shown], [pictures for _, pictures in shown]
        found = engine.generate(
            [ids[-room:] for ids in asked],
            SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p),
            max_new_tokens=sampling.max_new_tokens,
            n=sampling.samples,
            streams=[n * sampling.samples + i for n in numbers[first : first + size] for i in range(sampling.samples)],
            pictures=seen,
            stop_texts=tuple(until),
        )
        for one in found:
            if one.finish_reason.startswith("error"):
                raise UserError(one.finish_reason.removeprefix("error: ") + ", or use dtype=float32")
            ids = one.ids[:-1] if one.ids and one.ids[-1] in tokenizer.stop_ids else one.ids
            text, ended = tokenizer.decode(ids, skip_special=True), one.finish_reason == "stop"
            out[first + one.prompt_index].append(Written(text, ended, len(asked[one.prompt_index]) > room))
    return out


def _shown(
    ev: Evaluator, ids: Sequence[int], image: Picture, room: int, sampling: Sampling
) -> tuple[list[int], Pictures]:
    """A prompt's ids with as many placeholders as its picture takes, and the picture."""
    pad = ev.cfg.image_token_id
    if ids.count(pad) + ids.count(ev.cfg.video_token_id) > 1:
        raise UserError(f"{image.row} holds the text of <|image_pad|> or <|video_pad|>, which stands for a picture: "
                        "remove it")  # fmt: skip
    patches, grid = image_patches(image.open(), ev.cfg, sampling.min_pixels, sampling.max_pixels)
    count, place = merged_tokens(grid, ev.cfg), ids.index(pad)
    out = [*ids[:place], *[pad] * count, *ids[place + 1 :]]
    if len(out) > room:
        less = f"write a smaller --config.max_pixels than {sampling.max_pixels}"
        raise UserError(
            f"the question of {image.row} has {len(out)} tokens with its picture, and the model's positions leave room "
            f"for {room}; {less if len(ids) <= room else 'its words alone are too many: remove the row'}"
        )
    return out, Pictures.of([(patches, grid)])


def cut(text: str, until: Sequence[str], thinking: bool) -> str | None:
    """The final answer in `text`: what follows the thinking, up to a text of `until`. None if the thinking did not end.

    thinking: whether the prompt asked for thinking; if not, <think> and </think> are ordinary text.
    """
    if thinking:
        behind = after_thinking(text)
        if behind is None:
            return None
        text = behind.lstrip()
    for end in until:
        text = text.partition(end)[0]
    return text
