"""Fast-dLLM v2 (arXiv 2509.26328) in one file: a Qwen2 that writes several tokens per forward pass.

An autoregressive (AR) model, fine-tuned a little, becomes a block-diffusion model. Text is written block by
block. A block starts as masks; each pass guesses the masked positions of a sub-block in parallel, and every
guess above a confidence threshold is kept. Finished blocks stay in a KV cache as in any AR model. With block
size 1 it is an ordinary AR model.

    from checkpoint import load

    model, tokenizer = load("tiny/checkpoint")
    prompt = tokenizer.chat([{"role": "user", "content": "..."}])
    [result] = generate(model, [prompt], Decoding(threshold=0.9))

Read it from top to bottom; the method itself is `Row`. The file needs torch alone. Beside it,
`checkpoint.py` reads files, `verify.py` makes decoding lossless, and `fast.py` makes it faster.

Shapes: B rows of a batch, T positions of a window, S keys seen, D hidden size, H query heads, K key/value
heads, d head size, V vocabulary. Positions are absolute and start at 0; block k begins at k * block_size.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    """Shape and special ids of a checkpoint, named as in its `config.json` where no comment says another."""

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


# --- Mask ---


class Sees(NamedTuple):
    """A token's position, and which slots of the cache it sees: all before `end`, except for a gap."""

    position: int
    end: int
    gap_begin: int = 0
    gap_end: int = 0


PADDING = Sees(position=0, end=1)  # nobody reads it; it sees one slot, since a softmax over none is NaN


