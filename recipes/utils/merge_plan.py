"""What a merge has to do, from headers and configs alone: which bytes are copied, which tensors the adapter changes.

No weight is read here, so that a merge which cannot be done is refused before its first byte is written.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from recipes.utils.console import UserError

import torch

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# These begin by changing the base, so base + B·A is not what was trained.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields of LoraConfig that are handled here or say nothing about the weights; with any other one set, PEFT merges.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip
PARTS = (
    r"lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?"
)


class NotStreamable(Exception):
    """Why an adapter has to be merged by PEFT, in memory."""


class Stored(NamedTuple):
    """Where a tensor lies in a safetensors file: `size` bytes from `start`."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: list[int]


class Target(NamedTuple):
    """A tensor to write: the bytes of `source`, with the adapter's `parts` for it, multiplied by `scaling`."""

    source: Stored
    parts: dict[str, Stored]
    scaling: float


class Plan(NamedTuple):
    """The files to write, each with its tensors in order; `untied`: the head is no longer the embedding."""

    files: dict[str, dict[str, Target]]
    index: dict | None
    untied: bool
    dtype: str

    @property
    def size(self) -> int:
        return sum(target.source.size for file in self.files.values() for target in file.values())


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, in the order in which they lie there.

    Raises:
        UserError: if the file is not there, or not whole: one that was cut in a copy looks whole from its header.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        missing = 8 + length + max(entry["data_offsets"][1] for entry in header.values()) - path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: is not there, though the index of its folder names it; copy it again") from None
    except ValueError:
        raise UserError(f"{path}: is no safetensors file; copy or download it again") from None
    if missing > 0:
        raise UserError(f"{path}: its last {missing:,} bytes are missing; copy or download it again")
    found = [
        (name, Stored(path, 8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0],
                      entry["dtype"], entry["shape"]))
        for name, entry in header.items()
    ]  # fmt: skip
    return dict(sorted(found, key=lambda pair: pair[1].start))


def read_weights(folder: Path) -> tuple[dict[str, dict[str, Stored]], dict | None]:
    """({file name: its tensors}, the index of a sharded model). By the index: a folder may hold other weights too."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
        return {name: read_header(folder / name) for name in names}, content
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder}: has no safetensors weights; pickled ones are not loaded, since they can run code")
    return {"model.safetensors": read_header(folder / "model.safetensors")}, None


def plan_merge(base: Path, adapter: Path, scale: float = 1.0) -> Plan:
    """What is to be written, from headers alone.

    Raises:
        NotStreamable: for an adapter or a base that only PEFT can merge.
        UserError: for a base whose weights are quantised, an adapter of another base, or a file that is not whole.
    """
    base_config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in base_config:
        raise UserError(f"{base}: its weights are quantised, and merging there would round the adapter away; the model "
                        "that it was made from is needed as base")  # fmt: skip
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config["peft_type"] != "LORA":
        raise NotStreamable(f"the adapter is {config['peft_type']}, not LoRA")
    if str(config.get("init_lora_weights")).startswith(CHANGE_THE_BASE):
        raise NotStreamable(f"{config['init_lora_weights']} changed the base when it began")
    if other := [key for key, value in config.items() if value and key not in UNDERSTOOD]:
        raise NotStreamable(f"the adapter has {other[0]} set")
    files, index = read_weights(base)
    shard_of = {name: file for file, tensors in files.items() for name in tensors}
    changes, embedding = _changes(adapter), None
    if any({"lora_embedding_A", "lora_magnitude_vector"} <= set(parts) for parts in changes.values()):
        raise NotStreamable("the adapter has DoRA on an embedding")
    tied = base_config.get("tie_word_embeddings") or "lm_head.weight" not in shard_of
    untied = bool(tied) and any(name == "lm_head.weight" or name.endswith("embed_tokens.weight") for name in changes)
    if untied:  # the head is written apart, from what the embedding was
        embedding = next((name for name in shard_of if name.endswith("embed_tokens.weight")), None)
        if embedding is None:
            raise NotStreamable("the base's embedding has no known name")
        shard = shard_of["lm_head.weight"] = shard_of[embedding]
        files[shard]["lm_head.weight"] = files[shard][embedding]
        if index:
            index["weight_map"]["lm_head.weight"] = shard
    for name, parts in changes.items():
        if name not in shard_of:
            raise NotStreamable(f"the base's file has no {name}")
        source = files[shard_of[name]][name]
        if source.dtype not in DTYPES:
            raise UserError(f"{base}: {name} is {source.dtype}; a base in 16 or 32 bit is needed")
        if "lora_A" in parts and [parts["lora_B"].shape[0], parts["lora_A"].shape[1]] != source.shape:
            raise UserError(f"{base}: {name} is {source.shape} and the adapter's part for it "
                            f"{parts['lora_B'].shape} · {parts['lora_A'].shape}: the adapter belongs to another base")  # fmt: skip
        if "full" in parts and parts["full"].shape != source.shape:
            raise UserError(f"{name}: {parts['full'].shape} in the adapter and {source.shape} in the base; a vocabulary "
                            "that was resized cannot be merged")  # fmt: skip
    plan = {
        file: {name: Target(stored, changes.get(name, {}), _scaling(config, name, changes.get(name, {}), scale))
               for name, stored in tensors.items()}
        for file, tensors in files.items()
    }  # fmt: skip
    sizes = {}
    for tensors in files.values():
        for stored in tensors.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.size
    return Plan(plan, index, untied, str(DTYPES.get(max(sizes, key=sizes.get))).removeprefix("torch."))


def _changes(adapter: Path) -> dict[str, dict[str, Stored]]:
    """Base tensor name -> what the adapter holds for it, by part: lora_A.weight, ..., or `full` for a whole tensor."""
    changes = {}
    for key, stored in read_header(adapter / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if match := re.fullmatch(rf"(.*)\.({PARTS})", name):
            module, part = match.groups()
            name = f"{module}.bias" if part == "lora_B.bias" else f"{module}.weight"
            changes.setdefault(name, {})[part.removesuffix(".weight")] = stored
        else:
            changes.setdefault(name, {})["full"] = stored
    return changes


def _scaling(config: dict, name: str, parts: dict[str, Stored], scale: float) -> float:
    """scale · alpha / r (or / √r), alpha by the first pattern that fits the module's name, as PEFT matches it."""
    module = name.rpartition(".")[0]
    patterns = [key for key in config.get("alpha_pattern") or {} if re.match(rf"(.*\.)?({key})$", module)]
    alpha = config["alpha_pattern"][patterns[0]] if patterns else config["lora_alpha"]
    down = parts.get("lora_A") or parts.get("lora_embedding_A")
    patterns = [key for key in config.get("rank_pattern") or {} if re.match(rf"(.*\.)?({key})$", module)]
    rank = down.shape[0] if down else config["rank_pattern"][patterns[0]] if patterns else config["r"]
    return scale * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
