"""Accuracy and tokens per forward of a checkpoint on held-out problems, as one JSON object a decoder.

python tiny/evaluate.py tiny/checkpoint --count 1000
"""

import json
import platform
import sys
import time
from datetime import date
from itertools import islice
from pathlib import Path

import click
import torch
from problems import final_answer, problems

sys.path.insert(0, str(Path(__file__).parent.parent))
from fastdllm import Decoding, generate, load

DECODERS = {
    "AR": Decoding(block_size=1),
    "threshold 1": Decoding(threshold=1.0),
    "threshold 0.9": Decoding(threshold=0.9),
    "threshold 0.9, dual": Decoding(threshold=0.9, cache="dual"),
    "threshold 0.9, no sub-blocks": Decoding(threshold=0.9, sub_block_size=32),
}


@click.command(help=__doc__)
@click.argument("folder")
@click.option("--count", default=1000, show_default=True, help="Held-out problems.")
@click.option("--seed", default=0, show_default=True, help="Which held-out problems.")
@click.option("--batch-size", default=1, show_default=True)
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(DECODERS)), help="Decoders  [default: all]")
@click.option("--threads", type=int, help="CPU threads.")
def main(folder, count, seed, batch_size, max_new_tokens, only, threads):
    if threads:
        torch.set_num_threads(threads)
    model, tokenizer = load(folder)
    chosen = list(islice(problems("heldout", seed), count))
    prompts = [tokenizer.chat([{"role": "user", "content": p["question"]}]) for p in chosen]
    for name in only or DECODERS:
        if DECODERS[name].block_size != 1 and model.config.block_size == 1:
            continue  # a model that was not adapted
        knobs = DECODERS[name].__dict__ | {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        generate(model, prompts[:batch_size], Decoding(**knobs))  # warm-up
        began = time.perf_counter()
        results = generate(model, prompts, Decoding(**knobs))
        seconds = time.perf_counter() - began
        answers = [final_answer(tokenizer.decode(r.tokens)) for r in results]
        accuracy = sum(a == final_answer(p["answer"]) for a, p in zip(answers, chosen)) / count
        tokens, passes = sum(len(r.tokens) for r in results), sum(r.forward_passes for r in results)
        row = {
            "decoder": name,
            "accuracy": round(accuracy, 4),
            "standard_error": round((accuracy * (1 - accuracy) / count) ** 0.5, 4),
            "problems": count,
            "seed": seed,
            "tokens_per_forward": round(tokens / passes, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "stopped_by_length": sum(r.finish_reason == "length" for r in results) / count,
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "date": date.today().isoformat(),
        }
        click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
