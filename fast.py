"""What changes speed and never the method: packed weights, recorded passes, training attention, int8.

    model = prepack(load(folder)[0])                           # CPUs: weights in oneDNN's order
    generate(model, prompts, decoding, RecordedPasses(model))  # CUDA: a pass is one launch

`fastdllm.py` never imports this file. Shapes as there.
"""

import math
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fastdllm import (
    Decoding,
    KVCache,
    Linear,
    Qwen2,
    Window,
    best_guesses,
    causal_attention,
    layout,
    require,
    round_up,
    window_pass,
)

# --- Prepacked weights ---


class PrepackedLinear(Linear):
    """A linear layer for inference on a CPU, with its weight in the order in which oneDNN's products read it.

    Otherwise oneDNN reorders the weight in every product, or uses a slower kernel. A weight below
    SMALL_WEIGHT numbers fits in a core's cache. Its plain product is faster below FEW_ROWS rows of x, so it
    is kept in both orders.
    """

    SMALL_WEIGHT, FEW_ROWS = 2**18, 16

    def __init__(self, linear: Linear):
        nn.Module.__init__(self)
        weight = linear.weight.detach()
        self.plain = weight if weight.numel() < self.SMALL_WEIGHT else None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, self.FEW_ROWS)
        self.bias = linear.bias
        # the class attribute would hide a registered module, and the adapter is no part of the state dict
        object.__setattr__(self, "adapter", linear.adapter)

    def product(self, x: Tensor) -> Tensor:
        if self.plain is not None and x.numel() < self.FEW_ROWS * x.shape[-1]:
            return F.linear(x, self.plain, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def prepack(model: Qwen2) -> Qwen2:
    """The model, in place, ready to decode faster on a CPU: its linear layers as `PrepackedLinear`.

    A tied head takes memory of its own, since the embedding keeps the plain order. The model can no longer be
    trained, saved, copied, moved, or run under autocast. In float32 sums run in another order; in bfloat16
    every product that was compared was the same to the bit. Where oneDNN or the dtype is missing, or on
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
            setattr(parent, name, PrepackedLinear(getattr(parent, name)))  # and the plain weight is let go
    model.prepacked = True
    return model.requires_grad_(False)


# --- Recorded passes ---


def avoid_cudnn_attention() -> None:
    """Take cuDNN out of torch's choice of attention kernels, for the whole process.

    On an H100 torch prefers cuDNN, which by its users' reports takes 55 ms to 1 s to plan each new shape.
    Without recorded passes the number of keys grows with every block, so `chat` and prefills keep meeting new
    shapes. The setting is global, so only programs call this, not libraries.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


class Recorded(NamedTuple):
    """A pass as it is kept: tensors to fill before it runs, what runs it, and where its guesses appear."""

    numbers: Tensor  # tokens, starts, cache rows, wanted outputs, causal ends, concatenated
    draws: Tensor
    replay: Callable[[], Tensor]


class RecordedPasses:
    """Passes of static shape, recorded as CUDA graphs. A replay costs the host one copy and one launch.

    Make one object per model and thread, and pass it to `decode` or `generate`. It keeps the cache and the
    graphs from call to call, and serves one decoding at a time.

    Why a replay is safe: a graph runs the same kernels on the same addresses. Everything that differs between
    two passes of a shape (tokens, positions, rows, wanted outputs, random numbers) is copied into input
    tensors that the graph owns; everything else that it reads, weights and cache, keeps its place for as long
    as the graph is kept. The cache is made here, and `claim` drops all graphs when it makes a new one.
    Weights must not be moved or replaced after the first recording; then make a new object.

    A shape is the number of rows (a power of 2), the window's width, and the number of slots read (a power of
    2 times READ_STEP). Padding rows write to a spare cache row that no prompt uses. With record=False the
    passes run as they are, on any device, so that their arithmetic can be tested.
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
            # room for both, or they would drop each other's graphs; but at most twice the larger one
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
        starts: list[int],
        outputs: list[int],
        draws: Tensor,
        decoding: Decoding,
        has_masks: bool,
        causal: list[int] | None,
    ) -> Tensor:
        """What `best_guesses` gives for `outputs`, indices into the flattened (B, T) of this pass."""
        B, T = 1 << (len(places) - 1).bit_length(), tokens.shape[1]  # rows, padded to a power of 2
        N = B * (T if decoding.verify else min(T, decoding.sub_block_size))  # no pass guesses more
        spare, pad = self.cache.k.shape[1] - 1, B - len(places)
        in_order = places == list(range(B))
        seen = self.slots_for(round_up(max(starts) + T, decoding.block_size))
        numbers = [*starts, *[0] * pad, *places, *[spare] * pad, *outputs, *[0] * (N - len(outputs))]
        numbers += [*causal, *[0] * pad] if causal else []
        numbers = torch.cat([F.pad(tokens.flatten(), (0, pad * T)), torch.tensor(numbers)])
        if decoding.temperature:
            draws = F.pad(draws, (0, N - len(draws)))
        options = decoding.block_size, decoding.temperature, decoding.top_p, decoding.runner_up
        options += (decoding.verify, decoding.draft_width)
        key = (B, T, N, len(numbers), seen, in_order, has_masks, *options)
        recorded = self.passes.pop(key, None)
        if recorded is None:
            while len(self.passes) >= self.MOST_GRAPHS:
                del self.passes[next(iter(self.passes))]
            recorded = self.prepare(numbers, draws, B, T, N, seen, in_order, decoding, has_masks)
        self.passes[key] = recorded  # now the last used one
        recorded.numbers.copy_(numbers, non_blocking=True)
        recorded.draws.copy_(draws, non_blocking=True)
        return recorded.replay()[: len(outputs)]

    def prepare(self, numbers, draws, B, T, N, seen, in_order, decoding, has_masks) -> Recorded:
        """Inputs on the device, and what runs a pass over them; numbers and draws as in `Recorded`."""
        model, cache, device = self.model, self.cache, self.model.weight.device
        inputs = numbers.to(device, copy=True), draws.to(device, copy=True)

        def run() -> Tensor:
            sizes = [B * T, B, B, N]
            tokens, starts, rows, outputs, ends = inputs[0].split([*sizes, len(numbers) - sum(sizes)])
            tokens, starts, size = tokens.view(B, T), starts[:, None], decoding.block_size
            ends = ends[:, None] if len(ends) else None  # of the causal queries
            one_block = T < size or T == size and ends is None  # a commit may be one causal block
            drafts = decoding.draft_width if decoding.verify and has_masks else None
            mask_id = model.config.mask_token_id
            slots, positions, mask = layout(tokens, starts, seen, size, one_block, mask_id, drafts, ends)
            read = slice(B) if in_order else rows
            window = Window(positions, (rows[:, None], slots), (read, slice(seen)), mask)
            hidden = window_pass(model, cache, tokens, window, has_masks)
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


# --- Training attention ---
# What `train.visibility` says, computed block by block, or by sparse tiles; the dense mask is in train.py.


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`grouped_attention` in plain products, with a bool mask (B or 1, T, S); backward it is fast on CPUs."""
    B, H, T, d = q.shape
    K = k.shape[1]  # query heads of one key head are more rows of the same product
    scores = ((q * d**-0.5).reshape(B, K, -1, d) @ k.transpose(2, 3)).float()
    if mask is not None:
        unseen = ~mask[:, None, None]
        scores = scores.view(B, K, -1, *mask.shape[1:]).masked_fill(unseen, -torch.inf).view_as(scores)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).reshape(B, H, T, d)


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clean_mask: Tensor | None,
    noisy_mask: Tensor | None,
    length: int,
    block_size: int,
    views: int,
) -> Tensor:
    """`train.training_mask` applied block by block, so that few queries meet a key that they cannot see.

    clean_mask (B or 1, L, L): what a clean query sees of the clean copy. noisy_mask: the same of a noisy
    query, where its own block is its view's. None: blocks alone decide. With n blocks this is about
    (n + 1) / (2 n) / (views + 1) of the dense mask's work.
    """
    into_rows = lambda x: x[:, :, :-length].unflatten(2, (views, length)).transpose(1, 2).flatten(0, 1)
    # (B * views, heads, L, d)
    noisy_q, noisy_k, noisy_v = (into_rows(x) if views else None for x in (q, k, v))
    clean_q, clean_k, clean_v = (x[:, :, -length:] for x in (q, k, v))
    noisy, clean = [], []
    for start in range(0, length, block_size):
        own, end = slice(start, start + block_size), start + block_size
        mask = None if clean_mask is None else clean_mask[:, own, :end]
        clean.append(plain_attention(clean_q[:, :, own], clean_k[:, :, :end], clean_v[:, :, :end], mask))
        if views:
            earlier_k, earlier_v = (
                x[:, :, :start].repeat_interleave(views, dim=0) for x in (clean_k, clean_v)
            )
            keys = torch.cat([earlier_k, noisy_k[:, :, own]], dim=2)
            values = torch.cat([earlier_v, noisy_v[:, :, own]], dim=2)
            mask = None if noisy_mask is None else noisy_mask[:, own, :end]
            if mask is not None and len(mask) > 1:
                mask = mask.repeat_interleave(views, dim=0)
            noisy.append(plain_attention(noisy_q[:, :, own], keys, values, mask))
    if views:
        noisy = [torch.cat(noisy, dim=2).unflatten(0, (-1, views)).transpose(1, 2).flatten(2, 3)]
    return torch.cat(noisy + clean, dim=2)


