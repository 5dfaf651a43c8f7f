"""Fast-dLLM v2 (arXiv 2509.26328) in one file: a Qwen2 that writes several tokens per forward pass.

An autoregressive (AR) model, fine-tuned a little, becomes a block-diffusion model. Text is written block by
block. A block starts as masks; each pass guesses the masked positions of a sub-block in parallel, and every
guess above a confidence threshold is kept. Finished blocks stay in a KV cache as in any AR model. With block
size 1 it is an ordinary AR model.

    model, tokenizer = load("tiny/checkpoint")
    prompt = tokenizer.chat([{"role": "user", "content": "..."}])
    [result] = generate(model, [prompt], Decoding(threshold=0.9))

Read it from top to bottom; the method itself is `Row`. The file needs torch, safetensors and tokenizers, and
works when copied alone. `fast.py` beside it makes decoding faster and changes nothing else.

Shapes: B rows of a batch, T positions of a window, S keys seen, D hidden size, H query heads, K key/value
heads, d head size, V vocabulary. Positions are absolute and start at 0; block k begins at k * block_size.
"""

import hashlib
import json
import math
import operator
import os
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import accumulate, repeat
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Encoder
from torch import Tensor, nn


class InputError(ValueError):
    """The caller's input cannot work; the message is one sentence: what is wrong, and what would work."""

    def __init__(self, sentence: str):
        super().__init__(" ".join(sentence.split()))  # one line, also where a name in it has line breaks


def require(ok: object, sentence: str) -> None:
    if not ok:
        raise InputError(sentence)


def round_up(n: int, size: int) -> int:
    """The smallest multiple of `size` that is at least `n`."""
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
    block_size: int = 1  # `bd_size`: the diffusion block of the training; 1 is a plain autoregressive Qwen2
    mask_token_id: int | None = None  # the id of a position that is not yet known; an AR model has none
    stop_token_ids: tuple[int, ...] = ()  # `eos_token_id`
    tokenizer_size: int | None = None  # ids from here on are padding rows of the embedding, never guessed
    draft_width: int | None = None  # masks of a draft that a loaded adapter was trained with
    clean: str = "block"  # committed tokens see their whole "block" (paper), or, "causal", none later


# --- Mask ---


def block_causal_mask(queries: Tensor, keys: Tensor, block_size: int, causal: Tensor | None = None) -> Tensor:
    """Which keys each query sees: those of its own block and of the blocks before it (paper, section 3).

    Attention is bidirectional inside a block and causal between blocks. Positions of queries (..., T) and
    keys (S) give (..., T, S) bool. Block size 1 is the ordinary causal mask. causal (..., 1): queries before
    this position see no later key, see `Config.clean`. In training noisy copies stand beside the text;
    `train.visibility` says what they see.
    """
    seen = queries[..., None] // block_size >= keys // block_size
    return seen if causal is None else seen & ((queries >= causal)[..., None] | (queries[..., None] >= keys))


def attention_bias(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """A bool mask (B or 1, T or 1, S) as numbers to add: 0 where a key is seen, else minus infinity.

    Returns (B or 1, 1, groups * T or 1, S): the mask, repeated for each query head of a group.
    """
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)[:, None]
    return bias if mask.shape[1] == 1 else bias.repeat(1, 1, groups, 1)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, of q (B, H, T, d), k and v (B, K, S, d); no bias: all keys are seen.

    Key head h serves H / K query heads. They see the same keys, so they become rows of one product, which
    reads the keys once.
    """
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, K, H / K * T, d)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias).reshape(q.shape)


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The `attend` of `Qwen2.forward` that makes it the ordinary AR model, without a cache."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# --- Cache ---


class KVCache:
    """Keys and values of every position of every row, allocated once and written in place.

    Position p has slot p, and every pass over p overwrites it. Only a draft's masks lie elsewhere, see
    `draft_layout`. The slots of finished blocks are the block cache (paper, section 4). Those of the block in
    work are DualCache's sub-block cache.
    """

    def __init__(self, config: Config, rows: int, length: int, weight: Tensor):
        """`weight`: any tensor with the device and dtype that the cache shall have."""
        shape = config.num_hidden_layers, rows, length, config.num_key_value_heads, config.head_dim
        self.k, self.v = weight.new_empty(shape), weight.new_empty(shape)

    def update(self, layer: int, k: Tensor, v: Tensor, write: tuple, read: tuple) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, d) at (rows, slots) `write`; return those at `read`, (B, K, S, d)."""
        for cache, new in (self.k[layer], k), (self.v[layer], v):
            cache[write] = new.transpose(1, 2)
        return self.k[layer][read].transpose(1, 2), self.v[layer][read].transpose(1, 2)

    def clear(self, row: int, start: int = 0) -> None:
        """Zero a row from `start` on: attention also reads slots that its mask hides; they must be finite."""
        self.k[:, row, start:] = self.v[:, row, start:] = 0

    def grow(self, length: int) -> None:
        """Make room for positions up to `length`; what is written stays."""
        if (more := length - self.k.shape[2]) > 0:
            self.k, self.v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.k, self.v))

    def move(self, source: int, target: int) -> None:
        """Copy a row over another one, so that the rows in use stay the first ones."""
        if source == target:
            return
        self.k[:, target], self.v[:, target] = self.k[:, source], self.v[:, source]


# --- Network ---
# Qwen2 as it is: nothing in the architecture is new. Module names are the checkpoint's tensor names.


class Linear(nn.Linear):
    """y = W x + b, plus the low-rank product of an adapter at the positions that `masked` selects."""

    adapter = None  # see "Adapter" below

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor, masked: Tensor | None = None) -> Tensor:
        y = self.product(x)
        return y if masked is None or self.adapter is None else y + self.adapter(x, masked)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, times the weight."""
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, and sin with its first half negated, (B or 1, 1, T, d) in dtype, of positions (B or 1, T)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[:, None, :, None].float() * (1.0 / config.rope_theta**exponents)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, heads, T, d): coordinates i and i + d/2 turn by angle i."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple, attend: Callable, masked: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        heads = lambda y: y.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, d)
        q, k, v = (heads(project(x, masked)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(torch.cat([q, k], dim=1), *rope).split([q.shape[1], k.shape[1]], dim=1)
        y = attend(q, k, v)  # (B, H, T, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1), masked)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor, masked: Tensor | None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x, masked)) * self.up_proj(x, masked), masked)


class Layer(nn.Module):
    """A transformer block; called layer, since "block" is always the diffusion block."""

    def __init__(self, c: Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple, attend: Callable, masked: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend, masked)
        return x + self.mlp(self.post_attention_layernorm(x), masked)


class Qwen2(nn.Module):
    """The Qwen2 transformer. Its state dict has exactly the published names."""

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
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mask_row = None  # the embedding of masks, (D), where an adapter brings its own
        self.prepacked = False  # by `fast.prepack`: then it only decodes
        self.tie()

    def tie(self) -> None:
        """Make the head's weight the embedding's, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def weight(self) -> Tensor:
        """The embedding, whose device and dtype are the model's."""
        return self.model.embed_tokens.weight

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Callable, masked: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T, D) after the last norm, of tokens (B, T) at positions (B or 1, T).

        `attend(layer, q, k, v)` is all that the network asks of its surroundings: q (B, H, T, d), k and v
        (B, K, T, d) of the window in, (B, H, T, d) out. A cache, if there is one, lives in there.
        `masked` (B, T, 1) bool says where a loaded adapter is on; None is nowhere.
        """
        x = self.model.embed_tokens(tokens)
        if masked is not None and self.mask_row is not None:
            x = torch.where(masked, self.mask_row, x)
        rope = rotary(positions, self.config, x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rope, partial(attend, i), masked)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D): the output at position i predicts the token at i + 1."""
        return self.lm_head(hidden)


# --- Windows ---
# Every pass is the same call on another window [start, start + T) of positions. It writes the window's keys
# and values into the cache in place, and each query sees all slots up to the end of its own block:
#
#                earlier blocks   block in work
# prefill        wwwwwwwwwwwwww
# full, refresh  rrrrrrrrrrrrrr   wwwwwwwwwwwwwwww      w written and read, r only read
# sub            rrrrrrrrrrrrrr   rrrrwwwwrrrrrrrr
# commit         rrrrrrrrrrrrrr   wwwwwwwwwwwwwwww      its last output: first token of the next block
# fused          rrrrrrrrrrrrrr   wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww      a commit, and the next block

PIECE = 512  # a longer window runs in pieces of so many positions: a mask's memory is quadratic in them


