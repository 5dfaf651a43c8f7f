"""Teach a frozen model to draft for `--verify`: an adapter that is on at masks only, see `verify.py`.

An anchor a is the position of a known token; its group is w masks at a + 1 .. a + w. Each mask sees the known
tokens up to a and all masks of its group. The output at a predicts the token at a + 1 without the adapter, as
in AR, so targets begin at a + 2: the output at a + j predicts the token at a + j + 1. Known tokens see no
mask, so one pass without gradients serves all groups of a document.

Shapes: B rows, G groups of a row, w masks of a group, N tokens of a document, D hidden size, K key heads, d
head size.
"""

import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from checkpoint import load
from commands.console import Command, reports_mistakes
from fast import avoid_cudnn_attention
from fastdllm import PIECE, Qwen2, require, round_up
from training import runs
from training.attention import causal_attention, plain_attention
from training.data import Corpus, with_mask_token
from training.runs import RunSettings, files, lasting, machine, rank, run_options, steps, world_size
from verify import adapted_layers, adapter_of, add_adapter, base_digest, load_adapter, save_adapter

# --- Settings ---

# Draft j is kept if the drafts 0 to j are all right. Its weight is REACH times what it gains (all the kept
# drafts that need it), plus (1 - REACH) * NEAR ** j, which also teaches drafts that are not kept yet.
REACH, NEAR = 0.7, 0.9
OTHERS = 4096  # tokens absent from the data that each step samples as wrong answers


@dataclass(frozen=True)
class Drafting(RunSettings):
    """How to train a draft adapter."""

    steps: int = 1500
    batch_size: int = 16
    lr: float = 1.5e-3
    warmup: int = 50
    eval_every: int = 100
    eval_rows: int = 24  # documents
    anchors: int = 5  # groups of a row, all in one document
    width: int = 8  # masks of a group: how far a draft goes
    rank: int = 14
    cache_gb: float = 4.0  # of keys and values that are kept

    def __post_init__(self):
        super().__post_init__()
        require(self.width < PIECE, f"--width is {self.width}, it must be less than {PIECE}.")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a linear fall to 0."""
        rising = (step + 1) / max(1, self.warmup)
        falling = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.lr * min(rising, falling, 1)


# --- Groups ---


def anchors_of(trainable: np.ndarray) -> np.ndarray:
    """Positions where a draft can start: the next two tokens are trainable."""
    return np.flatnonzero(trainable[2:] & trainable[1:-1])


def endless_groups(corpus: Corpus, anchors: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Rows in a random order. A row is a document and so many `anchors` in it.

    Every anchor comes at least once an epoch: where a document has too few left for a row, some are repeated.
    """
    for epoch in count():
        rng, rows = np.random.default_rng([seed, epoch]), []
        for document in range(len(corpus.lengths)):
            at = rng.permutation(anchors_of(corpus.piece(document)[1]))
            for part in np.resize(at, round_up(len(at), anchors)).reshape(-1, anchors).tolist():
                rows.append((document, part))
        require(rows, "No document has two trainable tokens in a row, so there is nothing to draft.")
        yield from (rows[i] for i in rng.permutation(len(rows)))


@torch.no_grad()
def known_pass(model: Qwen2, tokens: Tensor) -> Tensor:
    """Keys and values (layers, 2, K, N, d) of one document's tokens (N), without the adapter."""
    kept = []

    def attend(layer, q, k, v):
        kept.append(torch.cat([k, v]))
        return causal_attention(layer, q, k, v)

    model(tokens[None], torch.arange(len(tokens), device=tokens.device)[None], attend)
    return torch.stack(kept)


class Known:
    """Documents' keys and values, in bfloat16, kept while they fit into `limit` bytes, else made anew."""

    def __init__(self, model: Qwen2, corpus: Corpus, limit: float):
        self.model, self.corpus, self.limit, self.kept, self.bytes = model, corpus, limit, {}, 0

    def tokens(self, document: int) -> Tensor:
        ids, _ = self.corpus.piece(document)
        return torch.from_numpy(ids.astype(np.int64)).to(self.model.weight.device)

    def targets(self, document: int) -> Tensor:
        """Its tokens, and -1 where a token is no target."""
        _, trainable = self.corpus.piece(document)
        tokens = self.tokens(document)
        return tokens.where(torch.tensor(trainable, device=tokens.device), -1)

    def __getitem__(self, document: int) -> Tensor:
        if (made := self.kept.get(document)) is None:
            made = known_pass(self.model, self.tokens(document)).bfloat16()
            if self.bytes + made.nbytes <= self.limit:
                self.kept[document], self.bytes = made, self.bytes + made.nbytes
        return made


