"""The prompts from which a draft adapter's training data are made."""

import gzip
import json
import sys

import pytest
from click.testing import CliRunner
from conftest import ROOT

sys.path.insert(0, str(ROOT / "adapters"))
import prompts  # noqa: E402


@pytest.fixture
def printed(monkeypatch):
    monkeypatch.setattr(prompts, "functions", lambda: [f"function {i}" for i in range(5)])

    def run(*options, mistake=False):
        result = CliRunner().invoke(prompts.main, [str(option) for option in options])
        assert result.exit_code == (2 if mistake else 0), result.output
        return result.output if mistake else [json.loads(line) for line in result.stdout.splitlines()]

    return run


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_user_turn_is_its_opening_and_what_the_model_wrote_and_cut_ones_are_left_out(printed, tmp_path):
    [first, *_] = openings = printed("--openings")
    ends = ["stop", "length"] + ["stop"] * (len(openings) - 2)
    written = [{**opening, "text": " ...", "finish_reason": end} for opening, end in zip(openings, ends)]
    turns = jsonl(tmp_path / "turns.jsonl", written)
    found = {record["prompt"] for record in printed("--turns", turns) if record["kind"] == "turn"}
    assert len(found) == len(openings) - 1
    assert first["prompt"].removeprefix(prompts.USER) + " ..." in found


def test_prompts_that_were_used_do_not_come_again(printed, tmp_path):
    questions = jsonl(tmp_path / "maths.jsonl", [{"question": f"question {i}"} for i in range(6)])
    before = printed("--maths", questions, "--most", 4)
    assert printed("--maths", questions, "--most", 4) == before  # the same every time
    used = jsonl(tmp_path / "before.jsonl", before)
    after = printed("--maths", questions, "--most", 4, "--without", used)
    assert len(before) == 8 and len(after) == 3
    assert {record["prompt"] for record in before}.isdisjoint(record["prompt"] for record in after)


def test_a_record_that_lacks_something_is_named(printed, tmp_path):
    half = gzip.compress(b'{"question": "one"}\n')[:-9]
    (tmp_path / "half.jsonl.gz").write_bytes(half)
    assert "half.jsonl.gz: ends in the middle" in printed("--maths", tmp_path / "half.jsonl.gz", mistake=True)
    (tmp_path / "maths.jsonl").write_text('\n{"question": "one"}\n\n{"prompt": "two"}\n')
    said = printed("--maths", tmp_path / "maths.jsonl", mistake=True)
    assert "maths.jsonl, line 4: needs `question`" in said
    assert "leave the files out" in printed("--openings", "--maths", tmp_path / "maths.jsonl", mistake=True)
