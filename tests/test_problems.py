"""The word problems: right by construction, and the splits disjoint by construction."""

import json
import re
import subprocess
import sys
from itertools import islice

import pytest
from conftest import ROOT
from problems import LARGEST, held_out, problems

from cli import final_answer


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_equation_is_true_and_the_last_one_is_the_answer(split):
    for problem in islice(problems(split, 7), 2000):
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem["answer"])
        assert 1 <= len(equations) <= 3
        for left, operator, right, result in equations:
            assert eval(f"{left} {operator} {right}") == int(result) <= LARGEST
        assert final_answer(problem["answer"]) == equations[-1][3]
        for number in re.findall(r"\d+", problem["question"]):
            assert re.search(rf"\b{number}\b", problem["answer"])


def skeleton(problem):
    """What decides the answer: the equations, and the question's kind."""
    return tuple(re.findall(r"\d+ [-+*/] \d+", problem["answer"])) + (problem["question"].split()[-1],)


def test_no_held_out_problem_is_a_training_problem_with_other_names():
    seen = [
        {skeleton(p) for p in islice(problems(split, seed), 3000)} for split, seed in [("train", 1), ("heldout", 2)]
    ]
    assert len(seen[1]) > 500 and not seen[0] & seen[1]


def test_about_a_tenth_is_held_out():
    assert sum(held_out(str(i)) for i in range(10000)) == pytest.approx(1000, abs=100)


def test_the_command_prints_reproducible_jsonl():
    command = [sys.executable, str(ROOT / "tiny" / "problems.py"), "--split", "heldout", "--seed", "3", "--count", "5"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second
    assert (
        all(set(json.loads(line)) == {"question", "answer"} for line in first.splitlines()) and first.count("\n") == 5
    )
