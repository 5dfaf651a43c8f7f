"""Speed of decoders beside AR of the same weights in the same run: what `python cli.py bench` does.

    python cli.py bench                                              # the shipped checkpoint
    python cli.py bench --shape 7b --batch-sizes 1,4,16 --json FILE  # random weights, 3 tokens a pass

Every row of the table decodes the same prompts. Each is run once alone from an empty cache, for its memory.
Then the rows of one batch size take turns: one round that is not counted, and `--rounds` that are; medians
are reported with the lowest and highest, and the JSON is written after each batch size. A pass lasts from the
end of the one before it to its own, so that passes add up to the whole and the host's work is in them. Rows
that wait for windows of one width share a forward pass; where their kinds differ it is listed as "mixed".

The machine's limit for a pass is the longer of two times: of the bytes that must move, at the rate of a large
copy, and of the operations that must be done, at the rate of a large matrix product, both measured in the
same run. What fits into a processor's own cache can beat it.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple
from unittest import mock

import click
import torch
from torch import nn
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import cli  # noqa: E402
import fastdllm  # noqa: E402
from fast import PrepackedLinear, RecordedPasses, avoid_cudnn_attention, prepack  # noqa: E402
from fastdllm import Config, Decoding, InputError, Pass, Qwen2, Result, require, round_up  # noqa: E402

QWEN = {"max_position_embeddings": 32768, "block_size": 32, "mask_token_id": 151665, "tokenizer_size": 151666}
SHAPES = {  # of Qwen2.5; "tiny" is for trying things out
    "tiny": Config(736, 192, 512, 4, 6, 2, 32, 4096, block_size=32, mask_token_id=728, tokenizer_size=729),
    "0.5b": Config(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True, **QWEN),
    "1.5b": Config(151936, 1536, 8960, 28, 12, 2, 128, tie_word_embeddings=True, **QWEN),
    "7b": Config(152064, 3584, 18944, 28, 28, 4, 128, **QWEN),
}
DECODERS = {
    "ar": {"block_size": 1},
    "block": {},
    "prefix": {"accept": "prefix"},
    "verify": {"verify": True},
    "ahead": {"verify": True, "draft_ahead": True},
    "fused": {"fuse_commit": True},
    "dual": {"cache": "dual"},
    "none": {"cache": "none"},
}


# --- What is measured ---


def random_model(config: Config, device: str, dtype: torch.dtype, seed: int = 0) -> Qwen2:
    """A network of random weights, made where and as they will be used."""
    with torch.device("meta"):
        model = Qwen2(config)
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in list(model.named_parameters()):
        weight = torch.ones(p.shape, device=device, dtype=dtype)
        if "norm" not in name:
            weight.normal_(0, 0.02, generator=generator)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=False))
    model.tie()
    return model.eval()


def build(
    model: str, shape: str | None, layers: int | None, device: str, dtype: str, adapter: str | None = None
):
    """Model and tokenizer of a checkpoint, or random weights of a shape: bfloat16 on CUDA, else float32."""
    avoid_cudnn_attention()
    require(
        not (shape and model != str(cli.SHIPPED)),
        "--shape and --model exclude one another; give one of them.",
    )
    require(shape or not layers, "--layers cuts a --shape; a checkpoint is taken whole.")
    if not shape:
        return fastdllm.load(model, device, dtype, adapter)
    require(shape in SHAPES, f"--shape {shape} is not known; take one of {', '.join(SHAPES)}.")
    require(
        dtype in fastdllm.DTYPES, f"dtype {dtype!r} is not known; take one of {', '.join(fastdllm.DTYPES)}."
    )
    config = replace(SHAPES[shape], num_hidden_layers=layers or SHAPES[shape].num_hidden_layers)
    device = fastdllm.pick_device(device)
    usual = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return random_model(config, device, fastdllm.DTYPES[dtype] or usual), None


def random_prompts(config: Config, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random ids below the mask's, which are ordinary tokens."""
    most = min(i for i in (config.mask_token_id, config.tokenizer_size, config.vocab_size) if i is not None)
    return torch.randint(most, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def plan(
    config: Config, decoders: Sequence[str], sub_block_sizes, rules: list[dict], **common
) -> dict[str, Decoding]:
    """Ways to decode, resolved, by a label. Raises InputError for what cannot work."""
    found = {}
    for name in decoders:
        require(name in DECODERS, f"--decoders has {name!r}; take some of {', '.join(DECODERS)}.")
        alone = name in ("ar", "verify", "ahead")  # none of these has sub-blocks
        ok = alone or config.block_size > 1
        require(
            ok, "The checkpoint has no diffusion block: only --decoders ar works, and verify with an adapter."
        )
        for sub, rule in [(1, {})] if alone else product(sub_block_sizes, rules):
            decoding = Decoding(sub_block_size=sub, **DECODERS[name], **rule, **common).resolve(config)
            rate = (
                f"threshold {decoding.threshold:g}"
                if "threshold" in rule
                else f"{decoding.tokens_per_pass} a pass"
            )
            found[name if alone else f"{name}, sub-block {decoding.sub_block_size}, {rate}"] = decoding
    return found


# --- Time, bytes and operations of a pass ---


@cache
def visible(start: int, stop: int, block_size: int) -> int:
    """Pairs of a query in [start, stop) and a key that it sees: all up to the end of the query's block."""
    return sum(round_up(a + 1, block_size) for a in range(start, stop))


def cost(config: Config, itemsize: int, passes: Sequence[Pass], block_size: int) -> tuple[int, int]:
    """Bytes that one forward pass over these windows must move, and operations that it must do.

    Bytes: every weight once, without the embedding's few rows, and the head only where something is guessed;
    each slot of the cache that a window reads or writes, once. Operations: two for each weight of a matrix
    and each token (of the head: each guessed token), and four for each coordinate of a query head and each
    key that it sees. An adapter, which is on in drafts, is left out: 1.6% of the shipped one's base.
    """
    D, L = config.hidden_size, config.num_hidden_layers
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    matrices = L * (2 * D * q + 2 * D * kv + 3 * D * config.intermediate_size)
    vectors = L * (q + 2 * kv + 2 * D) + D  # biases and norms
    head = config.vocab_size * D
    windows = [(p.start, p.start + len(p.tokens)) for p in passes]
    tokens, guessed = sum(len(p.tokens) for p in passes), sum(len(p.guessed) for p in passes)
    slots = sum(round_up(stop, block_size) for _, stop in windows)
    pairs = 0
    for p in passes:
        masks = p.tokens.count(config.mask_token_id) if p.kind in ("draft", "verify") else 0
        known = len(p.tokens) - masks
        group = masks // known  # masks after each token, which see it, all before it, and each other
        pairs += visible(p.start, p.start + known, block_size)
        pairs += sum(group * (p.start + token + 1 + group) for token in range(known) if group)
    moved = matrices + vectors + head * (guessed > 0) + 2 * kv * L * slots
    return itemsize * moved, 2 * matrices * tokens + 2 * head * guessed + 4 * q * L * pairs


class Call(NamedTuple):
    """One forward pass: one or several rows' windows."""

    kind: str  # "mixed" where its rows' differ
    seconds: float
    bytes: int
    operations: int


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def run(
    model: Qwen2, prompts: list[list[int]], decoding: Decoding, recorded: RecordedPasses | None = None
) -> tuple[list[Result], list[Call]]:
    """Decode to the end, and every forward pass on the way; the passes' times add up to the whole."""
    weight, forward, ends = model.weight, fastdllm.run_passes, []
    decoding = decoding.resolve(model.config)

    def watched(model, cache, places, passes, *rest):
        guesses = forward(model, cache, places, passes, *rest)
        wait(weight.device)  # a prefill that guesses nothing would still be running
        ends.append((passes, time.perf_counter()))
        return guesses

    wait(weight.device)
    last = time.perf_counter()
    with mock.patch.object(fastdllm, "run_passes", watched):  # the one place that all passes go through
        results = fastdllm.generate(model, prompts, decoding, recorded)
    calls = []
    for passes, end in ends:
        kind = passes[0].kind if len({pass_.kind for pass_ in passes}) == 1 else "mixed"
        calls.append(
            Call(kind, end - last, *cost(model.config, weight.itemsize, passes, decoding.block_size))
        )
        last = end
    return results, calls


def limits(device: torch.device, dtype: torch.dtype, prepacked: bool = False) -> dict:
    """What the machine can do: bytes per second of a large copy, read plus written, and operations per
    second.

    Operations are those of a large product with plain or prepacked weights, like the model's.
    """
    size, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1024)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    linear = torch.nn.utils.skip_init(fastdllm.Linear, side, side, device=device, dtype=dtype)
    linear.weight.data, linear.bias = b, None
    linear = PrepackedLinear(linear) if prepacked else linear

    def fastest(work) -> float:
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            work()
            wait(device)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    return {
        "bytes_per_second": 2 * size / fastest(lambda: target.copy_(source)),
        "operations_per_second": 2 * side**3 / fastest(lambda: linear(a)),
        "copied_bytes": size,
        "matrix_side": side,
    }


