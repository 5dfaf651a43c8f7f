"""Transformers and llama.cpp beside our AR, verified and block decoding: the same prompts and stop tokens.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py --model FOLDER --adapter FOLDER --prompts prompts.jsonl --output FILE.jsonl
    python benchmarks/peers.py --shape 0.5b --dtypes float32,bfloat16 --exact --output FILE.jsonl
    python benchmarks/peers.py --output FILE.jsonl --summary

All take turns at each batch of prompts, another one first each time; speeds include the prompts. Each line of
the result is one batch: everyone's tokens, passes and seconds. A run that was stopped goes on. The table says
how much is equal to AR of the same dtype: in half precision kernels differ with the shape, and rounding parts
two answers at a tie; what follows then differs too.

Transformers runs as its users run it: `generate`, greedy, with its defaults, on CUDA without cuDNN's
attention, as ours; it pads on the left. On a CPU our weights are prepacked, so memory holds them twice;
`--no-prepack` measures ours with Transformers' own tensors.

With `--gguf FILE` llama.cpp (the package xllamacpp) answers the same prompts, one at a time, greedy, with as
many threads. It gives text; the tokens that are counted are those of that text.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import click
import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from speed import FixedCount, FixedDrafts, build, random_prompts, table, wait  # noqa: E402

from checkpoint import unparse_config  # noqa: E402
from commands import console  # noqa: E402
from commands import prompts as files  # noqa: E402
from fast import RecordedPasses, prepack  # noqa: E402
from fastdllm import Decoding, InputError, Qwen2, check_prompt, generate, require  # noqa: E402
from verify import Verified, adapter_of, choose_drafts  # noqa: E402

# A way to write is a function (prompts, count) -> for each prompt at most `count` new tokens, and the number
# of forward passes after the one over the prompt, which gives the first token.


def ours(model: Qwen2, decoding: Decoding, recorded: RecordedPasses | None = None) -> Callable:
    """A way of this project's."""

    def write(prompts: list[list[int]], count: int) -> tuple[list[list[int]], int]:
        options = replace(decoding, max_new_tokens=count, batch_size=len(prompts))
        results = generate(model, prompts, options, recorded)
        return [result.tokens for result in results], sum(result.forward_passes for result in results)

    return write


def name_of(decoding: Decoding) -> str:
    if not isinstance(decoding, Verified):
        return "AR" if decoding.block_size == 1 else "block"
    width = f", width {decoding.draft_width}" if decoding.draft_width else ""
    return "verify" + width + ", ahead" * decoding.draft_ahead


def needed(package: str, instead: str):
    """An installed package. Raises InputError where it is not installed."""
    try:
        return import_module(package)
    except ImportError:
        how = "pip install -r benchmarks/requirements.txt"
        raise InputError(f"{package.capitalize()} is not installed: {how}, or {instead}.") from None


def as_transformers(model: Qwen2):
    """Transformers' network around the same tensors, without the adapter; the model is not prepacked."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**unparse_config(replace(model.config, block_size=1)))
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(config)
    tensors = model.state_dict().items()
    tensors = {
        name.replace(".base.", "."): x for name, x in tensors if not name.endswith((".A", ".B", ".row"))
    }
    peer.load_state_dict(tensors, assign=True)
    peer.tie_weights()
    rotary = peer.model.rotary_emb  # its tables are in no checkpoint
    peer.model.rotary_emb = type(rotary)(config).to(model.weight.device)
    return peer.eval()


def theirs(peer, device: torch.device, stop_token_ids: tuple[int, ...]) -> Callable:
    """Transformers' greedy `generate` as a way."""

    def write(prompts: list[list[int]], count: int) -> tuple[list[list[int]], int]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        options = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
        options["eos_token_id"] = list(stop_token_ids) or None
        rows = peer.generate(ids, attention_mask=real.to(device), **options)[:, longest:].tolist()
        # behind its stop token a row is padded until all have ended
        ends = [next((i + 1 for i, t in enumerate(row) if t in stop_token_ids), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends)], sum(ends) - len(ends)

    return write


def llama_cpp(file: Path, tokenizer, stop_token_ids: tuple[int, ...]) -> Callable:
    """llama.cpp's greedy completion by a GGUF file as a way, on the CPU."""
    library = needed("xllamacpp", "leave --gguf out")
    params = library.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(file), 4096, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = -1  # only the table is printed
    server = library.Server(params)

    def write(prompts: list[list[int]], count: int) -> tuple[list[list[int]], int]:
        answers = []
        for prompt in prompts:
            wanted = {"prompt": prompt, "max_tokens": count, "temperature": 0, "cache_prompt": False}
            [choice] = server.handle_completions(wanted)["choices"]
            ended = choice["finish_reason"] == "stop"
            answers.append(tokenizer.encode(choice["text"]) + list(stop_token_ids[:1]) * ended)
        return answers, sum(map(len, answers)) - len(answers)

    return write


