"""Tokenizer: the published files, chats by the checkpoint's own template, streaming."""

import json
from datetime import date

import pytest
from conftest import ROOT, golden, write_files

from checkpoint import Tokenizer, load_tokenizer
from fastdllm import InputError

GOLDEN, VOCABULARY = golden("tokenizer"), golden("qwen2_vocabulary")
NO_MERGES = "#version: 0.2\n"
JINJA, CONFIG = "chat_template.jinja", "tokenizer_config.json"
BOOKS = {"vocab.json": {"a": 0, "b": 1}, "merges.txt": NO_MERGES}
FILLERS = [f"<|{i}|>" for i in range(17)]
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *FILLERS[:11], "<tool_call>", "</tool_call>"]
ADDED += [*FILLERS[11:], "|<MASK>|"]


def tokenizer_of(folder, files):
    write_files(folder, files)
    return load_tokenizer(folder)


def refusal(folder, files):
    """The one short sentence with which tokenizer files are refused."""
    with pytest.raises(InputError) as caught:
        tokenizer_of(folder, files)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def only_model(**model):
    return {"tokenizer.json": {"model": {"type": "BPE", "vocab": {}, "merges": []} | model}}


@pytest.fixture(scope="module", params=[CONFIG, "added_tokens.json", "tokenizer.json"])
def tokenizer(request, tmp_path_factory):
    """The published tokenizer, cut down to what the golden texts need, from each form of its files."""
    size, vocab, folder = VOCABULARY["size"], VOCABULARY["vocab"], tmp_path_factory.mktemp("tokenizer")
    vocab = vocab | {f"<{i}>": i for i in {*range(size)} - {*vocab.values()}}
    files = {"vocab.json": vocab, "merges.txt": NO_MERGES + "\n".join(VOCABULARY["merges"]) + "\n"}
    if request.param == "added_tokens.json":
        files["added_tokens.json"] = {name: size + i for i, name in enumerate(ADDED)}
    else:
        entries = [{"content": name, "special": "tool" not in name} for name in ADDED]
        files[CONFIG] = {"added_tokens_decoder": dict(enumerate(entries, size))}
    tokenizer = tokenizer_of(folder, files)
    if request.param != "tokenizer.json":
        return tokenizer
    (folder / "vocab.json").unlink()
    return tokenizer_of(folder, {"tokenizer.json": tokenizer.encoder.to_str()})


