"""A conversation in a terminal: `cli.py chat`. Finished blocks stay in the cache from turn to turn."""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import click

from checkpoint import Tokenizer, require_written
from commands.console import SHIPPED, sentence_of
from commands.prompts import stream_answer
from fastdllm import Decoding, InputError, KVCache, Qwen2, Step, decode, require

with suppress(ImportError):  # a history and editing keys for `input`, where the system has them
    import readline  # noqa: F401

HELP = "Commands: /clear, /help, /quit. Ctrl-C stops an answer."
DEMO = (
    "The demo model solves one word problem, and a further question about it; /clear before another one. "
    "Try: Maya has 6 jars with 8 cards in each. She finds 2 more. How many cards does Maya have now? "
    "Then: She loses 5 of them. How many cards does Maya have now?"
)


class ChatCache:
    """Keys and values that are final, kept from one prompt to the next, which begins as the last one did."""

    def __init__(self):
        self.cache, self.tokens = None, []  # tokens: those whose keys and values are kept

    def decode(self, model: Qwen2, prompt: list[int], decoding: Decoding) -> Iterator[Step]:
        """`fastdllm.decode` of one prompt, from the first block on that differs from the last prompt."""
        size = decoding.block_size
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.tokens, prompt)))
        self.tokens = self.tokens[: equal // size * size]
        self.cache = self.cache or KVCache(model.config, 1, len(prompt), model.weight)
        for step in decode(model, [prompt], decoding, cache=self.cache, cached=len(self.tokens)):
            if decoding.cache != "none" and step.committed > len(self.tokens):
                self.tokens[step.start :] = step.tokens[: step.committed - step.start]
            yield step


class Chat:
    """A conversation. `system` None: what the template writes by itself."""

    def __init__(self, model: Qwen2, tokenizer: Tokenizer, decoding: Decoding, system: str | None):
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.clear()

    def clear(self) -> None:
        self.messages, self.cache = [*self.system], ChatCache()

    def run(self, name: str) -> None:
        """Read lines until /quit or the input ends; Ctrl-C ends a line or an answer, never the program.

        name: the model's, as it was given.
        """
        demo = Path(name).resolve() == SHIPPED.resolve()
        click.echo(f"{name}: {HELP}" + f"\n{DEMO}" * demo, err=True)
        sys.stdin.reconfigure(errors="surrogateescape")  # an invalid byte spoils its own line only
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
                require(not re.search("[\ud800-\udfff]", line), "The line is no UTF-8 text.")
                if line in ("/exit", "/quit", "exit", "quit"):
                    return
                if line == "/clear":
                    self.clear()
                    click.echo("The conversation is cleared.", err=True)
                elif line.startswith("/"):
                    click.echo(f"Error: unknown command {line}. " * (line != "/help") + HELP, err=True)
                elif line:
                    self.answer(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                click.echo(err=True)
            except (InputError, OSError) as error:
                if (sentence := sentence_of(error)) is None:
                    raise  # nobody reads on
                click.echo(f"Error: {sentence}", err=True)

    def answer(self, question: str) -> None:
        """One turn; an answer that Ctrl-C has cut is forgotten, with its question.

        Raises InputError where there is no room for it.
        """
        turn = {"role": "user", "content": question}
        messages = [*self.messages, turn]
        text = self.tokenizer.render(messages)
        require_written(messages, text)
        prompt = self.tokenizer.encode(text)
        most = self.model.config.max_position_embeddings
        room = most - len(prompt)
        require(room > 0, f"The conversation has outgrown the model's {most} positions; /clear it.")
        decoding = replace(self.decoding, max_new_tokens=min(self.decoding.max_new_tokens, room))
        steps = self.cache.decode(self.model, prompt, decoding)
        result = stream_answer(steps, self.tokenizer, partial(click.echo, nl=False))
        click.echo()
        if not result.finish_reason:
            click.echo("(interrupted; this question and its answer are forgotten)", err=True)
            return
        self.messages += [turn, {"role": "assistant", "content": self.tokenizer.decode(result.tokens)}]
        if result.finish_reason == "length":
            full = decoding.max_new_tokens == room
            limit = "the model has no more positions" if full else "--max-new-tokens"
            click.echo(f"(the answer was cut: {limit}; /clear forgets the conversation)", err=True)
