"""Which folder a run writes into, and which checkpoint it goes on from. Nothing here asks a question."""

import contextlib
import itertools
from pathlib import Path

from recipes.utils.checkpoint import fault, newest_complete
from recipes.utils.console import UserError, say


def find_run_folder(config) -> None:
    """Set `training.output_dir` of the `Config` and the checkpoint to resume from; a folder that holds a run is never
    written over, but by `--resume` of that run. Without a complete checkpoint there, `--resume` begins the run again in its
    folder, so that a job which was killed early needs nobody.

    Raises:
        UserError: if a given folder holds a run, or a checkpoint that was named is not complete.
    """
    given = config.training.get("output_dir")
    default = f"runs/{config.name}-{config.method}"
    if given and Path(given).exists() and not Path(given).is_dir():
        raise UserError(f"training.output_dir: {given} is a file, not a folder")
    if config.resume is None:
        if given and holds_a_run(Path(given)):
            raise UserError(f"{given}: holds a run already; give another --training.output_dir, or --resume to go on")
        numbered = itertools.chain([default], (f"{default}-{number}" for number in itertools.count(2)))
        config.training["output_dir"] = given or next(name for name in numbered if not holds_a_run(Path(name)))
        return
    if config.resume != "latest":
        checkpoint = Path(config.resume)
        if given and Path(given).resolve() != checkpoint.resolve().parent:
            raise UserError(f"--resume: {checkpoint} is not in training.output_dir {given}; leave one of the two out")
        if why := fault(checkpoint) if checkpoint.is_dir() else "there is no such folder":
            raise UserError(f"--resume: {checkpoint}: {why}; --resume alone takes the newest complete checkpoint")
        config.training["output_dir"] = str(checkpoint.parent)
        return
    begun = [Path(given)] if given else [Path(default), *Path("runs").glob(f"{Path(default).name}-*")]
    folder = max(begun, key=_last_written)
    checkpoint, passed_over = newest_complete(folder)
    for line in passed_over:
        say(f"resume: {line}")
    if checkpoint is None:
        say(f"resume: there is no complete checkpoint in {folder}; the run begins at its first step")
    else:
        say(f"resume: going on from {checkpoint}")
    config.resume = None if checkpoint is None else str(checkpoint)
    config.training["output_dir"] = str(folder)


def holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("run.json", "adapter_config.json")) or any(
        folder.glob("checkpoint-*")
    )


def _last_written(folder: Path) -> float:
    """When the run in `folder` was begun, taken up or ended last."""
    record = folder / "run.json"
    return record.stat().st_mtime if record.is_file() else 0.0


def discard_empty(folders) -> None:
    """Remove folders that hold nothing, the innermost first: of a run that was not begun, nothing stays."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
