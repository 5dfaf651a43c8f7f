"""Training data: records of a JSONL file become documents of token ids, and documents are packed into rows.

A record may have any of the formats that people have, see `FORMATS`. A document is its token ids, and which
of them are trainable. `Corpus` holds all documents, tokenised once and mapped into memory.

Shapes: B rows, L positions of a row.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken
from torch import Tensor
from tqdm import tqdm

from checkpoint import MASK, Tokenizer, require_written, write_tensors
from commands.console import say
from commands.prompts import encode_prompt, tools_of
from fastdllm import Config, InputError, require, round_up

# --- Records ---

BESIDE = ("system", "tools")  # keys that may stand beside the messages of every chat
FORMATS = {  # the keys that make a format -> the others that it reads
    ("messages",): BESIDE,
    ("conversations",): BESIDE,  # ShareGPT
    ("question", "answer"): BESIDE,
    ("prompt", "completion"): BESIDE,  # texts, or lists of messages
    ("instruction", "output"): ("input", *BESIDE),  # Alpaca
    ("text",): (),
}
# keys to which other programs give a meaning: to ignore one would train something else in silence
FOREIGN = "history context query response chosen rejected functions images audio videos weight train".split()
MEANING = {key for format, others in FORMATS.items() for key in format + others} | {*FOREIGN}
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
ROLES = tuple(SHAREGPT.values())
PARTS = "content tool_calls function_call reasoning_content reasoning thinking".split()  # of an answer

say_once = cache(say)


def document_of(record: dict, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a record, and which are trainable.

    What the assistant wrote trains, with its end token; `text` trains whole. Raises InputError for what has
    none of `FORMATS`, for two of them in one record, and for known keys that this format does not read.
    """
    require(isinstance(record, dict), "it is no JSON object")
    if record.get("token_ids") is not None:  # an answer that `cli.py generate --output` wrote, token by token
        prompt, answer = encode_prompt(record, tokenizer), record["token_ids"]
        require(isinstance(answer, list), "its token_ids are no list")
        idle = [key for key in ("weight", "train") if record.get(key) is not None]
        require(not idle, f"it has `{' '.join(idle)}` beside `token_ids`, where nothing uses it; remove it")
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)
    given = [key for key, value in record.items() if key in MEANING and value not in (None, "", [])]
    has = lambda format: all(record.get(key) is not None for key in format)
    format = next(filter(has, FORMATS), None)
    names = ", ".join(" and ".join(f"`{key}`" for key in format) for format in FORMATS)
    lone = f"only `{given[0]}`" if given else "none"
    require(format, f"of {names}, or a prompt and `token_ids`, it has {lone}")
    unused = [key for key in given if key not in format + FORMATS[format]]
    where = f"`{format[0]}`, where nothing uses it; remove one"
    require(not unused, f"it has `{' '.join(unused)}` beside {where}")
    if format != ("text",):
        return chat_document(messages_of(record, *format), tools_of(record), tokenizer)
    require(isinstance(record["text"], str) and record["text"], "its text is empty or no text")
    end = tokenizer.id("<|endoftext|>") or tokenizer.id(tokenizer.special.get("eos_token", ""))
    tokens = tokenizer.encode_text(record["text"]) + ([] if end is None else [end])
    return tokens, [True] * len(tokens)


