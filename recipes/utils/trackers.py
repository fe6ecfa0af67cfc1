"""Trackers by the libraries' own integrations (training.report_to): named, told what the run is made of, and never in the way.

Which tracker keeps what where is the library's own setting; checkpoints go there only if its own switch is set
(WANDB_LOG_MODEL, HF_MLFLOW_LOG_ARTIFACTS).
"""

import json
import os
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from recipes.utils.console import say

from transformers.integrations import integration_utils

SECONDS = 3  # to wait for a tracker's server


def join_trackers(trainer, run_folder: Path, samples=None) -> None:
    """Name the tracked run after `run_folder`, give its trackers what run.json holds and what `samples` answers, and let
    none of them stop training: one that fails is left out from there on, with a line that says why."""
    trainer.args.run_name = trainer.args.run_name or run_folder.name
    names = {kind: name for name, kind in integration_utils.INTEGRATION_TO_CALLBACK.items()}
    for callback in trainer.callback_handler.callbacks:
        name = names.get(type(callback))
        if name:
            _join(callback, name, run_folder, samples)


def _join(callback, name: str, run_folder: Path, samples) -> None:
    """Wrap the events of one integration; only the first process talks to a tracker."""
    begin, evaluated, end = callback.on_train_begin, callback.on_evaluate, callback.on_train_end
    before, after, show = OURS.get(name, (None, None, None))
    alive, close = True, None

    def on_train_begin(args, state, control, **kwargs):
        nonlocal close
        if before and state.is_world_process_zero:
            close = before(callback, args, run_folder)
        begin(args, state, control, **kwargs)
        if after and state.is_world_process_zero:
            record = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
            after(callback, {"git_commit": git_commit(), **record})

    def on_evaluate(args, state, control, **kwargs):
        evaluated(args, state, control, **kwargs)
        if show and samples and state.is_world_process_zero:
            show(callback, samples.latest, state.global_step)

    def on_train_end(args, state, control, **kwargs):
        end(args, state, control, **kwargs)
        if close:
            close()  # the next run of this process is another one

    def guarded(event):
        def call(*args, **kwargs):
            nonlocal alive
            try:
                return event(*args, **kwargs) if alive else None
            except Exception as error:
                alive = False
                say(f"warning: {name} is left out from here on, training goes on: {_first_line(error)}")

        return call

    callback.on_train_begin, callback.on_evaluate, callback.on_train_end = on_train_begin, on_evaluate, on_train_end
    for event in dir(callback):
        if event.startswith("on_"):
            setattr(callback, event, guarded(getattr(callback, event)))


def git_commit() -> str | None:
    """The commit of the repository that the run was started in, `-dirty` with changes; None outside of one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _wandb_before(callback, args, run_folder: Path):
    """Open the run, so that wandb neither asks for a login nor waits for a server that is not there; returns what closes
    it."""
    import wandb

    if wandb.run is not None:  # the user's own
        return None
    offline = why_offline(wandb) if os.environ.get("WANDB_MODE", "online") == "online" else None
    wandb.init(
        project=os.environ.get("WANDB_PROJECT", "huggingface"),
        name=args.run_name,
        dir=os.environ.get("WANDB_DIR", str(run_folder)),
        mode="offline" if offline else None,
        settings=wandb.Settings(silent=True) if offline else None,
    )
    if offline:
        say(f"wandb: {offline} wandb sync {Path(wandb.run.dir).parent}")
    return wandb.finish


def why_offline(wandb) -> str | None:
    """Why a run cannot be online, up to the command that uploads it later; None where it can."""
    if not wandb.login(prompt=False, verify=False):
        return "there is no login on this machine, so the run is kept offline; later: wandb login, then:"
    address = urlsplit(wandb.setup().settings.base_url)
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname, port), SECONDS).close()
    except OSError:
        return f"{address.hostname} cannot be reached, so the run is kept offline; later:"
    return None


def _wandb_after(callback, record: dict) -> None:
    import wandb

    wandb.config.update({"run": record}, allow_val_change=True)


def _tensorboard_before(callback, args, run_folder: Path) -> None:
    callback.logging_dir = callback.logging_dir or str(run_folder / "tensorboard")


def _tensorboard_after(callback, record: dict) -> None:
    callback.tb_writer.add_text("run", f"```json\n{json.dumps(record, indent=2, default=str)}\n```")


def _mlflow_before(callback, args, run_folder: Path) -> None:
    # By itself it tries a server that does not answer for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(SECONDS))


def _mlflow_after(callback, record: dict) -> None:
    import mlflow

    mlflow.set_tags({"git_commit": record["git_commit"], "data_sha256": json.dumps(record["data_sha256"])[:5000]})
    mlflow.log_dict(record, "run.json")


def _trackio_after(callback, record: dict) -> None:
    import trackio

    trackio.config.update({"run": record}, allow_val_change=True)


def _wandb_samples(callback, samples: list[dict], step: int) -> None:
    import wandb

    table = wandb.Table(columns=list(samples[0]), data=[list(sample.values()) for sample in samples])
    wandb.log({"samples": table, "train/global_step": step})


def _tensorboard_samples(callback, samples: list[dict], step: int) -> None:
    for sample in samples:
        stop = "" if sample["stopped"] else "\n\n(did not stop)"
        parts = (f"    {sample[key]}".replace("\n", "\n    ") for key in ("prompt", "expected", "answer"))
        callback.tb_writer.add_text(f"samples/{sample['where']}", "\n\n---\n\n".join(parts) + stop, step)


def _mlflow_samples(callback, samples: list[dict], step: int) -> None:
    import mlflow

    mlflow.log_dict({"samples": samples}, f"samples/step-{step}.json")


def _trackio_samples(callback, samples: list[dict], step: int) -> None:
    import pandas
    import trackio

    trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(samples)), "train/global_step": step})


OURS = {  # what to do before a tracker begins, once it has begun, and with samples
    "wandb": (_wandb_before, _wandb_after, _wandb_samples),
    "tensorboard": (_tensorboard_before, _tensorboard_after, _tensorboard_samples),
    "mlflow": (_mlflow_before, _mlflow_after, _mlflow_samples),
    "trackio": (None, _trackio_after, _trackio_samples),
}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
