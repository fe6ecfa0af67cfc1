"""A sweep tries what it was told, stops bad trials early, and goes on where it was stopped as if it had not been."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import ROOT, read_jsonl
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from recipes.sweep import at_an_edge, distribution, sweep
from recipes.utils.console import UserError

# In the place of a training recipe, for what is the sweep's own: three evaluations whose losses follow from alpha. It
# stops after the first one, once, if alpha is that of STOP, as a recipe does that is told to.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
alpha, folder = float(flags["--lora.lora_alpha"]), Path(flags["--training.output_dir"])
resumed = "--resume" in sys.argv
print("alpha", alpha)
if alpha == float(os.environ.get("FAIL", -1)):
    sys.exit("out of memory")
assert resumed == (folder / "checkpoint-1").exists()
folder.mkdir(parents=True, exist_ok=True)
model = {"name_or_path": "b", "dtype": "float32", "chat_template": "auto", "attn_implementation": "auto",
         "revision": None, "trust_remote_code": False}
record = {"name": "c", "status": "running", "method": "lora", "model": model, "lora": {"lora_alpha": alpha},
          "training": {}, "quantization": {}, "data": {"train": "t", "validation": "v"}, "data_sha256": {},
          "rows": {"train": {"rows": 1, "trained_tokens": 1}}, "seed": 0, "device": "CPU"}
(folder / "run.json").write_text(json.dumps(record))
for step in range(2 if resumed else 1, 4):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "eval_loss": alpha + 10 / step, "seconds": step}) + "\\n")
    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / "trainer_state.json").touch()
    if alpha == float(os.environ.get("STOP", -1)) and not resumed:
        sys.exit(75)
    time.sleep(alpha > 40)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "sft_lora.py").write_text(STAND_IN)
    monkeypatch.setattr("recipes.sweep.RECIPES", tmp_path)
    monkeypatch.setattr("recipes.sweep.LOOK_EVERY", 0.05)
    return tmp_path


def table_of(folder: Path) -> list:
    """(folder, parameters, state, loss) of the trials that came to an end."""
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'sweep.db'}")
    done = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    return sorted((Path(one.user_attrs["folder"]).name, one.params, one.state.name, one.value) for one in done)


def test_a_sweep_of_the_rank_says_that_alpha_stays(stand_in, capsys):
    for flags in ({"lora.lora_alpha": 3, "lora.r": "4,8"}, {"lora.lora_alpha": "3,4", "lora.r": "4,8"}):
        sweep(ROOT / "configs" / "tiny.yaml", flags, folder=stand_in / str(len(str(flags))), trials=1)
        said = "lora.lora_alpha stays 3 while lora.r changes" in capsys.readouterr().out
        assert said == (flags["lora.lora_alpha"] == 3)


@pytest.mark.parametrize(
    ("values", "best", "side"),
    [
        ("16,32,64", 16, "lower"),
        ("16,32,64", 64, "upper"),
        ("16,32,64", 32, None),
        ("1e-4..4e-4", 1.1e-4, "lower"),
        ("1e-4..4e-4", 2e-4, None),  # by the logarithm, the middle
        ("8..64", 62, "upper"),
        ("cosine,linear", "cosine", None),
    ],
)
def test_a_best_value_at_the_end_of_what_was_tried_is_told(values, best, side):
    lines = at_an_edge({"training.x": distribution("training.x", values)}, {"training.x": best})
    assert [f"the {side} end of what was tried" in line for line in lines] == [True] * (side is not None)


def test_a_sweep_of_short_trials_says_so_and_that_its_best_is_at_the_edge(stand_in, capsys):
    sweep(ROOT / "configs" / "tiny.yaml", {"lora.lora_alpha": "3,4,5"}, folder=stand_in / "trials")
    said = capsys.readouterr().out
    assert "warning: lora.lora_alpha 3 is at the lower end of what was tried (3 to 5): a better one may lie" in said
    assert "warning: 3 trials of 3 steps at most: what is best so early" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16,32,64", CategoricalDistribution([16, 32, 64])),
        ("1e-4, 2e-4", CategoricalDistribution([1e-4, 2e-4])),
        ("cosine,linear", CategoricalDistribution(["cosine", "linear"])),
        ("true,false", CategoricalDistribution([True, False])),
        ("1e-4..4e-4", FloatDistribution(1e-4, 4e-4, log=True)),
        ("0.0..0.1", FloatDistribution(0, 0.1)),
        ("8..64", IntDistribution(8, 64)),
        ("../rows.jsonl", None),
        ("q_proj", None),
        (4, None),
        (["q", "v"], None),
    ],
)
def test_values_of_a_flag_are_a_list_or_a_range(text, expected):
    assert distribution("lora.r", text) == expected


def test_lists_are_combined_and_the_last_changes_fastest(config_file, stand_in):
    flags = {"lora.lora_alpha": "2,1", "lora.r": "4,8", "lora.target_modules": ["q_proj"]}
    sweep(config_file(), flags, folder=stand_in / "sweep")
    tried = [(params["lora.lora_alpha"], params["lora.r"]) for _, params, _, _ in table_of(stand_in / "sweep")]
    assert tried == [(2, 4), (2, 8), (1, 4), (1, 8)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora.r": 4}, "nothing to tune"),
        ({"lora.r": "4,none"}, "lora.r"),
        ({"lora.alpah": "4,8"}, "lora.alpah"),
        ({"lora.r": "8..4"}, "below the second"),
        ({"lora.r": "0..4"}, "lora.r: 0 is not between"),
        ({"lora.r": "4,8", "training.learning_rate": "1e-4..-1"}, "below the second"),
        ({"lora.r": "4,8", "training.warmup_steps": "0..-3"}, "below the second"),
        ({"lora.r": "4,8", "training.output_dir": "x"}, "--folder"),
        ({"lora.r": "4,8", "training.eval_strategy": "no", "training.load_best_model_at_end": False}, "judged by"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_run(config_file, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        sweep(config_file(), flags, folder=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_grid_is_tried_in_order_and_the_best_is_the_lowest_loss(config_file, stand_in, capsys):
    config = config_file()
    best = sweep(config, {"lora.lora_alpha": "3,1,2", "lora.r": 4}, folder=stand_in / "sweep")
    assert table_of(stand_in / "sweep") == [
        ("trial-001", {"lora.lora_alpha": 3}, "COMPLETE", 3 + 10 / 3),
        ("trial-002", {"lora.lora_alpha": 1}, "COMPLETE", 1 + 10 / 3),
        ("trial-003", {"lora.lora_alpha": 2}, "COMPLETE", 2 + 10 / 3),
    ]
    assert best["params"] == {"lora.lora_alpha": 1}
    assert best["command"].endswith(f"sft_lora.py {config} --lora.r 4 --lora.lora_alpha 1")
    shown = capsys.readouterr().out
    assert best["command"] in shown.replace("\n", "")
    assert "trial-003" in shown  # the table of compare_runs


def test_a_sweep_that_was_stopped_goes_on_to_the_same_table(config_file, stand_in, monkeypatch, capsys):
    flags = {"lora.lora_alpha": "3,1,2"}
    monkeypatch.setenv("STOP", "1")
    with pytest.raises(KeyboardInterrupt):
        sweep(config_file(), flags, folder=stand_in / "stopped")
    assert "give the same command again" in capsys.readouterr().out
    assert len(table_of(stand_in / "stopped")) == 1
    again = sweep(config_file(), flags, folder=stand_in / "stopped")
    assert "alpha 1.0\nalpha 1.0\n" in (stand_in / "stopped" / "trial-002.log").read_text()
    monkeypatch.delenv("STOP")
    straight = sweep(config_file(), flags, folder=stand_in / "straight")
    assert table_of(stand_in / "stopped") == table_of(stand_in / "straight")
    assert {**again, "trial": ""} == {**straight, "trial": ""}
    assert sweep(config_file(), flags, folder=stand_in / "straight") == straight  # nothing is left to do


def test_points_of_a_range_are_the_same_after_a_stop(config_file, stand_in, monkeypatch):
    flags = {"lora.lora_alpha": "1..40"}
    sweep(config_file(), flags, trials=5, folder=stand_in / "straight")
    drawn = [params["lora.lora_alpha"] for _, params, _, _ in table_of(stand_in / "straight")]
    assert len(set(drawn)) > 2
    monkeypatch.setenv("STOP", str(drawn[2]))
    with pytest.raises(KeyboardInterrupt):
        sweep(config_file(), flags, trials=5, folder=stand_in / "stopped")
    sweep(config_file(), flags, trials=5, folder=stand_in / "stopped")
    assert table_of(stand_in / "stopped") == table_of(stand_in / "straight")


def test_a_trial_that_does_worse_than_usual_is_stopped_early(config_file, stand_in, capsys):
    flags = {"lora.lora_alpha": "1,2,3,4,50"}
    sweep(config_file(), flags, folder=stand_in / "sweep")
    *first, last = table_of(stand_in / "sweep")
    assert [state for _, _, state, _ in first] == ["COMPLETE"] * 4
    assert last[2] == "PRUNED"
    assert len(read_jsonl(stand_in / "sweep" / "trial-005" / "metrics.jsonl")) < 3
    assert "stopped early at step 1" in capsys.readouterr().out
    sweep(config_file(), flags, pruning=False, folder=stand_in / "whole")
    assert table_of(stand_in / "whole")[-1][2] == "COMPLETE"


def test_a_trial_that_fails_is_named_and_the_others_go_on(config_file, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "3")
    best = sweep(config_file(), {"lora.lora_alpha": "3,2"}, folder=stand_in / "sweep")
    assert best["params"] == {"lora.lora_alpha": 2}
    assert "failed with status 1: out of memory" in capsys.readouterr().out
    with pytest.raises(UserError, match="no trial came to an end"):
        sweep(config_file(), {"lora.lora_alpha": "3,3.0"}, folder=stand_in / "other")


def test_a_folder_with_another_sweep_is_refused(config_file, stand_in):
    sweep(config_file(), {"lora.lora_alpha": "3,2"}, folder=stand_in / "sweep")
    with pytest.raises(UserError, match="holds a sweep of other values"):
        sweep(config_file(), {"lora.lora_alpha": "3,4"}, folder=stand_in / "sweep")


@pytest.mark.slow
def test_two_alphas_on_the_tiny_model_stopped_in_the_second_and_taken_up_again(config_file, tmp_path):
    """The real recipe, the sweep ended by SIGTERM while its second trial trains: the losses are those of a sweep that
    was not stopped, to the last bit."""
    config = config_file(training={"max_steps": 16, "eval_steps": 4, "save_steps": 4, "output_dir": None})
    words = [sys.executable, ROOT / "recipes" / "sweep.py", config, "--lora.lora_alpha", "8,32", "--folder"]
    started = subprocess.Popen([*words, tmp_path / "stopped"], cwd=ROOT)
    second = tmp_path / "stopped" / "trial-002" / "metrics.jsonl"
    while not (second.is_file() and "eval_loss" in second.read_text()):
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(120) != 0
    assert len(table_of(tmp_path / "stopped")) == 1
    for folder in ("stopped", "straight"):
        subprocess.run([*words, tmp_path / folder], cwd=ROOT, check=True)
    assert table_of(tmp_path / "stopped") == table_of(tmp_path / "straight")
    assert len(table_of(tmp_path / "stopped")) == 2
    records = [json.loads((tmp_path / name / "trial-002" / "run.json").read_text()) for name in ("stopped", "straight")]
    assert records[0]["best_validation_loss"] == records[1]["best_validation_loss"]