def block_causal(position: int, block_size: int) -> Sees:
    """What a token sees in block-causal attention (paper, section 3): all before the end of its own block.

    So attention is bidirectional inside a block and causal between blocks. Block size 1 is the ordinary
    causal mask. In training noisy copies stand beside the text; `train.visibility` says what they see.
    """
    return Sees(position, end=(position // block_size + 1) * block_size)


def attention_mask(sees: Tensor, slots: int) -> Tensor:
    """Which of the first `slots` slots each token sees, (B, T, slots) bool; sees (B, T, 4): a `Sees` each."""
    slot = torch.arange(slots, device=sees.device)
    _, end, gap_begin, gap_end = sees.unsqueeze(-1).unbind(2)  # each (B, T, 1)
    return (slot < end) & ~((gap_begin <= slot) & (slot < gap_end))


def attention_bias(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """A bool mask (B, T, S) as numbers to add: 0 where a key is seen, else minus infinity.

    Returns (B, 1, groups * T, S): the mask, repeated for each query head of a group.
    """
    bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)[:, None]
    return bias.repeat(1, 1, groups, 1)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, of q (B, H, T, d), k and v (B, K, S, d); no bias: all keys are seen.

    Key head h serves H / K query heads. They see the same keys, so they become rows of one product, which
    reads the keys once.
    """
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, K, H / K * T, d)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias).reshape(q.shape)


# --- Cache ---

# Passes read the cache in multiples of so many slots. A hidden slot adds exactly 0, so attention's sums do
# not depend on how many whole multiples are read. (Other products may still round by a pass's width.)
KEY_STEP = 64


class KVCache:
    """Keys and values of every position of every row, written in place.

    Position p has slot p, and every pass over p overwrites it. (Only drafts ahead have masks in other slots,
    see `verify.py`.) The slots of finished blocks are the block cache (paper, section 4). For DualCache those
    of the unfinished block serve as well; which pass reads them is decided in `Row.next_pass`.
    """

    def __init__(self, config: Config, rows: int, length: int, weight: Tensor):
        """`weight`: any tensor with the device and dtype that the cache shall have."""
        slots = round_up(length, KEY_STEP)
        shape = config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)

    def update(self, layer: int, k: Tensor, v: Tensor, write: tuple, read: tuple) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, T, d) at (rows, slots) `write`; return those at `read`, (B, K, S, d)."""
        for cache, new in (self.k[layer], k), (self.v[layer], v):
            cache[write] = new.transpose(1, 2)
        return self.k[layer][read].transpose(1, 2), self.v[layer][read].transpose(1, 2)

    def clear(self, row: int, start: int = 0) -> None:
        """Zero a row from `start` on, for its next prompt.

        A slot that attention hides has weight 0, but 0 times a NaN of the last prompt would be NaN.
        """
        self.k[:, row, start:] = self.v[:, row, start:] = 0

    def grow(self, length: int) -> None:
        """Make room for positions up to `length`; what is written stays."""
        if (more := round_up(length, KEY_STEP) - self.k.shape[2]) > 0:
            self.k, self.v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.k, self.v))

    def move(self, source: int, target: int) -> None:
        """Copy a row over another one, so that the rows in use stay the first ones."""
        if source == target:
            return
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
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: tuple, attend: Callable) -> Tensor:
        B, T, _ = x.shape
        heads = lambda y: y.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, d)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(torch.cat([q, k], dim=1), *rope).split([q.shape[1], k.shape[1]], dim=1)
        y = attend(q, k, v)  # (B, H, T, d)
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

    def forward(self, x: Tensor, rope: tuple, attend: Callable) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """The Qwen2 transformer. Its state dict has exactly the published names."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # nn.Embedding would call normal_, which on the meta device loads torch's compiler, over a second
        embedding = torch.empty(config.vocab_size, config.hidden_size).uniform_(-(3**0.5), 3**0.5)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding.from_pretrained(embedding, freeze=False),
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
        """The embedding (V, D), whose device and dtype are the model's."""
        return self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, positions: Tensor, attend: Callable) -> Tensor:
        """Hidden states (B, T, D) after the last norm, of tokens (B, T) at positions (B or 1, T).

        `attend(layer, q, k, v)` is all that the network asks of its surroundings: q (B, H, T, d), k and v
        (B, K, T, d) of the window in, (B, H, T, d) out. A cache, if there is one, lives in there.
        """
        x = self.model.embed_tokens(tokens)
        rope = rotary(positions, self.config, x.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rope, partial(attend, i))
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D): the output at position i predicts the token at i + 1."""
        return self.lm_head(hidden)


# --- Windows ---
# Every pass is the same call on another window [start, start + T) of positions. It writes the window's keys
# and values into the cache in place. In block diffusion and AR each query sees all slots up to the end of its
# own block (`verify.draft_window` says what drafts see):
#
#                earlier blocks   block in work
# prefill        wwwwwwwwwwwwww
# full, refresh  rrrrrrrrrrrrrr   wwwwwwwwwwwwwwww      w written and read, r only read
# sub            rrrrrrrrrrrrrr   rrrrwwwwrrrrrrrr
# commit         rrrrrrrrrrrrrr   wwwwwwwwwwwwwwww      its last output: first token of the next block

PIECE = 512  # longer prefills run in pieces of so many positions, since a mask's memory is quadratic in them


def window_pass(
    model: Qwen2,
    cache: KVCache,
    tokens: Tensor,
    sees: Tensor,
    write: tuple,
    read: tuple,
    decoding: "Decoding",
    has_masks: bool,
) -> Tensor:
    """One forward pass over windows: hidden states (B, T, D) of tokens (B, T).

    sees (B, T, 4): a `Sees` for each token. write, read: (rows, slots) of the cache, see `KVCache.update`;
    the slots read are slice(0, S), and S a multiple of KEY_STEP. No shape depends on the values of a tensor,
    so that a pass can be recorded.
    """
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    bias = attention_bias(attention_mask(sees, read[1].stop), groups, model.weight.dtype)

    def attend(layer, q, k, v):
        return grouped_attention(q, *cache.update(layer, k, v, write, read), bias)

    return decoding.forward(model, tokens, sees[..., 0], attend, has_masks)


# --- Guess and accept ---


def nucleus(
    logits: Tensor, temperature: float, top_p: float, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities after temperature, top-k and top-p, and their ids, both (N, V or top_k), largest first.

    A token is dropped if those before it already sum to more than top_p; the rest is renormalised. At
    temperature 0 the probabilities stay as they are, and top-k and top-p count for nothing.
    """
    if temperature == 0:
        temperature, top_p, top_k = 1.0, 1.0, None
    p, ids = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    if top_k:
        p, ids = p[:, :top_k] / p[:, :top_k].sum(-1, keepdim=True), ids[:, :top_k]
    if top_p < 1:  # at 1 nothing is dropped, whatever the rounding of the sum
        p = p.masked_fill(p.cumsum(-1) - p > top_p, 0)
    return p / p.sum(-1, keepdim=True), ids


