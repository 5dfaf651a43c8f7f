"""eval, sweep, info, chat, and the views of a decoding: --watch and --trace."""

import itertools
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from click.testing import CliRunner
from conftest import ROOT

import cli
from benchmarks import judging
from fastdllm import Decoding, InputError, Pass, Result, Revealed, decode, generate, load, save
from viewer import terminal, trace

QUESTION = "Mia has 12 apples. She buys 7 more. How many apples does Mia have now?"


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.cli, [str(a) for a in arguments], input=stdin)


# --- eval ---


@pytest.mark.parametrize("text, answer", [
    ("so \\boxed{42}", "42"), ("\\boxed{1} and then \\boxed{2}.", "2"), ("\\boxed{\\frac{1}{2}}", "0.5"),
    ("\\boxed{\\text{42}}", "42"), ("\\boxed{1,234.00}", "1234"), ("\\boxed{open", None), ("a\n#### 1,200", "1200"),
    ("#### 18 dollars\n", "18"), ("#### $18.50.", "18.5"), ("12 #### 7 \n\n", "7"), ("it costs $3 and 25%.", "25"),
    ("the answer is -3.", "-3"), ("from 3 to 5.0", "5"), ("none", None), ("", None), ("####", None), ("0.5", "0.5"),
    ("first 9 #### then \\boxed{8}", "8"), ("1,000,000 people", "1000000"), ("\\boxed{50\\%}", "50"),
    ("12345678901234567891", "12345678901234567891"), ("#### -0.0", "0"), ("#### 007.50", "7.5"),
    ("9" * 5000, "9" * 5000),
])  # fmt: skip
def test_the_final_answer_is_found(text, answer):
    assert judging.final_answer(text) == answer


