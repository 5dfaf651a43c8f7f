"""Which choices make one pass faster, and what loading costs: milliseconds and memory, as JSON.

    python benchmarks/choices.py cpu --shape 0.5b --json FILE      # prepacked, joined, compiled; threads
    python benchmarks/choices.py cuda --shape 7b --json FILE       # recorded, fused, kinds of attention
    python benchmarks/choices.py profile --shape 7b --json FILE    # kernels of one pass
    python benchmarks/choices.py memory --shape 1.5b --json FILE   # peak memory and time of loading

`cpu` and `cuda` run windows of 1 token (AR), 8 (a sub-block) and 32 (a block) against a full cache, without
the head. Medians of rounds in which all ways take turns. The ways:

products        the matrix products of the pass alone; the rest of a pass is attention and small operations
eager           each operation launched by itself
recorded        CUDA: as the decoder runs, one graph
prepacked       CPU: weights in oneDNN's order, as the command line decodes
joined          one product for q, k and v, and one for gate and up
compiled        CPU: the whole pass by torch.compile; CUDA (`fused`): norms and rotary embedding only
written out     CUDA: attention as two products and a softmax
cuDNN           CUDA: its attention kernel allowed
flash           CUDA: flash attention with each row's number of keys on the device, instead of a mask
paged           the same on pages of the cache, which also divides the keys among the processors
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from speed import SHAPES, build, cost, limits, wait  # noqa: E402

import cli  # noqa: E402
import fastdllm  # noqa: E402
from fast import PrepackedLinear, RecordedPasses, prepack  # noqa: E402
from fastdllm import KVCache, Pass, Qwen2, Window, block_causal_mask, unparse_config, window_pass  # noqa: E402

WINDOWS, BLOCK = (1, 8, 32), 32


# --- One pass, and ways to change it ---


def milliseconds(work: Callable, seconds: float = 0.3) -> float:
    """Median of as many runs as fit into the time, after a few that do not count."""
    taken = []
    for _ in range(3):
        work()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or not taken:
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return median(taken)


def one_pass(model: Qwen2, batch: int, width: int, seen: int, masked: bool = True) -> Callable:
    """A pass over the first `width` positions of the last block of `seen`, of rows whose cache is full.

    masked=False makes no mask, for attention that knows the number of keys by itself.
    """
    device, size = model.weight.device, 1 if width == 1 else BLOCK
    cache = KVCache(model.config, batch, seen, model.weight)
    cache.k.zero_(), cache.v.zero_()
    tokens = torch.randint(700, (batch, width), device=device)
    positions = (seen - BLOCK + torch.arange(width, device=device)).expand(batch, width)
    # as in a recorded pass, whose positions vary
    mask = block_causal_mask(positions[:, -1:], torch.arange(seen, device=device), size) if masked else None
    write, read = (torch.arange(batch, device=device)[:, None], positions), (slice(batch), slice(seen))
    return partial(window_pass, model, cache, tokens, Window(positions, write, read, mask), False)


def linears(model: Qwen2) -> list[nn.Linear]:
    """The layers' matrices."""
    return [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]


def products(model: Qwen2, rows: int, packed: bool = False) -> Callable:
    """The matrix products of a pass, without what lies between them."""
    sizes = [m.in_features for m in linears(model)]
    inputs = {size: model.weight.new_empty(rows, size).normal_() for size in sizes}
    matrices = [PrepackedLinear(m) if packed else m for m in linears(model)]
    return lambda: [layer(inputs[size]) for layer, size in zip(matrices, sizes)]


