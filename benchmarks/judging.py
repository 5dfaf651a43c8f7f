"""Final answers of word problems and MATH: found, spelt one way, judged, and how sure a comparison is."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from decimal import Context, Decimal
from fractions import Fraction
from itertools import islice

from fastdllm import Result, Tokenizer, require

PAPER_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."  # for GSM8K and MATH

SYMBOLS = {"−": "-", "π": r"\pi ", "∞": r"\infty ", "×": r"\times", "∪": r"\cup "}
SYMBOLS |= {"≤": r"\le ", "≥": r"\ge "}
REWRITES = [  # of LaTeX, in order
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r",\\!\s*|\{,\}", ","),  # 10,\!080 and 10{,}080
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|(?<!\\)\\[,;:!()]", ""),
    (r"(?<!\\)\\(?=[ {}$%])|~", " "),
    (r"\^\s*\{?\s*\\circ\s*\}?|[$%€£°*]", ""),
    (r"\\(begin|end)\s*\{[pb]matrix\}", lambda m: "[[" if m[1] == "begin" else "]]"),
    # a unit at the end
    (r"(?<=[\w)}\]])\s*\\(?:text|mbox|mathrm)\s*\{\s*[a-zA-Z][a-zA-Z ./]*\}(?:\^\{?\d\}?)?[\s.]*$", ""),
    (r"\\(?:text|mbox|math|operatorname)[a-z]*\s*\{([^{}]*)\}", r"\1"),
    (r"\\(le|ge|ne)q(?![a-zA-Z])", r"\\\1"),
    (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"(?:√|\\?\bsqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
    (r"([_^])\s*\{\s*(\w+)\s*\}", r"\1\2"),
    (r"^\s*\\?[a-zA-Z]+(?:_\w)?(?:\([a-z]\))?\s*(?:=|\\in(?![a-zA-Z]))\s*(?=\S)", ""),  # x = 5, x \in [0, 1]
    (r"\s+(?:and|or)\s+", ","),
    (r"\s*/\s*", "/"),
]
UNIT = r"(?:\s+[a-zA-Z]{2}[a-zA-Z /]*(?:\^\d)?)?"
NUMBER = r"([-+]?)(?:(\d{1,9}) (?=\d+/))?(\d+\.?\d*|\.\d+)(?:/(\d{1,9}))?" + UNIT  # -1.50, 3/4 cups, 1 3/4


def final_answer(text: str) -> str | None:
    """The answer that a text ends in, as `normalised` spells it; None where there is none."""
    return find_answer(text)[0]


def find_answer(text: str) -> tuple[str | None, str | None]:
    """`final_answer` and its place: in the last \\boxed{}, else after the last ####, else the last number."""
    for box in reversed([*re.finditer(r"\\(?:boxed|fbox)(?![a-zA-Z])", text)]):
        inside = argument(text, box.end())
        if inside and (answer := normalised(inside[0])).strip("{}"):  # some repeat an empty box
            return answer, "boxed"
    line, _, more = text.rpartition("####")[2].strip().partition("\n")
    # a line of text with more below it is a heading
    if "####" in text and line and (not more or re.fullmatch(NUMBER, normalised(line))):
        return normalised(line), "####"
    numbers = re.findall(r"(?<!\d)-?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?", text)
    return (normalised(numbers[-1]), "last number") if numbers else (None, None)


def argument(text: str, start: int) -> tuple[str, int] | None:
    """LaTeX's argument at `start`, a {group} or one symbol, and its end; None where it is never closed."""
    depth, at = 0, re.compile(r"\s*").match(text, start).end()
    if text[at : at + 1] != "{":
        symbol = re.compile(r"\\[a-zA-Z]+|\S").match(text, at)
        return symbol and (symbol[0], symbol.end())
    for end in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[at + 1 : end], end + 1


def normalised(answer: str) -> str:
    """One spelling for equal answers: numbers are decimals where these end, else fractions; units, degrees,
    currency and percent signs, LaTeX's spaces and fonts, and a leading "x =" are left out.

    Nothing is multiplied out or sorted: x(x+1) and x^2+x, or 1,2 and 2,1, stay unequal.
    """
    text = answer.translate(str.maketrans(SYMBOLS))
    for pattern, written in REWRITES:
        text = re.sub(pattern, written, text)
    text = fractions(text).strip().rstrip(".")
    if text[:1] not in ("(", "[", "{"):  # there a comma is between elements
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(?:(?!\\\\)[^][(){},&])+", lambda m: element(m[0].strip()), text)
    return re.sub(r"^\(([A-Z])\)$", r"\1", text)  # a choice


