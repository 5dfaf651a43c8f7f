"""What all commands share: mistakes as one sentence, options, devices, and the model that they open.

torch takes seconds to import. So it is imported where something runs, and help pages show at once.
"""

from __future__ import annotations

import difflib
import errno
import functools
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from checkpoint import Tokenizer
    from fast import RecordedPasses
    from fastdllm import Decoding, Qwen2

VERSION = "3.0"
SHIPPED = Path(__file__).parent.parent / "tiny" / "checkpoint"
SAMPLE = (
    "Zoe has 5 bags with 7 cards in each. Then the cards double in number. Jack gives Zoe 14 more. She "
    "shares them equally among 6 friends. How many cards does each friend get?"
)
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
HELP_OPTIONS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
# this process's number, and how many torchrun started
TORCHRUN = os.environ if "LOCAL_RANK" in os.environ else {}
RANK, PROCESSES = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))


# --- Mistakes ---

# A user's mistake: exit status 2, and one sentence on stderr. click would print its usage before it.
OneSentence = click.UsageError
OneSentence.show = click.ClickException.show


def flag_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def sentence_of(error: Exception) -> str | None:
    """What a user is told: bad input, files that cannot be opened, full memory. None: the error is ours."""
    import torch

    from fastdllm import InputError
    from verify import Verified

    if isinstance(error, InputError):
        # the fields of a decoding are flags here; behind a colon stands a file's key
        fields = "|".join(name for name in Verified.__dataclass_fields__ if "_" in name)
        names = rf"(?<![\w/.-])(?<!: )({fields})(?![\w/:-])"
        return re.sub(names, lambda name: flag_of(name[0]), str(error))
    if isinstance(error, OSError) and error.errno != errno.EPIPE:  # nobody reads on: click ends quietly
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror or error}."
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if full or isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch's words on a CPU
        return "The memory is full; a smaller batch or shorter rows need less."
    return None


def reports_mistakes(command: Callable) -> Callable:
    """Turn a user's mistake into one sentence, and Ctrl-C into an exit status."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        import checkpoint  # noqa: F401  # and torch; cli.py lets Ctrl-C end the program at once up to here

        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.showwarning = lambda message, *where: say(str(message))
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and not stream.isatty():  # files and pipes are UTF-8
                stream.reconfigure(encoding="utf-8", errors=stream.errors)
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None:
                raise
            raise OneSentence(sentence) from None

    return wrapped


def require_writable(flag: str, path: Path | None, mark: str = "") -> None:
    """Raises InputError where `path` cannot become a file, or is one without `mark`; call it before work.

    mark: text that each file of this kind holds, so that no other one is replaced.
    """
    from fastdllm import require

    if path is None:
        return
    require(path.name != "-", f"{flag} -: standard output is no file; name one.")
    folder = path.absolute().parent
    require(folder.is_dir(), f"{flag} {path}: the folder {folder} does not exist.")
    require(path.is_file() or not path.exists(), f"{flag} {path}: is no file; name one.")
    require(os.access(folder, os.W_OK), f"{flag} {path}: nothing can be written in the folder {folder}.")
    content = path.read_bytes() if mark and path.exists() else b""
    own = not content or mark.encode() in content
    require(own, f"{flag} {path}: holds something else; remove it, or name another file.")


def say(note: str) -> None:
    """Print a note, from the first process only."""
    if RANK == 0:
        click.echo(f"Note: {note}", err=True)


def counted(number: int, noun: str) -> str:
    """The number with its noun: 1 token, 2 tokens, 2 passes."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"


# --- Help pages ---


class Option(click.Option):
    """An option under a heading of its command's help page, which shows no bounds of numbers."""

    def __init__(self, *given, heading: str = "Options", **more):
        super().__init__(*given, **more)
        self.heading = heading

    def make_metavar(self, ctx: click.Context) -> str:
        return super().make_metavar(ctx).removesuffix(" RANGE")

    def get_help_extra(self, context: click.Context) -> dict:
        extra = super().get_help_extra(context)
        default = extra.get("default", "").strip("()")  # brackets stand around it already
        return {"default": default} if default else {}


