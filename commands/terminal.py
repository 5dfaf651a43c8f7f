"""The live view of `--watch`: the answer in a terminal, each token coloured by the pass that revealed it."""

import itertools
import os
import shutil
import time
import unicodedata
from collections.abc import Iterable, Iterator

from tokenizers import decoders

from checkpoint import Tokenizer
from fastdllm import Step

RAMP = (33, 39, 44, 43, 42, 41, 77, 113, 149, 185, 221, 215, 209, 203, 204, 205, 206, 170, 134, 98)  # colours
BLANK = "\u2591\u2591"  # a mask, as wide as a short word
GREY, REFUSED = 240, -1


def token_texts(tokenizer: Tokenizer, ids: Iterable[int | None], special: bool = True) -> list[str | None]:
    """Text of each token; None for a mask. A character made of several tokens belongs to the last."""
    texts, stream = [], None
    for i in ids:
        if i is None or stream is None:  # text after a mask begins anew
            stream = decoders.DecodeStream(skip_special_tokens=not special)
        texts.append(None if i is None else stream.step(tokenizer.encoder, i) or "")
    return texts


def refused_drafts(step: Step, mask: int | None) -> list[tuple[int, int]]:
    """(position, token) of a step's drafts that AR would not choose, none of them behind the answer's end."""
    if step.kind != "verify":
        return []
    drafts = itertools.takewhile(lambda token: token != mask, step.tokens[1:])
    drafts = list(enumerate(drafts, step.start + 1))[len(step.revealed) - 1 :]  # the last one is AR's own
    end = step.revealed[0].position + len(step.final)
    return [(position, token) for position, token in drafts if not step.finish_reason or position < end]


def cell_width(character: str) -> int:
    """Columns of a terminal that a character takes."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrapped(cells: list[tuple[str, object]], width: int) -> list[list[tuple[str, object]]]:
    """Cells of (text, mark) as lines of at most `width` columns; each character keeps its mark."""
    lines, column = [[]], 0
    for text, mark in cells:
        for character in text.expandtabs(4):
            if unicodedata.category(character) == "Cc" and character != "\n":
                character = "\ufffd"  # a model must not steer the terminal
            if character == "\n" or column + cell_width(character) > width:
                lines.append([])
                column = 0
            if character != "\n":
                lines[-1].append((character, mark))
                column += cell_width(character)
    return lines


def styled(line: list[tuple[str, object]]) -> str:
    """A line with the colour of each mark: a pass's number, None (grey), or REFUSED (grey, crossed out)."""
    found = ""
    for mark, run in itertools.groupby(line, key=lambda cell: cell[1]):
        text = "".join(character for character, _ in run)
        colour = GREY if mark in (None, REFUSED) else RAMP[mark % len(RAMP)]
        styles = ["9"] * (mark == REFUSED) + [f"38;5;{colour}"] * ("NO_COLOR" not in os.environ)
        found += f"\x1b[{';'.join(styles)}m{text}\x1b[0m" if styles else text
    return found


def key(passes: int, marks: set[int], width: int) -> list[tuple[str, object]]:
    """The line below the answer: what a blank is, how many passes, and which have which colour, as far as
    there is room, the last one first.
    """
    cells = [(f"{BLANK} a mask, {passes} passes, revealed in pass", None)]
    return wrapped([*cells, *((f" {mark}", mark) for mark in sorted(marks, reverse=True))], width)[0]


def watch(
    tokenizer: Tokenizer, steps: Iterable[Step], begin: int, mask: int, show, delay: float = 0.0
) -> Iterator[Step]:
    """After each step draw what is known, masks as blanks; hand the step on; then wait `delay` seconds.

    Drafts that a step refused stand behind the known text, crossed out, until the next one. Below is a key.
    begin: the prompt's length. Lines that cannot change any more stay as they are, so that an answer may be
    longer than the window is high.
    """
    tokens, revealed_by, passes, final, printed, height = [], {}, 0, 0, 0, 0
    for step in steps:
        passes += step.kind != "prefill"
        if step.kind not in ("draft", "verify"):  # these leave no masks
            tokens += [mask] * (step.stop - begin - len(tokens))
        for kept in step.revealed:
            tokens += [mask] * (kept.position + 1 - begin - len(tokens))
            tokens[kept.position - begin] = kept.token
            revealed_by[kept.position - begin] = passes
        final += len(step.final)
        refused = [token for _, token in refused_drafts(step, mask)]
        if step.finish_reason:
            tokens, refused = tokens[:final], []  # what was guessed behind the end goes again
        marks = [*map(revealed_by.get, range(len(tokens))), *[REFUSED] * len(refused)]
        ids = [None if token == mask else token for token in tokens + refused]
        texts = token_texts(tokenizer, ids, special=False)
        cells = [(BLANK if text is None else text, mark) for text, mark in zip(texts, marks)]
        width = shutil.get_terminal_size().columns - 1
        known = wrapped(cells[: len(tokens)], width)
        lines = wrapped(cells, width) if refused else known
        below = key(passes, {*revealed_by.values()}, width)
        up = f"\x1b[{height}A\r\x1b[J" if height else ""
        show(up + "\n".join(map(styled, [*lines[printed:], below])))
        masked = (n for n, line in enumerate(known) if any(mark is None for _, mark in line))
        printed = next(masked, len(known) - 1)  # the last line may still grow
        height = len(lines) - printed  # and a line for the key
        yield step
        if not step.finish_reason:
            time.sleep(delay)
