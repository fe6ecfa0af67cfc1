"""The comparison says what differs, what came out, and what may not be compared."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from conftest import DATA, TINY, read_jsonl, write_jsonl
from pages import HOSTILE, Outline

from recipes.compare_runs import as_text, compare_runs
from recipes.evaluate_adapter import evaluate_adapter
from recipes.sft_lora import train_lora
from recipes.utils.config import load_config
from recipes.utils.console import UserError
from recipes.utils.evaluation import compare, figures, own_interval, read_rows, show_interval

FIRST_BUILD = DATA / "first_build_run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs that differ in alpha, trained and scored on the same rows."""
    folder, found = tmp_path_factory.mktemp("compare"), []
    rows = read_jsonl(TINY / "train.jsonl")
    train, validation = write_jsonl(folder / "train.jsonl", rows[:16]), write_jsonl(folder / "val.jsonl", rows[16:46])
    (folder / "small.yaml").write_text(
        f"model: {{name_or_path: {TINY / 'base'}, dtype: float32}}\n"
        f"data: {{train: {train}, validation: {validation}}}\n"
        "lora: {r: 4, target_modules: all-linear}\n"
        "training: {max_steps: 4, max_length: 320, per_device_train_batch_size: 2, learning_rate: 5.0e-3,\n"
        "  eval_strategy: steps, eval_steps: 2, save_steps: 2, logging_steps: 1}\n"
    )
    for alpha in (8, 32):
        flags = {"lora.lora_alpha": alpha, "training.output_dir": str(folder / f"alpha-{alpha}")}
        found.append(train_lora(load_config(folder / "small.yaml", flags, "lora")))
        evaluate_adapter(found[-1], max_rows=2)
    return found


@pytest.fixture
def twin(runs, tmp_path):
    """A function that copies the first run with its record changed by a function."""

    def make(change, name="twin") -> Path:
        shutil.copytree(runs[0], tmp_path / name)
        record = json.loads((runs[0] / "run.json").read_text())
        change(record)
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        return tmp_path / name

    return make


def test_on_a_narrow_terminal_runs_stand_below_each_other_and_nothing_is_cut(runs, monkeypatch, capsys):
    monkeypatch.setattr("recipes.compare_runs.out._width", 44)
    compare_runs(runs)
    shown = capsys.readouterr().out
    assert "…" not in shown
    lines = shown.splitlines()
    heads = [number for number, line in enumerate(lines) if line.split() in (["alpha-8"], ["alpha-32"])]
    assert len(heads) == 2, "one run in a table"


def test_the_time_of_a_resumed_run_is_that_of_all_its_sessions(runs, twin, capsys):
    resumed = twin(lambda record: record.update(resumed=[{"from": "checkpoint-2"}]))
    lines = read_jsonl(resumed / "metrics.jsonl")
    write_jsonl(resumed / "metrics.jsonl", [*lines[:-1], {**lines[-1], "seconds": 4321.0}])
    assert [row["time, s"] == "4,321" for row in compare_runs([runs[0], resumed])] == [False, True]


def test_what_differs_stands_in_the_table_and_nothing_else(runs, capsys):
    first, second = compare_runs(runs)
    assert (first["lora_alpha"], second["lora_alpha"]) == ("8", "32")
    assert set(second) == {
        "run", "lora_alpha", "validation loss", "test loss", "token accuracy", "exact match", "ROUGE-L", "chrF",
        "valid JSON", "stopped", "against alpha-8", "tokens/s", "time, s", "memory, GB",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "alpha-32" in shown
    assert "learning_rate" not in shown


def test_figures_are_those_of_the_runs_files(runs):
    found = compare_runs(runs)
    for one, folder in zip(found, runs, strict=True):
        losses = [line["eval_loss"] for line in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in line]
        assert one["validation loss"] == f"{min(losses):.4f}"
        low, high = own_interval(read_rows(folder / "evaluation" / "predictions.jsonl")["adapter"], "loss")
        loss = json.loads((folder / "evaluation" / "metrics.json").read_text())["adapter"]["loss"]
        assert one["test loss"] == f"{loss:.4f} ({low:.4f} to {high:.4f})"
        assert low < loss < high
    losses = [float(one["test loss"].split()[0]) for one in found]
    assert found[1]["against alpha-8"].startswith("loss better" if losses[1] < losses[0] else "loss worse")


def _other_file(name):
    def change(record):
        record["data_sha256"] = {
            path: "0" * 64 if path.endswith(name) else digest for path, digest in record["data_sha256"].items()
        }

    return change


@pytest.mark.parametrize(
    ("change", "expected", "loss_is_marked"),
    [
        (_other_file("val.jsonl"), "other validation rows", True),
        (_other_file("train.jsonl"), "other train rows", False),
        (lambda record: record["rows"]["validation"].update(trained_tokens=1), "other validation rows", True),
        (lambda record: record["data"].update(test="elsewhere.jsonl"), None, False),
    ],
)
def test_runs_on_other_rows_are_marked(runs, twin, change, expected, loss_is_marked, capsys):
    _, other = compare_runs([runs[0], twin(change)])
    assert other.get("not comparable") == expected
    assert other["validation loss"].endswith("†") == loss_is_marked
    assert ("is not comparable" in capsys.readouterr().out) == loss_is_marked


def test_a_validation_share_of_other_rows_is_not_comparable(twin):
    def share(seed):
        return lambda record: (record["data"].update(validation=0.1), record.update(seed=seed))

    same = compare_runs([twin(share(1), "a"), twin(share(1), "b")])
    assert "not comparable" not in same[1]
    other = compare_runs([twin(share(1), "c"), twin(share(2), "d")])
    assert other[1]["not comparable"] == "other validation rows"


def change_predictions(folder: Path, change) -> None:
    """Rewrite the run's predictions by `change` of their list, and let its metrics be of other rows."""
    lines = change(read_jsonl(folder / "evaluation" / "predictions.jsonl"))
    write_jsonl(folder / "evaluation" / "predictions.jsonl", lines)
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    metrics["of"]["rows_sha256"] = "0" * 64
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(metrics))


