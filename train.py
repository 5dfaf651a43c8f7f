"""Turn an AR Qwen2 into a block-diffusion model: the training recipe of Fast-dLLM v2 (paper, section 3).

    python train.py show                                                  # a packed, masked example
    python train.py ar --model FOLDER --data data.jsonl --out parent      # ordinary next-token training
    python train.py adapt --model parent --data data.jsonl --out adapted  # complementary masks, token shift
    python train.py draft --model FOLDER --data own.jsonl --out adapter   # an adapter that drafts: --verify
    torchrun --nproc-per-node 8 train.py adapt --preset 1.5b ...          # on several devices

Data is JSONL: `text`; `messages`, or `question` and `answer`, of which the assistant's part trains; or an
answer that `cli.py generate --output` wrote. A stopped run resumes from its last checkpoint when the same
command is started again.

Shapes: B rows, L positions of a row, V noisy views, T positions of an input, N targets, D hidden size. A row
is packed with whole documents. An input is a row's noisy views and its clean copy, [view 1 ; view 2 ; clean],
T = 3L.
"""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import count, islice, repeat
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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from cli import HELP_OPTIONS, encode_prompt, locked, options, own_device, reports_mistakes, several
from fast import blockwise_attention, int8_is_fast, plain_attention, sparse_attention, sparse_mask, to_int8
from fastdllm import (
    CLEAN,
    DTYPES,
    MASK_ROW,
    PIECE,
    InputError,
    Qwen2,
    Tokenizer,
    adapted_layers,
    adapter_tensors,
    add_adapter,
    attention_bias,
    base_digest,
    causal_attention,
    check_knobs,
    grouped_attention,
    knob,
    load,
    load_tokenizer,
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
    """Which trainable positions (B, L) view 1 masks. View 2 masks the others: each is a target exactly once.

    Per block t ~ U[0, 1), and a position is masked with probability 0.999 t + 0.001.
    """
    B, L = trainable.shape
    t = torch.rand(B, math.ceil(L / block_size), generator=generator).repeat_interleave(block_size, dim=1)[
        :, :L
    ]
    u = torch.rand(B, L, generator=generator)
    return trainable & (u < 0.999 * t + 0.001).to(trainable.device)


# --- Mask ---


def visibility(
    length: int, block_size: int, views: int, documents: Tensor | None = None, clean: str = "block"
) -> Callable:
    """Training's mask: `sees(row, head, query, key)` for indices into [noisy views ; clean].

    A noisy query sees its own block of its own view and all earlier clean blocks. A clean query sees clean
    blocks up to its own; with `clean` "causal" it sees clean positions up to its own. A clean query never
    sees a noisy key (paper, section 3). documents (B, L) gives each position its document's number, and no
    query sees another document. With views=0 this is `fastdllm.block_causal_mask`.
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
    """`visibility` as a bool tensor (S, S), or with documents (B, S, S); S is (views + 1) * length."""
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
    side = (views + 1) * length
    if kind == "sparse":
        sees = visibility(length, block_size, views, documents, clean)
        tiles = sparse_mask(sees, None if documents is None else len(documents), side, device)
        return lambda layer, *qkv: sparse_attention(*qkv, tiles)
    if kind == "dense":
        mask = training_mask(length, block_size, views, documents, device, clean).view(-1, side, side)
        bias = lambda q, k: attention_bias(mask, q.shape[1] // k.shape[1], q.dtype)
        return lambda layer, q, k, v: grouped_attention(q, k, v, bias(q, k))
    # without views the row may be cut anywhere, and 32 positions at a time are fast
    piece = block_size if views else 32
    piece = piece if length % piece == 0 else length
    among = lambda c: training_mask(length, block_size, 0, documents, device, c).view(-1, length, length)
    noisy_mask = None if documents is None and piece == block_size else among("block")
    clean_mask = noisy_mask if clean == "block" else among("causal")
    how = {"length": length, "block_size": piece, "views": views}
    return lambda layer, *qkv: blockwise_attention(*qkv, clean_mask, noisy_mask, **how)


# --- Loss ---


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


def noisy_views(trainable: Tensor, masked: Tensor, complement: bool) -> Tensor:
    """What each view masks, (B, V, L): `masked`, and with `complement` all other trainable positions."""
    return torch.stack([masked, trainable & ~masked] if complement else [masked], dim=1)


def diffusion_outputs(trainable: Tensor, documents: Tensor | None, views: Tensor) -> Tensor:
    """Flat indices (N) in (B, V + 1, L) of the outputs that have a target; for views see `noisy_views`."""
    targets = views & targets_of(trainable, documents)[:, None]
    targets = F.pad(targets, (0, 0, 0, 1))  # the clean copy has none
    return targets.flatten().nonzero()[:, 0] - 1  # token shift: the output at i predicts the token at i + 1


def causal_outputs(trainable: Tensor, documents: Tensor | None) -> Tensor:
    """Flat indices (N) in (B, L) of the outputs that have a target in next-token training."""
    return targets_of(trainable, documents).flatten().nonzero()[:, 0] - 1


def diffusion_pass(
    model: Qwen2,
    tokens: Tensor,
    views: Tensor,
    documents: Tensor | None = None,
    block_size: int | None = None,
    attention: str = "auto",
    clean: str = "block",
    masked: Tensor | None = None,
) -> Tensor:
    """Hidden states (B, V + 1, L, D) of the noisy views (B, V, L) and the clean copy of tokens (B, L).

    masked: where a low-rank adapter is on, as in `Qwen2.forward`. Raises InputError for a length that is no
    multiple of the block, or a model without a mask token.
    """
    size, mask_id = block_size or model.config.block_size, model.config.mask_token_id
    V, L = views.shape[1:]
    has_mask = mask_id is not None
    require(has_mask, "The model has no mask token; give its config a mask_token_id inside the embedding.")
    ok = L % size == 0
    require(ok, f"The rows have {L} positions, no multiple of the block size {size}; pad them with masks.")
    noisy = tokens[:, None].masked_fill(views, mask_id).flatten(1)  # (B, V * L)
    positions = positions_of(tokens, documents).repeat(1, V + 1)
    attend = training_attention(attention, L, size, V, documents, tokens.device, clean)
    hidden = model(torch.cat([noisy, tokens], dim=1), positions, attend, masked)
    return hidden.unflatten(1, (V + 1, L))


def causal_pass(
    model: Qwen2, tokens: Tensor, documents: Tensor | None = None, attention: str = "auto", masked=None
) -> Tensor:
    """Hidden states (B, L, D) of an ordinary causal pass over tokens; `masked` as in `diffusion_pass`."""
    attend = training_attention(attention, tokens.shape[1], 1, 0, documents, tokens.device)
    return model(tokens, positions_of(tokens, documents), attend, masked)


def predictions(hidden: Tensor, tokens: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) at the flat indices `outputs` of (B, ..., L), and the tokens (N) they predict."""
    B, L = tokens.shape
    row, at = outputs // (hidden.shape[:-1].numel() // B), outputs % L
    return hidden.flatten(0, -2)[outputs], tokens[row, at + 1]


def score(model: Qwen2, hidden: Tensor, targets: Tensor, largest: int = 2**26) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies in float32, and number of right predictions; hidden (N, D), targets (N).

    Only outputs with a target reach the head, and never more than `largest` logits are in memory at once.
    Where that takes several chunks, the backward pass computes each again.
    """

    def chunk(hidden, targets):
        logits = model.logits(hidden).float()
        return F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()

    rows = max(1, largest // model.config.vocab_size)
    if len(targets) <= rows:
        return chunk(hidden, targets)
    chunks = zip(hidden.split(rows), targets.split(rows))
    parts = [checkpoint(chunk, *part, use_reentrant=False) for part in chunks]
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

    tokens (B, L); trainable (B, L) bool. masked (B, L) bool: what view 1 masks (default: drawn). documents
    (B, L): document numbers; a document begins on a block boundary and sees no other (default: one document).
    Without `complement` there is no view 2. `block_size` defaults to the checkpoint's.

    Output i predicts token i + 1 if that is masked, so a document's first position is never a target. The sum
    over the views is divided by the number of targets. One clean copy serves both views, so a row costs 3L
    tokens. A run uses `Objective` and `Trainer.step`, which count targets over all processes. Raises
    InputError as `diffusion_pass` does.
    """
    size = block_size or model.config.block_size
    masked = complementary_noise(trainable, size) if masked is None else masked & trainable
    views = noisy_views(trainable, masked, complement)
    hidden = diffusion_pass(model, tokens, views, documents, size, attention)
    outputs = diffusion_outputs(trainable, documents, views)
    return score(model, *predictions(hidden, tokens, outputs))[0] / max(len(outputs), 1)


def causal_loss(
    model: Qwen2, tokens: Tensor, trainable: Tensor, documents: Tensor | None = None, attention: str = "auto"
) -> Tensor:
    """Mean next-token cross entropy over the trainable tokens, a scalar; arguments as in `training_loss`."""
    hidden, outputs = causal_pass(model, tokens, documents, attention), causal_outputs(trainable, documents)
    return score(model, *predictions(hidden, tokens, outputs))[0] / max(len(outputs), 1)


# --- Data ---


def chat_document(messages: list[dict], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """ChatML of a conversation through its last answer; answers are trainable, with end token and newline.

    Raises InputError for unknown roles, and contents that are no text.
    """
    tokens, trainable = [], []
    for message in messages:
        known = message["role"] in ("system", "user", "assistant", "tool")
        require(known, f"the role {message['role']!r:.99} is none of system, user, assistant and tool")
        require(type(message["content"]) is str, f"the {message['role']}'s content is no text")
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for before, turn in zip([-1, *answers], answers):
        # every turn begins with a special token, so that the pieces' tokens are those of the whole text
        prompt = tokenizer.chat(messages[before + 1 : turn], system=before < 0)
        answer = tokenizer.encode(f"{messages[turn]['content']}<|im_end|>\n")
        tokens += prompt + answer
        trainable += [False] * len(prompt) + [True] * len(answer)
    return tokens, trainable


def document_of(record: dict, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of one JSON object, and which are trainable. Other objects raise KeyError or the like."""
    if "token_ids" in record:  # an answer that `cli.py generate --output` wrote, token by token
        prompt, answer = encode_prompt(record, tokenizer), record["token_ids"]
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    if "text" in record:
        end = tokenizer.id("<|endoftext|>")
        tokens = tokenizer.encode(record["text"]) + ([] if end is None else [end])
        return tokens, [True] * len(tokens)
    messages = record.get("messages") or [
        {"role": "user", "content": record["question"]},
        {"role": "assistant", "content": record["answer"]},
    ]
    return chat_document(messages, tokenizer)


def read_documents(
    path: Path, tokenizer: Tokenizer, broken: str = "refuse", progress: Callable = lambda size: None
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each line of a JSONL file, and which are trainable; tells `progress` each line's bytes.

    A broken line raises InputError with its number; where `broken` is "skip", it is reported on stderr and
    left out.
    """
    mask, size = tokenizer.id("|<MASK>|"), len(tokenizer)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            progress(len(line))
            if not line.strip():
                continue
            try:
                document = tokens, trainable = document_of(json.loads(line), tokenizer)
                require(any(trainable), "it has no token to train on")
                inside = all(type(i) is int and 0 <= i < size for i in tokens)
                require(inside, "it has token ids outside the vocabulary")
                require(mask not in tokens, "it holds the mask token, which only training may write")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                forms = "no JSON object with `messages`, `question` and `answer`, `text`, or `token_ids`"
                sentence = str(error).rstrip(".") if isinstance(error, InputError) else None
                reason = sentence or f"{forms} ({error!r:.99})"
                refusal = f"{path}, line {number}: {reason}; --broken skip leaves such lines out."
                require(broken == "skip", refusal)
                print(f"{path}, line {number}: {reason}; skipped", file=sys.stderr)
                continue
            yield document


CORPUS_FILES = "tokens.bin", "trainable.bin", "offsets.npy"


class Corpus:
    """Tokenised documents in one array: token ids, which are trainable, and where each document begins."""

    def __init__(self, tokens: np.ndarray, trainable: np.ndarray, offsets: np.ndarray):
        self.tokens, self.trainable, self.offsets = tokens, trainable, offsets

    @classmethod
    def open(cls, folder: Path, check: bool = False) -> "Corpus":
        """Map `prepare`'s files into memory. `check`: compare checksums. Raises InputError for damage."""
        try:
            meta, mapped = read_json(folder / "meta.json"), partial(np.memmap, mode="r")
            tokens = mapped(folder / "tokens.bin", dtype=meta["dtype"])
            trainable, offsets = mapped(folder / "trainable.bin", dtype=bool), np.load(folder / "offsets.npy")
            intact = bool(offsets[-1] == len(tokens) == len(trainable))
            if check:
                intact &= meta.get("sha256") == {file: file_hash(folder / file) for file in CORPUS_FILES}
        except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError):
            intact = False
        require(intact, f"{folder}: its files are damaged; remove it, and it is made again.")
        return cls(tokens, trainable, offsets)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def piece(self, document: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trainable of [start, stop) of a document, cut at its end; by default all of it."""
        low, end = self.offsets[document : document + 2]
        where = slice(low + start, end if stop is None else min(low + stop, end))
        return self.tokens[where], self.trainable[where]

    @staticmethod
    def content(data: Path, folder: Path) -> str:
        """sha256 of the data; read from meta.json if the size and time noted there are still the file's."""
        meta = (data if data.is_dir() else folder) / "meta.json"
        known = read_json(meta) if meta.is_file() else {}
        if data.is_dir() or known.get("file") == file_status(data):
            return known.get("content", "")
        return file_hash(data)

    @classmethod
    def prepare(
        cls, data: Path, tokenizer: Tokenizer, folder: Path, broken="refuse", content: str | None = None
    ) -> "Corpus":
        """Open tokenised data. If `data` is a JSONL file, tokenise it into `folder`, unless it is there.

        content: what `Corpus.content` has found, if it was called already.
        Raises InputError for broken lines, data without documents, tokens of another tokenizer, and damaged
        files.
        """
        name = hashlib.sha256(f"{tokenizer.system} {tokenizer.encoder.to_str()}".encode()).hexdigest()[:16]
        if data.is_dir():
            same = read_json(data / "meta.json").get("tokenizer") == name
            require(same, f"{data}: was not tokenised with this tokenizer; give its JSONL file.")
            return cls.open(data, check=True)
        dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
        content = content or cls.content(data, folder)
        made_of = {"content": content, "tokenizer": name, "dtype": dtype, "broken": broken}
        if (folder / "meta.json").is_file() and made_of.items() <= read_json(folder / "meta.json").items():
            return cls.open(folder, check=True)
        for old in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a run that was killed
            shutil.rmtree(old, ignore_errors=True)
        part, offsets = folder.with_name(f".{folder.name}.{os.getpid()}.tmp"), [0]
        bar = tqdm(total=data.stat().st_size, desc=f"tokenising {data.name}", unit="B", unit_scale=True)
        try:
            part.mkdir(parents=True)
            with open(part / "tokens.bin", "wb") as ids, open(part / "trainable.bin", "wb") as flags, bar:
                for tokens, trainable in read_documents(data, tokenizer, broken, bar.update):
                    ids.write(np.array(tokens, dtype).tobytes())
                    flags.write(np.array(trainable, bool).tobytes())
                    offsets.append(offsets[-1] + len(tokens))
            require(len(offsets) > 1, f"{data}: holds no documents.")
            np.save(part / "offsets.npy", np.array(offsets, np.int64))
            made_of |= {"source": str(data.resolve()), "file": file_status(data), "tokens": offsets[-1]}
            made_of["sha256"] = {file: file_hash(part / file) for file in CORPUS_FILES}
            (part / "meta.json").write_text(json.dumps(made_of, indent=2) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return cls.open(folder)


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def file_status(path: Path) -> list[int]:
    """Size and time of change: a file that keeps both is taken to be unchanged."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


# --- Packing ---

Piece = tuple[int, int, int]  # (document, start, stop): its positions; those beyond its end are padding


def pack(
    lengths: np.ndarray, seq_len: int, block_size: int, packing: str, rng: np.random.Generator
) -> list[list[Piece]]:
    """Each document once, in rows of at most `seq_len` positions, in a random order; see PACKINGS.

    "documents" puts each document into the fullest row that has room for it. Only a document longer than a
    row is cut; its last piece is packed like a document. The other two ways drop the last, incomplete row.
    """
    rows, order = [], rng.permutation(len(lengths)).tolist()
    if packing == "documents":
        room = [[] for _ in range(seq_len)]  # number of free positions -> rows that have so many
        sizes = []  # the numbers above 0 that some row has, sorted
        for document in order:
            for start in range(0, lengths[document], seq_len):
                need = round_up(int(min(lengths[document] - start, seq_len)), block_size)
                at = bisect_left(sizes, need)
                free = sizes[at] if at < len(sizes) else seq_len
                row = room[free].pop() if free < seq_len else []
                if free < seq_len and not room[free]:
                    del sizes[at]
                if not row:
                    rows.append(row)
                row.append((document, start, start + need))
                if free > need and not room[free - need]:
                    insort(sizes, free - need)
                room[free - need].append(row)
        return [rows[i] for i in rng.permutation(len(rows))]
    row, filled = [], 0
    for document in order:
        length = int(lengths[document])
        whole = round_up(length + 1, block_size) if packing == "original" else length
        start = 0
        while start < whole:
            stop = min(whole, start + seq_len - filled)
            row.append((document, start, stop))
            start, filled = stop, filled + stop - start
            if filled == seq_len:
                rows.append(row)
                row, filled = [], 0
    return [rows[i] for i in rng.permutation(len(rows))]


def endless_rows(
    lengths: np.ndarray, seq_len: int, block_size: int, packing: str, seed: int
) -> Iterator[list[Piece]]:
    """Packed rows, epoch after epoch; the same arguments give the same rows."""
    for epoch in count():
        rows = pack(lengths, seq_len, block_size, packing, np.random.default_rng([seed, epoch]))
        enough = f"The data does not fill one row of {seq_len} positions; give more, or a lower --seq-len."
        require(rows, enough)
        yield from rows
        del rows  # frees them before the next epoch's are made


@dataclass
class Batch:
    """Rows of the network's input, each field (B, L)."""

    tokens: Tensor
    trainable: Tensor
    documents: Tensor | None  # numbers of the documents of a row; None: a row is one
    masked: Tensor | None = None  # what view 1 masks

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if x is None else to_device(x, device) for x in vars(self).values()))

    def split(self, rows: int) -> list["Batch"]:
        columns = [repeat(None) if x is None else x.split(rows) for x in vars(self).values()]
        return [Batch(*parts) for parts in zip(*columns)]

    def outputs(self, kind: str, complement: bool) -> Tensor:
        """Flat indices of the outputs that have a target; kind is diffusion or ar."""
        if kind == "ar":
            return causal_outputs(self.trainable, self.documents)
        views = noisy_views(self.trainable, self.masked, complement)
        return diffusion_outputs(self.trainable, self.documents, views)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. On CUDA it uses pinned memory, so that it need not wait for running work."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def lay_out(
    corpus: Corpus, rows: list[list[Piece]], seq_len: int, pad: int, separate_documents: bool
) -> Batch:
    """The rows' tokens. Positions without a document are padding, which does not train."""
    shape = len(rows), seq_len
    tokens, trainable = np.full(shape, pad, np.int64), np.zeros(shape, bool)
    documents = np.zeros(shape, np.int32)
    for r, row in enumerate(rows):
        at = 0
        for number, (document, start, stop) in enumerate(row, 1):
            ids, flags = corpus.piece(document, start, stop)
            tokens[r, at : at + len(ids)], trainable[r, at : at + len(ids)] = ids, flags
            documents[r, at : at + stop - start] = number
            at += stop - start
    numbers = torch.from_numpy(documents) if separate_documents else None
    return Batch(torch.from_numpy(tokens), torch.from_numpy(trainable), numbers)


def draw_noise(batch: Batch, block_size: int, *seeds: list[int]) -> None:
    """View 1's masks, each row's from its own seed, so that any process may run the row."""
    generators = [torch.Generator().manual_seed(int(np.random.default_rng(s).integers(2**63))) for s in seeds]
    rows = [complementary_noise(row[None], block_size, g) for row, g in zip(batch.trainable, generators)]
    batch.masked = torch.cat(rows)


# --- Devices ---


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
    """Run long work in the first process while the others wait; its mistakes are raised in all of them."""
    if not dist.is_initialized():
        work()
        return
    problem = [None]
    # this group waits up to a day; the main group keeps its 30 minutes, so a hanging step still fails soon
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if rank() == 0:
        try:
            work()
        except (InputError, OSError) as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, group=patient)
    dist.destroy_process_group(patient)
    require(problem[0] is None, problem[0])


