"""Verified drafts: the answer is that of AR decoding, whatever was drafted."""

import copy
import random
from itertools import islice

import pytest
import torch
from windows import masked_forward, prompt_of, run_sees, run_window

import verify
from fast import RecordedPasses, prepack
from fastdllm import Config, Decoding, InputError, KVCache, Qwen2, decode, generate
from tiny.problems import problems
from verify import Verified, VerifiedRow, add_adapter, choose_drafts, draft_window


@pytest.fixture(scope="module")
def lucky() -> Qwen2:
    """Random weights with a vocabulary of 3, whose drafts are often right by chance."""
    torch.manual_seed(0)
    config = Config(64, 32, 48, 1, 4, 2, 8, 512, block_size=8, mask_token_id=63, tokenizer_size=3)
    return Qwen2(config).eval().requires_grad_(False)


@pytest.mark.parametrize("part", range(4))
def test_verified_answers_are_ar_answers_in_2000_settings(untied, tied, lucky, part):
    rng, settings = random.Random(part), 0
    while settings < 500:
        model = (untied, tied, lucky)[settings % 3]
        top = 3 if model is lucky else 280
        prompts = [prompt_of(rng, rng.randrange(1, 40), top) for _ in range(rng.randrange(1, 12))]
        stops = rng.sample(range(top), min(top - 1, rng.choice([0, 0, 3, 20])))
        common = {
            "max_new_tokens": rng.randrange(1, 16),
            "stop_token_ids": stops,
            "batch_size": rng.randrange(1, 9),
        }
        if settings % 5 == 0:
            common |= {
                "temperature": rng.choice([0.5, 1.0, 2.0]),
                "top_p": rng.choice([0.8, 1.0]),
                "seed": part,
            }
        drafts = {"draft_width": rng.randrange(1, 12), "draft_ahead": rng.random() < 0.5}
        verified = generate(model, prompts, Verified(**common, **drafts))
        plain = generate(model, prompts, Decoding(1, **common))
        for v, p in zip(verified, plain):
            assert (v.tokens, v.finish_reason) == (p.tokens, p.finish_reason), (prompts, common, drafts)
            assert v.forward_passes <= p.forward_passes
        settings += len(prompts)


def test_drafts_of_the_shipped_model_are_kept_and_ahead_takes_fewer_passes(shipped):
    model, tokenizer = shipped
    question = "Mia has 12 apples. She buys 7 more. How many apples does Mia have now?"
    prompts = [tokenizer.chat([{"role": "user", "content": question}])]
    ways = Decoding(1), Verified(), Verified(draft_width=2), Verified(draft_width=2, draft_ahead=True)
    [plain], [verified], [two], [ahead] = (generate(model, prompts, way) for way in ways)
    assert verified.tokens == two.tokens == ahead.tokens == plain.tokens
    assert len(verified.tokens) / verified.forward_passes > 2
    assert set(verified.passes) == {"prefill", "draft", "verify"}
    assert ahead.passes["draft"] < two.passes["draft"]
    assert ahead.forward_passes < 0.8 * two.forward_passes


def test_rows_near_their_end_share_passes_with_the_others(shipped, monkeypatch):
    """Each answer is cut by its limit, where drafts are shorter; 16 places, most of which are in each pass."""
    model, tokenizer = shipped
    chats = [[{"role": "user", "content": p["question"]}] for p in islice(problems("heldout", 0), 48)]
    forward, rows = model.forward, []
    monkeypatch.setattr(
        model, "forward", lambda tokens, *given: (rows.append(len(tokens)), forward(tokens, *given))[1]
    )
    prompts = [tokenizer.chat(chat) for chat in chats]
    generate(model, prompts, Verified(draft_width=5, max_new_tokens=64, stop_token_ids=()))
    assert sum(rows) / len(rows) > 9  # 11.5; 6.9 if shorter drafts wait for each other


def first_steps(model, known, **options):
    """A row that has prefilled `known` and got token 20, and its next step."""
    row = VerifiedRow(known, Verified(**options).resolve(model), model.config.mask_token_id)
    row.take(row.next_pass(), [(20, 1.0)])
    return row, row.next_pass()


def run_draft(model, cache, tokens, start, sees):
    """Hidden states of a window of known tokens and masks."""
    has_masks = model.config.mask_token_id in tokens
    return run_sees(model, torch.tensor([tokens]), [start], cache, [sees], Verified(), has_masks)[0]


