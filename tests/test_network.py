"""Config, mask, cache, network: one pass over any window."""

import pytest
import torch
from conftest import golden

import fastdllm
from fastdllm import (
    InputError,
    KVCache,
    Qwen2,
    attention_bias,
    block_causal_mask,
    causal_attention,
    grouped_attention,
    run_window,
)

LOGITS = golden("logits")["cases"]


def name_of(case):
    return f"{case['checkpoint']}-{case['block_size']}"


def tokens_of(ids):
    return torch.tensor([ids])


def full_hidden(model, ids, block_size):
    positions = torch.arange(len(ids))[None]
    mask = block_causal_mask(positions, positions[0], block_size)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    bias = attention_bias(mask, groups, model.weight.dtype)
    return model(tokens_of(ids), positions, lambda layer, *qkv: grouped_attention(*qkv, bias))


def same_logits(model, hidden, expected):
    logits = model.logits(hidden)[0]
    for row, values in expected["rows"].items():
        torch.testing.assert_close(logits[int(row)], torch.tensor(values), atol=1e-3, rtol=0)
    assert logits.argmax(-1).tolist() == expected["argmax"]
    if "lse" in expected:
        torch.testing.assert_close(logits.logsumexp(-1), torch.tensor(expected["lse"]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name, rows", golden("train")["eval_masks"].items())
def test_mask_equals_golden(name, rows):
    queries, size, cached = (int(part.lstrip("qbscahe")) for part in name.split("_"))
    mask = block_causal_mask(torch.arange(cached, cached + queries), torch.arange(cached + queries), size)
    assert ["".join(str(int(seen)) for seen in row) for row in mask] == rows


@pytest.mark.parametrize("case", [c for c in LOGITS if c["kind"] == "full"], ids=name_of)
@torch.inference_mode()
def test_uncached_forward_equals_golden_logits(golden_models, case):
    model = golden_models[case["checkpoint"]]
    same_logits(model, full_hidden(model, case["input_ids"], case["block_size"]), case)


@pytest.mark.parametrize("case", [c for c in LOGITS if c["kind"] == "cache"], ids=name_of)
@torch.inference_mode()
def test_window_equals_golden_logits_for_every_kind_of_pass(golden_models, case):
    model, size = golden_models[case["checkpoint"]], case["block_size"]
    cache = KVCache(model.config, 1, 128, model.lm_head.weight)
    start = len(case["prefill_ids"])
    for kind, ids, at in [
        ("prefill", "prefill_ids", 0),
        ("block", "block_ids", start),
        ("sub", "sub_ids", start + case["sub_start"]),
        ("sub2", "sub2_ids", start + case["sub2_start"]),
        ("commit", "commit_ids", start),
        ("next", "next_ids", start + size),
    ]:
        same_logits(model, run_window(model, tokens_of(case[ids]), [at], cache, size), case[kind])


@torch.inference_mode()
def test_causal_kernel_equals_block_size_1_mask(golden_models):
    model, ids = golden_models["untied"], list(range(3, 40))
    causal = model(tokens_of(ids), torch.arange(len(ids))[None], causal_attention)
    torch.testing.assert_close(causal, full_hidden(model, ids, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 4, 8, 12])
@torch.inference_mode()
def test_committed_blocks_equal_one_uncached_forward(golden_models, size, rng):
    model, cache = (
        golden_models["tied"],
        KVCache(golden_models["tied"].config, 1, 48, golden_models["tied"].lm_head.weight),
    )
    ids = torch.randint(0, 280, (48,), generator=rng).tolist()
    noise = torch.randint(0, 280, (48,), generator=rng).tolist()
    hidden = [run_window(model, tokens_of(ids[:24]), [0], cache, size)]
    for start in range(24, 48, size):
        run_window(
            model, tokens_of(noise[start : start + size]), [start], cache, size
        )  # leaves nothing behind
        hidden.append(run_window(model, tokens_of(ids[start : start + size]), [start], cache, size))
    torch.testing.assert_close(torch.cat(hidden, dim=1), full_hidden(model, ids, size), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 8, 12])
@torch.inference_mode()
def test_a_long_window_runs_in_pieces_and_gives_the_same(golden_models, monkeypatch, size, rng):
    model, widths, forward = golden_models["tied"], [], Qwen2.forward
    monkeypatch.setattr(fastdllm, "PIECE", 20)
    monkeypatch.setattr(
        Qwen2, "forward", lambda self, *given: widths.append(given[0].shape[1]) or forward(self, *given)
    )
    ids = torch.randint(0, 280, (96,), generator=rng).tolist()
    cache = KVCache(model.config, 1, 96, model.weight)
    hidden = [
        run_window(model, tokens_of(ids[begin:end]), [begin], cache, size)
        for begin, end in ((0, 24), (24, 96))
    ]
    assert max(widths) <= 24
    torch.testing.assert_close(torch.cat(hidden, dim=1), full_hidden(model, ids, size), atol=1e-4, rtol=1e-4)
    if size > 1:
        with pytest.raises(InputError, match="must begin with a block"):
            run_window(model, tokens_of(ids[:40]), [25], cache, size)


@torch.inference_mode()
def test_rows_at_the_same_place_share_one_mask(golden_models, monkeypatch):
    model, masks, bias = golden_models["tied"], [], fastdllm.attention_bias
    monkeypatch.setattr(
        fastdllm, "attention_bias", lambda mask, *rest: masks.append(mask) or bias(mask, *rest)
    )
    for starts in ([0, 0, 0], [8, 16, 24]):
        run_window(
            model, torch.ones(3, 16, dtype=torch.long), starts, KVCache(model.config, 3, 40, model.weight), 8
        )
    assert [len(mask) for mask in masks] == [1, 3]


@torch.inference_mode()
def test_ragged_windows_equal_single_rows(golden_models, rng):
    model = golden_models["untied"]
    tokens = torch.randint(0, 300, (3, 40), generator=rng)
    starts = [8, 32, 16]
    together = KVCache(model.config, 4, 40, model.lm_head.weight)
    together.k.fill_(1e3), together.v.fill_(1e3)  # whatever stood there before
    for row, start in enumerate(starts):
        run_window(model, tokens[row : row + 1, :start], [0], together, 8, [row + 1])
    windows = torch.stack([tokens[row, start : start + 8] for row, start in enumerate(starts)])
    hidden = run_window(model, windows, starts, together, 8, [1, 2, 3])
    for row, start in enumerate(starts):
        alone = full_hidden(model, tokens[row, : start + 8].tolist(), 8)[0, start:]
        torch.testing.assert_close(hidden[row], alone, atol=1e-4, rtol=1e-4)
