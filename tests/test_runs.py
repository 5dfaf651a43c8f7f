"""Runs of train.py: they go on where they stopped, on any number of processes, and refuse what is not theirs."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

import train
from checkpoint import load
from train import Training
from training.runs import CHECKSUM, STATE, checkpoints

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def command(folder, objective="adapt", **options) -> list[str]:
    """A short run on few problems."""
    if not (folder / "data.jsonl").exists():
        problems = [json.dumps({"question": f"{n} and {n}?", "answer": f"{n + n}"}) for n in range(40)]
        (folder / "data.jsonl").write_text("\n".join(problems) + "\n")
    defaults = {"model": ROOT / "tiny" / "checkpoint", "data": folder / "data.jsonl", "out": folder / "out"}
    defaults |= {"steps": 2, "batch-size": 2, "seq-len": 32, "lr": 1e-3, "warmup": 4, "save-every": 1}
    options = defaults | {"threads": 1, "device": "cpu"} | options
    return [objective, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def run(folder, *flags, **options):
    """In this process, since torch is imported already."""
    return CliRunner().invoke(train.main, [*command(folder, **options), *flags])


def succeeds(*given, **options) -> str:
    result = run(*given, **options)
    assert result.exit_code == 0, result.output
    return result.output


def refused(result, *sentences) -> None:
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    for sentence in sentences:
        assert sentence in result.output


def kill_after_a_checkpoint(line: list[str], out) -> None:
    """Start train.py, and kill it as soon as it has written a checkpoint."""
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *line], stderr=subprocess.DEVNULL)
    while process.poll() is None and not checkpoints(out):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def metrics(out) -> list[dict]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


# --- Going on ---


@pytest.mark.parametrize("options", [{"objective": "ar"}, {"objective": "adapt", "ar-weight": 0.5}], ids=str)
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(tmp_path, options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options |= {"steps": 4, "heldout": tmp_path / "data.jsonl", "eval-rows": 2}
    assert "No checkpoint yet, starting at step 0." in succeeds(tmp_path, out=whole, **options)
    kill_after_a_checkpoint(command(tmp_path, out=killed, **options), killed)
    assert not (killed / "model.safetensors").exists()
    assert "Resuming at step " in succeeds(tmp_path, out=killed, **options)
    first, second = ((out / "model.safetensors").read_bytes() for out in (whole, killed))
    assert first == second
    assert metrics(whole) == metrics(killed)
    assert "All 4 steps are done already." in succeeds(tmp_path, out=killed, **options)


def test_two_processes_train_like_one_and_resume_each_others_runs(tmp_path):
    """FSDP2 on CPUs; the second of three steps is run by two processes."""
    options = {"batch-size": 8, "micro-batch": 2, "ar-weight": 0.5, "compute": "float32", "lr": 1e-4}
    options |= {"heldout": tmp_path / "data.jsonl", "eval-rows": 8, "eval-every": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    succeeds(tmp_path, out=one, steps=3, **options)
    succeeds(tmp_path, out=two, steps=1, **options)
    line = [*TORCHRUN, ROOT / "train.py", *command(tmp_path, out=two, steps=2, **options)]
    shared = subprocess.run(line, check=True, capture_output=True, text=True)
    assert shared.stderr.count("Resuming at step 1.") == 1
    succeeds(tmp_path, out=two, steps=3, **options)
    for expected, got in zip(metrics(one), metrics(two), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    one, two = (load(out, "cpu")[0].state_dict() for out in (one, two))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-5, rtol=1e-3)


def test_a_run_on_a_device_goes_on_in_bfloat16_with_recomputation(tmp_path, device):
    out, options = tmp_path / "out", {"eval-every": 2, "eval-rows": 2, "keep": 2}
    for steps in (2, 4):
        options |= {"device": device, "compute": "bfloat16", "heldout": tmp_path / "data.jsonl"}
        succeeds(tmp_path, "--recompute", steps=steps, **options)
    records = metrics(out)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    looks = {record["step"]: record.get("heldout_diffusion_loss") for record in records}
    assert looks[1] is looks[3] is None and looks[4] < looks[2]
    assert [place.name for place in checkpoints(out)] == ["step-0000003", "step-0000004"]
    files = {file.name for place in checkpoints(out) for file in place.iterdir()}
    assert files == {"state.safetensors", "state.sha256"}  # nothing that could run as code


def test_a_short_run_is_saved_ten_times_and_a_long_one_every_200_steps():
    assert [Training(steps=steps).saves_every for steps in (1, 50, 55, 6000)] == [1, 5, 6, 200]
    assert Training(steps=50, save_every=7).saves_every == 7


@pytest.mark.parametrize("checkpoint", [True, False])
def test_ctrl_c_says_what_the_same_command_goes_on_from(tmp_path, monkeypatch, checkpoint):
    begun = train.Adaptation.step

    def step(job, rows, number, progress):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return begun(job, rows, number, progress)

    monkeypatch.setattr(train.Adaptation, "step", step)
    result = run(tmp_path, **({} if checkpoint else {"save-every": 2}))
    place = checkpoints(tmp_path / "out")[0] if checkpoint else "the start"
    assert result.exit_code == 130 and f"Interrupted; the same command goes on from {place}." in result.output


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    succeeds(tmp_path)
    before, losses = train.Adaptation.step, {"diffusion_loss": float("nan")}
    monkeypatch.setattr(train.Adaptation, "step", lambda *given: before(*given) | losses)
    refused(run(tmp_path, steps=5), "step 3: the loss is NaN", "a lower --lr")
    assert [place.name for place in checkpoints(tmp_path / "out")] == ["step-0000001", "step-0000002"]


def test_a_checkpoint_that_cannot_be_written_is_one_sentence_and_the_last_one_stays(tmp_path):
    succeeds(tmp_path)
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # like a disk that is full
    line = [sys.executable, ROOT / "train.py", *command(tmp_path, steps=4)]
    full = subprocess.run(line, capture_output=True, text=True, preexec_fn=small)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "cannot be written" in full.stderr and "earlier ones stay" in full.stderr
    names = sorted(os.listdir(tmp_path / "out" / "checkpoints"))
    assert names == ["step-0000001", "step-0000002"]  # and nothing half written
    assert "Resuming at step 2." in succeeds(tmp_path, steps=4)


# --- What is not its own ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    succeeds(folder)
    return folder


@pytest.fixture
def again(finished, tmp_path):
    """Goes on with a copy of it; its data is where the run had it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return partial(run, tmp_path, data=finished / "data.jsonl")