class Window(NamedTuple):
    """Where a pass runs, and what its queries see."""

    positions: Tensor  # (B or 1, T)
    write: tuple  # (rows, slots) of the cache for the new keys and values, see `KVCache.update`
    read: tuple  # (rows, slots) whose keys are attended to
    mask: Tensor | None  # which of the slots read each query sees, (B or 1, T or 1, S) bool; None: all


def window_pass(model: Qwen2, cache: KVCache, tokens: Tensor, window: Window, has_masks: bool) -> Tensor:
    """One pass over windows: hidden states (B, T, D) of tokens (B, T).

    With `has_masks` a loaded adapter is on at the masks. No shape depends on the values of a tensor, so that
    a pass can be recorded.
    """
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    bias = None if window.mask is None else attention_bias(window.mask, groups, model.weight.dtype)

    def attend(layer, q, k, v):
        return grouped_attention(q, *cache.update(layer, k, v, window.write, window.read), bias)

    adapted = has_masks and model.mask_row is not None
    masked = (tokens == model.config.mask_token_id)[..., None] if adapted else None
    return model(tokens, window.positions, attend, masked)


def draft_layout(tokens: Tensor, starts: Tensor, slots: Tensor, mask_id: int, width: int) -> tuple:
    """Positions (B, T) of windows with drafts, and which slots (S) each query sees, (B, T, S).

    A window (B, T) begins at slot `starts` (B, 1): the last known token, its drafts, and per token one group
    of `width` masks, at the positions after it. With one draft and width 2:

        window       known  draft   mask   mask    mask   mask
        slot           p     p+1    p+2    p+3     p+4    p+5
        position       p     p+1    p+1    p+2     p+2    p+3
        sees         ..known ..draft  ..known, group   ..draft, group

    Tokens are causal and see no mask. Without drafts there is one group, whose slots are its positions.
    """
    B, T = tokens.shape
    index, is_mask = torch.arange(T, device=tokens.device), tokens == mask_id
    first = torch.where(is_mask.any(1), is_mask.int().argmax(1), T)[:, None]  # the masks' first place
    group, place = (index - first) // width, (index - first) % width
    last = torch.where(is_mask, group, index)  # place in the window of the last token that a query sees
    positions = starts + last + torch.where(is_mask, place + 1, 0)
    at = (slots - starts)[:, None]  # each slot's place in the window, (B, 1, S)
    begin = (first + group * width)[..., None]  # of a mask's own group
    own = is_mask[..., None] & (at >= begin) & (at < begin + width) & (at < T)
    return positions, (at <= last[..., None]) | own


def layout(
    tokens: Tensor,
    starts: Tensor,
    seen: int,
    block_size: int,
    one_block: bool,
    mask_id: int | None,
    draft_width: int | None,
    causal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots and positions of windows, and which of the first `seen` slots each query sees.

    tokens (B, T); starts (B or 1, 1). one_block: each window lies in one block, so that all of its queries
    see the same. draft_width: see `draft_layout`; None: a slot is its position. causal (B or 1, 1): see
    `block_causal_mask`. Returns (B or 1, T) twice and (B or 1, T or 1, seen) bool.
    """
    keys = torch.arange(seen, device=tokens.device)
    slots = starts + torch.arange(tokens.shape[1], device=tokens.device)
    if draft_width:
        return slots, *draft_layout(tokens, starts, keys, mask_id, draft_width)
    return slots, slots, block_causal_mask(slots[:, -1:] if one_block else slots, keys, block_size, causal)


def run_window(
    model: Qwen2,
    tokens: Tensor,
    starts: list[int],
    cache: KVCache,
    block_size: int,
    rows: Sequence[int] | None = None,
    has_masks: bool = False,
    draft_width: int | None = None,
    causal: list[int] | None = None,
) -> Tensor:
    """`window_pass` over the slots [start, start + T) of each row, in pieces where the window is long.

    tokens (B, T); window i begins at `starts[i]` and belongs to row `rows[i]` of the cache (default: i).
    draft_width: the masks are groups of drafts, see `draft_layout`; else a slot is its position. causal:
    queries before `causal[i]` see no later key. Returns (B, T, D). Raises InputError for a window that must
    be cut and does not begin with a block.
    """
    B, T = tokens.shape
    rows = list(range(B)) if rows is None else list(rows)
    piece = round_up(PIECE, block_size)
    if T > piece:  # no block sees a later one, so pieces give the same
        aligned = all(start % block_size == 0 for start in starts)
        require(aligned, f"A window of more than {piece} positions must begin with a block.")
        hidden = []
        for at in range(0, T, piece):
            part, begins = tokens[:, at : at + piece], [start + at for start in starts]
            hidden.append(run_window(model, part, begins, cache, block_size, rows, has_masks, None, causal))
        return torch.cat(hidden, dim=1)
    seen = round_up(max(starts) + T, block_size)
    if causal and all(start >= end for start, end in zip(starts, causal)):
        causal = None  # no query is causal
    same_place = len(set(zip(starts, causal or starts))) == 1
    if same_place:  # then all rows share positions and mask
        starts, causal = starts[:1], causal and causal[:1]
    one_block = not causal and all(start // block_size == (start + T - 1) // block_size for start in starts)
    first, mask_id = torch.tensor(starts, device=tokens.device)[:, None], model.config.mask_token_id
    ends = causal and torch.tensor(causal, device=tokens.device)[:, None]
    slots, positions, mask = layout(tokens, first, seen, block_size, one_block, mask_id, draft_width, ends)
    if one_block and same_place and not draft_width:
        mask = None  # nothing is read behind this block: all is seen
    in_order = rows == list(range(rows[0], rows[0] + B))  # slices then read without a copy
    read = slice(rows[0], rows[0] + B) if in_order else torch.tensor(rows, device=tokens.device)
    if in_order and same_place:
        write = read, slice(starts[0], starts[0] + T)
    else:
        write = torch.tensor(rows, device=tokens.device)[:, None], slots
    window = Window(positions, write, (read, slice(seen)), mask)
    return window_pass(model, cache, tokens, window, has_masks)


# --- Guess and accept ---


def nucleus(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities after temperature and top-p, and their token ids, both (N, V), the most probable first.

    A token is dropped where the probability before it already exceeds top_p; the rest is renormalised.
    Temperature 0 leaves the probabilities as they are.
    """
    if temperature == 0:
        temperature, top_p = 1.0, 1.0
    p, ids = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_p < 1:  # at 1 nothing is dropped, whatever the rounding of the sum
        p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)
    return p / p.sum(-1, keepdim=True), ids


def guess(logits: Tensor, decoding: "Decoding", draws: Tensor) -> tuple[Tensor, Tensor]:
    """A token and its confidence for each row of logits (N, V), in float32.

    Temperature 0: the argmax and its softmax probability. Otherwise one draw, by the uniform numbers `draws`
    (N), and its probability after temperature and top-p.
    """
    if decoding.temperature == 0:
        best, tokens = logits.max(dim=-1)
        return tokens, (best - logits.logsumexp(-1)).exp()
    p, ids = nucleus(logits, decoding.temperature, decoding.top_p)
    kept = (p > 0).sum(-1, keepdim=True)
    place = torch.searchsorted(p.cumsum(-1), draws[:, None], right=True)
    # sums are rounded, so a draw may lie above them; rows of NaN keep nothing, and are reported later
    place = place.minimum(kept - 1).clamp(min=0)
    return ids.gather(1, place)[:, 0], p.gather(1, place)[:, 0]


def accept(
    confidence: list[float], threshold: float, count: int | None = None, prefix: bool = False
) -> list[int]:
    """Which guesses are kept (paper, section 4): indices into `confidence`, in order.

    Kept are all that are strictly above the threshold; if none is, the most confident one, the first on ties.
    So threshold 1 keeps exactly one. With a `count`: the `count` most confident ones, and the threshold is
    not read. With `prefix`: all before the first one that is not above the threshold, and always the first.
    """
    if count:
        return sorted(sorted(range(len(confidence)), key=lambda i: -confidence[i])[:count])
    if prefix:
        below = (i for i, c in enumerate(confidence) if i > 0 and c <= threshold)
        return list(range(next(below, len(confidence))))
    best = confidence.index(max(confidence))
    return [i for i, c in enumerate(confidence) if c > threshold or i == best]


# --- Decoding ---


def knob(default, help: str, kind: type | None = None, low=None, high=None, choices: tuple = ()):
    """A field of settings: its help on the command line, and which values it may have."""
    rule = {"help": help, "kind": kind, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=rule)


