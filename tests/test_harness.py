"""Our models in lm-eval: against its own model on the same weights, and against `cli.py eval`."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from command_line import read_lines
from conftest import ROOT

pytest.importorskip("lm_eval", reason="pip install -r benchmarks/requirements.txt")
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from checkpoint import save  # noqa: E402
from commands.evaluate import read_problems, verdict  # noqa: E402
from commands.prompts import encode_prompts, read_jsonl  # noqa: E402
from fastdllm import Decoding, InputError, Qwen2, generate  # noqa: E402
from training.attention import causal_attention  # noqa: E402

TASKS = ROOT / "benchmarks" / "tasks"
PROBLEMS = read_lines(TASKS / "word_problems.jsonl")
UNTIL_END = {"until": [], "max_gen_toks": 100}


@pytest.fixture(scope="module", autouse=True)
def in_the_repository():
    """The task files name their data from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture
def subject(shipped):
    """The shipped model as lm-eval sees it, with other options."""

    def build(reading="ar", kind=Decoding, **options):
        return harness.HarnessModel("shipped", *shipped, kind(**options), reading)

    return build


@pytest.fixture(scope="module")
def peer(shipped, tmp_path_factory):
    """lm-eval's own model over the same weights, as a plain Qwen2."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    model, tokenizer = shipped
    with torch.device("meta"):
        plain = Qwen2(replace(model.config, block_size=1, mask_token_id=None))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie()
    folder = tmp_path_factory.mktemp("plain")
    save(plain, tokenizer, folder)
    # by model type, Transformers would cut numbers into digits, whatever tokenizer.json says
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    return HFLM(pretrained=str(folder), tokenizer=words, device="cpu", dtype="float32", batch_size=4)


def requests(kind, arguments):
    return [Instance(kind, {}, args, i, metadata=("word_problems", i, 1)) for i, args in enumerate(arguments)]


def write(model, prompts, *settings):
    """The texts of prompts, with the same settings or each with its own."""
    settings = settings * len(prompts) if len(settings) == 1 else settings
    return model.generate_until(requests("generate_until", [*zip(prompts, settings)]))


def chat(model, problem):
    return model.apply_chat_template([{"role": "user", "content": problem["question"]}])


# --- Log-likelihoods ---


def test_log_likelihoods_are_those_of_transformers(subject, peer):
    ours = subject(batch_size=3)
    pairs = [(chat(ours, p), " " * (i % 2) + p["answer"][: 20 * i + 9]) for i, p in enumerate(PROBLEMS)]
    start, greedy = (PROBLEMS[0]["answer"][part] for part in (slice(20), slice(20, None)))
    pairs += [("", "Mia has 12 apples."), ("How many ", "apples"), (chat(ours, PROBLEMS[0]) + start, greedy)]
    found, wanted = (m.loglikelihood(requests("loglikelihood", pairs)) for m in (ours, peer))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted] and found[-1][1]
    texts = [(p["question"] + "\n" + p["answer"],) for p in PROBLEMS]
    texts.append(("Mia has 12 apples. " * 400,))  # several windows
    found, wanted = (m.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for m in (ours, peer))
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-4)


def test_the_original_reading_scores_the_first_token_at_a_mask(subject, shipped):
    model, tokenizer = shipped
    config, ours = model.config, subject("original")
    context, answer = chat(ours, PROBLEMS[0]), PROBLEMS[1]["answer"]
    begin, rest = tokenizer.encode(context), tokenizer.encode(answer)
    row = begin + [config.mask_token_id] + rest[1:] + [config.stop_token_ids[0]]
    row += [config.mask_token_id] * (32 - len(row) % 32)
    allowed = torch.tensor([[i // 32 >= j // 32 for j in range(len(row))] for i in range(len(row))])

    def attend(layer, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)

    run = lambda ids, how: model.logits(model(torch.tensor([ids]), torch.arange(len(ids))[None], how))[0]
    with torch.inference_mode():
        logits, causal = run(row, attend)[len(begin) - 1], run(begin, causal_attention)[-1]
    [(score, greedy)] = ours.loglikelihood(requests("loglikelihood", [(context, answer)]))
    assert score == pytest.approx(logits.log_softmax(-1)[rest[0]].item(), abs=1e-5) and not greedy
    assert score != pytest.approx(causal.log_softmax(-1)[rest[0]].item(), abs=1e-2)
    with pytest.raises(InputError, match="perplexities"):
        ours.loglikelihood_rolling([])


# --- Generation ---


def test_a_chat_prompt_is_the_checkpoints_own_template(subject, shipped):
    _, tokenizer = shipped
    ours, messages = subject(), [{"role": "user", "content": "Mia has 12 apples. How many?"}]
    assert ours.tok_encode(ours.apply_chat_template(messages)) == tokenizer.chat(messages)
    assert ours.chat_template(True) == tokenizer.template
    begun = [*messages, {"role": "assistant", "content": "Mia"}]
    continued = ours.apply_chat_template(begun, add_generation_prompt=False)
    assert continued == ours.apply_chat_template(messages) + "Mia"


@pytest.mark.parametrize("decoder", harness.DECODERS)
def test_answers_are_those_of_our_eval(subject, shipped, decoder):
    model, tokenizer = shipped
    ours, tasks = subject(kind=harness.DECODERS[decoder], batch_size=3), ["word_problems"]
    results = harness.evaluate(ours, tasks, harness.find_tasks(tasks, str(TASKS)), True)
    samples = sorted(results["samples"]["word_problems"], key=lambda sample: sample["doc_id"])
    decoding = harness.DECODERS[decoder](max_new_tokens=128)
    problems = read_problems(read_jsonl(str(TASKS / "word_problems.jsonl")), None)
    answers = generate(model, encode_prompts(problems, tokenizer, decoding, model.config), decoding)
    verdicts = [verdict(problem, answer, tokenizer) for problem, answer in zip(problems.values(), answers)]
    assert [s["resps"][0][0] for s in samples] == [v["text"] for v in verdicts]
    assert [s["exact_match"] for s in samples] == [v["correct"] for v in verdicts]
    for name in ("new_tokens", "forward_passes"):  # the names of the command line
        assert results["speed"]["word_problems"][name] == sum(v[name] for v in verdicts)


def test_a_stop_string_cuts_the_text(subject):
    ours = subject(batch_size=2)
    stops = [{"until": stop, "max_gen_toks": 100} for stop in ([], ["="], ["####", " = "], ["zebra"])]
    whole, first, second, third = write(ours, [chat(ours, PROBLEMS[0])] * 4, *stops)
    assert first == whole[: whole.index("=")] and second == whole[: whole.index(" = ")] and third == whole


@pytest.mark.parametrize("settings, decoding", [
    ({}, {"temperature": 0}),
    ({"temperature": 1.5, "do_sample": False}, {"temperature": 0}),
    ({"temperature": 1.5, "top_k": 1}, {"temperature": 0}),
    ({"temperature": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, {"temperature": 0}),
    ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5}),
    ({"temperature": 0.7, "top_k": 0}, {"temperature": 0.7, "top_p": 1.0, "top_k": None}),
    ({"temperature": 0.7, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
      "num_beams": 1, "top_p": None}, {"temperature": 0.7, "top_p": 1.0, "top_k": None}),
])  # fmt: skip
def test_sampling_settings_are_honoured_or_change_nothing(settings, decoding):
    assert harness.sampling_of(harness.normalize_gen_kwargs(settings)) == decoding


@pytest.mark.parametrize("name, value", [
    ("min_p", 0.1), ("repetition_penalty", 1.2), ("presence_penalty", 0.5), ("frequency_penalty", 0.5),
    ("num_beams", 4), ("guidance_scale", 2), ("seed", 1),
])  # fmt: skip
def test_a_sampling_setting_that_is_not_built_is_refused_by_name(subject, name, value):
    with pytest.raises(InputError, match=f"sets {name} to {value}"):
        write(subject(), ["x"], UNTIL_END | {"temperature": 0.7, name: value})


def test_answers_that_the_model_has_no_room_for_are_shorter_with_one_note(subject, capsys):
    ours = subject(block_size=1)
    prompts = [chat(ours, problem) for problem in PROBLEMS[:2]]
    assert write(ours, prompts, UNTIL_END | {"max_gen_toks": 10**6}) == write(ours, prompts, UNTIL_END)
    assert capsys.readouterr().err.count("word_problems asks for answers of 1000000 tokens") == 1


# --- The command ---


def test_the_command_writes_lm_evals_file_and_the_paper_table(tmp_path):
    tasks, output = shutil.copytree(TASKS, tmp_path / "tasks"), tmp_path / "out.json"
    task = (tasks / "gsm8k_sample.yaml").read_text().replace("task: gsm8k_sample", "task: gsm8k")
    (tasks / "gsm8k_sample.yaml").write_text(task)

    def run(*more):
        arguments = ["--include-path", tasks, "--output", output, "--limit", 2, *more]
        return CliRunner().invoke(harness.main, [*map(str, arguments)], catch_exceptions=False)

    result = run("--tasks", "word_problems,word_choices")
    assert result.exit_code == 0, result.output
    assert "|word_problems|" in result.stdout and "tokens per forward" in result.stdout
    written = json.loads(output.read_text())
    assert written["results"]["word_choices"]["acc,none"] == 1
    assert written["speed"]["word_problems"]["new_tokens"] > 60
    samples = read_lines(tmp_path / "out.samples.jsonl")
    assert [sample["task"] for sample in samples] == ["word_problems"] * 2 + ["word_choices"] * 2
    result = run("--paper", "--tasks", "gsm8k", "--max-new-tokens", 40)
    assert result.exit_code == 0
    columns = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines()]
    assert [row[:3] for row in columns[2:]] == [["GSM8K", "1", "0.0"], ["GSM8K", "0.9", "0.0"]]
    assert columns[2][5:] == ["57.0", "62.0", "71.4", "83.7"]
    # thresholds, questions, lm-eval's two ways to find the answer
    assert len(read_lines(tmp_path / "out.samples.jsonl")) == 2 * 2 * 2
    unused = ["--tasks", "word_problems", "--decoder", "verify", "--threshold", 0.8]
    for mistake in ([], ["--tasks", "no_such_task"], ["--paper", "--num-fewshot", 3], unused):
        result = run(*mistake)
        assert result.exit_code == 2 and result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1


def test_two_processes_find_what_one_finds(tmp_path):
    found, texts = [], []
    for start in [], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]:
        what = f"--include-path {TASKS} --tasks word_problems,word_choices --device cpu --output"
        line = [sys.executable, *start, "benchmarks/harness.py", *what.split(), str(tmp_path / "out.json")]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("|word_problems|") == 1
        found.append(json.loads((tmp_path / "out.json").read_text()))
        # without log-likelihoods, which round otherwise in other batches
        samples = (tmp_path / "out.samples.jsonl").read_text().splitlines()
        texts.append([line for line in samples if "word_problems" in line])
    assert texts[0] == texts[1] and len(texts[0]) == 8
    assert found[0]["results"] == found[1]["results"]
    speeds = [[(s["new_tokens"], s["forward_passes"]) for s in f["speed"].values()] for f in found]
    assert speeds[0] == speeds[1]
