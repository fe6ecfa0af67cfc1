"""While it trains: every figure in metrics.jsonl, and one tidy line of what is known."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, read_jsonl, run_recipe, write_jsonl
from trl import SFTConfig

from recipes.utils.console import out
from recipes.utils.monitoring import Progress
from recipes.utils.monitoring.progress import BESIDE_THE_BAR, metrics_line


def test_a_runs_metrics_hold_every_figure(config_file):
    training = {"packing": False, "max_steps": -1, "num_train_epochs": 1, "eval_steps": 12, "save_steps": 12}
    path = config_file(training=training)
    assert run_recipe("sft_lora", path) == 0
    folder = path.parent / "run"
    logged = [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert logged[-1].keys() >= {
        "step", "epoch", "seconds", "loss", "mean_token_accuracy", "entropy", "grad_norm", "learning_rate",
        "num_tokens", "tokens_per_second", "trained_tokens_per_second", "padding_share", "flops_per_second",
        "peak_memory_gb", "process_memory_gb", "cpu_percent", "seconds_left",
    }  # fmt: skip
    rows = json.loads((folder / "run.json").read_text())["rows"]["train"]
    shares = [line["trained_tokens_per_second"] / line["tokens_per_second"] for line in logged]
    assert np.mean(shares) == pytest.approx(rows["trained_tokens"] / rows["tokens"], rel=0.05)
    assert 0 < np.mean([line["padding_share"] for line in logged]) < 0.2
    assert all(0.1 < line["process_memory_gb"] <= line["peak_memory_gb"] < 50 for line in logged)
    assert logged[0]["seconds_left"] > logged[-1]["seconds_left"] == 0
    documented = (ROOT / "docs" / "run_folder.md").read_text()
    for line in read_jsonl(folder / "metrics.jsonl"):
        assert not [key for key in line if f"`{key}`" not in documented]


LOGS = {
    "loss": 1.2345, "mean_token_accuracy": 0.981, "learning_rate": 2e-4, "tokens_per_second": 112345.0,
    "trained_tokens_per_second": 61234.0, "padding_share": 0.031, "mfu": 0.412, "peak_memory_gb": 22.14,
    "gpu_utilization": 98, "gpu_power_w": 651.2, "gpu_temperature_c": 61, "seconds_left": 3725.0,
}  # fmt: skip


def test_a_line_says_what_matters_and_leaves_out_what_is_not_known():
    assert metrics_line(LOGS) == (
        "loss 1.2345  accuracy 98.1%  lr 2.0e-04  112,345 tokens/s, 61,234 trained  padding 3%  MFU 41%  22.1 GB  "
        "GPU 98 %, 651 W  1:02:05 left"
    )
    assert metrics_line(LOGS, BESIDE_THE_BAR) == "loss 1.2345  accuracy 98.1%  112,345 tokens/s  MFU 41%  1:02:05 left"
    on_a_cpu = {key: value for key, value in LOGS.items() if key != "mfu" and not key.startswith("gpu")}
    assert "MFU" not in metrics_line(on_a_cpu) + metrics_line(on_a_cpu, BESIDE_THE_BAR)
    assert "GPU" not in metrics_line(on_a_cpu)


def test_a_step_at_a_rate_of_zero_is_told_as_one_that_changes_nothing():
    assert metrics_line({"loss": 1.0, "learning_rate": 0.0}) == "loss 1.0000  lr 0: a step that changes nothing"
    assert metrics_line({"loss": 1.0, "learning_rate": 1e-9}) == "loss 1.0000  lr 1.0e-09"


def test_seconds_are_counted_on_after_a_resume_and_the_last_step_says_what_follows(tmp_path, capsys):
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": step, "seconds": 100.0 * step} for step in (2, 4, 6)])
    progress, control = Progress(tmp_path), SimpleNamespace(should_evaluate=False)
    state = SimpleNamespace(global_step=4, max_steps=8, is_world_process_zero=True, epoch=0)
    progress.on_train_begin(None, state, control)
    for evaluates, told in (("steps", "the last evaluation, the adapter"), ("no", "; the adapter")):
        args = SFTConfig(eval_strategy=evaluates, use_cpu=True, bf16=False)
        for state.global_step in range(5, 9):
            progress.on_step_end(args, state, control)
            progress.on_log(args, state, control, logs={"loss": 1.0})
        lines = [line for line in capsys.readouterr().out.splitlines() if "all steps are taken" in line]
        assert len(lines) == 1
        assert told in lines[0]
    found = [line["seconds"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert found[:2] == [200.0, 400.0]
    assert all(400 <= seconds < 401 for seconds in found[2:])
    assert read_jsonl(tmp_path / "metrics.jsonl")[-2]["seconds_left"] < 1, "reckoned by this session alone"


def test_on_a_terminal_of_80_columns_progress_is_one_line(monkeypatch, tmp_path):
    """The bar is drawn again in its place: no line is wider than the terminal, and none is left behind."""
    terminal = type(out)(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr("recipes.utils.monitoring.progress.out", terminal)
    monkeypatch.setattr("recipes.utils.console.out", terminal)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    progress = Progress(tmp_path)
    state = SimpleNamespace(global_step=0, max_steps=3000, is_world_process_zero=True, epoch=0)
    progress.on_train_begin(None, state, SimpleNamespace(should_evaluate=False))
    for state.global_step in range(998, 1001):
        progress.on_log(None, state, None, logs=dict(LOGS))
        progress.on_step_end(None, state, None)
        progress.bar.refresh()
    progress.on_log(None, state, None, logs={"eval_loss": 1.0, "eval_mean_token_accuracy": 0.5})
    progress.on_train_end(None, state, None)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", terminal.file.getvalue())
    line, bar = (line.strip("\r").split("\r")[-1] for line in shown.strip().split("\n"))
    assert line == "step 1000/3000  validation loss 1.0000  accuracy 50.0%"
    assert re.fullmatch(
        r"1000/3000 ━+ +loss 1.2345  accuracy 98.1%  112,345 tokens/s  MFU 41%  0:00:00 left", bar.strip()
    )
    assert len(bar) <= 80
