"""Command line of Fast-dLLM v2: `python cli.py generate --threshold 0.9 --block-size 32`."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import errno
import functools
import glob
import hashlib
import itertools
import json
import math
import platform
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, fields, replace
from datetime import date
from functools import partial
from pathlib import Path

import click
import torch
from tqdm import tqdm

from benchmarks.judging import PAPER_PROMPT, aup, paired_drop, read_problems, score_line, scores, verdict
from fast import RecordedPasses, avoid_cudnn_attention, prepack
from fastdllm import (
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    DTYPES,
    Config,
    Decoding,
    InputError,
    Memory,
    Pass,
    Qwen2,
    Result,
    Tokenizer,
    check_prompt,
    decode,
    load,
    locate,
    pick_device,
    read_checkpoint,
    read_json,
    replace_file,
    require,
    shards,
)
from fastdllm import generate as generate_all
from viewer.terminal import watch
from viewer.trace import trace_page

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
with suppress(ImportError):  # a history and editing keys for `input`, where the system has them
    import readline  # noqa: F401

VERSION = "2.0"
SHIPPED = Path(__file__).parent / "tiny" / "checkpoint"
SAMPLE = (
    "Zoe has 5 bags with 7 cards in each. Then the cards double in number. Jack gives Zoe 14 more. She "
    "shares them equally among 6 friends. How many cards does each friend get?"
)
MOST = 10**5  # a --count above this is taken for a typing error
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
# this process's number, and how many torchrun started
TORCHRUN = os.environ if "LOCAL_RANK" in os.environ else {}
RANK, PROCESSES = int(TORCHRUN.get("RANK", 0)), int(TORCHRUN.get("WORLD_SIZE", 1))


# --- Mistakes ---


class OneSentence(click.ClickException):
    """A user's mistake: one sentence on stderr and exit status 2."""

    exit_code = 2


def with_flags(sentence: str) -> str:
    """Put flags for names of Decoding's fields; a name that is a plain word counts only as the first word."""
    names = "|".join(rf"(?<![\w/.-]){name}\b" if "_" in name else rf"^{name}\b" for name in KNOBS)
    return re.sub(names, lambda found: "--" + found[0].replace("_", "-"), sentence)