def alone(model: Qwen2, prompts: list[list[int]], decoding: Decoding, record: bool) -> float | None:
    """Peak memory in MiB of one run that shares nothing with those before it; None where the system does not
    tell.

    On CUDA of its tensors, weights included; elsewhere of the whole process, up to now.
    """
    device = model.weight.device
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    run(model, prompts, decoding, RecordedPasses(model) if record else None)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --- Report ---


def spread(values: Sequence[float]) -> dict:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


@dataclass
class Row:
    """One line of the table, and what was measured of it."""

    decoder: str
    decoding: Decoding
    prompts: list[list[int]]
    memory: float | None = None  # peak, MiB
    results: list[Result] = field(default_factory=list)
    rounds: list[list[Call]] = field(default_factory=list)

    def seconds(self, prefill: bool, decode: bool) -> list[float]:
        """Of each round, the prefill's part, the decoding's, or both."""
        wanted = lambda call: prefill if call.kind == "prefill" else decode
        return [sum(call.seconds for call in calls if wanted(call)) for calls in self.rounds]

    def rates(self, prefill: bool) -> list[float]:
        """Tokens per second of each round, over the time of decoding, or with the prefill's."""
        tokens = sum(len(result.tokens) for result in self.results)
        # a checkpoint that stops at once has no decoding
        return [tokens / max(seconds, 1e-9) for seconds in self.seconds(prefill, True)]


