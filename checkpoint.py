"""Checkpoints in the published format: config.json, tokenizer and chat template, safetensors weights.

    model, tokenizer = load("tiny/checkpoint")  # a folder, or a Hub id like owner/name
    prompt = tokenizer.chat([{"role": "user", "content": "..."}])

`load` gives what `fastdllm.py` decodes with, and `save` writes it back. Every Qwen2 loads, adapted or not;
what is none is refused by its name before its weights are fetched. A chat is written by the checkpoint's
own template. The two files work when copied alone.
"""

import json
import os
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path

import torch
from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Encoder
from torch import Tensor, nn

from fastdllm import Config, InputError, Qwen2, require


def brief(text: object) -> str:
    """One line of at most 200 characters, for foreign text in a message."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else line[:197] + "..."


# --- Chat template ---
# Templates are Jinja programs that come with a checkpoint. They see the conversation, never the machine.

# where the files have none; the default message is that of the published tokenizers
CHATML = """
{%- for m in messages %}
{%- if tools or m.tool_calls or m.reasoning_content or m.role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('without a template of its own, only plain turns of system, user and assistant work') }}
{%- endif %}
{%- if loop.first and m.role != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{{- '<|im_start|>' ~ m.role ~ '\n' }}{{ m.content }}{{ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# of one rendering, which is seconds: its characters, turns of loops over a range, and 64 for each call
MAX_WORK = 2**24


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: templates mark answers so; the text is as without."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it, and bounded: only data, and so many calls and characters."""

    def __init__(self):
        extensions = [loopcontrols, Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.writable)
        # Jinja's own filter escapes HTML, which would change the text
        self.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        self.globals["raise_exception"] = self.fail
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        del self.globals["lipsum"]  # it would write without end
        self.compile_once = lru_cache(maxsize=8)(self.from_string)

    def fail(self, message: str) -> None:
        raise TemplateError(message)

    def writable(self, value):
        if value is None:  # it would become the word None
            self.fail("it writes a null, such as a content, as text")
        return value

    def spend(self, work: int) -> None:
        self.work += work
        if self.work > MAX_WORK:
            self.fail("it does too much")

    def call(self, *args, **options):
        result = super().call(*args, **options)
        self.spend(64 + (len(result) if isinstance(result, range) else 0))
        return result

    def unsafe_undefined(self, obj, attribute):
        self.fail(f"{attribute!r} of a {type(obj).__name__} is outside what a template may use")

    def write(self, template: str, variables: dict) -> str:
        """Raises InputError with the template's own message where it is broken, raises, or does too much."""
        pieces, self.work = [], 0
        try:
            for piece in self.compile_once(template).generate(variables):
                pieces.append(piece)
                self.spend(len(piece))
        except Exception as error:  # a template may raise anything
            reason = brief(error).rstrip(".") or type(error).__name__
            raise InputError(f"The chat template cannot write this conversation: {reason}.") from None
        return "".join(pieces)


SANDBOX = Sandbox()


def require_written(messages: list[dict], text: str) -> None:
    """Raises InputError where a template left a message out of `text`; it may rewrite answers and results."""
    text = "".join(text.split())
    for role, content in ((message["role"], message.get("content")) for message in messages):
        rewritten = role in ("assistant", "tool") or not isinstance(content, str)
        left_out = f"The chat template leaves the {brief(role)} message out"
        written = rewritten or "".join(content.split()) in text
        require(written, f"{left_out}; put its text into another message.")


# --- Tokenizer ---

# how Qwen2 splits text into words before byte-pair encoding
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKENIZER_FILES = "tokenizer.json vocab.json merges.txt added_tokens.json tokenizer_config.json".split()
TOKENIZER_FILES += ["special_tokens_map.json", "chat_template.jinja"]
MASK = "|<MASK>|"


class Tokenizer:
    """Text to token ids and back, and chats by the checkpoint's own template."""

    def __init__(self, encoder: Encoder, files: dict[str, bytes]):
        self.encoder = encoder
        self.files = files  # contents by name, so that `save` can copy the tokenizer
        self.size = max(encoder.get_vocab().values(), default=-1) + 1  # the largest id plus 1
        settings = read_settings(files)
        # variables of a template
        self.special = {k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str)}
        bos = self.id(self.special.get("bos_token", "")) if settings.get("add_bos_token") else None
        self.begin = [] if bos is None else [bos]  # of a text that is no chat
        self.templates, self.template_source = {}, "none"  # the templates by name
        own, chatml = files.get("chat_template.jinja", b""), ("<|im_start|>", "<|im_end|>")
        own = own.decode("utf-8-sig")  # editors may put a byte order mark before it
        if template := own or settings.get("chat_template"):
            named = template if isinstance(template, list) else [{"name": "default", "template": template}]
            self.templates = {entry["name"]: entry["template"] for entry in named}
            self.template_source = "chat_template.jinja" if own else "tokenizer_config.json"
        elif None not in map(self.id, chatml):
            self.templates, self.template_source = {"default": CHATML}, "ChatML (no template in the files)"
        self.template = self.templates.get("default")

    def id(self, token: str) -> int | None:
        return self.encoder.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are recognised. Raises InputError for invalid text."""
        try:
            return self.encoder.encode(text, add_special_tokens=False).ids
        except Exception:  # the library has none of its own
            problem = f"No valid Unicode text, or none that the tokenizer takes: {brief(ascii(text))}."
            raise InputError(problem) from None

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text that is no chat, with a begin token where the tokenizer's settings add one."""
        ids = self.encode(text)
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.encoder.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat(
        self, messages: list, tools: list | None = None, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of `render`'s text, and of nothing else. Raises InputError as `render` and `encode`."""
        return self.encode(self.render(messages, tools, add_generation_prompt))

    def render(self, messages: list, tools: list | None = None, add_generation_prompt: bool = True) -> str:
        """A conversation as the checkpoint's template writes it, up to where the assistant's turn begins.

        Messages have `role`, `content` and whatever else the template reads; a null is as if left out, but
        for `content`. Raises InputError where there is no template, or where it fails.
        """
        says = lambda m: "content" in m or "tool_calls" in m
        good = lambda m: isinstance(m, dict) and isinstance(m.get("role"), str) and says(m)
        ok = isinstance(messages, (list, tuple)) and messages and all(map(good, messages))
        require(ok, "Messages are a list of objects, each with `role` and `content`.")
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        template, problem = self.templates.get(name), "The checkpoint has no chat template, so it cannot chat"
        advice = "put a chat_template.jinja into its folder, or continue a text with `generate --raw`"
        require(template, f"{problem}; {advice}.")
        require(not tools or "tools" in template, "The checkpoint's chat template has no place for tools.")
        messages = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        text = SANDBOX.write(template, self.special | given)
        for content in (message.get("content") for message in messages):
            as_code = isinstance(content, (list, dict)) and str(content) in text
            require(not as_code, "The chat template writes a content of parts as code; make it one text.")
        require_written([message for message in messages[:1] if message["role"] == "system"], text)
        return text

    def default_system(self) -> str | None:
        """The system message that the template writes where a chat has none."""
        chat = [{"role": "system", "content": "A SYSTEM"}, {"role": "user", "content": "A USER"}]
        try:
            before, after = self.render(chat).split("A SYSTEM")
            text = self.render(chat[1:])
        except (InputError, ValueError):  # no template, or one that takes no such chat
            return None
        # the default stands between what surrounds a message that is given
        found = re.fullmatch(re.escape(before) + "(.+)" + re.escape(after), text, re.DOTALL)
        return found and found[1]

    def stream(self, chunks: Iterable[Sequence[int]]) -> Iterator[str]:
        """Text of ids that arrive in chunks; a character is yielded as soon as its last byte has arrived."""
        stream, ids, written = decoders.DecodeStream(skip_special_tokens=True), [], 0
        for chunk in chunks:
            ids += chunk
            text = "".join(stream.step(self.encoder, i) or "" for i in chunk)
            written += len(text)
            yield text
        yield self.decode(ids)[written:]  # bytes that never became a character


text_of = lambda token: token["content"] if isinstance(token, dict) and "content" in token else token


def read_settings(files: dict[str, bytes]) -> dict:
    """What tokenizer_config.json says, and special_tokens_map.json where it says nothing; tokens as text."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        own = json.loads(files.get(name, b"{}")).items()
        settings |= {key: text_of(value) for key, value in own if value is not None}
    return settings


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """From `tokenizer.json`, or `vocab.json` and `merges.txt`, with added tokens of `tokenizer_config.json`
    or `added_tokens.json`. Raises InputError for missing, damaged or contradictory files."""
    folder = Path(folder)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    complete = "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files.keys()
    require(complete, f"{folder}: no tokenizer; tokenizer.json, or vocab.json and merges.txt, must be there.")
    try:
        return Tokenizer(build_encoder(folder, files), files)
    except Exception as error:  # the library has none of its own
        raise InputError(f"{folder}: the tokenizer files cannot be read: {brief(error)}") from None


def build_encoder(folder: Path, files: dict[str, bytes]) -> Encoder:
    settings = read_settings(files)
    added = {int(i): entry for i, entry in settings.get("added_tokens_decoder", {}).items()}
    if "tokenizer.json" in files:
        encoder = Encoder.from_buffer(files["tokenizer.json"])
        encoder.no_truncation()
        encoder.no_padding()
    else:
        encoder = Encoder(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        encoder.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(WORDS), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        encoder.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
        encoder.decoder = decoders.ByteLevel()
        named = [value for key, value in settings.items() if key.endswith("_token")]
        named += [MASK, *map(text_of, settings.get("additional_special_tokens", []))]
        for text, i in json.loads(files.get("added_tokens.json", b"{}")).items():
            # the file does not say which ones are special: those of this form, as in Qwen's own tokenizer
            special = text in named or re.fullmatch(r"<\|.*\|>", text) is not None
            added.setdefault(i, {"content": text, "special": special})
    for i, entry in sorted(added.items()):
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        token = AddedToken(entry["content"], **{flag: entry.get(flag, False) for flag in flags})
        encoder.add_tokens([token])
        got = encoder.token_to_id(token.content)  # the library numbers tokens itself and ignores listed ids
        require(got == i, f"added token {token.content!r:.100} is listed as id {i} but becomes {got}.")
    return encoder


# --- Load and save ---

NAMES = list(Config.__annotations__)
SAME_KEYS = NAMES[: NAMES.index("block_size")]  # fields that config.json has under the same names
SIZES = NAMES[: NAMES.index("rms_norm_eps")]
KINDS = ("qwen2", "Fast_dLLM_Qwen")
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"  # tensor name -> file, for weights in several files
HUB_ERRORS = {
    "LocalEntryNotFoundError": "no network",
    "RepositoryNotFoundError": "there is none of this name, or it is private",
    "GatedRepoError": "its terms must be accepted there, then `hf auth login` helps",
}
QUANTISED = ("quantization_config", "quantization", "compression_config")  # Transformers, MLX, older files
LONG, LIMIT = "dual_chunk_attention_config", "original_max_position_embeddings"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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


def near_miss(path: Path) -> Path | None:
    """The folder that a mistyped path may mean."""
    parent = path.parent if path.parent.is_dir() else near_miss(path.parent)
    names = [place.name for place in parent.iterdir() if place.is_dir()] if parent else []
    return next((parent / name for name in get_close_matches(path.name, names, 1)), None)


def locate(path: str | os.PathLike, files: list[str] | None = None) -> Path:
    """The folder `path`, or of a Hub id the download: `files`, else a checkpoint without its weights.

    A checkpoint's config.json is fetched and judged before the rest. Raises InputError for no such place.
    """
    folder, kind = Path(path), "an adapter's" if files else "a checkpoint's"
    if folder.is_dir():
        return folder
    require(not folder.exists(), f"{path}: is a file; give {kind} folder.")
    near, is_id = near_miss(folder), re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path))
    advice = f"give {kind} folder, or a Hub id like owner/name where there is no folder named owner."
    mistyped = not is_id or folder.parent.is_dir() or near and near.name == folder.name
    advice = f"did you mean {near}?" if near else advice
    require(not mistyped, f"{brief(path)}: no such folder; {advice}")
    if not files:
        parse_config(read_json(download(path, ["config.json"]) / "config.json"))
    return download(path, files or ["config.json", GENERATION, INDEX, *TOKENIZER_FILES])


def download(hub_id: str, names: list[str]) -> Path:
    """The local folder of a Hub repository, with the named files. Raises InputError where that fails."""
    from huggingface_hub import logging, snapshot_download  # only needed here

    logging.set_verbosity_error()  # a failure is said once, below
    try:
        return Path(snapshot_download(str(hub_id), allow_patterns=names))
    except Exception as error:  # no network, no such repository, no space
        reason = HUB_ERRORS.get(type(error).__name__) or brief(error) or type(error).__name__
        raise InputError(
            f"{hub_id}: no such folder, and not reachable as a Hub id ({reason}); where there is a network, "
            f"`hf download {hub_id} --local-dir FOLDER` fetches it, then give FOLDER."
        ) from None


def shards(folder: Path) -> list[str]:
    """Names of the checkpoint's weight files. Raises InputError for an index that names anything else."""
    if not (folder / INDEX).is_file():
        return ["model.safetensors"]
    index = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
    # a download reads the names as patterns, so only plain names are allowed
    ok = names and all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names)
    require(ok, f"{folder / INDEX}: weight_map must name .safetensors files of the same folder.")
    ok = "model.safetensors" in names or not (folder / "model.safetensors").is_file()
    require(ok, f"{folder}: holds {INDEX} and a model.safetensors that it does not name; remove one.")
    return names


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by name in a safetensors file. Raises InputError for damage, and for dtypes not in `DTYPES`."""
    these = "weights are read from .safetensors files, not from .bin or .gguf"
    require(path.is_file(), f"{path.parent}: {path.name} is missing; {these}.")
    try:
        with safe_open(path, framework="pt") as weights:
            parts = {name: weights.get_slice(name) for name in weights.keys()}
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            pointer = file.read(7) == b"version"
        fetch = "; it is a pointer of Git LFS, `git lfs pull` fetches the file" if pointer else ""
        raise InputError(f"{path}: damaged or no safetensors file: {brief(error)}{fetch}") from None
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
is_positive = lambda x: type(x) in (int, float) and x > 0
is_object = lambda x: isinstance(x, dict)
is_plain = lambda x: is_object(x) and x.get("rope_type", x.get("type", "default")) == "default"
as_list = lambda x: x if isinstance(x, list) else [] if x is None else [x]

# key of config.json -> whether a value is valid, and what it must be
RULES: dict[str, tuple[Callable, str]] = {
    **dict.fromkeys([*SIZES, "bd_size"], (is_integer(1), "a positive integer below 2**31")),
    **dict.fromkeys(["rms_norm_eps", "rope_theta"], (is_positive, "a positive number")),
    "tie_word_embeddings": (lambda x: type(x) is bool, "true or false"),
    "mask_token_id": (is_integer(0), "a token id"),
    "architectures": (lambda x: any("ForCausalLM" in str(name) for name in as_list(x)), "a language model's"),
    "eos_token_id": (lambda x: all(map(is_integer(0), as_list(x))), "a token id or a list of token ids"),
    "hidden_act": (lambda x: x == "silu", "silu"),
    "is_causal": (lambda x: x is True, "true: an encoder such as an embedding model writes no text"),
    "rope_scaling": (is_plain, "null: scaled rotary positions are not built"),
    "rope_parameters": (is_plain, "of rope_type default: rope_scaling is not built"),
    LONG: (lambda x: is_object(x) and is_integer(1)(x.get(LIMIT)), f"an object with {LIMIT}"),
    "use_sliding_window": (lambda x: x is False, "false: sliding windows are not built"),
}


def parse_config(raw: dict) -> Config:
    """From the contents of `config.json`. Raises InputError for invalid values and for what is not built."""
    kind, quantised = raw.get("model_type"), next(filter(None, map(raw.get, QUANTISED)), {})
    problem = f"model_type is {reprlib.repr(kind)}, which is no Qwen2"
    require(kind in KINDS, f"config.json: {problem}; {' and '.join(KINDS)} work.")
    method = reprlib.repr(quantised.get("quant_method", "no name") if is_object(quantised) else quantised)
    advice = "dequantise them first, or take the checkpoint they were made from"
    require(not quantised, f"config.json: the weights are quantised ({method}); {advice}.")
    c = {"bd_size": 1, "rope_theta": 10000.0}  # Transformers' default
    c |= {key: value for key, value in raw.items() if value is not None}
    if is_plain(rope := c.get("rope_parameters", {})):  # where newer Transformers keep it
        c["rope_theta"] = rope.get("rope_theta", c["rope_theta"])
    for key, (valid, rule) in RULES.items():  # reprlib is short, also for values too deep for repr
        ok = valid(c[key]) if key in c else key not in SIZES or key == "head_dim"
        require(ok, f"config.json: {key} is {reprlib.repr(c.get(key))}, it must be {rule}.")
    c.setdefault("head_dim", c["hidden_size"] // c["num_attention_heads"])
    if LONG in c:  # beyond these positions it needs an attention of its own
        c["max_position_embeddings"] = c[LONG][LIMIT]
    mask, rows = c.get("mask_token_id"), c["vocab_size"]
    require(mask is None or mask < rows, f"config.json: mask_token_id {mask} is not below vocab_size {rows}.")
    c |= {"block_size": c["bd_size"], "stop_token_ids": tuple(as_list(c.get("eos_token_id")))}
    return Config(**{name: c[name] for name in NAMES if name in c})


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
    }
    return {key: value for key, value in raw.items() if value not in (None, [])}


def read_checkpoint(path: str | os.PathLike, weights: bool = True) -> tuple[Path, Config, Tokenizer | None]:
    """Folder, config and tokenizer of a checkpoint; `weights=False` leaves out a Hub id's weights.

    generation_config.json and the tokenizer name further stop tokens, and the mask. Warns where a checkpoint
    for long contexts is limited to those that it was trained on.
    """
    folder = locate(path)
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    require(not is_adapter, f"{folder}: is an adapter, not a checkpoint; give its base, and it as --adapter.")
    raw = read_json(folder / "config.json")
    if (folder / GENERATION).is_file():
        more = read_json(folder / GENERATION).get("eos_token_id")
        raw["eos_token_id"] = as_list(raw.get("eos_token_id")) + as_list(more)
    config, tokenizer = parse_config(raw), None
    most, stops, mask = config.max_position_embeddings, config.stop_token_ids, config.mask_token_id
    if most < raw["max_position_embeddings"]:
        warnings.warn(f"{folder}: only {most:,} positions are used: {LONG} is not built.", stacklevel=2)
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        tokenizer = load_tokenizer(folder)
        size, rows = tokenizer.size, config.vocab_size
        require(size <= rows, f"{folder}: the tokenizer has {size} ids, the embedding only {rows} rows.")
        ends = map(tokenizer.id, (tokenizer.special.get("eos_token", ""), "<|im_end|>", "<|endoftext|>"))
        stops += tuple(i for i in ends if i is not None)
        mask = tokenizer.id(MASK) if mask is None else mask
        config = replace(config, mask_token_id=mask, tokenizer_size=size)
    config = replace(config, stop_token_ids=tuple(dict.fromkeys(stops)))
    return (locate(path, shards(folder)) if weights else folder), config, tokenizer


def load(
    path: str | os.PathLike, device: str = "auto", dtype: str | torch.dtype = "auto"
) -> tuple[Qwen2, Tokenizer | None]:
    """Model and tokenizer from a folder or a Hub id; the tokenizer is None where the folder has none.

    device: a torch device, or "auto": cuda, else mps, else cpu. dtype: one of `DTYPES` or its name; "auto" is
    the embedding's dtype in the file. Raises InputError naming the file, key or tensor that is wrong.
    """
    device, wanted = pick_device(device), DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    require(wanted in DTYPES.values(), f"dtype {dtype!r} is not known; take one of {', '.join(DTYPES)}.")
    folder, config, tokenizer = read_checkpoint(path)
    with torch.device("meta"):
        model = Qwen2(config)
    tensors = {}
    for file in shards(folder):
        tensor_shapes(folder / file)  # refuses a damaged file
        tensors |= load_file(folder / file)
    # older files repeat what rope_theta says
    tensors = {name: w for name, w in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and EMBEDDING in tensors:
        same = torch.equal(tensors.setdefault(HEAD, tensors[EMBEDDING]), tensors[EMBEDDING])
        require(same, f"{folder}: {HEAD} is not the embedding, but tie_word_embeddings is true.")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # its second line begins to say which names or shapes are wrong
        problem = brief(str(error).partition("\n")[2])
        raise InputError(f"{folder}: the weights are not those of config.json: {problem}") from None
    model.tie()
    return model.to(device, wanted or model.weight.dtype).eval(), tokenizer


def require_plain(model: nn.Module, doing: str) -> None:
    """Raises InputError for a model with an adapter or prepacked weights; doing: "cannot be saved", say."""
    with torch.device("meta"):
        plain = {name for name, _ in Qwen2(model.config).named_parameters()}
    ok = plain == {name for name, _ in model.named_parameters()}
    require(ok, f"A model with an adapter or prepacked weights {doing}; take the plain one.")


def save(model: Qwen2, tokenizer: Tokenizer | None, folder: str | os.PathLike) -> None:
    """Write what `load` reads, under the published names.

    An old config.json goes before the weights are replaced, and the new one comes last: without it, a folder
    that a kill leaves half-written is no checkpoint. Raises OSError where the folder cannot be written; where
    the weights cannot, an old checkpoint there stays whole.
    Raises InputError for a model that `require_plain` refuses: the files have no place for its weights.
    """
    require_plain(model, "cannot be saved")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}  # a tied head once
    dtype = str(model.weight.dtype).removeprefix("torch.")
    config = json.dumps(unparse_config(model.config) | {"torch_dtype": dtype}, indent=2) + "\n"

    def write(part: Path) -> None:
        save_file(weights, part, {"format": "pt"})
        # what an older checkpoint says would contradict the new files
        for name in ("config.json", INDEX, GENERATION, *(TOKENIZER_FILES if tokenizer else [])):
            (folder / name).unlink(missing_ok=True)

    replace_file(folder / "model.safetensors", write)
    for name, content in {**(tokenizer.files if tokenizer else {}), "config.json": config.encode()}.items():
        replace_file(folder / name, partial(Path.write_bytes, data=content))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a temporary file and rename it to `path`, so that no reader ever sees half a file.

    A symbolic link stays, and its target is replaced. Raises OSError where it cannot be written, and
    InputError for a folder, a device or a pipe.
    """
    require(path.is_file() or not path.exists(), f"{path}: is no regular file; name another.")
    path = Path(os.path.realpath(path))  # a link's target
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.umask(mask := os.umask(0))  # the only way to read the umask
        temporary.chmod(0o666 & ~mask)  # safetensors writes files that only their owner may read
        os.replace(temporary, path)
    except SafetensorError as error:  # as of a full disk
        raise OSError(f"{path}: cannot be written ({brief(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """`replace_file` for a safetensors file."""
    replace_file(path, lambda part: save_file(tensors, part, {"format": "pt"}))
