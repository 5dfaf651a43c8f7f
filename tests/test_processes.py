"""Files of answers: runs that go on, alone or among several processes, write what one whole run writes."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import mistake, read_lines, run, write_lines
from conftest import ROOT

from checkpoint import load, save
from commands import console, prompts


@pytest.fixture(params=["eval", "generate"])
def command(request, tmp_path):
    """Nine prompts of unlike lengths for either command, but for its --output."""
    if request.param == "eval":
        return ["eval", "--count", 9, "--max-new-tokens", 30]
    lines = [{"prompt": f"Mia has {n} apples. " * (1 + n % 4) + "How many?", "name": n} for n in range(9)]
    return ["generate", "--max-new-tokens", 9, "--input", write_lines(tmp_path / "prompts.jsonl", lines)]


@pytest.fixture
def as_process(monkeypatch):
    """Runs a command as process `rank` of two."""

    def start(rank, *arguments):
        before = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patched:
            patched.setattr(console, "RANK", rank)
            patched.setattr(console, "PROCESSES", 2)
            try:
                return run(*arguments)
            finally:
                signal.signal(signal.SIGTERM, before)

    return start


def parts(tmp_path):
    return sorted(tmp_path.glob("*.rank-*"))


def test_two_processes_write_what_one_writes(tmp_path, command, as_process):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert run(*command, "--output", one).exit_code == 0
    second = as_process(1, *command, "--output", two)
    assert second.exit_code == 0 and not second.output  # the first process reports
    [part] = parts(tmp_path)
    assert len(read_lines(part)) == 1 + 4  # a header, and its share of nine
    first = as_process(0, *command, "--output", two)
    assert first.exit_code == 0 and first.output
    assert two.read_bytes() == one.read_bytes() and not parts(tmp_path)
    assert not as_process(1, *command, "--output", two).output and not parts(tmp_path)  # it is complete


def test_a_run_goes_on_where_it_was_broken_off(tmp_path, command, monkeypatch):
    out, whole, finished = tmp_path / "out.jsonl", tmp_path / "whole.jsonl", prompts.finished
    assert run(*command, "--output", whole).exit_code == 0
    line = [*command, "--output", out, "--batch-size", 2]

    def fails_after_three(*given):
        yield from itertools.islice(finished(*given), 3)
        raise MemoryError

    monkeypatch.setattr(prompts, "finished", fails_after_three)
    assert run(*line).exit_code == 2 and not out.exists()
    [part] = parts(tmp_path)
    with part.open("a") as file:
        file.write('{"index": 8, "tok')  # half a line, as a kill leaves it
    left = []
    monkeypatch.setattr(prompts, "finished", lambda *given: left.append(len(given[1])) or finished(*given))
    result = run(*line)
    assert result.exit_code == 0 and left == [6] and "tokens/s" not in result.output  # the time is not known
    assert out.read_bytes() == whole.read_bytes() and not parts(tmp_path)


def test_a_finished_run_is_complete_and_no_other_one_replaces_it(tmp_path, command, monkeypatch):
    out = tmp_path / "out.jsonl"
    assert run(*command, "--output", out).exit_code == 0
    first = out.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(prompts, "finished", lambda *given: pytest.fail("something was decoded"))
        again = run(*command, "--output", out)
    assert again.exit_code == 0 and out.read_bytes() == first
    assert f"{out} is complete: it holds 9 answers." in again.stderr
    assert "holds something else" in mistake(*command, "--threshold", 0.5, "--output", out)
    assert out.read_bytes() == first and not parts(tmp_path)


def test_a_file_is_complete_for_the_same_fields_and_answers_only(tmp_path):
    out, source = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    for name, what in (("id", ["generate", "--input"]), ("answer", ["eval"])):
        out.unlink(missing_ok=True)
        write_lines(source, [{"prompt": "hi", "question": "hi", name: 1}])
        assert run(*what, source, "--max-new-tokens", 2, "--output", out).exit_code == 0
        write_lines(source, [{"prompt": "hi", "question": "hi", name: 2}])
        assert "holds something else" in mistake(*what, source, "--max-new-tokens", 2, "--output", out)


def test_parts_of_another_run_are_refused_by_what_differs_and_stay(tmp_path, as_process):
    model = shutil.copytree(ROOT / "tiny" / "checkpoint", tmp_path / "model")
    line = ["eval", "--count", 4, "--max-new-tokens", 9, "--model", model, "--output", tmp_path / "out.jsonl"]
    assert as_process(1, *line).exit_code == 0
    [part] = parts(tmp_path)
    before = part.read_bytes()
    for options, words in (
        (["--threshold", "0.5"], "threshold 0.9, not 0.5"),
        (["--dtype", "bfloat16"], "dtype torch.float32, not torch.bfloat16"),
        (["--verify"], "verify False, not True"),
        (["--count", 5], "prompts"),
    ):
        assert words in mistake(*line, *options)
    save(*load(model, "cpu"), model)  # as a training that was run again does
    assert "holds answers with weights" in mistake(*line)
    assert part.read_bytes() == before and parts(tmp_path) == [part]


def test_a_second_run_at_once_says_so(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "out.jsonl.rank-0").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing it" in mistake(
            "eval", "--count", 1, "--output", tmp_path / "out.jsonl"
        )


def test_several_processes_need_files(tmp_path, as_process):
    assert "need --output FILE" in as_process(0, "eval", "--count", 2).output
    source = write_lines(tmp_path / "x", [{"prompt": "hi"}])
    assert "--output FILE" in as_process(0, "generate", "--input", source).output
    assert "need --input FILE" in as_process(0, "generate", "a prompt").output


def test_torchrun_names_a_dead_process_and_the_same_command_goes_on(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    what = ["eval", "--count", "30", "--batch-size", "2", "--block-size", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / "cli.py")]
    line = [*torchrun, *what, "--device", "cpu", "--output", str(two)]
    other, part = (tmp_path / f"two.jsonl.rank-{rank}" for rank in (0, 1))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    group = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    # both have begun: a process that still imports torch has nothing to say yet
    while not (part.exists() and other.exists() and part.read_bytes().count(b"\n") >= 3):
        assert group.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(group.pid)], capture_output=True, text=True).stdout.split()
    [victim] = [pid for pid in children if b"\0RANK=1\0" in open(f"/proc/{pid}/environ", "rb").read()]
    os.kill(int(victim), signal.SIGKILL)
    errors = group.communicate(timeout=60)[1]
    assert group.returncode != 0 and f"pid: {victim}" in errors and "the same command goes on" in errors
    assert part.exists() and not two.exists()
    what[4] = "30"  # batches of other sizes too
    assert run(*what, "--output", two).exit_code == 0  # also in one process
    assert run(*what, "--output", one).exit_code == 0
    assert two.read_bytes() == one.read_bytes() and not part.exists()
