"""The word problems: right by construction, and the splits disjoint by construction."""

import json
import re
from itertools import islice

import pytest
from click.testing import CliRunner
from problems import LARGEST, MOST_STEPS, main, problems

from commands.evaluate import final_answer


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_equation_is_true_and_the_last_one_is_the_answer(split):
    for problem in islice(problems(split, 7), 1000):
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem["answer"])
        assert 1 <= len(equations) <= MOST_STEPS
        for left, operator, right, result in equations:
            assert eval(f"{left} {operator} {right}") == int(result) <= LARGEST
        assert final_answer(problem["answer"]) == equations[-1][3]
        for number in re.findall(r"\d+", problem["question"]):
            assert re.search(rf"\b{number}\b", problem["answer"])


def skeletons(problem):
    """What decides the answer of each turn: how the story starts, its equations, and what is asked."""
    turns = [(problem["question"], problem["answer"])] if "question" in problem else []
    texts = [message["content"] for message in problem.get("messages", [])]
    turns += zip(texts[::2], texts[1::2])
    equations, found = (" starts with " in turns[0][1],), []
    for question, answer in turns:
        equations += tuple(re.findall(r"\d+ [-+*/] \d+", answer))
        found.append((*equations, question.split()[-1]))
    return found


def test_no_held_out_problem_is_a_training_problem_with_other_names():
    seen = [
        {skeleton for problem in islice(problems(split, seed, 0.5), 1500) for skeleton in skeletons(problem)}
        for split, seed in [("train", 1), ("heldout", 2)]
    ]
    assert len(seen[1]) > 500 and not seen[0] & seen[1]


def test_a_conversation_goes_on_from_its_first_answer():
    for problem in islice(problems("train", 3, 1.0), 500):
        first, second = [m["content"] for m in problem["messages"] if m["role"] == "assistant"]
        numbers = re.findall(r"\d+", second)
        assert final_answer(first) in numbers and final_answer(second) == numbers[-2 if "=" in second else -1]
        assert [m["role"] for m in problem["messages"]] == ["user", "assistant"] * 2


def test_the_command_prints_reproducible_jsonl():
    options = ["--split", "heldout", "--seed", "3", "--count", "5"]
    first, second = (CliRunner().invoke(main, options).stdout for _ in range(2))
    assert first == second and first.count("\n") == 5
    assert all(set(json.loads(line)) == {"question", "answer"} for line in first.splitlines())
