"""Compares evaluation with lm_eval's Hugging Face backend on the same requests: python -m qwen3f.bench.evaluation

choices   questions in the form of MMLU: --subjects subjects, each with a prefix of five solved questions, and four
          choices of one letter. Whole subjects: 246 questions each, the average of MMLU's 57.
answers   --prompts prompts, greedy, --new tokens each, after the same --shots solved examples (GSM8K has 5).

Both sides have the same random weights at a released model's shape (bfloat16 on a GPU) and the same vocabulary, made on
the spot. Text goes in; log-likelihoods or text come out, so both also tokenise. The peer is lm_eval's HFLM with
transformers' scaled_dot_product_attention, at the fastest of --peer_batches and --answer_batches, which is found on a
part of the work. Ours is timed at its second call (the first captures graphs), with the time to make the engine.
"difference" is the largest difference of log-likelihoods between the two sides, "same" the share of equal answers. They
round differently, so in bfloat16 the difference is not small and the share is not 1.
"""

import argparse
import random
import string
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qwen3f import params as P
from qwen3f import presets
from qwen3f.bench.report import Report, clock, compute_dtype, device_of, peak_gib, reset_peak
from qwen3f.bench.transformers_model import copied
from qwen3f.bench.vocabulary import transformers_tokenizer, write_tokenizer
from qwen3f.eval.evaluator import Evaluator
from qwen3f.eval.generation import Sampling, write

LETTERS = ("A", "B", "C", "D")
END = "\u2603"  # a text that ends an answer, and never comes


def sentence(chance: random.Random, letters: int) -> str:
    """Random words of 2 to 9 letters, about `letters` letters together."""
    words, room = [], letters
    while room > 0:
        words.append("".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 9))))
        room -= len(words[-1]) + 1
    return " ".join(words)


