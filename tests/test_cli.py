"""Command line: text and statistics where they belong, defaults, files, and one sentence for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from conftest import ROOT

import cli
from benchmarks.judging import final_answer
from fast import prepack
from fastdllm import Decoding, InputError, generate, load
from train import read_documents

QUESTION = "Mia has 12 apples. She buys 7 more. How many apples does Mia have now?"


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.cli, ["generate", "--device", "cpu", *map(str, arguments)], input=stdin)


def mistake(*arguments, stdin=None):
    """The one sentence that a mistake gives."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2 and result.stdout == "", result.output
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ") and "Traceback" not in result.stderr
    return lines[-1]


def test_text_goes_to_stdout_and_statistics_to_stderr(shipped):
    model, tokenizer = shipped
    result = run(QUESTION)
    [expected] = generate(model, [tokenizer.chat([{"role": "user", "content": QUESTION}])], Decoding())
    assert result.exit_code == 0
    assert result.stdout == tokenizer.decode(expected.tokens) + "\n"
    summary = rf"{len(expected.tokens)} tokens in {expected.forward_passes} forward passes: [\d.]+ tokens per forward, "
    assert re.fullmatch(summary + r"[\d.]+ tokens/s, stop\n", result.stderr)


def test_without_a_prompt_the_sample_problem_is_shown_and_solved():
    result = run(stdin="")
    assert cli.SAMPLE in result.stderr
    assert final_answer(result.stdout) == "14"


def test_the_prompt_may_be_piped_in():
    assert run(stdin=QUESTION + "\n").stdout == run(QUESTION).stdout


def test_json_has_the_documented_fields_and_counts(shipped):
    result = run(QUESTION, "--json", "--threshold", 0.8, "--cache", "dual")
    found = json.loads(result.stdout)
    names = "text token_ids prompt_tokens new_tokens passes forward_passes tokens_per_forward seconds tokens_per_second "
    names += "finish_reason block_size sub_block_size threshold cache max_new_tokens temperature top_p seed stop_token_ids"
    assert set(names.split()) <= set(found)
    assert (found["threshold"], found["cache"], found["block_size"], found["sub_block_size"]) == (
        0.8,
        "dual",
        32,
        8,
    )
    assert found["new_tokens"] == len(found["token_ids"])
    assert found["forward_passes"] == sum(n for kind, n in found["passes"].items() if kind != "prefill")
    assert found["tokens_per_forward"] == pytest.approx(found["new_tokens"] / found["forward_passes"])
    assert found["token_ids"][-1] in found["stop_token_ids"] and found["finish_reason"] == "stop"
    tokenizer = shipped[1]
    assert found["prompt_tokens"] == len(tokenizer.chat([{"role": "user", "content": QUESTION}]))


@pytest.mark.parametrize("flags", [
    ["--threshold", "0.9", "--block-size", "32"], ["--cache", "dual"], ["--cache", "none"], ["--block-size", "1"],
    ["--block-size", "4"], ["--temperature", "0.5", "--top-p", "0.9", "--seed", "1"], ["--dtype", "bfloat16"],
    ["--max-new-tokens", "5"], ["--system", "Add."], ["--raw"], ["--sub-block-size", "32"],
])  # fmt: skip
def test_every_flag_works(flags):
    result = run(QUESTION, *flags)
    assert result.exit_code == 0 and result.stdout.strip()
    other_block = "--block-size" in flags and flags[-1] != "32"
    assert ("Note: " in result.stderr) == other_block


def test_weights_are_prepacked_where_that_works_unless_asked_not_to(monkeypatch):
    models, decode = [], cli.decode
    monkeypatch.setattr(cli, "decode", lambda model, *rest: models.append(model) or decode(model, *rest))
    assert run(QUESTION).stdout == run(QUESTION, "--no-prepack").stdout
    works = prepack(load(cli.SHIPPED, "cpu")[0]).prepacked  # not without oneDNN
    assert [model.prepacked for model in models] == [works, False]


def test_raw_continues_the_text_and_prompt_ids_the_ids(shipped):
    model, tokenizer = shipped
    ids = tokenizer.encode("Mia has 12")
    raw = json.loads(run("Mia has 12", "--raw", "--json", "--max-new-tokens", 9).stdout)
    by_ids = json.loads(run("--prompt-ids", ",".join(map(str, ids)), "--json", "--max-new-tokens", 9).stdout)
    assert raw["token_ids"] == by_ids["token_ids"] and raw["prompt_tokens"] == len(ids)


def test_a_checkpoint_without_tokenizer_prints_ids(folders):
    result = run("--model", folders["untied"], "--prompt-ids", "1,2,3", "--max-new-tokens", 4)
    assert len(result.stdout.split()) == 4


def test_defaults_are_the_dataclass_fields():
    options = {option.name: option.default for option in cli.generate.params}
    assert {name: options[name] for name in cli.KNOBS} == {
        name: getattr(Decoding, name) for name in cli.KNOBS
    }


