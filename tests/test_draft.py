"""The draft adapter: what trains, what a group of masks sees, and that known tokens never meet it."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

import cli
import fast
import fastdllm
import train
import train as drafts
from benchmarks.drafts import main as compare_drafts
from fast import RecordedPasses, prepack
from fastdllm import (
    Decoding,
    InputError,
    KVCache,
    LowRank,
    Qwen2,
    adapted_layers,
    adapter_tensors,
    add_adapter,
    base_digest,
    causal_attention,
    generate,
    load,
    load_adapter,
    run_window,
    save,
    save_adapter,
)
from train import Drafting, DraftTrainer, Known, draft, draft_loss, draft_targets, simulate

WIDTH = 4
SCRIPT = str(ROOT / "train.py")


@pytest.fixture(autouse=True)
def not_compiled():
    """Compiling takes seconds and changes nothing."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def adapted(folders):
    """A golden model with a random adapter."""
    model = load(folders["tied"], "cpu")[0]
    add_adapter(model, 4, 8.0)
    generator = torch.Generator().manual_seed(0)
    for tensor in adapter_tensors(model).values():
        tensor.data.normal_(0, 0.3, generator=generator)
    return model


def corpus(count=6, length=30, vocab=280):
    """Documents of a prompt of 6 tokens and an answer."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, count * length).astype(np.uint16)
    trainable = np.tile(np.arange(length) >= 6, count)
    return train.Corpus(tokens, trainable, np.arange(count + 1) * length)


def positions(tokens):
    return torch.arange(tokens.shape[1])[None]


# --- The adapter ---


def test_known_tokens_never_meet_the_adapter(adapted, folders):
    tokens = torch.randint(0, 280, (2, 20))
    plain = load(folders["tied"], "cpu")[0]
    expected = plain(tokens, positions(tokens), causal_attention)
    masked = torch.zeros(2, 20, 1, dtype=torch.bool)
    masked[:, 15:] = True
    for where in (None, torch.zeros_like(masked)):
        assert torch.equal(adapted(tokens, positions(tokens), causal_attention, where), expected)
    got = adapted(tokens, positions(tokens), causal_attention, masked)
    assert torch.equal(got[:, :15], expected[:, :15])
    assert not torch.allclose(got[:, 15:], expected[:, 15:])


def test_with_an_adapter_ar_is_the_bases_and_costs_nothing_and_verify_is_ar(adapted, folders, monkeypatch):
    rng = random.Random(0)
    prompts = [[rng.randrange(280) for _ in range(rng.randrange(1, 30))] for _ in range(7)]
    knobs = Decoding(block_size=1, max_new_tokens=20, stop_token_ids=(7,), batch_size=3)
    plain = generate(load(folders["tied"], "cpu")[0], prompts, knobs)
    for ahead in (False, True):
        drafts = replace(knobs, block_size=None, verify=True, draft_width=4, draft_ahead=ahead)
        verified = generate(adapted, prompts, drafts)
        assert [r.tokens for r in verified] == [r.tokens for r in plain]
        assert [r.finish_reason for r in verified] == [r.finish_reason for r in plain]
        assert verified == generate(adapted, prompts, drafts, RecordedPasses(adapted, record=False))
    monkeypatch.setattr(LowRank, "forward", None)  # a product of the adapter would fail
    for one, other in zip(generate(adapted, prompts, knobs), plain):
        assert one.tokens == other.tokens and one.passes == other.passes


def test_a_saved_adapter_loads_as_it_was_under_pefts_names(adapted, folders, tmp_path):
    adapted.config = replace(adapted.config, draft_width=WIDTH)
    save_adapter(adapted, tmp_path, 8.0, "some/base", base_digest(adapted))
    model = load(folders["tied"], "cpu", "bfloat16")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path)
    assert model.config.draft_width == WIDTH
    tensors = adapter_tensors(model)
    for name, tensor in adapter_tensors(adapted).items():
        assert torch.equal(tensors[name], tensor.bfloat16())
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert tensors[name].shape == (4, 208)
    assert not any("adapter" in name or "mask_row" in name for name in model.state_dict())


def test_an_adapter_gives_a_plain_base_its_mask(adapted, folders, tmp_path):
    save_adapter(adapted, tmp_path, 8.0, "some/base", base_digest(adapted))
    model = load(folders["tied"], "cpu")[0]
    model.config = replace(model.config, mask_token_id=None)
    assert load_adapter(model, tmp_path).config.mask_token_id == 285
    other = load(folders["tied"], "cpu")[0]
    other.config = replace(other.config, mask_token_id=None, tokenizer_size=286)
    with pytest.raises(InputError, match="its mask is id 285"):  # a token that texts have
        load_adapter(other, tmp_path)


def test_other_weights_are_a_warning(adapted, folders, tmp_path):
    save_adapter(adapted, tmp_path, 8.0, "some/base", "of something else")
    with pytest.warns(UserWarning, match="other weights.*some/base"):
        load_adapter(load(folders["tied"], "cpu")[0], tmp_path)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"r": 3}, "does not fit"),
        ({"r": "4"}, "needs r"),
        ({"masks_only": False}, "no adapter that is on at masks only"),
        ({"trainable_token_indices": [7]}, "its mask is id 7"),
        ({"trainable_token_indices": None}, "one id"),
        ({"draft_width": 0}, "draft_width is 0"),
        ({"draft_width": "8"}, "draft_width is 8"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_sentence_and_changes_nothing(
    adapted, folders, tmp_path, change, sentence
):
    save_adapter(adapted, tmp_path, 8.0, "some/base", base_digest(adapted))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    model = load(folders["tied"], "cpu")[0]
    with pytest.raises(InputError, match=sentence):
        load_adapter(model, tmp_path)
    assert model.mask_row is None and not any(layer.adapter for layer in adapted_layers(model).values())


def test_an_adapter_of_another_shape_and_a_rank_beyond_the_layers_are_refused(adapted, folders, tmp_path):
    save_adapter(adapted, tmp_path, 8.0, "some/base", base_digest(adapted))
    other = load(folders["untied"], "cpu")[0]
    other.config = replace(other.config, mask_token_id=285)
    with pytest.raises(InputError, match="does not fit"):
        load_adapter(other, tmp_path)
    with pytest.raises(InputError, match="allow 1 to 32"):
        add_adapter(adapted, 97, 8.0)
    with pytest.raises(InputError, match="adapter_config.json is missing"):
        load_adapter(other, folders["tied"])


def test_a_retrained_adapter_does_not_go_on_with_the_answers_of_the_old_one(adapted, folders, tmp_path):
    save_adapter(adapted, tmp_path / "adapter", 8.0, "some/base", base_digest(adapted))
    chosen = {"model": str(folders["tied"]), "adapter": str(tmp_path / "adapter")}
    before = cli.header_of(chosen, adapted, Decoding())
    assert before == cli.header_of(chosen, adapted, Decoding())
    os.utime(tmp_path / "adapter" / "adapter_model.safetensors", ns=(1, 1))  # as if written at another time
    assert before != cli.header_of(chosen, adapted, Decoding())


def test_an_adapter_is_loaded_before_prepacking_and_a_full_disk_is_an_os_error(
    adapted, tmp_path, monkeypatch
):
    save_adapter(adapted, tmp_path, 8.0, "some/base", base_digest(adapted))

    def fails(*given):
        raise fastdllm.SafetensorError("No space left on device")

    monkeypatch.setattr(fastdllm, "save_file", fails)
    with pytest.raises(OSError, match="adapter_model.safetensors: cannot be written"):
        save_adapter(adapted, tmp_path, 8.0, "some/base", "")
    assert load_adapter(adapted, tmp_path).mask_row is not None  # the earlier one is whole
    with pytest.raises(InputError, match="load it before"):
        load_adapter(prepack(adapted), tmp_path)


def test_an_answer_trains_behind_the_prompt_that_was_asked(shipped):
    """A record with both fields is answered for `prompt`, by cli.py too."""
    record = {"prompt": "hi", "messages": [{"role": "user", "content": "other"}], "token_ids": [5, 6]}
    asked = shipped[1].chat([{"role": "user", "content": "hi"}])
    assert train.document_of(record, shipped[1]) == (asked + [5, 6], [False] * len(asked) + [True] * 2)


# --- Groups ---


def test_a_group_sees_the_known_tokens_up_to_its_anchor_and_itself_as_in_decoding(adapted):
    known = Known(adapted, corpus(), 1e9)
    known_floats = lambda document: drafts.known_pass(adapted, known.tokens(document))
    anchors = torch.tensor([[5, 9, 20], [7, 6, 13]])
    got = draft(adapted, [known_floats(0), known_floats(3)], anchors, WIDTH)
    for row, document in enumerate((0, 3)):
        for group, anchor in enumerate(anchors[row].tolist()):
            masks = torch.full((WIDTH,), adapted.config.mask_token_id)
            tokens = known.tokens(document)
            cache = KVCache(adapted.config, 1, anchor + 1 + WIDTH, adapted.weight)
            run_window(adapted, tokens[None, :anchor], [0], cache, 1)
            window = torch.cat([tokens[anchor : anchor + 1], masks])[None]
            hidden = run_window(adapted, window, [anchor], cache, 1, None, True, WIDTH)
            torch.testing.assert_close(got[row, group], hidden[0, -WIDTH:], atol=1e-4, rtol=1e-4)


def test_targets_are_two_to_w_plus_one_behind_the_anchor_and_end_with_the_document():
    tokens = torch.arange(100, 110)
    got = draft_targets(tokens, torch.tensor([3, 6]), WIDTH)
    assert got.tolist() == [[105, 106, 107, 108], [108, 109, -1, -1]]
    tokens[6] = -1  # a user's turn: nothing behind it answers this anchor
    assert draft_targets(tokens, torch.tensor([3]), WIDTH).tolist() == [[105, -1, -1, -1]]


def test_every_anchor_is_drawn_once_an_epoch_the_prompts_last_token_too():
    rows = drafts.endless_groups(corpus(count=3), 3, WIDTH, 0)
    pieces = [piece for _, row in zip(range(24), rows) for piece in row]  # 22 anchors a document, 8 rows of 3
    assert {start - 1 for _, start, _ in pieces} == set(range(5, 28))
    assert len(set(pieces)) == 3 * 23 and len(pieces) == 72


def test_the_loss_over_the_whole_vocabulary_is_the_weighted_cross_entropy(adapted):
    hidden = torch.randn(2, 1, WIDTH, 96)
    targets = torch.tensor([[[3, 4, 3, 9]], [[9, 4, -1, -1]]])
    ids, others = torch.arange(20), torch.arange(20, adapted.config.vocab_size)
    loss, weight, _ = draft_loss(adapted, hidden, targets, ids, others, 0.5, 0)
    log_p = adapted.logits(hidden).log_softmax(-1)
    expected = -sum(
        0.5**j * log_p[row, 0, j, targets[row, 0, j]]
        for row, j in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    )
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
    draft_loss(adapted, hidden, targets, everything, none, 0.5, 1.0)[0].backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert 1 < kept < 5


def test_a_draft_is_kept_where_decoding_keeps_it_whatever_is_sampled(adapted):
    """Other tokens weigh more in the loss, since they stand for the rest, but win no guess by that."""
    hidden = adapted.model.embed_tokens.weight[[3]].detach()[None, None] / 100  # all logits are near
    [token] = adapted.logits(hidden).argmax(-1).flatten().tolist()
    others = torch.tensor([n for n in range(20) if n != token])
    loss, _, kept = draft_loss(
        adapted, hidden, torch.tensor([[[token]]]), torch.tensor([token]), others, 1.0, 0
    )
    assert kept == 1


def test_sampled_others_are_weighted_as_the_whole_rest(adapted):
    torch.manual_seed(0)
    hidden, targets = torch.randn(1, 1, 1, 96) / 50, torch.tensor([[[3]]])
    ids, rest = torch.arange(20), torch.arange(20, adapted.config.vocab_size)
    whole = draft_loss(adapted, hidden, targets, ids, rest, 1.0, 0)[0].item()
    sampled = [
        draft_loss(adapted, hidden, targets, ids, rest[torch.randperm(len(rest))[:60]], 1.0, 0)[0].item()
        for _ in range(100)
    ]
    assert np.mean(sampled) == pytest.approx(whole, abs=0.02)


# --- Training ---


def trainer(folders, variant="tied", **how):
    model = load(folders[variant], "cpu")[0]
    how = {
        "rank": 4,
        "width": WIDTH,
        "batch_size": 4,
        "anchors": 3,
        "warmup": 0,
        "others": 50,
        "int8": False,
    } | how
    return DraftTrainer(model, corpus(), corpus(), Drafting(**how))


def step(trainer, number=0):
    rows = [row for _, row in zip(range(4), trainer.rows(trainer.corpus, 0))]
    losses = trainer.step(trainer.batch(trainer.corpus, rows, number, 0))
    gradient = torch.cat([p.grad.flatten() for p in trainer.objective.parameters()])
    return losses, gradient


def test_only_the_adapter_has_gradients(folders):
    made = trainer(folders)
    step(made)
    assert [name for name, p in made.model.named_parameters() if p.grad is not None] == []
    assert made.objective.mask_row.grad.abs().sum() > 0
    for low_rank in made.objective.layers:
        assert low_rank.B.grad.abs().sum() > 0
        assert low_rank.A.grad.abs().sum() == 0  # B begins as zeros
        low_rank.B.data.normal_(0, 0.1)
    made.optimizer.zero_grad()
    step(made)
    assert all(low_rank.A.grad.abs().sum() > 0 for low_rank in made.objective.layers)


def test_kept_keys_and_values_change_nothing(folders):
    kept, anew = trainer(folders), trainer(folders, cache_gb=0.0)
    for number in range(2):
        losses, gradient = step(kept, number)
        other_losses, other = step(anew, number)
        assert losses == other_losses and torch.equal(gradient, other)
    assert kept.known.kept and not anew.known.kept


def test_int8_products_give_nearly_the_same_gradient_and_exact_known_tokens(folders):
    exact, rounded = trainer(folders), trainer(folders, int8=True)
    for made in (exact, rounded):
        generator = torch.Generator().manual_seed(1)
        for low_rank in made.objective.layers:
            low_rank.B.data.normal_(0, 0.05, generator=generator)
    losses, gradient = step(exact)
    other_losses, other = step(rounded)
    assert other_losses["draft_loss"] == pytest.approx(losses["draft_loss"], rel=0.02)
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.97
    assert torch.equal(exact.known[2], rounded.known[2])


def test_the_largest_number_of_a_bfloat16_row_keeps_its_sign_in_int8():
    levels, scale = fast.to_levels(torch.tensor([[160.0, -160.0, 80.0]]).bfloat16())  # 160 / scale is 127.5
    torch.testing.assert_close(
        (levels * scale).float(), torch.tensor([[160.0, -160.0, 80.0]]), rtol=0.02, atol=0
    )


@pytest.mark.parametrize("int8", [False, True])
def test_a_base_in_bfloat16_trains_an_adapter_in_float32(folders, int8):
    model = load(folders["tied"], "cpu", "bfloat16")[0]
    how = Drafting(rank=4, width=WIDTH, batch_size=4, anchors=3, others=50, int8=int8)
    losses, gradient = step(DraftTrainer(model, corpus(), None, how))
    assert np.isfinite(losses["draft_loss"]) and gradient.dtype == torch.float32


def test_simulation_counts_the_cycles_of_a_draft_that_is_always_or_never_right(folders, monkeypatch):
    made = trainer(folders)
    monkeypatch.setattr(drafts, "draft_targets", lambda tokens, anchors, width: torch.full((1, width), -1))
    assert simulate(made.model, made.known_heldout, [0], WIDTH) == {0: 12}  # 24 answer tokens, 2 a cycle
    guess = made.model.logits(torch.zeros(1, made.model.config.hidden_size)).argmax()
    monkeypatch.setattr(drafts, "draft", lambda *_: torch.zeros(1, 1, WIDTH, made.model.config.hidden_size))
    monkeypatch.setattr(drafts, "draft_targets", lambda *_: torch.full((1, WIDTH), int(guess)))
    assert simulate(made.model, made.known_heldout, [0], WIDTH) == {4: 4}


def test_a_users_next_turn_is_neither_a_target_nor_simulated(folders):
    made = trainer(folders)
    made.corpus.trainable[18:24] = False  # document 0: answers at 6..17 and 24..29
    row = next(row for row in train.endless_groups(made.corpus, 10, WIDTH, 0) if row[0][0] == 0)
    assert {start - 1 for _, start, _ in row} <= {*range(5, 16), *range(23, 28)}
    _, anchors, targets, _ = made.batch(made.corpus, [[(0, 15, 19)] * 3], 0, 0)
    assert anchors[0, 0] == 14 and (targets[0, 0] >= 0).tolist() == [True, True, False, False]
    made.known_heldout.corpus.trainable[18:24] = False
    kept = simulate(made.model, made.known_heldout, [0], WIDTH)
    assert sum((2 + m) * n for m, n in kept.items()) in (12, 13)  # the last cycle may end behind the answer


@pytest.mark.parametrize("option", ["--data", "--heldout"])
def test_a_document_longer_than_the_model_is_one_sentence(tmp_path, option):
    line = {"prompt": "a", "text": "", "token_ids": [5] * 3000}
    (tmp_path / "long.jsonl").write_text(json.dumps(line) + "\n")
    line = [*command(tmp_path), option, str(tmp_path / "long.jsonl"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(train.main, line)
    assert result.exit_code == 2 and "long.jsonl: a document has 30" in result.output


def command(tmp_path, **options):
    if not (tmp_path / "own.jsonl").exists():
        lines = [
            {"prompt": f"{n} and {n}?", "text": "", "token_ids": [n, n + 1, n, n + 2, 9, 8]}
            for n in range(12)
        ]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {
        **{"model": ROOT / "tiny" / "checkpoint", "data": tmp_path / "own.jsonl", "rank": 2, "width": 3},
        **{"steps": 8, "batch-size": 4, "anchors": 2, "save-every": 1, "threads": 1, "device": "cpu"},
    } | options
    return ["draft", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def test_answers_that_generate_wrote_are_read_token_by_token(tmp_path, shipped):
    command(tmp_path)
    [(tokens, trainable), *_] = train.read_documents(tmp_path / "own.jsonl", shipped[1])
    prompt = shipped[1].chat([{"role": "user", "content": "0 and 0?"}])
    assert tokens == [*prompt, 0, 1, 0, 2, 9, 8] and trainable == [False] * len(prompt) + [True] * 6


def test_a_killed_run_goes_on_to_the_same_adapter(tmp_path):
    line = command(tmp_path, heldout=tmp_path / "own.jsonl")
    whole, killed = ([*line, "--out", str(tmp_path / name), "--no-int8"] for name in ("whole", "killed"))
    assert CliRunner().invoke(train.main, whole).exit_code == 0
    run = subprocess.Popen([sys.executable, SCRIPT, *killed], stderr=subprocess.DEVNULL, cwd=ROOT)
    while run.poll() is None and not train.checkpoints(tmp_path / "killed"):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "killed" / "adapter_config.json").exists()
    assert CliRunner().invoke(train.main, killed).exit_code == 0
    first, second = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")
    )
    assert first == second


def test_an_adapter_goes_on_from_where_it_was(tmp_path):
    first, more = tmp_path / "first", tmp_path / "more"
    run = lambda *options: CliRunner().invoke(train.main, [*command(tmp_path, rank=3), *options])
    assert run("--out", str(first), "--no-int8", "--alpha", "5").exit_code == 0
    again = ["--adapter", str(first), "--steps", "1", "--lr", "1e-9", "--out", str(more)]
    for options, code in ([], 0), (["--int8"], 0), (["--no-int8"], 0), (["--seed", "1"], 2):
        result = run(*again, *options)  # only the last one is another run
        assert result.exit_code == code, result.output
    assert (more / "adapter_model.safetensors").read_bytes() == (
        first / "adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((more / "adapter_config.json").read_text())["lora_alpha"] == 5


@pytest.fixture(scope="module")
def plain(tmp_path_factory, shipped):
    """A plain Qwen2 folder, whose tokenizer has no mask token, and an adapter that was trained on it."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("plain"), shipped
    model = Qwen2(replace(model.config, block_size=1, mask_token_id=None, tokenizer_size=None)).eval()
    model.load_state_dict(shipped[0].state_dict())
    save(model, tokenizer, folder / "base")
    whole = json.loads(tokenizer.files["tokenizer.json"])
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] != "|<MASK>|"]
    (folder / "base" / "tokenizer.json").write_text(json.dumps(whole))
    line = [*command(folder, model=folder / "base", out=folder / "adapter", steps=1), "--no-int8"]
    assert CliRunner().invoke(train.main, line).exit_code == 0
    return str(folder / "base"), str(folder / "adapter")