@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda c: c["text"][:12])
def test_ids_and_text_equal_golden_and_a_stream_never_prints_half_a_character(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["decoded"]
    assert tokenizer.decode(case["ids"]) == case["decoded_skip_special"]
    pieces = list(tokenizer.stream([i] for i in case["ids"]))
    assert "".join(pieces) == case["decoded_skip_special"]
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("case", GOLDEN["chats"], ids=lambda c: str(len(c["messages"])))
def test_chat_equals_golden_ids_and_size_counts_every_id(tokenizer, case):
    assert tokenizer.chat(case["messages"]) == case["ids"]
    assert tokenizer.size == 151666 and tokenizer.id("|<MASK>|") == 151665


def test_stream_ends_with_bytes_that_never_became_a_character(tokenizer):
    ids = [tokenizer.id("Ã")]  # the byte-level name of the first byte of "é"
    assert "".join(tokenizer.stream([ids])) == tokenizer.decode(ids) == "\ufffd"


def test_added_tokens_without_flags_are_special_by_their_form_or_where_they_are_listed(tmp_path):
    names = "<tool_call> <|im_end|> |<MASK>| <eos> <extra> <other>".split()
    tokenizer = tokenizer_of(tmp_path, BOOKS | {
        "added_tokens.json": {name: 2 + i for i, name in enumerate(names)},
        CONFIG: {"eos_token": {"content": "<eos>"}, "pad_token": None},
        "special_tokens_map.json": {"additional_special_tokens": ["<extra>"]},
    })  # fmt: skip
    ids = tokenizer.encode("a".join(names) + "b")
    assert ids == [2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 1]
    assert tokenizer.decode(ids) == "<tool_call>aaaaa<other>b"


def test_a_text_begins_as_the_settings_say_and_only_once(tmp_path):
    names = {"added_tokens.json": {"<bos>": 2}}
    for add, begin in (True, [2]), (False, []):
        settings = {"bos_token": "<bos>", "add_bos_token": add}
        tokenizer = tokenizer_of(tmp_path, BOOKS | names | {CONFIG: settings})
        assert tokenizer.encode_text("ab") == begin + tokenizer.encode("ab")
        assert tokenizer.encode_text("<bos>ab") == [2] + tokenizer.encode("ab")


# --- Chats ---

LINES = (ROOT / "benchmarks" / "templates.jsonl").read_text().splitlines()
FAMILIES = {family["name"]: family for family in map(json.loads, LINES) if "chat_template" in family}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
SYSTEM = {"role": "system", "content": "Be terse."}
CALL = {"function": {"name": "find", "arguments": {"text": "é<b>"}}}
TOOL = {"type": "function", "function": {"name": "find", "description": "Finds 'é' & more."}}
LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LOOP += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OWN = "{% if messages[0].role != 'system' %}<|im_start|>system\nDon't {{ 1 < 2 }}.<|im_end|>\n{% endif %}\n"
QWEN = FAMILIES["Qwen2.5-Instruct"]["chat_template"]
ASKED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def with_template(shipped):
    """Makes the shipped tokenizer with another template; `settings` for tokenizer_config.json."""

    def build(template=None, files=None, **settings):
        settings = {"chat_template": template} | settings
        files = {name: text.encode() for name, text in (files or {}).items()}
        return Tokenizer(shipped[1].encoder, {CONFIG: json.dumps(settings).encode()} | files)

    return build


@pytest.mark.parametrize("template, system", [
    (OWN + LOOP, "Don't True."), (LOOP, None), (None, "You are a helpful assistant."),
    (FAMILIES["Qwen2.5-Math"]["chat_template"], "Please reason step by step, and put your final answer within \\boxed{}."),
])  # fmt: skip
def test_a_default_system_message_is_the_templates_own(with_template, template, system):
    tokenizer = with_template(template)
    expected = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    assert tokenizer.render([USER]) == expected + ASKED
    assert tokenizer.default_system() == system
    assert tokenizer.render([SYSTEM, USER]) == f"<|im_start|>system\nBe terse.<|im_end|>\n{ASKED}"


def test_a_distillations_turns_are_its_own_tokens(tmp_path):
    """Its tokenizer has no ChatML."""
    family = FAMILIES["R1 distillation"]
    settings = {key: family[key] for key in ("chat_template", "bos_token", "eos_token")}
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>"]
    added = [{"content": name, "special": name != "<think>"} for name in names]
    tokenizer = tokenizer_of(tmp_path, {
        "vocab.json": {"a": 0, "b": 1, "Ċ": 2}, "merges.txt": NO_MERGES,
        CONFIG: settings | {"added_tokens_decoder": dict(enumerate(added, 3))},
    })  # fmt: skip
    a, b, newline, bos, eos, user, assistant, think = range(8)
    asked, thought = {"role": "user", "content": "a"}, ANSWER | {"content": "<think>\nHm.\n</think>b"}
    assert tokenizer.chat([asked]) == [bos, user, a, assistant, think, newline]
    ids = tokenizer.chat([SYSTEM | {"content": "b"}, asked, thought, asked])
    assert ids == [bos, b, user, a, assistant, b, eos, user, a, assistant, think, newline]
    assert tokenizer.decode(ids) == "baba<think>\n"  # thinking is no special token, so it stays
    text = tokenizer.render([asked, ANSWER | {"content": None, "tool_calls": [CALL]}])
    assert '<｜Assistant｜>\ncall find\n```json\n{\n  "text": "é<b>"\n}\n```<｜end▁of▁sentence｜>' in text
    assert tokenizer.default_system() is None


def test_tools_calls_and_results_reach_the_template(with_template):
    tokenizer = with_template(QWEN)
    call = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
    results = [{"role": "tool", "content": "[1]"}, {"role": "tool", "content": "[2]"}]
    text = tokenizer.render([USER, call, *results, ANSWER | {"tool_calls": None}], [TOOL], False)
    head, _, turns = text.partition("<|im_end|>\n")
    listed = '{"type": "function", "function": {"name": "find", "description": "Finds \'é\' & more."}}'
    assert f"\n<tools>\n{listed}\n</tools>\n" in head
    one_call = '<tool_call>\n{"name": "find", "arguments": {"text": "é<b>"}}\n</tool_call>'
    answers = "".join(f"<tool_response>\n[{i}]\n</tool_response>" + "\n" * (2 - i) for i in (1, 2))
    assert turns == ASKED + (
        f"{one_call}\n{one_call}<|im_end|>\n<|im_start|>user\n{answers}<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n"
    )


@pytest.mark.parametrize("template, text", [
    ("{{ {'b': 'é<&>', 'a': [1]} | tojson }}", '{"b": "é<&>", "a": [1]}'),
    ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
    ("{{ strftime_now('%Y') }}", str(date.today().year)),
    ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}", "Yes"),
    ("  {% generation %}\n{{ messages[1].content }}\n  {% endgeneration %}\n.", "Yes\n."),
    ("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unk_token }}", "<s></s>False<u>"),
    ("{{ tools is none }}{{ tools is defined }}{{ messages[0].x is defined }}\n", "TrueTrueFalse"),
])  # fmt: skip
def test_what_templates_use_is_there(with_template, template, text):
    files = {"special_tokens_map.json": '{"unk_token": "<u>", "eos_token": "<other>"}'}
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": None}
    assert with_template(template, files, **settings).render([USER | {"x": None}, ANSWER, USER]) == text