class Command(click.Command):
    """A command whose options stand under headings."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        sections = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "heading", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class Commands(click.Group):
    """A group of such commands, that says where options go."""

    command_class = Command

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            where = f"stands before the command; options follow it: {context.command_path} COMMAND"
            raise OneSentence(f"{error.option_name} {where} {error.option_name} ...") from None


# --- Types of values ---

FILE, COUNT = click.Path(path_type=Path), click.IntRange(1, 10**6)


class ListOf(click.ParamType):
    """Values of one type with commas between them, as a list."""

    name = "list"

    def __init__(self, kind: click.ParamType):
        self.kind = kind

    def convert(self, value, parameter, context) -> list:
        parts = value if isinstance(value, list) else value.split(",")
        return [self.kind.convert(part, parameter, context) for part in parts]


class Existing(click.Path):
    """A place to read, as text. Where there is none, what has nearly its name is offered."""

    def convert(self, value, parameter, context) -> str:
        folder, name = os.path.split(value)
        if value != "-" and not os.path.exists(value) and os.path.isdir(folder or "."):
            there = os.listdir(folder or ".") if os.access(folder or ".", os.R_OK) else []
            for near in difflib.get_close_matches(name, there, 1):
                self.fail(f"{value} does not exist; did you mean {os.path.join(folder, near)}?")
        return super().convert(value, parameter, context)


INPUT = Existing(exists=True, dir_okay=False, allow_dash=True)
FOLDER = Existing(file_okay=False)  # a Hub id may stand for it
FOLDER.name = "folder"


# --- Options ---
# Where the default is None, "not given", `show_default` says what then counts.


def options(*chosen: Callable) -> Callable:
    """One decorator that adds options to a command, in this order."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(chosen), command)


def under(heading: str) -> Callable:
    """`click.option`, for options under this heading."""
    return functools.partial(click.option, cls=Option, heading=heading)


option, method, lossless, drawing = map(under, ("Options", "Method", "Lossless", "Drawing tokens"))
answers, view, machine = map(under, ("Input and output", "View", "Model and machine"))

threads = lambda option: option(
    "--threads", type=click.IntRange(1, 1024), show_default="torch's choice",
    help="CPU threads; beside other programs fewer are often faster.",
)  # fmt: skip
batch_option = machine("--batch-size", type=COUNT, default=16, help="Prompts decoded at the same time.")
record_option = machine(
    "--record/--no-record", default=True, help="CUDA: replay passes as CUDA graphs, faster."
)
model_options = options(  # which model a command opens, and where: what `open_model` takes
    machine("--model", type=FOLDER, default=str(SHIPPED), show_default="the demo model, tiny/checkpoint",
            help="A checkpoint: a folder or Hub id."),
    machine("--adapter", type=FOLDER, help="A draft adapter for --model: a folder or Hub id."),
    machine("--device", default="auto", help="auto, cpu, cuda or mps."),
    machine("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
            help="auto: as in the files."),
    machine("--prepack/--no-prepack", "packed", default=True,
            help="CPU: keep the weights as its matrix products read them, faster."),
    threads(machine),
)  # fmt: skip
decoding_options = options(  # how an answer is decoded: what `take_decoding` takes
    method("--block-size", type=COUNT, show_default="the checkpoint's",
           help="Tokens that are denoised together; 1 is autoregressive decoding (AR)."),
    method("--sub-block-size", type=COUNT, show_default="the greatest common divisor of 8 and the block",
           help="Tokens of a block that are revealed before the next ones."),
    method("--threshold", type=click.FloatRange(0, 1), show_default="0.9",
           help="Keep guesses of more confidence than this; 1 keeps one per pass."),
    method("--accept", type=click.Choice(["threshold", "prefix"]), show_default="threshold",
           help="Keep all guesses above the threshold, or only those before the first one below."),
    method("--cache", type=click.Choice(["none", "block", "dual"]), show_default="block",
           help="Compute all again, or keep finished blocks, or (DualCache) also most of a block."),
    lossless("--verify", is_flag=True, help="Keep only guesses that AR would choose too. With an --adapter a "
             "few timed passes decide between drafts, drafts ahead and AR."),
    lossless("--draft-width", type=COUNT, help="Tokens that a pass of --verify drafts.",
             show_default="the adapter's, else half a block, or with --draft-ahead an eighth"),
    lossless("--draft-ahead", is_flag=True, default=None,
             help="Draft in verifying passes too: wider passes, often fewer."),
    drawing("--temperature", type=click.FloatRange(0, 1e4), default=0.0,
            help="0 takes the most probable token; above, tokens are drawn, the higher the wilder."),
    drawing("--top-p", type=click.FloatRange(0, 1), show_default="1",
            help="Draw from the most probable tokens that together reach this probability."),
    drawing("--top-k", type=COUNT, show_default="all", help="Draw from so many of the most probable tokens."),
    drawing("--seed", type=click.IntRange(0, 2**63 - 1), show_default="another each time",
            help="Makes drawing repeatable."),
    answers("--max-new-tokens", type=COUNT, default=256, help="The longest answer."),
)  # fmt: skip


def take_decoding(given: dict) -> Decoding:
    """Takes a command's decoding options out of `given`. Raises InputError for those that contradict."""
    from fastdllm import Decoding, require
    from verify import Verified

    verify, names = given.pop("verify"), Verified.__dataclass_fields__
    named = {name: given.pop(name) for name in names if name in given}
    named = {name: value for name, value in named.items() if value is not None}
    idle, advice = ("draft_width", "draft_ahead"), "is for --verify; add it, or leave"
    if verify:
        idle = ("block_size", "sub_block_size", "threshold", "accept", "cache")
        advice = "means nothing to --verify, which writes what AR would; leave"
    for name in named:
        require(name not in idle, f"{flag_of(name)} {advice} {flag_of(name)} out.")
    return (Verified if verify else Decoding)(**named)


