"""Training: mask, noise, loss, data, and runs that go on where they stopped."""

import copy
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import ROOT, golden
from torch.nn.attention.flex_attention import create_block_mask

import fast
import train
from fastdllm import (
    InputError,
    KVCache,
    Qwen2,
    attention_bias,
    causal_attention,
    grouped_attention,
    load,
    load_tokenizer,
    run_window,
    save,
)
from train import (
    Batch,
    Corpus,
    Trainer,
    Training,
    causal_loss,
    chat_document,
    complementary_noise,
    draw_noise,
    endless_rows,
    lay_out,
    pack,
    read_documents,
    score,
    training_attention,
    training_loss,
    training_mask,
    visibility,
    with_mask_token,
)

GOLDEN = golden("train")


@pytest.fixture(scope="module")
def trainable_models(folders) -> dict:
    return {name: load(folder, "cpu")[0] for name, folder in folders.items()}


def example(rng, B=2, L=24, prompt=5):
    tokens = torch.randint(0, 280, (B, L), generator=rng)
    trainable = torch.arange(L).expand(B, L) >= prompt
    return tokens, trainable


def masked_of(case):
    """View 1's masked positions by the golden case's t and u."""
    trainable = torch.tensor(case["trainable"]).bool()
    t = torch.tensor(case["t"]).view(len(trainable), -1).repeat_interleave(case["block_size"], dim=1)
    return trainable & (torch.tensor(case["u"]).view(trainable.shape) < 0.999 * t + 0.001)


def dense(model, length, size, clean="block"):
    """The dense training mask of one view as an `attend`."""
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    bias = attention_bias(training_mask(length, size, clean=clean)[None], groups, torch.float32)
    return lambda layer, *qkv: grouped_attention(*qkv, bias)


# --- Mask ---


@pytest.mark.parametrize("name, rows", GOLDEN["train_masks"].items())
def test_training_mask_equals_golden(name, rows):
    length, size = (int(part.lstrip("Lbd")) for part in name.split("_"))
    assert ["".join(str(int(seen)) for seen in row) for row in training_mask(length, size)] == rows


def test_two_views_see_the_clean_copy_as_one_view_does_and_never_each_other():
    mask, single = training_mask(12, 4, views=2), training_mask(12, 4)
    for view in (0, 1):
        part = [*range(12 * view, 12 * view + 12), *range(24, 36)]
        assert torch.equal(mask[part][:, part], single)
    assert not mask[:12, 12:24].any() and not mask[12:24, :12].any()


PACKED = torch.tensor([[1] * 64 + [2] * 32 + [3] * 64, [1] * 96 + [2] * 64])  # documents of two rows of 160


