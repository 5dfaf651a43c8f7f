"""Turn an AR Qwen2 into a block-diffusion model: the training recipe of Fast-dLLM v2 (paper, section 3).

    python train.py show                                                  # a packed, masked example
    python train.py ar --model FOLDER --data data.jsonl --out parent      # ordinary next-token training
    python train.py adapt --model parent --data data.jsonl --out adapted  # complementary masks, token shift
    python train.py draft --model FOLDER --data own.jsonl --out adapter   # an adapter that drafts: --verify
    torchrun --nproc-per-node 8 train.py adapt --preset 1.5b ...          # on several devices

Data is JSONL of chats in any usual format, or of `text`; `show --data FILE` shows what trains of it. A
stopped run resumes from its last checkpoint when the same command is started again.

Shapes: B rows, L positions of a row, V noisy views, T positions of an input, N targets, D hidden size. A row
is packed with whole documents. An input is a row's noisy views and its clean copy, [view 1 ; view 2 ; clean],
T = (V + 1) L.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import math
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from checkpoint import DTYPES, Tokenizer, load, read_checkpoint, save
from commands.console import HELP_OPTIONS, SHIPPED, VERSION, Commands, options, reports_mistakes, say
from commands.terminal import token_texts
from fastdllm import Config, Qwen2, attention_bias, grouped_attention, require, round_up
from training import runs
from training.attention import blockwise_attention, can_compile, sparse_attention, sparse_mask
from training.data import PACKINGS, Corpus, Piece, endless_rows, lay_out, with_mask_token
from training.drafts import draft
from training.runs import FILE, RunSettings, files, lasting, machine, run_options, steps

# --- Noise ---


def complementary_noise(
    trainable: Tensor, block_size: int, generator: torch.Generator | None = None
) -> Tensor:
    """The trainable positions (B, L) that view 1 hides; view 2 hides the rest.

    So each is a target once; a document's first position never is, since nothing predicts it.

    Per block t ~ U[0, 1), and a position is masked with probability 0.999 t + 0.001.
    """
    B, L = trainable.shape
    t = torch.rand(B, math.ceil(L / block_size), generator=generator)  # of each block
    t = t.repeat_interleave(block_size, dim=1)[:, :L]
    u = torch.rand(B, L, generator=generator)
    return trainable & (u < 0.999 * t + 0.001).to(trainable.device)


# --- Mask ---


def visibility(length: int, block_size: int, views: int = 1, documents: Tensor | None = None) -> Callable:
    """Training's mask: `sees(row, head, query, key)` for indices into [noisy views ; clean].

    A noisy query sees its own block of its own view and all earlier clean blocks. A clean query sees clean
    blocks up to its own, and nothing noisy (paper, section 3). documents (B, L) gives each position its
    document's number, and no query sees another document. With views=0 this is `fastdllm.block_causal`.
    """

    def sees(row, head, query, key):
        query_view, query_at, key_view, key_at = query // length, query % length, key // length, key % length
        query_block, key_block = query_at // block_size, key_at // block_size
        own_block = (query_view == key_view) & (query_block == key_block)
        earlier_clean = (key_view == views) & (query_block > key_block)
        seen = own_block | earlier_clean
        return seen if documents is None else seen & (documents[row, query_at] == documents[row, key_at])

    return sees


def training_mask(
    length: int, block_size: int, views: int = 1, documents: Tensor | None = None, device: str = "cpu"
) -> Tensor:
    """`visibility` as a bool tensor (T, T), or with documents (B, T, T): the dense reference."""
    index = torch.arange((views + 1) * length, device=device)
    row = None if documents is None else torch.arange(len(documents), device=device)[:, None, None]
    return visibility(length, block_size, views, documents)(row, None, index[:, None], index)


@cache
def fast_attention(device: str) -> str:
    """The fast way on a kind of device; says once where it is missing."""
    if device == "cuda" and not can_compile():
        say("without a C compiler and Python's headers training attention is dense: slower, and more memory.")
        return "dense"
    return {"cpu": "blockwise", "cuda": "sparse"}.get(device, "dense")


def training_attention(
    kind: str, length: int, block_size: int, views: int, documents: Tensor | None, device: torch.device
) -> Callable:
    """The `attend` of `Qwen2.forward` that applies `visibility`, computed in one of three ways.

    dense: one masked product, the reference; blockwise: block by block, fast on CPUs; sparse: FlexAttention,
    fast on CUDA; auto: the fast one for the device.
    """
    kind, side = fast_attention(device.type) if kind == "auto" else kind, (views + 1) * length
    if kind == "sparse":
        sees = visibility(length, block_size, views, documents)
        tiles = sparse_mask(sees, None if documents is None else len(documents), side, device)
        return lambda layer, *qkv: sparse_attention(*qkv, tiles)
    if kind == "dense":
        mask = training_mask(length, block_size, views, documents, device).view(-1, side, side)
        bias = lambda q, k: attention_bias(mask, q.shape[1] // k.shape[1], q.dtype)
        return lambda layer, q, k, v: grouped_attention(q, k, v, bias(q, k))
    chunk = block_size if views else 32  # positions of one product; without views any size works, 32 is fast
    if length % chunk:
        chunk = length
    mask = training_mask(length, block_size, 0, documents, device).view(-1, length, length)
    return lambda layer, *qkv: blockwise_attention(*qkv, mask, length, chunk, views)


# --- Loss ---


def training_loss(
    model: Qwen2,
    tokens: Tensor,
    trainable: Tensor,
    block_size: int | None = None,
    masked: Tensor | None = None,
    documents: Tensor | None = None,
    attention: str = "auto",
    count: float | None = None,
) -> Tensor:
    """The adaptation's loss, a scalar: token-shifted cross entropy of complementary views (paper, section 3).

    tokens (B, L); trainable (B, L) bool. masked (B, L) bool: what view 1 hides (default: drawn). documents
    (B, L): document numbers; a document begins on a block boundary and sees no other (default: one document).
    `block_size` defaults to the checkpoint's. count: what the sum is divided by, default the targets of this
    call; a step of several micro-batches or processes gives the number of all its targets.

    The inputs may stay on the CPU: then nothing waits for the device. Raises InputError for a length that is
    no multiple of the block, and for a model without a mask token.
    """
    size, mask_id = block_size or model.config.block_size, model.config.mask_token_id
    L, move = tokens.shape[1], partial(to_device, device=model.weight.device)
    require(mask_id is not None, "The model has no mask token; its config needs a mask_token_id.")
    require(L % size == 0, f"The rows have {L} positions, no multiple of the block size {size}; pad them.")

    masked = complementary_noise(trainable, size) if masked is None else masked & trainable
    views = noisy_views(trainable, masked)  # (B, V, L)
    noisy = tokens[:, None].masked_fill(views, mask_id)
    inputs = torch.cat([noisy, tokens[:, None]], dim=1)  # (B, V + 1, L), the clean copy behind the views
    positions = positions_of(tokens, documents).repeat(1, inputs.shape[1])
    seen = None if documents is None else move(documents)
    attend = training_attention(attention, L, size, views.shape[1], seen, model.weight.device)
    hidden = model(move(inputs.flatten(1)), move(positions), attend)  # (B, T, D)

    # Token shift: the output at position i predicts the token at i + 1, where that is masked. A block's first
    # token, too, is predicted by the noisy block before it, as in the authors' training; in decoding that
    # block is finished.
    targets = views & targets_of(trainable, documents)[:, None]  # (B, V, L), no document's first position
    row, view, position = targets.nonzero(as_tuple=True)
    outputs, wanted = view * L + position - 1, tokens[row, position]
    loss = cross_entropy(model, hidden[move(row), move(outputs)], move(wanted))
    return loss / max(1, len(wanted) if count is None else count)


def next_token_loss(
    model: Qwen2,
    tokens: Tensor,
    trainable: Tensor,
    documents: Tensor | None = None,
    attention: str = "auto",
    count: float | None = None,
) -> Tensor:
    """AR training's loss, a scalar: next-token cross entropy; arguments as in `training_loss`."""
    move = partial(to_device, device=model.weight.device)
    seen = None if documents is None else move(documents)
    attend = training_attention(attention, tokens.shape[1], 1, 0, seen, model.weight.device)
    hidden = model(move(tokens), move(positions_of(tokens, documents)), attend)  # (B, L, D)
    row, position = targets_of(trainable, documents).nonzero(as_tuple=True)
    wanted = tokens[row, position]
    loss = cross_entropy(model, hidden[move(row), move(position - 1)], move(wanted))
    return loss / max(1, len(wanted) if count is None else count)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. On CUDA it uses pinned memory, so that it need not wait for running work."""
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)


def noisy_views(trainable: Tensor, masked: Tensor) -> Tensor:
    """What each view hides, (B, V, L): `masked` (B, L), and all other trainable positions."""
    return torch.stack([masked, trainable & ~masked], dim=1)


def first_of(documents: Tensor) -> Tensor:
    """Which positions (B, L) are the first of a document, of document numbers (B, L)."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)