def by_kind(rounds: list[list[Call]], machine: dict) -> dict[str, dict]:
    """Of each kind of pass: how many in a round, milliseconds, and the share of the machine's limit."""
    found = {}
    for kind in dict.fromkeys(call.kind for call in rounds[0]):
        of_kind = [[call for call in calls if call.kind == kind] for calls in rounds]
        ms = spread([1000 * fmean(call.seconds for call in calls) for calls in of_kind])
        moving = [1000 * call.bytes / machine["bytes_per_second"] for call in of_kind[0]]
        working = [1000 * call.operations / machine["operations_per_second"] for call in of_kind[0]]
        limit = fmean(map(max, moving, working))
        found[kind] = {"forward_calls": len(of_kind[0]), "ms": ms, "limit_ms": limit}
        found[kind] |= {"share_of_limit": limit / ms["median"]}
        found[kind] |= {"bound_by": "bytes" if sum(moving) > sum(working) else "operations"}
        found[kind] |= {
            key: fmean(getattr(call, key) for call in of_kind[0]) for key in ("bytes", "operations")
        }
    return found


def summary(row: Row, ar: Row | None, machine: dict) -> dict:
    """A row of the report: options, counts and rates; `ar`: the row of AR decoding at the same batch size."""
    options = (
        "block_size sub_block_size threshold tokens_per_pass cache fuse_commit verify draft_width".split()
    )
    options += ["max_new_tokens", "batch_size"]
    found = {"decoder": row.decoder, **{name: getattr(row.decoding, name) for name in options}}
    found |= {"prompts": len(row.prompts), "prompt_tokens": sum(map(len, row.prompts))}
    found |= cli.rates(row.results)
    found["forward_calls"] = sum(call.kind != "prefill" for call in row.rounds[0])  # rows share one
    for name, prefill in (("", False), ("_with_prefill", True)):
        rates = row.rates(prefill)
        found["tokens_per_second" + name] = spread(rates)
        found["speed_up" + name] = ar and spread([a / b for a, b in zip(rates, ar.rates(prefill))])
    found["prefill_ms"] = spread([1000 * seconds for seconds in row.seconds(True, False)])
    return found | {"peak_memory_mib": row.memory, "passes": by_kind(row.rounds, machine)}


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first flush left."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    aligned = lambda line: [
        line[0].ljust(widths[0]),
        *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:])),
    ]
    return "\n".join("  ".join(aligned(line)).rstrip() for line in (header, *lines))


