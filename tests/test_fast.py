"""fast.py: prepacked weights and recorded passes change no token."""

import gc
import math
import platform
import random
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import golden
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from windows import causal_attend, decoding_of, prompt_of, run_window

import fastdllm
from checkpoint import load, save
from fast import PrepackedLinear, RecordedPasses, prepack
from fastdllm import Config, Decoding, InputError, KVCache, Qwen2, decode, generate
from verify import Verified, adapter_tensors, add_adapter

CASES = golden("generate")["cases"]


# --- Prepacked weights ---


def works(dtype: str) -> bool:
    model = Qwen2(Config(64, 32, 48, 1, 4, 2, 8, 128)).to(getattr(torch, dtype))
    return isinstance(prepack(model).lm_head, PrepackedLinear)


WORKS = {dtype: works(dtype) for dtype in ("float32", "bfloat16", "float16")}  # as the processor knows them
needs_onednn = pytest.mark.skipif(not WORKS["float32"], reason="oneDNN is not in this build of torch")


@pytest.fixture(scope="module")
def packed_models(folders) -> dict:
    return {name: prepack(load(folder, "cpu")[0]) for name, folder in folders.items()}


@pytest.mark.parametrize("few", [1, PrepackedLinear.FEW_ROWS])  # 1: no product is plain
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_prepacked_weights_give_golden_tokens(packed_models, monkeypatch, case, few):
    monkeypatch.setattr(PrepackedLinear, "FEW_ROWS", few)
    [result] = generate(packed_models[case["checkpoint"]], [case["prompt"]], decoding_of(case))
    assert result.tokens == case["tokens"]


@pytest.mark.parametrize("dtype, near", [("float32", 1e-5), ("bfloat16", 2e-2)])
@torch.inference_mode()
def test_prepacked_products_are_the_plain_ones(dtype, near, rng):
    if not WORKS[dtype]:
        pytest.skip(f"oneDNN knows no {dtype} here")
    linear = torch.nn.Linear(640, 420).to(getattr(torch, dtype))
    x = torch.randn(2, 37, 640, generator=rng).to(linear.weight.dtype)
    for rows in (1, 5, 37):
        ours = PrepackedLinear(linear)(x[:, :rows])
        torch.testing.assert_close(ours, linear(x[:, :rows]), atol=near, rtol=near)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors may lack it")
def test_float32_is_prepacked_where_torch_has_onednn():
    assert WORKS["float32"] == torch.backends.mkldnn.is_available()  # else these tests skip in silence


@needs_onednn
def test_prepacking_holds_large_weights_once(folders, monkeypatch):
    model, _ = load(folders["tied"], "cpu")
    weights = [weakref.ref(p) for p in model.parameters() if p.dim() == 2 and p is not model.weight]
    alive, make = [], PrepackedLinear.__init__

    def counting(self, linear):
        alive.append(sum(weight() is not None for weight in weights))
        make(self, linear)

    monkeypatch.setattr(PrepackedLinear, "SMALL_WEIGHT", 0)
    monkeypatch.setattr(PrepackedLinear, "__init__", counting)
    prepack(model)
    gc.collect()
    assert alive[2:] == list(range(len(weights), 0, -1))  # after a trial and the head
    assert not any(w() is not None for w in weights)
    assert model.lm_head.packed.is_mkldnn and model.lm_head.plain is None
    assert not model.weight.is_mkldnn  # a lookup needs it as it was


@needs_onednn
def test_a_prepacked_model_is_neither_saved_nor_trained(folders, tmp_path):
    model = prepack(load(folders["tied"], "cpu")[0])
    with pytest.raises(InputError, match="prepacked weights cannot be saved"):
        save(model, None, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RuntimeError, match="grad"):
        model(torch.tensor([[1, 2, 3]]), torch.arange(3)[None], causal_attend).sum().backward()


@pytest.mark.parametrize("dtype", WORKS)
def test_prepacking_serves_every_dtype(folders, dtype):
    model, _ = load(folders["untied"], "cpu", dtype)
    [result] = generate(prepack(model), [[5, 6, 7]], Decoding(8, max_new_tokens=20, stop_token_ids=()))
    assert len(result.tokens) == 20