@contextmanager
def processes(device: str) -> Iterator[str]:
    """This process's device, among those that `torchrun` started."""
    device = own_device(device)
    if "LOCAL_RANK" not in os.environ:
        yield device
        return
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield device
    finally:
        dist.destroy_process_group()


class Adapter(nn.Module):
    """An adapter's weights as one float32 module: low-rank layers, and an embedding of masks.

    The optimiser and the checkpoints see it; the model's own state dict stays the base's.
    """

    def __init__(self, model: Qwen2, r: int, alpha: float, seed: int, mask_row: Tensor):
        super().__init__()
        add_adapter(model, r, alpha)
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(layer.adapter.float() for layer in adapted_layers(model).values())
        for low_rank in self.layers:
            bound = low_rank.A.shape[1] ** -0.5
            start = torch.empty(low_rank.A.shape).uniform_(-bound, bound, generator=generator)
            low_rank.A.data.copy_(start)
        self.mask_row = nn.Parameter(mask_row.detach().float().clone())

    def lend(self, model: Qwen2) -> None:
        """Make the trained row the model's embedding of masks."""
        # a view of it, since assigning a parameter would register it in the model
        model.mask_row = self.mask_row.view(-1).to(model.weight.dtype)


class Objective(nn.Module):
    """Model and losses as one module: DDP and FSDP need all that has gradients in one forward pass."""

    def __init__(self, model: Qwen2, how: "Training"):
        super().__init__()
        self.model, self.how, self.compute, self.adapter = model, how, DTYPES[how.compute], None
        if how.lora:  # the base is frozen, and the low-rank layers are on at all positions
            mask_id = model.config.mask_token_id
            self.adapter = Adapter(model, how.lora, 2.0 * how.lora, how.seed, model.weight[mask_id])
            model.requires_grad_(False)
            # `masked` is True everywhere, so Qwen2.forward would put this row everywhere; the hook does not
            model.mask_row = None
            model.model.embed_tokens.register_forward_hook(self.embed_masks)

    def embed_masks(self, embedding: nn.Module, inputs: tuple, x: Tensor) -> Tensor:
        """The trained row in place of the mask token's frozen one."""
        masks = (inputs[0] == self.model.config.mask_token_id)[..., None]
        return torch.where(masks, self.adapter.mask_row.to(x.dtype), x)

    def forward(self, batch: Batch, outputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Sum of the cross entropies and number of right predictions, per kind of loss.

        outputs: per kind, diffusion or ar, what `Batch.outputs` gives.
        """
        model, tokens, documents, found = self.model, batch.tokens, batch.documents, {}
        on = None if self.adapter is None else torch.ones(1, 1, 1, dtype=torch.bool, device=tokens.device)
        # FSDP2 has cast the weights to the compute dtype; autocast would cast again, and norms to float32
        mixed = self.compute not in (torch.float32, model.weight.dtype)
        with torch.autocast(tokens.device.type, self.compute, enabled=mixed):
            if "diffusion" in outputs:
                views = noisy_views(batch.trainable, batch.masked, self.how.complement)
                hidden = diffusion_pass(model, tokens, views, documents, clean=self.how.clean, masked=on)
                found["diffusion"] = score(model, *predictions(hidden, tokens, outputs["diffusion"]))
            if "ar" in outputs:
                # a causal clean copy is an ordinary causal pass
                made = "diffusion" in outputs and self.how.clean == "causal"
                hidden = hidden[:, -1] if made else causal_pass(model, tokens, documents, masked=on)
                found["ar"] = score(model, *predictions(hidden, tokens, outputs["ar"]))
        return found


def distribute(objective: Objective) -> nn.Module:
    """Ready for several processes: DDP, where each has all weights, or FSDP2, where each has a share of them.

    Trained weights are float32 from here on, frozen ones in the compute dtype. The residual stream is in the
    compute dtype under FSDP2 and with low-rank layers, else float32. FSDP2 also sends weights in the compute
    dtype. With `recompute` only the layers' inputs are kept for the backward pass.
    """
    how, layers = objective.how, objective.model.model.layers
    if how.recompute:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    size = sum(p.numel() for p in objective.model.parameters())
    parallel = how.parallel if how.parallel != "auto" else "fsdp" if size > 1e9 else "ddp"
    if parallel == "fsdp" and dist.is_initialized():
        policy = MixedPrecisionPolicy(param_dtype=objective.compute, reduce_dtype=torch.float32)
        for layer in layers:
            fully_shard(layer, mp_policy=policy, reshard_after_forward=how.reshard)
        fully_shard(objective, mp_policy=policy)
    objective.model.to(torch.float32 if objective.adapter is None else objective.compute)
    if parallel == "ddp" and dist.is_initialized():
        # without this, DDP regroups gradients after the first step, and a resumed run rounds differently
        return DistributedDataParallel(objective, find_unused_parameters=True)
    return objective


def micro_batch(objective: nn.Module, last: bool, reshard: bool):
    """A context for one micro-batch.

    Under DDP, and under FSDP without resharding, only a step's last micro-batch sends gradients.
    """
    if isinstance(objective, DistributedDataParallel) and not last:
        return objective.no_sync()
    if isinstance(objective, FSDPModule) and not reshard:
        objective.set_requires_gradient_sync(last)
        objective.set_reshard_after_backward(last)
        objective.set_is_last_backward(last)
    return nullcontext()


# --- Checkpoints ---
# A checkpoint is a folder. Each process writes one safetensors file with its share of the weights and the
# optimiser's state. The file's header says where each piece lies in its whole tensor. A JSON file beside it
# has its checksum. No file is executed. The folder is renamed to its name when it is complete, so a killed
# run resumes from a complete checkpoint. A step depends only on that checkpoint, the seed and its number.


def checkpoints(out: Path) -> list[Path]:
    """Finished ones, the oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def last_good(out: Path) -> str:
    """Words for the last checkpoint whose files are as they were written."""
    for place in reversed(checkpoints(out)):
        with suppress(InputError, OSError):
            check_shares(place)
            return f"the last good checkpoint is {place}"
    return "there is no good checkpoint"


def check_shares(place: Path) -> None:
    """Raises InputError where a checkpoint's file is missing or is not what was written."""
    shares = sorted(place.glob("share-*.safetensors"))
    require(shares, f"{place} has no files")
    for share in shares:
        known = read_json(share.with_suffix(".json"))
        require(known.get("sha256") == file_hash(share), f"the checksum of {share.name} differs")
        require(known.get("shares") == len(shares), f"there are {len(shares)} files of {known.get('shares')}")


def state_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trained tensors and AdamW's state, by name, not copied. Before a step that is zeros."""
    found, fresh = {}, not optimizer.state
    for name, p in objective.named_parameters():
        if p.requires_grad:
            state, name = optimizer.state[p], name.removeprefix("module.")  # DDP's
            if fresh:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state |= {key: torch.zeros_like(p.detach()) for key in ("exp_avg", "exp_avg_sq")}
            found[f"model.{name}"] = p.detach()
            found |= {f"optimizer.{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return found


def share_of(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor, as a view, and the first one's index; FSDP2 splits tensors by rows."""
    if not isinstance(tensor, DTensor):
        return tensor if tensor.dim() else tensor.view(1), 0
    rows = math.ceil(tensor.shape[0] / world_size())
    return tensor.to_local(), min(rank() * rows, tensor.shape[0])


def same_run(out: Path, run: dict) -> None:
    """Note the run in run.json. Raises InputError where the folder holds another run's checkpoints."""
    file = out / "run.json"
    if checkpoints(out) and file.exists():
        known = read_json(file)
        same = known.get("content") == run["content"]
        require(same, f"{out}: holds a run on other data, or the data has changed; take another --out.")
        for name, value in known.items():
            ok = run.get(name) == value
            require(ok, f"{out}: holds a run with {name} {value}, not {run.get(name)}; take another --out.")
    for old in (out / "checkpoints").glob(".*.tmp"):  # of a run that was killed
        shutil.rmtree(old, ignore_errors=True)
    replace_file(file, partial(Path.write_text, data=json.dumps(run, indent=2) + "\n"))


def alone(out: Path):
    """A context that keeps other runs out of the folder. Raises InputError where one uses it."""
    out.mkdir(parents=True, exist_ok=True)
    busy = f"{out}: another run is using it; wait for it, or take another --out."
    return locked(out / ".lock", busy) if rank() == 0 else nullcontext()


def save_checkpoint(
    out: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, step: int, keep: int
) -> None:
    """Write a checkpoint, renamed to its name when complete, and delete all but the last `keep`.

    Raises InputError where it cannot be written; earlier ones stay.
    """
    place = out / "checkpoints" / f"step-{step:07d}"
    part = place.with_name(f".{place.name}.tmp")
    tensors, first_rows = {}, {}
    shares = world_size() if isinstance(objective, FSDPModule) else 1
    for name, tensor in state_tensors(objective, optimizer).items():
        local, first = share_of(tensor)
        if isinstance(tensor, DTensor) or rank() == 0:
            tensors[name], first_rows[name] = local.cpu().contiguous(), first
    try:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        wait_for_all()
        if rank() < shares:
            file = part / f"share-{rank():05d}.safetensors"
            save_file(tensors, file, {"step": str(step), "first_rows": json.dumps(first_rows)})
            file.with_suffix(".json").write_text(json.dumps({"sha256": file_hash(file), "shares": shares}))
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
    """Take up the last checkpoint, on any number of processes; the step it was written after, or 0.

    Raises InputError where it is damaged.
    """
    if not checkpoints(out):
        return 0
    place = checkpoints(out)[-1]

    def check():
        try:
            check_shares(place)
        except InputError as error:
            damage = f"{place}: the checkpoint is damaged ({str(error).rstrip('.')})"
            raise InputError(f"{damage}; {last_good(out)}; remove the damaged one.") from None

    first_process(check)
    mine = {name: share_of(tensor) for name, tensor in state_tensors(objective, optimizer).items()}
    missing = {name: len(local) for name, (local, _) in mine.items()}
    for share in sorted(place.glob("share-*.safetensors")):
        with safe_open(share, "pt") as file:
            first_rows = json.loads(file.metadata()["first_rows"])
            for name in first_rows.keys() & mine.keys():
                (local, first), there, part = mine[name], first_rows[name], file.get_slice(name)
                low, high = max(first, there), min(first + len(local), there + part.get_shape()[0])
                if low < high:
                    local[low - first : high - first] = part[low - there : high - there]
                    missing[name] -= high - low
            step = int(file.metadata()["step"])
    require(not any(missing.values()), f"{place}: the checkpoint is of another model; take another --out.")
    return step


def save_result(
    out: Path, objective: nn.Module, model: Qwen2, tokenizer: Tokenizer, dtype: torch.dtype
) -> None:
    """Write a folder that `load` reads, from all processes' shares, with low-rank layers merged."""
    weights = {}
    for name, p in objective.named_parameters():
        whole = p.full_tensor() if isinstance(p, DTensor) else p  # all processes take part
        if rank() == 0:
            weights[name.removeprefix("module.")] = whole.detach().cpu()
    if rank() == 0:
        for i, (name, layer) in enumerate(adapted_layers(model).items()):
            if layer.adapter is not None:
                A, B = (weights.pop(f"adapter.layers.{i}.{part}") for part in "AB")
                base = weights[f"model.{name}.weight"]
                weights[f"model.{name}.weight"] = base.float() + layer.adapter.scale * (B @ A)
        if "adapter.mask_row" in weights:
            row = weights.pop("adapter.mask_row")
            weights["model.model.embed_tokens.weight"][model.config.mask_token_id] = row
        weights = {name.removeprefix("model."): weight.to(dtype) for name, weight in weights.items()}
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])  # where it is tied
        with torch.device("meta"):
            result = Qwen2(model.config)
        result.load_state_dict(weights, assign=True)
        result.tie()
        save(result, tokenizer, out)
    wait_for_all()


# --- Training ---


def setting(default, help: str, low=0, high=10**9, choices: tuple = ()):
    """A field with its help on the command line, and which values it may have."""
    return knob(default, help, type(default), low, high, choices)


class Settings:
    """A base for settings. Raises InputError for a value that its field does not allow."""

    def __post_init__(self):
        check_knobs(self, flags=True)


PACKINGS = {
    "documents": "padded to whole blocks, cut only if longer than a row, and masked from each other",
    "original": "padded to whole blocks by at least one token, cut at row ends, and visible to each other",
    "concatenated": "not padded, cut at row ends, and visible to each other",
}


@dataclass(frozen=True)
class Training(Settings):
    """How to train; batch, length, rate, steps, warm-up, schedule and noise are the paper's."""

    steps: int = setting(6000, "Steps of the optimiser.", 1)
    batch_size: int = setting(256, "Rows per step, of all devices together.", 1, 2**16)
    seq_len: int = setting(2048, "Positions of a row.", 1)
    micro_batch: int = setting(1, "Rows that a device runs at once; changes memory and speed only.", 1)
    lr: float = setting(2e-5, "Peak learning rate of AdamW.", high=100)
    warmup: int = setting(500, "Steps of linear warm-up.")
    schedule: str = setting(
        "constant", "After the warm-up; cosine falls to 0.", choices=("constant", "cosine")
    )
    weight_decay: float = setting(0.01, "AdamW's, of matrices.")
    clip: float = setting(1.0, "Largest gradient norm.", 1e-9)
    ar_weight: float = setting(0.0, "Weight of a causal loss beside the diffusion loss.")
    clean: str = setting(
        "block", "What finished blocks see: their whole block (paper), or causal, as in AR.", choices=CLEAN
    )
    complement: bool = setting(True, "Train on the complementary view as well.")
    lora: int = setting(0, "Train low-rank layers of this rank, merged into the result; 0: all weights.")
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
    reshard: bool = setting(
        True, "Under fsdp, share weights again after each use; --no-reshard is faster and larger."
    )
    seed: int = setting(0, "Of order, noise and random weights.")
    save_every: int = setting(200, "Steps between checkpoints.", 1)
    keep: int = setting(2, "Checkpoints that stay.", 1)
    eval_every: int = setting(200, "Steps between looks at held-out data.", 1)
    eval_rows: int = setting(64, "Rows of held-out data.", 1, 2**16)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up from 0, then constant, or a cosine that would be 0 a step after the last."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


PRESETS = {  # the paper's steps and rates, on 64 devices; on 80 GB, 1.5B needs no recomputing
    "1.5b": {"lr": 2e-5, "steps": 6000, "reshard": False},
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
                # a layer adds to the residual stream twice, and the sum of all layers should stay of one size
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                torch.nn.init.normal_(p, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if adds else 0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)
        model.to(device)
    require(tokenizer, f"{folder}: no tokenizer, so the data cannot be read.")
    return model.train(), tokenizer


def with_mask_token(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """A tokenizer that knows `|<MASK>|`, under its first free id: 151665 in Qwen2.5, which has a row.

    Its files are one `tokenizer.json` and the settings. Raises InputError where the embedding has too few
    `rows`.
    """
    if tokenizer.id("|<MASK>|") is not None:
        return tokenizer
    new = len(tokenizer)
    room = f"The mask token would be id {new}, outside the embedding of {rows} rows; add a row to it."
    require(new < rows, room)
    tokenizer.encoder.add_special_tokens([AddedToken("|<MASK>|", normalized=False)])
    settings = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"][str(new)] = {"content": "|<MASK>|", "special": True}
    config = json.dumps(settings, indent=2, ensure_ascii=False)
    files = {"tokenizer.json": tokenizer.encoder.to_str().encode(), "tokenizer_config.json": config.encode()}
    kept = {name: text for name, text in tokenizer.files.items() if name == "chat_template.jinja"}
    return Tokenizer(tokenizer.encoder, tokenizer.system, files | kept)


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
        check_length(how.seq_len, self.size, model.config.max_position_embeddings)
        share = world_size() * how.micro_batch
        ok = how.batch_size % share == 0
        parts = f"{world_size()} processes x --micro-batch {how.micro_batch}"
        require(ok, f"--batch-size {how.batch_size} is no multiple of {share}, {parts}.")
        self.objective = distribute(Objective(model, how))
        trained = [p for p in self.objective.parameters() if p.requires_grad]
        decayed, others = [p for p in trained if p.dim() == 2], [p for p in trained if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": how.weight_decay}, {"params": others}]
        betas = 0.9, 0.95  # as is usual for language models
        self.optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=betas, weight_decay=0.0, fused=True)
        if heldout:
            rows = list(islice(self.rows(heldout, 0), round_up(how.eval_rows, share)))
            self.heldout_batch = self.batch(heldout, rows, 0, 0)

    def rows(self, corpus: Corpus, seed: int) -> Iterator[list[Piece]]:
        return endless_rows(corpus.lengths, self.how.seq_len, self.size, self.how.packing, seed=seed)

    def batch(self, corpus: Corpus, rows: list[list[Piece]], step: int, seed: int) -> Batch:
        """This process's share of a step's rows."""
        mine = range(rank(), len(rows), world_size())
        separate = self.how.packing == "documents"
        batch = lay_out(corpus, [rows[i] for i in mine], self.how.seq_len, self.pad, separate)
        if "diffusion" in self.kinds:
            draw_noise(batch, self.size, *([seed, step, i] for i in mine))
        return batch

    def step(
        self, batch: Batch, backward: bool = True, progress: Callable = lambda rows: None
    ) -> dict[str, float]:
        """Gradients of one step, as if all its rows had run at once; loss and accuracy per kind.

        Calls `progress` with the number of rows that all processes have run, after each micro-batch.
        """
        how, sums = self.how, {(kind, name): 0.0 for kind in self.kinds for name in ("loss", "accuracy")}
        parts = batch.split(how.micro_batch)
        # on a device this would wait for all queued work, so the indices are found on the CPU
        outputs = [{kind: part.outputs(kind, how.complement) for kind in self.kinds} for part in parts]
        counts = total([sum(len(found[kind]) for found in outputs) for kind in self.kinds], self.device)
        counts = {kind: max(1, n) for kind, n in zip(self.kinds, counts)}
        # DDP and FSDP average gradients over processes, but the loss is a sum over them
        weights = {kind: weight * world_size() / counts[kind] for kind, weight in self.kinds.items()}
        for i, part in enumerate(parts):
            indices = {kind: to_device(x, self.device) for kind, x in outputs[i].items()}
            with micro_batch(self.objective, i + 1 == len(parts), how.reshard):
                found = self.objective(part.to(self.device), indices)
                if backward:
                    sum(loss * weights[kind] for kind, (loss, _) in found.items()).backward()
            for kind, (loss, right) in found.items():
                sums[kind, "loss"] += loss.detach()
                sums[kind, "accuracy"] += right
            progress(how.micro_batch * world_size())
        sums = dict(zip(sums, total([float(value) for value in sums.values()], self.device)))
        return {f"{kind}_{name}": value / counts[kind] for (kind, name), value in sums.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on held-out rows, always the same rows with the same noise."""
        found = self.step(self.heldout_batch, backward=False)
        for module in self.objective.modules():
            if isinstance(module, FSDPModule):  # it leaves weights gathered when no backward pass follows
                module.reshard()
        return {f"heldout_{name}": value for name, value in found.items()}

    def run(self, out: Path) -> None:
        """Train to the last step, from the last checkpoint in `out` if there is one.

        A step depends on seed and step number alone. Raises InputError when the loss is NaN or infinite.
        """
        how, log = self.how, out / "metrics.jsonl"
        done = load_checkpoint(out, self.objective, self.optimizer)
        require(done <= how.steps, f"{out}: has done {done} steps already, more than --steps {how.steps}.")
        if rank() == 0:  # steps after the checkpoint run again
            lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
            replace_file(log, partial(Path.write_bytes, data=b"".join(lines[:done])))
        done_rows = done * how.batch_size
        order = self.rows(self.corpus, how.seed)
        next(islice(order, done_rows, done_rows), None)  # skipped here, so that no step's time includes it
        with tqdm(total=how.steps * how.batch_size, initial=done_rows, unit="row", disable=rank() > 0) as bar:
            for step in range(done, how.steps):
                began = time.perf_counter()
                rows = list(islice(order, how.batch_size))
                losses = self.step(self.batch(self.corpus, rows, step, how.seed), progress=bar.update)
                norm = nn.utils.clip_grad_norm_(self.objective.parameters(), how.clip)
                norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
                if not all(map(math.isfinite, (norm, *losses.values()))):
                    documents = sorted({document for row in rows for document, _, _ in row})
                    shown = ", ".join(map(str, documents[:8])) + (", ..." if len(documents) > 8 else "")
                    problem = f"step {step + 1}: the loss is NaN or infinite ({losses}, gradient norm {norm})"
                    batch = f"its batch holds documents {shown} (of the tokenised data, from 0)"
                    raise InputError(f"{problem}; {batch}; {last_good(out)}; a lower --lr may help.")
                for group in self.optimizer.param_groups:
                    group["lr"] = how.learning_rate(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
                seconds = time.perf_counter() - began
                record = {"step": step + 1, "tokens": how.batch_size * how.seq_len, **losses}
                record |= {"grad_norm": norm, "lr": how.learning_rate(step), "seconds": round(seconds, 4)}
                last = step + 1 == how.steps
                if self.heldout and ((step + 1) % how.eval_every == 0 or last):
                    record |= self.evaluate()
                try:
                    if rank() == 0:
                        with open(log, "a") as file:
                            file.write(json.dumps(record) + "\n")
                except OSError as error:
                    reason = f"{log}: cannot be written ({error.strerror})"
                    raise InputError(f"{reason}; {last_good(out)}.") from None
                shown = {name: f"{value:.3f}" for name, value in record.items() if name.endswith("loss")}
                shown |= {"step": step + 1, "tokens/s": f"{record['tokens'] / seconds:,.0f}"}
                bar.set_postfix(shown, refresh=False)
                if (step + 1) % how.save_every == 0 or last:
                    save_checkpoint(out, self.objective, self.optimizer, step + 1, how.keep)


def check_length(seq_len: int, block_size: int, most: int) -> None:
    """Raises InputError for a row's length that the model or the blocks do not allow."""
    ok = seq_len % block_size == 0
    require(ok, f"--seq-len {seq_len} is no multiple of the block size {block_size}.")
    require(seq_len <= most, f"--seq-len {seq_len} is more than the model's {most} positions.")


# --- Drafts ---
# A group is w masks at the positions a + 1 .. a + w after its anchor a. Each mask sees the known tokens up to
# a and all masks of its group. The output at a + j predicts the token at a + j + 1. The output at a comes
# without the adapter, so it needs no training. Known tokens see no mask, so one pass without gradients serves
# all groups of a document.


@dataclass(frozen=True)
class Drafting(Settings):
    """How to train a draft adapter."""

    steps: int = setting(1500, "Steps of the optimiser.", 1)
    batch_size: int = setting(16, "Rows per step, of all devices; a row has --anchors groups.", 1)
    anchors: int = setting(5, "Groups of masks in a row, all in one document.", 1)
    width: int = setting(8, "Masks of a group: how far a draft goes.", 1, PIECE - 1)
    rank: int = setting(14, "Rank of the adapter.", 1)
    alpha: float = setting(28.0, "The adapter's products are multiplied by alpha / rank.")
    near: float = setting(0.9, "Weight of a draft's loss, relative to the draft before it.")
    reach: float = setting(0.7, "0: a draft's weight is --near's alone; 1: the gain in kept drafts.", 0, 1)
    others: int = setting(4096, "Tokens absent from the data that each step samples as negatives.")
    int8: bool = setting(
        int8_is_fast(), "Faster on CPUs with VNNI: round the frozen weights' products at masks."
    )
    lr: float = setting(1.5e-3, "Peak learning rate of AdamW; it falls linearly to 0.")
    warmup: int = setting(50, "Steps of linear warm-up.")
    clip: float = setting(1.0, "Largest gradient norm.", 1e-9)
    seed: int = setting(0, "Seed of weights, order and samples.")
    cache_gb: float = setting(4.0, "GB of keys and values to keep; others are computed again each time.")
    save_every: int = setting(50, "Steps between checkpoints.", 1)
    keep: int = setting(2, "Checkpoints that stay.", 1)
    eval_every: int = setting(100, "Steps between looks at held-out data.", 1)
    eval_rows: int = setting(24, "Held-out documents per look.", 1)

    @property
    def seq_len(self) -> int:
        """Positions that a row runs."""
        return self.anchors * self.width

    def learning_rate(self, step: int) -> float:
        rising = (step + 1) / max(1, self.warmup)
        falling = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.lr * min(rising, falling, 1)


def anchors_of(trainable: np.ndarray) -> np.ndarray:
    """Positions where a draft can start: the next two tokens are trainable."""
    return np.flatnonzero(trainable[2:] & trainable[1:-1])


def endless_groups(corpus: Corpus, anchors: int, width: int, seed: int) -> Iterator[list[Piece]]:
    """Rows in a random order. A row is `anchors` groups of masks in one document, each group a piece.

    Every group comes once an epoch. Where a document has too few groups left for a row, some are repeated.
    """
    for epoch in count():
        rng, rows = np.random.default_rng([seed, epoch]), []
        for document in range(len(corpus.lengths)):
            at = rng.permutation(anchors_of(corpus.piece(document)[1]))
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
    """Documents' keys and values, in bfloat16, kept while they fit into `limit` bytes, else made anew."""

    def __init__(self, model: Qwen2, corpus: Corpus, limit: float):
        self.model, self.corpus, self.limit, self.kept, self.bytes = model, corpus, limit, {}, 0

    def tokens(self, document: int) -> Tensor:
        ids, _ = self.corpus.piece(document)
        return torch.from_numpy(ids.astype(np.int64)).to(self.model.weight.device)

    def targets(self, document: int) -> Tensor:
        """Its tokens, and -1 where a token is no target."""
        ids, trainable = self.corpus.piece(document)
        return torch.from_numpy(np.where(trainable, ids.astype(np.int64), -1)).to(self.model.weight.device)

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
    everywhere = torch.ones(1, 1, 1, dtype=torch.bool, device=weight.device)
    return model(masks, positions, attend, everywhere).unflatten(1, (G, width))


def draft_targets(tokens: Tensor, anchors: Tensor, width: int) -> Tensor:
    """Targets (G, w) of the masks behind anchors (G) in one document's tokens; -1 from its answer's end on.

    tokens: see `Known.targets`.
    """
    at = anchors[:, None] + torch.arange(2, width + 2, device=tokens.device)
    found = tokens[at.clamp_max(len(tokens) - 1)].masked_fill(at >= len(tokens), -1)
    return found.masked_fill((found < 0).cumsum(-1) > 0, -1)


def draft_weights(chances: Tensor, near: float, reach: float) -> Tensor:
    """Weights (..., w) of the drafts' cross entropies, from the chance of each draft to be right (..., w).

    Draft j is kept if the drafts 0 to j are all right, so a group keeps sum_j prod_{k <= j} p_k drafts on
    average. Its gradient is that of sum_i w_i log p_i with w_i = sum_{j >= i} prod_{k <= j} p_k held fixed.
    `reach` is the share of w_i. The rest is near ** i, and teaches drafts that have no chance yet.
    """
    kept = chances.cumprod(-1)
    ahead = kept.flip(-1).cumsum(-1).flip(-1)
    return reach * ahead + (1 - reach) * near ** torch.arange(chances.shape[-1], device=chances.device)


def draft_loss(
    model: Qwen2, hidden: Tensor, targets: Tensor, ids: Tensor, others: Tensor, near: float, reach: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sum of cross entropies, sum of weights, drafts kept among `ids` and `others`.

    hidden (B, G, w, D), targets (B, G, w); near, reach: see `draft_weights`. The head runs over two sets of
    tokens. `ids` (sorted) holds all targets. `others` is a random sample of the remaining vocabulary; its
    logits are raised so that it stands for all of it. The full head would mostly lower tokens that never
    occur.
    """
    some = torch.cat([ids, others])
    rest = model.config.vocab_size - len(ids)
    logits = F.linear(hidden, model.lm_head.weight[some].to(hidden.dtype)).float()
    best = logits.argmax(-1)
    logits[..., len(ids) :] += math.log(max(1, rest) / max(1, len(others)))
    there = targets >= 0
    wanted = torch.searchsorted(ids, targets)  # 0 for -1
    losses = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none").view_as(targets)
    weights = draft_weights((-losses.detach()).exp() * there, near, reach) * there
    kept = ((best == wanted) & there).cumprod(-1).sum()
    return (losses * weights).sum(), weights.sum(), kept


@torch.no_grad()
def simulate(model: Qwen2, known: Known, documents: Iterable[int], width: int) -> Counter:
    """Replay verified decoding on each document's first answer: how many cycles keep 0, 1, 2, ... drafts.

    The answers count as what AR would write. A cycle is two passes, and writes 2 tokens and the kept drafts.
    """
    possible = {document: anchors_of(known.corpus.piece(document)[1]).tolist() for document in documents}
    kept, running = Counter(), [(document, at[0]) for document, at in possible.items() if at]
    while running:
        after = []
        for i in range(0, len(running), 32):
            part = running[i : i + 32]
            anchors = torch.tensor([[a] for _, a in part], device=model.weight.device)
            hidden = draft(model, [known[d] for d, _ in part], anchors, width)
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
        # a loaded adapter keeps its weights; a new mask row starts as a copy of a stop token's row
        loaded = adapter_tensors(model) if model.mask_row is not None else {}
        stop = model.config.stop_token_ids
        row = loaded.pop(MASK_ROW)[0] if loaded else model.weight[stop[-1] if stop else 0]
        self.objective = Adapter(model, how.rank, how.alpha, how.seed, row)
        tensors = adapter_tensors(model)
        for name, tensor in loaded.items():
            tensors[name].data.copy_(tensor)
        limit = how.cache_gb * 1e9
        self.known = Known(model, corpus, 0.8 * limit)
        self.known_heldout = heldout and Known(model, heldout, 0.2 * limit)
        ids = np.unique(corpus.tokens).astype(np.int64)
        rest = np.setdiff1d(np.arange(model.config.vocab_size), ids)
        self.ids, self.rest = (torch.from_numpy(part).to(self.device) for part in (ids, rest))
        fixed = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
        self.optimizer = torch.optim.AdamW(self.objective.parameters(), how.lr, **fixed)

    def rows(self, corpus: Corpus, seed: int) -> Iterator[list[Piece]]:
        return endless_groups(corpus, self.how.anchors, self.how.width, seed)

    def batch(self, corpus: Corpus, rows: list[list[Piece]], step: int, seed: int) -> tuple:
        """This process's share of a step: documents, anchors (B, G), targets (B, G, w), other tokens."""
        share = len(rows) // world_size()
        # sorted by document, so that a process needs the keys and values of few documents
        mine = sorted(rows)[rank() * share : (rank() + 1) * share]
        documents = [row[0][0] for row in mine]
        anchors = torch.tensor([[start - 1 for _, start, _ in row] for row in mine], device=self.device)
        tokens = (self.known.targets(document) for document in documents)
        targets = torch.stack([draft_targets(*pair, self.how.width) for pair in zip(tokens, anchors)])
        picked = np.random.default_rng([seed, step]).permutation(len(self.rest))[: self.how.others]
        return documents, anchors, targets, self.rest[torch.from_numpy(picked).to(self.device)]

    def step(self, batch: tuple, progress: Callable = lambda rows: None) -> dict[str, float]:
        """Gradients of one step, as if one process had run all its rows; loss, and drafts kept of a group."""
        documents, anchors, targets, others = batch
        self.objective.lend(self.model)
        known = {document: self.known[document] for document in set(documents)}
        hidden = draft(self.model, [known[document] for document in documents], anchors, self.how.width)
        loss, weight, kept = draft_loss(
            self.model, hidden, targets, self.ids, others, self.how.near, self.how.reach
        )
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
    """Lines that show a packed row to a person: its views, what each output predicts, and its mask."""
    separate, mask_id = how.packing == "documents", tokenizer.id("|<MASK>|")
    rows = endless_rows(corpus.lengths, how.seq_len, size, how.packing, seed=how.seed)
    pieces = next(islice(rows, row, None))
    batch = lay_out(corpus, [pieces], how.seq_len, mask_id, separate)
    draw_noise(batch, size, [how.seed, 0, row])
    views = noisy_views(batch.trainable, batch.masked, how.complement)[0]
    targets = targets_of(batch.trainable, batch.documents)[0]
    require(targets.any(), f"Row {row} has nothing that trains; show another --row.")
    text = [tokenizer.decode([i], skip_special_tokens=False) for i in batch.tokens[0].tolist()]
    yield f"Row {row}: {how.seq_len} positions in blocks of {size}, {targets.sum()} targets"
    ends = np.cumsum([stop - start for _, start, stop in pieces]).tolist()
    parts = ", ".join(f"{begin}-{end - 1}" for begin, end in zip([0, *ends], ends))
    yield f"Documents, kept separate, at positions {parts}" if separate else "Documents see each other"
    named = {f"view {i}": view for i, view in enumerate(views, 1)}
    blank = lambda word: " " * word.startswith(" ") + "_" * max(1, len(word.strip()))
    padding = lambda found: f" [padding x {len(found[0]) // len('|<MASK>|')}]"
    for name, masked in {"clean": torch.zeros_like(targets), **named}.items():
        words = "".join(blank(word) if m else word for word, m in zip(text, masked.tolist()))
        yield f"\n{name}:\n" + re.sub(r"(\|<MASK>\|)+", padding, words)
    first = int(targets.nonzero()[0]) // size * size
    yield f"\nThe block of positions {first}-{first + size - 1}; the output at i predicts the token at i + 1:"
    yield f"{'position':>8}  {'token':<16}" + "".join(f"{name:<17}" for name in named) + "predicted by"
    text = [word.replace("\n", "\\n") for word in text]
    for i in range(first, first + size):
        states = "".join(f"{'|<MASK>|' if masked[i] else text[i]:<17}" for masked in views)
        by = [f"output {i - 1} of {name}" for name, masked in named.items() if masked[i] and targets[i]]
        yield f"{i:>8}  {text[i]:<16}{states}{by[0] if by else '-'}"
    blocks = min(how.seq_len // size, 12)
    yield f"\nWhich block sees which ({blocks} of {how.seq_len // size}); a row is a query, a column a key:"
    names = [*named, "clean"]
    at = [part * how.seq_len + block * size for part in range(len(names)) for block in range(blocks)]
    firsts = torch.tensor(at)  # all positions of a block see the same blocks
    sees = visibility(how.seq_len, size, len(views), batch.documents, how.clean)
    mask = sees(0, None, firsts[:, None], firsts)
    yield " " * 9 + " ".join(f"{name:<{blocks}}" for name in names)
    for n, seen in enumerate(mask):
        cells = ("".join("#" if see else "." for see in part) for part in seen.view(-1, blocks).tolist())
        yield f"{names[n // blocks] if n % blocks == 0 else '':<9}{' '.join(cells)}"


# --- Command line ---

SHIPPED = Path(__file__).parent / "tiny"
FOLDER = click.Path(path_type=Path)
FILE = click.Path(exists=True, path_type=Path)
DIFFUSION = ("complement", "clean", "ar_weight", "lora")  # settings that only the adaptation has
COMMON = [f.name for f in fields(Training) if f.name not in DIFFUSION]
DTYPE_NAMES = click.Choice(["float32", "bfloat16", "float16"])


def take_preset(context: click.Context, _, name: str | None) -> None:
    context.default_map = (context.default_map or {}) | PRESETS.get(name, {})


run_options = several(
    click.option("--model", "folder", required=True, type=FOLDER, help="Checkpoint to start from."),
    click.option("--data", required=True, type=FILE, help="JSONL, or a folder of tokenised data."),
    click.option("--out", required=True, type=FOLDER, help="Folder of the result, checkpoints, metrics."),
    click.option("--heldout", type=FILE, help="Data to measure on, never to train on."),
    click.option(
        "--broken",
        type=click.Choice(["refuse", "skip"]),
        default="refuse",
        help="End the run at a broken line, or skip it.",
    ),
    click.option("--device", default="auto", help="auto, cpu, cuda or mps."),
    click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads  [default: torch's]"),
)
preset_option = click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    callback=take_preset,
    is_eager=True,
    expose_value=False,
    help="The paper's settings for a model of this size.",
)
model_options = several(
    click.option("--from-scratch", is_flag=True, help="Random weights; --model gives config and tokenizer."),
    click.option("--save-dtype", type=DTYPE_NAMES, default="float32", help="dtype of the result's file."),
)
sizes = click.IntRange(1, 10**6)
block_option = click.option("--block-size", type=sizes, help="[default: the checkpoint's, or 32]")


@click.group(help=__doc__.split("\n\n")[0], context_settings=HELP_OPTIONS)
def main():
    pass


def open_data(out: Path, run: dict, data: Path, heldout: Path | None, tokenizer: Tokenizer, broken: str):
    """Training and held-out data, tokenised by the first process after it has checked that the run may go on.

    Raises InputError for a folder with another run, and for data that cannot be used.
    """

    def prepare():
        content = Corpus.content(data, out / "tokens")
        same_run(out, {"content": content} | run)
        Corpus.prepare(data, tokenizer, out / "tokens", broken, content)
        if heldout:
            Corpus.prepare(heldout, tokenizer, out / "heldout", broken)

    first_process(prepare)
    there = lambda source, name: Corpus.open(source if source.is_dir() else out / name)
    return there(data, "tokens"), heldout and there(heldout, "heldout")


def lasting(how) -> dict:
    """Settings that may not change when a run is resumed."""
    free = "micro_batch parallel recompute reshard save_every keep eval_every eval_rows cache_gb int8".split()
    free += ["steps"] if getattr(how, "schedule", None) == "constant" else []
    return {name: value for name, value in asdict(how).items() if name not in free}


def mask_of(model: Qwen2, tokenizer: Tokenizer) -> int | None:
    """The mask token's id: the config's, else the tokenizer's."""
    known = model.config.mask_token_id
    return tokenizer.id("|<MASK>|") if known is None else known


def block_size_of(wanted: int | None, trained: int) -> int:
    """The diffusion block to adapt to: what was asked for, the checkpoint's, or the paper's 32."""
    return wanted or (trained if trained > 1 else 32)


@contextmanager
def one_run(device: str, threads: int | None, out: Path) -> Iterator[str]:
    """This process's device, for the only run that writes to `out`."""
    if threads:
        torch.set_num_threads(threads)
    with processes(device) as device, alone(out):
        yield device


def train(objective, folder, data, out, heldout, broken, device, threads, from_scratch, save_dtype, **how):
    """One run, in the only process or in one of those that `torchrun` started."""
    block_size = how.pop("block_size", None)
    require(block_size != 1, "--block-size 1 is autoregressive; `train.py ar` trains that.")
    how = Training(**how)
    with one_run(device, threads, out) as device:
        model, tokenizer = initial_model(folder, from_scratch, device, how.seed)
        size = 1
        if objective == "adapt":
            tokenizer = with_mask_token(tokenizer, model.config.vocab_size)
            size = block_size_of(block_size, model.config.block_size)
            other = model.config.block_size > 1 and model.config.clean != how.clean
            require(
                not other, f"{folder}: was adapted with --clean {model.config.clean}; adapt it with the same."
            )
        mask_id = mask_of(model, tokenizer)
        model.config = replace(model.config, block_size=size, mask_token_id=mask_id, clean=how.clean)
        run = {"objective": objective, "model": str(folder), "vocab_size": model.config.vocab_size}
        run |= {"block_size": size} | lasting(how)
        run |= {"base_digest": base_digest(model)} if how.lora else {}  # no checkpoint holds a frozen base
        corpus, unseen = open_data(out, run, data, heldout, tokenizer, broken)
        weights = {"ar": 1.0} if objective == "ar" else {"diffusion": 1.0, "ar": how.ar_weight}
        kinds = {kind: weight for kind, weight in weights.items() if weight}
        trainer = Trainer(kinds, model, corpus, unseen, how)
        trainer.run(out)
        save_result(out, trainer.objective, model, tokenizer, DTYPES[save_dtype])
        if rank() == 0:
            line = shlex.join(["python", "cli.py", "generate", "--model", str(out)])
            click.echo(f"The result is in {out}; try it: {line}", err=True)


@main.command(help="Ordinary next-token training, causal.")
@run_options
@model_options
@options(Training, *COMMON)
@reports_mistakes
def ar(**given):
    train("ar", **given)


@main.command(help="Make a block-diffusion model of an autoregressive one (paper, section 3).")
@run_options
@preset_option
@model_options
@block_option
@options(Training, *COMMON, *DIFFUSION)
@reports_mistakes
def adapt(**given):
    train("adapt", **given)


@main.command("draft")
@run_options
@options(Drafting, *(f.name for f in fields(Drafting)))
@click.option("--adapter", help="Go on from this adapter, with its rank and alpha  [default: a new one]")
@click.option("--base", help="The base's name in the adapter's config  [default: --model]")
@click.option("--dtype", type=DTYPE_NAMES, help="Of the base  [default: float32 on CPUs, else its own]")
@reports_mistakes
def draft_command(folder, data, heldout, out, broken, adapter, base, dtype, device, threads, **how):
    """Teach a frozen model to draft for --verify: an adapter, on at masks only.

    The best data are the model's own answers, since a draft is kept where it is what the model says:
    `cli.py generate --block-size 1 --input prompts.jsonl --output own.jsonl` writes them. Other texts work
    too.
    """
    how = Drafting(**how)
    with one_run(device, threads, out) as device:
        dtype = dtype or ("float32" if device == "cpu" else "auto")
        model, tokenizer = load(folder, device, dtype, adapter)
        require(tokenizer, f"{folder}: no tokenizer, so the data cannot be read.")
        if adapter:
            part = next(iter(adapted_layers(model).values())).adapter
            how = replace(how, rank=len(part.A), alpha=part.scale * len(part.A))
        tokenizer = with_mask_token(tokenizer, model.config.vocab_size)
        mask_id = mask_of(model, tokenizer)
        model.config = replace(model.config, mask_token_id=mask_id, draft_width=how.width)
        digest = base_digest(model)
        run = {"objective": "draft", "base_digest": digest, "dtype": str(model.weight.dtype)}
        run |= {"adapter": adapter} | lasting(how)
        corpus, unseen = open_data(out, run, data, heldout, tokenizer, broken)
        room = model.config.max_position_embeddings
        for source, there in ((data, corpus), (heldout, unseen)):
            longest = int(there.lengths.max()) if there else 0
            require(
                longest <= room, f"{source}: a document has {longest} tokens, the model {room} positions."
            )
        trainer = DraftTrainer(model, corpus, unseen, how)
        trainer.run(out)
        if rank() == 0:
            trainer.objective.lend(model)
            save_adapter(model, out, how.alpha, base or str(folder), digest)
            line = shlex.join(["--model", str(folder), "--adapter", str(out), "--verify"])
            click.echo(f"The adapter is in {out}; try it: python cli.py generate {line}", err=True)
        wait_for_all()


@main.command("show", help="Print a packed, masked example: views, which output predicts what, the mask.")
@click.option("--model", "folder", default=SHIPPED / "checkpoint", type=FOLDER, help="Tokenizer's folder.")
@click.option("--data", default=SHIPPED / "sample.jsonl", type=FILE, help="JSONL.")
@click.option("--row", default=0, type=click.IntRange(0, 10**6), help="Of the first 500 documents, packed.")
@block_option
@options(Training, "seq_len", "packing", "complement", "clean", "seed", seq_len={"default": 192})
@reports_mistakes
def show_command(folder, data, row, block_size, **how):
    how = Training(**how)
    tokenizer = load_tokenizer(folder)
    config = read_config(folder, tokenizer)
    tokenizer = with_mask_token(tokenizer, config.vocab_size)
    size = block_size_of(block_size, config.block_size)
    check_length(how.seq_len, size, config.max_position_embeddings)
    documents = list(islice(read_documents(data, tokenizer, "skip"), 500))  # enough to fill rows
    require(documents, f"{data}: holds no documents.")
    offsets = np.cumsum([0, *(len(tokens) for tokens, _ in documents)])
    tokens, trainable = (np.concatenate(column) for column in zip(*documents))
    corpus = Corpus(tokens, trainable, offsets)
    for line in show(corpus, tokenizer, size, how, row):
        click.echo(line)


if __name__ == "__main__":
    main()
