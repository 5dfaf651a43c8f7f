"""Verified drafts: the answer is that of AR decoding, whatever was drafted."""

import random
from collections import Counter

import pytest
import torch
from windows import masked_forward, prompt_of, run_sees, run_window

from fast import RecordedPasses, prepack
from fastdllm import Config, Decoding, InputError, KVCache, Qwen2, decode, generate
from verify import Verified, VerifiedRow, draft_window


@pytest.fixture(scope="module")
def models(golden_models) -> list[Qwen2]:
    """The golden checkpoints, and random weights with a vocabulary of 3, whose drafts are often right by
    chance.
    """
    torch.manual_seed(0)
    lucky = Qwen2(Config(64, 32, 48, 1, 4, 2, 8, 512, block_size=8, mask_token_id=63, tokenizer_size=3))
    return [*golden_models.values(), lucky.eval().requires_grad_(False)]


def random_setting(rng, model) -> tuple[list[list[int]], dict, dict]:
    """Prompts, options that AR has too, and options of drafts."""
    top = min(280, model.config.tokenizer_size or 280)
    prompts = [prompt_of(rng, rng.randrange(1, 40), top) for _ in range(rng.randrange(1, 12))]
    common = {
        "max_new_tokens": rng.randrange(1, 16),
        "stop_token_ids": tuple(rng.sample(range(top), min(top - 1, rng.choice([0, 0, 3, 20])))),
        "batch_size": rng.randrange(1, 9),
        "seed": rng.randrange(1000),
    }
    return prompts, common, {"draft_width": rng.randrange(1, 12), "draft_ahead": rng.random() < 0.5}


@pytest.mark.parametrize("part", range(4))
def test_verified_answers_are_ar_answers_in_2000_settings(models, part):
    rng, settings = random.Random(part), 0
    while settings < 500:
        model = models[settings % len(models)]
        prompts, common, drafts = random_setting(rng, model)
        if settings % 5 == 0:
            common |= {"temperature": rng.choice([0.5, 1.0, 2.0]), "top_p": rng.choice([0.8, 1.0])}
        verified = generate(model, prompts, Verified(**common, **drafts))
        plain = generate(model, prompts, Decoding(1, **common))
        assert [r.tokens for r in verified] == [r.tokens for r in plain], (prompts, common, drafts)
        assert [r.finish_reason for r in verified] == [r.finish_reason for r in plain]
        assert all(v.forward_passes <= p.forward_passes for v, p in zip(verified, plain))
        settings += len(prompts)


def test_drafts_of_the_shipped_model_are_kept_and_ahead_takes_fewer_passes(shipped):
    model, tokenizer = shipped
    question = "Mia has 12 apples. She buys 7 more. How many apples does Mia have now?"
    prompt = tokenizer.chat([{"role": "user", "content": question}])
    plain, verified, two, ahead = (
        generate(model, [prompt], knobs)[0]
        for knobs in (
            Decoding(1),
            Verified(),
            Verified(draft_width=2),
            Verified(draft_width=2, draft_ahead=True),
        )
    )
    assert verified.tokens == two.tokens == ahead.tokens == plain.tokens
    assert len(verified.tokens) / verified.forward_passes > 2
    assert set(verified.passes) == {"prefill", "draft", "verify"}
    assert ahead.passes["draft"] < two.passes["draft"]
    assert ahead.forward_passes < 0.8 * two.forward_passes


def test_what_is_committed_was_read_causally(models):
    """The cache after verified decoding holds what one AR pass over the same tokens writes."""
    model, kept = models[0], KVCache(models[0].config, 1, 64, models[0].weight)
    tokens = [5, 6, 7]
    for step in decode(
        model, [tokens], Verified(draft_width=4, max_new_tokens=40, stop_token_ids=()), cache=kept
    ):
        tokens = tokens + step.final
        known = step.committed
    assert known >= 40
    fresh = KVCache(model.config, 1, known, model.weight)
    with torch.inference_mode():
        run_window(model, torch.tensor([tokens[:known]]), [0], fresh, 1)
    torch.testing.assert_close(kept.k[:, :1, :known], fresh.k[:, :, :known], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept.v[:, :1, :known], fresh.v[:, :, :known], atol=1e-4, rtol=1e-4)


def first_steps(model, known, **options):
    """A row that has prefilled `known` and got token 20, and its next step."""
    row = VerifiedRow(known, Verified(**options).resolve(model), model.config.mask_token_id)
    row.take(row.next_pass(), [(20, 1.0)])
    return row, row.next_pass()


