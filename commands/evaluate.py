"""`cli.py eval` and `sweep`: the answer that a text ends in, accuracy, and how sure a comparison is."""

import itertools
import json
import math
import re
import sys
import time
from collections import Counter
from decimal import Decimal
from itertools import islice
from operator import itemgetter
from pathlib import Path

import click
from tqdm import tqdm

from checkpoint import Tokenizer
from commands import console, prompts
from fastdllm import Config, Decoding, Result, generate, require
from verify import Verified

PAPER_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."  # for GSM8K

# --- The answer of a text ---

# -$1,234.50, $-3, .5, 3/4 or 1 3/4; a minus behind a word, a number or a bracket is a subtraction
MINUS = r"(?:(?<![\w)}\]])(-))?(?:[$€£]\s?)?(?:(?<=[$€£])(-))?"
DIGITS = r"(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\w)\.\d+)"
NUMBER = re.compile(MINUS + r"(?:(\d{1,9}) (?=\d{1,9}/\d))?" + DIGITS + r"(?:/(\d{1,9})(?![\d/]))?")
REWRITES = [  # what LaTeX puts into and around numbers
    ("\u2212", "-"),
    (r"\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2"),
    (r"\{,\}|,\\!", ","),
    (r"(?<=\d)\\,(?=\d{3})|\\[!()]|\\(?=[ $%])", ""),
    (r"\\[,;:]|~", " "),
    (r"(?<=[a-zA-Z)}])\s*\^\s*\{?-?\d+\}?", ""),  # a unit's power
]


def final_answer(text: str) -> str | None:
    """The number that a text ends in, in plain decimal spelling, such as "-7" or "1234.5", or None."""
    return find_answer(text)[0]


def find_answer(text: str) -> tuple[str | None, str | None]:
    """`final_answer`, and its place: the last #### line, else the last \\boxed{}, else the last number.

    What holds no number is passed over: such a #### line is a heading, such a box was left empty.
    """
    for pattern, plain in REWRITES:
        text = re.sub(pattern, plain, text)
    lines = [line.rstrip("# ").rpartition("####")[2] for line in text.splitlines() if "####" in line]
    for place, parts in ("####", lines), ("boxed", boxes(text)):
        for part in reversed(parts):
            if answer := stated_number(part):
                return answer, place
    numbers = numbers_of(text)
    return (numbers[-1], "last number") if numbers else (None, None)


def boxes(text: str) -> list[str]:
    """What stands in each \\boxed{} that is closed."""
    found = []
    for box in re.finditer(r"\\(?:boxed|fbox)\s*\{", text):
        depth = 1
        for end in range(box.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                found.append(text[box.end() : end])
                break
    return found


def stated_number(text: str) -> str | None:
    """The number that a line or a box states: the one that it begins with, else its last one.

    It begins behind the last = and the last colon. What stands before a colon is a label: "Answer: 18" states
    18, and "Step 2: add" no number.
    """
    text = re.sub(r"^.*:(?!\d)", "", text, flags=re.DOTALL)
    for part in reversed(re.split(r"=|≈|\\approx", text)):
        if numbers := numbers_of(part):
            return numbers[0 if NUMBER.match(part.lstrip(" *{")) else -1]
    return None


def numbers_of(text: str) -> list[str]:
    """All numbers of a text as decimals; of fractions 28 digits."""
    found = []
    for minus, behind, whole, digits, bottom in NUMBER.findall(text):
        value = Decimal(digits.replace(",", ""))
        if int(bottom or 0):
            value = value / int(bottom) + int(whole or 0)
        plain = f"{value:f}"
        plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
        found.append("-" * bool((minus or behind) and value) + plain)
    return found


# --- Problems and scores ---


def read_problems(
    records: dict[str, dict] | None, count: int | None, instruction: str = ""
) -> dict[str, dict]:
    """Problems {"messages", "expected"} by their place: of `records`, or of the shipped held-out set."""
    if records is None:
        from tiny.problems import problems

        shipped = islice(problems("heldout", 0), count or 1000)
        records = {f"problem {number}": problem for number, problem in enumerate(shipped, 1)}
    needs = "needs `question` or `messages`, and an `answer` with a number in it."
    found = {}
    for place, record in islice(records.items(), count):
        messages, answer = record.get("messages"), record.get("answer")
        if isinstance(record.get("question"), str):
            messages = [{"role": "user", "content": record["question"] + instruction}]
        if type(answer) in (int, float):
            answer = f"{Decimal(str(answer)):f}"
        expected = final_answer(answer) if isinstance(answer, str) else None
        require(isinstance(messages, list) and messages and expected is not None, f"{place}: {needs}")
        found[place] = {"messages": messages, "expected": expected}
    return found


def verdict(problem: dict, result: Result, tokenizer: Tokenizer) -> dict:
    """One line of an evaluation's file. It holds no times, so a repeated run writes the same."""
    text = tokenizer.decode(result.tokens)
    answer, place = find_answer(text)
    judged = {"answer": answer, "correct": answer == problem["expected"], "answer_from": place, "text": text}
    counts = {"new_tokens": len(result.tokens), "forward_passes": result.forward_passes}
    return problem | judged | counts | {"finish_reason": result.finish_reason}


def scores(verdicts: list[dict], seconds: float | None = None) -> dict:
    """Accuracy with its standard error, and the rates, of a problem set."""
    n = len(verdicts)
    share = lambda key, value: sum(v[key] == value for v in verdicts) / n
    accuracy, tokens = share("correct", True), sum(v["new_tokens"] for v in verdicts)
    return {
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / n) ** 0.5,
        "problems": n,
        "tokens_per_forward": tokens / max(1, sum(v["forward_passes"] for v in verdicts)),
        "tokens_per_second": tokens / seconds if seconds else None,
        "stopped_by_length": share("finish_reason", "length"),
        "answers_from": dict(Counter(v["answer_from"] or "nowhere" for v in verdicts).most_common()),
    }


