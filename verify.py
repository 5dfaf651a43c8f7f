"""Lossless decoding: the model drafts with masks, reads its drafts as an AR model, keeps what AR would say.

    model, tokenizer = load("Qwen/Qwen2.5-Coder-0.5B-Instruct")
    load_adapter(model, "adapters/qwen2.5-coder-0.5b-instruct")  # not for a block-diffusion checkpoint
    [result] = generate(model, [prompt], Verified())

`Verified` goes where a `Decoding` goes. The answer is that of `Decoding(block_size=1)`, greedy or sampled: AR
is here the same model, without masks and with causal attention. A block-diffusion checkpoint drafts as it is.
An AR model needs an adapter that is on at masks only, so that known tokens are computed as in the base. Such
adapters, verified by the model's own AR reading, are known from "Your LLM Knows the Future" (arXiv
2507.11851) and I-DLM (2604.11035).

Shapes as in `fastdllm.py`; r is the adapter's rank.
"""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from checkpoint import brief, locate, read_json, replace_file, require_plain, tensor_shapes, write_tensors
from fastdllm import (
    PIECE,
    Decoding,
    Guess,
    KVCache,
    Qwen2,
    Row,
    Sees,
    Step,
    require,
    rounds_by_width,
    run_steps,
)

# --- Decoding ---

# tokens that may share a product of prepacked bfloat16 weights without changing a bit of each other
SAME_BITS = 32


