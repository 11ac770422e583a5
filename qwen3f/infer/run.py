"""The stage generate: prompts in from the configuration, answers out on stdout while they are written."""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from qwen3f.config import ModelConfig
from qwen3f.data.chat.kinds import check_thinking
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.chat.template import encode_chat
from qwen3f.data.multimodal.samples import check_tokenizer
from qwen3f.data.tokenizers.token_text import StreamDecoder
from qwen3f.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from qwen3f.errors import UserError
from qwen3f.infer.generate import stream
from qwen3f.infer.prompts import Shown, encode_shown, pictures_of, read_images, read_video
from qwen3f.infer.sampling import GREEDY, NON_THINKING, THINKING, SamplingParams
from qwen3f.infer.thinking import CLOSING, ThinkingBudget
from qwen3f.interop import source
from qwen3f.interop.history import never_saw_chats, pretrained_only
from qwen3f.params import EMBED, Params
from qwen3f.train.choices import find_device, find_dtype


@dataclasses.dataclass
class Answer:
    """One row's answer as it grows; stopped: by a stop id, which counts as a token but is not part of the text."""

    decoder: StreamDecoder
    text: str = ""
    tokens: int = 0
    stopped: bool = False

    def push(self, token: int, stop_ids: Sequence[int]) -> None:
        self.tokens += 1
        self.stopped = token in stop_ids
        self.text += self.decoder.finish() if self.stopped else self.decoder.push(token)


def run(config: ConfigDict, workdir: Path, progress: bool = True) -> list[Answer]:
    """Answer config.prompt or each of config.prompts, and say on stderr how fast; returns the answers.

    The workdir is not used. Raises UserError, before any token is made, for keys that are missing or do not go
    together, and as qwen3f.interop.source does.
    """
    prompts = _prompts(config)
    device = find_device(config.device)
    dtype = find_dtype(config.dtype, device)
    cfg = source.read_model_config(config.init_from)
    tokenizer = load_tokenizer(source.tokenizer_path(config.init_from), config.chat_template)
    thinks = config.chat and check_thinking(kind_of(tokenizer), config.thinking)
    sampling = choose_sampling(config, thinks)
    shown = _shown(config, cfg, tokenizer)
    rows = [_encode(config, tokenizer, prompt, shown) for prompt in prompts]
    _check_lengths(config, cfg, rows)
    if config.chat and never_saw_chats(config.init_from):
        print(
            f"{pretrained_only(config.init_from)}; to have it go on with a text write --config.chat=False",
            file=sys.stderr,
            flush=True,
        )
    options = {
        "max_new_tokens": config.max_new_tokens,
        "sampling": sampling,
        "seed": config.seed,
        "stop_ids": tokenizer.stop_ids,
        "num_ids": min(tokenizer.vocab_size, cfg.vocab_size),
        "budget": _budget(config, tokenizer, thinks),
        "pictures": [pictures_of(shown)] * len(rows) if shown else (),
    }
    params = source.read_params(config.init_from, cfg, device, dtype)
    answers = answer(cfg, params, tokenizer, prompts, rows, options)
    if config.out:
        with Path(config.out).open("a") as file:
            for prompt, one in zip(prompts, answers):
                line = {"prompt": prompt, "answer": one.text, "tokens": one.tokens, "stopped": one.stopped}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return answers


def choose_sampling(config: ConfigDict, thinks: bool) -> SamplingParams:
    """Qwen3's recommendation for the mode (greedy without chat), with each value that the configuration sets."""
    base = (THINKING if thinks else NON_THINKING) if config.chat else GREEDY
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    return dataclasses.replace(base, **{name: config[name] for name in names if config[name] is not None})


def _prompts(config: ConfigDict) -> list[str]:
    if not config.init_from:
        raise UserError(
            "config.init_from is missing; write --config.init_from=DIR, a Hugging Face directory, a workdir or its "
            "checkpoints/N"
        )
    if bool(config.prompt) == bool(config.prompts):
        raise UserError("give either --config.prompt=\"…\" or --config.prompts=\"('…', '…')\"")
    if config.system and not config.chat:
        raise UserError("config.system needs the chat format; leave out --config.chat=False or config.system")
    if config.out and not Path(config.out).absolute().parent.is_dir():
        raise UserError(f"config.out={config.out}: there is no directory {Path(config.out).parent}; make it first")
    prompts = [config.prompt] if config.prompt else list(config.prompts)
    if not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise UserError("config.prompts: every prompt must be a text that is not empty")
    return prompts


