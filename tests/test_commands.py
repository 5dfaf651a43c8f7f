"""eval, sweep, info, chat, and the views of a decoding: --watch and --trace."""

import copy
import errno
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from command_line import QUESTION, mistake, read_lines, run, run_json, user, write_lines
from conftest import ROOT

import verify
from commands import chat, console, evaluate, prompts, terminal, trace
from fastdllm import Decoding, Guess, InputError, Result, Sees, Step, decode, generate
from verify import Verified, adapter_of, add_adapter

# --- eval ---


def test_eval_reports_accuracy_and_rates(tmp_path):
    problems = [
        {"question": QUESTION.replace("12", str(i)), "answer": f"... #### {i + 7}"} for i in range(10, 16)
    ]
    source, out = write_lines(tmp_path / "problems.jsonl", problems), tmp_path / "out.jsonl"
    found = run_json("eval", source, "--output", out, "--threshold", 0.95)
    lines = read_lines(out)
    assert found["problems"] == len(lines) == 6
    assert found["accuracy"] == sum(line["correct"] for line in lines) / 6
    assert found["standard_error"] == pytest.approx((found["accuracy"] * (1 - found["accuracy"]) / 6) ** 0.5)
    passes = sum(line["forward_passes"] for line in lines)
    assert found["tokens_per_forward"] == pytest.approx(sum(line["new_tokens"] for line in lines) / passes)
    assert found["threshold"] == 0.95 and found["tokens_per_second"] > 0 and found["stopped_by_length"] == 0
    text = run("eval", source, "--output", out, "--threshold", 0.95)  # the score of the file that is there
    assert f"{100 * found['accuracy']:.1f}% (standard error" in text.stdout
    assert "of 6 problems," in text.stdout and "tokens/s" not in text.stdout


# --- the choice of --verify ---


