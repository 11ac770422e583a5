"""Whether the derivation in an answer to a procedure is right, line by line; its final answer is judged elsewhere."""

from qwen3f.data.sources.reasoning import digits, letters


def right_working(question: str, answer_text: str) -> float:
    """1.0 if the thought has the lines of the derivation, no more and no fewer, up to blanks; else 0.0, also for a
    question that is no procedure.

    A right answer with another derivation gets 0.0: the value says whether all steps were done, not only the last.
    """
    lines = letters.working(question) or digits.working(question)
    if not lines:
        return 0.0
    _, begun, rest = answer_text.partition("<think>")
    thought, ended, _ = rest.partition("</think>")
    if not begun or not ended:
        return 0.0
    written = [" ".join(line.split()) for line in thought.splitlines() if line.strip()]
    return float(written == lines)
