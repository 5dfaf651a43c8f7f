"""Speed of decoders beside AR of the same weights in the same run: what `python cli.py bench` does.

    python cli.py bench                                                # the shipped checkpoint
    python cli.py bench --shape 7b --batch-sizes 1,4,16 --output FILE  # random weights, 3 guesses kept a pass

Every row of the table decodes the same prompts. Each row runs once alone from an empty cache, which warms up
and shows its memory. Then the rows of one batch size take turns for `--rounds` rounds. Medians are reported
with the lowest and highest, and the JSON is written after each batch size. A pass lasts from the end of the
one before it to its own, so that passes add up to the whole and the host's work is in them. Rows that wait
for windows of one width share a forward pass; where their kinds differ it is listed as "mixed". A prompt
longer than 512 positions has several prefill passes.

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
from functools import partial
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

sys.path[:0] = [str(Path(__file__).parent.parent)]

import fastdllm  # noqa: E402
from checkpoint import DTYPES, Tokenizer, pick_device, replace_file  # noqa: E402
from commands.console import SHIPPED, open_model  # noqa: E402
from commands.evaluate import read_problems  # noqa: E402
from commands.prompts import environment, options_of, rates  # noqa: E402
from fast import PrepackedLinear, RecordedPasses, avoid_cudnn_attention, prepack  # noqa: E402
from fastdllm import Config, Decoding, Qwen2, Result, Row, Step, check_prompt, require  # noqa: E402
from verify import Verified, VerifiedRow  # noqa: E402

QWEN = {"max_position_embeddings": 32768, "block_size": 32, "mask_token_id": 151665, "tokenizer_size": 151666}
SHAPES = {  # of Qwen2.5; "tiny" is for trying things out
    "tiny": Config(736, 192, 512, 4, 6, 2, 32, 4096, block_size=32, mask_token_id=728, tokenizer_size=729),
    "0.5b": Config(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True, **QWEN),
    "1.5b": Config(151936, 1536, 8960, 28, 12, 2, 128, tie_word_embeddings=True, **QWEN),
    "7b": Config(152064, 3584, 18944, 28, 28, 4, 128, **QWEN),
}
BLOCKWISE = {
    "block": {},
    "prefix": {"accept": "prefix"},
    "dual": {"cache": "dual"},
    "none": {"cache": "none"},
}


# --- What is measured ---


@dataclass(frozen=True)
class FixedCount(Decoding):
    """Keeps a fixed number of guesses in each pass, whatever their confidence: random weights have none."""

    guesses_per_pass: int = 3

    def row(self, prompt: Sequence[int], mask: int | None, cached: int = 0, index: int = 0) -> Row:
        return FixedCountRow(prompt, self, mask, cached, index)


class FixedCountRow(Row):
    def take(self, step: Step, guesses: list[tuple[int, float]]) -> None:
        order = range(len(guesses))
        if self.decoding.accept == "threshold":  # the most confident ones, else the first
            order = sorted(order, key=lambda i: -guesses[i][1])
        kept = order[: self.decoding.guesses_per_pass]
        super().take(step, [(token, float(i in kept)) for i, (token, _) in enumerate(guesses)])


@dataclass(frozen=True)
class FixedDrafts(Verified):
    """Keeps a fixed number of drafts in each verifying pass, whatever AR would write."""

    guesses_per_pass: int = 3

    def row(self, prompt: Sequence[int], mask: int, cached: int = 0, index: int = 0) -> VerifiedRow:
        return FixedDraftsRow(prompt, self, mask, cached, index)


class FixedDraftsRow(VerifiedRow):
    def take(self, step: Step, guesses: list[tuple[int, float]]) -> None:
        drafts, count = [draft.token for draft in self.drafts], self.decoding.guesses_per_pass
        said = drafts[:count] + [(token + 1) % 100 for token in drafts[count : count + 1]]  # refuses the next
        super().take(step, [(token, 1.0) for token in said] + guesses[len(said) :])


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
    model: str, adapter: str | None, device: str, dtype: str, threads: int | None = None,
    shape: str | None = None, layers: int | None = None,
) -> tuple[Qwen2, Tokenizer | None]:  # fmt: skip
    """A checkpoint's model and tokenizer, or random weights of a shape: bfloat16 on CUDA, else float32.

    Raises InputError for options that do not fit each other.
    """
    if not shape:
        require(not layers, "--layers cuts a --shape; a checkpoint is taken whole.")
        return open_model(model, adapter, device, dtype, packed=False, threads=threads)[:2]
    own = model == str(SHIPPED)
    require(own, "--shape and --model exclude one another; give one of them.")
    require(not adapter, "--shape makes random weights, so --adapter has no place beside it.")
    require(shape in SHAPES, f"--shape {shape} is not known; take one of {', '.join(SHAPES)}.")
    require(dtype in DTYPES, f"--dtype {dtype} is not known; take one of {', '.join(DTYPES)}.")
    if threads:
        torch.set_num_threads(threads)
    avoid_cudnn_attention()
    device = pick_device(device)
    config = replace(SHAPES[shape], num_hidden_layers=layers or SHAPES[shape].num_hidden_layers)
    usual = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return random_model(config, device, DTYPES[dtype] or usual), None


def random_prompts(config: Config, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random ids below the mask's, which are ordinary tokens."""
    most = min(i for i in (config.mask_token_id, config.tokenizer_size, config.vocab_size) if i is not None)
    return torch.randint(most, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def plan(
    model: Qwen2, decoders: list[str], sub_block_sizes: list[int], rules: list[dict], **common
) -> dict[str, Decoding]:
    """Ways to decode, resolved, by a label. Raises InputError for what cannot work.

    rules: what is kept of a pass, thresholds such as {"threshold": 0.9}, or one {"guesses_per_pass": 3}. AR
    keeps its one token; verification what AR says, or the number.
    """
    found, count = {}, rules[0].get("guesses_per_pass")
    for name in decoders:
        if name == "ar":
            found[name] = Decoding(block_size=1, **common).resolve(model)
            continue
        if name in ("verify", "ahead"):
            kind, label = (FixedDrafts, f"{name}, {count} a pass") if count else (Verified, name)
            given = common | ({"guesses_per_pass": count} if count else {})
            found[label] = kind(draft_ahead=name == "ahead", **given).resolve(model)
            continue
        plain = "The checkpoint has no diffusion block: only --decoders ar works, and verify with an adapter."
        require(model.config.block_size > 1, plain)
        for sub, rule in product(sub_block_sizes, rules):
            [(key, value)] = rule.items()
            kind = Decoding if key == "threshold" else FixedCount
            label = f"threshold {value:g}" if key == "threshold" else f"{value} a pass"
            decoding = kind(sub_block_size=sub, **BLOCKWISE[name], **rule, **common).resolve(model)
            found[f"{name}, sub-block {sub}, {label}"] = decoding
    return found


# --- Time, bytes and operations of a pass ---


def cost(config: Config, itemsize: int, steps: Sequence[Step]) -> tuple[int, int]:
    """Bytes that one forward pass over these windows must move, and operations that it must do.

    Bytes: every weight once, without the embedding's few rows, and the head only where something is guessed;
    each slot of the cache that a window sees, once. Operations: two for each weight of a matrix and each
    token (of the head: each guess), and four for each coordinate of a query head and each key that it sees.
    An adapter, which is on in drafts, is left out: 1.6% of the shipped one's base.
    """
    D, L = config.hidden_size, config.num_hidden_layers
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    matrices = L * (2 * D * q + 2 * D * kv + 3 * D * config.intermediate_size)
    vectors = L * (q + 2 * kv + 2 * D) + D  # biases and norms
    head = config.vocab_size * D
    tokens, guesses = sum(len(step.tokens) for step in steps), sum(len(step.positions) for step in steps)
    slots = sum(max(token.end for token in step.sees) for step in steps)
    pairs = sum(token.end - token.gap_end + token.gap_begin for step in steps for token in step.sees)
    moved = matrices + vectors + head * (guesses > 0) + 2 * kv * L * slots
    return itemsize * moved, 2 * matrices * tokens + 2 * head * guesses + 4 * q * L * pairs


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
    model: Qwen2, texts: list[list[int]], decoding: Decoding, recorded: RecordedPasses | None = None
) -> tuple[list[Result], list[Call]]:
    """Decode to the end, and every forward pass on the way; the passes' times add up to the whole."""
    weight, forward, ends = model.weight, fastdllm.run_steps, []

    def watched(model, cache, places, steps, *rest):
        guesses = forward(model, cache, places, steps, *rest)
        wait(weight.device)  # a prefill that guesses nothing would still be running
        ends.append((steps, time.perf_counter()))
        return guesses

    wait(weight.device)
    last = time.perf_counter()
    with mock.patch.object(fastdllm, "run_steps", watched):  # the one place that all passes go through
        results = fastdllm.generate(model, texts, decoding, recorded)
    calls = []
    for steps, end in ends:
        kind = steps[0].kind if len({step.kind for step in steps}) == 1 else "mixed"
        calls.append(Call(kind, end - last, *cost(model.config, weight.itemsize, steps)))
        last = end
    return results, calls