def positions_of(tokens: Tensor, documents: Tensor | None) -> Tensor:
    """Positions (B or 1, L) of tokens (B, L); they start at 0 in each document."""
    index = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return index if documents is None else index - (index * first_of(documents)).cummax(dim=1).values


def targets_of(trainable: Tensor, documents: Tensor | None) -> Tensor:
    """Positions (B, L) that can be targets: trainable and not first in their document."""
    return trainable & ~first_of(torch.zeros_like(trainable) if documents is None else documents)


def cross_entropy(model: Qwen2, hidden: Tensor, targets: Tensor, largest: int = 2**26) -> Tensor:
    """Sum of the cross entropies in float32, of hidden states (N, D) that predict targets (N).

    Only outputs with a target reach the head, and never more than `largest` logits are in memory at once.
    Where that takes several chunks, the backward pass computes each again.
    """

    def chunk(hidden, targets):
        return F.cross_entropy(model.logits(hidden).float(), targets, reduction="sum")

    rows = max(1, largest // model.config.vocab_size)
    if len(targets) <= rows:
        return chunk(hidden, targets)
    chunks = zip(hidden.split(rows), targets.split(rows))
    return sum(checkpoint(chunk, *part, use_reentrant=False) for part in chunks)


# --- Settings ---


@dataclass(frozen=True)
class Training(RunSettings):
    """How to train; batch, length, rate, steps, warm-up, schedule and noise are the paper's."""

    steps: int = 6000
    batch_size: int = 256
    lr: float = 2e-5
    warmup: int = 500
    seq_len: int = 2048  # positions of a row
    micro_batch: int = 1  # rows that a device runs at once
    schedule: str = "constant"  # after the warm-up; or "cosine", which falls to 0
    weight_decay: float = 0.01  # of matrices
    ar_weight: float = 0.0  # of the next-token loss beside the adaptation's
    packing: str = "documents"  # or "original", see `training.data.pack`
    compute: str | None = None  # dtype of products; None: `fast_dtype`; trained weights are float32
    recompute: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            ok = value in choices or name == "compute" and value is None
            require(ok, f"--{name} is {value!r}, it must be {' or '.join(choices)}.")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant, or a cosine that would be 0 a step after the last."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


CHOICES = {"schedule": ("constant", "cosine"), "packing": PACKINGS, "compute": ("bfloat16", "float32")}
PRESETS = {  # the paper's steps and rates, on 64 devices; with 80 GB each, a 1.5B needs no recomputing
    "1.5b": {"lr": 2e-5, "steps": 6000},
    "7b": {"lr": 1e-5, "steps": 2500, "recompute": True},
}


def fast_dtype(device: str) -> str:
    """The number format of products that is fast: on many CPUs bfloat16 takes ten times as long."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def check_length(seq_len: int, config: Config) -> None:
    """Raises InputError for a row's length that the model or the blocks do not allow."""
    size, most = config.block_size, config.max_position_embeddings
    require(seq_len % size == 0, f"--seq-len {seq_len} is no multiple of the block size {size}.")
    require(seq_len <= most, f"--seq-len {seq_len} is more than the model's {most} positions.")


# --- A step ---


def noisy_batch(
    corpus: Corpus, rows: list[list[Piece]], seeds: list[list[int]], pad: int, size: int, settings: Training
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, trainable, documents and what view 1 hides, each (B, L) and on the CPU.

    Each row's noise has its own seed, so that any process may run the row.
    """
    clean = lay_out(corpus, rows, settings.seq_len, pad, settings.packing == "documents")
    generators = [torch.Generator().manual_seed(int(np.random.default_rng(s).integers(2**63))) for s in seeds]
    noise = [complementary_noise(row[None], size, g) for row, g in zip(clean[1], generators)]
    return *clean, torch.cat(noise)


class Adaptation:
    """The `Job` of the adaptation and of next-token training: a model, its data, and how to train it.

    weights: of the losses, "diffusion" and "ar"; those that are left out are not computed.
    """

    def __init__(self, model: Qwen2, weights: dict[str, float], corpus: Corpus, heldout, settings: Training):
        self.weights, self.settings, self.corpus, self.heldout = weights, settings, corpus, heldout
        self.size, self.pad = model.config.block_size, model.config.mask_token_id or 0
        self.device, self.row_tokens = model.weight.device, settings.seq_len
        processes = runs.world_size()
        self.share = share = processes * settings.micro_batch  # rows that all processes run at once
        parts = f"{processes} processes x --micro-batch {settings.micro_batch}"
        multiple = f"--batch-size {settings.batch_size} is no multiple of {share}, {parts}."
        require(settings.batch_size % share == 0, multiple)
        compute = DTYPES[settings.compute or fast_dtype(self.device.type)]
        self.whole = runs.distribute(model, compute, settings.recompute)
        self.trained = dict(model.named_parameters())
        matrices = [p for p in self.trained.values() if p.dim() == 2]
        others = [p for p in self.trained.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others}]
        if heldout is not None:  # rounded up, so that each process has as many
            self.heldout_rows = list(islice(self.rows(heldout=True), round_up(settings.eval_rows, processes)))
        betas = 0.9, 0.95  # as is usual for language models
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, weight_decay=0.0, fused=True)

    def rows(self, heldout: bool = False) -> Iterator[list[Piece]]:
        corpus, seed = (self.heldout, 0) if heldout else (self.corpus, self.settings.seed)
        return endless_rows(corpus.lengths, self.settings.seq_len, self.size, self.settings.packing, seed)

    def step(self, rows: list[list[Piece]], number: int, progress: Callable) -> dict[str, float]:
        return self.losses(self.corpus, rows, [self.settings.seed, number], progress)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses on held-out rows, always the same rows with the same noise."""
        if self.heldout is None:
            return {}
        losses = self.losses(self.heldout, self.heldout_rows, [0, 0], progress=lambda rows: None)
        return {f"heldout_{name}": value for name, value in losses.items()}

    def losses(
        self, corpus: Corpus, rows: list[list[Piece]], seed: list[int], progress: Callable
    ) -> dict[str, float]:
        """The losses as if all processes' rows had run at once; without no_grad, adds their gradients too."""
        settings, parts = self.settings, []
        mine = [*enumerate(rows)][runs.rank() :: runs.world_size()]
        for at in range(0, len(mine), settings.micro_batch):
            numbers, part = zip(*mine[at : at + settings.micro_batch])
            seeds = [[*seed, number] for number in numbers]
            parts.append(noisy_batch(corpus, part, seeds, self.pad, self.size, settings))
        # one count serves both losses: each target is masked in one view, and is the next token once
        targets = sum(int(targets_of(trainable, documents).sum()) for _, trainable, documents, _ in parts)
        [count] = runs.total([targets], self.device)  # of all processes
        sums = dict.fromkeys(self.weights, 0.0)
        for tokens, trainable, documents, masked in parts:
            given = {"tokens": tokens, "trainable": trainable, "documents": documents, "count": count}
            losses = {
                "ar": partial(next_token_loss, **given),
                "diffusion": partial(training_loss, **given, block_size=self.size, masked=masked),
            }
            for kind, weight in self.weights.items():
                loss = self.whole(losses[kind])
                sums[kind] += loss.detach()
                if loss.requires_grad:
                    # FSDP2 averages gradients over processes, but the loss is their sum
                    (loss * weight * runs.world_size()).backward()
            progress(self.share)
        sums = runs.total([float(loss) for loss in sums.values()], self.device)
        return {f"{kind}_loss": loss for kind, loss in zip(self.weights, sums)}


# --- The model before and after ---


def initial_model(folder: str, from_scratch: bool, device: str, seed: int) -> tuple[Qwen2, Tokenizer]:
    """The model to train, and its tokenizer."""
    if not from_scratch:
        model, tokenizer = load(folder, device)
    else:
        _, config, tokenizer = read_checkpoint(folder, weights=False)
        torch.manual_seed(seed)
        model = Qwen2(config)
        for name, p in model.named_parameters():
            if p.dim() == 2:
                # a layer adds to the residual stream twice, and the sum of all layers should stay of one size
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                torch.nn.init.normal_(p, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if adds else 0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)
        model.to(device)
    require(tokenizer, f"{folder}: no tokenizer, so the data cannot be read.")
    return model.train(), tokenizer


def adapted(tokenizer: Tokenizer, config: Config, block_size: int | None = None) -> tuple[Tokenizer, Config]:
    """The adapted model's tokenizer and config: with a mask token, and with `block_size`.

    None: the checkpoint's, or the paper's 32 for an AR model.
    """
    least = f"--block-size is {block_size}, it must be at least 2; `train.py ar` trains AR models."
    require(block_size is None or block_size > 1, least)
    tokenizer, config = with_mask_token(tokenizer, config)
    trained = config.block_size if config.block_size > 1 else 32
    return tokenizer, replace(config, block_size=block_size or trained)


def save_result(out: Path, job: Adaptation, model: Qwen2, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """Write a folder that `load` reads, from all processes' shares."""
    weights = {name: weight.to(dtype) for name, weight in runs.whole_tensors(job.trained).items()}
    if runs.rank() == 0:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # where it is tied
        with torch.device("meta"):
            result = Qwen2(model.config)
        result.load_state_dict(weights, assign=True)
        result.tie()
        save(result, tokenizer, out)
        line = shlex.join(["python", "cli.py", "generate", "--model", str(out)])
        click.echo(f"The result is in {out}; try it: {line}", err=True)


# --- Show ---


def show(corpus: Corpus, tokenizer: Tokenizer, config: Config, settings: Training, row: int) -> Iterator[str]:
    """Lines that show a packed row: what trains, its views, what each output predicts, and its mask."""
    L, size, mask_id = settings.seq_len, config.block_size, config.mask_token_id
    rows = endless_rows(corpus.lengths, L, size, settings.packing, seed=settings.seed)
    pieces = next(islice(rows, row, None))
    batch = noisy_batch(corpus, [pieces], [[settings.seed, 0, row]], mask_id, size, settings)
    tokens, trainable, documents, masked = batch
    views, targets = noisy_views(trainable, masked)[0], targets_of(trainable, documents)[0]
    require(targets.any(), f"Row {row} has nothing that trains; show another --row.")
    text = token_texts(tokenizer, tokens[0].tolist())
    mask = tokenizer.decode([mask_id], skip_special_tokens=False)
    apart = "hidden from" if settings.packing == "documents" else "visible to"
    yield f"Row {row}: {L} positions in blocks of {size}; targets: {targets.sum()}"
    yield f"Documents: {len(pieces)}, {apart} each other"
    padding = lambda found: f" [padding x {len(found[0]) // len(mask)}]"
    legible = lambda words: re.sub(f"({re.escape(mask)})+", padding, "".join(words))
    yield "\nclean; what trains stands in [[ ]]:"
    parts = []
    for trains, span in groupby(zip(trainable[0].tolist(), text), key=itemgetter(0)):
        words = "".join(word for _, word in span)
        parts.append(f"[[{words}]]" if trains else words)
    yield legible(parts)
    named = {f"view {i}": view for i, view in enumerate(views, 1)}
    blank = lambda word: " " * word.startswith(" ") + "_" * max(1, len(word.strip()))
    for name, masked in named.items():
        words = (blank(word) if hidden else word for word, hidden in zip(text, masked.tolist()))
        yield f"\n{name}; what is masked is blank:\n" + legible(words)
    first = int(targets.nonzero()[0]) // size * size
    yield f"\nThe block of positions {first}-{first + size - 1}; the output at i predicts the token at i + 1:"
    yield f"{'position':>8}  {'token':<16}" + "".join(f"{name:<17}" for name in named) + "predicted by"
    text = [word.replace("\n", "\\n") for word in text]
    for i in range(first, first + size):
        states = "".join(f"{mask if masked[i] else text[i]:<17}" for masked in views)
        by = [f"output {i - 1} of {name}" for name, masked in named.items() if masked[i] and targets[i]]
        yield f"{i:>8}  {text[i]:<16}{states}{by[0] if by else '-'}"
    blocks = min(L // size, 12)
    yield f"\nWhich block sees which ({blocks} of {L // size}); a row is a query, a column a key:"
    names = [*named, "clean"]
    at = [part * L + block * size for part in range(len(names)) for block in range(blocks)]
    firsts = torch.tensor(at)  # all positions of a block see the same blocks
    sees = visibility(L, size, len(views), documents)(0, None, firsts[:, None], firsts)
    yield " " * 9 + " ".join(f"{name:<{blocks}}" for name in names)
    for n, seen in enumerate(sees):
        cells = ("".join("#" if see else "." for see in part) for part in seen.view(-1, blocks).tolist())
        yield f"{names[n // blocks] if n % blocks == 0 else '':<9}{' '.join(cells)}"


# --- Command line ---

packing_option = files(
    "--packing", type=click.Choice(PACKINGS), default=Training.packing,
    help="documents: padded to whole blocks, cut only if longer than a row, hidden from each other. original "
    "(the authors'): each padded by at least one token, cut where a row ends, visible to each other.",
)  # fmt: skip
block_option = files("--block-size", type=int, show_default="the checkpoint's, or 32",
                     help="Tokens that are denoised together.")  # fmt: skip
training_options = options(  # what `ar` and `adapt` share
    run_options(Training),
    steps("--seq-len", default=Training.seq_len, help="Positions of a row."),
    machine("--micro-batch", default=Training.micro_batch,
            help="Rows that a device runs at once; changes memory and speed only."),
    steps("--schedule", type=click.Choice(CHOICES["schedule"]), default=Training.schedule,
          help="The learning rate after the warm-up; cosine falls to 0 at --steps."),
    steps("--weight-decay", default=Training.weight_decay, help="AdamW's, of matrices."),
    packing_option,
    machine("--compute", type=click.Choice(CHOICES["compute"]), show_default="bfloat16 on CUDA, else float32",
            help="Number format of products; trained weights are float32."),
    machine("--recompute/--no-recompute", default=Training.recompute,
            help="Keep only the layers' inputs for the backward pass: slower, less memory."),
    files("--from-scratch", is_flag=True,
          help="Begin with random weights; --model gives the shape and the tokenizer."),
    files("--save-dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
          help="Number format of the result's weights."),
)  # fmt: skip


def take_preset(context: click.Context, _, name: str | None) -> None:
    context.default_map = (context.default_map or {}) | PRESETS.get(name, {})


TITLE, EXAMPLES = __doc__.split("\n\n")[:2]


@click.group(cls=Commands, help=f"{TITLE}\n\n\b\n{EXAMPLES}", context_settings=HELP_OPTIONS)
@click.version_option(VERSION, prog_name="fastdllm")
def main():
    pass


def train(
    objective: str, folder: str, data: Path, out: Path, heldout: Path | None, broken: str, device: str,
    threads: int | None, from_scratch: bool, save_dtype: str, block_size: int | None = None, **given,
) -> None:  # fmt: skip
    """One run, in the only process or in one of those that `torchrun` started."""
    settings = Training(**given)
    with runs.one_run(device, threads, out) as device:
        settings = replace(settings, compute=settings.compute or fast_dtype(device))
        model, tokenizer = initial_model(folder, from_scratch, device, settings.seed)
        if objective == "ar":
            weights, model.config = {"ar": 1.0}, replace(model.config, block_size=1)
        else:
            weights = {"diffusion": 1.0} | ({"ar": settings.ar_weight} if settings.ar_weight else {})
            tokenizer, model.config = adapted(tokenizer, model.config, block_size)
        check_length(settings.seq_len, model.config)
        fixed = {"objective": objective, "model": folder, "block_size": model.config.block_size}
        fixed |= lasting(settings)
        if settings.schedule == "constant":
            del fixed["steps"]  # a cosine ends where its steps end; a constant rate may go on
        corpus, unseen = runs.open_data(out, fixed, data, heldout, model, tokenizer, broken)
        job = Adaptation(model, weights, corpus, unseen, settings)
        runs.run(job, out)
        save_result(out, job, model, tokenizer, DTYPES[save_dtype])


@main.command(short_help="Train next tokens.")
@training_options
@reports_mistakes
def ar(**given):
    """Ordinary next-token training of an autoregressive model."""
    train("ar", **given)


@main.command(short_help="Make a block-diffusion model of an AR one.")
@training_options
@block_option
@steps("--preset", type=click.Choice(list(PRESETS)), callback=take_preset, is_eager=True, expose_value=False,
       show_default=False, help="The paper's steps and rate for a model of this size.")  # fmt: skip
@steps("--ar-weight", default=Training.ar_weight,
       help="Weight of a next-token loss beside the adaptation's: keeps AR decoding good.")  # fmt: skip
@reports_mistakes
def adapt(**given):
    """Make a block-diffusion model of an autoregressive one (paper, section 3)."""
    train("adapt", **given)


main.add_command(draft)


@main.command("show", short_help="Print how data are read, packed and masked.")
@files("--model", "folder", default=SHIPPED, show_default="the demo model, tiny/checkpoint",
       help="Whose tokenizer and block size: a folder or Hub id.")  # fmt: skip
@files("--data", default=SHIPPED.parent / "sample.jsonl", show_default="tiny/sample.jsonl", type=FILE,
       help="JSONL, whose first 500 documents are packed.")  # fmt: skip
@files("--row", default=0, type=click.IntRange(0, 10**6), help="Which row, from 0.")
@files("--seq-len", default=192, help="Positions of a row.")
@files("--seed", default=Training.seed, help="Of the order and the noise.")
@packing_option
@block_option
@reports_mistakes
def show_command(folder, data, row, block_size, **given):
    """Print a packed, masked example: what trains, which output predicts what, and the mask."""
    settings = Training(**given)
    _, config, tokenizer = read_checkpoint(folder, weights=False)
    require(tokenizer, f"{folder}: no tokenizer, so the data cannot be read.")
    tokenizer, config = adapted(tokenizer, config, block_size)
    check_length(settings.seq_len, config)
    corpus = Corpus.read(data, tokenizer, config.mask_token_id, "skip", most=500)  # enough to fill rows
    for line in show(corpus, tokenizer, config, settings, row):
        click.echo(line)


if __name__ == "__main__":
    main()
