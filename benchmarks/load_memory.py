"""Peak memory and time of loading and prepacking a published shape with random weights, as one JSON object.

    python benchmarks/load_memory.py --shape 1.5b --dtype auto

The checkpoint is made in a temporary folder, loaded in a fresh process, and removed again.
"""

import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from fastdllm import Config, Qwen2, unparse_config

SHAPES = {
    "0.5b": Config(151936, 896, 4864, 24, 14, 2, 64, 32768, tie_word_embeddings=True),
    "1.5b": Config(151936, 1536, 8960, 28, 12, 2, 128, 32768, tie_word_embeddings=True),
}

LOADER = """
import json, re, sys, time
sys.path.insert(0, sys.argv[1])
import fastdllm
def peak():  # KiB of memory in use at its highest, pages of mapped files included (Linux)
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
began = time.perf_counter()
model, _ = fastdllm.load(sys.argv[2], "cpu", sys.argv[3])
seconds = time.perf_counter() - began
checksum = sum(p.sum(dtype=fastdllm.torch.float32).item() for p in model.parameters())  # touches every page
weights = sum(p.numel() * p.element_size() for p in model.parameters())
loaded = peak() - before
began = time.perf_counter()
fastdllm.prepack(model)
print(json.dumps({"load_seconds": round(seconds, 2), "weights_mib": weights >> 20, "peak_mib": loaded >> 10,
                  "peak_over_weights": round(loaded * 1024 / weights, 3),
                  "prepack_seconds": round(time.perf_counter() - began, 2),
                  "peak_with_prepacking_over_weights": round((peak() - before) * 1024 / weights, 3)}))
"""


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1.5b", show_default=True)
@click.option("--dtype", default="auto", show_default=True, help="To load in; the files are bfloat16.")
def main(shape, dtype):
    config = SHAPES[shape]
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            model = Qwen2(config)
        weights = {name: torch.randn(p.shape).mul_(0.02).bfloat16() for name, p in model.named_parameters()}
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
        del weights
        (Path(folder) / "config.json").write_text(json.dumps(unparse_config(config)))
        root = str(Path(__file__).parent.parent)
        run = subprocess.run(
            [sys.executable, "-c", LOADER, root, folder, dtype], check=True, capture_output=True, text=True
        )
    about = {"shape": shape, "files": "bfloat16", "dtype": dtype, "torch": torch.__version__}
    about |= {"machine": f"{platform.system()} {platform.machine()}", "date": date.today().isoformat()}
    click.echo(json.dumps(json.loads(run.stdout) | about))


if __name__ == "__main__":
    main()
