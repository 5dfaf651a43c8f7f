"""What a training step costs: `train.py adapt`, run as its users run it, on random weights of a shape.

    python benchmarks/training_step.py --shape 0.5b --device cuda --seq-len 2048 --micro-batch 4

Tokens per second, the process's peak memory (on CUDA of its tensors), and the operations per second of the
products of weights, forward and backward; attention, and what `--recompute` does twice, are not counted. On
CUDA training compiles its sparse attention; a second row shows the dense mask that takes its place where
there is no compiler.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from speed import SHAPES  # noqa: E402

from checkpoint import load_tokenizer, pick_device, unparse_config  # noqa: E402
from commands import console  # noqa: E402
from commands.prompts import environment  # noqa: E402
from fastdllm import Config, Qwen2, require  # noqa: E402

# train.py as it is, then the most memory that it took, in bytes
WATCHED = """
import resource, runpy, signal, sys, torch
sys.argv[:1] = []
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else most)
"""


def train(config: Config, steps: int, options: list[str], env: dict[str, str]) -> tuple[list[dict], int]:
    """The metrics of so many steps from random weights, and the most memory in bytes.

    Once they are done the run is ended, so that no checkpoint is written.
    """
    with tempfile.TemporaryDirectory() as work:
        model, out = Path(work) / "model", Path(work) / "out"
        metrics = out / "metrics.jsonl"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(unparse_config(config)))
        for name, content in load_tokenizer(console.SHIPPED).files.items():
            (model / name).write_bytes(content)
        log = lambda: metrics.read_text().splitlines() if metrics.exists() else []
        line = [sys.executable, "-c", WATCHED, ROOT / "train.py", "adapt", "--from-scratch", "--model", model]
        line += ["--out", out, "--steps", 10**6, "--save-every", 10**6, *options]
        pipe = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | env}
        with subprocess.Popen([*map(str, line)], **pipe) as process:
            try:
                while process.poll() is None and len(log()) < steps:
                    time.sleep(0.02)
            finally:  # also where this program is stopped
                process.terminate()
            printed = process.communicate()[0]
        require(len(log()) >= steps, "train.py failed; its message is above.")
        return [json.loads(record) for record in log()[:steps]], int(printed.split()[-1])


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "), context_settings=console.HELP_OPTIONS)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="tiny")
@click.option(
    "--data", default=str(ROOT / "tiny" / "sample.jsonl"), show_default="tiny/sample.jsonl", help="JSONL."
)
@click.option("--device", default="auto")
@click.option("--seq-len", default=192, help="Positions of a row.")
@click.option("--micro-batch", default=4, help="Rows of a step.")
@click.option("--steps", default=5, help="Measured, after one that warms up.")
@click.option("--recompute", is_flag=True, help="Keep only the layers' inputs for the backward pass.")
@click.option("--output", "target", type=console.FILE, help="Write the results here, as JSON.")
@console.reports_mistakes
def main(shape, data, device, seq_len, micro_batch, steps, recompute, target):
    device, rows = pick_device(device), []
    words, config = load_tokenizer(console.SHIPPED), SHAPES[shape]
    size = max(words.size, config.vocab_size)
    config = replace(config, vocab_size=size, mask_token_id=words.id("|<MASK>|"), tokenizer_size=words.size)
    options = ["--data", data, "--device", device, "--seq-len", seq_len, *["--recompute"] * recompute]
    options += ["--batch-size", micro_batch, "--micro-batch", micro_batch]
    with torch.device("meta"):
        layers = sum(p.numel() for p in Qwen2(config).model.layers.parameters() if p.dim() == 2)
    # the layers see two noisy views and a clean copy, and the head each token once; backward costs twice
    tokens = micro_batch * seq_len
    work = 2 * 3 * tokens * (3 * layers + config.vocab_size * config.hidden_size)
    about = {"shape": shape, "seq_len": seq_len, "micro_batch": micro_batch, "recompute": recompute}
    ways = {"chosen": {}} | ({"dense": {"PATH": "", "CC": ""}} if device.startswith("cuda") else {})
    for name, env in ways.items():
        log, memory = train(config, steps + 1, options, env)
        seconds = statistics.median(record["seconds"] for record in log[1:])
        row = {"attention": name, "tokens_per_second": tokens / seconds, "flop_per_second": work / seconds}
        rows.append(row | {"peak_memory_mib": memory / 2**20, "loss": log[-1]["diffusion_loss"]})
        click.echo("  ".join(f"{key}: {value}" for key, value in rows[-1].items()))
        if target:
            target.write_text(json.dumps(environment(device) | about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
