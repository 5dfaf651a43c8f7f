"""Which spellings of an answer are equal, and where in a text the answer is."""

import math

import pytest

from benchmarks.judging import aup, find_answer, normalised

EQUAL = [
    # numbers
    (r"1,234", "1234"), (r"10,\!080", "10080"), (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"10{,}080", "10080"), (r"\$32,\!348", "32348"), ("$18.50", "18.5"), ("€20", "20"), ("007.50", "7.5"),
    ("-0.0", "0"), ("+5", "5"), (".5", "0.5"), ("5.", "5"), (".0000672", "0.0000672"), ("3.0", "3"),
    ("−3", "-3"), (r"\(42\)", "42"), (r"$42$", "42"), (r"42\,", "42"), (r"**42**", "42"), (" 42 ", "42"),
    # fractions
    (r"\frac{1}{2}", "1/2"), (r"\dfrac{1}{2}", r"\tfrac12"), (r"\frac12", "0.5"), (r"\frac 59", "5/9"),
    (r"\frac{14}{3}", "14/3"), (r"\frac65", "1.2"), (r"\frac{2}{4}", "1/2"), ("6/3", "2"),
    (r"-\frac{35}{9}", "-35/9"), (r"\frac{-35}{9}", r"-\frac{35}{9}"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"), ("1 / 2", "1/2"), (r"1\frac{3}{4}", "7/4"),
    (r"1 \frac34", "1.75"), ("1 3/4", "1.75"), (r"-2\frac{1}{2}", "-2.5"), (r"\frac{\pi}{6}", r"\pi/6"),
    (r"-\frac{\pi}{6}", r"\frac{-\pi}{6}"), (r"\frac\pi2", "π/2"), (r"\frac{3\sqrt{3}}{4}", r"3\sqrt{3}/4"),
    (r"\frac{3\sqrt{3}}{4}", r"3\frac{\sqrt 3}{4}"), (r"\frac{x+1}{2}", "(x+1)/2"),
    (r"\frac{1}{\frac{2}{3}}", r"1/(2/3)"), (r"\cfrac{1}{2x}", "1/(2x)"),
    # roots and powers
    (r"11\sqrt2", r"11\sqrt{2}"), (r"70 \sqrt{2}", r"70\sqrt{2}"), ("√51", r"\sqrt{51}"),
    ("sqrt(5)", r"\sqrt{5}"), (r"x^{2}", "x^2"), (r"2^{10}", "2^10"), (r"4210_{5}", "4210_5"),
    ("288π", r"288 \pi"), ("288pi", r"288\pi"),
    # units, degrees, percent
    (r"90^\circ", "90"), (r"90^{\circ}", "90 degrees"), ("90°", "90"), (r"50\%", "50"), ("50 percent", "50%"),
    (r"5\text{ cm}", "5"), (r"10\text{ cm}^2", "10 cm^2"), (r"10\,\mathrm{cm}^{2}", "10"),
    ("18 dollars", "18"), (r"12\mbox{ inches}", "12"), ("60 km/h", "60"),
    (r"3\sqrt{13}\text{ units}", r"3\sqrt{13}"), ("6 square units", "6"),
    # words and choices
    (r"\text{Evelyn}", "Evelyn"), (r"\text{even}", "Even"), (r"\textbf{(C)}", "C"), (r"\text{(C)}", "(C)"),
    (r"\mathrm{east}", r"\text{East}"), (r"\text{Friday morning}", "friday  morning"), (r"\text{5}", "5"),
    # equations
    ("x=5", "5"), ("x = 5", "5"), (r"\theta = 30^\circ", "30"), ("f(x) = x^2", "x^2"),
    (r"x \in [-2,7]", "[-2,7]"), (r"\text{Area} = 12", "12"), ("5x - 7y + 11z + 4 = 0", "5x-7y+11z+4=0"),
    ("p - q", "p-q"),
    # lists, intervals, sets, vectors
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"\left(\frac{3}{2}, -13\right)", "(1.5,-13)"), (r"(2,\infty)", "(2, ∞)"),
    (r"\left(3,4\right]", "(3, 4]"), (r"\{1, 2\}", r"\left\{1,2\right\}"), ("1, -2", "1,-2"),
    (r"3, 5, 7", "3,5,7"), (r"3,\ 5,\ 7", "3,5,7"), (r"1 \text{ and } -2", "1,-2"),
    ("1,000, 2,000", "1000, 2000"), (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"(6, 31, -1.0)", "(6,31,-1)"),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{bmatrix}-1&0\\0&-1\end{bmatrix}"),
    (r"\begin{pmatrix} -\frac13 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -1/3 \\ \frac{2}{3} \end{pmatrix}"),
    (r"1 \pm \sqrt{19}", r"1\pm\sqrt{19}"), (r"x \leq 3", r"x \le 3"), (r"2 \le x", "2 ≤ x"),
]  # fmt: skip