def tables(rows: list[dict], machine: dict, device: torch.device) -> str:
    """The report as text: rates, then the passes."""
    middle = lambda found, digits: "-" if found is None else f"{found['median']:.{digits}f}"
    ranged = lambda v, digits: (
        f"{v['median']:.{digits}f} ({v['lowest']:.{digits}f}..{v['highest']:.{digits}f})"
    )
    rates, passes = [], []
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["passes"]))
    for row in rows:
        name = [row["decoder"], str(row["batch_size"])]
        memory = f"{row['peak_memory_mib'] or 0:,.0f}"
        speed, both = row["tokens_per_second"], row["tokens_per_second_with_prefill"]
        rates.append(
            [*name, f"{row['tokens_per_forward']:.2f}", ranged(speed, 1), middle(row["speed_up"], 2)]
        )
        rates[-1] += [
            middle(both, 1),
            middle(row["speed_up_with_prefill"], 2),
            middle(row["prefill_ms"], 1),
            memory,
        ]
        cell = lambda p: f"{p['ms']['median']:.2f} ({100 * p['share_of_limit']:.0f}%)" if p else "-"
        passes.append([*name, *(cell(row["passes"].get(kind)) for kind in kinds)])
    copied, multiplied = machine["bytes_per_second"] / 1e9, machine["operations_per_second"] / 1e12
    whose = "of CUDA's tensors" if device.type == "cuda" else "of the whole process so far (ru_maxrss)"
    header = "decoder, batch, tokens/forward, tokens/s, x AR, with prefill, x AR, prefill ms, peak MiB"
    parts = [
        table(header.split(", "), rates),
        "tokens/s (lowest..highest) and the first x AR: of decoding alone; with prefill: of all the time.\n"
        f"Peak memory is that {whose}.",
        table(["milliseconds a pass", "batch", *kinds], passes),
        f"(%): share of the machine's limit, the longer of bytes at a large copy's {copied:,.1f} GB/s and\n"
        f"operations at {multiplied:,.3f} Tflop/s, a large matrix product's.",
    ]
    return "\n\n".join(parts)


def write_report(path: Path | None, name: str, model: Qwen2, found: dict) -> None:
    """What was found, after hardware, versions, date, command and model, as JSON, where a path is given."""
    name = os.path.relpath(name) if os.path.isdir(name) else name
    about = {"model": name, "layers": model.config.num_hidden_layers}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen2(model.config).parameters())
    about |= {"parameters": parameters, "dtype": str(model.weight.dtype)[6:]}
    about |= {"device": str(model.weight.device), "cuda": torch.version.cuda}
    content = json.dumps(cli.environment(str(model.weight.device)) | about | found, indent=1) + "\n"
    if path:
        fastdllm.replace_file(path, partial(Path.write_text, data=content))


# --- Command ---


def prepare(path: Path | None, threads: int | None) -> None:
    """Set the threads. Raises InputError where the report could not be written, before anything runs."""
    if path:
        cli.require_writable("--json", path)
    if threads:
        torch.set_num_threads(threads)