@dataclass(frozen=True)
class Verified(Decoding):
    """A `Decoding` that keeps AR's text: the drafts that AR would not choose are dropped.

    Raises InputError for options of block diffusion, which have no meaning here.
    """

    # masks of a draft; None: the adapter's, else min(16, block / 2), with draft_ahead min(4, block / 8)
    draft_width: int | None = None
    draft_ahead: bool = False  # draft in verify passes too: fewer passes, but wider ones

    def __post_init__(self):
        super().__post_init__()
        for name, ar in ("block_size", 1), ("sub_block_size", 1), ("threshold", None):
            value = getattr(self, name)
            require(value in (None, ar), f"Verification keeps AR's text, so leave {name} {value} out.")
        require(self.accept == "threshold", "Verification keeps AR's text, so leave accept prefix out.")
        cached = f"Verification reads what it has cached, so cache must be block, not {self.cache}."
        require(self.cache == "block", cached)
        width = self.draft_width
        ok = width is None or type(width) is int and width >= 1
        require(ok, f"draft_width is {width!r}, it must be a whole number of at least 1.")
        ahead = self.draft_ahead
        require(type(ahead) is bool, f"draft_ahead is {ahead!r}, it must be True or False.")

    def resolve(self, model: Qwen2) -> "Verified":
        """With the adapter's or the checkpoint's draft width for None.

        Raises InputError for a model without masks, and for drafts that are too wide for one pass.
        """
        config, adapter = model.config, adapter_of(model)
        no_mask = "The checkpoint has no mask token, so it cannot draft; give it an adapter, or adapt it."
        require(config.mask_token_id is not None, no_mask)
        width = self.draft_width or (adapter.draft_width if adapter else None)
        if width is None:  # a pass that drafts ahead grows with the square of the width
            size = config.block_size
            width = max(1, min(4, size // 8) if self.draft_ahead else min(16, size // 2))
        resolved = replace(
            self, block_size=1, sub_block_size=1, stop_token_ids=self.stops(config), draft_width=width
        )
        room, widest = min(config.max_position_embeddings, PIECE), resolved.widest()
        wide = f"draft_width {width} needs passes of {widest} tokens, more than {room}; take a smaller one."
        require(widest <= room, wide)
        return resolved

    def widest(self) -> int:
        """Tokens in the widest pass that verifies."""
        tokens = self.draft_width + 1
        return tokens * tokens if self.draft_ahead else tokens

    def row(self, prompt: Sequence[int], mask: int, cached: int = 0, index: int = 0) -> "VerifiedRow":
        return VerifiedRow(prompt, self, mask, cached, index)

    def forward(
        self, model: Qwen2, tokens: Tensor, positions: Tensor, attend: Callable, has_masks: bool
    ) -> Tensor:
        """`Qwen2.forward` with the adapter, if there is one, on at the masks."""
        adapter = adapter_of(model)
        if adapter is None or not has_masks:
            return model(tokens, positions, attend)
        with adapter.on((tokens == model.config.mask_token_id)[..., None]):
            return model(tokens, positions, attend)

    def slots_past_end(self) -> int:
        return self.widest()

    def most_guesses(self, width: int) -> int:
        return width

    def most_rows(self, model: Qwen2, step: Step) -> int | None:
        """Rows that can share a pass without changing a token's bits; in bfloat16 on a CPU so many as have 32
        tokens together, at least one. That holds for prepacked weights, see `fast.prepack`.
        """
        if step.kind != "prefill" and rounds_by_width(model):
            return max(1, SAME_BITS // step.width)
        return super().most_rows(model, step)


class VerifiedRow(Row):
    """A row that keeps only the guesses that AR decoding would choose, so the answer is AR's.

    Draft and verify passes take turns. A draft pass adds AR's next token, and drafts what follows. A verify
    pass adds the drafts that AR agrees with, then AR's next token. With `draft_ahead` a verify pass also
    drafts, after each token that may be the last one kept, and the next pass verifies again. Between passes
    all known tokens but the last one are committed.
    """

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.drafts = []  # list of Guess, for the positions from `settled` on
        self.ar_draws = []  # the uniform number that AR draws for each new position

    def next_pass(self) -> Step:
        start, room, width = self.committed, self.limit - self.settled, self.decoding.draft_width
        if self.settled == self.prompt_length:  # nothing is written yet: the prompt runs first, in pieces
            stop = min(self.settled, start + PIECE)
            return self.plan("prefill", start, stop, [stop] if stop == self.settled else [], stop)

        # 1. Draft: the last known token, then masks. That token sees no mask, so its output is AR's
        # prediction, and its keys and values are final. A mask also sees the other masks, and its output
        # drafts the position after it (token shift).
        # 2. Verify: the last known token, then the drafts, all causal: the outputs are AR's predictions.
        # 3. Draft ahead: after the drafts, a group of masks for each token that may be the last one kept.
        # `room` tokens are left. Every pass adds a token of AR's own, so a verify pass can keep room - 1
        # drafts, and a draft pass needs only room - 2.
        self.drafts = self.drafts[: room - 1]
        if self.drafts:
            kind, masks = "verify", width if self.decoding.draft_ahead else 0
        else:
            kind, masks = "draft", min(width, max(0, room - 2))
        causal = [self.tokens[start], *(draft.token for draft in self.drafts)]
        tokens = causal + [self.mask] * (masks * len(causal))
        sees = draft_window(start, len(causal), masks)
        positions = [token.position + 1 for token in sees]  # token shift
        draws, outputs = self.draw(positions), list(range(len(tokens)))
        # all count as equally wide, so that rows with fewer drafts share a pass with others, padded
        shared = self.decoding.widest()
        return Step(
            kind, start, tokens, sees, positions, outputs, draws, self.settled, self.index, width=shared
        )

    def take(self, step: Step, guesses: list[tuple[int, float]]) -> None:
        """Keep AR's prediction, and before it the drafts that AR predicts too; note what is drafted next."""
        found = [Guess(position, *guess) for position, guess in zip(step.positions, guesses)]
        kept = 0  # a draft pass has none to compare
        while kept < len(self.drafts) and self.drafts[kept].token == found[kept].token:
            kept += 1
        step.revealed = found[: kept + 1]
        # the window's first token and the kept drafts have final keys now; the newest token has not run yet
        step.committed += kept
        self.committed = step.committed
        # `found`: the guesses of the causal tokens, then of each causal token's group of masks. The causal
        # token of index `kept` is the last one kept, so its group drafts what follows.
        causal = len(self.drafts) + 1
        masks = step.tokens.count(self.mask) // causal
        group = causal + masks * kept
        self.drafts = found[group : group + masks]
        self.advance(step)

    def draw(self, positions: list[int]) -> Tensor:
        """The numbers that AR draws for these positions, the same in every pass: so samples are AR's too."""
        if not self.decoding.temperature or not positions:
            return torch.empty(0)
        while len(self.ar_draws) <= max(positions) - self.prompt_length:
            self.ar_draws += super().draw([0]).tolist()  # one at a time, as AR draws them
        draws = [self.ar_draws[i - self.prompt_length] for i in positions]
        return torch.tensor(draws, dtype=torch.float32)


def draft_window(start: int, causal: int, masks: int) -> list[Sees]:
    """What each token of a window sees: `causal` tokens, then for each of them a group of `masks` masks.

    A causal token sees what AR sees. The masks of causal token i see the tokens up to i, and each other.
    Their slots come after all causal tokens and earlier groups; the gap hides what lies between. A mask may
    have the position of a draft, but never its slot. With the last known token, one draft and groups of 2:

        window       known  draft  mask       mask       mask         mask
        slot         p      p+1    p+2        p+3        p+4          p+5
        position     p      p+1    p+1        p+2        p+2          p+3
        sees slots   ..p    ..p+1  ..p, p+2, p+3         ..p+1, p+4, p+5
    """
    sees = [Sees(start + i, start + i + 1) for i in range(causal)]
    for i in range(causal):
        own, group = start + i, start + causal + i * masks  # slots of its causal token, and of its group
        sees += [Sees(own + 1 + j, group + masks, gap_begin=own + 1, gap_end=group) for j in range(masks)]
    return sees


# --- Choice ---
# Whether drafts pay depends on the device: on what a wide pass costs beside a pass over one token.

SHORT_WIDTH = 5  # of the chain to try beside the adapter's: for devices where each token of a pass costs
AHEAD_WIDTH = 3  # of drafts ahead: 16 tokens a pass
# Drafts must be so many times as fast as AR to be chosen: more than noise. Drafts ahead need more, since the
# counts flatter them: they start right behind a refused draft, where text is harder, and on text that drafts
# well the longer chain gains more.
DRAFTS_MARGIN, AHEAD_MARGIN = 1.04, 1.14
TRIAL_ROWS = 8  # most rows of a timed pass, so that it stays short
TRIAL_START = 192  # positions before a timed pass
TRIAL_SECONDS = 0.5  # after these no more tries, but each pass has two


@torch.inference_mode()
def time_passes(
    model: Qwen2, decoding: Verified, shapes: Iterable[tuple[int, int]], rows: int, recorded=None
) -> tuple[dict[tuple[int, int], float], bool]:
    """Seconds of each pass over all rows, the fastest of some tries; and whether the first token's guess and
    confidence were the same in all.

    shapes: of each pass, the number of known tokens, and of masks behind each of them.
    """
    decoding, mask, steps = replace(decoding, temperature=0.0), model.config.mask_token_id, {}
    for known, masks in shapes:
        sees = draft_window(TRIAL_START, known, masks)
        tokens, outputs = [0] * known + [mask] * known * masks, [*range(len(sees))]
        positions, none, width = [token.position + 1 for token in sees], torch.empty(0), len(sees)
        step = Step("verify", TRIAL_START, tokens, sees, positions, outputs, none, 0, width=width)
        steps[known, masks] = step
    length = TRIAL_START + max(step.width for step in steps.values())
    made = recorded.claim(model, rows, length) if recorded else None
    cache = made or KVCache(model.config, rows, length, model.weight)
    seconds, first_guesses, began = dict.fromkeys(steps, math.inf), set(), time.perf_counter()
    try:
        for tries in count():
            if tries >= 2 and time.perf_counter() - began > TRIAL_SECONDS:
                break
            for shape, step in steps.items():
                share = min(rows, decoding.most_rows(model, step) or rows)
                start = time.perf_counter()
                guesses = run_steps(model, cache, [*range(share)], [step] * share, decoding, recorded)
                taken = (time.perf_counter() - start) * math.ceil(rows / share)
                seconds[shape] = min(taken, seconds[shape])
                first_guesses.add(guesses[0][0])
    finally:
        if recorded:
            recorded.release()
    return seconds, len(first_guesses) == 1


def choose_drafts(model: Qwen2, decoding: Verified, rows: int = 1, recorded=None) -> tuple[Decoding, bool]:
    """How to write AR's text fast on this device: by longer or shorter drafts, by drafts ahead, or by AR.

    It follows from a second or two of timed passes over `rows` rows, at most 8, and from the adapter's counts
    of held-out drafts. Where the margins are not reached it is AR. Returns resolved options, and whether a
    token's guess was the same to the bit in passes of all widths. Raises InputError for a model without an
    adapter that has counts.
    """
    adapter, decoding = adapter_of(model), replace(decoding, draft_ahead=False).resolve(model)
    counts = adapter and adapter.heldout_kept
    require(counts, "A choice needs an adapter with heldout_kept in its adapter_config.json.")
    kept = lambda width: sum(min(n, width) * drafts for n, drafts in enumerate(counts)) / sum(counts)
    widths = sorted({min(SHORT_WIDTH, decoding.draft_width), decoding.draft_width})
    ahead = min(AHEAD_WIDTH, decoding.draft_width)
    names = {field.name: getattr(decoding, field.name) for field in fields(Decoding)}
    most = min(decoding.batch_size, SAME_BITS) if rounds_by_width(model) else decoding.batch_size
    ar = replace(Decoding(**names).resolve(model), batch_size=most)
    # of each way the passes (known tokens, masks behind each), and the tokens that they write over the margin
    ways = [(ar, [(1, 0)], 1)]
    for width in widths:
        chain = replace(decoding, draft_width=width)
        ways.append((chain, [(1, width), (width + 1, 0)], (2 + kept(width)) / DRAFTS_MARGIN))
    in_every_pass = replace(decoding, draft_width=ahead, draft_ahead=True)
    ways.append((in_every_pass, [(ahead + 1, ahead)], (1 + kept(ahead)) / AHEAD_MARGIN))
    shapes = [shape for _, passes, _ in ways for shape in passes]
    seconds, same_bits = time_passes(model, decoding, shapes, min(rows, TRIAL_ROWS), recorded)
    speed = lambda way: way[2] / sum(seconds[shape] for shape in way[1])
    return max(ways, key=speed)[0], same_bits


# --- Adapter ---
# A low-rank adapter (LoRA) that is on at masks only: the model learns to draft, and its own predictions stay
# the same. The folder has PEFT's layout, and the embedding of masks is stored as PEFT stores trained rows.

MASK_ROW = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter:
    """What the adapted layers of a model share: where the adapter is on now. The layers have the weights.

    Threads that decode at the same time need a model each, since this is one state for all of its passes.
    """

    def __init__(self, r: int, alpha: float, draft_width: int | None):
        self.r, self.alpha, self.draft_width = r, alpha, draft_width
        self.heldout_kept: list[int] = []  # how many held-out drafts kept 0, 1, 2, ... tokens, if known
        self.masked: Tensor | None = None  # (B, T, 1) bool; None: nowhere
        self.scale: Tensor | None = None  # alpha / r there, else 0

    @contextmanager
    def on(self, masked: Tensor) -> Iterator[None]:
        """Switch the adapter on where `masked` (B or 1, T or 1, 1) says so, for the forward passes inside."""
        self.masked, self.scale = masked, masked * (self.alpha / self.r)
        try:
            yield
        finally:
            self.masked = self.scale = None


class AdaptedLinear(nn.Module):
    """y = base(x), plus (alpha / r) B A x where the adapter is on; A is (r, in), B (out, r).

    The product is float32 on CPUs, where so small a one is several times as fast as in bfloat16.
    """

    def __init__(self, base: nn.Module, adapter: Adapter, A: Tensor, B: Tensor):
        super().__init__()
        self.base, self.adapter = base, adapter
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.base(x), self.adapter.scale
        if scale is None:
            return y
        dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        low = F.linear(x.to(dtype), self.A.to(dtype)) * scale.to(dtype)
        return y + F.linear(low, self.B.to(dtype)).to(y.dtype)


class AdaptedEmbedding(nn.Module):
    """The embedding, with a row of the adapter's own (D) where the adapter is on."""

    def __init__(self, base: nn.Embedding, adapter: Adapter, row: Tensor):
        super().__init__()
        self.base, self.adapter, self.row = base, adapter, nn.Parameter(row)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x, masked = self.base(tokens), self.adapter.masked
        return x if masked is None else torch.where(masked, self.row.to(x.dtype), x)


def adapter_of(model: Qwen2) -> Adapter | None:
    return getattr(model.model.embed_tokens, "adapter", None)


def adapted_layers(model: Qwen2) -> dict[str, AdaptedLinear]:
    """The layers that an adapter changes, under their tensors' names."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}


def target_layers(model: Qwen2) -> dict[str, nn.Linear]:
    """The layers of a plain model that an adapter would change, under their tensors' names."""
    return {name: layer for name, layer in model.named_modules() if name.endswith(TARGETS)}


def add_adapter(model: Qwen2, r: int, alpha: float, draft_width: int | None = None) -> Adapter:
    """Wrap the embedding, and every linear layer but the head, in an adapter that starts as zeros, in place.

    `load_adapter` or training fills it.

    Raises InputError for a model that is prepacked or has an adapter, and for an r that its layers do not
    allow.
    """
    require_plain(model, "takes no adapter")
    layers = target_layers(model)
    largest = min(min(layer.weight.shape) for layer in layers.values())
    require(1 <= r <= largest, f"The adapter's r is {r}, this model's layers allow 1 to {largest}.")
    adapter, on_cpu = Adapter(r, alpha, draft_width), model.weight.device.type == "cpu"
    zeros = partial(model.weight.new_zeros, dtype=torch.float32 if on_cpu else None)
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        out_size, in_size = layer.weight.shape
        A = zeros((r, in_size))
        B = zeros((r, out_size)).t()  # stored transposed, which is fastest for few rows
        setattr(model.get_submodule(parent), own, AdaptedLinear(layer, adapter, A, B))
    row = model.weight.new_zeros(model.config.hidden_size)
    model.model["embed_tokens"] = AdaptedEmbedding(model.model.embed_tokens, adapter, row)
    return adapter


def names_of(layer: str) -> list[str]:
    """PEFT's names of a layer's A and B."""
    return [f"base_model.model.{layer}.lora_{part}.weight" for part in "AB"]


def adapter_tensors(model: Qwen2) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names."""
    tensors = {MASK_ROW: model.model.embed_tokens.row[None]}
    for name, layer in adapted_layers(model).items():
        tensors |= zip(names_of(name), (layer.A, layer.B))
    return tensors


def base_digest(model: Qwen2) -> str:
    """A name for a base's weights, from the bytes of a few tensors in bfloat16; an adapter is left out."""
    layers, digest = model.model.layers, hashlib.sha256()
    first, last = (layers[i].self_attn.q_proj for i in (0, -1))
    for module in (model.model.norm, first, last):
        weight = getattr(module, "base", module).weight
        digest.update(weight.detach().cpu().bfloat16().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_adapter(
    model: Qwen2, folder: str | Path, base: str, digest: str | None, heldout_kept: list[int] | None = None
) -> None:
    """Write the adapter in bfloat16; each file is written beside its place and renamed.

    base: the name or folder of the checkpoint that it belongs to; digest: its `base_digest`, None where it
    is in float16; heldout_kept: how many held-out drafts kept 0, 1, 2, ... of their tokens.
    """
    folder, adapter = Path(folder), adapter_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().bfloat16().contiguous() for name, p in adapter_tensors(model).items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "target_modules": list(TARGETS),
        "trainable_token_indices": [model.config.mask_token_id],
        "masks_only": True,
        "draft_width": adapter.draft_width,
        "base_digest": digest,
    }
    config |= {} if heldout_kept is None else {"heldout_kept": heldout_kept}
    write_tensors(folder / ADAPTER_WEIGHTS, tensors)
    content = json.dumps(config, indent=2) + "\n"
    replace_file(folder / ADAPTER_CONFIG, partial(Path.write_text, data=content))


@torch.no_grad()
def load_adapter(model: Qwen2, path: str | Path) -> Qwen2:
    """Put an adapter, of a folder or a Hub id, on a model, in place; `Verified` switches it on at masks.

    A base without a mask token gets the adapter's mask id, or the first id that no token has. Raises
    InputError, and leaves the model as it was, for an adapter of another shape or kind, and for a model that
    is prepacked or has an adapter. Warns where the base's weights are not those it was trained on.
    """
    require_plain(model, "takes no adapter")
    folder = locate(path, files=ADAPTER_FILES)
    raw, c = read_json(folder / ADAPTER_CONFIG), model.config
    r, alpha, ids, width = map(raw.get, ("r", "lora_alpha", "trainable_token_indices", "draft_width"))
    ok = raw.get("peft_type") == "LORA" and raw.get("masks_only") is True
    require(ok, f"{folder}: is no adapter that is on at masks only; merge an ordinary one into its base.")
    one_id = isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int
    ok = type(r) is int and isinstance(alpha, (int, float)) and math.isfinite(alpha) and one_id
    require(ok, f"{folder}: needs r, lora_alpha and one id in trainable_token_indices.")
    most = c.max_position_embeddings
    ok = width is None or type(width) is int and 1 <= width <= most
    require(ok, f"{folder}: draft_width is {brief(width)}, it must be a whole number from 1 to {most}.")
    kept = raw.get("heldout_kept") or []
    ok = isinstance(kept, list) and all(type(count) is int and count >= 0 for count in kept)
    require(ok, f"{folder}: heldout_kept must be a list of counts.")
    found, wanted = tensor_shapes(folder / ADAPTER_WEIGHTS), {MASK_ROW: [1, c.hidden_size]}
    for name, layer in target_layers(model).items():
        out_size, in_size = layer.weight.shape
        wanted |= zip(names_of(name), ([r, in_size], [out_size, r]))
    wrong = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    tensor, base = brief(min(wrong, default="")), brief(raw.get("base_model_name_or_path"))
    shape = f"{tensor} is missing, unknown or of another shape"
    require(not wrong, f"{folder}: was made for {base} and does not fit this base: {shape}.")
    # a mask's embedding is the adapter's own, so any id will do that is no token of the text
    mask, taken = c.mask_token_id, c.tokenizer_size or 0
    if mask is None:
        mask = ids[0] if taken <= ids[0] < c.vocab_size else c.tokenizer_size
        full = f"{folder}: a mask needs an id that no token has, and all {c.vocab_size} are taken"
        require(mask is not None and mask < c.vocab_size, f"{full}; add a row to the embedding.")
    digest = base_digest(model)
    add_adapter(model, r, alpha, width).heldout_kept = kept if any(kept) else []
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as weights:
        for name, tensor in adapter_tensors(model).items():
            tensor.copy_(weights.get_tensor(name))
    model.config = replace(c, mask_token_id=mask)
    # float16 rounds small weights of bfloat16, so a digest in it says nothing, and none is stored
    half = model.weight.dtype == torch.float16
    if not half and raw.get("base_digest") not in (None, digest):
        other = f"{folder}: was trained on other weights than these (its base is named {base})."
        warnings.warn(f"{other} The text stays this model's own, but fewer drafts may be kept.", stacklevel=2)
    return model.eval()
