"""Scores agree with their libraries' own examples, intervals with scipy; verdicts say what the intervals allow."""

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import binomtest, bootstrap

from recipes.utils.evaluation import (
    column,
    compare,
    figure,
    figures,
    own_interval,
    score_text,
    sentence,
    show_difference,
)
from recipes.utils.evaluation.statistics import mark_luck
from recipes.utils.evaluation.verdicts import in_short, note_of, unseen


def rows_of(**columns) -> list[dict]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    ("target", "prediction", "expected"),
    [
        ("testing one two", "testing one", 4 / 5),  # these three are in rouge_score/rouge_scorer_test.py
        ("testing one two", "testing two", 4 / 5),
        ("first text", "text first", 1 / 2),
        # the pair of its README; the longest common subsequence "the quick brown jumps the" has 5 words of 9 and of 8
        ("The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log.", 2 * 5 / 17),
    ],
)
def test_rouge_l_is_that_of_the_librarys_own_examples(target, prediction, expected):
    found = score_text(target, prediction)["rouge_l"]
    assert found == pytest.approx(expected)
    assert found == RougeScorer(["rougeL"]).score(target, prediction)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("le café brûle", "le café gèle", 2 / 3),  # the library's own tokenizer would make 5 words of the first
        ("我想订两张票", "我想订三张票", 5 / 6),  # and none of these
        ("Привет мир", "Привет", 2 / 3),
        ("", "something", 0),
    ],
)
def test_rouge_l_counts_words_of_any_script(text, other, expected):
    assert score_text(text, other)["rouge_l"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        ("Niemand hat die Absicht, eine Mauer zu errichten", "Niemand hat die Absicht, eine Mauer zu errichten", 100.0),
        ("abcdefg", "hijklmnop", 0.0),
        ("", "reference", 0.0),
        ("a b c", "abc", 100.0),
        ("aa", "ab", 25.0),
        (
            "Nebo prostě nemají vybavení, které by jim pomohlo, uvedli lékaři.",
            "A někdy nemáme ani potřebný materiál, abychom jim pomohli, popsali lékaři.",
            31.22557079,
        ),
    ],
)
def test_chrf_is_that_of_sacrebleus_own_examples(hypothesis, reference, expected):
    """The cases and figures of test/test_chrf.py in mjpost/sacrebleu."""
    assert score_text(reference, hypothesis)["chrf"] == pytest.approx(expected, abs=1e-4)


def test_chrf_equals_its_formula():
    """chrF (Popović 2015): F with beta 2 of the mean precision and recall of character 1- to 6-grams, blanks aside."""
    reference, answer = "a table for two", "a table for ten"
    left, right = reference.replace(" ", ""), answer.replace(" ", "")
    precisions, recalls = [], []
    for n in range(1, 7):
        expected = [left[i : i + n] for i in range(len(left) - n + 1)]
        given = [right[i : i + n] for i in range(len(right) - n + 1)]
        hits = sum(min(expected.count(gram), given.count(gram)) for gram in set(given))
        precisions.append(hits / len(given))
        recalls.append(hits / len(expected))
    p, r = np.mean(precisions), np.mean(recalls)
    assert score_text(reference, answer)["chrf"] == pytest.approx(100 * 5 * p * r / (4 * p + r), rel=1e-6)


def test_valid_json_is_asked_only_where_json_is_expected():
    assert score_text('{"a": 1}', '{"a": 2}')["valid_json"] is True
    assert score_text('{"a": 1}', '{"a": ')["valid_json"] is False
    assert score_text("[1]", "1")["valid_json"] is False
    assert "valid_json" not in score_text("25", "25")
    assert "valid_json" not in score_text("a table", '{"a": 1}')


def test_loss_and_accuracy_are_weighted_by_tokens_and_the_perplexity_is_of_the_mean_loss():
    rows = rows_of(loss=[1.0, 3.0], token_accuracy=[1.0, 0.0], tokens=[30, 10], exact_match=[True, False])
    rows = [row | {"answer": "", "expected_tokens": 4} for row in rows]
    found = figures(rows)
    assert found["loss"] == 1.5
    assert found["token_accuracy"] == 0.75
    assert found["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["exact_match"] == 0.5


def test_the_interval_of_a_difference_is_scipys():
    """Of 300 rows, where nothing is smoothed; Student's t asks for percentiles a little further out."""
    rng = np.random.default_rng(1)
    ours, theirs, tokens = rng.normal(1.0, 0.3, 300), rng.normal(1.1, 0.3, 300), rng.integers(5, 80, 300)
    found = compare(rows_of(loss=ours, tokens=tokens), rows_of(loss=theirs, tokens=tokens))["loss"]

    def by_hand(index, axis):  # rows drawn by index; scipy's own default of 9999 draws
        drawn = (ours - theirs)[index] * tokens[index]
        return drawn.sum(axis) / tokens[index].sum(axis)

    expected = bootstrap((np.arange(300),), by_hand, method="percentile", rng=0, vectorized=True).confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.003)
    assert found["difference"] == pytest.approx(np.average(ours - theirs, weights=tokens))


