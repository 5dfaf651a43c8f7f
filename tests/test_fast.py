"""fast.py: prepacked weights and recorded passes change no token."""

import gc
import platform
import random
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import golden

import fastdllm
from fast import PrepackedLinear, RecordedPasses, prepack
from fastdllm import (
    Config,
    Decoding,
    InputError,
    KVCache,
    Linear,
    Qwen2,
    attention_bias,
    causal_attention,
    decode,
    generate,
    grouped_attention,
    run_window,
)

CASES = golden("generate")["cases"]


def options(case, **changes):
    names = ["block_size", "sub_block_size", "threshold", "cache", "max_new_tokens", "stop_token_ids"]
    return Decoding(**{name: case[name] for name in names if name in case} | changes)


def random_model(dtype: torch.dtype) -> Qwen2:
    return Qwen2(Config(64, 32, 48, 1, 4, 2, 8, 128, block_size=8, mask_token_id=63)).to(dtype)


def prompt_of(rng, length, top=280):
    return [rng.randrange(top) for _ in range(length)]


# --- Prepacked weights ---

WORKS = {
    dtype: prepack(random_model(getattr(torch, dtype))).prepacked
    for dtype in ("float32", "bfloat16", "float16")
}
needs_onednn = pytest.mark.skipif(not WORKS["float32"], reason="oneDNN is not in this build of torch")


@pytest.fixture(scope="module")
def packed_models(folders) -> dict:
    return {name: prepack(fastdllm.load(folder, "cpu")[0]) for name, folder in folders.items()}


@pytest.mark.parametrize("few", [1, PrepackedLinear.FEW_ROWS])  # 1: no product is plain
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_prepacked_weights_give_golden_tokens(packed_models, monkeypatch, case, few):
    monkeypatch.setattr(PrepackedLinear, "FEW_ROWS", few)
    [result] = generate(packed_models[case["checkpoint"]], [case["prompt"]], options(case))
    assert result.tokens == case["tokens"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_prepacked_products_are_the_plain_ones(dtype, rng):
    if not WORKS[dtype]:
        pytest.skip(f"oneDNN knows no {dtype} here")
    linear = Linear(640, 420).to(getattr(torch, dtype))
    x = torch.randn(2, 37, 640, generator=rng).to(linear.weight.dtype)
    near = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for rows in (1, 5, 37):
        ours = PrepackedLinear(linear)(x[:, :rows])
        torch.testing.assert_close(ours, linear(x[:, :rows]), atol=near, rtol=near)


def test_rows_of_a_batch_are_single_runs_with_prepacked_weights(packed_models):
    prompts = [prompt_of(random.Random(n), 3 + 4 * n) for n in range(7)]
    for size in (1, 8):
        knobs = Decoding(size, min(size, 4), 0.6, "dual", 24, batch_size=4, stop_token_ids=())
        alone = [generate(packed_models["tied"], [prompt], knobs)[0].tokens for prompt in prompts]
        assert [result.tokens for result in generate(packed_models["tied"], prompts, knobs)] == alone


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors may lack it")
def test_float32_is_prepacked_where_torch_has_onednn():
    assert (
        WORKS["float32"] == torch.backends.mkldnn.is_available()
    )  # else all of these tests would skip in silence


@needs_onednn
def test_prepacking_holds_large_weights_once(folders, monkeypatch):
    model, _ = fastdllm.load(folders["tied"], "cpu")
    weights = [weakref.ref(p) for p in model.parameters() if p.dim() == 2 and p is not model.weight]
    alive, make = [], PrepackedLinear.__init__
    monkeypatch.setattr(PrepackedLinear, "SMALL_WEIGHT", 0)
    monkeypatch.setattr(
        PrepackedLinear,
        "__init__",
        lambda self, *given: alive.append(sum(w() is not None for w in weights)) or make(self, *given),
    )
    prepack(model)
    gc.collect()
    assert alive[2:] == list(range(len(weights), 0, -1))  # after a trial and the head
    assert not any(w() is not None for w in weights)
    assert model.lm_head.packed.is_mkldnn and not model.weight.is_mkldnn  # a lookup needs it as it was


@needs_onednn
def test_a_prepacked_model_is_neither_saved_nor_trained(folders, tmp_path):
    model = prepack(fastdllm.load(folders["tied"], "cpu")[0])
    with pytest.raises(InputError, match="save it before"):
        fastdllm.save(model, None, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RuntimeError, match="grad"):
        model(torch.tensor([[1, 2, 3]]), torch.arange(3)[None], causal_attention).sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])  # a processor may know them or not
def test_prepacking_serves_every_dtype(folders, dtype):
    model, _ = fastdllm.load(folders["untied"], "cpu", dtype)
    [result] = generate(prepack(model), [[5, 6, 7]], Decoding(8, max_new_tokens=20, stop_token_ids=()))
    assert len(result.tokens) == 20


def test_without_onednn_prepacking_leaves_the_model_as_it_was(folders, monkeypatch):
    model, _ = fastdllm.load(folders["tied"], "cpu")
    modules = list(model.modules())
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert list(prepack(model).modules()) == modules


# --- Recorded passes ---