def problems_file(tmp_path, n=6):
    lines = [
        {"question": QUESTION.replace("12", str(i)), "answer": f"... #### {i + 7}"} for i in range(10, 10 + n)
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "problems.jsonl"


def test_eval_reports_accuracy_and_rates(tmp_path):
    source, out = problems_file(tmp_path), tmp_path / "out.jsonl"
    found = json.loads(run("eval", source, "--output", out, "--json", "--threshold", 0.95).stdout)
    lines = [json.loads(line) for line in out.read_text().splitlines()][1:]
    assert found["problems"] == len(lines) == 6
    assert found["accuracy"] == sum(line["correct"] for line in lines) / 6
    assert found["standard_error"] == pytest.approx((found["accuracy"] * (1 - found["accuracy"]) / 6) ** 0.5)
    passes = sum(line["forward_passes"] for line in lines)
    assert found["tokens_per_forward"] == pytest.approx(sum(line["new_tokens"] for line in lines) / passes)
    assert found["threshold"] == 0.95 and found["tokens_per_second"] > 0 and found["stopped_by_length"] == 0
    assert found["answers_from"] == {"####": 6}
    assert "; answers from ####: 6" in run("eval", source).stdout


def test_eval_goes_on_where_it_stopped_and_repeats_byte_for_byte(tmp_path):
    source, out = problems_file(tmp_path), tmp_path / "out.jsonl"
    assert run("eval", source, "--output", out).exit_code == 0
    whole = out.read_bytes()
    for cut in (len(whole) // 2, len(whole) // 3, 10, 0):  # in the middle of a line
        out.write_bytes(whole[:cut])
        assert run("eval", source, "--output", out).exit_code == 0
        assert out.read_bytes() == whole
    assert run("eval", source, "--output", out).exit_code == 0 and out.read_bytes() == whole
    other = run("eval", source, "--output", out, "--threshold", 0.5)
    assert other.exit_code == 2 and "threshold 0.9, not 0.5" in other.stderr and out.read_bytes() == whole
    other = run("eval", "--count", 3, "--output", out)
    assert other.exit_code == 2 and "other problems" in other.stderr and out.read_bytes() == whole
    narrow = run("eval", source, "--output", out, "--dtype", "bfloat16")
    assert (
        narrow.exit_code == 2
        and "dtype torch.float32, not torch.bfloat16" in narrow.stderr
        and out.read_bytes() == whole
    )
    out.write_text("a note without a newline")
    assert (
        run("eval", source, "--output", out).exit_code == 2 and out.read_text() == "a note without a newline"
    )


def test_eval_does_not_take_up_the_answers_of_other_weights(tmp_path):
    source, out, folder = problems_file(tmp_path, 2), tmp_path / "out.jsonl", tmp_path / "model"
    shutil.copytree(ROOT / "tiny" / "checkpoint", folder)
    assert run("eval", source, "--model", folder, "--output", out).exit_code == 0
    model, tokenizer = load(folder, "cpu")
    save(model, tokenizer, folder)  # as a training that was run again does
    again = run("eval", source, "--model", folder, "--output", out)
    assert again.exit_code == 2 and "holds answers with weights" in again.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_eval_writes_regular_files_only_and_says_so_first(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(cli, "open_model", lambda **given: pytest.fail("something ran"))
    for target, message in (
        (tmp_path / "fifo", "no regular file"),
        (tmp_path / "no" / "x", "does not exist"),
    ):
        result = run("eval", "--count", 1, "--output", target)
        assert result.exit_code == 2 and message in result.stderr


def test_eval_refuses_more_problems_than_memory_holds(monkeypatch):
    monkeypatch.setattr(cli, "read_problems", lambda *given: pytest.fail("it makes them all"))
    result = run("eval", "--count", 10**9)
    assert result.exit_code == 2 and "--count" in result.stderr


def test_eval_refuses_problems_without_an_answer(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "?", "answer": "3"}\n{"question": "?"}\n')
    result = run("eval", tmp_path / "p.jsonl")
    assert result.exit_code == 2 and "line 2" in result.stderr


def test_eval_takes_the_held_out_set_by_default():
    assert json.loads(run("eval", "--count", 3, "--json").stdout)["problems"] == 3


def test_ctrl_c_without_a_file_prints_the_score_so_far(tmp_path, monkeypatch):
    in_order = cli.in_order
    monkeypatch.setattr(cli, "in_order", lambda *given: itertools.islice(in_order(*given), 2))
    result = run("eval", problems_file(tmp_path, 3))
    assert result.exit_code == 130 and "of 2" in result.stdout
    assert "2 of 3 answers count" in result.stderr and "written" not in result.stderr


def test_eval_names_what_differs_and_a_second_run_at_once_says_so(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    source, out = problems_file(tmp_path, 2), tmp_path / "out.jsonl"
    assert run("eval", source, "--output", out).exit_code == 0
    whole = out.read_bytes()
    other = run("eval", source, "--output", out, "--threshold", 0.5)
    assert other.exit_code == 2 and "threshold 0.9, not 0.5" in other.stderr
    with out.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = run("eval", source, "--output", out)
    assert second.exit_code == 2 and "another run is writing it" in second.stderr
    assert out.read_bytes() == whole


# --- sweep ---


def test_sweep_marks_what_nothing_else_beats_and_recommends():
    found = json.loads(
        run("sweep", "--count", 4, "--thresholds", "0.5,1", "--sub-block-sizes", "8,32", "--json").stdout
    )
    rows = found["rows"]
    assert [row["block_size"] for row in rows] == [1, 1, 32, 32, 32, 32] and rows[0]["speed_up"] == 1
    assert rows[1]["verify"] and rows[1]["accuracy"] == rows[0]["accuracy"] and rows[1]["drop"] == 0
    for row in rows:
        merit = row["accuracy"], row["tokens_per_second"]
        beaten = any(
            o["accuracy"] >= merit[0] and o["tokens_per_second"] >= merit[1] and o is not row for o in rows
        )
        assert row["best"] != beaten
    assert found["recommended"] in (rows[0], *(row for row in rows if row["drop_upper"] <= 0.01))
    assert [area["sub_block_size"] for area in found["aup"]] == [8, 32]
    table = run("sweep", "--count", 2, "--thresholds", "0.9", "--sub-block-sizes", "8").stdout.splitlines()
    assert len(table) >= 6 and any(line.startswith("For 95% sure within 1 points of AR, ") for line in table)


def test_sweep_refuses_sizes_that_fit_nothing():
    result = run("sweep", "--count", 1, "--sub-block-sizes", "5")
    assert result.exit_code == 2 and "No sub-block size divides" in result.stderr
    assert "Note: sub-block size 5 does not divide block size 32; left out." in result.stderr
    for flags in (
        ["--sub-block-sizes", "0"],
        ["--thresholds", "nan"],
        ["--max-drop", "nan"],
        ["--max-drop", "-1"],
    ):
        result = run("sweep", "--count", 1, *flags)
        assert result.exit_code == 2 and "Error: " in result.stderr and flags[0] in result.stderr


def test_a_recommendation_needs_enough_problems():
    """Ten right answers of ten do not show that at most 1 in 100 is lost; a thousand of a thousand do."""
    few, many = (judging.paired_drop([True] * n, [True] * n, 0.01) for n in (10, 1000))
    assert few["drop"] == many["drop"] == 0
    assert few["drop_upper"] > 0.01 and 300 < few["problems_needed"] < 600
    assert many["drop_upper"] < 0.01 and many["problems_needed"] is None
    worse = judging.paired_drop([True] * 1000, [True] * 955 + [False] * 45, 0.01)
    assert worse["drop"] == 0.045 and worse["drop_upper"] > 0.045 and worse["problems_needed"] is None


def test_the_binomial_bound_is_where_so_few_successes_get_rare():
    assert judging.binomial_bound(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100), abs=1e-6)
    assert judging.binomial_bound(5, 20, 0.025) == pytest.approx(
        0.4910, abs=1e-3
    )  # Clopper and Pearson's table
    assert judging.binomial_bound(20, 20) == 1


# --- info ---


def test_info_describes_a_checkpoint_without_its_weights(tmp_path, shipped):
    model, tokenizer = shipped
    folder = shutil.copytree(ROOT / "tiny" / "checkpoint", tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    found = json.loads(run("info", "--model", folder, "--json").stdout)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["block_size"] == 32 and found["kind"] == "block diffusion"
    assert found["mask_token"] == f"{tokenizer.id('|<MASK>|')} |<MASK>|"
    assert found["weights_mib"] == pytest.approx(found["parameters"] * 4 / 2**20)
    assert found["cache_mib_per_1024_tokens"] == 2 * 4 * 2 * 32 * 4 / 1024
    assert "block diffusion" in run("info", folder).stdout
    both = run("info", folder, "--model", folder)
    assert both.exit_code == 2 and "give one of them" in both.stderr


# --- chat ---


def test_chat_answers_keeps_its_cache_and_saves(tmp_path, shipped):
    model, tokenizer = shipped
    saved = tmp_path / "talk.json"
    result = run(
        "chat",
        "--max-new-tokens",
        60,
        stdin=f"{QUESTION}\n/stats\nAnd now?\n/save {saved}\n/clear\n/stats\n/x\n/exit\nno\n",
    )
    assert result.exit_code == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == [QUESTION, "And now?"]
    for turn in (1, 3):  # the same answers as from scratch
        [fresh] = generate(model, [tokenizer.chat(messages[:turn])], Decoding(max_new_tokens=60))
        assert messages[turn]["content"] == tokenizer.decode(fresh.tokens)
        assert tokenizer.decode(fresh.tokens) in result.stdout
    assert "32 of 1024 positions are in the cache" in result.stderr and "0 of 1024" in result.stderr
    assert "Commands: " in result.stderr and "no" not in result.stdout.splitlines()


def test_chat_survives_odd_lines_and_names(tmp_path):
    place = os.fsencode(tmp_path)
    lines = [QUESTION.encode(), b"/system \xff", b"/save .", b"/save " + place, b"/save %s/talk" % place]
    result = run("chat", stdin=b"\n".join([*lines, b"/exit", b""]))
    assert result.exit_code == 0 and not result.exception
    assert "no UTF-8" in result.stderr and "name another" in result.stderr and str(tmp_path) in result.stderr
    assert json.loads((tmp_path / "talk").read_text())["messages"][0]["content"] == QUESTION


def test_chat_says_when_the_conversation_is_too_long(shipped):
    model, tokenizer = shipped
    talk = cli.Chat(model, tokenizer, Decoding().resolve(model.config), None)
    with pytest.raises(InputError, match="outgrown the model's 1024 positions; /clear"):
        talk.answer("apples " * 1100)
    assert talk.messages == []


@pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit"])
def test_words_that_end_a_chat(word):
    result = run("chat", stdin=f"{word}\n/stats\n")
    assert result.exit_code == 0 and "tokens" not in result.stderr


def test_chat_greets_helps_and_confirms():
    result = run("chat", stdin="/help\n/system Be brief.\n/system\n/clear\n/save a\0b\n/save\n")
    assert result.exit_code == 0 and result.stderr.count("Commands: ") == 2  # the banner's and /help's
    assert str(cli.SHIPPED) in result.stderr and "word problems only" in result.stderr
    assert (
        "The system message is now: Be brief." in result.stderr and "no system message now" in result.stderr
    )
    assert "The conversation is cleared." in result.stderr
    assert "no file's name" in result.stderr and "/save needs a file's name" in result.stderr


def test_an_answer_that_was_cut_is_forgotten(shipped, monkeypatch, capsys):
    model, tokenizer = shipped
    talk = cli.Chat(model, tokenizer, Decoding().resolve(model.config), None)
    monkeypatch.setattr(cli, "stream_answer", lambda *given: Result(tokens=[5, 6]))
    talk.answer(QUESTION)
    assert talk.messages == [] and "forgotten" in capsys.readouterr().err


# --- Watch and trace ---


def screen(text, width):
    """What a terminal shows after the text: enough of one for what `watch` writes."""
    rows, row, column = [[]], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[[\d;]*m|[\s\S]", text):
        if part == "\n":
            row, column = row + 1, 0
            rows += [[]] * (row == len(rows))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part == "\x1b[J":
            rows[row] = rows[row][:column]
            del rows[row + 1 :]
        elif not part.startswith("\x1b"):
            rows[row][column:] = [part]
            column += terminal.cell_width(part)
            assert column < width
    return "\n".join("".join(line) for line in rows)


@pytest.mark.parametrize("width", [30, 80])
@pytest.mark.parametrize("colour", [True, False])
def test_watch_ends_with_the_answer_on_the_screen(shipped, monkeypatch, width, colour):
    model, tokenizer = shipped
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    prompt, shown = tokenizer.chat([{"role": "user", "content": QUESTION}]), []
    steps = decode(model, [prompt], Decoding())
    steps = list(terminal.watch(tokenizer, steps, len(prompt), model.config.mask_token_id, shown.append))
    [result] = generate(model, [prompt], Decoding())
    answer = tokenizer.decode(result.tokens)
    lines = terminal.wrapped([(answer, None)], width - 1)
    assert screen("".join(shown), width) == "\n".join("".join(c for c, _ in line) for line in lines)
    assert terminal.BLANK in "".join(shown[:-1]) and ("\x1b[38;5;" in "".join(shown)) == colour
    assert [token for step in steps for token in step.final] == result.tokens


def test_watch_crosses_refused_drafts_out_until_the_next_pass(shipped, monkeypatch):
    model, tokenizer = shipped
    monkeypatch.setenv("COLUMNS", "80")
    prompt, shown = tokenizer.chat([{"role": "user", "content": "3+4"}]), []
    steps = decode(model, [prompt], Decoding(verify=True, draft_width=16))
    steps = list(terminal.watch(tokenizer, steps, len(prompt), model.config.mask_token_id, shown.append))
    crossed = ["".join(re.findall(r"\x1b\[9[\d;]*m(.*?)\x1b", text)) for text in shown]
    refused = [tokenizer.decode([draft.token for draft in step.refused]) for step in steps[:-1]]
    assert crossed == [*(text.replace("\n", "") for text in refused), ""] and any(crossed)
    [result] = generate(model, [prompt], Decoding(block_size=1))
    assert screen("".join(shown), 80) == tokenizer.decode(result.tokens)


@pytest.mark.parametrize("draft", ["\n\n", "\n\nZoe", "\nZoe", " Zoe"])
def test_refused_drafts_do_not_take_known_text_with_them(monkeypatch, draft):
    monkeypatch.setenv("COLUMNS", "80")
    texts, shown = ["five cards", " in", draft], []
    monkeypatch.setattr(terminal, "token_texts", lambda _, ids, special: [texts[i] for i in ids])
    verify = lambda token, **more: Pass(
        "verify", token, [], [], [], None, 0, revealed=[Revealed(token, token, 1.0)], final=[token], **more
    )
    passes = [verify(0, refused=[Revealed(1, 2, 0.5)]), verify(1, finish_reason="length")]
    list(terminal.watch(None, passes, 0, None, shown.append))
    assert draft.strip("\n") in shown[0] and screen("".join(shown), 80) == "five cards in"


def test_wide_characters_wrap_and_control_characters_do_not_steer_the_terminal():
    lines = terminal.wrapped([("世界世界", 1), ("a\x1b[2Jb\u0301", 2)], 5)
    assert ["".join(c for c, _ in line) for line in lines] == ["世界", "世界a", "\ufffd[2Jb\u0301"]


def test_words_are_not_broken_where_a_line_has_room():
    lines = terminal.wrapped([("an appl", 1), ("etree or two", 2), (" abcdefghijklm", 3)], 10)
    text = ["".join(character for character, _ in line).rstrip() for line in lines]
    assert text == ["an", "appletree", "or two", "abcdefghij", "klm"]
    assert [mark for _, mark in lines[1]][:5] == [1, 1, 1, 1, 2]


def test_watch_waits_after_each_pass_but_the_last(shipped, monkeypatch):
    model, tokenizer = shipped
    waits = []
    monkeypatch.setattr(terminal.time, "sleep", waits.append)
    prompt = tokenizer.chat([{"role": "user", "content": QUESTION}])
    passes = decode(model, [prompt], Decoding())
    passes = terminal.watch(
        tokenizer, passes, len(prompt), model.config.mask_token_id, lambda text: None, 0.25
    )
    count = len(list(passes))
    assert waits == [0.25] * (count - 1)


def test_the_times_of_passes_are_of_decoding_and_not_of_showing(shipped, monkeypatch):
    model, tokenizer = shipped
    clock = [0.0]  # only waiting takes time
    monkeypatch.setattr(cli.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(terminal.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    prompt, kept = tokenizer.chat([{"role": "user", "content": QUESTION}]), []
    decoding = Decoding().resolve(model.config)
    cli.stream_answer(model, tokenizer, prompt, decoding, None, lambda text: None, delay=0.25, keep=kept)
    assert clock[0] == 0.25 * (len(kept) - 1) > 0 and [seconds for _, seconds in kept] == [0.0] * len(kept)


def test_watch_is_plain_text_where_standard_output_is_no_terminal():
    assert run("generate", QUESTION, "--watch").stdout == run("generate", QUESTION).stdout


def trace_data(page):
    return json.loads(
        re.search(r'<script id="trace" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    )


def test_trace_holds_every_pass_and_token(tmp_path, shipped):
    out = tmp_path / "trace.html"
    answer = run("generate", QUESTION, "--trace", out).stdout
    data = trace_data(out.read_text())
    assert "".join(token["text"] for token in data["tokens"]) == answer[:-1] + "<|im_end|>"
    found = json.loads(run("generate", QUESTION, "--json").stdout)
    kinds = [step["kind"] for step in data["passes"]]
    assert {kind: kinds.count(kind) for kind in kinds} == found["passes"]
    for token in data["tokens"]:
        assert token["runner_up"]["text"] != token["text"] and 0 < token["confidence"] <= 1
        assert (
            data["passes"][token["pass"]]["start"]
            <= token["position"]
            <= data["passes"][token["pass"]]["stop"]
        )
    assert not re.search(
        r"(src|href)=(?!.data:)|https?://|@import|fetch\(", out.read_text().replace("http://www.w3.org", "")
    )


def test_trace_holds_the_answer_of_ar_decoding_and_times(tmp_path):
    run("generate", QUESTION, "--trace", tmp_path / "trace.html")
    data = trace_data((tmp_path / "trace.html").read_text())
    answer = run("generate", QUESTION, "--block-size", 1).stdout
    assert "".join(token["text"] for token in data["ar"]["tokens"]) == answer[:-1] + "<|im_end|>"
    for lane in (data, data["ar"]):
        times = [pass_["seconds"] for pass_ in lane["passes"]]
        assert times == sorted(times) and times[-1] > 0
    assert (data["block_size"], data["sub_block_size"], data["threshold"]) == (32, 8, 0.9)


def test_trace_shows_the_options_that_acted():
    page = lambda **how: trace_data(trace.trace_page(None, [1], [], [], "", Decoding(**how)))["options"]
    assert page(accept="prefix").items() >= {"accept": "prefix", "threshold": 0.9, "block_size": None}.items()
    assert page(verify=True, draft_width=4) == {"verify": True, "draft_width": 4}


def test_trace_holds_what_verification_refused(shipped):
    model, tokenizer = shipped
    prompt = tokenizer.chat([{"role": "user", "content": QUESTION}])
    pass_ = next(decode(model, [prompt], Decoding()))
    draft = pass_.revealed[0]._replace(token=tokenizer.encode("7")[0])
    [window] = trace.lane(tokenizer, [(replace(pass_, refused=[draft]), 0.5)])["passes"]
    assert window["seconds"] == 0.5
    expected = {"position": draft.position, "text": "7", "confidence": draft.confidence}
    assert window["refused"] == [expected]


def test_trace_escapes_whatever_stands_in_the_text(tmp_path):
    out = tmp_path / "trace.html"
    evil = "</script><script>alert(1)</script> & <b>"
    assert run("generate", evil, "--trace", out, "--max-new-tokens", 5).exit_code == 0
    data = out.read_text().partition('type="application/json">')[2].partition("</script>")[0]
    assert not set("<>&") & set(data) and evil in json.loads(data)["prompt"]
    missing = run("generate", "hi", "--trace", tmp_path / "no" / "x.html")
    assert missing.exit_code == 2 and "does not exist" in missing.stderr


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_trace_page_runs_in_a_browser_and_its_slider_moves(tmp_path):
    run("generate", QUESTION, "--trace", tmp_path / "trace.html")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    flags += f" --disable-component-update --disable-sync --enable-logging=stderr --user-data-dir={tmp_path / 'profile'}"
    masked = []
    for hash in ("", "#pass=2"):
        page = f"file://{tmp_path / 'trace.html'}{hash}"
        shown = subprocess.run(
            ["chromium", *flags.split(), "--dump-dom", page], capture_output=True, text=True, timeout=60
        )
        assert "CONSOLE" not in shown.stderr
        masked.append(len(re.findall(r'class="token[^"]*\bmasked', shown.stdout)))
    assert masked[0] == 0 < masked[1]