def timed(write: Callable, prompts: list[list[int]], count: int, device: torch.device) -> dict:
    wait(device)
    began = time.perf_counter()
    answers, passes = write(prompts, count)
    wait(device)
    seconds = time.perf_counter() - began
    return {"answers": answers, "forward_passes": passes, "seconds": round(seconds, 3)}


def equal_tokens(answers: list[list[int]], expected: list[list[int]]) -> int:
    """How many tokens stand before the first difference of each two answers."""
    alike = ([a == b for a, b in zip(*pair)] for pair in zip(answers, expected))
    return sum([*same, False].index(False) for same in alike)


def answers_of(run: dict) -> list[list[int]]:
    return run.get("answers") or [run["tokens"]]  # earlier raw files have batches of one


def summary(lines: list[dict]) -> str:
    """Per set of prompts and way: tokens per forward, tokens/s, times AR, and how much is AR's."""
    rows = []
    for name in dict.fromkeys(line["set"] for line in lines):
        part, speed = [line["ways"] for line in lines if line["set"] == name], {}
        for way in part[0]:
            ar = f"{way.split()[0]} AR"  # of the same dtype
            answers, expected = ([a for ways in part for a in answers_of(ways[w])] for w in (way, ar))
            tokens = sum(map(len, answers))
            speed[way] = tokens / sum(ways[way]["seconds"] for ways in part)
            passes = sum(ways[way]["forward_passes"] for ways in part)
            row = [f"{name}: {way}", f"{tokens / max(1, passes):.2f}", f"{speed[way]:.1f}"]
            row += [f"{speed[way] / speed[ar]:.2f}" if ar in speed else "-"]
            same = sum(a == b for a, b in zip(answers, expected))
            row += [f"{same} of {len(answers)}", f"{100 * equal_tokens(answers, expected) / tokens:.1f}%"]
            rows.append(row)
    return table(
        ["prompts: way", "tokens/forward", "tokens/s", "x AR", "answers as AR", "tokens as AR"], rows
    )