def draft_pass(model: Qwen2, known: list[Tensor], anchors: Tensor, width: int) -> Tensor:
    """Hidden states (B, G, w, D) of a group of masks behind each anchor (B, G) of B documents.

    known: each document's keys and values, see `known_pass`.
    """
    B, G = anchors.shape
    S, T, weight = int(anchors.max()) + 1, G * width, model.weight
    layers, _, K, _, d = known[0].shape
    past = weight.new_zeros(layers, 2, B, K, S, d)
    for row, kv in enumerate(known):
        past[:, :, row, :, : kv.shape[3]] = kv[:, :, :, :S]
    group = torch.arange(T, device=weight.device) // width
    earlier = torch.arange(S, device=weight.device) <= anchors[:, group, None]  # (B, T, S)
    seen = torch.cat([earlier, (group[:, None] == group).expand(B, T, T)], dim=2)

    def attend(layer, q, k, v):
        keys, values = (torch.cat(pair, dim=2) for pair in zip(past[layer], (k, v)))
        return plain_attention(q, keys, values, seen)

    masks = torch.full((B, T), model.config.mask_token_id, device=weight.device)
    positions = (anchors[..., None] + torch.arange(1, width + 1, device=weight.device)).flatten(1)
    with adapter_of(model).on(torch.ones(1, 1, 1, dtype=torch.bool, device=weight.device)):
        return model(masks, positions, attend).unflatten(1, (G, width))


def draft_targets(tokens: Tensor, anchors: Tensor, width: int) -> Tensor:
    """Targets (G, w) of the masks behind anchors (G) in one document's tokens; -1 from its answer's end on.

    tokens: see `Known.targets`.
    """
    at = anchors[:, None] + torch.arange(2, width + 2, device=tokens.device)  # token shift
    targets = tokens[at.clamp_max(len(tokens) - 1)].masked_fill(at >= len(tokens), -1)
    return targets.masked_fill((targets < 0).cumsum(-1) > 0, -1)


# --- Loss ---


def draft_weights(chances: Tensor, reach: float = REACH, near: float = NEAR) -> Tensor:
    """Weights (..., w) of the drafts' cross entropies, from the chance of each draft to be right (..., w).

    A group keeps sum_j prod_{k <= j} p_k drafts on average. Its gradient is that of sum_i w_i log p_i with
    w_i = sum_{j >= i} prod_{k <= j} p_k held fixed. The weights are reach * w_i + (1 - reach) * near ** i.
    """
    kept = chances.cumprod(-1)
    ahead = kept.flip(-1).cumsum(-1).flip(-1)
    return reach * ahead + (1 - reach) * near ** torch.arange(chances.shape[-1], device=chances.device)


