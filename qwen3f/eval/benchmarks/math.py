r"""MATH (Hendrycks et al. 2021, arXiv:2103.03874) as Minerva asks it (Lewkowycz et al. 2022, arXiv:2206.14858).

Source: EleutherAI/hendrycks_math, seven configurations, split test (5,000 rows). Columns: problem, type, solution (with
the answer in \boxed{…}). Prompt: "Problem:", "Solution:", behind Minerva's four examples. Metrics: exact_match of what
stands between "The final answer is" and "I hope it is correct.", both normalised by Minerva's appendix D, equal as
texts or by sympy; math_verify of the whole answer against the whole solution, by the package of that name.
"""

from collections.abc import Sequence

from qwen3f.data.sources.adapters.rows import Row, RowFault, text_of
from qwen3f.eval.benchmarks.benchmark import Benchmark, Generation, Item, Shots
from qwen3f.eval.benchmarks.math_answers import boxed, check_packages, equal, final_answer, normalised, verified

_CLOSING = "Final Answer: The final answer is ${}$. I hope it is correct."


def _example(problem: str, solution: str, answer: str) -> tuple[str, str]:
    return asked(problem), f"{solution}\n{_CLOSING.format(answer)}"


def asked(problem: str) -> str:
    return f"Problem:\n{problem}\n\nSolution:"


# Minerva's appendix D; the blanks are its own
EXAMPLES = (
    _example(
        r"Find the domain of the expression  $\frac{\sqrt{x-2}}{\sqrt{5-x}}$.",
        r"The expressions inside each square root must be non-negative. Therefore, $x-2 \ge 0$, so $x\ge2$, and $5 - x "
        r"\ge 0$, so $x \le 5$. Also, the denominator cannot be equal to zero, so $5-x>0$, which gives $x<5$. "
        r"Therefore, the domain of the expression is $\boxed{[2,5)}$.",
        "[2,5)",
    ),
    _example(
        r"If $\det \mathbf{A} = 2$ and $\det \mathbf{B} = 12,$ then find $\det (\mathbf{A} \mathbf{B}).$",
        r"We have that $\det (\mathbf{A} \mathbf{B}) = (\det \mathbf{A})(\det \mathbf{B}) = (2)(12) = \boxed{24}.$",
        "24",
    ),
    _example(
        "Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights instead, how many times "
        "must Terrell lift them in order to lift the same total weight?",
        r"If Terrell lifts two 20-pound weights 12 times, he lifts a total of $2\cdot 12\cdot20=480$ pounds of weight. "
        r" If he lifts two 15-pound weights instead for $n$ times, he will lift a total of $2\cdot15\cdot n=30n$ pounds"
        r" of weight.  Equating this to 480 pounds, we can solve for $n$:"
        "\n\\begin{align*}\n30n&=480\\\\\n\\Rightarrow\\qquad n&=480/30=\\boxed{16}\n\\end{align*}",
        "16",
    ),
    _example(
        "If the system of equations\n\n\\begin{align*}\n6x-4y&=a,\\\\\n6y-9x &=b.\n\\end{align*}has a solution $(x, y)$"
        " where $x$ and $y$ are both nonzero,\nfind $\\frac{a}{b},$ assuming $b$ is nonzero.",
        "If we multiply the first equation by $-\\frac{3}{2}$, we obtain\n\n$$6y-9x=-\\frac{3}{2}a.$$Since we also know"
        " that $6y-9x=b$, we have\n\n$$-\\frac{3}{2}a=b\\Rightarrow\\frac{a}{b}=\\boxed{-\\frac{2}{3}}.$$",
        r"-\frac{2}{3}",
    ),
)


def read(row: Row) -> Item:
    solution = text_of(row, "solution")
    answer = boxed(solution)
    if answer is None:
        raise RowFault("no_answer", f"{row.name} has no \\boxed{{…}} under 'solution': write the answer in one.")
    gold = {"answer": normalised(answer), "solution": solution}
    return Item(row.name, asked(text_of(row, "problem")), gold, group=text_of(row, "type"))


def score(item: Item, answers: Sequence[str]) -> dict[str, float]:
    given = normalised(final_answer(answers[0]))
    return {
        "exact_match": float(equal(given, item.gold["answer"])),
        "math_verify": float(verified(item.gold["solution"], answers[0])),
    }


MATH = Benchmark(
    name="math",
    hub_id="EleutherAI/hendrycks_math",
    configs=(
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    ),
    columns=("problem", "type", "solution"),
    read=read,
    metrics=("exact_match", "math_verify"),
    shots=Shots(4, "", "first", EXAMPLES, most=len(EXAMPLES)),
    generation=Generation(until=("Problem:",)),
    score=score,
    ready=check_packages,
)
