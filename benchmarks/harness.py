"""Our models in lm-eval, the language model evaluation harness that most published scores come from.

    pip install -r benchmarks/requirements.txt
    python benchmarks/harness.py --model M --tasks gsm8k,ifeval --decoder threshold --output results.json
    python benchmarks/harness.py --model M --paper

prints lm-eval's table and, for each task that generates, tokens per forward and tokens/s. `--output` writes
lm-eval's own result file, with these under "speed", and the samples beside it. `--paper` runs the paper's
tasks in the original's settings and prints the paper's scores beside ours; it stops at a task's stop strings,
which the original ignores. `torchrun --nproc-per-node 8 benchmarks/harness.py ...` shares the questions out
among devices. HumanEval and MBPP are judged by EvalPlus, see code_samples.py.

Log-likelihoods (MMLU, GPQA, perplexities) have two readings. "ar" is the usual one: each token given all
before it, causally. "original" is what the original's evaluation computes for its MMLU and GPQA: the
log-probability of the continuation's first token alone, at a mask in a block-causal pass that also sees the
rest of the continuation, an end token behind it, and masks up to the end of the block.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import click
import torch
import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import fastdllm  # noqa: E402
from checkpoint import Tokenizer, replace_file  # noqa: E402
from commands import console  # noqa: E402
from commands.evaluate import PAPER_PROMPT  # noqa: E402
from commands.prompts import environment, options_of, rates, summary_line  # noqa: E402
from fast import RecordedPasses  # noqa: E402
from fastdllm import Decoding, InputError, Qwen2, Result, decode, require  # noqa: E402
from training.attention import causal_attention  # noqa: E402
from training.runs import processes, rank, world_size  # noqa: E402
from verify import Verified  # noqa: E402

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError:
    raise SystemExit("lm-eval is not installed; pip install -r benchmarks/requirements.txt") from None

DECODERS = {
    "ar": partial(Decoding, block_size=1),
    "threshold": Decoding,
    "dual": partial(Decoding, cache="dual"),
    "verify": Verified,
}

# what a task's `generation_kwargs` may hold beside what decoding has: values that change nothing
NEUTRAL = dict.fromkeys(("num_beams", "num_return_sequences", "length_penalty", "repetition_penalty"), 1)
NEUTRAL |= dict.fromkeys(("presence_penalty", "frequency_penalty", "no_repeat_ngram_size"), 0)
NEUTRAL |= dict.fromkeys(("min_new_tokens", "min_tokens"), 0)
NEUTRAL_DRAWS = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}

# task: column of the paper's table, few-shot examples (None: the task's), where the instruction goes, metric
PAPER_TASKS = {
    "gsm8k": ("GSM8K", 0, "Answer:", "exact_match,flexible-extract"),
    "minerva_math": ("MATH", 0, "Solution:", "math_verify,none"),
    "ifeval": ("IFEval", None, None, "prompt_level_strict_acc,none"),
    "mmlu": ("MMLU", 5, None, "acc,none"),
    "gpqa_main_n_shot": ("GPQA", None, None, "acc,none"),
}
PAPER_SCORES = {  # Fast-dLLM v2 at threshold 1
    "Qwen2.5 1.5B": {"GSM8K": 57.0, "MATH": 46.8, "IFEval": 41.2, "MMLU": 54.6, "GPQA": 30.6},
    "v2 1.5B": {"GSM8K": 62.0, "MATH": 38.1, "IFEval": 47.0, "MMLU": 55.1, "GPQA": 27.7},
    "Qwen2.5 7B": {"GSM8K": 71.4, "MATH": 73.3, "IFEval": 70.8, "MMLU": 68.7, "GPQA": 33.5},
    "v2 7B": {"GSM8K": 83.7, "MATH": 61.6, "IFEval": 61.4, "MMLU": 66.6, "GPQA": 31.9},
}
SUMS = ("new_tokens", "forward_passes", "seconds")  # of `rates`, summed over a task's requests
PAPER_TOKENS = 2048  # longest answer; its blocks of 32 are the checkpoint's, its sub-blocks of 8 the default


def share_out(sizes: list[int], work: Callable[[list[int]], Iterable]) -> list:
    """What `work` gives for each index; each process does a share, longest first, and gets all, in order."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    mine = order[rank() :: world_size()]
    found = dict(zip(mine, work(mine)))
    if world_size() > 1:
        parts = [None] * world_size()
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # shares end at unlike times
        dist.all_gather_object(parts, found, group=patient)
        dist.destroy_process_group(patient)
        found = {i: x for part in parts for i, x in part.items()}
    return [found[i] for i in range(len(sizes))]


