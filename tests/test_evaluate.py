"""Where the answer of a text is, how it is spelt, and how sure a comparison is."""

import json

import pytest

from commands.evaluate import final_answer, highest_share, paired_drop, read_problems
from fastdllm import InputError


@pytest.mark.parametrize("text, answer", [
    # commas, currency, units, percent, minus
    ("$9{,}500 left.", "9500"), ("−5", "-5"), ("−$1,200.50", "-1200.5"), ("-$5", "-5"), ("$-5", "-5"), (r"-\$5", "-5"),
    (r"\$-5", "-5"), ("#### 10{,}080", "10080"), (r"10,\!080", "10080"), (r"\boxed{9\,500}", "9500"), ("1,000,000 people", "1000000"),
    ("it costs $3 and 25%.", "25"), (r"\boxed{50\%}", "50"), (r"\boxed{10\text{ cm}^2}", "10"), ("#### 10 cm^2", "10"), ("#### $ 5", "5"),
    (r"\boxed{\$18}", "18"), (r"= \boxed{\$ 9{,}500}", "9500"), ("USD 18", "18"), ("the answer is -3.", "-3"), ("(-5)", "-5"), (r"\boxed{x = -5}", "-5"),
    ("10-5", "5"), ("10 - 5", "5"), ("1, 2, 3", "3"), ("at 10:30", "30"),
    # decimals and fractions
    ("from 3 to 5.0", "5"), ("0.5", "0.5"), ("it is .5", "0.5"), ("5.", "5"), ("#### -0.0", "0"), ("#### 007.50", "7.5"), ("#### 3/4", "0.75"),
    ("#### 1 3/4", "1.75"), (r"\boxed{\frac{1}{2}}", "0.5"), (r"\boxed{2\frac{1}{2}}", "2.5"), (r"\boxed{-\frac{3}{4}}", "-0.75"), ("1/0", "1"), ("12345678901234567891", "12345678901234567891"),
    ("9" * 5000, "9" * 5000),
    # words around it
    ("#### Answer: 18", "18"), ("#### Answer: $18", "18"), (r"\boxed{9 + 9 = 18}", "18"), (r"\boxed{\text{The answer is 460}}", "460"),
    ("#### 18 dollars\n", "18"), ("#### $18.50.", "18.5"), ("#### 18 eggs in 2 days", "18"), ("#### The answer for 3 friends is 18", "18"),
    ("#### Total cost: $1,234.50 per year", "1234.5"), ("#### **18**", "18"), ("#### 18 ####", "18"), ("**Answer:** 18", "18"),
    (r"Therefore, \(\boxed{50}\).", "50"), ("4th grade: 12 kids", "12"),
    # none
    ("no idea", None), ("", None), ("####", None), (r"\boxed{open", None),
])  # fmt: skip
def test_the_final_answer_is_a_plain_decimal(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{1} #### 7", "7"), (r"#### 9 then \boxed{8}", "9"), ("12 #### 7 \n\n", "7"), ("#### 18\n#### 20", "20"),
    ("#### 18\n\n#### Explanation\nWe used 3 steps", "18"), ("#### 18 eggs\nDone in 2 steps.", "18"),
    ("#### Conclusion\nIt takes 5 days.", "5"), ("#### Step 2: add\nSo 3 + 4 = 7", "7"), ("#### \n18", "18"),
    (r"\boxed{1} and then \boxed{2}.", "2"), (r"\boxed{\boxed{5}}", "5"), (r"\fbox{5}", "5"), (r"\boxed{3} and \boxed{4", "3"),
    (r"\boxed{18} \boxed{}", "18"), (r"put it in \boxed{}. It is 12.", "12"), (r"\boxed{3}, in 2 steps", "3"), ("10-5 is what is left", "5"),
])  # fmt: skip
def test_the_last_line_of_hashes_wins_over_a_box_over_the_last_number(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["9" * 9999 + "/3", r"\frac" * 500, "{" * 999, r"\boxed{" * 300, "1," * 5000, "-" * 3000, "\\"]
)
def test_long_and_broken_texts_do_no_harm(text):
    final_answer(text)


@pytest.mark.parametrize("answer, expected", [
    (18, "18"), (18.0, "18"), (-0.5, "-0.5"), (1e20, "1" + 20 * "0"), ("... #### 1,200", "1200"), ("18", "18"),
])  # fmt: skip
def test_the_datas_answer_may_be_a_number_or_a_text(answer, expected):
    record = json.loads(json.dumps({"question": "?", "answer": answer}))
    assert read_problems({"line 1": record}, None)["line 1"]["expected"] == expected


@pytest.mark.parametrize("record", [
    {"question": "?"}, {"answer": 3}, {"question": "?", "answer": "none"}, {"question": "?", "answer": True},
    {"question": "?", "answer": float("nan")}, {"question": 3, "answer": 3}, {"messages": [], "answer": 3},
])  # fmt: skip
def test_problems_without_question_or_answer_are_named(record):
    with pytest.raises(InputError, match="line 7: needs `question` or `messages`"):
        read_problems({"line 7": record}, None)


def test_a_problem_keeps_its_system_message_and_what_would_be_unused_is_refused():
    record = {"question": "?", "answer": 3, "system": "s", "tools": [{"name": "f"}]}
    found = read_problems({"line 1": record}, None, "Think.")["line 1"]
    assert found | record == found | {"question": "?", "answer": 3}
    assert found["messages"] == [{"role": "user", "content": "?\nThink."}]
    messages = found["messages"]
    again = {"messages": messages, "answer": "99", "expected": "3"}  # as `eval --output` writes it
    assert read_problems({"line 1": again}, None)["line 1"]["expected"] == "3"
    gold = [*messages, {"role": "assistant", "content": "It is 3."}]
    with pytest.raises(InputError, match="line 1: its messages end in an answer"):
        read_problems({"line 1": {"messages": gold, "answer": 3}}, None)
    with pytest.raises(InputError, match="line 1: `question` and `messages` exclude one another"):
        read_problems({"line 1": record | {"messages": messages}}, None)
    with pytest.raises(InputError, match="line 1: an instruction follows a `question`"):
        read_problems({"line 1": {"messages": found["messages"], "answer": 3}}, None, "Think.")


def test_a_drop_is_known_after_enough_problems():
    """Ten right answers of ten do not show that at most 1 in 100 is lost; a thousand of a thousand do."""
    few, many = (paired_drop([True] * n, [True] * n) for n in (10, 1000))
    assert few["drop"] == many["drop"] == 0 and few["drop_upper"] > 0.01 > many["drop_upper"]
    worse = paired_drop([True] * 1000, [True] * 955 + [False] * 45)
    assert worse["drop"] == 0.045 < worse["drop_upper"] < 0.07
    mixed = paired_drop([True, False] * 500, [False, True] * 500)  # as many gained as lost is no proof
    assert mixed["drop"] == 0 and mixed["drop_upper"] > 0.05


@pytest.mark.parametrize("k, n, bound", [(0, 100, 0.0370), (5, 20, 0.4687), (81, 263, 0.3662), (20, 20, 1.0)])
def test_the_bound_of_a_share_is_wilsons(k, n, bound):
    """The third row is an example of Newcombe (1998)."""
    assert highest_share(k, n) == pytest.approx(bound, abs=1e-4)
