"""Verified drafts beside AR decoding of the same weights, in float32 and bfloat16: one prompt at a time, all
ways in turn, another one first at each prompt. Each way runs once before it is measured. `--transformers`
adds Transformers' greedy `generate` with the same weights and stop tokens.

    python benchmarks/drafts.py --model FOLDER --adapter adapters/qwen2.5-coder-0.5b-instruct \
        --prompts prompts.jsonl --out drafts.jsonl

Each line of the result is one prompt: for each way its tokens, passes and seconds, and whether the answer is
AR's in the same dtype, to the last token. A run that was stopped goes on. `--summary --out FILE` prints the
table of what is there.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import peers  # noqa: E402

import cli  # noqa: E402
from fast import prepack  # noqa: E402
from fastdllm import Decoding, Qwen2, generate, load, require  # noqa: E402

WIDTHS, CONFIDENCES = cli.numbers(int, 1, 99), cli.numbers(float, 0, 1)


def ours(model: Qwen2, decoding: Decoding, prompt: list[int], count: int) -> tuple[list[int], int]:
    """New tokens, at most `count`, and forward passes."""
    [result] = generate(model, [prompt], replace(decoding, max_new_tokens=count))
    return result.tokens, result.forward_passes


def theirs(write: Callable, prompt: list[int], count: int) -> tuple[list[int], int]:
    """The same by Transformers; its pass over the prompt gives a token and is not counted, as with ours."""
    [tokens] = write([prompt], count)
    return tokens, len(tokens) - 1


def timed(way: Callable, prompt: list[int], count: int) -> dict:
    began = time.perf_counter()
    tokens, passes = way(prompt, count)
    seconds = time.perf_counter() - began
    return {"tokens": tokens, "forward_passes": passes, "seconds": round(seconds, 3)}


def summary(lines: list[dict]) -> str:
    """Per set of prompts and way: tokens per forward, tokens/s, times AR, share of answers that are AR's."""
    heads = f"{'tokens/forward':>14} {'tokens/s':>9} {'x AR':>5} {'as AR':>8}"
    rows = [f"{'set':<10} {'way':<38} {heads}"]
    for name in dict.fromkeys(line["set"] for line in lines):
        part = [line["ways"] for line in lines if line["set"] == name]
        rates = {}
        for way in part[0]:
            ar, runs = f"{way.split()[0]} AR", [ways[way] for ways in part]
            tokens = sum(len(run["tokens"]) for run in runs)
            rates[way] = tokens / sum(run["seconds"] for run in runs)
            per_forward = tokens / sum(run["forward_passes"] for run in runs)
            same = sum(ways[way]["tokens"] == ways[ar]["tokens"] for ways in part)
            cells = f"{per_forward:>14.2f} {rates[way]:>9.1f} {rates[way] / rates[ar]:>5.2f}"
            rows.append(f"{name:<10} {way:<38} {cells} {same:>3} of {len(part)}")
    return "\n".join(rows)


@click.command(help=__doc__)
@click.option("--model", help="Folder or Hub id.")
@click.option("--adapter", help="Folder or Hub id.")
@click.option("--prompts", type=click.Path(exists=True), help="JSONL with `set` and `prompt`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSONL of the results.")
@click.option("--widths", default="5", show_default=True, help="Masks of a draft.", callback=WIDTHS)
@click.option(
    "--ahead", default="3", show_default=True, help="The same, with --draft-ahead.", callback=WIDTHS
)
@click.option(
    "--confidences", help="Also with --draft-confidence, at each of the widths.", callback=CONFIDENCES
)
@click.option("--dtypes", default="float32,bfloat16", show_default=True)
@click.option("--transformers", is_flag=True, help="Transformers too.")
@click.option("--max-new-tokens", default=384, show_default=True)
@click.option("--summary", "only_summary", is_flag=True, help="Print the table only.")
@cli.reports_mistakes
def main(
    model, adapter, prompts, out, widths, ahead, confidences, dtypes, transformers, max_new_tokens,
    only_summary,
):  # fmt: skip
    decodings = {"AR": Decoding(block_size=1)}
    verify = partial(Decoding, verify=True)
    for w in widths or []:
        decodings[f"verify, width {w}"] = verify(draft_width=w)
        for c in confidences or []:
            decodings[f"verify, width {w}, confidence {c:g}"] = verify(draft_width=w, draft_confidence=c)
    for w in ahead or []:
        decodings[f"verify, width {w}, ahead"] = verify(draft_width=w, draft_ahead=True)
    text = out.read_text() if out.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # without half a line, which a killed run leaves
    header, *done = map(json.loads, whole.splitlines() or ["{}"])
    if not only_summary:
        require(model and adapter and prompts, "Give --model, --adapter and --prompts.")
        records = list(cli.read_jsonl(prompts).values())
        good = all(isinstance(record.get(key), str) for record in records for key in ("set", "prompt"))
        require(good, f"{prompts}: each record needs `set` and `prompt`.")
        ways = {}
        about = {"transformers": peers.transformers_version()} if transformers else {}
        for dtype in dtypes.split(","):
            network, tokenizer = load(model, "cpu", dtype, adapter)
            network = prepack(network)
            ways |= {f"{dtype} {name}": partial(ours, network, how) for name, how in decodings.items()}
            if transformers:
                plain = peers.as_autoregressive(load(model, "cpu", dtype)[0])
                peer, stop = peers.as_transformers(plain), plain.config.stop_token_ids
                write = peers.as_peer(peer, plain.weight.device, stop)
                ways[f"{dtype} Transformers"] = partial(theirs, write)
        longest = Decoding(max_new_tokens=max_new_tokens)
        used = cli.header_of({"model": model, "adapter": adapter}, network, longest)
        run = hashlib.sha256(json.dumps([used, list(ways), records]).encode()).hexdigest()
        same = not header or header.get("run") == run
        require(same, f"{out}: holds a run of other weights, prompts or decoders; take another --out.")
        with open(out, "a", buffering=1) as file:
            cli.cut_half_a_line(out)
            if not header:
                about = cli.environment("cpu") | about | {"ways": list(ways), "run": run}
                file.write(json.dumps(about) + "\n")
            for way in ways.values():
                way([1] * 32, 8)
            for number, record in [*enumerate(records)][len(done) :]:
                prompt = tokenizer.chat([{"role": "user", "content": record["prompt"]}])
                first, found = number % len(ways), {}
                for way in [*ways][first:] + [*ways][:first]:
                    found[way] = timed(ways[way], prompt, max_new_tokens)
                found = {way: found[way] for way in ways}
                done.append({"set": record["set"], "id": record.get("id"), "ways": found})
                file.write(json.dumps(done[-1]) + "\n")
    click.echo(summary(done))


if __name__ == "__main__":
    main()