@pytest.mark.parametrize("asked, found, words", [
    (Verified(), (Verified(draft_width=5), True), "takes drafts of 5 tokens, by timed passes"),
    (Verified(), (Verified(draft_width=3, draft_ahead=True), True), "3 tokens in every pass (--draft-ahead),"),
    (Verified(), (Decoding(1), True), "drafts gain too little here (4 rows), so --verify runs plain AR."),
    (Verified(), (Verified(draft_width=5), False), "an answer may part from AR's at a tie."),
    (Verified(draft_width=3), None, None),  # what is given decides
    (Verified(draft_ahead=True), None, None),
    (Decoding(1), None, None),
])  # fmt: skip
def test_verify_says_what_it_chose_and_flags_decide(untied, monkeypatch, capsys, asked, found, words):
    model = copy.deepcopy(untied).bfloat16()
    add_adapter(model, 4, 8.0, 5).heldout_kept = [1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(verify, "choose_drafts", lambda *given: found)
    resolved = asked.resolve(model)
    chosen = console.choose(asked, resolved, model, rows=4)
    said = capsys.readouterr().err
    assert (chosen, words in said) == (found[0], True) if found else (chosen is resolved and not said)
    adapter_of(model).heldout_kept = []
    assert console.choose(asked, resolved, model) is resolved
    assert ("no held-out counts" in capsys.readouterr().err) == bool(words)


# --- sweep ---

FEW = ["sweep", "--count", 2, "--sub-block-sizes", "32", "--max-new-tokens", 40]


@pytest.fixture(scope="module")
def swept():
    return run_json(*FEW, "--thresholds", "0.5,1")


def test_sweep_measures_each_choice_beside_ar(swept):
    rows = swept["rows"]
    flags = ["--block-size 1", "--verify", *(f"--threshold {t} --sub-block-size 32" for t in ("0.5", "1"))]
    assert [row["flags"] for row in rows] == flags and [row["block_size"] for row in rows] == [1, 1, 32, 32]
    assert rows[0]["speed_up"] == 1 and rows[1]["identical"] and rows[1]["drop"] == 0
    assert swept["recommended"] in (rows[0], rows[1], *(row for row in rows if row["drop_upper"] <= 0.01))


def test_sweep_prints_a_line_for_each_row_and_one_conclusion():
    columns, *rows, advice = run(*FEW, "--thresholds", "0.9", "--caches", "dual").stdout.splitlines()
    assert columns.split()[:2] == ["accuracy", "s.e."] and max(map(len, [columns, *rows])) <= 100
    flags = ["--block-size 1", "--verify", "--threshold 0.9 --sub-block-size 32 --cache dual"]
    assert [row[: len(flags[2])].rstrip() for row in rows] == flags
    assert advice.startswith("Choose ")


@pytest.mark.parametrize("speeds, drops, identical, choice", [
    ((1, 3, 4), (0, 0, 0.004), True, "Choose --block: 4.00 times AR's speed, with 95% confidence within 1 points of AR's accuracy."),
    ((1, 3, 4), (0.05, 0.05, 0.05), True, "Choose --verify: 3.00 times AR's speed, with AR's answers. With a higher --count a faster one may qualify."),
    ((1, 3, 0.5), (0.05, 0.05, 0), False, "Choose AR, --block-size 1: nothing faster is with 95% confidence within 1 points of AR's accuracy. With a higher --count a faster one may qualify."),
    ((1, 0.5, 0.7), (0, 0, 0), True, "Choose AR, --block-size 1: nothing faster is with 95% confidence within 1 points of AR's accuracy."),
])  # fmt: skip
def test_sweep_recommends_the_fastest_that_is_sure(speeds, drops, identical, choice):
    """A faster row is worth more problems where its drop, here 0, is not yet sure to be small."""
    names = ("--block-size 1", "--verify", "--block")
    rows = [{"flags": n, "speed_up": s, "drop": 0, "drop_upper": d, "identical": identical, "verify": n == "--verify"}
            for n, s, d in zip(names, speeds, drops)]  # fmt: skip
    assert evaluate.recommended(rows, 1.0)[1] == choice


def test_ctrl_c_keeps_the_rows_of_a_sweep(monkeypatch):
    calls, whole = [], evaluate.generate

    def interrupted(*given):
        calls.append(given)
        if len(calls) > 4:  # each row warms up
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(evaluate, "generate", interrupted)
    result = run(*FEW)
    assert result.exit_code == 130 and "Interrupted: 2 of 8 rows are measured." in result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [
        "--block-size",
        "--verify",
        "Choose",
    ]


@pytest.mark.parametrize("size, subs", [(16, [8, 16]), (8, [8]), (12, [4, 12])])
def test_sweep_tries_small_sub_blocks_and_the_whole_block(shipped, size, subs):
    config, choices = replace(shipped[0].config, block_size=size), {"caches": ["block"], "thresholds": [1]}
    ways = evaluate.ways_of(config, choices | {"sub_block_sizes": None}, {})
    assert [way.sub_block_size for way in ways.values()][2:] == subs


def test_sweep_refuses_sizes_that_fit_nothing():
    assert "--sub-block-size 5 does not divide --block-size 32" in mistake("sweep", "--sub-block-sizes", 5)
    for flags in ("--sub-block-sizes 0", "--thresholds 0.5,2", "--max-drop -1"):
        assert flags.split()[0] in mistake("sweep", "--count", 1, *flags.split())


# --- info ---


def test_info_describes_a_checkpoint_without_its_weights(tmp_path, shipped):
    model, tokenizer = shipped
    copy = shutil.copytree(ROOT / "tiny" / "checkpoint", tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    found = run_json("info", "--model", copy)
    assert found["missing_weights"] == ["model.safetensors"] and "missing_weights" not in run_json("info")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["block_size"] == 32 and found["kind"] == "block diffusion"
    assert found["mask_token"] == f"{tokenizer.id('|<MASK>|')} '|<MASK>|'"
    ids = tokenizer.chat([user("?")])
    assert [int(shown.split()[0]) for shown in found["a_chat_ends_in"]] == ids[-6:]
    assert found["chat_template"] == "tokenizer_config.json"
    assert found["default_system_message"] == tokenizer.default_system()
    assert found["weights_mib"] == pytest.approx(found["parameters"] * 4 / 2**20)
    assert found["cache_mib_per_1024_tokens"] == 2 * 4 * 2 * 32 * 4 / 1024
    lines = run("info", copy).stdout.splitlines()
    assert lines[0].strip() == "missing weights  model.safetensors"
    assert all(len(line.split("  ")) > 1 and line.split("  ")[-1].strip() for line in lines)  # no blanks
    assert "give one of them" in mistake("info", copy, "--model", copy)
    assert "config.json is missing" in mistake("info", tmp_path)


# --- chat ---


def test_chat_answers_as_from_scratch_and_goes_on_after_odd_lines(shipped):
    model, tokenizer = shipped
    lines = [QUESTION.encode(), b"\xff", b"/what", b"And now?", b"/clear", QUESTION.encode(), b"/exit", b"no"]
    result = run("chat", "--max-new-tokens", 60, stdin=b"\n".join(lines))
    assert result.exit_code == 0 and "no" not in result.stdout.splitlines()
    assert "no UTF-8" in result.stderr and "unknown command /what" in result.stderr
    messages, expected = [], []
    for question in (QUESTION, "And now?"):
        messages.append(user(question))
        [fresh] = generate(model, [tokenizer.chat(messages)], Decoding(max_new_tokens=60))
        expected.append(tokenizer.decode(fresh.tokens))
        messages.append({"role": "assistant", "content": expected[-1]})
    assert result.stdout == "\n".join([*expected, expected[0], ""])


@pytest.fixture
def talk(shipped):
    return chat.Chat(*shipped, Decoding().resolve(shipped[0]), None)


def test_chat_says_when_the_conversation_is_too_long(talk):
    with pytest.raises(InputError, match="outgrown the model's 1024 positions; /clear"):
        talk.answer("apples " * 1100)
    assert talk.messages == []


def test_an_answer_that_was_interrupted_is_forgotten(talk, monkeypatch, capsys):
    monkeypatch.setattr(chat, "stream_answer", lambda steps, *given: next(steps) and Result(tokens=[5, 6]))
    talk.answer(QUESTION)
    assert talk.messages == [] and "forgotten" in capsys.readouterr().err


def test_a_chat_that_nobody_reads_ends(monkeypatch):
    asked = []

    def answer(self, question):
        asked.append(question)
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(chat.Chat, "answer", answer)
    assert "None" not in run("chat", stdin="one\ntwo\n").stderr and asked == ["one"]


def test_chat_greets_helps_and_says_what_each_command_did():
    for word in ("exit", "quit", "/exit", "/quit"):
        result = run("chat", stdin=f"/help\n/clear\n/foo\n{word}\n/what\n")
        assert result.exit_code == 0 and "/what" not in result.stderr
    assert result.stderr.count("Commands: ") == 3  # the greeting's, /help's and /foo's
    assert str(console.SHIPPED) in result.stderr
    assert "solves one word problem" in result.stderr and "/clear before another one" in result.stderr
    assert "The conversation is cleared." in result.stderr and "unknown command /foo" in result.stderr


def test_an_empty_system_message_is_said_like_any_other(shipped):
    talk = chat.Chat(*shipped, Decoding(max_new_tokens=1).resolve(shipped[0]), "")
    for _ in range(2):
        assert talk.messages == [{"role": "system", "content": ""}]
        talk.answer("hi")
        talk.clear()


@pytest.mark.parametrize("decoding", [
    Decoding(), Decoding(cache="dual"), Decoding(cache="none"), Decoding(block_size=1), Decoding(block_size=8), Verified(), Verified(draft_ahead=True),
])  # fmt: skip
def test_a_kept_cache_gives_the_answers_of_an_empty_one(shipped, decoding):
    """Also where a later prompt parts from what is kept, as where a template rewrites earlier turns."""
    model, tokenizer = shipped
    decoding, kept = replace(decoding, max_new_tokens=40).resolve(model), chat.ChatCache()
    asked, text = user(QUESTION), {"role": "assistant", "content": "In the bag."}
    other = text | {"content": "There are 12 - 7 = 5."}
    talks = [[asked], [asked, text, asked], [asked, other, asked], [asked]]
    for talk in talks:
        prompt, result = tokenizer.chat(talk), Result()
        for step in kept.decode(model, prompt, decoding):
            assert result.passes or step.start % decoding.block_size == 0  # whole blocks are kept
            result.add(step)
        assert result.tokens == generate(model, [prompt], decoding)[0].tokens
        whole = [*prompt, *result.tokens]  # drafts may be kept that lie behind the answer's end
        assert kept.tokens[: len(whole)] == whole[: len(kept.tokens)]
    assert bool(kept.tokens) == (decoding.cache != "none")


def test_a_second_turn_runs_only_what_is_new(shipped):
    model, tokenizer = shipped
    decoding, kept = Decoding().resolve(model), chat.ChatCache()
    prompt = tokenizer.chat([user(QUESTION)])
    answer = [token for step in kept.decode(model, prompt, decoding) for token in step.final]
    finished = len(kept.tokens)
    assert next(kept.decode(model, [*prompt, *answer, *prompt], decoding)).start == finished >= 32


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


def shown_steps(shipped, monkeypatch, width, decoding, question=QUESTION):
    """What `watch` draws of an answer, and the steps that it hands on."""
    model, tokenizer = shipped
    monkeypatch.setenv("COLUMNS", str(width))
    prompt, shown = tokenizer.chat([user(question)]), []
    steps = decode(model, [prompt], decoding)
    steps = list(terminal.watch(tokenizer, steps, len(prompt), model.config.mask_token_id, shown.append, 0))
    return steps, shown


@pytest.mark.parametrize("width, colour", [(36, True), (80, True), (80, False)])
def test_watch_ends_with_the_answer_and_a_key_on_the_screen(shipped, monkeypatch, width, colour):
    model, tokenizer = shipped
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    steps, shown = shown_steps(shipped, monkeypatch, width, Decoding())
    [result] = generate(model, [tokenizer.chat([user(QUESTION)])], Decoding())
    lines = terminal.wrapped([(tokenizer.decode(result.tokens), 0)], width - 1)
    *drawn, key = screen("".join(shown), width).split("\n")
    assert drawn == ["".join(c for c, _ in line) for line in lines]
    assert set(tokenizer.decode(result.tokens).split()) == set(" ".join(drawn).split())  # no word is broken
    passes = result.forward_passes
    assert key.startswith(f"{terminal.BLANK} a mask; colour: pass ") and key.endswith(f" {passes}")
    assert terminal.BLANK in "".join(shown[:-1]) and ("\x1b[38;5;" in "".join(shown)) == colour
    assert [token for step in steps for token in step.final] == result.tokens


def test_watchs_key_gives_each_passs_number_in_its_colour(shipped, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    steps, shown = shown_steps(shipped, monkeypatch, 80, Decoding())
    answer, _, key = shown[-1].rpartition("\n")
    colours = lambda text: dict(re.findall(r"\x1b\[38;5;(\d+)m(.*?)\x1b", text))
    numbers = {colour: text for colour, text in colours(key).items() if colour != str(terminal.GREY)}
    assert set(numbers) == set(colours("".join(shown)[: -len(key)])) - {str(terminal.GREY)}
    assert all(terminal.RAMP[int(number)] == int(colour) for colour, number in numbers.items())


def verify_step(tokens, revealed, final, finish_reason=None):
    sees = [Sees(i, i + 1) for i in range(len(tokens))]
    guesses = [Guess(i + 1, token, 1.0) for i, token in enumerate(revealed)]
    positions = list(range(1, len(tokens) + 1))
    after = {"revealed": guesses, "final": final, "finish_reason": finish_reason}
    return Step("verify", 0, tokens, sees, positions, positions, torch.empty(0), 0, **after)


def test_refused_drafts_are_those_that_ar_does_not_choose_up_to_the_answers_end():
    mask = 99  # the drafts are 5, 6, 7; masks behind them draft ahead
    tokens = [4, 5, 6, 7, *[mask] * 4]
    assert trace.refused_drafts(verify_step(tokens, [5, 8], [5, 8]), mask) == [(2, 6), (3, 7)]
    assert trace.refused_drafts(verify_step(tokens, [5, 6, 7, 8], [5, 6, 7, 8]), mask) == []
    assert trace.refused_drafts(verify_step(tokens, [5, 8], [5, 8], "stop"), mask) == [(2, 6)]
    ended = verify_step(tokens, [5, 6, 8], [5], "stop")  # by token 5
    assert trace.refused_drafts(ended, mask) == []
    assert trace.refused_drafts(replace(verify_step(tokens, [5], [5]), kind="draft"), mask) == []


@pytest.mark.parametrize("cells, width, lines", [
    ([("世界世界", 1), ("a\x1b[2Jb\u0301", 2)], 5, ["世界", "世界a", "\ufffd[2Jb\u0301"]),  # without spaces characters break
    ([("one two", 1), (" three", 2)], 9, ["one two ", "three"]), ([("one two", 1), (" three", 2)], 7, ["one two", "three"]),
    ([("one", 1), (terminal.BLANK * 3, None)], 6, ["one░░░", "░░░"]), ([("a\nb", 1)], 9, ["a", "b"]),
])  # fmt: skip
def test_lines_break_between_words_and_control_characters_do_not_steer_the_terminal(cells, width, lines):
    assert ["".join(c for c, _ in line) for line in terminal.wrapped(cells, width)] == lines


def test_the_beginning_of_a_word_moves_to_the_next_line_when_its_mask_is_known(monkeypatch):
    monkeypatch.setenv("COLUMNS", "12")
    texts, shown = ["the quick ", "f", "oxy", " b"], []
    monkeypatch.setattr(
        terminal, "token_texts", lambda _, ids, special: [i if i is None else texts[i] for i in ids]
    )
    first, last = verify_step([9], [0], [0]), verify_step([0], [1], [1], "length")
    first.revealed, last.revealed = [Guess(i, i - 1, 1.0) for i in (1, 2, 4)], [Guess(3, 2, 1.0)]
    first.final[:], last.final[:] = [], [0, 1, 2, 3]
    list(terminal.watch(None, [first, last], 1, None, shown.append, 0))
    assert screen("".join(shown), 12).startswith("the quick \nfoxy b\n")


def test_speed_and_times_of_passes_are_of_decoding_and_not_of_showing(shipped, monkeypatch):
    model, tokenizer = shipped
    clock, waits = [0.0], []  # only waiting takes time
    monkeypatch.setattr(prompts.time, "perf_counter", lambda: clock[0])
    sleep = lambda seconds: waits.append(clock.append(clock.pop() + seconds))
    monkeypatch.setattr(terminal.time, "sleep", sleep)
    prompt, times = tokenizer.chat([user(QUESTION)]), []
    steps = prompts.timed(decode(model, [prompt], Decoding()), times)
    steps = terminal.watch(tokenizer, steps, len(prompt), model.config.mask_token_id, lambda text: None, 0.25)
    prompts.stream_answer(steps, tokenizer, lambda text: None)
    assert len(waits) == len(times)
    assert clock[0] == 0.25 * len(waits) > 0 and [seconds for _, seconds in times] == [0.0] * len(times)


def trace_data(page):
    return json.loads(
        page.partition('<script id="trace" type="application/json">')[2].partition("</script>")[0]
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What `--trace` writes for the question."""
    out = tmp_path_factory.mktemp("trace") / "trace.html"
    result = run("generate", QUESTION, "--trace", out)
    assert f"wrote {out}, open it in a browser" in result.stderr
    return out.read_text()


def test_trace_holds_every_pass_and_token(page):
    data = trace_data(page)
    found = run_json("generate", QUESTION)
    assert "".join(token["text"] for token in data["tokens"]) == found["text"] + "<|im_end|>"
    kinds = [step["kind"] for step in data["passes"]]
    assert {kind: kinds.count(kind) for kind in kinds} == found["passes"]
    for token in data["tokens"]:
        window = data["passes"][token["pass"]]
        assert 0 < token["confidence"] <= 1 and window["start"] <= token["position"] <= window["stop"]
    own = page.replace("http://www.w3.org", "")  # nothing is fetched
    assert not re.search(r"(src|href)=(?!.data:)|https?://|@import|fetch\(", own)


def test_trace_holds_the_answer_of_ar_decoding_and_times(page):
    data = trace_data(page)
    answer = run("generate", QUESTION, "--block-size", 1).stdout
    assert "".join(token["text"] for token in data["ar"]["tokens"]) == answer[:-1] + "<|im_end|>"
    for lane in (data, data["ar"]):
        times = [step["seconds"] for step in lane["passes"]]
        assert times == sorted(times) and times[-1] > 0
    assert (data["block_size"], data["sub_block_size"], data["threshold"]) == (32, 8, 0.9)


def test_trace_shows_the_options_that_acted(shipped):
    page = lambda decoding: trace_data(trace.trace_page(None, [1], [], [], "", decoding, None))["options"]
    blocks = {"threshold": 0.9, "block_size": 32, "sub_block_size": 8}
    assert page(Decoding(accept="prefix").resolve(shipped[0])) == blocks | {"accept": "prefix"}
    assert page(Verified(draft_width=4).resolve(shipped[0])) == {"verify": True, "draft_width": 4}


def test_trace_holds_what_verification_refused(shipped):
    model, tokenizer = shipped
    known, draft, other = (tokenizer.encode(text)[0] for text in ("3", "7", "8"))
    [window] = trace.lane(tokenizer, [(verify_step([known, draft], [other], [other]), 0.5)], 99)["passes"]
    assert window["seconds"] == 0.5 and window["refused"] == [{"position": 1, "text": "7"}]


def test_trace_escapes_whatever_stands_in_the_text(tmp_path):
    out = tmp_path / "trace.html"
    evil = "</script><script>alert(1)</script> & <b>"
    assert run("generate", evil, "--trace", out, "--max-new-tokens", 5).exit_code == 0
    data = out.read_text().partition('type="application/json">')[2].partition("</script>")[0]
    assert not set("<>&") & set(data) and evil in json.loads(data)["prompt"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_trace_page_runs_in_a_browser_and_its_slider_moves(page, tmp_path):
    (tmp_path / "trace.html").write_text(page)
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
