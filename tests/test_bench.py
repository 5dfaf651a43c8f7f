"""benchmarks/: counts, bytes, operations, reports, and mistakes; no time is judged."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

import cli
from fastdllm import Config, Decoding, Pass, Qwen2, generate, grouped_attention, save

sys.path.insert(0, str(ROOT / "benchmarks"))
import choices  # noqa: E402
import peers  # noqa: E402

from benchmarks import speed  # noqa: E402

SMALL = "--shape tiny --layers 1 --device cpu --batch-sizes 1,2 --rounds 1 --prompt-tokens 32 --new-tokens 64".split()


def bench(*arguments):
    return CliRunner().invoke(cli.cli, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    target = tmp_path_factory.mktemp("bench") / "bench.json"
    run = bench(*SMALL, "--decoders", "ar,block,fused,dual,verify", "--json", target)
    assert run.exit_code == 0, run.output
    return json.loads(target.read_text()) | {"stdout": run.stdout}


def row(report: dict, decoder: str, batch_size: int) -> dict:
    [found] = [
        r for r in report["rows"] if r["decoder"].split(",")[0] == decoder and r["batch_size"] == batch_size
    ]
    return found


# --- Counts ---


def test_tokens_per_forward_at_a_fixed_rate_is_what_arithmetic_gives(report):
    # the prefill writes the first token, so sub-blocks hold 7, 8, 8 and 8 masks: 3 passes each at 3 a pass;
    # the first block's commit writes the second block's first token, and the last block is not committed
    passes = 12 + 1 + 12
    assert row(report, "block", 1)["forward_passes"] == passes
    assert row(report, "block", 1)["tokens_per_forward"] == 64 / passes
    assert row(report, "block", 2)["tokens_per_forward"] == 64 / passes
    assert row(report, "ar", 1)["forward_passes"] == 63


def test_rows_that_share_a_pass_are_counted_once(report):
    for decoder in ("ar", "block", "fused"):  # with DualCache rows may wait for windows of unlike width
        alone, both = row(report, decoder, 1), row(report, decoder, 2)
        assert both["forward_passes"] == 2 * alone["forward_passes"]
        assert both["forward_calls"] == alone["forward_calls"] == alone["forward_passes"]
        assert both["passes"]["prefill"]["forward_calls"] == 1


def test_each_decoder_shows_its_kinds_of_passes(report):
    kinds = {name: set(row(report, name, 1)["passes"]) for name in ("ar", "block", "fused", "dual", "verify")}
    assert kinds == {
        "ar": {"prefill", "commit"},
        "block": {"prefill", "full", "commit"},
        "fused": {"prefill", "full", "fused"},
        "dual": {"prefill", "refresh", "sub", "commit"},
        "verify": {"prefill", "draft", "verify"},
    }


def test_passes_add_up_to_the_whole_and_decoding_is_not_disturbed():
    model = speed.random_model(speed.SHAPES["tiny"], "cpu", torch.float32)
    prompts = speed.random_prompts(model.config, 2, 40)
    decoding = Decoding(tokens_per_pass=3, max_new_tokens=40, stop_token_ids=())
    results, calls = speed.run(model, prompts, decoding)
    assert results == generate(model, prompts, decoding)
    assert len(calls) == sum(results[0].passes.values()) and all(call.seconds > 0 for call in calls)


# --- Bytes and operations ---

CONFIG = Config(100, 8, 16, 3, 2, 1, 6, 64, block_size=4, mask_token_id=99)  # D 8, q 2 x 6, k and v 6


def window(start: int, width: int, guessed: int) -> Pass:
    return Pass("full", start, [0] * width, list(range(guessed)), [], torch.empty(0), 0)


def test_bytes_of_a_pass_are_weights_once_and_the_cache():
    matrices = 3 * (12 * 8 + 2 * 6 * 8 + 8 * 12 + 3 * 8 * 16)
    vectors = 3 * (12 + 2 * 6 + 2 * 8) + 8
    slot = 3 * 2 * 6  # keys and values of a position in all layers
    # a block at 8: 8 slots read, 4 written; a window of 2 at 12: slots up to 16, its block's end
    [moved, _] = speed.cost(CONFIG, 2, [window(8, 4, 3), window(12, 2, 2)], 4)
    assert moved == 2 * (matrices + vectors + 100 * 8 + slot * (12 + 16))
    assert speed.cost(CONFIG, 4, [window(0, 8, 0)], 4)[0] == 4 * (
        matrices + vectors + slot * 8
    )  # without the head


def test_operations_of_a_pass_are_products_and_attention():
    matrices = 3 * (12 * 8 + 2 * 6 * 8 + 8 * 12 + 3 * 8 * 16)
    pair = (
        4 * 3 * 12
    )  # query and key: a product and a sum of d numbers in 2 heads, once for the scores, once for values
    assert speed.cost(CONFIG, 2, [window(0, 8, 1)], 4)[1] == 2 * 8 * matrices + 2 * 800 + pair * (
        4 * 4 + 4 * 8
    )
    assert speed.cost(CONFIG, 2, [window(12, 2, 2)], 4)[1] == 2 * 2 * matrices + 2 * 2 * 800 + pair * 2 * 16
    assert (
        speed.cost(CONFIG, 2, [window(5, 1, 1)], 1)[1] == 2 * matrices + 2 * 800 + pair * 6
    )  # AR sees itself too


def test_the_masks_of_a_draft_see_each_other():
    known, masks = [7], [CONFIG.mask_token_id] * 3
    operations = lambda kind, tokens: speed.cost(
        CONFIG, 2, [Pass(kind, 4, tokens, [5, 6, 7, 8], [], torch.empty(0), 5)], 1
    )[1]
    pair = 4 * 3 * 12
    ahead = operations("verify", [7, 7] + masks[:2] + masks[:2])  # slots 4 to 9
    assert ahead - operations("verify", [7] * 6) == pair * (2 * (5 + 2) + 2 * (6 + 2) - (7 + 8 + 9 + 10))
    assert operations("draft", known + masks) - operations("verify", known + [7, 7, 7]) == pair * 3


@pytest.mark.parametrize("shape", speed.SHAPES)
def test_the_weights_that_are_counted_are_those_of_the_network(shape):
    config = speed.SHAPES[shape]
    with torch.device("meta"):
        model = Qwen2(config)
    counted = speed.cost(config, 1, [window(0, 32, 1)], 32)[0]
    counted -= 32 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    embedding = 0 if config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    assert counted + embedding == sum(p.numel() for p in model.parameters())


# --- Report ---


def test_the_report_names_hardware_versions_command_and_every_figure(report):
    for (
        name
    ) in "hardware torch python command date threads dtype device parameters rounds seed machine".split():
        assert report[name] is not None, name
    assert report["machine"]["bytes_per_second"] > 0 and report["machine"]["operations_per_second"] > 0
    assert len(report["rows"]) == 10
    for found in report["rows"]:
        assert found["new_tokens"] == 64 * found["batch_size"]
        for name in "tokens_per_second tokens_per_second_with_prefill prefill_ms speed_up".split():
            assert found[name]["lowest"] <= found[name]["median"] <= found[name]["highest"], name
        assert found["peak_memory_mib"] > 0
        for figures in found["passes"].values():
            assert figures["bytes"] > 0 and figures["operations"] > 0 and figures["ms"]["median"] > 0
            assert figures["bound_by"] in ("bytes", "operations")
            assert figures["share_of_limit"] == pytest.approx(figures["limit_ms"] / figures["ms"]["median"])
    assert row(report, "ar", 1)["speed_up"] == {"median": 1, "lowest": 1, "highest": 1}


def test_the_tables_show_every_row_twice(report):
    for found in report["rows"]:
        label = f"{found['decoder']} "
        assert sum(line.startswith(label) for line in report["stdout"].splitlines()) == 4  # two batch sizes


def test_a_checkpoint_is_measured_on_problems_and_stops_by_itself(tmp_path):
    run = bench("--device", "cpu", "--batch-sizes", 2, "--prompts", 2, "--rounds", 1, "--json", tmp_path / "b.json",
                "--decoders", "ar,block", "--thresholds", "0.5,0.9", "--sub-block-sizes", "8,32")  # fmt: skip
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "b.json").read_text())
    assert (
        not found["model"].startswith("/") and found["prompt_kind"] == "problems" and len(found["rows"]) == 5
    )
    assert all(2 < r["new_tokens"] < 2 * 128 for r in found["rows"])


# --- Choices ---


def ragged(device: str, dtype: torch.dtype, width: int, seen: int):
    """q, k, v of three rows whose queries see 1, some and all slots, k and v as the cache gives them, and a bias."""
    lengths = torch.tensor([1, seen - 37, seen], device=device, dtype=torch.int32)
    q = torch.randn(3, 6, width, 32, device=device, dtype=dtype)
    k, v = (torch.randn(3, seen, 2, 32, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    seen_by = torch.arange(seen, device=device) < lengths[:, None]
    return (
        lengths,
        (q, k, v),
        torch.zeros_like(seen_by, dtype=dtype).masked_fill(~seen_by, -torch.inf)[:, None, None],
    )


def documented(q, k, v, first_query, first_key, *sizes, seqused_k, block_table):
    """The kernel, as torch documents it: heads in the middle, rows one after the other, pages by their number."""
    answers = []
    for i, used in enumerate(seqused_k.tolist()):
        rows = slice(first_query[i], first_query[i + 1])
        if block_table is None:
            keys, values = (x[first_key[i] :][:used] for x in (k, v))
        else:
            keys, values = (x[block_table[i]].flatten(0, 1)[:used] for x in (k, v))
        found = grouped_attention(*(x.transpose(0, 1)[None] for x in (q[rows], keys, values)))
        answers.append(found[0].transpose(0, 1))
    return (torch.cat(answers),)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("width", [1, 8])
def test_flash_attention_is_called_as_torch_documents_it(monkeypatch, width, paged):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", documented)
    lengths, qkv, bias = ragged("cpu", torch.float32, width, 512)
    torch.testing.assert_close(choices.flash(lengths, width, 512, paged)(*qkv), grouped_attention(*qkv, bias))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("width", [1, 8, 32])
def test_cuda_flash_attention_is_masked_attention(width, paged):
    lengths, qkv, bias = ragged("cuda", torch.bfloat16, width, 512)
    found, expected = choices.flash(lengths, width, 512, paged)(*qkv), grouped_attention(*qkv, bias)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


# --- Mistakes ---


@pytest.mark.parametrize("arguments, words", [
    (["--shape", "3b"], "take one of"),
    (["--shape", "tiny", "--model", "elsewhere"], "exclude one another"),
    (["--layers", "2"], "--shape"),
    (["--decoders", "ar,fast"], "'fast'"),
    (["--batch-sizes", "1;2"], "with commas"),
    (["--batch-sizes", "0"], "from 1"),
    (["--thresholds", "0.9", "--tokens-per-pass", "3"], "exclude one another"),
    (["--thresholds", "2"], "from 0 to 1"),
    (["--sub-block-sizes", "7"], "divisor"),
    (["--shape", "tiny", "--prompt-tokens", "5000"], "4096"),
    (["--json", "/nowhere/bench.json"], "does not exist"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(arguments, words):
    run = bench("--device", "cpu", *arguments)
    assert run.exit_code == 2 and words in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1 and run.stderr.startswith("Error: ")


def test_a_plain_qwen2_has_only_ar(tmp_path):
    save(Qwen2(replace(CONFIG, block_size=1)), None, tmp_path)
    run = bench("--device", "cpu", "--model", tmp_path, "--prompt-tokens", 8)
    assert run.exit_code == 2 and "only --decoders ar works" in run.stderr


def test_without_the_benchmarks_folder_bench_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "benchmarks.speed", None)
    run = bench()
    assert run.exit_code == 2 and "benchmarks/speed.py" in run.stderr and run.stderr.count("\n") == 1


# --- Peers ---


def test_without_transformers_peers_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    run = CliRunner().invoke(peers.main, ["--shape", "tiny"])
    assert run.exit_code == 2 and run.stderr.startswith("Error: Transformers is not installed")
    assert run.stderr.count("\n") == 1


def test_peers_measures_the_same_weights_without_the_mask_token():
    model = speed.random_model(speed.SHAPES["tiny"], "cpu", torch.float32)
    plain = peers.as_autoregressive(model)
    assert plain.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert model.config.mask_token_id is not None  # the model itself keeps it
    assert (plain.config.block_size, plain.config.mask_token_id, plain.config.tokenizer_size) == (
        1,
        None,
        None,
    )


def test_the_first_difference_of_two_answers_is_the_earliest():
    found = peers.agreement([[1, 2, 3, 4], [1, 9, 3, 4]], [[1, 2, 3, 5], [1, 2, 3, 4]])
    assert found == {"equal_tokens": 6 / 8, "first_difference": {"row": 1, "position": 1}}
    assert peers.agreement([[1]], [[1]]) == {"equal_tokens": 1.0, "first_difference": None}


def test_peers_has_the_rounds_so_far_after_each_of_them():
    writers = {"transformers": lambda prompts, count: [[0] * count for _ in prompts]} | {
        "ar": lambda prompts, count: [[0] * (count - 1) + [1] for _ in prompts]
    }
    found = list(peers.measure(writers, [[1, 2], [3]], 4, 2, torch.device("cpu")))
    assert [[row["rounds"] for row in rows] for rows in found] == [[1, 1], [2, 2]]
    ar = found[1][1]
    assert ar["prompt_tokens"] == [2, 1] and ar["equal_tokens"] == 3 / 4
    assert ar["times_transformers"]["lowest"] <= ar["times_transformers"]["highest"]


def test_ragged_prompts_go_from_a_quarter_to_the_whole_length():
    model = speed.random_model(speed.SHAPES["tiny"], "cpu", torch.float32)
    lengths = [len(prompt) for prompt in peers.make_prompts(model, None, 4, 64, True)]
    assert lengths == [64, 48, 32, 16]
    assert [len(prompt) for prompt in peers.make_prompts(model, None, 2, 64, False)] == [64, 64]
