"""Command line of Fast-dLLM v2: `python cli.py generate --threshold 0.9 --block-size 32`."""

import errno
import functools
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, fields, replace
from datetime import date
from decimal import Context, Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path

import click
import torch
from tokenizers import decoders
from tqdm import tqdm

from fastdllm import (
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
    prepack,
    read_checkpoint,
    read_json,
    replace_file,
    require,
    shards,
)
from fastdllm import generate as generate_all

with suppress(ImportError):  # a history and editing keys for `input`, where the system has them
    import readline  # noqa: F401

TEMPLATE = Path(__file__).parent / "viewer" / "trace.html"
SHIPPED = Path(__file__).parent / "tiny" / "checkpoint"
SAMPLE = (
    "Zoe has 5 bags with 7 cards in each. Then the cards double in number. Jack gives Zoe 14 more. She shares them "
    "equally among 6 friends. How many cards does each friend get?"
)


class OneSentence(click.ClickException):
    """A user's mistake: one sentence on stderr and exit status 2."""

    exit_code = 2


INTERRUPTED = 130  # exit status that a shell expects of a program that Ctrl-C ended


@contextmanager
def ctrl_c() -> Iterator[list]:
    """A list that Ctrl-C fills, so that the pass in work ends first; pressed again, it interrupts at once."""
    pressed = []

    def handler(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def reports_mistakes(command):
    """Turn InputError, and files that cannot be opened, into one sentence."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except InputError as error:
            raise OneSentence(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # nobody reads on: click ends quietly
                raise
            place = "" if error.filename is None else f"{error.filename}: "
            raise OneSentence(f"{place}{error.strerror or error}.") from None

    return wrapped


# --- Options ---

HELP = {
    "block_size": "Tokens denoised together; 1 is autoregressive  [default: the checkpoint's]",
    "sub_block_size": "Window of a block that is revealed before the next one.",
    "threshold": "Keep guesses of more confidence than this, in [0, 1]; 1 writes one token a pass.",
    "tokens_per_pass": "Keep this many guesses a pass, the most confident, whatever the threshold.",
    "cache": "none: recompute everything; block: keep finished blocks; dual: DualCache for sub-blocks too.",
    "fuse_commit": "Commit a block in one pass with the next one's first.",
    "max_new_tokens": "Longest answer.",
    "temperature": "0: the most probable token, else sample.",
    "top_p": "Nucleus of the sampling.",
    "seed": "Makes sampling repeatable.",
    "batch_size": "Prompts decoded at the same time.",
    "cuda_graphs": "Replay recorded passes on CUDA.",
}


def check_sub_block(context: click.Context, parameter, size: int) -> int:
    """The default sub-block shrinks to smaller blocks; one that was asked for must divide the block."""
    block = context.params.get("block_size")
    chosen = context.get_parameter_source(parameter.name) is not click.core.ParameterSource.DEFAULT
    if chosen and block and size > 0 and block > 0 and block % size:
        raise OneSentence(f"sub_block_size {size} does not divide block_size {block}; take a divisor of {block}.")
    return size


def decoding_options(command):
    """One option for each field of Decoding, with its default."""
    for knob in reversed(fields(Decoding)):
        if knob.name not in HELP:
            continue
        kind = {"cache": click.Choice(["none", "block", "dual"])}.get(knob.name)
        kind = kind or (float if isinstance(knob.default, float) else int)
        name = "--" + knob.name.replace("_", "-")
        if isinstance(knob.default, bool):
            kind, name = None, f"{name}/--no-{name[2:]}"
        extra = {"show_default": knob.default is not None, "help": HELP[knob.name]}
        if knob.name == "sub_block_size":
            extra["callback"] = check_sub_block
        if knob.name == "block_size":
            extra["is_eager"] = True  # the sub-block's check needs it
        command = click.option(name, type=kind, default=knob.default, **extra)(command)
    return command


def model_options(command):
    """Which checkpoint, where and in which precision."""
    for option in [
        click.option(
            "--prepack/--no-prepack", "packed", default=True, show_default=True, help="CPU: weights in oneDNN's order."
        ),
        click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps."),
        click.option("--model", default=str(SHIPPED), help="Folder or Hub id  [default: the shipped checkpoint]"),
    ]:
        command = option(command)
    return command


def open_model(model: str, device: str, dtype: str, packed: bool) -> tuple[Qwen2, Tokenizer | None]:
    """Model and tokenizer, for decoding."""
    network, tokenizer = load(model, device, dtype)
    return prepack(network) if packed else network, tokenizer


# --- Prompts ---


def encode_prompt(record: dict, tokenizer: Tokenizer | None, system: str | None = None, raw: bool = False) -> list[int]:
    """Token ids of a record with `prompt_ids`, `messages` or `prompt`. Raises InputError for anything else."""
    if "prompt_ids" in record:
        require(isinstance(record["prompt_ids"], list), "prompt_ids must be a list of integers.")
        require(not raw and system is None, "--raw and --system are for text, not for token ids.")
        return record["prompt_ids"]
    require(tokenizer, "The checkpoint has no tokenizer; give token ids with --prompt-ids.")
    messages = record.get("messages")
    if "prompt" in record:
        prompt = record["prompt"]
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
        require(messages[0]["role"] != "system", "The messages have a system message already; leave --system out.")
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.chat(messages)


def encode_prompts(records: dict[str, dict], tokenizer, decoding: Decoding, config: Config, **how) -> list[list[int]]:
    """Checked token ids of records by where they stand ("": nowhere). Raises InputError that says where."""
    prompts = []
    for place, record in records.items():
        try:
            prompts.append(check_prompt(encode_prompt(record, tokenizer, **how), decoding, config))
        except InputError as error:
            raise InputError(f"{place}: {error}" if place else str(error)) from None
    return prompts


def read_jsonl(path: str) -> dict[str, dict]:
    """The objects of a JSONL file ("-": standard input), by where they stand. Raises InputError for a broken line."""
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
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, half a surrogate pair; nested too deeply
            raise InputError(f"{place}: not valid JSON ({error}).") from None
        require(isinstance(records[place], dict), f"{place}: not a JSON object.")
    return records


# --- Reports ---


def report(result: Result, prompt: list[int], tokenizer: Tokenizer | None) -> dict:
    """What there is to say about one answer; tokens are counted through the stop token, without the prompt."""
    return {
        "text": tokenizer.decode(result.tokens) if tokenizer else None,
        "token_ids": result.tokens,
        "prompt_tokens": len(prompt),
        "new_tokens": len(result.tokens),
        "passes": result.passes,
        **rates([result]),
        "finish_reason": result.finish_reason or "interrupted",
    }


def rates(results: list[Result], seconds: float | None = None) -> dict:
    """Counts and rates of answers, without their prefills; tokens per second where the time is known."""
    tokens, passes = sum(len(r.tokens) for r in results), sum(r.forward_passes for r in results)
    found = {"forward_passes": passes, "tokens_per_forward": tokens / max(1, passes)}
    return found | ({"seconds": seconds, "tokens_per_second": tokens / seconds} if seconds else {})


def summary_line(tokens: int, found: dict) -> str:
    """What `rates` found in words, and the finish reason where there is one."""
    line = f"{tokens} tokens in {found['forward_passes']} forward passes: {found['tokens_per_forward']:.2f} tokens per "
    line += "forward" + (f", {found['tokens_per_second']:.1f} tokens/s" if "tokens_per_second" in found else "")
    return line + (f", {found['finish_reason']}" if "finish_reason" in found else "")


def environment() -> dict:
    """What a number was measured on and with."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        processor = names[0] if names else processor
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    command = "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    return {"hardware": hardware, "threads": torch.get_num_threads(), **versions, "command": command,
            "date": date.today().isoformat()}  # fmt: skip


