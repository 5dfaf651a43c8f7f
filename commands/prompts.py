"""Prompts in, answers out: requests as token ids, streams, reports, and files of answers that go on."""

import glob
import hashlib
import json
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from typing import TextIO

import click
import torch
from tqdm import tqdm

from checkpoint import Tokenizer, locate, replace_file, require_written, shards
from commands import console
from fastdllm import Config, Decoding, InputError, Qwen2, Result, Step, check_prompt, decode, require
from verify import ADAPTER_FILES, ADAPTER_WEIGHTS, Verified

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# --- Prompts ---


def tools_of(record: dict) -> list | None:
    """The tools of a chat; some data hold them as JSON in a text."""
    tools = record.get("tools") or None
    with suppress(ValueError):
        tools = json.loads(tools) if isinstance(tools, str) else tools
    require(tools is None or isinstance(tools, list), "its tools are no list")
    return tools


def encode_prompt(
    request: dict, tokenizer: Tokenizer | None, system: str | None = None, raw: bool = False
) -> list[int]:
    """Token ids of a request with `prompt_ids`, `messages` or `prompt`, or InputError for anything else.

    `tools` beside messages reach the chat template, and a `system` message, given or of the request, stands
    before them.
    """
    if (ids := request.get("prompt_ids")) is not None:
        require(isinstance(ids, list), "prompt_ids must be a list of integers.")
        require(not raw and system is None, "--raw and --system are for text, not for token ids.")
        return ids
    if request.get("system"):
        require(isinstance(request["system"], str), "`system` must be text, in quotes.")
        require(system is None, "The request has a system message already; leave --system out.")
        system = request["system"]
    require(tokenizer, "The checkpoint has no tokenizer; `generate` takes token ids with --prompt-ids.")
    prompt, messages = request.get("prompt"), request.get("messages")
    require(prompt is None or messages is None, "`prompt` and `messages` exclude one another; give one.")
    if prompt is not None:
        require(isinstance(prompt, str), "`prompt` must be text, in quotes.")
        require(prompt.strip(), "The prompt is empty; give it some text.")
        messages = [{"role": "user", "content": prompt}]
    if raw:
        require(prompt and system is None, "--raw continues a prompt, without messages and --system.")
        return tokenizer.encode_text(prompt)
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    require(good, "This needs `prompt`, `prompt_ids`, or `messages`: objects with `role` and `content`.")
    if system is not None:
        first = messages[0].get("role")
        require(first != "system", "The messages have a system message already; leave --system out.")
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.chat(messages, tools_of(request))


def encode_prompts(
    requests: dict[str, dict], tokenizer: Tokenizer | None, decoding: Decoding, config: Config, **options
) -> list[list[int]]:
    """Checked token ids of each request; a mistake names the request's place, such as "FILE, line 3".

    options: those of `encode_prompt`.
    """
    prompts = []
    for place, request in requests.items():
        try:
            ids, most = encode_prompt(request, tokenizer, **options), config.max_position_embeddings
            if request.get("prompt_ids") is None and (messages := request.get("messages")):
                require_written(messages, tokenizer.render(messages, tools_of(request)))
            sizes = f"The prompt has {console.counted(len(ids), 'token')}, and the model {most} positions"
            require(len(ids) < most, f"{sizes}; shorten the prompt.")
            fits = len(ids) + decoding.max_new_tokens <= most
            require(fits, f"{sizes}, so --max-new-tokens {most - len(ids)} is the most.")
            prompts.append(check_prompt(ids, decoding, config))
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
    """The objects of a JSONL file's content, by their place, such as "FILE, line 3"."""
    array = f"{path}: holds a JSON array; JSONL has one object a line (`jq -c '.[]' FILE` makes it so)."
    require(not content.lstrip().startswith(b"["), array)
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


# --- One answer ---


def stream_answer(steps: Iterable[Step], tokenizer: Tokenizer | None, show) -> Result:
    """Hand an answer's text to `show` as it becomes final; Ctrl-C ends it."""
    result = Result()

    def chunks() -> Iterator[list[int]]:
        with suppress(KeyboardInterrupt):
            for step in steps:
                result.add(step)
                yield step.final

    as_numbers = ("".join(f"{i} " for i in ids) for ids in chunks())
    for text in tokenizer.stream(chunks()) if tokenizer else as_numbers:
        show(text)
    return result


