"""Fast-dLLM v2: a language model that writes several tokens per forward pass.

\b
  python cli.py generate                    # answers a sample problem
  python cli.py generate --verify --watch   # options follow the command
  python cli.py COMMAND --help
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while torch is imported, which takes seconds
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import json
import re
import sys
from functools import partial
from pathlib import Path

import click

# torch and all that needs it is imported where a command runs, so that help pages show at once
from commands import console
from commands.console import COUNT, FILE, INPUT, Commands, ListOf, OneSentence, reports_mistakes

answers, machine, option, view = console.answers, console.machine, console.option, console.view
PROBLEMS = click.IntRange(1, 10**5)  # more are taken for a typing error
json_option = answers("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


@click.group(help=__doc__, context_settings=console.HELP_OPTIONS, cls=Commands)
@click.version_option(console.VERSION, prog_name="fastdllm")
@click.pass_context
def cli(context):
    name = context.invoked_subcommand
    if console.PROCESSES > 1 and name not in ("generate", "eval"):
        raise OneSentence(f"cli.py {name} runs in one process; start it with python, not torchrun.")


# --- generate ---


@cli.command()
@click.argument("prompt", nargs=-1, metavar="[PROMPT]")
@console.decoding_options
@answers("--system", help="System message.", show_default="the template's")
@answers("--raw", is_flag=True, help="Continue the prompt as it is, without chat template.")
@answers("--prompt-ids", type=ListOf(click.INT), help='Token ids instead of text: "1,2,3".')
@answers("--input", "source", type=INPUT, help="JSONL with `prompt`, `messages` or `prompt_ids`; - is stdin.")
@answers("--output", "target", type=FILE, show_default="stdout", help="JSONL for --input's answers.")
@json_option
@view("--watch", "live", is_flag=True, help="Draw the answer in a terminal as it is written.")
@view("--compare", is_flag=True, help="AR beside it: both speeds, and whether the texts are equal.")
@view("--trace", type=FILE, help="HTML file for a page that replays the passes, beside AR's.")
@console.model_options
@console.batch_option
@console.record_option
@reports_mistakes
def generate(prompt, system, raw, prompt_ids, source, target, as_json, live, compare, trace, **given):
    """Answer a prompt, or a file of prompts.

    PROMPT is the question or request, as one argument in quotes. Without it, what is piped in is answered,
    or else a sample problem.

    With --input and --output, a run that was broken off goes on where it stopped, and `torchrun
    --nproc-per-node N cli.py generate ...` shares the prompts out among N devices.

    \b
    Examples:
      python cli.py generate --watch
      python cli.py generate --verify --compare "Mia has 12 apples. She buys 7 more. How many has she now?"
      python cli.py generate --trace replay.html
      python cli.py generate --model Qwen/Qwen2.5-0.5B-Instruct --system "Be brief." "Why is the sky blue?"
      python cli.py generate --input prompts.jsonl --output answers.jsonl
    """
    from commands.prompts import answer_file, encode_prompts, header_of, read_jsonl
    from fastdllm import require
    from verify import Verified

    require(len(prompt) < 2, f'Put the prompt into quotes: generate "{" ".join(prompt)}"')
    [prompt] = prompt or [None]
    many = source is not None
    sources = sum(value is not None for value in (prompt, prompt_ids, source))
    require(sources < 2, "PROMPT, --prompt-ids and --input exclude one another; give one of them.")
    target = None if target == Path("-") else target
    require(many or not target, "--output needs --input; one answer goes to standard output.")
    of_one = "--json, --watch, --compare and --trace show one answer; leave them out with --input."
    require(not many or not (as_json or live or compare or trace), of_one)
    files = "Several processes need --input FILE to share out, and --output FILE to write to."
    require(console.PROCESSES == 1 or target and source != "-", files)
    require(not (as_json and live), "--watch draws the answer and --json prints an object; give one of them.")
    console.require_writable("--output", target)
    console.require_writable("--trace", trace, mark='<script id="trace"')
    decoding = console.take_decoding(given)
    if many:
        requests = read_jsonl(source)
    elif prompt_ids:
        requests = {"": {"prompt_ids": prompt_ids}}
    else:
        if prompt is None and sys.stdin and not sys.stdin.closed and not sys.stdin.isatty():
            text = sys.stdin.buffer.read().decode(errors="surrogateescape")
            prompt = (text if raw else text.strip()) if text.strip() else None
        requests = {"": {"prompt": console.SAMPLE if prompt is None else prompt}}

    network, tokenizer, recorded = console.open_model(**given)
    asked, decoding = decoding, console.resolve(decoding, network)
    prompts = encode_prompts(requests, tokenizer, decoding, network.config, system=system, raw=raw)
    if many:
        header = header_of(given["model"], given["adapter"], network, decoding)
        requests = list(requests.values())
        if raw or system is not None:  # so that a line says all of what was asked
            requests = [request | {"prompt_ids": ids} for request, ids in zip(requests, prompts)]
        decoding = console.choose(asked, decoding, network, min(len(prompts), decoding.batch_size), recorded)
        answer_file(network, tokenizer, requests, prompts, decoding, recorded, target, header)
        return
    ar = decoding.block_size == 1 and not isinstance(decoding, Verified)
    require(not (compare and ar), "--compare sets a decoder beside AR, but this is AR; add --verify.")
    chance = compare and decoding.temperature and decoding.seed is None
    require(not chance, "--compare draws twice, so it needs a --seed, or temperature 0.")
    chosen = console.choose(asked, decoding, network, recorded=recorded)
    if isinstance(chosen, Verified) or not compare:
        decoding = chosen
    elif chosen is not decoding:
        console.say("--compare runs the drafts all the same.")
    if requests[""].get("prompt") is console.SAMPLE:
        click.echo(f"{console.SAMPLE}\n", err=True)
    elif given["model"] == str(console.SHIPPED) and prompt and not re.search("[0-9]", prompt):
        console.say("the demo model knows only word problems with numbers; --model takes another one.")
    drawn = live and tokenizer and sys.stdout and sys.stdout.isatty()
    if live and not drawn:
        console.say("--watch draws in a terminal only; this is the plain text.")
    answer_one(network, tokenizer, prompts[0], decoding, recorded, as_json, drawn, compare, trace)


def answer_one(
    model, tokenizer, prompt, decoding, recorded, as_json: bool, drawn: bool, compare: bool, trace
) -> None:
    """Decode one prompt: text to stdout as it becomes final and a summary to stderr, or one JSON object.

    drawn: live, in a terminal. compare: decode by AR too and say what differs. trace: a file for the replay,
    or None.
    """
    from itertools import islice

    from checkpoint import replace_file
    from commands.prompts import options_of, report, stream_answer, summary_line, timed
    from commands.terminal import watch
    from commands.trace import trace_page
    from fastdllm import Decoding, decode

    mask = model.config.mask_token_id
    show, silent = partial(click.echo, nl=False), lambda text: None
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "seed")
    ar = Decoding(block_size=1, **{name: getattr(decoding, name) for name in names}).resolve(model)

    def answer(way, show, drawn=False) -> tuple[dict, list]:
        """The facts of one decoding, and its passes with their times."""
        passes = []
        steps = timed(decode(model, [prompt], way, recorded), passes)
        if drawn:
            steps, show = watch(tokenizer, steps, len(prompt), mask, show), silent
        result = stream_answer(steps, tokenizer, show)
        return report(result, prompt, tokenizer, passes[-1][1] if passes else None), passes

    for way in (ar, decoding) if compare or trace else ():  # the first passes are slow: on CUDA they record
        list(islice(decode(model, [prompt], way, recorded), None if recorded else 4))
    found, passes = answer(decoding, silent if as_json else show, drawn)
    if not as_json:
        click.echo()
        click.echo(summary_line(found), err=True)
    interrupted = found["finish_reason"] == "interrupted"
    if (compare or trace) and not interrupted:
        of_ar, ar_passes = answer(ar, silent)
        interrupted = of_ar["finish_reason"] == "interrupted"
    if compare and not interrupted:
        same, dtype = found["token_ids"] == of_ar["token_ids"], str(model.weight.dtype).removeprefix("torch.")
        speed_up = found["tokens_per_second"] / of_ar["tokens_per_second"]
        found |= {"ar": of_ar, "speed_up": speed_up, "identical": same, "dtype": dtype}
        if not as_json:
            click.echo(f"AR: {summary_line(of_ar)}", err=True)
            equal = "identical" if same else "not identical"
            click.echo(f"{speed_up:.2f} times AR's speed in {dtype}, and the texts are {equal}", err=True)
    if as_json:
        click.echo(json.dumps(found | options_of(decoding), ensure_ascii=False))
    if trace and not interrupted:
        page = trace_page(tokenizer, prompt, passes, ar_passes, summary_line(found), decoding, mask)
        replace_file(trace, partial(Path.write_text, data=page, encoding="utf-8"))
        click.echo(f"wrote {trace}, open it in a browser", err=True)
    if interrupted:
        sys.exit(console.INTERRUPTED)


# --- chat ---


@cli.command()
@console.decoding_options
@answers("--system", help="System message.", show_default="the template's")
@console.model_options
@reports_mistakes
def chat(system, **given):
    """Talk with a model.

    Type a line and it is answered. /help lists the commands; Ctrl-C stops an answer, and /quit or the end of
    the input ends the chat.

    \b
    Examples:
      python cli.py chat
      python cli.py chat --model Qwen/Qwen2.5-0.5B-Instruct --system "Be brief."
    """
    from commands.chat import Chat
    from fastdllm import require

    require(sys.stdin, "Standard input is closed, so nobody could talk.")
    decoding = console.take_decoding(given)
    network, tokenizer, _ = console.open_model(**given)
    no_template = (
        "The checkpoint has no chat template; put its tokenizer and a chat_template.jinja beside it."
    )
    require(tokenizer and tokenizer.templates, no_template)
    decoding = console.choose(decoding, console.resolve(decoding, network), network)
    Chat(network, tokenizer, decoding, system).run(given["model"])


# --- eval and sweep ---

problems_argument = click.argument("problems", type=INPUT, required=False)
instruction_option = answers("--instruction", default="", show_default=False, help="Follows each question.")


@cli.command("eval")
@problems_argument
@console.decoding_options
@answers("--count", type=PROBLEMS, show_default="all; 1000 shipped", help="Only the first problems.")
@instruction_option
@answers("--paper-prompt", is_flag=True, help="The paper's instruction for GSM8K after each question.")
@answers("--output", "target", type=FILE, help="JSONL file for the answers.")
@json_option
@console.model_options
@console.batch_option
@console.record_option
@reports_mistakes
def evaluate(problems, count, instruction, paper_prompt, target, as_json, **given):
    """Accuracy on word problems.

    PROBLEMS is a JSONL file with `question` (or `messages`) and `answer`; without it the shipped held-out set
    is taken. An answer is the number in the last #### line, else in the last \\boxed{}, else the last number.

    With --output, a run that was broken off goes on where it stopped, and `torchrun --nproc-per-node N cli.py
    eval ...` shares the problems out among N devices.

    \b
    Examples:
      python cli.py eval --count 100
      python cli.py eval --verify gsm8k.jsonl --paper-prompt --model MODEL --output results.jsonl
    """
    from commands.evaluate import PAPER_PROMPT, evaluate, read_problems
    from commands.prompts import read_jsonl
    from fastdllm import require

    decoding = console.take_decoding(given)
    require(console.PROCESSES == 1 or target, "Several processes need --output FILE to write to.")
    require(console.PROCESSES == 1 or problems != "-", "Several processes need PROBLEMS in a file.")
    console.require_writable("--output", target)
    instruction = "\n".join(filter(None, (instruction, PAPER_PROMPT * paper_prompt)))
    problems = read_problems(problems and read_jsonl(problems), count, instruction)
    evaluate(problems, decoding, given, target, as_json)


@cli.command()
@problems_argument
@option("--thresholds", default="0.5,0.7,0.8,0.9,0.95,1", type=ListOf(click.FloatRange(0, 1)),
        help="Values of --threshold to try; so the next two.")  # fmt: skip
@option("--sub-block-sizes", show_default="8 and the whole block", type=ListOf(COUNT))
@option("--caches", default="block", type=ListOf(click.Choice(["none", "block", "dual"])))
@option("--max-drop", type=click.FloatRange(0, 100), default=1.0, help="Points below AR to accept.")
@option("--max-new-tokens", type=COUNT, default=256, help="The longest answer.")
@option("--count", type=PROBLEMS, default=400,
        help="Only the first problems. To show that no more than 1 point is lost takes 381.")  # fmt: skip
@instruction_option
@json_option
@console.model_options
@machine("--batch-size", type=COUNT, default=1, help="Prompts decoded at the same time.")
@console.record_option
@reports_mistakes
def sweep(problems, count, instruction, max_drop, as_json, batch_size, max_new_tokens, **given):
    """Which decoder to choose for your problems.

    Measures accuracy and speed of thresholds x sub-block sizes x caches, and of --verify, beside AR of the
    same weights. PROBLEMS is a file as for eval.

    Recommended is the fastest of --verify, where it wrote AR's answers, and of those that with 95% confidence
    lose no more than --max-drop points, paired with AR problem by problem.

    \b
    Examples:
      python cli.py sweep --count 50
      python cli.py sweep gsm8k.jsonl --model MODEL --thresholds 0.8,0.9 --sub-block-sizes 8,16,32
    """
    from commands.evaluate import read_problems, sweep
    from commands.prompts import read_jsonl

    choices = {name: given.pop(name) for name in ("thresholds", "sub_block_sizes", "caches")}
    limits = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    problems = read_problems(problems and read_jsonl(problems), count, instruction)
    sweep(problems, choices, limits, given, max_drop, as_json)


# --- bench and info ---

DECODERS = ["ar", "block", "dual", "none", "prefix", "verify", "ahead"]


@cli.command()
@option("--shape", help="Random weights of this shape instead of a checkpoint: 0.5b, 1.5b, 7b or tiny.")
@option("--layers", type=click.IntRange(1, 1000), show_default="all", help="Cut --shape to so many.")
@option("--decoders", default="ar,block,dual", type=ListOf(click.Choice(DECODERS)),
        help="ar; block diffusion as block, dual (DualCache), none (no cache) or prefix (--accept prefix); "
        "verify, and ahead (--verify --draft-ahead).")  # fmt: skip
@option("--thresholds", show_default="0.9", type=ListOf(click.FloatRange(0, 1)))
@option("--guesses-per-pass", type=COUNT, show_default="3 with --shape",
        help="Keep exactly so many guesses instead of those above a threshold, which random weights never "
        "pass.")  # fmt: skip
@option("--sub-block-sizes", default="8", type=ListOf(COUNT))
@option("--batch-sizes", default="1,4,16", type=ListOf(COUNT))
@option("--prompts", type=COUNT, show_default="one batch; of problems four, at least 16", help="How many.")
@option("--prompt-tokens", type=COUNT, show_default="word problems instead; 1024 without tokenizer",
        help="Random prompts of this length.")  # fmt: skip
@option("--new-tokens", type=click.IntRange(2, 10**6), default=128, help="The longest answer.")
@option("--rounds", type=click.IntRange(1, 1000), default=3, help="Interleaved; medians are shown.")
@option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of random prompts.")
@option("--output", "target", type=FILE, help="JSON file for all figures.")
@console.model_options
@console.record_option
@reports_mistakes
def bench(**given):
    """Speed, memory and time of each kind of pass.

    Decoders x batch sizes, beside AR of the same weights and what the machine could do.

    \b
    Examples:
      python cli.py bench --threads 1
      python cli.py bench --model MODEL --adapter ADAPTER --decoders ar,verify --batch-sizes 1
      python cli.py bench --shape 7b --device cuda --output bench.json
    """
    from benchmarks.speed import bench

    console.require_writable("--output", given["target"], mark='"decoder"')
    bench(**given)


@cli.command()
@click.argument("checkpoint", type=console.FOLDER, required=False)
@option("--model", type=console.FOLDER, show_default="the demo model", help="The same as CHECKPOINT.")
@json_option
@reports_mistakes
def info(checkpoint, model, as_json):
    """What a checkpoint is, without loading its weights.

    CHECKPOINT is a folder or Hub id: python cli.py info Qwen/Qwen2.5-0.5B-Instruct
    """
    from dataclasses import asdict

    import torch

    from checkpoint import DTYPES, read_checkpoint, read_json, shards
    from fastdllm import InputError, Qwen2, require

    require(not (model and checkpoint), "CHECKPOINT and --model name the same thing; give one of them.")
    place = model or checkpoint or str(console.SHIPPED)
    folder, config, tokenizer = read_checkpoint(place, weights=False)
    there = Path(place).is_dir()  # of a Hub id no weights are fetched
    missing = [name for name in shards(folder) if there and not (folder / name).is_file()]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen2(config).parameters())
    raw = read_json(folder / "config.json")
    dtype = str(raw.get("torch_dtype") or raw.get("dtype") or "float32")
    size = (DTYPES.get(dtype) or torch.float32).itemsize
    per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    shown = lambda i: f"{i} {tokenizer.decode([i], skip_special_tokens=False)!r}" if tokenizer else f"{i}"
    shape = {name: value for name, value in asdict(config).items() if "token_id" not in name}
    found = {"missing_weights": missing} if missing else {}
    found |= shape | {
        "parameters": parameters,
        "dtype": dtype,
        "kind": "autoregressive" if config.block_size == 1 else "block diffusion",
        "mask_token": None if config.mask_token_id is None else shown(config.mask_token_id),
        "stop_tokens": [shown(i) for i in config.stop_token_ids],
        "weights_mib": parameters * size / 2**20,
        "cache_mib_per_1024_tokens": per_position / 2**10,
        "chat_template": tokenizer.template_source if tokenizer else "none, since there is no tokenizer",
    }
    if tokenizer and tokenizer.template:
        try:
            ids = tokenizer.chat([{"role": "user", "content": "?"}])
            found["default_system_message"] = tokenizer.default_system()
            found["a_chat_ends_in"] = [shown(i) for i in ids[-6:]]
        except InputError as error:  # a template may want more than one message
            found["chat_template_says"] = str(error)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    for key, value in found.items():
        value = ", ".join(value) if isinstance(value, list) else "none" if value is None else value
        value = f"{value:,.1f}" if isinstance(value, float) and value > 1 else value
        value = f"{value:,}" if type(value) is int else value
        click.echo(f"{key.replace('_', ' '):>26}  {value}")


if __name__ == "__main__":
    cli()