def warn_of_block_size(config: Config, decoding: Decoding) -> None:
    """A block size other than the trained one works, at a price that the paper has measured."""
    size, trained = decoding.block_size, config.block_size
    if size in (None, trained):
        return
    if size == 1:
        note = "block size 1 decodes autoregressively, one token a pass"
    else:
        note = f"the checkpoint was trained with block size {trained}; another one costs accuracy"
        note += " (paper, 1.5B, GSM8K: 60.2 at 32, 59.7 at 16, 58.5 at 8, 56.8 at 4, 53.2 at 2)"
    click.echo(f"Note: {note}.", err=True)


# --- Commands ---


@click.group(help=__doc__)
def cli():
    pass


@cli.command()
@click.argument("prompt", required=False)
@model_options
@decoding_options
@click.option("--system", help="System message.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without a chat template.")
@click.option("--prompt-ids", help='Token ids instead of text: "1,2,3".')
@click.option("--input", "source", help="JSONL with `prompt`, `messages` or `prompt_ids` a line; - is standard input.")
@click.option("--output", "target", default="-", help="Where the answers of --input go, as JSONL  [default: stdout]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@click.option("--watch", "live", is_flag=True, help="Draw the block in work, coloured by pass, in a terminal.")
@click.option("--trace", help="Write a page that replays the passes to this HTML file.")
@reports_mistakes
def generate(
    prompt, model, device, dtype, packed, system, raw, prompt_ids, source, target, as_json, live, trace, **knobs
):
    """Answer PROMPT, or what is piped in, or a sample problem."""
    given = sum(value is not None for value in (prompt, prompt_ids, source))
    require(given < 2, "PROMPT, --prompt-ids and --input exclude one another; give one of them.")
    require(target == "-" or source is not None, "--output needs --input; one answer goes to standard output.")
    many = source is not None and (as_json or live or trace)
    require(not many, "--json, --watch and --trace show one answer; answers to --input are JSON lines anyway.")
    folder = Path(trace).absolute().parent if trace else Path()
    require(folder.is_dir(), f"--trace {trace}: the folder {folder} does not exist.")
    decoding = Decoding(**knobs, runner_up=trace is not None)
    if source is not None:
        records = read_jsonl(source)
    elif prompt_ids is not None:
        try:
            records = {"": {"prompt_ids": [int(i) for i in prompt_ids.split(",")]}}
        except ValueError:
            raise InputError(f'--prompt-ids is {prompt_ids!r}; give integers with commas, like "1,2,3".') from None
    else:
        if prompt is None and sys.stdin and not sys.stdin.isatty():
            prompt = sys.stdin.buffer.read().decode(errors="surrogateescape").strip() or None
        if prompt is None:
            prompt = SAMPLE
            click.echo(f"{prompt}\n", err=True)
        records = {"": {"prompt": prompt}}

    network, tokenizer = open_model(model, device, dtype, packed)
    decoding = decoding.resolve(network.config)
    prompts = encode_prompts(records, tokenizer, decoding, network.config, system=system, raw=raw)
    warn_of_block_size(network.config, decoding)
    live = live and tokenizer and sys.stdout.isatty()
    if source is not None:
        answer_file(network, tokenizer, list(records.values()), prompts, decoding, target)
    else:
        answer_one(network, tokenizer, prompts[0], decoding, as_json, live, trace)


def answer_one(
    model: Qwen2, tokenizer: Tokenizer | None, prompt: list[int], decoding: Decoding, as_json: bool, live: bool, trace
) -> None:
    """Decode one prompt: text to stdout as it becomes final and a summary to stderr, or one JSON object."""
    began = time.perf_counter()
    steps = []
    show = (lambda text: None) if as_json else lambda text: click.echo(text, nl=False)
    result = stream_answer(model, tokenizer, prompt, decoding, show, live=live and not as_json, keep=steps)
    found = report(result, prompt, tokenizer) | rates([result], time.perf_counter() - began)
    if as_json:
        click.echo(json.dumps(found | asdict(decoding), ensure_ascii=False))
    else:
        click.echo()
        click.echo(summary_line(found["new_tokens"], found), err=True)
    if trace:
        page = trace_page(tokenizer, prompt, steps, result, decoding)
        replace_file(Path(trace), partial(Path.write_text, data=page, encoding="utf-8"))
    if result.finish_reason is None:
        sys.exit(INTERRUPTED)


def stream_answer(
    model, tokenizer, prompt, decoding, show, memory=None, live=False, keep: list | None = None
) -> Result:
    """Decode one prompt, handing text to `show` as it becomes final; Ctrl-C ends it after the pass in work."""
    result = Result()

    def chunks() -> Iterator[list[int]]:
        steps = decode(model, [prompt], decoding, memory)
        for step in watch(tokenizer, steps, len(prompt), model.config.mask_token_id, show) if live else steps:
            result.add(step)
            if keep is not None:
                keep.append(step)
            yield step.final
            if interrupted:
                return

    with ctrl_c() as interrupted:
        texts = tokenizer.stream(chunks()) if tokenizer else (" ".join(map(str, ids)) + " " for ids in chunks() if ids)
        for text in texts:
            if not live:
                show(text)
                sys.stdout.flush()
    return result


def in_order(model: Qwen2, prompts: list[list[int]], decoding: Decoding, done: int = 0) -> Iterator[Result]:
    """Decode prompts in batches; each result comes as soon as all before it have. Shows a bar; Ctrl-C ends it early."""
    results, given = [Result() for _ in prompts], 0
    total = done + len(prompts)
    with tqdm(total=total, initial=done, unit="prompt") as bar, ctrl_c() as interrupted:
        for step in decode(model, prompts, decoding):
            results[step.row].add(step)
            bar.update(step.finish_reason is not None)
            while given < len(prompts) and results[given].finish_reason:
                yield results[given]
                given += 1
            if interrupted:
                break
    if given < len(prompts):
        click.echo(f"Interrupted: {done + given} of {total} answers are written.", err=True)
        sys.exit(INTERRUPTED)


def answer_file(model, tokenizer, records: list[dict], prompts: list[list[int]], decoding: Decoding, target) -> None:
    """Decode many prompts; each answer is written with its record's fields."""
    results, began = [], time.perf_counter()
    with click.open_file(target, "w", encoding="utf-8") as file:
        for record, prompt, result in zip(records, prompts, in_order(model, prompts, decoding)):
            results.append(result)
            file.write(json.dumps(record | report(result, prompt, tokenizer), ensure_ascii=False) + "\n")
            file.flush()
    found = rates(results, time.perf_counter() - began)
    tokens = sum(len(result.tokens) for result in results)
    click.echo(f"{len(prompts)} answers, " + summary_line(tokens, found), err=True)


# --- Judging ---

PAPER_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."  # for GSM8K and MATH

SYMBOLS = {"−": "-", "π": r"\pi ", "∞": r"\infty ", "×": r"\times", "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge "}
REWRITES = [  # of LaTeX, in order
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r",\\!\s*|\{,\}", ","),  # 10,\!080 and 10{,}080
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[,;:!()]", ""),
    (r"(?<!\\)\\(?=[ {}$%])|~", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|[$%€£°*]", ""),
    (r"\\(begin|end)\s*\{[pb]matrix\}", lambda m: "[[" if m[1] == "begin" else "]]"),
    # a unit at the end
    (r"(?<=[\w)}\]])\s*\\(?:text|mbox|mathrm)\s*\{\s*[a-zA-Z][a-zA-Z ./]*\}(?:\^\{?\d\}?)?[\s.]*$", ""),
    (r"\\(?:text|mbox|math|operatorname)[a-z]*\s*\{([^{}]*)\}", r"\1"),
    (r"\\(le|ge|ne)q(?![a-zA-Z])", r"\\\1"),
    (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"(?:√|\\?\bsqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
    (r"([_^])\s*\{\s*(\w+)\s*\}", r"\1\2"),
    (r"^\s*\\?[a-zA-Z]+(?:_\w)?(?:\([a-z]\))?\s*(?:=|\\in(?![a-zA-Z]))\s*(?=\S)", ""),  # x = 5, x \in [0, 1]
    (r"\s+(?:and|or)\s+", ","),
    (r"\s*/\s*", "/"),
]
UNIT = r"(?:\s+[a-zA-Z]{2}[a-zA-Z /]*(?:\^\d)?)?"
NUMBER = r"([-+]?)(?:(\d{1,9}) (?=\d+/))?(\d+\.?\d*|\.\d+)(?:/(\d{1,9}))?" + UNIT  # -1.50, 3/4 cups, 1 3/4


def final_answer(text: str) -> str | None:
    """The answer that a text ends in, as `normalised` spells it; None where there is none."""
    return find_answer(text)[0]


def find_answer(text: str) -> tuple[str | None, str | None]:
    """`final_answer` and where it is: in the last \\boxed{}, else after the last ####, else the last number."""
    for box in reversed([*re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])", text)]):
        inside = argument(text, box.end())
        if inside and (answer := normalised(inside[0])).strip("{}"):  # some repeat an empty box
            return answer, "boxed"
    line, _, more = text.rpartition("####")[2].strip().partition("\n")
    # a line of text with more below it is a heading
    if "####" in text and line and (not more or re.fullmatch(NUMBER, normalised(line))):
        return normalised(line), "####"
    numbers = re.findall(r"(?<!\d)-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?", text)
    return (normalised(numbers[-1]), "last number") if numbers else (None, None)


def argument(text: str, start: int) -> tuple[str, int] | None:
    """LaTeX's argument at `start`, a {group} or one symbol, and its end; None where it is never closed."""
    depth, at = 0, re.compile(r"\s*").match(text, start).end()
    if text[at : at + 1] != "{":
        symbol = re.compile(r"\\[a-zA-Z]+|\S").match(text, at)
        return symbol and (symbol[0], symbol.end())
    for end in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[at + 1 : end], end + 1


def normalised(answer: str) -> str:
    """One spelling for equal answers: numbers are decimals where these end, else fractions; units, degrees,
    currency and percent signs, LaTeX's spaces and fonts, and a leading "x =" are left out.

    Nothing is multiplied out or sorted: x(x+1) and x^2+x, or 1,2 and 2,1, stay unequal.
    """
    text = answer.translate(str.maketrans(SYMBOLS))
    for pattern, written in REWRITES:
        text = re.sub(pattern, written, text)
    text = fractions(text).strip().rstrip(".")
    if text[:1] not in ("(", "[", "{"):  # there a comma is between elements
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?:(?!\\\\)[^][(){},&])+", lambda m: element(m[0].strip()), text)
    return re.sub(r"^\(([A-Z])\)$", r"\1", text)  # a choice


def fractions(text: str) -> str:
    r"""\frac{a}{b} as a/b, with brackets where they are needed; 1\frac{3}{4} becomes 1 3/4."""
    while (start := text.rfind("\\frac")) >= 0:  # the last one has no other inside
        top = argument(text, start + len("\\frac"))
        bottom = top and argument(text, top[1])
        if not bottom:
            break
        a, b = (re.sub(r"\s", "", part) for part, _ in (top, bottom))
        a = f"({a})" if re.search(r"[-+]", a[1:]) else a
        b = b if re.fullmatch(r"\d+\.?\d*|[a-zA-Z]|\\[a-zA-Z]+(?:\{\w+\})?", b) else f"({b})"
        mixed = text[start - 1 : start].isdigit()
        text = text[:start] + " " * mixed + f"{a}/{b}" + text[bottom[1] :]
    return text


def element(text: str) -> str:
    """`normalised` of one part of an answer, between commas and brackets."""
    number = re.fullmatch(NUMBER, text)
    if not number or number[4] and (int(number[4]) == 0 or len(text) > 99):
        words = re.fullmatch(r"[a-zA-Z]{3,}(?:\s+[a-zA-Z]+)*", text)
        return " ".join(text.lower().split()) if words else re.sub(r"\s+", "", text)
    sign, whole, top, bottom = number.groups()
    value = Decimal(top)  # exact, however long
    if bottom:
        ratio = Fraction(value) / int(bottom) + int(whole or 0)
        value = Context(prec=400).divide(Decimal(ratio.numerator), Decimal(ratio.denominator))
        if Fraction(value) != ratio:
            return f"{sign.strip('+')}{ratio}"
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{sign.strip('+')}{text}" if value else "0"


def read_problems(path: str | None, count: int | None, instruction: str) -> dict[str, dict]:
    """Problems {"messages", "expected"} by where they stand: of a JSONL file, or the shipped held-out set."""
    if path is None:
        from tiny.problems import problems  # lies beside this file

        shipped = itertools.islice(problems("heldout", 0), count or 1000)
        records = {f"problem {number}": problem for number, problem in enumerate(shipped, 1)}
    else:
        records = dict(itertools.islice(read_jsonl(path).items(), count))
    found = {}
    for place, record in records.items():
        messages, answer = record.get("messages"), record.get("answer")
        if isinstance(record.get("question"), str):
            messages = [{"role": "user", "content": record["question"] + instruction}]
        expected = final_answer(answer) if isinstance(answer, str) else None
        good = isinstance(messages, list) and messages and expected is not None
        require(good, f"{place}: needs `question` or `messages`, and an `answer` with a number, #### or \\boxed{{}}.")
        found[place] = {"messages": messages, "expected": expected}
    return found


def verdict(problem: dict, result: Result, tokenizer: Tokenizer) -> dict:
    """One line of an evaluation; the same whenever and wherever it is written."""
    text = tokenizer.decode(result.tokens)
    answer, place = find_answer(text)
    judged = {"answer": answer, "correct": answer == problem["expected"], "answer_from": place, "text": text}
    counts = {"new_tokens": len(result.tokens), "forward_passes": result.forward_passes}
    return problem | judged | counts | {"finish_reason": result.finish_reason}


def scores(verdicts: list[dict]) -> dict:
    """Accuracy with its standard error, and the rates, of a problem set."""
    n = len(verdicts)
    share = lambda key, value: sum(v[key] == value for v in verdicts) / n
    accuracy, tokens = share("correct", True), sum(v["new_tokens"] for v in verdicts)
    return {
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / n) ** 0.5,
        "problems": n,
        "tokens_per_forward": tokens / max(1, sum(v["forward_passes"] for v in verdicts)),
        "stopped_by_length": share("finish_reason", "length"),
    }