def timed(steps: Iterable[Step], times: list[tuple[Step, float]]) -> Iterator[Step]:
    """Hand steps on, and note each with the seconds up to its end: of decoding only, not of display."""
    seconds, began = 0.0, time.perf_counter()
    for step in steps:
        seconds += time.perf_counter() - began
        times.append((step, seconds))
        yield step
        began = time.perf_counter()


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
    """Counts and rates of answers; prefills are left out of the passes, not of the seconds."""
    tokens, passes = sum(len(r.tokens) for r in results), sum(r.forward_passes for r in results)
    found = {"new_tokens": tokens, "forward_passes": passes, "tokens_per_forward": tokens / max(1, passes)}
    return found | ({"seconds": seconds, "tokens_per_second": tokens / seconds} if seconds else {})


def summary_line(found: dict) -> str:
    """What `rates` found in words, and the finish reason where there is one."""
    tokens, passes = found["new_tokens"], found["forward_passes"]
    line = f"{console.counted(tokens, 'token')} in {console.counted(passes, 'forward pass')}: "
    line += f"{found['tokens_per_forward']:.2f} tokens per forward"
    line += f", {found['tokens_per_second']:.1f} tokens/s" if "tokens_per_second" in found else ""
    return line + (f", {found['finish_reason']}" if "finish_reason" in found else "")


def options_of(decoding: Decoding) -> dict:
    """Decoding options for a report. A threshold is float32; its decimal is the one that was meant."""
    options = {"verify": isinstance(decoding, Verified)} | asdict(decoding)
    if decoding.threshold is not None:
        options["threshold"] = float(f"{decoding.threshold:.7g}")
    return options


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


# --- Many answers ---
# Each process appends results to a part file of its own, FILE.rank-N; when all are there, the first process
# writes FILE in one piece. `torchrun --nproc-per-node 8 cli.py eval --output FILE` starts eight processes,
# each on a device of its own; they share the prompts out, and exchange nothing but these files. So an answer
# that was written is never lost, and the same command goes on after a kill, also with another number of
# processes.


def finished(
    model: Qwen2, prompts: list[list[int]], decoding: Decoding, recorded
) -> Iterator[tuple[int, Result]]:
    """Decode prompts in batches; yields index and result of each one when it ends, until Ctrl-C."""
    results = [Result() for _ in prompts]
    bar = tqdm(total=len(prompts), unit="prompt", disable=console.RANK > 0)
    with bar, suppress(KeyboardInterrupt):
        for step in decode(model, prompts, decoding, recorded):
            results[step.prompt].add(step)
            if step.finish_reason:
                bar.update()
                yield step.prompt, results[step.prompt]


def answer_all(
    model: Qwen2, prompts: list[list[int]], decoding: Decoding, recorded, target: Path | None, header: dict,
    line_of: Callable[[int, Result], dict], show: Callable[[dict], None] = lambda line: None,
) -> tuple[list[dict], float | None]:  # fmt: skip
    """Answer prompts, and hand `line_of(index, result)` of each to `show`, or write it to the file `target`.

    header: all that the lines depend on. Each line of the file ends with `run`, a digest of it, so that the
    same command finds that the file is complete. Raises InputError for a file that holds anything else.
    Returns the lines and the seconds, None where an earlier run had begun. After Ctrl-C there are fewer
    lines, or with `target` the program ends. Of several processes only the first one returns.
    """
    began, lines, results = time.perf_counter(), [], {}
    if target is None:
        for index, result in finished(model, prompts, decoding, recorded):
            results[index] = result
            while len(lines) in results:  # in the order of the prompts, each as soon as possible
                lines.append(line_of(len(lines), results[len(lines)]))
                show(lines[-1])
        if len(lines) < len(prompts):
            kept = "with --output FILE the same command would go on"
            click.echo(f"Interrupted: {len(lines)} of {len(prompts)} answers are there; {kept}.", err=True)
        return lines, time.perf_counter() - began
    run = {"run": digest(header)}
    there = target.read_bytes().splitlines() if target.exists() else []
    end = json.dumps(run)[1:].encode()
    complete = len(there) == len(prompts) and all(line.endswith(end) for line in there)
    other = f"{target}: holds something else than the answers of this command"
    require(complete or not there, f"{other}; remove it, or name another --output.")
    if not complete:
        went_on = answer_share(model, prompts, decoding, recorded, target, header)
    if console.RANK > 0:
        sys.exit()
    if complete:
        console.say(f"{target} is complete: it holds {console.counted(len(prompts), 'answer')}.")
        return [json.loads(line) for line in there], None
    # the other processes go on; if one dies, torchrun ends this one
    while len(results := read_parts(target, header)) < len(prompts):
        time.sleep(0.5)
    # `run` comes last, also where a request has a field of this name
    without = lambda line: {name: value for name, value in line.items() if name != "run"}
    lines = [without(line_of(index, results[index])) | run for index in range(len(prompts))]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    replace_file(target, partial(Path.write_text, data=content, encoding="utf-8"))
    for part in parts_of(target):
        part.unlink(missing_ok=True)
    return lines, None if went_on else time.perf_counter() - began


