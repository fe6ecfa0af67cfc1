"""Runs of the training recipes in processes of their own, with the libraries imported once."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["recipes.sft_lora", "recipes.sft_qlora"])


def child(method: str, arguments: list[str], log: str, environment: dict):
    """The recipe's command line; ends with its exit status. What it prints goes to the file `log`."""
    from recipes import sft_lora, sft_qlora
    from recipes.utils.console import run

    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    sys.exit(run({"lora": sft_lora, "qlora": sft_qlora}[method].main, arguments))


def start(method, path, folder, *flags, **environment):
    """Begin a run of the config at `path` in `folder`; what it prints is in `folder`.log."""
    arguments = [str(path), "--training.output_dir", str(folder), *flags]
    process = FORKS.Process(target=child, args=(method, arguments, f"{folder}.log", environment))
    process.start()
    return process


def start_several(number: int, method, path, folder, *flags) -> list:
    """Begin a run of `number` processes, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
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