@pytest.mark.parametrize("cache", ["block", "dual"])
@pytest.mark.parametrize("size, sub, more", [
    (8, 4, {}), (8, 2, {"fuse_commit": True}), (1, 1, {}), (1, 1, {"verify": True, "draft_width": 5}),
    (1, 1, {"verify": True, "draft_width": 4, "draft_ahead": True}),
])  # fmt: skip
@pytest.mark.parametrize("clean", ["block", "causal"])
def test_recorded_passes_give_the_tokens_of_eager_ones(
    folders, monkeypatch, device, cache, size, sub, more, clean
):
    if "verify" in more and cache == "dual":
        pytest.skip("verification has no DualCache")
    model, _ = fastdllm.load(folders["untied"], device)
    model.config = replace(model.config, clean=clean)
    monkeypatch.setattr(RecordedPasses, "READ_STEP", 16)  # so that one run meets several lengths
    for temperature, prompts in (0.0, 1), (0.0, 7), (0.8, 5):
        prompts = [prompt_of(random.Random(n), 3 + 5 * n) for n in range(prompts)]
        knobs = Decoding(size, sub, 0.6, cache, 24, temperature, 0.9, seed=3, batch_size=3, **more)
        recorded = RecordedPasses(model, record=device == "cuda")
        assert generate(model, prompts, knobs, recorded) == generate(model, prompts, knobs)
        assert recorded.passes  # they ran


def test_recorded_passes_tell_drafts_of_other_widths_apart(shipped):
    """A draft of 8 masks, and a verification of 2 drafts with 2 masks after each token, are both 9 tokens wide."""
    model, tokenizer = shipped
    question = "Mia has 12 apples. She buys 7 more. How many apples does Mia have now?"
    prompt = tokenizer.chat([{"role": "user", "content": question}])
    recorded = RecordedPasses(model, record=False)
    for width, ahead in (8, False), (2, True), (8, False):
        knobs = Decoding(verify=True, draft_width=width, draft_ahead=ahead)
        assert generate(model, [prompt], knobs, recorded) == generate(model, [prompt], knobs)


def test_recorded_passes_serve_one_decoding_at_a_time_and_one_model(folders):
    model, _ = fastdllm.load(folders["untied"], "cpu")
    recorded, prompt = RecordedPasses(model, record=False), prompt_of(random.Random(1), 19)
    knobs = Decoding(8, 4, 0.6, max_new_tokens=30, stop_token_ids=())
    first = decode(model, [prompt], knobs, recorded=recorded)
    next(first)
    with pytest.raises(InputError, match="one decoding at a time"):
        generate(model, [prompt], knobs, recorded)
    first.close()  # broken off: the next one may have them
    assert generate(model, [prompt], knobs, recorded) == generate(model, [prompt], knobs)
    other, _ = fastdllm.load(folders["untied"], "cpu")
    with pytest.raises(InputError, match="another model"):
        generate(other, [prompt], knobs, recorded)


def test_recorded_passes_outlast_unlike_requests(folders):
    model, _ = fastdllm.load(folders["untied"], "cpu")
    recorded, prompt = RecordedPasses(model, record=False), prompt_of(random.Random(1), 19)
    recorded.MOST_GRAPHS = 4
    knobs = Decoding(8, 4, 0.6, max_new_tokens=30, stop_token_ids=(), batch_size=4)
    few, long = ([prompt] * 4, knobs), ([prompt], replace(knobs, max_new_tokens=300))
    for prompts, how in (few, long):
        generate(model, prompts, how, recorded)
    cache = recorded.cache
    for prompts, how in (few, long):
        generate(model, prompts, how, recorded)
    assert recorded.cache is cache  # room for both
    for temperature in range(1, 9):  # each another shape
        generate(model, [prompt], replace(knobs, temperature=float(temperature), seed=0), recorded)
    assert len(recorded.passes) == 4  # the last used ones
    recorded.claim(model, 1, 100_000)
    assert recorded.cache.k.shape[1] == 2  # not also five rows


# --- Devices ---


@pytest.mark.parametrize(
    "transposed", [False, True]
)  # CUDA's kernels differ in the layout of what they return
def test_groups_of_heads_equal_repeated_keys(device, monkeypatch, transposed, rng):
    kernel = torch.nn.functional.scaled_dot_product_attention
    turned = lambda *given, **how: kernel(*given, **how).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", turned if transposed else kernel)
    q, k, v = (torch.randn(2, heads, 5, 16, generator=rng).to(device) for heads in (6, 2, 2))
    one, each = (torch.rand(2, 1, queries, 5, generator=rng) < 0.7 for queries in (1, 5))
    one[..., 0] = each[..., 0] = True
    for mask in (None, one.to(device), each.to(device)):
        bias = lambda groups, mask=mask: mask if mask is None else attention_bias(mask[:, 0], groups, q.dtype)
        whole = grouped_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), bias(1))
        torch.testing.assert_close(grouped_attention(q, k, v, bias(3)), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_logits_are_those_of_the_cpu(folders, device, dtype):
    tokens, outputs = torch.arange(48)[None], []
    for where, precision in (("cpu", "float32"), (device, dtype)):
        model, _ = fastdllm.load(folders["untied"], where, precision)
        with torch.inference_mode():
            cache = KVCache(model.config, 1, 48, model.lm_head.weight)
            outputs.append(model.logits(run_window(model, tokens.to(where), [0], cache, 8)).float().cpu())
    near = 1e-3 if dtype == "float32" else 0.05 * outputs[0].abs().max().item()
    assert (outputs[0] - outputs[1]).abs().max().item() < near
