"""Tokenizer: the published files, chats by the checkpoint's own template, streaming."""

import json
from datetime import date

import pytest
from conftest import ROOT, golden

import checkpoint
from checkpoint import Tokenizer, load_tokenizer
from fastdllm import InputError

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
    assert tokenizer.decode(case["ids"]) == case["decoded_skip_special"]


@pytest.mark.parametrize("case", GOLDEN["chats"], ids=lambda c: str(len(c["messages"])))
def test_chat_equals_golden_ids(tokenizer, case):
    assert tokenizer.chat(case["messages"]) == case["ids"]


def test_size_counts_every_id(tokenizer):
    assert tokenizer.size == 151666
    assert tokenizer.id("|<MASK>|") == 151665


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda c: c["text"][:12])
def test_stream_never_prints_half_a_character(tokenizer, case):
    pieces = list(tokenizer.stream([i] for i in case["ids"]))
    assert "".join(pieces) == tokenizer.decode(case["ids"])
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_ends_with_bytes_that_never_became_a_character(tokenizer):
    ids = [tokenizer.id("Ã")]  # the byte-level name of the first byte of "é"
    assert "".join(tokenizer.stream([ids])) == tokenizer.decode(ids) == "\ufffd"


def test_added_tokens_without_flags_are_special_by_their_form_or_where_they_are_listed(tmp_path):
    names = "<tool_call> <|im_end|> |<MASK>| <eos> <extra> <other>".split()
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: 2 + i for i, name in enumerate(names)}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}, "pad_token": null}')
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<extra>"]}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a".join(names) + "b")
    assert ids == [2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 1]
    assert tokenizer.decode(ids) == "<tool_call>aaaaa<other>b"


# --- Chats ---

LINES = (ROOT / "benchmarks" / "templates.jsonl").read_text().splitlines()
FAMILIES = {family["name"]: family for family in map(json.loads, LINES) if "chat_template" in family}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
SYSTEM = {"role": "system", "content": "Be terse."}
CALL = {"function": {"name": "find", "arguments": {"text": "é<b>"}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds 'é' & more."}}
LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture
def with_template(shipped):
    """Makes the shipped tokenizer with another template; `settings` for tokenizer_config.json."""

    def build(template=None, files=None, **settings):
        settings = {"chat_template": template} | settings
        files = {name: text.encode() for name, text in (files or {}).items()}
        return Tokenizer(shipped[1].encoder, {"tokenizer_config.json": json.dumps(settings).encode()} | files)

    return build


@pytest.mark.parametrize("template, system", [
    ("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Qwen. You are kind.<|im_end|>\\n' }}"
     "{% endif %}" + LOOP + END, "You are Qwen. You are kind."),
    ("{% set default = \"Don't guess if 1 < 2.\" %}{%- if messages[0]['role'] != 'system' %}"
     "<|im_start|>system\n{{ default }}<|im_end|>\n{% endif %}\n" + LOOP + END, "Don't guess if 1 < 2."),
    (FAMILIES["Qwen2.5-Math"]["chat_template"],
     "Please reason step by step, and put your final answer within \\boxed{}."),
    (LOOP + END, None),
    (None, "You are a helpful assistant."),
])  # fmt: skip
def test_a_default_system_message_is_the_templates_own(with_template, template, system):
    tokenizer = with_template(template)
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    expected = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    assert tokenizer.render([USER]) == expected + turn
    assert tokenizer.default_system() == system
    assert tokenizer.render([SYSTEM, USER]) == f"<|im_start|>system\nBe terse.<|im_end|>\n{turn}"
    assert tokenizer.chat([USER]) == tokenizer.encode(tokenizer.render([USER]))


@pytest.fixture(scope="module")
def distillation(tmp_path_factory):
    """A tokenizer without ChatML, whose template has tokens of its own."""
    family, folder = FAMILIES["R1 distillation"], tmp_path_factory.mktemp("distillation")
    part = golden("qwen2_vocabulary")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(part["vocab"])}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(part["merges"]))
    added = {token: True for token in family["special"]} | {token: False for token in family["plain"]}
    ids = range(len(part["vocab"]), len(part["vocab"]) + len(added))
    listed = {i: {"content": token, "special": added[token]} for i, token in zip(ids, added)}
    settings = {key: family[key] for key in ("chat_template", "bos_token", "eos_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": listed}))
    return load_tokenizer(folder)


def test_a_distillations_turns_are_its_own_tokens(distillation):
    bos, eos, user, assistant, think = map(
        distillation.id,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>"),
    )
    hi, newline = distillation.encode("Hi"), distillation.encode("\n")
    assert distillation.chat([USER]) == [bos, user, *hi, assistant, think, *newline]
    thought = ANSWER | {"content": "<think>\nHm.\n</think>Hi"}
    ids = distillation.chat([SYSTEM | {"content": "Hi"}, USER, thought, USER])
    assert ids == [bos, *hi, user, *hi, assistant, *hi, eos, user, *hi, assistant, think, *newline]
    assert distillation.decode(ids).count("<think>") == 1  # no special token, so it stays
    assert distillation.default_system() is None


def test_the_content_of_a_call_may_be_null_where_the_template_allows_it(distillation):
    text = distillation.render([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}])
    assert '<｜Assistant｜>\ncall find\n```json\n{\n  "text": "é<b>"\n}\n```<｜end▁of▁sentence｜>' in text


def test_tools_calls_and_results_reach_the_template(with_template):
    tokenizer = with_template(FAMILIES["Qwen2.5-Instruct"]["chat_template"])
    call = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
    results = [{"role": "tool", "content": "[1]"}, {"role": "tool", "content": "[2]"}]
    text = tokenizer.render([USER, call, *results, ANSWER | {"tool_calls": None}], [TOOL], False)
    head, _, turns = text.partition("<|im_end|>\n")
    assert head.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful")
    listed = '{"type": "function", "function": {"name": "find", "description": "Finds \'é\' & more."}}'
    assert f"\n<tools>\n{listed}\n</tools>\n" in head
    one_call = '<tool_call>\n{"name": "find", "arguments": {"text": "é<b>"}}\n</tool_call>'
    assert turns == (
        "<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n{one_call}\n{one_call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n[1]\n</tool_response>\n<tool_response>\n[2]\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n"
    )


def test_thoughts_of_earlier_turns_vanish_where_the_template_says_so(with_template):
    tokenizer = with_template(FAMILIES["QwQ"]["chat_template"])
    thought = ANSWER | {"content": "<think>\nHm.\n</think>\n\nYes"}
    beside = ANSWER | {"reasoning_content": "\nHm.\n"}
    assert tokenizer.render([USER, thought, USER]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert tokenizer.render([USER, beside], None, False).endswith(
        "assistant\n<think>\nHm.\n</think>\n\nYes<|im_end|>\n"
    )


def test_a_template_of_plain_text_is_one(with_template):
    tokenizer = with_template(FAMILIES["ORZ"]["chat_template"])
    assert tokenizer.default_system() is None  # it refuses a system message
    text = tokenizer.render([USER])
    assert text.startswith("A conversation between User and") and text.endswith(
        "User: Hi\nAssistant: <think>"
    )


@pytest.mark.parametrize("template, text", [
    ("{{ {'a': 'é<&>', 'b': [1]} | tojson }}", '{"a": "é<&>", "b": [1]}'),
    ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
    ("{{ strftime_now('%Y') }}", str(date.today().year)),
    ("{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m.content }},{% endfor %}", "Hi,Yes,"),
    ("{% for m in messages[::-1] %}{{ loop.length - loop.index0 }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}", "32"),
    ("  {% generation %}\n{{ messages[1].content }}\n  {% endgeneration %}\n.", "Yes\n."),
    ("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unk_token }}", "<s></s>False<u>"),
    ("{{ tools is none }}{{ tools is defined }}{{ messages is mapping }}{{ messages[0].x is string }}", "TrueTrueFalseFalse"),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}", "7"),
    ("{{ '\\n  a ' | trim }}|{{ messages[0].content.split('i')[-1].strip() }}|\n", "a||"),
])  # fmt: skip
def test_what_templates_use_is_there(with_template, template, text):
    files = {"special_tokens_map.json": '{"unk_token": "<u>", "eos_token": "<other>"}'}
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    assert with_template(template, files, **settings).render([USER, ANSWER, USER]) == text


TWICE = "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}"
NESTED = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize("template, reason", [
    ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate."),
    ("{{ ''.__class__ }}", "'__class__' of a str is outside what a template may use"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__' of a str is outside"),
    ("{{ messages | attr('__class__') }}", "'__class__' of a list is outside"),
    ("{{ '{0.__class__}'.format(1) }}", "'__class__' of a int is outside"),
    ("{{ messages.append(1) }}", "'append' of a list is outside"),
    ("{{ raise_exception.__globals__ }}", "'__globals__' of a method is outside"),
    ("{% include '/etc/hostname' %}", "no loader for this environment"),
    ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
    ("{{ messages | no_such_filter }}", "No filter named 'no_such_filter'"),
    ("{{ messages[5].content }}", "list object has no element 5"),
    ("{{ 'a' + messages[2].content }}", "can only concatenate str"),
    ("{{ messages[2].content }}", "it writes a null, such as a content, as text"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth exceeded"),
    ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
    ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "it writes more than 16,777,216 characters"),
    (NESTED, "it does not end within 65,536 steps"),
    (TWICE, "it does not end within 65,536 steps"),
    ("{{ lipsum(n=1000000000) }}", "'lipsum' is undefined"),
])  # fmt: skip
def test_a_template_that_fails_is_one_sentence_with_its_own_message(
    with_template, template, reason, monkeypatch
):
    monkeypatch.setattr(checkpoint, "MAX_STEPS", 2**16)  # sooner
    tokenizer = with_template(template)
    with pytest.raises(InputError) as caught:
        tokenizer.chat([USER, ANSWER, ANSWER | {"content": None}])
    assert str(caught.value).startswith("The chat template cannot write this conversation: ")
    assert reason in str(caught.value) and len(str(caught.value)) < 300


def test_where_the_template_comes_from(with_template):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    for tokenizer, source, text, text_with_tools in [
        (with_template("own{{ tools or '' }}"), "tokenizer_config.json", "own", "own[1]"),
        (with_template(named), "tokenizer_config.json", "plain", "with tools"),
        (with_template(named[1:]), "tokenizer_config.json", None, "with tools"),
        (
            with_template(named, {"chat_template.jinja": "file\r\n\r\n"}),
            "chat_template.jinja",
            "file\n",
            None,
        ),
        (
            with_template("", {"chat_template.jinja": ""}),
            "ChatML (no template in the files)",
            "<|im_start|>",
            None,
        ),
    ]:
        assert tokenizer.template_source == source
        for tools, expected in ((None, text), ([1], text_with_tools)):
            if expected is None:
                with pytest.raises(InputError):
                    tokenizer.render([USER], tools)
            else:
                assert tokenizer.render([USER], tools).startswith(expected)


def test_a_chat_without_template_and_chatml_tokens_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.template is None and tokenizer.template_source == "none"
    with pytest.raises(InputError, match="has no chat template, so it cannot chat; --raw continues a text"):
        tokenizer.chat([USER])
    assert tokenizer.default_system() is None


@pytest.mark.parametrize("message, tools", [
    ({"role": "tool", "content": "[1]"}, None),
    ({"role": "human", "content": "Hi"}, None),
    (ANSWER | {"tool_calls": [CALL]}, None),
    (ANSWER | {"reasoning_content": "Hm."}, None),
    (ANSWER | {"content": None}, None),
    (USER, [TOOL]),
])  # fmt: skip
def test_what_plain_chatml_has_no_place_for_is_refused(with_template, message, tools):
    with pytest.raises(InputError, match="only plain turns of system, user and assistant|writes a null"):
        with_template().chat([USER, message], tools)


def test_tools_that_the_template_would_drop_are_refused(shipped):
    with pytest.raises(InputError, match="chat template has no place for tools"):
        shipped[1].chat([USER], [TOOL])


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


def test_a_tokenizer_without_tokens_has_size_0(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    assert load_tokenizer(tmp_path).size == 0
