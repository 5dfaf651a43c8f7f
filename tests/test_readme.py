"""The README: what it names exists, and what it shows runs."""

import re
import subprocess
import sys

import pytest
from click import Command
from conftest import ROOT

import cli
import fastdllm
import train

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ")
    for language, block in BLOCKS
    if language in ("sh", "console")
    for line in block.splitlines()
    if re.match(r"(\$ )?python \S+\.py", line)
]


def options_of(command: str) -> set[str]:
    """Flags that a script's command knows."""
    script, name = re.match(r"python (\S+) *(\w*)", command).groups()
    if script == "cli.py":
        known: Command = cli.cli.commands[name]
    elif script == "train.py":
        known = train.main.commands[name]
    else:
        text = (ROOT / script).read_text()
        return set(re.findall(r'"(--[\w-]+)"', text))
    return {flag for option in known.params for flag in (*option.opts, *option.secondary_opts)}


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README + (ROOT / "tiny" / "README.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_exists(command):
    assert set(re.findall(r"--[\w-]+", command)) <= options_of(command)


def test_every_flag_and_command_in_running_text_exists():
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    known = {
        flag
        for command in [*cli.cli.commands.values(), *train.main.commands.values()]
        for option in command.params
        for flag in (*option.opts, *option.secondary_opts)
    }
    known |= {"--help"}
    for code in re.findall(r"`([^`\n]+)`", text):
        own = options_of(code) if code.startswith("python benchmarks/") else known
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
            assert flag in own, flag
        for name in re.findall(r"python cli\.py (\w+)", code):
            assert name in cli.cli.commands, name


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "console"])
def test_what_the_quick_start_shows_is_what_comes_out(block):
    command, *shown = block.strip().split("\n")
    run = subprocess.run(
        [sys.executable, *command.removeprefix("$ python ").split()],
        cwd=ROOT, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    plain = lambda text: re.sub(r"[\d.]+ tokens/s", "N tokens/s", text).splitlines()
    assert set(plain(run.stdout)) <= set(plain(block))  # all of the answer is shown,
    assert set(plain("\n".join(shown))) <= set(plain(run.stdout + run.stderr))  # and nothing else


def test_every_function_in_the_table_of_concepts_exists():
    table = re.search(r"\| concept .*?\n\n", README, re.DOTALL)[0]
    named = re.findall(r"`(fastdllm|train)\.([\w.]+)`", table)
    assert len(named) >= 12
    for module, path in named:
        found = {"fastdllm": fastdllm, "train": train}[module]
        for part in path.split("."):
            found = getattr(found, part)


def test_the_program_that_embeds_the_file_is_short_and_runs(tmp_path):
    [program] = [block for language, block in BLOCKS if language == "python"]
    assert len(program.splitlines()) <= 12
    (tmp_path / "fastdllm.py").write_bytes((ROOT / "fastdllm.py").read_bytes())
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "####" in run.stdout


def test_every_local_link_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