def test_files_of_prompts_give_answers_in_order_with_their_fields(tmp_path):
    records = [{"id": i, "prompt": QUESTION.replace("12", str(i))} for i in range(3, 8)]
    records.append({"id": "m", "messages": [{"role": "user", "content": QUESTION}]})
    records.append({"id": "p", "prompt_ids": [5, 6, 7]})
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    source = ["--input", tmp_path / "in.jsonl", "--max-new-tokens", 60]
    assert run(*source, "--output", tmp_path / "out.jsonl", "--batch-size", 3).exit_code == 0
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [record["id"] for record in records]
    assert answers[5]["text"] == run(QUESTION, "--max-new-tokens", 60).stdout[:-1]
    alone = run(*source, "--batch-size", 1)
    assert alone.stdout == (tmp_path / "out.jsonl").read_text()


def test_mistakes_get_one_sentence(tmp_path, folders):
    assert "no such folder" in mistake("hi", "--model", tmp_path / "nowhere")
    assert "empty" in mistake("  ")
    assert "outside the vocabulary" in mistake("--prompt-ids", "1,99999")
    assert "give integers" in mistake("--prompt-ids", "1,x")
    assert "mask token" in mistake("a |<MASK>| b")
    assert "--sub-block-size 5 does not divide --block-size 32" in mistake("hi", "--sub-block-size", 5)
    assert "'--threshold': 1.5 is not in the range" in mistake("hi", "--threshold", 1.5)
    assert "the model has 1024" in mistake("hi", "--max-new-tokens", 5000)
    assert "no tokenizer" in mistake("hi", "--model", folders["untied"])
    assert "dtype 'int8' is not known" in mistake("hi", "--dtype", "int8")
    assert "exclude one another" in mistake("hi", "--prompt-ids", "1")
    assert "--output needs --input" in mistake("hi", "--output", "x")
    assert "--raw and --system are for text" in mistake("--prompt-ids", "1", "--raw")
    assert "--system has no place" in mistake("hi", "--raw", "--system", "x")
    assert "No valid Unicode" in mistake(stdin=b"caf\xe9")
    assert "No such file" in mistake("--input", tmp_path / "missing.jsonl")
    assert "temperature" in mistake("hi", "--temperature", -1)
    assert "leave --fuse-commit out" in mistake("hi", "--verify", "--fuse-commit")
    assert "leave accept prefix out" in mistake("hi", "--accept", "prefix", "--tokens-per-pass", 2)
    assert "is a folder" in mistake("--input", "-", "--output", tmp_path)


@pytest.mark.parametrize("line, message", [
    ("{", "not valid JSON"),
    ("3", "not a JSON object"),
    ('{"text": "x"}', "needs `prompt`"), ('{"prompt": ""}', "is empty"),
    ('{"messages": [{"role": "user"}]}', "needs `prompt`"), ('{"prompt_ids": [-1]}', "outside the vocabulary"),
    ('{"prompt_ids": "1"}', "list of integers"),
    ('{"prompt_ids": ["a"]}', "token ids"),
    ('{"prompt": "\\ud800 x"}', "not valid JSON"), ("[" * 100_000, "not valid JSON"),
])  # fmt: skip
def test_a_broken_line_is_named_and_nothing_is_written(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n' + line + "\n")
    said = mistake("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert "in.jsonl, line 2: " in said and message in said
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_to_a_system_message_keep_the_prompt_that_was_asked(tmp_path, shipped):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    common = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", 8]
    for options, kept in ([], False), (["--system", "Be brief."], True), (["--raw"], True):
        assert run(*common, *options).exit_code == 0
        line = json.loads((tmp_path / "out.jsonl").read_text())
        assert ("prompt_ids" in line) == kept
        [(tokens, trainable)] = read_documents(tmp_path / "out.jsonl", shipped[1])
        assert (
            len(tokens) - sum(trainable) == line["prompt_tokens"]
            and tokens[line["prompt_tokens"] :] == line["token_ids"]
        )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    assert "No space left" in mistake("--input", tmp_path / "in.jsonl", "--output", "/dev/full")


def test_options_that_would_be_ignored_are_refused(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "system", "content": "a"}]}\n')
    assert "show one answer" in mistake("--input", tmp_path / "in.jsonl", "--json")
    assert "give one of them" in mistake("hi", "--json", "--watch")
    assert "--delay is nan" in mistake("hi", "--watch", "--delay", "nan")
    assert "system message already" in mistake("--input", tmp_path / "in.jsonl", "--system", "b")
    assert "not for messages" in mistake("--input", tmp_path / "in.jsonl", "--raw")
    assert "Without --verify nothing is drafted, so leave --draft-width out" in mistake(
        "hi", "--draft-width", "3"
    )
    assert "so leave --threshold out" in mistake("hi", "--verify", "--threshold", "0.5")
    assert "so leave --accept out" in mistake("hi", "--verify", "--accept", "prefix")