def draft_loss(
    model: Qwen2,
    hidden: Tensor,
    targets: Tensor,
    ids: Tensor,
    others: Tensor,
    weigh: Callable = draft_weights,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of cross entropies, sum of weights, and how many drafts would be kept among these tokens.

    hidden (B, G, w, D), targets (B, G, w). The head runs over two sets of tokens. `ids` (sorted) holds all
    targets. `others` is a random sample of the remaining vocabulary; its logits are raised so that it stands
    for all of it. The full head would mostly lower tokens that never occur.
    """
    some = torch.cat([ids, others])
    rest = model.config.vocab_size - len(ids)
    logits = F.linear(hidden, model.lm_head.weight[some].to(hidden.dtype)).float()
    best = logits.argmax(-1)
    logits[..., len(ids) :] += math.log(max(1, rest) / max(1, len(others)))
    there = targets >= 0
    wanted = torch.searchsorted(ids, targets)  # 0 for -1
    losses = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none").view_as(targets)
    weights = weigh((-losses.detach()).exp() * there) * there
    kept = ((best == wanted) & there).cumprod(-1).sum()
    return (losses * weights).sum(), weights.sum(), kept


@torch.no_grad()
def simulate(model: Qwen2, known: Known, documents: Iterable[int], width: int) -> Counter:
    """Replay verified decoding on each document's first answer: how many cycles keep 0, 1, 2, ... drafts.

    The data's answer stands for what AR would write. A cycle is two passes, and writes 2 tokens and the kept
    drafts.
    """
    possible = {document: anchors_of(known.corpus.piece(document)[1]).tolist() for document in documents}
    kept, running = Counter(), [(document, at[0]) for document, at in possible.items() if at]
    while running:
        after = []
        for i in range(0, len(running), 32):
            part = running[i : i + 32]
            anchors = torch.tensor([[a] for _, a in part], device=model.weight.device)
            hidden = draft_pass(model, [known[d] for d, _ in part], anchors, width)
            guesses = torch.cat([model.logits(rows).argmax(-1) for rows in hidden.flatten(0, 2).split(256)])
            for (document, a), guess in zip(part, guesses.view(-1, width)):
                tokens = known.targets(document)
                right = guess == draft_targets(tokens, torch.tensor([a], device=tokens.device), width)[0]
                m = int(right.cumprod(0).sum())
                kept[m] += 1
                if a + 2 + m in possible[document]:  # else the answer ends
                    after.append((document, a + 2 + m))
        running = after
    return kept


# --- Training ---


def new_adapter(model: Qwen2, r: int, width: int, seed: int) -> None:
    """Put an adapter to train on a model: its products begin at 0, its mask as a stop token's embedding."""
    stop, generator = model.config.stop_token_ids, torch.Generator().manual_seed(seed)
    row = model.weight[stop[-1] if stop else 0].detach().clone()
    add_adapter(model, r, 2.0 * r, width)
    for layer in adapted_layers(model).values():
        bound = layer.A.shape[1] ** -0.5
        layer.A.data.copy_(torch.empty(layer.A.shape).uniform_(-bound, bound, generator=generator))
    model.model.embed_tokens.row.data.copy_(row)


class Drafts:
    """The `Job` of a draft adapter: a frozen model with an adapter, and the data to train it on."""

    def __init__(self, model: Qwen2, corpus: Corpus, heldout: Corpus | None, settings: Drafting):
        self.model, self.corpus, self.settings = model.requires_grad_(False).eval(), corpus, settings
        self.device, self.row_tokens = model.weight.device, settings.anchors * settings.width
        ok = settings.batch_size % world_size() == 0
        require(ok, f"--batch-size {settings.batch_size} is no multiple of {world_size()} processes.")
        trains = lambda name: name.endswith((".A", ".B", ".row"))
        self.trained = {name: p for name, p in model.named_parameters() if trains(name)}
        for p in self.trained.values():
            p.data, p.requires_grad = p.data.float(), True
        limit = settings.cache_gb * 1e9
        self.known = Known(model, corpus, 0.8 * limit if heldout else limit)
        self.known_heldout = heldout and Known(model, heldout, 0.2 * limit)
        ids = np.unique(corpus.tokens).astype(np.int64)
        rest = np.setdiff1d(np.arange(model.config.vocab_size), ids)
        self.ids, self.rest = (torch.from_numpy(part).to(self.device) for part in (ids, rest))
        fixed = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.trained.values(), settings.lr, **fixed)

    def rows(self) -> Iterator[tuple[int, list[int]]]:
        return endless_groups(self.corpus, self.settings.anchors, self.settings.seed)

    def batch(self, rows: list, number: int) -> tuple[list[int], Tensor, Tensor, Tensor]:
        """This process's share of a step: documents, anchors (B, G), targets (B, G, w), other tokens."""
        share = len(rows) // world_size()
        # sorted by document, so that a process needs the keys and values of few documents
        documents, anchors = zip(*sorted(rows)[rank() * share : (rank() + 1) * share])
        anchors = torch.tensor(anchors, device=self.device)
        tokens = (self.known.targets(document) for document in documents)
        targets = torch.stack([draft_targets(*pair, self.settings.width) for pair in zip(tokens, anchors)])
        picked = np.random.default_rng([self.settings.seed, number]).permutation(len(self.rest))[:OTHERS]
        return documents, anchors, targets, self.rest[torch.from_numpy(picked).to(self.device)]

    def step(self, rows: list, number: int, progress: Callable) -> dict[str, float]:
        """The loss, and the drafts kept of a group; gradients as if one process had run all rows."""
        documents, anchors, targets, others = self.batch(rows, number)
        known = {document: self.known[document] for document in set(documents)}
        hidden = draft_pass(self.model, [known[i] for i in documents], anchors, self.settings.width)
        loss, weight, kept = draft_loss(self.model, hidden, targets, self.ids, others)
        sums = [float(x) for x in (loss.detach(), weight, kept, anchors.numel())]
        loss_sum, weight_sum, kept, groups = runs.total(sums, self.device)
        (loss / weight_sum).backward()
        if dist.is_initialized():
            for p in self.trained.values():
                total = p.grad.contiguous()  # it may be transposed as p is, which NCCL would refuse
                dist.all_reduce(total)
                p.grad.copy_(total)
        progress(len(rows))
        return {"draft_loss": loss_sum / weight_sum, "kept": kept / groups}

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Tokens per forward on held-out answers, and how many cycles kept 0, 1, 2, ... drafts."""
        if self.known_heldout is None:
            return {}
        width, documents = self.settings.width, len(self.known_heldout.corpus.lengths)
        mine = range(rank(), min(self.settings.eval_rows, documents), world_size())
        kept = simulate(self.model, self.known_heldout, mine, width)
        counts = [int(n) for n in runs.total([float(kept[m]) for m in range(width + 1)], self.device)]
        written = sum((2 + m) * n for m, n in enumerate(counts))
        return {"heldout_tokens_per_forward": written / max(1, 2 * sum(counts)), "heldout_kept": counts}


# --- Command ---


@click.command(cls=Command, short_help="Teach a model to draft for --verify.")
@run_options(Drafting)
@steps("--anchors", default=Drafting.anchors, help="Groups of masks in a row.")
@steps("--width", type=int, show_default=f"{Drafting.width}, or the --adapter's",
       help="Masks of a group: the longest draft.")  # fmt: skip
@steps("--rank", type=int, show_default=f"{Drafting.rank}, or the --adapter's",
       help="Rank of the adapter's products: its size, and how much it can learn.")  # fmt: skip
@machine("--cache-gb", default=Drafting.cache_gb,
         help="GB of keys and values that a process keeps; more is computed again.")  # fmt: skip
@files("--adapter", help="Go on from this adapter: a folder or Hub id.", show_default="a new one")
@machine("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the base.",
         show_default="float32 on CPUs, else as in the files")  # fmt: skip
@reports_mistakes
def draft(folder, data, heldout, out, broken, adapter, dtype, device, threads, **given):
    """Teach a frozen model to draft for --verify: an adapter, on at masks only.

    A step takes --batch-size rows. A row has --anchors groups of --width masks, each behind a token of the
    same answer; the masks learn to guess what follows.

    The best data are the model's own answers, since a draft is kept where it is what the model says:
    `cli.py generate --block-size 1 --input prompts.jsonl --output own.jsonl` writes them.
    """
    own_rank = "--adapter has a rank of its own; leave --rank out."
    require(adapter is None or given["rank"] is None, own_rank)
    settings = Drafting(**{name: value for name, value in given.items() if value is not None})
    with runs.one_run(device, threads, out) as device:
        model, tokenizer = load(folder, device, dtype or ("float32" if device == "cpu" else "auto"))
        require(tokenizer, f"{folder}: no tokenizer, so the data cannot be read.")
        if model.weight.is_cuda:
            avoid_cudnn_attention()
        if adapter:
            start = adapter_of(load_adapter(model, adapter))
            start.draft_width = given["width"] or start.draft_width or settings.width
            settings = replace(settings, rank=start.r, width=start.draft_width)
        else:
            tokenizer, model.config = with_mask_token(tokenizer, model.config)
            new_adapter(model, settings.rank, settings.width, settings.seed)
        fixed = {"objective": "draft", "dtype": str(model.weight.dtype), "adapter": adapter}
        fixed |= lasting(settings)
        corpus, unseen = runs.open_data(out, fixed, data, heldout, model, tokenizer, broken)
        room = model.config.max_position_embeddings
        for source, documents in ((data, corpus), (heldout, unseen)):
            longest = int(documents.lengths.max()) if documents else 0
            too_long = f"{source}: a document has {longest} tokens, the model {room} positions."
            require(longest <= room, too_long)
        metrics = runs.run(Drafts(model, corpus, unseen, settings), out)
        if rank() == 0:
            digest = None if model.weight.dtype == torch.float16 else base_digest(model)
            save_adapter(model, out, folder, digest, metrics.get("heldout_kept"))
            line = shlex.join(["--model", folder, "--adapter", str(out), "--verify", "--compare"])
            click.echo(f"The adapter is in {out}; try it: python cli.py generate {line}", err=True)
