"""PiSSA and OLoRA: adapters that take a part of the base with them when they begin, given back when they are saved.

Such an adapter means something only on a base from which the same part was taken, by a decomposition that another
machine, or another seed, does not repeat. Saved as the difference to its start (PEFT's conversion, of twice the rank),
it is a plain LoRA on the base as it is published: it can be switched off, merged and served like any other.
"""

import json
import tempfile
from pathlib import Path

from recipes.utils.console import UserError, is_main_process

CHANGE_THE_BASE = ("pissa", "olora")
NEED_MORE = {
    "eva": "a pass over the data",
    "corda": "a pass over the data",
    "lora_ga": "a pass over the data",
    "loftq": "a base that it quantises itself",
}


def check_initialisation(lora: dict, method: str) -> None:
    """Raise `UserError` for an initialisation that these recipes cannot carry from training to the saved adapter."""
    start = str(lora.get("init_lora_weights", True))
    if start in NEED_MORE:
        raise UserError(
            f"lora.init_lora_weights: {start} needs {NEED_MORE[start]}, which these recipes do not make; "
            "use pissa, olora, gaussian, or leave the key out"
        )
    if not start.startswith(CHANGE_THE_BASE):
        return
    if method == "qlora":
        raise UserError(f"lora.init_lora_weights: {start} decomposes 16-bit weights and cannot start on a 4-bit base")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if lora.get(key):
            raise UserError(
                f"lora.init_lora_weights: {start} with {key} cannot be saved as a plain adapter; leave one out"
            )


def check_continued(folder: str | None) -> None:
    """Raise `UserError` where `folder` (model.adapter) is no adapter, or one that training cannot go on from."""
    if folder is None:
        return
    config = Path(folder) / "adapter_config.json"
    if not config.is_file():
        raise UserError(f"model.adapter: {folder} is no adapter folder (it has no adapter_config.json)")
    start = str(json.loads(config.read_text(encoding="utf-8")).get("init_lora_weights", True))
    if start.startswith((*CHANGE_THE_BASE, *NEED_MORE)):
        raise UserError(
            f"model.adapter: {folder} began with {start} and is no plain LoRA; convert it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )


def keep_start(model) -> tempfile.TemporaryDirectory | None:
    """Keep the untrained adapter of `model` where `save_plain` needs it, else None."""
    if not str(model.peft_config["default"].init_lora_weights).startswith(CHANGE_THE_BASE) or not is_main_process():
        return None
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    return folder


def save_plain(model, folder: Path, start: tempfile.TemporaryDirectory | None) -> None:
    """Write the adapter over the one in `folder` as a plain LoRA, if it began as something else."""
    if start is not None:
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=start.name)
