"""Prompts for a draft adapter's training data: maths questions, programming tasks, and functions to complete.

    python adapters/prompts.py --maths gsm8k_train.jsonl.gz --tasks mbpp_train.jsonl > prompts.jsonl

prints one JSON object with `prompt` per line, in a fixed random order, so that any beginning of it is a
sample of the whole. Functions to complete are signatures and docstrings of Python's standard library and
numpy: they ask as HumanEval does, without its problems. The model's own answers to the prompts are what an
adapter learns from.
"""

import gzip
import importlib
import inspect
import json
import pkgutil
import random
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import click

# EvalPlus's wording for chat models
TASK = "Please provide a self-contained Python script that solves the following problem in a markdown code "
TASK += "block:"


def read_jsonl(path: Path) -> Iterator[dict]:
    """Records of a JSONL file, which may be compressed by gzip."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def maths(path: Path) -> list[str]:
    """GSM8K's questions as they are."""
    return [record["question"] for record in read_jsonl(path)]


def tasks(path: Path) -> list[str]:
    """MBPP's tasks, with one test that shows the function's name."""
    return [f'{TASK}\n```\n"""\n{r["text"]}\n{r["test_list"][0]}\n"""\n```\n' for r in read_jsonl(path)]


def functions() -> list[str]:
    """Signature and docstring of public functions that say what they do in 60 to 900 characters."""
    found = {}
    names = [
        name for name in sorted(sys.stdlib_module_names) if name.isidentifier() and not name.startswith("_")
    ]
    skipped = {
        "antigravity",
        "this",
        "idlelib",
        "turtledemo",
        "lib2to3",
        "tkinter",
        "turtle",
    }  # importing these opens windows, or prints
    for name in [*(name for name in names if name not in skipped), "numpy"]:
        for module in submodules(name):
            for key, value in sorted(vars(module).items()):
                if (
                    not inspect.isfunction(value)
                    or key.startswith("_")
                    or value.__module__ != module.__name__
                ):
                    continue
                text = signature_and_docstring(key, value)
                if text:
                    found[key] = f"{TASK}\n```\n{text}```\n"
    return [found[key] for key in sorted(found)]


def submodules(name: str) -> Iterator:
    """A module and those right below it; what cannot be imported here is left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except Exception:  # other systems' modules raise whatever they like
        return
    yield module
    for _, child, _ in pkgutil.iter_modules(getattr(module, "__path__", []), f"{name}."):
        if child in sys.modules:  # importing more might run anything
            yield sys.modules[child]


def signature_and_docstring(name: str, function) -> str | None:
    documentation = inspect.getdoc(function)
    if not documentation or not 60 <= len(documentation) <= 900:
        return None
    try:
        head = f"def {name}{inspect.signature(function)}:"
    except (TypeError, ValueError):
        return None
    if " at 0x" in head or len(head) > 200:  # a default value that is an object shows its address
        return None
    return f"{head}\n{textwrap.indent(f'{chr(34) * 3}{documentation}{chr(10)}{chr(34) * 3}', '    ')}\n"


@click.command(help=__doc__)
@click.option(
    "--maths", "maths_file", type=click.Path(exists=True, path_type=Path), help="GSM8K's training questions."
)
@click.option(
    "--tasks", "tasks_file", type=click.Path(exists=True, path_type=Path), help="MBPP's training tasks."
)
@click.option(
    "--most", type=click.IntRange(1), default=700, show_default=True, help="Prompts of each of the kinds."
)
@click.option("--seed", default=0, show_default=True, help="Of the choice and the order.")
def main(maths_file, tasks_file, most, seed):
    kinds = {"function": functions()}
    if maths_file:
        kinds["maths"] = maths(maths_file)
    if tasks_file:
        kinds["task"] = tasks(tasks_file)
    rng = random.Random(seed)
    records = []
    for kind, prompts in sorted(kinds.items()):
        records += [
            {"kind": kind, "prompt": prompt} for prompt in rng.sample(prompts, min(most, len(prompts)))
        ]
        print(f"{kind}: {len(prompts)} prompts", file=sys.stderr)
    rng.shuffle(records)
    for record in records:
        click.echo(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    main()
