"""Trackers (training.report_to) by the libraries' own integrations, which are never in the way of the run."""

import copy
import os
import socket
from functools import partial, partialmethod
from pathlib import Path
from urllib.parse import urlsplit

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from recipes.utils.console import UserError, say
from recipes.utils.files import record_of


class Trackers(TrainerCallback):
    """Hands each event on to the trackers `names` ("wandb", "tensorboard" ...). The run there is named after `folder`,
    and its settings hold what run.json does. One that fails is left out from there on, with a line that says why.
    Raises `UserError` for one that is not installed."""

    def __init__(self, names, folder: Path):
        self.folder, self.close_wandb = Path(folder), None
        try:
            self.trackers = {name: INTEGRATION_TO_CALLBACK[name]() for name in names}
        except (ImportError, RuntimeError) as error:
            raise UserError(f"training.report_to: {error}") from error

    def _event(self, event: str, args, state, control, **kwargs) -> None:
        own = copy.copy(args)
        own.run_name = args.run_name or self.folder.name
        record = record_of(self.folder) if event == "on_train_begin" else {}
        for name, tracker in list(self.trackers.items()):
            try:
                # The integrations send what args.to_dict says; a parameter of MLflow holds 250 characters.
                own.to_dict = partial(dict, args.to_dict(), run=record) if record and name != "mlflow" else args.to_dict
                if event == "on_train_begin" and name == "tensorboard":
                    tracker.logging_dir = tracker.logging_dir or str(self.folder / "tensorboard")
                if event == "on_train_begin" and name == "wandb" and state.is_world_process_zero:
                    self.close_wandb = open_wandb(own.run_name, self.folder)
                getattr(tracker, event)(own, state, control, **kwargs)
                if event == "on_train_end" and name == "wandb" and self.close_wandb:
                    self.close_wandb()  # the next run of this process is another one
            except Exception as error:
                del self.trackers[name]
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                say(f"warning: {name} is left out from here on, training goes on: {reason}")


for _name in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Trackers, _name, partialmethod(Trackers._event, _name))


def open_wandb(name: str, folder: Path):
    """Open wandb's run so that it neither asks for a login nor waits for a server; returns what closes it."""
    import wandb

    if wandb.run:  # the user's own
        return None
    why = why_offline(wandb) if os.environ.get("WANDB_MODE", "online") == "online" else None
    project, place = os.environ.get("WANDB_PROJECT", "huggingface"), os.environ.get("WANDB_DIR", str(folder))
    settings = wandb.Settings(silent=True) if why else None
    run = wandb.init(project=project, name=name, dir=place, mode="offline" if why else None, settings=settings)
    if why:
        say(f"wandb: {why} wandb sync {Path(run.dir).parent}")
    return run.finish


def why_offline(wandb) -> str | None:
    """Why a run cannot be online, up to the command that uploads it later; None where it can."""
    if not wandb.login(prompt=False, verify=False):
        return "there is no login on this machine, so the run is kept offline; later: wandb login, then:"
    address = urlsplit(wandb.setup().settings.base_url)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=3).close()
    except OSError:
        return f"{address.hostname} cannot be reached, so the run is kept offline; later:"
    return None