def sampling_of(settings: dict) -> dict:
    """Decoding's options for a task's normalised `generation_kwargs`.

    Raises InputError for settings that would change the text and that decoding does not have.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    temperature, top_k = settings.pop("temperature", 0), settings.pop("top_k", 0)
    top_p, greedy = settings.pop("top_p", 1.0), not settings.pop("do_sample") or top_k == 1
    asked = "The task sets do_sample, but no temperature; give it one above 0, or leave do_sample out."
    require(greedy or float(temperature) > 0, asked)
    for name, value in settings.items():
        if name in ("until", "max_gen_toks") or greedy and name in NEUTRAL_DRAWS:
            continue
        idle = (NEUTRAL | NEUTRAL_DRAWS).get(name)
        only = "no decoder here has it, so leave it out" if idle is None else f"only {idle} works"
        require(value == idle, f"The task sets {name} to {value!r}; {only}.")
    if greedy:
        return {"temperature": 0.0}
    # 0 and -1 are other programs' words for all tokens
    return {"temperature": float(temperature), "top_p": top_p, "top_k": None if top_k in (0, -1) else top_k}


class HarnessModel(TemplateLM):
    """A model, a way of decoding and a reading of log-likelihoods, as lm-eval sees them.

    instructions: task name's beginning -> (what to replace in its prompts, by what).
    longest: new tokens, whatever the task asks for; None: the task's number, or 256.
    """

    def __init__(
        self, name: str, model: Qwen2, tokenizer: Tokenizer, decoding: Decoding, reading: str = "ar",
        longest: int | None = None, recorded: RecordedPasses | None = None,
    ):  # fmt: skip
        super().__init__()
        config = model.config
        require(tokenizer, f"{name}: has no tokenizer, so there is no text to evaluate.")
        require(config.stop_token_ids, f"{name}: names no end token, which log-likelihoods need.")
        adapted = reading == "ar" or config.block_size > 1
        require(adapted, f"{name}: only --loglikelihood ar reads a model that was not adapted to blocks.")
        self.name, self.model, self.tokens, self.decoding = name, model, tokenizer, decoding
        self.reading, self.longest, self.recorded = reading, longest, recorded
        self.instructions, self.speed = {}, {}
        self._device = model.weight.device

    # --- Text ---

    @property
    def tokenizer_name(self) -> str:
        return self.name

    @property
    def eot_token_id(self) -> int:
        return self.model.config.stop_token_ids[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.tokens.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokens.template or ""  # what lm-eval notes in its result file

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        if add_generation_prompt:
            return self.tokens.render(chat_history)
        # the last message is an answer's beginning, which the model continues
        return self.tokens.render(chat_history[:-1]) + chat_history[-1]["content"]

    # --- Generation ---

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        groups, texts = {}, [""] * len(requests)
        for place, request in enumerate(requests):
            settings = json.dumps(normalize_gen_kwargs(request.args[1]), sort_keys=True)
            groups.setdefault((request.task_name, settings), []).append(place)
        for _, settings in groups:  # a mistake is told before anything runs
            sampling_of(json.loads(settings))
        for (task, settings), places in groups.items():
            began = time.perf_counter()
            prompts = [requests[place].args[0] for place in places]
            for old, new in (rule for start, rule in self.instructions.items() if task.startswith(start)):
                prompts = [prompt.replace(old, new) for prompt in prompts]
            written = self.write(task, prompts, json.loads(settings), disable_tqdm)
            for place, (text, _) in zip(places, written):
                texts[place] = text
            found = rates([result for _, result in written], time.perf_counter() - began)
            before = self.speed.setdefault(task, dict.fromkeys(SUMS, 0))
            self.speed[task] = {name: before[name] + found[name] for name in SUMS}
        return texts

    def write(self, task: str, prompts: list[str], settings: dict, silent: bool) -> list[tuple[str, Result]]:
        """Text up to its first stop string, and all that was decoded, of prompts with a task's settings.

        An answer's limit is lowered to what the longest prompt leaves, but to no less than half the model's
        positions. What is still too long a prompt loses its beginning, as in lm-eval's own models.
        """
        encoded = [self.tokens.encode(prompt) for prompt in prompts]
        positions, wanted = (
            self.model.config.max_position_embeddings,
            self.longest or settings["max_gen_toks"],
        )
        most = max(positions - max(map(len, encoded)), positions // 2)
        note = f"{task} asks for answers of {wanted} tokens; the model's {positions} positions leave {most}."
        if wanted > most:
            console.say(note)
        longest = min(wanted, most)
        decoding = replace(self.decoding, max_new_tokens=longest, **sampling_of(settings))
        encoded = [prompt[-(positions - longest) :] for prompt in encoded]
        until = [stop for stop in settings["until"] if stop]
        work = lambda mine: self.decode_until([encoded[i] for i in mine], decoding, until, silent)
        return share_out([len(prompt) for prompt in encoded], work)

    def decode_until(
        self, prompts: list[list[int]], decoding: Decoding, until: list[str], silent: bool
    ) -> list[tuple[str, Result]]:
        """`write`, in this process alone, of token ids."""
        results = [Result() for _ in prompts]
        with tqdm(total=len(prompts), unit="prompt", disable=silent or rank() > 0) as bar:
            for step in decode(self.model, prompts, decoding, recorded=self.recorded):
                result = results[step.prompt]
                result.add(step)
                if until and step.final and not step.finish_reason:
                    tail = self.tokens.decode(result.tokens[-len(step.final) - 64 :])
                    if any(stop in tail for stop in until):
                        step.finish_reason = "stop"  # tells the decoder, which ends the row
                bar.update(step.finish_reason is not None)
        texts = [self.tokens.decode(result.tokens) for result in results]
        ends = [min((text.find(stop) for stop in until if stop in text), default=None) for text in texts]
        return [(text[:end], result) for text, end, result in zip(texts, ends, results)]

    # --- Log-likelihoods ---

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.reading == "ar":
            return super()._encode_pair(context, continuation)
        # the base class makes a chat prompt's last newline the first token
        begin = self.tokens.encode(context)
        return begin, self.tokens.encode(context + continuation)[len(begin) :]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        score, size = self.read_as_the_original, 1
        if self.reading == "ar":
            score, size = self.read_causally, self.decoding.batch_size

        def work(mine: list[int]) -> Iterator[tuple[float, bool]]:
            silent = disable_tqdm or rank() > 0
            for start in tqdm(range(0, len(mine), size), disable=silent, unit="batch"):
                yield from score([pairs[i] for i in mine[start : start + size]])

        return share_out([len(context) + len(continuation) for context, continuation in pairs], work)

    def read_causally(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation given its context, and whether AR decoding would write it."""
        room = self.model.config.max_position_embeddings + 1  # the last token is only predicted
        rows = [(context + continuation)[-room:] for context, continuation in pairs]
        longest = max(map(len, rows)) - 1  # padded on the right, where no token looks
        tokens = torch.tensor([row[:-1] + [0] * (longest - len(row) + 1) for row in rows], device=self.device)
        hidden = self.model(tokens, torch.arange(longest, device=self.device)[None], causal_attention)
        found = []
        for row, states, (_, continuation) in zip(rows, hidden, pairs):
            n = min(len(continuation), len(row) - 1)
            scores = self.model.logits(states[len(row) - 1 - n : len(row) - 1]).float().log_softmax(-1)
            wanted = torch.tensor(row[len(row) - n :], device=self.device)
            likely = scores.gather(1, wanted[:, None]).sum().item()
            found.append((likely, bool((scores.argmax(-1) == wanted).all())))
        return found

    def read_as_the_original(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """The "original" reading of one pair; it never says that a continuation is the greedy one."""
        [(context, continuation)] = pairs
        config = self.model.config
        size, mask = config.block_size, config.mask_token_id
        row = [*context, mask, *continuation[1:], self.eot_token_id]
        row += [mask] * (-len(row) % size)
        require(len(row) <= config.max_position_embeddings, f"A question has {len(row)} tokens, too many.")
        tokens = torch.tensor([row], device=self.device)
        sees = [fastdllm.block_causal(i, size) for i in range(len(row))]
        sees = torch.tensor([sees], device=self.device)
        seen = fastdllm.attention_mask(sees, len(row))
        groups = config.num_attention_heads // config.num_key_value_heads
        bias = fastdllm.attention_bias(seen, groups, self.model.weight.dtype)
        attend = lambda layer, q, k, v: fastdllm.grouped_attention(q, k, v, bias)
        hidden = self.model(tokens, sees[..., 0], attend)
        scores = self.model.logits(hidden[0, len(context) - 1]).float().log_softmax(-1)  # token shift
        return [(scores[continuation[0]].item(), False)]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of texts, in windows of the model's length; each token is predicted once."""
        require(self.reading == "ar", "The original's reading has no perplexities; take --loglikelihood ar.")
        windows = partial(utils.get_rolling_token_windows, prefix_token=self.prefix_token_id,
                          max_seq_len=self.model.config.max_position_embeddings, context_len=1)  # fmt: skip
        texts = [self.tok_encode(request.args[0]) for request in requests]
        parts = [[utils.make_disjoint_window(window) for window in windows(text)] for text in texts]
        flat = self._loglikelihood_tokens([(None, *pair) for part in parts for pair in part], disable_tqdm)
        scores = iter(score for score, _ in flat)
        return [sum(next(scores) for _ in part) for part in parts]


def find_tasks(tasks: list[str], folder: str | None) -> TaskManager:
    """Where the tasks are: in the folder if it has all, else also among lm-eval's (listing takes seconds)."""
    for defaults in [False, True] if folder else [True]:
        manager = TaskManager(include_path=folder, include_defaults=defaults)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if not unknown:
            return manager
    raise InputError(f"No task is called {', '.join(unknown)}; give --include-path, or see `lm-eval ls`.")


def evaluate(model: HarnessModel, tasks: list[str], manager: TaskManager, chat: bool, **options) -> dict:
    """lm-eval's results, and `speed`: tokens, passes, seconds and rates of each task that generates."""
    model.speed = {}
    options |= {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
    results = simple_evaluate(model, tasks=tasks, task_manager=manager, **options)
    return results | {"speed": {task: found | speed_of([found]) for task, found in model.speed.items()}}


def speed_of(sums: Iterable[dict]) -> dict:
    """Rates of several tasks' SUMS together."""
    tokens, passes, seconds = (sum(found[name] for found in sums) for name in SUMS)
    return {"tokens_per_forward": tokens / max(1, passes), "tokens_per_second": tokens / (seconds or 1)}


def paper_table(
    model: HarnessModel, tasks: list[str], thresholds: list[float | None], **options
) -> tuple[str, dict]:
    """Our scores with the paper's beside them, as Markdown; and lm-eval's results by task and threshold."""
    header = ["task", "threshold", "score", "tokens per forward", "tokens/s", *PAPER_SCORES]
    rows, found = [header, ["---"] * len(header)], {}
    for task in tasks:
        column, shots, marker, metric = PAPER_TASKS[task]
        model.instructions = {task: (marker, PAPER_PROMPT)} if marker else {}
        for threshold in thresholds:
            model.decoding = replace(model.decoding, threshold=threshold)
            results = evaluate(model, [task], num_fewshot=shots, **options)
            generates = bool(results["speed"])  # log-likelihoods have no threshold
            shown = "" if threshold is None or not generates else f"{threshold:g}"
            found[f"{task}, threshold {shown}" if shown else task] = results
            speed = speed_of(results["speed"].values()).values()
            score, paper = results["results"][task][metric], (row[column] for row in PAPER_SCORES.values())
            row = [column, shown, f"{100 * score:.1f}", *(f"{x:.2f}" if generates else "" for x in speed)]
            rows.append([*row, *map(str, paper)])
            if not generates:
                break
    return "\n".join("| " + " | ".join(row) + " |" for row in rows), found


def write_results(path: Path, results: dict, samples: list[dict]) -> None:
    """lm-eval's result file, and beside it what was asked and answered, as JSON lines."""
    dump = partial(json.dumps, default=utils.handle_non_serializable, ensure_ascii=False)
    lines = "".join(dump(sample) + "\n" for sample in samples)
    for file, text in (path, dump(results, indent=2) + "\n"), (path.with_suffix(".samples.jsonl"), lines):
        replace_file(file, partial(Path.write_text, data=text, encoding="utf-8"))


@click.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "), context_settings=console.HELP_OPTIONS)
@console.model_options
@click.option("--tasks", type=console.ListOf(click.STRING), help="Names, with commas.")
@click.option("--include-path", "folder", type=click.Path(exists=True, file_okay=False), help="More tasks.")
@click.option("--paper", is_flag=True, help="The paper's tasks, or some, in the original's settings.")
@click.option("--decoder", type=click.Choice([*DECODERS]), default="threshold")
@click.option("--threshold", type=click.FloatRange(0, 1), show_default="0.9; with --paper 1, then 0.9")
@click.option(
    "--loglikelihood",
    "reading",
    type=click.Choice(["ar", "original"]),
    show_default="ar; with --paper original",
)
@click.option("--max-new-tokens", type=console.COUNT, show_default="the task's, else 256")
@console.batch_option
@click.option("--num-fewshot", type=click.IntRange(0), show_default="the task's", help="Examples.")
@click.option("--limit", type=console.COUNT, help="Only the first questions of each task.")
@click.option("--chat/--no-chat", default=True, help="Apply the chat template.")
@click.option("--confirm-run-unsafe-code", is_flag=True, help="Let lm-eval itself run what the model writes.")
@click.option("--output", type=console.FILE, help="lm-eval's result file, as JSON.")
@console.reports_mistakes
def main(
    model, adapter, device, dtype, packed, threads, tasks, folder, paper, decoder, threshold, reading,
    max_new_tokens, batch_size, num_fewshot, output, **options,
):  # fmt: skip
    require(tasks or paper, "Name --tasks, or take --paper.")
    tasks, causal = tasks or list(PAPER_TASKS), decoder in ("ar", "verify")
    require(not paper or set(tasks) <= set(PAPER_TASKS), f"--paper knows the tasks {', '.join(PAPER_TASKS)}.")
    own = "--paper has its own number of examples; leave --num-fewshot out."
    require(not paper or num_fewshot is None, own)
    unused = f"--decoder {decoder} has no threshold; leave --threshold out."
    require(not causal or threshold is None, unused)
    if output:
        console.require_writable("--output", output)
    given = {} if causal else {"threshold": threshold}
    decoding = DECODERS[decoder](batch_size=batch_size, **given)
    with processes(device) as device:
        if world_size() > 1:  # to lm-eval all processes are one model, and all get its results
            os.environ["LOCAL_RANK"] = "0"
        network, tokenizer, recorded = console.open_model(
            model, adapter, device, dtype, packed, threads, record=True
        )
        decoding.resolve(network)  # a mistake is told before data is fetched
        reading = reading or ("original" if paper and not causal else "ar")
        longest = max_new_tokens or (PAPER_TOKENS if paper else None)
        subject = HarnessModel(model, network, tokenizer, decoding, reading, longest, recorded)
        talks = not options["chat"] or tokenizer.template
        require(talks, f"{model}: has no chat template; --no-chat asks without one.")
        options |= {"manager": find_tasks(tasks, folder)}
        if paper:
            rounds = [threshold] if causal or threshold is not None else [1.0, 0.9]
            table, found = paper_table(subject, tasks, rounds, **options)
        else:
            found = evaluate(subject, tasks, num_fewshot=num_fewshot, **options)
            lines = [f"{task}: {summary_line(speed)}" for task, speed in found["speed"].items()]
            table = "\n".join([utils.make_table(found), *lines])
        if rank() > 0:  # all have found the same
            return
    click.echo(table)
    if output:
        runs = found.values() if paper else [found]
        answers = [item for results in runs for item in results.pop("samples").items()]
        samples = [{"task": task} | sample for task, found_samples in answers for sample in found_samples]
        about = {
            "decoding": options_of(decoding),
            "loglikelihood": reading,
            "environment": environment(device),
        }
        write_results(output, found | about, samples)


if __name__ == "__main__":
    main()
