"""Command line: text and statistics where they belong, defaults, files, and one sentence for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from command_line import QUESTION, mistake, read_lines, run, run_json, user, write_lines
from conftest import ROOT

import cli
import fastdllm
from checkpoint import load
from commands import console, prompts
from commands.evaluate import final_answer
from fast import PrepackedLinear, prepack
from fastdllm import InputError, decode


def test_without_a_prompt_what_is_piped_in_is_answered_or_else_the_sample_problem():
    assert run("generate", stdin=QUESTION + "\n").stdout == run("generate", QUESTION).stdout
    result = run("generate", stdin="")
    assert console.SAMPLE in result.stderr and final_answer(result.stdout) == "14"


def test_the_demo_model_says_what_it_does_not_know():
    result = run("generate", "Why is the sky blue?", "--max-new-tokens", 4)
    assert "only word problems with numbers" in result.stderr and result.exit_code == 0


def test_json_has_the_documented_fields_and_counts(shipped):
    found = run_json("generate", QUESTION, "--threshold", 0.8, "--cache", "dual")
    names = "text token_ids prompt_tokens new_tokens passes forward_passes tokens_per_forward seconds tokens_per_second "
    names += "finish_reason block_size sub_block_size threshold cache max_new_tokens temperature top_p top_k seed stop_token_ids"
    assert set(names.split()) <= set(found)
    options = {"threshold": 0.8, "cache": "dual", "block_size": 32, "sub_block_size": 8, "verify": False}
    assert options.items() <= found.items()
    assert found["new_tokens"] == len(found["token_ids"])
    assert found["forward_passes"] == sum(n for kind, n in found["passes"].items() if kind != "prefill")
    assert found["tokens_per_forward"] == pytest.approx(found["new_tokens"] / found["forward_passes"])
    assert found["token_ids"][-1] in found["stop_token_ids"] and found["finish_reason"] == "stop"
    assert found["prompt_tokens"] == len(shipped[1].chat([user(QUESTION)]))
    verified = run_json("generate", QUESTION, "--verify", "--draft-width", 5)
    assert verified["verify"] and verified["draft_width"] == 5 and verified["draft_ahead"] is False
    assert set(verified["passes"]) == {"prefill", "draft", "verify"}


@pytest.mark.parametrize("flags", [
    "--threshold 0.9 --block-size 32", "--cache dual", "--cache none", "--block-size 1", "--block-size 4", "--max-new-tokens 5",
    "--temperature 0.5 --top-p 0.9 --top-k 5 --seed 1", "--dtype bfloat16", "--system Add.", "--sub-block-size 32",
    "--accept prefix", "--verify", "--verify --draft-width 4 --draft-ahead", "--threads 1", "--no-prepack",
])  # fmt: skip
def test_every_flag_works(flags):
    result = run("generate", QUESTION, *flags.split())
    assert result.exit_code == 0 and result.stdout.strip()
    assert ("Note: " in result.stderr) == (flags == "--block-size 4")


def test_weights_are_prepacked_where_that_works_unless_asked_not_to():
    packed = lambda model: any(isinstance(m, PrepackedLinear) for m in model.modules())
    works = packed(prepack(load(console.SHIPPED, "cpu")[0]))  # not without oneDNN
    opened = lambda packed: console.open_model(str(console.SHIPPED), device="cpu", packed=packed)[0]
    assert [packed(opened(True)), packed(opened(False))] == [works, False]


def test_raw_continues_the_text_and_prompt_ids_the_ids(shipped):
    ids, few = shipped[1].encode("Mia has 12"), ["--max-new-tokens", 9]
    raw = run_json("generate", "Mia has 12", "--raw", *few)
    by_ids = run_json("generate", "--prompt-ids", ", ".join(map(str, ids)), *few)
    assert raw["token_ids"] == by_ids["token_ids"] and raw["prompt_tokens"] == len(ids)
    piped = run_json("generate", "--raw", *few, stdin="  Mia has 12\n")
    assert piped["prompt_tokens"] == len(shipped[1].encode("  Mia has 12\n"))


def test_an_empty_system_message_is_a_given_one(shipped):
    empty, none = [{"role": "system", "content": ""}, user(QUESTION)], [user(QUESTION)]
    given = run_json("generate", QUESTION, "--system", "")["prompt_tokens"]
    assert given == len(shipped[1].chat(empty)) > len(shipped[1].chat(none))


def defaults(name):
    return cli.cli.commands[name].make_context(name, [], parent=cli.cli.make_context("cli", [name])).params


# --- --compare ---


def test_compare_sets_ar_beside_the_chosen_decoder():
    result, alone = (
        run("generate", QUESTION, "--compare", "--verify"),
        run("generate", QUESTION, "--block-size", 1),
    )
    assert result.stdout == alone.stdout
    own, ar, verdict = result.stderr.splitlines()
    assert ar.startswith("AR: ") and "tokens/s" in own and "tokens/s" in ar
    assert re.fullmatch(r"[\d.]+ times AR's speed in float32, and the texts are identical", verdict)
    found = run_json("generate", QUESTION, "--compare", "--max-new-tokens", 30)
    assert found["ar"]["text"] == alone.stdout[: len(found["ar"]["text"])] and found["dtype"] == "float32"
    assert found["identical"] == (found["token_ids"] == found["ar"]["token_ids"])
    assert found["speed_up"] == pytest.approx(found["tokens_per_second"] / found["ar"]["tokens_per_second"])


def test_compare_names_a_difference(folders):
    ids = ["generate", "--model", folders["untied"], "--prompt-ids", "1,2,3", "--max-new-tokens", 40]
    result = run(*ids, "--compare", "--threshold", 0)  # without a tokenizer the answer is printed as ids
    assert "the texts are not identical" in result.stderr and len(result.stdout.split()) == 40


# --- Files of prompts ---


def test_files_of_prompts_give_answers_in_order_with_their_fields(tmp_path):
    records = [{"id": i, "prompt": QUESTION.replace("12", str(i))} for i in range(3, 8)]
    records += [{"id": "m", "messages": [user(QUESTION)]}, {"id": "p", "prompt_ids": [5, 6, 7]}]
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n")
    few = ["--max-new-tokens", 30]
    source = ["generate", "--input", tmp_path / "in.jsonl", *few]
    assert run(*source, "--output", tmp_path / "out.jsonl", "--batch-size", 3).exit_code == 0
    answers = read_lines(tmp_path / "out.jsonl")
    assert [answer["id"] for answer in answers] == [record["id"] for record in records]
    assert answers[5]["text"] == run("generate", QUESTION, *few).stdout[:-1]
    assert len({answer.pop("run") for answer in answers}) == 1
    alone = run(*source, "--batch-size", 1)
    assert list(map(json.loads, alone.stdout.splitlines())) == answers


def test_what_is_piped_out_is_utf8_in_every_locale(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"id": "漢", "prompt": "hi"}])
    command = ["generate", "--device", "cpu", "--input", str(source), "--max-new-tokens", "2"]
    assert '"id": "漢"' in CliRunner(charset="latin-1").invoke(cli.cli, command).stdout_bytes.decode()


def test_answers_can_be_asked_again(tmp_path):
    """Their field `run` gives way to that of the new file."""
    source, target = write_lines(tmp_path / "in", [{"prompt": "hi", "run": 3}]), tmp_path / "out.jsonl"
    for _ in range(2):
        result = run("generate", "--input", source, "--max-new-tokens", 2, "--output", target)
        assert result.exit_code == 0
    assert "is complete" in result.stderr and read_lines(target)[0]["run"] != 3


def test_answers_to_a_system_message_keep_the_prompt_that_was_asked(tmp_path, shipped):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "hi"}])
    for options, kept in ([], False), (["--system", "Be brief."], True), (["--raw"], True):
        line = json.loads(run("generate", "--input", source, "--max-new-tokens", 8, *options).stdout)
        assert ("prompt_ids" in line) == kept
        ids = line["prompt_ids"] if kept else shipped[1].chat([user("hi")])
        assert len(ids) == line["prompt_tokens"]


def test_extra_keys_of_messages_and_tools_reach_the_template():
    class Tokenizer:
        chat = staticmethod(lambda messages, tools: [messages, tools])

    messages = [{"role": "user", "content": None, "tool_call_id": "x"}]
    for tools in [{"name": "f"}], '[{"name": "f"}]':
        request = {"messages": messages, "tools": tools, "prompt": None, "prompt_ids": None}
        assert prompts.encode_prompt(request, Tokenizer()) == [messages, [{"name": "f"}]]
    request = {"prompt": "hi", "system": "Be brief."}
    assert prompts.encode_prompt(request, Tokenizer())[0][0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(InputError, match="leave --system out"):
        prompts.encode_prompt(request, Tokenizer(), system="Be long.")


@pytest.mark.parametrize("line, message", [
    (b"{", "not valid JSON"), (b"3", "not a JSON object"), (b'{"text": "x"}', "needs `prompt`"), (b'{"prompt": ""}', "is empty"),
    (b'{"prompt": 5}', "must be text"),
    (b'{"messages": [{"role": "user"}]}', "each with `role` and `content`"), (b'{"messages": [3]}', "needs `prompt`"),
    (b'{"prompt": "a", "messages": []}', "exclude one another"), (b'{"prompt_ids": [-1]}', "outside the vocabulary"),
    (b'{"prompt_ids": "1"}', "list of integers"), (b'{"prompt_ids": ["a"]}', "token ids"),
    (b'{"prompt": "\\ud800 x"}', "not valid JSON"), (b"[" * 100_000, "not valid JSON"), (b'{"prompt": "caf\xe9"}', "not valid JSON"),
])  # fmt: skip
def test_a_broken_line_is_named_and_nothing_is_written(tmp_path, line, message):
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "hi"}\n' + line + b"\n")
    said = mistake("generate", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert "in.jsonl, line 2: " in said and message in said
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_a_json_array_is_no_jsonl(tmp_path):
    (tmp_path / "in.json").write_text('[\n{"prompt": "hi"}\n]')
    assert "in.json: holds a JSON array; JSONL has one object a line" in mistake(
        "generate", "--input", tmp_path / "in.json"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize(
    "command",
    ["generate hi --trace", "generate --input - --output", "eval --count 1 --output", "bench --output"],
)
def test_files_are_refused_by_name_before_anything_runs(tmp_path, monkeypatch, command):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(console, "open_model", lambda **given: pytest.fail("something ran"))
    for name, message in {"fifo": "is no file", "no/x": "does not exist", "": "is no file"}.items():
        said = mistake(*command.split(), tmp_path / name)
        assert said.startswith(f"{command.split()[-1]} {tmp_path / name}: ") and message in said


@pytest.mark.parametrize(
    "command",
    [
        "generate hi --max-new-tokens 9 --trace",
        "bench --shape tiny --rounds 1 --decoders ar --batch-sizes 1 --prompts 1 --prompt-tokens 9 --new-tokens 2 --output",
    ],
)
def test_only_a_file_of_its_own_is_replaced_and_that_is_said(tmp_path, command):
    out = tmp_path / "out"
    out.write_text("dear diary")
    assert "holds something else" in mistake(*command.split(), out) and out.read_text() == "dear diary"
    out.unlink()
    for _ in range(2):
        result = run(*command.split(), out)
        assert result.exit_code == 0 and f"wrote {out}" in result.stderr and out.stat().st_size > 100


# --- Mistakes ---


@pytest.mark.parametrize("given, message", [
    ("hi --model /nowhere", "no such folder"), ("hi --model README.md", "'README.md' is a file"),
    ("hi --model tiny/chekpoint", "did you mean tiny/checkpoint?"), ("--input tiny/sampl.jsonl", "did you mean tiny/sample.jsonl?"),
    ("--input /nowhere", "'/nowhere' does not exist"), ("--input tiny", "'tiny' is a directory"),
    ("hi --adapter tiny/checkpoint --verify", "give that with --model"), ("Why is the sky blue?", 'generate "Why is the sky blue?"'),
    ("--prompt-ids 1,99999", "outside the vocabulary"), ("--prompt-ids 1,x", "'x' is not a valid integer"), ("|<MASK>|", "mask token"),
    ("hi --sub-block-size 5", "--sub-block-size 5 does not divide --block-size 32"), ("hi --dtype int8", "'int8' is not one of 'auto'"),
    ("hi --sub-block-size 8 --block-size 4", "--sub-block-size 8 does not divide --block-size 4"), ("hi --device gpu", "only cpu"),
    ("hi --threshold 1.5", "'--threshold': 1.5 is not in the range"), ("hi --threshold nan", "threshold is nan"),
    ("hi --temperature -1", "'--temperature'"), ("hi --max-new-tokens 5000", "so --max-new-tokens 1014 is the most"),
    (f"{'|<MASK>|' * 1100} --raw", "the model 1024 positions; shorten the prompt"), ("hi --batch-size 99999999999999999999", "'--batch-size'"),
    ("hi --prompt-ids 1", "exclude one another"), ("hi --output x", "--output needs --input"), ("--prompt-ids 1 --raw", "are for text"),
    ("hi --raw --system x", "without messages and --system"), ("hi --json --watch", "give one of them"),
    ("--input tiny/sample.jsonl --json", "show one answer"), ("--input tiny/sample.jsonl --compare", "show one answer"),
    ("hi --draft-width 16", "--draft-width is for --verify; add it"), ("hi --draft-ahead", "--draft-ahead is for --verify; add it"),
    ("hi --verify --threshold 0.9", "leave --threshold out"), ("hi --verify --accept threshold", "leave --accept out"),
    ("hi --verify --block-size 1", "leave --block-size out"), ("hi --verify --cache block", "leave --cache out"),
    ("hi --compare --block-size 1", "this is AR; add --verify"), ("hi --compare --temperature 1", "needs a --seed"),
    ("--treshold 0.9", "No such option '--treshold'."),
])  # fmt: skip
def test_a_mistake_gets_one_sentence(monkeypatch, given, message):
    monkeypatch.chdir(ROOT)
    said = mistake("generate", *given.split())
    assert message in said and said.count("\n") == 0


def test_other_mistakes_get_one_sentence_too(tmp_path, folders):
    chat = write_lines(tmp_path / "x", [{"messages": [{"role": "system", "content": "a"}]}])
    assert "is empty" in mistake("generate", "  ") and "No valid Unicode" in mistake(
        "generate", stdin=b"caf\xe9"
    )
    assert "no tokenizer" in mistake("generate", "hi", "--model", folders["untied"])
    assert "system message already" in mistake("generate", "--input", chat, "--system", "b")
    assert "without messages" in mistake("generate", "--input", chat, "--raw")
    assert "is a directory" in mistake("eval", tmp_path)
    for command in (
        "eval --count",
        "sweep --count",
        "bench --threads",
        "bench --batch-sizes",
        "sweep --sub-block-sizes",
    ):
        assert command.split()[-1] in mistake(*command.split(), "9" * 20)  # before it makes them all


@pytest.mark.parametrize("flags, note", [
    ("--seed 1", "--seed changes nothing at temperature 0."), ("--top-p 0.9", "--top-p changes nothing at temperature 0."),
    ("--block-size 33", "its sub-blocks have 1 token, which is slow; --sub-block-size 33"), ("--block-size 4", "trained with block size 32"),
    ("--watch", "draws in a terminal only"), ("--dtype bfloat16", "--dtype float32 is faster here"),
])  # fmt: skip
def test_what_is_slow_or_without_effect_is_noted(monkeypatch, flags, note):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # as without AVX-512
    assert note in run("generate", "hi", "--max-new-tokens", 2, *flags.split()).stderr


@pytest.mark.parametrize("arguments, message", [
    ("--threshold 0.9 generate", "--threshold stands before the command; options follow it: cli COMMAND --threshold"),
    ("genrate", "No such command 'genrate'."), ("chat --batch-size 3", "No such option '--batch-size'."), ("info a b", "unexpected extra argument"),
])  # fmt: skip
def test_clicks_own_mistakes_take_one_line(arguments, message):
    result = CliRunner().invoke(cli.cli, arguments.split())
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1 and not result.stdout


def test_commands_that_do_not_share_work_refuse_several_processes(monkeypatch):
    monkeypatch.setattr(console, "PROCESSES", 2)
    for name in ("sweep", "bench", "chat", "info"):
        assert f"cli.py {name} runs in one process" in mistake(name)


def test_an_error_of_ours_is_no_sentence_of_the_user():
    @console.reports_mistakes
    def broken():
        return {}["question"]

    with pytest.raises(KeyError):
        broken()


def test_only_a_decodings_fields_are_named_as_flags():
    sentence = lambda text: console.sentence_of(InputError(text))
    assert sentence("block_size 4 and draft_width 2.") == "--block-size 4 and --draft-width 2."
    for text in ("config.json: block_size is 0.", "/a/block_size: no such folder.", "block_sizes"):
        assert sentence(text) == text


# --- Closed streams and Ctrl-C ---


def start(*arguments):
    """A command beside the streams of this process."""
    return cli.cli.main([*map(str, arguments), "--device", "cpu"], standalone_mode=False)


def test_a_closed_standard_input_is_one_sentence_where_it_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    start("generate", "--max-new-tokens", "2")
    assert console.SAMPLE in capsys.readouterr().err
    for command in (["chat"], ["generate", "--input", "-"]):
        with pytest.raises(console.OneSentence, match="Standard input"):
            start(*command)


def interrupting(after):
    """`decode` with a Ctrl-C in the midst."""

    def steps(*given, **more):
        for number, step in enumerate(decode(*given, **more)):
            if number == after:
                signal.raise_signal(signal.SIGINT)
            yield step

    return steps


@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_ends_with_what_was_generated(monkeypatch, after):
    whole = run("generate", QUESTION).stdout
    monkeypatch.setattr(fastdllm, "decode", interrupting(after))
    result = run("generate", QUESTION)
    assert result.exit_code == 130 and result.stderr.endswith(", interrupted\n")
    assert len(result.stdout) < len(whole) and whole.startswith(result.stdout[:-1])
    assert len(result.stdout) > 1 or not after


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_ctrl_c_keeps_the_answers_that_are_there(tmp_path, monkeypatch, command):
    records = [{"prompt": QUESTION, "question": QUESTION, "answer": 19}] * 3
    source = write_lines(tmp_path / "in.jsonl", records)
    monkeypatch.setattr(prompts, "decode", interrupting(10))
    result = run(command, *["--input"] * (command == "generate"), source, "--batch-size", 1)
    assert result.exit_code == 130
    assert re.search("Interrupted: 1 of 3 answers are there; with --output FILE", result.stderr)
    if command == "eval":
        assert result.stdout.startswith("100.0% (standard error 0.0) of 1 problem,")
    else:
        assert result.stdout.count("\n") == 1


# --- Help ---


@pytest.mark.parametrize("name", [[], *([name] for name in cli.cli.commands)])
def test_every_help_page_is_whole_has_examples_and_shows_defaults(name):
    short, long = (CliRunner().invoke(cli.cli, [*name, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == 0 and short.stdout == long.stdout and "Usage: " in short.stdout
    assert "python cli.py " + " ".join(name) in short.stdout
    if name:
        shown, given = " ".join(short.stdout.split()), defaults(name[0])
        for option in cli.cli.commands[name[0]].params:
            if given.get(option.name) not in (None, False, "") and option.opts[0].startswith("--"):
                assert re.search(rf"{option.opts[0]}\b[^-]?.*?default: ", shown), option.name
    else:  # summaries are not cut
        lines = short.stdout.partition("Commands:\n")[2].splitlines()
        assert len(lines) == 6 and all(line.endswith(".") and "..." not in line for line in lines)


def test_help_starts_without_torch_and_no_command_imports_what_it_does_not_need():
    code = "import sys, cli; loaded = lambda *names: {*names} & sys.modules.keys(); "
    code += "heavy = loaded('torch', 'tokenizers', 'tqdm', 'jinja2', 'huggingface_hub'); assert not heavy, heavy; "
    code += "cli.cli(['info'], standalone_mode=False); "
    code += "heavy = loaded('sympy', 'huggingface_hub', 'torch._dynamo', 'torch._inductor', 'commands.prompts'); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
