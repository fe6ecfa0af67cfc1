"""The report holds what the run's files hold, escapes what users and models wrote, needs no network, and never stops a
run."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
from conftest import DATA, TINY, read_jsonl, write_jsonl
from pages import HOSTILE, Outline
from trained import train

from recipes.evaluate_adapter import evaluate_adapter
from recipes.utils.monitoring import Report, refresh_report, write_report
from recipes.utils.monitoring.report import COLOURS, LONGEST, bars, curves

pytestmark = pytest.mark.plots


def outline(folder: Path) -> Outline:
    page = (folder / "report.html").read_text(encoding="utf-8").replace('<html lang="en">', "")
    return Outline(page)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was trained and scored, and its report as it stood at each evaluation."""
    folder = tmp_path_factory.mktemp("report")
    rows = read_jsonl(TINY / "train.jsonl")
    lines = [
        f"model: {{name_or_path: {TINY / 'base'}, dtype: float32}}",
        f"data: {{train: {write_jsonl(folder / 'train.jsonl', rows[:16])},",
        f"  validation: {write_jsonl(folder / 'val.jsonl', rows[16:20])}}}",
        "lora: {r: 4, target_modules: all-linear}",
        f"training: {{output_dir: {folder / 'run'}, max_steps: 4, max_length: 320, per_device_train_batch_size: 2,",
        "  learning_rate: 5.0e-3, eval_strategy: steps, eval_steps: 2, save_steps: 2, logging_steps: 1}",
    ]
    (folder / "small.yaml").write_text("\n".join(lines))
    seen, on_evaluate = [], Report.on_evaluate

    def keep(self, args, state, control, **kwargs):
        on_evaluate(self, args, state, control, **kwargs)
        seen.append((self.path).read_text())

    Report.on_evaluate = keep
    try:
        run = train(folder / "small.yaml")
    finally:
        Report.on_evaluate = on_evaluate
    evaluate_adapter(run, max_rows=2)
    return run, seen


def test_the_report_is_written_at_each_evaluation_and_after_the_last_step(finished):
    run, seen = finished
    assert len(seen) == 2
    assert all(">running<" in page and 'http-equiv="refresh"' in page for page in seen)
    assert "at step 2<" in seen[0]
    page = (run / "report.html").read_text()
    assert ">finished<" in page
    assert 'http-equiv="refresh"' not in page


def test_the_report_holds_config_findings_curves_figures_and_answers(finished):
    run, _ = finished
    text = outline(run).text
    record = json.loads((run / "run.json").read_text())
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert record["findings"][0]["message"] in text  # few steps
    for name in ("learning_rate", "0.005", record["versions"]["torch"], *record["data_sha256"].values()):
        assert name in text
    for title in ("Loss", "Throughput", "Learning rate", "Length of train rows", "Loss of test rows"):
        assert f'aria-label="{title}"' in (run / "report.html").read_text()
    for model in ("base", "adapter"):
        assert f"{metrics[model]['loss']:.4f}" in text
    assert read_jsonl(run / "evaluation" / "predictions.jsonl")[0]["expected"].strip() in text
    assert "The adapter" in text
    best = min(line["eval_loss"] for line in read_jsonl(run / "metrics.jsonl") if "eval_loss" in line)
    assert f"{best:.4f}" in text


def test_the_length_histogram_of_the_record_counts_every_row(finished):
    counts = json.loads((finished[0] / "run.json").read_text())["rows"]["train"]
    assert sum(counts["length_histogram"]["rows"]) == counts["rows"] == 16
    assert len(counts["length_histogram"]["edges"]) == len(counts["length_histogram"]["rows"]) + 1


@pytest.fixture
def hostile(finished, tmp_path) -> Path:
    """The same run with markup in every text that a user or a model wrote."""
    run, _ = finished
    record = json.loads((run / "run.json").read_text())
    record["model"]["name_or_path"] = record["status"] = HOSTILE
    record["data_sha256"] = {HOSTILE: HOSTILE}
    record["findings"] = [{"level": "warn", "message": HOSTILE}]
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    table = metrics["report"]["tables"][0]
    metrics["report"]["tables"] += [{**table, "title": f"tag {HOSTILE}"}, {**table, "title": f"forgetting: {HOSTILE}"}]
    metrics["report"]["verdicts"].append(HOSTILE)
    assert len(metrics["report"]["examples"]) == 2
    for row in metrics["report"]["examples"]:
        row |= {"where": HOSTILE, "tag": HOSTILE, "prompt": [{"role": HOSTILE, "content": HOSTILE}] * 2}
        row["expected"] = HOSTILE + " and half of an emoji \ud83d" + "x" * (2 * LONGEST)
        row["sides"] = [[HOSTILE, HOSTILE, False, [[HOSTILE, "extra"], [HOSTILE, "missing"]]]] * 2
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 5, "lo')
    sample = {"step": 2, "where": HOSTILE, "prompt": HOSTILE, "expected": HOSTILE, "answer": HOSTILE, "stopped": False}
    write_jsonl(tmp_path / "samples.jsonl", [sample, {**sample, "step": 4}])
    write_jsonl(tmp_path / "ledger.jsonl", [{"where": HOSTILE, "step": 1, "epoch": 0.5, "loss": 1.0, "tokens": 3}])
    write_report(tmp_path)
    return tmp_path