@cache
def compiled_flex() -> Callable:
    """One kernel per shape; gradients or none, views, and kinds of loss make a dozen shapes."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_mask) -> Tensor:
    """FlexAttention: tiles of the mask in which nothing is seen are skipped."""
    kernel = compiled_flex() if q.is_cuda else flex_attention  # not compiled it is a dense reference
    return kernel(q.to(v.dtype), k.to(v.dtype), v, block_mask=block_mask, enable_gqa=True)


def sparse_mask(sees: Callable, rows: int | None, side: int, device: torch.device) -> BlockMask:
    """FlexAttention's form of `sees(row, head, query, key)`: which tiles are seen in part, which whole.

    rows: None where all rows share it. Memory holds 128 queries at a time; torch's own function writes out
    the mask of all queries and keys.
    """
    tile, index = 128, torch.arange(side, device=device)
    row = None if rows is None else torch.arange(rows, device=device)[:, None, None]
    tiles, some, every = math.ceil(side / tile), [], []
    for queries in index.split(tile):
        seen = sees(row, None, queries[:, None], index).view(-1, len(queries), side)
        seen = F.pad(seen, (0, tiles * tile - side, 0, tile - len(queries))).unflatten(2, (tiles, tile))
        some.append(seen.any(3).any(1))
        every.append(seen.all(3).all(1))
    some, every = (torch.stack(parts, dim=1)[:, None] for parts in (some, every))  # (B or 1, 1, tiles, tiles)
    order = partial(torch.argsort, descending=True, stable=True)  # those that are seen come first
    listed = lambda which: (which.sum(-1, dtype=torch.int32), order(which.int()).int())
    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=tile, mask_mod=sees, seq_lengths=(side, side)
    )


# --- Int8 training ---
# Where only an adapter trains, products with frozen weights may be rounded, and so may the gradients that
# pass through them: many CPUs multiply int8 several times as fast as float32 or bfloat16. Scales are per
# position and per channel. The adapter's own products stay exact, and so do passes over known tokens.
# Held-out figures of such a training come from int8 products too.


def int8_is_fast() -> bool:
    """Whether this CPU multiplies int8 in hardware (VNNI); without it int8 products are a plain loop.

    Measured on 320 rows and one core: 710 GFLOP/s with VNNI, where float32 has 165; without it 3, where
    float32 has 70 to 85.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch cannot tell
    return bool(capabilities.get("avx512_vnni"))


