"""The adaptation: noise, mask, loss and a step's gradients."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, golden
from torch.nn.attention import flex_attention
from windows import causal_attend, run_window

import train
from checkpoint import load
from fastdllm import InputError, KVCache, Qwen2, attention_bias, grouped_attention
from train import complementary_noise, next_token_loss, training_loss, training_mask
from training import attention
from training.data import Corpus

GOLDEN = golden("train")


@pytest.fixture(scope="module")
def models(folders) -> dict:
    """The golden checkpoints, to train; block size 32 and 8."""
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


def dense(model, length, size):
    """The dense training mask of one view as an `attend`."""
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    bias = attention_bias(training_mask(length, size)[None], groups, torch.float32)
    return lambda layer, *qkv: grouped_attention(*qkv, bias)


def gradients_of(model, loss) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# --- Mask ---


@pytest.mark.parametrize("name, rows", GOLDEN["train_masks"].items())
def test_training_mask_equals_golden(name, rows):
    length, size = (int(part.lstrip("Lbd")) for part in name.split("_"))
    assert ["".join(str(int(seen)) for seen in row) for row in training_mask(length, size)] == rows


PACKED = torch.tensor([[1] * 64 + [2] * 32 + [3] * 64, [1] * 96 + [2] * 64])  # documents of two rows of 160


@pytest.mark.parametrize("documents", [None, PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("views, size", [(0, 1), (1, 32), (2, 32), (2, 8)])
@pytest.mark.parametrize("kind", ["blockwise", "sparse"])
def test_every_attention_equals_the_dense_mask_forward_and_backward(
    rng, device, kind, views, size, documents
):
    L, results = 160, []  # tiles of 128 are larger than a block, and do not divide the length
    backward = kind != "sparse" or device == "cuda"  # FlexAttention has no backward pass on CPUs
    documents = documents if documents is None else documents.to(device)
    data = [torch.randn(2, heads, (views + 1) * L, 16, generator=rng).to(device) for heads in (6, 2, 2)]
    for way in ("dense", kind):
        qkv = [x.clone().requires_grad_(backward) for x in data]
        y = train.training_attention(way, L, size, views, documents, torch.device(device))(0, *qkv)
        if backward:
            y.sin().sum().backward()
        results.append([y, *(x.grad for x in qkv if backward)])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_sparse_attention_skips_most_tiles():
    tiles = attention.sparse_mask(train.visibility(2048, 32, 2), None, 3 * 2048, torch.device("cpu"))
    assert tiles.sparsity() > 70  # percent


@pytest.mark.parametrize("compute, tolerance", [("float32", 1e-5), ("bfloat16", 0.06)])
def test_flex_attention_can_be_traced_in_a_recomputed_step_and_has_the_dense_gradients(
    models, rng, monkeypatch, compute, tolerance
):
    """The step as CUDA runs it, traced by torch.compile, backward pass included, but run by plain products."""
    # CPUs: forward only
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)
    traced = torch.compile(flex_attention.flex_attention, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(flex_attention, "flex_attention", traced)
    tokens, trainable = example(rng, L=96)
    documents, results = torch.tensor([[1] * 64 + [2] * 32, [1] * 32 + [2] * 64]), []
    masked = complementary_noise(trainable, 32, torch.Generator().manual_seed(0))
    for kind in ("dense", "sparse"):
        model = copy.deepcopy(models["tied"])
        whole = train.runs.distribute(model, getattr(torch, compute), recompute=True)
        own = partial(training_loss, block_size=32, masked=masked)
        given = {"tokens": tokens, "trainable": trainable, "documents": documents, "attention": kind}
        losses = [whole(partial(loss, **given)) for loss in (own, next_token_loss)]
        sum(losses).backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        results.append((torch.stack(losses).detach(), gradients))
    (expected, dense), (got, sparse) = results
    torch.testing.assert_close(got, expected, atol=0, rtol=tolerance / 5)
    for name, gradient in dense.items():
        assert (sparse[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_on_cuda_without_a_compiler_attention_is_dense_which_is_said_once(monkeypatch, capsys):
    train.fast_attention.cache_clear()
    monkeypatch.setattr(train, "can_compile", lambda: False)
    assert [train.fast_attention(kind) for kind in ("cuda", "cuda", "cpu")] == ["dense", "dense", "blockwise"]
    assert capsys.readouterr().err.count("without a C compiler") == 1
    train.fast_attention.cache_clear()
    monkeypatch.setattr(train, "can_compile", lambda: True)
    assert train.fast_attention("cuda") == "sparse"
    train.fast_attention.cache_clear()


# --- Noise ---


def test_noise_masks_only_trainable_positions_with_the_papers_probability():
    rng = torch.Generator().manual_seed(1)
    trainable = torch.arange(64).expand(4000, 64) >= 20
    masked = complementary_noise(trainable, 32, rng)
    assert not masked[:, :20].any()
    assert masked[:, 20:].float().mean().item() == pytest.approx(0.999 * 0.5 + 0.001, abs=0.01)
    share = masked[:, 32:].float().mean(dim=1)  # of a whole block: uniform, so quarters are equally likely
    for low in (0, 0.25, 0.5, 0.75):
        assert ((share >= low) & (share < low + 0.25)).float().mean().item() == pytest.approx(0.25, abs=0.03)


# --- Loss ---


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["id"])
@pytest.mark.parametrize("kind", ["dense", "blockwise"])
def test_loss_and_gradients_equal_golden(models, case, kind):
    model = models[case["checkpoint"]]
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


def test_chunks_of_logits_change_nothing(models, rng, monkeypatch):
    model, results, rows = models["tied"], [], []
    hidden, targets = torch.randn(50, model.config.hidden_size, generator=rng), torch.randint(0, 280, (50,))
    monkeypatch.setattr(model, "logits", lambda x: rows.append(len(x)) or model.lm_head(x))
    for largest in (2**26, 7 * model.config.vocab_size):
        model.zero_grad()
        x = hidden.clone().requires_grad_()
        loss = train.cross_entropy(model, x, targets, largest)
        loss.backward()
        results.append((loss, x.grad, model.lm_head.weight.grad.clone()))
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole)
    assert rows[0] == 50 and max(rows[1:]) == 7


def test_every_trainable_token_is_a_target_exactly_once(models, rng, monkeypatch):
    model, seen = models["tied"], []
    monkeypatch.setattr(train, "cross_entropy", lambda model, hidden, targets: seen.append(targets) or 0)
    tokens, trainable = torch.arange(48).view(2, 24), example(rng)[1]
    for flags in (trainable, trainable | True):  # nothing predicts position 0
        training_loss(model, tokens, flags, masked=complementary_noise(flags, 8, rng))
        assert seen.pop().sort().values.tolist() == tokens[:, 1:][flags[:, 1:]].tolist()
    monkeypatch.undo()
    assert training_loss(model, tokens, trainable & False) == 0


@torch.inference_mode()
def test_training_forward_equals_the_windows_of_decoding(golden_models, rng):
    model, size, L = golden_models["tied"], 8, 24
    tokens = torch.randint(0, 280, (1, L), generator=rng)
    noisy = tokens.masked_fill(torch.rand(1, L, generator=rng) < 0.5, model.config.mask_token_id)
    trained = model(torch.cat([noisy, tokens], 1), torch.arange(L).repeat(2)[None], dense(model, L, size))
    cache = KVCache(model.config, 1, L, model.lm_head.weight)
    for start in range(0, L, size):
        block = slice(start, start + size)
        denoised = run_window(model, noisy[:, block], [start], cache, size)
        committed = run_window(model, tokens[:, block], [start], cache, size)
        torch.testing.assert_close(denoised, trained[:, :L][:, block], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(committed, trained[:, L:][:, block], atol=1e-4, rtol=1e-4)


def test_rows_that_are_no_whole_blocks_and_models_without_masks_are_refused(models, rng):
    tokens, trainable = example(rng, L=20)
    with pytest.raises(InputError, match="20 positions, no multiple of the block size 8"):
        training_loss(models["tied"], tokens, trainable)
    plain = Qwen2(type(models["tied"].config)(64, 32, 64, 1, 2, 1, 16, 128))
    with pytest.raises(InputError, match="no mask token"):
        training_loss(plain, tokens, trainable, 4)


def test_next_token_loss_is_next_token_cross_entropy(models, rng):
    model = models["untied"]
    tokens, trainable = example(rng)
    logits = model.logits(model(tokens, torch.arange(24)[None], causal_attend))[:, :-1]
    labels = tokens[:, 1:].masked_fill(~trainable[:, 1:], -100)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(next_token_loss(model, tokens, trainable), expected)


@pytest.mark.parametrize("objective", ["diffusion", "ar"])
def test_a_packed_row_trains_like_its_documents_alone(models, rng, objective):
    tokens, trainable = example(rng, B=1, L=40, prompt=0)  # block size 8
    documents, noise = torch.tensor([[1] * 16 + [2] * 24]), complementary_noise(trainable, 8, rng)

    def loss(part: slice, **more):
        given = models["tied"], tokens[:, part], trainable[:, part]
        if objective == "ar":
            return next_token_loss(*given, **more)
        return training_loss(*given, masked=noise[:, part], **more)

    alone = (loss(slice(0, 16)) * 15 + loss(slice(16, 40)) * 23) / 38
    torch.testing.assert_close(loss(slice(0, 40), documents=documents), alone)


@pytest.mark.parametrize("loss", [next_token_loss, training_loss])
def test_the_chosen_attention_gives_the_dense_masks_gradient(device, rng, loss):
    model, results = load(ROOT / "tiny" / "checkpoint", device)[0], []
    tokens, trainable = example(rng, L=160)  # on the CPU, wherever the model is
    more = {"masked": complementary_noise(trainable, 32, rng)} if loss is training_loss else {}
    for kind in ("auto", "dense"):
        results.append(
            gradients_of(model, loss(model, tokens, trainable, documents=PACKED, attention=kind, **more))
        )
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-2)


# --- A step ---


@pytest.fixture
def job(tmp_path, shipped):
    """Makes an adaptation of a fresh copy of the shipped checkpoint, on few problems."""
    lines = [{"question": f"{n} and {n}?" * (n % 5 + 1), "answer": f"{n + n}"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    corpus = Corpus.read(tmp_path / "data.jsonl", shipped[1], None, "refuse")

    def make(device="cpu", **changed):
        settings = {"seq_len": 64, "batch_size": 4, "compute": "float32", "steps": 3, "lr": 1e-3, "warmup": 0}
        model = load(ROOT / "tiny" / "checkpoint", device)[0]
        weights = {"diffusion": 1.0, "ar": 0.5}
        return train.Adaptation(model, weights, corpus, corpus, train.Training(**settings | changed))

    return make


def step(job):
    order = job.rows()
    losses = job.step([next(order) for _ in range(4)], 0, lambda rows: None)
    return losses, torch.cat([p.grad.flatten() for p in job.trained.values()])


@pytest.mark.parametrize("settings", [{"micro_batch": 4}, {"micro_batch": 2}, {"recompute": True}], ids=str)
def test_accumulation_and_recomputing_give_the_large_batchs_gradient(job, settings):
    (losses, expected), (other, got) = step(job(micro_batch=1)), step(job(**settings))
    assert other == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)


def test_a_step_trains_by_the_two_losses_of_its_rows(job):
    made = job(batch_size=2, micro_batch=1)
    rows = [row for _, row in zip(range(2), made.rows())]
    losses = made.step(rows, 5, lambda rows: None)
    seeds, model = [[0, 5, 0], [0, 5, 1]], made.whole.model
    batch = train.noisy_batch(made.corpus, rows, seeds, made.pad, 32, made.settings)
    tokens, trainable, documents, masked = batch
    expected = training_loss(model, tokens, trainable, 32, masked, documents)
    other = next_token_loss(model, tokens, trainable, documents)
    assert losses == pytest.approx({"diffusion_loss": expected.item(), "ar_loss": other.item()}, rel=1e-5)
    got = torch.cat([p.grad.flatten() for p in made.trained.values()])
    torch.testing.assert_close(got, gradients_of(model, expected + 0.5 * other), atol=1e-5, rtol=1e-3)


def test_learning_rate_warms_up_and_stays_or_falls():
    constant, cosine = (
        train.Training(steps=100, lr=1.0, warmup=10, schedule=s) for s in ("constant", "cosine")
    )
    rates = [constant.learning_rate(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:] == [1.0] * 91
    assert cosine.learning_rate(55) == pytest.approx(0.5)


@pytest.mark.parametrize("field, value", [
    ("packing", "document"), ("compute", "float16"), ("steps", 0), ("save_every", 0), ("batch_size", 10**20),
    ("lr", -1.0), ("lr", float("nan")), ("ar_weight", -1), ("clip", 0),
])  # fmt: skip
def test_a_setting_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(InputError, match=f"--{field.replace('_', '-')} is {value!r}, it must be "):
        train.Training(**{field: value})
