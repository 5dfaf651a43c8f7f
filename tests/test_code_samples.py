"""Prompts for code problems and sample files for the harnesses that run the code."""

import json
import sys

import pytest
from click.testing import CliRunner
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import code_samples  # noqa: E402

HUMANEVAL = {"task_id": "HumanEval/7", "prompt": 'def f(x):\n    """ Add 1. """\n', "entry_point": "f"}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add 1.",
    "test_list": ["assert f(1) == 2", "assert f(2) == 3"],
}


def run(kind, records, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = CliRunner().invoke(code_samples.main, [kind, str(file)])
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_prompts_are_worded_as_evalplus_words_them(tmp_path):
    _, prompts = run("problems", [HUMANEVAL, MBPP], tmp_path)
    assert [prompt["task_id"] for prompt in prompts] == ["HumanEval/7", "Mbpp/11"]
    begin = "Please provide a self-contained Python script that solves the following problem "
    begin += "in a markdown code block:"
    assert prompts[0]["prompt"] == f'{begin}\n```\ndef f(x):\n    """ Add 1. """\n```\n'
    assert (
        prompts[1]["prompt"] == f'{begin}\n```\n"""\nWrite a function to add 1.\nassert f(1) == 2\n"""\n```\n'
    )


@pytest.mark.parametrize(
    "text",
    [
        "Sure:\n```python\ndef f(x):\n    return x + 1\n```\nTry it:\n```python\nf(2)\n```",
        "```\ndef f(x):\n    return x + 1\n\n\n```",
        "def f(x):\n    return x + 1",
        "```\npython\ndef f(x):\n    return x + 1\n```",
        "```py\ndef f(x):\n    return x + 1",  # cut by length
    ],
)
def test_a_sample_is_the_first_code_block_and_completes_the_prompt(text, tmp_path):
    _, [sample] = run("samples", [{"task_id": "HumanEval/7", "text": text}], tmp_path)
    assert sample["solution"] == "def f(x):\n    return x + 1\n"
    for program in sample["solution"], HUMANEVAL["prompt"] + sample["completion"]:
        names = {}
        exec(program, names)
        assert names["f"](1) == 2


def test_broken_records_are_named(tmp_path):
    for kind, record in [("problems", {"task_id": 1}), ("samples", {"task_id": 1, "text": "x"})]:
        done, printed = run(kind, [HUMANEVAL | {"text": "x"}, record], tmp_path)
        assert done.exit_code == 2 and not printed and "line 2: needs" in done.stderr
