"""A LoRA adapter: what is trained and in which precision, saved whole, found and loaded again, at another strength."""

import dataclasses
import json
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoTokenizer, BitsAndBytesConfig

from recipes.utils.console import RunEnded, UserError, is_main_process, say
from recipes.utils.data import read_tokenizer
from recipes.utils.files import read_json, sync
from recipes.utils.model.base import ModelOptions, attention_and_reason, commit_of, find_base, load_base, name_of

CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # when they begin: not linear in their scale
NO_PLAIN_START = (*CHANGE_THE_BASE, "eva")


def check_initialisation(lora: dict) -> None:
    """Raise `UserError` for an initialisation that these recipes do not carry from training to the saved adapter."""
    start = str(lora.get("init_lora_weights", True))
    if not start.startswith(NO_PLAIN_START):
        return
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
    done = []
    if not options.adapter_input_cast:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module._cast_input_dtype = cast_outside_autocast
        done.append("adapter inputs uncast")
    if options.compile_layers:
        for layer in model.get_base_model().base_model.layers:
            layer.compile(backend=backend)  # in place: no name in a checkpoint changes
        done.append("decoder layers compiled, which the first steps pay for")
    if done:
        say(f"speed: {', '.join(done)}")


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
        config |= {"base_model_name_or_path": name_of(base), "revision": commit_of(base)}
        path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        card = path.with_name("README.md")
        card.write_text(card.read_text(encoding="utf-8").replace(str(base), name_of(base)), encoding="utf-8")


def read_run(folder: Path) -> dict:
    """The record (run.json) of the run in `folder`. Raises `UserError` where there is none, or no adapter of it."""
    if not (Path(folder) / "run.json").is_file():
        raise UserError(f"{folder}: is no run folder (it has no run.json)")
    return read_adapter(folder)


def newest_run(root: Path | str = "runs") -> Path:
    """The run below `root` that finished last. Raises `UserError` where none has."""
    records = ((read_json(path), path.parent) for path in Path(root).glob("*/run.json"))
    finished = [(record["finished"], path) for record, path in records if record["status"] == "finished"]
    if not finished:
        raise UserError(f"no finished run under {root}/; name the run's folder")
    return max(finished)[1]


def read_adapter(folder: Path) -> dict:
    """The record (run.json) of an adapter, which may be a run's checkpoint; of another tool's adapter, what its
    adapter_config.json says in the same form, without `data`. Raises `UserError` if there is none, or a broken one."""
    folder, config = Path(folder), Path(folder) / "adapter_config.json"
    of_a_run = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    record = next((read_json(place / "run.json") for place in of_a_run if (place / "run.json").is_file()), None)
    if not config.is_file() and record:
        mend = "go on with --resume, or name one of its checkpoints"
        raise UserError(f"{folder}: holds no adapter yet (its run is {record['status']}, not finished); {mend}")
    if not config.is_file():
        raise UserError(f"{folder}: is no run folder and no adapter (it has no adapter_config.json)")
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "; pickled ones are not loaded, since they can run code" if pickled else ""
        raise UserError(f"{folder}: holds no adapter weights (adapter_model.safetensors){why}")
    if record:
        if record["status"] != "finished" and (folder / "run.json").is_file():
            say(f"{folder}: its run was taken up again and is {record['status']}; the adapter there is from before")
        return record
    adapter = read_json(config)
    model = ModelOptions(adapter["base_model_name_or_path"], adapter.get("revision"))
    base = base_of({"model": dataclasses.asdict(model)})
    shape = read_json(base / "config.json")
    model = dataclasses.replace(model, dtype=shape.get("dtype") or shape.get("torch_dtype") or "float32")
    record = {"name": folder.resolve().name, "method": "lora", "commit": commit_of(base)}
    return record | {"model": dataclasses.asdict(model)}


def base_of(record: dict) -> Path:
    """The folder of the base that the adapter of `record` was trained on; from the cache, where it is there whole."""
    options = ModelOptions(**record["model"])
    try:
        # Where no commit is known (another tool's adapter), any that the cache has of the main branch.
        return find_base(options, record.get("commit") or options.revision or "main")
    except UserError as error:
        if not isinstance(error.__cause__, (LocalEntryNotFoundError, HFValidationError)):
            raise
        mend = "the folder of the adapter's base is not there; a relative path is one from where the command runs"
        raise UserError(f"{options.name_or_path}: {mend}") from error


def load_adapter(folder: Path, record: dict):
    """The adapter of `folder` on its base, in the precision of its training: after Q-LoRA, in 4 bit."""
    from peft import PeftModel

    options = ModelOptions(**record["model"])
    quantization = BitsAndBytesConfig(**record["quantization"]) if record["method"] == "qlora" else None
    attention, _ = attention_and_reason(options, not torch.cuda.is_available())
    return PeftModel.from_pretrained(load_base(base_of(record), options, attention, quantization), folder)


def load_adapter_tokenizer(folder: Path, record: dict):
    """The tokenizer and template that the adapter was trained with; for another tool's adapter, its base's."""
    if "data" in record:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return read_tokenizer(base_of(record), record["model"]["chat_template"])[0]


def check_linear(adapter: Path, scale: float) -> None:
    """Raise `UserError` if `scale` is not 1 and the adapter in the folder `adapter` is not linear in it."""
    config = read_json(Path(adapter) / "adapter_config.json")
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
