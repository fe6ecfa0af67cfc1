"""Tune settings: train once for each of several values, and say which did best on the validation rows.

    python recipes/sweep.py configs/mistral.yaml --lora.lora_alpha 16,32,64
    python recipes/sweep.py configs/mistral.yaml --qlora --lora.r 8,16 --training.learning_rate 1e-4..4e-4 --trials 12

Lists alone are tried in every combination; with a range (low..high) Optuna's TPE chooses --trials points. Every other
flag is passed on as it is. Each trial is a run folder of its own, by a process of its own. From the fifth on, trials
that do worse than the median of those before them at the same step are stopped early (--no-pruning runs them to the
end). A sweep that was stopped goes on where it was: give the same command again.
"""

import contextlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

from recipes.utils.console import STOPPED, CommandLine, UserError, first_look, read_flags, recipe_parser, run_main, say


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("config", help="a YAML file, such as configs/mistral.yaml")
    parser.add_argument("--qlora", action="store_true", help="train with recipes/sft_qlora.py")
    parser.add_argument("--trials", type=int, help="how many; all combinations of lists, 20 where a range is searched")
    parser.add_argument("--folder", metavar="DIR", help="where the trials go; runs/CONFIG-METHOD-sweep without it")
    parser.add_argument("--no-pruning", dest="pruning", action="store_false", help="run every trial to its end")
    parser.add_argument("--seed", type=int, default=0, help="of the points that are drawn in ranges (0)")
    return parser


if __name__ == "__main__":
    given = first_look(command_line(), data_files=False)  # answered before the imports below, which take seconds

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from recipes.compare_runs import compare_runs
from recipes.utils.config import load_config
from recipes.utils.files import locked, read_jsonl

RECIPES = Path(__file__).parent
LOOK_EVERY = 0.5  # seconds
EDGE, FEW_STEPS = 0.1, 20  # the share of a range that counts as its end; steps of a trial that say little
DONE = (TrialState.COMPLETE, TrialState.PRUNED)  # what fails counts as pruned: another try would fail as well


def sweep(config, flags: dict, qlora=False, trials=None, folder=None, pruning=True, seed=0) -> dict:
    """Run the sweep and return the best trial: {"trial" (folder), "params", "validation_loss" (nats), "command"}.
    `flags` are keys of the config with their values: "16,32,64", "1e-4..4e-4", or one value that all trials share.
    Raises `UserError` for values that the config does not take, and if no trial came to an end."""
    # 1. What is tried, and whether the config takes it: each value of a list, both ends of a range.
    method = "qlora" if qlora else "lora"
    script = ["python", os.path.relpath(RECIPES / f"sft_{method}.py"), str(config)]
    space = {key: found for key, value in flags.items() if (found := distribution(key, value))}
    fixed = {key: value for key, value in flags.items() if key not in space}
    if not space:
        raise UserError("nothing to tune: give a key several values, such as --lora.lora_alpha 16,32,64")
    if "training.output_dir" in flags:
        raise UserError("--training.output_dir: each trial has its own; the sweep's folder is --folder")
    values = {key: getattr(found, "choices", None) or (found.low, found.high) for key, found in space.items()}
    first = fixed | {key: ends[0] for key, ends in values.items()}
    checked = [load_config(config, first | {key: end}, method) for key, ends in values.items() for end in ends]
    if any(one.training.get("eval_strategy", "no") == "no" for one in checked):
        raise UserError("trials are judged by their validation loss: --training.eval_strategy steps")
    if "lora.r" in space and not {"lora.lora_alpha", "lora.use_rslora"} & space.keys():
        alpha = f"lora.lora_alpha stays {checked[0].lora.get('lora_alpha', 8)} while lora.r changes"
        say(f"{alpha}, so the scale falls as the rank rises; another: --lora.lora_alpha, or several to try")
    lists = all(isinstance(found, CategoricalDistribution) for found in space.values())
    grid = [dict(zip(values, one, strict=True)) for one in itertools.product(*values.values())] if lists else []
    trials = min(trials or len(grid), len(grid)) if grid else trials or 20

    # 2. Trial by trial, in a database that a stopped sweep goes on with; what one draws depends on those before alone.
    folder = Path(folder or f"runs/{Path(config).stem}-{method}-sweep")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as afterwards:
        afterwards.enter_context(locked(folder))
        for sent in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(sent) != signal.SIG_IGN:  # as nohup has it
                afterwards.callback(signal.signal, sent, signal.signal(sent, signal.default_int_handler))
        afterwards.callback(optuna.logging.set_verbosity, optuna.logging.get_verbosity())
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4) if pruning else optuna.pruners.NopPruner()
        storage, of = f"sqlite:///{folder / 'sweep.db'}", [str(config), method, repr(space), fixed]
        study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True, pruner=pruner)
        if study.user_attrs.get("of", of) != of:
            raise UserError(f"{folder}: holds a sweep of other values; give its command again, or another --folder")
        study.set_user_attr("of", of)
        while (number := len(study.get_trials(states=DONE))) < trials:
            if grid and not study.get_trials(states=(TrialState.WAITING,)):
                study.enqueue_trial(grid[number])
            study.sampler = optuna.samplers.TPESampler(seed=seed + number)
            trial = study.ask(space)
            say(f"trial {number + 1} of {trials}: {shlex.join(words(trial.params))}")
            run_trial(study, trial, folder / f"trial-{number + 1:03}", [*script, *words(fixed | trial.params)])

    # 3. Side by side, and the command that makes the best one again.
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        raise UserError(f"no trial came to an end; see {folder}/*.log")
    compare_runs([path.parent for path in sorted(folder.glob("trial-*/run.json"))])
    best, name = study.best_trial, study.best_trial.user_attrs["folder"]
    command = shlex.join([*script, *words(fixed | best.params)])
    say(f"\nbest: {name}, validation loss {best.value:.4f}\nagain: {command}")
    for line in [*at_an_edge(space, best.params), *too_short(folder, len(study.get_trials(states=DONE)))]:
        say(f"warning: {line}")
    say(f"next:  python recipes/evaluate_adapter.py {shlex.quote(name)}")
    return {"trial": name, "params": best.params, "validation_loss": best.value, "command": command}


