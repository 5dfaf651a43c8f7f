"""The page of `--trace`: a replay of the passes, with AR decoding of the same prompt beside it."""

import json
from pathlib import Path

from fastdllm import Decoding, Pass, Tokenizer
from viewer.terminal import token_texts

TEMPLATE = Path(__file__).parent / "trace.html"
TimedPasses = list[tuple[Pass, float]]  # each pass with the seconds from the start to its end


def trace_page(
    tokenizer: Tokenizer | None,
    prompt: list[int],
    passes: TimedPasses,
    ar_passes: TimedPasses,
    summary: str,
    decoding: Decoding,
) -> str:
    """The page as HTML, from the template beside this file; whatever the model wrote is escaped."""
    if decoding.verify:
        always = {"verify", "draft_width"}
        hidden = {"block_size", "sub_block_size", "accept", "threshold", "tokens_per_pass"}
    else:
        always = {"threshold", "block_size", "sub_block_size"}
        hidden = {"draft_width", "draft_confidence", "draft_ahead"}
    hidden |= {"max_new_tokens", "batch_size", "stop_token_ids", "runner_up"}
    shown = lambda name, value: name in always or name not in hidden and value != getattr(Decoding, name)
    options = {name: value for name, value in vars(decoding).items() if shown(name, value)}
    data = {
        "title": "How the answer was written",
        "prompt": tokenizer.decode(prompt, skip_special_tokens=False)
        if tokenizer
        else " ".join(map(str, prompt)),
        "summary": summary,
        "options": options,
        "block_size": decoding.block_size,
        "sub_block_size": decoding.sub_block_size,
        "threshold": None if decoding.verify or decoding.tokens_per_pass else decoding.threshold,
        **lane(tokenizer, passes),
        "ar": lane(tokenizer, ar_passes),
    }
    escaped = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return TEMPLATE.read_text(encoding="utf-8").replace('"@@TRACE@@"', escaped)


def lane(tokenizer: Tokenizer | None, passes: TimedPasses) -> dict:
    """Passes with their windows, times and refused drafts, and the answer's tokens with the pass of each."""
    text_of = (lambda ids: token_texts(tokenizer, ids)) if tokenizer else lambda ids: [f" {i}" for i in ids]
    one = lambda i: text_of([i])[0]
    drafts = lambda p: [{"position": d.position, "text": one(d.token), "confidence": d.confidence} for d in p]
    found = sorted((kept, number) for number, (pass_, _) in enumerate(passes) for kept in pass_.revealed)
    found = found[: sum(len(pass_.final) for pass_, _ in passes)]
    tokens = []
    for (kept, number), text in zip(found, text_of([kept.token for kept, _ in found])):
        token = {"position": kept.position, "text": text, "pass": number, "confidence": kept.confidence}
        if kept.runner_up:
            other, probability = kept.runner_up
            token["runner_up"] = {"text": one(other), "confidence": probability}
        tokens.append(token)
    windows = [
        {
            "kind": pass_.kind,
            "start": pass_.start,
            "stop": pass_.stop,
            "seconds": round(seconds, 5),
            "refused": drafts(pass_.refused),
        }
        for pass_, seconds in passes
    ]
    return {"passes": windows, "tokens": tokens}
