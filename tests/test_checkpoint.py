"""Load and save: what is right loads exactly, what is wrong is named in one sentence."""

import json
import os
import reprlib
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT, change_config, write_files
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import load, load_tokenizer, parse_config, replace_file, save
from fastdllm import Config, Decoding, InputError, Qwen2, generate

NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
INDEX, SECOND = "model.safetensors.index.json", "model-00002-of-00002.safetensors"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_weights(folder, changes):
    """Put tensors in by name; None takes one out."""
    weights = load_file(folder / "model.safetensors") | changes
    save_file({name: w for name, w in weights.items() if w is not None}, folder / "model.safetensors")


def shard(folder):
    """Spread the weights over two files with an index, as large checkpoints are."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    index = {}
    for file, part in ("model-00001-of-00002.safetensors", names[:9]), (SECOND, names[9:]):
        save_file({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    write_files(folder, {INDEX: {"weight_map": index}})


def refusal(path, device="cpu", dtype="auto"):
    """The one short sentence with which a checkpoint is refused."""
    with pytest.raises(InputError) as caught:
        load(path, device, dtype)
    assert len(str(caught.value)) < 500
    return str(caught.value)


def same_weights(model, other):
    theirs = dict(other.named_parameters())
    return all(torch.equal(p, theirs.pop(name)) for name, p in model.named_parameters()) and not theirs


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


# --- Load ---


def test_shards_equal_one_file_in_a_folder_and_on_the_hub(folder, hub, untied):
    shard(folder)
    for place in (folder, "somebody/tiny"):
        assert same_weights(load(place, "cpu")[0], untied)


def test_every_parameter_has_the_asked_dtype_or_the_embeddings_also_where_files_mix_them(folder):
    edit_weights(folder, {EMBEDDING: load_file(folder / "model.safetensors")[EMBEDDING].bfloat16()})
    asked = ("float32", "bfloat16", "float16", "auto")
    for name, dtype in zip(asked, (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16)):
        model, _ = load(folder, "cpu", name)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert len(generate(model, [[1, 2, 3]], Decoding(8, max_new_tokens=4))[0].tokens) == 4


def test_a_tied_head_is_the_embedding_also_where_the_file_repeats_it(folders, tmp_path):
    folder = shutil.copytree(folders["tied"], tmp_path / "copy")
    for head in None, load_file(folder / "model.safetensors")[EMBEDDING]:
        edit_weights(folder, {HEAD: head})
        model, _ = load(folder, "cpu")
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rope_theta_is_read_from_either_place_and_an_unscaled_rope_may_be_spelt_out(folder):
    old = config_of(folder) | {"rope_scaling": {"rope_type": "default"}}
    new = old | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert parse_config(old).rope_theta == 1e6
    assert parse_config(new).rope_theta == parse_config(new | {"rope_theta": None}).rope_theta == 5e5


TOKENIZER_FILES = {
    "vocab.json": '{"a": 0, "b": 1}',
    "merges.txt": "#version: 0.2\n",
    "added_tokens.json": '{"<end>": 2}',
    "tokenizer_config.json": '{"eos_token": {"content": "<end>", "special": true}}',
    "special_tokens_map.json": '{"bos_token": "a"}',
    "chat_template.jinja": "{{ bos_token }}",
}


def test_stop_and_mask_ids_come_from_the_files_that_have_them(folder, shipped):
    stops_of = lambda folder: load(folder, "cpu")[0].config.stop_token_ids
    change_config(folder, eos_token_id=None, mask_token_id=None)
    write_files(folder, {"generation_config.json": {"eos_token_id": [17, 18]}})
    assert stops_of(folder) == (17, 18)
    write_files(folder, TOKENIZER_FILES)  # which names its end as an object
    assert stops_of(folder) == (17, 18, 2)
    tokenizer = shipped[1]
    write_files(folder, dict.fromkeys(TOKENIZER_FILES, "{}") | tokenizer.files)
    change_config(folder, vocab_size=tokenizer.size, eos_token_id=16)
    edit_weights(folder, {name: torch.zeros(tokenizer.size, 64) for name in (HEAD, EMBEDDING)})
    config = load(folder, "cpu")[0].config
    assert config.mask_token_id == tokenizer.id("|<MASK>|") and config.tokenizer_size == tokenizer.size
    assert config.stop_token_ids == (16, 17, 18, tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>"))
    write_files(folder, {"generation_config.json": {"eos_token_id": {"id": 17}}})
    assert "it must be a token id or a list of token ids" in refusal(folder)


# --- Save ---


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_save_writes_what_load_reads_under_the_published_names(golden_models, folders, tmp_path, name):
    save(golden_models[name], None, tmp_path)
    again, _ = load(tmp_path, "cpu")
    assert again.config == golden_models[name].config and same_weights(again, golden_models[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    original, written = (folder / "model.safetensors" for folder in (folders[name], tmp_path))
    assert load_file(written).keys() == load_file(original).keys()
    assert written.stat().st_mode == (tmp_path / "config.json").stat().st_mode  # whoever may read
    with safe_open(written, "pt") as weights:
        assert weights.metadata() == {"format": "pt"}  # Transformers refuses files without it
    published = config_of(folders[name]) | {"head_dim": again.config.head_dim}
    del published["rope_scaling"], published["use_sliding_window"]  # off
    assert config_of(tmp_path) == published


def test_an_autoregressive_model_is_saved_as_plain_qwen2(tmp_path):
    save(Qwen2(Config(64, 32, 64, 1, 2, 1, 16, 128)), None, tmp_path)
    assert config_of(tmp_path)["model_type"] == "qwen2"
    assert not {"bd_size", "mask_token_id", "eos_token_id"} & config_of(tmp_path).keys()
    with pytest.raises(InputError, match="never adapted"):
        generate(load(tmp_path, "cpu")[0], [[1]], Decoding(32))


def test_save_keeps_every_file_of_the_tokenizer_and_nothing_of_an_older_checkpoint(folder, shipped, tmp_path):
    shard(folder)
    write_files(folder, TOKENIZER_FILES)
    model, tokenizer = load(folder, "cpu")
    model.get_parameter(NORM).data[:] = 0
    save(model, tokenizer, tmp_path / "new")
    assert {name: (tmp_path / "new" / name).read_text() for name in TOKENIZER_FILES} == TOKENIZER_FILES
    save(model, None, folder)
    assert same_weights(load(folder, "cpu")[0], model)
    write_files(folder, {"generation_config.json": {"eos_token_id": [17, 18]}})
    save(model, shipped[1], folder)
    assert load_tokenizer(folder).files == shipped[1].files
    assert not (folder / "generation_config.json").exists()  # its stop tokens would be added


def test_a_save_without_room_leaves_the_old_files(golden_models, folder, monkeypatch):
    write_files(folder, TOKENIZER_FILES)
    contents = lambda: {path.name: path.read_bytes() for path in folder.iterdir()}
    before = contents()

    def fails(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="cannot be written"):
        save(golden_models["untied"], load_tokenizer(folder), folder)
    assert contents() == before


@pytest.mark.parametrize("renamed", [0, 1, 3])
def test_a_save_that_is_killed_leaves_no_checkpoint_of_both(golden_models, folder, monkeypatch, renamed):
    write_files(folder, TOKENIZER_FILES)
    rename, left = os.replace, iter(range(renamed))

    def ends_early(source, target):
        if next(left, None) is None:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", ends_early)
    with pytest.raises(KeyboardInterrupt):
        save(golden_models["untied"], load_tokenizer(folder), folder)
    assert refusal(folder) == f"{folder}: config.json is missing."
    assert not any(path.name.endswith(".tmp") for path in folder.iterdir())


def test_a_pipe_or_folder_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link", "."):
        with pytest.raises(InputError, match="is no regular file"):
            replace_file(tmp_path / name, lambda path: path.write_text("new"))
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    link.symlink_to("there/target")
    for text in ("new", "newer"):  # at first there is no target
        replace_file(link, lambda path, text=text: path.write_text(text))
        assert link.is_symlink() and target.read_text() == text
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["target"]


# --- Mistakes in files ---


@pytest.mark.parametrize("changes, message", [
    ({NORM: None}, 'Missing key(s) in state_dict: "model.norm.weight".'),
    ({"extra": torch.zeros(2)}, 'Unexpected key(s) in state_dict: "extra".'),
    ({"a\nb" * 1000: torch.zeros(2)}, 'Unexpected key(s) in state_dict: "a ba b'),
    ({NORM: torch.zeros(65)}, "size mismatch for model.norm.weight: copying a param with shape torch.Size([65])"),
    ({NORM: torch.zeros(64).double()}, "model.norm.weight is F64, only F32, BF16 and F16 are loaded."),
    ({NORM: torch.zeros(64).to(torch.float8_e5m2)}, "model.norm.weight is F8_E5M2, only"),
    ({"extra" * 999: torch.zeros(2, dtype=torch.uint8)}, "... is U8, only"),
    ({"extra": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "extra is F4, only"),
])  # fmt: skip
def test_wrong_tensors_are_named(folder, changes, message):
    edit_weights(folder, changes)
    assert message in refusal(folder)


def test_damaged_and_missing_files_are_named(folder):
    shard(folder)
    whole = (folder / SECOND).read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 100):
        write_files(folder, {SECOND: damaged})
        assert f"{SECOND}: damaged" in refusal(folder)
    for name in (SECOND, "config.json"):
        (folder / name).unlink()
        assert f"{name} is missing" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_json_that_cannot_be_read_is_named(folder, name):
    for content in (b"[" * 100_000, b'{"a": "caf\xe9"}', b"{", b"", b"1" * 5000):
        write_files(folder, {name: content})
        assert f"{name}: cannot be read as JSON" in refusal(folder)
    write_files(folder, {name: b"[]"})
    assert f"{name}: must hold one JSON object" in refusal(folder)


@pytest.mark.parametrize("key, value", [
    ("hidden_size", None), ("hidden_size", 2**31), ("vocab_size", "many"), ("bd_size", 0), ("bd_size", True),
    ("mask_token_id", "x"), ("rms_norm_eps", -1e-6), ("tie_word_embeddings", "no"),
    ("rope_theta", "1e6"), ("rope_theta", -1.0), ("rope_theta", float("nan")),
    ("eos_token_id", [[300]]), ("eos_token_id", -1), ("eos_token_id", "300"), ("eos_token_id", True),
    ("rope_scaling", {"type": "yarn", "factor": 4.0}), ("rope_parameters", {"rope_type": "yarn"}),
    ("use_sliding_window", True), ("hidden_act", "gelu" * 200), ("is_causal", False),
    ("architectures", ["Qwen2ForSequenceClassification"]),
], ids=str)  # fmt: skip
def test_a_value_of_the_config_that_cannot_work_is_named_with_what_would(folder, key, value):
    change_config(folder, **{key: value})
    assert refusal(folder).startswith(f"config.json: {key} is {reprlib.repr(value)}, it must be ")


@pytest.mark.parametrize("changes, message", [
    ({"model_type": None}, "model_type is None, which is no Qwen2; qwen2 and Fast_dLLM_Qwen work"),
    ({"model_type": "qwen2_moe" * 999, "quantization_config": {"bits": 4}}, "which is no Qwen2"),
    ({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2"}, "hidden_size": None}, "which is no Qwen2"),
    ({"quantization_config": {"quant_method": "awq"}, "vocab_size": 7}, "quantised ('awq'); dequantise them first"),
    *(({key: {"bits": 4}}, "quantised ('no name')") for key in ("quantization", "compression_config")),
    ({"hidden_size": 66}, "the weights are not those of config.json: size mismatch for model.embed_tokens"),
    ({"head_dim": 15}, "size mismatch for model.layers.0.self_attn.q_proj.weight"),
    ({"num_key_value_heads": 3}, "size mismatch for model.layers.0.self_attn.k_proj.weight"),
    ({"num_hidden_layers": 3}, 'Missing key(s) in state_dict: "model.layers.2.'),
    ({"mask_token_id": 320}, "mask_token_id 320 is not below vocab_size 320"),
    ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'"),
    ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
])  # fmt: skip
def test_configs_that_contradict_themselves_or_ask_for_more_are_refused(folder, changes, message):
    change_config(folder, **changes)
    assert message in refusal(folder)


# --- Places ---


@pytest.mark.parametrize("name", [
    "*.safetensors", "model-[0-9].safetensors", "model-?.safetensors", "../copy/model.safetensors",
    "/model.safetensors", "model.bin", "model.safetensors\n", "", 7, ["model.safetensors"],
], ids=str)  # fmt: skip
def test_an_index_names_only_weight_files_of_its_folder_and_no_pattern_of_it_is_fetched(folder, hub, name):
    write_files(folder, {INDEX: {"weight_map": {EMBEDDING: "model.safetensors", NORM: name}}})
    for place in (folder, "somebody/hostile"):
        assert "weight_map must name .safetensors files of the same folder" in refusal(place)
    assert hub and not any("*" in pattern or pattern == name for names in hub for pattern in names)


def test_what_can_be_refused_is_refused_before_more_is_fetched(folder, hub, shipped):
    write_files(folder, shipped[1].files)
    assert "the tokenizer has 749 ids, the embedding only 320 rows" in refusal("somebody/tiny")
    assert not any(name.endswith(".safetensors") for names in hub for name in names)
    change_config(folder, model_type="gemma3")
    hub.clear()
    assert refusal("somebody/gemma").startswith("config.json: model_type is 'gemma3'")
    assert hub == [["config.json"]]


@pytest.mark.parametrize("path, advice", [
    ("tiny/chekpoint", "no such folder; did you mean tiny/checkpoint?"),
    ("./tinny/checkpoint", "no such folder; did you mean tiny/checkpoint?"),
    ("tinny/checkpoint", "no such folder; did you mean tiny/checkpoint?"),
    ("README.md", "is a file; give a checkpoint's folder."),
    *((path, "no such folder; give a checkpoint's folder, or a Hub id like owner/name") for path in
      ("./tiny/x", "/nowhere/x", "nowhere", "a/b/c", ".x/y")),
])  # fmt: skip
def test_a_path_that_leads_nowhere_asks_no_network_and_a_near_miss_is_said(hub, monkeypatch, path, advice):
    monkeypatch.chdir(ROOT)
    assert refusal(path).startswith(f"{path}: {advice}")
    assert hub == []


@pytest.mark.parametrize("error, reason", [
    (LocalEntryNotFoundError("Got: ConnectError\nAn error happened"), "no network"),
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    (RuntimeError(), "RuntimeError"),
])  # fmt: skip
def test_a_hub_that_cannot_be_reached_is_one_short_sentence(monkeypatch, error, reason):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refusal("nobody/nothing")
    assert message.startswith(f"nobody/nothing: no such folder, and not reachable as a Hub id ({reason});")
    assert "`hf download nobody/nothing --local-dir FOLDER`" in message


def test_a_hub_id_is_found_in_the_cache_without_a_network(folders, tmp_path, monkeypatch):
    repository = tmp_path / "models--somebody--tiny"
    shutil.copytree(folders["untied"], repository / "snapshots" / "abc")
    write_files(repository, {"refs/main": "abc"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load("somebody/tiny", "cpu")[0].config.block_size == 32


def test_unknown_devices_and_dtypes_are_refused(folder):
    for device in ("tpu", "cpu:x", "meta", "privateuseone"):
        assert f"device '{device}' is not available here, only " in refusal(folder, device)
    for dtype in ("int3", torch.int8):
        assert f"dtype {dtype!r} is not known; take one of float32" in refusal(folder, dtype=dtype)
