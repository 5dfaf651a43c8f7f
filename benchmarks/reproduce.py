"""The paper's figures, remade with the shipped checkpoint on a laptop: six SVG files and their data.

    pip install -r benchmarks/requirements.txt
    python benchmarks/reproduce.py

Accuracy is of held-out problems; speed is decoding of the same weights by the same code, AR (block size 1)
included, rounds interleaved, medians reported. Run it on a machine that does nothing else.
"""

import json
import statistics
import sys
import time
from itertools import islice
from pathlib import Path

import click
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import cli  # noqa: E402
from benchmarks.judging import final_answer  # noqa: E402
from fastdllm import Decoding, generate  # noqa: E402
from tiny.problems import problems as word_problems  # noqa: E402

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9730d", "#2a8c55", "#777777"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
STYLE |= {"svg.hashsalt": "reproduce", "legend.frameon": False}


class Bench:
    """The model, the problems, and what was measured."""

    def __init__(self, model: str, problems: int, rounds: int):
        self.model, self.tokenizer, _ = cli.open_model(model, None, "cpu", "auto", True, False)
        chosen = islice(word_problems("heldout", 1), problems)
        self.problems = [
            {
                "messages": [{"role": "user", "content": p["question"]}],
                "expected": final_answer(p["answer"]),
            }
            for p in chosen
        ]
        self.prompts = [self.tokenizer.chat(p["messages"]) for p in self.problems]
        self.rounds = rounds

    def score(self, **knobs) -> dict:
        """Accuracy and tokens per forward over all problems."""
        results = generate(self.model, self.prompts, Decoding(max_new_tokens=128, **knobs))
        return cli.scores([cli.verdict(p, r, self.tokenizer) for p, r in zip(self.problems, results)])

    def speeds(self, ways: dict, count: int) -> dict[object, dict]:
        """Tokens/s of several ways to decode the first prompts: interleaved rounds, median and range."""
        found = {name: [] for name in ways}
        for decoding in ways.values():
            generate(self.model, self.prompts[: decoding.batch_size], decoding)
        for _ in range(self.rounds):
            for name, decoding in ways.items():
                began = time.perf_counter()
                results = generate(self.model, self.prompts[:count], decoding)
                found[name].append(sum(len(r.tokens) for r in results) / (time.perf_counter() - began))
        return {
            name: {"tokens_per_second": statistics.median(v), "lowest": min(v), "highest": max(v)}
            for name, v in found.items()
        }


def thresholds(bench: Bench, count: int) -> dict:
    values, subs, knobs = (
        [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0],
        [8, 32],
        {"max_new_tokens": 128, "batch_size": 1},
    )
    ways = {(n, t): Decoding(threshold=t, sub_block_size=n, **knobs) for n in subs for t in values}
    speeds = bench.speeds(ways | {"AR": Decoding(block_size=1, **knobs)}, count)
    rows = [
        {"sub_block_size": n, "threshold": t, **bench.score(threshold=t, sub_block_size=n), **speeds[n, t]}
        for n, t in tqdm([way for way in ways], "thresholds")
    ]
    return {"rows": rows, "AR": bench.score(block_size=1) | speeds["AR"]}


def sub_blocks(bench: Bench, count: int) -> dict:
    return {
        "rows": [
            {"sub_block_size": n, "threshold": t, **bench.score(sub_block_size=n, threshold=t)}
            for t in (0.5, 0.9, 1.0)
            for n in tqdm([2, 4, 8, 16, 32], f"sub-blocks, threshold {t}")
        ]
    }


def blocks(bench: Bench, count: int) -> dict:
    return {
        "rows": [
            {"block_size": n, "threshold": t, **bench.score(block_size=n, sub_block_size=n, threshold=t)}
            for t in (0.5, 0.9, 1.0)
            for n in tqdm([2, 4, 8, 16, 32], f"blocks, threshold {t}")
        ]
    }


def batches(bench: Bench, count: int) -> dict:
    rows = []
    for size in tqdm([1, 2, 4, 8, 16, 32], "batch sizes"):
        knobs = {"max_new_tokens": 128, "batch_size": size}
        ways = {"AR": Decoding(block_size=1, **knobs)}
        for sub in (8, 32):
            ways[f"block, sub-block {sub}"] = Decoding(sub_block_size=sub, **knobs)
        ways["dual, sub-block 8"] = Decoding(cache="dual", **knobs)
        found = bench.speeds(ways, max(count, 4 * size))
        rows += [{"batch_size": size, "decoder": name, **speed} for name, speed in found.items()]
    return {"rows": rows}