@torch.inference_mode()
def test_masks_of_a_draft_see_each_other_and_known_tokens_do_not_see_them(untied):
    known, width, mask = list(range(3, 14)), 5, untied.config.mask_token_id
    _, draft = first_steps(untied, known, draft_width=width)
    assert (draft.kind, draft.tokens) == ("draft", [20] + [mask] * width)
    ids = [*known, *draft.tokens]
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    seen[-width:] = True
    cache = KVCache(untied.config, 1, len(ids), untied.weight)
    run_window(untied, torch.tensor([known]), [0], cache, 1)
    window = run_draft(untied, cache, draft.tokens, len(known), draft.sees)
    whole = masked_forward(untied, ids, seen)[0, len(known) :]
    torch.testing.assert_close(window, whole, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_drafts_ahead_are_those_of_a_draft_pass_after_the_kept_tokens(untied):
    """Group j of a verify pass gives what a draft pass gives once the first j drafts are known."""
    width, known, mask = 3, list(range(3, 14)), untied.config.mask_token_id
    row, draft = first_steps(untied, known, draft_ahead=True, draft_width=width)
    row.take(draft, [(token, 0.9) for token in (21, 22, 23, 24)])
    ahead = row.next_pass()
    assert (ahead.kind, ahead.tokens) == ("verify", [21, 22, 23, 24] + [mask] * 4 * width)
    assert ahead.positions[:4] == [13, 14, 15, 16] and ahead.positions[4:10] == [14, 15, 16, 15, 16, 17]
    one, other = (KVCache(untied.config, 1, 40, untied.weight) for _ in range(2))
    for cache in one, other:
        run_window(untied, torch.tensor([[*known, 20]]), [0], cache, 1)
    together = run_draft(untied, one, ahead.tokens, 12, ahead.sees)[4:].split(width)
    for j, token in enumerate([21, 22, 23, 24]):
        alone = run_draft(untied, other, [token] + [mask] * width, 12 + j, draft_window(12 + j, 1, width))
        torch.testing.assert_close(together[j], alone[1:], atol=1e-4, rtol=1e-4)


def test_no_pass_is_spent_beyond_the_budget(lucky):
    for budget in range(1, 8):
        knobs = Verified(draft_width=5, max_new_tokens=budget, stop_token_ids=())
        for step in decode(lucky, [[1, 2, 0]], knobs):
            assert step.start + len(step.tokens) <= 3 + budget and not step.finish_reason == "stop"


@pytest.mark.parametrize("knobs, words", [
    ({"cache": "dual"}, "cache must be block, not dual"), ({"cache": "none"}, "cache must be block, not none"),
    ({"block_size": 32}, "leave block_size 32 out"), ({"sub_block_size": 8}, "leave sub_block_size 8 out"),
    ({"threshold": 0.9}, "leave threshold 0.9 out"), ({"accept": "prefix"}, "leave accept prefix out"),
    ({"draft_width": 0}, "draft_width is 0"), ({"draft_width": 10**6}, "passes of 1000001 tokens, more than 512"),
    ({"draft_width": 30, "draft_ahead": True}, "draft_width 30 needs passes of 961 tokens, more than 512"),
    ({"draft_ahead": 3}, "draft_ahead is 3, it must be True or False"),
])  # fmt: skip
def test_options_that_contradict_verification_or_do_not_fit_a_pass_are_refused(untied, knobs, words):
    with pytest.raises(InputError, match=words):
        decode(untied, [[1]], Verified(**knobs))


@pytest.mark.parametrize("size, width, ahead", [(1, 1, 1), (8, 4, 1), (32, 16, 4), (64, 16, 4), (256, 16, 4)])
def test_drafts_are_half_a_block_or_ahead_an_eighth_and_passes_keep_their_bits(size, width, ahead):
    model = Qwen2(Config(64, 32, 48, 1, 4, 2, 8, 512, block_size=size, mask_token_id=63))
    chain, wide = Verified().resolve(model), Verified(draft_ahead=True).resolve(model)
    assert (chain.draft_width, wide.draft_width) == (width, ahead)
    assert max(chain.widest(), wide.widest()) <= verify.SAME_BITS


def test_a_model_without_masks_cannot_draft():
    with pytest.raises(InputError, match="cannot draft; give it an adapter"):
        decode(Qwen2(Config(64, 32, 48, 1, 4, 2, 8, 128)), [[1]], Verified())


# --- Bits ---


@pytest.fixture(scope="module")
def wide_model() -> Qwen2:
    """Random bfloat16 weights of some width: logits are nearly equal, so that every lost bit shows."""
    torch.manual_seed(0)
    masks = {"block_size": 8, "mask_token_id": 1999, "tokenizer_size": 1999}
    model = Qwen2(Config(2000, 256, 512, 4, 8, 2, 32, 512, **masks))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.06)
    return prepack(model.eval().requires_grad_(False).bfloat16())


