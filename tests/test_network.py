"""Config, mask, cache, network: one pass over any window."""

import pytest
import torch
from conftest import golden
from windows import block_causal_mask, block_forward, run_window

from fastdllm import KVCache

LOGITS = golden("logits")["cases"]


def name_of(case):
    return f"{case['checkpoint']}-{case['block_size']}"


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
    mask = block_causal_mask(queries, cached + queries, size)
    assert ["".join(str(int(seen)) for seen in row) for row in mask] == rows


@pytest.mark.parametrize("case", [c for c in LOGITS if c["kind"] == "full"], ids=name_of)
@torch.inference_mode()
def test_uncached_forward_equals_golden_logits(golden_models, case):
    model = golden_models[case["checkpoint"]]
    same_logits(model, block_forward(model, case["input_ids"], case["block_size"]), case)


@pytest.mark.parametrize("case", [c for c in LOGITS if c["kind"] == "cache"], ids=name_of)
@torch.inference_mode()
def test_window_equals_golden_logits_for_every_kind_of_pass(golden_models, case):
    model, size, start = golden_models[case["checkpoint"]], case["block_size"], len(case["prefill_ids"])
    cache = KVCache(model.config, 1, 128, model.weight)
    places = {
        "prefill": 0,
        "block": start,
        "sub": start + case["sub_start"],
        "sub2": start + case["sub2_start"],
    }
    for kind, at in (places | {"commit": start, "next": start + size}).items():
        ids = torch.tensor([case[f"{kind}_ids"]])
        same_logits(model, run_window(model, ids, [at], cache, size), case[kind])
