"""Runs and adapters on the disk: found, read, and loaded again, at another strength if it must be."""

import dataclasses
import glob
import os
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, BitsAndBytesConfig

from recipes.utils.console import UserError, say, time_limit
from recipes.utils.data import DataOptions, read_tokenizer
from recipes.utils.files import read_json
from recipes.utils.model import (
    CHANGE_THE_BASE,
    ModelOptions,
    attention_and_reason,
    base_hashes,
    check_fit,
    find_base,
    fit_vocabulary,
    load_base,
    load_onto,
    loading,
    model_config,
    on_hub,
    read_adapter_config,
    stored_shapes,
)

WHERE = ("train", "validation", "test", "exclude")  # keys of `data` that are paths
SECONDS = 60  # to find an adapter's layers by a regular expression, which may never end
RECORD = {  # what a run.json has to hold, and of which types
    "name": str, "method": str, "status": str, "finished": str | None, "commit": str | None, "model": dict,
    **{f"model.{key}": str for key in ("name_or_path", "dtype", "chat_template", "attn_implementation")},
    "model.revision": str | None, "model.trust_remote_code": bool, "data": dict, "lora": dict | None,
    "training": dict | None, "quantization": dict | None, "rows": dict | None, "data_sha256": dict | None,
    "base_sha256": dict | None, "seed": int | None, "train": dict | None, "started_in": str | None,
}  # fmt: skip


def read_record(path: Path) -> dict:
    """A run.json, of the types that it was written with. Raises `UserError` where it is not."""
    record = read_json(path, RECORD)
    try:
        ModelOptions(**record["model"])
        DataOptions(**record["data"])
    except TypeError as error:
        raise UserError(f"{path}: is of another version of these recipes, or was edited: {error}") from error
    if record["method"] not in ("lora", "qlora") or (record["method"] == "qlora") != bool(record.get("quantization")):
        raise UserError(f"{path}: `method` and `quantization` do not fit each other")
    return record


def read_run(folder: Path, base_model: str | None = None) -> dict:
    """The record (run.json) of the run in `folder`. Raises `UserError` where there is none, or no adapter of it."""
    if not (Path(folder) / "run.json").is_file():
        raise UserError(f"{folder}: is no run folder (it has no run.json)")
    return read_adapter(folder, base_model)


def newest_run(root: Path | str = "runs") -> Path:
    """The run below `root` that finished last. Raises `UserError` where none has."""
    records = ((read_record(path), path.parent) for path in Path(root).glob("*/run.json"))
    finished = [(record.get("finished") or "", path) for record, path in records if record["status"] == "finished"]
    if not finished:
        raise UserError(f"no finished run under {root}/; name the run's folder")
    return max(finished)[1]


def read_adapter(folder: Path, base_model: str | None = None) -> dict:
    """The record (run.json) of an adapter, which may be a run's checkpoint; of another tool's adapter, what its
    adapter_config.json says in the same form, without `data`; with `base_model` (a folder, or a name on the hub) in the
    place of the base that they name. Raises `UserError` if there is no adapter, a broken one, or one without a base."""
    folder, config = Path(folder), Path(folder) / "adapter_config.json"
    of_a_run = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    path = next((place / "run.json" for place in of_a_run if (place / "run.json").is_file()), None)
    if not config.is_file() and path:
        status, mend = read_json(path, {"status": str})["status"], "go on with --resume, or name one of its checkpoints"
        raise UserError(f"{folder}: holds no adapter yet (its run is {status}, not finished); {mend}")
    if not config.is_file():
        raise UserError(f"{folder}: is no run folder and no adapter (it has no adapter_config.json)")
    if not (folder / "adapter_model.safetensors").is_file():
        why = "; pickled ones are not loaded, since they can run code" * (folder / "adapter_model.bin").is_file()
        raise UserError(f"{folder}: holds no adapter weights (adapter_model.safetensors){why}")
    if path:
        record = _from_here(read_record(path), path.parent)
        if record["status"] != "finished" and (folder / "run.json").is_file():
            say(f"{folder}: its run was taken up again and is {record['status']}; the adapter there is from before")
        return _on_another_base(record, base_model) if base_model else record
    adapter = read_adapter_config(folder)
    name = base_model or adapter.get("base_model_name_or_path")
    revision = None if base_model else adapter.get("revision")
    if not name:
        raise UserError(f"{config}: names no base (base_model_name_or_path); name it: --base-model PATH_OR_NAME")
    model = dataclasses.asdict(ModelOptions(name, revision))
    base = base_of({"model": model})
    shape = read_json(base / "config.json")
    model["dtype"] = shape.get("dtype") or shape.get("torch_dtype") or "float32"
    return {"name": folder.resolve().name, "method": "lora", "commit": on_hub(base)[1], "model": model}


