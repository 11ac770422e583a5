"""Texts to score and to judge; many have faults that occur in practice."""

from tests.eval.benchmark_rows import SPLITS


def gsm8k(number):
    solution = SPLITS["gsm8k"]["test"][number]["answer"]
    right = solution.rpartition("#### ")[2]
    plain = right.replace(",", "")
    return [
        solution,
        f"... so #### {plain}",
        f"#### {right}.",
        f"It is ${right}.",
        f"The answer is {plain}",
        f"{plain} apples, not 7",
        f"#### 3\n#### {plain}",
        f"#### {plain}\n#### 3",
        f" {plain}.00",
        f"#### -{plain}",
        "no number",
        "",
        "$.,",
        f"a{plain}b",
        f"(1) {plain} - 5",
        f"#### ${plain}",
        "1,234.50 and .5.",
        f"x={plain}%",
    ]


def triviaqa(number):
    name = SPLITS["triviaqa"]["validation"][number]["answer"]["value"]
    quoted = [f"{name}!", f'"{name} city"', f"{name} city", f"a {name}", f"{name.upper()}onsea", f"{name}-on-sea"]
    return [
        name,
        f" {name.lower()} ",
        f"the {name}",
        f"The  {name}",
        *quoted,
        "",
        "?",
        f"{name}\0",
        f"{name}é",
        "Paris",
    ]


def math(number):
    end = "I hope it is correct."
    answers = [
        *(r"\frac{3}{4}", "12", r"\sqrt{5}", "3/4", "0.75", r"\frac34", r"\frac 3 4", r"\sqrt5", "12.0", "x=12", ""),
        *(r"\text{12}", "12 units", r"\$12", r"\boxed{12}", r"5^{1/2}", "12,", "{12", r"\frac{6}{8}", "1,2", "12 cm"),
        *(r"\left(3,4\right)", r"2^3+4", r"\sqrt[2]{5}", "twelve", r"12^\circ"),
    ]
    out = [f"So it is.\nFinal Answer: The final answer is ${one}$. {end}" for one in answers]
    out += [f"Final Answer: The final answer is {answer}. {end}" for answer in answers[:6]]
    said = "Final Answer: The final answer is"
    cut_off = [said, "The final answer is $12$. I hope", f"{said} $12$"]
    return [*out, *cut_off, r"Thus $\boxed{12}$", r"$\boxed{\frac{3}{4}}$.", r"\boxed{\sqrt{5}}", ""]


GENERATED = {"gsm8k": gsm8k, "triviaqa": triviaqa, "math": math}

PAIRS = [
    ("The cat sat", " on the mat"),
    ("The cat sat ", "on the mat"),  # a blank that belongs to the continuation
    ("The cat sat  ", " on the mat"),
    ("", "the end"),
    ("A", " the"),
    ("t", "he tokens merge"),  # "the" is one token
    ("a\n", "new line"),
    ("naïve café Ω 日本", " ünï 語"),
    ("Question: why?\nAnswer:", " because it is so"),
    ("Question: why?\nAnswer:", " because it was"),
    ("Question: why?\nAnswer:", " the"),
    ("A long context that will not fit into a short model at all, ", "not at all"),
    ("<|im_start|>user\nhi<|im_end|>\n", "<think>\n\n</think>"),
]

DOCUMENTS = [
    "the cat sat on the mat, and then the cat sat on the other mat until the rain fell on the mat",
    "one",
    "naïve Ω\n\n  blanks   and\tmore",
    "exactly twenty-four byte",
]