def test_a_closed_standard_output_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    monkeypatch.setattr(sys, "stdout", None)
    generate = lambda *given: cli.cli.main(["generate", "--device", "cpu", *given], standalone_mode=False)
    with pytest.raises(cli.OneSentence, match="Standard output is closed"):
        generate("--input", str(tmp_path / "in.jsonl"))
    generate("hi", "--watch", "--max-new-tokens", "2")
    assert "Note: --watch draws in a terminal only" in capsys.readouterr().err


def test_commands_that_do_not_share_work_refuse_several_processes(monkeypatch):
    monkeypatch.setattr(cli, "PROCESSES", 2)
    for name in ("sweep", "bench", "chat", "info"):
        found = CliRunner().invoke(cli.cli, [name])
        assert found.exit_code == 2 and f"cli.py {name} runs in one process" in found.stderr


def test_prompts_from_a_closed_standard_input_are_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="Standard input is closed"):
        cli.read_jsonl("-")


def test_names_of_fields_become_flags_but_not_in_paths_or_plain_words():
    said = cli.with_flags("cache is 'x'; a/batch_size, the cache and sub_block_size 5")
    assert said == "--cache is 'x'; a/batch_size, the cache and --sub-block-size 5"


def test_latin_1_bytes_in_a_file_and_a_closed_standard_input(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    assert "line 1: not valid JSON" in mistake("--input", tmp_path / "in.jsonl")
    command = f"{sys.executable} {ROOT / 'cli.py'} generate --device cpu <&-"
    closed = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert closed.returncode == 0 and final_answer(closed.stdout) == "14"


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_ends_with_what_was_generated(folders):
    command = [
        sys.executable,
        "-u",
        str(ROOT / "cli.py"),
        "generate",
        "--model",
        str(folders["untied"]),
        "--device",
        "cpu",
    ]
    command += ["--prompt-ids", "1,2,3", "--max-new-tokens", "1000", "--cache", "none", "--threshold", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    first = process.stdout.read(1)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    errors = errors.decode()
    assert process.returncode == 130 and "Traceback" not in errors
    tokens = (first + rest).split()
    assert re.search(rf"^{len(tokens)} tokens in .* interrupted$", errors, re.MULTILINE)
    model, _ = load(folders["untied"], "cpu")
    [whole] = generate(model, [[1, 2, 3]], Decoding(threshold=1.0, max_new_tokens=1000))
    assert [int(token) for token in tokens] == whole.tokens[: len(tokens)]


def test_the_prompts_file_is_never_written_over(tmp_path):
    source, link = tmp_path / "in.jsonl", tmp_path / "link.jsonl"
    source.write_text('{"prompt": "hi"}\n')
    link.symlink_to(source)
    for target in (source, link):
        assert "is the file of --input" in mistake("--input", source, "--output", target)
    assert source.read_text() == '{"prompt": "hi"}\n'


def test_trace_writes_regular_files_only_and_says_so_first(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(cli, "open_model", lambda **given: pytest.fail("something ran"))
    assert "no regular file" in mistake("hi", "--trace", tmp_path / "fifo")
    assert (tmp_path / "fifo").is_fifo()


def test_closed_standard_streams_give_no_traceback():
    start = lambda command: subprocess.Popen(
        f"{sys.executable} {ROOT / 'cli.py'} {command}", shell=True, stderr=subprocess.PIPE, text=True
    )
    few = "--device cpu --max-new-tokens 3"
    runs = [start(f"generate hi {few} <&-"), start(f"generate hi {few} >&-"), start(f"chat {few} <&- >&-")]
    for run in runs:
        errors = run.communicate()[1]
        assert "Traceback" not in errors and run.returncode in (0, 1, 2)


@pytest.mark.parametrize("command", [
    ["eval", "--count"], ["sweep", "--count"], ["bench", "--threads"],     ["generate", "hi", "--block-size"], ["generate", "hi", "--max-new-tokens"], ["eval", "--max-new-tokens"],
    ["bench", "--batch-sizes"], ["sweep", "--block-sizes"],
])  # fmt: skip
def test_numbers_of_twenty_digits_get_one_sentence(command):
    result = CliRunner().invoke(cli.cli, [*command, "9" * 20])
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(errors) == 1 and command[-1] in errors[0]


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_while_it_loads_gives_no_traceback():
    code = "import runpy, sys; sys.argv = ['cli.py', 'chat']; print(flush=True); "
    code += f"runpy.run_path({str(ROOT / 'cli.py')!r}, run_name='__main__')"
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) as process:
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors and process.returncode in (0, 130)  # 0: it had loaded already


@pytest.mark.parametrize("name", [[], *([name] for name in cli.cli.commands)])
def test_every_command_has_a_short_flag_for_help(name):
    short, long = (CliRunner().invoke(cli.cli, [*name, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == 0 and short.stdout == long.stdout and "Usage: " in short.stdout


def test_version():
    result = CliRunner().invoke(cli.cli, ["--version"])
    assert result.exit_code == 0 and cli.VERSION in result.stdout