def test_a_folder_with_another_run_is_refused_and_stays(again, tmp_path):
    out = tmp_path / "out"
    before = (out / "model.safetensors").read_bytes()
    refused(again(steps=4, seed=1), "holds a run with seed 0, not 1; take another --out")
    refused(again(steps=1), "has done 2 steps, more than --steps 1")
    assert (out / "model.safetensors").read_bytes() == before
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tok')  # torn by a full disk
    assert again(steps=3).exit_code == 0 and [record["step"] for record in metrics(out)] == [1, 2, 3]


def test_a_cosine_ends_where_its_steps_end(tmp_path):
    said = succeeds(tmp_path, schedule="cosine", steps=1)
    assert "--warmup 4 is more than --steps 1: the rate never reaches --lr." in said
    longer = run(tmp_path, schedule="cosine", steps=2)  # its rates would be others from the start
    refused(longer, "holds a run with steps 1, not 2")


def test_a_resumed_run_needs_the_same_data_whatever_its_date(again, tmp_path):
    data = tmp_path / "data.jsonl"
    os.utime(data, (1, 1))
    assert again(steps=3, data=data).exit_code == 0
    data.write_text(data.read_text().replace("7", "8"))
    refused(again(steps=4, data=data), "holds a run with other data, or it has changed")


def test_a_resumed_run_needs_the_same_model(tmp_path, shipped):
    folder = shutil.copytree(ROOT / "tiny" / "checkpoint", tmp_path / "model")
    succeeds(tmp_path, model=folder)
    shutil.copytree(tmp_path / "out", folder, dirs_exist_ok=True)  # trained further, under the same name
    refused(run(tmp_path, model=folder, steps=3), "holds a run with another model, or it has changed")


