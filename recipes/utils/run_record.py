"""run.json: what a run was made of, how it ended and what came out; and how to find a run again."""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
from datetime import datetime, timezone
from pathlib import Path

from recipes.utils.config import Config
from recipes.utils.console import RunEnded, UserError, is_main_process, say
from recipes.utils.disk import DISK_FULL, sync_path
from recipes.utils.failures import out_of_memory
from recipes.utils.jsonl import read_json
from recipes.utils.prepare import Prepared
from recipes.utils.report import refresh_report
from recipes.utils.run_table import device_name

import torch
from safetensors import SafetensorError

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


@contextlib.contextmanager
def recorded(config: Config, trainer, train: Prepared, validation: Prepared | None, accepted: list[str]):
    """Keep run.json true: `running` while the body runs, then how it ended: `finished`, `stopped`, `diverged` or
    `failed`. Yields a dict for the results to be written at the end.

    `accepted` are the changes that a resumed run was allowed. What the body raises goes on; running out of memory, or of
    disk, becomes a `RunEnded` that says what to do. Rows that were skipped go to bad_rows.jsonl.
    """
    counts = {part: rows.counts for part, rows in (("train", train), ("validation", validation)) if rows}
    files = train.files | (validation.files if validation else {})
    record, results = _describe(config, trainer, counts, files, accepted), {}
    _write(config.run_folder, record)
    _write_bad_rows(config.run_folder, counts)
    try:
        yield results
    except BaseException as error:
        if isinstance(error, torch.OutOfMemoryError):
            ended = RunEnded("failed", out_of_memory(config, trainer))
        elif isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno in DISK_FULL):
            ended = RunEnded(
                "failed", f"{config.run_folder}: cannot be written: {error}; make room on the disk, then --resume"
            )
        else:
            ended = error
        word = ended.word if isinstance(ended, RunEnded) else "failed"
        how = str(ended) if isinstance(ended, RunEnded) else type(error).__name__  # whose message may hold paths
        with contextlib.suppress(OSError):
            _write(config.run_folder, {**record, "status": word, "ended": _now(), "step": trainer.state.global_step,
                                       "reason": how})  # fmt: skip
        refresh_report(config.run_folder)
        if ended is error:
            raise
        raise ended from error
    _write(config.run_folder, {**record, "status": "finished", "finished": _now(), **results})


def read_run(folder: Path) -> dict:
    """The record of the run in `folder`. Raises `UserError` where there is none."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UserError(f"{folder}: is no run folder (it has no run.json)")
    record = read_json(path)
    if not (path.parent / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: holds no adapter yet (its run is {record['status']}, not finished); go on with --resume, or name "
            "one of its checkpoints"
        )
    if record["status"] != "finished":
        say(f"{folder}: its run was taken up again and is {record['status']}; the adapter there is from before")
    return record


def newest_run(folder: str = "runs") -> Path:
    """The run below `folder` that finished last. Raises `UserError` where none has."""
    records = [(path.parent, read_json(path)) for path in Path(folder).glob("*/run.json")]
    finished = [(record["finished"], path) for path, record in records if record["status"] == "finished"]
    if not finished:
        raise UserError(f"no finished run under {folder}/; name the run's folder")
    return max(finished)[1]


def _describe(config: Config, trainer, counts: dict[str, dict], files: dict[str, str], accepted: list[str]) -> dict:
    """What the run is made of; after a resume, with when it began and how often it was taken up again."""
    record = {
        "status": "running",
        "method": config.method,
        "name": config.name,
        "started": _now(),
        "model": dataclasses.asdict(config.model),
        "revision_asked": config.revision_asked,
        "data": dataclasses.asdict(config.data),
        "lora": config.lora,
        "training": {key: value for key, value in config.training.items() if not key.endswith("token")},
        "quantization": config.quantization,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
        "device": device_name(config.training["use_cpu"]),
        "processes": trainer.args.world_size,
        "data_sha256": files,
        "rows": {part: {**values, "bad": len(values["bad"])} for part, values in counts.items()},
        "seed": trainer.args.seed,
        "findings": [finding._asdict() for finding in config.findings],
    }
    before = config.run_folder / "run.json"
    if config.resume and before.is_file():
        old = read_json(before)
        again = {"from": Path(config.resume).name, "at": _now(), "accepted": accepted}
        record |= {"started": old["started"], "resumed": [*old.get("resumed", []), again]}
        if changed := [f"{name} {old['versions'].get(name)}, now {now}" for name, now in record["versions"].items()
                       if old["versions"].get(name) != now]:  # fmt: skip
            say(f"resume: other versions than the run was begun with: {'; '.join(changed)}")
    return record


def _write_bad_rows(folder: Path, counts: dict[str, dict]) -> None:
    bad = {row["where"]: row for values in counts.values() for row in values["bad"]}.values()
    if bad and is_main_process():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in bad]
        (folder / "bad_rows.jsonl").write_text("".join(lines), encoding="utf-8")


def _write(folder: Path, record: dict) -> None:
    if not is_main_process():
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".run.json.tmp"
    temporary.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    sync_path(temporary)
    temporary.replace(folder / "run.json")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