def lengths(bench: Bench, count: int) -> dict:
    """Seconds of each answer alone, by its length; only answers that AR and block diffusion give alike."""
    ways = {"AR": Decoding(block_size=1, max_new_tokens=128), "block": Decoding(max_new_tokens=128)}
    groups = {}
    for prompt in tqdm(bench.prompts[: 2 * count], "answer lengths"):
        seconds = {name: [] for name in ways}
        for _ in range(bench.rounds):
            for name, decoding in ways.items():
                began = time.perf_counter()
                [seconds[name + " result"]] = generate(bench.model, [prompt], decoding)
                seconds[name].append(time.perf_counter() - began)
        results = seconds["AR result"], seconds["block result"]
        if results[0].tokens == results[1].tokens:
            row = len(results[1].tokens) / max(1, results[1].forward_passes)
            ratio = statistics.median(seconds["AR"]) / statistics.median(seconds["block"])
            groups.setdefault(len(results[1].tokens) // 5 * 5, []).append((ratio, row))
    return {
        "rows": [
            {
                "tokens_from": low,
                "tokens_to": low + 4,
                "answers": len(group),
                "speed_up": statistics.mean(ratio for ratio, _ in group),
                "tokens_per_forward": statistics.mean(rate for _, rate in group),
            }
            for low, group in sorted(groups.items())
            if len(group) >= 3
        ]
    }


# --- Figures ---


def line(axis, x, heights, low, high, colour, label=None, shift=0.0, marker="o-"):
    """A line with a bar from low to high at each point; `shift` keeps several lines' bars apart."""
    bars = [[h - a for h, a in zip(heights, low)], [b - h for h, b in zip(heights, high)]]
    axis.errorbar([i + shift for i in x], heights, bars, fmt=marker, color=colour, capsize=3, label=label)


def accuracy_line(axis, x, rows, colour, label=None, shift=0.0):
    heights, errors = ([100 * row[key] for row in rows] for key in ("accuracy", "standard_error"))
    low, high = ([h + sign * e for h, e in zip(heights, errors)] for sign in (-1, 1))
    line(axis, x, heights, low, high, colour, label, shift)
    axis.set_ylabel("accuracy (%), standard error")


def speed_line(axis, x, rows, colour, label=None, shift=0.0, over=None):
    """Tokens per second, median and range of the rounds; `over`: divided by these speeds."""
    keys, over = ("tokens_per_second", "lowest", "highest"), over or [1] * len(rows)
    line(axis, x, *([row[key] / base for row, base in zip(rows, over)] for key in keys), colour, label, shift)


def draw_thresholds(data, axes):
    accuracy, speed = axes
    for sub, colour, shift in ((8, BLUE, -0.06), (32, ORANGE, 0.06)):
        rows = [row for row in data["rows"] if row["sub_block_size"] == sub]
        x = range(len(rows))
        accuracy_line(accuracy, x, rows, colour, f"sub-block {sub}", shift)
        speed_line(speed, x, rows, colour, shift=shift)
    accuracy.axhline(100 * data["AR"]["accuracy"], color=GREY, linestyle=":", label="AR, same weights")
    speed.axhline(data["AR"]["tokens_per_second"], color=GREY, linestyle=":")
    speed.set_ylabel("tokens/s, batch 1, range of rounds")
    speed.set_ylim(bottom=0)
    for axis in axes:
        axis.set_xticks(x, [f"{row['threshold']:g}" for row in rows])
        axis.set_xlabel("threshold")


def draw_sizes(name):
    def draw(data, axes):
        accuracy, rate = axes
        for threshold, colour in ((1.0, GREEN), (0.9, BLUE), (0.5, ORANGE)):
            rows = [row for row in data["rows"] if row["threshold"] == threshold]
            x = range(len(rows))
            accuracy_line(accuracy, x, rows, colour, f"threshold {threshold:g}", shift=(threshold - 0.8) / 5)
            rate.plot(x, [row["tokens_per_forward"] for row in rows], "o-", color=colour)
        rate.set_ylabel("tokens per forward")
        rate.set_ylim(bottom=0)
        for axis in axes:
            axis.set_xticks(x, [str(row[name]) for row in rows])
            axis.set_xlabel(name.replace("sub_block", "sub-block").replace("_", " "))

    return draw


def draw_batches(names, relative):
    def draw(data, axis):
        sizes = sorted({row["batch_size"] for row in data["rows"]})
        speed = {(row["batch_size"], row["decoder"]): row for row in data["rows"]}
        over = [speed[size, "AR"]["tokens_per_second"] for size in sizes] if relative else None
        for i, (name, colour) in enumerate(zip(names, (BLUE, GREEN, ORANGE))):
            rows, colour = [speed[size, name] for size in sizes], GREY if name == "AR" else colour
            speed_line(axis, range(len(sizes)), rows, colour, name, (i - 1) / 15, over)
        if relative:
            axis.axhline(1, color=GREY, linestyle=":", label="AR, same weights, same batch")
        axis.set_xticks(range(len(sizes)), map(str, sizes))
        axis.set_xlabel("batch size")
        axis.set_ylabel("speed-up over AR, range of rounds" if relative else "tokens/s, range of rounds")
        axis.set_ylim(bottom=0)

    return draw


def draw_lengths(data, axis):
    rows, x = data["rows"], range(len(data["rows"]))
    axis.plot(x, [row["speed_up"] for row in rows], "o-", color=BLUE, label="speed-up over AR")
    axis.plot(x, [row["tokens_per_forward"] for row in rows], "s--", color=ORANGE, label="tokens per forward")
    axis.axhline(1, color=GREY, linestyle=":")
    axis.set_xticks(x, [f"{row['tokens_from']}-{row['tokens_to']}\nn={row['answers']}" for row in rows])
    axis.set_xlabel("tokens of the answer")
    axis.set_ylim(bottom=0)


FIGURES = {  # file name: (measurement, drawing, title)
    "threshold": (thresholds, draw_thresholds, "Accuracy and speed against the threshold"),
    "sub_block_size": (sub_blocks, draw_sizes("sub_block_size"), "Sub-block size, block 32"),
    "block_size": (blocks, draw_sizes("block_size"), "Block size changed at inference only (trained: 32)"),
    "dual_cache": (
        batches,
        draw_batches(["block, sub-block 8", "dual, sub-block 8", "AR"], False),
        "DualCache off and on",
    ),
    "batch_size": (
        batches,
        draw_batches(["block, sub-block 8", "dual, sub-block 8", "block, sub-block 32"], True),
        "Speed-up against batch size, threshold 0.9",
    ),
    "answer_length": (lengths, draw_lengths, "Speed-up against answer length, batch 1, threshold 0.9"),
}


@click.command(help=__doc__)
@click.option("--model", default=str(cli.SHIPPED), help="Checkpoint  [default: the shipped one]")
@click.option("--problems", default=400, show_default=True, help="Held-out problems behind each accuracy.")
@click.option("--timed", default=64, show_default=True, help="Problems behind each speed.")
@click.option("--rounds", default=3, show_default=True, help="Interleaved rounds of each timing.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU threads.")
@click.option("--only", multiple=True, type=click.Choice(list(FIGURES)), help="Figures  [default: all]")
@click.option("--draw-only", is_flag=True, help="Draw the committed data again.")
def main(model, problems, timed, rounds, threads, only, draw_only):
    import matplotlib  # here, so that --help works without it

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    torch.set_num_threads(threads)
    folder = ROOT / "benchmarks" / "figures"
    folder.mkdir(exist_ok=True)
    bench = None if draw_only else Bench(model, problems, rounds)
    measured = {}
    for name in only or FIGURES:
        measure, draw, title = FIGURES[name]
        if draw_only:
            data = json.loads((folder / f"{name}.json").read_text())
        else:
            measured[measure] = measured.get(measure) or measure(bench, timed)
            how = {"problems": problems, "timed_problems": timed, "rounds": rounds}
            data = measured[measure] | {"measured": cli.environment("cpu") | how}
            (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
        with plt.rc_context(STYLE):
            panels = 2 if name in ("threshold", "sub_block_size", "block_size") else 1
            figure, axes = plt.subplots(
                1, panels, figsize=(7.2 if panels == 2 else 5.4, 3.6), layout="constrained"
            )
            draw(data, axes)
            figure.suptitle(title, fontsize=11)
            handles = (axes[0] if panels == 2 else axes).get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower center", ncols=2 if panels == 1 else 3)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
