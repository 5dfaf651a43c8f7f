"""What could make a recorded pass faster on a CUDA device: milliseconds of one pass, and its share of the limit.

    python benchmarks/cuda_choices.py --shape 7b --json benchmarks/results/gpu/cuda_choices.json

Windows of 1 token (AR), 8 (a sub-block) and 32 (a block) against 1,280 positions, in batches, without the head, every
way recorded as a CUDA graph but `eager`. `recorded` is how the decoder runs; `joined`, one product for q, k and v and
one for gate and up; `written out`, attention as two products and a softmax in place of the kernel; `fused`, norms and
rotary embedding by torch.compile; `joined fused`, both. `products` is what the pass's matrix products take alone: the
rest is attention and small operations. The limit is that of `python cli.py bench`: the longer of bytes over a large
copy's rate and operations over a large product's.
"""

import json
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import click
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cpu_choices import join, linears, milliseconds, products, static_pass  # noqa: E402
from speed import build, cost, limits, wait  # noqa: E402

import cli  # noqa: E402
import fastdllm  # noqa: E402
from fastdllm import Graphs, KVCache, Pass  # noqa: E402

WINDOWS, SEEN = (1, 8, 32), 1280
WAYS = ("products", "eager", "recorded", "written out", "fused", "joined", "joined fused")
SMALL = (fastdllm.RMSNorm, "forward"), (fastdllm, "rotate")  # which read and write much and compute little


def written_out(q, k, v, bias):
    """`grouped_attention` as two products and a softmax between them."""
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[3])
    scores = grouped @ k.transpose(2, 3) * q.shape[3] ** -0.5
    return ((scores + bias).softmax(dim=-1) @ v).reshape(q.shape)


def window(model: fastdllm.Qwen2, batch: int, width: int):
    """A pass over the last block's first `width` positions, of rows whose cache is full."""
    cache = KVCache(model.config, batch, SEEN, model.weight)
    cache.k.zero_(), cache.v.zero_()
    tokens = torch.randint(700, (batch, width), device=model.weight.device)
    starts = torch.full_like(tokens[:, :1], SEEN - 32)
    return partial(static_pass, model, cache, 1 if width == 1 else 32, tokens, starts)


def record(run, device: torch.device):
    """The work as a CUDA graph's replay; on other devices, where only this script is tried, the work itself."""
    return Graphs().capture(run, device)[1] if device.type == "cuda" else run


def limit(model: fastdllm.Qwen2, batch: int, width: int, machine: dict) -> float:
    """Milliseconds that this pass takes at the machine's measured rates."""
    start = SEEN - 32
    step = Pass("full", start, [0] * width, [], torch.empty(0))
    moved, done = cost(model.config, model.weight.itemsize, [step] * batch, 1 if width == 1 else 32)
    return 1000 * max(moved / machine["bytes_per_second"], done / machine["operations_per_second"])


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--shape", default="7b", show_default=True, help="Random weights: 0.5b, 1.5b, 7b or tiny.")
@click.option("--layers", type=int, help="Of the shape, fewer than it has.")
@click.option("--batch-sizes", default="1,16", show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="To measure each.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the results to this file.")
def main(shape, layers, batch_sizes, device, seconds, target):
    model, _ = build(str(cli.SHIPPED), shape, layers, device, "bfloat16")
    where, rows = model.weight.device, {}
    machine = limits(where, torch.bfloat16)
    cases = [(batch, width) for batch in map(int, batch_sizes.split(",")) for width in WINDOWS]
    for way in WAYS:
        if way == "joined":
            join(model)
        changes = {(fastdllm, "grouped_attention"): written_out} if way == "written out" else {}
        if way.endswith("fused"):
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = (
                64  # else it would give up after a few windows and run eagerly
            )
            changes = {place: torch.compile(getattr(*place), dynamic=False) for place in SMALL}
        for batch, width in cases:
            row = rows.setdefault((batch, width), {"batch": batch, "width": width})
            with torch.inference_mode(), ExitStack() as patches:
                for place, new in changes.items():
                    patches.enter_context(mock.patch.object(*place, new))
                alone = way == "products"
                run = products(model, linears(model), batch * width) if alone else window(model, batch, width)
                work = run if way == "eager" else record(run, where)
                row[way] = round(milliseconds(lambda work=work: (work(), wait(where)), seconds), 3)
    for (batch, width), row in rows.items():
        row["limit"] = round(limit(model, batch, width, machine), 3)
        row |= {f"{way}, share of the limit": round(row["limit"] / row[way], 3) for way in WAYS}
        click.echo("  ".join(f"{key}: {value}" for key, value in row.items()))
    if target:
        found = cli.environment() | {"shape": shape, "layers": layers, "positions": SEEN, "machine": machine}
        target.write_text(json.dumps(found | {"passes": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