def to_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, K) as int8 levels, and each row's scale (N, 1): x is about levels * scale."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    levels = (x * (1 / scale)).round().clamp(-127, 127)  # in bfloat16 the largest may round to 128
    return levels.to(torch.int8), scale


# compiling needs a compiler and Python's headers; else they run as they are, several times as slow
can_compile = shutil.which("g++") and (Path(sysconfig.get_path("include")) / "Python.h").exists()
fused = partial(torch.compile, dynamic=True) if can_compile else lambda f: f
to_levels_fast = fused(to_levels)


@fused
def balanced_levels(x: Tensor, balance: Tensor) -> tuple[Tensor, Tensor]:
    return to_levels(x * balance)


@fused
def from_levels(y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return y.float() * rows * columns


class Int8Product(torch.autograd.Function):
    """x W^T in int8, and in its backward pass dy W; W has no gradient."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        levels, scale = balanced_levels(x.flatten(0, -2), linear.balance)
        y = from_levels(torch._int_mm(levels, linear.levels.t()), scale, linear.scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        linear = ctx.linear
        levels, scale = to_levels_fast(dy.flatten(0, -2))
        dx = from_levels(torch._int_mm(levels, linear.back_levels.t()), scale, linear.back_scale)
        return dx.to(dy.dtype).view(*dy.shape[:-1], -1), None


class Int8Linear(Linear):
    """A frozen linear layer. Its product is int8 in passes with an adapter, and exact in other passes."""

    def __init__(self, linear: Linear, largest: Tensor):
        """largest (K): each channel's largest share of its position's largest |input|.

        Channels of large inputs are shrunk and their weights grow, so that both round well (SmoothQuant).
        """
        nn.Module.__init__(self)
        self.weight, self.bias = linear.weight, linear.bias
        object.__setattr__(self, "adapter", linear.adapter)  # no part of the model's state
        weight = linear.weight.detach().float()
        root = (largest.clamp_min(1e-5) / weight.abs().amax(dim=0).clamp_min(1e-5)).sqrt()
        self.balance = 1 / root
        self.levels, scale = to_levels(weight * root)
        self.back_levels, back_scale = to_levels(weight.t().contiguous())
        self.scale, self.back_scale = scale.flatten(), back_scale.flatten()

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        if masked is None:
            return F.linear(x, self.weight, self.bias)
        y = Int8Product.apply(x, self)
        y = y if self.bias is None else y + self.bias
        return y + self.adapter(x, masked)


@torch.no_grad()
def to_int8(model: Qwen2, documents: list[Tensor]) -> None:
    """Make the layers of a frozen model `Int8Linear`, in place; documents (T) show what inputs they get."""
    largest = {}

    def look(layer, inputs):
        x = inputs[0].flatten(0, -2)
        now = (x / x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12)).abs().amax(dim=0)
        largest[layer] = torch.maximum(largest.get(layer, now), now)

    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, Linear)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    for tokens in documents:
        model(tokens[None], torch.arange(len(tokens))[None], causal_attention)
    for hook in hooks:
        hook.remove()
    for parent in list(model.model.layers.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                setattr(parent, name, Int8Linear(child, largest[child]))
