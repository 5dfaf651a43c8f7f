"""The files' imports: the method needs torch alone, arrows go one way, nobody imports a program."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

BELOW = {  # each file or folder of the project, and what it may import of the others
    "fastdllm": set(),
    "checkpoint": {"fastdllm"},
    "verify": {"fastdllm", "checkpoint"},
    "fast": {"fastdllm"},
    "commands": {"fastdllm", "checkpoint", "verify", "fast", "tiny"},
    "training": {"fastdllm", "checkpoint", "verify", "fast", "commands"},
    "train": {"fastdllm", "checkpoint", "verify", "fast", "commands", "training"},
    "cli": {"fastdllm", "checkpoint", "verify", "fast", "commands", "training", "benchmarks"},
    "benchmarks": {"fastdllm", "checkpoint", "verify", "fast", "commands", "training", "tiny"},
    "adapters": {"fastdllm", "checkpoint", "verify", "fast", "commands", "training"},
}
FILES = [f"{name}.py" for name in BELOW if (ROOT / f"{name}.py").exists()]
FILES += [path.relative_to(ROOT).as_posix() for name in BELOW for path in sorted((ROOT / name).glob("*.py"))]


def imports_of(file: str) -> set[str]:
    """Modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{name.name}" for name in node.names]
            found |= {
                name if (ROOT / f"{name.replace('.', '/')}.py").exists() else node.module for name in inside
            }
    return found


def place_of(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file):
    own = place_of(Path(file).with_suffix("").as_posix().replace("/", "."))
    others = {place_of(module) for module in imports_of(file)}
    project = others & {*BELOW, "tiny"}
    assert project <= BELOW[own] | ({own} if "/" in file else set())


def test_the_method_needs_torch_alone():
    others = {place_of(module) for module in imports_of("fastdllm.py")} - sys.stdlib_module_names
    assert others == {"torch"}


def test_no_imports_form_a_circle():
    names = {file.removesuffix(".py").replace("/", "."): file for file in FILES}
    order = TopologicalSorter({name: imports_of(file) & names.keys() for name, file in names.items()})
    assert set(order.static_order()) == names.keys()  # raises for a circle
