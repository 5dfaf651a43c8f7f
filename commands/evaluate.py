"""`cli.py eval` and `sweep`: the answer that a text ends in, accuracy, and how sure a comparison is."""

import itertools
import json
import math
import re
import sys
import time
from decimal import Decimal
from itertools import islice
from operator import itemgetter
from pathlib import Path
from statistics import NormalDist

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
    (r"(?<=\d)\s*(?=\\[dtc]?frac)", " "),  # 2\frac{1}{2}
    (r"\\[dtc]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2"),
    (r"\{,\}|,\\!", ","),
    (r"(?<=\d)\\,(?=\d{3})|\\[!()]|\\(?=[ $%])", ""),
    (r"\\[,;:]|~", " "),
    (r"(?<=[a-zA-Z)}])\s*\^\s*\{?-?\d+\}?", ""),  # a unit's power
]


def final_answer(text: str) -> str | None:
    """The number of the last #### line, else of the last \\boxed{}, else the last one, such as "1234.5".

    What holds no number is passed over: such a #### line is a heading, such a box was left empty.
    """
    for pattern, plain in REWRITES:
        text = re.sub(pattern, plain, text)
    lines = [line.rstrip("# ").rpartition("####")[2] for line in text.splitlines() if "####" in line]
    for part in [*reversed(lines), *reversed(boxes(text))]:
        if answer := stated_number(part):
            return answer
    return next(reversed(numbers_of(text)), None)


def boxes(text: str) -> list[str]:
    """What stands in each \\boxed{} that is closed."""
    found, opened = [], []
    for mark in re.finditer(r"\\(?:boxed|fbox)\s*\{|[{}]", text):
        if mark[0] != "}":
            opened.append(mark)
        elif opened and len((box := opened.pop())[0]) > 1:
            found.append((box.end(), text[box.end() : mark.start()]))
    return [content for _, content in sorted(found)]


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
        # what `eval` wrote has the model's answer beside the expected one
        messages, answer = record.get("messages"), record.get("expected", record.get("answer"))
        both = f"{place}: `question` and `messages` exclude one another; give one."
        require(not (messages and record.get("question")), both)
        if isinstance(record.get("question"), str):
            asked = "\n".join(filter(None, (record["question"], instruction)))
            messages = [{"role": "user", "content": asked}]
        elif messages:
            require(not instruction, f"{place}: an instruction follows a `question`, this has `messages`.")
        if type(answer) in (int, float):
            answer = f"{Decimal(str(answer)):f}"
        expected = final_answer(answer) if isinstance(answer, str) else None
        require(isinstance(messages, list) and messages and expected is not None, f"{place}: {needs}")
        answered = isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
        require(not answered, f"{place}: its messages end in an answer; leave that out.")
        chat = {name: record[name] for name in ("system", "tools") if record.get(name)}
        found[place] = chat | {"messages": messages, "expected": expected}
    return found


def verdict(problem: dict, result: Result, tokenizer: Tokenizer) -> dict:
    """One line of an evaluation's file. It holds no times, so a repeated run writes the same."""
    text = tokenizer.decode(result.tokens)
    answer = final_answer(text)
    judged = {"answer": answer, "correct": answer == problem["expected"], "text": text}
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
    }


def highest_share(k: float, n: int) -> float:
    """Wilson's upper bound, at confidence 97.5%, of a share that was k of n."""
    z = NormalDist().inv_cdf(0.975)
    share, spread = k / n, z * math.sqrt(k * (n - k) / n + z * z / 4) / n
    return (share + z * z / (2 * n) + spread) / (1 + z * z / n)


def paired_drop(ar: list[bool], own: list[bool]) -> dict:
    """How much accuracy a decoder loses against AR on the same problems, with its upper bound at 95%.

    The drop is the share of problems that only AR gets right less that of those that only the decoder does,
    so its bound is the one's upper bound less the other's lower bound.
    """
    n = len(ar)
    lost = sum(a and not b for a, b in zip(ar, own))
    gained = sum(b and not a for a, b in zip(ar, own))
    upper = highest_share(lost, n) + highest_share(n - gained, n) - 1
    return {"drop": (lost - gained) / n, "drop_upper": upper}


# --- eval ---