def join(model: Qwen2) -> None:
    """One product for q, k and v, and one for gate and up: copies of the weights, side by side."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        weight, bias = torch.cat([p.weight for p in qkv]), torch.cat([p.bias for p in qkv])
        attention.forward = partial(joined_attention, attention, weight, bias)
        mlp.forward = partial(joined_mlp, mlp.down_proj, both)


def joined_attention(module, weight, bias, x, rope, attend, masked):
    B, T, _ = x.shape
    heads = [p.out_features // module.head_dim for p in (module.q_proj, module.k_proj, module.v_proj)]
    qkv = F.linear(x, weight, bias).view(B, T, -1, module.head_dim).transpose(1, 2)
    both, v = qkv.split([heads[0] + heads[1], heads[2]], dim=1)
    q, k = fastdllm.rotate(both, *rope).split(heads[:2], dim=1)
    return module.o_proj(attend(q, k, v).transpose(1, 2).reshape(B, T, -1))


def joined_mlp(down, weight, x, masked):
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    return down(F.silu(gate) * up)


def written_out(q, k, v, bias=None):
    """`grouped_attention` as two products and a softmax between them."""
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])
    scores = grouped @ k.transpose(2, 3) * q.shape[3] ** -0.5
    return ((scores + bias).softmax(dim=-1) @ v).reshape(q.shape)


PAGE = 256  # slots; the kernel takes multiples of it, and a recorded pass's cache grows by as many


def flash(lengths: torch.Tensor, width: int, seen: int, paged: bool) -> Callable:
    """`grouped_attention` of windows of `width` by flash attention: row i sees its first lengths[i] slots.

    lengths: (B,) int32. They lie on the device, so one recording serves all of them, without a mask and
    without a shape per number of slots read. On pages, and for single tokens, the kernel divides the keys
    among the processors too; else only rows and heads, which at batch 1 leaves most processors idle. CUDA and
    half precision only. torch's public `varlen_attn` is the same call, and fills one more tensor each time.
    """
    count = partial(torch.arange, device=lengths.device, dtype=torch.int32)
    first_query, first_key = (count(len(lengths) + 1) * size for size in (width, seen))
    pages = count(len(lengths) * seen // PAGE).view(len(lengths), -1) if paged else None

    def attend(q, k, v, bias=None):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T or B * S, heads, d)
        if paged:
            k, v = (x.unflatten(0, (-1, PAGE)) for x in (k, v))
        where, how = (first_query, first_key, width, seen), {"seqused_k": lengths, "block_table": pages}
        out = torch.ops.aten._flash_attention_forward(q, k, v, *where, 0.0, False, False, **how)[0]
        return out.unflatten(0, (-1, width)).transpose(1, 2)

    return attend


# --- Commands ---


@click.group(help=__doc__)
def main():
    pass


json_option = click.option(
    "--json", "target", type=click.Path(path_type=Path), help="Write the results here."
)


def write(target: Path | None, found: dict, device: str) -> None:
    if target:
        target.write_text(json.dumps(cli.environment(device) | found, indent=1) + "\n")


def line(row: dict) -> str:
    return "  ".join(f"{key}: {value}" for key, value in row.items())


@main.command()
@click.option("--model", default=str(cli.SHIPPED))
@click.option("--shape", help="Random weights instead: 0.5b, 1.5b, 7b or tiny.")
@click.option("--layers", type=int, help="Of the shape, fewer than it has.")
@click.option("--threads", default="1,2", show_default=True, callback=cli.numbers(int, 1))
@click.option("--dtypes", default="float32,bfloat16", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, help="Also measure torch.compile.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=0.3, show_default=True, help="To measure each, in each round.")
@json_option
def cpu(model, shape, layers, threads, dtypes, compiled, rounds, seconds, target):
    """Dtypes, threads, and ways to make a pass faster on this CPU, at batch 1 and 160 positions."""
    ways = ["products", "prepacked products", "eager", "prepacked", "joined", "compiled"][: 5 + compiled]
    found = []
    for dtype in dtypes.split(","):
        for count in threads:
            torch.set_num_threads(count)
            torch._dynamo.reset()  # else, after a few networks, it would give up compiling and run eagerly
            works, row = {}, {"dtype": dtype, "threads": count}
            for way in ways:
                network, _ = build(model, shape, layers, "cpu", dtype)
                change = {"prepacked": prepack, "joined": join}.get(way)
                change and change(network)
                for width in WINDOWS:
                    if way.endswith("products"):
                        work = products(network, width, way.startswith("prepacked"))
                    else:
                        work = one_pass(network, 1, width, 160)
                    if way == "compiled":
                        work = torch.compile(work, dynamic=False)
                        began = time.perf_counter()
                        with torch.inference_mode():
                            work()
                        row[f"compiling {width}, s"] = round(time.perf_counter() - began, 1)
                    works[f"{way} {width}"] = work
            with torch.inference_mode():  # in turns, so that the machine's moods meet all of them
                taken = [
                    {name: milliseconds(work, seconds) for name, work in works.items()} for _ in range(rounds)
                ]
            row |= {name: round(median(turn[name] for turn in taken), 3) for name in works}
            found.append(row)
            click.echo(line(row))
            write(target, {"model": shape or "shipped", "layers": layers, "ms": found}, "cpu")


WAYS = "products", "eager", "recorded", "recorded, cuDNN", "written out", "flash", "flash, paged"
WAYS += "fused", "joined", "joined fused"
SMALL = (fastdllm.RMSNorm, "forward"), (fastdllm, "rotate")  # which read and write much and compute little


@main.command()
@click.option("--shape", default="7b", show_default=True, help="Random weights: 0.5b, 1.5b, 7b or tiny.")
@click.option("--layers", type=int, help="Of the shape, fewer than it has.")
@click.option("--batch-sizes", default="1,16", show_default=True, callback=cli.numbers(int, 1))
@click.option("--device", default="cuda", show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="To measure each.")
@json_option
def cuda(shape, layers, batch_sizes, device, seconds, target):
    """Ways to make a recorded pass faster, against 1,280 positions, with their share of the limit."""
    seen = 1280
    model, _ = build(str(cli.SHIPPED), shape, layers, device, "bfloat16")
    where, rows = model.weight.device, {}
    machine = limits(where, torch.bfloat16)
    for way in WAYS:
        if way.startswith("flash") and where.type != "cuda":
            continue
        if way == "joined":
            join(model)
        changes = {(fastdllm, "grouped_attention"): written_out} if way == "written out" else {}
        if way.endswith("fused"):
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64  # else after a few windows it would run eagerly
            changes = {place: torch.compile(getattr(*place), dynamic=False) for place in SMALL}
        torch.backends.cuda.enable_cudnn_sdp(way.endswith("cuDNN"))
        for batch in batch_sizes:
            for width in WINDOWS:
                row = rows.setdefault((batch, width), {"batch": batch, "width": width})
                if way.startswith("flash"):  # AR sees itself last, a block its end
                    keys = seen - (BLOCK - 1) * (width == 1)
                    lengths = torch.full((batch,), keys, device=where, dtype=torch.int32)
                    changes = {(fastdllm, "grouped_attention"): flash(lengths, width, seen, "paged" in way)}
                with torch.inference_mode(), ExitStack() as patches:
                    for place, new in changes.items():
                        patches.enter_context(mock.patch.object(*place, new))
                    alone = way == "products"
                    masked = not way.startswith("flash")
                    one = partial(one_pass, model, batch, width, seen, masked)
                    run = products(model, batch * width) if alone else one()
                    # on a CPU, where only this script is tried, nothing is recorded
                    record = way != "eager" and where.type == "cuda"
                    work = RecordedPasses(model).capture(run, where) if record else run
                    row[way] = round(milliseconds(lambda work=work: (work(), wait(where)), seconds), 3)
                pass_ = Pass("full", seen - BLOCK, [0] * width, [], [], torch.empty(0), 0)
                moved, done = cost(
                    model.config, model.weight.itemsize, [pass_] * batch, 1 if width == 1 else BLOCK
                )
                limit = max(moved / machine["bytes_per_second"], done / machine["operations_per_second"])
                row["limit"] = round(1000 * limit, 3)
                row.setdefault("share of the limit", {})[way] = round(1000 * limit / row[way], 3)
        found = {"shape": shape, "layers": layers, "positions": seen, "machine": machine}
        # after each way: a run that is cut off leaves these
        write(target, found | {"passes": list(rows.values())}, device)
    for row in rows.values():
        click.echo(line(row))


@main.command()
@click.option("--shape", default="7b", show_default=True, help="Random weights: 0.5b, 1.5b, 7b or tiny.")
@click.option("--layers", type=int, help="Of the shape, fewer than it has.")
@click.option("--device", default="cuda", show_default=True)
@json_option
def profile(shape, layers, device, target):
    """Kernels of a pass of 1 and 32 tokens, by name and time; on CUDA also what recording it takes."""
    model, _ = build(str(cli.SHIPPED), shape, layers, device, "bfloat16")
    where, found = model.weight.device, []
    activity = torch.profiler.ProfilerActivity
    for width in (1, BLOCK):
        row = {"width": width}
        with torch.inference_mode():
            work = one_pass(model, 1, width, 1280)
            if where.type == "cuda":
                before, began = torch.cuda.memory_reserved(where), time.perf_counter()
                work = RecordedPasses(model).capture(work, where)
                wait(where)
                row["recording_seconds"] = time.perf_counter() - began
                row["recording_mib"] = (torch.cuda.memory_reserved(where) - before) / 2**20
            work(), wait(where)
            kinds = [activity.CPU] + [activity.CUDA] * (where.type == "cuda")
            with torch.profiler.profile(activities=kinds) as profiled:
                work(), wait(where)
        name = "self_device_time_total" if where.type == "cuda" else "self_cpu_time_total"
        spent = lambda event, name=name: getattr(event, name)
        events = sorted(profiled.key_averages(), key=spent, reverse=True)[:25]
        row["kernels"] = [
            {"name": e.key, "calls": e.count, "ms": spent(e) / 1000} for e in events if spent(e)
        ]
        found.append(row)
        write(target, {"shape": shape, "layers": layers, "passes": found}, device)
        for kernel in row["kernels"]:
            click.echo(f"{width:3} tokens {kernel['ms']:9.3f} ms {kernel['calls']:5} {kernel['name'][:80]}")


def peak_kib() -> int:
    """Memory in use at its highest, pages of mapped files included (Linux)."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@main.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1.5b", show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="To load in; the files are bfloat16.")
