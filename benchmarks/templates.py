"""Compare chats with Transformers' `apply_chat_template`, in text and ids, on families of templates.

    pip install transformers && python benchmarks/templates.py TOKENIZER

TOKENIZER is a folder with Qwen2.5's vocab.json, merges.txt and tokenizer_config.json. `templates.jsonl` has
templates in the form of each family, with their special tokens, and conversations. Each template writes each
conversation, with the assistant's turn begun and without. Refused here alone: tools, or a null, for which the
template has no place; Transformers leaves them out.
"""

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import click
from transformers import AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))
from checkpoint import CHATML, load_tokenizer  # noqa: E402


def write_family(tokenizer: Path, family: dict, folder: Path) -> None:
    """The tokenizer's files in `folder`, with the family's template and special tokens."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer / name, folder)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    listed = settings["added_tokens_decoder"]
    for kind in ("special", "plain"):
        for text in family.get(kind, []):
            listed[str(max(map(int, listed)) + 1)] = {"content": text, "special": kind == "special"}
    own = {key: value for key, value in family.items() if key.endswith(("_token", "_template"))}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | own))


def attempt(write, *arguments, **options):
    """What `write` returns, or None where it refuses the conversation."""
    try:
        return write(*arguments, **options)
    except Exception:
        return None


def compare(ours, theirs, messages: list, tools: list | None, begun: bool) -> str:
    """In one word or two: how the two write a conversation."""
    options = {"tools": tools, "add_generation_prompt": begun}
    text, ids = attempt(ours.render, messages, **options), attempt(ours.chat, messages, **options)
    other = attempt(theirs.apply_chat_template, messages, tokenize=False, **options)
    other_ids = attempt(theirs.apply_chat_template, messages, return_dict=False, **options)
    if text == other and ids == other_ids:
        return "refused by both" if text is None else "equal"
    if text is None or other is None:
        return "refused here" if text is None else "refused there"
    click.echo(f"{messages}\n{text!r}\n{other!r}\n{ids}\n{other_ids}")
    return "different"


@click.command(help=__doc__)
@click.argument("tokenizer", type=click.Path(exists=True, path_type=Path))
def main(tokenizer):
    logging.set_verbosity_error()
    records = [json.loads(line) for line in Path(__file__).with_suffix(".jsonl").read_text().splitlines()]
    chats, total = [record for record in records if "messages" in record], Counter()
    for family in (record for record in records if "chat_template" in record):
        with tempfile.TemporaryDirectory() as folder:
            write_family(tokenizer, family, Path(folder))
            ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        theirs.chat_template = theirs.chat_template or CHATML  # Transformers has none of its own
        found = Counter(
            compare(ours, theirs, chat["messages"], chat.get("tools"), begun)
            for chat in chats
            for begun in (True, False)
        )
        total += found
        click.echo(f"{family['name']}: {dict(found)}")
    click.echo(f"all: {dict(total)}")


if __name__ == "__main__":
    main()