def fractions(text: str) -> str:
    r"""\frac{a}{b} as a/b, with brackets where they are needed; 1\frac{3}{4} becomes 1 3/4."""
    while (start := text.rfind("\\frac")) >= 0:  # the last one has no other inside
        top = argument(text, start + len("\\frac"))
        bottom = top and argument(text, top[1])
        if not bottom:
            break
        a, b = (re.sub(r"\s", "", part) for part, _ in (top, bottom))
        a = f"({a})" if re.search(r"[-+]", a[1:]) else a
        b = b if re.fullmatch(r"\d+\.?\d*|[a-zA-Z]|\\[a-zA-Z]+(?:\{\w+\})?", b) else f"({b})"
        mixed = text[start - 1 : start].isdigit()
        text = text[:start] + " " * mixed + f"{a}/{b}" + text[bottom[1] :]
    return text


def element(text: str) -> str:
    """`normalised` of one part of an answer, between commas and brackets."""
    number = re.fullmatch(NUMBER, text)
    if not number or number[4] and (int(number[4]) == 0 or len(text) > 99):
        words = re.fullmatch(r"[a-zA-Z]{3,}(?:\s+[a-zA-Z]+)*", text)
        return " ".join(text.lower().split()) if words else re.sub(r"\s+", "", text)
    sign, whole, top, bottom = number.groups()
    value = Decimal(top)  # exact, however long
    if bottom:
        ratio = Fraction(value) / int(bottom) + int(whole or 0)
        value = Context(prec=400).divide(Decimal(ratio.numerator), Decimal(ratio.denominator))
        if Fraction(value) != ratio:
            return f"{sign.strip('+')}{ratio}"
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{sign.strip('+')}{text}" if value else "0"


def read_problems(records: dict[str, dict] | None, count: int | None, instruction: str = "") -> dict:
    """Problems {"messages", "expected"} by their place: of `records`, or of the shipped held-out set."""
    if records is None:
        from tiny.problems import problems

        shipped = islice(problems("heldout", 0), count or 1000)
        records = {f"problem {number}": problem for number, problem in enumerate(shipped, 1)}
    needs = "needs `question` or `messages`, and an `answer` with a number, #### or \\boxed{}."
    found = {}
    for place, record in islice(records.items(), count):
        messages, answer = record.get("messages"), record.get("answer")
        if isinstance(record.get("question"), str):
            messages = [{"role": "user", "content": record["question"] + instruction}]
        expected = final_answer(answer) if isinstance(answer, str) else None
        good = isinstance(messages, list) and messages and expected is not None
        require(good, f"{place}: {needs}")
        found[place] = {"messages": messages, "expected": expected}
    return found


def verdict(problem: dict, result: Result, tokenizer: Tokenizer) -> dict:
    """One line of an evaluation's file. It holds no times, so a repeated run writes the same."""
    text = tokenizer.decode(result.tokens)
    answer, place = find_answer(text)
    judged = {"answer": answer, "correct": answer == problem["expected"], "answer_from": place, "text": text}
    counts = {"new_tokens": len(result.tokens), "forward_passes": result.forward_passes}
    return problem | judged | counts | {"finish_reason": result.finish_reason}


def scores(verdicts: list[dict]) -> dict:
    """Accuracy with its standard error, and the rates, of a problem set."""
    n = len(verdicts)
    share = lambda key, value: sum(v[key] == value for v in verdicts) / n
    accuracy, tokens = share("correct", True), sum(v["new_tokens"] for v in verdicts)
    return {
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / n) ** 0.5,
        "problems": n,
        "tokens_per_forward": tokens / max(1, sum(v["forward_passes"] for v in verdicts)),
        "stopped_by_length": share("finish_reason", "length"),
        "answers_from": dict(Counter(v["answer_from"] or "nowhere" for v in verdicts).most_common()),
    }


def aup(points: Iterable[tuple[float, float]], best: float | None = None) -> float:
    """Accuracy under parallelism of pairs (tokens per forward, accuracy in percent); d3LLM, ICML 2026.

    With the pairs (r, y) sorted by r: the first r y, plus the area under y W(y) by trapezoids. The weight
    W(y) = min(exp(3 (y / best - 1)), 1) punishes accuracy below the `best` (default: of these pairs), and
    pairs more than 5 points below the first do not count. Decoding 4 tokens per forward without loss scores
    4 times AR.
    """
    points = sorted(points)
    points = [(r, y) for r, y in points if y >= points[0][1] - 5]
    best = max(y for _, y in points) if best is None else best
    height = [y * min(math.exp(3 * (y / best - 1)), 1) if best else 0.0 for _, y in points]
    strips = zip(points, points[1:], height, height[1:])
    return points[0][0] * points[0][1] + sum((s[0] - r[0]) * (a + b) / 2 for r, s, a, b in strips)


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


def score_line(found: dict) -> str:
    speed = found["tokens_per_second"]
    return (
        f"{100 * found['accuracy']:.1f}% (standard error {100 * found['standard_error']:.1f}) "
        f"of {found['problems']} problems, {found['tokens_per_forward']:.2f} tokens per forward"
        + (f", {speed:.1f} tokens/s" if speed else "")
        + f", {100 * found['stopped_by_length']:.1f}% stopped by length; answers from "
        + ", ".join(f"{place}: {count}" for place, count in found["answers_from"].items())
    )