def guess(logits: Tensor, decoding: "Decoding", draws: Tensor) -> tuple[Tensor, Tensor]:
    """A token and its confidence for each row of logits (N, V), in float32.

    Temperature 0: the argmax and its softmax probability. Otherwise one draw, by the uniform numbers `draws`
    (N), and its probability after temperature, top-k and top-p.
    """
    if decoding.temperature == 0:
        best, tokens = logits.max(dim=-1)
        return tokens, (best - logits.logsumexp(-1)).exp()
    p, ids = nucleus(logits, decoding.temperature, decoding.top_p, decoding.top_k)
    kept = (p > 0).sum(-1, keepdim=True)
    place = torch.searchsorted(p.cumsum(-1), draws[:, None], right=True)
    # sums are rounded, so a draw may lie above them; rows of NaN keep nothing, and are reported later
    place = place.minimum(kept - 1).clamp(min=0)
    return ids.gather(1, place)[:, 0], p.gather(1, place)[:, 0]


def accept(confidence: list[float], threshold: float, prefix: bool = False) -> list[int]:
    """Which guesses are kept (paper, section 4): indices into `confidence`, in order.

    Kept are all that are strictly above the threshold; if none is, the most confident one, the first on ties.
    So threshold 1 keeps exactly one. With `prefix`: the first guess, and those that follow it as long as each
    is above the threshold.
    """
    if prefix:
        kept = 1
        while kept < len(confidence) and confidence[kept] > threshold:
            kept += 1
        return list(range(kept))
    best = confidence.index(max(confidence))
    return [i for i, c in enumerate(confidence) if c > threshold or i == best]


# --- Options ---


