"""Guess, accept, decode, generate: the golden vectors and the properties that users rely on."""

import collections
import itertools
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, golden
from windows import causal_attend, decoding_of, prompt_of

import fastdllm
from checkpoint import load
from fastdllm import Decoding, InputError, KVCache, Row, accept, decode, generate, guess, nucleus
from verify import Verified

CASES = golden("generate")["cases"]
TRACES = {trace["id"]: trace["steps"] for trace in golden("traces")["traces"]}


# --- Guess and accept ---


@pytest.mark.parametrize(
    "case", golden("sampling")["cases"], ids=lambda c: f"T{c['temperature']}-p{c['top_p']}"
)
def test_nucleus_equals_golden_probabilities(case):
    p, ids = nucleus(torch.tensor(case["logits"]), case["temperature"], case["top_p"])
    torch.testing.assert_close(
        torch.zeros_like(p).scatter(1, ids, p), torch.tensor(case["probs"]), atol=1e-5, rtol=0
    )


def test_draws_follow_the_nucleus_and_confidence_is_the_drawn_probability():
    logits = torch.tensor([[2.0, 1.5, 0.3, -1.0, 1.9]])
    draws = torch.arange(10000) / 10000  # evenly spread, so the shares are exact
    tokens, confidence = guess(logits.expand(10000, 5), Decoding(temperature=0.8, top_p=0.9), draws)
    p, ids = nucleus(logits, 0.8, 0.9)
    for probability, token in zip(p[0].tolist(), ids[0].tolist()):
        assert (tokens == token).float().mean().item() == pytest.approx(probability, abs=2e-4)
        assert torch.all(confidence[tokens == token] == probability)


def test_extreme_draws_take_a_token_that_was_kept():
    most = 1 - 2**-24
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]])
    tokens, confidence = guess(logits, Decoding(temperature=1.0, top_p=0.5), torch.tensor([0.0, most]))
    assert tokens.tolist() == [1, 1] and confidence.tolist() == [1.0, 1.0]
    logits = torch.randn(500, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, 2000:] = -torch.inf  # sums of 2000 probabilities may end below the largest draw
    tokens, confidence = guess(logits, Decoding(temperature=1.0), torch.full((500,), most))
    assert tokens.max() < 2000 and confidence.min() > 0


def test_confidence_at_the_threshold_is_not_revealed_and_ties_reveal_the_first():
    limit = torch.tensor(0.3).item()  # above 0.3 as a double, equal to it as a float32
    assert accept([0.2, limit, 0.9], limit) == [2]
    assert accept([0.5, 0.8, 0.8], 1.0) == [1]
    assert accept([1.0, 1.0], 1.0) == [0]
    assert accept([0.1, 0.2], 0.0) == [0, 1]


def test_threshold_is_compared_in_float32(golden_models):
    confidence = torch.tensor(0.3).item()
    knobs = Decoding(8, 8, 0.3, max_new_tokens=9, stop_token_ids=()).resolve(golden_models["tied"])
    row = Row([1] * 4, knobs, 285)
    step = row.next_pass()
    row.take(step, [(7, confidence)] * 4)
    assert [kept.position for kept in step.revealed] == [4]  # equal is not above: only the first of the ties


def test_a_prefix_ends_at_the_first_guess_that_is_not_above_the_threshold():
    assert accept([0.95, 0.99, 0.5, 0.99], 0.9, prefix=True) == [0, 1]
    assert accept([0.5, 0.99, 0.99], 0.9, prefix=True) == [0, 1, 2]  # the first one is always kept
    assert accept([0.5, 0.9, 0.99], 0.9, prefix=True) == [0]  # strictly above
    assert accept([0.1], 0.9, prefix=True) == [0]


def test_prefix_acceptance_reveals_from_left_to_right(golden_models):
    knobs = Decoding(8, 8, 0.4, max_new_tokens=40, stop_token_ids=(), accept="prefix")
    for step in decode(golden_models["tied"], [[1, 2, 3]], knobs):
        positions = [kept.position for kept in step.revealed]
        assert positions == step.positions[: len(positions)]