def reports_mistakes(command: Callable) -> Callable:
    """Turn a mistake into one sentence: bad input, files that cannot be opened, full memory, Ctrl-C."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except InputError as error:
            raise OneSentence(with_flags(str(error))) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # nobody reads on: click ends quietly
                raise
            place = "" if error.filename is None else f"{error.filename}: "
            raise OneSentence(f"{place}{error.strerror or error}.") from None
        except (RuntimeError, MemoryError) as error:
            full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            if not full and "allocate memory" not in str(error):  # torch's words for a CPU's memory
                raise
            raise OneSentence("The memory is full; a smaller batch or shorter rows need less.") from None
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    return wrapped


def require_writable(flag: str, path: Path) -> None:
    """Raises InputError where the folder is missing, or `path` is a device or a pipe; call it before work."""
    folder = path.absolute().parent
    require(folder.is_dir(), f"{flag} {path}: the folder {folder} does not exist.")
    require(path.is_file() or not path.exists(), f"{flag} {path}: is no regular file; name a file.")


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


# --- Options ---


class Grouped(click.Command):
    """A command whose help shows its options in groups, by each option's `group`."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list] = {}
        for parameter in self.get_params(context):
            if record := parameter.get_help_record(context):
                groups.setdefault(getattr(parameter, "group", "Other options"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


class GroupedOption(click.Option):
    """Shows its default, unless its help says it in words."""

    def __init__(self, *given, group: str = "Other options", **more):
        default = more.get("default")
        hidden = "[default" in more.get("help", "") or default is None or default is False or default == ""
        super().__init__(*given, show_default=not hidden, **more)
        self.group = group


option = partial(click.option, cls=GroupedOption)


def numbers(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable:
    """Parses an option's comma-separated list of numbers in [low, high]; None stays None."""

    def parse(context, parameter, text):
        with suppress(ValueError):
            found = text and [kind(part) for part in text.split(",")]
            if all(low <= number <= high for number in found or []):
                return found
        flag = "--" + parameter.name.replace("_", "-")
        raise OneSentence(f"{flag} is {text!r:.80}; give numbers from {low:g} to {high:g} with commas.")

    return parse


def count_option(flag: str, low: int = 1, high: int = 10**6, **more) -> Callable:
    """An option for one whole number in [low, high]."""
    return option(flag, type=click.IntRange(low, high), **more)


counts = numbers(int, 1, 10**6)
split_words = lambda context, parameter, text: text.split(",")
FILE = click.Path(dir_okay=False, path_type=Path)


def several(*decorators: Callable) -> Callable:
    """Several options as one decorator."""

    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def options(cls, *names: str, group: str = "Other options", **overrides: dict) -> Callable:
    """An option for each named field of a dataclass, with the field's default, help and limits.

    The metadata of a field has `help`, and if they apply `kind` (int or float), `low`, `high` and `choices`;
    `overrides` gives further arguments of `click.option` by the field's name.
    """

    def one(name: str) -> Callable:
        field = cls.__dataclass_fields__[name]
        rule, flag = field.metadata, "--" + name.replace("_", "-")
        kind = {int: click.IntRange, float: click.FloatRange}.get(rule.get("kind"))
        more = {"default": field.default, "help": rule["help"]}
        if rule.get("choices"):
            more["type"] = click.Choice(rule["choices"])
        elif kind:
            more["type"] = kind(rule.get("low"), rule.get("high"))
        if type(field.default) is bool:
            flag += f"/--no-{flag[2:]}"
        return option(flag, group=group, **more | overrides.get(name, {}))

    return several(*map(one, names))


KNOBS = [field.name for field in fields(Decoding) if "help" in field.metadata]
decoding_options = options(Decoding, *KNOBS, group="Decoding")


model_option, file_option = partial(option, group="Model"), partial(option, group="Input and output")
# apart from the others, since the cache that chat keeps from turn to turn cannot be recorded
record_option = model_option("--record/--no-record", default=True, help="CUDA: replay passes as CUDA graphs.")
source_options = several(
    model_option("--model", default=str(SHIPPED), help="Folder or Hub id  [default: the shipped one]"),
    model_option("--adapter", help="Draft adapter over the model: folder or Hub id."),
    model_option("--device", default="auto", help="auto, cpu, cuda or mps."),
    model_option("--dtype", default="auto", help="auto (the files'), float32, bfloat16 or float16."),
    model_option(
        "--prepack/--no-prepack", "packed", default=True, help="CPU: weights in oneDNN's order, faster."
    ),
)
model_options = several(source_options, record_option)


def split_options(given: dict) -> tuple[Decoding, dict]:
    """A command's options as its decoding, and what `open_model` takes.

    Raises InputError for an option that the decoding would ignore.
    """
    decoding = Decoding(**{name: given.pop(name) for name in KNOBS})
    of_drafts = ("draft_width", "draft_ahead", "draft_confidence")
    of_blocks = ("threshold", "sub_block_size", "tokens_per_pass", "accept")
    verify = decoding.verify
    reason = "--verify keeps what AR would choose" if verify else "Without --verify nothing is drafted"
    for name in of_blocks if verify else of_drafts:
        is_default = getattr(decoding, name) == getattr(Decoding, name)
        require(is_default, f"{reason}, so leave --{name.replace('_', '-')} out.")
    return decoding, given


def own_device(device: str) -> str:
    """This process's device, among those that `torchrun` started."""
    local = os.environ.get("LOCAL_RANK")
    if local and device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(local))  # before anything else touches a device
        device = f"cuda:{local}"
    return pick_device(device)


def say(note: str) -> None:
    """Print a note once, from the first process."""
    if RANK == 0:
        click.echo(f"Note: {note}", err=True)


def open_model(
    model: str, adapter: str | None, device: str, dtype: str, packed: bool, record: bool = False
) -> tuple[Qwen2, Tokenizer | None, RecordedPasses | None]:
    """Model, tokenizer, and on CUDA recorded passes, for decoding on this process's device."""
    with warnings.catch_warnings(record=True) as found:
        network, tokenizer = load(model, own_device(device), dtype, adapter)
    for warning in found:
        say(str(warning.message))
    recorded = None
    if network.weight.is_cuda:
        avoid_cudnn_attention()
        recorded = RecordedPasses(network) if record else None
    return prepack(network) if packed else network, tokenizer, recorded


# --- Prompts ---


def encode_prompt(
    request: dict, tokenizer: Tokenizer | None, system: str | None = None, raw: bool = False
) -> list[int]:
    """Token ids of a request with `prompt_ids`, `messages` or `prompt`, or InputError for anything else."""
    if "prompt_ids" in request:
        require(isinstance(request["prompt_ids"], list), "prompt_ids must be a list of integers.")
        require(not raw and system is None, "--raw and --system are for text, not for token ids.")
        return request["prompt_ids"]
    require(tokenizer, "The checkpoint has no tokenizer; give token ids with --prompt-ids.")
    messages = request.get("messages")
    if "prompt" in request:
        prompt = request["prompt"]
        require(isinstance(prompt, str) and prompt.strip(), "The prompt is empty; give it some text.")
        if raw:
            require(system is None, "--raw continues the prompt as it is, so --system has no place in it.")
            return tokenizer.encode(prompt)
        messages = [{"role": "user", "content": prompt}]
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    good = good and all(isinstance(m.get(key), str) for m in messages for key in ("role", "content"))
    require(good, "This needs `prompt`, `prompt_ids`, or `messages`: objects with `role` and `content`.")
    require(not raw, "--raw is for a prompt, not for messages.")
    if system is not None:
        first = messages[0]["role"]
        require(first != "system", "The messages have a system message already; leave --system out.")
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.chat(messages)


def encode_prompts(
    requests: dict[str, dict], tokenizer, decoding: Decoding, config: Config, **how
) -> list[list[int]]:
    """Checked token ids of each request; a mistake names the request's place, such as "FILE, line 3"."""
    prompts = []
    for place, request in requests.items():
        try:
            prompts.append(check_prompt(encode_prompt(request, tokenizer, **how), decoding, config))
        except InputError as error:
            raise InputError(f"{place}: {error}" if place else str(error)) from None
    return prompts


def read_jsonl(path: str) -> dict[str, dict]:
    """The objects of a JSONL file ("-": stdin), by their place. Raises InputError for a broken line."""
    require(path != "-" or sys.stdin, "Standard input is closed; give a file's name.")
    with click.open_file(path, "rb") as file:
        records = parse_jsonl(file.read(), path)
    require(records, f"{path}: holds no records.")
    return records


def parse_jsonl(content: bytes, path: str | Path) -> dict[str, dict]:
    records = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            records[place] = json.loads(line)
            json.dumps(records[place], ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:  # also no UTF-8, or half a surrogate pair
            raise InputError(f"{place}: not valid JSON ({error}).") from None
        require(isinstance(records[place], dict), f"{place}: not a JSON object.")
    return records


# --- Reports ---


def report(result: Result, prompt: list[int], tokenizer: Tokenizer | None, seconds=None) -> dict:
    """The facts of one answer. `new_tokens` includes the stop token, not the prompt."""
    return {
        "text": tokenizer.decode(result.tokens) if tokenizer else None,
        "token_ids": result.tokens,
        "prompt_tokens": len(prompt),
        "passes": result.passes,
        **rates([result], seconds),
        "finish_reason": result.finish_reason or "interrupted",
    }


def rates(results: list[Result], seconds: float | None = None) -> dict:
    """Counts and rates of answers, without their prefills; tokens per second where the time is known."""
    tokens, passes = sum(len(r.tokens) for r in results), sum(r.forward_passes for r in results)
    found = {"new_tokens": tokens, "forward_passes": passes, "tokens_per_forward": tokens / max(1, passes)}
    return found | ({"seconds": seconds, "tokens_per_second": tokens / seconds} if seconds else {})


def summary_line(found: dict) -> str:
    """What `rates` found in words, and the finish reason where there is one."""
    line = f"{found['new_tokens']} tokens in {found['forward_passes']} forward passes: "
    line += f"{found['tokens_per_forward']:.2f} tokens per forward"
    line += f", {found['tokens_per_second']:.1f} tokens/s" if "tokens_per_second" in found else ""
    return line + (f", {found['finish_reason']}" if "finish_reason" in found else "")


def environment(device: str) -> dict:
    """Hardware, versions, command and date of a measurement on `device`."""
    device, cpuinfo = torch.device(device), Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    processor = names[0] if names else platform.processor() or platform.machine()
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "date": date.today().isoformat(),
    }


def note_of_options(model: Qwen2, decoding: Decoding) -> None:
    """What a user should know of options that work at a price."""
    size, trained, note = decoding.block_size, model.config.block_size, None
    if model.mask_row is not None and not decoding.verify:
        note = "the adapter learnt drafts only; without --verify "
        note += "quality is not guaranteed" if size > 1 else "it changes nothing"
    elif size == 1 < trained and not decoding.verify:
        note = "block size 1 decodes autoregressively, one token per pass"
    elif size not in (1, trained):
        paper = "paper, 1.5B, GSM8K: 60.2 at 32, 59.7 at 16, 58.5 at 8, 56.8 at 4, 53.2 at 2"
        note = f"the checkpoint was trained with block size {trained}; another one costs accuracy ({paper})"
    if note:
        say(f"{note}.")


# --- generate ---

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


@click.group(help=__doc__, context_settings=HELP_OPTIONS)
@click.version_option(VERSION, prog_name="fastdllm")
@click.pass_context
@reports_mistakes
def cli(context):
    name = context.invoked_subcommand
    ok = PROCESSES == 1 or name in ("generate", "eval")
    require(ok, f"cli.py {name} runs in one process; start it with python, not torchrun.")


@cli.command(cls=Grouped)
@click.argument("prompt", required=False)
@model_options
@decoding_options
@file_option("--system", help="System message.")
@file_option("--raw", is_flag=True, help="Continue the prompt as it is, without chat template.")
@file_option("--prompt-ids", help='Token ids instead of text: "1,2,3".')
@file_option("--input", "source", help="JSONL with `prompt`, `messages` or `prompt_ids`; - is stdin.")
@file_option("--output", "target", default="-", help="JSONL for the answers to --input  [default: stdout]")
@file_option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@file_option("--watch", "live", is_flag=True, help="Draw the answer in a terminal as it is written.")
@file_option("--delay", type=click.FloatRange(0, 60), default=0.15, help="Seconds per pass of --watch.")
@file_option(
    "--trace", type=FILE, help="Write a page that replays the passes, beside AR's, to this HTML file."
)
@reports_mistakes
def generate(prompt, system, raw, prompt_ids, source, target, as_json, live, delay, trace, **given):
    """Answer PROMPT, or what is piped in, or a sample problem.

    With --input and --output, a run that was broken off goes on where it stopped, and `torchrun
    --nproc-per-node N cli.py generate ...` shares the prompts out among N devices. With --block-size 1 the
    output file serves as --data of `train.py draft`.
    """
    asked = sum(value is not None for value in (prompt, prompt_ids, source))
    require(asked < 2, "PROMPT, --prompt-ids and --input exclude one another; give one of them.")
    one = source is None
    require(target == "-" or not one, "--output needs --input; one answer goes to standard output.")
    require(one or target != "-" or sys.stdout, "Standard output is closed; name a file with --output.")
    require(not math.isnan(delay), "--delay is nan; give seconds, like 0.15.")
    shown = as_json or live or trace
    require(one or not shown, "--json, --watch and --trace show one answer; leave them out with --input.")
    require(PROCESSES == 1 or source not in (None, "-"), "Several processes need --input FILE to share out.")
    require(not (as_json and live), "--watch draws the answer and --json prints an object; give one of them.")
    require(target == "-" or not Path(target).is_dir(), f"--output {target}: is a folder; name a file.")
    if "-" not in (source, target) and Path(target).exists() and Path(source).exists():
        same = os.path.samefile(source, target)
        require(not same, f"--output {target} is the file of --input; name another one.")
    if trace:
        require_writable("--trace", trace)
    decoding, chosen = split_options(given)
    decoding = replace(decoding, runner_up=bool(trace))
    if not one:
        requests = read_jsonl(source)
    elif prompt_ids is not None:
        integers = re.fullmatch(r"\s*-?\d{1,18}\s*(,\s*-?\d{1,18}\s*)*", prompt_ids)
        require(integers, f'--prompt-ids is {prompt_ids!r:.80}; give integers with commas, like "1,2,3".')
        requests = {"": {"prompt_ids": [int(i) for i in prompt_ids.split(",")]}}
    else:
        if prompt is None and sys.stdin and not sys.stdin.closed and not sys.stdin.isatty():
            prompt = sys.stdin.buffer.read().decode(errors="surrogateescape").strip() or None
        if prompt is None:
            prompt = SAMPLE
            click.echo(f"{prompt}\n", err=True)
        requests = {"": {"prompt": prompt}}

    network, tokenizer, recorded = open_model(**chosen)
    decoding = decoding.resolve(network.config)
    prompts = encode_prompts(requests, tokenizer, decoding, network.config, system=system, raw=raw)
    note_of_options(network, decoding)
    if live and not (tokenizer and sys.stdout and sys.stdout.isatty()):
        click.echo("Note: --watch draws in a terminal only; this is the plain text.", err=True)
        live = False
    if one:
        delay = delay if live else None
        answer_one(network, tokenizer, prompts[0], decoding, recorded, as_json, delay, trace)
        return
    header = header_of(chosen, network, decoding)
    requests = list(requests.values())
    if raw or system is not None:  # so that a line says all of what was asked
        requests = [request | {"prompt_ids": ids} for request, ids in zip(requests, prompts)]
    answer_file(network, tokenizer, requests, prompts, decoding, recorded, target, header)


def answer_one(
    model, tokenizer, prompt, decoding, recorded, as_json: bool, delay: float | None, trace
) -> None:
    """Decode one prompt: text to stdout as it becomes final and a summary to stderr, or one JSON object.

    delay: seconds per pass of a live drawing; None: no drawing. trace: a file for the replay, or None.
    """
    show = (lambda text: None) if as_json else partial(click.echo, nl=False)
    passes = []
    if trace:  # the first pass after loading is slow: it runs once untimed
        next(decode(model, [prompt], decoding, None, recorded))
    result = stream_answer(model, tokenizer, prompt, decoding, recorded, show, delay=delay, keep=passes)
    found = report(result, prompt, tokenizer, passes[-1][1])
    if as_json:
        click.echo(json.dumps(found | asdict(decoding), ensure_ascii=False))
    else:
        click.echo()
        click.echo(summary_line(found), err=True)
    if trace:
        ar = replace(decoding, block_size=1, sub_block_size=1, verify=False, fuse_commit=False, cache="block")
        beside = []
        stream_answer(model, tokenizer, prompt, ar, recorded, lambda text: None, keep=beside)
        page = trace_page(tokenizer, prompt, passes, beside, summary_line(found), decoding)
        replace_file(trace, partial(Path.write_text, data=page, encoding="utf-8"))
    if result.finish_reason is None:
        sys.exit(INTERRUPTED)


def stream_answer(
    model, tokenizer, prompt, decoding, recorded, show, memory=None, delay=None, keep=None
) -> Result:
    """Decode one prompt, handing text to `show` as it becomes final; Ctrl-C ends it after the pass in work.

    keep: a list that gets each pass with the seconds up to its end, of decoding only, not of display.
    delay: see `answer_one`.
    """
    result, keep = Result(), [] if keep is None else keep

    def timed() -> Iterator[Pass]:
        seconds, began = 0.0, time.perf_counter()
        for pass_ in decode(model, [prompt], decoding, memory, recorded):
            seconds += time.perf_counter() - began
            keep.append((pass_, seconds))
            yield pass_
            began = time.perf_counter()

    def chunks() -> Iterator[list[int]]:
        passes = timed()
        if delay is not None:
            passes = watch(tokenizer, passes, len(prompt), model.config.mask_token_id, show, delay)
        for pass_ in passes:
            result.add(pass_)
            yield pass_.final
            if interrupted:
                return

    with ctrl_c() as interrupted:
        as_numbers = ("".join(f"{i} " for i in ids) for ids in chunks())
        for text in tokenizer.stream(chunks()) if tokenizer else as_numbers:
            if delay is None:
                show(text)
    return result


# --- Many prompts ---
# `torchrun --nproc-per-node 8 cli.py eval --output FILE` starts this program eight times, each on a device of
# its own. Each process answers its share of the prompts and appends to a part file of its own; the first one
# then puts the answers in order. They exchange nothing else. So an answer that was written is never lost, and
# the same command goes on after a kill, also with another number of processes. `generate --output FILE` does
# so with one process too; `eval`, whose file says which run it is of, then goes on from that file itself.


def finished(
    model: Qwen2, prompts: list[list[int]], decoding: Decoding, recorded, done: int = 0
) -> Iterator[tuple[int, Result]]:
    """Decode prompts in batches; yields index and result of each one when it ends.

    A bar begins at `done`. After Ctrl-C the pass in work is the last.
    """
    results, total = [Result() for _ in prompts], done + len(prompts)
    with tqdm(total=total, initial=done, unit="prompt", disable=RANK > 0) as bar, ctrl_c() as interrupted:
        for pass_ in decode(model, prompts, decoding, recorded=recorded):
            results[pass_.row].add(pass_)
            if pass_.finish_reason:
                bar.update()
                yield pass_.row, results[pass_.row]
            if interrupted:
                return


def in_order(results: Iterator[tuple[int, Result]]) -> Iterator[Result]:
    """Results in the order of their prompts, each as soon as possible."""
    waiting, given = {}, 0
    for index, result in results:
        waiting[index] = result
        while given in waiting:
            yield waiting.pop(given)
            given += 1


def answer_all(
    model, prompts: list[list[int]], decoding: Decoding, recorded, target: Path | None, header: dict, start=0
) -> Iterator[Result]:
    """Results of `prompts[start:]`, in order. Of several processes only the first one yields them.

    target: the file beside which each process writes its part; None: without parts, each result at once.
    """
    if target is None:
        require(PROCESSES == 1, "Several processes need --output FILE, beside which each writes its part.")
        yield from in_order(finished(model, prompts[start:], decoding, recorded, start))
        return
    go_on = f"what is answered is in {target}.rank-*, and the same command goes on."

    def ended_by_torchrun(*_) -> None:
        click.echo(f"Error: torchrun ends process {RANK}, since another one has failed; {go_on}", err=True)
        os._exit(1)

    if PROCESSES > 1:
        signal.signal(signal.SIGTERM, ended_by_torchrun)
    header = header | {"prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()}
    path = part_of(target)
    with locked(path, f"{path}: another run is writing it; wait for it, or name another --output.") as file:
        there = read_parts(target, header)
        cut_half_a_line(path)
        if not path.stat().st_size:
            write_line(file, header)
        # longest first, so that the processes end at about the same time
        order = sorted(range(start, len(prompts)), key=lambda i: -len(prompts[i]))[RANK::PROCESSES]
        left, count = [i for i in order if i not in there], 0
        answers = finished(model, [prompts[i] for i in left], decoding, recorded, len(order) - len(left))
        for index, result in answers:
            write_line(file, {"index": left[index]} | asdict(result))
            count += 1
    if count < len(left):
        click.echo(f"Interrupted: {go_on}", err=True)
        sys.exit(INTERRUPTED)
    if RANK > 0:
        return
    wanted = set(range(start, len(prompts)))
    while not wanted <= (there := read_parts(target, header)).keys():  # a process that dies ends this one
        time.sleep(0.5)
    yield from (there[i] for i in range(start, len(prompts)))
    for part in parts_of(target):  # the caller has written everything by now
        part.unlink()


def part_of(target: Path) -> Path:
    """This process's part file."""
    return Path(f"{target}.rank-{RANK}")


def answered_before(target: Path | None) -> bool:
    """Whether an earlier try has left a part file: then nobody knows how long the answers took."""
    return target is not None and part_of(target).exists()


def write_line(file, record: dict) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def cut_half_a_line(path: Path) -> None:
    """Cut off what follows the last line break: a killed process may leave it."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def parts_of(target: Path) -> list[Path]:
    return sorted(target.parent.glob(glob.escape(target.name) + ".rank-*"))


def read_parts(target: Path, header: dict) -> dict[int, Result]:
    """Results so far by the prompt's index, of this run and of an earlier try."""
    found = {}
    for part in parts_of(target):
        for line in written(part, header)[1:]:
            index = line.pop("index")
            found[index] = Result(**line)
    return found


def written(path: Path, header: dict) -> list[dict]:
    """Whole lines that an earlier run has written, its header first; none where there is no file.

    Raises InputError where that run was another one, naming what differs.
    """
    content = path.read_bytes() if path.exists() else b""
    first = json.dumps(header, ensure_ascii=False).encode()
    if content[: len(first)] != first[: len(content)]:
        there = None
        with suppress(ValueError, RecursionError):
            there = json.loads(content.partition(b"\n")[0])
        if isinstance(there, dict) and isinstance(there.get("options"), dict):
            # option by option, so that the message names the one that differs
            old, new = ({**h, **h["options"], "options": None} for h in (there, header))
            for name in new:
                differs = f"holds answers with {name} {old.get(name)}, not {new[name]}"
                require(old.get(name) == new[name], f"{path}: {differs}; name another file.")
        raise InputError(f"{path}: holds no answers of this run; remove it or name another file.")
    return list(parse_jsonl(content[: content.rfind(b"\n") + 1], path).values())


@contextmanager
def locked(path: Path, problem: str) -> Iterator:
    """The file, open for appending, by this process alone; a killed process leaves no lock.

    Raises InputError with `problem` where another process has it.
    """
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(problem) from None
        yield file


def header_of(chosen: dict, network: Qwen2, decoding: Decoding) -> dict:
    """First line of a file that a run can go on with: all that an answer depends on, but its prompt."""
    folder, used = locate(chosen["model"]), asdict(decoding)
    used.pop("batch_size")
    paths = [folder / name for name in shards(folder)]
    if chosen["adapter"] is not None:
        paths.append(locate(chosen["adapter"], files=ADAPTER_FILES) / ADAPTER_WEIGHTS)
    files = {path.name: path.stat() for path in paths}
    return {
        "model": chosen["model"],
        "adapter": chosen["adapter"],
        "dtype": str(network.weight.dtype),
        "weights": {name: [file.st_size, file.st_mtime_ns] for name, file in files.items()},
        "options": json.loads(json.dumps(used)),
    }


def answer_file(
    model, tokenizer, requests: list[dict], prompts, decoding: Decoding, recorded, target: str, header: dict
) -> None:
    """Decode many prompts; each answer is written with its request's fields."""
    results, began = [], time.perf_counter()
    place = Path(target)
    has_parts = target != "-" and (place.is_file() or not place.exists())  # a pipe has none
    place = place if has_parts else None
    resumed = answered_before(place)
    answers = answer_all(model, prompts, decoding, recorded, place, header)
    # lazy: an earlier file stays until there are answers to replace it
    opened = click.open_file(target, "w", encoding="utf-8", lazy=has_parts) if RANK == 0 else nullcontext()
    with closing(answers), opened as file:
        for result, request, prompt in zip(answers, requests, prompts):
            results.append(result)
            write_line(file, request | report(result, prompt, tokenizer))
    if RANK > 0:
        return
    found = rates(results, None if resumed else time.perf_counter() - began)
    click.echo(f"{len(results)} answers, " + summary_line(found), err=True)
    if len(results) < len(prompts):
        click.echo(f"Interrupted: {len(results)} of {len(prompts)} answers are written.", err=True)
        sys.exit(INTERRUPTED)


# --- eval ---


@cli.command("eval", cls=Grouped)
@click.argument("problems", required=False)
@model_options
@decoding_options
@count_option("--count", high=MOST, help="Only the first problems  [default: all of a file, 1000 shipped]")
@option("--instruction", default="", help="Text after each question.")
@option("--paper-prompt", is_flag=True, help=f"The paper's instruction for GSM8K: {PAPER_PROMPT}")
@option("--output", "target", type=FILE, help="Write each answer to JSONL.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@reports_mistakes
def evaluate(problems, count, instruction, paper_prompt, target, as_json, **given):
    """Accuracy on PROBLEMS, JSONL with `question` (or `messages`) and `answer`; default: the shipped held-out
    set.

    The answer is the last \\boxed{}, else what follows the last ####, else the last number. With --output, a
    run that was broken off goes on where it stopped, and `torchrun --nproc-per-node N cli.py eval ...` shares
    the problems out among N devices.
    """
    decoding, chosen = split_options(given)
    if target:
        require_writable("--output", target)
    both = paper_prompt and instruction
    require(not both, "--paper-prompt and --instruction exclude one another; give one.")
    instruction = "\n" + PAPER_PROMPT if paper_prompt else instruction
    records = None if problems is None else read_jsonl(problems)
    problems = read_problems(records, count, instruction)
    network, tokenizer, recorded = open_model(**chosen)
    decoding = decoding.resolve(network.config)
    prompts = encode_prompts(problems, tokenizer, decoding, network.config)
    problems = list(problems.values())
    header = header_of(chosen, network, decoding) if target else {}
    note_of_options(network, decoding)

    busy = f"{target}: another run is writing it; wait for it, or name another file."
    began = time.perf_counter()
    with locked(target, busy) if target and RANK == 0 else nullcontext() as file:
        lines = written(target, header) if target else []
        verdicts = lines[1:]
        same = len(verdicts) <= len(problems)
        same = same and all(line.items() >= p.items() for line, p in zip(verdicts, problems))
        require(same, f"{target}: holds answers to other problems; remove it or name another file.")
        if file:
            cut_half_a_line(target)
            if not lines:
                write_line(file, header)
        start, shared = len(verdicts), target if PROCESSES > 1 else None
        resumed = answered_before(shared)
        with closing(answer_all(network, prompts, decoding, recorded, shared, header, start)) as answers:
            for result, problem in zip(answers, problems[start:]):
                verdicts.append(verdict(problem, result, tokenizer))
                if file:
                    write_line(file, verdicts[-1])
    if RANK > 0:
        return
    tokens = sum(line["new_tokens"] for line in verdicts[start:])
    if verdicts:
        speed = None if resumed or not tokens else tokens / (time.perf_counter() - began)
        found = scores(verdicts) | {"tokens_per_second": speed}
        about = asdict(decoding) | environment(str(network.weight.device))
        click.echo(json.dumps(found | about) if as_json else score_line(found))
    if len(verdicts) < len(problems):
        kept = "are written; the same command goes on" if target else "count; with --output it could go on"
        click.echo(f"Interrupted: {len(verdicts)} of {len(problems)} answers {kept}.", err=True)
        sys.exit(INTERRUPTED)


# --- sweep ---


@cli.command(cls=Grouped)
@click.argument("problems", required=False)
@model_options
@option("--thresholds", default="0.5,0.7,0.8,0.9,0.95,1", callback=numbers(float, 0, 1))
@option("--block-sizes", help="[default: the checkpoint's]", callback=counts)
@option("--sub-block-sizes", default="8,32", callback=counts)
@option("--caches", default="block", help="Of none, block and dual.", callback=split_words)
@count_option("--count", high=MOST, default=200, help="Problems.")
@option("--instruction", default="", help="Text after each question.")
@option("--max-drop", type=click.FloatRange(0, 100), default=1.0, help="Points below AR to accept.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@options(Decoding, "batch_size", "max_new_tokens", batch_size={"default": 1})
@reports_mistakes
def sweep(
    problems, thresholds, block_sizes, sub_block_sizes, caches, count, instruction, max_drop, as_json,
    batch_size, max_new_tokens, **chosen,
):  # fmt: skip
    """Accuracy and speed of thresholds x block sizes x sub-block sizes x caches, beside AR of the same
    weights.

    A row marked * is beaten by no other in both accuracy and speed. Answers are paired with AR's problem by
    problem. A choice is recommended if with 95% confidence it loses no more than --max-drop points. AUP is a
    score without hardware: the area under accuracy against tokens per forward.
    """
    require(not math.isnan(max_drop), "--max-drop is nan; give points of accuracy, like 1.")
    records = None if problems is None else read_jsonl(problems)
    problems = read_problems(records, count, instruction)
    network, tokenizer, recorded = open_model(**chosen)
    knobs = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    choices = [Decoding(block_size=1, **knobs).resolve(network.config)]
    if network.config.mask_token_id is not None:
        choices.append(Decoding(verify=True, **knobs).resolve(network.config))
    trained = network.config.block_size
    sizes = block_sizes or [trained] * (trained > 1)
    for size, sub in itertools.product(sizes, sub_block_sizes):
        if size == 1 or size % sub:
            divides = f"sub-block size {sub} does not divide block size {size}"
            click.echo(f"Note: {'block size 1 is AR' if size == 1 else divides}; left out.", err=True)
            continue
        ways = itertools.product(caches, thresholds)
        choices += [Decoding(size, sub, t, cache, **knobs).resolve(network.config) for cache, t in ways]
    only_ar = "This checkpoint decodes by AR only, so nothing is to compare; adapt it, or give --adapter."
    require(sizes or len(choices) > 1, only_ar)
    require(not sizes or len(choices) > 2, "No sub-block size divides a block size above 1; choose others.")
    prompts = encode_prompts(problems, tokenizer, choices[0], network.config)
    problems = list(problems.values())
    rows, answers = [], []
    for decoding in tqdm(choices, unit="row"):
        generate_all(network, prompts[: decoding.batch_size], decoding, recorded)  # warms up
        began = time.perf_counter()
        results = generate_all(network, prompts, decoding, recorded)
        rate = rates(results, time.perf_counter() - began)["tokens_per_second"]
        answers.append([verdict(problem, result, tokenizer) for problem, result in zip(problems, results)])
        rows.append(scores(answers[-1]) | {"tokens_per_second": rate} | asdict(decoding))
    speed = lambda row: row["tokens_per_second"]
    merit = lambda row: (row["accuracy"], speed(row))
    for row, own in zip(rows, answers):
        row["speed_up"] = speed(row) / speed(rows[0])
        row |= paired_drop([v["correct"] for v in answers[0]], [v["correct"] for v in own], max_drop / 100)
        rivals = [merit(other) for other in rows if merit(other) != merit(row)]
        row["best"] = not any(a >= row["accuracy"] and s >= speed(row) for a, s in rivals)
    sure = [row for row in rows if row["drop_upper"] <= max_drop / 100 or row is rows[0]]
    best = max(sure, key=speed)
    hoped = max((row for row in rows if row["problems_needed"]), key=speed, default=None)
    areas = {}
    for row in rows[1:]:
        if not row["verify"]:
            key = row["block_size"], row["sub_block_size"], row["cache"]
            areas.setdefault(key, []).append((row["tokens_per_forward"], 100 * row["accuracy"]))
    areas = {key: aup(points, 100 * max(r["accuracy"] for r in rows)) for key, points in areas.items()}
    if as_json:
        names = "block_size", "sub_block_size", "cache", "aup"
        scored = [dict(zip(names, (*key, area))) for key, area in areas.items()]
        found = {"rows": rows, "recommended": best, "max_drop": max_drop, "aup": scored}
        click.echo(json.dumps(found | environment(str(network.weight.device))))
        return
    columns = "decoder sub-block cache accuracy s.e. tokens/forward tokens/s speed-up".split()
    click.echo(" ".join(f"{name:>14}" for name in columns))
    for row in rows:
        cells = [name_of(row), row["sub_block_size"], row["cache"], f"{100 * row['accuracy']:.1f}"]
        cells += [f"{100 * row['standard_error']:.1f}", f"{row['tokens_per_forward']:.2f}"]
        cells += [f"{row['tokens_per_second']:.1f}", f"{row['speed_up']:.2f}"]
        click.echo(" ".join(f"{cell:>14}" for cell in cells) + " *" * row["best"])
    for (size, sub, cache), area in areas.items():
        click.echo(f"AUP of block size {size}, sub-block size {sub}, cache {cache}: {area:.0f}")
    within = f"within {max_drop:g} points of AR"
    click.echo(f"For 95% sure {within}, the fastest is {flags_of(best)}: {best['speed_up']:.2f} times AR.")
    if hoped and speed(hoped) > speed(best):
        faster = f"{flags_of(hoped)} is faster, {hoped['speed_up']:.2f} times AR, and may be {within}"
        click.echo(f"{faster}: --count {hoped['problems_needed']} would show it.")


def name_of(row: dict) -> str:
    if row["verify"]:
        return "verify"
    return "AR" if row["block_size"] == 1 else f"{row['block_size']} at {row['threshold']:g}"


def flags_of(row: dict) -> str:
    """The flags that choose this row's decoder."""
    if row["verify"]:
        return "--verify"
    if row["block_size"] == 1:
        return "--block-size 1"
    flags = "--threshold {threshold:g} --block-size {block_size} --sub-block-size {sub_block_size}"
    return (flags + " --cache {cache}").format(**row)


# --- bench and info ---


@cli.command(cls=Grouped)
@model_options
@option("--shape", help="Random weights of this shape instead of a checkpoint: 0.5b, 1.5b, 7b or tiny.")
@count_option("--layers", high=1000, help="Cut the shape to so many layers.")
@option(
    "--decoders",
    default="ar,block,dual",
    help="Of ar, block, fused, dual, none, prefix, verify, ahead.",
    callback=split_words,
)
@option("--thresholds", help="[default: 0.9]", callback=numbers(float, 0, 1))
@option(
    "--tokens-per-pass", help="Fixed count instead of thresholds  [default with --shape: 3]", callback=counts
)
@option("--sub-block-sizes", default=f"{Decoding.sub_block_size}", callback=counts)
@option("--batch-sizes", default="1,4,16", callback=numbers(int, 1, 10**5))
@count_option("--prompts", help="Number of prompts  [default: one batch; of problems 4 batches, at least 16]")
@count_option(
    "--prompt-tokens", help="Length of random prompts  [default: problems instead; 1024 without tokenizer]"
)
@count_option("--new-tokens", low=2, default=128, help="Longest answer.")
@count_option("--rounds", high=1000, default=3, help="Rounds, interleaved; medians are shown.")
@count_option("--threads", high=1024, help="CPU threads  [default: torch's]")
@count_option("--seed", low=0, default=0, help="Of random prompts and weights.")
@option("--json", "json_file", type=FILE, help="Write all figures here.")
@reports_mistakes
def bench(**given):
    """Speed, memory and time of each pass: decoders x batch sizes, beside AR and the machine's limits."""
    try:
        from benchmarks.speed import bench
    except ModuleNotFoundError:
        raise InputError("bench needs benchmarks/speed.py beside cli.py; run it in the repository.") from None
    bench(**given)


@cli.command(cls=Grouped)
@click.argument("model_argument", metavar="[MODEL]", required=False)
@option("--model", help="Folder or Hub id  [default: the shipped checkpoint]")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@reports_mistakes
def info(model_argument, model, as_json):
    """Describe MODEL, a folder or Hub id, without loading its weights."""
    require(not (model and model_argument), "MODEL and --model name the same thing; give one of them.")
    folder, config, tokenizer = read_checkpoint(model or model_argument or str(SHIPPED), weights=False)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen2(config).parameters())
    raw = read_json(folder / "config.json")
    dtype = str(raw.get("torch_dtype") or raw.get("dtype") or "float32")
    size = (DTYPES.get(dtype) or torch.float32).itemsize
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    shown = lambda i: f"{i} {tokenizer.decode([i], skip_special_tokens=False)}" if tokenizer else f"{i}"
    apart = ("mask_token_id", "stop_token_ids", "draft_width")
    found = {name: value for name, value in asdict(config).items() if name not in apart}
    found |= {"parameters": parameters, "dtype": dtype}
    found |= {"kind": "autoregressive" if config.block_size == 1 else "block diffusion"}
    found |= {"mask_token": None if config.mask_token_id is None else shown(config.mask_token_id)}
    found |= {"stop_tokens": [shown(i) for i in config.stop_token_ids]}
    found |= {"weights_mib": parameters * size / 2**20, "cache_mib_per_1024_tokens": per_position / 2**10}
    if as_json:
        click.echo(json.dumps(found))
        return
    for key, value in found.items():
        value = ", ".join(value) if isinstance(value, list) else value
        value = f"{value:,.1f}" if isinstance(value, float) and value > 1 else value
        click.echo(f"{key.replace('_', ' '):>26}  {value}")


# --- chat ---

CHAT_HELP = "Commands: /clear, /system TEXT, /stats, /save FILE, /help, /quit. Ctrl-C stops an answer."


@cli.command(cls=Grouped, help=f"Talk with a model. {CHAT_HELP}")
@source_options
@decoding_options
@option("--system", help="System message.")
@reports_mistakes
def chat(system, **given):
    require(sys.stdout, "Standard output is closed, so nobody could read an answer.")
    decoding, chosen = split_options(given)
    network, tokenizer, _ = open_model(**chosen)
    require(tokenizer, "The checkpoint has no tokenizer, so it cannot chat.")
    decoding = decoding.resolve(network.config)
    note_of_options(network, decoding)
    click.echo(f"{chosen['model']}: {CHAT_HELP}", err=True)
    if Path(chosen["model"]) == SHIPPED:
        click.echo(f"The shipped model solves word problems only. Try: {SAMPLE}", err=True)
    Chat(network, tokenizer, decoding, system).run()


class Chat:
    """A conversation, and what it has cost. Finished blocks stay in its memory from turn to turn."""

    def __init__(self, model: Qwen2, tokenizer: Tokenizer, decoding: Decoding, system: str | None):
        self.model, self.tokenizer, self.decoding, self.system = model, tokenizer, decoding, system
        self.clear()

    def clear(self) -> None:
        self.messages, self.memory, self.results, self.seconds = [], Memory(), [], 0.0

    def run(self) -> None:
        """Read lines until /quit or the input ends; Ctrl-C ends a line or an answer, never the program."""
        begin = ""
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # an invalid byte spoils its own line only
        while sys.stdin and not sys.stdin.closed:
            try:
                line = input(f"{begin}> " if sys.stdin.isatty() else "").strip()
                line.encode()
                begin = ""
                if line in ("/exit", "/quit", "exit", "quit"):
                    return
                self.turn(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                begin = "\n"
            except UnicodeError:
                click.echo("Error: the line is no UTF-8 text.", err=True)
            except InputError as error:
                click.echo(f"Error: {error}", err=True)

    def turn(self, line: str) -> None:
        """One line: a command, or something to answer."""
        name, _, rest = line.partition(" ")
        if name in ("/clear", "/system", "/stats", "/save"):
            self.command(name, rest.strip())
        elif line.startswith("/"):
            click.echo(CHAT_HELP, err=True)
        elif line:
            self.answer(line)

    def command(self, name: str, rest: str) -> None:
        """Do what a command says, and say on stderr what was done."""
        if name == "/clear":
            self.clear()
            done = "The conversation is cleared."
        elif name == "/system":
            self.system = rest or None
            done = f"The system message is now: {rest}" if rest else "There is no system message now."
        elif name == "/stats":
            line = summary_line(rates(self.results, self.seconds or 1e-9))
            room = self.model.config.max_position_embeddings
            done = f"{line}; {len(self.memory.tokens)} of {room} positions are in the cache"
        elif not rest:
            done = "Error: /save needs a file's name."
        else:
            content = json.dumps({"messages": self.conversation()}, ensure_ascii=False) + "\n"
            try:
                replace_file(Path(rest), partial(Path.write_text, data=content, encoding="utf-8"))
                done = f"Saved to {rest}."
            except OSError as error:
                done = f"Error: {rest}: {error.strerror}."
            except InputError as error:
                done = f"Error: {error}"
            except ValueError:
                done = f"Error: {rest!a}: no file's name."
        click.echo(done, err=True)

    def conversation(self) -> list[dict]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def answer(self, question: str) -> None:
        """One turn; an answer that Ctrl-C has cut is forgotten, with its question.

        Raises InputError where there is no room for it.
        """
        turn = {"role": "user", "content": question}
        prompt = self.tokenizer.chat([*self.conversation(), turn])
        most = self.model.config.max_position_embeddings
        room = most - len(prompt)
        require(room > 0, f"The conversation has outgrown the model's {most} positions; /clear it.")
        decoding = replace(self.decoding, max_new_tokens=min(self.decoding.max_new_tokens, room))
        began = time.perf_counter()
        show = partial(click.echo, nl=False)
        result = stream_answer(self.model, self.tokenizer, prompt, decoding, None, show, self.memory)
        self.seconds += time.perf_counter() - began
        click.echo()
        self.results.append(result)
        if not result.finish_reason:
            click.echo("(interrupted; this question and its answer are forgotten)", err=True)
            return
        self.messages += [turn, {"role": "assistant", "content": self.tokenizer.decode(result.tokens)}]
        if result.finish_reason == "length":
            last = decoding.max_new_tokens == room
            why = "the model has no more positions; /clear the conversation" if last else "--max-new-tokens"
            click.echo(f"(the answer was cut: {why})", err=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli()