@dataclass(frozen=True)
class Decoding:
    """How to decode; beside each option stands what None means.

    Raises InputError for values that cannot work.
    """

    block_size: int | None = None  # tokens denoised together, 1 is AR; None: the checkpoint's
    sub_block_size: int | None = None  # a block is guessed in such parts, in order; None: gcd(8, block_size)
    threshold: float | None = None  # guesses of more confidence are kept, 1 keeps one per pass; None: 0.9
    cache: str = "block"  # reuse: "none", "block" of finished blocks, "dual" also of the unfinished block
    max_new_tokens: int = 256  # the longest answer
    temperature: float = 0.0  # 0: the most probable token, else sample
    top_p: float = 1.0  # nucleus of the sampling
    stop_token_ids: Sequence[int] | None = None  # None: the checkpoint's; (): none
    seed: int | None = None  # every prompt starts from it; None: a new one each time
    accept: str = "threshold"  # keep all guesses above the threshold, or only a "prefix" of them
    batch_size: int = 16  # prompts decoded at the same time
    top_k: int | None = None  # sample from so many tokens only; None: from all

    def __post_init__(self):
        for name in ("block_size", "sub_block_size", "top_k", "max_new_tokens", "batch_size"):
            value, optional = getattr(self, name), getattr(Decoding, name) is None
            ok = type(value) is int and value >= 1 or optional and value is None
            require(ok, f"{name} is {value!r}, it must be a whole number of at least 1.")
        for name, most in ("threshold", 1), ("top_p", 1), ("temperature", 10_000):
            value, optional = getattr(self, name), getattr(Decoding, name) is None
            ok = isinstance(value, (int, float)) and 0 <= value <= most or optional and value is None
            require(ok, f"{name} is {value!r}, it must lie in [0, {most}].")
        for name, choices in ("cache", ("none", "block", "dual")), ("accept", ("threshold", "prefix")):
            value = getattr(self, name)
            require(value in choices, f"{name} is {value!r}, it must be one of {', '.join(choices)}.")
        ok = self.seed is None or type(self.seed) is int and 0 <= self.seed < 2**63
        require(ok, f"seed is {self.seed!r}, it must be a whole number from 0.")
        stop = self.stop_token_ids
        ok = isinstance(stop, (tuple, list, set, frozenset)) and all(type(i) is int and i >= 0 for i in stop)
        require(ok or stop is None, f"stop_token_ids is {stop!r}, it must be a list of token ids, or None.")

    def resolve(self, model: Qwen2) -> "Decoding":
        """With the checkpoint's values for None. Raises InputError where checkpoint and options clash."""
        config = model.config
        size, most = self.block_size or config.block_size, config.max_position_embeddings
        require(size <= most, f"block_size is {size}, the model has {most} positions; take a smaller one.")
        adapted = "The checkpoint has no mask token, so it was never adapted: only block_size 1 (AR) works."
        require(config.mask_token_id is not None or size == 1, adapted)
        sub = self.sub_block_size or math.gcd(8, size)
        require(size > 1 or sub == 1, "block_size 1 (AR) has no sub-blocks, so leave sub_block_size out.")
        fits = size % sub == 0
        require(fits, f"sub_block_size {sub} does not divide block_size {size}; take a divisor of {size}.")
        threshold = 0.9 if self.threshold is None else self.threshold
        return replace(
            self,
            block_size=size,
            sub_block_size=sub,
            threshold=torch.tensor(threshold, dtype=torch.float32).item(),  # as the confidences are
            stop_token_ids=self.stops(config),
        )

    def stops(self, config: Config) -> tuple[int, ...]:
        return config.stop_token_ids if self.stop_token_ids is None else tuple(self.stop_token_ids)

    # `decode` calls these on resolved options; `verify.Verified` overrides them.

    def row(self, prompt: Sequence[int], mask: int | None, cached: int = 0, index: int = 0) -> "Row":
        """A prompt that is decoded this way; the arguments are those of `Row`."""
        return Row(prompt, self, mask, cached, index)

    def forward(
        self, model: Qwen2, tokens: Tensor, positions: Tensor, attend: Callable, has_masks: bool
    ) -> Tensor:
        """`Qwen2.forward` of one pass; `has_masks`: whether a mask is among the tokens."""
        return model(tokens, positions, attend)

    def slots_past_end(self) -> int:
        """How many slots after a row's last one a pass may write."""
        return 0

    def most_guesses(self, width: int) -> int:
        """The largest number of guesses of a pass over a window so wide."""
        return min(width, self.sub_block_size)

    def most_rows(self, model: Qwen2, step: "Step") -> int | None:
        """How many rows may share the pass of such a step; None: any number.

        In bfloat16 on CPUs long products round differently from short ones, so each prefill runs alone.
        """
        return 1 if step.kind == "prefill" and rounds_by_width(model) else None


def rounds_by_width(model: Qwen2) -> bool:
    """Whether a pass must stay narrow for a token to keep its last bits: in bfloat16 on a CPU.

    Float32 rounds by width as well, but by too little to have changed a token in any test.
    """
    return model.weight.device.type == "cpu" and model.weight.dtype == torch.bfloat16


# --- Row ---


class Guess(NamedTuple):
    """A guess of the token at a position."""

    position: int
    token: int
    confidence: float


