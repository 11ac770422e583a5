"""Number theory: division with remainder, gcd and lcm by Euclid, powers and linear congruences modulo m."""

import math

from qwen3f.data.sources.random_choices import Draws
from qwen3f.data.sources.reasoning.draft import Draft, operand


def make(draws: Draws, difficulty: int) -> Draft:
    """Remainders (1), gcd (1 to 3), lcm (2, 3), powers and congruences (3 to 5); numbers grow with the difficulty."""
    makers = {
        1: (_remainder, _gcd),
        2: (_gcd, _lcm),
        3: (_gcd, _lcm, _power, _congruence),
        4: (_power, _congruence),
        5: (_power, _congruence),
    }
    return draws.choice(makers[difficulty])(draws, difficulty)


def _remainder(draws: Draws, difficulty: int) -> Draft:
    n, m = draws.between(10, 199), draws.between(3, 19)
    steps = [f"The largest multiple of {m} up to {n}:", f"{m} * {n // m} = {m * (n // m)}"]
    steps += ["What is left:", f"{n} - {m * (n // m)} = {n % m}"]
    return Draft(f"What is the remainder when {n} is divided by {m}?", steps, n % m)


def _pair(draws: Draws, difficulty: int) -> tuple[int, int]:
    size = (12, 40, 160, 500, 2000)[difficulty - 1]
    shared = draws.between(2, 12)
    b = draws.between(2, size)
    return shared * (b + draws.between(1, size)), shared * b


def _euclid(a: int, b: int) -> list[str]:
    lines = ["Divide with remainder until the remainder is 0:"]
    while b:
        lines.append(f"{a} = {b} * {a // b} + {a % b}")
        a, b = b, a % b
    return [*lines, f"The last divisor, {a}, is the greatest common divisor."]


def _gcd(draws: Draws, difficulty: int) -> Draft:
    a, b = _pair(draws, difficulty)
    return Draft(f"What is the greatest common divisor of {a} and {b}?", _euclid(a, b), math.gcd(a, b))


def _lcm(draws: Draws, difficulty: int) -> Draft:
    a, b = _pair(draws, difficulty)
    shared = math.gcd(a, b)
    steps = [*_euclid(a, b), "The least common multiple is the product divided by it:"]
    steps.append(f"{a} * {b} / {shared} = {a} * {b // shared} = {math.lcm(a, b)}")
    return Draft(f"What is the least common multiple of {a} and {b}?", steps, math.lcm(a, b))


def _power(draws: Draws, difficulty: int) -> Draft:
    """A power modulo m, by repeated squaring; a higher difficulty takes more squarings and products."""
    exponent = draws.between(2 ** (difficulty - 1), 2 ** (2 * difficulty - 2))
    m = draws.between(5, 10 * difficulty)
    base = draws.between(2, m - 2)  # not m − 1, whose powers are 1 and m − 1
    steps = [f"Square again and again modulo {m}:", f"{base}^1 mod {m} = {base}"]
    powers = {1: base}
    at = 1
    while 2 * at <= exponent:
        square = powers[at] ** 2 % m
        steps.append(f"{base}^{2 * at} mod {m} = {powers[at]} * {powers[at]} mod {m} = {square}")
        at *= 2
        powers[at] = square
    used = [power for power in powers if exponent & power]
    steps.append(f"The exponent is a sum of powers of 2: {' + '.join(map(str, used))} gives {exponent}.")
    if len(used) > 1:
        steps.append("Multiply these powers:")
    result = powers[used[0]]
    for power in used[1:]:
        product = result * powers[power] % m
        steps.append(f"{result} * {powers[power]} mod {m} = {product}")
        result = product
    steps.append(f"{base}^{exponent} mod {m} = {result}")
    return Draft(f"What is the remainder when {base}^{exponent} is divided by {m}?", steps, result)


def _congruence(draws: Draws, difficulty: int) -> Draft:
    """A congruence, by the extended Euclidean algorithm: each remainder is a sum of multiples of m and a."""
    m = draws.between(10, 4**difficulty)
    a = draws.choice([n for n in range(2, m) if math.gcd(n, m) == 1])
    b = draws.between(1, m - 1)
    steps = [f"Find the inverse of {a} modulo {m}. Write each remainder as a sum of multiples of {m} and {a}:"]
    (r0, s0, t0), (r1, s1, t1) = (m, 1, 0), (a, 0, 1)
    while r1 != 1:
        q = r0 // r1
        (r0, s0, t0), (r1, s1, t1) = (r1, s1, t1), (r0 - q * r1, s0 - q * s1, t0 - q * t1)
        combination = f"{operand(s1)} * {m} + {operand(t1)} * {a}"
        steps.append(f"{r0 * q + r1} - {q} * {r0} = {r1} = {combination}")
    inverse = t1 % m
    steps += ["So the inverse is:", f"{operand(t1)} mod {m} = {inverse}", "Multiply both sides by it:"]
    steps.append(f"{inverse} * {b} mod {m} = {inverse * b % m}")
    question = f"Find the smallest integer x ≥ 0 such that {a} * x leaves the remainder {b} when divided by {m}."
    return Draft(question, steps, inverse * b % m)
