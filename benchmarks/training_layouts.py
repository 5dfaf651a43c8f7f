"""What the trainer's choices cost, side by side: tokens per second and memory of one training step.

    python benchmarks/training_layouts.py                                  # the shipped checkpoint, on this CPU
    python benchmarks/training_layouts.py --shape 1.5b --seq-len 2048 --rows 1 --recompute    # on a GPU

Two layouts of the same loss, [view 1 ; view 2 ; clean] (3L tokens) and two times [view ; clean] (4L, the original's),
with the dense mask and with the attention that `train.py` chooses. Each runs in a process of its own, for its memory;
all see the same rows, a third of them prompts, and must give the same loss.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from speed import build  # noqa: E402

import cli  # noqa: E402
from train import Objective, complementary_noise, distribute, training_attention, training_loss  # noqa: E402

WAYS = {  # name: (layout, attention)
    "3L, chosen attention": ("3L", "auto"),
    "3L, dense mask": ("3L", "dense"),
    "4L, chosen attention": ("4L", "auto"),
    "4L, dense mask (the original's)": ("4L", "dense"),
}


def peak_mib(device: torch.device) -> float:
    """Largest memory so far: of the device, or of the process where that is the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(
    way: str, model: str, shape: str | None, device: str, rows: int, seq_len: int, steps: int, recompute: bool
):
    """Loss, tokens per second (median of the steps), and memory beyond the weights and their gradients, of one way."""
    layout, attention = WAYS[way]
    network, _ = build(model, shape, None, device, "float32")
    network.requires_grad_(True)
    distribute(Objective(network, True, torch.bfloat16), "ddp", recompute)
    where = network.lm_head.weight.device
    generator = torch.Generator().manual_seed(0)
    size = network.config.block_size
    tokens = torch.randint(network.config.mask_token_id, (rows, seq_len), generator=generator)
    trainable = (torch.arange(seq_len) >= seq_len // 3).expand(rows, -1)
    masked = complementary_noise(trainable, size, generator)
    if layout == "4L":
        tokens, masked, trainable = (
            tokens.repeat(2, 1),
            torch.cat([masked, trainable & ~masked]),
            trainable.repeat(2, 1),
        )
    tokens, masked, trainable = (x.to(where) for x in (tokens, masked, trainable))
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    before, seconds = peak_mib(where), []
    if where.type == "cuda":  # what building the model took does not count
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where) / 2**20
    for _ in range(steps + 1):
        began = time.perf_counter()
        with torch.autocast(where.type, torch.bfloat16):
            loss = training_loss(network, tokens, trainable, size, masked, None, layout == "3L", attention)
        loss.backward()
        if where.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    found = {"loss": loss.item(), "tokens_per_second": rows * seq_len / statistics.median(seconds[1:])}
    found["memory_mib"] = peak_mib(where) - before
    if where.type == "cuda" and attention == "auto":
        mask = training_attention("sparse", seq_len, size, 2 if layout == "3L" else 1, None, where)
        found["tiles_skipped_percent"] = mask.keywords["block_mask"].sparsity()
    return found


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--model", default=str(cli.SHIPPED), help="Checkpoint.")
@click.option("--shape", help="Random weights instead: 0.5b, 1.5b or 7b.")
@click.option("--device", default="auto", show_default=True)
@click.option("--rows", default=16, show_default=True)
@click.option("--seq-len", default=192, show_default=True)
@click.option("--steps", default=5, show_default=True)
@click.option("--recompute", is_flag=True, help="Keep only the layers' inputs for the backward pass.")
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the results here.")
@click.option("--one", hidden=True, type=click.Choice(list(WAYS)))
def main(threads, target, one, **how):
    torch.set_num_threads(threads)
    if one:
        return click.echo(json.dumps(measure(one, **how)))
    rows = []
    for way in WAYS:
        run = subprocess.run([sys.executable, *sys.argv, "--one", way], capture_output=True, text=True)
        if run.returncode:
            rows.append({"way": way, "failed": run.stderr.strip().splitlines()[-1]})  # memory, most likely
            click.echo(f"{way:<34}{rows[-1]['failed']}")
            continue
        rows.append({"way": way} | json.loads(run.stdout))
        found = rows[-1]
        click.echo(f"{way:<34}{found['tokens_per_second']:10,.0f} tokens/s {found['memory_mib']:9,.0f} MiB")
    losses = [row["loss"] for row in rows if "loss" in row]
    click.echo(f"losses agree to {max(losses) - min(losses):.1e}")
    if target:
        how["model"] = os.path.relpath(how["model"])
        target.write_text(json.dumps(cli.environment() | how | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