def aup(points: Iterable[tuple[float, float]], best: float | None = None) -> float:
    """Accuracy under parallelism of pairs (tokens per forward, accuracy in percent); d3LLM, ICML 2026.

    With the pairs (r, y) sorted by r: the first r y, plus the area under y W(y) by trapezoids. The weight
    W(y) = min(exp(3 (y / best - 1)), 1) punishes accuracy below the `best` (default: of these pairs), and pairs
    more than 5 points below the first do not count. Four tokens per forward without loss have 4 times AR's.
    """
    points = sorted(points)
    points = [(r, y) for r, y in points if y >= points[0][1] - 5]
    best = max(y for _, y in points) if best is None else best
    height = [y * min(math.exp(3 * (y / best - 1)), 1) if best else 0.0 for _, y in points]
    strips = zip(points, points[1:], height, height[1:])
    return points[0][0] * points[0][1] + sum((s[0] - r[0]) * (a + b) / 2 for r, s, a, b in strips)


def score_line(found: dict) -> str:
    speed = found["tokens_per_second"]
    return (
        f"{100 * found['accuracy']:.1f}% (standard error {100 * found['standard_error']:.1f}) of {found['problems']} "
        f"problems, {found['tokens_per_forward']:.2f} tokens per forward"
        + (f", {speed:.1f} tokens/s" if speed else "")
        + f", {100 * found['stopped_by_length']:.1f}% stopped by length"
    )


