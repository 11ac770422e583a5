"""Reads solutions by the rule of `draft.py` and evaluates what they claim; shares no code with the generator."""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def value(text: str, names: dict[str, Fraction | Callable] | None = None) -> Fraction:
    """The exact value of an expression of numbers, + - * / ^ mod, names and calls of names."""
    tree = ast.parse(text.strip().replace("^", "**").replace(" mod ", " % "), mode="eval").body

    def walk(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub()):
                return -walk(node.operand)
            case ast.BinOp():
                return Fraction(_OPERATORS[type(node.op)](walk(node.left), walk(node.right)))
            case ast.Name(id=name):
                return Fraction(names[name])
            case ast.Call(func=ast.Name(id=name)):
                return Fraction(names[name](int(walk(node.args[0]))))
        raise AssertionError(f"not an expression: {text!r}")

    return walk(tree)


def truth(text: str) -> bool:
    """The truth value of a formula of true, false, not, and, or, implies.

    A binary operation inside another one stands in parentheses.
    """
    tokens = text.replace("(", " ( ").replace(")", " ) ").split()

    def whole() -> bool:
        left = part()
        if not tokens or tokens[0] == ")":
            return left
        kind = tokens.pop(0)
        right = part()
        return {"and": left and right, "or": left or right, "implies": right or not left}[kind]

    def part() -> bool:
        token = tokens.pop(0)
        if token == "not":
            return not part()
        if token == "(":
            inner = whole()
            assert tokens.pop(0) == ")"
            return inner
        return {"true": True, "false": False}[token]

    result = whole()
    assert not tokens
    return result


def chains(solution: str) -> list[list[str]]:
    """The chains of equal expressions in a solution, the last line left out."""
    found: list[list[str]] = []
    for line in solution.split("\n")[:-1]:
        if line.startswith("= "):
            found[-1] += line[2:].split(" = ")
        else:
            found.append(line.split(" = "))
    return [chain for chain in found if len(chain) > 1]


def wrong_chains(solution: str, names: dict[str, Fraction | Callable] | None = None) -> list[list[str]]:
    """The chains whose expressions are not all equal; formulas are known by their words."""

    def evaluate(text: str) -> Fraction | bool:
        return truth(text) if "true" in text or "false" in text else value(text, names)

    return [chain for chain in chains(solution) if len({evaluate(text) for text in chain}) > 1]