@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.5, 0.8)])
def test_top_k_keeps_the_k_most_probable_tokens(temperature, top_p, rng):
    logits = torch.randn(3, 50, generator=rng)
    p, ids = nucleus(logits, temperature, top_p, top_k=4)
    best = (logits / temperature).softmax(-1).topk(4)
    assert torch.equal(ids, best.indices)
    shares = best.values / best.values.sum(-1, keepdim=True)
    kept = shares * (shares.cumsum(-1) - shares <= top_p)
    torch.testing.assert_close(p, kept / kept.sum(-1, keepdim=True))


def test_top_k_of_1_is_greedy_at_any_temperature(golden_models):
    knobs = Decoding(8, max_new_tokens=30, stop_token_ids=(), threshold=1.0)
    greedy, sampled = (
        generate(golden_models["untied"], [[1, 2, 3]], replace(knobs, **more))[0].tokens
        for more in ({"block_size": 1}, {"block_size": 1, "temperature": 1.5, "top_k": 1})
    )
    assert greedy == sampled


def test_confidence_is_float32_whatever_the_weights(golden_models, folders):
    model, _ = load(folders["untied"], "cpu", "bfloat16")
    [step] = [
        s for s in decode(model, [[5, 6, 7]], Decoding(8, threshold=0.0, max_new_tokens=3)) if s.revealed
    ][:1]
    as_bfloat16 = [torch.tensor(kept.confidence).bfloat16().item() for kept in step.revealed]
    assert any(kept.confidence != b for kept, b in zip(step.revealed, as_bfloat16))


# --- Golden vectors ---


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_generate_equals_golden_tokens_and_passes(golden_models, case):
    steps = list(decode(golden_models[case["checkpoint"]], [case["prompt"]], decoding_of(case)))
    assert [token for step in steps for token in step.final] == case["tokens"]
    assert collections.Counter(f"{step.kind}:{len(step.tokens)}" for step in steps) == case["passes"]


@pytest.mark.parametrize("cache", ["none", "block", "dual"])
@pytest.mark.parametrize("size", [1, 8, 48])
def test_tokens_do_not_depend_on_the_pieces_of_a_long_prompt(golden_models, monkeypatch, cache, size):
    prompts = [prompt_of(random.Random(n), 100 - 13 * n) for n in range(4)]
    knobs = Decoding(size, min(size, 8), 0.6, cache, 30, stop_token_ids=(), batch_size=3)
    whole = generate(golden_models["untied"], prompts, knobs)
    monkeypatch.setattr(fastdllm, "PIECE", 16)
    pieces = list(decode(golden_models["untied"], prompts, knobs))
    for n, result in enumerate(whole):
        assert [token for step in pieces if step.prompt == n for token in step.final] == result.tokens
    if cache != "none":
        widest = max(len(step.tokens) for step in pieces if step.kind == "prefill")
        assert widest == fastdllm.round_up(16, size)


@pytest.mark.parametrize("case", [c for c in CASES if c["cache"] == "block"], ids=lambda c: c["id"])
def test_recomputing_everything_gives_the_same_tokens(golden_models, case):
    [result] = generate(golden_models[case["checkpoint"]], [case["prompt"]], decoding_of(case, cache="none"))
    assert result.tokens == case["tokens"]


@pytest.mark.parametrize("case", [c for c in CASES if c["id"] in TRACES], ids=lambda c: c["id"])
def test_every_denoising_pass_equals_its_golden_trace(golden_models, case):
    steps = decode(golden_models[case["checkpoint"]], [case["prompt"]], decoding_of(case))
    steps = [step for step in steps if step.kind in ("full", "refresh", "sub")]
    assert len(steps) == len(TRACES[case["id"]])
    for step, (kind, start, revealed) in zip(steps, TRACES[case["id"]]):
        size, sub = case["block_size"], case["sub_block_size"]
        at = step.positions[0]
        assert (step.kind, at - at % size % sub) == (kind, start)
        assert [r[:2] for r in step.revealed] == [tuple(r[:2]) for r in revealed]
        assert [r[2] for r in step.revealed] == pytest.approx([r[2] for r in revealed], abs=1e-3)


