"""Several processes share the prompts out, and write one file as one process does."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from conftest import ROOT

import cli

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "cli.py")]


def run(*arguments):
    return CliRunner().invoke(cli.cli, [str(a) for a in arguments])


@pytest.fixture
def as_process(monkeypatch):
    """Runs a command as process `rank` of two."""

    def start(rank, *arguments):
        monkeypatch.setattr(cli, "RANK", rank)
        monkeypatch.setattr(cli, "PROCESSES", 2)
        before = signal.getsignal(signal.SIGTERM)
        try:
            return run(*arguments)
        finally:
            signal.signal(signal.SIGTERM, before)

    return start


@pytest.fixture
def prompts(tmp_path):
    """Prompts of unlike lengths."""
    lines = [{"prompt": f"Mia has {n} apples. " * (1 + n % 4) + "How many?", "name": n} for n in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "prompts.jsonl"


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_two_processes_write_what_one_writes(tmp_path, prompts, as_process, command):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    what = ["eval", "--count", 9] if command == "eval" else ["generate", "--input", prompts]
    assert run(*what, "--output", one).exit_code == 0
    second = as_process(1, *what, "--output", two)
    assert second.exit_code == 0 and not second.output  # the first process reports
    first = as_process(0, *what, "--output", two)
    assert first.exit_code == 0 and first.output
    assert two.read_bytes() == one.read_bytes()
    assert not list(tmp_path.glob("*.rank-*"))


def test_one_process_goes_on_and_an_earlier_file_stays_until_it_is_done(tmp_path, prompts, monkeypatch):
    out, whole = tmp_path / "out.jsonl", run("generate", "--input", prompts).stdout
    out.write_text("from before")
    line, finished = ["generate", "--input", prompts, "--output", out, "--batch-size", 2], cli.finished

    def fails_after_three(*given):
        yield from itertools.islice(finished(*given), 3)
        raise MemoryError

    monkeypatch.setattr(cli, "finished", fails_after_three)
    assert run(*line).exit_code == 2 and out.read_text() == "from before"
    other = run(*line, "--threshold", 0.5)
    assert other.exit_code == 2 and "threshold 0.9, not 0.5" in other.output
    left = []
    monkeypatch.setattr(cli, "finished", lambda *given: left.append(len(given[1])) or finished(*given))
    assert run(*line).exit_code == 0 and left == [6]
    assert out.read_text() == whole and not list(tmp_path.glob("*.rank-*"))


def test_a_killed_process_goes_on_and_half_a_line_is_cut_off(tmp_path, as_process):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert run("eval", "--count", 8, "--output", one).exit_code == 0
    line = ["eval", "--count", 8, "--output", two]
    assert as_process(1, *line).exit_code == 0
    part = tmp_path / "two.jsonl.rank-1"
    whole = part.read_bytes().splitlines(keepends=True)
    kept = json.loads(whole[1])
    kept["tokens"] = kept["tokens"][:1]  # to see that it is not made again
    part.write_bytes(whole[0] + json.dumps(kept).encode() + b"\n" + whole[2][:10])
    assert as_process(1, *line).exit_code == 0 and as_process(0, *line).exit_code == 0
    expected, got = ([json.loads(x) for x in path.read_text().splitlines()] for path in (one, two))
    differing = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
    assert differing == [kept["index"] + 1] and got[differing[0]]["new_tokens"] == 1


def test_parts_of_another_run_are_refused_and_stay(tmp_path, as_process):
    out = tmp_path / "out.jsonl"
    assert as_process(1, "eval", "--count", 4, "--output", out).exit_code == 0
    part = tmp_path / "out.jsonl.rank-1"
    before = part.read_bytes()
    for options, words in [(["--threshold", "0.5"], "threshold 0.9, not 0.5"), (["--count", 5], "prompts")]:
        other = as_process(1, "eval", "--count", 4, "--output", out, *options)
        assert other.exit_code == 2 and words in other.output and part.read_bytes() == before


def test_a_part_that_was_left_does_not_hide_one_process_speed(tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.rank-0").write_text("of a run that was given up\n")
    found = json.loads(run("eval", "--count", 2, "--output", out, "--json").stdout)
    assert found["tokens_per_second"] > 0


def test_several_processes_need_files(prompts, as_process):
    assert "need --output FILE" in as_process(0, "eval", "--count", 2).output
    assert "need --output FILE" in as_process(0, "generate", "--input", prompts).output
    assert "need --input FILE" in as_process(0, "generate", "a prompt").output


def test_torchrun_names_a_dead_process_and_the_same_command_goes_on(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    what = ["eval", "--count", "60", "--batch-size", "2", "--block-size", "1"]
    assert run(*what, "--output", one).exit_code == 0
    line, part = [*TORCHRUN, *what, "--output", str(two)], tmp_path / "two.jsonl.rank-1"
    group = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not part.exists() or part.read_bytes().count(b"\n") < 3:
        assert group.poll() is None
        time.sleep(0.02)
    [victim] = [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-P", str(group.pid)], capture_output=True, text=True
        ).stdout.split()
        if b"\0RANK=1\0" in open(f"/proc/{pid}/environ", "rb").read()
    ]
    os.kill(victim, signal.SIGKILL)
    errors = group.communicate(timeout=60)[1]
    assert group.returncode != 0 and f"pid: {victim}" in errors and "the same command goes on" in errors
    assert part.exists() and not two.read_text().count("\n") > 1
    subprocess.run(line, check=True, capture_output=True, cwd=ROOT)
    assert two.read_bytes() == one.read_bytes() and not part.exists()
