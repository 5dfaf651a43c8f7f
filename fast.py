"""What changes speed and never the method: prepacked weights for CPUs, recorded passes for CUDA.

    model = prepack(load(folder)[0])                           # CPUs: weights in oneDNN's order
    recorded = RecordedPasses(model)                           # CUDA: a pass is one launch; made once
    generate(model, prompts, decoding, recorded)

`fastdllm.py` never imports this file. Shapes as there.
"""

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdllm import PADDING, Decoding, KVCache, Qwen2, best_guesses, require, window_pass

# --- Prepacked weights ---


class PrepackedLinear(nn.Module):
    """A linear layer for inference on a CPU, with its weight in the order in which oneDNN's products read it.

    Otherwise oneDNN reorders the weight in every product, or uses a slower kernel. A weight below
    SMALL_WEIGHT numbers fits in a core's cache. Its plain product is faster below FEW_ROWS rows of x, so it
    is kept in both orders.
    """

    SMALL_WEIGHT, FEW_ROWS = 2**18, 16

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.plain = weight if weight.numel() < self.SMALL_WEIGHT else None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, self.FEW_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.plain is not None and x.numel() < self.FEW_ROWS * x.shape[-1]:
            return F.linear(x, self.plain, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def prepack(model: Qwen2) -> Qwen2:
    """The model, in place, ready to decode faster on a CPU: its linear layers as `PrepackedLinear`.

    A tied head takes memory of its own, since the embedding keeps the plain order. The model can no longer be
    trained, saved, copied, moved, or run under autocast. In float32 sums run in another order than in the
    plain layer; in bfloat16 every product that was compared had the plain layer's bits. Where oneDNN or the
    dtype is missing, or on another device, the model comes back unchanged.
    """
    if model.weight.device.type != "cpu":
        return model
    try:
        trial = PrepackedLinear(nn.Linear(64, 64, dtype=model.weight.dtype))
        trial(model.weight.new_zeros(PrepackedLinear.FEW_ROWS, 64))
    except (AttributeError, RuntimeError):
        return model
    # names, not layers, are listed, so that each plain weight is let go before the next one is packed
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name in [name for name, child in parent.named_children() if isinstance(child, nn.Linear)]:
            setattr(parent, name, PrepackedLinear(getattr(parent, name)))
    return model.requires_grad_(False)


# --- Recorded passes ---


def avoid_cudnn_attention() -> None:
    """Take cuDNN out of torch's choice of attention kernels, for the whole process.

    On an H100 torch prefers cuDNN, which by its users' reports takes 55 ms to 1 s to plan each new shape.
    Without recorded passes the number of keys grows with every block, so `chat` and prefills keep meeting new
    shapes. The setting is global, so only programs call this, not libraries.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


RECORDING = threading.Lock()  # CUDA lets a process record one graph at a time


class Recorded(NamedTuple):
    """A pass as it is kept: tensors to fill before it runs, what runs it, and where its guesses appear."""

    numbers: Tensor  # tokens, what they see, starts, cache rows, wanted outputs, concatenated
    draws: Tensor
    replay: Callable[[], Tensor]


class RecordedPasses:
    """Passes of static shape, recorded as CUDA graphs. A replay costs the host a copy or two and one launch.

    Make one object per model and thread, and pass it to `decode` or `generate`. It keeps the cache and the
    graphs from call to call, and serves one decoding at a time.

    Why a replay is safe: a graph runs the same kernels on the same addresses. Everything that differs between
    two passes of a shape (tokens, positions, rows, wanted outputs, random numbers) is copied into input
    tensors that the graph owns; everything else that it reads, weights and cache, keeps its place for as long
    as the graph is kept. The cache is made here, and `claim` drops all graphs when it makes a new one. All
    graphs share one pool of memory, so a replay overwrites what earlier ones left there, the last pass's
    output too; `fastdllm.run_steps` has read it by then. Weights must not be moved or replaced after the
    first recording; then make a new object.

    A shape is the number of rows (a power of 2), the window's width, and the number of slots read (a power of
    2 times READ_STEP). What is frozen into a graph besides (whether there are masks, the decoder,
    temperature, top-p, top-k) is part of the key under which it is kept. Padding rows write to a spare cache
    row that no prompt uses. With record=False the passes run as they are, on any device, so that their
    arithmetic can be tested.
    """

    READ_STEP = 256  # slots
    MOST_GRAPHS = 256  # the last used ones are kept

    def __init__(self, model: Qwen2, record: bool = True):
        self.model, self.record, self.in_use = model, record, False
        self.cache, self.passes, self.pool, self.stream = None, {}, None, None

    def claim(self, model: Qwen2, rows: int, length: int) -> KVCache:
        """A cache for so many rows and positions, until `release`.

        Raises InputError where it is in use, or made for another model.
        """
        another = "These recorded passes belong to another model; make new ones for this one."
        require(model is self.model, another)
        require(not self.in_use, "Recorded passes serve one decoding at a time; make one object per thread.")
        wanted = rows + 1, self.slots_for(length)
        there = tuple(self.cache.k.shape[1:3]) if self.cache else (0, 0)
        both = tuple(map(max, wanted, there))
        if both != there:
            # room for this call and earlier ones, so that calls in turn keep their graphs; but at most twice
            # the larger
            far_more = math.prod(both) > 2 * max(math.prod(wanted), math.prod(there))
            size = wanted if far_more else both
            self.passes = {}
            self.cache = self.pool = None  # free the old cache before the new one is made
            self.cache = KVCache(model.config, *size, model.weight)
            self.cache.clear(size[0] - 1)
        self.in_use = True
        return self.cache

    def slots_for(self, positions: int) -> int:
        """The smallest power of 2 times READ_STEP that is at least `positions`."""
        return self.READ_STEP << ((positions - 1) // self.READ_STEP).bit_length()

    def release(self) -> None:
        self.in_use = False

    def run(
        self,
        places: list[int],
        tokens: Tensor,
        sees: Tensor,
        starts: list[int],
        seen: int,
        outputs: list[int],
        draws: Tensor,
        decoding: Decoding,
        has_masks: bool,
    ) -> Tensor:
        """What `best_guesses` gives for `outputs`, indices into the flattened (B, T) of this pass.

        Arguments as in `fastdllm.run_steps`: row i lies at `places[i]` of the cache; tokens (B, T), sees
        (B, T, 4) and draws are on the CPU; the first `seen` slots are read.
        """
        B, T = 1 << (len(places) - 1).bit_length(), tokens.shape[1]  # rows, padded to a power of 2
        N = B * decoding.most_guesses(T)
        spare, pad = self.cache.k.shape[1] - 1, B - len(places)
        in_order, seen = places == list(range(B)), self.slots_for(seen)
        sees = torch.cat([sees.flatten(), torch.tensor(PADDING * (pad * T), dtype=torch.long)])
        rest = [*starts, *[0] * pad, *places, *[spare] * pad, *outputs, *[0] * (N - len(outputs))]
        # in the order in which `prepare` splits them
        numbers = torch.cat([F.pad(tokens.flatten(), (0, pad * T)), sees, torch.tensor(rest)])
        if decoding.temperature:
            draws = F.pad(draws, (0, N - len(draws)))
        shape = B, T, N, seen, in_order
        key = shape, has_masks, type(decoding), decoding.temperature, decoding.top_p, decoding.top_k
        recorded = self.passes.pop(key, None)
        if recorded is None:
            while len(self.passes) >= self.MOST_GRAPHS:
                del self.passes[next(iter(self.passes))]
            recorded = self.prepare(numbers, draws, shape, decoding, has_masks)
        self.passes[key] = recorded  # now the last used one
        recorded.numbers.copy_(numbers, non_blocking=True)
        recorded.draws.copy_(draws, non_blocking=True)
        return recorded.replay()[: len(outputs)]

    def prepare(
        self, numbers: Tensor, draws: Tensor, shape: tuple, decoding: Decoding, has_masks: bool
    ) -> Recorded:
        """Inputs on the device, and what runs a pass over them; numbers and draws as in `Recorded`."""
        model, cache, device = self.model, self.cache, self.model.weight.device
        inputs = numbers.to(device, copy=True), draws.to(device, copy=True)
        B, T, N, seen, in_order = shape

        def run() -> Tensor:
            tokens, sees, starts, rows, outputs = inputs[0].split([B * T, B * T * 4, B, B, N])
            slots = starts[:, None] + torch.arange(T, device=device)
            write, read = (rows[:, None], slots), (slice(B) if in_order else rows, slice(0, seen))
            tokens, sees = tokens.view(B, T), sees.view(B, T, 4)
            hidden = window_pass(model, cache, tokens, sees, write, read, decoding, has_masks)
            return best_guesses(model, hidden.flatten(0, 1)[outputs], inputs[1], decoding)

        return Recorded(*inputs, self.capture(run, device) if self.record else run)

    def capture(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        """Record `run` as a CUDA graph; the replay returns the same output tensor each time, filled anew.

        "thread_local" lets other threads allocate memory meanwhile.
        """
        with RECORDING, torch.cuda.device(device):
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # a recording needs kernels that have run before
                for _ in range(2):
                    run()  # it writes what the replay writes again
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                found = run()
        self.pool = self.pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay
