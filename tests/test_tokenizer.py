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
    names = (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
    )
    names += "vision_end vision_pad image_pad video_pad"
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
    ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% endfor %}", None),
    (None, "You are a helpful assistant."),
])  # fmt: skip
def test_default_system_message_is_the_templates(tmp_path, template, system):
    part = golden("qwen2_vocabulary")
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(part["vocab"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(part["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
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