def test_a_resumed_run_needs_the_same_tokenizer(tmp_path):
    folder = shutil.copytree(ROOT / "tiny" / "checkpoint", tmp_path / "model")
    succeeds(tmp_path, model=folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    refused(run(tmp_path, model=folder, steps=3), "holds a run with another tokenizer, or it has changed")


def test_what_a_killed_process_left_half_written_is_removed(again, tmp_path):
    out = tmp_path / "out"
    left = [out / ".model.safetensors.7.tmp", out / "checkpoints" / ".step-0000003.tmp" / "state.safetensors"]
    left[1].parent.mkdir()
    for file in left:
        file.write_bytes(b"half")
    assert again(steps=3).exit_code == 0
    assert not left[0].exists() and not left[1].parent.exists()
    other = tmp_path / "other" / ".notes.tmp"  # in a folder that was there before the run
    other.parent.mkdir()
    other.write_bytes(b"mine")
    succeeds(tmp_path, out=other.parent)
    assert other.read_bytes() == b"mine"


def test_a_second_run_in_the_same_folder_is_refused(again, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "out" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(again(steps=3), "another run is using it")
    assert again(steps=3).exit_code == 0


@pytest.mark.parametrize("damage", ["weights", "header", "checksum", "missing", "empty", "all"])
def test_a_damaged_checkpoint_is_refused_and_without_it_the_run_goes_on(again, tmp_path, damage):
    places = checkpoints(tmp_path / "out")
    bad = places if damage == "all" else places[1:]
    content = bytearray((places[1] / STATE).read_bytes())
    if damage in ("weights", "header"):
        content[7 if damage == "header" else len(content) * 3 // 4] ^= 1
        (places[1] / STATE).write_bytes(content)
    elif damage == "checksum":
        (places[1] / CHECKSUM).write_bytes(b"\xff")
    else:
        for file in places[1].iterdir() if damage == "empty" else [place / STATE for place in bad]:
            file.unlink()
    for place in reversed(bad):
        then = "starts at step 0" if place == places[0] else "goes on from step-0000001"
        refused(again(steps=3), f"{place.name}: the checkpoint is damaged; remove it, and the run {then}.")
        shutil.rmtree(place)
    assert ("starting at step 0." if damage == "all" else "Resuming at step 1.") in again(steps=3).output
    assert [record["step"] for record in metrics(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"seq-len": 100}, "--seq-len 100 is no multiple of the block size 32"),
        ({"seq-len": 2048}, "--seq-len 2048 is more than the model's 1024 positions"),
        ({"batch-size": 3, "micro-batch": 2}, "--batch-size 3 is no multiple of 2"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"packing": "original", "seq-len": 1024, "data": "short.jsonl"}, "does not fill one row of 1024"),
        ({"out": "short.jsonl"}, "short.jsonl"),
        ({"data": "."}, "--data"),
        ({"block-size": 1}, "--block-size is 1, it must be at least 2; `train.py ar` trains AR models"),
        ({"lr": "nan"}, "--lr is nan, it must be 0 or a positive number"),
        ({"steps": 10**20}, "--steps"),
        ({"packing": "original", "heldout": "short.jsonl", "seq-len": 64}, "does not fill one row of 64"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.jsonl").write_text('{"text": "1"}\n')
    refused(run(tmp_path, **options), sentence)


# --- Command line ---


def test_show_prints_a_row_as_it_trains_on_a_screen(tmp_path):
    path, said = tmp_path / "data.jsonl", "Mia has 3 books."
    record = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": said}]}
    path.write_text(json.dumps(record) + "\n")
    shown = CliRunner().invoke(train.main, ["show", "--data", str(path)]).output
    assert "Row 0: 192 positions" in shown and " [padding x " in shown and f"[[{said}<|im_end|>" in shown
    assert "|<MASK>|" not in shown.partition("The block of positions")[0] and len(shown.splitlines()) < 120
    table = [line.split() for line in shown.splitlines() if "output" in line and "of view" in line]
    predicted = {view: {int(line[0]) for line in table if line[-1] == view} for view in "12"}
    assert predicted["1"] and predicted["2"] and not predicted["1"] & predicted["2"]  # the complement
    assert all(int(line[line.index("output") + 1]) == int(line[0]) - 1 for line in table)  # token shift
    path.write_text("{\n")
    refused(CliRunner().invoke(train.main, ["show", "--data", str(path)]), "no documents")


@pytest.mark.parametrize("module", ["click", "torch"])
@pytest.mark.parametrize("line", [["train.py", "show"], ["cli.py", "chat"]], ids=str)
def test_ctrl_c_while_the_program_starts_is_quiet(tmp_path, line, module):
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    line = [sys.executable, ROOT / line[0], line[1]]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}  # importing it interrupts
    result = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "")


def test_show_ends_quietly_where_nobody_reads_on():
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, ROOT / "train.py", "show"]
    shown = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert shown.stderr == ""


def test_starting_loads_no_compiler_and_no_sharding():
    slow = "torch._dynamo torch._inductor torch.distributed.fsdp torch.distributed.tensor".split()
    code = f"import sys, train; print([name for name in {slow} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout == "[]\n"


def test_presets_are_the_papers_and_options_override_them(monkeypatch):
    seen = {}
    monkeypatch.setattr(train, "train", lambda objective, **given: seen.update(given))
    flags = ["--model", "m", "--data", str(ROOT / "train.py"), "--out", "o", "--preset", "7b", "--steps", "7"]
    CliRunner().invoke(train.main, ["adapt", *flags], catch_exceptions=False)
    names = ("lr", "steps", "batch_size", "seq_len", "warmup", "recompute")
    assert [seen[name] for name in names] == [1e-5, 7, 256, 2048, 500, True]


def test_what_is_there_is_never_trained_over(again, tmp_path):
    folder = shutil.copytree(ROOT / "tiny" / "checkpoint", tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    refused(run(tmp_path, model=folder, out=folder), "holds a model or metrics that no run has made here")
    assert (folder / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    refused(run(tmp_path, out=tmp_path / "mine"), "holds a model or metrics that no run has made here")
    shutil.rmtree(tmp_path / "out" / "checkpoints")  # the README says that they may go
    refused(again(seed=1), "holds a run with seed 0, not 1")
    (tmp_path / "out" / "config.json").unlink()  # now nothing is left that was worth the time
    assert again(seed=1).exit_code == 0


def test_data_that_can_be_read_only_once_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(run(tmp_path, data=tmp_path / "pipe"), "pipe: is no file, and is read more than once")