def fastest(work: Callable, device: torch.device, times: int = 6) -> float:
    """Seconds of the fastest of several runs."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@torch.inference_mode()
def limits(device: torch.device, dtype: torch.dtype, packed: bool = False) -> dict:
    """What the machine can do: bytes per second of a large copy, read plus written, and operations per
    second.

    Operations are those of a large product with plain or prepacked weights, like the model's.
    """
    size, side = (2**30, 8192) if device.type == "cuda" else (2**27, 1024)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    linear = nn.Linear(side, side, bias=False, device=device, dtype=dtype)
    linear = PrepackedLinear(linear) if packed else linear
    x = torch.randn(side, side, device=device, dtype=dtype)
    return {
        "bytes_per_second": 2 * size / fastest(lambda: target.copy_(source), device),
        "operations_per_second": 2 * side**3 / fastest(lambda: linear(x), device),
        "copied_bytes": size,
        "matrix_side": side,
    }


WIDTHS = (1, 32)  # tokens, of AR's pass and of a block's


@torch.inference_mode()
def layer_times(config: Config, packed: bool) -> dict[str, list[float]]:
    """Milliseconds that one layer takes on this CPU for each of WIDTHS, by dtype."""
    one = replace(config, num_hidden_layers=1, vocab_size=8, mask_token_id=None, tokenizer_size=None)
    attend = lambda layer, q, k, v: fastdllm.grouped_attention(q, k, v)
    found = {}
    for name in ("float32", "bfloat16"):
        model = random_model(one, "cpu", DTYPES[name])
        model = prepack(model) if packed else model
        inputs = [(torch.zeros(1, n, dtype=torch.long), torch.arange(n)[None], attend) for n in WIDTHS]
        work = [partial(model, *given) for given in inputs]
        found[name] = [1000 * fastest(one_pass, model.weight.device, 20) for one_pass in work]
    return found


def alone(model: Qwen2, texts: list[list[int]], decoding: Decoding, record: bool) -> float | None:
    """Peak memory in MiB of one run that shares nothing with those before it; None where the system does not
    tell.

    On CUDA of its tensors, weights included; elsewhere of the whole process, up to now.
    """
    device = model.weight.device
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    run(model, texts, decoding, RecordedPasses(model) if record else None)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --- Report ---


def spread(values: Sequence[float]) -> dict:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def ranged(values: dict, digits: int = 1) -> str:
    """What `spread` gave, as text."""
    middle, low, high = (f"{values[key]:.{digits}f}" for key in ("median", "lowest", "highest"))
    return f"{middle} ({low}..{high})"


@dataclass
class Cell:
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
        found[kind] = {
            "forward_calls": len(of_kind[0]),
            "ms": ms,
            "limit_ms": limit,
            "share_of_limit": limit / ms["median"],
            "bound_by": "bytes" if sum(moving) > sum(working) else "operations",
            "bytes": fmean(call.bytes for call in of_kind[0]),
            "operations": fmean(call.operations for call in of_kind[0]),
        }
    return found


def summary(cell: Cell, ar: Cell | None, machine: dict) -> dict:
    """A row of the report: options, counts and rates; `ar`: AR decoding at the same batch size."""
    found = {"decoder": cell.decoder, **options_of(cell.decoding)}
    found |= {"prompts": len(cell.prompts), "prompt_tokens": sum(map(len, cell.prompts))}
    found |= rates(cell.results)
    found["forward_calls"] = sum(call.kind != "prefill" for call in cell.rounds[0])  # rows share one
    for name, prefill in (("", False), ("_with_prefill", True)):
        speeds = cell.rates(prefill)
        found["tokens_per_second" + name] = spread(speeds)
        found["speed_up" + name] = ar and spread([a / b for a, b in zip(speeds, ar.rates(prefill))])
    found["prefill_ms"] = spread([1000 * seconds for seconds in cell.seconds(True, False)])
    return found | {"peak_memory_mib": cell.memory, "passes": by_kind(cell.rounds, machine)}


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, the first flush left."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    aligned = lambda line: [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
    return "\n".join("  ".join(aligned(line)).rstrip() for line in (header, *lines))


HEADER = "decoder, batch, tokens/pass, tokens/s, x AR, overall, x overall, prefill ms, MiB"


def tables(rows: list[dict], machine: dict, device: torch.device, record: bool) -> str:
    """The report as text: rates, then the passes."""
    middle = lambda found, digits: "-" if found is None else f"{found['median']:.{digits}f}"
    lines, passes = [], []
    for row in rows:
        short = row["decoder"].replace(" sub-block", "").replace(" threshold", "")
        name, memory = [short, str(row["batch_size"])], row["peak_memory_mib"]
        digits = 0 if row["tokens_per_second"]["median"] > 100 else 1
        lines.append([*name, f"{row['tokens_per_forward']:.2f}", ranged(row["tokens_per_second"], digits)])
        lines[-1] += [middle(row["speed_up"], 2), middle(row["tokens_per_second_with_prefill"], 1)]
        lines[-1] += [middle(row["speed_up_with_prefill"], 2), middle(row["prefill_ms"], 1)]
        lines[-1].append("-" if memory is None else f"{memory:,.0f}")
        cell = lambda p: f"{p['ms']['median']:.2f} ({100 * p['share_of_limit']:.0f}%)"
        kinds = ", ".join(f"{kind} {cell(p)}" for kind, p in row["passes"].items())
        passes.append(f"{short}, batch {row['batch_size']}: {kinds}")
    copied, multiplied = machine["bytes_per_second"] / 1e9, machine["operations_per_second"] / 1e12
    whose = "of CUDA's tensors" if device.type == "cuda" else "of the whole process so far (ru_maxrss)"
    if record:
        whose += ";\nrecorded passes take the cache in powers of 2, so up to twice what the prompts need"
    parts = [
        table(HEADER.split(", "), lines),
        "Decoders with blocks have their sub-block size and threshold behind the name. tokens/s\n"
        "(lowest..highest) is of decoding alone, overall includes the prefill. Peak memory is that\n"
        f"{whose}.",
        "\n".join(["Milliseconds a pass (share of the machine's limit):", *passes]),
        f"The limit is the longer of bytes at a large copy's {copied:,.1f} GB/s and operations at\n"
        f"{multiplied:,.3f} Tflop/s, a large matrix product's.",
    ]
    if times := machine.get("layer_ms"):
        by_width = [dict(zip(times, ms)) for ms in zip(*times.values())]
        fast = [min(ms, key=ms.get) for ms in by_width]
        said = [" and ".join(f"{x:.3g} ms in {name}" for name, x in ms.items()) for ms in by_width]
        parts.append(
            f"Fast on this CPU: --dtype {fast[0]} for AR, --dtype {fast[1]} for blocks. A layer takes\n"
            f"{said[0]} for one token,\n{said[1]} for {WIDTHS[1]}."
        )
    return "\n\n".join(parts)


# --- Command ---


def measure(
    model: Qwen2, cells: list[Cell], rounds: int, packed: bool, record: bool, report: Callable
) -> None:
    """Fill in memory, then results and rounds of one batch size after the other.

    `report(machine)` is called after each batch size, also where Ctrl-C or full memory ends it.
    """
    weight, sizes = model.weight, dict.fromkeys(cell.decoding.batch_size for cell in cells)
    with tqdm(total=len(cells) * (rounds + record + 1), unit="run") as bar:
        for cell in cells:
            bar.set_description(f"memory of {cell.decoder}, batch {cell.decoding.batch_size}")
            cell.memory = alone(model, cell.prompts, cell.decoding, record)
            bar.update()
        # on a CPU their buffers count as memory of the process, so these come after the cells' own memory
        machine = limits(weight.device, weight.dtype, packed)
        if weight.device.type == "cpu":
            machine["layer_ms"] = layer_times(model.config, packed)
        recorded = RecordedPasses(model) if record else None
        if recorded:  # room for the largest cell now: a cache that grows drops the recorded passes
            longest = max(len(text) + cell.decoding.max_new_tokens for cell in cells for text in cell.prompts)
            recorded.claim(model, max(sizes), longest + 64)
            recorded.release()
        for size in sizes:
            group = [cell for cell in cells if cell.decoding.batch_size == size]
            try:
                for number in range(1 - record, rounds + 1):  # round 0 records
                    for cell in group:
                        bar.set_description(f"round {number} of {cell.decoder}, batch {size}")
                        cell.results, calls = run(model, cell.prompts, cell.decoding, recorded)
                        cell.rounds += [calls] * (number > 0)
                        bar.update()
                        if number == rounds:
                            rate = f"{ranged(spread(cell.rates(False)))} tokens/s"
                            tqdm.write(f"{cell.decoder}, batch {size}: {rate}", file=sys.stderr)
            finally:
                report(machine)


def bench(
    model: str, adapter: str | None, device: str, dtype: str, packed: bool, threads: int | None, record: bool,
    shape: str | None, layers: int | None, decoders: list[str], thresholds: list[float] | None,
    guesses_per_pass: int | None, sub_block_sizes: list[int], batch_sizes: list[int], prompts: int | None,
    prompt_tokens: int | None, new_tokens: int, rounds: int, seed: int, target: Path | None,
) -> None:  # fmt: skip
    """Measure, print the tables, and write the JSON; options as in `cli.py bench`.

    After Ctrl-C what was measured is printed and written too.
    """
    both = thresholds and guesses_per_pass
    require(not both, "--thresholds and --guesses-per-pass exclude one another; give one.")
    network, tokenizer = build(model, adapter, device, dtype, threads, shape, layers)
    network = prepack(network) if packed else network
    config, record = network.config, record and network.weight.is_cuda
    # random weights are sure of nothing: at a threshold they write one token a pass
    fixed = guesses_per_pass or (3 if shape and not thresholds else None)
    rules = [{"guesses_per_pass": fixed}] if fixed else [{"threshold": t} for t in thresholds or [0.9]]
    problems = tokenizer is not None and prompt_tokens is None
    cells = []
    for size in batch_sizes:
        common = {"max_new_tokens": new_tokens, "batch_size": size, "stop_token_ids": () if shape else None}
        ways = plan(network, decoders, sub_block_sizes, rules, **common)
        # answers to problems end where they like: several batches of them, so that the last, half empty one
        # counts less
        count = prompts or (max(16, 4 * size) if problems else size)
        if problems:
            texts = [tokenizer.chat(problem["messages"]) for problem in read_problems(None, count).values()]
        else:
            texts = random_prompts(config, count, prompt_tokens or 1024, seed)
        cells += [Cell(name, decoding, texts) for name, decoding in ways.items()]
        for text, decoding in product(texts, ways.values()):
            check_prompt(text, decoding, config)  # all of them, before anything runs
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen2(config).parameters())
    name, where = os.path.relpath(model) if os.path.isdir(model) else model, str(network.weight.device)
    packed = isinstance(network.lm_head, PrepackedLinear)  # not every machine can
    about = environment(where) | {"model": shape or name, "adapter": adapter, "random_weights": bool(shape)}
    about |= {"layers": config.num_hidden_layers, "parameters": parameters, "device": where}
    about |= {"dtype": str(network.weight.dtype)[6:], "cuda": torch.version.cuda, "prepacked": packed}
    about |= {"prompt_kind": "problems" if problems else "random", "seed": seed}
    rows = []

    def report(machine: dict) -> None:
        """The rows so far, as JSON: a run that is cut off leaves its figures."""
        done = [cell for cell in cells if cell.rounds]
        ar = {cell.decoding.batch_size: cell for cell in done if cell.decoder == "ar"}
        rows[:] = [summary(cell, ar.get(cell.decoding.batch_size), machine) for cell in done]
        about["machine"], about["rounds"] = machine, min((len(cell.rounds) for cell in done), default=0)
        if target and rows:
            content = json.dumps(about | {"rows": rows}, indent=1) + "\n"
            replace_file(target, partial(Path.write_text, data=content))

    try:
        measure(network, cells, rounds, packed, record, report)
    except KeyboardInterrupt:
        click.echo(f"Interrupted: {len(rows)} of {len(cells)} rows were measured.", err=True)
        raise
    finally:
        if rows:
            click.echo(tables(rows, about["machine"], network.weight.device, record))
            if target:
                click.echo(f"wrote {target}", err=True)
