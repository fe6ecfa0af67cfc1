"""Recipes in processes of their own, with the libraries imported once."""

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from types import ModuleType

from recipes.utils.console import CommandLine, parse, run_main, training_parser

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["recipes.sft_lora", "recipes.sft_qlora"])


def command_line(recipe: ModuleType | str | None, argv) -> CommandLine:
    """The words of `argv` as `recipe` reads them: a module of recipes/, or the docstring of one that trains."""
    if isinstance(recipe, ModuleType) and hasattr(recipe, "command_line"):
        parser = recipe.command_line()
    else:
        parser = training_parser(recipe.__doc__ if isinstance(recipe, ModuleType) else recipe)
    looks_for_data = getattr(recipe, "__name__", "").rpartition(".")[2] not in ("plan_run", "sweep")
    return parse(parser, [str(word) for word in argv], looks_for_data)


def run_recipe(name: str, *argv) -> int:
    """The exit status of `python recipes/NAME.py ARGV...`, called in this process."""
    recipe = importlib.import_module(f"recipes.{name}")
    parsed = CommandLine({"traceback": "--traceback" in argv}, {}, {})  # a slip in the words is told by `run_main`, too
    return run_main(lambda _: recipe.main(command_line(recipe, argv)), parsed)


def child(recipe: str, arguments: list[str], log: str, environment: dict):
    """The recipe's command line; ends with its exit status. What it prints goes to the file `log`."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    sys.exit(run_recipe(recipe, *arguments))


def start(method, path, folder, *flags, **environment):
    """Begin a run of the config at `path` in `folder`; what it prints is in `folder`.log."""
    arguments = [str(path), "--training.output_dir", str(folder), *flags]
    process = FORKS.Process(target=child, args=(f"sft_{method}", arguments, f"{folder}.log", environment))
    process.start()
    return process


def start_several(number: int, method, path, folder, *flags) -> list:
    """Begin a run of `number` processes, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [
        start(method, path, folder, *flags, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(number)
    ]


def warm() -> None:
    """Have the imports done, which are not the run's."""
    process = FORKS.Process(target=print)
    process.start()
    process.join()


def log_of(folder: Path) -> str:
    return Path(f"{folder}.log").read_text()