@pytest.mark.parametrize("documents", [None, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("views, size", [(0, 1), (1, 32), (2, 32), (2, 8)])
@pytest.mark.parametrize("kind", ["blockwise", "sparse"])
@pytest.mark.parametrize("clean", ["block", "causal"])
def test_every_attention_equals_the_dense_mask_forward_and_backward(
    rng, device, kind, views, size, documents, clean
):
    L, results = 160, []  # tiles of 128 are larger than a block, and do not divide the length
    backward = kind != "sparse" or device == "cuda"  # FlexAttention has no backward pass on CPUs
    documents = documents if documents is None else documents.to(device)
    data = [torch.randn(2, heads, (views + 1) * L, 16, generator=rng).to(device) for heads in (6, 2, 2)]
    for way in ("dense", kind):
        qkv = [x.clone().requires_grad_(backward) for x in data]
        y = training_attention(way, L, size, views, documents, torch.device(device), clean)(0, *qkv)
        if backward:
            y.sin().sum().backward()
        results.append([y, *(x.grad for x in qkv if backward)])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "length, size, views, documents", [(160, 32, 2, PACKED), (600, 8, 1, None), (512, 256, 0, None)]
)
def test_sparse_attention_runs_the_tiles_in_which_something_is_seen(length, size, views, documents):
    rows, side = None if documents is None else len(documents), (views + 1) * length
    sees = visibility(length, size, views, documents)
    mask = fast.sparse_mask(sees, rows, side, torch.device("cpu"))
    expected = create_block_mask(sees, rows, None, side, side, device="cpu")
    for tiles in "kv", "full_kv":  # seen in part, and as a whole
        counts, indices = (getattr(mask, f"{tiles}_{part}") for part in ("num_blocks", "indices"))
        assert torch.equal(counts, getattr(expected, f"{tiles}_num_blocks"))
        assert torch.equal(indices, getattr(expected, f"{tiles}_indices"))


def test_sparse_attention_skips_most_tiles():
    long = fast.sparse_mask(visibility(2048, 32, 2), None, 3 * 2048, torch.device("cpu"))
    assert long.sparsity() > 70  # percent


@pytest.mark.parametrize("compute, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_flex_attention_can_be_traced_in_a_recomputed_step_and_has_the_dense_gradients(
    trainable_models, rng, monkeypatch, compute, tolerance
):
    """The step as CUDA runs it, traced by torch.compile, backward pass included, but run by plain products."""
    monkeypatch.setattr(
        "torch.nn.attention.flex_attention._validate_device", lambda *qkv: None
    )  # CPUs: forward only
    traced = torch.compile(fast.flex_attention, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(fast, "flex_attention", traced)
    attentions, results = training_attention, []
    tokens, trainable = example(rng, L=96)
    documents = torch.tensor([[1] * 64 + [2] * 32, [1] * 32 + [2] * 64])
    masked = complementary_noise(trainable, 32, torch.Generator().manual_seed(0))
    for kind in ("dense", "sparse"):
        monkeypatch.setattr(train, "training_attention", lambda _, *rest, kind=kind: attentions(kind, *rest))
        model = copy.deepcopy(next(iter(trainable_models.values())))
        model.config = replace(model.config, block_size=32)
        how = Training(compute=str(compute).removeprefix("torch."), recompute=True)
        step, batch = (
            train.distribute(train.Objective(model, how)),
            Batch(tokens, trainable, documents, masked),
        )
        found = step(batch, {kind: batch.outputs(kind, True) for kind in ("diffusion", "ar")})
        losses = [loss for loss, _ in found.values()]
        sum(losses).backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        results.append((torch.stack(losses).detach(), gradients))
    (expected, dense), (got, sparse) = results
    torch.testing.assert_close(got, expected, atol=0, rtol=tolerance / 5)
    for name, gradient in dense.items():
        assert (sparse[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_a_causal_clean_copy_sees_no_later_position_and_views_see_whole_blocks_of_it():
    mask, whole = training_mask(12, 4, 1, clean="causal"), training_mask(12, 4)
    assert torch.equal(mask[12:, 12:], torch.ones(12, 12, dtype=torch.bool).tril())
    assert torch.equal(mask[:12], whole[:12]) and not mask[12:, :12].any()


def test_documents_see_only_themselves():
    mask = training_mask(160, 32, 2, PACKED)
    apart = PACKED.repeat(1, 3)[:, :, None] == PACKED.repeat(1, 3)[:, None]
    assert torch.equal(mask, training_mask(160, 32, 2) & apart)


# --- Noise ---


def test_noise_masks_only_trainable_positions_with_the_papers_probability():
    rng = torch.Generator().manual_seed(1)
    trainable = torch.arange(64).expand(4000, 64) >= 20
    masked = complementary_noise(trainable, 32, rng)
    assert not masked[:, :20].any()
    assert masked[:, 20:].float().mean().item() == pytest.approx(0.999 * 0.5 + 0.001, abs=0.01)
    share = (
        masked[:, 32:].float().mean(dim=1)
    )  # of a whole block: uniform, so the quarters are equally likely
    for low in (0, 0.25, 0.5, 0.75):
        assert ((share >= low) & (share < low + 0.25)).float().mean().item() == pytest.approx(0.25, abs=0.03)


# --- Loss ---


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["id"])
@pytest.mark.parametrize("kind", ["dense", "blockwise"])
def test_loss_and_gradients_equal_golden(trainable_models, case, kind):
    model = trainable_models[case["checkpoint"]]
    model.zero_grad()
    tokens, trainable = torch.tensor(case["tokens"]), torch.tensor(case["trainable"]).bool()
    before = tokens.clone(), trainable.clone()
    loss = training_loss(model, tokens, trainable, case["block_size"], masked_of(case), attention=kind)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-4)
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    total = sum(norm**2 for norm in gradients.values()) ** 0.5
    assert total == pytest.approx(case["grad_norm"], rel=1e-4)
    assert gradients["model.embed_tokens.weight"] == pytest.approx(case["embed_grad_norm"], rel=1e-4)
    for name, norm in case["grad_norms"].items():
        assert gradients.get(name, norm) == pytest.approx(norm, rel=1e-4)
    assert torch.equal(tokens, before[0]) and torch.equal(trainable, before[1])  # inputs are left as they are


def test_loss_function_equals_golden():
    logits, labels = (torch.tensor(GOLDEN["loss_function"][key]) for key in ("logits", "labels"))
    wanted = labels[:, 1:] != -100

    size = logits.shape[-1]

    class Head:
        logits = staticmethod(lambda hidden: hidden)
        config = type("", (), {"vocab_size": size})

    loss, _ = score(Head, logits[:, :-1][wanted], labels[:, 1:][wanted])
    assert loss.item() / wanted.sum().item() == pytest.approx(GOLDEN["loss_function"]["loss_mean"], abs=1e-6)
    assert wanted.sum().item() == GOLDEN["loss_function"]["terms"]


def test_chunks_of_logits_change_nothing(trainable_models, rng, monkeypatch):
    model, results, rows = trainable_models["tied"], [], []
    hidden, targets = torch.randn(50, model.config.hidden_size, generator=rng), torch.randint(0, 280, (50,))
    monkeypatch.setattr(model, "logits", lambda x: rows.append(len(x)) or model.lm_head(x))
    for largest in (2**26, 7 * model.config.vocab_size):
        model.zero_grad()
        x = hidden.clone().requires_grad_()
        loss, right = score(model, x, targets, largest)
        loss.backward()
        results.append((loss, right, x.grad, model.lm_head.weight.grad.clone()))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole)
    assert rows[0] == 50 and max(rows[1:]) == 7


def test_every_trainable_token_is_a_target_exactly_once(trainable_models, rng, monkeypatch):
    model, seen = trainable_models["tied"], []
    monkeypatch.setattr(train, "score", lambda model, hidden, targets: seen.append(targets) or [0])
    tokens, trainable = torch.arange(48).view(2, 24), example(rng)[1]
    training_loss(model, tokens, trainable, masked=complementary_noise(trainable, 8, rng))
    assert seen[0].sort().values.tolist() == tokens[trainable].tolist()
    everything = torch.ones_like(trainable)
    training_loss(model, tokens, everything, masked=complementary_noise(everything, 8, rng))
    assert (
        seen[1].sort().values.tolist() == tokens[:, 1:].flatten().tolist()
    )  # position 0 is nobody's next token


def test_no_targets_give_a_loss_of_0(trainable_models, rng):
    tokens, trainable = example(rng)
    assert training_loss(trainable_models["tied"], tokens, trainable & False) == 0


def test_one_clean_copy_for_two_views_equals_two_passes_of_view_and_clean(trainable_models, rng):
    model = trainable_models["tied"]
    (tokens, trainable), size, L = example(rng), 8, 24
    masked = complementary_noise(trainable, size, rng)
    total = 0
    for view in (masked, trainable & ~masked):
        noisy = tokens.masked_fill(view, model.config.mask_token_id)
        hidden = model(torch.cat([noisy, tokens], 1), torch.arange(L).repeat(2)[None], dense(model, L, size))
        logits = model.logits(hidden[:, : L - 1])[view[:, 1:]]
        total = total + F.cross_entropy(logits, tokens[:, 1:][view[:, 1:]], reduction="sum")
    expected = total / trainable[:, 1:].sum()
    gradients = []
    for loss in (expected, training_loss(model, tokens, trainable, masked=masked)):
        torch.testing.assert_close(loss, expected)
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("clean", ["block", "causal"])
def test_training_forward_equals_the_windows_of_decoding(golden_models, rng, clean):
    model, size, L = golden_models["tied"], 8, 24
    tokens = torch.randint(0, 280, (1, L), generator=rng)
    noisy = tokens.masked_fill(torch.rand(1, L, generator=rng) < 0.5, model.config.mask_token_id)
    both = torch.cat([noisy, tokens], 1)
    trained = model(both, torch.arange(L).repeat(2)[None], dense(model, L, size, clean))
    cache = KVCache(model.config, 1, L, model.lm_head.weight)
    for start in range(0, L, size):
        block = slice(start, start + size)
        denoised = run_window(model, noisy[:, block], [start], cache, size)
        causal = [start + size] if clean == "causal" else None
        committed = run_window(model, tokens[:, block], [start], cache, size, causal=causal)
        torch.testing.assert_close(denoised, trained[:, :L][:, block], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(committed, trained[:, L:][:, block], atol=1e-4, rtol=1e-4)


def test_the_stop_token_trains(trainable_models):
    model = trainable_models["untied"]
    model.zero_grad()
    tokens = torch.full((1, 16), model.config.stop_token_ids[0])
    training_loss(model, tokens, torch.ones(1, 16, dtype=torch.bool), 8).backward()
    assert model.model.embed_tokens.weight.grad[model.config.stop_token_ids[0]].abs().sum() > 0


def test_rows_that_are_no_whole_blocks_and_models_without_masks_are_refused(trainable_models, rng):
    tokens, trainable = example(rng, L=20)
    with pytest.raises(InputError, match="20 positions, no multiple of the block size 8"):
        training_loss(trainable_models["tied"], tokens, trainable)
    plain = Qwen2(type(trainable_models["tied"].config)(64, 32, 64, 1, 2, 1, 16, 128))
    with pytest.raises(InputError, match="no mask token"):
        training_loss(plain, tokens, trainable, 4)


def test_causal_loss_is_next_token_cross_entropy(trainable_models, rng):
    model = trainable_models["untied"]
    tokens, trainable = example(rng)
    logits = model.logits(model(tokens, torch.arange(24)[None], causal_attention))[:, :-1]
    labels = tokens[:, 1:].masked_fill(~trainable[:, 1:], -100)
    torch.testing.assert_close(
        causal_loss(model, tokens, trainable), F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    )


# --- Data ---


def test_trainable_is_what_the_assistant_wrote_with_end_token_and_newline(shipped):
    _, tokenizer = shipped
    turns = [("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e")]
    tokens, trainable = chat_document([{"role": r, "content": c} for r, c in turns], tokenizer)
    written = [t for t, mine in zip(tokens, trainable) if mine]
    assert tokenizer.decode(written, skip_special_tokens=False) == "b c<|im_end|>\ne<|im_end|>\n"
    text = "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in turns)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text


def test_a_conversation_begins_once_and_an_unanswered_question_is_left_out(shipped):
    _, tokenizer = shipped
    system = type(tokenizer)(tokenizer.encoder, "Be brief.", {})
    turns = [("user", "a"), ("assistant", "\n\nb"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    tokens, trainable = chat_document([{"role": r, "content": c} for r, c in turns], system)
    text = "".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in [("system", "Be brief."), *turns[:4]])
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    written = [t for t, mine in zip(tokens, trainable) if mine]
    assert tokenizer.decode(written, skip_special_tokens=False) == "\n\nb<|im_end|>\nd<|im_end|>\n"


def test_text_trains_whole_and_ends_with_its_end_token(tmp_path, shipped):
    (tmp_path / "data.jsonl").write_text('{"text": "Mia has 3 books."}\n')
    [(tokens, trainable)] = read_documents(tmp_path / "data.jsonl", shipped[1])
    assert shipped[1].decode(tokens, skip_special_tokens=False) == "Mia has 3 books.<|endoftext|>" and all(
        trainable
    )


BROKEN = [
    "{",
    "[]",
    '{"messages": 3}',
    '{"question": "?"}',
    '{"text": 3}',
    '{"messages": [{"role": "user"}]}',
    "\xff",
]
BROKEN += [
    '{"text": "|<MASK>|"}',
    '{"question": "?", "answer": null}',
    '{"question": ["?"], "answer": "!"}',
    "[" * 10**5,
]
BROKEN += ['{"messages": [{"role": "Assistant", "content": "!"}]}']


@pytest.mark.parametrize("line", [*BROKEN, '{"messages": [{"role": "user", "content": "?"}]}'])
def test_a_broken_line_is_named_and_refused_or_skipped(tmp_path, shipped, capsys, line):
    data, good = tmp_path / "data.jsonl", b'{"question": "?", "answer": "!"}\n'
    data.write_bytes(good + b"\n" + line.encode("latin1") + b"\n" + good)
    with pytest.raises(InputError, match="line 3: .*--broken skip"):
        list(read_documents(data, shipped[1]))
    assert len(list(read_documents(data, shipped[1], "skip"))) == 2
    assert "line 3" in capsys.readouterr().err


def prepared(tmp_path, tokenizer, count=40):
    lines = [
        json.dumps({"question": f"{n} and {n}?" * (n % 5 + 1), "answer": f"{n + n}"}) for n in range(count)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return Corpus.prepare(tmp_path / "data.jsonl", tokenizer, tmp_path / "tokens")


def test_data_is_tokenised_once_and_anew_when_it_changes(tmp_path, shipped, monkeypatch):
    _, tokenizer = shipped
    corpus = prepared(tmp_path, tokenizer)
    assert isinstance(corpus.tokens, np.memmap) and corpus.tokens.dtype == np.uint16
    documents = list(read_documents(tmp_path / "data.jsonl", tokenizer))
    for i, (tokens, trainable) in enumerate(documents):
        ids, flags = corpus.piece(i, 0, 10**6)
        assert ids.tolist() == tokens and flags.tolist() == trainable
    with monkeypatch.context() as patch:
        patch.setattr(train, "read_documents", None)  # would fail if it were read again
        Corpus.prepare(tmp_path / "data.jsonl", tokenizer, tmp_path / "tokens")
        Corpus.prepare(tmp_path / "tokens", tokenizer, tmp_path / "elsewhere")
        other = type(tokenizer)(tokenizer.encoder, "Be brief.", {})
        with pytest.raises(InputError, match="not tokenised with this tokenizer"):
            Corpus.prepare(tmp_path / "tokens", other, tmp_path / "elsewhere")
    with open(tmp_path / "data.jsonl", "a") as file:
        file.write('{"question": "?", "answer": "!"}\n')
    assert len(Corpus.prepare(tmp_path / "data.jsonl", tokenizer, tmp_path / "tokens").lengths) == 41


def test_broken_data_leaves_what_was_tokenised_before(tmp_path, shipped):
    prepared(tmp_path, shipped[1])
    before = (tmp_path / "tokens" / "tokens.bin").read_bytes()
    (tmp_path / "data.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="line 1"):
        Corpus.prepare(tmp_path / "data.jsonl", shipped[1], tmp_path / "tokens")
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no documents"):
        Corpus.prepare(tmp_path / "data.jsonl", shipped[1], tmp_path / "tokens")
    assert (tmp_path / "tokens" / "tokens.bin").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "tokens"]


# --- Packing ---

LENGTHS = np.array([5, 8, 9, 16, 3, 24, 30, 70, 1, 8])


def test_packing_keeps_documents_whole_in_whole_blocks():
    rows = pack(LENGTHS, 32, 8, "documents", np.random.default_rng(0))
    pieces = sorted(piece for row in rows for piece in row)
    padded = -(-LENGTHS // 8) * 8  # aligned ones get no further block
    long = [(7, 0, 32), (7, 32, 64), (7, 64, 72)]  # longer than a row, so cut
    assert pieces == sorted([(i, 0, n) for i, n in enumerate(padded) if i != 7] + long)
    assert all(sum(stop - start for _, start, stop in row) <= 32 for row in rows)
    assert len(rows) <= -(-padded.sum() // 32) + 1  # and hardly a hole


def test_original_packing_pads_every_document_cuts_at_rows_and_drops_the_rest():
    rows = pack(LENGTHS, 32, 8, "original", np.random.default_rng(0))
    stream = [piece for row in rows for piece in row]
    assert all(sum(stop - start for _, start, stop in row) == 32 for row in rows)
    assert len(rows) == (LENGTHS // 8 * 8 + 8).sum() // 32  # aligned ones get a whole further block
    ends = {i: max(stop for j, _, stop in stream if j == i) for i in {j for j, _, _ in stream}}
    assert sum(ends[i] == LENGTHS[i] // 8 * 8 + 8 for i in ends) >= len(ends) - 1
    plain = pack(LENGTHS, 32, 8, "concatenated", np.random.default_rng(0))
    assert len(plain) == LENGTHS.sum() // 32


def test_rows_are_laid_out_padded_with_masks_that_do_not_train(tmp_path, shipped):
    corpus = prepared(tmp_path, shipped[1])
    [row] = [
        row for row in pack(corpus.lengths, 96, 32, "documents", np.random.default_rng(0)) if len(row) == 3
    ][:1]
    batch = lay_out(corpus, [row], 96, 7, separate_documents=True)
    assert batch.documents[0].tolist() == [1] * 32 + [2] * 32 + [3] * 32
    for n, (document, start, stop) in enumerate(row):
        ids, flags = corpus.piece(document, start, stop)
        pad = 32 - len(ids)
        assert batch.tokens[0, 32 * n : 32 * n + 32].tolist() == [*ids.tolist(), *[7] * pad]
        assert batch.trainable[0, 32 * n : 32 * n + 32].tolist() == [*flags.tolist(), *[False] * pad]


def test_rows_come_in_a_seeded_order_each_document_once_an_epoch():
    how = LENGTHS, 32, 8, "documents"
    order = endless_rows(*how, seed=3)
    epochs = [[next(order) for _ in pack(*how, np.random.default_rng([3, e]))] for e in (0, 1)]
    for epoch in epochs:
        assert {document for row in epoch for document, _, _ in row} == set(range(10))
    assert epochs[0] != epochs[1]
    again = endless_rows(*how, seed=3)
    assert [next(again) for _ in epochs[0]] == epochs[0]


@pytest.mark.parametrize("objective", ["diffusion", "ar"])
def test_a_packed_row_trains_like_its_documents_alone(trainable_models, rng, objective):
    model = trainable_models["tied"]  # block size 8
    tokens, trainable = example(rng, B=1, L=40, prompt=0)
    documents = torch.tensor([[1] * 16 + [2] * 24])
    masked = complementary_noise(trainable, 8, rng)
    alone = [slice(0, 16), slice(16, 40)]
    if objective == "ar":
        packed = causal_loss(model, tokens, trainable, documents)
        losses = [causal_loss(model, tokens[:, part], trainable[:, part]) for part in alone]
    else:
        packed = training_loss(model, tokens, trainable, masked=masked, documents=documents)
        losses = [training_loss(model, tokens[:, p], trainable[:, p], masked=masked[:, p]) for p in alone]
    torch.testing.assert_close(packed, (losses[0] * 15 + losses[1] * 23) / 38)


def test_a_row_draws_its_own_noise(rng):
    batch = Batch(*example(rng, B=3), None)
    draw_noise(batch, 8, [0, 5, 0], [0, 5, 1], [0, 5, 2])
    part = Batch(batch.tokens[1:], batch.trainable[1:], None)
    draw_noise(part, 8, [0, 5, 1], [0, 5, 2])
    assert torch.equal(part.masked, batch.masked[1:]) and not torch.equal(batch.masked[0], batch.masked[1])


# --- Training ---


def test_learning_rate_warms_up_and_stays_or_falls():
    constant, cosine = (Training(steps=100, lr=1.0, warmup=10, schedule=s) for s in ("constant", "cosine"))
    rates = [constant.learning_rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:] == [1.0] * 91
    assert cosine.learning_rate(55) == pytest.approx(0.5)


@pytest.fixture
def trainer(tmp_path, shipped):
    """A trainer of a fresh copy of the shipped checkpoint."""
    corpus = prepared(tmp_path, shipped[1])

    def make(device="cpu", **how):
        how = {
            "seq_len": 64,
            "batch_size": 4,
            "compute": "float32",
            "steps": 3,
            "lr": 1e-3,
            "warmup": 0,
        } | how
        model = load(ROOT / "tiny" / "checkpoint", device)[0]
        return Trainer({"diffusion": 1.0, "ar": 0.5}, model, corpus, corpus, Training(**how))

    return make


def gradients(trainer):
    rows = [row for row, _ in zip(trainer.rows(trainer.corpus, 0), range(4))]
    losses = trainer.step(trainer.batch(trainer.corpus, rows, 0, 0))
    return losses, torch.cat([p.grad.flatten() for p in trainer.objective.parameters()])


@pytest.mark.parametrize("how", [{"micro_batch": 4}, {"micro_batch": 2}, {"recompute": True}], ids=str)
def test_accumulation_and_recomputing_give_the_large_batchs_gradient(trainer, how):
    (losses, expected), (other, got) = gradients(trainer(micro_batch=1)), gradients(trainer(**how))
    assert other == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("objective", ["diffusion", "ar"])
def test_the_chosen_attention_gives_the_dense_masks_gradient(device, rng, objective):
    model, results = load(ROOT / "tiny" / "checkpoint", device)[0], []
    tokens, trainable = example(rng, L=160)
    masked = complementary_noise(trainable, 32, rng)
    data = [x.to(device) for x in (tokens, trainable, masked, PACKED)]
    for kind in ("auto", "dense"):
        model.zero_grad()
        if objective == "ar":
            loss = causal_loss(model, data[0], data[1], data[3], kind)
        else:
            loss = training_loss(model, *data[:2], 32, *data[2:], attention=kind)
        loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-2)


def test_a_run_on_a_device_goes_on_in_bfloat16_with_recomputation(trainer, tmp_path, device):
    how = {"compute": "bfloat16", "recompute": True, "save_every": 1, "eval_every": 2, "eval_rows": 16}
    trainer(device, steps=2, **how).run(tmp_path)
    trainer(device, steps=4, **how).run(tmp_path)
    records = metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[3]["heldout_diffusion_loss"] < records[1]["heldout_diffusion_loss"]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(trainer, tmp_path):
    trainer(save_every=1, steps=2).run(tmp_path)
    run = trainer(save_every=1, steps=5)
    run.objective.model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(InputError, match=r"step 3: .*NaN.*documents \d+.*step-0000002"):
        run.run(tmp_path)
    assert [path.name for path in train.checkpoints(tmp_path)] == ["step-0000001", "step-0000002"]


def test_held_out_data_is_looked_at_and_checkpoints_are_few(trainer, tmp_path):
    trainer(steps=4, save_every=1, eval_every=2, eval_rows=16, keep=2).run(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [step for step, record in enumerate(records, 1) if "heldout_diffusion_accuracy" in record] == [
        2,
        4,
    ]
    assert records[3]["heldout_diffusion_loss"] < records[1]["heldout_diffusion_loss"]
    assert [path.name for path in train.checkpoints(tmp_path)] == ["step-0000003", "step-0000004"]


@pytest.mark.parametrize("form", ["tokenizer.json", "added_tokens_decoder", "added_tokens.json", "none"])
def test_a_tokenizer_without_mask_gets_it_as_its_first_free_id(tmp_path, shipped, form):
    model, tokenizer = shipped
    whole = json.loads(tokenizer.files["tokenizer.json"])
    added = [token for token in whole["added_tokens"] if token["content"] != "|<MASK>|"]
    if form == "tokenizer.json":
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | {"added_tokens": added}))
        (tmp_path / "tokenizer_config.json").write_bytes(tokenizer.files["tokenizer_config.json"])
    else:
        (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
        merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    if form == "added_tokens_decoder":
        settings = {"added_tokens_decoder": {token["id"]: token for token in added}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    elif form == "added_tokens.json":
        (tmp_path / "added_tokens.json").write_text(
            json.dumps({token["content"]: token["id"] for token in added})
        )
    plain = load_tokenizer(tmp_path)
    first = len(plain)
    masked = with_mask_token(plain, model.config.vocab_size)
    save(model, masked, tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert again.id("|<MASK>|") == masked.id("|<MASK>|") == first and len(again) == first + 1
    assert again.encode("books|<MASK>|") == [*again.encode("books"), first]
    assert with_mask_token(again, 10**6) is again
    with pytest.raises(InputError, match=f"id {first}, outside the embedding of {first} rows"):
        with_mask_token(load_tokenizer(tmp_path), first)


# --- Runs ---


def command(tmp_path, objective, **options):
    """Command line of a short run on few problems."""
    if not (tmp_path / "data.jsonl").exists():
        problems = [json.dumps({"question": f"{n} and {n}?", "answer": f"{n + n}"}) for n in range(40)]
        (tmp_path / "data.jsonl").write_text("\n".join(problems) + "\n")
    options = {
        **{
            "model": ROOT / "tiny" / "checkpoint",
            "data": tmp_path / "data.jsonl",
            "seq-len": 64,
            "warmup": 4,
            "compute": "float32",
        },
        **{"steps": 6, "batch-size": 4, "lr": 1e-3, "save-every": 1, "threads": 1, "device": "cpu"},
    } | options
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [str(ROOT / "train.py"), objective, *flags]


def metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def succeeds(line):
    """Run a command line of train.py in this process: torch is imported already."""
    result = CliRunner().invoke(train.main, line[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("objective", ["ar", "adapt"])
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(tmp_path, objective):
    options = {"ar-weight": 0.5} if objective == "adapt" else {}
    whole, killed = (
        command(tmp_path, objective, out=tmp_path / name, **options) for name in ("whole", "killed")
    )
    succeeds(whole)
    run = subprocess.Popen([sys.executable, *killed], stderr=subprocess.DEVNULL)
    while run.poll() is None and not train.checkpoints(tmp_path / "killed"):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    succeeds(killed)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert first == second
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


@pytest.mark.parametrize("parallel, resumes", [("ddp", None), ("fsdp", "one")])
def test_two_processes_train_like_one_and_resume_each_others_runs(tmp_path, parallel, resumes):
    options = {"batch-size": 8, "micro-batch": 2, "ar-weight": 0.5, "compute": "float32", "lr": 1e-4}
    options |= {"parallel": parallel, "heldout": tmp_path / "data.jsonl"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    for steps, with_two in (2, "two"), (3, resumes):
        for name in "one", "two":
            line = command(tmp_path, "adapt", out=tmp_path / name, steps=steps, **options)
            if name == with_two:
                subprocess.run([*torchrun, *line], check=True, capture_output=True)
            else:
                succeeds(line)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    one, two = (load(tmp_path / name, "cpu")[0].state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-5, rtol=1e-3)


def test_metrics_that_cannot_be_written_are_one_sentence(trainer, tmp_path, monkeypatch):
    """On a full disk closing the file fails as writing does, since its text is still in the buffer."""

    def fail(self, *text):
        raise OSError(errno.ENOSPC, "No space left on device")

    full, usual = type("Full", (io.StringIO,), {"write": fail, "close": fail}), open
    opened = lambda path, *how: full() if str(path).endswith("metrics.jsonl") else usual(path, *how)
    monkeypatch.setattr(train, "open", opened, raising=False)
    with pytest.raises(
        InputError, match="metrics.jsonl: cannot be written .No space left on device.; there is"
    ):
        trainer().run(tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_one_sentence_and_the_last_one_stays(tmp_path):
    succeeds(command(tmp_path, "adapt", out=tmp_path / "out", steps=2))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # like a disk that is full
    line = command(tmp_path, "adapt", out=tmp_path / "out", steps=4)
    run = subprocess.run([sys.executable, *line], capture_output=True, text=True, preexec_fn=small)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "cannot be written" in run.stderr and "the last good checkpoint is" in run.stderr
    assert [path.name for path in train.checkpoints(tmp_path / "out")] == ["step-0000001", "step-0000002"]
    succeeds(line)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_a_folder_with_another_run_is_refused(tmp_path):
    out = tmp_path / "out"
    run = lambda **options: CliRunner().invoke(train.main, command(tmp_path, "adapt", out=out, **options)[1:])
    assert run(steps=2).exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    other = run(steps=4, seed=1)
    assert other.exit_code == 2 and "holds a run with seed 0, not 1" in other.output
    assert (out / "model.safetensors").read_bytes() == before
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tok')  # torn by a full disk
    assert run(steps=3).exit_code == 0 and [record["step"] for record in metrics(out)] == [1, 2, 3]
    with open(tmp_path / "data.jsonl", "a") as file:
        file.write('{"question": "1?", "answer": "1"}\n')
    other = run(steps=4)
    assert other.exit_code == 2 and "holds a run on other data" in other.output


def test_a_cosine_ends_where_its_steps_end(tmp_path):
    flags = command(tmp_path, "adapt", out=tmp_path / "out", schedule="cosine", steps=1)[1:]
    assert CliRunner().invoke(train.main, flags).exit_code == 0
    longer = CliRunner().invoke(
        train.main, [*flags, "--steps", "2"]
    )  # its rates would be others from the start
    assert longer.exit_code == 2 and "holds a run with steps 1, not 2" in longer.output


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"seq-len": 100}, "--seq-len 100 is no multiple of the block size 32"),
        ({"seq-len": 2048}, "--seq-len 2048 is more than the model's 1024 positions"),
        ({"batch-size": 3, "micro-batch": 2}, "--batch-size 3 is no multiple of 2"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"packing": "original", "seq-len": 1024, "data": "short.jsonl"}, "does not fill one row of 1024"),
        ({"out": "short.jsonl"}, "short.jsonl"),
        ({"block-size": 1}, "--block-size 1 is autoregressive"),
        ({"clean": "causal"}, "was adapted with --clean block"),
        ({"clip": 0}, "'--clip'"),
        ({"lr": "nan"}, "--lr is nan, it must lie in [0, 100]"),
        ({"lr": "inf"}, "'--lr'"),
        ({"ar-weight": "nan"}, "--ar-weight is nan"),
        ({"lora": 97}, "allow 1 to"),
        *(
            ({name: 10**20}, f"'--{name}'")
            for name in ("steps", "batch-size", "seq-len", "threads", "block-size")
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.jsonl").write_text('{"text": "1"}\n')
    line = command(tmp_path, "adapt", **({"out": tmp_path / "out"} | options))
    run = CliRunner().invoke(train.main, line[1:])
    assert run.exit_code == 2 and sentence in run.output and "Traceback" not in run.output


@pytest.mark.parametrize(
    "field, value", [("packing", "document"), ("parallel", "ddpp"), ("steps", 0), ("lr", -1.0)]
)
def test_a_setting_that_no_option_could_have_is_refused_in_python_too(field, value):
    with pytest.raises(InputError, match=f"--{field} is {value!r}, it must"):
        Training(**{field: value})


def test_show_prints_a_row_as_it_trains():
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", "show"], capture_output=True, text=True, check=True
    )
    table = [line.split() for line in run.stdout.splitlines() if "output" in line and "of view" in line]
    assert table
    for position, output in ((line[0], line[line.index("output") + 1]) for line in table):
        assert int(output) == int(position) - 1  # token shift
    views = [{line[0] for line in table if line[-1] == view} for view in "12"]
    assert not views[0] & views[1]  # the complement


def test_show_fits_a_screen_and_counts_padding():
    shown = CliRunner().invoke(train.main, ["show"])
    assert "Row 0: 192 positions" in shown.output and " [padding x " in shown.output
    views = shown.output.partition("The block of positions")[0]
    assert "|<MASK>|" not in views and len(shown.output.splitlines()) < 120


def test_show_ends_quietly_where_nobody_reads_on():
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", "show"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert run.stderr == ""


def test_next_token_training_has_no_options_of_diffusion():
    ar, adapt = ({p.name for p in train.main.commands[name].params} for name in ("ar", "adapt"))
    assert adapt - ar >= {"block_size", "complement", "clean", "ar_weight", "lora"}
    helps = [p.help for name in ("ar", "adapt") for p in train.main.commands[name].params]
    assert all(helps)


def test_show_says_where_there_is_nothing_to_show(tmp_path):
    (tmp_path / "data.jsonl").write_text("{\n")
    shown = CliRunner().invoke(train.main, ["show", "--data", str(tmp_path / "data.jsonl")])
    assert shown.exit_code == 2 and "holds no documents" in shown.output


def test_presets_are_the_papers_and_options_override_them(monkeypatch):
    seen = {}
    monkeypatch.setattr(train, "train", lambda objective, **given: seen.update(given))
    flags = ["--model", "m", "--data", str(ROOT / "train.py"), "--out", "o", "--preset", "7b", "--steps", "7"]
    CliRunner().invoke(train.main, ["adapt", *flags], catch_exceptions=False)
    assert (seen["lr"], seen["steps"], seen["batch_size"], seen["seq_len"], seen["warmup"]) == (
        1e-5,
        7,
        256,
        2048,
        500,
    )


# --- Files of a run ---


def run(tmp_path, *flags, objective="adapt", **options):
    """A short run in this process, in the folder "out"."""
    how = {"out": tmp_path / "out", "batch-size": 2, "seq-len": 32} | options
    return CliRunner().invoke(train.main, [*command(tmp_path, objective, **how)[1:], *flags])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    assert run(folder, steps=2).exit_code == 0
    return folder


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it; its data is where the run had it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return partial(run, tmp_path, data=finished / "data.jsonl")


def test_a_checkpoint_holds_no_file_that_could_run_as_code(finished):
    files = [file for place in train.checkpoints(finished / "out") for file in place.iterdir()]
    assert len(files) == 4 and {file.suffix for file in files} == {".safetensors", ".json"}


@pytest.mark.parametrize("damage", ["weights", "header", "checksum", "missing", "empty"])
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_is_named(again, tmp_path, damage):
    good, bad = train.checkpoints(tmp_path / "out")
    share = bad / "share-00000.safetensors"
    if damage == "weights":
        flip_a_byte(share)
    elif damage == "header":
        share.write_bytes(b"\xff" * 8 + share.read_bytes()[8:])
    elif damage == "checksum":
        share.with_suffix(".json").write_text('{"sha')
    else:
        for file in [share] if damage == "missing" else bad.iterdir():
            file.unlink()
    refused = again(steps=3)
    assert refused.exit_code == 2 and "Traceback" not in refused.output
    assert f"{bad}: the checkpoint is damaged" in refused.output
    assert f"the last good checkpoint is {good}" in refused.output
    shutil.rmtree(bad)
    assert again(steps=3).exit_code == 0 and [record["step"] for record in metrics(tmp_path / "out")] == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("name", ["tokens.bin", "trainable.bin", "offsets.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["flipped", "short", "empty"])
def test_damaged_tokens_are_one_sentence(again, tmp_path, name, damage):
    file = tmp_path / "out" / "tokens" / name
    if damage == "flipped":
        flip_a_byte(file)
    else:
        file.write_bytes(file.read_bytes()[: 40 if damage == "short" else 0])
    refused = again(steps=3)
    made_again = refused.exit_code == 0 and name == "meta.json"  # what it says of the data differs
    assert made_again or refused.exit_code == 2 and str(tmp_path / "out" / "tokens") in refused.output
    assert "Traceback" not in refused.output


def test_a_resumed_run_needs_the_same_data_whatever_its_date(again, finished, tmp_path):
    data = tmp_path / "data.jsonl"
    os.utime(data, (1, 1))
    again(steps=3, data=data)
    assert len(metrics(tmp_path / "out")) == 3
    data.write_text(data.read_text().replace("7", "8"))
    other = again(steps=4, data=data)
    assert other.exit_code == 2 and "holds a run on other data" in other.output


def test_fewer_steps_than_are_done_are_refused(again):
    fewer = again(steps=1)
    assert fewer.exit_code == 2 and "has done 2 steps already, more than --steps 1" in fewer.output


def test_a_second_run_in_the_same_folder_is_refused(again, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "out" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second = again(steps=3)
        assert second.exit_code == 2 and "another run is using it" in second.output
    assert again(steps=3).exit_code == 0


def test_the_end_says_where_the_result_is_and_how_to_run_it(again, tmp_path):
    assert f"python cli.py generate --model {tmp_path / 'out'}" in again(steps=2).output


# --- Causal clean copies and low rank ---


def test_a_causal_clean_copy_gives_the_causal_loss_without_a_pass_of_its_own(trainable_models, rng):
    model, (tokens, trainable) = trainable_models["tied"], example(rng)
    batch = Batch(tokens, trainable, None, complementary_noise(trainable, 8, rng))
    objective = train.Objective(model, Training(clean="causal", compute="float32"))
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    found = objective(batch, {kind: batch.outputs(kind, True) for kind in ("diffusion", "ar")})
    hook.remove()
    loss = found["ar"][0] / trainable[:, 1:].sum()
    torch.testing.assert_close(loss, causal_loss(model, tokens, trainable))
    assert len(passes) == 1


def test_a_checkpoint_that_was_adapted_with_a_causal_clean_copy_is_decoded_so(tmp_path, shipped):
    model, tokenizer = shipped
    torch.manual_seed(0)
    parent = Qwen2(replace(model.config, num_hidden_layers=1, block_size=1))
    save(parent, tokenizer, tmp_path / "parent")
    line = command(
        tmp_path, "adapt", model=tmp_path / "parent", out=tmp_path / "out", steps=1, clean="causal"
    )
    assert CliRunner().invoke(train.main, [*line[1:], "--block-size", "32"]).exit_code == 0
    assert load(tmp_path / "out", "cpu")[0].config.clean == "causal"


def test_low_rank_layers_alone_train_and_are_merged_into_the_result(trainer, tmp_path, shipped):
    run = trainer(lora=4, lr=0.02, clean="causal", save_every=1)
    base = {name: p.detach().clone() for name, p in run.objective.model.named_parameters()}
    run.run(tmp_path)
    losses = [record["diffusion_loss"] for record in metrics(tmp_path)]
    assert losses[-1] < losses[0]
    model = run.objective.model
    assert all(torch.equal(p, base[name]) and p.grad is None for name, p in model.named_parameters())
    train.save_result(tmp_path / "result", run.objective, model, shipped[1], torch.float32)
    merged = load(tmp_path / "result", "cpu")[0]
    tokens = torch.tensor([[5, 6, model.config.mask_token_id, 7]])
    everywhere = torch.ones(1, 1, 1, dtype=torch.bool)
    with torch.no_grad():
        expected = model(tokens, torch.arange(4)[None], causal_attention, everywhere)
        got = merged(tokens, torch.arange(4)[None], causal_attention)
        before = shipped[0](tokens, torch.arange(4)[None], causal_attention)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, before, atol=1e-2)
    resumed = trainer(lora=4, lr=0.02, clean="causal")
    train.load_checkpoint(tmp_path, resumed.objective, resumed.optimizer)
    trained = zip(run.objective.adapter.parameters(), resumed.objective.adapter.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in trained)