@pytest.mark.parametrize("batch_size, temperature, width", [(1, 0.0, 3), (1, 1.0, 8), (4, 0.0, 5)])
def test_verified_answers_are_ar_answers_in_bfloat16(wide_model, batch_size, temperature, width):
    prompts = [prompt_of(random.Random(n), 5 + 3 * n, 1999) for n in range(5)]
    common = {"max_new_tokens": 40, "batch_size": batch_size, "temperature": temperature, "seed": 0}
    plain = generate(wide_model, prompts, Decoding(1, **common))
    verified = generate(wide_model, prompts, Verified(draft_width=width, **common))
    assert [r.tokens for r in verified] == [r.tokens for r in plain]


def test_a_layer_of_real_shape_gives_the_same_bits_in_windows_of_all_widths():
    """One layer of Qwen2.5-0.5B: up to 32 tokens may share a pass."""
    torch.manual_seed(0)
    config = Config(512, 896, 4864, 1, 14, 2, 64, 512, tokenizer_size=512)
    model = prepack(Qwen2(config).eval().requires_grad_(False).bfloat16())
    tokens = torch.randint(512, (1, 96))

    def hidden(width):
        cache = KVCache(config, 1, 96, model.weight)
        parts = [(i, tokens[:, i : i + width]) for i in range(0, 96, width)]
        return torch.cat([run_window(model, part, [i], cache, 1) for i, part in parts], dim=1)

    one = hidden(1)
    assert all(torch.equal(hidden(width), one) for width in (2, 5, 6, 16, 25, 32))


# --- Choice ---

# of each case: seconds of passes by (known tokens, masks behind each), and the way that is chosen
# wide passes are nearly free
FLAT = {(1, 0): 1.0, (1, 5): 1.2, (6, 0): 1.1, (1, 8): 1.25, (9, 0): 1.15, (4, 3): 1.25}
CASES = [
    (FLAT, (3, True)),
    (FLAT | {(4, 3): 2.5}, (8, False)),
    (FLAT | {(4, 3): 1.36}, (8, False)),  # drafts ahead gain less than their margin
    (FLAT | {(1, 8): 1.6, (9, 0): 1.4, (4, 3): 2.5}, (5, False)),  # each token of a pass costs
    # a slow processor: AR
    (FLAT | {(1, 5): 3.0, (6, 0): 3.0, (1, 8): 3.5, (9, 0): 3.4, (4, 3): 6.0}, (None, None)),
    # a gain of less than noise
    (FLAT | {(1, 5): 2.2, (6, 0): 2.2, (1, 8): 2.6, (9, 0): 2.5, (4, 3): 6.0}, (None, None)),
]


@pytest.mark.parametrize("seconds, chosen", CASES)
def test_the_fastest_way_by_timed_passes_is_chosen(untied, monkeypatch, seconds, chosen):
    model = copy.deepcopy(untied)
    add_adapter(model, 4, 8.0, 8).heldout_kept = [453, 332, 258, 205, 176, 113, 113, 72, 125]
    monkeypatch.setattr(verify, "time_passes", lambda *given: (seconds, True))
    given = {"max_new_tokens": 9, "temperature": 0.5, "seed": 1}
    decoding, same_bits = choose_drafts(model, Verified(**given))
    assert choose_drafts(model, Verified(draft_ahead=True, **given)) == (decoding, same_bits)
    assert (getattr(decoding, "draft_width", None), getattr(decoding, "draft_ahead", None)) == chosen
    assert (decoding.max_new_tokens, decoding.temperature, decoding.seed) == (9, 0.5, 1)
    assert decoding.block_size == 1 and same_bits
    wide, _ = choose_drafts(model.bfloat16(), Verified(batch_size=64))
    assert wide.batch_size == (64 if isinstance(wide, Verified) else verify.SAME_BITS)


def test_the_choice_is_made_by_passes_that_run(untied):
    with pytest.raises(InputError, match="needs an adapter with heldout_kept"):
        choose_drafts(untied, Verified())
    model = copy.deepcopy(untied).bfloat16()
    add_adapter(model, 4, 8.0, 5).heldout_kept = [1, 1]
    for recorded in None, RecordedPasses(model, record=False):
        decoding, same_bits = choose_drafts(model, Verified(max_new_tokens=9), rows=9, recorded=recorded)
        assert type(same_bits) is bool
        prompts = [[1, 2, 3], [4, 5]]
        assert generate(model, prompts, decoding, recorded)[0].finish_reason  # the passes are free again