def test_without_onednn_prepacking_leaves_the_model_as_it_was(folders, monkeypatch):
    model, _ = load(folders["tied"], "cpu")
    modules = list(model.modules())
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert list(prepack(model).modules()) == modules


# --- Recorded passes ---


class PretendedGraph:
    """A CUDA graph without CUDA: a replay makes the recorded calls again, on the tensors that they had.

    It first spoils what all graphs of its pool have made. So a replay that reads more than its inputs and what
    it has computed itself gives NaN, or another answer, and so does a result that is read too late.
    """

    def __init__(self):
        self.calls, self.made, self.shared = [], [], None

    def pool(self) -> weakref.WeakSet:
        return self.shared

    def replay(self) -> None:
        for tensor in (tensor for graph in self.shared for tensor in graph.made):
            tensor.fill_(math.nan if tensor.is_floating_point() else 10**9)
        for function, given, results in self.calls:
            for old, new in zip(results, tensors_in(function(*given[0], **given[1]))):
                if old.data_ptr() != new.data_ptr():  # else it is a view, or was written in place
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """`torch.cuda.graph`, pretended: keeps the calls that run inside, and what they make."""

    ROOM = math.inf  # after so many calls memory ends

    def __init__(self, graph: PretendedGraph, pool: weakref.WeakSet | None, **_):
        super().__init__()
        self.graph, graph.shared = graph, weakref.WeakSet() if pool is None else pool
        graph.shared.add(graph)

    def __torch_dispatch__(self, function, types, args=(), named=None):
        if len(self.graph.calls) >= self.ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        given = args, named or {}
        found = function(*given[0], **given[1])
        results, there = tensors_in(found), {storage_of(tensor) for tensor in tensors_in(given)}
        self.graph.made += [tensor for tensor in results if storage_of(tensor) not in there]
        self.graph.calls.append((function, given, results))
        return found


def tensors_in(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def adapted(folders, monkeypatch, device):
    """A golden model with a random adapter, where passes can be recorded: on a CPU, graphs are pretended."""
    monkeypatch.setattr(RecordedPasses, "READ_STEP", 64)  # so that one run meets several lengths
    if device == "cpu":
        stream = SimpleNamespace(wait_stream=lambda other: None)
        pretended = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext}
        pretended |= {"device": nullcontext, "CUDAGraph": PretendedGraph, "graph": Recording}
        for name, value in pretended.items():
            monkeypatch.setattr(torch.cuda, name, value)
    model, _ = load(folders["untied"], device)
    add_adapter(model, 4, 8.0)
    generator = torch.Generator().manual_seed(0)
    for tensor in adapter_tensors(model).values():
        tensor.data.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


DECODERS = (
    Decoding(1), Decoding(8, 8, 0.6), Decoding(8, 4, 0.6), Decoding(8, 2, 0.6, "dual"),
    Verified(draft_width=8), Verified(draft_width=2, draft_ahead=True),  # both verify 9 tokens
)  # fmt: skip


@pytest.mark.parametrize("most, temperature", [(256, 0.0), (2, 0.8)])
def test_recorded_passes_give_the_tokens_of_eager_ones(adapted, monkeypatch, most, temperature):
    """One object for all decodings, of one prompt and of rows of unlike lengths; many graphs are kept, or few."""
    monkeypatch.setattr(RecordedPasses, "MOST_GRAPHS", most)
    prompts = [prompt_of(random.Random(n), 3 + 15 * n) for n in range(5)]  # of which 3 share a pass
    more = {"max_new_tokens": 20, "temperature": temperature, "top_p": 0.9, "seed": 3, "batch_size": 3}
    recorded = RecordedPasses(adapted)
    for some in (prompts[:1], prompts):
        for knobs in (replace(decoder, **more) for decoder in DECODERS):
            assert generate(adapted, some, knobs, recorded) == generate(adapted, some, knobs), knobs
            assert 0 < len(recorded.passes) <= most  # they ran