def done_before(path: Path, problems: list[dict], header: dict) -> list[dict]:
    """Lines that an earlier, broken-off run has written, its header first; half a line at the end is cut off.

    Raises InputError, and leaves the file as it is, where that run was another one.
    """
    if not path.exists():
        return []
    content, first = path.read_bytes(), json.dumps(header, ensure_ascii=False).encode()
    same = content[: len(first)] == first[: len(content)]
    require(same, f"{path}: holds something else than answers of this run; remove it or name another file.")
    whole = content[: content.rfind(b"\n") + 1]
    lines = list(parse_jsonl(whole, path).values())
    same = len(lines) <= len(problems) + 1 and all(v.items() >= p.items() for v, p in zip(lines[1:], problems))
    require(same, f"{path}: holds answers to other problems; remove it or name another file.")
    os.truncate(path, len(whole))
    return lines


# --- Views ---

RAMP = (33, 39, 44, 43, 42, 41, 77, 113, 149, 185, 221, 215, 209, 203, 204, 205, 206, 170, 134, 98)  # terminal colours
BLANK = "\u2591\u2591"  # a mask, as wide as a short word


def token_texts(tokenizer: Tokenizer, ids: Iterable[int | None], special: bool = True) -> list[str | None]:
    """Text of each token; None for a mask. A character of several tokens is the last one's."""
    texts, stream = [], None
    for i in ids:
        stream = stream or decoders.DecodeStream(skip_special_tokens=not special)
        texts.append(None if i is None else stream.step(tokenizer.encoder, i) or "")
        stream = None if i is None else stream
    return texts


