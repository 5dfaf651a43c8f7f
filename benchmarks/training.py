"""The trainer's layouts and the recipe's ablations, side by side.

    python benchmarks/training.py layouts --shape 1.5b --seq-len 2048 --rows 1 --recompute
    python benchmarks/training.py resume --device cuda
    python benchmarks/training.py ablations --parent build/ar --data build/train.jsonl --work build/ablations

`layouts`: tokens per second and memory of one training step. Two layouts of the same loss, [view 1 ; view 2 ;
clean] (3L tokens) and two times [view ; clean] (4L, the original's), with the dense mask and with the
attention that train.py chooses. Each runs in a process of its own, for its memory; all see the same rows, a
third of them prompts, and must give the same loss.

Model FLOP use is of the products of weights that the loss
needs, forward and backward, against the rate of a large product in bfloat16; attention and what `--recompute`
does twice are not counted.

`resume`: a run of one process under torchrun with sharded weights, stopped after a checkpoint and started
again, beside one that was left alone: the same losses, and tokens per second.

`ablations`: which parts of the recipe, and how much of it, buy what. Adapts the autoregressive parent anew
for each row (seven adaptations, about half an hour on one core; started again, it goes on where it stopped),
evaluates each on held-out problems, and writes benchmarks/results/ablations.json. All use one seed, so
differences of a standard error or two are noise; none is trained to its end.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from speed import build, limits  # noqa: E402

import cli  # noqa: E402


@click.group(help=__doc__)
def main():
    pass


# --- Layouts ---

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
    """Loss, tokens per second (median of the steps), FLOP use, and memory beyond weights and gradients."""
    from train import Objective, Training, complementary_noise, distribute, training_loss

    layout, attention = WAYS[way]
    network, _ = build(model, shape, None, device, "float32")
    network.requires_grad_(True)
    how = Training(recompute=recompute)
    distribute(Objective(network, how))
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
    step = statistics.median(seconds[1:])
    found = {"loss": loss.item(), "tokens_per_second": rows * seq_len / step}
    found["memory_mib"] = peak_mib(where) - before
    c = network.config
    layers = sum(p.numel() for p in network.model.layers.parameters() if p.dim() == 2)
    positions = rows * seq_len * (3 if layout == "3L" else 4)
    # every trainable token is a target once, in the view that masks it
    head = c.vocab_size * c.hidden_size * rows * (seq_len - seq_len // 3)
    rate = limits(where, torch.bfloat16)["operations_per_second"]
    found["flop_use"] = 3 * 2 * (layers * positions + head) / step / rate
    if where.type == "cuda" and attention == "auto":
        from fast import sparse_mask
        from train import visibility

        views = 2 if layout == "3L" else 1
        tiles = sparse_mask(visibility(seq_len, size, views), None, (views + 1) * seq_len, where)
        found["tiles_skipped_percent"] = tiles.sparsity()
    return found


@main.command()
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
def layouts(threads, target, one, **how):
    """What the trainer's choices cost: tokens per second and memory of one training step."""
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
        click.echo(
            f"{way:<34}{found['tokens_per_second']:10,.0f} tokens/s {found['memory_mib']:9,.0f} MiB "
            f"{100 * found['flop_use']:5.1f}% of the large product's rate"
        )
        if target:
            about = cli.environment(how["device"]) | how | {"model": os.path.relpath(how["model"])}
            target.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    losses = [row["loss"] for row in rows if "loss" in row]
    if losses:
        click.echo(f"losses agree to {max(losses) - min(losses):.1e}")
    sys.exit(not losses)


# --- Stopped and started again ---


def torchrun(line: list[str], enough: Callable = lambda: False) -> None:
    """Run until it ends, or until there is `enough`: then torchrun is asked to end its processes."""
    with subprocess.Popen(line) as process:
        try:
            while process.poll() is None and not enough():
                time.sleep(0.02)
        finally:
            process.terminate()
    if process.returncode and not enough():
        sys.exit(f"torchrun failed: {process.returncode}")


