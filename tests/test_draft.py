"""The draft adapter: what trains, what a group of masks sees, and that known tokens never meet it."""

import json
import os
import random
import subprocess
import warnings
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from test_runs import TORCHRUN, kill_after_a_checkpoint
from windows import run_sees, run_window

import cli
import train
import verify
from checkpoint import load, save
from commands import prompts
from fast import RecordedPasses, prepack
from fastdllm import Decoding, InputError, KVCache, Qwen2, generate
from training import drafts
from training.data import Corpus
from verify import Verified, adapted_layers, adapter_of, add_adapter, load_adapter

WIDTH = 4


@pytest.fixture
def adapted(folders) -> Qwen2:
    """A golden model with a random adapter."""
    model = load(folders["tied"], "cpu")[0]
    add_adapter(model, 4, 8.0, WIDTH)
    generator = torch.Generator().manual_seed(0)
    for tensor in verify.adapter_tensors(model).values():
        tensor.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture
def saved(adapted, tmp_path):
    """Its folder."""
    verify.save_adapter(adapted, tmp_path / "adapter", "some/base", verify.base_digest(adapted))
    return tmp_path / "adapter"


def corpus(count=6, length=30, vocab=280) -> Corpus:
    """Documents of a prompt of 6 tokens and an answer."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, count * length).astype(np.uint16)
    return Corpus(tokens, np.tile(np.arange(length) >= 6, count), np.arange(count + 1) * length)


# --- The adapter ---


def test_with_an_adapter_ar_is_the_bases_and_costs_nothing_and_verify_is_ar(
    adapted, golden_models, monkeypatch
):
    rng = random.Random(0)
    prompts = [[rng.randrange(280) for _ in range(rng.randrange(1, 30))] for _ in range(7)]
    common = {"max_new_tokens": 20, "stop_token_ids": (7,), "batch_size": 3}
    plain = generate(golden_models["tied"], prompts, Decoding(1, **common))
    for ahead in (False, True):
        decoding = Verified(draft_width=4, draft_ahead=ahead, **common)
        verified = generate(adapted, prompts, decoding)
        assert [r.tokens for r in verified] == [r.tokens for r in plain]
        assert [r.finish_reason for r in verified] == [r.finish_reason for r in plain]
        assert verified == generate(adapted, prompts, decoding, RecordedPasses(adapted, record=False))
    monkeypatch.setattr(
        verify.AdaptedLinear, "forward", lambda layer, x: layer.base(x)
    )  # no product of the adapter
    assert generate(adapted, prompts, Decoding(1, **common)) == plain


def test_a_saved_adapter_loads_as_it_was_under_pefts_names(adapted, saved, folders):
    model = load(folders["tied"], "cpu", "bfloat16")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, saved)
    assert adapter_of(model).draft_width == WIDTH
    tensors = verify.adapter_tensors(model)
    for name, tensor in verify.adapter_tensors(adapted).items():
        assert torch.equal(tensors[name], tensor.bfloat16())
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 208)
    with pytest.raises(InputError):  # its weights are not a plain Qwen2's
        save(model, None, saved)
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_digest": "of something else"}))
    with pytest.warns(UserWarning, match="trained on other weights.* The text stays"):
        load_adapter(load(folders["tied"], "cpu", "bfloat16")[0], saved)


def test_an_adapter_gives_a_plain_base_its_mask_or_the_first_free_id(saved, folders):
    for size, mask in (None, 285), (286, 286):  # a tokenizer whose texts have 285
        model = load(folders["tied"], "cpu")[0]
        model.config = replace(model.config, mask_token_id=None, tokenizer_size=size)
        assert load_adapter(model, saved).config.mask_token_id == mask


@pytest.mark.parametrize("change, sentence", [
    ({"r": 3}, "does not fit"),
    ({"r": "4"}, "needs r"),
    ({"lora_alpha": float("nan")}, "needs r"),
    ({"masks_only": False}, "no adapter that is on at masks only"),
    ({"trainable_token_indices": None}, "one id"),
    ({"draft_width": 0}, "draft_width is 0"),
    ({"draft_width": "8"}, "draft_width is 8"),
    ({"heldout_kept": [3, -1]}, "heldout_kept must be a list of counts"),
])  # fmt: skip
def test_an_adapter_that_does_not_fit_is_one_sentence_and_changes_nothing(saved, folders, change, sentence):
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = load(folders["tied"], "cpu")[0]
    with pytest.raises(InputError, match=sentence):
        load_adapter(model, saved)
    assert adapter_of(model) is None and not adapted_layers(model)


def test_what_cannot_take_an_adapter_says_so(adapted, saved, folders):
    other = load(folders["untied"], "cpu")[0]
    other.config = replace(other.config, mask_token_id=285)
    with pytest.raises(InputError, match="does not fit"):
        load_adapter(other, saved)
    with pytest.raises(InputError, match="allow 1 to 32"):
        add_adapter(other, 97, 8.0)
    with pytest.raises(InputError, match="adapter_config.json is missing"):
        load_adapter(other, folders["tied"])
    for model in (adapted, prepack(other)):  # it has one, or is in oneDNN's order
        with pytest.raises(InputError, match="adapter"):
            load_adapter(model, saved)


def test_a_retrained_adapter_does_not_go_on_with_the_answers_of_the_old_one(adapted, saved, folders):
    header = lambda: prompts.header_of(str(folders["tied"]), str(saved), adapted, Decoding())
    before = header()
    assert before == header()
    os.utime(saved / "adapter_model.safetensors", ns=(1, 1))  # as if written at another time
    assert before != header()


def test_prepacked_weights_keep_the_adapter(adapted):
    masks = torch.full((1, 8), adapted.config.mask_token_id)

    @torch.inference_mode()
    def run():
        cache = KVCache(adapted.config, 1, 8, adapted.weight)
        return run_sees(
            adapted, masks, [0], cache, [verify.draft_window(0, 1, 7)], Verified(), has_masks=True
        )

    plain = run()
    if prepack(adapted) is None or isinstance(adapted.lm_head, torch.nn.Linear):
        pytest.skip("oneDNN is not in this build of torch")
    torch.testing.assert_close(run(), plain, atol=1e-4, rtol=1e-3)
    for layer in adapted_layers(adapted).values():
        layer.B.data.zero_()
    assert (run() - plain).abs().max() > 0.1  # the low-rank layers matter, not only the masks' row


# --- Groups and loss ---


def test_a_group_sees_the_known_tokens_up_to_its_anchor_and_itself_as_in_decoding(adapted):
    known = drafts.Known(adapted, corpus(), 1e9)
    known_floats = lambda document: drafts.known_pass(adapted, known.tokens(document))
    anchors = torch.tensor([[5, 9, 20], [7, 6, 13]])
    got = drafts.draft_pass(adapted, [known_floats(0), known_floats(3)], anchors, WIDTH)
    for row, document in enumerate((0, 3)):
        for group, anchor in enumerate(anchors[row].tolist()):
            masks = torch.full((WIDTH,), adapted.config.mask_token_id)
            tokens = known.tokens(document)
            cache = KVCache(adapted.config, 1, anchor + 1 + WIDTH, adapted.weight)
            run_window(adapted, tokens[None, :anchor], [0], cache, 1)
            window = torch.cat([tokens[anchor : anchor + 1], masks])[None]
            sees = [verify.draft_window(anchor, 1, WIDTH)]
            hidden = run_sees(adapted, window, [anchor], cache, sees, Verified(), has_masks=True)
            torch.testing.assert_close(got[row, group], hidden[0, -WIDTH:], atol=1e-4, rtol=1e-4)


def test_targets_are_two_to_w_plus_one_behind_the_anchor_and_end_with_the_document():
    tokens = torch.arange(100, 110)
    got = drafts.draft_targets(tokens, torch.tensor([3, 6]), WIDTH)
    assert got.tolist() == [[105, 106, 107, 108], [108, 109, -1, -1]]
    tokens[6] = -1  # a user's turn: nothing behind it answers this anchor
    assert drafts.draft_targets(tokens, torch.tensor([3]), WIDTH).tolist() == [[105, -1, -1, -1]]


def test_every_anchor_is_drawn_once_an_epoch_the_prompts_last_token_too():
    rows = islice(drafts.endless_groups(corpus(count=3), 3, 0), 24)  # of 3 documents, 8 each
    drawn = [(document, anchor) for document, anchors in rows for anchor in anchors]
    assert {anchor for _, anchor in drawn} == set(range(5, 28))
    assert len(set(drawn)) == 3 * 23 and len(drawn) == 72


def test_the_loss_over_the_whole_vocabulary_is_the_weighted_cross_entropy(adapted):
    hidden = torch.randn(2, 1, WIDTH, 96)
    targets = torch.tensor([[[3, 4, 3, 9]], [[9, 4, -1, -1]]])
    ids, others = torch.arange(20), torch.arange(20, adapted.config.vocab_size)
    loss, weight, _ = drafts.draft_loss(
        adapted, hidden, targets, ids, others, lambda p: drafts.draft_weights(p, 0, 0.5)
    )
    log_p = adapted.logits(hidden).log_softmax(-1)
    places = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    expected = -sum(0.5**j * log_p[row, 0, j, targets[row, 0, j]] for row, j in places)
    assert weight == 1.875 + 1.5
    torch.testing.assert_close(loss, expected)


def test_full_reach_has_the_gradient_of_the_number_of_kept_drafts(adapted):
    torch.manual_seed(0)
    hidden = (3 * torch.randn(2, 1, WIDTH, 96)).requires_grad_()
    targets = adapted.logits(hidden.detach()).argmax(-1)
    targets[1, 0, 2:] = -1  # the second document ends after two drafts
    p = adapted.logits(hidden).softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    kept = (p * (targets >= 0)).cumprod(-1).sum()
    (expected,) = torch.autograd.grad(-kept, hidden)
    everything, none = torch.arange(adapted.config.vocab_size), torch.arange(0)
    drafts.draft_loss(adapted, hidden, targets, everything, none, lambda p: drafts.draft_weights(p, 1))[
        0
    ].backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert 1 < kept < 5


def test_a_draft_is_kept_where_decoding_keeps_it_whatever_is_sampled(adapted):
    """Other tokens weigh more in the loss, since they stand for the rest, but win no guess by that."""
    hidden = adapted.weight[[3]].detach()[None, None] / 100  # all logits are near
    [token] = adapted.logits(hidden).argmax(-1).flatten().tolist()
    others = torch.tensor([n for n in range(20) if n != token])
    assert (
        drafts.draft_loss(adapted, hidden, torch.tensor([[[token]]]), torch.tensor([token]), others)[2] == 1
    )


def test_sampled_others_are_weighted_as_the_whole_rest(adapted):
    torch.manual_seed(0)
    hidden, targets = torch.randn(1, 1, 1, 96) / 50, torch.tensor([[[3]]])
    ids, rest = torch.arange(20), torch.arange(20, adapted.config.vocab_size)
    loss = lambda others: drafts.draft_loss(adapted, hidden, targets, ids, others, torch.ones_like)[0].item()
    sampled = [loss(rest[torch.randperm(len(rest))[:60]]) for _ in range(100)]
    assert np.mean(sampled) == pytest.approx(loss(rest), abs=0.02)


# --- Training ---


def job(folders, dtype="float32", **changed) -> drafts.Drafts:
    model = load(folders["tied"], "cpu", dtype)[0]
    drafts.new_adapter(model, 4, WIDTH, seed=0)
    settings = {"rank": 4, "width": WIDTH, "batch_size": 4, "anchors": 3, "warmup": 0} | changed
    return drafts.Drafts(model, corpus(), corpus(), drafts.Drafting(**settings))


def step(job, number=0):
    losses = job.step([row for _, row in zip(range(4), job.rows())], number, lambda rows: None)
    return losses, torch.cat([p.grad.flatten() for p in job.trained.values()])


def test_only_the_adapter_has_gradients(folders):
    made = job(folders)
    step(made)
    names = {name for name, p in made.model.named_parameters() if p.grad is not None}
    assert names == made.trained.keys() and all(name.endswith((".A", ".B", ".row")) for name in names)
    assert made.model.model.embed_tokens.row.grad.abs().sum() > 0
    for layer in adapted_layers(made.model).values():
        assert layer.B.grad.abs().sum() > 0 and layer.A.grad.abs().sum() == 0  # B begins as zeros
        layer.B.data.normal_(0, 0.1)
    made.optimizer.zero_grad()
    step(made)
    assert all(layer.A.grad.abs().sum() > 0 for layer in adapted_layers(made.model).values())


def test_kept_keys_and_values_change_nothing(folders):
    kept, anew = job(folders), job(folders, cache_gb=0.0)
    for number in range(2):
        (losses, gradient), (other_losses, other) = step(kept, number), step(anew, number)
        assert losses == other_losses and torch.equal(gradient, other)
    assert kept.known.kept and not anew.known.kept


def test_a_base_in_bfloat16_trains_an_adapter_in_float32(folders):
    losses, gradient = step(job(folders, "bfloat16"))
    assert np.isfinite(losses["draft_loss"]) and gradient.dtype == torch.float32


def test_simulation_counts_the_cycles_of_a_draft_that_is_always_or_never_right(folders, monkeypatch):
    made = job(folders)
    run = lambda: drafts.simulate(made.model, made.known_heldout, [0], WIDTH)
    monkeypatch.setattr(drafts, "draft_targets", lambda *_: torch.full((1, WIDTH), -1))
    assert run() == {0: 12}  # 24 answer tokens, 2 a cycle
    zeros = torch.zeros(1, 1, WIDTH, made.model.config.hidden_size)
    guess = int(made.model.logits(zeros[0, 0, 0]).argmax())
    monkeypatch.setattr(drafts, "draft_pass", lambda *_: zeros)
    monkeypatch.setattr(drafts, "draft_targets", lambda *_: torch.full((1, WIDTH), guess))
    assert run() == {4: 4}


def test_a_users_next_turn_is_neither_a_target_nor_simulated(folders):
    made = job(folders)
    for known in (made.known, made.known_heldout):
        known.corpus.trainable[18:24] = False  # document 0: answers at 6..17 and 24..29
    drawn = next(anchors for document, anchors in drafts.endless_groups(made.corpus, 10, 0) if document == 0)
    assert {*drawn} <= {*range(5, 16), *range(23, 28)}
    _, anchors, targets, _ = made.batch([(0, [14] * 3)], 0)
    assert anchors[0, 0] == 14 and (targets[0, 0] >= 0).tolist() == [True, True, False, False]
    kept = drafts.simulate(made.model, made.known_heldout, [0], WIDTH)
    assert sum((2 + m) * n for m, n in kept.items()) in (12, 13)  # the last cycle may end behind the answer


# --- Commands ---


def command(folder, **options) -> list[str]:
    """A short training on answers that `generate --output` might have written."""
    if not (folder / "own.jsonl").exists():
        ids = [[n, n + 1, n, n + 2, 9, 8] for n in range(12)]
        lines = [{"prompt": f"{n} and {n}?", "text": "", "token_ids": own} for n, own in enumerate(ids)]
        (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    defaults = {"model": ROOT / "tiny" / "checkpoint", "data": folder / "own.jsonl", "rank": 2, "width": 3}
    defaults |= {"steps": 3, "batch-size": 4, "anchors": 2, "save-every": 1, "threads": 1, "device": "cpu"}
    options = defaults | {"out": folder / "out"} | options
    options = {name: value for name, value in options.items() if value is not None}
    return ["draft", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def trains(folder, status=0, **options) -> str:
    result = CliRunner().invoke(train.main, command(folder, **options))
    assert result.exit_code == status and "Traceback" not in result.output, result.output
    return result.output


def weights(folder) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_killed_run_goes_on_to_the_same_adapter_and_two_processes_train_like_one(tmp_path):
    whole, killed, two = (tmp_path / name for name in ("whole", "killed", "two"))
    options = {"heldout": tmp_path / "own.jsonl"}
    trains(tmp_path, out=whole, **options)
    kill_after_a_checkpoint(command(tmp_path, out=killed, **options), killed)
    assert not (killed / "adapter_config.json").exists()
    assert "Resuming at step" in trains(tmp_path, out=killed, **options)
    assert weights(whole) == weights(killed)
    line = [*TORCHRUN, ROOT / "train.py", *command(tmp_path, out=two, **options)]
    subprocess.run(line, check=True, capture_output=True)
    one, two = ([*map(json.loads, open(out / "metrics.jsonl"))] for out in (whole, two))
    for alone, shared in zip(one, two, strict=True):
        assert shared["draft_loss"] == pytest.approx(alone["draft_loss"], rel=1e-4)
        assert shared.get("heldout_kept") == alone.get("heldout_kept")
    kept = json.loads((whole / "adapter_config.json").read_text())["heldout_kept"]
    assert kept == one[-1]["heldout_kept"] and len(kept) == 4
    base = load(ROOT / "tiny" / "checkpoint", "cpu")[0]
    assert adapter_of(load_adapter(base, whole)).heldout_kept == (kept if any(kept) else [])


def test_an_adapter_goes_on_from_where_it_was(tmp_path):
    first, more = tmp_path / "first", tmp_path / "more"
    trains(tmp_path, out=first, rank=3)
    again = {"adapter": first, "out": more, "steps": 1, "lr": 1e-9, "rank": None, "width": None}
    trains(tmp_path, **again)
    assert weights(more) == weights(first)
    config = json.loads((more / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["draft_width"]) == (3, 6, 3)
    assert "heldout_kept" not in config
    trains(tmp_path, **again | {"heldout": tmp_path / "own.jsonl"})  # all steps are done, and its counts come
    assert sum(json.loads((more / "adapter_config.json").read_text())["heldout_kept"])
    assert "holds a run with seed 0, not 1" in trains(tmp_path, status=2, **again | {"seed": 1})
    assert "leave --rank out" in trains(tmp_path, status=2, **again | {"rank": 3})


@pytest.mark.parametrize("options, sentence", [
    ({"rank": 10**4}, "allow 1 to"),
    ({"width": 512}, "--width is 512"),
    ({"model": "no"}, "no such folder"),
    ({"data": "long.jsonl"}, "long.jsonl: a document has 30"),
    ({"heldout": "long.jsonl"}, "long.jsonl: a document has 30"),
], ids=str)  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    line = {"prompt": "a", "text": "", "token_ids": [5] * 3000}
    (tmp_path / "long.jsonl").write_text(json.dumps(line) + "\n")
    assert sentence in trains(tmp_path, status=2, **options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, shipped) -> tuple[str, str]:
    """A plain Qwen2 folder, whose tokenizer has no mask token, and an adapter that was trained on it."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("plain"), shipped
    model = Qwen2(replace(model.config, block_size=1, mask_token_id=None, tokenizer_size=None)).eval()
    model.load_state_dict(shipped[0].state_dict())
    save(model, tokenizer, folder / "base")
    whole = json.loads(tokenizer.files["tokenizer.json"])
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] != "|<MASK>|"]
    (folder / "base" / "tokenizer.json").write_text(json.dumps(whole))
    trains(folder, model=folder / "base", out=folder / "adapter", steps=1)
    return str(folder / "base"), str(folder / "adapter")