def cell_width(character: str) -> int:
    """Columns of a terminal that a character takes."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrapped(cells: list[tuple[str, object]], width: int) -> list[list[tuple[str, object]]]:
    """Cells of (text, mark) broken into lines of at most `width` columns; every character keeps its cell's mark."""
    lines, column = [[]], 0
    for text, mark in cells:
        for character in text.expandtabs(4):
            if character == "\n":
                lines.append([])
                column = 0
                continue
            if unicodedata.category(character) == "Cc":
                character = "\ufffd"  # a model must not steer the terminal
            if column + cell_width(character) > width:
                lines.append([])
                column = 0
            lines[-1].append((character, mark))
            column += cell_width(character)
    return lines


def watch(tokenizer: Tokenizer, steps: Iterable[Pass], begin: int, mask: int, show) -> Iterator[Pass]:
    """Draw the block in work after each pass, masks as blanks and tokens coloured by their pass; passes go through.

    Lines that cannot change any more are left behind, so that an answer may be longer than the window is high.
    """
    plain = "NO_COLOR" in os.environ
    tokens, revealed_by, final, printed, height = [], {}, 0, 0, 0
    for number, step in enumerate(steps):
        tokens += [mask] * (step.start + len(step.tokens) - begin - len(tokens))  # a new block
        for kept in step.revealed:
            tokens += [mask] * (kept.position + 1 - begin - len(tokens))
            tokens[kept.position - begin] = kept.token
            revealed_by[kept.position - begin] = number
        final += len(step.final)
        if step.finish_reason:
            tokens = tokens[:final]  # what was guessed behind the end goes again
        texts = token_texts(tokenizer, [None if t == mask else t for t in tokens], special=False)
        cells = [(BLANK if text is None else text, revealed_by.get(i)) for i, text in enumerate(texts)]
        lines = wrapped(cells, shutil.get_terminal_size().columns - 1)
        drawn = []
        for line in lines[printed:]:
            styled = ""
            for mark, run in itertools.groupby(line, key=lambda cell: cell[1]):
                text = "".join(character for character, _ in run)
                colour = 240 if mark is None else RAMP[mark % len(RAMP)]
                styled += text if plain else f"\x1b[38;5;{colour}m{text}\x1b[0m"
            drawn.append(styled)
        up = f"\x1b[{height - 1}A" if height > 1 else ""
        show(f"{up}\r\x1b[J" * (height > 0) + "\n".join(drawn))
        sys.stdout.flush()
        masked = [any(mark is None for _, mark in line) for line in lines]
        settled = masked.index(True) if True in masked else len(lines) - 1
        height = len(lines) - max(printed, settled)
        printed = max(printed, settled)
        yield step


