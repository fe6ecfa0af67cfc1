"""Tune settings: train once for each of several values, and say which did best on the validation rows.

    python recipes/sweep.py configs/mistral.yaml --lora.lora_alpha 16,32,64
    python recipes/sweep.py configs/mistral.yaml --lora.lora_alpha 16,32,64 --training.learning_rate 1e-4..4e-4 --trials 12
    python recipes/sweep.py configs/qwen2.yaml --qlora --lora.r 8,16 --training.num_train_epochs 1

Lists alone are tried in every combination; with a range (low..high) Optuna's TPE chooses --trials points. Every other
flag is passed on as it is. Each trial is a run folder of its own, by a process of its own. Trials that do worse than
the median of those before them at the same step are stopped early (--no-pruning runs them to the end). A sweep that was
stopped goes on where it was: give the same command again.
"""

import json
import os
import shlex
import sys
from pathlib import Path

from recipes.utils.command_line import ArgumentParser, first_look, parse, recipe_parser

TRIALS = 20  # where a range leaves it open how many there are


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("config", help="a YAML file, such as configs/mistral.yaml")
    parser.add_argument("--qlora", action="store_true", help="train with recipes/sft_qlora.py")
    parser.add_argument(
        "--trials", type=int, help=f"how many; all combinations of lists, {TRIALS} where a range is searched"
    )
    parser.add_argument("--folder", metavar="DIR", help="where the trials go; runs/CONFIG-METHOD-sweep without it")
    parser.add_argument("--no-pruning", dest="pruning", action="store_false", help="run every trial to its end")
    parser.add_argument("--seed", type=int, default=0, help="of the points that are drawn in ranges (0)")
    return parser


if __name__ == "__main__":  # --help and slips are answered before the imports, which take seconds
    first_look(command_line(), data=False)

from recipes.compare_runs import compare_runs
from recipes.utils.config import load_config
from recipes.utils.console import UserError, run, say
from recipes.utils.search_space import corners, grid, split_flags
from recipes.utils.trials import done, open_study, run_trial

import optuna
from optuna.trial import TrialState

RECIPES = Path(__file__).parent


def sweep(config, flags: dict, qlora=False, trials=None, folder=None, pruning=True, seed=0) -> dict:
    """Run the sweep and return the best trial: {"trial" (folder), "params", "validation_loss" (nats a token), "command"}.

    `flags` are keys of the config with their values: "16,32,64", "1e-4..4e-4", or one value that all trials share.

    Raises:
        UserError: for values that the config does not take, a config that never evaluates, a `folder` that holds another
            sweep, or if no trial came to an end.
    """
    # 1. What is tried, and whether the config takes it.
    method = "qlora" if qlora else "lora"
    space, fixed = split_flags(flags)
    if not space:
        raise UserError("nothing to tune: give a key several values, such as --lora.lora_alpha 16,32,64")
    if "training.output_dir" in flags:
        raise UserError("--training.output_dir: each trial has its own; the sweep's folder is --folder")
    checked = [load_config(config, fixed | values, method, new_run=False) for values in corners(space)]
    if any(one.training.get("eval_strategy", "no") == "no" for one in checked):
        raise UserError("trials are judged by their validation loss: --training.eval_strategy steps")
    combinations = grid(space)
    trials = trials or (len(combinations) if combinations else TRIALS)
    trials = min(trials, len(combinations)) if combinations else trials

    # 2. The study, in a database in the sweep's folder: new, or one that was stopped.
    folder = Path(folder or f"runs/{Path(config).stem}-{method}-sweep")
    study = open_study(folder, {"config": str(config), "method": method, "space": repr(space), "fixed": fixed}, pruning)

    # 3. Trial by trial. What they draw depends on the trials before alone, so a stop changes nothing.
    while (number := done(study)) < trials:
        if combinations and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.enqueue_trial(combinations[number])
        study.sampler = optuna.samplers.TPESampler(seed=seed + number)
        trial, trial_folder = study.ask(space), folder / f"trial-{number + 1:03}"
        command = _command(config, method, fixed | trial.params)
        say(f"trial {number + 1} of {trials}: {shlex.join(_words(trial.params))}")
        run_trial(study, trial, trial_folder, command)

    # 4. Side by side, and the command that makes the best one again.
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        raise UserError(f"no trial came to an end; see {folder}/*.log")
    compare_runs([path.parent for path in sorted(folder.glob("trial-*/run.json"))])
    best, command = study.best_trial, shlex.join(_command(config, method, fixed | study.best_trial.params))
    name = best.user_attrs["folder"]
    say(
        f"\nbest: {name}, validation loss {best.value:.4f}\nagain: {command}\nnext:  python recipes/evaluate_adapter.py {name}"
    )
    return {"trial": name, "params": best.params, "validation_loss": best.value, "command": command}


def _command(config, method: str, settings: dict) -> list[str]:
    script = os.path.relpath(RECIPES / f"sft_{method}.py")
    return ["python", script, str(config), *_words(settings)]


def _words(settings: dict) -> list[str]:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return [word for key, text in texts.items() for word in (f"--{key}", text)]


def main(argv: list[str]) -> None:
    options, keys = parse(command_line(), argv)
    sweep(options.pop("config"), keys, **options)


if __name__ == "__main__":
    sys.exit(run(main))
