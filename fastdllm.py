"""Fast-dLLM v2 (arXiv 2509.26328) in one file: a Qwen2 language model that writes several tokens per forward pass.

An autoregressive model, fine-tuned a little, becomes a block-diffusion model: text is written block by block, a block
starts as masks, each pass guesses all masked positions of a sub-block at once, and every guess above a confidence
threshold is kept. Finished blocks stay in a KV cache as in any autoregressive model. With block size 1 it *is* one.

    model, tokenizer = load("tiny/checkpoint")
    [result] = generate(model, [tokenizer.chat([{"role": "user", "content": "..."}])], Decoding(threshold=0.9))

Shapes: B rows of a batch, T positions of a window, S keys seen, D hidden size, H query heads, K key/value heads,
d head size, V vocabulary. Positions are absolute and start at 0; block k covers positions [k * size, (k + 1) * size).

The file needs torch, safetensors and tokenizers only, and works when copied alone.
"""

import json
import math
import operator
import os
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Encoder
from torch import Tensor, nn


class InputError(ValueError):
    """What the caller gave cannot work; the message is one sentence that says what is wrong and what would work."""


def require(ok: object, sentence: str) -> None:
    if not ok:
        raise InputError(sentence)


def round_up(n: int, size: int) -> int:
    """The first multiple of `size` that is not below `n`."""
    return -(-n // size) * size


# --- Config ---


@dataclass(frozen=True)
class Config:
    """Shape and special ids of a checkpoint, under the names of its `config.json` where it has them."""

    vocab_size: int  # rows of the embedding; the tokenizer may use fewer
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    block_size: int = 1  # `bd_size`: the diffusion block that was trained; 1 is a plain autoregressive Qwen2
    mask_token_id: int | None = None  # the id that stands for "not yet known"; an autoregressive model has none
    stop_token_ids: tuple[int, ...] = ()  # `eos_token_id`
    tokenizer_size: int | None = None  # ids from here on are padding rows of the embedding and are never guessed


# --- Mask ---


def block_causal_mask(queries: Tensor, keys: Tensor, block_size: int) -> Tensor:
    """May the query at position a see the key at position b? Where a // size >= b // size (paper, section 3).

    Bidirectional inside a block, causal between blocks; queries (..., T) and keys (S) give (..., T, S) bool.
    """
    return queries[..., None] // block_size >= keys // block_size


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Callable | None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v; q (B, H, T, d), k and v (B, K, S, d), key head h serves H / K query heads.

    mask: None, every query sees every key; bool, broadcast to (B, 1, T, S); or a function of q, k and v that attends
    in a way of its own, like CAUSAL.
    """
    if callable(mask):
        return mask(q, k, v)
    if causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    bias = None if mask is None else attention_bias(mask, q.shape[2], q.shape[1] // k.shape[1], q.dtype)
    return grouped_attention(q, k, v, bias)


def attention_bias(mask: Tensor, length: int, groups: int, dtype: torch.dtype) -> Tensor:
    """What `grouped_attention` adds for a bool mask, broadcast to (B, 1, T, S): (B or 1, 1, H / K * T, S)."""
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return bias.expand(torch.broadcast_shapes(mask.shape, (1, 1, length, 1))).repeat(1, 1, groups, 1)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """`attention` with the queries of a group as further rows of one product: they see the same keys, read once."""
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, K, H / K * T, d)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias).reshape(q.shape)


CAUSAL = partial(attention, mask=None, causal=True)  # block size 1 from position 0 on: the kernel knows this mask


# --- Cache ---


class KVCache:
    """Keys and values of every position of every row, allocated once and written in place.

    One slot a position: a slot holds what the last pass over its position wrote. Committed blocks (paper, section 4)
    are the slots that no later pass runs again; the sub-block cache (DualCache) is the slots of the block in work.
    """

    def __init__(self, config: Config, rows: int, length: int, like: Tensor):
        shape = config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)

    def update(self, layer: int, k: Tensor, v: Tensor, rows, positions, read) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, d) at rows (B, 1) and positions (B, T), tensors or both slices; the slots `read`, as
        (B, K, S, d)."""
        for cache, new in (self.k[layer], k), (self.v[layer], v):
            cache[rows, positions] = new.transpose(1, 2)
        return self.k[layer][read].transpose(1, 2), self.v[layer][read].transpose(1, 2)

    def clear(self, row: int, start: int = 0) -> None:
        """Empty a row from `start` on: slots that a mask hides are still read, so they must be finite."""
        self.k[:, row, start:] = self.v[:, row, start:] = 0

    def grow(self, length: int) -> None:
        """Make room for positions up to `length`; what is written stays."""
        if (more := length - self.k.shape[2]) > 0:
            self.k, self.v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.k, self.v))

    def move(self, source: int, target: int) -> None:
        """Copy a row over another one, so that the rows in use stay the first ones."""
        self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]