@pytest.mark.parametrize("case", golden("batch")["cases"], ids=lambda c: c["id"])
def test_batch_rows_equal_golden_tokens(golden_models, case):
    model, rows = golden_models[case["checkpoint"]], case["rows"]
    longest = max(len(row["tokens"] or range(30)) for row in rows)
    results = generate(model, [row["prompt"] for row in rows], decoding_of(case, max_new_tokens=longest))
    for row, result in zip(rows, results):
        expected = row["tokens"]
        if expected is None:  # no vector: the original errs there; the single run decides
            expected = generate(model, [row["prompt"]], decoding_of(case, max_new_tokens=longest))[0].tokens
        assert result.tokens[: len(expected)] == expected
        if expected[-1] in case["stop_token_ids"]:
            assert result.tokens == expected


# --- Properties of one row ---


@torch.inference_mode()
def test_block_size_1_equals_a_naive_greedy_loop(golden_models):
    model, ids = golden_models["untied"], prompt_of(random.Random(1), 11)
    for _ in range(40):
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], causal_attend)
        ids.append(model.logits(hidden)[0, -1].argmax().item())
    [result] = generate(model, [ids[:11]], Decoding(block_size=1, max_new_tokens=40, stop_token_ids=()))
    assert result.tokens == ids[11:]
    assert result.passes == {"prefill": 1, "commit": 39}


@pytest.mark.parametrize("cache", ["none", "block", "dual"])
def test_max_new_tokens_cuts_exactly_and_spends_nothing_on_what_is_cut(golden_models, cache):
    model, prompt = golden_models["tied"], prompt_of(random.Random(2), 13)
    knobs = Decoding(8, 4, 0.5, cache, 30, stop_token_ids=())
    steps = list(decode(model, [prompt], knobs))
    tokens = [token for step in steps for token in step.final]
    for n in range(1, 31):
        [cut] = generate(model, [prompt], replace(knobs, max_new_tokens=n))
        assert cut.tokens == tokens[:n] and cut.finish_reason == "length"
        needed = next(i for i, s in enumerate(steps, 1) if sum(len(s.final) for s in steps[:i]) >= n)
        assert sum(cut.passes.values()) == needed


@pytest.mark.parametrize("cache", ["none", "block", "dual"])
def test_a_stop_cuts_after_its_first_occurrence(golden_models, cache):
    model, prompt = golden_models["untied"], prompt_of(random.Random(3), 21)
    knobs = Decoding(16, 8, 0.5, cache, 48, stop_token_ids=())
    [free] = generate(model, [prompt], knobs)
    assert generate(model, [prompt], replace(knobs, stop_token_ids=set(prompt) - set(free.tokens))) == [free]
    for stop in set(free.tokens):
        [result] = generate(model, [prompt], replace(knobs, stop_token_ids=(stop, 301)))
        assert result.tokens == free.tokens[: free.tokens.index(stop) + 1]
        assert result.finish_reason == "stop"
        assert sum(result.passes.values()) <= sum(free.passes.values())


def test_sub_block_equal_to_block_makes_dual_a_no_op(golden_models):
    rng = random.Random(4)
    for size in (4, 8, 16, 32):
        prompt, knobs = prompt_of(rng, rng.randrange(1, 50)), Decoding(size, size, 0.6, "block", 40)
        block, dual = (
            generate(golden_models["tied"], [prompt], replace(knobs, cache=c))[0] for c in ("block", "dual")
        )
        assert block.tokens == dual.tokens
        assert block.forward_passes == dual.forward_passes


def test_the_default_sub_block_divides_every_block_and_a_given_one_must(golden_models):
    model = golden_models["untied"]
    for size, sub in [(32, 8), (12, 4), (4, 4), (7, 1), (1, 1)]:
        assert Decoding(size).resolve(model).sub_block_size == sub
    for size, sub in [(32, 5), (12, 8), (4, 8), (8, 16)]:
        with pytest.raises(InputError, match=f"{sub} does not divide block_size {size}"):
            generate(model, [[1, 2, 3]], Decoding(size, sub))


@pytest.mark.parametrize("knobs, words", [
    (Decoding(10**6), "is 1000000, the model has 1024 positions"),
    (Verified(draft_width=10**6), "draft_width 1000000 needs passes of 1000001 tokens, more than 512"),
])  # fmt: skip
def test_blocks_and_drafts_beyond_what_a_pass_holds_are_refused(golden_models, knobs, words):
    with pytest.raises(InputError, match=words):
        decode(golden_models["untied"], [[1, 2]], knobs)


