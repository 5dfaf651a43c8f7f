"""Which dtype, how many threads, and what else could make a pass faster on this CPU: milliseconds of one pass.

    python benchmarks/cpu_choices.py --json benchmarks/results/cpu_choices.json
    python benchmarks/cpu_choices.py --shape 0.5b

Windows of 1 token (AR), 8 (a sub-block) and 32 (a block) against 160 positions, batch 1, without the head, medians of
rounds in which all ways take turns. Besides dtypes and thread counts: `prepacked`, weights in oneDNN's order, as the
command line decodes; `joined`, plain weights, one product for q, k and v and one for gate and up; `compiled`, plain
weights, the whole pass by torch.compile (a C++ compiler is needed; the seconds that compiling took stand beside it).
`products` is what the matrix products of the pass take alone, one after the other, and `prepacked products` the same in
that order: the rest of a pass is attention, small operations and overhead.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import click
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from speed import build  # noqa: E402

import cli  # noqa: E402
import fastdllm  # noqa: E402
from fastdllm import KVCache, PrepackedLinear, block_causal_mask, prepack  # noqa: E402

WINDOWS, PAST, ROUNDS = (1, 8, 32), 128, 5


def milliseconds(work, seconds: float = 0.3) -> float:
    """Median of as many runs as fit into the time, after a few that do not count."""
    taken = []
    for _ in range(3):
        work()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return median(taken)


def linears(model: fastdllm.Qwen2, prepacked: bool = False) -> list[nn.Module]:
    """The layers' matrices."""
    plain = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    return [PrepackedLinear(m) for m in plain] if prepacked else plain


def products(model: fastdllm.Qwen2, matrices: list[nn.Module], width: int):
    """The matrix products of a pass, without what lies between them."""
    shapes = [m.in_features for m in linears(model)]
    inputs = {size: model.weight.new_empty(width, size).normal_() for size in shapes}
    return lambda: [layer(inputs[size]) for layer, size in zip(matrices, shapes)]


def join(model: fastdllm.Qwen2) -> None:
    """One product for q, k and v, and one for gate and up: copies of the weights, side by side."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        weight, bias = torch.cat([p.weight for p in qkv]), torch.cat([p.bias for p in qkv])
        attention.forward = partial(joined_attention, attention, weight, bias)
        mlp.forward = partial(joined_mlp, mlp.down_proj, both)


def joined_attention(module, weight, bias, x, rope, mask, store):
    B, T, _ = x.shape
    heads = [p.out_features // module.head_dim for p in (module.q_proj, module.k_proj, module.v_proj)]
    qkv = F.linear(x, weight, bias).view(B, T, -1, module.head_dim).transpose(1, 2)
    both, v = qkv.split([heads[0] + heads[1], heads[2]], dim=1)
    q, k = fastdllm.rotate(both, *rope).split(heads[:2], dim=1)
    k, v = store(k, v)
    return module.o_proj(fastdllm.attention(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))


def joined_mlp(down, weight, x):
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    return down(F.silu(gate) * up)


def static_pass(model: fastdllm.Qwen2, cache: KVCache, block_size: int, tokens, starts):
    """Windows as `Graphs` runs them: positions are tensors, so that one compilation or recording serves all of them."""
    (B, T), device = tokens.shape, tokens.device
    positions, seen = starts + torch.arange(T, device=device), cache.k.shape[2]
    mask = block_causal_mask(positions[:, -1:], torch.arange(seen, device=device), block_size)[:, None]
    read, rows = (slice(B), slice(seen)), torch.arange(B, device=device)[:, None]
    return model(tokens, positions, mask, partial(cache.update, rows=rows, positions=positions, read=read))


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--model", default=str(cli.SHIPPED))
@click.option("--shape", help="Random weights instead: 0.5b, 1.5b or 7b.")
@click.option("--layers", type=int, help="Of the shape, fewer than it has.")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, help="Also measure torch.compile.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Add the results to this file.")
def main(model, shape, layers, threads, compiled, target):
    rows, ways = (
        [],
        ("products", "prepacked products", "eager", "prepacked", "joined", "compiled")[: 5 + compiled],
    )
    for dtype in ("float32", "bfloat16"):
        for count in map(int, threads.split(",")):
            torch.set_num_threads(count)
            torch._dynamo.reset()  # else, after a few networks, it would give up compiling and run eagerly
            works, row = {}, {"dtype": dtype, "threads": count}
            for way in ways:
                network, _ = build(model, shape, layers, "cpu", dtype)
                cache = KVCache(network.config, 1, PAST + 32, network.weight)
                cache.clear(0)
                change = {"prepacked": prepack, "joined": join}.get(way)
                change and change(network)
                matrices = linears(network, way == "prepacked products") if way.endswith("products") else None
                for width in WINDOWS:
                    tokens, size = torch.randint(700, (1, width)), 1 if width == 1 else 32
                    if matrices:
                        work = products(network, matrices, width)
                    elif way == "compiled":
                        work = torch.compile(partial(static_pass, network, cache, size), dynamic=False)
                        work = partial(work, tokens, torch.tensor([[PAST]]))
                        began = time.perf_counter()
                        with torch.inference_mode():
                            work()
                        row[f"compiling {width}, s"] = round(time.perf_counter() - began, 1)
                    else:
                        work = partial(network.window, tokens, [PAST], cache, size)
                    works[f"{way} {width}"] = work
            with torch.inference_mode():  # in turns, so that the machine's moods meet all of them
                taken = [{name: milliseconds(work) for name, work in works.items()} for _ in range(ROUNDS)]
            row |= {name: round(median(turn[name] for turn in taken), 3) for name in works}
            rows.append(row)
            click.echo("  ".join(f"{key}: {value}" for key, value in row.items()))
    if target:
        found = json.loads(target.read_text()) if target.exists() else []
        found.append(cli.environment() | {"model": shape or "shipped", "layers": layers, "ms": rows})
        target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