def score_line(found: dict) -> str:
    speed = found["tokens_per_second"]
    return (
        f"{100 * found['accuracy']:.1f}% (standard error {100 * found['standard_error']:.1f}) "
        f"of {found['problems']} problems, {found['tokens_per_forward']:.2f} tokens per forward"
        + (f", {speed:.1f} tokens/s" if speed else "")
        + f", {100 * found['stopped_by_length']:.1f}% stopped by length; answers from "
        + ", ".join(f"{place}: {count}" for place, count in found["answers_from"].items())
    )


def binomial_bound(k: int, n: int, alpha: float = 0.025) -> float:
    """Clopper and Pearson's upper bound of a probability after k of n successes, at confidence 1 - alpha."""
    if k >= n:
        return 1.0
    low, high = k / n, 1.0
    few = 2 * k < n
    side = range(k + 1) if few else range(k + 1, n + 1)  # the shorter one
    terms = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in side]
    for _ in range(40):  # bisection
        p = (low + high) / 2
        log_p, log_q = math.log(p), math.log1p(-p)
        tail = sum(math.exp(term + i * log_p + (n - i) * log_q) for i, term in zip(side, terms))
        at_most_k = tail if few else 1 - tail
        low, high = (p, high) if at_most_k > alpha else (low, p)
    return high


