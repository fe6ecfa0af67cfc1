"""A LoRA adapter: where it may begin, what is trained and in which precision, and how it is saved: whole or not."""

from pathlib import Path

import torch
from safetensors import safe_open

from recipes.utils.console import RunEnded, UserError, is_main_process, say
from recipes.utils.files import read_json, sync, write_json
from recipes.utils.model.base import ModelOptions, commit_of, name_of

CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # when they begin: not linear in their scale
NO_PLAIN_START = (*CHANGE_THE_BASE, "eva")


def check_initialisation(lora: dict) -> None:
    """Raise `UserError` for an initialisation that these recipes do not carry from training to the saved adapter."""
    start = str(lora.get("init_lora_weights", True))
    if start.startswith(NO_PLAIN_START):
        need = "a base that it quantises itself" if start == "loftq" else "a pass over the data"
        why = f"needs {need}, which these recipes do not make"
        if start.startswith(("pissa", "olora")):
            why = "changes the base, so its adapter fits no published one"
        mend = "use gaussian, or leave the key out; tuned, all variants are within 1-2 % (arXiv 2602.04998)"
        raise UserError(f"lora.init_lora_weights: {start} {why}: {mend}")


def check_adapter(folder: str | None) -> None:
    """Raise `UserError` where `folder` (model.adapter) is no adapter, or one that training cannot go on from."""
    if folder is None:
        return
    config, why = Path(folder) / "adapter_config.json", "pickled weights are not loaded, since they can run code"
    if not config.is_file():
        raise UserError(f"model.adapter: {folder} is no adapter folder (it has no adapter_config.json)")
    if not config.with_name("adapter_model.safetensors").is_file():
        raise UserError(f"model.adapter: {folder} has no adapter_model.safetensors; {why}")
    start = str(read_json(config).get("init_lora_weights", True))
    if start.startswith(NO_PLAIN_START):
        mend = "convert it with PEFT's path_initial_model_for_weight_conversion first"
        raise UserError(f"model.adapter: {folder} began with {start} and is no plain LoRA; {mend}")


def prepare_adapter(model, options: ModelOptions, backend: str = "inductor") -> None:
    """Make a model with its adapter ready to train: what is trained in float32, since in 16 bit small steps are rounded
    away, and the levers on speed of `options`, which leave the losses as they are. Call it when the trainer is built,
    which casts an adapter on a 4-bit base to bfloat16. `backend` is torch.compile's."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # here: PEFT takes seconds, and a merge needs none of it

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    base = getattr(model.get_base_model(), "name_or_path", "")
    for config in model.peft_config.values():
        # An adapter to go on from names its base as the hub does, and PEFT would ask the hub for it at each save.
        config.base_model_name_or_path, config.revision = base or None, commit_of(Path(base))
    if not options.adapter_input_cast:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module._cast_input_dtype = cast_outside_autocast
        say("speed: adapter inputs uncast")
    if options.compile_layers:
        for layer in model.get_base_model().base_model.layers:
            layer.compile(backend=backend)  # in place: no name in a checkpoint changes
        say("speed: decoder layers compiled, which the first steps pay for")


def cast_outside_autocast(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """PEFT casts each adapter's input to float32, and autocast casts it back: the same values, a copy in memory more.
    Outside of autocast (generation) the cast is needed."""
    return x if x is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def adapter_shapes(model) -> dict[str, list[int]]:
    """{name in the adapter's file: shape} of the adapter of `model`."""
    from peft import get_peft_model_state_dict

    return {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """{name: shape} of the adapter file in `folder`."""
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def save_adapter(trainer, folder: Path) -> None:
    """Write adapter, tokenizer and template into `folder`, each whole and adapter_config.json last: it stands for all.
    Raises `RunEnded` if tensors of the adapter are missing or flattened, as sharded training can leave them."""
    staging = Path(folder) / ".adapter"
    trainer.save_model(str(staging))
    if not is_main_process():
        return
    if stored_shapes(staging) != adapter_shapes(trainer.model):
        raise RunEnded("failed", f"{staging}: the adapter that was written is not whole; its checkpoints are kept")
    (staging / "training_args.bin").unlink()  # a pickle, with the paths of this machine
    publish_base(staging)
    sync(staging)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "adapter_config.json"):
        path.replace(Path(folder) / path.name)
    staging.rmdir()


def publish_base(folder: Path) -> None:
    """Make a saved adapter fit to be given away: safetensors leaves its file to its owner alone, and a base from the
    hub is named as this machine's cache keeps it; here as the hub does, with its commit."""
    path = Path(folder) / "adapter_config.json"
    path.with_name("adapter_model.safetensors").chmod(path.stat().st_mode)
    config = read_json(path)
    base = Path(config["base_model_name_or_path"] or "")
    if commit_of(base):
        write_json(path, config | {"base_model_name_or_path": name_of(base), "revision": commit_of(base)})
        card = path.with_name("README.md")
        card.write_text(card.read_text(encoding="utf-8").replace(str(base), name_of(base)), encoding="utf-8")
