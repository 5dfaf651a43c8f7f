"""Transformers' Qwen2 beside our AR, verified and block decoding: the same weights and prompts, in one run.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py --shape 0.5b --batch-sizes 1,4 --json FILE
    python benchmarks/peers.py --model FOLDER --adapter FOLDER --batch-sizes 1,4,16,32 --ragged --json FILE

Transformers runs as its users run it: `generate`, greedy, with its defaults, on CUDA without cuDNN's
attention, as ours. On a CPU our weights are prepacked, so memory holds them twice; `--plain` measures ours
with Transformers' own tensors too. Each decoder writes exactly `--new-tokens` tokens. Rounds are interleaved
after a warm-up; medians are reported with the lowest and highest. "First" is the time of a run that writes
one token, and tokens/s is of what comes after it. Equal are the tokens before the first difference of an
answer and those after it: in half precision kernels differ with the shape, and rounding parts them at a tie.

Prompts are the first ones of `--prompts` (JSONL as `cli.py generate` takes it). Without it they are word
problems in the chat format, repeated up to `--prompt-tokens`, or random ids where there is no tokenizer;
`--ragged` makes these of unequal length, from a quarter of `--prompt-tokens` up. Transformers pads on the
left. The JSON is written after each round.
"""

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import click
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from speed import build, prepare, random_prompts, spread, table, wait, write_report  # noqa: E402

import cli  # noqa: E402
from fast import RecordedPasses, prepack  # noqa: E402
from fastdllm import Decoding, InputError, Qwen2, Tokenizer, check_prompt, generate, require  # noqa: E402
from fastdllm import unparse_config as raw_config  # noqa: E402


def as_autoregressive(model: Qwen2) -> Qwen2:
    """The same layers without a mask token: like Transformers, it may guess every id."""
    plain = copy.copy(model)
    plain.config = replace(model.config, block_size=1, mask_token_id=None, tokenizer_size=None)
    return plain


def transformers_version() -> str:
    """Raises InputError where Transformers is not installed."""
    try:
        from transformers import __version__ as version
    except ImportError:
        missing = "Transformers is not installed; pip install -r benchmarks/requirements.txt"
        raise InputError(missing) from None
    return version


def as_transformers(plain: Qwen2):
    """Transformers' network around the same tensors."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**raw_config(plain.config))
    with torch.device("meta"):
        peer = Qwen2ForCausalLM(config)
    peer.load_state_dict(plain.state_dict(), assign=True)
    peer.tie_weights()
    rotary = peer.model.rotary_emb  # its tables are in no checkpoint
    peer.model.rotary_emb = type(rotary)(config).to(plain.weight.device)
    return peer.eval()


def as_peer(peer, device: torch.device, stop_token_ids: Iterable[int] = ()) -> Callable:
    """Transformers' greedy `generate` as a function (prompts, count) -> new tokens; it pads on the left."""
    stop = list(stop_token_ids) or None

    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        how = {"do_sample": False, "max_new_tokens": count, "eos_token_id": stop, "pad_token_id": 0}
        return peer.generate(ids, attention_mask=real.to(device), **how)[:, longest:].tolist()

    return write


