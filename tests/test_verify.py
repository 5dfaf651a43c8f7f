"""Verified drafts: the answer is that of AR decoding, whatever was drafted."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

import fastdllm
from fastdllm import Config, Decoding, InputError, Memory, Qwen2, VerifiedRow, accept, decode, generate


@pytest.fixture(scope="module")
def models(golden_models) -> list[Qwen2]:
    """The golden checkpoints, and random weights with a vocabulary of 3, whose drafts are often right by
    chance.
    """
    torch.manual_seed(0)
    lucky = Qwen2(Config(64, 32, 48, 1, 4, 2, 8, 512, block_size=8, mask_token_id=63, tokenizer_size=3))
    return [*golden_models.values(), lucky.eval().requires_grad_(False)]


def random_setting(rng, model) -> tuple[list[list[int]], Decoding]:
    top = min(280, model.config.tokenizer_size or 280)
    prompts = [[rng.randrange(top) for _ in range(rng.randrange(1, 40))] for _ in range(rng.randrange(1, 12))]
    stops = tuple(rng.sample(range(top), min(top - 1, rng.choice([0, 0, 3, 20]))))
    return prompts, Decoding(
        verify=True,
        draft_width=rng.randrange(1, 12),
        draft_ahead=rng.random() < 0.5,
        draft_confidence=rng.choice([0.0, 0.0, 0.05, 0.3, 1.0]),
        max_new_tokens=rng.randrange(1, 16),
        stop_token_ids=stops,
        batch_size=rng.randrange(1, 9),
        seed=rng.randrange(1000),
    )


def as_ar(decoding: Decoding) -> Decoding:
    return replace(decoding, verify=False, block_size=1)


@pytest.mark.parametrize("part", range(4))
def test_verified_answers_are_ar_answers_in_2000_settings(models, part):
    rng, settings = random.Random(part), 0
    while settings < 500:
        model = models[settings % len(models)]
        prompts, knobs = random_setting(rng, model)
        if settings % 5 == 0:
            knobs = replace(knobs, temperature=rng.choice([0.5, 1.0, 2.0]), top_p=rng.choice([0.8, 1.0]))
        verified, plain = generate(model, prompts, knobs), generate(model, prompts, as_ar(knobs))
        assert [r.tokens for r in verified] == [r.tokens for r in plain], (prompts, knobs)
        assert [r.finish_reason for r in verified] == [r.finish_reason for r in plain]
        assert all(v.forward_passes <= p.forward_passes for v, p in zip(verified, plain))
        settings += len(prompts)


def test_no_draft_behind_the_end_of_an_answer_counts_as_refused(shipped):
    model, tokenizer = shipped
    prompts = [tokenizer.chat([{"role": "user", "content": f"{n}+4"}]) for n in range(8)]
    last = {pass_.row: pass_ for pass_ in decode(model, prompts, Decoding(verify=True, draft_width=20))}
    results = generate(model, prompts, Decoding(block_size=1))
    for row, (prompt, result) in enumerate(zip(prompts, results)):
        assert all(draft.position < len(prompt) + len(result.tokens) for draft in last[row].refused)


def test_drafts_of_the_shipped_model_are_kept_and_save_passes(shipped):
    model, tokenizer = shipped
    question = "Mia has 12 apples. She buys 7 more. How many apples does Mia have now?"
    prompt = tokenizer.chat([{"role": "user", "content": question}])
    [verified], [plain] = (
        generate(model, [prompt], k) for k in (Decoding(verify=True), Decoding(block_size=1))
    )
    assert verified.tokens == plain.tokens and len(verified.tokens) / verified.forward_passes > 2
    assert set(verified.passes) == {"prefill", "draft", "verify"}


def test_what_is_committed_was_read_causally(models):
    """The cache after verified decoding holds what one AR pass over the same tokens writes."""
    model, memory = models[0], Memory()
    knobs = Decoding(verify=True, draft_width=4, max_new_tokens=40, stop_token_ids=())
    tokens = [5, 6, 7]
    for pass_ in decode(model, [tokens], knobs, memory):
        tokens = tokens + pass_.final
    known = len(memory.tokens)
    assert memory.tokens == tokens[:known] and known >= 40
    fresh = fastdllm.KVCache(model.config, 1, known, model.weight)
    fastdllm.run_window(model, torch.tensor([tokens[:known]]), [0], fresh, 1)
    torch.testing.assert_close(memory.cache.k[:, :1, :known], fresh.k, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(memory.cache.v[:, :1, :known], fresh.v, atol=1e-4, rtol=1e-4)


def test_masks_of_a_draft_see_each_other_and_known_tokens_do_not_see_them(models):
    model, mask = models[0], models[0].config.mask_token_id
    known, width = list(range(3, 14)), 5
    row = VerifiedRow(known, Decoding(verify=True, draft_width=width).resolve(model.config), mask)
    row.take(row.next_pass(), [(20, 1.0, None)])
    draft = row.next_pass()
    assert (draft.kind, draft.tokens) == ("draft", [20] + [mask] * width)
    ids = [*known, *draft.tokens]
    n, positions = len(ids), torch.arange(len(ids))
    seen = positions[None] <= positions[:, None]
    seen[-width:] = True
    bias = fastdllm.attention_bias(seen[None], 2, torch.float32)
    attend = lambda layer, *qkv: fastdllm.grouped_attention(*qkv, bias)
    with torch.inference_mode():
        whole = model(torch.tensor([ids]), positions[None], attend)
        cache = fastdllm.KVCache(model.config, 1, n, model.weight)
        fastdllm.run_window(model, torch.tensor([known]), [0], cache, 1)
        window = fastdllm.run_window(
            model, torch.tensor([draft.tokens]), [len(known)], cache, 1, None, True, width
        )
    torch.testing.assert_close(window[0], whole[0, len(known) :], atol=1e-4, rtol=1e-4)


def test_drafts_ahead_are_those_of_a_draft_pass_after_the_kept_tokens(models):
    """Group j of a verify pass gives what a draft pass gives once the first j drafts are known."""
    model, mask, width = models[0], models[0].config.mask_token_id, 3
    knobs = Decoding(verify=True, draft_ahead=True, draft_width=width).resolve(model.config)
    known, row = list(range(3, 14)), VerifiedRow(list(range(3, 14)), knobs, mask)
    row.take(row.next_pass(), [(20, 1.0, None)])
    row.take(row.next_pass(), [(token, 0.9, None) for token in (21, 22, 23, 24)])
    ahead = row.next_pass()
    assert (ahead.kind, ahead.tokens) == ("verify", [21, 22, 23, 24] + [mask] * 4 * width)
    assert ahead.guessed[:4] == [13, 14, 15, 16] and ahead.guessed[4:10] == [14, 15, 16, 15, 16, 17]
    run = lambda cache, window, start: fastdllm.run_window(
        model, torch.tensor([window]), [start], cache, 1, None, True, width if mask in window else None
    )[0]
    with torch.inference_mode():
        caches = [fastdllm.KVCache(model.config, 1, 40, model.weight) for _ in range(2)]
        for cache in caches:
            cache.clear(0)
            run(cache, [*known, 20], 0)
        together = run(caches[0], ahead.tokens, 12)[4:].split(width)
        for j, token in enumerate([21, 22, 23, 24]):
            alone = run(caches[1], [token] + [mask] * width, 12 + j)
            torch.testing.assert_close(together[j], alone[1:], atol=1e-4, rtol=1e-4)


def test_drafts_ahead_take_fewer_passes(shipped):
    model, tokenizer = shipped
    question = "Mia has 12 apples. She buys 7 more. How many apples does Mia have now?"
    prompt = tokenizer.chat([{"role": "user", "content": question}])
    two, one = (
        generate(model, [prompt], Decoding(verify=True, draft_width=2, draft_ahead=ahead))[0]
        for ahead in (False, True)
    )
    assert one.tokens == two.tokens and one.passes["draft"] < two.passes["draft"]
    assert one.forward_passes < 0.8 * two.forward_passes


def test_a_pass_says_which_drafts_were_refused(models):
    knobs = Decoding(verify=True, draft_width=6, max_new_tokens=60, stop_token_ids=())
    passes = list(decode(models[0], [[1, 2, 3]], knobs))
    kinds = Counter(pass_.kind for pass_ in passes)
    assert kinds["prefill"] == 1 and kinds["verify"] <= kinds["draft"]
    for pass_ in passes:
        assert bool(pass_.refused) <= (pass_.kind == "verify")
        if pass_.kind == "verify":
            drafts = pass_.tokens[1:]
            assert len(pass_.revealed) + len(pass_.refused) == len(drafts) + 1
            kept = [r.token for r in pass_.revealed[:-1]]
            assert kept + [r.token for r in pass_.refused] == drafts
            if pass_.refused:  # AR's own token replaces the first draft that it disagrees with
                assert pass_.revealed[-1].position == pass_.refused[0].position
                assert pass_.revealed[-1].token != pass_.refused[0].token
        assert len(pass_.final) == len(pass_.revealed)


def test_drafts_that_are_sure_to_fail_are_not_verified(models):
    knobs = Decoding(verify=True, draft_confidence=1.0, max_new_tokens=20, stop_token_ids=())
    [result] = generate(models[0], [[1, 2, 3]], knobs)
    assert result.passes == {"prefill": 1, "draft": 19}  # each advances one token, as AR does


def test_no_pass_is_spent_beyond_the_budget(models):
    for budget in range(1, 8):
        knobs = Decoding(verify=True, draft_width=5, max_new_tokens=budget, stop_token_ids=())
        for pass_ in decode(models[-1], [[1, 2, 0]], knobs):
            assert pass_.start + len(pass_.tokens) <= 3 + budget and not pass_.finish_reason == "stop"


@pytest.mark.parametrize("knobs, words", [
    ({"cache": "dual"}, "cache must be block, not dual"),
    ({"cache": "none"}, "cache must be block, not none"),
    ({"fuse_commit": True}, "leave fuse_commit out"),
    ({"draft_width": 0}, "draft_width"),
    ({"draft_confidence": 1.5}, "draft_confidence"),
])  # fmt: skip
def test_options_that_contradict_verification_are_refused(knobs, words):
    with pytest.raises(InputError, match=words):
        Decoding(verify=True, **knobs)


def test_a_model_without_masks_cannot_draft(models):
    plain = Qwen2(Config(64, 32, 48, 1, 4, 2, 8, 128))
    with pytest.raises(InputError, match="cannot draft; load an adapter"):
        decode(plain, [[1]], Decoding(verify=True))
    with pytest.raises(InputError, match="draft_width 30 needs passes of 961 tokens, more than 512"):
        decode(models[-1], [[1]], Decoding(verify=True, draft_width=30, draft_ahead=True)).close()
    with pytest.raises(InputError, match="leave block_size 4 out"):
        decode(models[0], [[1]], Decoding(4, verify=True))


# --- Accept ---


def test_a_prefix_ends_at_the_first_guess_that_is_not_above_the_threshold():
    assert accept([0.95, 0.99, 0.5, 0.99], 0.9, prefix=True) == [0, 1]
    assert accept([0.5, 0.99, 0.99], 0.9, prefix=True) == [0, 1, 2]  # the first one is always kept
    assert accept([0.5, 0.9, 0.99], 0.9, prefix=True) == [0]  # strictly above
    assert accept([0.1], 0.9, prefix=True) == [0]


def test_prefix_acceptance_reveals_from_left_to_right(golden_models):
    knobs = Decoding(8, 8, 0.4, max_new_tokens=40, stop_token_ids=(), accept="prefix")
    for pass_ in decode(golden_models["tied"], [[1, 2, 3]], knobs):
        positions = [kept.position for kept in pass_.revealed]
        assert positions == pass_.guessed[: len(positions)]