def messages_of(record: dict, asked: str, answered: str | None = None) -> list[dict]:
    """The messages of a chat by its format's keys. Raises InputError for what is no list of messages."""

    def listed(key: str, role: str = "user") -> list[dict]:
        """A list of messages as it is, and a text as one message of `role`."""
        content = record[key]
        if isinstance(content, str):
            return [{"role": role, "content": content}]
        ok = isinstance(content, list) and all(isinstance(message, dict) for message in content)
        require(ok, f"`{key}` is neither a text nor a list of messages")
        return content

    if record.get("input"):
        parts = [record["instruction"], record["input"]]
        require(all(isinstance(part, str) for part in parts), "its instruction or input is no text")
        record = record | {"instruction": "\n".join(filter(None, parts))}
    messages = listed(asked)
    if asked == "conversations":
        role_of = lambda turn: SHAREGPT.get(str(turn.get("from")), turn.get("from"))
        messages = [turn | {"role": role_of(turn), "content": turn.get("value")} for turn in messages]
    if answered:
        messages = [message | {"train": False} for message in messages] + listed(answered, "assistant")
    if record.get("system"):
        twice = messages[:1] and messages[0].get("role") == "system"
        require(not twice, "it has `system` beside messages that begin with a system message; remove one")
        messages = listed("system", "system") + messages
    for message in messages:
        role, content = message.get("role"), message.get("content")
        require(role in ROLES, f"the role {role!r:.99} is none of {', '.join(ROLES)}")
        # an answer may consist of tool calls alone
        ok = isinstance(content, str) or content is None and role == "assistant"
        require(ok, f"the {role}'s content is no text")
    return messages


def is_trained(message: dict) -> bool:
    """Whether a message trains. Raises InputError for other weights than 0 and 1, and 1 of a question."""
    weights = [message[key] for key in ("weight", "train") if message.get(key) is not None]
    require(all(w in (0, 1) for w in weights), f"a weight is {weights}; a message trains or not: 1 or 0")
    is_answer = message["role"] == "assistant"
    require(is_answer or not any(weights), f"a weight is 1 for {message['role']}; only answers train")
    return is_answer and all(weights)