def run(command, *arguments, **more):
    result = CliRunner().invoke(cli.cli, [command, "--device", "cpu", *arguments], **more)
    assert result.exit_code == 0, result.output
    return result


def test_every_command_takes_an_adapter_over_a_plain_base(plain, tmp_path):
    base, adapter = plain
    over, question = ["--model", base, "--adapter", adapter], "Mia has 12 apples. How many?"
    short = ["--max-new-tokens", "12"]
    asked = ["generate", "--json", *short, question]
    found, ar = (json.loads(run(*asked, *more).stdout) for more in ([*over, "--verify"], ["--model", base]))
    assert found["text"] == ar["text"] and "draft" in found["passes"]
    run("generate", *over, "--verify", *short, "--trace", str(tmp_path / "page.html"), question)
    assert re.search(r'"refused": ?\[\{', (tmp_path / "page.html").read_text())  # in its data
    answers = [
        json.loads(run("eval", *over, *more, *short, "--count", "2", "--json").stdout)
        for more in (["--verify"], [])
    ]
    assert answers[0]["accuracy"] == answers[1]["accuracy"]
    rows = json.loads(run("sweep", *over, *short, "--count", "2", "--json").stdout)["rows"]
    assert [row["verify"] for row in rows] == [False, True]
    run(
        "bench",
        *over,
        "--decoders",
        "ar,verify",
        "--prompts",
        "1",
        "--batch-sizes",
        "1",
        "--new-tokens",
        "4",
        "--rounds",
        "1",
    )
    talk = f"{question}\nAnd now?\n/exit\n"
    verified, plain_talk = (
        run("chat", *more, *short, input=talk).stdout for more in ([*over, "--verify"], ["--model", base])
    )
    assert verified == plain_talk