def distribution(key: str, text) -> BaseDistribution | None:
    """One of a list (16,32,64), or a number of a range (1e-4..4e-4): whole where both ends are, else on a logarithmic
    scale above zero, as learning rates want. None for a single value."""
    mark = next((mark for mark in (",", "..") if isinstance(text, str) and mark in text), None)
    values: list = [read_flags([f"--{key}={part.strip()}"])[key] for part in text.split(mark)] if mark else []
    if mark == ",":
        return CategoricalDistribution(list(dict.fromkeys(values)))
    if len(values) != 2 or not {type(value) for value in values} <= {int, float}:
        return None
    if values[0] >= values[1]:
        raise UserError(f"--{key} {text}: the first number must be below the second")
    if all(isinstance(value, int) for value in values):
        return IntDistribution(*values)
    return FloatDistribution(*values, log=values[0] > 0)


def at_an_edge(space: dict[str, BaseDistribution], best: dict) -> list[str]:
    """A line for each number whose best value is the least or the largest that was tried, beyond which a better one may
    lie: an end of a list of numbers, or within a tenth of a range's end, on its own scale."""
    lines = []
    for key, found in space.items():
        ends = sorted(value for value in getattr(found, "choices", ()) if type(value) in (int, float))
        value, places = best[key], {}
        if isinstance(found, (IntDistribution, FloatDistribution)):
            ends = [found.low, found.high]
            scale = math.log if found.log else float
            place = (scale(value) - scale(found.low)) / (scale(found.high) - scale(found.low))
            places = {"lower": place <= EDGE, "upper": place >= 1 - EDGE}
        elif len(ends) > 1:
            places = {"lower": value == ends[0], "upper": value == ends[-1]}
        for side in (name for name, is_there in places.items() if is_there):
            tried = f"{ends[0]:g} to {ends[-1]:g}"
            lines.append(
                f"{key} {value:.3g} is at the {side} end of what was tried ({tried}): a better one may lie beyond"
            )
    return lines


def too_short(folder: Path, trials: int) -> list[str]:
    """A line where trials are too short to tell settings apart: in so few steps a rate has hardly risen and fallen."""
    lines = [found[-1]["step"] for path in folder.glob("trial-*/metrics.jsonl") if (found := read_jsonl(path))]
    if not lines or (steps := max(lines)) >= FEW_STEPS:
        return []
    many = f"{trials} trial{'s' * (trials > 1)} of {steps} steps at most: what is best so early need not be best later"
    return [f"{many}; more rows, or --training.num_train_epochs"]


def words(settings: dict) -> list[str]:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return [word for key, text in texts.items() for word in (f"--{key}", text)]


def run_trial(study: optuna.Study, trial: optuna.Trial, folder: Path, command: list[str]) -> None:
    """Train into `folder`, from its last checkpoint where it has one, while Optuna is told each validation loss."""
    trial.set_user_attr("folder", str(folder))
    resume = ["--resume"] if any(folder.glob("checkpoint-*/trainer_state.json")) else []
    if folder.exists() and not resume:  # stopped before its first checkpoint
        with locked(folder):
            shutil.rmtree(folder)
    command, log = [sys.executable, *command[1:], "--training.output_dir", str(folder)], folder.with_suffix(".log")
    with open(log, "a") as file:  # a session of its own: the terminal does not stop it as well
        process = subprocess.Popen([*command, *resume], stdout=file, stderr=file, start_new_session=True)
    started, losses, running, pruned = time.monotonic(), {}, True, False
    try:
        while running and not pruned:
            time.sleep(LOOK_EVERY)
            running = process.poll() is None  # asked before the last look, so that nothing is missed
            for line in read_jsonl(folder / "metrics.jsonl"):
                if "eval_loss" in line and line["step"] not in losses and not pruned:
                    losses[line["step"]] = line["eval_loss"]
                    say(f"  step {line['step']}: validation loss {line['eval_loss']:.4f}")
                    trial.report(line["eval_loss"], line["step"])
                    pruned = trial.should_prune()
        if not pruned and process.returncode in (STOPPED, -signal.SIGTERM, -signal.SIGINT):
            raise KeyboardInterrupt  # it was told to stop, and not this process
    except KeyboardInterrupt:
        say("stopped; to go on, give the same command again")
        raise
    finally:
        process.terminate()
        process.wait()
    seconds, best = f"{time.monotonic() - started:,.0f} s", min(losses.values(), default=None)
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
        say(f"  stopped early at step {max(losses)}: validation loss {losses[max(losses)]:.4f}, {seconds}")
    elif process.returncode == 0 and losses:
        study.tell(trial, best)
        say(f"  best {best:.4f}, {seconds}")
    else:
        reason = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        if reason.startswith("error: "):  # as a UserError is shown; the trial is taken up again
            raise UserError(reason.removeprefix("error: "))
        study.tell(trial, state=TrialState.PRUNED)
        say(f"  failed with status {process.returncode}: {reason}; see {log}")


def main(given: CommandLine) -> None:
    sweep(flags=given.flags, **{name: value for name, value in given.options.items() if name != "traceback"})


if __name__ == "__main__":
    sys.exit(run_main(main, given))