@click.option("--folder", hidden=True, help="Load this one here, and measure that.")
@json_option
def memory(shape, dtype, folder, target):
    """Peak memory and time of loading and prepacking, in a fresh process; the files are made and removed."""
    if folder:
        return click.echo(json.dumps(measure_loading(folder, dtype)))
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            model = Qwen2(SHAPES[shape])
        weights = {name: torch.randn(p.shape).mul_(0.02).bfloat16() for name, p in model.named_parameters()}
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
        del weights
        (Path(folder) / "config.json").write_text(json.dumps(unparse_config(SHAPES[shape])))
        again = [sys.executable, __file__, "memory", "--dtype", dtype, "--folder", folder]
        run = subprocess.run(again, check=True, capture_output=True, text=True)
    about = {"shape": shape, "files": "bfloat16", "dtype": dtype, "system": platform.system()}
    found = json.loads(run.stdout) | about
    click.echo(json.dumps(found))
    write(target, found, "cpu")


def measure_loading(folder: str, dtype: str) -> dict:
    before, began = peak_kib(), time.perf_counter()
    model, _ = fastdllm.load(folder, "cpu", dtype)
    seconds = time.perf_counter() - began
    sum(p.sum(dtype=torch.float32).item() for p in model.parameters())  # touches every page
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    loaded, began = peak_kib() - before, time.perf_counter()
    prepack(model)
    return {
        "load_seconds": round(seconds, 2),
        "weights_mib": weights >> 20,
        "peak_mib": loaded >> 10,
        "peak_over_weights": round(loaded * 1024 / weights, 3),
        "prepack_seconds": round(time.perf_counter() - began, 2),
        "peak_with_prepacking_over_weights": round((peak_kib() - before) * 1024 / weights, 3),
    }


if __name__ == "__main__":
    main()