@dataclass
class Step:
    """One forward pass over one row's window: what goes in, and once it ran, what came of it."""

    kind: str  # prefill, full, refresh, sub or commit; draft or verify
    start: int  # the window's tokens have the slots [start, start + len(tokens))
    tokens: list[int]  # its input, masks included
    sees: list[Sees]  # of each token, its position and the slots that it sees
    positions: list[int]  # to guess
    outputs: list[int]  # for each of them, the place in the window whose output predicts it
    draws: Tensor  # a uniform number for each of them, at temperatures above 0
    committed: int  # keys and values before here are final after it; `take` adds the drafts that it keeps
    prompt: int = 0  # the prompt's index
    width: int = 0  # steps of equal width may share a pass; at least len(tokens)
    revealed: list[Guess] = field(default_factory=list)  # guesses that were kept
    final: list[int] = field(default_factory=list)  # new tokens that no mask precedes any more, in order
    finish_reason: str | None = None  # in a row's last step: "stop" or "length"

    @property
    def stop(self) -> int:
        """The first position after the window."""
        return max(token.position for token in self.sees) + 1


class Row:
    """One prompt while it is decoded; its next step follows from its state (paper, section 4, algorithm 1).

        while not row.finish_reason:
            step = row.next_pass()
            row.take(step, run(step))

    tokens: the prompt, guesses that were kept, and masks up to the end of the block in work.
    settled: every token before this position is final.
    committed: keys and values before this position are final and in the cache; with cache none they are
    never reused, and it only says which blocks are finished.
    block_filled: DualCache only; every slot of the block in work was written.
    """

    def __init__(
        self, prompt: Sequence[int], decoding: Decoding, mask: int | None, cached: int = 0, index: int = 0
    ):
        """`decoding` is resolved; the prompt's first `cached` positions, whole blocks, are in the cache."""
        self.decoding, self.mask, self.index = decoding, mask, index
        self.tokens, self.settled, self.prompt_length = list(prompt), len(prompt), len(prompt)
        self.limit, self.finish_reason = len(prompt) + decoding.max_new_tokens, None
        self.planned: Step | None = None  # its next step, for `decode_rows`
        # The block with the prompt's last token always runs, since its last output may predict the first new
        # token. With cache none the blocks before it count as committed, and every pass starts at 0.
        last_block = (len(prompt) - 1) // decoding.block_size * decoding.block_size
        self.committed = last_block if decoding.cache == "none" else min(cached, last_block)
        self.block_filled = False
        self.generator = torch.Generator()  # of this row alone: no other row changes what it draws
        self.generator.seed() if decoding.seed is None else self.generator.manual_seed(decoding.seed)

    def next_pass(self) -> Step:
        """The next step of this row. The answer must not be finished."""
        size, sub, cache = self.decoding.block_size, self.decoding.sub_block_size, self.decoding.cache
        block = self.settled // size * size  # where the block in work begins
        self.tokens += [self.mask] * (block + size - len(self.tokens))
        start = 0 if cache == "none" else self.committed

        # 1. Commit finished blocks: they run without masks, and the cache keeps what that pass wrote. For the
        # prompt's blocks this is the prefill, and a long one runs in pieces; a block of the answer runs once
        # more. Where the block in work has no token yet, the last output predicts its first one: so does the
        # prefill of a prompt that ends on a block boundary. With block size 1 each token is a finished block,
        # so after the prefill all passes are commits: that is AR.
        if self.committed < block:
            stop = block if cache == "none" else min(block, self.committed + round_up(PIECE, size))
            kind = "prefill" if stop <= self.prompt_length else "commit"
            return self.plan(kind, start, stop, [stop] if stop == self.settled else [], committed=stop)

        # 2. Sub-blocks are revealed from left to right: guess the masks of the first one that has any.
        low = self.tokens.index(self.mask, block) // sub * sub
        masked = [i for i in range(low, low + sub) if self.tokens[i] == self.mask]

        # 3. DualCache runs the sub-block alone; the rest of its block is read from the cache, as the last
        # refresh wrote it. Position low is guessed from the output at low - 1, outside of that window. So low
        # must be known already, and all of the block's slots written; else the whole block runs. With cache
        # "block" every pass runs the whole block, and with "none" everything from position 0.
        if self.block_filled and self.tokens[low] != self.mask:
            return self.plan("sub", low, low + sub, masked, self.committed)
        kind = "refresh" if cache == "dual" else "full"
        return self.plan(kind, start, block + size, masked, self.committed)

    def take(self, step: Step, guesses: list[tuple[int, float]]) -> None:
        """Accept guesses (token, confidence) of `step.positions` and complete the step."""
        commits = step.committed > self.committed
        self.committed = step.committed
        # after a commit a new block begins, and none of its slots is written yet
        self.block_filled = not commits and (self.block_filled or step.kind == "refresh")
        step.revealed = [Guess(position, *found) for position, found in zip(step.positions, guesses)]
        # The first token of a block is predicted by the finished block before it, which holds no mask: as in
        # AR decoding it is kept at any confidence.
        if not commits:
            confidence = [guess.confidence for guess in step.revealed]
            kept = accept(confidence, self.decoding.threshold, self.decoding.accept == "prefix")
            step.revealed = [step.revealed[i] for i in kept]
        self.advance(step)

    def plan(self, kind: str, start: int, stop: int, positions: list[int], committed: int) -> Step:
        """A step whose window is the positions [start, stop), in slots of the same numbers."""
        outputs = [i - 1 - start for i in positions]  # token shift (section 3): output i - 1 predicts i
        sees = [block_causal(i, self.decoding.block_size) for i in range(start, stop)]
        draws, tokens = self.draw(positions), self.tokens[start:stop]
        width = len(tokens)
        return Step(kind, start, tokens, sees, positions, outputs, draws, committed, self.index, width)

    def draw(self, positions: list[int]) -> Tensor:
        """A uniform number for each guess; a position that is guessed again gets a new one."""
        count = len(positions) if self.decoding.temperature else 0
        return torch.rand(count, generator=self.generator, dtype=torch.float32)

    def advance(self, step: Step) -> None:
        """Write the revealed tokens and move `settled` over what is final now.

        The answer ends early at a stop token, as soon as no mask precedes it.
        """
        for kept in step.revealed:
            if kept.position == len(self.tokens):  # in a verified row, which holds no masks
                self.tokens.append(kept.token)
            else:
                self.tokens[kept.position] = kept.token
        for token in self.tokens[self.settled : self.limit]:
            if token == self.mask:
                break
            step.final.append(token)
            self.settled += 1
            if token in self.decoding.stop_token_ids:
                self.finish_reason = "stop"
                break
            if self.settled == self.limit:
                self.finish_reason = "length"
        step.finish_reason = self.finish_reason


