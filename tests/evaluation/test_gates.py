"""A gate is decided by the interval, and a slip in one is found by its words."""

import json

import pytest

from recipes.utils.console import UserError
from recipes.utils.evaluation.gates import decide, read_gate, rows_of_runs

BASELINES, METRICS, FIELDS = ["base", "shots", "best"], ["metric.f1"], ["field.name", "field.items[].price"]


def gate_of(text: str, part="forgetting"):
    return read_gate(text, BASELINES, METRICS, FIELDS, part)


@pytest.fixture
def last(tmp_path, monkeypatch):
    """Runs whose names hold a sign."""
    monkeypatch.chdir(tmp_path)
    for name in ("last", "last-2", "a + b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exact_match >= base + 0.05", ("predictions", "exact_match", True, "base", 0.05)),
        ("exact_match>=base+0.05", ("predictions", "exact_match", True, "base", 0.05)),
        ("exact_match >= base", ("predictions", "exact_match", True, "base", 0.0)),
        ("rouge_l >= runs/last - 0.02", ("predictions", "rouge_l", True, "runs/last", -0.02)),
        ("rouge_l >= runs/last-2", ("predictions", "rouge_l", True, "runs/last-2", 0.0)),
        ("rouge_l >= runs/last-2 - 1e-2", ("predictions", "rouge_l", True, "runs/last-2", -0.01)),
        ("rouge_l >= runs/a + b", ("predictions", "rouge_l", True, "runs/a + b", 0.0)),
        ("forgetting.loss <= base + 0.1", ("forgetting", "loss", False, "base", 0.1)),
        ("chrf >= best - 2", ("predictions", "chrf", True, "best", -2.0)),
        ("f1 >= shots + 3", ("predictions", "metric.f1", True, "shots", 3.0)),
        ("metric.f1 >= 0.5", ("predictions", "metric.f1", True, "", 0.5)),
        ("field.items[].price >= .9", ("predictions", "field.items[].price", True, "", 0.9)),
        ("answer_tokens <= base + 10", ("predictions", "answer_tokens", False, "base", 10.0)),
    ],
)
def test_what_a_gate_says(text, expected, last):
    assert tuple(gate_of(text))[1:] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exact_match", "expected SCORE >= REFERENCE"),
        ("exact_match > base", "write >= or <=, not >"),
        ("exact_match => base", "write >= or <="),
        ("exact_mach >= base", "did you mean 'exact_match'"),
        ("field.nam >= base", "did you mean 'field.name'"),
        ("exact_match <= base", "more is better: write >="),
        ("loss >= base", "less is better: write <="),
        ("exact_match >= base + 5", "write 0.05 for five points"),
        ("exact_match >= bse + 0.05", "did you mean 'base'"),
        ("exact_match >= runs/gone - 0.1", "no run folder"),
        ("exact_match >= system", "add --system TEXT"),
        ("exact_match >= base + five", "no run folder"),
        ("exact_match >= old - 0.02", "add --against OLD_RUN"),
        ("old_test.exact_match >= 0.9", r"old_test.\* needs .*--against OLD_RUN"),
    ],
)
def test_a_slip_in_a_gate_is_named(text, message, last):
    with pytest.raises(UserError, match=message):
        gate_of(text)


def test_forgetting_needs_its_rows_and_json_its_fields():
    with pytest.raises(UserError, match="--forgetting FILE"):
        gate_of("forgetting.loss <= base", part=None)
    with pytest.raises(UserError, match="no expected answer is a JSON"):
        read_gate("valid_json >= 0.9", BASELINES, [], [])


def answers(right: int, rows: int, **more) -> list[dict]:
    return [{"exact_match": number < right, "answer": "", **more} for number in range(rows)]


@pytest.mark.parametrize(
    ("text", "ours", "theirs", "rows", "verdict"),
    [
        ("exact_match >= base + 0.05", 80, 10, 100, "pass"),
        ("exact_match >= base + 0.05", 10, 80, 100, "fail"),
        ("exact_match >= base + 0.65", 80, 10, 100, "too few rows to say"),  # the point is above it, the interval not
        ("exact_match >= base - 0.05", 50, 50, 20, "too few rows to say"),  # alike, but 20 rows cannot show five points
        ("exact_match >= base - 0.05", 100, 100, 100, "pass"),
        ("exact_match >= base", 19, 0, 19, "too few rows to say"),
        ("exact_match >= 0.9", 99, 0, 100, "pass"),
        ("exact_match >= 0.9", 92, 0, 100, "too few rows to say"),
        ("exact_match >= 0.9", 50, 0, 100, "fail"),
    ],
)
def test_a_gate_is_decided_by_the_interval(text, ours, theirs, rows, verdict):
    scored = {"base": answers(theirs, rows), "adapter": answers(ours, rows)}
    found = decide(gate_of(text), scored, {}, None)
    assert found["verdict"] == verdict
    assert found["rows"] == rows
    assert text in found["text"]


def test_best_is_the_best_baseline_by_that_score_and_at_most_is_the_other_way():
    scored = {"base": answers(10, 100), "shots": answers(80, 100), "adapter": answers(50, 100)}
    assert decide(gate_of("exact_match >= base"), scored, {}, None)["verdict"] == "pass"
    assert decide(gate_of("exact_match >= best"), scored, {"exact_match": "shots"}, None)["verdict"] == "fail"
    losses = {name: [{"loss": loss + 0.01 * (n % 3), "tokens": 3} for n in range(50)]
              for name, loss in {"base": 1.0, "adapter": 1.05}.items()}  # fmt: skip
    assert decide(gate_of("loss <= base + 0.1"), losses, {}, None)["verdict"] == "pass"
    assert decide(gate_of("loss <= base + 0.01"), losses, {}, None)["verdict"] == "fail"


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_no_number_passes_no_gate():
    scored = {name: [{"loss": loss, "tokens": 3}] * 50 for name, loss in {"base": 1.0, "adapter": float("nan")}.items()}
    assert decide(gate_of("loss <= base + 9"), scored, {}, None)["verdict"] == "fail"
    assert decide(gate_of("loss <= 9"), scored, {}, None)["verdict"] == "fail"


def test_another_run_must_have_been_scored_on_the_same_rows(last):
    gate = gate_of("exact_match >= runs/last - 0.02")

    def rows(digest="same", tokens=12, text=gate):
        return rows_of_runs([text], {"predictions": digest}, lambda part: tokens)

    with pytest.raises(UserError, match=r"score that run first: python recipes/evaluate_adapter.py runs/last"):
        rows()
    folder = last / "last" / "evaluation"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"of": {"rows_sha256": "same"}}))
    lines = [{"tokens": 3, "base": {}, "adapter": {"exact_match": True, "loss": 1.0}}] * 4
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="was scored on other rows"):
        rows("other")
    assert rows()[gate] == [{"exact_match": True, "loss": 1.0, "tokens": 3}] * 4
    loss = gate_of("loss <= runs/last")
    assert rows(text=loss)
    with pytest.raises(UserError, match="has other tokens"):
        rows(tokens=13, text=loss)
    with pytest.raises(UserError, match="was scored without rouge_l"):
        rows(text=gate_of("rouge_l >= runs/last"))
    assert not rows(text=gate_of("exact_match >= base"))