def _from_here(record: dict, folder: Path) -> dict:
    """The `record` of the run in `folder`, with its paths as they are from where this process runs: one that leads
    nowhere here, and somewhere from where the run was started, if its folder lies to that as it did then."""
    if not record.get("started_in"):  # an older version wrote it
        return record

    def found(value):
        if isinstance(value, list):
            return [found(each) for each in value]
        if isinstance(value, dict):  # an entry of data.train
            return value | {"path": found(value.get("path"))}
        if not isinstance(value, str) or Path(value).exists() or glob.glob(value):
            return value
        there = folder.resolve() / record["started_in"] / value
        return os.path.relpath(there.resolve()) if there.exists() or glob.glob(str(there)) else value

    model = record["model"] | {key: found(record["model"].get(key)) for key in ("name_or_path", "adapter")}
    data = {key: found(value) if key in WHERE else value for key, value in record["data"].items()}
    hashes = {found(path): digest for path, digest in (record.get("data_sha256") or {}).items()}
    return {**record, "model": model, "data": data, "data_sha256": hashes}


def _on_another_base(record: dict, base_model: str) -> dict:
    """The `record` of a run with another base, which is checked by its shapes; says where its files are other ones."""
    model = record["model"] | {"name_or_path": base_model, "revision": None, "adapter": None}
    other = {**record, "commit": None, "model": model, "base_sha256": None}
    before = record.get("base_sha256") or {}
    now = base_hashes(base_of(other)) if before else {}
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        say(f"--base-model: {base_model} is not the very base of its training: {', '.join(changed)}")
    return other


def base_of(record: dict) -> Path:
    """The folder of the base that the adapter of `record` was trained on; from the cache, where it is there whole.
    Raises `UserError` for another one in its place."""
    options = ModelOptions(**record["model"])
    try:
        # Where no commit is known (another tool's adapter), any that the cache has of the main branch.
        base = find_base(options, record.get("commit") or options.revision or "main")
        check_same_base(base, record)
        return base
    except UserError as error:
        if not isinstance(error.__cause__, (LocalEntryNotFoundError, HFValidationError)):
            raise
        mend = "the folder of the adapter's base is not there; a relative path is one from where the command runs"
        raise UserError(f"{options.name_or_path}: {mend}. If it lies elsewhere: --base-model PATH_OR_NAME") from error


def load_adapters_base(folder: Path, record: dict):
    """The base of the adapter in `folder`, as the adapter's training had it: after Q-LoRA in 4 bit; with the adapter's
    vocabulary. Raises `UserError` for a base that the adapter does not fit, before its weights are read."""
    options, base = ModelOptions(**record["model"]), base_of(record)
    with time_limit(SECONDS, UserError(f"{folder}: a regular expression of its adapter_config.json does not end")):
        check_fit(Path(folder), base, options)
    quantization = BitsAndBytesConfig(**record["quantization"]) if record["method"] == "qlora" else None
    attention, _ = attention_and_reason(model_config(base, options), options, not torch.cuda.is_available())
    model = load_base(base, options, attention, quantization)
    fit_vocabulary(model, stored_shapes(Path(folder)))
    return model


def check_same_base(base: Path, record: dict) -> None:
    """Raise `UserError` if a file of `base` is another one than the run of `record` was trained on."""
    before = record.get("base_sha256") or {}
    now = base_hashes(base) if before else {}
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        why = f"{', '.join(changed)} is another file than the adapter was trained on"
        raise UserError(f"{base}: {why}; put the base of its training there")


def load_adapter(folder: Path, record: dict):
    """The adapter of `folder` on its base. Raises as `load_adapters_base` does."""
    return load_onto(load_adapters_base(folder, record), folder)


def load_adapter_tokenizer(folder: Path, record: dict):
    """The tokenizer and template that the adapter was trained with: its folder's own; another tool's adapter may lack
    one or both, and then has its base's. Says where they are not the base's."""
    if "data" in record:
        with loading(f"{folder}: its tokenizer"):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return read_tokenizer(base_of(record), record["model"]["chat_template"], adapter=folder)[0]


def check_linear(adapter: Path, scale: float) -> None:
    """Raise `UserError` if `scale` is not 1 and the adapter in the folder `adapter` is not linear in it."""
    config = read_adapter_config(Path(adapter))
    wrong = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(key)]
    wrong += ["peft_type"] * (config["peft_type"] != "LORA") + ["bias"] * (config.get("bias", "none") != "none")
    wrong += ["init_lora_weights"] * str(config.get("init_lora_weights")).startswith(CHANGE_THE_BASE)
    if scale != 1 and wrong:
        why = f"this adapter ({wrong[0]}: {config[wrong[0]]}) is not linear in its scale"
        raise UserError(f"scale {scale:g}: {why}; only 1 can be had")


def set_scale(model, scale: float) -> None:
    """Make the adapter of a PEFT `model` weigh `scale` times what it was trained with."""
    for module in model.modules():
        if hasattr(module, "set_scale"):  # a LoRA layer
            module.set_scale("default", scale)
