"""Training data: records in the formats that people have, tokenised data, and packing."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import AddedToken
from tokenizers import Tokenizer as Encoder

from checkpoint import Tokenizer, load_tokenizer, save
from fastdllm import InputError
from training import data
from training.data import Corpus, document_of, endless_rows, lay_out, pack, read_documents, with_mask_token

# --- Records ---


@pytest.fixture(scope="module")
def chatml(shipped) -> Tokenizer:
    return shipped[1]


def templated(tokenizer: Tokenizer, template: str, *special: str) -> Tokenizer:
    """A tokenizer with another template, and with tokens that it needs."""
    encoder = Encoder.from_str(tokenizer.encoder.to_str())
    encoder.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return Tokenizer(encoder, {"chat_template.jinja": template.encode()})


def trained(record: dict, tokenizer: Tokenizer) -> list[str]:
    """The texts that train, one for each stretch of trainable tokens."""
    tokens, trainable = document_of(record, tokenizer)
    spans, last = [], False
    for token, trains in zip(tokens, trainable, strict=True):
        if trains:
            spans = [*spans, []] if not last else spans
            spans[-1].append(token)
        last = trains
    return [tokenizer.decode(span, skip_special_tokens=False) for span in spans]


def text_of(record: dict, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(document_of(record, tokenizer)[0], skip_special_tokens=False)


def chat(*turns: str) -> list[dict]:
    """Messages of user and assistant in turn; a turn may be a message already."""
    roles = ["user", "assistant"] * len(turns)
    return [turn if isinstance(turn, dict) else {"role": r, "content": turn} for r, turn in zip(roles, turns)]


def answer(content="b", **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def test_a_chatml_document_is_its_text_and_answers_train_with_end_token_and_newline(chatml):
    records = [json.loads(line) for line in open(ROOT / "tiny" / "sample.jsonl")]
    records.append({"messages": chat("a", "\n\nb c", "d", " e ", "unanswered")})
    for record in records:
        messages = record.get("messages") or chat(record["question"], record["answer"])
        expected, flags = [], []
        for question, reply in zip(messages[::2], messages[1::2]):
            asked = f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
            parts = chatml.encode(asked), chatml.encode(f"{reply['content']}<|im_end|>\n")
            expected += parts[0] + parts[1]
            flags += [False] * len(parts[0]) + [True] * len(parts[1])
        assert document_of(record, chatml) == (expected, flags)


def sharegpt(**turns: str) -> list[dict]:
    return [{"from": name, "value": value} for name, value in turns.items()]


SYSTEM = {"role": "system", "content": "s"}
# fmt: off
SAME = [  # records, and the messages that they mean
    ({"question": "a", "answer": "b"}, chat("a", "b")),
    ({"question": "a", "answer": "b", "system": "s", "id": 7}, [SYSTEM, *chat("a", "b")]),
    ({"question": "a", "answer": "b", "system": "", "token_ids": None}, chat("a", "b")),
    ({"messages": chat("a", "b"), "system": "s", "text": None}, [SYSTEM, *chat("a", "b")]),
    ({"prompt": "a", "completion": "b"}, chat("a", "b")),
    ({"prompt": chat("a", "x", "c"), "completion": chat("", "b")[1:]}, chat("a", answer("x", weight=0), "c", "b")),
    ({"instruction": "a", "output": "b", "input": "", "history": []}, chat("a", "b")),
    ({"instruction": "a", "output": "b", "input": "c"}, chat("a\nc", "b")),
    ({"conversations": sharegpt(system="s", human="a", gpt="b")}, [SYSTEM, *chat("a", "b")]),
    ({"conversations": [{"from": "human", "value": "a", "weight": None}, *sharegpt(gpt="b")]}, chat("a", "b")),
]
# fmt: on


@pytest.mark.parametrize("record, messages", SAME, ids=lambda x: " ".join(x) if isinstance(x, dict) else "")
def test_every_format_is_the_chat_that_it_means(chatml, record, messages):
    assert document_of(record, chatml) == document_of({"messages": messages}, chatml)


def test_text_trains_whole_and_ends_with_its_end_token(chatml):
    assert trained({"text": "Mia has 3 books."}, chatml) == ["Mia has 3 books.<|endoftext|>"]
    assert text_of({"text": "Mia has 3 books."}, chatml) == "Mia has 3 books.<|endoftext|>"


def test_an_answer_that_generate_wrote_trains_token_by_token_behind_its_prompt(chatml):
    prompt = chatml.chat(chat("hi"))
    for record in ({"prompt": "hi", "text": "!", "id": 1}, {"messages": chat("hi")}, {"prompt_ids": prompt}):
        tokens, trainable = document_of(record | {"token_ids": [5, 6]}, chatml)
        assert tokens == prompt + [5, 6] and trainable == [False] * len(prompt) + [True] * 2


@pytest.mark.parametrize("off", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}], ids=str)
def test_an_answer_of_weight_0_is_seen_and_does_not_train(chatml, off):
    record = {"messages": chat("a", answer("b", **off), "c", answer("d", weight=1, train=True))}
    assert trained(record, chatml) == ["d<|im_end|>\n"]
    assert text_of(record, chatml) == text_of({"messages": chat("a", "b", "c", "d")}, chatml)


TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}]
# like Qwen2.5's: tools in the system message, calls as JSON, a tool's answer as the user's
CALLS = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}{% set role = 'user' if m.role == 'tool' else m.role %}<|im_start|>{{ role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# like an R1 distillation's: thoughts of every answer are left out, and the generation prompt opens new ones
R1 = """<BOS>{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}<Assistant>
{{- m.content.split('</think>')[-1] }}<EOS>{% endif %}{% endfor %}{% if add_generation_prompt %}<Assistant><think>
{% endif %}"""
R1_TOKENS = "<BOS>", "<User>", "<Assistant>", "<EOS>", "<think>", "<tool>"
# like QwQ's: the thoughts of earlier answers are left out
QWQ = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
PLAIN = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
SAID = [  # template, turns, what trains of them, and what is said
    (
        QWQ,
        ["a", "<think>x</think>b", "c", "<think>y</think>d"],
        "y</think>d<|im_end|>\n",
        "only the last answer trains",
    ),
    (R1, ["a", "thoughts</think>b"], "b<EOS>", "leaves out some of an answer's content"),
    (PLAIN, ["a", "b"], "b\n", "without an end token"),
    (R1, ["a", "b", "c"], "b<EOS>", "what follows the last answer"),
]


def test_the_checkpoints_own_template_says_where_an_answer_begins_and_ends(chatml):
    r1 = templated(chatml, R1, *R1_TOKENS)
    record = {"messages": chat("a", "b", "c", "<tool>d")}
    assert text_of(record, r1) == "<BOS><User>a<Assistant>b<EOS><User>c<Assistant><tool>d<EOS>"
    assert trained(record, r1) == ["b<EOS>", "<tool>d<EOS>"]  # <t begins <think> too, but is no token


def test_a_prompt_has_the_ids_that_decoding_sees_also_where_letters_merge_across_the_cut(chatml):
    plain = templated(chatml, PLAIN)
    prompt = plain.chat(chat("a"))
    tokens, trainable = document_of({"messages": chat("a", "Mia has")}, plain)
    assert tokens[: len(prompt)] == prompt and trainable == [i >= len(prompt) for i in range(len(tokens))]
    assert plain.encode("user: a\nassistant: Mia has\n") != tokens  # the blank would belong to the word


def test_tools_and_calls_are_rendered_and_train(chatml):
    tokenizer = templated(chatml, CALLS)
    called, reply = answer(None, tool_calls=CALL), {"role": "tool", "content": "2"}
    record = {"messages": [*chat("a"), called, reply, answer("two")], "tools": TOOLS}
    written = '<tool_call>{"name": "add", "arguments": {"n": 1}}</tool_call><|im_end|>\n'
    assert trained(record, tokenizer) == [written, "two<|im_end|>\n"]
    assert '[{"type": "function", "function": {"name": "add"}}]' in text_of(record, tokenizer)
    assert document_of(record | {"tools": json.dumps(TOOLS)}, tokenizer) == document_of(record, tokenizer)


@pytest.mark.parametrize("template, turns, text, note", SAID, ids=[note for *_, note in SAID])
def test_what_the_template_makes_of_a_chat_trains_and_a_surprise_is_said_once(
    chatml, capsys, template, turns, text, note
):
    data.say_once.cache_clear()
    tokenizer = templated(chatml, template, *R1_TOKENS, "</think>")
    for _ in range(2):
        assert trained({"messages": chat(*turns)}, tokenizer) == [text]
    assert capsys.readouterr().err.count(note) == 1


REFUSED = [
    ({"text": "a", "messages": chat("a", "b")}, "`text` beside `messages`"),
    ({"question": "a", "answer": "b", "output": "c"}, "`output` beside `question`"),
    ({"instruction": "a", "output": "b", "history": [["a", "b"]]}, "`history` beside `instruction`"),
    ({"question": "a", "answer": "b", "weight": 0}, "`weight` beside `question`"),
    ({"text": "a", "system": "s"}, "`system` beside `text`"),
    ({"messages": [SYSTEM, *chat("a", "b")], "system": "s"}, "`system` beside messages that begin with"),
    ({"messages": chat("a", answer(weight=0.5))}, "a weight is"),
    ({"messages": chat({"role": "user", "content": "a", "train": True}, "b")}, "only answers train"),
    ({"messages": chat("a", answer(weight=0))}, "no token to train on"),
    ({"messages": chat("a", "")}, "an answer is empty"),
    ({"messages": chat("a", "b"), "tools": "{"}, "tools are no list"),
    ({"messages": chat(answer())}, "begins with one"),
    ({"messages": [*chat("a"), {"role": "Assistant", "content": "b"}]}, "the role 'Assistant' is none of"),
    ({"conversations": [{"from": "bing", "value": "a"}]}, "the role 'bing'"),
    ({"messages": [{"role": "user"}, answer()]}, "the user's content is no text"),
    ({"question": ["?"], "answer": "b"}, "`question` is neither a text nor a list"),
    ({"question": "a", "answer": 18}, "`answer` is neither"),
    ({"instruction": "a", "output": "b", "input": 3}, "instruction or input is no text"),
    ({"question": "a", "answer": None}, "it has only `question`"),
    ({"id": 1}, "it has none"),
    ({"text": ""}, "text is empty"),
    ({"text": "Mia has 3 books."}, "the mask token"),
    ({"prompt": "a", "token_ids": [10**6]}, "outside the vocabulary"),
    ({"prompt": "a", "token_ids": 3}, "token_ids are no list"),
    ({"prompt": "a", "token_ids": [5], "train": False}, "it has `train` beside `token_ids`"),
    ([], "no JSON object"),
]


@pytest.mark.parametrize("record, sentence", REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_what_cannot_be_trained_as_it_is_meant_is_refused_by_name(tmp_path, chatml, record, sentence):
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"line 1: .*{sentence}.*--broken skip"):
        list(read_documents(tmp_path / "data.jsonl", chatml, chatml.encode(" books")[0], "refuse"))


UNUSED = [
    (CALLS, {"messages": chat("a", answer(reasoning_content="c"))}, "leaves out the `reasoning_content`"),
    (PLAIN, {"messages": chat("a", answer(tool_calls=CALL))}, "leaves out the `tool_calls`"),
    (PLAIN, {"messages": chat("a", "b"), "tools": TOOLS}, "no place for tools"),
    ("{{ messages[0].content }}", {"messages": chat("a", "b")}, "leaves out the `content`"),
    (R1, {"messages": chat("a", "thoughts</think>")}, "leaves out the `content`"),
    (
        "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
        {"messages": chat("a", "b")},
        "leaves the user message out",
    ),
]


@pytest.mark.parametrize("template, record, sentence", UNUSED, ids=[sentence for *_, sentence in UNUSED])
def test_what_the_template_does_not_write_is_refused_by_name(chatml, template, record, sentence):
    with pytest.raises(InputError, match=sentence):
        document_of(record, templated(chatml, template, *R1_TOKENS))


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[" * 10**5, b'{"text": 3}', b'{"messages": 3}'], ids=repr)
def test_a_broken_line_is_named_and_refused_or_skipped(tmp_path, chatml, capsys, line):
    path, good = tmp_path / "data.jsonl", b'{"question": "?", "answer": "!"}\n'
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(InputError, match="line 3: .*--broken skip"):
        list(read_documents(path, chatml, None, "refuse"))
    assert len(list(read_documents(path, chatml, None, "skip"))) == 2
    assert "line 3" in capsys.readouterr().err


# --- Corpus ---


def prepared(tmp_path, tokenizer, mask=None) -> Corpus:
    return Corpus.prepare(tmp_path / "data.jsonl", tokenizer, mask, tmp_path / "tokens")


@pytest.fixture
def lines(tmp_path) -> list[str]:
    """Of the file data.jsonl."""
    lines = [{"question": f"{n} and {n}?" * (n % 5 + 1), "answer": f"{n + n}"} for n in range(40)]
    lines = [json.dumps(line) + "\n" for line in lines]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    return lines


def test_data_is_tokenised_once_and_anew_when_anything_changes(tmp_path, chatml, lines, monkeypatch):
    corpus, path = prepared(tmp_path, chatml), tmp_path / "data.jsonl"
    documents = list(read_documents(path, chatml, None, "refuse"))
    assert [tuple(x.tolist() for x in corpus.piece(i, 0, 10**6)) for i in range(40)] == documents
    calls, read = [], data.read_documents
    monkeypatch.setattr(data, "read_documents", lambda *given: calls.append(given) or read(*given))
    made = lambda *given: (len(prepared(tmp_path, *given).lengths), len(calls))
    assert made(chatml) == (40, 0)
    assert made(templated(chatml, CALLS)) == (40, 1)  # another template makes other tokens
    assert made(chatml, 10**6) == (40, 2)  # other documents may hold this mask
    path.write_text("".join(lines[:7]))
    assert made(chatml, 10**6) == (7, 3)
    for damaged in b"", (tmp_path / "tokens").read_bytes()[:-1]:
        (tmp_path / "tokens").write_bytes(damaged)
        assert made(chatml, 10**6)[0] == 7
    assert len(calls) == 5 and sorted(os.listdir(tmp_path)) == ["data.jsonl", "tokens"]


def test_a_tokenizer_without_mask_gets_it_as_its_first_free_id(tmp_path, shipped):
    model, tokenizer = shipped
    whole = json.loads(tokenizer.files["tokenizer.json"])
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    added = {t["id"]: t for t in whole["added_tokens"] if t["content"] != "|<MASK>|"}
    settings = {"added_tokens_decoder": added, "chat_template": CALLS}
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    plain, config = load_tokenizer(tmp_path), replace(model.config, mask_token_id=None)
    first = plain.size
    with pytest.raises(InputError, match=f"id {first}, which is outside the embedding of {first} rows"):
        with_mask_token(plain, replace(config, vocab_size=first))
    masked, config = with_mask_token(plain, config)
    save(model, masked, tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert again.id("|<MASK>|") == masked.id("|<MASK>|") == config.mask_token_id == first
    assert again.encode("books|<MASK>|") == [*again.encode("books"), first] and again.size == first + 1
    assert again.template == masked.template == CALLS
    assert with_mask_token(again, config) == (again, config)


# --- Packing ---

LENGTHS = np.array([5, 8, 9, 16, 3, 24, 30, 70, 1, 8])


def test_packing_keeps_documents_whole_in_whole_blocks():
    rows = pack(LENGTHS, 32, 8, "documents", np.random.default_rng(0))
    pieces = sorted(piece for row in rows for piece in row)
    padded = -(-LENGTHS // 8) * 8  # aligned ones get no further block
    long = [(7, 0, 32), (7, 32, 64), (7, 64, 72)]  # longer than a row, so cut
    assert pieces == sorted([(i, 0, n) for i, n in enumerate(padded) if i != 7] + long)
    assert all(sum(stop - start for _, start, stop in row) <= 32 for row in rows)
    assert len(rows) <= -(-padded.sum() // 32) + 1  # and hardly a hole


def test_original_packing_pads_every_document_cuts_at_rows_and_drops_the_rest():
    rows = pack(LENGTHS, 32, 8, "original", np.random.default_rng(0))
    stream = [piece for row in rows for piece in row]
    assert all(sum(stop - start for _, start, stop in row) == 32 for row in rows)
    assert len(rows) == (LENGTHS // 8 * 8 + 8).sum() // 32  # aligned ones get a whole further block
    ends = {i: max(stop for j, _, stop in stream if j == i) for i in {j for j, _, _ in stream}}
    assert sum(ends[i] == LENGTHS[i] // 8 * 8 + 8 for i in ends) >= len(ends) - 1


def test_rows_are_laid_out_padded_with_masks_that_do_not_train(tmp_path, chatml, lines):
    corpus = prepared(tmp_path, chatml)
    packed = pack(corpus.lengths, 96, 32, "documents", np.random.default_rng(0))
    row = next(row for row in packed if len(row) == 3)
    tokens, trainable, documents = lay_out(corpus, [row], 96, 7, separate=True)
    assert documents[0].tolist() == [1] * 32 + [2] * 32 + [3] * 32
    assert not lay_out(corpus, [row], 96, 7, separate=False)[2].any()
    for n, (document, start, stop) in enumerate(row):
        ids, flags = corpus.piece(document, start, stop)
        own, pad = slice(32 * n, 32 * n + 32), 32 - len(ids)
        assert tokens[0, own].tolist() == [*ids.tolist(), *[7] * pad]
        assert trainable[0, own].tolist() == [*flags.tolist(), *[False] * pad]


def test_rows_come_in_a_seeded_order_each_document_once_an_epoch():
    how = LENGTHS, 32, 8, "documents"
    order = endless_rows(*how, seed=3)
    epochs = [[next(order) for _ in pack(*how, np.random.default_rng([3, e]))] for e in (0, 1)]
    for epoch in epochs:
        assert {document for row in epoch for document, _, _ in row} == set(range(10))
    assert epochs[0] != epochs[1]
    again = endless_rows(*how, seed=3)
    assert [next(again) for _ in epochs[0]] == epochs[0]
