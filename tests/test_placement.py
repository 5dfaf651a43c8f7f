"""Passes and training steps keep to the model's device: what CUDA would refuse or wait for is refused here.

The `meta` device computes shapes alone, and the code takes CUDA's branches on it. No value can be read from it.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from windows import prompt_of

import train
from fast import RecordedPasses
from fastdllm import Config, Decoding, Qwen2, generate
from training.attention import plain_attention
from training.data import Corpus
from training.drafts import Drafting, Drafts, new_adapter
from verify import Verified, add_adapter

COPIES = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class OneDevice(TorchDispatchMode):
    """Raises where an operation sees tensors of two devices. Copies may, and numbers, which have no dimension.

    recorded: as in a CUDA graph, nothing may come from the CPU either.
    """

    def __init__(self, recorded: bool = False):
        super().__init__()
        self.recorded = recorded

    def __torch_dispatch__(self, function, types, args=(), named=None):
        devices = devices_of((args, named))
        assert len(devices) < 2 or function in COPIES and not self.recorded, f"{function} sees {devices}"
        found = function(*args, **(named or {}))
        from_cpu = self.recorded and "cpu" in devices | devices_of(found)
        assert not from_cpu, f"{function} has a tensor of the CPU in a recording"
        return found


def devices_of(values) -> set[str]:
    return {x.device.type for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.dim()}


class Reads(TorchFunctionMode):
    """Counts the values that are read from the meta device, and makes them up: method -> what it gives."""

    def __init__(self, **made_up):
        super().__init__()
        self.made_up, self.count = made_up, 0

    def __torch_function__(self, function, types, args=(), named=None):
        name = function.__name__
        if name in self.made_up and args[0].is_meta:
            self.count += 1
            return self.made_up[name](args[0])
        return function(*args, **(named or {}))


class NoLists(TorchFunctionMode):
    """Raises where a list becomes a tensor, or a tensor a list: either waits for a copy."""

    def __torch_function__(self, function, types, args=(), named=None):
        lists = torch.tensor, torch.as_tensor, torch.Tensor.tolist
        assert function not in lists, f"{function.__name__} in a recording"
        return function(*args, **(named or {}))


@pytest.fixture
def model() -> Qwen2:
    with torch.device("meta"):
        return Qwen2(Config(64, 32, 48, 1, 4, 2, 8, 1024, block_size=8, mask_token_id=63, tokenizer_size=62))


# --- Decoding ---

KINDS = {
    Decoding(1): {"prefill", "commit"},
    Decoding(8, 4, cache="none"): {"prefill", "full", "commit"},
    Decoding(8, 4): {"prefill", "full", "commit"},
    Decoding(8, 2, cache="dual"): {"prefill", "refresh", "sub", "commit"},
    Verified(draft_width=3): {"prefill", "draft", "verify"},
    Verified(draft_width=3, draft_ahead=True): {"prefill", "draft", "verify"},
}


@pytest.mark.parametrize("record", [False, True])
def test_a_pass_keeps_to_one_device_and_a_recording_waits_for_nothing(model, monkeypatch, record):
    rng = random.Random(0)

    def guesses(table: torch.Tensor) -> list[list[float]]:
        assert table.shape[1:] == (2,)
        return [[rng.randrange(2), rng.random()] for _ in range(len(table))]  # so drafts are often right

    def capture(passes, run, device):
        def replay():
            with OneDevice(recorded=True), NoLists():
                return run()

        return replay

    monkeypatch.setattr(RecordedPasses, "capture", capture)
    add_adapter(model, 2, 4.0)
    prompts = [prompt_of(rng, length, 60) for length in (5, 520)]  # 520: a prefill in two pieces
    for number, (decoding, kinds) in enumerate(KINDS.items()):
        temperature = 0.7 * ((number + record) % 2)
        more = {"max_new_tokens": 6, "temperature": temperature, "top_p": 0.9, "top_k": 5}
        with OneDevice(), Reads(tolist=guesses):
            recorded = RecordedPasses(model) if record else None
            results = generate(model, prompts, replace(decoding, **more), recorded)
        assert [len(result.tokens) for result in results] == [6, 6]
        assert set().union(*(result.passes for result in results)) == kinds


# --- Training ---


def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    return Corpus(rng.integers(0, 60, 240).astype(np.uint16), np.arange(240) % 30 > 5, np.arange(9) * 30)


def reference_of_flex(q, k, v, tiles):
    """FlexAttention refuses the meta device: a dense product with the mask that its tiles were made of."""
    index = torch.arange(q.shape[2], device=q.device)
    seen = tiles.mask_mod(index[: len(q), None, None], None, index[:, None], index)
    assert devices_of([tiles.kv_indices, tiles.full_kv_indices]) == {"meta"}
    return plain_attention(q, k, v, seen.view(-1, *seen.shape[-2:]))


@pytest.mark.parametrize("attention", ["dense", "blockwise", "sparse"])
def test_a_training_step_keeps_to_one_device_and_waits_once(model, monkeypatch, attention):
    monkeypatch.setattr(train, "sparse_attention", reference_of_flex)
    monkeypatch.setattr(train, "fast_attention", lambda device: attention)
    for micro_batch, recompute, packing in (2, False, "documents"), (1, True, "original"):
        given = {"micro_batch": micro_batch, "recompute": recompute, "packing": packing}
        # float32, since autocast knows no meta device
        settings = train.Training(compute="float32", seq_len=32, batch_size=2, eval_rows=2, **given)
        job = train.Adaptation(model, {"diffusion": 1.0, "ar": 0.5}, corpus(), corpus(), settings)
        rows = [row for row, _ in zip(job.rows(), range(2))]
        with OneDevice(), Reads(__float__=lambda x: 1.0) as reads:
            job.step(rows, 0, lambda rows: None)
            assert reads.count == 2  # the losses, at the end
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            job.evaluate()
        assert all(p.grad is not None for p in model.parameters())


def test_a_step_of_drafts_keeps_to_one_device(model):
    new_adapter(model, 2, 3, seed=0)
    settings = Drafting(batch_size=4, anchors=2, width=3, eval_rows=2)
    job = Drafts(model, corpus(), corpus(), settings)
    rows = [row for row, _ in zip(job.rows(), range(4))]
    with OneDevice(), Reads(__float__=lambda x: 1.0, __int__=lambda x: 2):
        job.step(rows, 0, lambda rows: None)
        job.evaluate()
    assert all(p.grad is not None for p in job.trained.values())