def make_prompts(
    model: Qwen2, tokenizer: Tokenizer | None, count: int, length: int, ragged: bool
) -> list[list[int]]:
    """Prompts of `length` tokens, or with `ragged` of lengths spread evenly from a quarter of it up."""
    quarter = max(1, length // 4)
    lengths = [length - (length - quarter) * i // max(1, count - 1) * ragged for i in range(count)]
    if tokenizer is None:
        return [prompt[:n] for prompt, n in zip(random_prompts(model.config, count, length), lengths)]
    problems = cli.read_problems(None, count).values()
    texts = [tokenizer.chat(problem["messages"]) for problem in problems]
    return [list(islice(cycle(text), n)) for text, n in zip(texts, lengths)]


def agreement(found: list[list[int]], expected: list[list[int]]) -> dict:
    """Share of equal tokens, and the first place (row, position) where two answers differ, if they do."""
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
) -> Iterator[list[dict]]:
    """A row for each of several functions (prompts, count) -> new tokens, the first of which is Transformers.

    Yields the rows after each round, of all rounds so far.
    """
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
            assert all(len(answer) == new_tokens for answer in tokens[name])
            if number:  # the first one warms up
                seconds[name].append(taken)
        if number:
            yield summary(seconds, tokens, prompts, new_tokens)


def summary(seconds: dict, tokens: dict, prompts: list[list[int]], new_tokens: int) -> list[dict]:
    """A row for each decoder, of (first token, all tokens) seconds of each round and the last answers."""
    base, rows = next(iter(seconds)), []
    for name, taken in seconds.items():
        rates = [len(prompts) * (new_tokens - 1) / max(whole - first, 1e-9) for first, whole in taken]
        row = {
            "decoder": name,
            "batch_size": len(prompts),
            "rounds": len(taken),
            "prompt_tokens": list(map(len, prompts)),
            "first_ms": spread([1000 * first for first, _ in taken]),
            "seconds": spread([whole for _, whole in taken]),
            "tokens_per_second": spread(rates),
            "tokens_per_second_with_prefill": spread(
                [len(prompts) * new_tokens / whole for _, whole in taken]
            ),
            "times_transformers": spread([b[1] / whole for (_, whole), b in zip(taken, seconds[base])]),
            **agreement(tokens[name], tokens[base]),
            "tokens": tokens[name],
        }
        rows.append(row)
    return rows


def cells(row: dict) -> list[str]:
    """A row of the table."""
    rate, whole, ratio = (row[key] for key in ("tokens_per_second", "seconds", "times_transformers"))
    ours = f"{100 * row['as_our_ar']['equal_tokens']:.1f}%" if "as_our_ar" in row else ""
    return [
        row["decoder"],
        str(row["batch_size"]),
        f"{row['first_ms']['median']:.1f}",
        f"{rate['median']:.1f} ({rate['lowest']:.1f}..{rate['highest']:.1f})",
        f"{whole['median']:.3f}",
        f"{ratio['median']:.2f}",
        f"{100 * row['equal_tokens']:.1f}%",
        ours,
    ]


HEADER = "decoder, batch, first (ms), tokens/s after it, seconds, times faster, as Transformers, as our AR"


@click.command(help=__doc__)
@cli.model_options
@click.option("--shape", help="Random weights of this shape instead of a checkpoint: 0.5b, 1.5b, 7b or tiny.")
@click.option("--layers", type=click.IntRange(1), help="Cut the shape to so many layers.")
@click.option("--batch-sizes", default="1,4", show_default=True, callback=cli.numbers(int, 1))
@click.option("--prompts", "file", help="JSONL with `prompt`, `messages` or `prompt_ids`.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--ragged", is_flag=True, help="Prompts of unequal length.")
@click.option("--plain", is_flag=True, help="CPU: ours with plain weights too.")
@click.option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Of each answer.")
@click.option("--tokens-per-pass", type=int, help="Of the block decoder  [default: 3 of random weights]")
@click.option("--sub-block-size", default=Decoding.sub_block_size, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads  [default: torch's]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all here.")
@cli.reports_mistakes
def main(
    model, adapter, device, dtype, packed, record, shape, layers, batch_sizes, file, prompt_tokens, ragged,
    plain, new_tokens, rounds, threads, json_file, **knobs,
):  # fmt: skip
    version = transformers_version()
    prepare(json_file, threads)
    given = model, shape, layers, device, dtype, adapter
    network, tokenizer = build(*given)
    if shape:  # random weights are sure of nothing
        knobs["tokens_per_pass"] = knobs["tokens_per_pass"] or 3
    where = network.weight.device
    peer = as_transformers(as_autoregressive(network))
    ours = {"": network}  # what the decoder's name has behind it, and the network
    if packed and where.type == "cpu":
        ours = {"": prepack(build(*given)[0])} | ({", plain": network} if plain else {})

    def write(model: Qwen2, recorded: RecordedPasses | None, how: dict, prompts, count) -> list[list[int]]:
        decoding = Decoding(max_new_tokens=count, batch_size=len(prompts), stop_token_ids=(), **how)
        return [result.tokens for result in generate(model, prompts, decoding, recorded)]

    writers, ar_alike = {"transformers": as_peer(peer, where)}, {}
    for name, each in ours.items():
        twin = as_autoregressive(each)
        passes = {
            one: RecordedPasses(one) if record and where.type == "cuda" else None for one in (twin, each)
        }
        writers["ar" + name] = partial(write, twin, passes[twin], {})
        if network.config.mask_token_id is not None:
            writers["verify" + name] = partial(write, each, passes[each], {"verify": True})
            # AR of the same model, which never guesses a mask either
            ar_alike["verify" + name] = partial(write, each, passes[each], {"block_size": 1})
        if network.config.block_size > 1:
            writers["block" + name] = partial(write, each, passes[each], knobs)
    decoding = Decoding(max_new_tokens=new_tokens, **knobs if "block" in writers else {})
    decoding = decoding.resolve(network.config)
    if file:
        encoded = cli.encode_prompts(cli.read_jsonl(file), tokenizer, decoding, network.config)
        require(len(encoded) >= max(batch_sizes), f"{file}: holds fewer prompts than --batch-sizes asks for.")
        batches = [encoded[:size] for size in batch_sizes]
    else:
        batches = [make_prompts(network, tokenizer, size, prompt_tokens, ragged) for size in batch_sizes]
        check_prompt(batches[0][0], decoding, network.config)  # the longest
    about = {"random_weights": bool(shape), "adapter": adapter, "transformers": version}
    about |= {
        "attention": peer.config._attn_implementation,
        "prepacked": ours[""].prepacked,
        "ragged": ragged,
    }
    about |= {"new_tokens": new_tokens, **knobs}
    rows = []
    for prompts in tqdm(batches, unit="batch size"):
        alike = {name: own(prompts, new_tokens) for name, own in ar_alike.items()}
        for measured in measure(writers, prompts, new_tokens, rounds, where):
            for row in measured:
                answers = row.pop("tokens")
                if row["decoder"] in alike:
                    row["as_our_ar"] = agreement(answers, alike[row["decoder"]])
            write_report(json_file, shape or model, network, about | {"rows": rows + measured})
        rows += measured
    click.echo(table(HEADER.split(", "), [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
