"""JSON answers by field, and the user's own metric."""

import pytest

from recipes.utils.console import UserError
from recipes.utils.evaluation import add_metrics, field_names, read_metrics, score_text
from recipes.utils.evaluation.scores import json_fields


@pytest.mark.parametrize(
    ("wanted", "given", "expected"),
    [
        ({"a": 1, "b": {"c": "x"}}, {"b": {"c": "x"}, "a": 1}, {"a": True, "b.c": True}),
        ({"a": 1, "b": {"c": "x"}}, {"a": 2, "b": {"c": "x"}}, {"a": False, "b.c": True}),
        ({"a": 1}, {"a": 1.0}, {"a": True}),
        ({"a": 1}, {"a": True}, {"a": False}),
        ({"a": 1}, {"a": "1"}, {"a": False}),
        ({"a": None}, {"a": None}, {"a": True}),
        ({"a": None}, {}, {"a": False, "(all)": False}),
        ({"a": []}, {"a": []}, {"a": True}),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, {"a[]": False}),
        ({"i": [{"p": 1, "q": 2}, {"p": 3, "q": 4}]}, {"i": [{"p": 1, "q": 2}, {"p": 3, "q": 5}]},
         {"i[].p": True, "i[].q": False}),
        ({"a": 1}, {"a": 1, "extra": 2}, {"a": True, "extra": False}),
        ({"a": 1}, None, {"a": False}),
        ([1, 2], [2, 1], {"[]": False}),
    ],
)  # fmt: skip
def test_each_field_is_right_or_not(wanted, given, expected):
    assert json_fields(wanted, given) == expected


def test_fields_of_an_answer_are_scores_of_their_row():
    found = score_text('{"name": "Anna", "to": {"city": "Rome"}}', '{"name": "Anna", "to": {"city": "Oslo"}, "x": 1}')
    assert (found["field.name"], found["field.to.city"]) == (True, False)
    assert "field.x" not in found
    assert found["field_accuracy"] == pytest.approx(1 / 3)
    assert score_text('{"a": 1}', "no JSON")["field.a"] is False
    assert not [name for name in score_text("words", '{"a": 1}') if name.startswith("field")]
    assert field_names('{"a": {"b": 1}, "c": [{"d": 2}]}') == ["field.a.b", "field.c[].d"]
    assert field_names("words") == []


@pytest.fixture
def own(tmp_path):
    """A file of the user's with functions that are good and bad, and a module beside it."""
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    path = tmp_path / "own.py"
    path.write_text(
        "from beside import HALF\n"
        "def half(expected, answer):\n    return HALF if expected == answer else 0\n"
        "def fails(expected, answer):\n    return {}[answer]\n"
        "def words(expected, answer):\n    return 'good'\n"
        "def nothing(expected, answer):\n    return float('nan')\n"
        "def one(expected):\n    return 1\n"
        "def exact_match(expected, answer):\n    return 1\n"
    )
    return path


def test_a_metric_of_the_users_own_scores_each_answer(own):
    rows = [{"expected": " a\n", "answer": "a "}, {"expected": "a", "answer": "b"}, {"loss": 1.0}]
    add_metrics(rows, read_metrics([f"{own}:half"]), ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"])
    assert [row.get("metric.half") for row in rows] == [0.5, 0.0, None]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hafl", "has no function hafl; did you mean half"),
        ("HALF", "has no function HALF"),
        ("one", r"must take \(expected, answer\)"),
        ("exact_match", "there is a score exact_match already"),
        ("", "expected FILE:FUNCTION"),
    ],
)
def test_a_slip_in_a_metric_is_found_before_anything_is_scored(own, name, message):
    with pytest.raises(UserError, match=message):
        read_metrics([f"{own}:{name}"])


def test_files_that_cannot_be_run_are_named_with_their_line(own, tmp_path):
    with pytest.raises(UserError, match="there is no file gone.py"):
        read_metrics(["gone.py:f1"])
    (tmp_path / "broken.py").write_text("x = 1\nx = y\n")
    with pytest.raises(UserError, match=r"broken.py:2: cannot be run: NameError"):
        read_metrics([f"{tmp_path / 'broken.py'}:f1"])
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(UserError, match=r"syntax.py:2: cannot be run: SyntaxError"):
        read_metrics([f"{tmp_path / 'syntax.py'}:f"])
    (tmp_path / "notes.txt").write_text("f1")
    with pytest.raises(UserError, match="is no Python file"):
        read_metrics([f"{tmp_path / 'notes.txt'}:f1"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", r"own.py:5: KeyError: 'a', for the answer to rows.jsonl:7"),
        ("words", "gave 'good' for the answer to rows.jsonl:7; a finite number is needed"),
        ("nothing", "gave nan for the answer to rows.jsonl:7"),
    ],
)
def test_a_metric_that_fails_names_its_line_and_the_row(own, name, message):
    with pytest.raises(UserError, match=message):
        add_metrics([{"expected": "a", "answer": "a"}], read_metrics([f"{own}:{name}"]), ["rows.jsonl:7"])
