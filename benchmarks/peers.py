"""Transformers' Qwen2 beside our AR and block decoding: the same weights, the same prompts, in one run.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py --shape 0.5b --batch-sizes 1,4 --json FILE

Transformers runs as its users run it: `generate`, greedy, with its defaults. Its network is given our tensors, so that
memory holds the weights once, or on a CPU twice, where ours are prepacked beside them. Everybody writes exactly
`--new-tokens` tokens; rounds are interleaved after a warm-up, and medians are reported with the lowest and highest.
"First" is the time of a run that writes one token only, and tokens/s is of what comes after it. Whether the tokens
agree is told apart: rounding may part two kernels at a tie.
"""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from speed import build, prepare, random_prompts, spread, table, wait, write_report  # noqa: E402

import cli  # noqa: E402
from fast import prepack  # noqa: E402
from fastdllm import Decoding, InputError, Qwen2, check_prompt, generate, require  # noqa: E402
from fastdllm import unparse_config as raw_config  # noqa: E402


def as_autoregressive(model: Qwen2) -> Qwen2:
    """The same weights without a mask token: like Transformers, it may guess every id."""
    with torch.device("meta"):
        plain = Qwen2(replace(model.config, block_size=1, mask_token_id=None, tokenizer_size=None))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie()
    return plain.eval()


def as_transformers(plain: Qwen2):
    """Transformers' network around the same weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**raw_config(plain.config))
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(config)
    peer.load_state_dict(plain.state_dict(), assign=True)
    peer.tie_weights()
    rotary = peer.model.rotary_emb  # its tables are in no checkpoint
    peer.model.rotary_emb = type(rotary)(config).to(plain.weight.device)
    return peer.eval()


def agreement(found: list[list[int]], expected: list[list[int]]) -> dict:
    """Share of equal tokens, and the first place (row, position) where two answers part, if they do."""
    pairs = [
        (row, i, a == b)
        for row, (x, y) in enumerate(zip(found, expected))
        for i, (a, b) in enumerate(zip(x, y))
    ]
    first = min(((i, row) for row, i, same in pairs if not same), default=None)
    share = sum(same for *_, same in pairs) / len(pairs)
    return {"equal_tokens": share, "first_difference": first and {"row": first[1], "position": first[0]}}


def measure(
    writers: dict, prompts: list[list[int]], new_tokens: int, rounds: int, device: torch.device
) -> list[dict]:
    """A row for each of several functions (prompts, count) -> new tokens; the first one is what others are held to."""
    seconds, tokens = {name: [] for name in writers}, {}
    for number in range(rounds + 1):
        for name, write in writers.items():
            taken = []
            for count in (1, new_tokens):
                wait(device)
                began = time.perf_counter()
                tokens[name] = write(prompts, count)
                wait(device)
                taken.append(time.perf_counter() - began)
            if number:  # the first one warms up
                seconds[name].append(taken)
    base, rows = next(iter(writers)), []
    for name, taken in seconds.items():
        assert all(len(answer) == new_tokens for answer in tokens[name])
        rates = [len(prompts) * (new_tokens - 1) / max(whole - first, 1e-9) for first, whole in taken]
        rows.append({
            "decoder": name,
            "batch_size": len(prompts),
            "first_ms": spread([1000 * first for first, _ in taken]),
            "seconds": spread([whole for _, whole in taken]),
            "tokens_per_second": spread(rates),
            "tokens_per_second_with_prefill": spread([len(prompts) * new_tokens / whole for _, whole in taken]),
            "times_transformers": spread([b[1] / whole for (_, whole), b in zip(taken, seconds[base])]),
            **(agreement(tokens[name], tokens[base]) if name in ("ar", "verify") else {}),
        })  # fmt: skip
    return rows


@click.command(help=__doc__)
@cli.model_options
@click.option("--shape", help="Random weights of this shape instead of a checkpoint: 0.5b, 1.5b, 7b or tiny.")
@click.option("--layers", type=click.IntRange(1), help="Cut the shape to so many layers.")
@click.option("--batch-sizes", default="1,4", show_default=True, callback=cli.numbers(int))
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Random ones.")
@click.option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Of each answer.")
@click.option("--tokens-per-pass", type=int, default=3, show_default=True, help="Of the block decoder.")
@click.option("--sub-block-size", default=Decoding.sub_block_size, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved; medians are shown."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads  [default: torch's]")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here."
)
@cli.reports_mistakes
def main(
    model, adapter, device, dtype, packed, record, shape, layers, batch_sizes, prompt_tokens, new_tokens, rounds, threads, json_file,
    **knobs,
):  # fmt: skip
    try:
        from transformers import __version__ as version
    except ImportError:
        raise InputError(
            "Transformers is not installed; pip install -r benchmarks/requirements.txt"
        ) from None
    require(min(batch_sizes) > 0, "--batch-sizes are whole numbers of at least 1.")
    prepare(json_file, threads)
    network, _ = build(model, shape, layers, device, dtype, adapter)
    plain, weight = as_autoregressive(network), network.weight
    peer = as_transformers(plain)
    if packed:
        prepack(plain)
        if adapter:
            prepack(network)
        else:
            network.model, network.lm_head = plain.model, plain.lm_head  # once for both ways to decode

    def transformers(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=weight.device)
        how = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        return peer.generate(ids, attention_mask=torch.ones_like(ids), **how)[:, ids.shape[1] :].tolist()

    def ours(model: Qwen2, prompts: list[list[int]], count: int, **how) -> list[list[int]]:
        decoding = Decoding(max_new_tokens=count, batch_size=len(prompts), stop_token_ids=(), **how)
        return [result.tokens for result in generate(model, prompts, decoding)]

    writers = {"transformers": transformers, "ar": partial(ours, plain)}
    if network.config.mask_token_id is not None:
        writers["verify"] = partial(ours, network, verify=True)
    if network.config.block_size > 1:
        writers["block"] = partial(ours, network, **knobs)
    batches = [random_prompts(network.config, size, prompt_tokens) for size in batch_sizes]
    decoding = Decoding(max_new_tokens=new_tokens, **knobs).resolve(network.config)
    for prompt in batches[0]:
        check_prompt(prompt, decoding, network.config)
    rows = []
    for prompts in tqdm(batches, unit="batch size"):
        rows += measure(writers, prompts, new_tokens, rounds, weight.device)

    cells = []
    for row in rows:
        rate, whole, ratio = (row[k] for k in ("tokens_per_second", "seconds", "times_transformers"))
        cells.append([row["decoder"], str(row["batch_size"]), f"{row['first_ms']['median']:.1f}"])
        cells[-1] += [
            f"{rate['median']:.1f} ({rate['lowest']:.1f}..{rate['highest']:.1f})",
            f"{whole['median']:.3f}",
        ]
        cells[-1] += [
            f"{ratio['median']:.2f}",
            f"{100 * row['equal_tokens']:.1f}%" if "equal_tokens" in row else "",
        ]
    header = "decoder, batch, first (ms), tokens/s after it, seconds, times faster, tokens as Transformers"
    click.echo(table(header.split(", "), cells))
    about = {
        "random_weights": bool(shape),
        "transformers": version,
        "attention": peer.config._attn_implementation,
    }
    about |= {"prepacked": plain.prepacked, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    about |= {"rounds": rounds, **knobs}
    write_report(json_file, shape or model, network, about | {"rows": rows})


if __name__ == "__main__":
    main()
