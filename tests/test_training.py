"""Training: mask, noise, loss, data, and runs that go on where they stopped."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, golden

import train
from fastdllm import CAUSAL, InputError, KVCache, Qwen2, attention, load
from train import (
    batches,
    blockwise_attention,
    causal_attention,
    causal_loss,
    chat_document,
    complementary_noise,
    cross_entropy,
    learning_rate,
    read_documents,
    training_loss,
    training_mask,
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


@pytest.mark.parametrize("views", [1, 2])
def test_blockwise_attention_equals_the_dense_mask(rng, views):
    L, size = 24, 8
    q = torch.randn(2, 6, (views + 1) * L, 16, generator=rng)
    k, v = (torch.randn(2, 2, (views + 1) * L, 16, generator=rng) for _ in range(2))
    dense = attention(q, k, v, training_mask(L, size, views))
    torch.testing.assert_close(blockwise_attention(q, k, v, L, size, views), dense, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(causal_attention(q, k, v), attention(q, k, v, CAUSAL), atol=1e-5, rtol=1e-4)


# --- Noise ---


def test_noise_masks_only_trainable_positions_with_the_papers_probability():
    rng = torch.Generator().manual_seed(1)
    trainable = torch.arange(64).expand(4000, 64) >= 20
    masked = complementary_noise(trainable, 32, rng)
    assert not masked[:, :20].any()
    assert masked[:, 20:].float().mean().item() == pytest.approx(0.999 * 0.5 + 0.001, abs=0.01)
    share = masked[:, 32:].float().mean(dim=1)  # of a whole block: uniform, so the quarters are equally likely
    for low in (0, 0.25, 0.5, 0.75):
        assert ((share >= low) & (share < low + 0.25)).float().mean().item() == pytest.approx(0.25, abs=0.03)


# --- Loss ---


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["id"])
@pytest.mark.parametrize("dense", [True, False])
def test_loss_and_gradients_equal_golden(trainable_models, case, dense):
    model = trainable_models[case["checkpoint"]]
    model.zero_grad()
    tokens, trainable = torch.tensor(case["tokens"]), torch.tensor(case["trainable"]).bool()
    before = tokens.clone(), trainable.clone()
    loss = training_loss(model, tokens, trainable, case["block_size"], masked_of(case), dense)
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

    class Head:
        logits = staticmethod(lambda hidden: hidden)

    loss = cross_entropy(Head, logits[:, :-1][wanted], labels[:, 1:][wanted])
    assert loss.item() == pytest.approx(GOLDEN["loss_function"]["loss_mean"], abs=1e-6)
    assert wanted.sum().item() == GOLDEN["loss_function"]["terms"]


def test_every_trainable_token_is_a_target_exactly_once(trainable_models, rng, monkeypatch):
    model, seen = trainable_models["tied"], []
    monkeypatch.setattr(train, "cross_entropy", lambda model, hidden, targets: seen.append(targets))
    tokens, trainable = torch.arange(48).view(2, 24), example(rng)[1]
    training_loss(model, tokens, trainable, masked=complementary_noise(trainable, 8, rng))
    assert seen[0].sort().values.tolist() == tokens[trainable].tolist()
    everything = torch.ones_like(trainable)
    training_loss(model, tokens, everything, masked=complementary_noise(everything, 8, rng))
    assert seen[1].sort().values.tolist() == tokens[:, 1:].flatten().tolist()  # position 0 is nobody's next token


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
        hidden = model(torch.cat([noisy, tokens], 1), torch.arange(L).repeat(2)[None], training_mask(L, size))
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
def test_training_forward_equals_the_windows_of_decoding(golden_models, rng):
    model, size, L = golden_models["tied"], 8, 24
    tokens = torch.randint(0, 280, (1, L), generator=rng)
    noisy = tokens.masked_fill(torch.rand(1, L, generator=rng) < 0.5, model.config.mask_token_id)
    trained = model(torch.cat([noisy, tokens], 1), torch.arange(L).repeat(2)[None], training_mask(L, size))
    cache = KVCache(model.config, 1, L, model.lm_head.weight)
    for start in range(0, L, size):
        block = slice(start, start + size)
        denoised = model.window(noisy[:, block], [start], cache, size)
        committed = model.window(tokens[:, block], [start], cache, size)
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
    logits = model.logits(model(tokens, torch.arange(24)[None], CAUSAL))[:, :-1]
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


def test_a_broken_line_is_named(tmp_path, shipped):
    for line in ("{", "[]", '{"messages": 3}', '{"question": "?"}'):
        (tmp_path / "data.jsonl").write_text('{"question": "?", "answer": "!"}\n' + line + "\n")
        with pytest.raises(InputError, match="line 2"):
            list(read_documents(tmp_path / "data.jsonl", shipped[1]))
    (tmp_path / "data.jsonl").write_text('\n{"messages": [{"role": "user", "content": "?"}]}\n')
    with pytest.raises(InputError, match="line 2: nothing of it"):
        list(read_documents(tmp_path / "data.jsonl", shipped[1]))


def test_batches_have_one_length_and_use_every_document_once_an_epoch():
    lengths = [32, 64, 32, 32, 64, 96, 32]
    order = batches(lengths, 2, seed=3)
    epoch = [next(order) for _ in range(4)]
    assert sorted(i for batch in epoch for i in batch) == list(range(7))
    assert all(len({lengths[i] for i in batch}) == 1 for batch in epoch)
    again = batches(lengths, 2, seed=3)
    assert [next(again) for _ in range(4)] == epoch


def test_learning_rate_warms_up_and_stays_or_falls():
    rates = [learning_rate(step, 100, 1.0, 10, "constant") for step in range(100)]
    assert rates[0] == 0.1 and rates[9:] == [1.0] * 91
    assert learning_rate(55, 100, 1.0, 10, "cosine") == pytest.approx(0.5)


# --- Runs ---


@pytest.mark.parametrize("objective", ["ar", "adapt"])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, objective):
    problems = [json.dumps({"question": f"{n} and {n}?", "answer": f"{n + n}"}) for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(problems) + "\n")
    command = [sys.executable, str(ROOT / "train.py"), objective, "--model", str(ROOT / "tiny" / "checkpoint")]
    command += ["--data", str(tmp_path / "data.jsonl"), "--steps", "12", "--batch-size", "4", "--save-every", "1"]
    command += ["--lr", "1e-3", "--ar-weight", "0.5", "--threads", "1", "--device", "cpu"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    run = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    while run.poll() is None and not (tmp_path / "killed" / "state.pt").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    subprocess.run([*command, "--out", str(tmp_path / "killed")], check=True, capture_output=True)
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == resumed