def check_knobs(settings, flags: bool = False) -> None:
    """Raises InputError for a value that its `knob` does not allow; None may stand where it is the default.

    flags: name the fields as on the command line.
    """
    for name, rule in ((f.name, f.metadata) for f in fields(settings) if "kind" in f.metadata):
        value, default = getattr(settings, name), getattr(type(settings), name)
        low, high = rule["low"], math.inf if rule["high"] is None else rule["high"]
        if rule["choices"]:
            ok, must = value in rule["choices"], f"be one of {', '.join(rule['choices'])}"
        elif rule["kind"] is int:
            ok, must = type(value) is int and low <= value <= high, f"be a whole number of at least {low}"
            must += f" and at most {high}" if high < math.inf else ""
        elif rule["kind"] is float:
            ok = isinstance(value, (int, float)) and low <= value <= high
            must = f"lie in [{low:g}, {high:g}]"
        else:
            ok, must = type(value) is bool, "be True or False"
        shown = "--" + name.replace("_", "-") if flags else name
        require(ok or (value is None and default is None), f"{shown} is {value!r}, it must {must}.")


CACHES, ACCEPTS, CLEAN = ("none", "block", "dual"), ("threshold", "prefix"), ("block", "causal")


@dataclass(frozen=True)
class Decoding:
    """How to decode; the defaults are the paper's. Raises InputError for values that cannot work."""

    block_size: int | None = knob(
        None, "Tokens denoised together; 1: AR  [default: the checkpoint's]", int, 1
    )
    sub_block_size: int = knob(8, "Window of a block that is revealed before the next one.", int, 1)
    threshold: float = knob(0.9, "Keep guesses of more confidence; 1 keeps one per pass.", float, 0, 1)
    cache: str = knob("block", "Reuse nothing, finished blocks, or also sub-blocks.", choices=CACHES)
    max_new_tokens: int = knob(256, "Longest answer.", int, 1)
    temperature: float = knob(0.0, "0: the most probable token, else sample.", float, 0, 1e4)
    top_p: float = knob(1.0, "Nucleus of the sampling.", float, 0, 1)
    stop_token_ids: tuple[int, ...] | None = None  # None: the checkpoint's; (): none
    seed: int | None = knob(None, "Makes sampling repeatable.", int, 0, 2**63 - 1)
    batch_size: int = knob(16, "Prompts decoded at the same time.", int, 1)
    tokens_per_pass: int | None = knob(
        None, "Keep exactly so many guesses per pass, instead of a threshold.", int, 1
    )
    fuse_commit: bool = knob(False, "Commit a block in one pass with the next one's first.")
    runner_up: bool = False  # also record the second-best token of each guess
    accept: str = knob(
        "threshold",
        "Keep all guesses above the threshold, or those before the first one below it.",
        choices=ACCEPTS,
    )
    verify: bool = knob(False, "Lossless: keep a guess only if AR decoding would choose it.")
    draft_width: int | None = knob(
        None, "Masks of a draft  [default: the adapter's, else half a block, ahead an eighth]", int, 1
    )
    draft_ahead: bool = knob(False, "Draft in verify passes too: fewer passes, but wider ones.")
    draft_confidence: float = knob(0.0, "Verify drafts while their joint confidence is above.", float, 0, 1)

    def __post_init__(self):
        check_knobs(self)
        tiny = 0 < self.temperature < 1e-4  # logits divided by it would overflow
        require(not tiny, f"temperature is {self.temperature}, it must be 0 or at least 0.0001.")
        stop = self.stop_token_ids
        ok = isinstance(stop, (tuple, list, set, frozenset)) and all(type(i) is int for i in stop)
        require(ok or stop is None, f"stop_token_ids is {stop!r}, it must be a list of token ids, or None.")
        if self.verify:
            block = f"verify reads what it has cached, so cache must be block, not {self.cache}."
            require(self.cache == "block", block)
            require(not self.fuse_commit, "verify has no commit passes, so leave fuse_commit out.")
        fixed = "tokens_per_pass keeps the most confident guesses, so leave accept prefix out."
        require(self.tokens_per_pass is None or self.accept == "threshold", fixed)

    def resolve(self, config: Config) -> "Decoding":
        """With the checkpoint's values for None. Raises InputError where checkpoint and options clash."""
        size, sub = self.block_size or config.block_size, self.sub_block_size
        has_mask = config.mask_token_id is not None
        if self.verify:
            no_mask = "The checkpoint has no mask token, so it cannot draft; load an adapter, or adapt it."
            require(has_mask, no_mask)
            ok = self.block_size in (None, 1, config.block_size)
            require(ok, f"verify reads as an AR model does, so leave block_size {size} out.")
            size = sub = 1
        if sub == Decoding.sub_block_size:
            sub = min(sub, size)  # only the default shrinks: a size that somebody chose must fit
        most = config.max_position_embeddings
        require(size <= most, f"block_size is {size}, the model has {most} positions; take a smaller one.")
        fits = size % sub == 0
        require(fits, f"sub_block_size {sub} does not divide block_size {size}; take a divisor of {size}.")
        adapted = "The checkpoint has no mask token, so it was never adapted: only block_size 1 (AR) works."
        require(has_mask or size == 1, adapted)
        stop = config.stop_token_ids if self.stop_token_ids is None else tuple(self.stop_token_ids)
        part = 8 if self.draft_ahead else 2  # a pass that drafts ahead grows with the square of the width
        width = self.draft_width or config.draft_width or max(1, config.block_size // part)
        found = replace(self, block_size=size, sub_block_size=sub, stop_token_ids=stop, draft_width=width)
        room = min(most, PIECE)
        wide = f"draft_width {width} needs passes of {widest(found)} tokens, more than {room}"
        require(not self.verify or widest(found) <= room, f"{wide}; take a smaller one.")
        return found


class Revealed(NamedTuple):
    """A guess of the token at a position."""

    position: int
    token: int
    confidence: float
    runner_up: tuple[int, float] | None = None  # the most probable other token, where it was asked for


@dataclass
class Pass:
    """One forward pass over one row's window: what goes in, and once it ran, what came of it."""

    kind: str  # prefill, full, refresh, sub, commit or fused; draft or verify
    start: int  # the window is [start, start + len(tokens))
    tokens: list[int]  # its input, masks included
    guessed: list[int]  # positions to guess
    outputs: list[int]  # for each of them, the place in the window whose output predicts it
    draws: Tensor  # a uniform number for each of them, at temperatures above 0
    committed: int  # once it ran, earlier positions have their final keys and values in the cache
    row: int = 0  # the prompt's index
    revealed: list[Revealed] = field(default_factory=list)  # guesses that were kept
    refused: list[Revealed] = field(default_factory=list)  # drafts that AR's prediction cuts off
    final: list[int] = field(default_factory=list)  # new tokens that no mask precedes any more, in order
    finish_reason: str | None = None  # in a row's last pass: "stop" or "length"

    @property
    def stop(self) -> int:
        """The first position after the window. Drafts share positions: there it is the last one guessed."""
        drafts = self.kind in ("draft", "verify")
        return self.guessed[-1] if drafts else self.start + len(self.tokens)


class Row:
    """One prompt while it is decoded; its next pass follows from its state (paper, section 4, algorithm 1).

        while not row.finish_reason:
            pass_ = row.next_pass()
            row.take(pass_, run(pass_))

    tokens: prompt, known tokens, kept guesses, and masks up to the end of the block in work.
    certain: every token before this position is final.
    committed: every position before this one is in a finished block whose keys and values are in the cache.
    block_cached: DualCache only; every slot of the block in work was written.
    """

    def __init__(self, prompt: Sequence[int], decoding: Decoding, mask: int | None, cached=0, index=0):
        """`decoding` is resolved; the prompt's first `cached` positions, whole blocks, are in the cache."""
        self.decoding, self.mask, self.index = decoding, mask, index
        self.tokens, self.certain, self.prompt_length = list(prompt), len(prompt), len(prompt)
        self.limit, self.finish_reason = len(prompt) + decoding.max_new_tokens, None
        self.planned: Pass | None = None  # its next pass, for `decode_rows`
        # The block of the prompt's last token always runs, since its last output may predict the first new
        # token. Blocks before it are committed as far as the cache has them; with cache none, all count.
        before = (len(prompt) - 1) // decoding.block_size * decoding.block_size
        self.committed = before if decoding.cache == "none" else min(cached, before)
        self.block_cached = False
        # confidences are float32, so the threshold must be one too
        self.threshold = torch.tensor(decoding.threshold).item()
        self.generator = torch.Generator()  # of this row alone: no other row changes what it draws
        self.generator.seed() if decoding.seed is None else self.generator.manual_seed(decoding.seed)

    def next_pass(self) -> Pass:
        """The next pass over this row. The answer must not be finished."""
        size, sub, cache = self.decoding.block_size, self.decoding.sub_block_size, self.decoding.cache
        begin = self.certain // size * size  # of the block in work
        end = begin + size
        self.tokens += [self.mask] * (end - len(self.tokens))
        start = 0 if cache == "none" else self.committed

        # 1. Commit finished blocks: they run once more without masks, and the cache keeps what that pass
        # wrote. Of the prompt this is the prefill. Where the next block has no token yet, the last output
        # predicts its first one. A fused pass also runs the next block, and guesses its first sub-block.
        # Where the checkpoint was adapted so, committed tokens see no later one, as in AR (`Config.clean`).
        if self.committed < begin:
            kind = "prefill" if begin <= self.prompt_length else "commit"
            if kind == "commit" and self.decoding.fuse_commit and size > 1 and begin + 1 < self.limit:
                return self.plan("fused", start, end, list(range(begin, begin + sub)), begin)
            return self.plan(kind, start, begin, [begin] if self.certain == begin else [], begin)

        # 2. Sub-blocks are revealed from left to right: guess the masks of the first one that has any.
        low = self.tokens.index(self.mask, begin) // sub * sub
        guessed = [i for i in range(low, low + sub) if self.tokens[i] == self.mask]

        # 3. DualCache runs the sub-block alone; the rest of its block is read from the cache, as the last
        # refresh wrote it. Such a pass has no output low - 1, which predicts position low. So it needs a
        # known token there, and a block whose slots were all written; else the whole block runs.
        if self.block_cached and self.tokens[low] != self.mask:
            return self.plan("sub", low, low + sub, guessed, self.committed)
        return self.plan("refresh" if cache == "dual" else "full", start, end, guessed, self.committed)

    def take(self, pass_: Pass, guesses: list[tuple]) -> None:
        """Accept guesses (token, confidence, runner-up) for `pass_.guessed` and complete the pass."""
        commits = pass_.committed > self.committed
        self.committed = pass_.committed
        if commits:  # the next block begins, whose slots only a fused pass has written
            self.block_cached = self.decoding.cache == "dual" and pass_.kind == "fused"
        elif pass_.kind == "refresh":
            self.block_cached = True
        if guesses:
            confidence = [c for _, c, _ in guesses]
            if commits:
                # The first token of a block is predicted by the finished block before it, which holds no
                # mask: as in AR decoding it is kept at any confidence.
                confidence[0] = 1.0
            prefix = self.decoding.accept == "prefix"
            kept = accept(confidence, self.threshold, self.decoding.tokens_per_pass, prefix)
            pass_.revealed = [Revealed(pass_.guessed[i], *guesses[i]) for i in kept]
        self.finish(pass_)

    def plan(self, kind: str, start: int, stop: int, guessed: list[int], committed: int) -> Pass:
        """A pass over positions [start, stop)."""
        outputs = [i - 1 - start for i in guessed]  # token shift (section 3): output i - 1 predicts i
        draws = self.draw(guessed) if self.decoding.temperature else torch.empty(0)
        return Pass(kind, start, self.tokens[start:stop], guessed, outputs, draws, committed, self.index)

    def draw(self, guessed: list[int]) -> Tensor:
        """A uniform number for each guess; positions are drawn anew in every pass."""
        return torch.rand(len(guessed), generator=self.generator)

    def finish(self, pass_: Pass) -> None:
        """Write the revealed tokens and move `certain` over what is final now.

        The answer ends early at a stop token, as soon as no mask precedes it.
        """
        for kept in pass_.revealed:
            self.tokens[kept.position : kept.position + 1] = [kept.token]  # replaces a mask, or is appended
        for token in self.tokens[self.certain : self.limit]:
            if token == self.mask or self.finish_reason:
                break
            pass_.final.append(token)
            self.certain += 1
            if token in self.decoding.stop_token_ids:
                self.finish_reason = "stop"
            elif self.certain == self.limit:
                self.finish_reason = "length"
        pass_.finish_reason = self.finish_reason


class VerifiedRow(Row):
    """A row that keeps only the guesses that AR decoding would choose, so the answer is AR's.

    All passes have block size 1. Draft and verify passes take turns. A draft pass adds AR's next token, and
    drafts what follows. A verify pass adds the drafts that AR agrees with, then AR's next token. If no draft
    is worth verifying, another draft pass follows. With `draft_ahead` a verify pass also drafts, behind each
    token that may be the last one kept, and the next pass verifies again. After the prefill all but the last
    known token is committed.
    """

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.drafts = []  # list of Revealed, for the positions from `certain` on
        self.numbers = []  # what AR draws for each new position, uniform in [0, 1)

    def next_pass(self) -> Pass:
        start, room, width = self.committed, self.limit - self.certain, self.decoding.draft_width
        if self.certain == self.prompt_length:
            return self.plan("prefill", start, self.certain, [self.certain], self.certain)

        # 1. Draft: the last known token, then masks. That token sees nothing behind it, so its output is AR's
        # prediction, and its keys and values are final. A mask also sees the other masks, and its output
        # drafts the position after it (token shift). Masks whose drafts could not be kept are left out.
        # 2. Verify: the last known token, then the drafts, all causal: the outputs are AR's predictions.
        # 3. Draft ahead: behind the drafts, a group of masks for each token that may be the last one kept.
        self.drafts = self.drafts[: room - 1]
        if self.drafts:
            kind, masks = "verify", width if self.decoding.draft_ahead else 0
        else:  # this pass and its verification each write a token of AR's, so room - 2 drafts can be kept
            kind, masks = "draft", min(width, max(0, room - 2))
        window = [self.tokens[start], *(draft.token for draft in self.drafts)]
        # The token at position i predicts position i + 1. The masks of its group are at i + 1, i + 2, ... and
        # predict the position after their own.
        after = range(self.certain, self.certain + len(window))
        guessed = [*after, *(position + i for position in after for i in range(1, masks + 1))]
        draws = self.draw(guessed) if self.decoding.temperature else torch.empty(0)
        tokens = window + [self.mask] * (masks * len(window))
        return Pass(kind, start, tokens, guessed, range(len(tokens)), draws, self.certain, self.index)

    def take(self, pass_: Pass, guesses: list[tuple]) -> None:
        """Keep AR's prediction, and before it the drafts that AR predicts too; note what is drafted next."""
        found = [Revealed(position, *guess) for position, guess in zip(pass_.guessed, guesses)]
        agree = [draft.token == guess.token for draft, guess in zip(self.drafts, found)]
        kept = [*agree, False].index(False)  # a draft pass has none to compare
        pass_.revealed, refused = found[: kept + 1], self.drafts[kept:]
        self.committed = pass_.committed = pass_.committed + kept
        groups = len(agree) + 1  # group k drafts what follows if k drafts are kept
        masks = len(found) // groups - 1  # of a group
        self.drafts = self.promising(found[groups + masks * kept :][:masks])
        self.finish(pass_)
        end = self.certain if self.finish_reason else self.limit  # AR never comes to drafts behind the end
        pass_.refused = [draft for draft in refused if draft.position < end]

    def promising(self, drafts: list[Revealed]) -> list[Revealed]:
        """The first drafts, as long as the product of their confidences is above `draft_confidence`."""
        joint = accumulate((draft.confidence for draft in drafts), operator.mul)  # it never rises
        return [draft for draft, p in zip(drafts, joint) if p > self.decoding.draft_confidence]

    def draw(self, guessed: list[int]) -> Tensor:
        """The numbers that AR draws for these positions, the same in every pass: so samples are AR's too."""
        while len(self.numbers) <= max(guessed) - self.prompt_length:
            self.numbers += torch.rand(1, generator=self.generator).tolist()
        return torch.tensor([self.numbers[i - self.prompt_length] for i in guessed])


def check_prompt(prompt: Sequence[int], decoding: Decoding, config: Config) -> list[int]:
    """The prompt as a list of ints. Raises InputError where it cannot be decoded."""
    try:
        prompt = [operator.index(token) for token in prompt]
    except TypeError:
        lists = "Prompts are a list of lists of token ids; encode text first, and wrap one prompt."
        raise InputError(lists) from None
    vocab, limit = config.tokenizer_size or config.vocab_size, config.max_position_embeddings
    require(prompt, "The prompt is empty; give at least one token.")
    mask = config.mask_token_id
    stray = next((token for token in prompt if not 0 <= token < vocab), None)
    require(stray is None, f"The prompt has token id {stray}, outside the vocabulary of {vocab}.")
    ok = mask not in prompt
    require(ok, f"The prompt has the mask token, id {mask}, which only the decoder may write.")
    total = len(prompt) + decoding.max_new_tokens
    sizes = f"{len(prompt)} prompt tokens and {decoding.max_new_tokens} new ones make {total} positions"
    require(total <= limit, f"{sizes}, the model has {limit}; lower max_new_tokens or shorten the prompt.")
    return prompt


class Memory:
    """A conversation's cache, kept from one `decode` to the next: a turn runs only what is new in it."""

    def __init__(self):
        self.cache, self.block_size = None, 0
        self.tokens = []  # those whose keys and values are committed

    def recall(self, prompt: Sequence[int], block_size: int) -> int:
        """How many first positions of the prompt, whole blocks, are in the cache; the rest is forgotten."""
        kept = self.tokens if block_size == self.block_size else []
        equal = [a == b for a, b in zip(kept, prompt)]
        known = [*equal, False].index(False) // block_size * block_size
        self.tokens, self.block_size = self.tokens[:known], block_size
        return known

    def keep(self, cache: KVCache, pass_: Pass) -> None:
        """Take note of what a pass has committed."""
        if pass_.committed > len(self.tokens):
            self.cache = cache
            self.tokens[pass_.start :] = pass_.tokens[: pass_.committed - pass_.start]


def decode(
    model: Qwen2,
    prompts: Iterable[Sequence[int]],
    decoding: Decoding,
    memory: Memory | None = None,
    recorded=None,
) -> Iterator[Pass]:
    """Decode prompts (lists of token ids), yielding each `Pass` of each row once it is complete.

    Each row advances independently. Rows with windows of equal width share a forward pass, and so do prompts
    of nearly the same length. A finished row's place goes to the next prompt. A prompt gets the tokens that
    it gets alone; in bfloat16 up to rounding, which depends on what shares its passes.
    memory: for one prompt of one model; what an earlier call has committed is not run again.
    recorded: `fast.RecordedPasses`, for CUDA.
    Raises InputError, before anything runs, for options or prompts that cannot work.
    """
    decoding = decoding.resolve(model.config)
    prompts = [check_prompt(prompt, decoding, model.config) for prompt in prompts]
    require(memory is None or len(prompts) == 1, f"A memory serves one prompt, not {len(prompts)}.")
    require(not (memory and recorded), "Recorded passes have a cache of their own; leave the memory out.")
    return decode_rows(model, prompts, decoding, memory, recorded)


@torch.inference_mode()
def decode_rows(
    model: Qwen2, prompts: list[list[int]], decoding: Decoding, memory: Memory | None, recorded
) -> Iterator[Pass]:
    """`decode` with resolved options and checked prompts. Row i of the cache belongs to `rows[i]`."""
    size, count = decoding.block_size, min(len(prompts), decoding.batch_size)
    longest = max((len(prompt) for prompt in prompts), default=0) + decoding.max_new_tokens
    # a window of drafts may write past its row's last token
    length = round_up(longest, size) + decoding.verify * widest(decoding)
    if recorded:
        cache = recorded.claim(model, count, length)
    else:
        cache = memory and memory.cache or KVCache(model.config, count, length, model.weight)
        cache.grow(length)
    waiting = iter(enumerate(prompts))
    row_class = VerifiedRow if decoding.verify else Row

    def admit(place: int) -> Row | None:
        """The next waiting prompt, if any, as the row at this place of the cache."""
        index, prompt = next(waiting, (None, None))
        if prompt is None:
            return None
        cached = memory.recall(prompt, size) if memory else 0
        cache.clear(place, cached)
        row = row_class(prompt, decoding, model.config.mask_token_id, cached, index)
        row.planned = row.next_pass()
        return row

    try:
        rows = [admit(place) for place in range(count)]
        while rows:
            # 1. choose the rows that run together: prefills first, then the width that most rows wait for
            widths = [shared_width(row.planned, decoding) for row in rows]
            width = max(widths, key=lambda w: (w[0], widths.count(w)))
            group = [place for place, w in enumerate(widths) if w == width]
            # 2. run their passes as one
            passes = [rows[place].planned for place in group]
            guesses = run_passes(model, cache, group, passes, decoding, recorded)
            # 3. each row takes its guesses and plans its next pass
            for place, pass_, found in zip(group, passes, guesses):
                row = rows[place]
                row.take(pass_, found)
                row.planned = None if row.finish_reason else row.next_pass()
                if memory:
                    memory.keep(cache, pass_)
                yield pass_
                row.finish_reason = pass_.finish_reason  # a caller may set it, to end this row alone
            # 4. the next prompts take the places of finished rows; without any, the last row moves there
            for place in reversed(group):  # from the back: the row that moves has not finished
                if rows[place].finish_reason:
                    if row := admit(place):
                        rows[place] = row
                    else:
                        cache.move(len(rows) - 1, place)
                        rows[place] = rows[-1]
                        rows.pop()
    finally:  # also where the caller breaks off
        if recorded:
            recorded.release()


def shared_width(pass_: Pass, decoding: Decoding) -> tuple[bool, int]:
    """Passes with equal keys can run as one. A key is whether the pass is a prefill, and a width.

    The width of a prefill is rounded up to 64, that of a verification is the widest possible one.
    """
    if pass_.kind == "prefill":
        return True, round_up(len(pass_.tokens), 64)
    return False, widest(decoding) if pass_.kind == "verify" else len(pass_.tokens)


def widest(decoding: Decoding) -> int:
    """Tokens in the widest pass that verifies."""
    tokens = decoding.draft_width + 1
    return tokens * tokens if decoding.draft_ahead else tokens


def run_passes(
    model: Qwen2, cache: KVCache, places: list[int], passes: list[Pass], decoding: Decoding, recorded
) -> list[list]:
    """Run passes of one `shared_width` as one forward pass; pass i belongs to row `places[i]` of the cache.

    Returns the guesses (token, confidence, runner-up) of each pass. Shorter windows are padded on the right.
    Only prefills and verifications are padded. They end with a whole block, so their tokens do not see the
    padding. Later passes overwrite the padding's slots before they read them.
    """
    width = max(len(pass_.tokens) for pass_ in passes)
    outputs = [n * width + place for n, pass_ in enumerate(passes) for place in pass_.outputs]
    draws = torch.cat([pass_.draws for pass_ in passes])
    tokens = torch.tensor([pass_.tokens + [0] * (width - len(pass_.tokens)) for pass_ in passes])
    starts = [pass_.start for pass_ in passes]
    has_masks = any(model.config.mask_token_id in pass_.tokens for pass_ in passes)
    # at block size 1 all tokens are causal anyway
    is_causal = model.config.clean == "causal" and decoding.block_size > 1
    causal = [pass_.committed for pass_ in passes] if is_causal else None
    if recorded and passes[0].kind != "prefill":
        found = recorded.run(places, tokens, starts, outputs, draws, decoding, has_masks, causal)
    else:
        device = model.weight.device
        drafts = decoding.draft_width if decoding.verify and has_masks else None
        size, tokens = decoding.block_size, tokens.to(device)
        hidden = run_window(model, tokens, starts, cache, size, places, has_masks, drafts, causal)
        if not outputs:
            return [[] for _ in passes]
        hidden = hidden.flatten(0, 1)[torch.tensor(outputs, device=device)]
        found = best_guesses(model, hidden, draws, decoding)
    table = found.tolist()  # the pass's one transfer back
    nan = any(math.isnan(confidence) for _, confidence, *_ in table)
    require(not nan, "The model's output is NaN; in float16 it may overflow, then bfloat16 or float32 works.")
    guesses = ((int(t), c, (int(more[0]), more[1]) if more else None) for t, c, *more in table)
    return [[next(guesses) for _ in pass_.guessed] for pass_ in passes]


def best_guesses(model: Qwen2, hidden: Tensor, draws: Tensor, decoding: Decoding) -> Tensor:
    """The guess of each hidden state (N, D): token and confidence, (N, 2); with the runner-up's, (N, 4).

    All are float32, which holds any id below 2**24.
    """
    mask_id, size = model.config.mask_token_id, model.config.tokenizer_size

    def columns(logits: Tensor, draws: Tensor) -> Tensor:
        logits = logits[:, :size].float()
        found = [*guess(logits, decoding, draws)]
        if decoding.runner_up:
            p = logits.softmax(dim=-1).scatter(1, found[0][:, None], 0.0)
            found += [p.argmax(dim=-1), p.amax(dim=-1)]
        return torch.stack([column.float() for column in found], dim=1)

    logits, draws = model.logits(hidden), draws.to(hidden.device)
    if mask_id is not None:
        logits[:, mask_id] = -torch.inf  # a mask is no guess
    # on a CPU a few rows at a time: what is read several times then stays in a core's cache
    rows = max(1, 2**18 // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(rows), draws.split(rows) if len(draws) else repeat(draws))
    return torch.cat([columns(*part) for part in parts])


@dataclass
class Result:
    """What was generated for one prompt."""

    tokens: list[int] = field(default_factory=list)  # new ones, through the stop token
    finish_reason: str | None = None  # "stop" or "length"; None where decoding was broken off
    passes: dict[str, int] = field(default_factory=dict)  # kind -> count

    def add(self, pass_: Pass) -> None:
        """Take in the row's next pass."""
        self.tokens += pass_.final
        self.passes[pass_.kind] = self.passes.get(pass_.kind, 0) + 1
        self.finish_reason = pass_.finish_reason

    @property
    def forward_passes(self) -> int:
        """Passes that wrote the answer: all but the prefill."""
        return sum(self.passes.values()) - self.passes.get("prefill", 0)


def generate(
    model: Qwen2, prompts: Iterable[Sequence[int]], decoding: Decoding, recorded=None
) -> list[Result]:
    """Decode prompts (lists of token ids) to the end: one result per prompt, in order. Raises as `decode`."""
    prompts = list(prompts)
    results = [Result() for _ in prompts]
    for pass_ in decode(model, prompts, decoding, recorded=recorded):
        results[pass_.row].add(pass_)
    return results


# --- Tokenizer ---

# how Qwen2 splits text into words before byte-pair encoding
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_FILES = (
    "tokenizer.json vocab.json merges.txt added_tokens.json tokenizer_config.json chat_template.jinja"
).split()


def brief(text: object) -> str:
    """One line of at most 200 characters, for foreign text in a message."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else line[:197] + "..."


def call_tokenizer(problem: str, function: Callable, *args, **options):
    """`function`'s result. Raises InputError with `problem` where the tokenizers library fails."""
    try:
        return function(*args, **options)
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics are not even that
        raise InputError(f"{problem}: {brief(repr(error))}") from None


class Tokenizer:
    """Text to token ids and back, and ChatML."""

    def __init__(self, encoder: Encoder, system: str | None, files: dict[str, bytes]):
        self.encoder = encoder
        self.system = system  # the default system message of a chat
        self.files = files  # contents by name, so that `save` can copy the tokenizer
        self.size = max(encoder.get_vocab().values(), default=-1) + 1

    def __len__(self) -> int:
        """The largest id plus 1."""
        return self.size

    def id(self, token: str) -> int | None:
        return self.encoder.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are recognised. Raises InputError for invalid text."""
        valid = text.isascii() or text.encode(errors="ignore").decode() == text
        require(valid, f"No valid Unicode text: {brief(ascii(text))}.")
        return call_tokenizer("Cannot encode text", self.encoder.encode, text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.encoder.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat(self, messages: Sequence[dict], system: bool = True) -> list[int]:
        """ChatML of messages with `role` and `content`, up to where the assistant's turn begins.

        The default system message is added where there is none; `system=False` omits it, to continue a chat.
        """
        if system and self.system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.system}, *messages]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return self.encode(text + "<|im_start|>assistant\n")

    def stream(self, chunks: Iterable[Sequence[int]]) -> Iterator[str]:
        """Text of ids that arrive in chunks; a character is yielded as soon as its last byte has arrived."""
        stream, ids, written = decoders.DecodeStream(skip_special_tokens=True), [], 0
        for chunk in chunks:
            ids += chunk
            text = "".join(stream.step(self.encoder, i) or "" for i in chunk)
            written += len(text)
            yield text
        yield self.decode(ids)[written:]  # bytes that never became a character


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """From `tokenizer.json`, or `vocab.json` and `merges.txt`, with added tokens of `tokenizer_config.json`
    or `added_tokens.json`. Raises InputError for missing, damaged or contradictory files."""
    folder = Path(folder)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    complete = "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files.keys()
    require(complete, f"{folder}: no tokenizer; tokenizer.json, or vocab.json and merges.txt, must be there.")
    return call_tokenizer(f"{folder}: the tokenizer files cannot be read", build_tokenizer, folder, files)


def build_tokenizer(folder: Path, files: dict[str, bytes]) -> Tokenizer:
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    listed = {int(i): entry for i, entry in settings.get("added_tokens_decoder", {}).items()}
    if "added_tokens.json" in files and not listed:
        names = json.loads(files["added_tokens.json"])
        listed = {i: {"content": name, "special": True} for name, i in names.items()}
    if "tokenizer.json" in files:
        encoder = Encoder.from_buffer(files["tokenizer.json"])
        encoder.no_truncation()
        encoder.no_padding()
        own = json.loads(files["tokenizer.json"]).get("added_tokens", [])
        listed = {entry["id"]: entry for entry in own} | listed
    else:
        encoder = Encoder(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        encoder.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        encoder.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
        encoder.decoder = decoders.ByteLevel()
    for i, entry in sorted(listed.items()):
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        token = AddedToken(entry["content"], **{flag: entry.get(flag, False) for flag in flags})
        add = encoder.add_special_tokens if token.special else encoder.add_tokens
        add([token])
        got = encoder.token_to_id(token.content)  # the library numbers tokens itself and ignores listed ids
        what = f"added token {token.content!r:.100}"
        require(got == i, f"{folder}: {what} is listed as id {i} but becomes {got}.")
    # chats are ChatML: of a chat template only the default system message is used
    template = str(settings.get("chat_template") or files.get("chat_template.jinja", b"").decode())
    match = re.search(r"<\|im_start\|>system(?:\\n|\n)([^{<']+)<\|im_end\|>", template)
    system = None if template else "You are a helpful assistant."
    system = match[1] if match else system
    return Tokenizer(encoder, system, files)


# --- Load and save ---

NAMES = list(Config.__annotations__)
SAME_KEYS = NAMES[: NAMES.index("block_size")]  # fields that config.json has under the same names
SIZES = NAMES[: NAMES.index("rms_norm_eps")]
REQUIRED = {"model_type", *SIZES} - {"head_dim"}
INDEX = "model.safetensors.index.json"  # tensor name -> file, for weights in several files
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}


def read_json(path: Path) -> dict:
    """A JSON file's object. Raises InputError for a missing or invalid file."""
    require(path.is_file(), f"{path.parent}: {path.name} is missing.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {brief(error)}") from None
    require(isinstance(content, dict), f"{path}: must hold one JSON object.")
    return content


def locate(path: str | os.PathLike, weights: bool = True, files: list[str] | None = None) -> Path:
    """The folder `path`, or of a Hub id the download: `files`, else a checkpoint with `weights` or not."""
    if Path(path).is_dir():
        return Path(path)
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
    require(hub_id, f"{brief(path)}: no such folder; give a checkpoint's folder or a Hub id like owner/name.")
    from huggingface_hub import snapshot_download  # comes with tokenizers; only needed here

    download = partial(snapshot_download, str(path))
    try:
        if files:
            return Path(download(allow_patterns=files))
        small = ["config.json", "generation_config.json", INDEX, *TOKENIZER_FILES]
        folder = Path(download(allow_patterns=small))  # with the index, which names the weight files
        return Path(download(allow_patterns=[*small, *shards(folder)])) if weights else folder
    except InputError:
        raise
    except Exception as error:  # no network, no such repository, no space
        reason = brief(error) or type(error).__name__
        raise InputError(
            f"{path}: no such folder, and as a Hub id it could not be downloaded ({reason}); where there is "
            f"a network, `hf download {path} --local-dir FOLDER` fetches it, then give FOLDER."
        ) from None


def shards(folder: Path) -> list[str]:
    """Names of the checkpoint's weight files. Raises InputError for an index that names anything else."""
    if not (folder / INDEX).is_file():
        return ["model.safetensors"]
    index = read_json(folder / INDEX).get("weight_map")
    # a download reads the names as patterns, so only plain names are allowed
    plain = lambda name: isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
    ok = isinstance(index, dict) and index and all(map(plain, index.values()))
    require(ok, f"{folder / INDEX}: weight_map must name .safetensors files of the same folder.")
    return sorted(set(index.values()))


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by name in a safetensors file. Raises InputError for damage, and for dtypes not in `DTYPES`."""
    require(path.is_file(), f"{path.parent}: {path.name} is missing.")
    try:
        with safe_open(path, framework="pt") as weights:
            parts = {name: weights.get_slice(name) for name in weights.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or no safetensors file: {brief(error)}") from None
    for name, part in parts.items():
        ok = part.get_dtype() in ("F32", "BF16", "F16")
        require(ok, f"{path.name}: {brief(name)} is {part.get_dtype()}, only F32, BF16 and F16 are loaded.")
    return {name: part.get_shape() for name, part in parts.items()}


def pick_device(device: str) -> str:
    """The device, with "auto" resolved. Raises InputError for one that is not available."""
    there = [name for name in ("cuda", "mps") if getattr(torch, name).is_available()] + ["cpu"]
    device = there[0] if device == "auto" else str(device)
    try:
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, ImportError):  # an unknown name, or what this build of torch lacks
        raise InputError(f"device {device!r} is not available here, only {', '.join(there)}.") from None
    return device


is_integer = lambda low: lambda x: type(x) is int and low <= x < 2**31
is_number = lambda low, high: lambda x: type(x) in (int, float) and low <= x <= high
is_plain = lambda x: isinstance(x, dict) and x.get("rope_type", x.get("type", "default")) == "default"
as_list = lambda x: x if isinstance(x, list) else [] if x is None else [x]

# key of config.json -> whether a value is valid, and what it must be
RULES: dict[str, tuple[Callable, str]] = {
    **dict.fromkeys([*SIZES, "bd_size"], (is_integer(1), "a positive integer below 2**31")),
    "rms_norm_eps": (is_number(0, 1), "a number from 0 to 1"),
    "rope_theta": (is_number(1, 1e12), "a number from 1 to 1e12"),
    "tie_word_embeddings": (lambda x: type(x) is bool, "true or false"),
    "mask_token_id": (is_integer(0), "a token id"),
    "clean": (lambda x: x in CLEAN, "block or causal"),
    "eos_token_id": (lambda x: all(map(is_integer(0), as_list(x))), "a token id or a list of token ids"),
    "model_type": (lambda x: x in ("qwen2", "Fast_dLLM_Qwen"), "qwen2 or Fast_dLLM_Qwen"),
    "hidden_act": (lambda x: x == "silu", "silu"),
    "rope_scaling": (is_plain, "null: scaled rotary positions are not built"),
    "rope_parameters": (is_plain, "of rope_type default: rope_scaling is not built"),
    "use_sliding_window": (lambda x: x is False, "false: sliding windows are not built"),
    "layer_types": (lambda x: all(kind == "full_attention" for kind in as_list(x)), "full_attention"),
}


def parse_config(raw: dict) -> Config:
    """From the contents of `config.json`. Raises InputError for invalid values and for what is not built."""
    rope, c = raw.get("rope_parameters"), {"bd_size": 1, "rope_theta": 10000.0}  # Transformers' default
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None  # where newer Transformers keep it
    for part in ({"rope_theta": theta}, raw):
        c |= {key: value for key, value in part.items() if value is not None}
    for key, (valid, rule) in RULES.items():  # reprlib is short, also for values too deep for repr
        ok = valid(c[key]) if key in c else key not in REQUIRED
        require(ok, f"config.json: {key} is {reprlib.repr(c.get(key))}, it must be {rule}.")
    hidden, heads, groups = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    head_dim, vocab, mask = c.get("head_dim", hidden // heads), c["vocab_size"], c.get("mask_token_id")
    rows = max(vocab, c["intermediate_size"], heads * head_dim)
    for ok, problem in [
        ("head_dim" in c or hidden % heads == 0, f"hidden_size {hidden} does not divide by {heads} heads"),
        (heads % groups == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"),
        (head_dim % 2 == 0, f"head_dim is {head_dim}, rotary positions need an even one"),
        (mask is None or mask < vocab, f"mask_token_id {mask} is outside the vocabulary of {vocab}"),
        (rows * hidden < 2**40, f"a weight of {rows} x {hidden} numbers is too large"),
        (c["num_hidden_layers"] <= 1000, f"num_hidden_layers {c['num_hidden_layers']} is more than 1000"),
    ]:
        require(ok, f"config.json: {problem}.")
    return Config(
        **{key: c[key] for key in SAME_KEYS if key in c} | {"head_dim": head_dim},
        block_size=c["bd_size"],
        clean=c.get("clean", "block"),
        mask_token_id=mask,
        stop_token_ids=tuple(as_list(c.get("eos_token_id"))),
    )


def unparse_config(c: Config) -> dict:
    """The contents of `config.json`, published keys and `mask_token_id`; block size 1 is a plain Qwen2."""
    adapted = c.block_size > 1
    raw = {
        "architectures": ["Fast_dLLM_QwenForCausalLM" if adapted else "Qwen2ForCausalLM"],
        "model_type": "Fast_dLLM_Qwen" if adapted else "qwen2",
        **{key: getattr(c, key) for key in SAME_KEYS},
        "hidden_act": "silu",
        "eos_token_id": c.stop_token_ids[0] if len(c.stop_token_ids) == 1 else list(c.stop_token_ids),
        "mask_token_id": c.mask_token_id,
        "bd_size": c.block_size if adapted else None,
        "clean": "causal" if adapted and c.clean == "causal" else None,
    }
    return {key: value for key, value in raw.items() if value not in (None, [])}


def read_config(folder: Path, tokenizer: Tokenizer | None) -> Config:
    """The checkpoint's config, with stop and mask tokens of `generation_config.json` and the tokenizer."""
    raw = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        more = read_json(folder / "generation_config.json").get("eos_token_id")
        raw["eos_token_id"] = as_list(raw.get("eos_token_id")) + as_list(more)
    config = parse_config(raw)
    stops, mask, size = list(config.stop_token_ids), config.mask_token_id, None
    if tokenizer:
        stops += [i for i in map(tokenizer.id, ("<|im_end|>", "<|endoftext|>")) if i is not None]
        mask = tokenizer.id("|<MASK>|") if mask is None else mask
        size, rows = len(tokenizer), config.vocab_size
        require(size <= rows, f"{folder}: the tokenizer has {size} ids, the embedding only {rows} rows.")
    stops = tuple(dict.fromkeys(stops))
    return replace(config, mask_token_id=mask, stop_token_ids=stops, tokenizer_size=size)


def read_checkpoint(path: str | os.PathLike, weights: bool = True) -> tuple[Path, Config, Tokenizer | None]:
    """Folder, config and tokenizer of a checkpoint; `weights=False` leaves out a Hub id's weights."""
    folder = locate(path, weights)
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    tokenizer = load_tokenizer(folder) if has_tokenizer else None
    return folder, read_config(folder, tokenizer), tokenizer


def load(
    path: str | os.PathLike,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    adapter: str | os.PathLike | None = None,
) -> tuple[Qwen2, Tokenizer | None]:
    """Model and tokenizer from a folder or a Hub id; the tokenizer is None where the folder has none.

    device: a torch device, or "auto": cuda, else mps, else cpu. dtype: one of `DTYPES` or its name; "auto" is
    the embedding's dtype in the file. adapter: see `load_adapter`. Raises InputError naming the file, key or
    tensor that is wrong.
    """
    device, wanted = pick_device(device), DTYPES.get(dtype, dtype)
    require(wanted in DTYPES.values(), f"dtype {dtype!r} is not known; take one of {', '.join(DTYPES)}.")
    folder, config, tokenizer = read_checkpoint(path)
    with torch.device("meta"):
        model = Qwen2(config)
    load_weights(model, folder, device, wanted)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval(), tokenizer


def load_weights(model: Qwen2, folder: Path, device: str, dtype: torch.dtype | None) -> None:
    """Fill a model on the meta device. Tensors are read one by one, so memory holds the weights once."""
    expected = {name: list(p.shape) for name, p in model.named_parameters()}  # without a tied head
    files = {}
    for file in shards(folder):
        for name, shape in tensor_shapes(folder / file).items():
            files[name], wanted = file, expected.get(name, shape)
            require(shape == wanted, f"{file}: {name} has shape {shape}, the config asks for {wanted}.")
    tied_head = model.config.tie_word_embeddings and files.pop("lm_head.weight", None)  # some files repeat it
    missing, unknown = expected.keys() - files, files.keys() - expected
    for names, problem in [(missing, "missing"), (unknown, "not part of this model")]:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        require(not names, f"{folder}: tensor {brief(min(names, default=''))} is {problem}{more}.")
    for name in expected:  # the embedding comes first and decides the dtype "auto"
        with safe_open(folder / files[name], "pt") as weights:  # opened anew, so that its pages are freed
            tensor = weights.get_tensor(name)
        dtype = dtype or tensor.dtype
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(device, dtype)))
    model.tie()
    if tied_head:
        with safe_open(folder / tied_head, "pt") as weights:
            same = torch.equal(weights.get_tensor("lm_head.weight").to(device, dtype), model.lm_head.weight)
        require(same, f"{tied_head}: lm_head.weight is not the embedding, but tie_word_embeddings is true.")