# --- Network ---
# Qwen2 as it is: nothing in the architecture is new. Module names are the checkpoint's tensor names.


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, times the weight."""
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, and sin with its first half negated, (B, 1, T, d), of positions (B, T), from float32 cast to dtype."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[:, None, :, None].float() * (1.0 / config.rope_theta**exponents)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, heads, T, d): coordinate i < d/2 turns with i + d/2, by the angle i."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask, store: Callable | None) -> Tensor:
        B, T, _ = x.shape
        heads = lambda y: y.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, T, heads * d) -> (B, heads, T, d)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(torch.cat([q, k], dim=1), *rope).split([q.shape[1], k.shape[1]], dim=1)
        if store:
            k, v = store(k, v)  # (B, K, T, d) written, (B, K, S, d) seen
        y = attention(q, k, v, mask)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A transformer block; called layer, since "block" is always the diffusion block."""

    def __init__(self, c: Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask, store: Callable | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, store)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The Qwen2 transformer. Its state dict has exactly the published names."""

    PREFILL = 512  # positions, in whole blocks, that run at once under a mask: it would grow with the prompt's square

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the head's weight the embedding's, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def weight(self) -> Tensor:
        """The embedding: what is made beside the model is made like it, on its device and in its dtype."""
        return self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, positions: Tensor, mask, store: Callable | None = None) -> Tensor:
        """Hidden states (B, T, D) after the last norm, of tokens (B, T) at positions (B or 1, T).

        The caller supplies positions and mask, and `store(layer, k, v)` where keys outside the window are seen too.
        """
        x = self.model.embed_tokens(tokens)
        rope = rotary(positions, self.config, x.dtype)
        if isinstance(mask, Tensor):  # made once for all layers
            groups = self.config.num_attention_heads // self.config.num_key_value_heads
            mask = partial(grouped_attention, bias=attention_bias(mask, tokens.shape[1], groups, x.dtype))
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rope, mask, partial(store, i) if store else None)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D): row i predicts the token at position i + 1."""
        return self.lm_head(hidden)

    def window(
        self, tokens: Tensor, starts: Sequence[int], cache: KVCache, block_size: int, rows: Sequence[int] | None = None
    ) -> Tensor:
        """One pass over positions [start, start + T) of each row: hidden states (B, T, D), K and V written in place.

        tokens (B, T); row i of the batch stands in row `rows[i]` of the cache (default: i) and begins at `starts[i]`.
        A query sees all slots up to the end of its own block, so that prefill, denoising, refresh, sub-block and
        commit passes are this same call on different windows:

                           earlier blocks   block in work
            prefill        wwwwwwwwwwwwww
            denoise        rrrrrrrrrrrrrr   wwwwwwwwwwwwwwww
              sub-block    rrrrrrrrrrrrrr   rrrrwwwwrrrrrrrr      w written and read, r only read
            commit         rrrrrrrrrrrrrr   wwwwwwwwwwwwwwww      last row: first token of the next block
        Raises InputError for a window of several blocks that is to run in pieces and does not begin with a block.
        """
        B, T = tokens.shape
        rows = list(range(B)) if rows is None else list(rows)
        piece, aligned = round_up(self.PREFILL, block_size), len(set(starts)) == 1
        causal = aligned and starts[0] == 0 and block_size == 1
        if T > piece and not causal:  # no block sees a later one: in pieces it is the same
            whole = all(start % block_size == 0 for start in starts)
            require(whole, f"A window of more than {piece} positions must begin with a block.")
            cuts = range(0, T, piece)
            parts = ((tokens[:, cut : cut + piece], [start + cut for start in starts]) for cut in cuts)
            return torch.cat([self.window(*part, cache, block_size, rows) for part in parts], dim=1)
        seen = round_up(max(starts) + T, block_size)
        starts = list(starts)[:1] if aligned else list(starts)  # then all rows share positions and mask
        positions = torch.tensor(starts, device=tokens.device)[:, None] + torch.arange(T, device=tokens.device)
        if aligned and starts[0] // block_size == (starts[0] + T - 1) // block_size:
            mask = None  # the window lies in one block, and every slot that is read is at most that block's
        elif causal:
            mask = CAUSAL
        else:
            mask = block_causal_mask(positions, torch.arange(seen, device=tokens.device), block_size)[:, None]
        if rows == list(range(rows[0], rows[0] + B)):  # a slice reads the past without copying it
            read = slice(rows[0], rows[0] + B)
        else:
            read = torch.tensor(rows, device=tokens.device)
        if aligned and isinstance(read, slice):
            write = read, slice(starts[0], starts[0] + T)
        else:
            write = torch.tensor(rows, device=tokens.device)[:, None], positions
        store = partial(cache.update, rows=write[0], positions=write[1], read=(read, slice(seen)))
        return self(tokens, positions, mask, store)


# --- Prepacked weights ---