def test_scores_on_other_test_rows_are_marked_and_not_compared(runs, twin):
    other = twin(lambda record: None)
    change_predictions(other, lambda lines: [{**line, "prompt": [{"role": "user", "content": "?"}]} for line in lines])
    _, row = compare_runs([runs[0], other])
    assert row["not comparable"] == "other test rows"
    assert row["test loss"].endswith("†")
    assert "against alpha-8" not in row


def test_runs_scored_on_other_numbers_of_rows_are_held_against_each_other_on_those_in_common(runs, twin, capsys):
    """The rows of the second are 25 of the first one's 30, in another order, and five new ones."""
    other = twin(lambda record: None)
    new = [{"role": "user", "content": "?"}]
    change_predictions(other, lambda lines: [{**line, "prompt": new} for line in lines[:5]] + lines[:4:-1])
    _, row = compare_runs([runs[1], other])
    assert row["test loss"].endswith("†")
    assert "it is held against that on the 25 rows in common" in capsys.readouterr().out
    first, second = (read_jsonl(run / "evaluation" / "predictions.jsonl") for run in (runs[1], other))
    pairs = list(zip(second[5:], first[:4:-1], strict=True))
    rows = ([{**pair[place]["adapter"], "tokens": pair[place]["tokens"]} for pair in pairs] for place in (0, 1))
    found = compare(*rows)["loss"]
    assert row["against alpha-32"].startswith(f"loss {found['verdict']} ({show_interval('loss', found)})")


def test_runs_with_other_numbers_of_answers_are_compared_on_those_in_common(runs, tmp_path, capsys):
    other = tmp_path / "more"
    shutil.copytree(runs[1], other)
    evaluate_adapter(other, max_rows=24, max_new_tokens=4)
    capsys.readouterr()
    _, row = compare_runs([runs[0], other])
    assert (
        "more: answers to 24 rows, alpha-8 to 2; held against each other on those in common" in capsys.readouterr().out
    )
    assert "exact match too few rows to say" in row["against alpha-8"]
    assert "not comparable" not in row


def test_a_run_that_goes_on_and_was_not_scored_is_in_the_table(runs, twin):
    going = twin(lambda record: record.update(status="running"), "going")
    shutil.rmtree(going / "evaluation")
    (going / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "seconds": 3.0}\n{"step": 2, "lo')
    _, row = compare_runs([runs[0], going])
    assert row["run"] == "going (running)"
    assert row["validation loss"] == ""
    assert "test loss" not in row


def test_the_csv_has_numbers_and_the_page_is_escaped(runs, twin, tmp_path):
    twin(lambda record: record["model"].update(chat_template=HOSTILE), "<b>odd & bold")
    table = compare_runs([*runs, tmp_path / "<b>odd & bold"], html=tmp_path / "runs.html", csv=tmp_path / "runs.csv")
    with open(tmp_path / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["lora.lora_alpha"] for line in lines] == ["8", "32", "8"]
    for line, row in zip(lines, table, strict=True):
        assert f"{float(line['best_validation_loss']):.4f}" == row["validation loss"]
        assert float(line["loss_low"]) < float(line["loss"]) < float(line["loss_high"])
    page = Outline((tmp_path / "runs.html").read_text().replace('<html lang="en">', ""))
    assert HOSTILE in page.text
    assert not page.tags & {"b", "script", "link", "img"}


def test_runs_stand_in_a_line_each_where_they_fit_and_in_columns_where_not(runs, twin, capsys):
    folders = [twin(lambda record: None, name) for name in ("one", "two", "three", "four", "five")]
    compare_runs(folders)
    lines = capsys.readouterr().out.splitlines()
    assert sum("one" in line and "four" in line for line in lines) == 1  # the head of four columns
    assert max(map(len, lines)) <= 120
    for folder in folders:
        shutil.rmtree(folder / "evaluation")
    compare_runs(folders)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "one",
        "two",
        "three",
        "four",
        "five",
    ]


def test_a_run_folder_of_the_first_build_stands_beside_a_new_one(runs):
    """As it was written before run.json had a format."""
    assert "format" not in json.loads((FIRST_BUILD / "run.json").read_text())
    new, old = compare_runs([runs[0], FIRST_BUILD])
    assert (new["r"], old["r"], old["lora_alpha"]) == ("4", "16", "32")
    assert old["validation loss"] == "0.0489 †"
    rows = read_rows(FIRST_BUILD / "evaluation" / "predictions.jsonl")["adapter"]
    assert old["test loss"].startswith(f"{figures(rows)['loss']:.4f} (")
    assert old["not comparable"] == "other train rows, other validation rows, other test rows"


def test_rows_that_were_not_counted_are_left_out(runs, twin):
    """Of a Dataset in memory nothing is known but what was trained."""
    own = twin(lambda record: record["rows"].update(train=None), "own")
    _, row = compare_runs([runs[0], own])
    assert row["train rows"] == "–"
    assert row["validation loss"]
    assert "not comparable" not in row


def test_no_run_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run under"):
        compare_runs()
    with pytest.raises(UserError, match="is no run folder"):
        compare_runs([tmp_path])


def test_a_cell_that_a_spreadsheet_would_compute_comes_behind_a_quote():
    assert [as_text(value) for value in ("=1+1", "@a", "plain", -1.5)] == ["'=1+1", "'@a", "plain", -1.5]