@torch.inference_mode()
def test_masks_of_a_draft_see_each_other_and_known_tokens_do_not_see_them(models):
    model, known, width = models[0], list(range(3, 14)), 5
    _, draft = first_steps(model, known, draft_width=width)
    assert (draft.kind, draft.tokens) == ("draft", [20] + [model.config.mask_token_id] * width)
    ids = [*known, *draft.tokens]
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    seen[-width:] = True
    cache = KVCache(model.config, 1, len(ids), model.weight)
    run_window(model, torch.tensor([known]), [0], cache, 1)
    window = run_sees(
        model, torch.tensor([draft.tokens]), [len(known)], cache, [draft.sees], Verified(), True
    )
    whole = masked_forward(model, ids, seen)
    torch.testing.assert_close(window[0], whole[0, len(known) :], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_drafts_ahead_are_those_of_a_draft_pass_after_the_kept_tokens(models):
    """Group j of a verify pass gives what a draft pass gives once the first j drafts are known."""
    model, mask, width, known = models[0], models[0].config.mask_token_id, 3, list(range(3, 14))
    row, draft = first_steps(model, known, draft_ahead=True, draft_width=width)
    row.take(draft, [(token, 0.9) for token in (21, 22, 23, 24)])
    ahead = row.next_pass()
    assert (ahead.kind, ahead.tokens) == ("verify", [21, 22, 23, 24] + [mask] * 4 * width)
    assert ahead.positions[:4] == [13, 14, 15, 16] and ahead.positions[4:10] == [14, 15, 16, 15, 16, 17]
    run = lambda cache, window, start, sees: run_sees(
        model, torch.tensor([window]), [start], cache, [sees], Verified(), mask in window
    )[0]
    caches = [KVCache(model.config, 1, 40, model.weight) for _ in range(2)]
    for cache in caches:
        run(cache, [*known, 20], 0, draft_window(0, len(known) + 1, 0))
    together = run(caches[0], ahead.tokens, 12, ahead.sees)[4:].split(width)
    for j, token in enumerate([21, 22, 23, 24]):
        alone = run(caches[1], [token] + [mask] * width, 12 + j, draft_window(12 + j, 1, width))
        torch.testing.assert_close(together[j], alone[1:], atol=1e-4, rtol=1e-4)


def test_a_step_shows_which_drafts_were_kept(models):
    knobs = Verified(draft_width=6, max_new_tokens=60, stop_token_ids=())
    steps = list(decode(models[0], [[1, 2, 3]], knobs))
    kinds = Counter(step.kind for step in steps)
    assert kinds["prefill"] == 1 and kinds["verify"] <= kinds["draft"]
    for step in steps:
        assert len(step.final) == len(step.revealed)
        if step.kind == "verify":
            kept, drafts = [guess.token for guess in step.revealed[:-1]], step.tokens[1:]
            assert kept == drafts[: len(kept)]
            if len(kept) < len(drafts):  # AR's own token replaces the first draft that it disagrees with
                assert step.revealed[-1].token != drafts[len(kept)]


def test_no_pass_is_spent_beyond_the_budget(models):
    for budget in range(1, 8):
        knobs = Verified(draft_width=5, max_new_tokens=budget, stop_token_ids=())
        for step in decode(models[-1], [[1, 2, 0]], knobs):
            assert step.start + len(step.tokens) <= 3 + budget and not step.finish_reason == "stop"


@pytest.mark.parametrize("knobs, words", [
    ({"cache": "dual"}, "cache must be block, not dual"),
    ({"cache": "none"}, "cache must be block, not none"),
    ({"block_size": 32}, "leave block_size 32 out"),
    ({"sub_block_size": 8}, "leave sub_block_size 8 out"),
    ({"threshold": 0.9}, "leave threshold 0.9 out"),
    ({"accept": "prefix"}, "leave accept prefix out"),
    ({"draft_width": 0}, "draft_width"),
])  # fmt: skip
def test_options_that_contradict_verification_are_refused(knobs, words):
    with pytest.raises(InputError, match=words):
        Verified(**knobs)


def test_a_model_without_masks_cannot_draft(models):
    plain = Qwen2(Config(64, 32, 48, 1, 4, 2, 8, 128))
    with pytest.raises(InputError, match="cannot draft; load an adapter"):
        decode(plain, [[1]], Verified())
    with pytest.raises(InputError, match="draft_width 30 needs passes of 961 tokens, more than 512"):
        decode(models[-1], [[1]], Verified(draft_width=30, draft_ahead=True))


# --- Bits ---


@pytest.fixture(scope="module")
def wide_model() -> Qwen2:
    """Random bfloat16 weights of some width: logits are nearly equal, so that every lost bit shows."""
    torch.manual_seed(0)
    model = Qwen2(
        Config(2000, 256, 512, 4, 8, 2, 32, 512, block_size=8, mask_token_id=1999, tokenizer_size=1999)
    )
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.06)
    return model.eval().requires_grad_(False).bfloat16()


@pytest.mark.parametrize("batch_size, temperature, width", [(1, 0.0, 3), (1, 1.0, 8), (4, 0.0, 5)])
def test_verified_answers_are_ar_answers_in_bfloat16(wide_model, batch_size, temperature, width):
    model, prompts = prepack(wide_model), [prompt_of(random.Random(n), 5 + 3 * n, 1999) for n in range(5)]
    common = {"max_new_tokens": 40, "batch_size": batch_size, "temperature": temperature, "seed": 0}
    plain = generate(model, prompts, Decoding(1, **common))
    verified = generate(model, prompts, Verified(draft_width=width, **common))
    assert [r.tokens for r in verified] == [r.tokens for r in plain]


# --- Recorded passes ---


def test_recorded_passes_tell_drafts_of_other_widths_apart(shipped):
    """A draft of 8 masks, and a verification of 2 drafts with 2 masks after each token, are both 9 tokens wide."""
    model, tokenizer = shipped
    prompt = tokenizer.chat(
        [{"role": "user", "content": "Mia has 12 apples. She buys 7 more. How many now?"}]
    )
    recorded = RecordedPasses(model, record=False)
    for width, ahead in (8, False), (2, True), (8, False):
        knobs = Verified(draft_width=width, draft_ahead=ahead)
        assert generate(model, [prompt], knobs, recorded) == generate(model, [prompt], knobs)