def score_line(found: dict) -> str:
    accuracy, error, cut = (100 * found[key] for key in ("accuracy", "standard_error", "stopped_by_length"))
    line = f"{accuracy:.1f}% (standard error {error:.1f}) of {console.counted(found['problems'], 'problem')}"
    line += f", {found['tokens_per_forward']:.2f} tokens per forward"
    line += f", {found['tokens_per_second']:.1f} tokens/s" if found["tokens_per_second"] else ""
    return f"{line}, {cut:.1f}% stopped by length"


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
    rows = min(len(problems), decoding.batch_size)
    decoding = console.choose(asked, decoding, network, rows, recorded)
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

    choices: lists of `thresholds`, `sub_block_sizes` and `caches`. limits: what all choices share,
    `batch_size` and `max_new_tokens`. Each row is printed when it is measured, so that Ctrl-C loses none.
    """
    network, tokenizer, recorded = console.open_model(**chosen)
    ways = {flags: way.resolve(network) for flags, way in ways_of(network.config, choices, limits).items()}
    encoded = prompts.encode_prompts(problems, tokenizer, ways[AR], network.config)
    show, width = (lambda line: None) if as_json else tqdm.write, max(map(len, ways))
    column = lambda verdicts, key: [verdict[key] for verdict in verdicts]
    rows, answers = [], []
    show(f"{'':{width}} accuracy  s.e. tokens/forward  tokens/s times AR")
    try:
        for flags, decoding in tqdm(ways.items(), unit="row"):
            generate(network, encoded[: decoding.batch_size], decoding, recorded)  # warms up
            began = time.perf_counter()
            results = generate(network, encoded, decoding, recorded)
            seconds = time.perf_counter() - began
            answers.append([verdict(*pair, tokenizer) for pair in zip(problems.values(), results)])
            ar, own = answers[0], answers[-1]
            row = {"flags": flags} | scores(own, seconds) | prompts.options_of(decoding)
            row |= paired_drop(column(ar, "correct"), column(own, "correct"))
            row["identical"] = column(own, "text") == column(ar, "text")
            row["speed_up"] = row["tokens_per_second"] / (rows or [row])[0]["tokens_per_second"]
            rows.append(row)
            line = f"{flags:{width}} {100 * row['accuracy']:8.1f} {100 * row['standard_error']:5.1f}"
            line += f" {row['tokens_per_forward']:14.2f} {row['tokens_per_second']:9.1f}"
            show(f"{line} {row['speed_up']:8.2f}")
    except KeyboardInterrupt:
        click.echo(f"Interrupted: {len(rows)} of {len(ways)} rows are measured.", err=True)
    if rows:
        best, said = recommended(rows, max_drop)
        show(said)
        found = {"rows": rows, "recommended": best, "max_drop": max_drop}
        if as_json:
            click.echo(json.dumps(found | prompts.environment(str(network.weight.device))))
    if len(rows) < len(ways):
        sys.exit(console.INTERRUPTED)


AR = "--block-size 1"


def ways_of(config: Config, choices: dict, limits: dict) -> dict[str, Decoding]:
    """By their flags AR, verified drafts where the model has masks, and each choice where it has blocks."""
    ways = {AR: Decoding(block_size=1, **limits)}
    if config.mask_token_id is not None:
        ways["--verify"] = Verified(**limits)
    size = config.block_size
    subs = choices["sub_block_sizes"] or sorted({math.gcd(8, size), size})
    thresholds = choices["thresholds"] if size > 1 else []
    for cache, sub, threshold in itertools.product(choices["caches"], subs, thresholds):
        flags = f"--threshold {threshold:g} --sub-block-size {sub}"
        flags += f" --cache {cache}" if cache != "block" else ""
        ways[flags] = Decoding(None, sub, threshold, cache, **limits)
    only_ar = "This checkpoint decodes by AR only, so nothing is to compare; adapt it, or give --adapter."
    require(len(ways) > 1, only_ar)
    return ways


def recommended(rows: list[dict], max_drop: float) -> tuple[dict, str]:
    """The fastest row of AR, --verify where it wrote AR's answers, and those that surely lose little."""
    within = f"within {max_drop:g} points of AR's accuracy"
    lossless = lambda row: row["verify"] and row["identical"]
    sure = [row for row in rows if row["drop_upper"] <= max_drop / 100 or lossless(row) or row is rows[0]]
    best = max(sure, key=itemgetter("speed_up"))
    because = "with AR's answers" if lossless(best) else f"with 95% confidence {within}"
    said = f"Choose {best['flags']}: {best['speed_up']:.2f} times AR's speed, {because}."
    if best is rows[0]:
        said = f"Choose AR, {AR}: nothing faster is with 95% confidence {within}."
    if any(row["speed_up"] > best["speed_up"] and row["drop"] < max_drop / 100 for row in rows):
        said += " With a higher --count a faster one may qualify."
    return best, said
