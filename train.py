"""Turn an autoregressive Qwen2 into a block-diffusion model: the training recipe of Fast-dLLM v2 (paper, section 3).

    python train.py show                                                        # a packed, masked example, to be read
    python train.py ar --model FOLDER --data problems.jsonl --out parent        # ordinary next-token training
    python train.py adapt --model parent --data problems.jsonl --out adapted    # complementary masks and token shift
    torchrun --nproc-per-node 8 train.py adapt --preset 1.5b --model ... --data ... --out ...   # on several devices

Data is JSONL with `messages` (or `question` and `answer`; trainable is what the assistant wrote) or `text`. A run that
was stopped, however it was, goes on from its last checkpoint when it is started again with the same command.

Shapes: B rows, L positions of a row, T positions of an input, N targets, D hidden size. A row is packed with whole
documents. An input is the noisy views of a row followed by its clean copy, [view 1 ; view 2 ; clean], T = 3L.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cache, partial, wraps
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from fastdllm import (
    DTYPES,
    InputError,
    Qwen2,
    Tokenizer,
    load,
    load_tokenizer,
    pick_device,
    read_config,
    read_json,
    replace_file,
    require,
    round_up,
    save,
)

# --- Mask ---


def visibility(length: int, block_size: int, views: int, documents: Tensor | None = None) -> Callable:
    """The mask's one definition: `sees(row, head, query, key)` of indices in [noisy views ; clean] (paper, section 3).

    A noisy query sees its own block of its own view, and the clean blocks before it; a clean query sees the clean
    blocks up to its own; nothing clean sees anything noisy. With `documents` (B, L), numbers that differ between the
    documents of a row, nothing sees another document. Without noisy views and with block size 1 it is the causal mask.
    """

    def sees(row, head, query, key):
        query_part, query_at, key_part, key_at = query // length, query % length, key // length, key % length
        query_block, key_block = query_at // block_size, key_at // block_size
        own_block = (query_part == key_part) & (query_block == key_block)
        earlier_clean = (key_part == views) & (query_block > key_block)
        seen = own_block | earlier_clean
        return seen if documents is None else seen & (documents[row, query_at] == documents[row, key_at])

    return sees


def training_mask(
    length: int, block_size: int, views: int = 1, documents: Tensor | None = None, device: str | None = None
) -> Tensor:
    """`visibility` written out, bool, (side, side) or with documents (B, side, side); side is (views + 1) * length."""
    index = torch.arange((views + 1) * length, device=device)
    row = None if documents is None else torch.arange(len(documents), device=device)[:, None, None]
    return visibility(length, block_size, views, documents)(row, None, index[:, None], index)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attention` written out; mask (B or 1, T, S). On CPUs its bfloat16 backward is 5 times as fast as the kernel."""
    B, H, T, d = q.shape
    K = k.shape[1]  # query heads of one key head are more rows of the same product
    scores = ((q * d**-0.5).reshape(B, K, -1, d) @ k.transpose(2, 3)).float()
    if mask is not None:
        scores = scores.view(B, K, -1, *mask.shape[1:]).masked_fill(~mask[:, None, None], -torch.inf).view_as(scores)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).reshape(B, H, T, d)


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, length: int, block_size: int, views: int
) -> Tensor:
    """What `training_mask` allows, computed block by block, so that hardly a query meets a key that it may not see.

    `seen` (B or 1, L, L) is the clean copy's own mask, None where blocks alone decide: a noisy query sees what a clean
    one sees, with its own view's block in place of the clean one. With n blocks it does about
    (n + 1) / (2 n) / (views + 1) of the dense mask's work.
    """
    fold = lambda x: x[:, :, :-length].unflatten(2, (views, length)).transpose(1, 2).flatten(0, 1)  # views into rows
    noisy_q, noisy_k, noisy_v = (fold(x) if views else None for x in (q, k, v))  # (B * views, heads, L, d)
    clean_q, clean_k, clean_v = (x[:, :, -length:] for x in (q, k, v))
    noisy, clean = [], []
    for start in range(0, length, block_size):
        own, end = slice(start, start + block_size), start + block_size
        mask = None if seen is None else seen[:, own, :end]
        clean.append(plain_attention(clean_q[:, :, own], clean_k[:, :, :end], clean_v[:, :, :end], mask))
        if views:
            keys, values = (
                torch.cat([whole[:, :, :start].repeat_interleave(views, dim=0), part[:, :, own]], dim=2)
                for part, whole in ((noisy_k, clean_k), (noisy_v, clean_v))
            )
            mask = None if mask is None else mask.repeat_interleave(views, dim=0) if len(mask) > 1 else mask
            noisy.append(plain_attention(noisy_q[:, :, own], keys, values, mask))
    if views:
        clean.insert(0, torch.cat(noisy, dim=2).unflatten(0, (-1, views)).transpose(1, 2).flatten(2, 3))
    return torch.cat(clean, dim=2)