TWICE = "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}"
NESTED = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize("template, reason", [
    ("{{ raise_exception('Roles must\nalternate.') }}", "Roles must alternate."),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__' of a str is outside what a template may use"),
    ("{{ messages | attr('__class__') }}", "'__class__' of a list is outside"),
    ("{{ '{0.__class__}'.format(1) }}", "'__class__' of a int is outside"),
    ("{{ raise_exception.__globals__ }}", "'__globals__' of a method is outside"),
    ("{{ messages.append(1) }}", "'append' of a list is outside"),
    ("{% include '/etc/hostname' %}", "no loader for this environment"),
    ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
    ("{{ messages[2].content }}", "it writes a null, such as a content, as text"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth exceeded"),
    ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
    ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "it does too much"),
    (NESTED, "it does too much"),
    (TWICE, "it does too much"),
    ("{{ lipsum(n=1000000000) }}", "'lipsum' is undefined"),
    ("{{ raise_exception('long ' * 1000) }}", "long long"),
])  # fmt: skip
def test_a_template_that_fails_is_one_short_sentence(with_template, template, reason):
    with pytest.raises(InputError) as caught:
        with_template(template).chat([USER, ANSWER, ANSWER | {"content": None}])
    assert str(caught.value).startswith("The chat template cannot write this conversation: ")
    assert reason in str(caught.value) and len(str(caught.value)) < 300


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]


@pytest.mark.parametrize("template, files, source, text, text_with_tools", [
    ("own{{ tools or '' }}", {}, CONFIG, "own", "own[1]"),
    (NAMED, {}, CONFIG, "plain", "with tools"),
    (NAMED[1:], {}, CONFIG, None, "with tools"),
    (NAMED, {JINJA: "\ufefffile\r\n\r\n"}, JINJA, "file\n", None),
    ("", {JINJA: ""}, "ChatML (no template in the files)", "<|im_start|>", None),
], ids=str)  # fmt: skip
def test_where_the_template_comes_from(with_template, template, files, source, text, text_with_tools):
    tokenizer = with_template(template, files)
    assert tokenizer.template_source == source
    for tools, expected in ((None, text), ([1], text_with_tools)):
        if expected:
            assert tokenizer.render([USER], tools).startswith(expected)
        else:
            with pytest.raises(InputError):
                tokenizer.render([USER], tools)


