"""run.json: what a run was made of and what came out; and how to find a run again."""

import dataclasses
import importlib.metadata
import json
import platform
from datetime import datetime, timezone
from pathlib import Path

from recipes.utils.config import Config
from recipes.utils.console import UserError, device_name, is_main_process
from recipes.utils.jsonl import data_files, file_hash

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


def begin_run(config: Config, seed: int, train: dict, validation: dict | None) -> None:
    """Write run.json with status `running`: the resolved config, hashes of the data files, versions and the counts of
    `prepare`; rows that were skipped go to bad_rows.jsonl."""
    if not is_main_process():
        return
    files = [
        path
        for part in (config.data.train, config.data.validation)
        if isinstance(part, (str, list))
        for path in data_files(part)
    ]
    record = {
        "status": "running",
        "method": config.method,
        "name": config.name,
        "started": _now(),
        "model": dataclasses.asdict(config.model),
        "data": dataclasses.asdict(config.data),
        "lora": config.lora,
        "training": {key: value for key, value in config.training.items() if not key.endswith("token")},
        "quantization": config.quantization,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES}
        | {"python": platform.python_version()},
        "device": device_name(config.training["use_cpu"]),
        "data_sha256": {str(path): file_hash(path) for path in files},
        "rows": {
            part: {key: value for key, value in counts.items() if key != "bad"} | {"bad": len(counts["bad"])}
            for part, counts in (("train", train), ("validation", validation))
            if counts
        },
        "seed": seed,
        "findings": [finding._asdict() for finding in config.findings],
    }
    _write(config.run_folder, record)
    bad = {row["where"]: row for part in (train, validation) if part for row in part["bad"]}.values()
    if bad:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in bad]
        (config.run_folder / "bad_rows.jsonl").write_text("".join(lines), encoding="utf-8")


def finish_run(config: Config, **results) -> None:
    """Set run.json's status to `finished` and add `results`."""
    if is_main_process():
        record = json.loads((config.run_folder / "run.json").read_text(encoding="utf-8"))
        _write(config.run_folder, {**record, "status": "finished", "finished": _now(), **results})


def read_run(folder: Path) -> dict:
    """The record of the run in `folder`. Raises `UserError` where there is none."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UserError(f"{folder}: is no run folder (it has no run.json)")
    if not (path.parent / "adapter_config.json").is_file():
        raise UserError(f"{folder}: holds no adapter yet (its run did not finish); go on with --resume")
    return json.loads(path.read_text(encoding="utf-8"))


def newest_run(folder: str = "runs") -> Path:
    """The run below `folder` that finished last. Raises `UserError` where none has."""
    records = [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in Path(folder).glob("*/run.json")]
    finished = [(record["finished"], path) for path, record in records if record["status"] == "finished"]
    if not finished:
        raise UserError(f"no finished run under {folder}/; name the run's folder")
    return max(finished)[1]


def _write(folder: Path, record: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".run.json.tmp"
    temporary.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(folder / "run.json")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
