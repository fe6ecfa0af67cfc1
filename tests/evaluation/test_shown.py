"""What the report shows of an evaluation: answers beside the expected ones, the furthest from it first; histograms."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.utils.evaluation.shown import binned, distributions, examples, mark_differences


@settings(max_examples=60, deadline=None)
@given(st.text("ab {}\"'\n.", max_size=40), st.text("ab {}\"'\n.", max_size=40))
def test_marks_hold_both_texts(expected, answer):
    """Without what is missing the pieces are the answer; without what is extra, the expected text."""
    pieces = mark_differences(expected, answer)
    assert "".join(text for text, kind in pieces if kind != "missing") == answer.strip()
    if {kind for _, kind in pieces} - {"extra"}:
        assert "".join(text for text, kind in pieces if kind != "extra") == expected.strip()


def test_marks_are_on_the_words_that_differ():
    pieces = mark_differences('{"name": "Paul", "count": 46}', '{"name": "Palencia", "count": 46}')
    assert [piece for piece in pieces if piece[1] != "same"] == [["Paul", "missing"], ["Palencia", "extra"]]
    assert mark_differences("one two three", "nothing alike") == [["nothing alike", "extra"]]


def line(number: int, **adapter) -> dict:
    """Of predictions.jsonl, with answers of base and adapter where `adapter` has scores."""
    scores = {"exact_match": 0, "chrf": 10.0, "stopped": True, "answer": "no", "answer_tokens": 3}
    own = {"base": {**scores, "loss": 4.0}, "adapter": {**scores, "answer": "yes", "loss": 1.0, **adapter}}
    if not adapter:
        own = {"base": {"loss": 2.0}, "adapter": {"loss": math.nan}}
    asked = [{"role": "user", "content": "?"}]
    return {"where": f"test.jsonl:{number}", "tag": "", "prompt": asked, "expected": "yes", "expected_tokens": 2, **own}


def test_the_answers_furthest_from_the_expected_one_come_first_and_a_few_others_after():
    wrong = [line(number, chrf=float(number)) for number in range(20, 8, -1)]
    right = [line(number, exact_match=1, chrf=100.0) for number in range(30, 40)]
    found = examples([*right, *wrong, line(99)])
    assert [one["where"].rpartition(":")[2] for one in found] == [*map(str, range(9, 17)), *map(str, range(30, 34))]
    assert [one["furthest"] for one in found] == [True] * 8 + [False] * 4
    assert found[0]["sides"] == [
        ["base", "chrF 10", True, [["no", "extra"]]],
        ["adapter", "chrF 9", True, [["yes", "same"]]],
    ]
    assert found[-1]["sides"][1][1] == "exact"


def test_distributions_count_each_row_and_each_answer_once():
    losses, lengths = distributions([line(1, chrf=1.0), line(2, chrf=2.0), line(3)])
    assert [sum(losses["series"][model]) for model in ("base", "adapter")] == [3, 2]  # one is no number
    assert {name: sum(rows) for name, rows in lengths["series"].items()} == {"base": 2, "adapter": 2, "expected": 2}
    assert lengths["edges"] == [1.5, 2.5, 3.5]
    assert binned("", "", {"base": [math.nan], "adapter": []}) is None
