"""The live view of `--watch`: the answer in a terminal, each token coloured by the pass that revealed it."""

import itertools
import os
import shutil
import time
import unicodedata
from collections.abc import Iterable, Iterator

import click
from tokenizers import decoders

from checkpoint import Tokenizer
from fastdllm import Step

RAMP = (33, 39, 44, 43, 42, 41, 77, 113, 149, 185, 221, 215, 209, 203, 204, 205, 206, 170, 134, 98)  # colours
BLANK = "\u2591\u2591"  # a mask, as wide as a short word
GREY = 240
PACE = 0.15  # seconds; a small model's passes would be too fast to be seen


def token_texts(tokenizer: Tokenizer, ids: Iterable[int | None], special: bool = True) -> list[str | None]:
    """Text of each token; None for a mask. A character made of several tokens belongs to the last."""
    texts, stream = [], None
    for i in ids:
        if i is None or stream is None:  # text after a mask begins anew
            stream = decoders.DecodeStream(skip_special_tokens=not special)
        texts.append(None if i is None else stream.step(tokenizer.encoder, i) or "")
    return texts


def cell_width(character: str) -> int:
    """Columns of a terminal that a character takes."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrapped(cells: list[tuple[str, object]], width: int) -> list[list[tuple[str, object]]]:
    """Cells of (text, mark) as lines of at most `width` columns; each character keeps its mark.

    A line ends before the word that has no room, or within masks, and what is longer than a line is cut.
    """
    lines, columns = [[]], 0
    for text, mark in cells:
        for character in text.expandtabs(4):
            if unicodedata.category(character) == "Cc" and character != "\n":
                character = "\ufffd"  # a model must not steer the terminal
            full = columns + cell_width(character) > width
            if character == "\n" or full and character == " ":
                lines.append([])
                columns = 0
                continue
            if full:
                ends = [i for i, (c, mark) in enumerate(lines[-1], 1) if c == " " or mark is None]
                end = ends[-1] if ends and mark is not None else len(lines[-1])
                lines[-1:] = lines[-1][:end], lines[-1][end:]
                columns = sum(cell_width(c) for c, _ in lines[-1])
            lines[-1].append((character, mark))
            columns += cell_width(character)
    return lines


def styled(line: list[tuple[str, object]]) -> str:
    """A line with the colour of each mark: a pass's number, or None (grey)."""
    colour = lambda mark: GREY if mark is None else RAMP[mark % len(RAMP)]
    if "NO_COLOR" in os.environ:
        colour = lambda mark: None
    runs = itertools.groupby(line, key=lambda cell: cell[1])
    return "".join(click.style("".join(text for text, _ in run), fg=colour(mark)) for mark, run in runs)


def key(passes: set[int], masks: bool, width: int) -> list[tuple[str, object]]:
    """The line below the answer: what a mask looks like, and the colours of the last passes."""
    cells = [(f"{BLANK} a mask; colour: pass" if masks else "colour: pass", None)]
    for number in sorted(passes)[-max(1, (width - 40) // 4) :]:
        cells.append((f" {number}" if number else " 0 (the prompt)", number))
    return wrapped(cells, width)[0]


def watch(
    tokenizer: Tokenizer, steps: Iterable[Step], begin: int, mask: int, show, pace: float = PACE
) -> Iterator[Step]:
    """After each step draw what is known, masks as blanks, and a key below; then hand the step on.

    begin: the prompt's length. pace: seconds that a pass takes at least. Lines that cannot change any more
    stay as they are, so that an answer may be longer than the window is high.
    """
    tokens, revealed_by, passes, final, printed, height = [], {}, 0, 0, 0, 0
    began = time.perf_counter()
    for step in steps:
        passes += step.kind != "prefill"
        blocks = step.kind not in ("draft", "verify")  # these leave no masks
        if blocks:
            tokens += [mask] * (step.stop - begin - len(tokens))
        for kept in step.revealed:
            tokens += [mask] * (kept.position + 1 - begin - len(tokens))
            tokens[kept.position - begin] = kept.token
            revealed_by[kept.position - begin] = passes
        final += len(step.final)
        if step.finish_reason:
            tokens = tokens[:final]  # what was guessed behind the end goes again
        texts = token_texts(tokenizer, (None if token == mask else token for token in tokens), special=False)
        marks = map(revealed_by.get, range(len(tokens)))
        width = shutil.get_terminal_size().columns - 1
        lines = wrapped([(BLANK if text is None else text, mark) for text, mark in zip(texts, marks)], width)
        time.sleep(max(0, began + pace - time.perf_counter()))
        began = time.perf_counter()
        up = f"\x1b[{height}A\r\x1b[J" if height else ""
        show(up + "\n".join(map(styled, [*lines[printed:], key({*revealed_by.values()}, blocks, width)])))
        masked = (n for n, line in enumerate(lines) if any(mark is None for _, mark in line))
        # the last line may still grow, and a word that a mask has cut move to it
        printed = max(0, next(masked, len(lines) - 1) - 1)
        height = len(lines) - printed  # and a line for the key
        yield step