def test_mask_and_padding_ids_are_never_guessed(folders):
    model, _ = load(folders["untied"], "cpu")
    model.lm_head.weight.data[:] = 0  # all ids are equally likely: the first allowed one is the argmax
    model.config = replace(model.config, mask_token_id=0, tokenizer_size=2)
    for knobs in [Decoding(8), Decoding(1), Decoding(8, temperature=1.0, seed=0)]:
        steps = decode(model, [[1, 1, 1]], replace(knobs, max_new_tokens=20, stop_token_ids=()))
        steps = list(itertools.islice(steps, 100))  # a mask that is guessed is guessed for ever
        assert [token for step in steps for token in step.final] == [1] * 20


@pytest.mark.parametrize("prompt, message", [
    ([], "empty"), ([320], "320, outside the vocabulary of 320"), ([-1], "-1, outside"), ([5, 310], "mask token"),
    ([1] * 1000, "1256 positions, the model has 1024"),
    (["a"], "list of lists"), (5, "list of lists"), ([1.5], "list of lists"),
])  # fmt: skip
def test_bad_prompts_are_refused_before_anything_runs(golden_models, prompt, message):
    with pytest.raises(InputError, match=message):
        decode(golden_models["untied"], [[1, 2], prompt], Decoding())


@pytest.mark.parametrize("knobs", [
    {"threshold": 1.1}, {"threshold": -0.1}, {"threshold": float("nan")}, {"cache": "triple"}, {"top_p": 2.0},
    {"max_new_tokens": None}, {"block_size": 8.0}, {"stop_token_ids": ("a",)}, {"stop_token_ids": 5},
    {"seed": 2**70}, {"seed": -1}, {"max_new_tokens": 0}, {"top_p": None}, {"top_k": 0}, {"accept": "all"},
    {"temperature": -1.0}, {"block_size": 0}, {"sub_block_size": 0}, {"batch_size": 0},
])  # fmt: skip
def test_bad_options_are_refused(knobs):
    with pytest.raises(InputError, match=next(iter(knobs))):
        Decoding(**knobs)


# --- Properties of a batch ---


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cache", ["none", "block", "dual"])
def test_rows_equal_their_single_runs(golden_models, seed, cache):
    rng = random.Random(seed)
    size = rng.choice([1, 4, 8, 16])
    sub = rng.choice([s for s in (1, 2, 4, 8) if size % s == 0])
    temperature = rng.choice([0.0, 0.0, 0.7])
    model = golden_models[rng.choice(["tied", "untied"])]
    prompts = [prompt_of(rng, rng.choice([1, size, 2 * size, rng.randrange(1, 60)])) for _ in range(7)]
    stops = tuple(rng.sample(range(280), 20))
    knobs = Decoding(
        size, sub, rng.choice([0.3, 0.6, 1.0]), cache, rng.randrange(1, 40), temperature, 0.9,
        stop_token_ids=stops, seed=seed, batch_size=3,
    )  # fmt: skip
    together = generate(model, prompts, knobs)
    assert together == [generate(model, [prompt], knobs)[0] for prompt in prompts]
    assert (
        len({len(result.tokens) for result in together}) > 1 or knobs.max_new_tokens == 1
    )  # some stop early


def test_a_cache_full_of_nan_never_leaks(golden_models, monkeypatch):
    prompts = [prompt_of(random.Random(5), n) for n in (3, 16, 29, 40, 8)]
    all_knobs = [Decoding(8, 4, 0.6, cache, 20, batch_size=3) for cache in ("none", "block", "dual")]
    clean = [generate(golden_models["untied"], prompts, knobs) for knobs in all_knobs]
    allocate = KVCache.__init__

    def filled(self, *args):
        allocate(self, *args)
        self.k.fill_(torch.nan)
        self.v.fill_(torch.nan)

    monkeypatch.setattr(KVCache, "__init__", filled)
    assert [generate(golden_models["untied"], prompts, knobs) for knobs in all_knobs] == clean