def _shown(config: ConfigDict, cfg: ModelConfig, tokenizer: Tokenizer) -> list[Shown]:
    """The images and the video that every prompt asks about."""
    if not (config.images or config.video):
        return []
    if not (config.chat and cfg.vision_enabled):
        raise UserError(
            "config.images and config.video need a model with a vision tower, and config.chat=True; leave them out"
        )
    check_tokenizer(tokenizer, cfg)
    shown = read_images(config.images, cfg, config.min_pixels, config.max_pixels)
    return [*shown, read_video(config.video, config.video_fps, cfg)] if config.video else shown


def _encode(config: ConfigDict, tokenizer: Tokenizer, prompt: str, shown: Sequence[Shown]) -> list[int]:
    if not config.chat:
        return tokenizer.encode(prompt)
    messages = [{"role": "system", "content": config.system}] if config.system else []
    messages.append({"role": "user", "content": prompt})
    if shown:
        return encode_shown(tokenizer, messages, shown, thinking=config.thinking)
    return encode_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=config.thinking)


def _budget(config: ConfigDict, tokenizer: Tokenizer, thinks: bool) -> ThinkingBudget | None:
    if config.thinking_budget is None:
        return None
    if not thinks:
        raise UserError(
            "config.thinking_budget needs a chat that thinks: leave out --config.chat=False and "
            "--config.thinking=False, give a model that thinks, or leave the budget out"
        )
    closing = tuple(tokenizer.encode(CLOSING, allow_special=True))
    return ThinkingBudget(config.thinking_budget, tokenizer.special_id("</think>"), closing)


def _check_lengths(config: ConfigDict, cfg: ModelConfig, rows: list[list[int]]) -> None:
    longest, room = max(map(len, rows)), cfg.max_position_embeddings
    if config.max_new_tokens < 1:
        raise UserError(f"config.max_new_tokens must be at least 1, got {config.max_new_tokens}")
    if longest >= room:
        raise UserError(f"a prompt has {longest} tokens and the model takes {room} with the answer; shorten it")
    if longest + config.max_new_tokens > room:
        raise UserError(
            f"config.max_new_tokens={config.max_new_tokens} after a prompt of {longest} tokens exceeds the model's "
            f"{room} positions; write --config.max_new_tokens={room - longest} or less"
        )


def answer(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    rows: Sequence[Sequence[int]],
    options: Mapping[str, Any],
) -> list[Answer]:
    """Run all rows as one batch, printing as `_show` does. rows: the ids of the prompts. options: of `stream`."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=params[EMBED].device)
    answers = [Answer(StreamDecoder(tokenizer)) for _ in rows]
    shown = [0] * len(rows)
    begin = first = time.perf_counter()
    for step, ids in enumerate(stream(cfg, params, tokens, prompt_lengths=[len(row) for row in rows], **options)):
        for one, token in zip(answers, ids.tolist()):
            if not one.stopped:
                one.push(token, tokenizer.stop_ids)
        _show(answers, prompts, shown)
        if step == 0:
            first = time.perf_counter()
    end = time.perf_counter()
    for one in answers:
        one.text += one.decoder.finish()
    _show(answers, prompts, shown, complete=True)
    total = sum(one.tokens for one in answers)
    speed = f", then {(total - len(rows)) / (end - first):.1f} tokens/s" if total > len(rows) else ""
    print(
        f"{total} new tokens: the first after {first - begin:.2f} s ({sum(map(len, rows))} prompt tokens){speed}",
        file=sys.stderr,
        flush=True,
    )
    return answers


def _show(answers: Sequence[Answer], prompts: Sequence[str], shown: list[int], complete: bool = False) -> None:
    """Print what is new, in order: an answer's text comes out when those before it have ended.

    shown: characters of each answer that are out, −1 when it has ended; written to. Several answers get a line with
    their prompt above them.
    """
    for number, one in enumerate(answers):
        if shown[number] < 0:
            continue
        if len(answers) > 1 and not shown[number] and (one.text or one.stopped or complete):
            print(f"--- {prompts[number]}")
        print(one.text[shown[number] :], end="", flush=True)
        shown[number] = len(one.text)
        if not (one.stopped or complete):
            return
        print(flush=True)
        shown[number] = -1