def trace_page(tokenizer: Tokenizer | None, prompt, steps: list[Pass], result: Result, decoding: Decoding) -> str:
    """A page that replays the passes, from the template beside this file; whatever the model wrote is escaped."""
    text_of = (lambda ids: token_texts(tokenizer, ids)) if tokenizer else lambda ids: [f" {i}" for i in ids]
    found = sorted((kept, number) for number, step in enumerate(steps) for kept in step.revealed)
    found = found[: len(result.tokens)]
    tokens = []
    for (kept, number), text in zip(found, text_of([kept.token for kept, _ in found])):
        other, probability = kept.runner_up
        runner_up = {"text": text_of([other])[0], "confidence": probability}
        fields = {"position": kept.position, "text": text, "pass": number, "confidence": kept.confidence}
        tokens.append(fields | {"runner_up": runner_up})
    data = {
        "title": "How the answer was written",
        "prompt": tokenizer.decode(prompt, skip_special_tokens=False) if tokenizer else " ".join(map(str, prompt)),
        "summary": summary_line(len(tokens), report(result, prompt, tokenizer)),
        "options": {name: getattr(decoding, name) for name in HELP if name != "batch_size"},
        "passes": [{"kind": s.kind, "start": s.start, "stop": s.start + len(s.tokens)} for s in steps],
        "tokens": tokens,
    }
    escaped = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return TEMPLATE.read_text(encoding="utf-8").replace('"@@TRACE@@"', escaped)


