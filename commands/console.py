"""What all commands share: mistakes as one sentence, options, devices, and the model that they open.

torch takes seconds to import. So it is imported where something runs, and help pages show at once.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
HELP_OPTIONS = {"help_option_names": ["-h", "--help"], "show_default": True}
# this process's number, and how many torchrun started
TORCHRUN = os.environ if "LOCAL_RANK" in os.environ else {}
RANK, PROCESSES = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))


# --- Mistakes ---


class OneSentence(click.ClickException):
    """A user's mistake: one sentence on stderr and exit status 2."""

    exit_code = 2


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


class Commands(click.Group):
    """A group that names the nearest option for one that does not exist, and says where options go."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            where = f"stands before the command; options follow it: {context.command_path} COMMAND"
            raise OneSentence(f"{error.option_name} {where} {error.option_name} ...") from None

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except click.NoSuchOption as error:
            command, near = error.ctx.command_path, error.possibilities or []
            hint = f"did you mean {near[0]}?" if near else f"see {command} --help."
            raise OneSentence(f"{command} has no option {error.option_name}; {hint}") from None


def require_writable(flag: str, path: Path) -> None:
    """Raises InputError where the folder is missing, or `path` is no regular file; call it before work."""
    from fastdllm import require

    folder = path.absolute().parent
    require(folder.is_dir(), f"{flag} {path}: the folder {folder} does not exist.")
    require(not path.is_dir(), f"{flag} {path}: is a folder; name a file.")
    require(path.is_file() or not path.exists(), f"{flag} {path}: is no regular file; name a file.")
    require(os.access(folder, os.W_OK), f"{flag} {path}: nothing can be written in the folder {folder}.")


@contextmanager
def ctrl_c() -> Iterator[list]:
    """A list that Ctrl-C fills, so that the caller ends after the pass in work; a second one interrupts."""
    pressed = []

    def handler(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def say(note: str) -> None:
    """Print a note once, from the first process."""
    if RANK == 0:
        click.echo(f"Note: {note}", err=True)


# --- Options ---
# Where the default is None, "not given", `show_default` says what then counts.

FILE, COUNT = click.Path(path_type=Path), click.IntRange(1, 10**6)


class ListOf(click.ParamType):
    """Values of one type with commas between them, as a list."""

    name = "list"

    def __init__(self, kind: click.ParamType):
        self.kind = kind

    def convert(self, value, parameter, context) -> list:
        parts = value if isinstance(value, list) else value.split(",")
        return [self.kind.convert(part, parameter, context) for part in parts]


def options(*chosen: Callable) -> Callable:
    """One decorator that adds options to a command, in this order."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(chosen), command)


threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), show_default="torch's choice",
    help="CPU threads; beside other programs fewer are often faster.",
)  # fmt: skip
batch_option = click.option("--batch-size", type=COUNT, default=16, help="Prompts decoded at the same time.")
record_option = click.option(
    "--record/--no-record", default=True, help="CUDA: replay passes as CUDA graphs, faster."
)
model_options = options(  # which model a command opens, and where: what `open_model` takes
    click.option("--model", default=str(SHIPPED), show_default="tiny/checkpoint, the demo model",
                 help="A checkpoint: a folder or Hub id."),
    click.option("--adapter", show_default="none", help="A draft adapter for --verify: a folder or Hub id."),
    click.option("--device", default="auto", help="auto, cpu, cuda or mps."),
    click.option("--dtype", default="auto", help="auto (as in the files), float32, bfloat16 or float16."),
    click.option("--prepack/--no-prepack", "packed", default=True,
                 help="CPU: keep the weights as its matrix products read them, faster."),
    threads_option,
)  # fmt: skip
decoding_options = options(  # how an answer is decoded: what `take_decoding` takes
    click.option("--block-size", type=COUNT, show_default="the checkpoint's",
                 help="Tokens that are denoised together; 1 is autoregressive decoding (AR)."),
    click.option("--sub-block-size", type=COUNT, show_default="8, or what divides the block",
                 help="Tokens of a block that are revealed before the next ones."),
    click.option("--threshold", type=click.FloatRange(0, 1), show_default="0.9",
                 help="Keep guesses of more confidence than this; 1 keeps one per pass."),
    click.option("--accept", type=click.Choice(["threshold", "prefix"]), show_default="threshold",
                 help="Keep all guesses above the threshold, or only those before the first one below."),
    click.option("--cache", type=click.Choice(["none", "block", "dual"]), show_default="block",
                 help="Compute all again, or keep finished blocks, or (DualCache) also most of a block."),
    click.option("--verify", is_flag=True, help="Lossless: keep only guesses that AR would choose too."),
    click.option("--draft-width", type=COUNT, show_default="the adapter's, else half a block",
                 help="With --verify: tokens that a pass drafts."),
    click.option("--draft-ahead", is_flag=True, default=None, show_default="off",
                 help="With --verify: draft in verifying passes too, so fewer but wider passes."),
    click.option("--max-new-tokens", type=COUNT, default=256, help="The longest answer."),
    click.option("--temperature", type=click.FloatRange(0, 1e4), default=0.0,
                 help="0 takes the most probable token; above, tokens are drawn, the higher the wilder."),
    click.option("--top-p", type=click.FloatRange(0, 1), show_default="1",
                 help="Draw from the most probable tokens that together reach this probability."),
    click.option("--top-k", type=COUNT, show_default="all",
                 help="Draw from so many of the most probable tokens."),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), show_default="another each time",
                 help="Makes drawing repeatable."),
)  # fmt: skip