def save(model: Qwen2, tokenizer: Tokenizer | None, folder: str | os.PathLike) -> None:
    """Write what `load` reads, under the published names.

    Raises OSError where the folder cannot be written; an older checkpoint's files are then complete. Raises
    InputError for a prepacked model, since its weights have no portable form.
    """
    require(not model.prepacked, "A prepacked model cannot be saved; save it before `prepack`.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # a tied head once
    dtype = str(model.weight.dtype).removeprefix("torch.")
    config = json.dumps(unparse_config(model.config) | {"torch_dtype": dtype}, indent=2) + "\n"
    files = {"config.json": config.encode(), **(tokenizer.files if tokenizer else {})}
    write_tensors(folder / "model.safetensors", weights)
    (folder / INDEX).unlink(missing_ok=True)  # an older checkpoint's index would name other files
    for name, content in files.items():
        replace_file(folder / name, partial(Path.write_bytes, data=content))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary file and rename it to `path`, so that no reader ever sees half a file.

    A symbolic link stays, and its target is replaced. Raises InputError for a folder, a device or a pipe.
    """
    require(path.is_file() or not path.exists(), f"{path}: is no regular file; name another.")
    path = Path(os.path.realpath(path))  # a link's target
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.umask(mask := os.umask(0))  # the only way to read the umask
        temporary.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """`replace_file` for a safetensors file. Raises OSError where it cannot be written."""
    try:
        replace_file(path, lambda part: save_file(tensors, part, {"format": "pt"}))
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({brief(error)})") from None


# --- Adapter ---
# A low-rank adapter (LoRA) that is on at masks only: the model learns to draft, and its own predictions stay
# the same. The folder has PEFT's layout, and the embedding of masks is stored as PEFT stores trained rows.

MASK_ROW = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """(alpha / r) B A x where `masked`, else 0: an adapter's part of a layer; A is (r, in), B (out, r).

    On CPUs it is float32, where so small a product is several times as fast as in bfloat16.
    """

    def __init__(self, linear: Linear, r: int, scale: float):
        super().__init__()
        out_size, in_size = linear.weight.shape
        on_cpu = linear.weight.device.type == "cpu"
        zeros = partial(linear.weight.new_zeros, dtype=torch.float32 if on_cpu else None)
        self.A, self.B = nn.Parameter(zeros((r, in_size))), nn.Parameter(zeros((out_size, r)))
        self.scale = scale

    def forward(self, x: Tensor, masked: Tensor) -> Tensor:
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype  # a training on CUDA keeps float32
        A, B = self.A.to(dtype), self.B.to(dtype)
        low = torch.where(masked, F.linear(x.to(dtype), A) * self.scale, 0)
        return F.linear(low, B).to(x.dtype)


def names_of(layer: str) -> list[str]:
    """PEFT's names of a layer's A and B."""
    return [f"base_model.model.{layer}.lora_{part}.weight" for part in "AB"]


def adapted_layers(model: Qwen2) -> dict[str, Linear]:
    """The layers that an adapter changes, under their tensors' names."""
    named = model.named_modules()
    return {name: layer for name, layer in named if isinstance(layer, Linear) and name.endswith(TARGETS)}


def add_adapter(model: Qwen2, r: int, alpha: float) -> None:
    """Give every linear layer but the head a `LowRank` of zeros, and masks a row of their own.

    None of it is in the model's state dict, which stays the base's. Raises InputError for an r that no layer
    of this size can have.
    """
    layers = adapted_layers(model).values()
    largest = min(min(layer.weight.shape) for layer in layers)
    require(1 <= r <= largest, f"The adapter's r is {r}, this model's layers allow 1 to {largest}.")
    for layer in layers:
        # not registered as a submodule, so that it stays out of the state dict
        object.__setattr__(layer, "adapter", LowRank(layer, r, alpha / r))
    model.mask_row = model.weight.new_zeros(model.config.hidden_size)


def adapter_tensors(model: Qwen2) -> dict[str, Tensor]:
    """The loaded adapter's tensors under PEFT's names."""
    tensors = {MASK_ROW: model.mask_row[None]}
    for name, layer in adapted_layers(model).items():
        tensors |= zip(names_of(name), (layer.adapter.A, layer.adapter.B))
    return tensors


def base_digest(model: Qwen2) -> str:
    """A name for a model's weights, from a few of its tensors in their bytes."""
    layers, digest = model.model.layers, hashlib.sha256()
    first, last = (layer.self_attn.q_proj.weight for layer in (layers[0], layers[-1]))
    for weight in (model.model.norm.weight, first, last):
        digest.update(weight.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapter(model: Qwen2, folder: str | os.PathLike, alpha: float, base: str, digest: str) -> None:
    """Write the adapter in bfloat16; each file is written beside its place and renamed.

    base: the name or folder of the checkpoint that it belongs to; digest: that checkpoint's `base_digest`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().bfloat16().contiguous() for name, p in adapter_tensors(model).items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": len(next(iter(adapted_layers(model).values())).adapter.A),
        "lora_alpha": alpha,
        "target_modules": list(TARGETS),
        "trainable_token_indices": [model.config.mask_token_id],
        "masks_only": True,
        "draft_width": model.config.draft_width,
        "base_digest": digest,
    }
    write_tensors(folder / ADAPTER_WEIGHTS, tensors)
    content = json.dumps(config, indent=2) + "\n"
    replace_file(folder / ADAPTER_CONFIG, partial(Path.write_text, data=content))


@torch.no_grad()
def load_adapter(model: Qwen2, path: str | os.PathLike) -> Qwen2:
    """Put an adapter, of a folder or a Hub id, on a model, in place; it is on where a pass has masks.

    A base without a mask token gets the adapter's mask id. Raises InputError, and leaves the model as it was,
    for an adapter of another shape or kind. Warns where the base's weights are not those it was trained on.
    """
    require(not model.prepacked, "A prepacked model takes no adapter; load it before `prepack`.")
    folder = locate(path, files=ADAPTER_FILES)
    raw, c = read_json(folder / ADAPTER_CONFIG), model.config
    r, alpha, ids = raw.get("r"), raw.get("lora_alpha"), raw.get("trainable_token_indices")
    ok = raw.get("peft_type") == "LORA" and raw.get("masks_only") is True
    require(ok, f"{folder}: is no adapter that is on at masks only; merge an ordinary one into its base.")
    ok = type(r) is int and is_number(-1e9, 1e9)(alpha) and isinstance(ids, list) and len(ids) == 1
    require(ok, f"{folder}: needs r, lora_alpha and one id in trainable_token_indices.")
    width = raw.get("draft_width")
    most = c.max_position_embeddings
    ok = width is None or type(width) is int and 1 <= width <= most
    require(ok, f"{folder}: draft_width is {brief(width)}, it must be a whole number from 1 to {most}.")
    # a base without a mask token takes one that no text has
    allowed = range(c.tokenizer_size or 0, c.vocab_size) if c.mask_token_id is None else [c.mask_token_id]
    fits = type(ids[0]) is int and ids[0] in allowed
    require(fits, f"{folder}: its mask is id {ids[0]}, the base's {c.mask_token_id} of {c.vocab_size}.")
    found, wanted = tensor_shapes(folder / ADAPTER_WEIGHTS), {MASK_ROW: [1, c.hidden_size]}
    for name, layer in adapted_layers(model).items():
        out_size, in_size = layer.weight.shape
        wanted |= zip(names_of(name), ([r, in_size], [out_size, r]))
    wrong = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    tensor = brief(min(wrong, default=""))
    problem = f"does not fit this base: {tensor} is missing, unknown or of another shape"
    require(not wrong, f"{folder}: {problem}.")
    add_adapter(model, r, alpha)
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as weights:
        for name, tensor in adapter_tensors(model).items():
            tensor.copy_(weights.get_tensor(name))
    model.config = replace(c, mask_token_id=ids[0], draft_width=width)
    # float16 rounds small weights of bfloat16, so its digest says nothing
    if raw.get("base_digest") != base_digest(model) and model.weight.dtype != torch.float16:
        base = brief(raw.get("base_model_name_or_path"))
        other = f"{folder}: was trained on other weights than these (its base is named {base})."
        warnings.warn(f"{other} The text stays this model's own, but fewer drafts may be kept.", stacklevel=2)
    return model