# --- Decode ---


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


def decode(
    model: Qwen2,
    prompts: Iterable[Sequence[int]],
    decoding: Decoding,
    recorded=None,
    cache: KVCache | None = None,
    cached: int = 0,
) -> Iterator[Step]:
    """Decode prompts (lists of token ids), yielding each `Step` of each row once it is complete.

    Rows with windows of equal width share a forward pass, and so do prompts of nearly the same length. A
    finished row's place goes to the next prompt. A caller may end a row by setting the step's finish_reason.

    But for rounding a prompt gets the tokens that it gets alone: nothing in a shared pass goes from row to
    row. Each row has a row of the cache, positions and a random generator of its own. Shorter windows are
    padded on the right, where no real token sees the padding. The slots that padding or an earlier prompt
    has written are zeroed or overwritten before a token of this row sees them. Rounding may depend on how
    many tokens share a pass: in float32 too little to have changed a token in any test, in bfloat16 not
    always.

    recorded: `fast.RecordedPasses`, for CUDA.
    cache, cached: for one prompt, the keys and values of its first `cached` positions, whole blocks.
    Raises InputError, before anything runs, for options or prompts that cannot work.
    """
    decoding = decoding.resolve(model)
    prompts = [check_prompt(prompt, decoding, model.config) for prompt in prompts]
    require(cache is None or len(prompts) == 1, f"A cache is for one prompt, not {len(prompts)}.")
    room = cache.k.shape[2] if cache else 0
    whole = 0 <= cached <= room and cached % decoding.block_size == 0
    require(whole, f"cached is {cached}, it must be whole blocks that the cache holds.")
    require(not (cache and recorded), "Recorded passes have a cache of their own; leave the other one out.")
    return decode_rows(model, prompts, decoding, recorded, cache, cached)