def test_all_that_users_and_models_wrote_is_escaped(hostile):
    page = outline(hostile)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) > 15


def test_the_report_is_one_file_without_script_that_asks_nothing_of_the_network(hostile):
    page = outline(hostile)
    assert not page.tags & {"link", "img", "iframe", "object", "script", "form"}
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", (hostile / "report.html").read_text())
    assert "prefers-color-scheme: dark" in page.text


def test_a_run_without_any_files_yet_has_a_report(finished, tmp_path):
    (tmp_path / "run.json").write_text((finished[0] / "run.json").read_text())
    write_report(tmp_path)
    assert "What was run" in outline(tmp_path).text


def test_a_run_folder_of_the_first_build_has_a_report(tmp_path):
    run = shutil.copytree(DATA / "first_build_run", tmp_path / "run")
    write_report(run)
    text = outline(run).text
    assert "best validation loss" in text
    assert "examples/tiny/train.jsonl" in text


def test_a_folder_without_a_record_has_a_report(tmp_path):
    """As a trainer that is not ours leaves it."""
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "epoch": 0.5, "seconds": 2.0, "loss": 1.5}])
    write_report(tmp_path)
    assert "of training" in outline(tmp_path).text


def test_figures_that_are_no_numbers_do_not_keep_the_report_from_being_written(finished, tmp_path):
    (tmp_path / "run.json").write_text((finished[0] / "run.json").read_text())
    lines = [{"step": 1, "epoch": 0.1, "seconds": 1.0, "loss": math.nan, "eval_loss": math.nan, "grad_norm": math.inf}]
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    write_report(tmp_path)


def test_a_disk_error_is_one_line_and_leaves_the_old_report_whole(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text((finished[0] / "run.json").read_text())
    write_report(tmp_path)
    before = (tmp_path / "report.html").read_text()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    refresh_report(tmp_path)
    shown = capsys.readouterr().out
    assert "No space left" in shown
    assert shown.count("\n") == 1
    monkeypatch.undo()
    assert (tmp_path / "report.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_training_goes_on_when_the_report_cannot_be_written(config_file, monkeypatch, capsys):
    monkeypatch.setattr("recipes.utils.monitoring.report.write_page", lambda *args, **values: 1 / 0)
    run = train(config_file(training={"max_steps": 2, "eval_steps": 1, "save_steps": 1}))
    assert (run / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.count("report.html could not be written: ZeroDivisionError") >= 2


def test_the_worst_rows_of_the_ledger_come_first(finished, tmp_path):
    (tmp_path / "run.json").write_text((finished[0] / "run.json").read_text())
    usual = [
        {"where": f"usual:{n}", "step": 10 * epoch, "epoch": epoch, "loss": 3.0 / epoch, "tokens": 9}
        for n in range(40)
        for epoch in (1, 2)
    ]
    wrong = [{"where": f"wrong:{n}", "step": 20, "epoch": 2, "loss": 2.5 + n, "tokens": 9} for n in range(3)]
    write_jsonl(tmp_path / "ledger.jsonl", usual + wrong)
    write_report(tmp_path)
    text = outline(tmp_path).text
    assert text.index("wrong:2") < text.index("wrong:1") < text.index("wrong:0") < text.index("usual")


def test_plots_take_the_colours_of_the_page_and_name_their_series():
    steps = list(range(1, 3001))
    plots = [
        curves("Loss", "nats", {"training": (steps, [1 / n for n in steps]), "validation": ([1], [0.5])}, "log"),
        bars("Length", "tokens", [0, 1, 2], {"rows": [3, 4]}),
    ]  # fmt: skip
    for plot in plots:
        assert not any(stand_in in plot for stand_in in COLOURS)
        assert "var(--a)" in plot
        assert "<style" not in plot
        assert len(plot) < 60_000
    assert "training" in plots[0]
    assert "validation" in plots[0]
