"""The shipped checkpoint's tokenizer: byte-level BPE in which every word and every number up to 99 is one
token.

    python tiny/tokenizer.py FOLDER

A number is one token because a number of two digits shifts everything after it by one position, which a model
that guesses many positions at once cannot know before it knows the number.
"""

import json
from itertools import islice
from pathlib import Path

import click
from problems import problems
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

WORDS = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
DIGITS = WORDS.replace(r"\p{N}{1,2}", r"\p{N}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "|<MASK>|"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(words=WORDS, sample=20000):
    """The tokenizer, from a fixed sample of the training problems; the special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{p['question']}\n{p['answer']}" for p in islice(problems("train", 0), sample)]
    texts += [f"{n} {n}" for n in range(100)] * 20 + ["user\nassistant\nsystem\n"] * 100
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4096, min_frequency=20, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--digits", is_flag=True, help="A token for each digit, to see what a token for each number is worth."
)
def main(folder, digits):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build(DIGITS if digits else WORDS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # so that others cut words as tokenizer.json says
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["|<MASK>|"],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    click.echo(f"{folder}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