def runs(command, *arguments, **more):
    result = CliRunner().invoke(cli.cli, [command, "--device", "cpu", *arguments], **more)
    assert result.exit_code == 0, result.output
    return result


def test_every_command_takes_an_adapter_over_a_plain_base(plain, tmp_path):
    base, adapter = plain
    question, page = "Mia has 12 apples. How many?", tmp_path / "page.html"
    ar, verified = ["--model", base], ["--model", base, "--adapter", adapter, "--verify"]
    short, few = ["--max-new-tokens", "12"], ["--count", "2", "--json"]
    both = lambda *line, **more: [
        runs(line[0], *over, *short, *line[1:], **more).stdout for over in (verified, ar)
    ]
    drafted, plain_answer = map(json.loads, both("generate", "--json", question))
    assert drafted["text"] == plain_answer["text"] and "draft" in drafted["passes"]
    lossless, exact = map(json.loads, both("eval", *few))
    assert lossless["accuracy"] == exact["accuracy"]
    first, second = both("chat", input=f"{question}\nAnd now?\n/exit\n")
    assert first == second
    runs("generate", *verified, *short, "--trace", str(page), question)
    assert page.stat().st_size > 1000
    rows = json.loads(runs("sweep", *verified[:-1], *short, *few).stdout)["rows"]
    assert [row["verify"] for row in rows] == [False, True]


def test_an_adapter_without_verify_says_what_it_is_worth(plain):
    base, adapter = plain
    said = lambda *more: (
        runs("generate", "--model", base, "--adapter", adapter, "--max-new-tokens", "3", "hi", *more).stderr
    )
    assert "without --verify it changes nothing" in said()
    assert "quality is not guaranteed" in said("--block-size", "8")
    [note] = [line for line in said("--verify").splitlines() if line.startswith("Note")]
    assert "no held-out counts" in note  # so nothing can be chosen
    assert "Note" not in said("--verify", "--draft-width", "3")