def test_an_adapter_without_verify_says_what_it_is_worth(plain):
    base, adapter = plain
    over = ["--model", base, "--adapter", adapter, "--max-new-tokens", "3", "hi"]
    assert "without --verify it changes nothing" in run("generate", *over).stderr
    assert "quality is not guaranteed" in run("generate", *over, "--block-size", "8").stderr
    assert "Note" not in run("generate", *over, "--verify").stderr


def test_other_weights_are_one_note(plain, tmp_path):
    base, adapter = plain
    shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    config |= {"base_digest": "of something else"}
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    over = ["--model", base, "--adapter", str(tmp_path / "other"), "--verify", "--max-new-tokens", "3", "hi"]
    [note] = [line for line in run("generate", *over).stderr.splitlines() if "trained on other" in line]
    assert note.startswith("Note: ") and "The text stays" in note


def test_two_processes_train_like_one(tmp_path):
    line = command(tmp_path, steps=3, heldout=tmp_path / "own.jsonl")
    one, two = ([*line, "--out", str(tmp_path / name), "--no-int8"] for name in ("one", "two"))
    assert CliRunner().invoke(train.main, one).exit_code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, SCRIPT, *two], check=True, capture_output=True, cwd=ROOT)
    records = [
        [json.loads(record) for record in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, two in zip(*records, strict=True):
        assert two["draft_loss"] == pytest.approx(one["draft_loss"], rel=1e-4)
        assert two.get("heldout_kept") == one.get("heldout_kept")


@pytest.mark.parametrize(
    "options, sentence",
    [({"rank": 10**4}, "allow 1 to"), ({"batch-size": 0}, "--batch-size"), ({"model": "no"}, "no")],
)
def test_bad_input_is_one_sentence(tmp_path, options, sentence):
    result = CliRunner().invoke(train.main, [*command(tmp_path, **options), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and sentence in result.output and "Traceback" not in result.output


def test_prepacked_weights_keep_the_adapter(adapted):
    masks = torch.full((1, 8), adapted.config.mask_token_id)

    @torch.inference_mode()
    def run(has_masks):
        cache = KVCache(adapted.config, 1, 8, adapted.weight)
        return run_window(adapted, masks, [0], cache, 1, None, has_masks, 8)

    plain = run(True)
    prepack(adapted)  # in place
    if not adapted.prepacked:
        pytest.skip("oneDNN is not in this build of torch")
    torch.testing.assert_close(run(True), plain, atol=1e-4, rtol=1e-3)
    for layer in adapted_layers(adapted).values():
        layer.adapter.B.data.zero_()
    assert (run(True) - plain).abs().max() > 0.1  # the low-rank layers matter, not only the masks' row


def test_a_comparison_of_drafts_does_not_go_on_with_another_run(plain, tmp_path, monkeypatch):
    base, adapter = plain
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    line = ["--model", base, "--adapter", adapter, "--prompts", str(prompts), "--out", str(out)]
    line += ["--widths", "2", "--ahead", "1", "--dtypes", "float32", "--max-new-tokens", "3"]
    prompts.write_text('{"set": "a", "prompt": "hi"}\n')
    assert CliRunner().invoke(compare_drafts, line).exit_code == 0
    whole = out.read_bytes()
    with open(out, "ab") as file:
        file.write(b'{"set"')  # of a run that was killed
    assert CliRunner().invoke(compare_drafts, ["--summary", "--out", str(out)]).exit_code == 0
    assert CliRunner().invoke(compare_drafts, line).exit_code == 0 and out.read_bytes() == whole
    prompts.write_text('{"set": "a", "prompt": "ho"}\n')
    other = CliRunner().invoke(compare_drafts, line)
    assert other.exit_code == 2 and "another --out" in other.output and out.read_bytes() == whole
    monkeypatch.setitem(sys.modules, "transformers", None)
    missing = CliRunner().invoke(compare_drafts, [*line, "--transformers"])
    assert missing.exit_code == 2 and "not installed" in missing.output and out.read_bytes() == whole
