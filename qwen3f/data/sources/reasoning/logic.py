"""Logic: orders from comparisons, knights and knaves, truth values of formulas."""

import itertools
from typing import NamedTuple

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning.draft import NAMES, Draft, listed

_RELATIONS = (  # more, less, most
    ("taller", "shorter", "tallest"),
    ("older", "younger", "oldest"),
    ("faster", "slower", "fastest"),
    ("stronger", "weaker", "strongest"),
    ("richer", "poorer", "richest"),
    ("happier", "sadder", "happiest"),
    ("louder", "quieter", "loudest"),
)
_ORDINALS = ("", "second ", "third ", "fourth ", "fifth ", "sixth ", "seventh ")

# A formula: a variable, ("not", formula) or (connective, formula, formula).
Formula = str | tuple[str, "Formula"] | tuple[str, "Formula", "Formula"]


def make(draws: Draws, difficulty: int) -> Draft:
    """One of three kinds: `difficulty` + 2 people to order; 2 to 4 knights or knaves; 2·difficulty connectives."""
    return draws.choice((_ordering, _knights, _formula))(draws, difficulty)


def _ordering(draws: Draws, difficulty: int) -> Draft:
    order = draws.sample(NAMES, difficulty + 2)
    more, less, most = draws.choice(_RELATIONS)
    count = len(order)
    # All neighbours are compared, so the order is the only one that fits; the other clues follow from these.
    pairs = [(i, i + 1) for i in range(count - 1)]
    spare = [(i, j) for i in range(count) for j in range(i + 2, count)]
    pairs += draws.sample(spare, difficulty - 1)
    clues = [
        f"{order[i]} is {more} than {order[j]}." if draws.chance(1, 2) else f"{order[j]} is {less} than {order[i]}."
        for i, j in draws.shuffled(pairs)
    ]
    rank = draws.between(1, count - 1)
    question = f"{' '.join(clues)} Who is the {_ORDINALS[rank]}{most} of {listed(sorted(order))}?"
    steps = [f"{order[0]} is the only one who is {less} than nobody, so {order[0]} is the {most}."]
    steps += [
        f"Without {listed(order[:i])}, only {order[i]} is {less} than nobody, "
        f"so {order[i]} is the {_ORDINALS[i]}{most}."
        for i in range(1, rank + 1)
    ]
    return Draft(question, steps, order[rank])


class _Statement(NamedTuple):
    """What a person says, and whether it is true for each assignment (True is a knight)."""

    text: str
    truth: dict[tuple[bool, ...], bool]


def _knights(draws: Draws, difficulty: int) -> Draft:
    people = draws.sample(NAMES, (2, 2, 3, 3, 4)[difficulty - 1])
    cases = list(itertools.product((True, False), repeat=len(people)))
    possible: list[tuple[bool, ...]] = []
    while len(possible) != 1:
        said = [_statement(draws, people, cases, speaker) for speaker in range(len(people))]
        possible = [case for case in cases if all(said[i].truth[case] == case[i] for i in range(len(people)))]
    case = possible[0]
    question = "Knights always tell the truth and knaves always lie. "
    question += f"{listed(people)} are each a knight or a knave. "
    question += " ".join(f'{name} says: "{said[i].text}"' for i, name in enumerate(people))
    steps = ["Try all cases."]
    for tried in cases:
        text = listed([f"{name} is a {_role(knight)}" for name, knight in zip(people, tried, strict=True)])
        wrong = [i for i in range(len(people)) if said[i].truth[tried] != tried[i]]
        if wrong:
            i = wrong[0]
            verdict = (
                f"the statement of {people[i]} would be {_word(not tried[i])}, but {people[i]} is a {_role(tried[i])}. "
                "Impossible."
            )
        else:
            verdict = "all knights tell the truth and all knaves lie. Possible."
        steps.append(f"If {text}: {verdict}")
    if draws.chance(1, 2):
        steps.append(f"Only one case is possible, and it has {sum(case)} of the {len(people)} as knights.")
        return Draft(f"{question} How many of them are knights?", steps, sum(case))
    i = draws.below(len(people))
    steps.append(f"Only one case is possible, and in it {people[i]} is a {_role(case[i])}.")
    return Draft(f"{question} Is {people[i]} a knight or a knave?", steps, _role(case[i]))


def _statement(draws: Draws, people: list[str], cases: list[tuple[bool, ...]], speaker: int) -> _Statement:
    others = [i for i in range(len(people)) if i != speaker]
    a = draws.choice(others)
    form = draws.below(5)
    if form == 0:
        role = draws.chance(1, 2)
        return _Statement(f"{people[a]} is a {_role(role)}.", {case: case[a] == role for case in cases})
    if form == 1:
        number = draws.between(0, len(people))
        return _Statement(f"The number of knights among us is {number}.", {case: sum(case) == number for case in cases})
    b = draws.choice([i for i in range(len(people)) if i != a])
    first, second = people[min(a, b)], people[max(a, b)]
    if form == 2:
        return _Statement(f"{first} and {second} are of the same kind.", {c: c[a] == c[b] for c in cases})
    if form == 3:
        return _Statement(f"At least one of {first} and {second} is a knave.", {c: not (c[a] and c[b]) for c in cases})
    return _Statement(f"Exactly one of {first} and {second} is a knight.", {c: c[a] != c[b] for c in cases})


def _role(knight: bool) -> str:
    return "knight" if knight else "knave"


def _word(value: bool) -> str:
    return "true" if value else "false"


def _formula(draws: Draws, difficulty: int) -> Draft:
    variables = "PQRSTU"[: difficulty + 1]
    values = {name: draws.chance(1, 2) for name in variables}
    formula = _grow(draws, variables, 2 * difficulty)
    facts = listed([f"{name} is {_word(value)}" for name, value in values.items()])
    steps = [_written(_assigned(formula, values))]
    current = _assigned(formula, values)
    while not isinstance(current, str):
        current = _reduced(current)
        steps.append(f"= {_written(current)}")
    question = f"{facts}. Is the statement {_written(formula)} true or false?"
    return Draft(question, ["Put the truth values in and go from the inside out:", *steps], current)


def _grow(draws: Draws, variables: str, connectives: int) -> Formula:
    if connectives == 0:
        return draws.choice(variables)
    if draws.chance(1, 4):
        return ("not", _grow(draws, variables, connectives - 1))
    left = draws.between(0, connectives - 1)
    kind = draws.choice(("and", "or", "implies"))
    return (kind, _grow(draws, variables, left), _grow(draws, variables, connectives - 1 - left))


def _written(formula: Formula, outer: bool = True) -> str:
    if isinstance(formula, str):
        return formula
    if len(formula) == 2:
        return f"not {_written(formula[1], outer=False)}"
    text = f"{_written(formula[1], outer=False)} {formula[0]} {_written(formula[2], outer=False)}"
    return text if outer else f"({text})"


def _assigned(formula: Formula, values: dict[str, bool]) -> Formula:
    if isinstance(formula, str):
        return _word(values[formula])
    return (formula[0], *(_assigned(part, values) for part in formula[1:]))


def _reduced(formula: Formula) -> Formula:
    """The formula after the first connective, from the left, whose parts are truth values."""
    for i, part in enumerate(formula[1:], start=1):
        if not isinstance(part, str):
            return (*formula[:i], _reduced(part), *formula[i + 1 :])
    parts = [part == "true" for part in formula[1:]]
    if formula[0] == "not":
        return _word(not parts[0])
    if formula[0] == "implies":
        return _word(not parts[0] or parts[1])
    return _word(all(parts) if formula[0] == "and" else any(parts))
