"""Turn an AR Qwen2 into a block-diffusion model: the training recipe of Fast-dLLM v2 (paper, section 3).

    python train.py show                                                   # a packed, masked example, to be
    read python train.py ar --model FOLDER --data data.jsonl --out parent       # ordinary next-token training
    python train.py adapt --model parent --data data.jsonl --out adapted   # complementary masks and token
    shift python train.py draft --model FOLDER --data own.jsonl --out adapter    # an adapter that drafts, for
    --verify torchrun --nproc-per-node 8 train.py adapt --preset 1.5b ...           # on several devices

Data is JSONL with `messages` (or `question` and `answer`; what the assistant wrote is trainable), with
`text`, or with a `prompt` and its own answer in `text`. A run that was stopped, however it was, goes on from
its last checkpoint when it is started again with the same command.

Shapes: B rows, L positions of a row, T positions of an input, N targets, D hidden size. A row is packed with
whole documents. An input is the noisy views of a row followed by its clean copy, [view 1 ; view 2 ; clean], T
= 3L.
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import count, islice
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from cli import options, reports_mistakes
from fast import blockwise_attention, plain_attention, sparse_attention, sparse_mask, to_int8
from fastdllm import (
    DTYPES,
    InputError,
    Qwen2,
    Tokenizer,
    adapted_layers,
    add_adapter,
    attention_bias,
    base_digest,
    causal_attention,
    grouped_attention,
    load,
    load_tokenizer,
    pick_device,
    read_config,
    read_json,
    replace_file,
    require,
    round_up,
    save,
    save_adapter,
)

# --- Noise ---


def complementary_noise(
    trainable: Tensor, block_size: int, generator: torch.Generator | None = None
) -> Tensor:
    """Which trainable positions (B, L) view 1 masks; view 2 masks the others, so that each is a target
    exactly once.

    Per block t ~ U[0, 1), and a position is masked with probability 0.999 t + 0.001.
    """
    B, L = trainable.shape
    t = torch.rand(B, L // block_size, generator=generator).repeat_interleave(block_size, dim=1)
    u = torch.rand(B, L, generator=generator)
    return trainable & (u < 0.999 * t + 0.001).to(trainable.device)


# --- Mask ---


def visibility(
    length: int, block_size: int, views: int, documents: Tensor | None = None, clean: str = "block"
) -> Callable:
    """The mask's one definition: `sees(row, head, query, key)` of indices in [noisy views ; clean] (paper,
    section 3).

    A noisy query sees its own block of its own view, and the clean blocks before it. A clean query sees the
    clean blocks up to its own, or with `clean` "causal" the clean positions up to its own. Nothing clean sees
    anything noisy. With `documents` (B, L), numbers that differ between the documents of a row, nothing sees
    another document. Without noisy views and with block size 1 it is the ordinary causal mask.
    """

    def sees(row, head, query, key):
        query_view, query_at, key_view, key_at = query // length, query % length, key // length, key % length
        query_block, key_block = query_at // block_size, key_at // block_size
        own_block = (query_view == key_view) & (query_block == key_block)
        if clean == "causal":
            own_block = own_block & ((query_view < views) | (query_at >= key_at))
        earlier_clean = (key_view == views) & (query_block > key_block)
        seen = own_block | earlier_clean
        return seen if documents is None else seen & (documents[row, query_at] == documents[row, key_at])

    return sees


def training_mask(
    length: int,
    block_size: int,
    views: int = 1,
    documents: Tensor | None = None,
    device: str | None = None,
    clean: str = "block",
) -> Tensor:
    """`visibility` written out, bool, (side, side) or with documents (B, side, side); side is (views + 1) *
    length.
    """
    index = torch.arange((views + 1) * length, device=device)
    row = None if documents is None else torch.arange(len(documents), device=device)[:, None, None]
    return visibility(length, block_size, views, documents, clean)(row, None, index[:, None], index)


def training_attention(
    kind: str,
    length: int,
    block_size: int,
    views: int,
    documents: Tensor | None,
    device: torch.device,
    clean: str = "block",
) -> Callable:
    """The `attend` of `Qwen2.forward` that applies `visibility`, computed in one of three ways.

    dense: one masked product, the reference; blockwise: block by block, fast on CPUs; sparse: FlexAttention,
    fast on CUDA; auto: the fast one for the device.
    """
    if kind == "auto":
        kind = {"cpu": "blockwise", "cuda": "sparse"}.get(device.type, "dense")
    if kind == "sparse":
        sees = visibility(length, block_size, views, documents, clean)
        tiles = sparse_mask(sees, None if documents is None else len(documents), (views + 1) * length, device)
        return lambda layer, *qkv: sparse_attention(*qkv, tiles)
    dense = partial(training_mask, length, documents=documents, device=device)
    if kind == "dense":
        mask = dense(block_size, views, clean=clean).view(-1, (views + 1) * length, (views + 1) * length)
        return lambda layer, q, k, v: grouped_attention(
            q, k, v, attention_bias(mask, q.shape[1] // k.shape[1], v.dtype)
        )
    # without views a block is only a piece of the work, and 32 is a good size for it
    chunk = block_size if views else max(block_size, min(length, 32))
    chunk = chunk if length % chunk == 0 else length
    square = lambda mask: mask.view(-1, length, length)
    alone = documents is None and chunk == block_size  # then blocks alone decide
    noisy_mask = None if alone else square(dense(block_size, 0))
    clean_mask = noisy_mask if clean == "block" else square(dense(block_size, 0, clean="causal"))
    how = {"length": length, "block_size": chunk, "views": views}
    return lambda layer, *qkv: blockwise_attention(*qkv, clean_mask, noisy_mask, **how)


# --- Loss ---


def positions_of(documents: Tensor) -> Tensor:
    """Positions (B, L) that start at 0 in each document of a row."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - (index * first).cummax(dim=1).values


def targets_of(trainable: Tensor, documents: Tensor | None) -> Tensor:
    """Positions (B, L) that can be targets: trainable, and not first in their document, since output i - 1
    predicts token i."""
    first = torch.zeros_like(trainable)
    first[:, 0] = True
    if documents is not None:
        first[:, 1:] |= documents[:, 1:] != documents[:, :-1]
    return trainable & ~first


def diffusion_outputs(
    model: Qwen2,
    tokens: Tensor,
    trainable: Tensor,
    masked: Tensor,
    documents: Tensor | None = None,
    block_size: int | None = None,
    complement: bool = True,
    attention: str = "auto",
    clean: str = "block",
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, D) before the masked positions of all views, the tokens (N) there, and the clean
    copy's hidden states (B, L, D)."""
    size, mask_id = block_size or model.config.block_size, model.config.mask_token_id
    B, L = tokens.shape
    require(
        mask_id is not None,
        "The model has no mask token; give its config a mask_token_id inside the embedding.",
    )
    ok = L % size == 0
    require(ok, f"The rows have {L} positions, no multiple of the block size {size}; pad them with masks.")
    views = torch.stack([masked, trainable & ~masked] if complement else [masked], dim=1)  # (B, views, L)
    noisy = tokens[:, None].masked_fill(views, mask_id).flatten(1)  # (B, views * L)
    index = torch.arange(L, device=tokens.device)[None] if documents is None else positions_of(documents)
    V = views.shape[1]
    attend = training_attention(attention, L, size, V, documents, tokens.device, clean)
    hidden = model(torch.cat([noisy, tokens], dim=1), index.repeat(1, V + 1), attend).unflatten(1, (V + 1, L))
    # token shift: the output at i predicts the token at i + 1
    targets = (views & targets_of(trainable, documents)[:, None])[:, :, 1:]
    return hidden[:, :V, :-1][targets], tokens[:, None].expand_as(views)[:, :, 1:][targets], hidden[:, V]