def ways_of(
    network: Qwen2, decodings: dict, recorded: RecordedPasses | None, packed: bool, transformers: bool
) -> dict:
    """The ways to write with one model, by their names, which begin with its dtype. Prepacks it in place."""
    where, stop = network.weight.device, next(iter(decodings.values())).resolve(network).stop_token_ids
    peer = {"Transformers": theirs(as_transformers(network), where, stop)} if transformers else {}
    network = prepack(network) if packed else network
    own = {name: ours(network, decoding, recorded) for name, decoding in decodings.items()}
    return {f"{str(network.weight.dtype)[6:]} {name}": way for name, way in (own | peer).items()}


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "), context_settings=console.HELP_OPTIONS)
@console.model_options
@console.record_option
@click.option("--shape", help="Random weights of this shape instead of a checkpoint: 0.5b, 1.5b, 7b or tiny.")
@click.option("--dtypes", type=console.ListOf(click.STRING), help="Several, in place of --dtype.")
@click.option("--prompts", "file", help="JSONL as `cli.py generate --input` takes it; `set` groups them.")
@click.option(
    "--prompt-tokens", type=console.COUNT, default=512, help="Of random prompts, without --prompts."
)
@click.option("--batches", type=console.COUNT, show_default="all of the file, or 3", help="How many.")
@click.option("--batch-size", type=console.COUNT, default=1, help="Prompts at a time.")
@click.option(
    "--widths", type=console.ListOf(console.COUNT), show_default="the model's", help="Masks of a draft."
)
@click.option("--ahead", type=console.ListOf(console.COUNT), default=[], help="The same, with --draft-ahead.")
@click.option("--transformers/--no-transformers", default=True)
@click.option("--gguf", "ggufs", type=console.FILE, multiple=True, help="For llama.cpp; may be repeated.")
@click.option("--max-new-tokens", type=console.COUNT, default=128, help="The longest answer.")
@click.option("--exact", is_flag=True, help="No stop tokens: each answer has --max-new-tokens.")
@click.option("--output", "target", required=True, type=console.FILE, help="JSONL of the results.")
@click.option("--summary", "only_summary", is_flag=True, help="Print the table of what is there.")
@console.reports_mistakes
def main(
    model, adapter, device, dtype, packed, threads, record, shape, dtypes, file, prompt_tokens, batches,
    batch_size, widths, ahead, transformers, ggufs, max_new_tokens, exact, target, only_summary,
):  # fmt: skip
    if only_summary:
        lines = [*files.parse_jsonl(target.read_bytes(), target).values()][1:]
        own = lines and all({"set", "ways"} <= line.keys() for line in lines)
        require(own, f"{target}: is no result of this program, or holds no batch yet.")
        click.echo(summary(lines))
        return
    console.require_writable("--output", target)
    instead = "--no-transformers"
    about = {"transformers": needed("transformers", instead).__version__} if transformers else {}
    limits = {"max_new_tokens": max_new_tokens, "stop_token_ids": () if exact else None}
    ways, chosen = {}, {}  # what `--verify` takes by itself, in five tries for each dtype
    for name in dtypes or [dtype]:
        network, tokenizer = build(model, adapter, device, name, threads, shape)
        config = network.config = replace(network.config, **{"tokenizer_size": None} if shape else {})
        decodings = [Decoding(block_size=1, **limits)]
        if config.mask_token_id is not None:
            kind = FixedDrafts if shape else Verified  # random weights are sure of nothing
            decodings += [kind(draft_width=width, **limits) for width in widths or [None]]
            decodings += [kind(draft_width=width, draft_ahead=True, **limits) for width in ahead]
        if config.block_size > 1:
            decodings.append((FixedCount if shape else Decoding)(**limits))
        named = {name_of(decoding): decoding for decoding in decodings}
        recorded = RecordedPasses(network) if record and network.weight.is_cuda else None
        ways |= ways_of(network, named, recorded, packed, transformers)
        if adapter and adapter_of(network).heldout_kept:
            tries = (choose_drafts(network, Verified(**limits), batch_size, recorded) for _ in range(5))
            chosen[str(network.weight.dtype)[6:]] = [name_of(decoding) for decoding, _ in tries]
    count = None if batches is None else batches * batch_size
    longest = decodings[0].resolve(network)
    stop = longest.stop_token_ids
    for path in ggufs:
        require(tokenizer and batch_size == 1 and not exact, "--gguf needs a --model, and batches of one.")
        ways[f"{str(network.weight.dtype)[6:]} llama.cpp, {path.name}"] = llama_cpp(path, tokenizer, stop)
    if file:
        records = dict([*files.read_jsonl(file).items()][:count])
        prompts, records = files.encode_prompts(records, tokenizer, longest, config), [*records.values()]
    else:
        prompts = random_prompts(config, count or 3 * batch_size, prompt_tokens)
        check_prompt(prompts[0], longest, config)
        records = [{"set": "random"}] * len(prompts)
    used = {"shape": shape} if shape else files.header_of(model, adapter, network, longest)
    of_gguf = [[path.stat().st_size, path.stat().st_mtime_ns] for path in ggufs]
    used |= files.options_of(longest) | about | {"packed": packed, "record": record, "gguf": of_gguf}
    used |= {"threads": torch.get_num_threads(), "device": str(network.weight.device)}
    run = hashlib.sha256(json.dumps([used, list(ways), batch_size, prompts]).encode()).hexdigest()
    busy = f"{target}: another run is writing it; wait for it, or name another --output."
    with files.lock_run(target, busy) as output:
        content = target.read_bytes()
        header, *done = [*files.parse_jsonl(content[: content.rfind(b"\n") + 1], target).values()] or [{}]
        same = not content or header.get("run") == run
        require(same, f"{target}: holds another run, or something else; take another --output.")
        files.cut_half_a_line(target)  # a killed run leaves it
        where = network.weight.device
        if not header:
            about |= {"model": shape or model, "adapter": adapter, "batch_size": batch_size}
            about |= {"ways": list(ways), "chosen": chosen}
            files.write_line(output, files.environment(str(where)) | about | {"run": run})
        # warms up; on CUDA all shapes are recorded, those of the longest prompts first
        spans = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        spans.sort(key=lambda span: -max(map(len, span)))
        for write in ways.values():
            for span in spans if recorded else spans[:1]:
                write(span, max_new_tokens if recorded else min(8, max_new_tokens))
        try:
            for start in tqdm(range(len(done) * batch_size, len(prompts), batch_size), unit="batch"):
                texts, names = prompts[start : start + batch_size], list(ways)
                first = start // batch_size % len(ways)
                turn = names[first:] + names[:first]
                found = {way: timed(ways[way], texts, max_new_tokens, where) for way in turn}
                first_one = records[start] if batch_size == 1 else {}
                line = {"set": first_one.get("set", "all"), "id": first_one.get("id")}
                done.append(line | {"ways": {way: found[way] for way in ways}})
                files.write_line(output, done[-1])
        finally:  # also after Ctrl-C
            if done:
                click.echo(summary(done))


if __name__ == "__main__":
    main()