def chat_document(
    messages: list[dict], tools: list | None, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation through its last answer, and which are trainable: answers and their ends.

    An answer spans from the end of the conversation before it, rendered with the generation prompt, to its
    own end. The text is cut at both ends and then encoded: so a prompt has the ids that decoding will see,
    also where letters across a cut would make one token. Raises InputError for an answer that is empty, and
    for parts of it that the template leaves out.
    """
    trained = [is_trained(message) for message in messages]
    messages = [{k: v for k, v in message.items() if k not in ("weight", "train")} for message in messages]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    require(answers and answers[0] > 0, "it has no answer, or begins with one")
    if answers[-1] + 1 < len(messages):
        say_once("what follows the last answer of a conversation is left out.")
    render = partial(tokenizer.render, tools=tools, add_generation_prompt=False)
    left_out, texts, spans = "the chat template leaves out", [], []
    for i in answers:
        message, text = messages[i], render(messages[: i + 1])
        parts = [part for part in PARTS if message.get(part)]
        require(parts, "an answer is empty")
        for part in parts:
            less = message | {part: None}
            less["content"] = less.get("content") or ""  # a template may refuse to write a null
            require(render([*messages[:i], less]) != text, f"{left_out} the `{part}` of an answer")
        texts.append(text)
        if trained[i]:
            before = tokenizer.render(messages[:i], tools, add_generation_prompt=True)
            spans.append(slice(parting(before, text, tokenizer), len(text)))
            turn = text.removeprefix(render(messages[:i]))  # with what the generation prompt has of it
            content, written = ("".join(x.split()) for x in (message.get("content") or "", turn))
            if content not in written:
                say_once(f"{left_out} some of an answer's content, such as reasoning; see `train.py show`.")
            elif content and written.endswith(content):
                say_once("the chat template ends an answer without an end token, so no model learns to stop.")
    whole = texts[-1]
    require_written(messages[: answers[-1]], whole)
    if not all(map(whole.startswith, texts)):
        say_once("the chat template rewrites earlier turns, so of a chat only the last answer trains.")
        spans = spans[-1:] if trained[answers[-1]] else []

    tokens, trainable, at = [], [], 0
    for span in [*spans, slice(len(whole), len(whole))]:
        prompt, answer = tokenizer.encode(whole[at : span.start]), tokenizer.encode(whole[span])
        tokens += prompt + answer
        trainable += [False] * len(prompt) + [True] * len(answer)
        at = span.stop
    return tokens, trainable


def parting(before: str, text: str, tokenizer: Tokenizer) -> int:
    """Where `text` first differs from the prompt `before`, moved back to where a token begins."""
    if text.startswith(before):
        return len(before)
    # the generation prompt opens what this answer does not have, such as <think>
    pairs = enumerate(zip(tokenizer.encode(before), tokenizer.encode(text)))
    differing = [i for i, (one, other) in pairs if one != other]
    offsets = tokenizer.encoder.encode(text, add_special_tokens=False).offsets
    return offsets[differing[0]][0] if differing else len(text)


def read_documents(
    path: Path, tokenizer: Tokenizer, mask: int | None, broken: str, progress: Callable = lambda size: None
) -> Iterator[tuple[list[int], list[bool]]]:
    """The document of each line of a JSONL file, see `document_of`; tells `progress` each line's bytes.

    A line that is broken, or holds the `mask` token, raises InputError with its number; where `broken` is
    "skip", it is reported on stderr and left out.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            progress(len(line))
            if not line.strip():
                continue
            try:
                tokens, trainable = document_of(json.loads(line), tokenizer)
                require(any(trainable), "it has no token to train on")
                inside = all(type(i) is int and 0 <= i < tokenizer.size for i in tokens)
                require(inside, "it has token ids outside the vocabulary")
                require(mask not in tokens, "it holds the mask token, which only training may write")
            except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or too deep
                known = isinstance(error, InputError)
                reason = str(error).rstrip(".") if known else f"it is no JSON ({error!r:.99})"
                refusal = f"{path}, line {number}: {reason}; --broken skip leaves such lines out."
                require(broken == "skip", refusal)
                print(f"{path}, line {number}: {reason}; skipped", file=sys.stderr)
                continue
            yield tokens, trainable


# --- Corpus ---


@dataclass
class Corpus:
    """Tokenised documents in one array: token ids, which are trainable, and where each document begins."""

    tokens: np.ndarray
    trainable: np.ndarray
    offsets: np.ndarray  # one more than documents

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def piece(self, document: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trainable of [start, stop) of a document, cut at its end; by default all of it."""
        low, end = self.offsets[document : document + 2]
        where = slice(low + start, end if stop is None else min(low + stop, end))
        return self.tokens[where], self.trainable[where]

    @classmethod
    def read(
        cls, data: Path, tokenizer: Tokenizer, mask: int | None, broken: str, most: int | None = None
    ) -> "Corpus":
        """The documents of a JSONL file, or the first `most`; raises InputError as `read_documents` does."""
        bar = tqdm(
            total=data.stat().st_size, desc=f"tokenising {data.name}", unit="B", unit_scale=True, delay=1
        )
        with bar:
            found = islice(read_documents(data, tokenizer, mask, broken, bar.update), most)
            documents = [(np.array(tokens, np.int32), np.array(trains)) for tokens, trains in found]
        require(documents, f"{data}: holds no documents.")
        tokens, trainable = map(np.concatenate, zip(*documents))
        return cls(tokens, trainable, np.cumsum([0, *(len(tokens) for tokens, _ in documents)]))

    @classmethod
    def open(cls, file: Path) -> "Corpus":
        """Map a file of `prepare` into memory."""
        with safe_open(file, "pt") as tensors:
            return cls(*(tensors.get_tensor(name).numpy() for name in cls.__annotations__))

    @classmethod
    def prepare(
        cls, data: Path, tokenizer: Tokenizer, mask: int | None, file: Path, broken: str = "refuse"
    ) -> "Corpus":
        """`read` into a file, unless that was done already. Where it fails the file stays as it was."""
        made_of = f"{file_hash(data)} {tokenizer_hash(tokenizer)} {mask} {broken}"
        digest = hashlib.sha256(made_of.encode()).digest()
        with suppress(OSError, SafetensorError), safe_open(file, "np") as old:  # may be missing or damaged
            if old.get_tensor("made_of").tobytes() == digest:
                return cls.open(file)
        arrays = vars(cls.read(data, tokenizer, mask, broken)) | {"made_of": np.array([*digest], np.uint8)}
        write_tensors(file, {name: torch.from_numpy(array) for name, array in arrays.items()})
        return cls.open(file)


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of its files, the chat template's among them."""
    return hashlib.sha256(repr(sorted(tokenizer.files.items())).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def with_mask_token(tokenizer: Tokenizer, config: Config) -> tuple[Tokenizer, Config]:
    """A tokenizer and a config with a mask token: the config's, or `|<MASK>|` under the first free id.

    That is 151665 in Qwen2.5, whose embedding has a row for it. Raises InputError where there is no row, and
    where the id is a stop token.
    """
    if config.mask_token_id is not None:
        return tokenizer, config
    new, rows = tokenizer.size, config.vocab_size
    gets = f"The mask token would get id {new}, which is"
    require(new < rows, f"{gets} outside the embedding of {rows} rows; add a row to it.")
    incomplete = "tokenizer_config.json or added_tokens.json must name all added tokens"
    require(new not in config.stop_token_ids, f"{gets} a stop token; {incomplete}.")
    tokenizer.encoder.add_special_tokens([AddedToken(MASK, normalized=False)])
    replaced = "vocab.json", "merges.txt", "added_tokens.json"
    files = {name: content for name, content in tokenizer.files.items() if name not in replaced}
    files["tokenizer.json"] = tokenizer.encoder.to_str().encode()
    return Tokenizer(tokenizer.encoder, files), replace(config, mask_token_id=new)


# --- Packing ---

PACKINGS = ("documents", "original")
Piece = tuple[int, int, int]  # (document, start, stop): its positions; those beyond its end are padding


def pack(
    lengths: np.ndarray, seq_len: int, block_size: int, packing: str, rng: np.random.Generator
) -> list[list[Piece]]:
    """An epoch's rows of at most `seq_len` positions, in a random order.

    Documents are padded to whole blocks. "documents": each goes into the fullest row that has room for it.
    Only a document longer than a row is cut; each piece then counts as a document. "original": each has at
    least one position of padding, all stand one behind the other, cut where a row ends; the last, incomplete
    row is dropped.
    """
    rows, order = [], rng.permutation(len(lengths)).tolist()
    if packing == "documents":
        room = [[] for _ in range(seq_len)]  # number of free positions -> rows that have so many
        for document in order:
            for start in range(0, lengths[document], seq_len):
                need = round_up(int(min(lengths[document] - start, seq_len)), block_size)
                # positions that are free in the fullest row that has room
                free = next((n for n in range(need, seq_len, block_size) if room[n]), None)
                if free is None:
                    row, free = [], seq_len
                    rows.append(row)
                else:
                    row = room[free].pop()
                row.append((document, start, start + need))
                room[free - need].append(row)
        return [rows[i] for i in rng.permutation(len(rows))]
    row, filled = [], 0
    for document in order:
        start, whole = 0, round_up(int(lengths[document]) + 1, block_size)
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


def lay_out(
    corpus: Corpus, rows: list[list[Piece]], seq_len: int, pad: int, separate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, trainable, and each position's document number, (B, L); padding does not train.

    Documents that are not `separate` share one number: then they see each other, and positions run on.
    """
    shape = len(rows), seq_len
    tokens, trainable = np.full(shape, pad, np.int64), np.zeros(shape, bool)
    documents = np.zeros(shape, np.int32)
    for r, row in enumerate(rows):
        at = 0
        for number, (document, start, stop) in enumerate(row, 1):
            ids, flags = corpus.piece(document, start, stop)
            tokens[r, at : at + len(ids)], trainable[r, at : at + len(ids)] = ids, flags
            documents[r, at : at + stop - start] = number if separate else 0
            at += stop - start
    return torch.from_numpy(tokens), torch.from_numpy(trainable), torch.from_numpy(documents)
