"""Prompts for a draft adapter's training data: maths questions, programming tasks, functions, and user turns.

    python adapters/prompts.py --maths gsm8k_train.jsonl.gz --tasks mbpp_train.jsonl > prompts.jsonl

prints one JSON object with `prompt` per line, in a fixed random order, so that any beginning of it is a
sample of the whole. Functions to complete are signatures and docstrings of Python's standard library and
numpy: they ask as HumanEval does, without its problems. The model's own answers to the prompts are what an
adapter learns from.

User turns are written by the model itself, from a few first words:

    python adapters/prompts.py --openings > openings.jsonl
    python cli.py generate --model FOLDER --raw --block-size 1 --temperature 1 --top-p 0.95 --seed 1 \
        --max-new-tokens 80 --batch-size 40 --input openings.jsonl --output turns-1.jsonl

Other seeds give other turns. `--turns turns-1.jsonl` adds them to the prompts.
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

sys.path[:0] = [str(Path(__file__).parent.parent)]

from commands.console import HELP_OPTIONS, reports_mistakes  # noqa: E402
from commands.prompts import parse_jsonl  # noqa: E402
from fastdllm import InputError, require  # noqa: E402

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

# EvalPlus's wording for chat models
TASK = "Please provide a self-contained Python script that solves the following problem in a markdown code "
TASK += "block:"

USER = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
USER += "<|im_start|>user\n"

# first words of user turns: code, then prose, then maths
OPENINGS = """
Write a Python function that
Write a function which
Implement
Can you write a class that
Write a script that
How can I
Fix this code:
What does this code do?
Write unit tests for
Refactor this function:
Write a SQL query that
Write a JavaScript function that
Why do I get this error?
Write a program that
Using pandas,
In Python, how do I
Explain
What is the difference between
Write a short story about
Write an email to
Summarize the following text:
Tell me about
Who was
Give me some advice on
List five
What are the advantages of
Describe how
Translate this into French:
Why is
Write a paragraph about
How does
Suggest
A shop sells
If a train
Calculate
Solve the equation
Maria has
Find the probability that
How many
A farmer
""".strip().splitlines()


def read_jsonl(path: Path, *needed: str) -> list[dict]:
    """Records of a JSONL file, which may be compressed by gzip.

    Raises InputError for a broken line and for a record without a key that is needed.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            records = parse_jsonl(file.read(), path)
        except EOFError:
            raise InputError(f"{path}: ends in the middle of its compressed data.") from None
    for place, record in records.items():
        missing = [f"`{key}`" for key in needed if not record.get(key)]
        require(not missing, f"{place}: needs {' and '.join(missing)}.")
    return list(records.values())


def maths(path: Path) -> list[str]:
    """GSM8K's questions as they are."""
    return [record["question"] for record in read_jsonl(path, "question")]


def tasks(path: Path) -> list[str]:
    """MBPP's tasks, with one test that shows the function's name."""
    return [
        f'{TASK}\n```\n"""\n{r["text"]}\n{r["test_list"][0]}\n"""\n```\n'
        for r in read_jsonl(path, "text", "test_list")
    ]


def turns(path: Path) -> list[str]:
    """User turns of `generate --input openings.jsonl`, without those that were cut off."""
    records = read_jsonl(path, "prompt", "text", "finish_reason")
    whole = [record for record in records if record["finish_reason"] == "stop"]
    return [record["prompt"].removeprefix(USER) + record["text"] for record in whole]


def functions() -> list[str]:
    """Signature and docstring of public functions that say what they do in 60 to 900 characters."""
    found = {}
    # importing these opens windows, or prints
    skipped = {"antigravity", "this", "idlelib", "turtledemo", "lib2to3", "tkinter", "turtle"}
    public = sorted(name for name in sys.stdlib_module_names - skipped if not name.startswith("_"))
    for name in [*public, "numpy"]:
        for module in submodules(name):
            for key, value in sorted(vars(module).items()):
                own = inspect.isfunction(value) and value.__module__ == module.__name__
                if key.startswith("_") or not own:
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


@click.command(help=__doc__, context_settings=HELP_OPTIONS)
@click.option("--maths", "maths_file", type=FILE, help="GSM8K's training questions.")
@click.option("--tasks", "tasks_file", type=FILE, help="MBPP's training tasks.")
@click.option("--turns", "turns_files", type=FILE, multiple=True, help="User turns; may be repeated.")
@click.option("--without", type=FILE, help="Prompts that were used already, as printed by this program.")
@click.option("--openings", is_flag=True, help="Print first words of user turns, and nothing else.")
@click.option("--most", type=click.IntRange(1), default=700, show_default=True, help="Prompts of each kind.")
@click.option("--seed", default=0, show_default=True, help="Of the choice and the order.")
@reports_mistakes
def main(maths_file, tasks_file, turns_files, without, openings, most, seed):
    others = maths_file or tasks_file or turns_files or without
    require(not (openings and others), "--openings prints first words alone; leave the files out.")
    if openings:
        for words in OPENINGS:
            click.echo(json.dumps({"prompt": USER + words}))
        return
    kinds = {"function": functions()}
    if maths_file:
        kinds["maths"] = maths(maths_file)
    if tasks_file:
        kinds["task"] = tasks(tasks_file)
    if turns_files:
        kinds["turn"] = sorted({turn for path in turns_files for turn in turns(path)})
    used = {record["prompt"] for record in read_jsonl(without, "prompt")} if without else set()
    rng = random.Random(seed)
    records = []
    for kind, prompts in sorted(kinds.items()):
        prompts = [prompt for prompt in prompts if prompt not in used]
        records += [
            {"kind": kind, "prompt": prompt} for prompt in rng.sample(prompts, min(most, len(prompts)))
        ]
        print(f"{kind}: {len(prompts)} prompts", file=sys.stderr)
    rng.shuffle(records)
    for record in records:
        click.echo(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    main()
