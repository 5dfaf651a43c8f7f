"""The README: what it names exists, and what it shows runs."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from click import Command
from conftest import ROOT

import cli
import train

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(block for language, block in BLOCKS if language in ("sh", "console")).replace("\\\n", " ")
COMMANDS = re.findall(r"(?:python|torchrun [^\n]*?) ?(\S+\.py[^\n&|]*)", SHELL)
REAL = "Qwen/Qwen2.5-Coder"  # weights that this machine may not have


def options_of(command: str) -> set[str]:
    """Flags that a script's command knows."""
    script, name = re.match(r"(\S+) *(\w*)", command).groups()
    group = {"cli.py": cli.cli, "train.py": train.main}.get(script)
    if group is None:
        return set(re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text()))
    known: Command = group.commands[name]
    return {flag for option in known.params for flag in (*option.opts, *option.secondary_opts)}


def test_nothing_is_left_to_fill_in():
    for name in ("README.md", "tiny/README.md", "benchmarks/README.md"):
        assert "@@" not in (ROOT / name).read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_exists(command):
    assert set(re.findall(r"--[a-z][\w-]*", command)) <= options_of(command)


def test_every_flag_and_command_in_running_text_exists():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    commands = [*cli.cli.commands.values(), *train.main.commands.values()]
    options = [option for command in commands for option in command.params]
    known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
    known |= {"--check", "--nnodes", "--nproc-per-node"}  # of ruff and torchrun
    for code in re.findall(r"`([^`\n]+)`", text):
        own = options_of(code.removeprefix("python ")) if code.startswith("python benchmarks/") else known
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
            assert flag in own, flag
        for name in re.findall(r"python cli\.py (\w+)", code):
            assert name in cli.cli.commands, name
        for name in re.findall(r"python train\.py (\w+)", code):
            assert name in train.main.commands, name


def examples() -> list[str]:
    """Console blocks that can run here."""
    return [block for language, block in BLOCKS if language == "console" and REAL not in block]


@pytest.mark.parametrize("block", examples(), ids=lambda block: block.partition("\n")[0])
def test_what_is_shown_is_what_comes_out(block, tmp_path):
    command, *shown = block.strip().split("\n")
    command = command.removeprefix("$ python ").replace("build/", f"{tmp_path}/")
    arguments = shlex.split(command.replace("--steps 50 ", "--steps 2 "))  # in seconds
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    plain = lambda text: re.sub(r"[\d.]+ tokens/s", "N tokens/s", text.replace(f"{tmp_path}/", "build/"))
    out, err = plain(run.stdout).splitlines(), plain(run.stderr).splitlines()
    assert set(out) <= set(plain(block).splitlines())  # all of the answer is shown,
    assert set(map(plain, shown)) <= {*out, *err}  # and nothing else


def test_every_function_in_the_table_of_concepts_exists():
    table = re.search(r"\| concept .*?\n\n", README, re.DOTALL)[0]
    named = re.findall(r"`((?:training\.)?[a-z]+)\.([\w.]+)`", table)
    assert len(named) >= 15
    for module, path in named:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)


def test_the_program_that_embeds_two_files_is_short_and_runs(tmp_path):
    [program] = [block for language, block in BLOCKS if language == "python"]
    assert len(program.splitlines()) <= 14
    for name in ("fastdllm.py", "checkpoint.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.count("####") == 2 and run.stdout.endswith("\n")


@pytest.mark.parametrize("name", ["README.md", "tiny/README.md", "benchmarks/README.md"])
def test_every_local_link_leads_somewhere(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / name).parent / target).exists(), target
