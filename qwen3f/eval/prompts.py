"""How a question is put to the model: as raw text, or in the chat format with thinking on or off."""

from qwen3f.data.chat.template import render
from qwen3f.eval.benchmarks.benchmark import Benchmark
from qwen3f.eval.benchmarks.items import Asked

FORMS = ("raw", "chat")
BETWEEN, BEFORE_ANSWER = "\n\n", " "


def raw(asked: Asked, prompt: str) -> str:
    """Description, examples with their answers, and the question, as the harness joins them."""
    shots = "".join(f"{question}{BEFORE_ANSWER}{answer}{BETWEEN}" for question, answer in asked.examples)
    return f"{asked.description}{shots}{prompt}"


def chat(asked: Asked, prompt: str, thinking: bool) -> str:
    """The description as system message, examples as turns, the question as the last one, up to the answer's start."""
    messages = [{"role": "system", "content": asked.description}] if asked.description else []
    for question, answer in asked.examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": prompt})
    return render(messages, add_generation_prompt=True, enable_thinking=thinking)


def prompts(benchmark: Benchmark, asked: Asked, form: str, thinking: bool) -> tuple[str, ...]:
    """What the model reads: one text, or of a question with a prompt for each choice so many."""
    item = asked.item
    given = (item.prompt,) if isinstance(item.prompt, str) else item.prompt
    if form == "raw" and not benchmark.task:
        return tuple(raw(asked, prompt) for prompt in given)
    # choices stand where an answer begins, without an empty thinking block: the harness has it so
    block = not thinking and benchmark.generation is not None
    return tuple(chat(asked, item.chat_prompt or prompt, not block) for prompt in given)
