"""The paper's figures, remade with the shipped checkpoint on a laptop: five SVG files and their data.

    pip install -r benchmarks/requirements.txt
    python benchmarks/reproduce.py
    python benchmarks/reproduce.py --problems 8 --timed 4 --rounds 1 --figures FOLDER   # a trial, in a minute

Accuracy is of held-out problems; speed is decoding of the same weights by the same code, AR (block size 1)
included, rounds interleaved, medians reported. Run it on a machine that does nothing else.
"""

import json
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import click
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from speed import spread  # noqa: E402

from commands.console import HELP_OPTIONS, SHIPPED, open_model, reports_mistakes  # noqa: E402
from commands.evaluate import read_problems, scores, verdict  # noqa: E402
from commands.prompts import environment  # noqa: E402
from fastdllm import Decoding, generate  # noqa: E402
from tiny.problems import problems as word_problems  # noqa: E402

BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9730d", "#2a8c55", "#777777"
STYLE = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "reproduce"}
SIZES = [2, 4, 8, 16, 32]
FOLDER = Path(__file__).parent / "figures"

# --- Measurements ---


class Bench:
    """The model, the problems, and how much is measured."""

    def __init__(self, model: str, problems: int, timed: int, rounds: int, threads: int):
        self.model, self.tokenizer, _ = open_model(model, device="cpu", threads=threads)
        self.timed, self.rounds = timed, rounds
        chosen = enumerate(islice(word_problems("heldout", 1), problems))
        self.problems = read_problems({f"problem {number}": problem for number, problem in chosen}, None)
        self.prompts = [self.tokenizer.chat(problem["messages"]) for problem in self.problems.values()]

    def score(self, **options) -> dict:
        """Accuracy and tokens per forward over all problems."""
        results = generate(self.model, self.prompts, Decoding(max_new_tokens=128, **options))
        return scores([verdict(p, r, self.tokenizer) for p, r in zip(self.problems.values(), results)])

    def speeds(self, ways: dict, count: int) -> dict[object, dict]:
        """Tokens/s of several ways to decode the first prompts: interleaved rounds, median and range."""
        found = {name: [] for name in ways}
        for decoding in ways.values():  # warms up
            generate(self.model, self.prompts[: decoding.batch_size], decoding)
        for _ in range(self.rounds):
            for name, decoding in ways.items():
                began = time.perf_counter()
                results = generate(self.model, self.prompts[:count], decoding)
                found[name].append(sum(len(r.tokens) for r in results) / (time.perf_counter() - began))
        ranges = {name: spread(rates) for name, rates in found.items()}
        return {name: {"tokens_per_second": r.pop("median")} | r for name, r in ranges.items()}


def thresholds(bench: Bench) -> dict:
    values = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0]
    alone = partial(Decoding, max_new_tokens=128, batch_size=1)
    ways = {(n, t): alone(threshold=t, sub_block_size=n) for n in (8, 32) for t in values}
    speeds = bench.speeds(ways | {"AR": alone(block_size=1)}, bench.timed)
    rows = []
    for n, t in tqdm(ways, "thresholds"):
        options = {"sub_block_size": n, "threshold": t}
        rows.append(options | bench.score(**options) | speeds[n, t])
    return {"rows": rows, "AR": bench.score(block_size=1) | speeds["AR"]}


def sizes(bench: Bench, changed: str) -> dict:
    """Accuracy by the size of sub-blocks, or of blocks without sub-blocks, at three thresholds."""
    rows = []
    for t, n in tqdm([(t, n) for t in (0.5, 0.9, 1.0) for n in SIZES], changed):
        whole = {"block_size": n} if changed == "block_size" else {}
        rows.append({changed: n, "threshold": t} | bench.score(sub_block_size=n, threshold=t, **whole))
    return {"rows": rows}


def batches(bench: Bench) -> dict:
    rows = []
    for size in tqdm([1, 2, 4, 8, 16, 32], "batch sizes"):
        way = partial(Decoding, max_new_tokens=128, batch_size=size)
        ways = {"AR": way(block_size=1), "dual, sub-block 8": way(cache="dual")}
        ways |= {f"block, sub-block {sub}": way(sub_block_size=sub) for sub in (8, 32)}
        found = bench.speeds(ways, max(bench.timed, 4 * size))
        rows += [{"batch_size": size, "decoder": name, **speed} for name, speed in found.items()]
    return {"rows": rows}


# --- Figures ---


def line(axis, rows, middle, low, high, colour, label=None, shift=0.0):
    """A point for each row with a bar from low to high; `shift` keeps several lines' bars apart."""
    bars = [[h - a for h, a in zip(middle, low)], [b - h for h, b in zip(middle, high)]]
    axis.errorbar([i + shift for i in range(len(rows))], middle, bars, fmt="o-", color=colour, capsize=3,
                  label=label)  # fmt: skip


def accuracy_line(axis, rows, colour, label=None, shift=0.0):
    middle, errors = ([100 * row[key] for row in rows] for key in ("accuracy", "standard_error"))
    low, high = ([h + sign * e for h, e in zip(middle, errors)] for sign in (-1, 1))
    line(axis, rows, middle, low, high, colour, label, shift)
    axis.set_ylabel("accuracy (%), standard error")