def resolve(asked: Decoding, model: Qwen2) -> Decoding:
    """What was asked for, with the model's values; says what a user should know of it."""
    import torch

    from fastdllm import Decoding, rounds_by_width
    from verify import SAME_BITS, Verified, adapter_of

    decoding, trained, verify = asked.resolve(model), model.config.block_size, isinstance(asked, Verified)
    size, sub = decoding.block_size, decoding.sub_block_size
    if adapter_of(model) and not verify:
        price = "quality is not guaranteed" if size > 1 else "it changes nothing"
        say(f"the adapter learnt drafts only; without --verify {price}.")
    elif size not in (1, trained):
        paper = "paper, 1.5B, GSM8K: 60.2 at 32, 58.5 at 8, 53.2 at 2"
        say(f"the checkpoint was trained with block size {trained}; another one costs accuracy ({paper}).")
    if sub < min(8, size) and asked.sub_block_size is None:
        odd = f"block size {size} is no multiple of 8, so its sub-blocks have {counted(sub, 'token')}"
        say(f"{odd}, which is slow; --sub-block-size {size} takes the whole block.")
    if verify and rounds_by_width(model):
        parts = "round otherwise than AR's in bfloat16, so an answer may part from AR's at a tie"
        if isinstance(model.lm_head, torch.nn.Linear):
            say(f"without prepacked weights wide passes {parts}.")
        elif decoding.widest() > SAME_BITS:
            say(f"passes of {decoding.widest()} tokens {parts}; up to {SAME_BITS} do not.")
    elif verify and model.weight.element_size() < 4:
        half = str(model.weight.dtype).removeprefix("torch.")
        say(f"in {half} rounding may depend on a pass's width here; an answer may part from AR's at a tie.")
    for name in ("top_p", "top_k", "seed"):
        if getattr(asked, name) != getattr(Decoding, name) and not asked.temperature:
            say(f"{flag_of(name)} changes nothing at temperature 0.")
    return decoding


def choose(asked: Decoding, decoding: Decoding, model: Qwen2, rows: int = 1, recorded=None) -> Decoding:
    """A fast way of `--verify` for so many rows, where its options leave it open; says which one it is.

    Without an adapter's counts of held-out drafts it is `decoding`: what was asked for, resolved.
    """
    from fastdllm import rounds_by_width
    from verify import Verified, adapter_of, choose_drafts

    adapter = adapter_of(model)
    if not adapter or not isinstance(asked, Verified) or asked.draft_width or asked.draft_ahead:
        return decoding
    if not adapter.heldout_kept:
        say("the adapter has no held-out counts (train.py draft --heldout), so drafts may be slower than AR.")
        return decoding
    chosen, same_bits = choose_drafts(model, asked, rows, recorded)
    if not isinstance(chosen, Verified):
        little = f"by timed passes drafts gain too little here ({counted(rows, 'row')})"
        say(f"{little}, so --verify runs plain AR.")
        return chosen
    ahead = " in every pass (--draft-ahead)" if chosen.draft_ahead else ""
    way = f"drafts of {counted(chosen.draft_width, 'token')}{ahead}"
    say(f"--verify takes {way}, by timed passes.")
    if not same_bits and rounds_by_width(model):
        say("in bfloat16 rounding depends on a pass's width here; an answer may part from AR's at a tie.")
    return chosen


# --- Models ---


def own_device(device: str) -> str:
    """This process's device, among those that `torchrun` started."""
    import torch

    from checkpoint import pick_device

    local = os.environ.get("LOCAL_RANK")
    if local and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
        torch.cuda.set_device(pick_device(device))  # before anything else touches a device
    return pick_device(device)


def open_model(
    model: str,
    adapter: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    packed: bool = True,
    threads: int | None = None,
    record: bool = False,
) -> tuple[Qwen2, Tokenizer | None, RecordedPasses | None]:
    """Model, tokenizer, and on CUDA recorded passes, for decoding on this process's device."""
    import torch

    from checkpoint import load
    from fast import RecordedPasses, avoid_cudnn_attention, prepack
    from fastdllm import require, rounds_by_width
    from verify import load_adapter

    alone = "--adapter fits the model that it was made for, not the demo model; give that with --model."
    require(not adapter or model != str(SHIPPED), alone)
    if threads:
        torch.set_num_threads(threads)
    network, tokenizer = load(model, own_device(device), dtype)
    network = load_adapter(network, adapter) if adapter else network
    one_dnn = torch.backends.mkldnn.is_available()
    if rounds_by_width(network) and not (one_dnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        say("this CPU is slow in bfloat16; --dtype float32 is faster here.")
    recorded = None
    if network.weight.is_cuda:
        avoid_cudnn_attention()
        recorded = RecordedPasses(network) if record else None
    return prepack(network) if packed else network, tokenizer, recorded