def test_the_interval_of_a_share_is_wilsons():
    rows = rows_of(exact_match=[True] * 60 + [False] * 40)
    expected = binomtest(60, 100).proportion_ci(method="wilson")
    assert own_interval(rows, "exact_match") == pytest.approx((expected.low, expected.high))
    low, high = own_interval(rows_of(exact_match=[False] * 20), "exact_match")
    assert low == 0
    assert high > 0.1, "20 rows do not show that it never happens"


def test_pairing_finds_what_two_separate_intervals_would_hide():
    rng = np.random.default_rng(3)
    hard = rng.normal(2.0, 1.0, 100)  # how hard a row is moves both models alike
    ours, theirs = (rows_of(loss=hard + shift, tokens=[10] * 100) for shift in (rng.normal(-0.1, 0.1, 100), 0.0))
    assert own_interval(ours, "loss")[1] > own_interval(theirs, "loss")[0]
    assert compare(ours, theirs)["loss"]["verdict"] == "better"


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([1] * 30, [0] * 30, "better"),
        ([0] * 30, [1] * 30, "worse"),
        ([1] * 30, [1] * 30, "the same"),
        ([1] * 19, [0] * 19, "too few rows to say"),
        ([1] * 3 + [0] * 97, [0] * 100, "too few rows to say"),
        ([1] * 5 + [0] * 95, [0] * 100, "better"),
        ([0] * 30, [0] * 30, "0 % for both"),
        ([0] * 3, [0] * 3, "too few rows to say"),
        ([1], [1], "too few rows to say"),
        ([0.5] * 5 + [0.4] * 95, [0.4] * 100, "too few rows to say"),  # not even a sign test would call it
        ([1 + 1e-7] * 30, [1] * 30, "the same"),  # in the figures that are shown
        ([1, 0] * 50, [0, 1] * 50, "too few rows to say"),
        ([1], [0], "too few rows to say"),
        pytest.param(
            [float("nan")] * 30,
            [0] * 30,
            "too few rows to say",
            marks=pytest.mark.filterwarnings("ignore::scipy.stats.DegenerateDataWarning"),
        ),
    ],
)
def test_the_verdict(ours, theirs, verdict):
    assert compare(rows_of(exact_match=ours), rows_of(exact_match=theirs))["exact_match"]["verdict"] == verdict


def test_a_lower_loss_is_better_and_a_longer_answer_is_neither():
    ours = rows_of(loss=[1.0] * 30, tokens=[9] * 30, answer_tokens=[12.0] * 30, stopped=[True] * 30)
    theirs = rows_of(loss=[1.5] * 30, tokens=[9] * 30, answer_tokens=[10.0] * 30, stopped=[True] * 29 + [False])
    found = compare(ours, theirs)
    assert {name: one["verdict"] for name, one in found.items()} == {
        "loss": "better", "perplexity": "better", "answer_tokens": "longer", "stopped": "too few rows to say",
    }  # fmt: skip
    assert sentence("adapter against base", found) == (
        "The adapter is better than the base in loss (−0.5000, 95 % interval −0.5000 to −0.5000); "
        "gives longer answers; too few rows to say: stopped (with 30 rows, under 13 points cannot be seen)."
    )
    assert show_difference("exact_match", 0.985) == "+98.5"


def test_a_figure_is_along_the_axis_of_the_draws():
    values, weights = column(rows_of(loss=[1.0, 2.0, 4.0], tokens=[1, 1, 2]), "loss")
    draws = np.stack([values, values[::-1]]), np.stack([weights, weights])
    assert figure(*draws, "loss", axis=-1) == pytest.approx([2.75, (4 + 2 + 2) / 4])


def test_what_is_0_in_both_is_no_sameness():
    found = compare(
        rows_of(stopped=[False] * 30, exact_match=[True] * 30), rows_of(stopped=[False] * 30, exact_match=[True] * 30)
    )
    assert sentence("adapter against base", found) == (
        "The adapter is the same as the base in exact match; has, like the base, 0 % in stopped."
    )