def speed_line(axis, rows, colour, label=None, shift=0.0, over=None):
    """Tokens per second, median and range of the rounds; `over`: divided by these speeds."""
    keys, over = ("tokens_per_second", "lowest", "highest"), over or [1] * len(rows)
    spans = ([row[key] / base for row, base in zip(rows, over)] for key in keys)
    line(axis, rows, *spans, colour, label, shift)


def label_axis(axis, name, values):
    axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axis.set_xlabel(name)


def draw_thresholds(data, axes):
    accuracy, speed = axes
    for sub, colour, shift in ((8, BLUE, -0.06), (32, ORANGE, 0.06)):
        rows = [row for row in data["rows"] if row["sub_block_size"] == sub]
        accuracy_line(accuracy, rows, colour, f"sub-block {sub}", shift)
        speed_line(speed, rows, colour, shift=shift)
    accuracy.axhline(100 * data["AR"]["accuracy"], color=GREY, linestyle=":", label="AR, same weights")
    speed.axhline(data["AR"]["tokens_per_second"], color=GREY, linestyle=":")
    speed.set_ylabel("tokens/s, batch 1, range of rounds")
    speed.set_ylim(bottom=0)
    for axis in axes:
        label_axis(axis, "threshold", [row["threshold"] for row in rows])


def draw_sizes(name, data, axes):
    accuracy, rate = axes
    for threshold, colour in ((1.0, GREEN), (0.9, BLUE), (0.5, ORANGE)):
        rows = [row for row in data["rows"] if row["threshold"] == threshold]
        accuracy_line(accuracy, rows, colour, f"threshold {threshold:g}", shift=(threshold - 0.8) / 5)
        rate.plot([row["tokens_per_forward"] for row in rows], "o-", color=colour)
    rate.set_ylabel("tokens per forward")
    rate.set_ylim(bottom=0)
    for axis in axes:
        words = name.replace("sub_block", "sub-block").replace("_", " ")
        label_axis(axis, words, [row[name] for row in rows])


def draw_batches(data, axes):
    [axis] = axes
    counts = sorted({row["batch_size"] for row in data["rows"]})
    speed = {(row["batch_size"], row["decoder"]): row for row in data["rows"]}
    over = [speed[size, "AR"]["tokens_per_second"] for size in counts]
    for i, (name, colour) in enumerate(zip((BLOCK, DUAL, "block, sub-block 32"), (BLUE, GREEN, ORANGE))):
        speed_line(axis, [speed[size, name] for size in counts], colour, name, (i - 1) / 15, over)
    axis.axhline(1, color=GREY, linestyle=":", label="AR, same weights, same batch")
    label_axis(axis, "batch size", counts)
    axis.set_ylabel("speed-up over AR, range of rounds")
    axis.set_ylim(bottom=0)


BLOCK, DUAL = "block, sub-block 8", "dual, sub-block 8"
FIGURES = {  # file name: (measurement, drawing, panels, title)
    "threshold": (thresholds, draw_thresholds, 2, "Accuracy and speed against the threshold"),
    "sub_block_size": (partial(sizes, changed="sub_block_size"), partial(draw_sizes, "sub_block_size"), 2,
                       "Sub-block size, block 32"),
    "block_size": (partial(sizes, changed="block_size"), partial(draw_sizes, "block_size"), 2,
                   "Block size changed at inference only (trained: 32)"),
    "batch_size": (batches, draw_batches, 1, "Speed-up against batch size, threshold 0.9"),
}  # fmt: skip


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "), context_settings=HELP_OPTIONS)
@click.option("--model", default=str(SHIPPED), show_default="the shipped one", help="Checkpoint.")
@click.option("--problems", default=400, help="Held-out problems behind each accuracy.")
@click.option("--timed", default=64, help="Problems behind each speed.")
@click.option("--rounds", default=3, help="Interleaved rounds of each timing.")
@click.option("--threads", type=int, default=1, help="CPU threads.")
@click.option("--only", multiple=True, type=click.Choice(list(FIGURES)), show_default="all", help="Figures.")
@click.option("--figures", "folder", type=click.Path(path_type=Path), default=FOLDER,
              show_default="benchmarks/figures", help="Folder of the pictures and their data.")  # fmt: skip
@click.option("--draw-only", is_flag=True, help="Draw the folder's data again.")
@reports_mistakes
def main(model, problems, timed, rounds, threads, only, folder, draw_only):
    import matplotlib  # here, so that --help works without it

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    bench = None if draw_only else Bench(model, problems, timed, rounds, threads)
    for name in only or FIGURES:
        measure, draw, panels, title = FIGURES[name]
        if draw_only:
            data = json.loads((folder / f"{name}.json").read_text())
        else:
            about = {"problems": problems, "timed_problems": timed, "rounds": rounds}
            data = measure(bench) | {"measured": environment("cpu") | about}
            (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
        with plt.rc_context(STYLE):
            wide = 7.2 if panels == 2 else 5.4
            figure, axes = plt.subplots(1, panels, figsize=(wide, 3.6), layout="constrained", squeeze=False)
            draw(data, axes[0])
            figure.suptitle(title, fontsize=11)
            legend = axes[0][0].get_legend_handles_labels()
            figure.legend(*legend, loc="outside lower center", ncols=1 + panels)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
