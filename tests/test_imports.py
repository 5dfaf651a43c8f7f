"""The files' imports: the method needs torch alone, arrows go one way, nobody imports a program."""

import ast
import sys
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
    """Top-level modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file):
    own = Path(file).with_suffix("").parts[0]
    project = imports_of(file) & {*BELOW, "tiny"}
    assert project <= BELOW[own] | ({own} if "/" in file else set())


def test_the_method_needs_torch_alone():
    assert imports_of("fastdllm.py") - sys.stdlib_module_names == {"torch"}
