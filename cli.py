"""Command line of Fast-dLLM v2: `python cli.py generate --threshold 0.9 --block-size 32`."""

import functools
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import click
from tqdm import tqdm

from fastdllm import Config, Decoding, InputError, Qwen2, Result, Tokenizer, check_prompt, decode, load

SHIPPED = Path(__file__).parent / "tiny" / "checkpoint"
SAMPLE = (
    "Otto has 5 boxes with 5 buttons in each. Lily gives Otto 8 more. He shares them equally among 3 friends. "
    "How many buttons does each friend get?"
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
            if error.filename is None:
                raise
            raise OneSentence(f"{error.filename}: {error.strerror}.") from None

    return wrapped


# --- Options ---

HELP = {
    "block_size": "Tokens denoised together; 1 is autoregressive  [default: the checkpoint's]",
    "sub_block_size": "Window of a block that is revealed before the next one.",
    "threshold": "Keep guesses of more confidence than this, in [0, 1]; 1 writes one token a pass.",
    "cache": "none: recompute everything; block: keep finished blocks; dual: DualCache for sub-blocks too.",
    "max_new_tokens": "Longest answer.",
    "temperature": "0: the most probable token, else sample.",
    "top_p": "Nucleus of the sampling.",
    "seed": "Makes sampling repeatable.",
    "batch_size": "Prompts decoded at the same time.",
}


def decoding_options(command):
    """One option for each field of Decoding, with its default."""
    for knob in reversed(fields(Decoding)):
        if knob.name not in HELP:
            continue
        kind = {"cache": click.Choice(["none", "block", "dual"])}.get(knob.name)
        kind = kind or (float if isinstance(knob.default, float) else int)
        name = "--" + knob.name.replace("_", "-")
        shown = knob.default is not None
        command = click.option(name, type=kind, default=knob.default, show_default=shown, help=HELP[knob.name])(command)
    return command


def model_options(command):
    """Which checkpoint, where and in which precision."""
    for option in [
        click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps."),
        click.option("--model", default=str(SHIPPED), help="Folder or Hub id  [default: the shipped checkpoint]"),
    ]:
        command = option(command)
    return command


# --- Prompts ---


def encode_prompt(record: dict, tokenizer: Tokenizer | None, system: str | None, raw: bool) -> list[int]:
    """Token ids of a record with `prompt_ids`, `messages` or `prompt`. Raises InputError for anything else."""
    if "prompt_ids" in record:
        ids = record["prompt_ids"]
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise InputError("prompt_ids must be a list of integers.")
        return ids
    if tokenizer is None:
        raise InputError("The checkpoint has no tokenizer; give token ids with --prompt-ids.")
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"].strip():
            raise InputError("The prompt is empty; give it some text.")
        if raw:
            return tokenizer.encode(record["prompt"])
        messages = [{"role": "user", "content": record["prompt"]}]
    else:
        messages = record.get("messages")
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if not good or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise InputError("this needs `prompt`, `prompt_ids`, or `messages`: objects with `role` and `content`.")
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.chat(messages)


def read_jsonl(path: str) -> dict[str, dict]:
    """The objects of a JSONL file ("-": standard input), by where they stand. Raises InputError for a broken line."""
    records = {}
    with click.open_file(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                records[place] = json.loads(line)
            except ValueError as error:
                raise InputError(f"{place}: not valid JSON ({error}).") from None
            if not isinstance(records[place], dict):
                raise InputError(f"{place}: not a JSON object.")
    if not records:
        raise InputError(f"{path}: holds no prompts.")
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
        "forward_passes": result.forward_passes,
        "tokens_per_forward": len(result.tokens) / max(1, result.forward_passes),
        "finish_reason": result.finish_reason or "interrupted",
    }


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
@reports_mistakes
def generate(prompt, model, device, dtype, system, raw, prompt_ids, source, target, as_json, **knobs):
    """Answer PROMPT, or what is piped in, or a sample problem."""
    if sum(given is not None for given in (prompt, prompt_ids, source)) > 1:
        raise InputError("PROMPT, --prompt-ids and --input exclude one another; give one of them.")
    if target != "-" and source is None:
        raise InputError("--output needs --input; a single answer goes to standard output.")
    decoding = Decoding(**knobs)
    if source is not None:
        records = read_jsonl(source)
    elif prompt_ids is not None:
        try:
            records = {"--prompt-ids": {"prompt_ids": [int(i) for i in prompt_ids.split(",")]}}
        except ValueError:
            raise InputError(f'--prompt-ids is {prompt_ids!r}; give integers with commas, like "1,2,3".') from None
    else:
        if prompt is None and not sys.stdin.isatty():
            prompt = sys.stdin.read().strip() or None
        if prompt is None:
            prompt = SAMPLE
            click.echo(f"{prompt}\n", err=True)
        records = {"PROMPT": {"prompt": prompt}}

    network, tokenizer = load(model, device, dtype)
    decoding = decoding.resolve(network.config)
    prompts = []
    for place, record in records.items():
        try:
            prompts.append(encode_prompt(record, tokenizer, system, raw))
            check_prompt(prompts[-1], decoding, network.config)
        except InputError as error:
            raise InputError(f"{place}: {error}" if source is not None else str(error)) from None
    warn_of_block_size(network.config, decoding)
    if source is not None:
        answer_file(network, tokenizer, list(records.values()), prompts, decoding, target)
    else:
        answer_one(network, tokenizer, prompts[0], decoding, as_json)


def answer_one(model: Qwen2, tokenizer: Tokenizer | None, prompt: list[int], decoding: Decoding, as_json: bool) -> None:
    """Decode one prompt: text to stdout as it becomes final and a summary to stderr, or one JSON object."""
    result = Result()

    def chunks() -> Iterator[list[int]]:
        for step in decode(model, [prompt], decoding):
            result.add(step)
            yield step.final
            if interrupted:
                return

    began = time.perf_counter()
    with ctrl_c() as interrupted:
        texts = tokenizer.stream(chunks()) if tokenizer else (" ".join(map(str, ids)) + " " for ids in chunks() if ids)
        for text in texts:
            if not as_json:
                click.echo(text, nl=False)
                sys.stdout.flush()
    seconds = time.perf_counter() - began
    summary = report(result, prompt, tokenizer)
    summary |= {"seconds": seconds, "tokens_per_second": len(result.tokens) / seconds}
    if as_json:
        click.echo(json.dumps(summary | asdict(decoding), ensure_ascii=False))
    else:
        click.echo()
        click.echo(
            "{new_tokens} tokens in {forward_passes} forward passes: {tokens_per_forward:.2f} tokens per forward, "
            "{tokens_per_second:.1f} tokens/s, {finish_reason}".format(**summary),
            err=True,
        )
    if result.finish_reason is None:
        sys.exit(INTERRUPTED)


def answer_file(model, tokenizer, records: list[dict], prompts: list[list[int]], decoding: Decoding, target) -> None:
    """Decode many prompts in batches; each answer is written as soon as all before it are, with its record's fields."""
    results, written = [Result() for _ in prompts], 0
    with click.open_file(target, "w", encoding="utf-8") as file, tqdm(total=len(prompts), unit="prompt") as bar:
        with ctrl_c() as interrupted:
            for step in decode(model, prompts, decoding):
                results[step.row].add(step)
                bar.update(step.finish_reason is not None)
                while written < len(prompts) and results[written].finish_reason:
                    answer = report(results[written], prompts[written], tokenizer)
                    file.write(json.dumps(records[written] | answer, ensure_ascii=False) + "\n")
                    file.flush()
                    written += 1
                if interrupted:
                    break
    if written < len(prompts):
        click.echo(f"Interrupted: {written} of {len(prompts)} answers are written.", err=True)
        sys.exit(INTERRUPTED)
    tokens, passes = sum(len(r.tokens) for r in results), sum(r.forward_passes for r in results)
    seconds = bar.format_dict["elapsed"]
    click.echo(
        f"{len(prompts)} answers, {tokens} tokens in {passes} forward passes: {tokens / max(1, passes):.2f} tokens per "
        f"forward, {tokens / seconds:.1f} tokens/s",
        err=True,
    )


if __name__ == "__main__":
    cli()
