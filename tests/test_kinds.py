"""Checkpoints that people have, by kind: they work, or are refused by what is wrong with them."""

import json
import shutil

import pytest
from click.testing import CliRunner
from conftest import ROOT, change_config
from safetensors.torch import load_file, save_file

import cli
import train
from checkpoint import load, load_tokenizer
from commands.prompts import encode_prompts
from fastdllm import Decoding, InputError


def test_weights_that_are_there_twice_or_not_at_all_are_refused(folder):
    weights = folder / "model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(weights), "model-00001-of-00001.safetensors")}
    shutil.copy(weights, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="a model.safetensors that it does not name; remove one"):
        load(folder, "cpu")
    weights.unlink()
    load(folder, "cpu")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="model.safetensors is missing; weights are read from"):
        load(folder, "cpu")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(InputError, match="pointer of Git LFS"):
        load(folder, "cpu")


def test_rotary_frequencies_in_the_file_are_skipped(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = weights["model.norm.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load(folder, "cpu")


def test_an_adapter_is_not_taken_for_a_checkpoint():
    with pytest.raises(InputError, match="is an adapter, not a checkpoint; give its base"):
        load(ROOT / "adapters" / "qwen2.5-coder-0.5b-instruct", "cpu")


def test_a_long_context_model_is_cut_to_its_trained_positions_with_one_note(folder):
    change_config(folder, dual_chunk_attention_config={"original_max_position_embeddings": 512})
    result = CliRunner().invoke(cli.cli, ["info", str(folder)])
    assert result.exit_code == 0 and result.stderr.count("Note: ") == 1 and "Warning" not in result.stderr
    assert "max position embeddings  512" in result.stdout


def test_a_message_that_the_template_drops_is_refused(tmp_path, shipped):
    shutil.copytree(ROOT / "tiny" / "checkpoint", tmp_path, dirs_exist_ok=True)
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer, user = load_tokenizer(tmp_path), {"role": "user", "content": "Hi"}
    assert tokenizer.render([user]) == "Hi\n"
    with pytest.raises(InputError, match="leaves the system message out"):
        tokenizer.chat([{"role": "system", "content": "Be brief."}, user])
    for role in ("human", "developer"):
        with pytest.raises(InputError, match=f"leaves the {role} message out"):
            request = {"messages": [user, {"role": role, "content": "And\nnow?"}]}
            encode_prompts({"line 1": request}, tokenizer, Decoding(), shipped[0].config)


def test_a_mask_never_gets_the_id_of_a_stop_token(tmp_path):
    """As where only vocab.json and merges.txt were copied: then the first free id is the end token's."""
    folder = shutil.copytree(ROOT / "tiny" / "checkpoint", tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = []
    size = max(tokenizer["model"]["vocab"].values()) + 1
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").unlink()
    change_config(folder, mask_token_id=None, bd_size=None, model_type="qwen2", eos_token_id=size)
    (tmp_path / "data.jsonl").write_text('{"text": "1 2 3 4"}\n' * 40)
    command = ["adapt", "--model", folder, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out"]
    result = CliRunner().invoke(train.main, [*map(str, command), "--seq-len", "32", "--device", "cpu"])
    assert result.exit_code == 2 and "is a stop token" in result.stderr