UNEQUAL = [
    ("5", "-5"), ("5", "50"), ("12", "1,2"), ("1,2", "2,1"), (r"\frac{1}{2}", "2"), ("1/3", "0.333"),
    ("0.5", "50%"), ("(3,4)", "[3,4]"), ("(3,4]", "(3,4)"), (r"\{1,2\}", "(1,2)"), ("52_8", "52"),
    ("52_8", "52_9"), ("x^2", "2x"), ("x+1", "x-1"), (r"\sqrt{2}", "2"), (r"2\sqrt{3}", r"3\sqrt{2}"),
    (r"\frac{1}{2x}", r"\frac{1}{2}x"), (r"\frac{x+1}{2}", "x+1/2"), ("2ab", "2"), ("2x", "2"), ("6-5i", "6"),
    (r"\pi", "3.14"), ("C", "c"), ("1 3/4", "13/4"), (r"1\frac{3}{4}", "13/4"), ("1/0", "1"),
    (r"(2,\infty)", r"(-\infty,2)"), ("even", "odd"), ("1,234", "1.234"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"), (r"1 + \sqrt{19}", r"1 - \sqrt{19}"), ("2^10", "210"),
    (r"\cot x", r"\tan x"), ("x=5", "x=6"), ("(1,234)", "1234"), ("y = 2x", "y = 2"),
]  # fmt: skip


@pytest.mark.parametrize("one, other", EQUAL)
def test_equal_answers_have_one_spelling(one, other):
    assert normalised(one) == normalised(other) == normalised(normalised(one))


@pytest.mark.parametrize("one, other", UNEQUAL)
def test_unequal_answers_keep_two_spellings(one, other):
    assert normalised(one) != normalised(other)


@pytest.mark.parametrize("text, answer, place", [
    (r"so \boxed{\frac{1}{2}} it is", "0.5", "boxed"), (r"\boxed{1} #### 7", "1", "boxed"),
    ("1 #### 7", "7", "####"), (r"\boxed{\boxed{5}}", "5", "boxed"), (r"\fbox{5}", "5", "boxed"),
    (r"\boxed 5", "5", "boxed"), (r"\boxed{\left\{ x : x > 0 \right\}}", "{x:x>0}", "boxed"),
    (r"\boxed{3} and \boxed{4", "3", "boxed"), (r"put it in \boxed{}. It is 12.", "12", "last number"),
    (r"\boxed{{}} 12", "12", "last number"), ("#### 18 eggs\nDone in 2 steps.", "18", "####"),
    ("#### Conclusion\nIt takes 5 days.", "5", "last number"),
    ("#### Step 2: add\nSo 3 + 4 = 7", "7", "last number"), ("#### yes", "yes", "####"),
    ("#### 3/4", "0.75", "####"), ("10-5 is what is left", "5", "last number"),
    ("it is -5", "-5", "last number"), ("a, 5, b", "5", "last number"),
    ("the chance is 1/3.", "1/3", "last number"), ("no idea", None, None), ("", None, None),
])  # fmt: skip
def test_the_answer_and_its_place_are_found(text, answer, place):
    assert find_answer(text) == (answer, place)


def test_long_and_broken_answers_do_no_harm():
    for text in (
        "9" * 9999 + "/3",
        r"\frac" * 500,
        "{" * 999,
        r"\boxed{" * 300,
        r"\sqrt" * 300,
        "(" * 999,
        "\\",
    ):
        assert isinstance(normalised(text), str)
        find_answer(text)


def test_accuracy_under_parallelism():
    assert aup([(1, 72.55)]) == 72.55
    assert aup([(4, 80), (1, 80)]) == pytest.approx(4 * 80)  # no loss: the whole area
    worse = 78 * math.exp(-3 * (1 - 78 / 80))
    assert aup([(1, 80), (2, 78), (5, 70)]) == pytest.approx(80 + (80 + worse) / 2)  # 70 is too bad to count
    assert aup([(1, 80), (2, 78)], best=90) < aup([(1, 80), (2, 78)])
    assert aup([(1, 0), (2, 0)]) == 0
