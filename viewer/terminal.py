"""The live view of `--watch`: the answer in a terminal, each token coloured by the pass that revealed it."""

import itertools
import os
import shutil
import time
import unicodedata
from collections.abc import Iterable, Iterator

from tokenizers import decoders

from fastdllm import Pass, Tokenizer

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


def cell_width(character: str) -> int:
    """Columns of a terminal that a character takes."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrapped(cells: list[tuple[str, object]], width: int) -> list[list[tuple[str, object]]]:
    """Cells of (text, mark) as lines of at most `width` columns; each character keeps its mark.

    A word that fits into a line is not broken; the space before it ends the line.
    """
    lines, column, word = [[]], 0, 0  # word: where the last word of the line begins
    for text, mark in cells:
        for character in text.expandtabs(4):
            if character == "\n":
                lines.append([])
                column = word = 0
                continue
            if unicodedata.category(character) == "Cc":
                character = "\ufffd"  # a model must not steer the terminal
            if column + cell_width(character) > width:
                moved = lines[-1][word:] if 0 < word and character != " " else []
                lines[-1] = lines[-1][: len(lines[-1]) - len(moved)]
                lines.append(moved)
                column, word = sum(cell_width(c) for c, _ in moved), 0
            lines[-1].append((character, mark))
            column += cell_width(character)
            if character == " ":
                word = len(lines[-1])
    return lines


def watch(
    tokenizer: Tokenizer, passes: Iterable[Pass], begin: int, mask: int, show, delay: float = 0.0
) -> Iterator[Pass]:
    """After each pass draw what is known, masks as blanks; hand the pass on; then wait `delay` seconds.

    Drafts that a pass refused stand behind the known text, crossed out, until the next pass. begin: the
    prompt's length. Lines that cannot change any more stay as they are, so that an answer may be longer than
    the window is high.
    """
    plain = "NO_COLOR" in os.environ
    tokens, revealed_by, final, printed, height = [], {}, 0, 0, 0
    for number, pass_ in enumerate(passes):
        if pass_.kind not in ("draft", "verify"):  # these leave no masks
            tokens += [mask] * (pass_.stop - begin - len(tokens))
        for kept in pass_.revealed:
            tokens += [mask] * (kept.position + 1 - begin - len(tokens))
            tokens[kept.position - begin] = kept.token
            revealed_by[kept.position - begin] = number
        final += len(pass_.final)
        refused = [draft.token for draft in pass_.refused]
        if pass_.finish_reason:
            tokens, refused = tokens[:final], []  # what was guessed behind the end goes again
        marks = [*map(revealed_by.get, range(len(tokens))), *[REFUSED] * len(refused)]
        ids = [None if token == mask else token for token in tokens + refused]
        texts = token_texts(tokenizer, ids, special=False)
        cells = [(BLANK if text is None else text, mark) for text, mark in zip(texts, marks)]
        width = shutil.get_terminal_size().columns - 1
        lines = known = wrapped(cells[: len(tokens)], width)
        if refused:
            lines = wrapped(cells, width)
        drawn = []
        for line in lines[printed:]:
            styled = ""
            for mark, run in itertools.groupby(line, key=lambda cell: cell[1]):
                text = "".join(character for character, _ in run)
                colour = GREY if mark in (None, REFUSED) else RAMP[mark % len(RAMP)]
                crossed = "9" if mark == REFUSED else ""
                style = ";".join(filter(None, (crossed, "" if plain else f"38;5;{colour}")))
                styled += f"\x1b[{style}m{text}\x1b[0m" if style else text
            drawn.append(styled)
        up = f"\x1b[{height - 1}A" if height > 1 else ""
        show(f"{up}\r\x1b[J" * (height > 0) + "\n".join(drawn))
        masked = (n for n, line in enumerate(known) if any(mark is None for _, mark in line))
        settled = next(masked, len(known) - 1) - 1  # a word of the line before may still grow and move down
        printed = max(printed, settled)
        height = len(lines) - printed
        yield pass_
        if not pass_.finish_reason:
            time.sleep(delay)
