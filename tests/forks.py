"""Recipes in processes of their own, with the libraries imported once."""

import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType

from recipes.utils.console import CommandLine, parse, run_main, training_parser

FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["recipes.sft_lora", "recipes.sft_qlora", "quick_runs"]
SERVER = forkserver._forkserver
SERVER.set_forkserver_preload(IMPORTED)


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


def begin(server: forkserver.ForkServer, **environment) -> forkserver.ForkServer:
    """Have the libraries imported in `environment`; a server that is there already is left as it is."""
    before = dict(os.environ)
    tests = Path(__file__).parent
    path = [str(tests.parent), str(tests), before.get("PYTHONPATH", "")]  # from whatever folder the test runs in
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(path))
    try:
        server.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return server


def server_in(**environment) -> forkserver.ForkServer:
    """A second server, whose libraries read another environment as they were imported."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([*IMPORTED, "recipes.merge_adapter"])
    return begin(server, **environment)


def fork(target, *arguments, server: forkserver.ForkServer = SERVER):
    """`target(*arguments)` in a new process of the server's."""
    begin(server)
    process = FORKS.Process(target=target, args=arguments)
    forkserver.connect_to_new_process = server.connect_to_new_process
    try:
        process.start()
    finally:
        forkserver.connect_to_new_process = SERVER.connect_to_new_process
    return process


def as_main(script: str, words: list[str], folder: str, environment: dict, streams: list[str]) -> None:
    """What `python SCRIPT WORDS...` does once it has imported the libraries."""
    import torch
    from huggingface_hub import constants

    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    constants.HF_HUB_OFFLINE = environment["HF_HUB_OFFLINE"] == "1"
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def start_script(*words, folder, streams=("/dev/null",) * 3, server=SERVER, environment=None):
    """Begin `python WORDS...` in `folder`; `streams` are the files of its input, output and errors."""
    script, *words = map(str, words)
    environment = {**os.environ, **(environment or {})}
    return fork(as_main, script, words, str(folder), environment, [*map(str, streams)], server=server)


def fork_script(*words, **options) -> subprocess.CompletedProcess:
    """`start_script` to its end, with its output captured."""
    with tempfile.TemporaryDirectory() as logs:
        printed = [Path(logs, name) for name in ("out", "err")]
        process = start_script(*words, streams=["/dev/null", *printed], **options)
        process.join(300)
        process.kill()
        process.join()
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in printed))


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
    return fork(child, f"sft_{method}", arguments, f"{folder}.log", environment)


def ranks(number: int) -> list[dict]:
    """The environment of each of `number` processes, as torchrun would set it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def start_several(number: int, method, path, folder, *flags) -> list:
    """Begin a run of `number` processes."""
    return [start(method, path, folder, *flags, **environment) for environment in ranks(number)]


def warm() -> None:
    """Have the imports done, which are not the run's."""
    fork(print).join()


def log_of(folder: Path) -> str:
    return Path(f"{folder}.log").read_text()
