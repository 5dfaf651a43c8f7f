"""Tokenizer: the published files, ChatML, streaming."""

import json

import pytest
from conftest import golden

from fastdllm import InputError, load_tokenizer

GOLDEN = golden("tokenizer")


@pytest.fixture(scope="module", params=["tokenizer_config.json", "added_tokens.json", "tokenizer.json"])
def tokenizer(request, tmp_path_factory):
    """The published tokenizer, cut down to what the golden texts need, from each form of its files."""
    part, folder = golden("qwen2_vocabulary"), tmp_path_factory.mktemp("tokenizer")
    vocab = part["vocab"] | {f"<{i}>": i for i in set(range(part["size"])) - set(part["vocab"].values())}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(part["merges"]) + "\n")
    names = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    names += "vision_start vision_end vision_pad image_pad video_pad"
    special = [f"<|{name}|>" for name in names.split()]
    plain = ["<tool_call>", "</tool_call>"] + [f"<|fim_{n}|>" for n in ("prefix", "middle", "suffix", "pad")]
    plain += ["<|repo_name|>", "<|file_sep|>"]
    added = {151643 + i: name for i, name in enumerate([*special, *plain, "|<MASK>|"])}
    if request.param == "added_tokens.json":
        (folder / "added_tokens.json").write_text(json.dumps({name: i for i, name in added.items()}))
    else:
        entries = {str(i): {"content": name, "special": name not in plain} for i, name in added.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    if request.param == "tokenizer.json":
        load_tokenizer(folder).encoder.save(str(folder / "tokenizer.json"))
        (folder / "vocab.json").unlink()
    return load_tokenizer(folder)


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda c: c["text"][:12])
def test_ids_and_text_equal_golden(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
    if "tool_call" not in case["text"]:  # added_tokens.json alone does not say which tokens are special
        assert tokenizer.decode(case["ids"]) == case["decoded_skip_special"]


@pytest.mark.parametrize("case", GOLDEN["chats"], ids=lambda c: str(len(c["messages"])))
def test_chat_equals_golden_ids(tokenizer, case):
    assert tokenizer.chat(case["messages"]) == case["ids"]


def test_length_counts_every_id(tokenizer):
    assert len(tokenizer) == 151666
    assert tokenizer.id("|<MASK>|") == 151665


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda c: c["text"][:12])
def test_stream_never_prints_half_a_character(tokenizer, case):
    pieces = list(tokenizer.stream([i] for i in case["ids"]))
    assert "".join(pieces) == tokenizer.decode(case["ids"])
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_ends_with_bytes_that_never_became_a_character(tokenizer):
    ids = [tokenizer.id("Ã")]  # the byte-level name of the first byte of "é"
    assert "".join(tokenizer.stream([ids])) == tokenizer.decode(ids) == "\ufffd"


@pytest.mark.parametrize("template, system", [
    ("{{ '<|im_start|>system\\nYou are Qwen. You are kind.<|im_end|>\\n' }}", "You are Qwen. You are kind."),
    ("{%- if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
     "{%- else %}{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}", "You are Qwen."),
    ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% endfor %}", None),
    (None, "You are a helpful assistant."),
])  # fmt: skip
def test_default_system_message_is_the_templates(tmp_path, template, system):
    part = golden("qwen2_vocabulary")
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(part["vocab"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(part["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template} if template else {})
    )
    tokenizer = load_tokenizer(tmp_path)
    text = tokenizer.decode(tokenizer.chat([{"role": "user", "content": "Hi"}]), skip_special_tokens=False)
    expected = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    assert text == expected + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_broken_tokenizer_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(InputError, match="tokenizer files cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "added_tokens.json").write_text('{"<x>": 7}')
    with pytest.raises(InputError, match="'<x>' is listed as id 7 but becomes 1"):
        load_tokenizer(tmp_path)


def test_added_tokens_of_tokenizer_json_keep_their_ids_or_are_refused(tmp_path, shipped):
    whole = json.loads(shipped[1].files["tokenizer.json"])
    first, second = whole["added_tokens"][:2]
    first["id"], second["id"] = second["id"], first["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(InputError, match=r"added token '<\|im_start\|>' is listed as id 745 but becomes 746"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name, content", [
    ("chat_template.jinja", "caf\xe9".encode("latin-1")),
    ("tokenizer_config.json", '{"chat_template": "caf\xe9"}'.encode("latin-1")),
    ("tokenizer.json", '{"model": "caf\xe9"}'.encode("latin-1")),
    ("tokenizer_config.json", b'{"a": ' + b"[" * 100_000),
    ("tokenizer_config.json", b"[]"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}'),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"749": {"content": "\\ud800"}}}'),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"7": {"content": "a\\n"}}}'),
    ("tokenizer.json", b'{"model": {"type": "' + b"x\\n" * 20_000 + b'"}}'),
    ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'),
])  # fmt: skip
def test_files_that_cannot_be_read_give_one_short_line(tmp_path, shipped, name, content):
    for file, original in shipped[1].files.items():
        (tmp_path / file).write_bytes(original)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # so that the template's own file counts
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("model, pattern, text", [
    ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}, "x", "b"),  # raises a plain Exception
    ({"type": "BPE", "vocab": {"a": 0}, "merges": []}, r"(\w+)*\1$", "a" * 50 + "!"),  # a panic
])  # fmt: skip
def test_text_that_the_tokenizer_cannot_encode_is_refused(tmp_path, model, pattern, text):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": split}))
    with pytest.raises(InputError, match="Cannot encode text"):
        load_tokenizer(tmp_path).encode(text)


def test_text_that_is_no_unicode_is_refused_in_one_short_line(shipped):
    with pytest.raises(InputError, match="No valid Unicode text") as caught:
        shipped[1].encode("\n\udce9" * 10_000)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_tokenizer_without_tokens_has_length_0(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    assert len(load_tokenizer(tmp_path)) == 0
