"""What is trained, and how it is saved: PiSSA and OLoRA take a part of the base with them when they begin.

Such an adapter means something only on a base from which the same part was taken, by a decomposition that another
machine, or another seed, does not repeat. Saved as the difference to its start (PEFT's conversion, of twice the rank),
it is a plain LoRA on the base as it is published: it can be switched off, merged and served like any other.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

from recipes.utils.console import RunEnded, UserError, is_main_process
from recipes.utils.disk import sync
from recipes.utils.jsonl import read_json

from peft import get_peft_model_state_dict
from safetensors import safe_open

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
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise UserError(f"model.adapter: {folder} has no adapter_model.safetensors; pickled weights are not loaded, since "
                        "they can run code")  # fmt: skip
    start = str(read_json(config).get("init_lora_weights", True))
    if start.startswith((*CHANGE_THE_BASE, *NEED_MORE)):
        raise UserError(
            f"model.adapter: {folder} began with {start} and is no plain LoRA; convert it with PEFT's "
            "path_initial_model_for_weight_conversion first"
        )


def train_in_float32(model) -> None:
    """Make all that is trained float32, whatever the base is in: in 16 bit small steps would be rounded away. PEFT leaves
    modules_to_save in the base's dtype, TRL casts an adapter on a 4-bit base to bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class Start(NamedTuple):
    """An adapter before training: the shape of each of its tensors, and its own files where `save_adapter` needs them."""

    shapes: dict[str, list[int]]
    files: tempfile.TemporaryDirectory | None


def keep_start(model, revision: str | None) -> Start:
    """What `save_adapter` has to know of the untrained adapter of `model`, which is one of the base at `revision`."""
    model.peft_config["default"].revision = revision
    files = None
    if str(model.peft_config["default"].init_lora_weights).startswith(CHANGE_THE_BASE) and is_main_process():
        files = tempfile.TemporaryDirectory()
        model.save_pretrained(files.name)
    return Start(adapter_shapes(model), files)


def adapter_shapes(model) -> dict[str, list[int]]:
    """{name in the adapter's file: shape} of the adapter of `model`."""
    return {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """{name: shape} of the adapter file in `folder`."""
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def save_adapter(trainer, start: Start) -> None:
    """Write adapter, tokenizer and template into the run folder, each file whole and adapter_config.json last: where it
    stands, an adapter stands. One that began by changing the base is written as a plain LoRA.

    Raises `RunEnded` if the file is not the whole adapter (sharded training can leave empty or flattened tensors).
    """
    folder = Path(trainer.args.output_dir)
    staging = folder / ".adapter"
    trainer.save_model(str(staging))
    if not is_main_process():
        return
    if start.files:
        trainer.model.save_pretrained(staging, path_initial_model_for_weight_conversion=start.files.name)
    elif stored_shapes(staging) != start.shapes:
        raise RunEnded("failed", f"{staging}: the adapter that was written is not whole; its checkpoints are kept")
    (staging / "training_args.bin").unlink()  # a pickle, with the paths of this machine
    sync(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "adapter_config.json"):
        path.replace(folder / path.name)
    staging.rmdir()