def answer_share(
    model: Qwen2, prompts: list[list[int]], decoding: Decoding, recorded, target: Path, header: dict
) -> bool:
    """Write this process's share of the results to its part; returns whether an earlier run had begun it."""
    go_on = f"what is answered is in {target}.rank-*, and the same command goes on."
    ended = f"Error: process {console.RANK} was ended, as torchrun does where another one fails; {go_on}"
    if console.PROCESSES > 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(ended))
    there, path = read_parts(target, header), Path(f"{target}.rank-{console.RANK}")
    with lock_run(path, f"{path}: another run is writing it; wait for it, or name another --output.") as part:
        cut_half_a_line(path)
        went_on = path.stat().st_size > 0
        if not went_on:
            write_line(part, header)
        # longest first, so that the processes end at about the same time
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        left = [i for i in order[console.RANK :: console.PROCESSES] if i not in there]
        for index, result in finished(model, [prompts[i] for i in left], decoding, recorded):
            write_line(part, {"index": left[index]} | asdict(result))
            there[left[index]] = result
    if not there.keys() >= {*left}:
        click.echo(f"Interrupted: {len(there)} of {len(prompts)} answers are there; {go_on}", err=True)
        sys.exit(console.INTERRUPTED)
    return went_on


def parts_of(target: Path) -> list[Path]:
    return sorted(target.parent.glob(glob.escape(target.name) + ".rank-*"))


def read_parts(target: Path, header: dict) -> dict[int, Result]:
    """Results so far by the prompt's index, of all processes and of earlier runs; half a line is left out.

    Raises InputError where these were other runs, naming what differs.
    """
    results = {}
    for path in parts_of(target):
        content = path.read_bytes()
        lines = list(parse_jsonl(content[: content.rfind(b"\n") + 1], path).values())
        for name in header if lines else ():
            there = lines[0].get(name)
            differs = f"{path}: holds answers with {name} {there}, not {header[name]}"
            if name == "prompts":  # a digest
                differs = f"{path}: holds answers to other prompts"
            require(there == header[name], f"{differs}; remove it, or name another --output.")
        results |= {line.pop("index"): Result(**line) for line in lines[1:]}
    return results


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def write_line(file: TextIO, record: dict) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def cut_half_a_line(path: Path) -> None:
    """Cut off what follows the last line break: a killed process may leave it."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


@contextmanager
def lock_run(path: Path, problem: str) -> Iterator[TextIO]:
    """The file, open for appending, by this process alone; a killed process leaves no lock.

    Raises InputError with `problem` where another process has it.
    """
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(problem) from None
        except OSError:  # a file system without locks
            console.say(f"{path}: cannot be locked here, so start one run only.")
        yield file


def header_of(model: str, adapter: str | None, network: Qwen2, decoding: Decoding) -> dict:
    """All that an answer depends on, but its prompt: the first line of a file that a run goes on with."""
    options, folder = options_of(decoding), locate(model)
    options.pop("batch_size")
    paths = [folder / name for name in shards(folder)]
    if adapter is not None:
        paths.append(locate(adapter, files=ADAPTER_FILES) / ADAPTER_WEIGHTS)
    return {
        "model": model,
        "adapter": adapter,
        "dtype": str(network.weight.dtype),
        "weights": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths},
        **json.loads(json.dumps(options)),
    }


def answer_file(
    model: Qwen2, tokenizer: Tokenizer | None, requests: list[dict], prompts: list[list[int]],
    decoding: Decoding, recorded, target: Path | None, header: dict,
) -> None:  # fmt: skip
    """Decode many prompts, and write each answer with its request's fields to a file, or to stdout."""
    line_of = lambda index, result: requests[index] | report(result, prompts[index], tokenizer)
    header = header | {"prompts": digest([requests, prompts])}
    show = lambda line: click.echo(json.dumps(line, ensure_ascii=False))
    lines, seconds = answer_all(model, prompts, decoding, recorded, target, header, line_of, show)
    results = [Result(line["token_ids"], passes=line["passes"]) for line in lines]
    click.echo(f"{console.counted(len(lines), 'answer')}, {summary_line(rates(results, seconds))}", err=True)
    if len(lines) < len(prompts):
        sys.exit(console.INTERRUPTED)
