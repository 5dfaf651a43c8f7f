"""Guess, accept, decode, generate: the golden vectors and the properties that users rely on."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import golden
from windows import causal_attend, decoding_of, prompt_of

import fastdllm
from checkpoint import load
from fast import RecordedPasses
from fastdllm import Decoding, InputError, KVCache, accept, decode, generate, guess, nucleus

CASES, SAMPLING = golden("generate")["cases"], golden("sampling")["cases"]
TRACES = {trace["id"]: trace["steps"] for trace in golden("traces")["traces"]}
FREE = {"stop_token_ids": ()}


def tokens_of(steps):
    return [token for step in steps for token in step.final]


# --- Guess and accept ---


@pytest.mark.parametrize("case", SAMPLING, ids=lambda c: f"{c['temperature']} {c['top_p']}")
def test_nucleus_equals_golden_probabilities(case):
    p, ids = nucleus(torch.tensor(case["logits"]), case["temperature"], case["top_p"])
    found = torch.zeros_like(p).scatter(1, ids, p)
    torch.testing.assert_close(found, torch.tensor(case["probs"]), atol=1e-5, rtol=0)


def test_draws_follow_the_nucleus_and_confidence_is_the_drawn_probability():
    logits = torch.tensor([[2.0, 1.5, 0.3, -1.0, 1.9]])
    draws = torch.arange(10000) / 10000  # evenly spread, so the shares are exact
    tokens, confidence = guess(logits.expand(10000, 5), Decoding(temperature=0.8, top_p=0.9), draws)
    p, ids = nucleus(logits, 0.8, 0.9)
    for probability, token in zip(p[0].tolist(), ids[0].tolist()):
        assert (tokens == token).float().mean().item() == pytest.approx(probability, abs=2e-4)
        assert torch.all(confidence[tokens == token] == probability)


def test_the_largest_draw_takes_a_token_that_was_kept():
    most = torch.full((500,), 1 - 2**-24)
    logits = torch.tensor([[0.0, 5.0, 1.0]]).expand(500, 3)
    tokens, confidence = guess(logits, Decoding(temperature=1.0, top_p=0.5), most)
    assert torch.all(tokens == 1) and torch.all(confidence == 1)
    logits = torch.randn(500, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, 2000:] = -torch.inf  # sums of 2000 probabilities may end below the largest draw
    tokens, confidence = guess(logits, Decoding(temperature=1.0), most)
    assert tokens.max() < 2000 and confidence.min() > 0


def test_confidence_at_the_threshold_is_not_revealed_and_ties_reveal_the_first(tied):
    limit = Decoding(threshold=0.3).resolve(tied).threshold
    assert limit == torch.tensor(0.3).item() != 0.3  # compared in float32, as confidences are
    assert accept([0.2, limit, 0.9], limit) == [2]
    assert accept([0.5, 0.8, 0.8], 1.0) == [1]
    assert accept([1.0, 1.0], 1.0) == [0]
    assert accept([0.1, 0.2], 0.0) == [0, 1]


def test_a_prefix_ends_at_the_first_guess_that_is_not_above_the_threshold(tied):
    assert accept([0.95, 0.99, 0.5, 0.99], 0.9, prefix=True) == [0, 1]
    assert accept([0.5, 0.99, 0.99], 0.9, prefix=True) == [0, 1, 2]  # the first one is always kept
    assert accept([0.5, 0.9, 0.99], 0.9, prefix=True) == [0]  # strictly above
    for step in decode(tied, [[1, 2, 3]], Decoding(8, 8, 0.4, max_new_tokens=40, accept="prefix", **FREE)):
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
    tokens, confidence = guess(logits, Decoding(temperature=temperature, top_k=1), torch.rand(3))
    assert torch.equal(tokens, logits.argmax(-1)) and torch.all(confidence == 1)


def test_confidence_is_float32_whatever_the_weights(folders):
    model, _ = load(folders["untied"], "cpu", "bfloat16")
    steps = decode(model, [[5, 6, 7]], Decoding(8, threshold=0.0, max_new_tokens=3))
    confidence = torch.tensor([kept.confidence for step in steps for kept in step.revealed])
    assert torch.any(confidence != confidence.bfloat16())


# --- Golden vectors ---


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_generate_equals_golden_tokens_and_passes_and_recomputing_changes_none(golden_models, case):
    model, prompts = golden_models[case["checkpoint"]], [case["prompt"]]
    steps = list(decode(model, prompts, decoding_of(case)))
    assert tokens_of(steps) == case["tokens"]
    assert Counter(f"{step.kind}:{len(step.tokens)}" for step in steps) == case["passes"]
    if case["cache"] == "block":
        assert tokens_of(decode(model, prompts, decoding_of(case, cache="none"))) == case["tokens"]


@pytest.mark.parametrize("cache", ["none", "block", "dual"])
@pytest.mark.parametrize("size", [1, 8, 48])
def test_tokens_do_not_depend_on_the_pieces_of_a_long_prompt(untied, monkeypatch, cache, size):
    prompts = [prompt_of(random.Random(n), 100 - 13 * n) for n in range(4)]
    knobs = Decoding(size, min(size, 8), 0.6, cache, 30, batch_size=3, **FREE)
    whole = generate(untied, prompts, knobs)
    monkeypatch.setattr(fastdllm, "PIECE", 16)
    pieces = list(decode(untied, prompts, knobs))
    for n, result in enumerate(whole):
        assert tokens_of(step for step in pieces if step.prompt == n) == result.tokens
    if cache != "none":
        widest = max(len(step.tokens) for step in pieces if step.kind == "prefill")
        assert widest == fastdllm.round_up(16, size)


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
def test_block_size_1_equals_a_naive_greedy_loop(untied):
    ids = prompt_of(random.Random(1), 11)
    for _ in range(40):
        hidden = untied(torch.tensor([ids]), torch.arange(len(ids))[None], causal_attend)
        ids.append(untied.logits(hidden)[0, -1].argmax().item())
    [result] = generate(untied, [ids[:11]], Decoding(block_size=1, max_new_tokens=40, **FREE))
    assert result.tokens == ids[11:]
    assert result.passes == {"prefill": 1, "commit": 39}


@pytest.mark.parametrize("cache", ["none", "block", "dual"])
def test_max_new_tokens_cuts_exactly_and_spends_nothing_on_what_is_cut(tied, cache):
    prompt, knobs = prompt_of(random.Random(2), 13), Decoding(8, 4, 0.5, cache, 30, **FREE)
    steps = list(decode(tied, [prompt], knobs))
    for n in range(1, 31):
        [cut] = generate(tied, [prompt], replace(knobs, max_new_tokens=n))
        assert cut.tokens == tokens_of(steps)[:n] and cut.finish_reason == "length"
        needed = next(i for i in range(1, 99) if len(tokens_of(steps[:i])) >= n)
        assert sum(cut.passes.values()) == needed


@pytest.mark.parametrize("cache", ["none", "block", "dual"])
def test_a_stop_cuts_after_its_first_occurrence(untied, cache):
    prompt, knobs = prompt_of(random.Random(3), 21), Decoding(16, 8, 0.5, cache, 48, **FREE)
    [free] = generate(untied, [prompt], knobs)
    assert generate(untied, [prompt], replace(knobs, stop_token_ids=set(prompt) - set(free.tokens))) == [free]
    for stop in set(free.tokens):
        [result] = generate(untied, [prompt], replace(knobs, stop_token_ids=(stop, 301)))
        assert result.tokens == free.tokens[: free.tokens.index(stop) + 1]
        assert result.finish_reason == "stop"
        assert sum(result.passes.values()) <= sum(free.passes.values())


def test_the_default_sub_block_divides_every_block_and_a_given_one_must(untied):
    for size, sub in [(32, 8), (12, 4), (4, 4), (7, 1), (1, 1)]:
        assert Decoding(size).resolve(untied).sub_block_size == sub
    for size, sub in [(32, 5), (12, 8), (4, 8), (8, 16)]:
        with pytest.raises(InputError, match=f"{sub} does not divide block_size {size}"):
            decode(untied, [[1, 2, 3]], Decoding(size, sub))


def test_mask_and_padding_ids_are_never_guessed(folders):
    model, _ = load(folders["untied"], "cpu")
    model.lm_head.weight.data[:] = 0  # all ids are equally likely: the first allowed one is the argmax
    model.config = replace(model.config, mask_token_id=0, tokenizer_size=2)
    for knobs in [Decoding(8), Decoding(1), Decoding(8, temperature=1.0, seed=0)]:
        steps = decode(model, [[1, 1, 1]], replace(knobs, max_new_tokens=20, **FREE))
        assert tokens_of(itertools.islice(steps, 100)) == [1] * 20  # a guessed mask is guessed for ever


@pytest.mark.parametrize("prompt, message", [
    ([], "empty"), ([320], "320, outside the vocabulary of 320"), ([-1], "-1, outside"), ([5, 310], "mask token"),
    ([1] * 1000, "1256 positions, the model has 1024"),
    (["a"], "list of lists"), (5, "list of lists"), ([1.5], "list of lists"),
])  # fmt: skip
def test_bad_prompts_are_refused_before_anything_runs(untied, prompt, message):
    with pytest.raises(InputError, match=message):
        decode(untied, [[1, 2], prompt], Decoding())


@pytest.mark.parametrize("knobs", [
    {"threshold": 1.1}, {"threshold": -0.1}, {"threshold": float("nan")}, {"cache": "triple"}, {"top_p": 2.0},
    {"max_new_tokens": None}, {"block_size": 8.0}, {"stop_token_ids": ("a",)}, {"stop_token_ids": 5},
    {"seed": 2**70}, {"seed": -1}, {"stop_token_ids": [-1]}, {"max_new_tokens": 0}, {"top_p": None}, {"top_k": 0}, {"accept": "all"},
    {"temperature": -1.0}, {"block_size": 10**6}, {"block_size": 0}, {"sub_block_size": 0}, {"batch_size": 0},
])  # fmt: skip
def test_bad_options_are_refused(untied, knobs):
    with pytest.raises(InputError, match=next(iter(knobs))):
        Decoding(**knobs).resolve(untied)


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
    more = {"stop_token_ids": rng.sample(range(280), 20), "seed": seed, "batch_size": 3}
    threshold, most = rng.choice([0.3, 0.6, 1.0]), rng.randrange(2, 40)
    knobs = Decoding(size, sub, threshold, cache, most, temperature, 0.9, **more)
    together = generate(model, prompts, knobs)
    assert together == [generate(model, [prompt], knobs)[0] for prompt in prompts]
    assert len({len(result.tokens) for result in together}) > 1  # some stop early


def test_a_cache_full_of_nan_never_leaks(untied, monkeypatch):
    prompts = [prompt_of(random.Random(5), n) for n in (3, 16, 29, 40, 8)]
    all_knobs = [Decoding(8, 4, 0.6, cache, 20, batch_size=3) for cache in ("none", "block", "dual")]
    clean = [generate(untied, prompts, knobs) for knobs in all_knobs]
    allocate = KVCache.__init__

    def filled(self, *args):
        allocate(self, *args)
        self.k.fill_(torch.nan)
        self.v.fill_(torch.nan)

    monkeypatch.setattr(KVCache, "__init__", filled)
    assert [generate(untied, prompts, knobs) for knobs in all_knobs] == clean


def test_seeds_reproduce_no_seed_varies_and_a_blocks_first_token_is_drawn_too(untied):
    knobs = Decoding(8, temperature=1.5, max_new_tokens=30, **FREE)
    seeds = (1, 1, *range(2, 20))
    seeded = [generate(untied, [[1] * 8], replace(knobs, seed=seed))[0].tokens for seed in seeds]
    assert seeded[0] == seeded[1] != seeded[2]
    assert len({tokens[0] for tokens in seeded}) > 1
    free = generate(untied, [[1, 2, 3]] * 2, knobs)
    assert free[0].tokens != free[1].tokens


@pytest.mark.parametrize("size, cache", [(1, "block"), (8, "block"), (8, "dual")])
def test_rows_share_passes_and_prompts_of_nearly_the_same_length_their_prefill(
    untied, monkeypatch, size, cache
):
    run, passes = fastdllm.run_steps, []
    prompts = [prompt_of(random.Random(n), length) for n, length in enumerate((62, 49, 40, 80, 120))]
    knobs = Decoding(size, min(size, 4), 0.6, cache, 20, **FREE)
    alone = [generate(untied, [prompt], knobs)[0].tokens for prompt in prompts]
    monkeypatch.setattr(fastdllm, "run_steps", lambda *given: passes.append(given[3]) or run(*given))
    assert [result.tokens for result in generate(untied, prompts, knobs)] == alone
    assert [len(steps) for steps in passes if steps[0].kind == "prefill"] == [3, 2]
    assert sum(map(len, passes)) / len(passes) > 2.5


def test_weights_that_give_no_numbers_are_reported(folders):
    model, _ = load(folders["untied"], "cpu")
    model.model.norm.weight.data[:] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="is NaN"):
            generate(model, [[1, 2]], Decoding(temperature=temperature))


def test_no_prompts_give_no_results(untied):
    assert generate(untied, [], Decoding()) == []


# --- A cache that is kept ---


@pytest.mark.parametrize("cache", ["block", "dual"])
def test_a_kept_cache_gives_the_same_tokens_and_runs_only_what_is_new(untied, cache):
    rng, knobs = random.Random(6), Decoding(8, 4, 0.6, cache, 21, **FREE)
    prompt, kept, committed = [], KVCache(untied.config, 1, 1, untied.weight), 0
    for _ in range(4):
        prompt = prompt + prompt_of(rng, rng.randrange(1, 30))
        steps = list(decode(untied, [prompt], knobs, cache=kept, cached=committed))
        [fresh] = generate(untied, [prompt], knobs)
        assert tokens_of(steps) == fresh.tokens
        whole = len(prompt) // 8 * 8
        first = min(committed, whole - 8 * (whole == len(prompt)))
        prefilled = [(step.start, len(step.tokens)) for step in steps if step.kind == "prefill"]
        assert prefilled == ([(first, whole - first)] if first < whole else [])
        prompt, committed = prompt + fresh.tokens, steps[-1].committed


def test_a_kept_cache_is_for_one_prompt_and_recorded_passes_have_their_own(untied):
    kept, recorded = KVCache(untied.config, 2, 64, untied.weight), RecordedPasses(untied, record=False)
    with pytest.raises(InputError, match="one prompt, not 2"):
        decode(untied, [[1], [2]], Decoding(), cache=kept)
    with pytest.raises(InputError, match="have a cache of their own"):
        decode(untied, [[1]], Decoding(), recorded, kept)


@pytest.mark.parametrize("positions", [-32, 5, 96])
def test_cached_positions_are_whole_blocks_that_the_cache_holds(untied, positions):
    for cache in None, KVCache(untied.config, 1, 64, untied.weight):
        with pytest.raises(InputError, match=f"cached is {positions}, it must be whole blocks"):
            decode(untied, [[1] * 100], Decoding(32), cache=cache, cached=positions)
    with pytest.raises(InputError, match="cached is 32"):
        decode(untied, [[1] * 100], Decoding(32), cached=32)
