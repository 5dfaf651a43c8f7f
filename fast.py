"""What changes speed and never the method: prepacked weights, recorded passes, and training attention.

    model = prepack(load(folder)[0])                            # CPUs: weights in the order that products read
    generate(model, prompts, decoding, RecordedPasses(model))   # CUDA: a pass is one launch

`fastdllm.py` never imports this file. Shapes as there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdllm import (
    Decoding,
    KVCache,
    Linear,
    Qwen2,
    best_guesses,
    looks_from,
    require,
    round_up,
    window_pass,
)

# --- Prepacked weights ---


class PrepackedLinear(Linear):
    """A linear layer for inference on a CPU, with its weight in the order in which oneDNN's products read it.

    A plain weight is brought into that order anew in every product, or read in a slower one. A weight of fewer
    numbers than SMALL_WEIGHT stays in a core's cache, where a product of fewer rows than FEW_ROWS is faster plain:
    such a weight is kept in both orders.
    """

    SMALL_WEIGHT, FEW_ROWS = 2**18, 16

    def __init__(self, linear: Linear, tied: bool = False):
        """With `tied` the weight keeps its order, since the embedding needs it so; only the product is oneDNN's."""
        nn.Module.__init__(self)
        weight = linear.weight.detach()
        self.plain = weight if weight.numel() < self.SMALL_WEIGHT else None
        self.packed = weight if tied else torch.ops.mkldnn._reorder_linear_weight(weight, self.FEW_ROWS)
        self.bias, self.adapter = linear.bias, linear.adapter

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        if self.plain is not None and x.numel() < self.FEW_ROWS * x.shape[-1]:
            y = F.linear(x, self.plain, self.bias)
        else:
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y if masked is None or self.adapter is None else y + masked * self.adapter(x)


def prepack(model: Qwen2) -> Qwen2:
    """The model, in place, ready to decode faster on a CPU: its linear layers as `PrepackedLinear`.

    It can no longer be trained, saved, copied, moved, or run under autocast. In float32 sums run in another order; in
    bfloat16 every product that was compared was the same to the bit. Where oneDNN or the dtype is missing, or on
    another device, the model comes back unchanged.
    """
    if model.weight.device.type != "cpu" or model.prepacked:
        return model
    try:
        trial = PrepackedLinear(model.model.layers[0].self_attn.k_proj)
        trial(model.weight.new_zeros(PrepackedLinear.FEW_ROWS, model.config.hidden_size))
    except (AttributeError, RuntimeError):
        return model
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name in [name for name, child in parent.named_children() if isinstance(child, Linear)]:
            tied = parent is model and model.config.tie_word_embeddings
            setattr(
                parent, name, PrepackedLinear(getattr(parent, name), tied)
            )  # and the plain weight is let go
    model.prepacked = True
    return model.requires_grad_(False)


# --- Recorded passes ---


class Recorded(NamedTuple):
    """A pass as it is kept: tensors to fill before it runs, what runs it, and where its guesses appear."""

    numbers: Tensor  # token ids, starts, cache rows and wanted outputs, one after the other
    draws: Tensor
    replay: Callable[[], Tensor]