def take_decoding(given: dict) -> Decoding:
    """Takes a command's decoding options out of `given`. Raises InputError for those that contradict."""
    from fastdllm import Decoding, require
    from verify import Verified

    verify, names = given.pop("verify"), Verified.__dataclass_fields__
    named = {name: given.pop(name) for name in names if name in given}
    named = {name: value for name, value in named.items() if value is not None}
    for name in named:
        flag, of_blocks = flag_of(name), ("block_size", "sub_block_size", "threshold", "accept", "cache")
        lossless = f"--verify writes what AR would write, so leave {flag} out, or leave --verify out."
        require(not verify or name not in of_blocks, lossless)
        drafts = f"{flag} is for --verify; add --verify, or leave {flag} out."
        require(verify or name not in ("draft_width", "draft_ahead"), drafts)
    return (Verified if verify else Decoding)(**named)


def resolve(asked: Decoding, model: Qwen2) -> Decoding:
    """What was asked for, with the model's values; says what a user should know of it."""
    from fastdllm import Decoding, require
    from verify import Verified, adapter_of

    verify, trained = isinstance(asked, Verified), model.config.block_size
    no_drafts = "--verify needs a model that can draft: give it an --adapter, or adapt it (train.py adapt)."
    require(not verify or model.config.mask_token_id is not None, no_drafts)
    decoding = asked.resolve(model)
    size = decoding.block_size
    if adapter_of(model) and not verify:
        price = "quality is not guaranteed" if size > 1 else "it changes nothing"
        say(f"the adapter learnt drafts only; without --verify {price}.")
    elif size == 1 < trained and not verify:
        say("block size 1 decodes autoregressively, one token per pass.")
    elif size not in (1, trained):
        paper = "paper, 1.5B, GSM8K: 60.2 at 32, 59.7 at 16, 58.5 at 8, 56.8 at 4, 53.2 at 2"
        say(f"the checkpoint was trained with block size {trained}; another one costs accuracy ({paper}).")
    idle = {name: "block size 1" for name in ("threshold", "accept", "cache") if size == 1 and not verify}
    idle |= {name: "temperature 0" for name in ("top_p", "top_k", "seed") if not asked.temperature}
    for name, place in idle.items():
        if getattr(asked, name) not in (getattr(Decoding, name), "none"):  # without a cache even AR differs
            say(f"{flag_of(name)} changes nothing at {place}.")
    return decoding


# --- Models ---


def own_device(device: str) -> str:
    """This process's device, among those that `torchrun` started."""
    import torch

    from checkpoint import pick_device
    from fastdllm import require

    local = os.environ.get("LOCAL_RANK")
    if local and device in ("auto", "cuda") and torch.cuda.is_available():
        there = torch.cuda.device_count()
        few = f"torchrun started more processes than the {there} GPUs here; lower --nproc-per-node."
        require(int(local) < there, few)
        torch.cuda.set_device(int(local))  # before anything else touches a device
        device = f"cuda:{local}"
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
    from verify import load_adapter

    if threads:
        torch.set_num_threads(threads)
    network, tokenizer = load(model, own_device(device), dtype)
    network = load_adapter(network, adapter) if adapter else network
    recorded = None
    if network.weight.is_cuda:
        avoid_cudnn_attention()
        recorded = RecordedPasses(network) if record else None
    return prepack(network) if packed else network, tokenizer, recorded
