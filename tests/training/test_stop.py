"""Stop signals and deadlines: the step in hand, a whole checkpoint, status 75; and what a second Ctrl-C does."""

import json
import os
import signal
import time

import psutil
import pytest
from conftest import ROOT, read_jsonl, run_recipe
from forks import start_script
from transformers import TrainerCallback

from recipes import sft_lora
from recipes.utils.config import load_config
from recipes.utils.console import RunEnded
from recipes.utils.training import Deadline
from recipes.utils.training.checkpoint import fault
from recipes.utils.training.trainer import signals_to

LONG = {"max_steps": 5000, "eval_steps": 5000, "save_steps": 5000}


def wait_for(path, text=""):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and text in path.read_text()):
        time.sleep(0.02)
    assert path.exists(), "the run did not begin"


class SignalAt(TrainerCallback):
    """Sends this process a signal at one moment of the run."""

    def __init__(self, event, step, number):
        self.step, self.number = step, number
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.number:
            os.kill(os.getpid(), self.number)
            self.number = None


@pytest.fixture
def signal_at(monkeypatch):
    """Add a `SignalAt` to the trainer of the next run."""

    def plan(*when):
        class Signalled(sft_lora.ResumableTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.add_callback(SignalAt(*when))

        monkeypatch.setattr(sft_lora, "ResumableTrainer", Signalled)

    return plan


def test_sigterm_ends_the_script_with_status_75_a_whole_checkpoint_and_no_final_adapter(config_file, tmp_path):
    streams = ["/dev/null", tmp_path / "out", tmp_path / "err"]
    process = start_script("recipes/sft_lora.py", config_file(training=LONG), folder=ROOT, streams=streams)
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 2')
    process.terminate()  # SIGTERM
    process.join(60)
    errors = (tmp_path / "err").read_text()
    assert process.exitcode == 75, errors
    assert "SIGTERM: stopping after this step" in errors
    assert "is complete; the same command with --resume goes on" in errors
    assert "Traceback" not in errors
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert fault(checkpoint) is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    last = [line["step"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line][-1]
    assert checkpoint.name == f"checkpoint-{last}"


def test_a_second_ctrl_c_ends_at_once(config_file, tmp_path, monkeypatch, capsys):
    """Both within one step: the first lets it finish, the second does not."""
    finished = []

    class Interrupted(sft_lora.ResumableTrainer):
        def training_step(self, *args, **kwargs):
            for _ in range(2 * (self.state.global_step == 5)):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)  # the handler runs
            finished.append(self.state.global_step)
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(sft_lora, "ResumableTrainer", Interrupted)
    assert run_recipe("sft_lora", config_file()) == 1
    assert finished[-1] == 4
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert "--resume" in errors
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("number", "event", "step", "stops_at"),
    [
        (signal.SIGTERM, "on_step_begin", 2, 3),
        (signal.SIGINT, "on_step_begin", 2, 3),
        (signal.SIGUSR1, "on_step_begin", 2, 3),
        (signal.SIGHUP, "on_step_begin", 2, 3),
        (signal.SIGTERM, "on_prediction_step", 4, 4),
        (signal.SIGTERM, "on_save", 4, 4),
        (signal.SIGTERM, "on_step_end", 8, 8),
    ],
)
def test_each_signal_stops_at_the_next_end_of_a_step_or_within_an_evaluation(
    config_file, tmp_path, signal_at, number, event, step, stops_at
):
    before = signal.getsignal(number)
    signal_at(event, step, number)
    assert run_recipe("sft_lora", config_file()) == 75
    folder = tmp_path / "run"
    assert max(int(path.name[11:]) for path in folder.glob("checkpoint-*")) == stops_at
    assert fault(folder / f"checkpoint-{stops_at}") is None
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["step"]) == ("stopped", stops_at)
    assert not (folder / "adapter_config.json").exists()
    assert signal.getsignal(number) == before


def test_an_evaluation_that_a_stop_put_off_is_made_up_at_the_resume(
    config_file, tmp_path, signal_at, monkeypatch, capsys
):
    path = config_file(lora={"lora_dropout": 0.1})
    with monkeypatch.context():
        signal_at("on_step_begin", 3, signal.SIGTERM)
        assert run_recipe("sft_lora", path) == 75
        monkeypatch.undo()
    folder = tmp_path / "run"
    assert not any("eval_loss" in line for line in read_jsonl(folder / "metrics.jsonl"))
    assert run_recipe("sft_lora", path, "--resume") == 0
    assert "evaluation that the stop has put off comes first" in capsys.readouterr().out
    assert [line["step"] for line in read_jsonl(folder / "metrics.jsonl") if "eval_loss" in line] == [4, 8]
    whole = tmp_path / "whole"
    assert run_recipe("sft_lora", path, "--training.output_dir", whole) == 0
    assert (folder / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_max_hours_stops_with_a_whole_checkpoint(config_file, tmp_path):
    hours = (time.time() - psutil.Process().create_time() + 8) / 3600  # from the start of this process
    with pytest.raises(RunEnded, match="stopped by --max-hours"):
        sft_lora.train_lora(load_config(config_file(training=LONG), {}, "lora", max_hours=hours))
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert fault(checkpoint) is None
    assert checkpoint.name != "checkpoint-5000"


@pytest.mark.parametrize(("step", "save", "stops"), [(1, 10, False), (1, 60, True), (70, 1, True)])
def test_a_deadline_leaves_time_for_a_step_and_two_saves(step, save, stops):
    deadline = Deadline(1)
    deadline.end, deadline.longest_step, deadline.longest_save = time.time() + 100, step, save
    assert deadline.is_near() is stops


def test_a_stop_signal_in_the_last_save_waits_for_it_and_the_run_is_finished(config_file, tmp_path, monkeypatch, capfd):
    """A run that was stopped there would have lost nothing but its adapter."""
    save = sft_lora.save_adapter

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        save(*args)

    monkeypatch.setattr(sft_lora, "save_adapter", interrupted)
    assert run_recipe("sft_lora", config_file(training={"max_steps": 2})) == 0
    assert "ending when the adapter is saved" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_ctrl_c_in_the_last_save_ends_at_once_and_the_record_says_failed(config_file, tmp_path, monkeypatch):
    def interrupted(*args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    monkeypatch.setattr(sft_lora, "save_adapter", interrupted)
    assert run_recipe("sft_lora", config_file(training={"max_steps": 2})) == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_under_nohup_the_end_of_a_session_is_not_heard():
    heard = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_to(lambda number, frame: heard.append(number)):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
