"""Load and save: what is right loads exactly, what is wrong is named in one sentence."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastdllm
from fastdllm import Config, Decoding, InputError, generate, load, parse_config, save

NORM = "model.norm.weight"


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the untied golden checkpoint that a test may damage."""
    return shutil.copytree(folders["untied"], tmp_path / "copy")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def shard(folder):
    """Spread the weights over two files with an index, as large checkpoints are."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_shards_equal_one_file(folder, golden_models):
    shard(folder)
    model, _ = load(folder, "cpu")
    for name, p in golden_models["untied"].named_parameters():
        assert torch.equal(p, model.get_parameter(name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_parameter_has_the_asked_dtype(folder, dtype):
    model, _ = load(folder, "cpu", dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert len(generate(model, [[1, 2, 3]], Decoding(8, max_new_tokens=4))[0].tokens) == 4


def test_dtype_auto_is_the_files(folder):
    edit_weights(folder, lambda weights: weights.update({n: w.bfloat16() for n, w in weights.items()}))
    assert load(folder, "cpu")[0].lm_head.weight.dtype == torch.bfloat16


def test_dtype_auto_is_one_dtype_where_the_files_mix_them(folder):
    edit_weights(folder, lambda weights: weights.update({NORM: weights[NORM].bfloat16()}))
    assert {p.dtype for p in load(folder, "cpu")[0].parameters()} == {torch.float32}


def test_a_tied_head_is_the_embedding_also_where_the_file_repeats_it(folders, golden_models, tmp_path):
    assert golden_models["tied"].lm_head.weight is golden_models["tied"].model.embed_tokens.weight
    folder = shutil.copytree(folders["tied"], tmp_path / "copy")
    edit_weights(
        folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    )
    model, _ = load(folder, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_unscaled_rope_may_be_spelt_out(folder):
    edit_config(folder, rope_scaling={"rope_type": "default"})
    assert load(folder, "cpu")


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_save_writes_what_load_reads(golden_models, tmp_path, name):
    save(golden_models[name], None, tmp_path)
    again, _ = load(tmp_path, "cpu")
    assert again.config == golden_models[name].config
    for key, p in golden_models[name].state_dict().items():
        assert torch.equal(p, again.state_dict()[key])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_save_replaces_a_checkpoint_of_several_files(golden_models, folder):
    shard(folder)
    model, _ = load(folder, "cpu")
    model.get_parameter(NORM).data[:] = 0
    save(model, None, folder)
    assert load(folder, "cpu")[0].get_parameter(NORM).abs().sum() == 0


def test_save_uses_the_published_names_and_keys(golden_models, folders, tmp_path):
    save(golden_models["tied"], None, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folders["tied"] / "model.safetensors").keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert saved.metadata() == {"format": "pt"}  # Transformers refuses files without it
    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((folders["tied"] / "config.json").read_text())
    assert {key: config[key] for key in original if key in config} == {k: v for k, v in original.items() if k in config}
    assert {"bd_size", "mask_token_id", "model_type", "architectures", "torch_dtype"} <= config.keys()


def test_an_autoregressive_model_is_saved_as_plain_qwen2(tmp_path):
    config = Config(64, 32, 64, 1, 2, 1, 16, 128)
    save(fastdllm.Qwen2(config), None, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "qwen2" and "bd_size" not in raw
    model, _ = load(tmp_path, "cpu")
    with pytest.raises(InputError, match="never adapted"):
        generate(model, [[1]], Decoding(32))


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(golden_models, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(fastdllm, "save_file", full_disk)
    with pytest.raises(OSError):
        save(golden_models["tied"], None, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_stop_and_mask_ids_come_from_the_files_that_have_them(folder, shipped):
    edit_config(folder, eos_token_id=None, mask_token_id=None)
    (folder / "generation_config.json").write_text('{"eos_token_id": [17, 18]}')
    assert load(folder, "cpu")[0].config.stop_token_ids == (17, 18)
    model, tokenizer = shipped
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    edit_config(folder, vocab_size=len(tokenizer))
    size = (len(tokenizer), 64)
    edit_weights(
        folder, lambda w: w.update({n: torch.zeros(size) for n in ("lm_head.weight", "model.embed_tokens.weight")})
    )
    config = load(folder, "cpu")[0].config
    assert config.mask_token_id == tokenizer.id("|<MASK>|")
    assert config.stop_token_ids == (17, 18, tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>"))
    assert config.tokenizer_size == len(tokenizer)


def drop(name):
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize("edit, message", [
    (drop(NORM), "tensor model.norm.weight is missing"),
    (lambda w: (w.pop(NORM), w.pop("lm_head.weight")), r"lm_head.weight is missing \(and 1 more\)"),
    (lambda w: w.update(extra=torch.zeros(2)), "tensor extra is not part of this model"),
    (lambda w: w.update({NORM: torch.zeros(65)}), r"model.norm.weight has shape \[65\], the config asks for \[64\]"),
])  # fmt: skip
def test_wrong_tensors_are_named(folder, edit, message):
    edit_weights(folder, edit)
    with pytest.raises(InputError, match=message):
        load(folder, "cpu")


def test_damaged_and_missing_files_are_named(folder):
    shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 100):
        second.write_bytes(damaged)
        with pytest.raises(InputError, match="model-00002-of-00002.safetensors: damaged"):
            load(folder, "cpu")
    second.unlink()
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors is missing"):
        load(folder, "cpu")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: cannot be read as JSON"):
        load(folder, "cpu")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json is missing"):
        load(folder, "cpu")


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_scaling"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": 66}, "does not divide by 4 heads"),
    ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
    ({"mask_token_id": 320}, "mask_token_id 320 is outside the vocabulary of 320"),
    ({"bd_size": 0}, "bd_size is 0"),
    ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ({"mask_token_id": "x"}, "mask_token_id is 'x', no int"),
    ({"rope_theta": "1e6"}, "rope_theta is '1e6', no float or int"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', no bool"),
    ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight is missing \(and 11 more\)"),
])  # fmt: skip
def test_configs_that_contradict_themselves_or_ask_for_more_are_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        load(folder, "cpu")


def test_rope_theta_is_read_from_either_place(folder, golden_models):
    raw = json.loads((folder / "config.json").read_text())
    theta = raw.pop("rope_theta")
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    assert parse_config(raw).rope_theta == theta == golden_models["untied"].config.rope_theta


def test_a_hub_id_is_found_in_the_cache_without_a_network(folders, tmp_path):
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / "abc"
    shutil.copytree(folders["untied"], snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    code = "from fastdllm import *; model, _ = load('somebody/tiny', 'cpu'); print(model.config.block_size)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "32\n"


def test_unknown_places_devices_and_dtypes_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path, device, dtype, message in [
        (tmp_path / "nowhere", "cpu", "auto", "no such folder"),
        ("nobody/nothing", "cpu", "auto", "hf download nobody/nothing"),
        (folder, "tpu", "auto", "device 'tpu' is not available"),
        (folder, "cpu:x", "auto", "device 'cpu:x' is not available"),
        (folder, "cpu", "int3", "dtype 'int3' is not known"),
    ]:
        with pytest.raises(InputError, match=message):
            load(path, device, dtype)
