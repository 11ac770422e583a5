"""Problems: answers equal an independent solver's, every step is true, and a problem is a function of its arguments."""

import hashlib
import itertools
import math
import re
import statistics
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3f.data.sources.reasoning import DIFFICULTIES, KINDS, problem
from qwen3f.errors import UserError
from tests.data.sources.reasoning.checker import chains, truth, value, wrong_chains
from tests.data.sources.reasoning.solver import says, solve

_LESS = {"shorter", "younger", "slower", "weaker", "poorer", "sadder", "quieter"}
_WORDS = {"true", "false", "knight", "knave"}


def _check(item):
    answer, names = solve(item.question)
    assert item.answer == answer, item
    assert item.solution.endswith(f"\nThe answer is \\boxed{{{answer}}}."), item
    assert item.solution.count("\\boxed") == 1
    assert wrong_chains(item.solution, names) == [], item
    assert re.fullmatch(r"-?\d+(/\d+)?|[A-Z][a-z]+", answer) or answer in _WORDS, item
    if "/" in answer:
        top, bottom = map(int, answer.split("/"))
        assert bottom > 1
        assert math.gcd(top, bottom) == 1


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_steps(kind, difficulty):
    for index in range(60):
        item = problem(kind, difficulty, 11, index)
        assert (item.kind, item.difficulty) == (kind, difficulty)
        _check(item)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(DIFFICULTIES), st.integers(), st.integers(-(2**70), 2**70))
def test_any_seed_and_index(kind, difficulty, seed, index):
    item = problem(kind, difficulty, seed, index)
    assert item == problem(kind, difficulty, seed, index)
    _check(item)


@pytest.mark.parametrize("kind", ["arithmetic", "algebra", "number_theory", "word_problem", "sequence"])
def test_steps_end_at_the_answer(kind):
    for difficulty in DIFFICULTIES:
        for index in range(30):
            item = problem(kind, difficulty, 5, index)
            if "greatest common divisor" in item.question:  # its answer is said in words, by the line before the last
                assert f", {item.answer}, is the greatest" in item.solution.split("\n")[-2]
            else:
                assert value(chains(item.solution)[-1][-1]) == Fraction(item.answer)


def test_logic_words_agree_with_the_answer():
    for difficulty in DIFFICULTIES:
        for index in range(60):
            item = problem("logic", difficulty, 5, index)
            *steps, _ = item.solution.split("\n")
            if item.question.startswith("P is"):
                assert steps[-1] == f"= {item.answer}"
            elif item.question.startswith("Knights"):
                # There is one case for each combination of roles, and the only possible case gives the answer.
                people = len(re.findall("says:", item.question))
                assert len(steps) == 2**people + 2
                (possible,) = [line for line in steps[1:-1] if line.endswith(" Possible.")]
                roles = dict(re.findall(r"(\w+) is a (knight|knave)", possible.partition(":")[0]))
                named = re.search(r"Is (\w+) a knight or a knave\?", item.question)
                found = roles[named[1]] if named else str(list(roles.values()).count("knight"))
                assert found == item.answer
            else:
                assert re.fullmatch(rf".*\b{item.answer} is the (\w+ )?\w+est\.", steps[-1])


def test_knights_cases_are_refuted_by_the_statement_named():
    refuted = 0
    for index in range(120):
        item = problem("logic", 1 + index % 5, 6, index)
        said = dict(re.findall(r'(\w+) says: "(.*?)"', item.question))
        for line in item.solution.split("\n"):
            if match := re.fullmatch(r"If (.*): the statement of (\w+) would be (true|false), .* Impossible\.", line):
                case = {name: role == "knight" for name, role in re.findall(r"(\w+) is a (knight|knave)", match[1])}
                assert says(said[match[2]], case) is (match[3] == "true")
                assert case[match[2]] is (match[3] == "false")  # a knight said what is false, or a knave what is true
                refuted += 1
    assert refuted > 100


def test_ordering_steps_take_the_only_one_left():
    seen = 0
    for index in range(120):
        item = problem("logic", 1 + index % 5, 7, index)
        if " Who is the " not in item.question:
            continue
        pairs = re.findall(r"(\w+) is (\w+er) than (\w+)\.", item.question)
        less = {(a, b) if word in _LESS else (b, a) for a, word, b in pairs}
        taken = []
        for line in item.solution.split("\n")[:-1]:
            (name,) = {name for name in re.findall(r"(\w+) is (?:the|\w+er)", line) if name[0].isupper()}
            left = {person for pair in less for person in pair} - set(taken)
            tops = {person for person in left if not any((person, other) in less for other in left)}
            assert tops == {name}
            taken.append(name)
            seen += 1
    assert seen > 60


def test_polynomials_list_true_differences():
    rows_seen = 0
    for index in range(60):
        item = problem("sequence", 1 + index % 5, 8, index)
        if not (match := re.search(r"has the values (.*) at 1,", item.question)):
            continue
        row = [int(v) for v in match[1].split(", ")]
        for found in re.findall(r"Differences of order \d: (.*)\.", item.solution):
            row = [b - a for a, b in itertools.pairwise(row)]
            assert found == ", ".join(map(str, row))
            rows_seen += 1
        assert len(set(row)) == 1
    assert rows_seen > 40


def test_the_checker_finds_a_wrong_step():
    assert truth("(true implies false) or not (false and true)") is True
    assert truth("true implies false") is False
    good = problem("arithmetic", 4, 0, 1).solution
    assert wrong_chains(good) == []
    numbers = list(re.finditer(r"\d+", good.rpartition("\n")[0]))
    for number in numbers[:: max(1, len(numbers) // 8)]:
        changed = f"{good[: number.start()]}{int(number[0]) + 1}{good[number.end() :]}"
        assert wrong_chains(changed), changed


@pytest.mark.parametrize("kind", KINDS)
def test_difficulty_takes_more_steps(kind):
    means = [
        statistics.mean(problem(kind, difficulty, 3, index).solution.count("\n") for index in range(150))
        for difficulty in DIFFICULTIES
    ]
    assert means == sorted(set(means)), means
    assert means[-1] > 1.8 * means[0], means


_DIGEST_CODE = """
import hashlib
import itertools
from qwen3f.data.sources.reasoning import DIFFICULTIES, KINDS, problem
digest = hashlib.sha256()
for kind in KINDS:
    for difficulty in DIFFICULTIES:
        for index in range(20):
            digest.update(repr(problem(kind, difficulty, 0, index)).encode())
print(digest.hexdigest()[:16])
"""


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_other_processes_give_the_same(hash_seed):
    digest = hashlib.sha256()
    for kind in KINDS:
        for difficulty in DIFFICULTIES:
            for index in range(20):
                digest.update(repr(problem(kind, difficulty, 0, index)).encode())
    command = [sys.executable, "-c", _DIGEST_CODE]
    environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(p for p in sys.path if p)}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert output.strip() == digest.hexdigest()[:16]
    # The same on every machine. Whoever changes it on purpose raises `_FORMAT` in reasoning/source.py as well.
    assert digest.hexdigest()[:16] == "c56c5e16c8101139"


def test_errors():
    with pytest.raises(UserError, match=r"Unknown kind of problem 'geometry'; there are arithmetic, .*: write one"):
        problem("geometry", 1, 0, 0)
    for difficulty in (0, 6, 1.5):
        with pytest.raises(UserError, match=rf"no difficulty {difficulty} of logic problems: write a number from 1 to"):
            problem("logic", difficulty, 0, 0)