@cli.command("eval")
@click.argument("problems", required=False)
@model_options
@decoding_options
@click.option("--count", type=click.IntRange(1), help="Only the first problems  [default: all, or 1000 shipped]")
@click.option("--instruction", default="", help="Text after each question.")
@click.option("--paper-prompt", is_flag=True, help=f"The paper's instruction for GSM8K: {PAPER_PROMPT}")
@click.option("--output", "target", type=click.Path(dir_okay=False, path_type=Path), help="Write each answer to JSONL.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@reports_mistakes
def evaluate(problems, model, device, dtype, packed, count, instruction, paper_prompt, target, as_json, **knobs):
    """Accuracy on PROBLEMS, JSONL with `question` (or `messages`) and `answer`; default: the shipped held-out set.

    The answer is the last \\boxed{}, else what follows the last ####, else the last number. With --output, a run that
    was broken off goes on where it stopped.
    """
    decoding = Decoding(**knobs)
    require(not (paper_prompt and instruction), "--paper-prompt and --instruction exclude one another; give one.")
    problems = read_problems(problems, count, "\n" + PAPER_PROMPT if paper_prompt else instruction)
    network, tokenizer = open_model(model, device, dtype, packed)
    decoding = decoding.resolve(network.config)
    prompts = encode_prompts(problems, tokenizer, decoding, network.config)
    problems = list(problems.values())
    options = {name: value for name, value in asdict(decoding).items() if name != "batch_size"}
    header = {"model": model, "dtype": str(network.weight.dtype), "options": json.loads(json.dumps(options))}
    if target:
        folder = locate(model)
        files = {name: (folder / name).stat() for name in shards(folder)}
        header["weights"] = {name: [file.st_size, file.st_mtime_ns] for name, file in files.items()}
    lines = done_before(target, problems, header) if target else []
    verdicts = lines[1:]
    warn_of_block_size(network.config, decoding)

    began, start, tokens = time.perf_counter(), len(verdicts), 0
    with open(target, "a", encoding="utf-8") if target else nullcontext() as file:
        write = lambda record: file and (file.write(json.dumps(record, ensure_ascii=False) + "\n"), file.flush())
        if not lines:
            write(header)
        for problem, result in zip(problems[start:], in_order(network, prompts[start:], decoding, start)):
            verdicts.append(verdict(problem, result, tokenizer))
            tokens += len(result.tokens)
            write(verdicts[-1])
    speed = tokens / (time.perf_counter() - began) if tokens else None  # of what this run wrote
    found = scores(verdicts) | {"tokens_per_second": speed}
    click.echo(json.dumps(found | asdict(decoding) | environment()) if as_json else score_line(found))


def numbers(kind):
    """An option's comma-separated list of numbers."""

    def parse(context, parameter, text):
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            raise OneSentence(f"--{parameter.name.replace('_', '-')} is {text!r}; give numbers with commas.") from None

    return parse


@cli.command()
@click.argument("problems", required=False)
@model_options
@click.option("--thresholds", default="0.5,0.7,0.8,0.9,0.95,1", show_default=True, callback=numbers(float))
@click.option("--block-sizes", help="[default: the checkpoint's]", callback=lambda c, p, t: t and numbers(int)(c, p, t))
@click.option("--sub-block-sizes", default="8,32", show_default=True, callback=numbers(int))
@click.option("--caches", default="block", show_default=True, callback=lambda c, p, text: text.split(","))
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, help="Problems.")
@click.option("--instruction", default="", help="Text after each question.")
@click.option("--batch-size", default=1, show_default=True, help="Prompts decoded at the same time.")
@click.option("--max-new-tokens", default=Decoding.max_new_tokens, show_default=True)
@click.option("--max-drop", default=1.0, show_default=True, help="Points of accuracy below AR that are acceptable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@reports_mistakes
def sweep(
    problems, model, device, dtype, packed, thresholds, block_sizes, sub_block_sizes, caches, count, instruction,
    max_drop, as_json, **knobs,
):  # fmt: skip
    """Accuracy and speed of thresholds x block sizes x sub-block sizes x caches, beside AR of the same weights.

    Rows marked * are the best choices: no other is both faster and better.
    """
    problems = read_problems(problems, count, instruction)
    network, tokenizer = open_model(model, device, dtype, packed)
    choices = [Decoding(block_size=1, **knobs).resolve(network.config)]
    for size, sub, cache in itertools.product(block_sizes or [network.config.block_size], sub_block_sizes, caches):
        if size > 1 and sub > 0 and size % sub == 0:
            choices += [Decoding(size, sub, t, cache, **knobs).resolve(network.config) for t in thresholds]
    require(len(choices) > 1, "No sub-block size divides a block size above 1; choose others.")
    prompts = encode_prompts(problems, tokenizer, choices[0], network.config)
    problems = list(problems.values())
    rows = []
    for decoding in tqdm(choices, unit="row"):
        rows.append(measured(network, tokenizer, problems, prompts, decoding))
    merit = lambda row: (row["accuracy"], row["tokens_per_second"])
    for row in rows:
        row["speed_up"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        rivals = [merit(other) for other in rows if merit(other) != merit(row)]
        row["best"] = not any(a >= row["accuracy"] and s >= row["tokens_per_second"] for a, s in rivals)
    allowed = [row for row in rows if row["accuracy"] >= rows[0]["accuracy"] - max_drop / 100]
    chosen = max(allowed, key=lambda row: row["tokens_per_second"])
    if as_json:
        click.echo(json.dumps({"rows": rows, "recommended": chosen, "max_drop": max_drop} | environment()))
        return
    columns = "threshold block sub-block cache accuracy s.e. tokens/forward tokens/s speed-up".split()
    click.echo(" ".join(f"{name:>14}" for name in columns))
    for row in rows:
        name = "AR" if row["block_size"] == 1 else f"{row['threshold']:g}"
        cells = [name, row["block_size"], row["sub_block_size"], row["cache"], f"{100 * row['accuracy']:.1f}"]
        cells += [f"{100 * row['standard_error']:.1f}", f"{row['tokens_per_forward']:.2f}"]
        cells += [f"{row['tokens_per_second']:.1f}", f"{row['speed_up']:.2f}"]
        click.echo(" ".join(f"{cell:>14}" for cell in cells) + " *" * row["best"])
    how = "AR, --block-size 1" if chosen["block_size"] == 1 else "--threshold {threshold:g} --block-size {block_size} "
    how = (how + "--sub-block-size {sub_block_size} --cache {cache}" * (chosen["block_size"] > 1)).format(**chosen)
    click.echo(f"Within {max_drop:g} points of AR, the fastest is {how}: {chosen['speed_up']:.2f} times AR.")


def measured(model, tokenizer, problems: list[dict], prompts: list[list[int]], decoding: Decoding) -> dict:
    """Scores, speed and options of one way of decoding a problem set, after a warm-up."""
    generate_all(model, prompts[: decoding.batch_size], decoding)
    began = time.perf_counter()
    results = generate_all(model, prompts, decoding)
    seconds = time.perf_counter() - began
    found = scores([verdict(problem, result, tokenizer) for problem, result in zip(problems, results)])
    return found | {"tokens_per_second": rates(results, seconds)["tokens_per_second"]} | asdict(decoding)


def optional(kind):
    """Like `numbers`, for an option that may be left out."""
    return lambda context, parameter, text: text and numbers(kind)(context, parameter, text)


@cli.command()
@model_options
@click.option("--shape", help="Random weights of this shape instead of a checkpoint: 0.5b, 1.5b, 7b or tiny.")
@click.option("--layers", type=click.IntRange(1), help="Cut the shape to so many layers.")
@click.option("--decoders", default="ar,block,dual", show_default=True, help="Of ar, block, fused, dual and none.")
@click.option("--thresholds", help="[default: 0.9]", callback=optional(float))
@click.option(
    "--tokens-per-pass", help="Instead of thresholds  [default: 3, of random weights]", callback=optional(int)
)
@click.option("--sub-block-sizes", default=f"{Decoding.sub_block_size}", show_default=True, callback=numbers(int))
@click.option("--batch-sizes", default="1,4,16", show_default=True, callback=numbers(int))
@click.option("--prompts", type=click.IntRange(1), help="How many  [default: a batch; of problems 4, at least 16]")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Random prompts  [default: problems, or 1024 tokens]")
@click.option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Longest answer.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved; medians are shown.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads  [default: torch's]")
@click.option("--seed", default=0, show_default=True, help="Of random prompts and weights.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
@reports_mistakes
def bench(**options):
    """Speed, memory and time of each pass: decoders x batch sizes, beside AR and the machine's limits."""
    folder = Path(__file__).parent / "benchmarks"
    require((folder / "speed.py").is_file(), "bench needs benchmarks/speed.py beside cli.py; run it in the repository.")
    sys.path.insert(0, str(folder))
    from speed import bench

    bench(**options | {"decoders": options["decoders"].split(",")})


@cli.command()
@click.option("--model", default=str(SHIPPED), help="Folder or Hub id  [default: the shipped checkpoint]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@reports_mistakes
def info(model, as_json):
    """What a checkpoint is, without loading its weights."""
    folder, config, tokenizer = read_checkpoint(model, weights=False)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen2(config).parameters())
    raw = read_json(folder / "config.json")
    dtype = str(raw.get("torch_dtype") or raw.get("dtype") or "float32")
    size = DTYPES[dtype].itemsize if DTYPES.get(dtype) else 4
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    name = lambda i: f"{i}" + (f" {tokenizer.decode([i], skip_special_tokens=False)}" if tokenizer else "")
    found = {name: value for name, value in asdict(config).items() if "token" not in name or name == "tokenizer_size"}
    found |= {"parameters": parameters, "dtype": dtype}
    found |= {"kind": "autoregressive" if config.block_size == 1 else "block diffusion"}
    found |= {"mask_token": None if config.mask_token_id is None else name(config.mask_token_id)}
    found |= {"stop_tokens": [name(i) for i in config.stop_token_ids]}
    found |= {"weights_mib": parameters * size / 2**20, "cache_mib_per_1024_tokens": per_position / 2**10}
    if as_json:
        click.echo(json.dumps(found))
        return
    for key, value in found.items():
        value = ", ".join(value) if isinstance(value, list) else value
        value = f"{value:,.1f}" if isinstance(value, float) and value > 1 else value
        click.echo(f"{key.replace('_', ' '):>26}  {value}")


@cli.command()
@model_options
@decoding_options
@click.option("--system", help="System message.")
@reports_mistakes
def chat(model, device, dtype, packed, system, **knobs):
    """Talk with a model: /clear, /system TEXT, /stats, /save FILE, /exit.

    Finished blocks stay in the cache from turn to turn, so a turn pays only for what is new. Ctrl-C stops an answer.
    """
    decoding = Decoding(**knobs)
    network, tokenizer = open_model(model, device, dtype, packed)
    require(tokenizer, "The checkpoint has no tokenizer, so it cannot chat.")
    decoding = decoding.resolve(network.config)
    warn_of_block_size(network.config, decoding)
    Chat(network, tokenizer, decoding, system).run()


class Chat:
    """A conversation, its memory, and what it has cost."""

    def __init__(self, model: Qwen2, tokenizer: Tokenizer, decoding: Decoding, system: str | None):
        self.model, self.tokenizer, self.decoding, self.system = model, tokenizer, decoding, system
        self.clear()

    def clear(self) -> None:
        self.messages, self.memory, self.results, self.seconds = [], Memory(), [], 0.0

    def run(self) -> None:
        """Read lines until /exit or the end of the input; Ctrl-C ends a line or an answer, never the program."""
        begin = ""
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # a stray byte spoils its own line only
        while True:
            try:
                line = input(f"{begin}> " if sys.stdin.isatty() else "").strip()
                line.encode()
                begin = ""
                if line == "/exit":
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
            click.echo("Commands: /clear, /system TEXT, /stats, /save FILE, /exit.", err=True)
        elif line:
            self.answer(line)

    def command(self, name: str, rest: str) -> None:
        if name == "/clear":
            self.clear()
        elif name == "/system":
            self.system = rest or None
        elif name == "/stats":
            tokens = sum(len(result.tokens) for result in self.results)
            line = summary_line(tokens, rates(self.results, self.seconds or 1e-9))
            room = self.model.config.max_position_embeddings
            click.echo(f"{line}; {len(self.memory.tokens)} of {room} positions are in the cache", err=True)
        elif not rest:
            click.echo("Error: /save needs a file's name.", err=True)
        else:
            content = json.dumps({"messages": self.conversation()}, ensure_ascii=False) + "\n"
            try:
                replace_file(Path(rest), partial(Path.write_text, data=content, encoding="utf-8"))
            except OSError as error:
                click.echo(f"Error: {rest}: {error.strerror}.", err=True)

    def conversation(self) -> list[dict]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages

    def answer(self, question: str) -> None:
        """One turn; its messages are kept where it could begin. Raises InputError where there is no room for it."""
        turn = {"role": "user", "content": question}
        prompt = self.tokenizer.chat([*self.conversation(), turn])
        room = self.model.config.max_position_embeddings - len(prompt)
        require(room > 0, f"The conversation has outgrown the model's {room + len(prompt)} positions; /clear it.")
        decoding = replace(self.decoding, max_new_tokens=min(self.decoding.max_new_tokens, room))
        began = time.perf_counter()
        show = partial(click.echo, nl=False)
        result = stream_answer(self.model, self.tokenizer, prompt, decoding, show, self.memory)
        self.seconds += time.perf_counter() - began
        click.echo()
        self.results.append(result)
        self.messages += [turn, {"role": "assistant", "content": self.tokenizer.decode(result.tokens)}]
        if result.finish_reason != "stop":
            why = "at the last position: /clear the conversation" if decoding.max_new_tokens == room else "early"
            click.echo(f"(the answer ends {why})" if result.finish_reason else "(interrupted)", err=True)


if __name__ == "__main__":
    cli()