def test_scores_that_only_some_rows_have_are_compared_where_both_have_them():
    ours = [{"loss": 1.0, "tokens": 2}] * 40
    ours = [{**row, "exact_match": True} if number < 30 else row for number, row in enumerate(ours)]
    theirs = [{"loss": 2.0, "tokens": 2, "exact_match": False} for _ in range(40)]
    found = compare(ours, theirs)
    assert (found["loss"]["rows"], found["exact_match"]["rows"]) == (40, 30)


def test_the_smallest_difference_that_can_be_seen_is_told():
    """With 50 rows of which 16 differ, 8 each way: the interval reaches 16 points to either side."""
    ours, theirs = [1] * 8 + [0] * 8 + [1] * 34, [0] * 8 + [1] * 8 + [1] * 34
    found = compare(rows_of(exact_match=ours), rows_of(exact_match=theirs))["exact_match"]
    assert found["verdict"] == "too few rows to say"
    assert found["unseen"] == pytest.approx((found["high"] - found["low"]) / 2)
    assert unseen("exact_match", found) == "under 16 points"
    loss = compare(rows_of(loss=[1.0, 1.2] * 15, tokens=[1] * 30), rows_of(loss=[1.1, 1.0] * 15, tokens=[1] * 30))[
        "loss"
    ]
    assert unseen("loss", loss).startswith("under 0.05")
    alike = compare(rows_of(loss=[1.0] * 9, tokens=[1] * 9), rows_of(loss=[1.5] * 9, tokens=[1] * 9))["loss"]
    assert alike["verdict"] == "too few rows to say"
    assert unseen("loss", alike) == note_of("loss", alike) == "", "nothing is under 0.0000"
    assert sentence("adapter against base", {"stopped": alike | {"unseen": None}}).endswith(": stopped (of 9 rows).")


def rows_that_differ(better: int, worse: int, rows: int) -> tuple[list, list]:
    ours = [1] * better + [0] * worse + [1] * (rows - better - worse)
    theirs = [0] * better + [1] * worse + [1] * (rows - better - worse)
    return rows_of(exact_match=ours), rows_of(exact_match=theirs)


@pytest.mark.parametrize(
    ("better", "worse", "rows", "text"),
    [
        (30, 2, 50, "BETTER than the best baseline in exact match (+56.0 points, 95 % interval +37.9 to +69.9), "
                    "worse in nothing"),
        (2, 30, 50, "WORSE than the best baseline in exact match (−56.0 points, 95 % interval −69.9 to −37.9), "
                    "better in nothing"),
        (5, 3, 50, "TOO FEW ROWS TO SAY whether it is better or worse than the best baseline: with 50 rows, no "
                   "difference under 12 points of exact match can be seen; score more rows"),
        (0, 0, 50, "THE SAME as the best baseline on these rows"),
    ],
)  # fmt: skip
def test_the_verdict_in_a_line(better, worse, rows, text):
    assert in_short("adapter against best", compare(*rows_that_differ(better, worse, rows))) == text


def test_better_in_one_and_worse_in_another_is_mixed():
    ours, theirs = rows_that_differ(30, 2, 50)
    ours, theirs = ([{**row, "loss": loss, "tokens": 1} for row in rows] for rows, loss in ((ours, 2.0), (theirs, 1.0)))
    text = in_short("adapter against base", compare(ours, theirs))
    assert text.startswith("MIXED: better than the base in exact match (")
    assert text.endswith("worse in loss (+1.0000, 95 % interval +1.0000 to +1.0000)")


def test_of_many_tags_those_that_may_be_luck_are_told_as_such():
    """Twenty tags of which one is truly better, and one looks so at p = 0.03."""
    tags = [compare(*rows_that_differ(better, worse, 40)) for better, worse in [(20, 0), (6, 0), *[(3, 3)] * 18]]
    assert [one["exact_match"]["verdict"] for one in tags[:3]] == ["better", "better", "too few rows to say"]
    tags[1]["exact_match"]["p"] = 0.03
    mark_luck(tags)
    assert [one["exact_match"]["verdict"] for one in tags[:3]] == ["better", "may be luck", "too few rows to say"]
    alone = [compare(*rows_that_differ(6, 0, 40))]
    mark_luck(alone)
    assert alone[0]["exact_match"]["verdict"] == "better"