@cache
def compiled_flex() -> Callable:
    """One kernel for each shape; with and without gradients, views, and the last batch's rows make a dozen of them."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_mask) -> Tensor:
    """FlexAttention: tiles of the mask in which nothing is seen are skipped."""
    kernel = compiled_flex() if q.is_cuda else flex_attention  # not compiled it is a dense reference
    return kernel(q.to(v.dtype), k.to(v.dtype), v, block_mask=block_mask, enable_gqa=True)


def sparse_mask(length: int, block_size: int, views: int, documents: Tensor | None, device: torch.device) -> BlockMask:
    """`visibility` for FlexAttention: the tiles that are seen in part, and those that are seen as a whole.

    They are found one row of tiles at a time: torch's own function writes out the mask of all queries and keys.
    """
    sees, side, tile = visibility(length, block_size, views, documents), (views + 1) * length, 128
    row = None if documents is None else torch.arange(len(documents), device=device)[:, None, None]
    index, tiles = torch.arange(side, device=device), -(-side // tile)
    some, every = [], []
    for queries in index.split(tile):
        seen = sees(row, None, queries[:, None], index).view(-1, len(queries), side)
        seen = F.pad(seen, (0, tiles * tile - side, 0, tile - len(queries))).unflatten(2, (tiles, tile))
        some.append(seen.any(3).any(1))
        every.append(seen.all(3).all(1))
    some, every = (torch.stack(rows, dim=1)[:, None] for rows in (some, every))  # (B or 1, 1, tiles, tiles)
    order = partial(torch.argsort, descending=True, stable=True)  # those that are, then those that are not
    listed = lambda which: (which.sum(-1, dtype=torch.int32), order(which.int()).int())
    return BlockMask.from_kv_blocks(
        *listed(some & ~every), *listed(every), BLOCK_SIZE=tile, mask_mod=sees, seq_lengths=(side, side)
    )


def training_attention(
    kind: str, length: int, block_size: int, views: int, documents: Tensor | None, device: torch.device
) -> Tensor | Callable:
    """The mask argument of `Qwen2.forward`: what `visibility` says, in one of three ways.

    dense: one masked product, the reference; blockwise: written out block by block, fast on CPUs; sparse:
    FlexAttention, fast on CUDA; auto: the fast one.
    """
    if kind == "auto":
        kind = {"cpu": "blockwise", "cuda": "sparse"}.get(device.type, "dense")
    if kind == "sparse":
        return partial(sparse_attention, block_mask=sparse_mask(length, block_size, views, documents, device))
    dense = partial(training_mask, length, block_size, documents=documents, device=device)
    if kind == "dense":
        return dense(views).view(-1, 1, (views + 1) * length, (views + 1) * length)
    chunk = block_size if views else max(block_size, min(length, 32))  # without views blocks matter to the mask alone
    chunk = chunk if length % chunk == 0 else length
    seen = None if documents is None and chunk == block_size else dense(0).view(-1, length, length)
    return partial(blockwise_attention, seen=seen, length=length, block_size=chunk, views=views)


# --- Noise ---


def complementary_noise(trainable: Tensor, block_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Which trainable positions (B, L) view 1 masks; view 2 masks the others, so that each is a target exactly once.

    Per block t ~ U[0, 1), and a position is masked with probability 0.999 t + 0.001.
    """
    B, L = trainable.shape
    t = torch.rand(B, L // block_size, generator=generator).repeat_interleave(block_size, dim=1)
    u = torch.rand(B, L, generator=generator)
    return trainable & (u < 0.999 * t + 0.001).to(trainable.device)


# --- Loss ---


def positions_of(documents: Tensor) -> Tensor:
    """Positions (B, L) that start at 0 in each document of a row."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - (index * first).cummax(dim=1).values


def targets_of(trainable: Tensor, documents: Tensor | None) -> Tensor:
    """Which positions (B, L) have an output before them that may answer for them: not the first of a document."""
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
) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and the tokens (N) they answer for: the outputs before the masked positions of all views."""
    size, mask_id = block_size or model.config.block_size, model.config.mask_token_id
    B, L = tokens.shape
    require(mask_id is not None, "The model has no mask token; give its config a mask_token_id inside the embedding.")
    ok = L % size == 0
    require(ok, f"The rows have {L} positions, no multiple of the block size {size}; pad them with masks.")
    views = torch.stack([masked, trainable & ~masked] if complement else [masked], dim=1)  # (B, views, L)
    noisy = tokens[:, None].masked_fill(views, mask_id).flatten(1)  # (B, views * L)
    index = torch.arange(L, device=tokens.device)[None] if documents is None else positions_of(documents)
    count = views.shape[1]
    mask = training_attention(attention, L, size, count, documents, tokens.device)
    hidden = model(torch.cat([noisy, tokens], dim=1), index.repeat(1, count + 1), mask)
    # token shift: the output at i answers for the token at i + 1
    wanted = (views & targets_of(trainable, documents)[:, None])[:, :, 1:]
    rows = hidden[:, : count * L].unflatten(1, (count, L))[:, :, :-1][wanted]
    return rows, tokens[:, None].expand_as(views)[:, :, 1:][wanted]


def causal_outputs(
    model: Qwen2, tokens: Tensor, trainable: Tensor, documents: Tensor | None = None, attention: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and the tokens (N) they answer for, of ordinary next-token prediction."""
    index = torch.arange(tokens.shape[1], device=tokens.device)[None] if documents is None else positions_of(documents)
    mask = training_attention(attention, tokens.shape[1], 1, 0, documents, tokens.device)
    wanted = targets_of(trainable, documents)[:, 1:]
    return model(tokens, index, mask)[:, :-1][wanted], tokens[:, 1:][wanted]


def score(model: Qwen2, hidden: Tensor, targets: Tensor, largest: int = 2**26) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies in float32, and number of right guesses, of hidden (N, D) against token ids (N).

    Only target rows reach the head, and never more than `largest` logits are there at once: where that takes several
    chunks, the backward pass computes each anew.
    """

    def chunk(hidden, targets):
        logits = model.logits(hidden).float()
        return F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()

    rows = max(1, largest // model.config.vocab_size)
    if len(targets) <= rows:
        return chunk(hidden, targets)
    parts = [checkpoint(chunk, *part, use_reentrant=False) for part in zip(hidden.split(rows), targets.split(rows))]
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

    tokens (B, L) and trainable (B, L) bool, L a multiple of the block size (default: the checkpoint's). Output i
    predicts the token at i + 1 where that is masked, so a document's first position is never a target; the sum over
    both views is divided by the number of targets. `masked` (B, L) bool fixes what view 1 masks, which is drawn
    otherwise; `documents` (B, L) numbers the documents of a row, which begin on block boundaries and know nothing of
    each other (default: one); without `complement` there is no view 2. One clean copy serves both views, so a row costs
    3L tokens. Inputs are left as they are. Raises InputError for a length that is no multiple of the block, or a model
    without a mask token.
    """
    size = block_size or model.config.block_size
    if masked is None and tokens.shape[1] % size == 0:
        masked = complementary_noise(trainable, size)
    masked = trainable if masked is None else masked & trainable
    outputs = diffusion_outputs(model, tokens, trainable, masked, documents, size, complement, attention)
    return score(model, *outputs)[0] / max(len(outputs[1]), 1)


def causal_loss(model: Qwen2, tokens: Tensor, trainable: Tensor, documents: Tensor | None = None) -> Tensor:
    """Mean next-token cross entropy over the trainable tokens, a scalar; arguments as in `training_loss`."""
    outputs = causal_outputs(model, tokens, trainable, documents)
    return score(model, *outputs)[0] / max(len(outputs[1]), 1)


# --- Data ---


def chat_document(messages: list[dict], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """ChatML of a conversation through its last answer; trainable is what the assistant wrote, with end and newline.

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
    """Token ids and which of them are trainable, of each line of a JSONL file; `progress` is told each line's bytes.

    A broken line raises InputError naming it, or where `broken` is "skip", is named on standard error and left out.
    """
    mask = tokenizer.id("|<MASK>|")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            progress(len(line))
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if "text" in record:
                    tokens = tokenizer.encode(record["text"]) + [tokenizer.id("<|endoftext|>")]
                    tokens = tokens if tokens[-1] is not None else tokens[:-1]
                    document = tokens, [True] * len(tokens)
                else:
                    roles = ("user", "question"), ("assistant", "answer")
                    messages = record.get("messages") or [{"role": r, "content": record[key]} for r, key in roles]
                    document = chat_document(messages, tokenizer)
                require(any(document[1]), "nothing of it is an assistant's, so nothing trains")
                require(mask not in document[0], "it holds the mask token, which only training may write")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = error if isinstance(error, InputError) else f"no JSON object with messages or text ({error!r})"
                require(broken == "skip", f"{path}, line {number}: {reason}; --broken skip leaves such lines out.")
                print(f"{path}, line {number}: {reason}; skipped", file=sys.stderr)
                continue
            yield document


class Corpus:
    """Tokenised documents: all tokens in a row, which of them are trainable, and where each document begins."""

    def __init__(self, tokens: np.ndarray, trainable: np.ndarray, offsets: np.ndarray):
        self.tokens, self.trainable, self.offsets = tokens, trainable, offsets

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """From files that stay on disk, mapped into memory."""
        mapped = partial(np.memmap, mode="r")
        tokens = mapped(folder / "tokens.bin", dtype=json.loads((folder / "meta.json").read_text())["dtype"])
        corpus = cls(tokens, mapped(folder / "trainable.bin", dtype=bool), np.load(folder / "offsets.npy"))
        whole = corpus.offsets[-1] == len(corpus.tokens) == len(corpus.trainable)
        require(whole, f"{folder}: its files do not belong together; remove it, and it is made anew.")
        return corpus

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def piece(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trainable of [start, stop) of a document, or of as much of it as there is."""
        low, end = self.offsets[document : document + 2]
        where = slice(low + start, min(low + stop, end))
        return self.tokens[where], self.trainable[where]

    @classmethod
    def prepare(cls, data: Path, tokenizer: Tokenizer, folder: Path, broken: str = "refuse") -> "Corpus":
        """Of a folder that was prepared before, or of a JSONL file, tokenised into `folder` unless that was done.

        Raises InputError for broken lines, for data without documents, and for tokens of another tokenizer.
        """
        name = hashlib.sha256(f"{tokenizer.system} {tokenizer.encoder.to_str()}".encode()).hexdigest()[:16]
        if data.is_dir():
            meta = read_json(data / "meta.json")
            same = meta.get("tokenizer") == name
            require(same, f"{data}: was not tokenised with this tokenizer; give its JSONL file.")
            return cls.open(data)
        status, dtype = data.stat(), "uint16" if len(tokenizer) <= 2**16 else "uint32"
        made_of = {"source": str(data.resolve()), "bytes": status.st_size, "changed": status.st_mtime_ns}
        made_of |= {"tokenizer": name, "dtype": dtype, "broken": broken}
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

PACKINGS = {
    "documents": "padded to whole blocks, whole where they fit, and kept apart",
    "original": "padded, always by at least one token, cut where a row ends, and seen by each other",
    "concatenated": "the same without padding",
}
Piece = tuple[int, int, int]  # a document, and [start, stop) of it; what lies beyond its end is padding


def pack(
    lengths: np.ndarray, seq_len: int, block_size: int, packing: str, rng: np.random.Generator
) -> list[list[Piece]]:
    """Each document once, in rows of at most `seq_len` positions, in a random order; see PACKINGS for the ways.

    "documents" puts each document into the fullest row that has room for it; only one that is longer than a row is
    cut, into rows of its own. The other two drop the last, incomplete row.
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
        require(rows, f"The data does not fill one row of {how[0]} positions; give more of it, or a lower --seq-len.")
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
        parts = [(x.split(rows) if x is not None else None) for x in (getattr(self, f.name) for f in fields(self))]
        return [Batch(*(p[i] if p else None for p in parts)) for i in range(len(parts[0]))]


def lay_out(corpus: Corpus, rows: list[list[Piece]], seq_len: int, pad: int, apart: bool) -> Batch:
    """The rows' tokens; what no document fills is padding, which does not train."""
    shape = len(rows), seq_len
    tokens, trainable, documents = np.full(shape, pad, np.int64), np.zeros(shape, bool), np.zeros(shape, np.int32)
    for r, row in enumerate(rows):
        at = 0
        for number, (document, start, stop) in enumerate(row, 1):
            ids, flags = corpus.piece(document, start, stop)
            tokens[r, at : at + len(ids)], trainable[r, at : at + len(ids)] = ids, flags
            documents[r, at : at + stop - start] = number
            at += stop - start
    tensors = map(torch.from_numpy, (tokens, trainable, documents))
    return Batch(*tensors) if apart else Batch(*islice(tensors, 2), None)


def draw_noise(batch: Batch, block_size: int, *seeds: list[int]) -> None:
    """View 1's masks, each row's from seeds of its own, so that they do not depend on who runs the row."""
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
    """Have the first process do something that the others wait for; a mistake it finds is everyone's."""
    problem = [None]
    if rank() == 0:
        try:
            work()
        except (InputError, OSError) as error:
            problem = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(problem)
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
    # the others wait while the first one tokenises
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=24))
    try:
        yield device
    finally:
        dist.destroy_process_group()


class Objective(nn.Module):
    """Model and losses as one module: its forward pass is all that has gradients, as DDP and FSDP ask for."""

    def __init__(self, model: Qwen2, complement: bool, compute: torch.dtype):
        super().__init__()
        self.model, self.complement, self.compute = model, complement, compute

    def forward(self, kind: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropies, and number of right guesses; kind is diffusion or ar."""
        model, data = self.model, (batch.tokens, batch.trainable)
        with torch.autocast(batch.tokens.device.type, self.compute, enabled=self.compute != torch.float32):
            if kind == "ar":
                hidden, targets = causal_outputs(model, *data, batch.documents)
            else:
                hidden, targets = diffusion_outputs(
                    model, *data, batch.masked, batch.documents, complement=self.complement
                )
            return score(model, hidden, targets)


def distribute(objective: Objective, parallel: str, recompute: bool) -> nn.Module:
    """As each process runs it: DDP, each with all weights, or FSDP2, each with its share of weights and optimiser.

    Weights are float32 from here on. `recompute` keeps only the layers' inputs for the backward pass. What lies between
    the matrix products, the residual stream above all, is in the compute dtype under FSDP2, which sends the weights
    around in it, and in float32 otherwise.
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
        # otherwise it groups gradients anew after the first step, and a run that was resumed adds in another order
        return DistributedDataParallel(objective, find_unused_parameters=True)
    return objective


# --- Checkpoints ---

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is as it should be


def checkpoints(out: Path) -> list[Path]:
    """Finished ones, the oldest first."""
    return sorted((out / "checkpoints").glob("step-*"))


def last_good(out: Path) -> str:
    there = checkpoints(out)
    return f"the last good one is {there[-1]}" if there else "there is none yet"


def last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


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


def save_checkpoint(out: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, step: int, keep: int) -> None:
    """Written beside its place and renamed, so that each one there is is whole; then all but the last `keep` go.

    Raises InputError where it cannot be written; those that are there stay.
    """
    place = out / "checkpoints" / f"step-{step:07d}"
    part = place.with_name(f".{place.name}.tmp")
    weights, state = get_state_dict(objective, optimizer)
    try:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        wait_for_all()
        whole = {"model": weights, "optimizer": state, "step": step}
        dcp.save(whole, checkpoint_id=part, no_dist=not dist.is_initialized())
        if rank() == 0:
            os.replace(part, place)
            for old in checkpoints(out)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        wait_for_all()
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise InputError(f"{place}: the checkpoint cannot be written ({last_line(error)}); {last_good(out)}.") from None


def load_checkpoint(out: Path, objective: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Take up the last checkpoint, on any number of processes; the step it was written after, or 0."""
    if not (there := checkpoints(out)):
        return 0
    weights, state = get_state_dict(objective, optimizer)
    whole = {"model": weights, "optimizer": state, "step": 0}
    try:
        dcp.load(whole, checkpoint_id=there[-1], no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        raise InputError(
            f"{there[-1]}: the checkpoint cannot be read ({last_line(error)}); remove it to go on from the one before."
        ) from None
    set_state_dict(objective, optimizer, model_state_dict=whole["model"], optim_state_dict=whole["optimizer"])
    return whole["step"]


def save_result(out: Path, objective: nn.Module, model: Qwen2, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """The model as a folder that `load` reads, whatever it is spread over."""
    everything = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(objective, options=everything)
    if rank() == 0:
        with torch.device("meta"):
            whole = Qwen2(model.config)
        whole.load_state_dict({k.removeprefix("model."): w.to(dtype) for k, w in weights.items()}, assign=True)
        whole.tie()
        save(whole, tokenizer, out)
    wait_for_all()


# --- Training ---


@dataclass(frozen=True)
class Training:
    """How to train; batch, length, rate, steps, warm-up, schedule and noise are the paper's, which names no others."""

    steps: int = 6000
    batch_size: int = 256  # rows a step, of all devices together
    seq_len: int = 2048  # positions of a row
    micro_batch: int = 1  # rows a device runs at once; the gradient is the whole batch's, whatever it is
    lr: float = 2e-5  # peak
    warmup: int = 500  # steps
    schedule: str = "constant"  # after the warm-up; or cosine, down to 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW, as is usual for language models
    clip: float = 1.0  # largest gradient norm
    ar_weight: float = 0.0  # of a causal loss beside the diffusion loss
    complement: bool = True  # train on view 2 as well
    packing: str = "documents"
    compute: str = "bfloat16"  # of products and activations; weights and optimiser are float32
    parallel: str = "auto"  # ddp or fsdp; auto: fsdp from a billion parameters on
    recompute: bool = False  # keep only the layers' inputs for the backward pass
    seed: int = 0
    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # checkpoints
    eval_every: int = 200  # steps between looks at held-out data
    eval_rows: int = 64  # of it

    def learning_rate(self, step: int) -> float:
        """Linear warm-up from 0, then constant, or a cosine that would be 0 a step after the last."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


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
                out = name.endswith(("o_proj.weight", "down_proj.weight"))  # two additions to the residual a layer
                torch.nn.init.normal_(p, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if out else 0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)
        model.to(device)
    require(tokenizer, f"{folder}: no tokenizer, so the data cannot be read.")
    return model.train(), tokenizer


def with_mask_token(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """A tokenizer that knows `|<MASK>|`, under its first free id: 151665 in Qwen2.5, whose embedding has that row.

    Raises InputError where the embedding has not so many `rows`.
    """
    if tokenizer.id("|<MASK>|") is not None:
        return tokenizer
    new, files = len(tokenizer), dict(tokenizer.files)
    require(new < rows, f"The mask token would be id {new}, outside the embedding of {rows} rows; add a row to it.")
    token = {"content": "|<MASK>|", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    token["special"] = True
    edit = lambda name, change: files.update({name: json.dumps(change(json.loads(files[name])), indent=2).encode()})
    if "tokenizer.json" in files:
        edit("tokenizer.json", lambda t: t | {"added_tokens": [*t.get("added_tokens", []), {"id": new} | token]})
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"][str(new)] = token
        files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
    if "added_tokens.json" in files:
        edit("added_tokens.json", lambda names: names | {"|<MASK>|": new})
    elif "tokenizer.json" not in files and "added_tokens_decoder" not in settings:
        files["added_tokens.json"] = json.dumps({"|<MASK>|": new}).encode()
    tokenizer.encoder.add_special_tokens([AddedToken("|<MASK>|", normalized=False)])
    return Tokenizer(tokenizer.encoder, tokenizer.system, files)


class Trainer:
    """A model, its data, and how to train it."""

    def __init__(self, kinds: dict[str, float], model: Qwen2, corpus: Corpus, heldout: Corpus | None, how: Training):
        self.kinds, self.how = kinds, how  # kind of loss -> its weight
        self.corpus, self.heldout = corpus, heldout
        self.size = model.config.block_size
        self.pad = model.config.mask_token_id or 0
        self.device = model.lm_head.weight.device
        ok = how.seq_len % self.size == 0
        require(ok, f"--seq-len {how.seq_len} is no multiple of the block size {self.size}.")
        share = world_size() * how.micro_batch
        ok = how.batch_size % share == 0
        parts = f"{world_size()} processes x --micro-batch {how.micro_batch}"
        require(ok, f"--batch-size {how.batch_size} is no multiple of {share}, {parts}.")
        parameters = sum(p.numel() for p in model.parameters())
        parallel = how.parallel if how.parallel != "auto" else "fsdp" if parameters > 1e9 else "ddp"
        objective = Objective(model, how.complement, DTYPES[how.compute])
        self.objective = distribute(objective, parallel, how.recompute)
        decayed = [p for p in model.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": how.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=how.betas, fused=True)
        if heldout:
            rows = list(islice(self.rows(heldout, 0), round_up(how.eval_rows, share)))
            self.looked_at = self.batch(heldout, rows, 0, 0)

    def rows(self, corpus: Corpus, seed: int) -> Iterator[list[Piece]]:
        return endless_rows(corpus.lengths, self.how.seq_len, self.size, self.how.packing, seed=seed)

    def batch(self, corpus: Corpus, rows: list[list[Piece]], step: int, seed: int) -> Batch:
        """This process's share of a step's rows."""
        mine = range(rank(), len(rows), world_size())
        apart = self.how.packing == "documents"
        batch = lay_out(corpus, [rows[i] for i in mine], self.how.seq_len, self.pad, apart)
        draw_noise(batch, self.size, *([seed, step, i] for i in mine))
        return batch

    def target_counts(self, batch: Batch) -> dict[str, float]:
        """Targets of each kind of loss in all processes' shares: what the sums are divided by."""
        masked = batch.trainable if self.how.complement else batch.masked
        flags = {"ar": batch.trainable, "diffusion": masked}
        counts = [targets_of(flags[kind], batch.documents).sum().item() for kind in self.kinds]
        return dict(zip(self.kinds, total(counts, self.device)))

    def step(self, batch: Batch, backward: bool = True) -> dict[str, float]:
        """Gradients of one step, as if all its rows had run at once; loss and accuracy of each kind."""
        counts, sums = self.target_counts(batch), {kind: [0.0, 0.0] for kind in self.kinds}
        parts = [part.to(self.device) for part in batch.split(self.how.micro_batch)]
        runs = [(kind, part) for part in parts for kind in self.kinds]
        ddp = isinstance(self.objective, DistributedDataParallel)
        for i, (kind, part) in enumerate(runs):
            with self.objective.no_sync() if ddp and i + 1 < len(runs) else nullcontext():
                loss, right = self.objective(kind, part)
                if backward:  # DDP and FSDP average over processes, the loss is a sum over them
                    (loss * self.kinds[kind] * world_size() / max(1, counts[kind])).backward()
            sums[kind] = [sums[kind][0] + loss.detach(), sums[kind][1] + right]
        flat = total([float(value) for kind in self.kinds for value in sums[kind]], self.device)
        names = [(kind, name) for kind in self.kinds for name in ("loss", "accuracy")]
        return {f"{kind}_{name}": value / max(1, counts[kind]) for (kind, name), value in zip(names, flat)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on held-out rows, always the same ones with the same noise."""
        return {f"heldout_{name}": value for name, value in self.step(self.looked_at, backward=False).items()}

    def run(self, out: Path) -> None:
        """Train to the last step, from the last checkpoint in `out` if there is one.

        A step depends on seed and step number alone. Raises InputError when the loss is no number any more.
        """
        how, log = self.how, out / "metrics.jsonl"
        done = load_checkpoint(out, self.objective, self.optimizer)
        if rank() == 0:  # what was logged after the checkpoint is run again
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            replace_file(log, partial(Path.write_text, data="".join(lines[:done])))
        order = self.rows(self.corpus, how.seed)
        for _ in range(done * how.batch_size):
            next(order)
        bar = tqdm(total=how.steps, initial=done, unit="step", disable=rank() > 0)
        with open(log if rank() == 0 else os.devnull, "a", buffering=1) as file, bar:
            for step in range(done, how.steps):
                began = time.perf_counter()
                rows = list(islice(order, how.batch_size))
                losses = self.step(self.batch(self.corpus, rows, step, how.seed))
                norm = nn.utils.clip_grad_norm_(self.objective.parameters(), how.clip)
                norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
                if not all(map(math.isfinite, (norm, *losses.values()))):
                    documents = sorted({document for row in rows for document, _, _ in row})
                    some = ", ".join(map(str, documents[:8])) + (", ..." if len(documents) > 8 else "")
                    raise InputError(
                        f"step {step + 1}: the loss is no number any more ({losses}, gradient norm {norm}); its batch "
                        f"holds documents {some} (of the tokenised data, from 0). Of checkpoints, {last_good(out)}; a "
                        "lower --lr may help."
                    )
                for group in self.optimizer.param_groups:
                    group["lr"] = how.learning_rate(step)
                self.optimizer.step()
                self.optimizer.zero_grad()
                seconds = time.perf_counter() - began
                record = {"step": step + 1, "tokens": how.batch_size * how.seq_len, **losses, "grad_norm": norm}
                record |= {"lr": how.learning_rate(step), "seconds": round(seconds, 4)}
                last = step + 1 == how.steps
                if self.heldout and ((step + 1) % how.eval_every == 0 or last):
                    record |= self.evaluate()
                try:
                    file.write(json.dumps(record) + "\n")
                except OSError as error:
                    raise InputError(f"{log}: cannot be written ({error.strerror}); {last_good(out)}.") from None
                bar.update()
                shown = {name: f"{value:.3f}" for name, value in record.items() if name.endswith("loss")}
                bar.set_postfix(shown | {"tokens/s": f"{record['tokens'] / seconds:,.0f}"}, refresh=False)
                if (step + 1) % how.save_every == 0 or last:
                    file.flush()
                    save_checkpoint(out, self.objective, self.optimizer, step + 1, how.keep)


# --- Show ---


def show(corpus: Corpus, tokenizer: Tokenizer, size: int, how: Training, row: int) -> Iterator[str]:
    """Lines that show a packed row to a person: its views, which output answers for which token, and its mask."""
    apart = how.packing == "documents"
    rows = endless_rows(corpus.lengths, how.seq_len, size, how.packing, seed=how.seed)
    batch = lay_out(corpus, [next(islice(rows, row, None))], how.seq_len, tokenizer.id("|<MASK>|"), apart)
    require(batch.trainable.any(), f"Row {row} has nothing that trains; show another --row.")
    draw_noise(batch, size, [how.seed, 0, row])
    views = [batch.masked[0], (batch.trainable & ~batch.masked)[0]][: 1 + how.complement]
    targets = targets_of(batch.trainable, batch.documents)[0]
    text = [tokenizer.decode([i], skip_special_tokens=False).replace("\n", "\\n") for i in batch.tokens[0].tolist()]
    documents = [0] * how.seq_len if batch.documents is None else batch.documents[0].tolist()
    parts = [f"{documents.index(d)}-{how.seq_len - 1 - documents[::-1].index(d)}" for d in sorted(set(documents)) if d]
    yield f"Row {row}: {how.seq_len} positions in blocks of {size}, {targets.sum()} targets"
    yield f"Documents, kept apart, at positions {', '.join(parts)}" if apart else "Documents see each other"
    for name, masked in [("clean", torch.zeros_like(views[0])), *((f"view {i}", v) for i, v in enumerate(views, 1))]:
        yield f"\n{name}:"
        words = ["_" * max(1, len(word.strip())) if m else word for word, m in zip(text, masked.tolist())]
        words = [" " + word if m and full[:1] == " " else word for word, full, m in zip(words, text, masked.tolist())]
        yield "".join(words).replace("\\n", "\n").replace("|<MASK>|", "~")
    first = int(targets.nonzero()[0]) // size * size
    yield f"\nThe block of positions {first}-{first + size - 1}; the output at i answers for position i + 1:"
    yield f"{'position':>8}  {'token':<16}" + "".join(f"view {i:<12}" for i in range(1, 1 + len(views))) + "answered by"
    for i in range(first, first + size):
        states = "".join(f"{'|<MASK>|' if masked[i] else text[i]:<17}" for masked in views)
        by = [f"output {i - 1} of view {n}" for n, masked in enumerate(views, 1) if masked[i] and targets[i]]
        yield f"{i:>8}  {text[i]:<16}{states}{by[0] if by else '-'}"
    blocks = min(how.seq_len // size, 12)
    yield f"\nWho sees whom, block by block ({blocks} of {how.seq_len // size}); a row is a query, a column a key:"
    at = [part * how.seq_len + block * size for part in range(1 + len(views)) for block in range(blocks)]
    first_of = torch.tensor(at)  # a block's first position sees what all of it see
    mask = visibility(how.seq_len, size, len(views), batch.documents)(0, None, first_of[:, None], first_of)
    names = [*(f"view {i}" for i in range(1, 1 + len(views))), "clean"]
    yield " " * 9 + " ".join(f"{name:<{blocks}}" for name in names)
    for n in range(len(at)):
        seen = "".join((" " * (k % blocks == 0 < k)) + ".#"[mask[n, k]] for k in range(len(at)))
        yield f"{names[n // blocks] if n % blocks == 0 else '':<9}{seen}"


# --- Command line ---

POSITIVE = click.IntRange(1)
FOLDER = click.Path(path_type=Path)
SHIPPED = Path(__file__).parent / "tiny"


def option(name: str, help: str | None = None, **more) -> Callable:
    """A field of `Training` as an option."""
    default = getattr(Training, name)
    flag = "--" + name.replace("_", "-")
    if type(default) is bool:
        flag += f"/--no-{flag[2:]}"
    elif type(default) is int:
        more = {"type": click.IntRange(0 if name in ("warmup", "seed") else 1)} | more
    elif type(default) is float:
        more = {"type": click.FloatRange(0, min_open=name == "clip")} | more
    return click.option(flag, default=default, show_default=True, help=help, **more)


def options(*decorators: Callable) -> Callable:
    """Several options as one decorator."""
    return lambda command: [command := decorate(command) for decorate in reversed(decorators)][-1]


def sentences(command: Callable) -> Callable:
    """A user's mistake becomes one sentence and exit code 2."""

    @wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (InputError, OSError) as error:
            mistake = click.ClickException(str(error))
        except torch.OutOfMemoryError:
            mistake = click.ClickException("The device's memory is full; --micro-batch 1 and --recompute need less.")
        mistake.exit_code = 2
        raise mistake

    return run


def take_preset(context: click.Context, _, name: str | None) -> None:
    context.default_map = (context.default_map or {}) | PRESETS.get(name, {})


data_options = options(
    option("seq_len", "Positions of a row."),
    option("packing", "; ".join(f"{k}: documents {v}" for k, v in PACKINGS.items()), type=click.Choice(list(PACKINGS))),
    option("complement", "Train on the complementary view as well."),
    option("seed"),
    click.option("--block-size", type=POSITIVE, help="Diffusion block to adapt to  [default: the checkpoint's, or 32]"),
)
training_options = options(
    click.option("--model", "folder", required=True, type=FOLDER, help="Checkpoint to start from."),
    click.option("--data", required=True, type=click.Path(exists=True, path_type=Path), help="JSONL, or tokenised."),
    click.option("--out", required=True, type=FOLDER, help="Folder of the result, checkpoints and metrics."),
    click.option("--heldout", type=click.Path(exists=True, path_type=Path), help="Data to look at, never to train on."),
    click.option("--preset", type=click.Choice(list(PRESETS)), callback=take_preset, is_eager=True, expose_value=False),
    click.option("--from-scratch", is_flag=True, help="Random weights; --model then needs config and tokenizer only."),
    data_options,
    option("steps"),
    option("batch_size", "Rows a step, of all devices together."),
    option("micro_batch", "Rows a device runs at once; changes memory and speed only."),
    option("lr", "Peak learning rate of AdamW."),
    option("warmup", "Steps of linear warm-up."),
    option("schedule", "After the warm-up.", type=click.Choice(["constant", "cosine"])),
    option("weight_decay"),
    option("clip", "Largest gradient norm."),
    option("ar_weight", "Weight of a causal loss beside the diffusion loss."),
    option("compute", "Of products; weights are float32.", type=click.Choice(["bfloat16", "float32"])),
    option("parallel", "Under torchrun; auto: fsdp above 1e9 weights.", type=click.Choice(["auto", "ddp", "fsdp"])),
    option("recompute", "Keep only the layers' inputs for the backward pass."),
    option("save_every", "Steps between checkpoints."),
    option("keep", "Checkpoints that stay."),
    option("eval_every", "Steps between looks at held-out data."),
    option("eval_rows", "Rows of it."),
    click.option("--broken", type=click.Choice(["refuse", "skip"]), default="refuse", show_default=True, help="Lines."),
    click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True
    ),
    click.option("--device", default="auto", show_default=True),
    click.option("--threads", type=POSITIVE, help="CPU threads."),
)


@click.group(help=__doc__.split("\n\n")[0])
def main():
    pass


def train(objective, folder, data, out, heldout, from_scratch, block_size, broken, dtype, device, threads, **how):
    """One run, of the process that `torchrun` started or the only one."""
    how = Training(**how)
    if threads:
        torch.set_num_threads(threads)
    with processes(device) as device:
        model, tokenizer = initial_model(folder, from_scratch, device, how.seed)
        if objective == "adapt":
            tokenizer = with_mask_token(tokenizer, model.config.vocab_size)
        trained = model.config.block_size
        size = 1 if objective == "ar" else block_size or (trained if trained > 1 else 32)
        require(objective == "ar" or size > 1, "--block-size 1 is autoregressive; `train.py ar` trains that.")
        mask = tokenizer.id("|<MASK>|") if model.config.mask_token_id is None else model.config.mask_token_id
        model.config = replace(model.config, block_size=size, mask_token_id=mask)
        out.mkdir(parents=True, exist_ok=True)
        resumable = {"micro_batch", "parallel", "recompute", "save_every", "keep", "eval_every", "eval_rows", "betas"}
        resumable |= {"steps"} if how.schedule == "constant" else set()  # a cosine ends where its steps end
        content = data / "tokens.bin" if data.is_dir() else data
        run = {"objective": objective, "model": str(folder), "vocab_size": model.config.vocab_size, "block_size": size}
        run |= {"data": str(data), "data_bytes": content.stat().st_size if content.exists() else 0}
        run |= {name: value for name, value in asdict(how).items() if name not in resumable}

        def prepare():
            same_run(out, run)
            Corpus.prepare(data, tokenizer, out / "tokens", broken)
            heldout and Corpus.prepare(heldout, tokenizer, out / "heldout", broken)

        first_process(prepare)
        there = lambda source, name: Corpus.open(source if source.is_dir() else out / name)
        corpus, heldout = there(data, "tokens"), heldout and there(heldout, "heldout")
        kinds = {"ar": 1.0} if objective == "ar" else {"diffusion": 1.0}
        if objective == "adapt" and how.ar_weight:
            kinds["ar"] = how.ar_weight
        trainer = Trainer(kinds, model, corpus, heldout, how)
        trainer.run(out)
        save_result(out, trainer.objective, model, tokenizer, DTYPES[dtype])


@main.command(help="Ordinary next-token training, causal.")
@training_options
@sentences
def ar(**given):
    train("ar", **given)


@main.command(help="Make a block-diffusion model of an autoregressive one (paper, section 3).")
@training_options
@sentences
def adapt(**given):
    train("adapt", **given)


@main.command("show", help="Print a packed, masked example: views, which output answers for which token, the mask.")
@click.option("--model", "folder", default=SHIPPED / "checkpoint", type=FOLDER, help="Folder with a tokenizer.")
@click.option("--data", default=SHIPPED / "sample.jsonl", type=click.Path(exists=True, path_type=Path), help="JSONL.")
@click.option("--row", default=0, type=click.IntRange(0), show_default=True)
@data_options
@sentences
def show_command(folder, data, row, block_size, **how):
    how = Training(**({"seq_len": 192} | how))
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
