"""How a question is put to the model: as raw text, or in the chat format with thinking on or off."""

from qwen3f.data.chat.kinds import HYBRID, TemplateKind
from qwen3f.data.chat.recognise import kind_of
from qwen3f.data.chat.template import render
from qwen3f.data.tokenizers.tokenizer import Tokenizer
from qwen3f.eval.benchmarks.benchmark import Benchmark
from qwen3f.eval.benchmarks.items import Asked

FORMS = ("raw", "chat")
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"  # before a question about one, as the chat template writes it
BETWEEN, BEFORE_ANSWER = "\n\n", " "


def raw(asked: Asked, prompt: str) -> str:
    """Description, examples with their answers, and the question, as the harness joins them."""
    shots = "".join(f"{question}{BEFORE_ANSWER}{answer}{BETWEEN}" for question, answer in asked.examples)
    return f"{asked.description}{shots}{prompt}"


def chat(asked: Asked, prompt: str, thinking: bool | None, kind: TemplateKind) -> str:
    """The description as system message, examples as turns, the question as the last one, up to the answer's start.

    thinking: None: the chat template's default.
    """
    messages = [{"role": "system", "content": asked.description}] if asked.description else []
    for question, answer in asked.examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": prompt})
    return render(messages, add_generation_prompt=True, enable_thinking=thinking, kind=kind)


def is_chat(benchmark: Benchmark, form: str) -> bool:
    """Whether its questions are asked in chats: if `form` is "chat", and always for a task."""
    return form == "chat" or bool(benchmark.task)


def template_of(benchmark: Benchmark, form: str, tokenizer: Tokenizer) -> TemplateKind:
    """The kind of the chats that its questions are asked in; HYBRID without chats. Raises UserError as `kind_of`."""
    return kind_of(tokenizer) if is_chat(benchmark, form) else HYBRID


def prompts(
    benchmark: Benchmark, asked: Asked, form: str, thinking: bool, kind: TemplateKind = HYBRID
) -> tuple[str, ...]:
    """What the model reads: one text, or one for each choice if the item has a prompt for each choice.

    Raises UserError if the kind of chats cannot do `thinking`.
    """
    item = asked.item
    given = (item.prompt,) if isinstance(item.prompt, str) else item.prompt
    if benchmark.vision:
        given = tuple(PICTURE + prompt for prompt in given)
    if not is_chat(benchmark, form):
        return tuple(raw(asked, prompt) for prompt in given)
    # choices are scored where an answer begins, without an empty thinking block, as in the harness
    thinks = None if benchmark.generation is None else thinking
    return tuple(chat(asked, item.chat_prompt or prompt, thinks, kind) for prompt in given)
