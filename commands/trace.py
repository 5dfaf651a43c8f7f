"""The page of `--trace`: a replay of the passes, with AR decoding of the same prompt beside it."""

import json
from itertools import takewhile
from pathlib import Path

from checkpoint import Tokenizer
from commands.prompts import options_of
from commands.terminal import token_texts
from fastdllm import Decoding, Step

TEMPLATE = Path(__file__).parent / "trace.html"
TimedSteps = list[tuple[Step, float]]  # each step with the seconds from the start to its end


def trace_page(
    tokenizer: Tokenizer | None, prompt: list[int], steps: TimedSteps, ar_steps: TimedSteps,
    summary: str, decoding: Decoding, mask: int | None,
) -> str:  # fmt: skip
    """The page as HTML, from the template beside this file; whatever the model wrote is escaped."""
    options = options_of(decoding)
    chosen = [name for name in options if options[name] != getattr(type(decoding), name, False)]
    hidden = ["stop_token_ids"] + ["block_size", "sub_block_size"] * options["verify"]
    as_numbers = " ".join(map(str, prompt))
    data = {
        "title": "How the answer was written",
        "prompt": tokenizer.decode(prompt, skip_special_tokens=False) if tokenizer else as_numbers,
        "summary": summary,
        "options": {name: options[name] for name in chosen if name not in hidden},
        "block_size": decoding.block_size,
        "sub_block_size": decoding.sub_block_size,
        "threshold": options["threshold"],
        **lane(tokenizer, steps, mask),
        "ar": lane(tokenizer, ar_steps, mask),
    }
    escaped = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return TEMPLATE.read_text(encoding="utf-8").replace('"@@TRACE@@"', escaped)


def refused_drafts(step: Step, mask: int | None) -> list[tuple[int, int]]:
    """(position, token) of a step's drafts that AR would not choose, none of them behind the answer's end."""
    if step.kind != "verify":
        return []
    drafts = takewhile(lambda token: token != mask, step.tokens[1:])
    drafts = list(enumerate(drafts, step.start + 1))[len(step.revealed) - 1 :]  # the last one is AR's own
    end = step.revealed[0].position + len(step.final)
    return [(position, token) for position, token in drafts if not step.finish_reason or position < end]


def lane(tokenizer: Tokenizer | None, steps: TimedSteps, mask: int | None) -> dict:
    """Passes with their windows, times and refused drafts, and the answer's tokens with the pass of each."""
    text_of = (lambda ids: token_texts(tokenizer, ids)) if tokenizer else lambda ids: [f" {i}" for i in ids]
    found = sorted((kept, number) for number, (step, _) in enumerate(steps) for kept in step.revealed)
    found = found[: sum(len(step.final) for step, _ in steps)]
    tokens = [
        {"position": kept.position, "text": text, "pass": number, "confidence": kept.confidence}
        for (kept, number), text in zip(found, text_of([kept.token for kept, _ in found]))
    ]
    passes = []
    for step, seconds in steps:
        refused = [{"position": p, "text": text_of([i])[0]} for p, i in refused_drafts(step, mask)]
        window = {"kind": step.kind, "start": step.start, "stop": step.stop}
        passes.append(window | {"seconds": round(seconds, 5), "refused": refused})
    return {"passes": passes, "tokens": tokens}
