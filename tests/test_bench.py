"""benchmarks/: counts, bytes, operations, reports, and mistakes; no time is judged."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from command_line import mistake, run
from conftest import ROOT

import fastdllm
from checkpoint import save
from fastdllm import Config, Qwen2, Step, block_causal, generate
from verify import draft_window

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers  # noqa: E402

from benchmarks import speed  # noqa: E402

SMALL = "--shape tiny --layers 1 --device cpu --batch-sizes 1,2 --rounds 1 --prompt-tokens 32 --new-tokens 64".split()
KINDS = {
    "ar": {"prefill", "commit"},
    "block": {"prefill", "full", "commit"},
    "dual": {"prefill", "refresh", "sub", "commit"},
    "verify": {"prefill", "draft", "verify"},
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    target = tmp_path_factory.mktemp("bench") / "bench.json"
    result = run("bench", *SMALL, "--decoders", ",".join(KINDS), "--output", target)
    assert result.exit_code == 0, result.output
    return json.loads(target.read_text()) | {"stdout": result.stdout, "stderr": result.stderr}


@pytest.fixture(scope="module")
def tiny():
    return speed.random_model(speed.SHAPES["tiny"], "cpu", torch.float32)


def row(report: dict, decoder: str, batch_size: int) -> dict:
    of = lambda r: (r["decoder"].split(",")[0], r["batch_size"])
    [found] = [r for r in report["rows"] if of(r) == (decoder, batch_size)]
    return found


# --- Counts ---


def test_tokens_per_forward_at_a_fixed_rate_is_what_arithmetic_gives(report):
    # the prefill writes the first token, so sub-blocks hold 7, 8, 8 and 8 masks: 3 passes each at 3 a pass;
    # the first block's commit writes the second block's first token, and the last block is not committed
    # a draft and a verifying pass write 1 + 3 + 1 tokens: 12 times, and once the last 3
    passes = {"ar": 63, "block": 12 + 1 + 12, "verify": 26}
    for decoder, count in passes.items():  # with DualCache rows may wait for windows of unlike width
        alone, both = row(report, decoder, 1), row(report, decoder, 2)
        assert alone["tokens_per_forward"] == both["tokens_per_forward"] == 64 / count
        assert alone["forward_passes"] == count and both["forward_passes"] == 2 * count
        assert alone["forward_calls"] == both["forward_calls"] == count  # rows share a pass
        assert both["passes"]["prefill"]["forward_calls"] == 1


def test_passes_add_up_to_the_whole_and_a_long_prompt_has_several_prefills(tiny):
    prompts = speed.random_prompts(tiny.config, 2, 40 + fastdllm.PIECE)
    decoding = speed.FixedCount(max_new_tokens=40, stop_token_ids=())
    results, calls = speed.run(tiny, prompts, decoding)
    assert results == generate(tiny, prompts, decoding)
    assert len(calls) == sum(results[0].passes.values()) and all(call.seconds > 0 for call in calls)
    assert [call.kind for call in calls][:3] == ["prefill", "prefill", "full"]
    assert results[0].passes["prefill"] == 2 and results[0].forward_passes == len(calls) - 2


# --- Bytes and operations ---

CONFIG = Config(100, 8, 16, 3, 2, 1, 6, 64, block_size=4, mask_token_id=99)  # D 8, q 2 x 6, k and v 6
MATRICES, HEAD = 3 * (12 * 8 + 2 * 6 * 8 + 8 * 12 + 3 * 8 * 16), 100 * 8
PAIR = 4 * 3 * 12  # query and key: products and sums of d numbers in 2 heads, for scores and for values


def blocks(start: int, width: int, size: int = 4) -> list:
    return [block_causal(i, size) for i in range(start, start + width)]


def step_of(sees: list, guesses: int) -> Step:
    return Step("full", 0, [0] * len(sees), sees, list(range(guesses)), [], torch.empty(0), 0)


def test_bytes_of_a_pass_are_weights_once_and_the_cache():
    vectors = 3 * (12 + 2 * 6 + 2 * 8) + 8
    slot = 3 * 2 * 6  # keys and values of a position in all layers
    # a block at 8: 8 slots read, 4 written; a window of 2 at 12: slots up to 16, its block's end
    moved, _ = speed.cost(CONFIG, 2, [step_of(blocks(8, 4), 3), step_of(blocks(12, 2), 2)])
    assert moved == 2 * (MATRICES + vectors + HEAD + slot * (12 + 16))
    without_head, _ = speed.cost(CONFIG, 4, [step_of(blocks(0, 8), 0)])
    assert without_head == 4 * (MATRICES + vectors + slot * 8)


@pytest.mark.parametrize("sees, guesses, pairs", [
    (blocks(0, 8), 1, 4 * 4 + 4 * 8),
    (blocks(12, 2), 2, 2 * 16),
    (blocks(5, 1, size=1), 1, 6),  # AR sees itself too
    (draft_window(4, causal=1, masks=3), 4, 5 + 3 * 8),
    (draft_window(4, causal=4, masks=0), 4, 5 + 6 + 7 + 8),
    (draft_window(4, causal=2, masks=2), 6, 5 + 6 + 2 * (5 + 2) + 2 * (6 + 2)),  # a mask sees what its token sees
])  # fmt: skip
def test_operations_of_a_pass_are_products_and_attention(sees, guesses, pairs):
    found = speed.cost(CONFIG, 2, [step_of(sees, guesses)])[1]
    assert found == 2 * len(sees) * MATRICES + 2 * guesses * HEAD + PAIR * pairs


@pytest.mark.parametrize("shape", speed.SHAPES)
def test_the_weights_that_are_counted_are_those_of_the_network(shape):
    config = speed.SHAPES[shape]
    with torch.device("meta"):
        model = Qwen2(config)
    counted = speed.cost(config, 1, [step_of(blocks(0, 32, 32), 1)])[0]
    counted -= 32 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    embedding = 0 if config.tie_word_embeddings else model.weight.numel()
    assert counted + embedding == sum(p.numel() for p in model.parameters())


# --- Report ---


def test_the_report_names_hardware_versions_command_and_every_figure(report):
    names = "hardware torch python command date threads dtype device parameters rounds seed machine"
    assert all(report[name] is not None for name in names.split())
    assert min(report["machine"][f"{name}_per_second"] for name in ("bytes", "operations")) > 0
    assert {name: set(row(report, name, 1)["passes"]) for name in KINDS} == KINDS
    for found in report["rows"]:
        assert found["new_tokens"] == 64 * found["batch_size"] and found["peak_memory_mib"] > 0
        for name in "tokens_per_second tokens_per_second_with_prefill prefill_ms speed_up".split():
            assert found[name]["lowest"] <= found[name]["median"] <= found[name]["highest"], name
        for figures in found["passes"].values():
            assert figures["bytes"] > 0 and figures["operations"] > 0 and figures["ms"]["median"] > 0
            assert figures["bound_by"] in ("bytes", "operations")
            assert figures["share_of_limit"] == pytest.approx(figures["limit_ms"] / figures["ms"]["median"])
    assert row(report, "ar", 1)["speed_up"] == {"median": 1, "lowest": 1, "highest": 1}


def test_ctrl_c_leaves_what_was_measured(tmp_path, monkeypatch):
    runs, whole = [], speed.run

    def interrupted(model, prompts, decoding, *rest):
        runs.append(decoding.batch_size)
        if runs.count(2) > 2:  # the memory of both rows, then the first one's round
            raise KeyboardInterrupt
        return whole(model, prompts, decoding, *rest)

    monkeypatch.setattr(speed, "run", interrupted)
    result = run("bench", *SMALL, "--decoders", "ar,block", "--output", tmp_path / "b.json")
    assert result.exit_code == 130 and "2 of 4 rows were measured" in result.stderr
    assert "ar  " in result.stdout and "x overall" in result.stdout
    assert [r["batch_size"] for r in json.loads((tmp_path / "b.json").read_text())["rows"]] == [1, 1]


def test_a_checkpoint_is_measured_on_problems_and_stops_by_itself(tmp_path):
    line = "--device cpu --batch-sizes 2 --prompts 2 --rounds 1 --decoders ar,block --thresholds 0.5,0.9"
    line += " --sub-block-sizes 8,32 --output"
    result = run("bench", *line.split(), tmp_path / "b.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "b.json").read_text())
    assert not found["model"].startswith("/") and found["prompt_kind"] == "problems"
    assert len(found["rows"]) == 5 and all(2 < r["new_tokens"] < 2 * 128 for r in found["rows"])


# --- Mistakes ---


@pytest.mark.parametrize("arguments, words", [
    (["--shape", "3b"], "take one of"),
    (["--shape", "tiny", "--model", "elsewhere"], "exclude one another"),
    (["--shape", "tiny", "--adapter", "elsewhere"], "random weights"),
    (["--layers", "2"], "--shape"),
    (["--thresholds", "0.9", "--guesses-per-pass", "3"], "exclude one another"),
    (["--sub-block-sizes", "7"], "divisor"),
    (["--shape", "tiny", "--prompt-tokens", "5000"], "4096"),
    (["--output", "/nowhere/bench.json"], "does not exist"),
    (["--model", "plain", "--prompt-tokens", "8"], "only --decoders ar works"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    save(Qwen2(replace(CONFIG, block_size=1)), None, "plain")
    assert words in mistake("bench", "--device", "cpu", *arguments)


# --- Peers ---


def run_peers(*arguments):
    return CliRunner().invoke(peers.main, [*map(str, arguments)])


def test_the_peers_table_counts_tokens_up_to_the_first_difference():
    line = lambda answers, seconds: {"answers": answers, "forward_passes": 4, "seconds": seconds}
    ways = {
        "float32 AR": line([[1, 2, 3, 4], [5, 6]], 2.0),
        "float32 verify": line([[1, 2, 9, 4], [5, 6]], 1.0),
    }
    [_, ar, verify] = peers.summary([{"set": "all", "ways": ways}]).splitlines()
    assert ar.split()[-6:] == ["3.0", "1.00", "2", "of", "2", "100.0%"]
    assert verify.split()[-7:] == ["1.50", "6.0", "2.00", "1", "of", "2", "66.7%"]


def test_peers_goes_on_where_it_was_stopped_and_refuses_another_run(tmp_path):
    target = tmp_path / "peers.jsonl"
    common = ["--device", "cpu", "--prompts", ROOT / "tiny" / "prompts.jsonl", "--no-transformers"]
    common += ["--max-new-tokens", 64, "--output", target]
    first = run_peers(*common)
    assert first.exit_code == 0, first.output
    whole = target.read_text().splitlines()
    assert len(whole) == 1 + 3 and "verify" in first.stdout and "3 of 3" in first.stdout
    target.write_text("\n".join([*whole[:2], whole[2][:99]]))  # a kill leaves half a line
    assert run_peers(*common).exit_code == 0
    answers = lambda lines: [[w["answers"] for w in json.loads(line)["ways"].values()] for line in lines[1:]]
    assert answers(target.read_text().splitlines()) == answers(whole)
    for flag in "--batch-size", "--max-new-tokens":
        other = run_peers(*common, flag, 2)
        assert other.exit_code == 2 and "take another --output" in other.stderr
    assert run_peers(*common, "--summary").stdout.splitlines()[0] == first.stdout.splitlines()[0]
    target.write_text("my notes")
    assert run_peers(*common).exit_code == 2 and target.read_text() == "my notes"


def test_without_transformers_peers_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    run = run_peers("--shape", "tiny", "--output", tmp_path / "p.jsonl")
    assert run.exit_code == 2 and run.stderr.startswith("Error: Transformers is not installed")
    assert run.stderr.count("\n") == 1
