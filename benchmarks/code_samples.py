"""HumanEval and MBPP for EvalPlus or human-eval: prompts from their problems, sample files from answers.

    python benchmarks/code_samples.py problems HumanEvalPlus.jsonl > prompts.jsonl
    python cli.py generate --input prompts.jsonl --output answers.jsonl --max-new-tokens 512
    python benchmarks/code_samples.py samples answers.jsonl > samples.jsonl
    evalplus.evaluate --dataset humaneval --samples samples.jsonl

The model's code is only written to files here; EvalPlus and human-eval run it, in their own sandboxes.
"""

import json
import re
import sys
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("", "adapters")]
from prompts import TASK  # noqa: E402, EvalPlus's wording

from commands.console import HELP_OPTIONS, reports_mistakes  # noqa: E402
from commands.prompts import read_jsonl  # noqa: E402
from fastdllm import require  # noqa: E402


def prompt(place: str, problem: dict) -> dict:
    """What the model is asked, of a problem in HumanEval's, EvalPlus's or MBPP's own form."""
    if isinstance(text := problem.get("prompt"), str):
        name = str(problem.get("task_id"))
    else:
        good = isinstance(problem.get("text"), str) and problem.get("test_list")
        require(good, f"{place}: needs `prompt`, or MBPP's `text` and `test_list`.")
        name = f"Mbpp/{problem.get('task_id')}"
        text = f'"""\n{problem["text"]}\n{problem["test_list"][0]}\n"""'
    return {"task_id": name, "prompt": f"{TASK}\n```\n{text.strip()}\n```\n"}


def sample(place: str, answer: dict) -> dict:
    """What is run: the answer's first code block, or all of it; `solution` for EvalPlus, else human-eval."""
    good = all(isinstance(answer.get(key), str) for key in ("task_id", "text"))
    require(good, f"{place}: needs `task_id` and `text`, as `cli.py generate --input` writes them.")
    block = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", answer["text"], re.DOTALL)
    code = (block[1] if block else answer["text"]).rstrip() + "\n"
    code = re.sub(r"\A\s*python\n", "", code)  # some models write the language below the fence
    # human-eval puts the prompt before it: an open function, which the solution then defines anew
    return {"task_id": answer["task_id"], "solution": code, "completion": f"    pass\n\n\n{code}"}


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "), context_settings=HELP_OPTIONS)
@click.argument("kind", type=click.Choice(["problems", "samples"]))
@click.argument("file")
@reports_mistakes
def main(kind, file):
    convert = prompt if kind == "problems" else sample
    for record in [convert(place, record) for place, record in read_jsonl(file).items()]:
        click.echo(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    main()