def test_a_chat_without_template_and_chatml_tokens_is_refused(tmp_path):
    tokenizer = tokenizer_of(tmp_path, BOOKS)
    assert tokenizer.template is None and tokenizer.template_source == "none"
    with pytest.raises(InputError, match="has no chat template, so it cannot chat; .* `generate --raw`"):
        tokenizer.chat([USER])
    assert tokenizer.default_system() is None


PLAIN, NO_TOOLS = "only plain turns of system, user and assistant", "chat template has no place for tools"


@pytest.mark.parametrize("template, messages, tools, reason", [
    (None, [USER, {"role": "tool", "content": "[1]"}], None, PLAIN),
    (None, [USER, ANSWER | {"tool_calls": [CALL]}], None, PLAIN),
    (None, [USER, ANSWER | {"reasoning_content": "Hm."}], None, PLAIN),
    (None, [USER], [TOOL], PLAIN),
    (LOOP, "Why is the sky blue?", None, "Messages are a list of objects"),
    (LOOP, [{"from": "human", "value": "Hi"}], None, "each with `role` and `content`"),
    (LOOP, [], None, "Messages are a list of objects"),
    (LOOP, [USER], [TOOL], NO_TOOLS),
    (LOOP, [USER, ANSWER | {"content": None}], None, "writes a null"),
    (LOOP, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], None, "a content of parts as code"),
])  # fmt: skip
def test_what_the_template_has_no_place_for_is_refused(with_template, template, messages, tools, reason):
    with pytest.raises(InputError, match=reason):
        with_template(template).chat(messages, tools)


# --- Mistakes in files ---


def test_missing_and_contradictory_files_are_named(tmp_path, shipped):
    assert "no tokenizer; tokenizer.json, or vocab.json and merges.txt" in refusal(tmp_path, {})
    wrong = BOOKS | {"added_tokens.json": {"<x>": 7}}
    assert "added token '<x>' is listed as id 7 but becomes 2" in refusal(tmp_path, wrong)
    wrong = shipped[1].files | {CONFIG: {"added_tokens_decoder": {"745": {"content": "<|im_start|>"}}}}
    assert "added token '<|im_start|>' is listed as id 745 but becomes 746" in refusal(tmp_path, wrong)


@pytest.mark.parametrize("name, content", [
    (JINJA, "caf\xe9".encode("latin-1")),
    (CONFIG, '{"chat_template": "caf\xe9"}'.encode("latin-1")),
    ("tokenizer.json", '{"half": '),
    (CONFIG, '{"a": ' + "[" * 100_000),
    (CONFIG, "[]"),
    (CONFIG, '{"added_tokens_decoder": {"x": 1}}'),
    (CONFIG, '{"added_tokens_decoder": {"749": {"content": "\\ud800"}}}'),
    ("tokenizer.json", '{"model": {"type": "' + "x\\n" * 20_000 + '"}}'),
    *only_model(merges=[["a", "b"]]).items(),
])  # fmt: skip
def test_files_that_cannot_be_read_give_one_short_line(tmp_path, shipped, name, content):
    files = shipped[1].files | {CONFIG: "{}"}  # so that the template's own file counts
    assert "tokenizer files cannot be read" in refusal(tmp_path, files | {name: content})


@pytest.mark.parametrize("model, text", [
    ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}, "b"),
    ({}, "\n\udce9" * 10_000),  # a tokenizer without tokens
])  # fmt: skip
def test_text_that_cannot_be_encoded_is_refused_in_one_short_line(tmp_path, model, text):
    with pytest.raises(InputError, match="No valid Unicode text, or none that the tokenizer takes") as caught:
        tokenizer_of(tmp_path, only_model(**model)).encode(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
