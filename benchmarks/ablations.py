"""The paper's ablations of the training recipe, in small: which parts of it, and how much of it, buy what.

    python benchmarks/ablations.py --parent build/tiny/ar --data build/tiny/train.jsonl --work build/ablations

adapts the autoregressive parent anew for every row (six adaptations, about half an hour on one core; started again, it
goes on where it stopped), evaluates each on held-out problems, and writes benchmarks/results/ablations.json. All of
them use one seed, so that differences of a standard error or two are noise; none is trained to its end.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from cli import environment  # noqa: E402

RECIPE = {"seq-len": 192, "batch-size": 18, "micro-batch": 18, "lr": 2e-3, "warmup": 30, "schedule": "cosine"}
STEPS = 300
ALONE = {"packing": "concatenated", "complement": False}
ROWS = {  # name: what differs from RECIPE
    "all of it": {"ar-weight": 0.5},
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
}


def flags(options: dict) -> list[str]:
    named = lambda k, v: [f"--{k}" if v else f"--no-{k}"] if type(v) is bool else [f"--{k}", str(v)]
    return [part for key, value in options.items() for part in named(key, value)]


def run(script: str, *arguments, **how) -> subprocess.CompletedProcess:
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)], check=True, env=threads, **how
    )


@click.command(help=__doc__.split("\n\n")[0])
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
def main(parent, data, work, count, out):
    work.mkdir(parents=True, exist_ok=True)
    found = {"command": " ".join(["python", "benchmarks/ablations.py", f"--count {count}"]), **environment()}
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
                line = "eval", "--model", folder, "--count", count, "--max-new-tokens", 128, "--json", *how
                record.write_text(run("cli.py", *line, stdout=subprocess.PIPE, text=True).stdout)
            score = json.loads(record.read_text())
            row[decoder] = {key: score[key] for key in ("accuracy", "standard_error", "tokens_per_forward")}
        found["rows"].append(row)
        out.write_text(json.dumps(found, indent=1) + "\n")
        cells = [f"{100 * row[d]['accuracy']:5.1f}% {row[d]['tokens_per_forward']:5.2f}" for d in DECODERS]
        click.echo(f"{name:<50}" + "   ".join(cells))


if __name__ == "__main__":
    main()
