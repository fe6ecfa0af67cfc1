"""An adapter folder, of a run or of somebody else's, and the folder of its base's weights."""

import dataclasses
from pathlib import Path

from recipes.utils.config import ModelOptions
from recipes.utils.console import UserError
from recipes.utils.hub import FILES, cached_base, hub_errors
from recipes.utils.jsonl import read_json
from recipes.utils.model import load_run_base, load_tokenizer

from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoTokenizer


def read_adapter(folder: Path) -> dict:
    """The record (run.json) of the adapter in `folder`, which may be a run's checkpoint; for an adapter of another
    tool, what its adapter_config.json says in the same form, without `data`.

    Raises:
        UserError: if `folder` holds no adapter, or a broken one.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise UserError(f"{folder}: is no run folder and no adapter (it has no adapter_config.json)")
    adapter = read_json(config)
    if not (folder / "adapter_model.safetensors").is_file():
        why = (
            "; pickled ones are not loaded, since they can run code" if (folder / "adapter_model.bin").is_file() else ""
        )
        raise UserError(f"{folder}: holds no adapter weights (adapter_model.safetensors){why}")
    for place in (folder, folder.parent):
        if (place / "run.json").is_file() and (place == folder or folder.name.startswith("checkpoint-")):
            return read_json(place / "run.json")
    model = ModelOptions(adapter["base_model_name_or_path"], adapter.get("revision"))
    record = {"name": folder.resolve().name, "method": "lora", "model": dataclasses.asdict(model)}
    config = read_json(find_base(record) / "config.json")
    record["model"]["dtype"] = config.get("dtype") or config.get("torch_dtype") or "float32"
    return record


def find_base(record: dict) -> Path:
    """The folder that holds the base of `record`: a folder as it is, or a snapshot of the hub, from the cache if it is
    there whole."""
    model = record["model"]
    name, revision = model["name_or_path"], model["revision"]
    if Path(name).is_dir():
        base = Path(name)
    else:
        base = cached_base(name, revision) or _download(name, revision)
    if not (base / "config.json").is_file():
        raise UserError(f"{name}: the adapter's base is not there (no config.json)")
    return base


def load_adapter(folder: Path, record: dict):
    """The adapter of `folder` on the base that it was trained on (after Q-LoRA, in 4 bit)."""
    return PeftModel.from_pretrained(load_run_base(record), folder)


def load_adapter_tokenizer(folder: Path, record: dict):
    """The tokenizer and template that the adapter was trained with; for another tool's adapter, its base's."""
    if "data" in record:
        return AutoTokenizer.from_pretrained(folder)
    return load_tokenizer(ModelOptions(**record["model"]))[0]


def _download(name: str, revision: str | None) -> Path:
    with hub_errors(name, revision):
        try:
            snapshot_download(name, revision=revision, allow_patterns=FILES)
        except ValueError as error:  # what the client raises for a name that cannot be one
            raise UserError(
                f"{name}: the folder of the adapter's base is not there; a relative path is one from where the command runs"
            ) from error
    if base := cached_base(name, revision):  # offline, the client gives what it has
        return base
    raise UserError(
        f"{name}: its weights are not all in the cache, and the hub has no safetensors or cannot be reached"
    )
