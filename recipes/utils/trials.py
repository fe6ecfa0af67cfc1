"""The trials of a sweep: a process each, watched by Optuna while it trains."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from recipes.utils.console import USER_ERROR, UserError, say

import optuna
from optuna.trial import TrialState

FIRST = 4  # trials that are run to the end, to know what is usual
LOOK_EVERY = 0.5  # seconds
STOPPED = (75, -signal.SIGTERM, -signal.SIGINT)  # what a recipe ends with when it was told to stop


def open_study(folder: Path, of: dict, pruning: bool) -> optuna.Study:
    """The study in the database of `folder`, new or taken up again; `of` says what is tried, and must be the same then.

    Raises:
        UserError: for a folder that holds another sweep, or one whose trial is still running.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'sweep.db'}",
        study_name="sweep",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FIRST) if pruning else optuna.pruners.NopPruner(),
    )
    if study.user_attrs.get("of", of) != of:
        raise UserError(f"{folder}: holds a sweep of other values; give another --folder, or the command of that one")
    study.set_user_attr("of", of)
    for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _alive(left.user_attrs.get("process")):
            raise UserError(
                f"{folder}: a trial is still running, as process {left.user_attrs['process']}; wait, or end it"
            )
        study.tell(left.number, state=TrialState.FAIL)  # its values come again, and go on from its last checkpoint
    return study


def _alive(process: int | None) -> bool:
    try:
        return process is not None and os.kill(process, 0) is None
    except OSError:
        return False


def done(study: optuna.Study) -> int:
    """Trials that came to an end: by themselves, by pruning, or by an error that another try would meet again."""
    return sum(
        trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "error" in trial.user_attrs
        for trial in study.get_trials(deepcopy=False)
    )


def run_trial(study: optuna.Study, trial: optuna.Trial, folder: Path, command: list[str]) -> None:
    """Train by `command` into `folder`, report each evaluation to Optuna while it goes on, and tell it the result.

    Raises:
        KeyboardInterrupt: if this process or the trial's was told to stop: the trial is taken up again by the next sweep.
        UserError: for settings that the recipe refuses.
    """
    trial.set_user_attr("folder", str(folder))
    words = [sys.executable, *command[1:], "--training.output_dir", str(folder)]
    if any(folder.glob("checkpoint-*/trainer_state.json")):
        words.append("--resume")
    else:
        shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
    log = folder.with_suffix(".log")
    started, losses, pruned = time.monotonic(), {}, False
    with open(log, "a") as file, _sigterm_as_ctrl_c():
        # In a session of its own it is asked to stop once, by this process, and not by the terminal as well.
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        trial.set_user_attr("process", process.pid)
        try:
            running = True
            while running and not pruned:
                time.sleep(LOOK_EVERY)
                running = process.poll() is None  # asked before the last look, so that nothing is missed
                for step, loss in _evaluations(folder / "metrics.jsonl"):
                    if step not in losses and not pruned:
                        losses[step] = loss
                        say(f"  step {step}: validation loss {loss:.4f}")
                        trial.report(loss, step)
                        pruned = trial.should_prune()
        finally:
            process.terminate()
            process.wait()
        if not pruned and process.returncode in STOPPED:
            raise KeyboardInterrupt  # it was told to stop, not this process; the trial is taken up again
    seconds = f"{time.monotonic() - started:,.0f} s"
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
        say(f"  stopped early at step {max(losses)}: validation loss {losses[max(losses)]:.4f}, {seconds}")
    elif process.returncode == 0 and losses:
        study.tell(trial, min(losses.values()))
        say(f"  best {min(losses.values()):.4f}, {seconds}")
    else:
        reason = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        trial.set_user_attr("error", reason)
        study.tell(trial, state=TrialState.FAIL)
        if process.returncode == USER_ERROR:
            raise UserError(reason.removeprefix("error: "))
        say(f"  failed with status {process.returncode}: {reason}; see {log}")


def _evaluations(path: Path) -> list[tuple[int, float]]:
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    metrics = [json.loads(line) for line in lines]
    return [(line["step"], line["eval_loss"]) for line in metrics if "eval_loss" in line]


@contextlib.contextmanager
def _sigterm_as_ctrl_c():
    """So that a trial does not outlive a sweep that is told to stop."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; to go on, give the same command again")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
