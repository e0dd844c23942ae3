"""The house rules that a newcomer relies on: imports point down, files and functions stay small."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"main", "main_linear", "main_finetune", "eval_zeroshot", "eval_retrieval"}
SCRIPTS |= {"make_dataset", "export", "report", "benchmark", "run_with_submitit"}
SCRIPTS |= {"advice", "validation"}  # of main.py: they know its flags
FILES = [*ROOT.glob("*.py"), *ROOT.glob("infra/*.py"), *ROOT.glob("benchmarks/*.py")]
TESTS = sorted(ROOT.glob("tests/*.py"))


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """The modules of this repository that a file imports, anywhere in it."""
    ours, found = set(map(name_of, FILES)), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return (found & ours) - {"infra", "benchmarks"}


IMPORTS = {name_of(path): imports_of(path) for path in FILES}


def floor_of(module):
    """utils is the ground; above it infra, then method and data, then scripts and benchmarks."""
    if module in SCRIPTS or module.startswith("benchmarks"):
        return 3
    return 0 if module == "utils" else 1 if module.startswith("infra") else 2


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_imports_point_down(module):
    above = {other for other in IMPORTS[module] if floor_of(other) > floor_of(module)}
    assert not above


def test_no_module_imports_itself_by_a_detour():
    def reach(module, path):
        assert module not in path, " -> ".join([*path, module])
        for other in IMPORTS[module]:
            reach(other, [*path, module])

    for module in IMPORTS:
        reach(module, [])


def lines_of(path):
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=name_of)
def test_no_file_is_over_400_lines_and_no_function_over_60(path):
    assert lines_of(path) <= 400
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def sentences_of(path):
    """The texts of a file with a blank inside, but docstrings and the help of flags."""
    tree, passed = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add":
            passed |= set(map(id, ast.walk(node)))
        if isinstance(node, ast.Expr):
            passed.add(id(node.value))
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and " " in node.value.strip()
            and id(node) not in passed
        ):
            yield node.value


@pytest.mark.parametrize("path", [p for p in FILES if floor_of(name_of(p)) < 3], ids=name_of)
def test_libraries_name_no_flags(path):
    """They cannot know the flags of the script that calls them."""
    assert not [text for text in sentences_of(path) if re.search(r"--[a-z]", text)]


def test_the_method_and_the_readme_are_read_in_one_sitting():
    method = ("main", "models", "towers", "losses", "engine")
    sizes = {name: lines_of(ROOT / f"{name}.py") for name in method}
    assert sizes["main"] <= 310 and sum(sizes.values()) <= 1400
    assert (ROOT / "README.md").stat().st_size <= 16 * 1024