@main.command()
@click.option("--model", default=str(cli.SHIPPED), help="Checkpoint.")
@click.option("--data", default=str(ROOT / "tiny" / "sample.jsonl"), help="JSONL.")
@click.option("--device", default="auto", show_default=True)
@click.option("--processes", default=1, show_default=True)
@click.option("--steps", default=12, show_default=True)
@click.option("--seq-len", default=192, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the results here.")
def resume(model, data, device, processes, steps, seq_len, target):
    """A run under torchrun that is stopped after a checkpoint and started again, beside one that is not."""
    with tempfile.TemporaryDirectory() as work:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        line += [ROOT / "train.py", "adapt", "--model", model, "--data", data, "--device", device]
        line += ["--parallel", "fsdp", "--batch-size", 8, "--micro-batch", 4, "--seq-len", seq_len]
        line += ["--steps", steps, "--save-every", steps // 3, "--lr", 1e-4, "--warmup", 2, "--out"]
        whole, stopped = Path(work) / "whole", Path(work) / "stopped"
        whole_line, stopped_line = ([*map(str, line), str(out)] for out in (whole, stopped))
        torchrun(whole_line)
        torchrun(stopped_line, lambda: list(stopped.glob("checkpoints/step-*")))
        steps_before = len((stopped / "metrics.jsonl").read_text().splitlines())
        torchrun(stopped_line)
        logs = [
            [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            for out in (whole, stopped)
        ]
    losses = [[step["diffusion_loss"] for step in log] for log in logs]
    found = {"stopped_after_step": steps_before, "losses": losses}
    found["largest_difference"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    found["tokens_per_second"] = statistics.median(step["tokens"] / step["seconds"] for step in logs[0][1:])
    click.echo(json.dumps(found))
    if target:
        about = {"device": device, "processes": processes, "model": os.path.relpath(model)}
        target.write_text(json.dumps(cli.environment(device) | about | found, indent=1) + "\n")


# --- Ablations ---

RECIPE = {"seq-len": 192, "batch-size": 18, "micro-batch": 18, "lr": 2e-3, "warmup": 30, "schedule": "cosine"}
STEPS = 300
ALONE = {"packing": "concatenated", "complement": False}
ROWS = {  # name: what differs from RECIPE
    "all of it": {"ar-weight": 0.5},
    "all of it, a causal clean copy": {"ar-weight": 0.5, "clean": "causal"},
    "without the causal loss": {},
    "original packing (documents see each other)": {"packing": "original"},
    "original packing, without the complementary view": {"packing": "original", "complement": False},
    "token shift alone (no padding either)": ALONE,
    "all of it, a third of the data": {"ar-weight": 0.5, "steps": STEPS // 3},
}
DECODERS = {
    "ar": ["--block-size", "1"],
    "threshold 1": ["--threshold", "1"],
    "threshold 0.9": ["--threshold", "0.9"],
    "threshold 0.9, sub-block 32": ["--threshold", "0.9", "--sub-block-size", "32"],
    "verify": ["--verify"],
}


def flags(options: dict) -> list[str]:
    named = lambda k, v: [f"--{k}" if v else f"--no-{k}"] if type(v) is bool else [f"--{k}", str(v)]
    return [part for key, value in options.items() for part in named(key, value)]


def run(script: str, *arguments, **how) -> subprocess.CompletedProcess:
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], check=True, env=threads, **how
    )


@main.command()
@click.option(
    "--parent", required=True, type=click.Path(exists=True, path_type=Path), help="Autoregressive model."
)
@click.option(
    "--data", required=True, type=click.Path(exists=True, path_type=Path), help="Training problems."
)
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for the adaptations.")
@click.option("--count", default=400, show_default=True, help="Held-out problems.")
@click.option(
    "--out", default=ROOT / "benchmarks" / "results" / "ablations.json", type=click.Path(path_type=Path)
)
def ablations(parent, data, work, count, out):
    """Which parts of the training recipe, and how much of it, buy what."""
    work.mkdir(parents=True, exist_ok=True)
    found = {
        "command": " ".join(["python", "benchmarks/training.py ablations", f"--count {count}"]),
        **cli.environment("cpu"),
    }
    found |= {"seed": 0, "recipe": RECIPE | {"steps": STEPS}, "rows": []}
    for name, changes in ROWS.items():
        options = RECIPE | {"steps": STEPS, "seed": 0, "device": "cpu"} | changes
        folder = work / name.replace(" ", "_").replace(",", "").replace("(", "").replace(")", "")
        tokens = work / "tokens"  # tokenised once for all
        source = tokens if tokens.exists() else data
        if not (folder / "model.safetensors").exists():
            run("train.py", "adapt", "--model", parent, "--data", source, "--out", folder, *flags(options))
            if (folder / "tokens").exists() and not tokens.exists():
                os.rename(folder / "tokens", tokens)
        row = {
            "name": name,
            "changes": changes,
            "tokens": options["steps"] * RECIPE["batch-size"] * RECIPE["seq-len"],
        }
        for decoder, how in DECODERS.items():
            record = folder / f"{decoder.replace(' ', '_')}.json"
            if not record.exists():
                line = ["eval", "--model", folder, "--device", "cpu", "--count", count, "--json", *how]
                line += ["--max-new-tokens", 128]
                record.write_text(run("cli.py", *line, stdout=subprocess.PIPE, text=True).stdout)
            score = json.loads(record.read_text())
            row[decoder] = {key: score[key] for key in ("accuracy", "standard_error", "tokens_per_forward")}
        found["rows"].append(row)
        out.write_text(json.dumps(found, indent=1) + "\n")
        cells = [f"{100 * row[d]['accuracy']:5.1f}% {row[d]['tokens_per_forward']:5.2f}" for d in DECODERS]
        click.echo(f"{name:<50}" + "   ".join(cells))


if __name__ == "__main__":
    main()