@torch.inference_mode()
def decode_rows(
    model: Qwen2, prompts: list[list[int]], decoding: Decoding, recorded, cache: KVCache | None, cached: int
) -> Iterator[Step]:
    """`decode` with resolved options and checked prompts. Row i of the cache belongs to `rows[i]`."""
    count = min(len(prompts), decoding.batch_size)
    longest = max((len(prompt) for prompt in prompts), default=0) + decoding.max_new_tokens
    length = round_up(longest, decoding.block_size) + decoding.slots_past_end()
    if recorded:
        cache = recorded.claim(model, count, length)
    elif cache:
        cache.grow(length)
    else:
        cache = KVCache(model.config, count, length, model.weight)
    waiting = iter(enumerate(prompts))

    def admit(place: int) -> Row | None:
        """The next waiting prompt, if any, as the row at this place of the cache."""
        index, prompt = next(waiting, (None, None))
        if prompt is None:
            return None
        cache.clear(place, cached)
        row = decoding.row(prompt, model.config.mask_token_id, cached, index)
        row.planned = row.next_pass()
        return row

    try:
        rows = [admit(place) for place in range(count)]
        while rows:
            # 1. choose the rows that run together: prefills first, then the width that most rows wait for
            shapes = [shared_shape(row.planned) for row in rows]
            shape = max(shapes, key=lambda s: (s[0], shapes.count(s)))
            group = [place for place, s in enumerate(shapes) if s == shape]
            group = group[: decoding.most_rows(model, rows[group[0]].planned)]
            # 2. run their steps as one pass
            steps = [rows[place].planned for place in group]
            guesses = run_steps(model, cache, group, steps, decoding, recorded)
            # 3. each row takes its guesses and plans its next step
            for place, step, found in zip(group, steps, guesses):
                row = rows[place]
                row.take(step, found)
                row.planned = None if row.finish_reason else row.next_pass()
                yield step
                row.finish_reason = step.finish_reason  # the caller may have set it
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


def shared_shape(step: Step) -> tuple[bool, int, int]:
    """Steps of equal shape can run as one pass; for prefills a length counts as the next multiple of 64."""
    if step.kind == "prefill":
        return True, step.start, round_up(step.width, 64)
    return False, 0, step.width


