"""Which text is an answer, and which answers are the same: a table of pairs, decided by hand."""

from __future__ import annotations

import pytest

from lorapre.lab.evaluate.scoring import Score, after_hashes, equal, last_box, score

SAME = [
    # numbers
    ("18", "18"),
    ("18", "18.0"),
    ("18", "18.00"),
    ("18", "$18"),
    ("18", "\\$18"),
    ("18", "18 dollars"),
    ("3", "3 eggs a day"),
    ("-5", "-5"),
    ("0", "-0"),
    ("1234", "1,234"),
    ("70000", "70,000"),
    ("1234", "1{,}234"),
    ("1234", "1,\\!234"),
    ("1024", "2^{10}"),
    # fractions, decimals, percent
    ("\\frac{1}{2}", "1/2"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac12", "\\frac{1}{2}"),
    ("\\dfrac{3}{4}", "0.75"),
    ("\\frac{2}{4}", "\\frac{1}{2}"),
    ("\\frac{1}{3}", "0.333333"),
    ("3.5", "3\\frac{1}{2}"),
    ("50", "50\\%"),
    ("50", "50%"),
    ("0.5", "50\\%"),
    # LaTeX
    ("\\sqrt{8}", "2\\sqrt{2}"),
    ("11\\sqrt2", "11\\sqrt{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("6+9i", "9i+6"),
    ("x=5", "5"),
    ("90^\\circ", "90"),
    ("10 \\text{ cm}", "10"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
    ("1,-2", "-2,1"),
    ("[2,5)", "[2,5)"),
    ("(-\\infty,2)\\cup(3,\\infty)", "(3,\\infty)\\cup(-\\infty,2)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{(C)}", "C"),
    ("seven, and no formula {", "seven, and no formula {"),
]
DIFFERENT = [
    ("-5", "5"),
    ("18", "19"),
    ("18", "180"),
    ("18", "18.1"),
    ("1234", "1,235"),
    ("18", "19 dollars"),
    ("\\frac{1}{3}", "0.33"),
    ("\\frac{1}{2}", "\\frac{2}{1}"),
    ("1.5", "1,5"),
    ("50", "5\\%"),
    ("2\\pi", "6.28"),
    ("x^2+2x+1", "(x-1)^2"),
    ("(3,4)", "(4,3)"),
    ("[2,5)", "[2,5]"),
    ("1,-2", "1,2"),
    ("\\sqrt{2}", "2"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
    ("\\text{Evelyn}", "\\text{Bob}"),
    ("\\text{(C)}", "(B)"),
    ("1", "\\frac{1}{0}"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_equal_answers_are_equal(gold: str, answer: str) -> None:
    assert equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_unequal_answers_are_unequal(gold: str, answer: str) -> None:
    assert not equal(gold, answer)


def test_the_answer_after_hashes_is_the_rest_of_the_first_such_line() -> None:
    assert after_hashes("so\n#### 1,234.\nmore #### 5") == "1,234"
    assert after_hashes("#### \nnothing") is None
    assert after_hashes("####5 or ## 5") is None


def test_the_last_box_that_closes_is_read_with_its_inner_braces() -> None:
    assert last_box("\\boxed{1} then \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert last_box("\\boxed{3} and \\boxed{4, cut") == "3"
    assert last_box("\\boxed{\\left\\{1, 2\\right\\}}") == "\\left\\{1, 2\\right\\}"
    assert last_box("\\boxed{}") is None
    assert last_box("no box") is None


@pytest.mark.parametrize(
    ("completion", "gold", "marking", "expected"),
    [
        ("2+3=5\n#### 5", "5", "hashes", Score("5", "hashes", True)),
        (
            "#### 5 apples. In a box: \\boxed{6}",
            "5",
            "hashes",
            Score("5 apples. In a box: \\boxed{6}", "hashes", False),
        ),
        ("#### 6\nor \\boxed{5}", "5", "hashes", Score("6", "hashes", False)),
        ("#### 6\nor \\boxed{5}", "5", "boxed", Score("5", "boxed", True)),
        ("It is \\boxed{5}", "5", "hashes", Score("5", "boxed", True)),
        ("The answer is: 5", "5", "hashes", Score("5", "text", True)),
        ("First 4, then 5", "5", "hashes", Score("5", "text", True)),
        ("First 5, then 4", "5", "hashes", Score("4", "text", False)),
        ("I do not know", "5", "hashes", Score(None, None, False)),
        ("", "5", "boxed", Score(None, None, False)),
    ],
)
def test_the_tasks_own_mark_comes_before_the_other_and_both_before_the_text(
    completion: str, gold: str, marking: str, expected: Score
) -> None:
    assert score(completion, gold, marking) == expected  # type: ignore[arg-type]