@pytest.mark.parametrize("device", ["cpu"])
def test_when_memory_ends_in_a_recording_the_next_decoding_works(adapted, monkeypatch):
    recorded, prompts = RecordedPasses(adapted), [prompt_of(random.Random(n), 9 + n) for n in range(3)]
    for calls, temperature in (0, 0.0), (60, 0.8):  # no graph is there yet, or some are
        knobs = Verified(max_new_tokens=20, temperature=temperature, seed=3)
        with monkeypatch.context() as patch:
            patch.setattr(Recording, "ROOM", calls)
            with pytest.raises(torch.OutOfMemoryError):
                generate(adapted, prompts, knobs, recorded)
        assert generate(adapted, prompts, knobs, recorded) == generate(adapted, prompts, knobs)


SOME = Decoding(8, 4, 0.6, max_new_tokens=30, stop_token_ids=(), batch_size=4)


def test_recorded_passes_serve_one_decoding_at_a_time_and_one_model(untied, tied):
    recorded, prompt = RecordedPasses(untied, record=False), prompt_of(random.Random(1), 19)
    first = decode(untied, [prompt], SOME, recorded=recorded)
    next(first)
    with pytest.raises(InputError, match="one decoding at a time"):
        generate(untied, [prompt], SOME, recorded)
    first.close()  # broken off: the next one may have them
    assert generate(untied, [prompt], SOME, recorded) == generate(untied, [prompt], SOME)
    with pytest.raises(InputError, match="another model"):
        generate(tied, [prompt], SOME, recorded)


def test_recorded_passes_outlast_unlike_requests(untied):
    recorded, prompt = RecordedPasses(untied, record=False), prompt_of(random.Random(1), 19)
    recorded.MOST_GRAPHS = 4
    caches = []
    for count, most in [(4, 30), (1, 300)] * 2:
        generate(untied, [prompt] * count, replace(SOME, max_new_tokens=most), recorded)
        caches.append(recorded.cache)
    assert caches[1] is caches[2] is caches[3]  # room for both
    for temperature in range(1, 9):  # each another shape
        generate(untied, [prompt], replace(SOME, temperature=float(temperature), seed=0), recorded)
    assert len(recorded.passes) == 4  # the last used ones
    recorded.claim(untied, 1, 100_000)
    assert recorded.cache.k.shape[1] == 2  # not also five rows


# --- Devices ---


@pytest.mark.parametrize("transposed", [False, True])  # CUDA's kernels return one layout or another
def test_groups_of_heads_equal_repeated_keys(device, monkeypatch, transposed, rng):
    kernel = torch.nn.functional.scaled_dot_product_attention
    turned = lambda *given, **how: kernel(*given, **how).transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", turned if transposed else kernel)
    q, k, v = (torch.randn(2, heads, 5, 16, generator=rng).to(device) for heads in (6, 2, 2))
    seen = torch.rand(2, 5, 5, generator=rng) < 0.7
    seen[..., 0] = True
    one, three = (fastdllm.attention_bias(seen.to(device), groups, q.dtype) for groups in (1, 3))
    repeated = [x.repeat_interleave(3, 1) for x in (k, v)]
    for bias, grouped_bias in (None, None), (one, three):
        whole = fastdllm.grouped_attention(q, *repeated, bias)
        found = fastdllm.grouped_attention(q, k, v, grouped_bias)
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_cuda_logits_are_those_of_the_cpu(folders, device, dtype):
    tokens, outputs = torch.arange(48)[None], []
    for where, precision in ("cpu", "float32"), (device, dtype):
        model, _ = load(folders["untied"], where, precision)
        cache = KVCache(model.config, 1, 48, model.weight)
        outputs.append(model.logits(run_window(model, tokens.to(where), [0], cache, 8)).float().cpu())
    near = 1e-3 if dtype == "float32" else 0.05 * outputs[0].abs().max().item()
    assert (outputs[0] - outputs[1]).abs().max().item() < near