def measure(model: Qwen2, rows: list[Row], rounds: int, record: bool, report: Callable) -> bool:
    """Fill in memory, then results and rounds of one batch size after the other; `report(machine)` after
    each.

    False where Ctrl-C ended it early. Raises InputError where memory ends.
    """
    bar = tqdm(total=len(rows) * (rounds + 2), unit="run")
    machine, sizes = None, dict.fromkeys(row.decoding.batch_size for row in rows)
    try:
        for row in rows:
            row.memory = alone(model, row.prompts, row.decoding, record)
            bar.update()
        # on a CPU its buffers count as memory of the process, so this comes after the rows' own memory
        machine = limits(model.weight.device, model.weight.dtype, model.prepacked)
        recorded = RecordedPasses(model) if record else None
        if recorded:  # room for the largest row now: a cache that grows drops the recorded passes
            longest = max(len(prompt) + row.decoding.max_new_tokens for row in rows for prompt in row.prompts)
            recorded.claim(model, max(sizes), longest + 64)
            recorded.release()
        for size in sizes:
            group = [row for row in rows if row.decoding.batch_size == size]
            for number in range(rounds + 1):
                taken = []
                for row in group:
                    row.results, calls = run(model, row.prompts, row.decoding, recorded)
                    taken.append(calls)
                    bar.update()
                if number:  # the first one warms up
                    for row, calls in zip(group, taken):
                        row.rounds.append(calls)
            report(machine)
    except torch.OutOfMemoryError:
        size = row.decoding.batch_size
        raise InputError(f"The memory does not hold batch size {size}; give smaller --batch-sizes.") from None
    except KeyboardInterrupt:
        bar.close()
        done = sum(bool(row.rounds) for row in rows)
        click.echo(f"Interrupted: {done} of {len(rows)} rows measured.", err=True)
        if done:
            report(machine)
        return False
    finally:
        bar.close()
    return True


def bench(
    model, adapter, device, dtype, packed, record, shape, layers, decoders, thresholds, tokens_per_pass,
    sub_block_sizes, batch_sizes,
    prompts, prompt_tokens, new_tokens, rounds, threads, seed, json_file,
) -> None:  # fmt: skip
    """Measure, print the tables, and write the JSON; options as in `cli.bench`."""
    require(
        not (thresholds and tokens_per_pass),
        "--thresholds and --tokens-per-pass exclude one another; give one.",
    )
    prepare(json_file, threads)
    require(not (shape and adapter), "--shape makes random weights, so --adapter has no place beside it.")
    network, tokenizer = build(model, shape, layers, device, dtype, adapter)
    if packed:
        prepack(network)
    config, weight = network.config, network.weight
    if shape and not thresholds:  # random weights are sure of nothing: at a threshold one token a pass
        tokens_per_pass = tokens_per_pass or [3]
    rules = [{"tokens_per_pass": n} for n in tokens_per_pass or []] or [
        {"threshold": t} for t in thresholds or [0.9]
    ]
    problems = tokenizer is not None and prompt_tokens is None
    rows = []
    for size in batch_sizes:
        common = {"max_new_tokens": new_tokens, "batch_size": size, "stop_token_ids": () if shape else None}
        ways = plan(config, decoders, sub_block_sizes, rules, **common)
        # answers to problems end where they like: several batches of them, so that the last, half empty one
        # counts less
        count = prompts or (max(16, 4 * size) if problems else size)
        if problems:
            texts = [tokenizer.chat(p["messages"]) for p in cli.read_problems(None, count).values()]
        else:
            texts = random_prompts(config, count, prompt_tokens or 1024, seed)
        rows += [Row(name, decoding, texts) for name, decoding in ways.items()]
        for prompt, decoding in product(texts, ways.values()):
            fastdllm.check_prompt(prompt, decoding, config)  # all of them, before anything runs
    about = {"random_weights": bool(shape), "prompt_kind": "problems" if problems else "random", "seed": seed}
    about |= {"prepacked": network.prepacked}
    summaries = []

    def report(machine: dict) -> None:
        """The rows so far, as JSON: a run that is cut off leaves its figures."""
        done = [row for row in rows if row.rounds]
        ar = {row.decoding.batch_size: row for row in done if row.decoder == "ar"}
        summaries[:] = [summary(row, ar.get(row.decoding.batch_size), machine) for row in done]
        about["machine"], about["rounds"] = machine, min(len(row.rounds) for row in done)
        write_report(json_file, shape or model, network, about | {"rows": summaries})

    whole = measure(network, rows, rounds, record and weight.is_cuda, report)
    if summaries:
        click.echo(tables(summaries, about["machine"], weight.device))
    if not whole:
        sys.exit(cli.INTERRUPTED)
