"""The disk: what a run's checkpoints need of it, what its being full looks like, and bringing files to it."""

import errno
import math
import os
import shutil
from pathlib import Path

from recipes.utils.console import UserError
from recipes.utils.run_table import steps_of

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SMALL_FILES = 32 << 20  # tokenizer, configs, states: bytes a checkpoint, generously


def checkpoint_bytes(trainer) -> int:
    """Bytes of one checkpoint: the float32 adapter, and the optimizer's two moments of it (in 8 bit: two bytes)."""
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    moments = 2 if "8bit" in trainer.args.optim else 8
    return trainable * (4 + moments) + SMALL_FILES


def check_disk(trainer) -> str:
    """A line that says what the run's checkpoints need of the disk: as many as are kept, the best one, and the one that
    is being written. Raises `UserError` if there is less."""
    args, size = trainer.args, checkpoint_bytes(trainer)
    steps = steps_of(args, len(trainer.train_dataset))[0]
    interval = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    saves = {"no": 0, "steps": math.ceil(steps / interval), "epoch": math.ceil(args.num_train_epochs)}
    saves = saves.get(args.save_strategy.value, 1)
    kept = min(saves, args.save_total_limit + args.load_best_model_at_end) if args.save_total_limit else saves
    needed = (kept + (kept > 0)) * size
    folder = Path(args.output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free + sum(f.stat().st_size for f in folder.glob("checkpoint-*/*") if f.is_file())
    if needed > free:
        raise UserError(
            f"{folder}: {kept} checkpoints of {size / 1e9:.2f} GB and the one that is being written need "
            f"{needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free: --training.save_total_limit 2, or another disk "
            "with --training.output_dir"
        )
    return f"{kept} of {size / 1e9:.2f} GB at most; {free / 1e9:,.0f} GB free" if kept else "none"


def sync(folder: Path) -> None:
    """Bring the files of `folder`, and their names, to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def sync_path(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