class RecordedPasses:
    """Passes of static shape, recorded as CUDA graphs and replayed: to the host a pass is a copy and a launch.

    Make one per model and pass it to `decode` or `generate`; it keeps the cache and the graphs from call to call. It
    serves one decoding at a time, so a service makes one per thread.

    Why a replay is safe: a graph runs the same kernels on the same addresses. Everything that differs between two
    passes of a shape (tokens, positions, rows, wanted outputs, random numbers) is copied into input tensors that the
    graph owns; everything else that it reads, weights and cache, keeps its place for as long as the graph is kept. The
    cache is made here, and `claim` drops all graphs when it makes a new one. Weights must not be moved or replaced
    after the first recording; then make a new object.

    A shape is the number of rows (a power of 2), the window's width, and the number of slots read (a power of 2 times
    READ_STEP). Padding rows write to a spare cache row that no prompt uses. With record=False the passes run as they
    are, on any device, so that their arithmetic can be tested.
    """

    READ_STEP = 256  # slots
    MOST_GRAPHS = 256  # the last used ones are kept

    def __init__(self, model: Qwen2, record: bool = True):
        self.model, self.record, self.in_use = model, record, False
        self.cache, self.passes, self.pool, self.stream = None, {}, None, None

    def claim(self, model: Qwen2, rows: int, length: int) -> KVCache:
        """A cache for so many rows and positions, until `release`. Raises InputError where it is in use."""
        require(
            model is self.model, "These recorded passes belong to another model; make new ones for this one."
        )
        require(not self.in_use, "Recorded passes serve one decoding at a time; make one object per thread.")
        powers = lambda n: self.READ_STEP << max(0, (n - 1) // self.READ_STEP).bit_length()
        wanted, there = (rows + 1, powers(length)), (0, 0)
        if self.cache is not None:
            there = tuple(self.cache.k.shape[1:3])
        if there[0] < wanted[0] or there[1] < wanted[1]:
            # room for both, so that unlike requests do not drop each other's graphs, unless that is far more
            both = max(wanted[0], there[0]), max(wanted[1], there[1])
            far_more = both[0] * both[1] > 2 * max(wanted[0] * wanted[1], there[0] * there[1])
            size = wanted if far_more else both
            self.passes, self.pool, self.cache = (
                {},
                None,
                None,
            )  # free the old cache before the new one is made
            self.cache = KVCache(model.config, *size, model.weight)
            self.cache.clear(size[0] - 1)
        self.in_use = True
        return self.cache

    def release(self) -> None:
        self.in_use = False

    def run(
        self,
        cache: KVCache,
        slots: list[int],
        tokens: Tensor,
        starts: list[int],
        outputs: list[int],
        draws: Tensor,
        decoding: Decoding,
        has_masks: bool,
    ) -> Tensor:
        """What `best_guesses` gives for `outputs`, places in the flattened (B, T) of this pass."""
        B, T = 1 << (len(slots) - 1).bit_length(), tokens.shape[1]
        N = B * (T if decoding.verify else min(T, decoding.sub_block_size))  # no pass guesses more
        spare, more = cache.k.shape[1] - 1, B - len(slots)
        first_rows = slots == list(range(B))
        seen = round_up(round_up(max(starts) + T, decoding.block_size), self.READ_STEP)
        seen = min(self.READ_STEP << (seen // self.READ_STEP - 1).bit_length(), cache.k.shape[2])
        numbers = [*tokens.flatten().tolist(), *[0] * (more * T), *starts, *[0] * more]
        numbers += [*slots, *[spare] * more, *outputs, *[0] * (N - len(outputs))]
        if decoding.temperature:
            draws = F.pad(draws, (0, N - len(draws)))
        options = decoding.block_size, decoding.temperature, decoding.top_p, decoding.runner_up
        key = (B, T, N, seen, first_rows, has_masks, *options)
        recorded = self.passes.pop(key, None)
        if recorded is None:
            while len(self.passes) >= self.MOST_GRAPHS:
                del self.passes[next(iter(self.passes))]
            recorded = self.prepare(cache, numbers, draws, B, T, N, seen, first_rows, decoding, has_masks)
        self.passes[key] = recorded  # now the last used one
        recorded.numbers.copy_(torch.tensor(numbers), non_blocking=True)
        recorded.draws.copy_(draws, non_blocking=True)
        return recorded.replay()[: len(outputs)]

    def prepare(self, cache, numbers, draws, B, T, N, seen, first_rows, decoding, has_masks) -> Recorded:
        model = self.model
        device = model.weight.device
        inputs = torch.tensor(numbers, device=device), draws.to(device)

        def run() -> Tensor:
            tokens, starts, rows, outputs = inputs[0].split([B * T, B, B, N])
            tokens, positions = tokens.view(B, T), starts[:, None] + torch.arange(T, device=device)
            mask_id = model.config.mask_token_id if has_masks else None
            queries = looks_from(tokens, positions, T <= decoding.block_size, mask_id)
            write, read = (rows[:, None], positions), (slice(B) if first_rows else rows, slice(seen))
            hidden = window_pass(
                model, cache, tokens, positions, write, read, queries, decoding.block_size, has_masks
            )
            return best_guesses(model, hidden.flatten(0, 1)[outputs], inputs[1], decoding)

        return Recorded(*inputs, self.capture(run, device) if self.record else run)

    def capture(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        """Record `run` as a CUDA graph; the replay returns the same output tensor each time, filled anew.

        A process may record one graph at a time. "thread_local" lets other threads allocate memory meanwhile.
        """
        with torch.cuda.device(device):
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