def causal_outputs(
    model: Qwen2,
    tokens: Tensor,
    trainable: Tensor,
    documents: Tensor | None = None,
    attention: str = "auto",
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and the tokens (N) that they predict in ordinary next-token training.

    hidden (B, L, D): of a pass that was causal already; None: the pass is made here.
    """
    if hidden is None:
        index = torch.arange(tokens.shape[1], device=tokens.device)[None]
        index = index if documents is None else positions_of(documents)
        attend = training_attention(attention, tokens.shape[1], 1, 0, documents, tokens.device)
        hidden = model(tokens, index, attend)
    targets = targets_of(trainable, documents)[:, 1:]
    return hidden[:, :-1][targets], tokens[:, 1:][targets]


def score(model: Qwen2, hidden: Tensor, targets: Tensor, largest: int = 2**26) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies in float32, and number of right predictions, of hidden (N, D) against ids
    (N).

    Only target rows reach the head, and never more than `largest` logits are there at once: where that takes
    several chunks, the backward pass computes each anew.
    """

    def chunk(hidden, targets):
        logits = model.logits(hidden).float()
        return F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()

    rows = max(1, largest // model.config.vocab_size)
    if len(targets) <= rows:
        return chunk(hidden, targets)
    parts = [
        checkpoint(chunk, *part, use_reentrant=False) for part in zip(hidden.split(rows), targets.split(rows))
    ]
    return tuple(sum(column) for column in zip(*parts))


def training_loss(
    model: Qwen2,
    tokens: Tensor,
    trainable: Tensor,
    block_size: int | None = None,
    masked: Tensor | None = None,
    documents: Tensor | None = None,
    complement: bool = True,
    attention: str = "auto",
) -> Tensor:
    """The adaptation's loss, a scalar: token-shifted cross entropy of complementary views (paper, section 3).

    tokens (B, L) and trainable (B, L) bool, L a multiple of the block size (default: the checkpoint's).
    Output i predicts the token at i + 1 where that is masked, so a document's first position is never a
    target; the sum over both views is divided by the number of targets. `masked` (B, L) bool fixes what view
    1 masks, which is drawn otherwise; `documents` (B, L) numbers the documents of a row, which begin on block
    boundaries and know nothing of each other (default: one); without `complement` there is no view 2. One
    clean copy serves both views, so a row costs 3L tokens. Inputs are left as they are. Raises InputError for
    a length that is no multiple of the block, or a model without a mask token.
    """
    size = block_size or model.config.block_size
    if masked is None and tokens.shape[1] % size == 0:
        masked = complementary_noise(trainable, size)
    masked = trainable if masked is None else masked & trainable
    outputs = diffusion_outputs(model, tokens, trainable, masked, documents, size, complement, attention)[:2]
    return score(model, *outputs)[0] / max(len(outputs[1]), 1)


def causal_loss(model: Qwen2, tokens: Tensor, trainable: Tensor, documents: Tensor | None = None) -> Tensor:
    """Mean next-token cross entropy over the trainable tokens, a scalar; arguments as in `training_loss`."""
    outputs = causal_outputs(model, tokens, trainable, documents)
    return score(model, *outputs)[0] / max(len(outputs[1]), 1)


# --- Data ---


def chat_document(messages: list[dict], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """ChatML of a conversation through its last answer; trainable is what the assistant wrote, with end and
    newline.

    Raises InputError for roles and contents that are none.
    """
    tokens, trainable = [], []
    for message in messages:
        known = message["role"] in ("system", "user", "assistant", "tool")
        require(known, f"the role {message['role']!r} is none of system, user, assistant and tool")
        require(type(message["content"]) is str, f"the {message['role']}'s content is no text")
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for before, turn in zip([-1, *answers], answers):
        # every turn begins with a special token, so that the pieces' tokens are those of the whole text
        prompt = tokenizer.chat(messages[before + 1 : turn], system=before < 0)
        answer = tokenizer.encode(f"{messages[turn]['content']}<|im_end|>\n")
        tokens += prompt + answer
        trainable += [False] * len(prompt) + [True] * len(answer)
    return tokens, trainable


def read_documents(
    path: Path, tokenizer: Tokenizer, broken: str = "refuse", progress: Callable = lambda size: None
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids and which of them are trainable, of each line of a JSONL file; `progress` is told each line's
    bytes.

    A broken line raises InputError naming it, or where `broken` is "skip", is named on standard error and
    left out.
    """
    mask, size = tokenizer.id("|<MASK>|"), len(tokenizer)  # a length that walks through the vocabulary
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            progress(len(line))
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if "token_ids" in record:  # an answer that `cli.py generate --output` wrote, token by token
                    asked = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
                    prompt, answer = tokenizer.chat(asked), record["token_ids"]
                    document = prompt + answer, [False] * len(prompt) + [True] * len(answer)
                elif "text" in record:
                    tokens = tokenizer.encode(record["text"]) + [tokenizer.id("<|endoftext|>")]
                    tokens = tokens if tokens[-1] is not None else tokens[:-1]
                    document = tokens, [True] * len(tokens)
                else:
                    roles = ("user", "question"), ("assistant", "answer")
                    messages = record.get("messages") or [
                        {"role": r, "content": record[key]} for r, key in roles
                    ]
                    document = chat_document(messages, tokenizer)
                require(any(document[1]), "nothing of it is an assistant's, so nothing trains")
                inside = all(type(i) is int and 0 <= i < size for i in document[0])
                require(inside, "it has token ids outside the vocabulary")
                require(mask not in document[0], "it holds the mask token, which only training may write")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                forms = "no JSON object with `messages`, `question` and `answer`, or `text`"
                reason = error if isinstance(error, InputError) else f"{forms} ({error!r:.99})"
                require(
                    broken == "skip", f"{path}, line {number}: {reason}; --broken skip leaves such lines out."
                )
                print(f"{path}, line {number}: {reason}; skipped", file=sys.stderr)
                continue
            yield document


class Corpus:
    """Tokenised documents: all tokens, which of them are trainable, and where each document begins."""

    def __init__(self, tokens: np.ndarray, trainable: np.ndarray, offsets: np.ndarray):
        self.tokens, self.trainable, self.offsets = tokens, trainable, offsets

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """From files that stay on disk, mapped into memory. Raises InputError where they are damaged."""
        mapped = partial(np.memmap, mode="r")
        try:
            tokens = mapped(folder / "tokens.bin", dtype=read_json(folder / "meta.json")["dtype"])
            corpus = cls(
                tokens, mapped(folder / "trainable.bin", dtype=bool), np.load(folder / "offsets.npy")
            )
            offsets = corpus.offsets
            whole = offsets.ndim == 1 and offsets[0] == 0 and bool((np.diff(offsets) > 0).all())
            whole = whole and offsets[-1] == len(corpus.tokens) == len(corpus.trainable)
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            whole = False
        require(whole, f"{folder}: its files are damaged; remove it, and it is made anew.")
        return corpus

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def piece(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trainable of [start, stop) of a document, or of as much of it as there is."""
        low, end = self.offsets[document : document + 2]
        where = slice(low + start, min(low + stop, end))
        return self.tokens[where], self.trainable[where]

    @staticmethod
    def content(data: Path, folder: Path | None = None) -> str:
        """A hash of the data's content; of a file that has not changed since it was tokenised into `folder`,
        kept.
        """
        meta = (data if data.is_dir() else folder or data) / "meta.json"
        known = read_json(meta) if meta.is_file() else {}
        if data.is_dir():
            return known.get("content", "")
        status = data.stat()
        same = (known.get("bytes"), known.get("changed")) == (status.st_size, status.st_mtime_ns)
        return known["content"] if same and "content" in known else file_hash(data)

    @classmethod
    def prepare(cls, data: Path, tokenizer: Tokenizer, folder: Path, broken: str = "refuse") -> "Corpus":
        """Of a folder that was prepared before, or of a JSONL file, tokenised into `folder` unless that was
        done.

        Raises InputError for broken lines, for data without documents, and for tokens of another tokenizer.
        """
        name = hashlib.sha256(f"{tokenizer.system} {tokenizer.encoder.to_str()}".encode()).hexdigest()[:16]
        if data.is_dir():
            meta = read_json(data / "meta.json")
            same = meta.get("tokenizer") == name
            require(same, f"{data}: was not tokenised with this tokenizer; give its JSONL file.")
            return cls.open(data)
        status, dtype = data.stat(), "uint16" if len(tokenizer) <= 2**16 else "uint32"
        made_of = {
            "content": cls.content(data, folder),
            "source": str(data.resolve()),
            "bytes": status.st_size,
        }
        made_of |= {"changed": status.st_mtime_ns, "tokenizer": name, "dtype": dtype, "broken": broken}
        if (folder / "meta.json").is_file() and made_of.items() <= read_json(folder / "meta.json").items():
            return cls.open(folder)
        for old in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a run that was killed
            shutil.rmtree(old, ignore_errors=True)
        part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        offsets = [0]
        bar = tqdm(total=status.st_size, desc=f"tokenising {data.name}", unit="B", unit_scale=True)
        try:
            part.mkdir(parents=True)
            with open(part / "tokens.bin", "wb") as ids, open(part / "trainable.bin", "wb") as flags, bar:
                for tokens, trainable in read_documents(data, tokenizer, broken, bar.update):
                    ids.write(np.array(tokens, dtype).tobytes())
                    flags.write(np.array(trainable, bool).tobytes())
                    offsets.append(offsets[-1] + len(tokens))
            require(len(offsets) > 1, f"{data}: holds no documents.")
            np.save(part / "offsets.npy", np.array(offsets, np.int64))
            made_of |= {"documents": len(offsets) - 1, "tokens": offsets[-1]}
            (part / "meta.json").write_text(json.dumps(made_of, indent=2) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return cls.open(folder)


# --- Packing ---

Piece = tuple[int, int, int]  # a document, and [start, stop) of it; what lies beyond its end is padding


def pack(
    lengths: np.ndarray, seq_len: int, block_size: int, packing: str, rng: np.random.Generator
) -> list[list[Piece]]:
    """Each document once, in rows of at most `seq_len` positions, in a random order; see PACKINGS for the
    ways.

    "documents" puts each document into the fullest row that has room for it; only one that is longer than a
    row is cut, into rows of its own. The other two drop the last, incomplete row.
    """
    rows, order = [], rng.permutation(len(lengths)).tolist()
    if packing == "documents":
        room, sizes = defaultdict(list), 0  # free positions -> rows; and which keys have rows, as bits
        for document in order:
            for start in range(0, lengths[document], seq_len):
                need = round_up(int(min(lengths[document] - start, seq_len)), block_size)
                if fits := sizes >> need:
                    free = need + (fits & -fits).bit_length() - 1
                    row = room[free].pop()
                    sizes &= ~(1 << free) if not room[free] else -1
                else:
                    free, row = seq_len, []
                    rows.append(row)
                row.append((document, start, start + need))
                if free > need:
                    room[free - need].append(row)
                    sizes |= 1 << (free - need)
        return [rows[i] for i in rng.permutation(len(rows))]
    row, filled = [], 0
    for document in order:
        length = int(lengths[document])
        whole = length // block_size * block_size + block_size if packing == "original" else length
        start = 0
        while start < whole:
            stop = min(whole, start + seq_len - filled)
            row.append((document, start, stop))
            start, filled = stop, filled + stop - start
            if filled == seq_len:
                rows.append(row)
                row, filled = [], 0
    return [rows[i] for i in rng.permutation(len(rows))]


def endless_rows(lengths: np.ndarray, *how, seed: int) -> Iterator[list[Piece]]:
    """Packed rows, epoch after epoch: a function of the arguments alone."""
    epoch = 0
    while True:
        rows = pack(lengths, *how, np.random.default_rng([seed, epoch]))
        require(
            rows,
            f"The data does not fill one row of {how[0]} positions; give more of it, or a lower --seq-len.",
        )
        yield from rows
        del rows  # before the next epoch's are there
        epoch += 1


@dataclass
class Batch:
    """Rows of the network's input, each (B, L)."""

    tokens: Tensor
    trainable: Tensor
    documents: Tensor | None  # numbers of the documents of a row; None: a row is one
    masked: Tensor | None = None  # what view 1 masks

    def to(self, device) -> "Batch":
        move = lambda x: None if x is None else x.to(device, non_blocking=True)
        return Batch(*(move(getattr(self, f.name)) for f in fields(self)))

    def split(self, rows: int) -> list["Batch"]:
        parts = [
            (x.split(rows) if x is not None else None) for x in (getattr(self, f.name) for f in fields(self))
        ]
        return [Batch(*(p[i] if p else None for p in parts)) for i in range(len(parts[0]))]


def lay_out(
    corpus: Corpus, rows: list[list[Piece]], seq_len: int, pad: int, separate_documents: bool
) -> Batch:
    """The rows' tokens; positions without a document are padding, which does not train."""
    shape = len(rows), seq_len
    tokens, trainable, documents = (
        np.full(shape, pad, np.int64),
        np.zeros(shape, bool),
        np.zeros(shape, np.int32),
    )
    for r, row in enumerate(rows):
        at = 0
        for number, (document, start, stop) in enumerate(row, 1):
            ids, flags = corpus.piece(document, start, stop)
            tokens[r, at : at + len(ids)], trainable[r, at : at + len(ids)] = ids, flags
            documents[r, at : at + stop - start] = number
            at += stop - start
    tensors = map(torch.from_numpy, (tokens, trainable, documents))
    return Batch(*tensors) if separate_documents else Batch(*islice(tensors, 2), None)


def draw_noise(batch: Batch, block_size: int, *seeds: list[int]) -> None:
    """View 1's masks, each row's from seeds of its own, so that they do not depend on who runs the row."""
    generators = [torch.Generator().manual_seed(int(np.random.default_rng(s).integers(2**63))) for s in seeds]
    rows = [complementary_noise(row[None], block_size, g) for row, g in zip(batch.trainable, generators)]
    batch.masked = torch.cat(rows)


# --- Devices ---

PATIENT = []  # the group of processes for waits that may take hours


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: list[float], device: torch.device) -> list[float]:
    """Sums over all processes."""
    if not dist.is_initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def wait_for_all() -> None:
    """No process goes on before all are here."""
    if dist.is_initialized():
        dist.barrier()


def first_process(work: Callable[[], None]) -> None:
    """Have the first process do something that the others wait for; a mistake it finds is everyone's."""
    problem = [None]
    if rank() == 0:
        try:
            work()
        except (InputError, OSError) as error:
            problem = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(problem, group=PATIENT[0])
    require(problem[0] is None, problem[0])


@contextmanager
def processes(device: str) -> Iterator[str]:
    """This process's device, among those that `torchrun` started."""
    local = os.environ.get("LOCAL_RANK")
    if local and device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(local))  # before anything else touches a device
        device = f"cuda:{local}"
    device = pick_device(device)
    if local is None:
        yield device
        return
    # a step that hangs must not block for a day; only the tokenising, which the others wait for, may take
    # long
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=30))
    PATIENT.append(dist.new_group(backend="gloo", timeout=timedelta(hours=24)))
    try:
        yield device
    finally:
        PATIENT.clear()
        dist.destroy_process_group()


class Objective(nn.Module):
    """Model and losses as one module: its forward pass is all that has gradients, as DDP and FSDP ask for."""

    def __init__(self, model: Qwen2, complement: bool, clean: str, kinds: list[str], compute: torch.dtype):
        super().__init__()
        self.model, self.complement, self.clean, self.kinds, self.compute = (
            model,
            complement,
            clean,
            kinds,
            compute,
        )

    def forward(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Sum of cross entropies and number of right predictions of each kind of loss, diffusion or ar."""
        model, data, found = self.model, (batch.tokens, batch.trainable), {}
        # FSDP2 has cast the weights to the compute dtype already; autocast would cast again, and norms to
        # float32
        mixed = self.compute not in (torch.float32, model.weight.dtype)
        with torch.autocast(batch.tokens.device.type, self.compute, enabled=mixed):
            clean_hidden = None
            if "diffusion" in self.kinds:
                how = {"complement": self.complement, "clean": self.clean}
                hidden, targets, clean_hidden = diffusion_outputs(
                    model, *data, batch.masked, batch.documents, **how
                )
                found["diffusion"] = score(model, hidden, targets)
            if "ar" in self.kinds:
                clean_hidden = clean_hidden if self.clean == "causal" else None
                found["ar"] = score(
                    model, *causal_outputs(model, *data, batch.documents, hidden=clean_hidden)
                )
        return found


def distribute(objective: Objective, parallel: str, recompute: bool) -> nn.Module:
    """As each process runs it: DDP, each with all weights, or FSDP2, each with its share of weights and
    optimiser.

    Weights are float32 from here on. `recompute` keeps only the layers' inputs for the backward pass. What
    lies between the matrix products, the residual stream above all, is in the compute dtype under FSDP2,
    which sends the weights around in it, and in float32 otherwise.
    """
    layers = objective.model.model.layers
    if recompute:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if parallel == "fsdp" and dist.is_initialized():
        policy = MixedPrecisionPolicy(param_dtype=objective.compute, reduce_dtype=torch.float32)
        for module in (*layers, objective):
            fully_shard(module, mp_policy=policy)
    objective.float()
    if parallel == "ddp" and dist.is_initialized():
        # otherwise it groups gradients anew after the first step, and a run that was resumed adds in another
        # order
        return DistributedDataParallel(objective, find_unused_parameters=True)
    return objective


# --- Checkpoints ---
# A checkpoint is a folder of safetensors files, one per process with its share of weights and optimiser, and
# JSON beside each: where a share lies in the whole tensor, and the file's checksum. Nothing in it is ever run
# as code.


def checkpoints(out: Path) -> list[Path]:
    """Finished ones, the oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def last_good(out: Path, below: Path | None = None) -> str:
    """Words for the last checkpoint whose checksums are right, of those before `below`."""
    for place in reversed([place for place in checkpoints(out) if below is None or place < below]):
        try:
            for file in place.glob("share-*.json"):
                verified(file)
        except InputError:
            continue
        return f"the last good one is {place}"
    return "there is no good one"


def verified(index: Path) -> dict:
    """The contents of a share's JSON. Raises InputError where the share is not what was written."""
    content, data = read_json(index), index.with_suffix(".safetensors")
    require(data.is_file(), f"{data}: is missing.")
    require(file_hash(data) == content.get("sha256"), f"{data}: is damaged, its checksum differs.")
    return content


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()


def state_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and AdamW's state by name, the tensors themselves; state that is not there yet is zeros."""
    found = {}
    for name, p in objective.named_parameters():
        name = name.removeprefix("module.")  # DDP's
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p.detach()), torch.zeros_like(p.detach())
        found[f"model.{name}"] = p.detach()
        found |= {f"optimizer.{name}.{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return found


def share_of(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor, and the first one's number; FSDP2 splits tensors by rows."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    local, rows = tensor.to_local(), -(-tensor.shape[0] // world_size())
    return local, min(rank() * rows, tensor.shape[0])


def same_run(out: Path, run: dict) -> None:
    """Raises InputError where the folder holds another run's checkpoints: going on would mix the two."""
    file = out / "run.json"
    if checkpoints(out) and file.exists():
        for name, value in read_json(file).items():
            ok = run.get(name) == value
            require(ok, f"{out}: holds a run with {name} {value}, not {run.get(name)}; take another --out.")
    for old in (out / "checkpoints").glob(".*.tmp"):  # of a run that was killed
        shutil.rmtree(old, ignore_errors=True)
    replace_file(file, partial(Path.write_text, data=json.dumps(run, indent=2) + "\n"))


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The folder for this run alone, else InputError; a killed run leaves no lock."""
    out.mkdir(parents=True, exist_ok=True)
    if rank() > 0:
        yield
        return
    with open(out / ".lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError:
            raise InputError(f"{out}: another run is using it; wait for it, or take another --out.") from None
        yield


def save_checkpoint(
    out: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, step: int, keep: int
) -> None:
    """Written beside its place and renamed, so that each one there is complete; then all but the last `keep`
    go.

    Raises InputError where it cannot be written; those that are there stay.
    """
    place = out / "checkpoints" / f"step-{step:07d}"
    part = place.with_name(f".{place.name}.tmp")
    tensors, pieces = {}, {}
    for name, tensor in state_tensors(objective, optimizer).items():
        local, first = share_of(tensor)
        if (isinstance(tensor, DTensor) or rank() == 0) and (local.dim() == 0 or len(local)):
            tensors[name] = local.detach().cpu().contiguous()
            pieces[name] = {"shape": list(tensor.shape), "first": first}
    try:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        wait_for_all()
        file = part / f"share-{rank():05d}.safetensors"
        save_file(tensors, file)
        index = {"step": step, "sha256": file_hash(file), "tensors": pieces}
        file.with_suffix(".json").write_text(json.dumps(index))
        wait_for_all()
        if rank() == 0:
            os.replace(part, place)
            for old in checkpoints(out)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        wait_for_all()
    except (OSError, SafetensorError) as error:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"{place}: the checkpoint cannot be written ({reason}); {last_good(out)}.") from None


def load_checkpoint(out: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Take up the last checkpoint, on any number of processes; the step it was written after, or 0."""
    if not (there := checkpoints(out)):
        return 0
    place = there[-1]
    try:
        shares = {
            file.with_suffix(".safetensors"): verified(file) for file in sorted(place.glob("share-*.json"))
        }
        require(shares, f"{place}: is empty.")
        step = next(iter(shares.values()))["step"]
        for name, tensor in state_tensors(objective, optimizer).items():
            local, first = share_of(tensor)
            filled = 0
            for file, index in shares.items():
                piece = index["tensors"].get(name)
                if piece is None:
                    continue
                require(piece["shape"] == list(tensor.shape), f"{file}: {name} has another shape.")
                with safe_open(file, "pt") as content:
                    if local.dim() == 0:
                        local.copy_(content.get_tensor(name))
                        filled = 1
                        continue
                    part = content.get_slice(name)
                    rows = part.get_shape()[0]
                    low, high = max(first, piece["first"]), min(first + len(local), piece["first"] + rows)
                    if low < high:
                        local[low - first : high - first] = part[
                            low - piece["first"] : high - piece["first"]
                        ].to(local)
                        filled += high - low
            require(filled == (1 if local.dim() == 0 else len(local)), f"{place}: {name} is not complete.")
    except (InputError, OSError, SafetensorError, KeyError, TypeError) as error:
        reason = str(error).strip().rstrip(".") or "unknown"
        raise InputError(
            f"{place}: the checkpoint cannot be read ({reason}); remove it to go on from an earlier one: "
            f"{last_good(out, place)}."
        ) from None
    return step


def save_result(
    out: Path, objective: nn.Module, model: Qwen2, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """The model as a folder that `load` reads, whatever it is spread over."""
    weights = {}
    for name, p in objective.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p  # all processes take part
        if rank() == 0:
            weights[name.removeprefix("module.").removeprefix("model.")] = whole.detach().cpu().to(dtype)
    if rank() == 0:
        with torch.device("meta"):
            result = Qwen2(model.config)
        result.load_state_dict(weights, assign=True, strict=False)  # a tied head is in there once
        result.tie()
        save(result, tokenizer, out)
    wait_for_all()


# --- Training ---


def setting(default, help: str, kind: type | None = None, low=0, high=None, choices: tuple = ()):
    """A field with its help on the command line, and which values it may have."""
    kind = kind or (type(default) if type(default) in (int, float) else None)
    high = 10**9 if high is None and kind else high
    return field(
        default=default, metadata={"help": help, "kind": kind, "low": low, "high": high, "choices": choices}
    )


def check_numbers(how) -> None:
    """Raises InputError for a float that is NaN or infinite."""
    for name, value in vars(how).items():
        ok = type(value) is not float or math.isfinite(value)
        require(ok, f"--{name.replace('_', '-')} is {value}; give a finite number.")


PACKINGS = {
    "documents": "padded to whole blocks, whole where they fit, and kept separate",
    "original": "padded, always by at least one token, cut where a row ends, and seen by each other",
    "concatenated": "the same without padding",
}


@dataclass(frozen=True)
class Training:
    """How to train; batch, length, rate, steps, warm-up, schedule and noise are the paper's, which names no
    others.
    """

    steps: int = setting(6000, "Steps of the optimiser.", low=1)
    batch_size: int = setting(256, "Rows per step, of all devices together.", low=1)
    seq_len: int = setting(2048, "Positions of a row.", low=1)
    micro_batch: int = setting(1, "Rows that a device runs at once; changes memory and speed only.", low=1)
    lr: float = setting(2e-5, "Peak learning rate of AdamW.", high=100)
    warmup: int = setting(500, "Steps of linear warm-up.")
    schedule: str = setting(
        "constant", "After the warm-up; cosine falls to 0.", choices=("constant", "cosine")
    )
    weight_decay: float = setting(0.01, "AdamW's, of matrices.")
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW, as is usual for language models
    clip: float = setting(1.0, "Largest gradient norm.", low=1e-9)
    ar_weight: float = setting(0.0, "Weight of a causal loss beside the diffusion loss.")
    clean: str = setting(
        "block", "What the clean copy sees: blocks (paper), or causal.", choices=("block", "causal")
    )
    complement: bool = setting(True, "Train on the complementary view as well.")
    packing: str = setting(
        "documents", "; ".join(f"{k}: documents {v}" for k, v in PACKINGS.items()), choices=tuple(PACKINGS)
    )
    compute: str = setting(
        "bfloat16", "Dtype of products; weights are float32.", choices=("bfloat16", "float32")
    )
    parallel: str = setting(
        "auto", "Under torchrun; auto: fsdp above 1e9 weights.", choices=("auto", "ddp", "fsdp")
    )
    recompute: bool = setting(False, "Keep only the layers' inputs for the backward pass.")
    seed: int = setting(0, "Of order, noise and random weights.")
    save_every: int = setting(200, "Steps between checkpoints.", low=1)
    keep: int = setting(2, "Checkpoints that stay.", low=1)
    eval_every: int = setting(200, "Steps between looks at held-out data.", low=1)
    eval_rows: int = setting(64, "Rows of held-out data.", low=1)

    def __post_init__(self):
        check_numbers(self)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up from 0, then constant, or a cosine that would be 0 a step after the last."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        return (
            self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))
        )


PRESETS = {  # the paper's, on 64 devices
    "1.5b": {"lr": 2e-5, "steps": 6000, "recompute": True},
    "7b": {"lr": 1e-5, "steps": 2500, "recompute": True},
}


def initial_model(folder: Path, from_scratch: bool, device: str, seed: int) -> tuple[Qwen2, Tokenizer]:
    """The model to train, and its tokenizer."""
    if not from_scratch:
        model, tokenizer = load(folder, device)
    else:
        tokenizer = load_tokenizer(folder)
        config = read_config(folder, tokenizer)
        torch.manual_seed(seed)
        model = Qwen2(config)
        for name, p in model.named_parameters():
            if p.dim() == 2:
                out = name.endswith(
                    ("o_proj.weight", "down_proj.weight")
                )  # two additions to the residual a layer
                torch.nn.init.normal_(p, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if out else 0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)
        model.to(device)
    require(tokenizer, f"{folder}: no tokenizer, so the data cannot be read.")
    return model.train(), tokenizer


def with_mask_token(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """A tokenizer that knows `|<MASK>|`, under its first free id: 151665 in Qwen2.5, whose embedding has that
    row.

    Its files are one `tokenizer.json` and the settings. Raises InputError where the embedding has too few
    `rows`.
    """
    if tokenizer.id("|<MASK>|") is not None:
        return tokenizer
    new = len(tokenizer)
    require(
        new < rows,
        f"The mask token would be id {new}, outside the embedding of {rows} rows; add a row to it.",
    )
    tokenizer.encoder.add_special_tokens([AddedToken("|<MASK>|", normalized=False)])
    settings = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"][str(new)] = {"content": "|<MASK>|", "special": True}
    files = {"tokenizer.json": tokenizer.encoder.to_str().encode(), "tokenizer_config.json": dump(settings)}
    kept = {name: tokenizer.files[name] for name in ("chat_template.jinja",) if name in tokenizer.files}
    return Tokenizer(tokenizer.encoder, tokenizer.system, files | kept)


def dump(settings: dict) -> bytes:
    return json.dumps(settings, indent=2, ensure_ascii=False).encode()


class Trainer:
    """A model, its data, and how to train it."""

    def __init__(
        self, kinds: dict[str, float], model: Qwen2, corpus: Corpus, heldout: Corpus | None, how: Training
    ):
        self.kinds, self.how = kinds, how  # kind of loss -> its weight
        self.corpus, self.heldout = corpus, heldout
        self.size = model.config.block_size
        self.pad = model.config.mask_token_id or 0
        self.device = model.weight.device
        ok, most = how.seq_len % self.size == 0, model.config.max_position_embeddings
        require(ok, f"--seq-len {how.seq_len} is no multiple of the block size {self.size}.")
        require(how.seq_len <= most, f"--seq-len {how.seq_len} is more than the model's {most} positions.")
        share = world_size() * how.micro_batch
        ok = how.batch_size % share == 0
        parts = f"{world_size()} processes x --micro-batch {how.micro_batch}"
        require(ok, f"--batch-size {how.batch_size} is no multiple of {share}, {parts}.")
        parameters = sum(p.numel() for p in model.parameters())
        parallel = how.parallel if how.parallel != "auto" else "fsdp" if parameters > 1e9 else "ddp"
        objective = Objective(model, how.complement, how.clean, list(kinds), DTYPES[how.compute])
        self.objective = distribute(objective, parallel, how.recompute)
        decayed = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": how.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=how.betas, fused=True)
        if heldout:
            rows = list(islice(self.rows(heldout, 0), round_up(how.eval_rows, share)))
            self.looked_at = self.batch(heldout, rows, 0, 0)

    def rows(self, corpus: Corpus, seed: int) -> Iterator[list[Piece]]:
        return endless_rows(corpus.lengths, self.how.seq_len, self.size, self.how.packing, seed=seed)

    def batch(self, corpus: Corpus, rows: list[list[Piece]], step: int, seed: int) -> Batch:
        """This process's share of a step's rows."""
        mine = range(rank(), len(rows), world_size())
        separate = self.how.packing == "documents"
        batch = lay_out(corpus, [rows[i] for i in mine], self.how.seq_len, self.pad, separate)
        draw_noise(batch, self.size, *([seed, step, i] for i in mine))
        return batch

    def target_counts(self, batch: Batch) -> dict[str, float]:
        """Targets of each kind of loss in all processes' shares: what the sums are divided by."""
        masked = batch.trainable if self.how.complement else batch.masked
        flags = {"ar": batch.trainable, "diffusion": masked}
        counts = [targets_of(flags[kind], batch.documents).sum().item() for kind in self.kinds]
        return dict(zip(self.kinds, total(counts, self.device)))

    def step(
        self, batch: Batch, backward: bool = True, progress: Callable = lambda rows: None
    ) -> dict[str, float]:
        """Gradients of one step, as if all its rows had run at once; loss and accuracy of each kind.

        `progress` is told how many rows of all processes have run, after each micro-batch.
        """
        counts, sums = self.target_counts(batch), {kind: [0.0, 0.0] for kind in self.kinds}
        parts = batch.split(self.how.micro_batch)
        ddp = isinstance(self.objective, DistributedDataParallel)
        for i, part in enumerate(parts):
            with self.objective.no_sync() if ddp and i + 1 < len(parts) else nullcontext():
                found = self.objective(part.to(self.device))
                if backward:  # DDP and FSDP average over processes, the loss is a sum over them
                    weigh = lambda kind: self.kinds[kind] * world_size() / max(1, counts[kind])
                    sum(loss * weigh(kind) for kind, (loss, _) in found.items()).backward()
            for kind, (loss, right) in found.items():
                sums[kind] = [sums[kind][0] + loss.detach(), sums[kind][1] + right]
            progress(self.how.micro_batch * world_size())
        flat = total([float(value) for kind in self.kinds for value in sums[kind]], self.device)
        names = [(kind, name) for kind in self.kinds for name in ("loss", "accuracy")]
        return {f"{kind}_{name}": value / max(1, counts[kind]) for (kind, name), value in zip(names, flat)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on held-out rows, always the same ones with the same noise."""
        return {f"heldout_{name}": value for name, value in self.step(self.looked_at, backward=False).items()}

    def run(self, out: Path) -> None:
        """Train to the last step, from the last checkpoint in `out` if there is one.

        A step depends on seed and step number alone. Raises InputError when the loss is NaN or infinite.
        """
        how, log = self.how, out / "metrics.jsonl"
        done = load_checkpoint(out, self.objective, self.optimizer)
        require(done <= how.steps, f"{out}: has done {done} steps already, more than --steps {how.steps}.")
        if rank() == 0:  # what was logged after the checkpoint is run again
            lines = (
                log.read_bytes().decode(errors="replace").splitlines(keepends=True) if log.exists() else []
            )
            replace_file(log, partial(Path.write_text, data="".join(lines[:done])))
        order = self.rows(self.corpus, how.seed)
        for _ in range(done * how.batch_size):
            next(order)
        rows_done, all_rows = done * how.batch_size, how.steps * how.batch_size
        bar = tqdm(total=all_rows, initial=rows_done, unit="row", disable=rank() > 0)
        with open(log if rank() == 0 else os.devnull, "a", buffering=1) as file, bar:
            for step in range(done, how.steps):
                began = time.perf_counter()
                rows = list(islice(order, how.batch_size))
                losses = self.step(self.batch(self.corpus, rows, step, how.seed), progress=bar.update)
                norm = nn.utils.clip_grad_norm_(self.objective.parameters(), how.clip)
                norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
                if not all(map(math.isfinite, (norm, *losses.values()))):
                    documents = sorted({document for row in rows for document, _, _ in row})
                    some = ", ".join(map(str, documents[:8])) + (", ..." if len(documents) > 8 else "")
                    raise InputError(
                        f"step {step + 1}: the loss is NaN or infinite ({losses}, gradient norm {norm}); its "
                        "batch "
                        f"holds documents {some} (of the tokenised data, from 0). Of checkpoints, "
                        f"{last_good(out)}; a "
                        "lower --lr may help."
                    )
                for group in self.optimizer.param_groups:
                    group["lr"] = how.learning_rate(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
                seconds = time.perf_counter() - began
                record = {
                    "step": step + 1,
                    "tokens": how.batch_size * how.seq_len,
                    **losses,
                    "grad_norm": norm,
                }
                record |= {"lr": how.learning_rate(step), "seconds": round(seconds, 4)}
                last = step + 1 == how.steps
                if self.heldout and ((step + 1) % how.eval_every == 0 or last):
                    record |= self.evaluate()
                try:
                    file.write(json.dumps(record) + "\n")
                except OSError as error:
                    raise InputError(
                        f"{log}: cannot be written ({error.strerror}); {last_good(out)}."
                    ) from None
                shown = {"step": step + 1} | {
                    name: f"{value:.3f}" for name, value in record.items() if name.endswith("loss")
                }
                bar.set_postfix(shown | {"tokens/s": f"{record['tokens'] / seconds:,.0f}"}, refresh=False)
                if (step + 1) % how.save_every == 0 or last:
                    file.flush()
                    save_checkpoint(out, self.objective, self.optimizer, step + 1, how.keep)


# --- Drafts ---
# What an adapter learns: a group of masks at a + 1 .. a + w sees the known tokens up to its anchor a, and
# itself. The output at a + j predicts the token at a + j + 1. The output at a itself is the model's own and
# needs no training. Known tokens see no mask: one pass without gradients serves all groups of a document.


@dataclass(frozen=True)
class Drafting:
    """How to train a draft adapter."""

    steps: int = setting(1500, "Steps of the optimiser.", low=1)
    batch_size: int = setting(16, "Rows per step of all devices; a row is some groups of a document.", low=1)
    anchors: int = setting(5, "Groups of masks in a row.", low=1)
    width: int = setting(8, "Masks of a group: how far a draft goes.", low=1)
    rank: int = setting(14, "Rank of the adapter.", low=1)
    alpha: float = setting(28.0, "The adapter's products are multiplied by alpha / rank.")
    near: float = setting(0.9, "Weight of a draft's loss, relative to the draft before it.")
    others: int = setting(4096, "Tokens a step's loss samples of those that the data never uses.")
    int8: bool = setting(True, "On CPUs, round the frozen weights' products at masks: several times as fast.")
    lr: float = setting(1.5e-3, "Peak learning rate of AdamW; it falls linearly to 0.")
    warmup: int = setting(50, "Steps of linear warm-up.")
    clip: float = setting(1.0, "Largest gradient norm.")
    seed: int = setting(0, "Of weights, order and samples.")
    cache_gb: float = setting(4.0, "Memory for keys and values of known tokens, which else run anew.")
    save_every: int = setting(50, "Steps between checkpoints.", low=1)
    keep: int = setting(2, "Checkpoints that stay.", low=1)
    eval_every: int = setting(100, "Steps between looks at held-out data.", low=1)
    eval_rows: int = setting(24, "Documents of it.", low=1)

    def __post_init__(self):
        check_numbers(self)

    @property
    def seq_len(self) -> int:
        """Positions that a row runs."""
        return self.anchors * self.width

    def learning_rate(self, step: int) -> float:
        return self.lr * min(
            (step + 1) / max(1, self.warmup), (self.steps - step) / max(1, self.steps - self.warmup), 1
        )


def anchors_of(trainable: np.ndarray) -> np.ndarray:
    """Positions that two trainable tokens follow, the prompt's last one too: a draft can start there."""
    return np.flatnonzero(trainable[2:] & trainable[1:-1])


def endless_groups(corpus: Corpus, anchors: int, width: int, seed: int) -> Iterator[list[Piece]]:
    """Rows of `anchors` groups of masks in one document, as pieces, in a random order.

    Every group comes once an epoch. Where a document has too few groups left for a row, some are repeated.
    """
    for epoch in count():
        rng, rows = np.random.default_rng([seed, epoch]), []
        for document, length in enumerate(corpus.lengths):
            at = rng.permutation(anchors_of(corpus.piece(document, 0, length)[1]))
            for part in np.resize(at, round_up(len(at), anchors)).reshape(-1, anchors).tolist():
                rows.append([(document, a + 1, a + 1 + width) for a in part])
        require(rows, "No document has two trainable tokens in a row, so there is nothing to draft.")
        yield from (rows[i] for i in rng.permutation(len(rows)))


@torch.no_grad()
def known_pass(model: Qwen2, tokens: Tensor) -> Tensor:
    """Keys and values (layers, 2, K, T, d) of one document's tokens (T), without the adapter."""
    kept = []

    def attend(layer, q, k, v):
        kept.append(torch.cat([k, v]))
        return causal_attention(layer, q, k, v)

    model(tokens[None], torch.arange(len(tokens), device=tokens.device)[None], attend)
    return torch.stack(kept)


class Known:
    """Documents' keys and values, kept while they fit into `limit` bytes, else made anew each time."""

    def __init__(self, model: Qwen2, corpus: Corpus, limit: float):
        self.model, self.corpus, self.limit, self.kept, self.bytes = model, corpus, limit, {}, 0

    def tokens(self, document: int) -> Tensor:
        ids, _ = self.corpus.piece(document, 0, self.corpus.lengths[document])
        return torch.from_numpy(ids.astype(np.int64)).to(self.model.weight.device)

    def __getitem__(self, document: int) -> Tensor:
        if (found := self.kept.get(document)) is None:
            found = known_pass(self.model, self.tokens(document)).bfloat16()
            if self.bytes + found.nbytes <= self.limit:
                self.kept[document], self.bytes = found, self.bytes + found.nbytes
        return found


def draft(model: Qwen2, known: list[Tensor], anchors: Tensor, width: int) -> Tensor:
    """Hidden states (B, G, w, D) of a group of masks behind each anchor (B, G) of B documents.

    known: each document's keys and values, see `known_pass`.
    """
    B, G = anchors.shape
    S, T, weight = int(anchors.max()) + 1, G * width, model.weight
    past = weight.new_zeros(len(model.model.layers), 2, B, *known[0].shape[2:3], S, known[0].shape[4])
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
    everywhere = torch.ones(1, 1, 1, dtype=torch.bool, device=weight.device)
    return model(masks, positions, attend, everywhere).unflatten(1, (G, width))


def draft_targets(tokens: Tensor, anchors: Tensor, width: int) -> Tensor:
    """Tokens (G, w) that the masks behind anchors (G) of one document draft; -1 beyond its end."""
    at = anchors[:, None] + torch.arange(2, width + 2, device=tokens.device)
    return tokens[at.clamp_max(len(tokens) - 1)].masked_fill(at >= len(tokens), -1)


def draft_loss(model: Qwen2, hidden: Tensor, targets: Tensor, ids: Tensor, others: Tensor, near: float):
    """Weighted sum of cross entropies, sum of the weights, and number of drafts that would be kept.

    hidden (B, G, w, D), targets (B, G, w). The head runs over the tokens `ids`, sorted, which hold all
    targets, and over `others`, a random sample of the rest of the vocabulary that counts as the whole of it.
    Most of the full head's products would only push down tokens that never come up.
    """
    some = torch.cat([ids, others])
    rest = model.config.vocab_size - len(ids)
    logits = F.linear(hidden, model.lm_head.weight[some].to(hidden.dtype)).float()
    logits[..., len(ids) :] += math.log(max(1, rest) / max(1, len(others)))
    there = targets >= 0
    wanted = torch.searchsorted(ids, targets.clamp_min(int(ids[0])))
    weights = near ** torch.arange(targets.shape[-1], device=targets.device) * there
    losses = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none").view_as(targets)
    kept = ((logits.argmax(-1) == wanted) & there).cumprod(-1).sum()
    return (losses * weights).sum(), weights.sum(), kept


@torch.no_grad()
def simulate(model: Qwen2, known: Known, documents: Iterable[int], width: int) -> Counter:
    """How many cycles of verified decoding keep 0, 1, 2, ... drafts, where the verifier writes these answers.

    A cycle is two passes, and writes 2 tokens and the kept ones.
    """
    kept, state = Counter(), []
    for document in documents:
        at = anchors_of(known.corpus.piece(document, 0, known.corpus.lengths[document])[1])
        state += [(document, int(a)) for a in at[:1]]
    while state:
        after = []
        for part in (state[i : i + 32] for i in range(0, len(state), 32)):
            anchors = torch.tensor([[a] for _, a in part], device=model.weight.device)
            hidden = draft(model, [known[d] for d, _ in part], anchors, width)
            guesses = torch.cat([model.logits(rows).argmax(-1) for rows in hidden.flatten(0, 2).split(256)])
            for (document, a), guess in zip(part, guesses.view(-1, width)):
                tokens = known.tokens(document)
                right = guess == draft_targets(tokens, torch.tensor([a], device=tokens.device), width)[0]
                m = int(right.cumprod(0).sum())
                kept[m] += 1
                if a + 4 + m < len(tokens):
                    after.append((document, a + 2 + m))
        state = after
    return kept


class DraftAdapter(nn.Module):
    """The adapter's float32 weights as one module, for the optimiser and the checkpoints."""

    def __init__(self, model: Qwen2, how: Drafting):
        super().__init__()
        add_adapter(model, how.rank, how.alpha)
        generator = torch.Generator().manual_seed(how.seed)
        self.layers = nn.ModuleList(layer.adapter.float() for layer in adapted_layers(model).values())
        for low_rank in self.layers:
            bound = low_rank.A.shape[1] ** -0.5
            start = torch.empty(low_rank.A.shape).uniform_(-bound, bound, generator=generator)
            low_rank.A.data.copy_(start)
        stop = model.config.stop_token_ids[-1:] or (0,)
        # the row of a token that is sure to be trained is as good as any to begin with
        self.mask_row = nn.Parameter(model.weight[stop[0]].detach().float().clone())

    def lend(self, model: Qwen2) -> None:
        """Give the model the masks' row as it is now, as a view: a parameter would become the model's own."""
        model.mask_row = self.mask_row.view(-1).to(model.weight.dtype)


class DraftTrainer(Trainer):
    """A frozen model and the adapter that is trained on it."""

    def __init__(self, model: Qwen2, corpus: Corpus, heldout: Corpus | None, how: Drafting):
        self.model, self.corpus, self.heldout, self.how = model.eval(), corpus, heldout, how
        model.requires_grad_(False)
        self.device = model.weight.device
        ok = how.batch_size % world_size() == 0
        require(ok, f"--batch-size {how.batch_size} is no multiple of {world_size()} processes.")
        if how.int8 and self.device.type == "cpu":
            some = np.random.default_rng(how.seed).permutation(len(corpus.lengths))[:4]
            to_int8(model, [Known(model, corpus, 0).tokens(i)[:512] for i in some])
        self.objective = DraftAdapter(model, how)
        limit = how.cache_gb * 1e9
        self.known = Known(model, corpus, limit)
        self.known_heldout = heldout and Known(model, heldout, limit / 4)
        self.ids = torch.from_numpy(np.unique(corpus.tokens).astype(np.int64)).to(self.device)
        rest = np.setdiff1d(np.arange(model.config.vocab_size), self.ids.cpu())
        self.rest = torch.from_numpy(rest).to(self.device)
        parameters = self.objective.parameters()
        self.optimizer = torch.optim.AdamW(
            parameters, how.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )

    def rows(self, corpus: Corpus, seed: int) -> Iterator[list[Piece]]:
        return endless_groups(corpus, self.how.anchors, self.how.width, seed)

    def batch(self, corpus: Corpus, rows: list[list[Piece]], step: int, seed: int) -> tuple:
        """This process's share of a step: documents, anchors (B, G), targets (B, G, w), other tokens."""
        mine = rows[rank() :: world_size()]
        documents = [row[0][0] for row in mine]
        anchors = torch.tensor([[start - 1 for _, start, _ in row] for row in mine], device=self.device)
        tokens = (self.known.tokens(document) for document in documents)
        targets = torch.stack([draft_targets(*pair, self.how.width) for pair in zip(tokens, anchors)])
        picked = np.random.default_rng([seed, step]).permutation(len(self.rest))[: self.how.others]
        return documents, anchors, targets, self.rest[torch.from_numpy(picked).to(self.device)]

    def step(self, batch: tuple, progress: Callable = lambda rows: None) -> dict[str, float]:
        """Gradients of one step, as if one process had run all its rows; loss, and drafts kept of a group."""
        documents, anchors, targets, others = batch
        self.objective.lend(self.model)
        hidden = draft(self.model, [self.known[document] for document in documents], anchors, self.how.width)
        loss, weight, kept = draft_loss(self.model, hidden, targets, self.ids, others, self.how.near)
        sums = [float(x) for x in (loss.detach(), weight, kept, anchors.numel())]
        loss_sum, weight_sum, kept, groups = total(sums, self.device)
        (loss / weight_sum).backward()
        if dist.is_initialized():
            for p in self.objective.parameters():
                dist.all_reduce(p.grad)
        progress(self.how.batch_size)
        return {"draft_loss": loss_sum / weight_sum, "kept": kept / groups}

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Tokens per forward on held-out answers, and how many cycles kept 0, 1, 2, ... drafts."""
        self.objective.lend(self.model)
        mine = range(rank(), min(self.how.eval_rows, len(self.heldout.lengths)), world_size())
        kept = simulate(self.model, self.known_heldout, mine, self.how.width)
        counts = [int(n) for n in total([float(kept[m]) for m in range(self.how.width + 1)], self.device)]
        written = sum((2 + m) * n for m, n in enumerate(counts))
        return {"heldout_tokens_per_forward": written / max(1, 2 * sum(counts)), "heldout_kept": counts}


# --- Show ---


def show(corpus: Corpus, tokenizer: Tokenizer, size: int, how: Training, row: int) -> Iterator[str]:
    """Lines that show a packed row to a person: its views, which output answers for which token, and its
    mask.
    """
    separate = how.packing == "documents"
    rows = endless_rows(corpus.lengths, how.seq_len, size, how.packing, seed=how.seed)
    batch = lay_out(corpus, [next(islice(rows, row, None))], how.seq_len, tokenizer.id("|<MASK>|"), separate)
    require(batch.trainable.any(), f"Row {row} has nothing that trains; show another --row.")
    draw_noise(batch, size, [how.seed, 0, row])
    views = [batch.masked[0], (batch.trainable & ~batch.masked)[0]][: 1 + how.complement]
    targets = targets_of(batch.trainable, batch.documents)[0]
    text = [
        tokenizer.decode([i], skip_special_tokens=False).replace("\n", "\\n")
        for i in batch.tokens[0].tolist()
    ]
    documents = [0] * how.seq_len if batch.documents is None else batch.documents[0].tolist()
    parts = [
        f"{documents.index(d)}-{how.seq_len - 1 - documents[::-1].index(d)}"
        for d in sorted(set(documents))
        if d
    ]
    yield f"Row {row}: {how.seq_len} positions in blocks of {size}, {targets.sum()} targets"
    yield (
        f"Documents, kept separate, at positions {', '.join(parts)}"
        if separate
        else "Documents see each other"
    )
    for name, masked in [
        ("clean", torch.zeros_like(views[0])),
        *((f"view {i}", v) for i, v in enumerate(views, 1)),
    ]:
        yield f"\n{name}:"
        words = ["_" * max(1, len(word.strip())) if m else word for word, m in zip(text, masked.tolist())]
        words = [
            " " + word if m and full[:1] == " " else word
            for word, full, m in zip(words, text, masked.tolist())
        ]
        padded = re.sub(r"(\|<MASK>\|)+", lambda m: f" [padding x {len(m[0]) // 8}]", "".join(words))
        yield padded.replace("\\n", "\n")
    first = int(targets.nonzero()[0]) // size * size
    yield f"\nThe block of positions {first}-{first + size - 1}; the output at i answers for position i + 1:"
    yield (
        f"{'position':>8}  {'token':<16}"
        + "".join(f"view {i:<12}" for i in range(1, 1 + len(views)))
        + "answered by"
    )
    for i in range(first, first + size):
        states = "".join(f"{'|<MASK>|' if masked[i] else text[i]:<17}" for masked in views)
        by = [f"output {i - 1} of view {n}" for n, masked in enumerate(views, 1) if masked[i] and targets[i]]
        yield f"{i:>8}  {text[i]:<16}{states}{by[0] if by else '-'}"
    blocks = min(how.seq_len // size, 12)
    yield f"\nWhich block sees which ({blocks} of {how.seq_len // size}); a row is a query, a column a key:"
    at = [part * how.seq_len + block * size for part in range(1 + len(views)) for block in range(blocks)]
    first_of = torch.tensor(at)  # a block's first position sees what all of it see
    mask = visibility(how.seq_len, size, len(views), batch.documents, how.clean)(
        0, None, first_of[:, None], first_of
    )
    names = [*(f"view {i}" for i in range(1, 1 + len(views))), "clean"]
    yield " " * 9 + " ".join(f"{name:<{blocks}}" for name in names)
    for n in range(len(at)):
        seen = "".join((" " * (k % blocks == 0 < k)) + ".#"[mask[n, k]] for k in range(len(at)))
        yield f"{names[n // blocks] if n % blocks == 0 else '':<9}{seen}"


# --- Command line ---

SHIPPED = Path(__file__).parent / "tiny"
FOLDER = click.Path(path_type=Path)
FILE = click.Path(exists=True, path_type=Path)
POSITIVE = click.IntRange(1, 10**6)
DIFFUSION = ("complement", "clean", "ar_weight")  # settings that only the adaptation has
COMMON = [f.name for f in fields(Training) if "help" in f.metadata and f.name not in DIFFUSION]
DTYPE_NAMES = click.Choice(["float32", "bfloat16", "float16"])
BROKEN = click.Choice(["refuse", "skip"])


def take_preset(context: click.Context, _, name: str | None) -> None:
    context.default_map = (context.default_map or {}) | PRESETS.get(name, {})


def several(*decorators: Callable) -> Callable:
    """Several options as one decorator."""
    return lambda command: [command := decorate(command) for decorate in reversed(decorators)][-1]


run_options = several(
    click.option("--model", "folder", required=True, type=FOLDER, help="Checkpoint to start from."),
    click.option("--data", required=True, type=FILE, help="JSONL, or a folder of it tokenised."),
    click.option("--out", required=True, type=FOLDER, help="Folder of the result, checkpoints, metrics."),
    click.option("--heldout", type=FILE, help="Data to measure on, never to train on."),
    click.option(
        "--broken", type=BROKEN, default="refuse", help="A broken line ends the run, or is left out."
    ),
    click.option("--device", default="auto", help="auto, cpu, cuda or mps."),
    click.option("--threads", type=POSITIVE, help="CPU threads  [default: torch's]"),
)
preset = {
    "type": click.Choice(list(PRESETS)),
    "callback": take_preset,
    "is_eager": True,
    "expose_value": False,
}
model_options = several(
    click.option("--preset", **preset, help="The paper's steps and rate for a model of this size."),
    click.option("--from-scratch", is_flag=True, help="Random weights; --model gives config and tokenizer."),
    click.option("--save-dtype", type=DTYPE_NAMES, default="float32", help="Of the result's file."),
)
block_option = click.option("--block-size", type=POSITIVE, help="[default: the checkpoint's, or 32]")


@click.group(help=__doc__.split("\n\n")[0], context_settings={"help_option_names": ["-h", "--help"]})
def main():
    pass


def open_data(out: Path, run: dict, data: Path, heldout: Path | None, tokenizer: Tokenizer, broken: str):
    """Training and held-out data, tokenised by the first process, once it is sure that the run goes on.

    Raises InputError for a folder with another run, and for data that cannot be used.
    """

    def prepare():
        same_run(out, {"content": Corpus.content(data, out / "tokens")} | run)
        Corpus.prepare(data, tokenizer, out / "tokens", broken)
        heldout and Corpus.prepare(heldout, tokenizer, out / "heldout", broken)

    first_process(prepare)
    there = lambda source, name: Corpus.open(source if source.is_dir() else out / name)
    return there(data, "tokens"), heldout and there(heldout, "heldout")


def train(objective, folder, data, out, heldout, broken, device, threads, from_scratch, save_dtype, **how):
    """One run, of the process that `torchrun` started or the only one."""
    block_size = how.pop("block_size", None)
    how = Training(**how)
    if threads:
        torch.set_num_threads(threads)
    with processes(device) as device, locked(out):
        model, tokenizer = initial_model(folder, from_scratch, device, how.seed)
        if objective == "adapt":
            tokenizer = with_mask_token(tokenizer, model.config.vocab_size)
        trained, mask = model.config.block_size, model.config.mask_token_id
        size = 1 if objective == "ar" else block_size or (trained if trained > 1 else 32)
        require(objective == "ar" or size > 1, "--block-size 1 is autoregressive; `train.py ar` trains that.")
        mask = tokenizer.id("|<MASK>|") if mask is None else mask
        model.config = replace(model.config, block_size=size, mask_token_id=mask)
        run = {"objective": objective, "model": str(folder), "vocab_size": model.config.vocab_size}
        run |= {"block_size": size} | lasting(how)
        corpus, heldout = open_data(out, run, data, heldout, tokenizer, broken)
        kinds = {"ar": 1.0} if objective == "ar" else {"diffusion": 1.0}
        if objective == "adapt" and how.ar_weight:
            kinds["ar"] = how.ar_weight
        trainer = Trainer(kinds, model, corpus, heldout, how)
        trainer.run(out)
        save_result(out, trainer.objective, model, tokenizer, DTYPES[save_dtype])
        if rank() == 0:
            click.echo(f"The result is in {out}; try it: python cli.py generate --model {out}", err=True)


def lasting(how) -> dict:
    """Settings that may not change when a run is resumed."""
    free = {"micro_batch", "parallel", "recompute", "save_every", "keep", "eval_every", "eval_rows", "betas"}
    free |= {"cache_gb"} | ({"steps"} if getattr(how, "schedule", None) == "constant" else set())
    return {name: value for name, value in asdict(how).items() if name not in free}


@main.command(help="Ordinary next-token training, causal.")
@run_options
@model_options
@options(Training, *COMMON)
@reports_mistakes
def ar(**given):
    train("ar", **given)


@main.command(help="Make a block-diffusion model of an autoregressive one (paper, section 3).")
@run_options
@model_options
@block_option
@options(Training, *COMMON, *DIFFUSION)
@reports_mistakes
def adapt(**given):
    train("adapt", **given)


@main.command("draft")
@run_options
@options(Drafting, *(f.name for f in fields(Drafting)))
@click.option("--base", help="The base's name in the adapter's config  [default: --model]")
@click.option("--dtype", type=DTYPE_NAMES, help="Of the base  [default: float32 on CPUs, else its own]")
@reports_mistakes
def draft_command(folder, data, heldout, out, broken, base, dtype, device, threads, **how):
    """Teach a frozen model to draft for --verify: an adapter, on at masks only.

    The best data are the model's own answers, since a draft is kept where it is what the model says:
    `cli.py generate --block-size 1 --input prompts.jsonl --output own.jsonl` writes them. Other texts work
    too.
    """
    how = Drafting(**how)
    if threads:
        torch.set_num_threads(threads)
    with processes(device) as device, locked(out):
        model, tokenizer = load(folder, device, dtype or ("float32" if device == "cpu" else "auto"))
        require(tokenizer, f"{folder}: no tokenizer, so the data cannot be read.")
        tokenizer = with_mask_token(tokenizer, model.config.vocab_size)
        mask = tokenizer.id("|<MASK>|")
        model.config = replace(model.config, mask_token_id=mask, draft_width=how.width)
        digest = base_digest(model)
        run = {"objective": "draft", "base_digest": digest} | lasting(how)
        corpus, heldout = open_data(out, run, data, heldout, tokenizer, broken)
        trainer = DraftTrainer(model, corpus, heldout, how)
        trainer.run(out)
        if rank() == 0:
            trainer.objective.lend(model)
            save_adapter(model, out, how.alpha, base or str(folder), digest)
            line = f"python cli.py generate --model {folder} --adapter {out} --verify"
            click.echo(f"The adapter is in {out}; try it: {line}", err=True)
        wait_for_all()


@main.command("show", help="Print a packed, masked example: views, which output predicts what, the mask.")
@click.option("--model", "folder", default=SHIPPED / "checkpoint", type=FOLDER, help="Tokenizer's folder.")
@click.option("--data", default=SHIPPED / "sample.jsonl", type=FILE, help="JSONL.")
@click.option("--row", default=0, type=click.IntRange(0, 10**6), help="Which row of the first epoch.")
@block_option
@options(Training, "seq_len", "packing", "complement", "clean", "seed", seq_len={"default": 192})
@reports_mistakes
def show_command(folder, data, row, block_size, **how):
    how = Training(**how)
    tokenizer = load_tokenizer(folder)
    config = read_config(folder, tokenizer)
    tokenizer = with_mask_token(tokenizer, config.vocab_size)
    size = block_size or (config.block_size if config.block_size > 1 else 32)
    ok = how.seq_len % size == 0
    require(ok, f"--seq-len {how.seq_len} is no multiple of the block size {size}.")
    documents = list(islice(read_documents(data, tokenizer, "skip"), 500))  # enough to fill rows
    require(documents, f"{data}: holds no documents.")
    offsets = np.cumsum([0, *(len(tokens) for tokens, _ in documents)])
    corpus = Corpus(*(np.concatenate(column) for column in zip(*documents)), offsets)
    for line in show(corpus, tokenizer, size, how, row):
        click.echo(line)


if __name__ == "__main__":
    main()