def test_seeds_reproduce_and_no_seed_varies(golden_models):
    prompt, knobs = [1, 2, 3], Decoding(8, temperature=1.5, max_new_tokens=30, stop_token_ids=())
    model = golden_models["untied"]
    seeded = [generate(model, [prompt], replace(knobs, seed=seed))[0].tokens for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    free = generate(model, [prompt] * 2, knobs)
    assert free[0].tokens != free[1].tokens


def test_sampling_draws_the_first_token_of_a_block_too(golden_models):
    model, knobs = golden_models["untied"], Decoding(8, temperature=2.0, max_new_tokens=1, stop_token_ids=())
    firsts = {generate(model, [[1] * 8], replace(knobs, seed=seed))[0].tokens[0] for seed in range(20)}
    assert len(firsts) > 1


@pytest.mark.parametrize("cache", ["block", "dual"])
def test_rows_of_different_lengths_share_forward_passes(golden_models, monkeypatch, cache):
    model, calls, window = golden_models["tied"], [], fastdllm.window_pass
    spy = lambda model, cache, tokens, *rest: calls.append(len(tokens)) or window(model, cache, tokens, *rest)
    monkeypatch.setattr(fastdllm, "window_pass", spy)
    knobs = Decoding(8, 4, 0.9, cache, 40, stop_token_ids=())
    generate(model, [prompt_of(random.Random(7), 12 + 8 * row) for row in range(8)], knobs)
    assert sum(calls) / len(calls) > 4  # rows a pass


def test_weights_that_give_no_numbers_are_reported(folders):
    model, _ = load(folders["untied"], "cpu")
    model.model.norm.weight.data[:] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="is NaN"):
            generate(model, [[1, 2]], Decoding(temperature=temperature))


def test_no_prompts_give_no_results(golden_models):
    assert generate(golden_models["untied"], [], Decoding()) == []


@pytest.mark.parametrize("size, cache", [(1, "block"), (8, "block"), (8, "dual")])
def test_prompts_of_nearly_the_same_length_share_their_prefill(golden_models, monkeypatch, size, cache):
    model, run, calls = golden_models["untied"], fastdllm.run_steps, []
    prompts = [prompt_of(random.Random(n), length) for n, length in enumerate((62, 49, 40, 80, 120))]
    knobs = Decoding(size, min(size, 4), 0.6, cache, 20, stop_token_ids=())
    alone = [generate(model, [prompt], knobs)[0].tokens for prompt in prompts]
    spy = lambda model, cache, rows, steps, *rest: (
        calls.append(steps) or run(model, cache, rows, steps, *rest)
    )
    monkeypatch.setattr(fastdllm, "run_steps", spy)
    assert [result.tokens for result in generate(model, prompts, knobs)] == alone
    assert [len(steps) for steps in calls if steps[0].kind == "prefill"] == [3, 2]


# --- A cache that is kept ---


@pytest.mark.parametrize("cache", ["block", "dual"])
def test_a_kept_cache_gives_the_same_tokens_and_runs_only_what_is_new(golden_models, cache):
    rng, model = random.Random(6), golden_models["untied"]
    knobs = Decoding(8, 4, 0.6, cache, 21, stop_token_ids=())
    prompt, kept, committed = [], KVCache(model.config, 1, 1, model.weight), 0
    for _ in range(4):
        prompt = prompt + prompt_of(rng, rng.randrange(1, 30))
        steps = list(decode(model, [prompt], knobs, cache=kept, cached=committed))
        [fresh] = generate(model, [prompt], knobs)
        assert [token for step in steps for token in step.final] == fresh.tokens
        whole = len(prompt) // 8 * 8
        first = min(committed, whole - 8 * (whole == len(prompt)))
        prefilled = [(step.start, len(step.tokens)) for step in steps if step.kind == "prefill"]
        assert prefilled == ([(first, whole - first)] if first < whole else [])
        prompt, committed = prompt + fresh.tokens, steps[-1].committed


def test_a_kept_cache_is_for_one_prompt(golden_models):
    model = golden_models["untied"]
    with pytest.raises(InputError, match="one prompt, not 2"):
        decode(model, [[1], [2]], Decoding(), cache=KVCache(model.config, 2, 64, model.weight))


# --- The file alone ---


def test_the_file_alone_decodes_a_state_dict(tmp_path):
    shutil.copy(ROOT / "fastdllm.py", tmp_path)
    code = (
        "from fastdllm import *; c = Config(64, 32, 48, 1, 4, 2, 8, 128, block_size=8, mask_token_id=63); "
        "weights = Qwen2(c).state_dict(); model = Qwen2(c); model.load_state_dict(weights); "
        "print(generate(model, [[1, 2, 3]], Decoding(max_new_tokens=7))[0].tokens)"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(run.stdout.split(",")) == 7