def run_steps(
    model: Qwen2, cache: KVCache, places: list[int], steps: list[Step], decoding: Decoding, recorded
) -> list[list[tuple[int, float]]]:
    """Run steps of one `shared_shape` as one forward pass; step i belongs to row `places[i]` of the cache.

    Returns the guesses (token, confidence) of each step. Only prefills and the passes of verified rows are
    padded, on the right: there no token sees a slot behind its own window's end, so none sees the padding.
    """
    width = max(len(step.tokens) for step in steps)
    pad = lambda values, value: [*values, *[value] * (width - len(values))]
    tokens = torch.tensor([pad(step.tokens, 0) for step in steps])
    sees = torch.tensor([pad(step.sees, PADDING) for step in steps])
    starts = [step.start for step in steps]
    seen = round_up(max(starts) + width, KEY_STEP)
    outputs = [n * width + output for n, step in enumerate(steps) for output in step.outputs]
    draws = torch.cat([step.draws for step in steps])
    has_masks = any(model.config.mask_token_id in step.tokens for step in steps)
    if recorded and steps[0].kind != "prefill":
        found = recorded.run(places, tokens, sees, starts, seen, outputs, draws, decoding, has_masks)
    else:
        device = model.weight.device
        tokens, sees = tokens.to(device), sees.to(device)
        write, read = cache_places(places, starts, width, seen, device)
        hidden = window_pass(model, cache, tokens, sees, write, read, decoding, has_masks)
        if not outputs:
            return [[] for _ in steps]
        hidden = hidden.flatten(0, 1)[torch.tensor(outputs, device=device)]
        found = best_guesses(model, hidden, draws, decoding)
    table = found.tolist()  # the pass's one transfer back
    nan = any(math.isnan(confidence) for _, confidence in table)
    require(not nan, "The model's output is NaN; in float16 it may overflow, then bfloat16 or float32 works.")
    guesses = ((int(token), confidence) for token, confidence in table)
    return [[next(guesses) for _ in step.positions] for step in steps]


def cache_places(
    places: list[int], starts: list[int], width: int, seen: int, device: torch.device
) -> tuple[tuple, tuple]:
    """(rows, slots) of the cache to write, and to read; slices where possible, since these copy nothing."""
    first, count = places[0], len(places)
    in_order = places == list(range(first, first + count))
    rows = slice(first, first + count) if in_order else torch.tensor(places, device=device)
    read = rows, slice(0, seen)
    if count == 1:
        return (rows, slice(starts[0], starts[0] + width)), read
    slots = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)  # (B, T)
    return (torch.tensor(places, device=device)[:, None], slots), read


def best_guesses(model: Qwen2, hidden: Tensor, draws: Tensor, decoding: Decoding) -> Tensor:
    """The guess of each hidden state (N, D): token and confidence, (N, 2).

    Both are float32, which holds any id below 2**24.
    """
    mask_id, size = model.config.mask_token_id, model.config.tokenizer_size
    logits, draws = model.logits(hidden), draws.to(hidden.device)
    if mask_id is not None:
        logits[:, mask_id] = -torch.inf  # a mask is no guess
    # on a CPU a few rows at a time: what is read several times then stays in a core's cache
    rows = max(1, 2**18 // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = []
    for i in range(0, len(logits), rows):  # draws are empty at temperature 0
        found = guess(logits[i : i + rows, :size].float(), decoding, draws[i : i + rows])
        parts.append(torch.stack([found[0].float(), found[1]], dim=1))
    return torch.cat(parts)


@dataclass
class Result:
    """What was generated for one prompt."""

    tokens: list[int] = field(default_factory=list)  # new ones, through the stop token
    finish_reason: str | None = None  # "stop" or "length"; None where decoding was broken off
    passes: dict[str, int] = field(default_factory=dict)  # kind -> count

    def add(self, step: Step) -> None:
        """Take in the row's next step."""
        self.tokens += step.final
        self.passes[step.kind] = self.passes.get(step.kind, 0) + 1
        self.finish_reason = step.finish_reason

    @property
    def forward_passes(self) -> int:
        """Passes that wrote the answer: all but the prefill, though that may give the first token."""
        return sum(self.passes.values()) - self.passes.get("prefill", 0)


def generate(
    model: Qwen2, prompts: Iterable[Sequence[int]], decoding: Decoding, recorded=None
) -> list[Result]:
    """Decode prompts (lists of token ids) to the end: one result per prompt, in order. Raises as `decode`."""
    prompts = list(prompts)
    results = [Result() for _ in prompts]
    for step in decode(model, prompts, decoding, recorded=recorded):
        results[step.prompt].add(step)
    return results
