"""Checkpoints that are complete or absent: written under another name, synced, listed with checksums, then renamed.

A kill at any moment leaves either the whole checkpoint or none under its name; what a disk does to one later is found by
its manifest.json before training goes on from it.
"""

import contextlib
import hashlib
import json
import shutil
from datetime import datetime, timezone
from pathlib import Path

from recipes.utils.console import RunEnded, say
from recipes.utils.disk import sync, sync_path
from recipes.utils.jsonl import file_hash

import torch
import torch.distributed
from safetensors import SafetensorError
from transformers.trainer_utils import rotate_checkpoints

MANIFEST = "manifest.json"
JUDGES = ("training.metric_for_best_model", "training.greater_is_better", "data.validation", "validation rows")
NEEDED = {"adapter weights": "adapter_model.safetensors", "optimizer state": "optimizer*", "scheduler": "scheduler.pt",
          "random state": "rng_state*.pth", "trainer state": "trainer_state.json"}  # fmt: skip


def save_whole(trainer, made_of: dict) -> None:
    """Make `trainer` write each checkpoint under another name and rename it when it is on the disk.

    `made_of` (utils/same_run.py) goes into the manifest. trainer_state.json names no best checkpoint, which would be a
    path of this machine: `begin_from` finds it again by its step. Raises `RunEnded` where a checkpoint cannot be written;
    the one before it stays.
    """
    save, args, folder = trainer._save_checkpoint, trainer.args, Path(trainer.args.output_dir)
    staging = folder / ".saving"

    def save_checkpoint(model, trial):
        state, limit = trainer.state, args.save_total_limit
        name = f"checkpoint-{state.global_step}"
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        args.output_dir, args.save_total_limit = str(staging), None
        try:
            save(model, trial)
            trainer.accelerator.wait_for_everyone()  # each process has written its part
            state.best_model_checkpoint = None
            if args.should_save:
                state.save_to_json(str(staging / name / "trainer_state.json"))
                # a pickle, with the paths of this machine
                (staging / name / "training_args.bin").unlink(missing_ok=True)
                _write_manifest(staging / name, state.global_step, made_of)
                _publish(staging / name, folder / name)
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        # torch and safetensors have errors of their own for a full disk
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise RunEnded("failed", _not_written(folder / name, error)) from error
        finally:
            args.output_dir, args.save_total_limit = str(folder), limit
        trainer.accelerator.wait_for_everyone()
        best = folder / f"checkpoint-{state.best_global_step}"
        state.best_model_checkpoint = str(best) if best.is_dir() else None
        if args.should_save:
            rotate_checkpoints(str(folder), limit, state.best_model_checkpoint)

    trainer._save_checkpoint = save_checkpoint


def fault(checkpoint: Path) -> str | None:
    """Why training cannot go on from `checkpoint`; None if it is complete and every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if manifest.pop("sha256") != _digest(manifest):
            raise ValueError
        files = manifest["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its writing was cut off, or these recipes did not write it"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for what, pattern in NEEDED.items():
        if not any(Path(name).match(pattern) for name in files):
            return f"it holds no {what}"
    if sum(name.startswith("rng_state") for name in files) < manifest["made_of"].get("processes", 1):
        return "it holds no random state of some processes"
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
    for name, entry in files.items():
        if file_hash(checkpoint / name) != entry["sha256"]:
            return f"{name} is not what was written (its checksum differs)"
    return None


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """(the complete checkpoint in `folder` of the highest step, or None; a line for each later one that is not)."""
    for left in folder.glob(".old-checkpoint-*"):
        with contextlib.suppress(OSError):  # its successor stands, and it is left behind for `begin_from` to delete
            left.rename(left.with_name(left.name.removeprefix(".old-")))
    passed_over = []
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        why = fault(checkpoint)
        if why is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is passed over: {why}")
    return None, passed_over


def read_made_of(checkpoint: Path) -> dict:
    """What the complete `checkpoint` was made with, as `save_whole` was given it."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["made_of"]


def begin_from(trainer, checkpoint: str | None, accepted: list[str]) -> None:
    """Clear what a killed save has left in the run folder, and make `trainer` begin where `checkpoint` ended: with its
    best checkpoint so far, if that one is still whole and the `accepted` changes (utils/same_run.py) leave it comparable,
    and without another step if it was the last one."""
    folder = Path(trainer.args.output_dir)
    if trainer.args.should_save:
        shutil.rmtree(folder / ".saving", ignore_errors=True)
        for left in folder.glob(".old-*"):
            shutil.rmtree(left, ignore_errors=True)
        _set_aside(folder, _step(Path(checkpoint)) if checkpoint else -1)
    if checkpoint is None:
        return
    step = json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))["best_global_step"]
    best = Path(checkpoint).with_name(f"checkpoint-{step}")
    why = fault(best) if step and best != Path(checkpoint) else None
    if any(line.startswith(JUDGES) for line in accepted):
        why = "what is best is judged otherwise now"
    if why:
        say(f"resume: {best}, the best checkpoint so far, is not used: {why}")
    read_state, run_epoch = trainer._init_training_state, trainer._run_epoch

    def init_training_state(*args, **kwargs):
        result = read_state(*args, **kwargs)
        # how often it logs, evaluates and saves would be the checkpoint's
        trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
        if why or not trainer.args.load_best_model_at_end:
            trainer.state.best_metric = trainer.state.best_global_step = None
        elif step:
            trainer.state.best_model_checkpoint = str(best)
        return result

    def run_epoch_unless_done(**kwargs):
        if trainer.state.global_step < trainer.state.max_steps:
            run_epoch(**kwargs)
        else:  # the trainer itself would make one step more
            trainer.control.should_training_stop = True

    trainer._init_training_state, trainer._run_epoch = init_training_state, run_epoch_unless_done


def _write_manifest(checkpoint: Path, step: int, made_of: dict) -> None:
    files = {str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
             for path in sorted(checkpoint.rglob("*")) if path.is_file()}  # fmt: skip
    written = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    content = {"step": step, "written": written, "made_of": made_of, "files": files}
    content["sha256"] = _digest(content)
    (checkpoint / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _publish(staged: Path, checkpoint: Path) -> None:
    """Give the synced folder its name. One that bears the name (damaged, or of steps that are done again) goes after."""
    sync(staged)
    old = checkpoint.with_name(f".old-{checkpoint.name}")
    if checkpoint.exists():
        shutil.rmtree(old, ignore_errors=True)
        checkpoint.rename(old)
    staged.rename(checkpoint)
    sync_path(checkpoint.parent)
    shutil.rmtree(old, ignore_errors=True)


def _set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints beyond `step`, damaged or of a course that was given up: they would pass for the newest ones."""
    for later in [path for path in folder.glob("checkpoint-*") if _step(path) > step]:
        unused = later.with_name(f"unused-{later.name}")
        shutil.rmtree(unused, ignore_errors=True)
        later.rename(unused)
        say(f"resume: {later} is kept as {unused.name}")


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _not_written(checkpoint: Path, error: Exception) -> str:
    return (
        f"{checkpoint} could not be written: {str(error).splitlines()[0]}\nThe checkpoint before it is whole, and nothing "
        "half-written is left; make room on the disk, then run again with --resume"
    )
