"""Imports go in one direction, and files and functions stay small. The tests parse the source and import nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def of_qwen3f(names):
    return tuple(f"qwen3f.{name}" for name in names.split())


BASE = of_qwen3f("config params tree errors rng")  # modules that know nothing of models and runs

# part: (what it may not import, exceptions)
ARROWS = {
    "kernels": (("qwen3f", "sharding"), ()),
    "sharding": (("qwen3f",), BASE),
    **{name: (("qwen3f", "sharding"), BASE) for name in BASE},
    "qwen3f.model": (of_qwen3f("train stages infer eval data interop checkpoint processes plan"), ()),
    "qwen3f.vision": (of_qwen3f("model train stages infer eval data interop checkpoint processes plan"), ()),
    "qwen3f.data": (of_qwen3f("train model stages"), ()),
    "qwen3f.train": (of_qwen3f("stages rl"), ()),
    "qwen3f.rl": (of_qwen3f("stages"), ()),
    "qwen3f.report": (of_qwen3f("train model infer data interop checkpoint processes plan rl vision"), ()),
    "qwen3f.tasks": (of_qwen3f("rl stages train model infer"), ()),
    "qwen3f.sandbox": (("qwen3f", "sharding"), (*BASE, "qwen3f.polling", "qwen3f.sandbox")),
    "qwen3f": (("experiments", "launch"), ()),
}
SIZED = ("qwen3f", "kernels", "sharding", "experiments", "launch")
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 400, 80, 8
REGISTRATIONS = {"custom_op", "register_fake", "register_autograd"}


def sources(part):
    """Files of a module or package, such as qwen3f.data."""
    path = ROOT / part.replace(".", "/")
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imported(tree, package):
    """Full names that a module of `package` imports, at its top and within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -(node.level - 1) or None] if node.level else []
            origin = ".".join([*parents, *filter(None, [node.module])])
            yield from ((f"{origin}.{alias.name}", node.lineno) for alias in node.names)


def within(name, parts):
    return any(name == part or name.startswith(part + ".") for part in parts)


def forbidden_imports(text, package, forbidden, exceptions):
    names = imported(ast.parse(text), package)
    return [(line, name) for name, line in names if within(name, forbidden) and not within(name, exceptions)]


@pytest.mark.parametrize("part", ARROWS)
def test_imports_run_one_way(part):
    forbidden, exceptions = ARROWS[part]
    for name in (*forbidden, *exceptions):
        assert all(path.exists() for path in sources(name)), f"{name} is no module"
    wrong = []
    for path in sources(part):
        place = path.relative_to(ROOT)
        found = forbidden_imports(path.read_text(), ".".join(place.parent.parts), forbidden, exceptions)
        wrong += [f"{place}:{line} imports {name}" for line, name in found]
    assert not wrong, "\n".join(wrong)


def test_every_form_of_an_import_is_seen():
    text = "import a.b\nfrom a import c\ndef f():\n    from ..x.y import z\nfrom . import w\nfrom ab import d\n"
    assert [name for name, _ in imported(ast.parse(text), "p.q")] == ["a.b", "a.c", "p.q.w", "ab.d", "p.x.y.z"]
    assert forbidden_imports(text, "p.q", ("a", "p"), ("a.c", "p.x")) == [(1, "a.b"), (5, "p.q.w")]


def name_of(node):
    """The last word of a name, an attribute or a call."""
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def formulas(tree):
    """Functions whose parameters autograd or torch.library dictate."""
    registered = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(name_of(base) == "Function" for base in node.bases):
            yield from (f for f in node.body if isinstance(f, ast.FunctionDef))
        elif isinstance(node, ast.Call) and name_of(node) in REGISTRATIONS:
            registered |= {name_of(argument) for argument in [*node.args, *(k.value for k in node.keywords)]}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            decorators = {name_of(decorator) for decorator in node.decorator_list}
            if node.name in registered or decorators & REGISTRATIONS:
                yield node


def count_parameters(function):
    a = function.args
    named = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x]
    return len(named) - (named[:1] in (["self"], ["cls"]))


def too_large(text, any_signature=False):
    tree = ast.parse(text)
    if (lines := len(text.splitlines())) > LINES_OF_A_FILE:
        yield f"{lines} lines, at most {LINES_OF_A_FILE}"
    dictated = set(formulas(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if (lines := node.end_lineno - node.lineno + 1) > LINES_OF_A_FUNCTION:
            yield f"{node.name} has {lines} lines, at most {LINES_OF_A_FUNCTION}"
        free = any_signature or node in dictated or (node.name.startswith("load_") and node.name.endswith("_dataset"))
        if not free and (count := count_parameters(node)) > PARAMETERS:
            yield f"{node.name} has {count} parameters, at most {PARAMETERS}"


@pytest.mark.parametrize(
    "path", [path for part in SIZED for path in sources(part)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_functions_and_signatures_are_small(path):
    place = path.relative_to(ROOT)
    wrong = list(too_large(path.read_text(), any_signature=place.parts[0] == "kernels"))
    assert not wrong, "\n".join(f"{place}: {words}" for words in wrong)


def test_what_is_too_large_is_seen():
    nine = "a, b, c, /, d, e, *f, g, h, **i"
    assert list(too_large(f"def f({nine}): pass")) == ["f has 9 parameters, at most 8"]
    assert list(too_large(f"class A:\n    def f(self, {nine}): pass")) == ["f has 9 parameters, at most 8"]
    assert list(too_large("class A:\n    def f(self, a, b, c, d, e, f, g, h): pass")) == []
    assert list(too_large(f"def f({nine}): pass", any_signature=True)) == []
    assert list(too_large(f"def load_sft_dataset({nine}): pass")) == []
    assert list(too_large(f"class A(torch.autograd.Function):\n    def forward({nine}): pass")) == []
    assert list(too_large(f"@custom_op('x', mutates_args=())\ndef f({nine}): pass")) == []
    assert list(too_large(f"def f({nine}): pass\nop.register_autograd(g, setup_context=f)")) == []
    body = "    x\n"
    assert list(too_large("def f():\n" + 79 * body)) == []
    assert list(too_large("def f():\n" + 80 * body)) == ["f has 81 lines, at most 80"]
    assert list(too_large(400 * "x\n")) == []
    assert list(too_large(401 * "x\n")) == ["401 lines, at most 400"]