def paired_drop(ar: list[bool], own: list[bool], most: float) -> dict:
    """How much accuracy a decoder loses against AR on the same problems, with its upper bound at 95%.

    `lost` are problems that only AR gets right, `gained` those that only the decoder does. The drop is
    (lost - gained) / n. Its bound is the upper bound of lost's share less the lower bound of gained's, each
    at 97.5%. `problems_needed`: how many problems with these shares would bring the bound to `most`; None if
    it is there, or if no size that was tried does.
    """
    n = len(ar)
    lost = sum(a and not b for a, b in zip(ar, own))
    gained = sum(b and not a for a, b in zip(ar, own))
    bound = lambda n, lost, gained: binomial_bound(lost, n) - (1 - binomial_bound(n - gained, n))
    drop, upper, needed = (lost - gained) / n, bound(n, lost, gained), None
    if drop < most < upper:
        sizes = (math.ceil(n * 1.1**i) for i in range(1, 80))
        scaled = ((size, size * lost // n, size * gained // n) for size in sizes)
        needed = next((size for size, *counts in scaled if bound(size, *counts) <= most), None)
    return {"drop": drop, "drop_upper": upper, "problems_needed": needed}


# --- eval ---


def evaluate(
    problems: dict[str, dict], asked: Decoding, chosen: dict, target: Path | None, as_json: bool
) -> None:
    """What `cli.py eval` does with read problems; `chosen`: what `open_model` takes."""
    network, tokenizer, recorded = console.open_model(**chosen)
    decoding = console.resolve(asked, network)
    encoded = prompts.encode_prompts(problems, tokenizer, decoding, network.config)
    problems = list(problems.values())
    header = prompts.header_of(chosen["model"], chosen["adapter"], network, decoding)
    header |= {"prompts": prompts.digest([problems, encoded])}
    line_of = lambda index, result: verdict(problems[index], result, tokenizer)
    verdicts, seconds = prompts.answer_all(network, encoded, decoding, recorded, target, header, line_of)
    if verdicts:
        found = scores(verdicts, seconds)
        about = prompts.options_of(decoding) | prompts.environment(str(network.weight.device))
        click.echo(json.dumps(found | about) if as_json else score_line(found))
    if len(verdicts) < len(problems):
        sys.exit(console.INTERRUPTED)


# --- sweep ---


def sweep(
    problems: dict[str, dict], choices: dict, limits: dict, chosen: dict, max_drop: float, as_json: bool
) -> None:
    """What `cli.py sweep` does: accuracy and speed of each choice beside AR of the same weights.

    choices: lists of `thresholds`, `block_sizes` (None: the checkpoint's), `sub_block_sizes` and `caches`.
    limits: what all choices share, `batch_size` and `max_new_tokens`.
    """
    network, tokenizer, recorded = console.open_model(**chosen)
    decodings = [decoding.resolve(network) for decoding in decodings_of(network.config, choices, limits)]
    encoded = prompts.encode_prompts(problems, tokenizer, decodings[0], network.config)
    rows, answers = [], []
    for decoding in tqdm(decodings, unit="row"):
        generate(network, encoded[: decoding.batch_size], decoding, recorded)  # warms up
        began = time.perf_counter()
        results = generate(network, encoded, decoding, recorded)
        seconds = time.perf_counter() - began
        answers.append([verdict(*pair, tokenizer) for pair in zip(problems.values(), results)])
        rows.append(scores(answers[-1], seconds) | prompts.options_of(decoding))
    column = lambda verdicts, key: [verdict[key] for verdict in verdicts]
    for row, own in zip(rows, answers):
        row["speed_up"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        row["identical"] = column(own, "text") == column(answers[0], "text")
        row |= paired_drop(column(answers[0], "correct"), column(own, "correct"), max_drop / 100)
    for row in rows:
        row["best"] = not any(beats(other, row) for other in rows)
    sure = [row for row in rows if row["drop_upper"] <= max_drop / 100 or row is rows[0]]
    best = max(sure, key=itemgetter("speed_up"))
    if as_json:
        found = {"rows": rows, "recommended": best, "max_drop": max_drop}
        click.echo(json.dumps(found | prompts.environment(str(network.weight.device))))
    else:
        print_table(rows, best, f"within {max_drop:g} points of AR")


def decodings_of(config: Config, choices: dict, limits: dict) -> list[Decoding]:
    """AR, verified drafts where the model has masks, and each choice whose sub-blocks fit."""
    decodings = [Decoding(block_size=1, **limits)]
    if config.mask_token_id is not None:
        decodings.append(Verified(**limits))
    sizes = choices["block_sizes"] or [config.block_size] * (config.block_size > 1)
    only_ar = "This checkpoint decodes by AR only, so nothing is to compare; adapt it, or give --adapter."
    require(sizes or len(decodings) > 1, only_ar)
    for size, sub in itertools.product(sizes, choices["sub_block_sizes"]):
        if size % sub:
            console.say(f"sub-block size {sub} does not divide block size {size}; left out.")
            continue
        ways = itertools.product(choices["caches"], choices["thresholds"])
        decodings += [Decoding(size, sub, threshold, cache, **limits) for cache, threshold in ways]
    require(not sizes or len(decodings) > 2, "No sub-block size divides a block size; choose others.")
    return decodings


def beats(one: dict, other: dict) -> bool:
    """Whether a row is better than another one in accuracy or speed, and worse in neither."""
    differences = [one[key] - other[key] for key in ("accuracy", "tokens_per_second")]
    return min(differences) >= 0 < max(differences)


def print_table(rows: list[dict], best: dict, within: str) -> None:
    """A line for each row, AR's first, and what follows from them."""
    columns = "decoder threshold block sub-block cache accuracy s.e. tokens/forward tokens/s speed-up".split()
    line = lambda cells: " ".join(f"{cell:>{max(8, len(name))}}" for cell, name in zip(cells, columns))
    click.echo(line(columns))
    for row in rows:
        cells = [row["threshold"], row["block_size"], row["sub_block_size"], row["cache"]]
        ar = "verify" if row["verify"] else "AR"
        cells = ["blocks", *cells] if row["block_size"] > 1 else [ar, *"----"]
        cells += [f"{100 * row['accuracy']:.1f}", f"{100 * row['standard_error']:.1f}"]
        cells += [f"{row['tokens_per_forward']:.2f}", f"{row['tokens_per_second']:.1f}"]
        click.echo(line([*cells, f"{row['speed_up']:.2f}"]) + " *" * row["best"])
    advice = f"For 95% sure {within}, the fastest is {flags_of(best)}: {best['speed_up']:.2f} times AR."
    stays = f"AR stays the choice: nothing that is faster is for 95% sure {within}."
    click.echo(stays if best is rows[0] else advice)
    for row in rows:
        if row["verify"] and row["identical"] and row["speed_up"] > 1:
            click.echo(f"--verify wrote AR's answers at {row['speed_up']:.2f} times AR's speed.")
    faster = [row for row in rows if row["speed_up"] > best["speed_up"] and not row["verify"]]
    unsure = [row for row in faster if row["problems_needed"]]
    for row in sorted(unsure, key=itemgetter("speed_up"))[-1:]:
        hope = f"{flags_of(row)} is faster, {row['speed_up']:.2f} times AR, and may be {within}"
        click.echo(f"{hope}: --count {row['problems_needed']} would show it.")


def flags_of(row: dict) -> str:
    """The flags that choose this row's decoder."""
    flags = "--threshold {threshold:g} --block-size {block_size} --sub-block-size {sub_block_size}"
    return "--verify" if row["verify"] else (flags + " --cache {cache}").format(**row)
