"""Load and save: what is right loads exactly, what is wrong is named in one sentence."""

import json
import os
import shutil
import socket
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load, load_tokenizer, parse_config, replace_file, require_plain, save
from fastdllm import Config, Decoding, InputError, Qwen2, generate

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
        folder,
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}),
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
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(folders["tied"] / "model.safetensors").keys()
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as saved:
        assert saved.metadata() == {"format": "pt"}  # Transformers refuses files without it
    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((folders["tied"] / "config.json").read_text())
    assert {key: config[key] for key in original if key in config} == {
        k: v for k, v in original.items() if k in config
    }
    assert {"bd_size", "mask_token_id", "model_type", "architectures", "torch_dtype"} <= config.keys()


def test_an_autoregressive_model_is_saved_as_plain_qwen2(tmp_path):
    config = Config(64, 32, 64, 1, 2, 1, 16, 128)
    save(Qwen2(config), None, tmp_path)
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

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
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
    edit_config(folder, vocab_size=tokenizer.size)
    size = (tokenizer.size, 64)
    edit_weights(
        folder,
        lambda w: w.update({n: torch.zeros(size) for n in ("lm_head.weight", "model.embed_tokens.weight")}),
    )
    config = load(folder, "cpu")[0].config
    assert config.mask_token_id == tokenizer.id("|<MASK>|")
    assert config.stop_token_ids == (17, 18, tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>"))
    assert config.tokenizer_size == tokenizer.size


def test_the_end_of_a_distillations_turns_stops(folder):
    """Its own token, which tokenizer_config.json names as an object; there is no ChatML in it."""
    end = "<｜end▁of▁sentence｜>"
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    entry = {"content": end, "special": True}
    settings = {"added_tokens_decoder": {"1": entry}, "eos_token": entry, "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_config(folder, eos_token_id=None)
    assert load(folder, "cpu")[0].config.stop_token_ids == (1,)


TOKENIZER_FILES = {
    "vocab.json": '{"a": 0, "b": 1}',
    "merges.txt": "#version: 0.2\n",
    "added_tokens.json": '{"<|im_end|>": 2}',
    "tokenizer_config.json": '{"eos_token": "<|im_end|>"}',
    "special_tokens_map.json": '{"bos_token": "a"}',
    "chat_template.jinja": "{{ bos_token }}",
}


def test_save_keeps_every_file_of_the_tokenizer_and_none_of_an_older_one(folder, shipped, tmp_path):
    for name, content in TOKENIZER_FILES.items():
        (folder / name).write_text(content)
    model, tokenizer = load(folder, "cpu")
    save(model, tokenizer, tmp_path / "saved")
    written = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert {name: written[name].decode() for name in TOKENIZER_FILES} == TOKENIZER_FILES
    save(model, shipped[1], tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.files == shipped[1].files and again.template == shipped[1].template


def test_a_model_with_other_parameters_is_not_saved(folders, tmp_path):
    model, _ = load(folders["untied"], "cpu")
    require_plain(model, "cannot be saved")
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    with pytest.raises(InputError, match="adapter or prepacked weights cannot be saved; take the plain one"):
        save(model, None, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def drop(name):
    return lambda weights: weights.pop(name)


@pytest.mark.parametrize("edit, message", [
    (drop(NORM), "tensor model.norm.weight is missing"),
    (lambda w: (w.pop(NORM), w.pop("lm_head.weight")), r"lm_head.weight is missing \(and 1 more\)"),
    (lambda w: w.update(extra=torch.zeros(2)), "tensor extra is not part of this model"),
    (lambda w: w.update({NORM: torch.zeros(65)}), r"model.norm.weight has shape \[65\], .* asks for \[64\]"),
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
    ({"model_type": "llama"}, "model_type is 'llama', which is no Qwen2; qwen2 and Fast_dLLM_Qwen work"),
    ({"model_type": None}, "model_type is None"),
    ({"clean": "causal"}, "clean is 'causal', it must be block"),
    ({"dual_chunk_attention_config": {"chunk_size": 7}}, "an object with original_max_position_embeddings"),
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
    ({"mask_token_id": "x"}, "mask_token_id is 'x', it must be a token id"),
    ({"rope_theta": "1e6"}, "rope_theta is '1e6', it must be a number"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', it must be true or false"),
    ({"hidden_size": 2**31}, "hidden_size is 2147483648, it must be a positive integer below"),
    ({"bd_size": True}, "bd_size is True"),
    ({"rope_theta": 1e30}, r"rope_theta is 1e\+30, it must be a number from 1 to 1e12"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ({"rope_theta": float("nan")}, "rope_theta is nan"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e30}}, r"rope_theta is 1e\+30"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"eos_token_id": [[300]]}, r"eos_token_id is \[\[300\]\], it must be a token id or a list of token ids"),
    ({"eos_token_id": -1}, "eos_token_id is -1"),
    ({"eos_token_id": "300"}, "eos_token_id is '300'"),
    ({"eos_token_id": True}, "eos_token_id is True"),
    ({"model_type": "x\ny" * 20_000}, "^.{,200}$"),
    ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight is missing \(and 11 more\)"),
])  # fmt: skip
def test_configs_that_contradict_themselves_or_ask_for_more_are_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        load(folder, "cpu")


def test_a_model_that_is_no_qwen2_is_refused_by_its_name():
    """Whatever else its config lacks or holds; the real config of a vision model sits in text_config."""
    for other in ("gemma3", "LLaDA", "gpt2", "qwen3", "qwen2_moe"):
        with pytest.raises(InputError, match=f"model_type is '{other}', which is no Qwen2"):
            parse_config({"model_type": other, "n_embd": 768, "quantization_config": {"quant_method": "awq"}})
    vision = {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2", "hidden_size": 64}}
    with pytest.raises(InputError, match="model_type is 'qwen2_5_vl', which is no Qwen2"):
        parse_config(vision)


@pytest.mark.parametrize("quantised, name", [
    ({"quant_method": "awq", "bits": 4}, "awq"),
    ({"quant_method": "gptq", "bits": 8}, "gptq"),
    ({"quant_method": "fp8"}, "fp8"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"bits": 4}, "no name"),
])  # fmt: skip
def test_quantised_weights_are_refused_by_their_method(folder, quantised, name):
    edit_config(folder, quantization_config=quantised, vocab_size=7)
    with pytest.raises(InputError, match=rf"the weights are quantised \('{name}'\); dequantise them first"):
        load(folder, "cpu")


def test_positions_end_where_an_attention_of_its_own_would_begin(folder, tmp_path):
    edit_config(folder, max_position_embeddings=2048)
    edit_config(folder, dual_chunk_attention_config={"original_max_position_embeddings": 512})
    with pytest.warns(UserWarning, match="only 512 positions are used: dual_chunk_attention_config") as notes:
        model, _ = load(folder, "cpu")
    assert model.config.max_position_embeddings == 512 and len(notes) == 1
    save(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 512


def test_rotary_tables_in_the_file_are_skipped(folder, golden_models):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(8)}))
    model, _ = load(folder, "cpu")
    assert torch.equal(model.lm_head.weight, golden_models["untied"].lm_head.weight)


@pytest.mark.parametrize("stops", [[[17]], -1, "17", 2**31, {"id": 17}, 1.5])
def test_stop_ids_of_the_generation_config_are_checked(folder, stops):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(InputError, match="eos_token_id is .*, it must be a token id"):
        load(folder, "cpu")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": "caf\xe9"}', b"[]", b"", b"1" * 5000])
def test_json_that_cannot_be_read_is_named_in_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(
        InputError, match=f"{name}: (cannot be read as JSON|must hold one JSON object)"
    ) as caught:
        load(folder, "cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_value_as_deep_as_json_allows_is_refused(folder):
    """Python parses it, and cannot write it back at a greater depth of calls."""
    value, deeper = [], lambda call, depth: call() if depth == 0 else deeper(call, depth - 1)
    for _ in range(sys.getrecursionlimit() - 250):
        value = [value]
    raw = json.loads((folder / "config.json").read_text()) | {"eos_token_id": value}
    with pytest.raises(InputError, match="eos_token_id is"):
        deeper(lambda: parse_config(raw), 100)


PATTERNS = ["*", "*.safetensors", "model-[0-9].safetensors", "model-?.safetensors"]
OUTSIDE = ["../copy/model.safetensors", "sub/model.safetensors", "/model.safetensors"]
OTHERS = ["model.bin", "model.safetensors\n", "", 7, ["model.safetensors"]]


@pytest.mark.parametrize("name", PATTERNS + OUTSIDE + OTHERS, ids=str)
def test_an_index_names_only_weight_files_of_its_folder(folder, name):
    weight_map = {"model.embed_tokens.weight": "model.safetensors", NORM: name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="weight_map must name .safetensors files of the same folder"):
        load(folder, "cpu")


@pytest.mark.parametrize("name", PATTERNS + OUTSIDE, ids=str)
def test_a_download_takes_no_pattern_from_an_index(folder, monkeypatch, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    asked = []
    download = lambda hub_id, allow_patterns: asked.extend(allow_patterns) or str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match="weight_map"):
        load("somebody/hostile", "cpu")
    assert asked and not any("*" in pattern or pattern == name for pattern in asked)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A Hub whose every repository is `folder`, and the list of patterns that were asked of it."""
    asked, cache = [], tmp_path / "cache"
    cache.mkdir()

    def download(hub_id, allow_patterns):
        asked.append(list(allow_patterns))
        for name in {*allow_patterns} & {path.name for path in folder.iterdir()}:
            shutil.copy(folder / name, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_config_is_judged_before_anything_else_is_fetched(folder, hub):
    edit_config(folder, model_type="gemma3")
    with pytest.raises(InputError, match="model_type is 'gemma3'"):
        load("somebody/gemma", "cpu")
    assert hub == [["config.json"]]


def test_weights_are_fetched_after_the_tokenizer_was_read(folder, hub, shipped):
    for name, content in shipped[1].files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match="the tokenizer has 749 ids, the embedding only 320 rows"):
        load("somebody/tiny", "cpu")
    assert hub[0] == ["config.json"] and "tokenizer.json" in hub[1]
    assert not any(name.endswith(".safetensors") for names in hub for name in names)


def test_every_shard_of_a_hub_id_is_fetched(folder, hub, golden_models):
    shard(folder)
    model, _ = load("somebody/tiny", "cpu")
    assert torch.equal(model.lm_head.weight, golden_models["untied"].lm_head.weight)
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= {*hub[-1]}


@pytest.mark.parametrize(
    "path", ["tiny/chekpoint", "./tiny/x", "../x", "/nowhere/x", "nowhere", "a/b/c", ".x/y"]
)
def test_a_near_miss_of_a_path_asks_no_network(hub, monkeypatch, path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=f"^{path}: no such folder; give a checkpoint's folder"):
        load(path, "cpu")
    assert hub == []


@pytest.mark.parametrize("error, reason", [
    (LocalEntryNotFoundError("Got: ConnectError\nAn error happened"), "no network"),
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    (TimeoutError(), "TimeoutError"),
])  # fmt: skip
def test_a_hub_that_cannot_be_reached_is_one_short_sentence(monkeypatch, error, reason):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        load("nobody/nothing", "cpu")
    message = str(caught.value)
    assert message.startswith(f"nobody/nothing: no such folder, and not reachable as a Hub id ({reason});")
    assert len(message) < 250


REFUSED = (
    "float64 int8 uint8 int64 uint16 bool complex64 float8_e4m3fn float8_e5m2 float8_e8m0fnu float4_e2m1fn_x2"
)


@pytest.mark.parametrize("dtype", REFUSED.split())
@pytest.mark.parametrize("name", [NORM, "extra"])
def test_dtypes_that_a_cast_would_distort_are_refused(folder, dtype, name):
    values = torch.zeros(64, dtype=torch.uint8)
    values = values.view(torch.float4_e2m1fn_x2) if "float4" in dtype else values.to(getattr(torch, dtype))
    edit_weights(folder, lambda weights: weights.update({name: values}))
    with pytest.raises(InputError, match=f"model.safetensors: {name} is [A-Z0-9_]+, only F32, BF16 and F16"):
        load(folder, "cpu", "float32")


def test_names_with_line_breaks_give_one_line(folder):
    edit_weights(folder, lambda weights: weights.update({"a\nb" * 1000: torch.zeros(2)}))
    with pytest.raises(InputError, match="tensor a ba b") as caught:
        load(folder, "cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_pipe_or_socket_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's whole path may be too long
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for name in ("pipe", "link", "socket", "."):
        with pytest.raises(InputError, match="is no regular file"):
            replace_file(tmp_path / name, lambda path: path.write_text("new"))
    assert (
        (tmp_path / "pipe").is_fifo()
        and (tmp_path / "link").is_symlink()
        and (tmp_path / "socket").is_socket()
    )
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("existing", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, existing):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    link.symlink_to("there/target")
    if existing:
        target.write_text("old")
    replace_file(link, lambda path: path.write_text("new"))
    assert link.is_symlink() and target.read_text() == link.read_text() == "new"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["target"]


def test_rope_theta_is_read_from_either_place(folder, golden_models):
    raw = json.loads((folder / "config.json").read_text())
    theta = raw.pop("rope_theta")
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    assert parse_config(raw).rope_theta == theta == golden_models["untied"].config.rope_theta
    assert parse_config(raw | {"rope_theta": None}).rope_theta == theta
    assert parse_config(raw | {"rope_theta": 5e5}).rope_theta == 5e5


def test_a_hub_id_is_found_in_the_cache_without_a_network(folders, tmp_path):
    snapshot = tmp_path / "hub" / "models--somebody--tiny" / "snapshots" / "abc"
    shutil.copytree(folders["untied"], snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    code = "from checkpoint import *; model, _ = load('somebody/tiny', 'cpu'); print(model.config.block_size)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "32\n"


def test_unknown_places_devices_and_dtypes_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path, device, dtype, message in [
        (tmp_path / "nowhere", "cpu", "auto", "no such folder"),
        ("nobody/nothing", "cpu", "auto", "hf download nobody/nothing"),
        (folder, "tpu", "auto", "device 'tpu' is not available"),
        (folder, "cpu:x", "auto", "device 'cpu:x' is not available"),
        (folder, "meta", "auto", "device 'meta' is not available"),
        (folder, "privateuseone", "auto", "device 'privateuseone' is not available"),
        (folder, "cpu", "int3", "dtype 'int3' is not known"),
        (folder, "cpu", torch.int8, "dtype torch.int8 is not known"),
    ]:
        with pytest.raises(InputError, match=message):
            load(path, device, dtype)