def mmlu(subjects: int, questions: int, letters: int, seed: int = 0) -> list[dict[str, Any]]:
    """`questions` questions in the form of MMLU's prompts, evenly over subjects. letters: of a question, at most."""
    chance = random.Random(seed)

    def asked() -> str:
        lines = [f"{letter}. {sentence(chance, chance.randint(letters // 16, letters // 6))}" for letter in LETTERS]
        return "\n".join([sentence(chance, chance.randint(letters // 4, letters)), *lines, "Answer:"])

    out = []
    for subject in range(subjects):
        head = f"The following are multiple choice questions (with answers) about {sentence(chance, 20)}.\n\n"
        shots = "".join(f"{asked()} {chance.choice(LETTERS)}\n\n" for _ in range(5))
        for _ in range(questions * (subject + 1) // subjects - questions * subject // subjects):
            out.append({"context": head + shots + asked(), "choices": list(LETTERS), "answer": chance.randrange(4)})
    chance.shuffle(out)  # as a random sample of all subjects would be
    return out


class Sides:
    """Our evaluator and lm_eval's models, with the same weights. The peer is made when it is first needed."""

    def __init__(self, asked: argparse.Namespace, place: Path, device: torch.device) -> None:
        cfg = presets.get(asked.preset)
        self.asked, self.device = asked, device
        self._place = place / "tokenizer"
        self.tokenizer = write_tokenizer(self._place, cfg.vocab_size)
        self.params = P.init_params(cfg, 0, dtype=compute_dtype(device), device=device)
        self.ours = Evaluator(cfg, self.params, self.tokenizer)
        self._peers: dict[int, Any] = {}
        self._module: Any = None

    def peer(self, batch: int) -> Any:
        """lm_eval's model at a batch size."""
        from lm_eval.models.huggingface import HFLM

        if self._module is None:
            self._module = copied(self.ours.cfg, self.params).eval()
        if batch not in self._peers:
            self._peers[batch] = HFLM(
                pretrained=self._module,
                tokenizer=transformers_tokenizer(self._place),
                batch_size=batch,
                max_length=self.ours.cfg.max_position_embeddings,
                device=str(self.device),
            )
        return self._peers[batch]

    def fastest(self, run: Callable[[Any], object], batches: Sequence[int]) -> int:
        """The batch size that is fastest on a part of the work. Sizes that do not fit are left out."""
        found = {}
        for batch in batches:
            try:
                found[batch] = clock(lambda batch=batch: run(self.peer(batch)), self.device, 1, 1)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                print(f"lm_eval: a batch of {batch} does not fit", file=sys.stderr, flush=True)
        return min(found, key=found.__getitem__)


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Requests in lm_eval's form."""
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def choices(report: Report, sides: Sides) -> None:
    asked, device = sides.asked, sides.device
    questions = mmlu(asked.subjects, asked.questions, asked.letters)
    pairs = [(one["context"], f" {choice}") for one in questions for choice in one["choices"]]
    tokens = sum(len(before) + len(after) for before, after in sides.ours.encode_pairs(pairs[:: len(LETTERS)]))
    case = {"case": f"{asked.preset}, {len(questions)} × 4, {tokens / len(questions):.0f} tokens a question"}
    sides.ours.multiple_choice(questions[: len(questions) // 8 + 1])
    reset_peak(device)
    result: dict[str, Any] = {}
    before = sides.ours.counts
    seconds = clock(lambda: result.update(sides.ours.multiple_choice(questions)), device, 1, 0)
    counts = sides.ours.counts - before
    report.add(
        **case,
        who="qwen3f",
        seconds=seconds,
        questions_s=len(questions) / seconds,
        computed=counts["computed"] / counts["asked"],
        padding=counts["padding"] / max(1, counts["computed"]),
        peak_gib=peak_gib(device),
    )

    def measure() -> dict[str, Any]:
        every = requests("loglikelihood", pairs)
        few = every[: 4 * max(asked.peer_batches)]
        best = sides.fastest(lambda lm: lm.loglikelihood(few, disable_tqdm=True), asked.peer_batches)
        reset_peak(device)
        found: list[tuple[float, bool]] = []
        taken = clock(
            lambda: found.extend(sides.peer(best).loglikelihood(every, disable_tqdm=True)), device, repeats=1, warm=0
        )
        flat = [value for one in result["loglikelihoods"] for value in one]
        return {
            "seconds": taken,
            "questions_s": len(questions) / taken,
            "batch": best,
            "difference": max(abs(a - b) for a, (b, _) in zip(flat, found, strict=True)),
            "ours_over_it": taken / seconds,
            "peak_gib": peak_gib(device),
        }

    report.peer({**case, "who": "lm_eval HFLM"}, "lm_eval", measure)


def answers(report: Report, sides: Sides) -> None:
    asked, device = sides.asked, sides.device
    chance = random.Random(1)
    solved = [f"{sentence(chance, asked.letters)}\n{sentence(chance, asked.letters)}\n\n" for _ in range(asked.shots)]
    lengths = [chance.randint(asked.letters // 2, asked.letters) for _ in range(asked.prompts)]
    prompts = ["".join(solved) + sentence(chance, length) for length in lengths]
    tokens = sum(len(sides.tokenizer.encode(prompt)) for prompt in prompts) / len(prompts)
    case = {"case": f"{asked.preset}, {asked.prompts} prompts of {tokens:.0f} tokens, {asked.new} new ones, greedy"}
    texts: list[str] = []

    def ours() -> None:
        written = write(sides.ours, prompts, Sampling(asked.new), range(len(prompts)), (END,))
        texts[:] = [one.text for (one,) in written]

    reset_peak(device)
    seconds = clock(ours, device, repeats=1, warm=1)
    total = asked.prompts * asked.new
    report.add(**case, who="qwen3f", seconds=seconds, tokens_s=total / seconds, peak_gib=peak_gib(device))

    def measure() -> dict[str, Any]:
        options = {"until": [END], "max_gen_toks": asked.new, "do_sample": False}
        short = {**options, "max_gen_toks": max(1, asked.new // 4)}
        few = requests("generate_until", [(prompt, short) for prompt in prompts[: max(asked.answer_batches)]])
        best = sides.fastest(lambda lm: lm.generate_until(few, disable_tqdm=True), asked.answer_batches)
        lm, every = sides.peer(best), requests("generate_until", [(prompt, options) for prompt in prompts])
        reset_peak(device)
        found: list[str] = []
        taken = clock(lambda: found.extend(lm.generate_until(every, disable_tqdm=True)), device, repeats=1, warm=0)
        return {
            "seconds": taken,
            "tokens_s": total / taken,
            "batch": best,
            "same": sum(a == b for a, b in zip(texts, found, strict=True)) / len(texts),
            "ours_over_it": taken / seconds,
            "peak_gib": peak_gib(device),
        }

    report.peer({**case, "who": "lm_eval HFLM"}, "lm_eval", measure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("--cases", default="choices,answers", help="some of choices, answers")
    parser.add_argument("--preset", default="qwen3-0.6b")
    parser.add_argument("--subjects", type=int, default=7, help="MMLU has 57")
    parser.add_argument("--questions", type=int, default=1722, help="of all subjects together; MMLU has 14042")
    parser.add_argument("--letters", type=int, default=160, help="letters of a question or prompt, at most")
    parser.add_argument("--peer_batches", default=[16, 32, 64], help="batch sizes to try for choices", **sizes)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--shots", type=int, default=0, help="solved examples before each prompt, the same for all")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--answer_batches", default=[64, 128, 256], help="batch sizes to try for answers", **sizes)
    parser.add_argument("--device", default="auto")
    asked = parser.parse_args(arguments)
    device = device_of(asked.device)
    report = Report("evaluation", device)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        sides = Sides(asked, Path(directory), device)
        for case in asked.cases.split(","):
            {"choices": choices, "answers": answers}[case](report, sides)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