class PrepackedLinear(nn.Module):
    """A linear layer for inference on a CPU, with its weight in the order in which oneDNN's products read it.

    A plain weight is brought into that order anew in every product, or read in a slower one. Weights of fewer numbers
    than SMALL stay in a core's cache, where a product of fewer rows than FEW is faster plain: these are kept both ways.
    """

    SMALL, FEW = 2**18, 16

    def __init__(self, linear: nn.Linear, tied: bool = False):
        """With `tied` the weight keeps its order, since somebody else needs it so; only the product is oneDNN's."""
        super().__init__()
        weight = linear.weight.detach()
        self.plain = weight if weight.numel() < self.SMALL else None
        self.packed = weight if tied else torch.ops.mkldnn._reorder_linear_weight(weight, self.FEW)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.plain is not None and x.numel() < self.FEW * x.shape[-1]:
            return F.linear(x, self.plain, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def prepack(model: Qwen2) -> Qwen2:
    """The model, in place, ready to decode faster on a CPU: its linear layers as `PrepackedLinear`.

    It can no longer be trained, saved, copied, moved, or run under autocast. In float32 sums run in another order, in
    bfloat16 every product was the same to the bit where it was compared. Where oneDNN or the dtype is missing, or on
    another device, the model comes back as it was.
    """
    if model.weight.device.type != "cpu" or is_prepacked(model):
        return model
    try:
        trial = PrepackedLinear(model.model.layers[0].self_attn.k_proj)
        trial(model.weight.new_zeros(PrepackedLinear.FEW, model.config.hidden_size))
    except (AttributeError, RuntimeError):
        return model
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name in [name for name, child in parent.named_children() if isinstance(child, nn.Linear)]:
            tied = parent is model and model.config.tie_word_embeddings
            setattr(parent, name, PrepackedLinear(getattr(parent, name), tied))  # which lets go of the plain weight
    return model.requires_grad_(False)


def is_prepacked(model: Qwen2) -> bool:
    """Has `prepack` changed it?"""
    return any(isinstance(module, PrepackedLinear) for module in model.modules())


# --- Guess and accept ---


def nucleus(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities after temperature and top-p, and their token ids, both (N, V), the most probable first.

    A token is dropped where the probability before it already exceeds top_p; the rest is renormalised. Temperature 0
    leaves the probabilities as they are.
    """
    if temperature == 0:
        temperature, top_p = 1.0, 1.0
    p, ids = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_p < 1:  # at 1 nothing is dropped, whatever the rounding of the sum
        p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)
    return p / p.sum(-1, keepdim=True), ids


def guess(logits: Tensor, decoding: "Decoding", draws: Tensor) -> tuple[Tensor, Tensor]:
    """A token and its confidence for each row of logits (N, V), in float32.

    Temperature 0: the argmax and its softmax probability. Otherwise one draw, by the uniform numbers `draws` (N), and
    its probability after temperature and top-p.
    """
    if decoding.temperature == 0:
        best, tokens = logits.max(dim=-1)
        return tokens, (best - logits.logsumexp(-1)).exp()
    p, ids = nucleus(logits, decoding.temperature, decoding.top_p)
    kept = (p > 0).sum(-1, keepdim=True)
    place = torch.searchsorted(p.cumsum(-1), draws[:, None], right=True)
    place = place.minimum(kept - 1).clamp(min=0)  # the sum is rounded, so a draw may lie above it
    return ids.gather(1, place)[:, 0], p.gather(1, place)[:, 0]


def accept(confidence: list[float], threshold: float, count: int | None = None) -> list[int]:
    """Which guesses are kept (paper, section 4): all above the threshold, and always the most confident one.

    Indices into `confidence`, in order; strictly above, and the first one on ties, so that threshold 1 keeps exactly
    one guess a pass. With a `count` it is that many, the most confident ones, whatever the threshold.
    """
    if count:
        return sorted(sorted(range(len(confidence)), key=lambda i: -confidence[i])[:count])
    best = confidence.index(max(confidence))
    return [i for i, c in enumerate(confidence) if c > threshold or i == best]


# --- Decoding ---


@dataclass(frozen=True)
class Decoding:
    """How to decode; the defaults are the paper's. Raises InputError for values that cannot work."""

    block_size: int | None = None  # tokens denoised together; None: what the checkpoint was trained with; 1: AR
    sub_block_size: int = 8  # window of a block that is revealed before the next; the default shrinks to smaller blocks
    threshold: float = 0.9  # reveal guesses of more confidence than this; 1: one token a pass
    cache: str = "block"  # "none": recompute everything; "block": keep finished blocks; "dual": DualCache too
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: the most probable token
    top_p: float = 1.0  # nucleus, at temperatures above 0
    stop_token_ids: tuple[int, ...] | None = None  # None: the checkpoint's; (): none
    seed: int | None = None  # with a seed, a prompt's tokens depend on nothing but prompt and options
    batch_size: int = 16  # prompts decoded at the same time
    tokens_per_pass: int | None = None  # reveal this many guesses a pass, the most confident, whatever the threshold
    fuse_commit: bool = False  # commit a block in one pass with the next one's first; changes what that pass guesses
    runner_up: bool = False  # also record the second-best token of each guess
    cuda_graphs: bool = True  # replay recorded passes on CUDA: the same tokens, without the host's work

    def __post_init__(self):
        whole = lambda v: type(v) is int and v >= 1
        number = lambda v, most: isinstance(v, (int, float)) and 0 <= v <= most
        ids = lambda v: isinstance(v, (tuple, list, set, frozenset)) and all(type(i) is int for i in v)
        for names, ok, rule in [
            ("sub_block_size max_new_tokens batch_size", whole, "be a whole number of at least 1"),
            ("block_size tokens_per_pass", lambda v: v is None or whole(v), "be a whole number of at least 1, or None"),
            ("threshold top_p", lambda v: number(v, 1), "lie in [0, 1]"),
            ("temperature", lambda v: v == 0 or number(v, 1e4) and v >= 1e-4, "be 0, or between 0.0001 and 10000"),
            ("cache", lambda v: v in ("none", "block", "dual"), "be none, block or dual"),
            ("seed", lambda v: v is None or type(v) is int and 0 <= v < 2**63, "be between 0 and 2**63 - 1, or None"),
            ("stop_token_ids", lambda v: v is None or ids(v), "be a list of token ids, or None"),
        ]:
            for name in names.split():
                value = getattr(self, name)
                require(ok(value), f"{name} is {value!r}, it must {rule}.")

    def resolve(self, config: Config) -> "Decoding":
        """With the checkpoint's values for what is None. Raises InputError where checkpoint and options clash."""
        size, sub = self.block_size or config.block_size, self.sub_block_size
        if sub == Decoding.sub_block_size:
            sub = min(sub, size)  # only the default shrinks: a size that somebody chose must fit
        require(size % sub == 0, f"sub_block_size {sub} does not divide block_size {size}; take a divisor of {size}.")
        adapted = size == 1 or config.mask_token_id is not None
        require(adapted, "The checkpoint has no mask token, so it was never adapted: only block_size 1 (AR) works.")
        stop = config.stop_token_ids if self.stop_token_ids is None else tuple(self.stop_token_ids)
        return replace(self, block_size=size, sub_block_size=sub, stop_token_ids=stop)


class Revealed(NamedTuple):
    """A guess that was kept."""

    position: int
    token: int
    confidence: float
    runner_up: tuple[int, float] | None = None  # the most probable other token, where it was asked for


@dataclass
class Pass:
    """One forward pass over one row's window: what it ran, and once it ran, what came of it."""

    kind: str  # prefill, full, refresh, sub, commit or fused
    start: int  # the window is [start, start + len(tokens))
    tokens: list[int]  # its input, masks included
    guessed: list[int]  # positions guessed, position i from the output at i - 1 (token shift)
    draws: Tensor  # a uniform number for each of them, at temperatures above 0
    committed: int = 0  # so many first tokens of the window are final, and so are their keys and values
    row: int = 0  # the prompt's index
    revealed: list[Revealed] = field(default_factory=list)
    final: list[int] = field(default_factory=list)  # new tokens that no mask precedes any more, in order
    finish_reason: str | None = None  # in a row's last pass: "stop" or "length"


def sequence(
    prompt: Sequence[int], decoding: Decoding, mask: int | None, known: int = 0
) -> Generator[Pass, list, None]:
    """The passes that write one answer (paper, section 4 and algorithm 1): the whole method, without the network.

    Yields each pass that it needs and is sent the guesses, a list of (token, confidence, runner-up) for `guessed`;
    `decoding` is resolved. A pass is complete, with what it revealed, when the next one is asked for. The first
    `known` positions of the prompt, whole blocks, are in the cache already.
    """
    size, sub = decoding.block_size, decoding.sub_block_size
    tokens, limit, stops = list(prompt), len(prompt) + decoding.max_new_tokens, set(decoding.stop_token_ids)
    generator = torch.Generator()  # of this row alone: no other row changes what it draws
    generator.seed() if decoding.seed is None else generator.manual_seed(decoding.seed)
    threshold = torch.tensor(decoding.threshold).item()  # confidences are float32, so compare with one
    final = len(prompt)  # everything before is known for good

    def run(kind, start, stop, guessed, committed=0):
        """One pass, and the guesses that it reveals; true when the answer is complete."""
        nonlocal final
        draws = torch.rand(len(guessed) if decoding.temperature else 0, generator=generator)
        step = Pass(kind, start, tokens[start:stop], guessed, draws, committed)
        guesses = yield step
        # after committed tokens comes a token that no threshold holds back; what else is guessed beside it must pass
        sure = guessed[:1] if committed else []
        confidence = [1.0 if position in sure else c for position, (_, c, _) in zip(guessed, guesses)]
        for i in accept(confidence, threshold, decoding.tokens_per_pass) if guessed else []:
            step.revealed.append(Revealed(guessed[i], *guesses[i]))
        for kept in step.revealed:
            tokens[kept.position : kept.position + 1] = [kept.token]  # replaces a mask, or is appended
        while final < min(len(tokens), limit) and tokens[final] != mask and not step.finish_reason:
            step.final.append(tokens[final])
            final += 1
            step.finish_reason = "stop" if step.final[-1] in stops else "length" if final == limit else None
        return step.finish_reason is not None

    begin = len(prompt) // size * size  # of the block in work
    aligned = begin == len(prompt)  # then the block's first token comes from the prefill's last row
    first = 0 if decoding.cache == "none" else min(known, begin - size * aligned)
    if aligned or (first < begin and decoding.cache != "none"):
        if (yield from run("prefill", first, begin, [begin] * aligned, begin - first)):
            return
    cached = False  # does the block cache hold this block?
    while True:
        end = begin + size
        tokens += [mask] * (end - len(tokens))
        origin = 0 if decoding.cache == "none" else begin
        for low in range(begin, end, sub):
            high = low + sub
            while masked := [i for i in range(low, high) if tokens[i] == mask]:
                # token shift: the first position's guess stands one row before the window, in a whole-block pass
                if cached and tokens[low] != mask:
                    kind, start, stop = "sub", low, high
                else:
                    kind, start, stop = "refresh" if decoding.cache == "dual" else "full", origin, end
                    cached = decoding.cache == "dual"
                if (yield from run(kind, start, stop, masked)):
                    return
        # commit: the finished block runs once more without masks, and its last row begins the next block
        kind, guessed, beyond = "commit", [end], 0
        if decoding.fuse_commit and size > 1 and end + 1 < limit:  # and with it, all of masks, the next block
            kind, guessed, beyond = "fused", [*range(end, end + sub)], size
            tokens += [mask] * size
        if (yield from run(kind, origin, end + beyond, guessed, end - origin)):
            return
        cached = beyond > 0 and decoding.cache == "dual"
        begin = end


def check_prompt(prompt: Sequence[int], decoding: Decoding, config: Config) -> list[int]:
    """The prompt as a list of ints. Raises InputError where it cannot be decoded."""
    try:
        prompt = [operator.index(token) for token in prompt]
    except TypeError:
        raise InputError("Prompts are a list of lists of token ids; encode text first, and wrap one prompt.") from None
    vocab, limit = config.tokenizer_size or config.vocab_size, config.max_position_embeddings
    require(prompt, "The prompt is empty; give at least one token.")
    stray, mask = next((token for token in prompt if not 0 <= token < vocab), None), config.mask_token_id
    require(stray is None, f"The prompt has token id {stray}, outside the vocabulary of {vocab}.")
    require(mask not in prompt, f"The prompt has the mask token, id {mask}, which only the decoder may write.")
    total = len(prompt) + decoding.max_new_tokens
    sizes = f"{len(prompt)} prompt tokens and {decoding.max_new_tokens} new ones make {total} positions"
    require(total <= limit, f"{sizes}, the model has {limit}; lower max_new_tokens or shorten the prompt.")
    return prompt


class Memory:
    """A conversation's cache, kept from one `decode` to the next, so that a turn pays only for what is new in it."""

    def __init__(self):
        self.cache, self.block_size = None, 0
        self.tokens = []  # of the blocks that are committed

    def recall(self, prompt: Sequence[int], block_size: int) -> int:
        """How many first positions of the prompt, whole blocks, are in the cache; the rest is forgotten."""
        known, most = 0, min(len(self.tokens), len(prompt)) if block_size == self.block_size else 0
        while known + block_size <= most:
            if self.tokens[known : known + block_size] != list(prompt[known : known + block_size]):
                break
            known += block_size
        self.tokens, self.block_size = self.tokens[:known], block_size
        return known


def decode(
    model: Qwen2, prompts: Sequence[Sequence[int]], decoding: Decoding, memory: Memory | None = None
) -> Iterator[Pass]:
    """Decode prompts (lists of token ids), yielding a `Pass` for each pass of each row as it completes.

    Rows walk on by themselves: those that wait for windows of the same width share a forward pass, prompts of nearly
    the same length too, and a finished row leaves its place to the next prompt. A row's tokens are those of its prompt
    decoded alone. With a `memory`, for one prompt only, blocks that an earlier call has committed are not run again.
    Raises InputError, before anything runs, for options or prompts that cannot work.
    """
    decoding = decoding.resolve(model.config)
    prompts = [check_prompt(prompt, decoding, model.config) for prompt in prompts]
    require(memory is None or len(prompts) == 1, f"A memory serves one prompt, not {len(prompts)}.")
    return _decode(model, prompts, decoding, memory)


@dataclass
class Row:
    """A prompt that is being decoded."""

    index: int  # of the prompt
    passes: Generator[Pass, list, None]
    step: Pass | None  # the pass it waits for; None: done


@torch.inference_mode()
def _decode(
    model: Qwen2, prompts: Sequence[Sequence[int]], decoding: Decoding, memory: Memory | None
) -> Iterator[Pass]:
    longest = max((len(prompt) + decoding.max_new_tokens for prompt in prompts), default=0)
    places, length = min(len(prompts), decoding.batch_size), round_up(longest, decoding.block_size)
    graphs = None if memory or decoding.cache == "none" or not decoding.cuda_graphs else Graphs.of(model)
    if graphs and graphs.in_use.acquire(blocking=False):
        try:
            yield from decode_rows(model, prompts, decoding, graphs.reserve(model, places, length), graphs=graphs)
        finally:  # also where the caller breaks off
            graphs.in_use.release()
    else:  # or another decoding, half way, has the recorded passes' cache
        cache = memory and memory.cache or KVCache(model.config, places, length, model.weight)
        cache.grow(length)
        yield from decode_rows(model, prompts, decoding, cache, memory)


def decode_rows(
    model: Qwen2,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    cache: KVCache,
    memory: Memory | None = None,
    graphs: "Graphs | None" = None,
) -> Iterator[Pass]:
    """`decode` with a cache that has a place for each of `batch_size` prompts, and room for the longest."""
    size, places = decoding.block_size, min(len(prompts), decoding.batch_size)
    waiting = iter(enumerate(prompts))

    def admit(place: int) -> Row | None:
        """The next waiting prompt, if any, as the row at this place of the cache."""
        for index, prompt in waiting:
            known = memory.recall(prompt, size) if memory else 0
            cache.clear(place, known)
            passes = sequence(prompt, decoding, model.config.mask_token_id, known)
            return Row(index, passes, next(passes))
        return None

    rows = [admit(place) for place in range(places)]
    while rows:
        widths = [shared_width(row.step) for row in rows]
        # prefills first, so that rows come together; then the width that most rows wait for
        width = max(widths, key=lambda w: (w[0], widths.count(w)))
        group = [place for place, w in enumerate(widths) if w == width]
        steps = [rows[place].step for place in group]
        for place, step, guesses in zip(group, steps, shifted_guesses(model, cache, group, steps, decoding, graphs)):
            step.row = rows[place].index
            try:
                rows[place].step = rows[place].passes.send(guesses)
            except StopIteration:
                rows[place].step = None
            if memory and step.committed:
                memory.cache, memory.tokens[step.start :] = cache, step.tokens[: step.committed]
            yield step
        for place in reversed(group):
            if rows[place].step is None:
                row, last = admit(place), len(rows) - 1
                if not row and place < last:
                    cache.move(last, place)  # the rows in use stay the first ones
                rows[place] = row or rows[last]
                del rows[last + bool(row) :]


def shared_width(step: Pass) -> tuple[bool, int]:
    """Passes that agree in this run as one: is it a prefill, and its width, of a prefill rounded up to 64 positions."""
    prefill = step.kind == "prefill"
    return prefill, round_up(len(step.tokens), 64 if prefill else 1)


def shifted_guesses(
    model: Qwen2, cache: KVCache, rows: list[int], steps: list[Pass], decoding: Decoding, graphs: "Graphs | None" = None
) -> list[list]:
    """Run one pass over windows of one `shared_width`, of these rows of the cache: each one's guesses (token,
    confidence, runner-up).

    Token shift (paper, section 3): the guess for position i stands in the output at i - 1. What fills up a shorter
    prompt stands behind it, where nothing of it looks, and its slots are written again before anybody reads them.
    """
    counts, width = [len(step.guessed) for step in steps], max(len(step.tokens) for step in steps)
    device = model.weight.device
    wanted = [n * width + i - 1 - step.start for n, step in enumerate(steps) for i in step.guessed]
    draws = torch.cat([step.draws for step in steps])
    if graphs and steps[0].kind != "prefill":
        found = graphs.run(model, cache, rows, steps, wanted, draws, decoding)
    else:
        tokens = torch.tensor([[*step.tokens, *[0] * (width - len(step.tokens))] for step in steps], device=device)
        hidden = model.window(tokens, [step.start for step in steps], cache, decoding.block_size, rows)
        if not wanted:
            return [[] for _ in steps]
        found = best_guesses(model, hidden.flatten(0, 1)[torch.tensor(wanted, device=device)], draws, decoding)
    table = found.tolist()  # the pass's one transfer back
    finite = all(row[1] == row[1] for row in table)
    require(finite, "The model's output is not a number; in float16 it may overflow, then bfloat16 or float32 works.")
    guesses = iter([(int(t), c, (int(other[0]), other[1]) if other else None) for t, c, *other in table])
    return [[next(guesses) for _ in range(count)] for count in counts]


def best_guesses(model: Qwen2, hidden: Tensor, draws: Tensor, decoding: Decoding) -> Tensor:
    """Token, confidence, and where asked for the runner-up's (N, 2 or 4), of hidden states (N, D), in float32.

    float32 holds any id below 2**24.
    """
    config = model.config
    logits = model.logits(hidden)
    if config.mask_token_id is not None:
        logits[:, config.mask_token_id] = -torch.inf  # a mask is no guess
    logits = logits[:, : config.tokenizer_size].float()
    columns = [*guess(logits, decoding, draws.to(logits.device))]
    if decoding.runner_up:
        p = logits.softmax(dim=-1).scatter(1, columns[0][:, None], 0.0)
        columns += [p.argmax(dim=-1), p.amax(dim=-1)]
    return torch.stack([column.float() for column in columns], dim=1)


class Graphs:
    """Passes of static shape, recorded once as CUDA graphs and replayed: a pass is one copy and one launch to the host.

    A pass's shape is its rows (a power of 2), its width, and how many slots of the cache it reads (in steps of READ).
    What fills up the rows stands in a spare row of the cache. Without `record` the passes run as they are, so that
    their mathematics can be tested anywhere. One decoding at a time holds `in_use`, and with it cache and passes.
    """

    READ = 256
    MOST = 256  # recorded passes that are kept, the last used ones
    RECORDING = threading.Lock()  # CUDA allows one recording at a time in a process

    def __init__(self, record: bool = True):
        self.record, self.in_use = record, threading.Lock()
        self.cache, self.weights, self.passes, self.pool, self.stream = None, None, {}, None, None

    @staticmethod
    def of(model: Qwen2) -> "Graphs | None":
        """This model's; None where it is on no CUDA device."""
        if model.weight.is_cuda:
            GRAPHS.setdefault(model, Graphs())
        graphs = GRAPHS.get(model)
        return graphs if graphs and (model.weight.is_cuda or not graphs.record) else None

    def reserve(self, model: Qwen2, rows: int, length: int) -> KVCache:
        """A cache of at least this size and one spare row; recorded passes hold on to it, and to where weights lie."""
        wanted, weights = (rows + 1, round_up(length, self.READ)), [(w.data_ptr(), w.dtype) for w in model.parameters()]
        there = (0, 0) if self.cache is None else tuple(self.cache.k.shape[1:3])
        # large enough for both, so that unlike requests do not undo each other's passes, unless that is far more
        size, most = tuple(map(max, wanted, there)), 2 * max(math.prod(wanted), math.prod(there))
        size = size if math.prod(size) <= most else wanted
        if size != there or weights != self.weights:
            self.passes, self.pool, self.cache = {}, None, None  # let go of the old ones first
            self.cache, self.weights = KVCache(model.config, *size, model.weight), weights
            self.cache.clear(size[0] - 1)
        return self.cache

    def run(
        self,
        model: Qwen2,
        cache: KVCache,
        rows: list[int],
        steps: list[Pass],
        wanted: list[int],
        draws: Tensor,
        decoding: Decoding,
    ) -> Tensor:
        """What `best_guesses` gives for the outputs `wanted` of the windows' pass."""
        B, T, spare = 1 << (len(rows) - 1).bit_length(), len(steps[0].tokens), cache.k.shape[1] - 1
        N = B * min(T, decoding.sub_block_size)  # no pass guesses more
        whole = rows == list(range(B))
        seen = round_up(max(step.start for step in steps) + T, decoding.block_size)
        seen = min(round_up(seen, self.READ), cache.k.shape[2])
        more = B - len(rows)
        numbers = [token for step in steps for token in step.tokens] + [0] * (more * T)
        numbers += [step.start for step in steps] + [0] * more
        numbers += [*rows, *[spare] * more, *wanted, *[0] * (N - len(wanted))]
        sampled = F.pad(draws, (0, N - len(draws))) if decoding.temperature else draws
        given = torch.tensor(numbers)
        key = (B, T, seen, whole, decoding.block_size, N, decoding.temperature, decoding.top_p, decoding.runner_up)
        if key in self.passes:
            self.passes[key] = self.passes.pop(key)  # now the last used one
        else:
            while len(self.passes) >= self.MOST:
                del self.passes[next(iter(self.passes))]
            self.passes[key] = self.prepare(model, cache, given, sampled, B, T, N, seen, whole, decoding)
        inputs, found, replay = self.passes[key]
        for static, value in zip(inputs, (given, sampled)):
            static.copy_(value, non_blocking=True)
        return (replay() if found is None else (replay(), found)[1])[: len(wanted)]

    def prepare(self, model, cache, given, sampled, B, T, N, seen, whole, decoding) -> tuple:
        """Input tensors, output tensor, and what runs the pass; where nothing is recorded that returns the output."""
        device = model.weight.device
        inputs = given.to(device), sampled.to(device)

        def run() -> Tensor:
            tokens, starts, rows, wanted = inputs[0].split([B * T, B, B, N])
            positions = starts[:, None] + torch.arange(T, device=device)
            ends = positions if T > decoding.block_size else positions[:, -1:]  # in one block all see the same slots
            mask = block_causal_mask(ends, torch.arange(seen, device=device), decoding.block_size)[:, None]
            read = slice(B) if whole else rows
            store = partial(cache.update, rows=rows[:, None], positions=positions, read=(read, slice(seen)))
            hidden = model(tokens.view(B, T), positions, mask, store)
            return best_guesses(model, hidden.flatten(0, 1)[wanted], inputs[1], decoding)

        return inputs, *(self.capture(run, device) if self.record else (None, run))

    def capture(self, run: Callable[[], object], device: torch.device) -> tuple[object, Callable[[], None]]:
        """Record what `run` does as a CUDA graph: its output, which each replay fills anew, and the replay."""
        with self.RECORDING, torch.cuda.device(device):
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # recording needs kernels that have run before
                for _ in range(2):
                    run()  # writes what the replay will write once more
            torch.cuda.current_stream().wait_stream(self.stream)
            graph, apart = torch.cuda.CUDAGraph(), "thread_local"  # other threads may go on allocating
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=apart):
                found = run()
        self.pool = self.pool or graph.pool()
        return found, graph.replay


GRAPHS: WeakKeyDictionary[Qwen2, Graphs] = WeakKeyDictionary()  # of each model that has decoded


@dataclass
class Result:
    """What was generated for one prompt."""

    tokens: list[int] = field(default_factory=list)  # new ones, through the stop token
    finish_reason: str | None = None  # "stop" or "length"; None where decoding was broken off
    passes: dict[str, int] = field(default_factory=dict)  # kind -> count

    def add(self, step: Pass) -> None:
        """Take in the row's next pass."""
        self.tokens += step.final
        self.passes[step.kind] = self.passes.get(step.kind, 0) + 1
        self.finish_reason = step.finish_reason

    @property
    def forward_passes(self) -> int:
        """Passes that wrote the answer: all but the prefill."""
        return sum(self.passes.values()) - self.passes.get("prefill", 0)


def generate(model: Qwen2, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[Result]:
    """Decode prompts (lists of token ids) to the end: one result a prompt, in order. Raises what `decode` raises."""
    results = [Result() for _ in prompts]
    for step in decode(model, prompts, decoding):
        results[step.row].add(step)
    return results


# --- Tokenizer ---

# how Qwen2 cuts text into words before byte-pair encoding
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_FILES = "tokenizer.json vocab.json merges.txt added_tokens.json tokenizer_config.json chat_template.jinja"


class Tokenizer:
    """Text to token ids and back, and ChatML."""

    def __init__(self, encoder: Encoder, system: str | None, files: dict[str, bytes]):
        self.encoder = encoder
        self.system = system  # what ChatML begins with where the messages have no system message
        self.files = files  # by name, so that a checkpoint can be saved with its tokenizer

    def __len__(self) -> int:
        """Ids in use: the largest one plus 1."""
        return max(self.encoder.get_vocab().values()) + 1

    def id(self, token: str) -> int | None:
        return self.encoder.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are recognised. Raises InputError for text that is no Unicode."""
        require(text.isascii() or text.encode(errors="ignore").decode() == text, f"No valid Unicode text: {text!a}.")
        return self.encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.encoder.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[dict], system: bool = True) -> list[int]:
        """ChatML of messages with `role` and `content`, up to where the assistant's turn begins.

        Without a system message the default one comes first, unless `system` is false: the middle of a conversation.
        """
        if system and self.system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return self.encode(text + "<|im_start|>assistant\n")

    def stream(self, chunks: Iterable[Sequence[int]]) -> Iterator[str]:
        """Text of ids that arrive in chunks, each character as soon as its last byte is there."""
        stream, ids, written = decoders.DecodeStream(skip_special_tokens=True), [], 0
        for chunk in chunks:
            ids += chunk
            text = "".join(stream.step(self.encoder, i) or "" for i in chunk)
            written += len(text)
            yield text
        yield self.decode(ids)[written:]  # bytes that never became a character


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """From `tokenizer.json`, or `vocab.json` and `merges.txt` with the added tokens of `tokenizer_config.json` or
    `added_tokens.json`. Raises InputError where they are missing or disagree."""
    folder = Path(folder)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES.split() if (folder / name).is_file()}
    settings = read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    ok = "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files.keys()
    require(ok, f"{folder}: no tokenizer; tokenizer.json, or vocab.json and merges.txt, must be there.")
    try:
        if "tokenizer.json" in files:
            encoder = Encoder.from_str(files["tokenizer.json"].decode())
            encoder.no_truncation()
            encoder.no_padding()
        else:
            encoder = Encoder(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
            encoder.normalizer = normalizers.NFC()
            split = pre_tokenizers.Split(Regex(WORDS), "isolated")
            encoder.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
            encoder.decoder = decoders.ByteLevel()
        added = {int(i): entry for i, entry in settings.get("added_tokens_decoder", {}).items()}
        if not added and "added_tokens.json" in files:
            names = read_json(folder / "added_tokens.json")
            added = {i: {"content": name, "special": True} for name, i in names.items()}
        for i, entry in sorted(added.items()):
            flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
            token = AddedToken(entry["content"], **{flag: entry.get(flag, False) for flag in flags})
            encoder.add_special_tokens([token]) if token.special else encoder.add_tokens([token])
            got = encoder.token_to_id(token.content)
            require(got == i, f"{folder}: added token {token.content!r} is listed as id {i} but becomes {got}.")
    except InputError:
        raise
    except Exception as error:  # the library raises plain Exception, a malformed entry anything
        raise InputError(f"{folder}: the tokenizer files cannot be read: {error!r}") from None
    # of a model's own chat template only the default system message differs from plain ChatML
    template = str(settings.get("chat_template") or files.get("chat_template.jinja", b"").decode())
    match = re.search(r"<\|im_start\|>system(?:\\n|\n)([^{<]+)<\|im_end\|>", template)
    system = match[1] if match else None if template else "You are a helpful assistant."
    return Tokenizer(encoder, system, files)


# --- Load and save ---

SHAPE_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings"
).split()
OTHER_KEYS = {
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), (float, int)),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window"), (bool,)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (dict,)),
    **{"layer_types": (list,), "mask_token_id": (int,), "eos_token_id": (int, list)},
}
INDEX = "model.safetensors.index.json"  # tensor name -> file, where the weights are in several
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}


def read_json(path: Path) -> dict:
    """A JSON file's object. Raises InputError naming the file where it is missing or broken."""
    require(path.is_file(), f"{path.parent}: {path.name} is missing.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    require(isinstance(content, dict), f"{path}: must hold one JSON object.")
    return content


def locate(path: str | os.PathLike, weights: bool = True) -> Path:
    """The checkpoint's folder: `path`, or where huggingface_hub keeps what it downloads for a Hub id `owner/name`."""
    if Path(path).is_dir():
        return Path(path)
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
    require(hub_id, f"{path}: no such folder; give a checkpoint's folder or a Hub id like owner/name.")
    from huggingface_hub import snapshot_download  # comes with tokenizers; only needed here

    try:
        small = ["config.json", "generation_config.json", INDEX, *TOKENIZER_FILES.split()]
        folder = Path(snapshot_download(str(path), allow_patterns=small))  # tells which weight files there are
        return Path(snapshot_download(str(path), allow_patterns=[*small, *shards(folder)])) if weights else folder
    except InputError:
        raise
    except Exception as error:  # no network, no such repository, no space
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: no such folder, and as a Hub id it could not be downloaded ({reason}); where there is a network, "
            f"`hf download {path} --local-dir FOLDER` fetches it, then give FOLDER."
        ) from None


def shards(folder: Path) -> list[str]:
    """Names of the checkpoint's weight files. Raises InputError for a broken index."""
    if not (folder / INDEX).is_file():
        return ["model.safetensors"]
    index = read_json(folder / INDEX).get("weight_map")
    ok = isinstance(index, dict) and index and all(isinstance(file, str) for file in index.values())
    require(ok, f"{folder / INDEX}: has no weight_map from tensors to files.")
    return sorted(set(index.values()))


def open_weights(path: Path, device: str = "cpu"):
    """A safetensors file, mapped. Raises InputError where it is missing or damaged."""
    require(path.is_file(), f"{path.parent}: {path.name} is missing.")
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or no safetensors file ({error}); fetch it again.") from None


def pick_device(device: str) -> str:
    """The device, "auto" made definite. Raises InputError where it is not there."""
    there = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    device = there[0] if device == "auto" else str(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # an unknown name; a name that this build of torch does not serve
        raise InputError(f"device {device!r} is not available here, only {', '.join(there)}.") from None
    return device


def parse_config(raw: dict) -> Config:
    """From the contents of `config.json`. Raises InputError where it contradicts itself or asks for more."""
    raw = {"bd_size": 1} | {key: value for key, value in raw.items() if value is not None}
    for key, kinds in OTHER_KEYS.items():
        names = " or ".join(kind.__name__ for kind in kinds)
        require(type(raw.get(key)) in (*kinds, type(None)), f"config.json: {key} is {raw.get(key)!r}, no {names}.")
    rope = raw.get("rope_parameters", {})  # newer Transformers keep rope_theta in here
    if type(raw.get("hidden_size")) is type(heads := raw.get("num_attention_heads")) is int and heads > 0:
        ok = "head_dim" in raw or raw["hidden_size"] % heads == 0
        require(ok, f"config.json: hidden_size {raw['hidden_size']} does not divide by {heads} heads.")
        raw.setdefault("head_dim", raw["hidden_size"] // heads)
    for key in [*SHAPE_KEYS, "bd_size"]:
        ok = type(raw.get(key)) is int and raw[key] > 0
        require(ok, f"config.json: {key} is {raw.get(key)!r}, it must be a positive integer.")
    groups, vocab, mask = raw["num_key_value_heads"], raw["vocab_size"], raw.get("mask_token_id")
    kind, activation = raw.get("model_type"), raw.get("hidden_act", "silu")
    scaling = raw.get("rope_scaling", {}) | rope
    plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    sliding = raw.get("use_sliding_window") or "sliding_attention" in raw.get("layer_types", [])
    for ok, problem in [
        (kind in ("qwen2", "Fast_dLLM_Qwen"), f"model_type is {kind!r}, only qwen2 and Fast_dLLM_Qwen are built"),
        (activation == "silu", f"hidden_act is {activation!r}, only silu is built"),
        (plain, "rope_scaling is set, and scaled rotary positions are not built; set it to null"),
        (not sliding, "use_sliding_window is set, and sliding windows are not built; set it to false"),
        (heads % groups == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"),
        (raw["head_dim"] % 2 == 0, f"head_dim is {raw['head_dim']}, rotary positions need an even one"),
        (mask is None or 0 <= mask < vocab, f"mask_token_id {mask} is outside the vocabulary of {vocab}"),
    ]:
        require(ok, f"config.json: {problem}.")
    stop = raw.get("eos_token_id", [])
    return Config(
        **{key: raw[key] for key in SHAPE_KEYS},
        rms_norm_eps=raw.get("rms_norm_eps", Config.rms_norm_eps),
        rope_theta=raw.get("rope_theta") or rope.get("rope_theta", 10000.0),  # Transformers' default
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        block_size=raw["bd_size"],
        mask_token_id=mask,
        stop_token_ids=tuple(stop) if isinstance(stop, list) else (stop,),
    )


def unparse_config(c: Config) -> dict:
    """The contents of `config.json`: the published keys, and `mask_token_id`. A plain Qwen2 at block size 1."""
    adapted = c.block_size > 1
    raw = {
        "architectures": ["Fast_dLLM_QwenForCausalLM" if adapted else "Qwen2ForCausalLM"],
        "model_type": "Fast_dLLM_Qwen" if adapted else "qwen2",
        **{key: getattr(c, key) for key in (*SHAPE_KEYS, "rms_norm_eps", "rope_theta", "tie_word_embeddings")},
        "hidden_act": "silu",
        "eos_token_id": c.stop_token_ids[0] if len(c.stop_token_ids) == 1 else list(c.stop_token_ids),
        "mask_token_id": c.mask_token_id,
        "bd_size": c.block_size if adapted else None,
    }
    return {key: value for key, value in raw.items() if value not in (None, [])}


def read_config(folder: Path, tokenizer: Tokenizer | None) -> Config:
    """The checkpoint's config, with mask and stop tokens that stand in its other files only."""
    config = parse_config(read_json(folder / "config.json"))
    stops, mask, size = list(config.stop_token_ids), config.mask_token_id, None
    if (folder / "generation_config.json").is_file():
        more = read_json(folder / "generation_config.json").get("eos_token_id") or []
        stops += more if isinstance(more, list) else [more]
    if tokenizer:
        stops += [i for i in map(tokenizer.id, ("<|im_end|>", "<|endoftext|>")) if i is not None]
        mask = tokenizer.id("|<MASK>|") if mask is None else mask
        size, rows = len(tokenizer), config.vocab_size
        require(size <= rows, f"{folder}: the tokenizer has {size} ids, the embedding only {rows} rows.")
    return replace(config, mask_token_id=mask, stop_token_ids=tuple(dict.fromkeys(stops)), tokenizer_size=size)


def read_checkpoint(path: str | os.PathLike, weights: bool = True) -> tuple[Path, Config, Tokenizer | None]:
    """Folder, config and tokenizer of a checkpoint; of a Hub id the weights are fetched only where they are wanted."""
    folder = locate(path, weights)
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    return folder, read_config(folder, tokenizer), tokenizer


def load(
    path: str | os.PathLike, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[Qwen2, Tokenizer | None]:
    """Model and tokenizer from a folder or a Hub id; the tokenizer is None where the folder has none.

    device: a torch device, or "auto": cuda, else mps, else cpu. dtype: a torch dtype or its name, or "auto": the
    files'. Tensors go from the mapped file to their parameters one by one, so memory holds the weights once.
    Raises InputError naming the file, key or tensor that is wrong, before anything runs.
    """
    device = pick_device(device)
    if isinstance(dtype, str):
        require(dtype in DTYPES, f"dtype {dtype!r} is not known; take one of {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    folder, config, tokenizer = read_checkpoint(path)
    with torch.device("meta"):
        model = Qwen2(config)

    expected = {name: list(p.shape) for name, p in model.named_parameters()}  # a tied head is the embedding, once
    files = {}
    for file in shards(folder):
        with open_weights(folder / file) as weights:
            for name in weights.keys():
                files[name] = file
                shape, wanted = weights.get_slice(name).get_shape(), expected.get(name)
                ok = wanted in (None, shape)
                require(ok, f"{file}: {name} has shape {shape}, the config asks for {wanted}.")
    repeated = config.tie_word_embeddings and files.pop("lm_head.weight", None)  # others write it again
    for names, problem in [(expected.keys() - files, "missing"), (files.keys() - expected, "not part of this model")]:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        require(not names, f"{folder}: tensor {min(names, default='')} is {problem}{more}.")
    for name in expected:  # the embedding is the first: "auto" takes its dtype
        with open_weights(folder / files[name], device) as weights:  # opened anew, so that its pages are let go
            tensor = weights.get_tensor(name)
        dtype = dtype or tensor.dtype
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(dtype)))
    model.tie()
    if repeated:
        with open_weights(folder / repeated, device) as weights:
            same = torch.equal(weights.get_tensor("lm_head.weight").to(dtype), model.lm_head.weight)
        require(same, f"{repeated}: lm_head.weight is not the embedding, but config.json has tie_word_embeddings true.")
    return model.eval(), tokenizer


def save(model: Qwen2, tokenizer: Tokenizer | None, folder: str | os.PathLike) -> None:
    """Write what `load` reads, under the published names; each file is written beside its place and renamed.

    Raises OSError where the folder cannot be written; a checkpoint that was there is then still whole. Raises
    InputError for a prepacked model, which has no weights in a form that could be written.
    """
    require(not is_prepacked(model), "A prepacked model cannot be saved; save it before `prepack`.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # a tied head is not repeated
    dtype = str(model.weight.dtype).removeprefix("torch.")
    config = json.dumps(unparse_config(model.config) | {"torch_dtype": dtype}, indent=2) + "\n"
    files = {"config.json": config.encode(), **(tokenizer.files if tokenizer else {})}
    try:
        replace_file(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    except SafetensorError as error:
        raise OSError(f"{folder / 'model.safetensors'}: cannot be written ({error})") from None
    (folder / INDEX).unlink(missing_ok=True)  # it would name the files of an older checkpoint
    for name, content in files.items():
        replace_file(folder / name, partial(Path.write_bytes, data=content))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a file under a temporary name and rename it to `path`, so that no reader ever sees half a file."""
    require(path.name, f"{path}: is a folder; name a file.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.umask(mask := os.umask(0))  # the only way to read it
        temporary.chmod(0o666 & ~mask)  # safetensors makes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
