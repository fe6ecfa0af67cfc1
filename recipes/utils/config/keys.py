"""Which keys a config may hold and which values they take: those of the library class behind each section."""

import inspect
import re
import typing
from pathlib import Path

import torch
from jsonargparse import ArgumentError, ArgumentParser
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig

from recipes.utils.console import SECTION_NAMES, UserError, near, slip_of_section
from recipes.utils.data import DataOptions
from recipes.utils.model import ModelOptions

_CLASSES: tuple[type, ...] = (ModelOptions, DataOptions, LoraConfig, SFTConfig, BitsAndBytesConfig)
SECTIONS = dict(zip(SECTION_NAMES, _CLASSES, strict=True))
CHECKER = ArgumentParser(exit_on_error=False)  # made once: reading the classes' signatures takes tenths of a second
for _section, _class in SECTIONS.items():
    CHECKER.add_class_arguments(_class, _section)

RENAMED = {
    "training.max_seq_length": "training.max_length", "training.evaluation_strategy": "training.eval_strategy",
    "training.warmup_ratio": "training.warmup_steps, which takes a share of all steps below 1", "lora.lora_r": "lora.r",
    "training.resume_from_checkpoint": "the flag --resume [CHECKPOINT]", "training.group_by_length": "training.packing",
    "training.overwrite_output_dir": "nothing: a folder that holds a run is never overwritten",
    "training.save_safetensors": "nothing: safetensors are always written", "training.no_cuda": "training.use_cpu",
    "training.epochs": "training.num_train_epochs", "training.torch_dtype": "model.dtype",
    "model.model_name_or_path": "model.name_or_path", "model.attn_impl": "model.attn_implementation",
    "model.torch_dtype": "model.dtype", "lora.alpha": "lora.lora_alpha", "lora.dropout": "lora.lora_dropout",
    "training.batch_size": "training.per_device_train_batch_size", "lora.lora_target_modules": "lora.target_modules",
}  # fmt: skip

_NO_USE = "rows reach TRL with token ids and labels (answers only), so this key would change nothing"
_OF_LABELS = ("assistant_only_loss", "completion_only_loss", "eos_token", "pad_token", "dataset_text_field",
              "dataset_kwargs", "truncation_mode", "formatting_func")  # fmt: skip
REFUSED = {
    **{f"training.{key}": _NO_USE for key in _OF_LABELS},
    "training.model_init_kwargs": "use section `model`", "training.trust_remote_code": "use model.trust_remote_code",
    "training.chat_template_path": "use model.chat_template", "lora.revision": "it follows model.revision",
    "training.bf16": "it follows model.dtype", "training.fp16": "it follows model.dtype",
    "training.do_train": "a recipe trains; recipes/evaluate_adapter.py evaluates",
    "training.do_eval": "use training.eval_strategy", "training.do_predict": "use recipes/evaluate_adapter.py",
    "training.hub_token": "it would be written into every checkpoint; use: hf auth login",
    "training.push_to_hub": "a run writes to its folder alone; afterwards: hf upload NAME RUN_FOLDER",
    "training.save_only_model": "a run could not go on from such a checkpoint",
    "training.ignore_data_skip": "a resumed run would see rows twice",
    "training.auto_find_batch_size": "it begins again in silence; an out-of-memory error says what to turn down",
    "training.eval_on_start": "recipes/evaluate_adapter.py scores the base",
    "training.restore_callback_states_from_checkpoint": "a resume has what it needs without it",
    "training.dataloader_num_workers": "rows are ready: workers gain nothing, and a stop signal would end them first",
    "training.enable_jit_checkpoint": "SIGTERM, SIGINT and SIGUSR1 end a run with a checkpoint already",
    "lora.task_type": "it is CAUSAL_LM here", "lora.inference_mode": "an adapter in training is not in inference mode",
    "lora.trainable_token_indices": "TRL's fused head cannot train single rows; use --lora.modules_to_save '[lm_head]'",
}  # fmt: skip

RANGES = {  # 1e-12 stands for above zero
    "training.per_device_train_batch_size": (1, 100_000), "training.per_device_eval_batch_size": (1, 100_000),
    "training.gradient_accumulation_steps": (1, 1_000_000), "training.max_length": (2, 10_000_000),
    "training.learning_rate": (1e-12, 1e3), "training.num_train_epochs": (1e-12, 1e6),
    "lora.r": (1, 100_000), "lora.lora_dropout": (0, 0.999), "data.max_over_length": (0, 1), "data.samples": (0, 64),
}  # fmt: skip
CHOICES = {"bnb_4bit_quant_type": ("nf4", "fp4")}  # of classes that do not tell them


def key_names(section: str) -> list[str]:
    """The keys of a section: the arguments of its class."""
    return [name for name in inspect.signature(SECTIONS[section]).parameters if name != "kwargs"]


def known_key(key: str, method: str) -> tuple[str, str]:
    """("training", "learning_rate") for a real key; raises `UserError` with the mend for any other."""
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        homes = [f"{s}.{section}" for s in SECTIONS if not name and section in key_names(s)]
        mend = homes[0] if homes else ", ".join(SECTIONS)
        raise UserError(slip_of_section(section) or f"unknown section `{section}`; did you mean `{mend}`?")
    if section == "quantization" and method == "lora":
        raise UserError("a `quantization` section is Q-LoRA's: run recipes/sft_qlora.py, or remove it")
    if key in RENAMED:
        raise UserError(f"`{key}` is not a key of these libraries any more; now: {RENAMED[key]}")
    if key in REFUSED:
        raise UserError(f"`{key}` is refused: {REFUSED[key]}")
    if not name:
        raise UserError(f"`{section}` is a section: write its keys below it, indented")
    if name not in (names := key_names(section)):
        close = near(name, names)
        meant = [f"{s}.{name}" for s in SECTIONS if name in key_names(s)] + ([f"{section}.{close}"] if close else [])
        raise UserError(f"unknown key `{key}`" + (f"; did you mean `{meant[0]}`?" if meant else ""))
    return section, name


def check_value(section: str, name: str, value):
    """`value` as the type that its library class declares. Raises `UserError` if it is none."""
    key, declared = f"{section}.{name}", inspect.signature(SECTIONS[section]).parameters[name]
    if value is None and declared.default is not None and type(None) not in typing.get_args(declared.annotation):
        raise UserError(f"{key}: needs a value; leave the key out for the default")
    if key in RANGES and isinstance(value, (int, float)) and not RANGES[key][0] <= value <= RANGES[key][1]:
        raise UserError(f"{key}: {value} is not between {RANGES[key][0]} and {RANGES[key][1]}")
    if name == "init_lora_weights" and re.fullmatch(r"pissa_niter_\d+", str(value)):
        return value  # declared as a Literal that spells out a placeholder
    if name.endswith(("_dtype", "_storage")) and not isinstance(getattr(torch, str(value), None), torch.dtype):
        raise UserError(f"{key}: {value!r} is not a torch dtype; use bfloat16")
    if name.startswith(("load_in_", "bnb_4bit_use")) and not isinstance(value, bool):
        raise UserError(f"{key}: expected true or false, got {value!r}")
    field = getattr(SECTIONS[section], "__dataclass_fields__", {}).get(name)
    choices = field.metadata.get("choices") if field else CHOICES.get(name)
    if choices and value not in choices:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")
    try:
        return getattr(CHECKER.parse_object({section: {name: value}}, defaults=False)[section], name)
    except ArgumentError as error:
        kind = declared.annotation
        expected = kind.__name__ if isinstance(kind, type) else re.sub(r"[\w.]+\.", "", str(kind))
        raise UserError(f"{key}: expected {expected}, got {value!r}") from error


def did_you_mean(value: object, names: typing.Iterable[str]) -> str:
    close = near(value, names)
    return f"; did you mean {close!r}?" if close else ""


def check_classes(arguments: dict[str, dict], given: dict[str, tuple[object, str]], path: Path) -> None:
    """Build the class of each section with its `arguments`, since some values only the classes can judge (the names of
    schedulers, optimizers, strategies); their refusal is told with the line of the key whose value it names."""
    for section, values in arguments.items():
        try:
            SECTIONS[section](**values)
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            message = str(error).splitlines()[0]
            for key, (value, where) in given.items():
                if key.startswith(f"{section}.") and message.startswith(f"{value} "):
                    meant = did_you_mean(value, re.findall(r"'([^']+)'", message))
                    said = f"{value!r} is unknown{meant}" if meant else message
                    raise UserError(f"{where}: {key}: {said}") from error
            raise UserError(f"{path}: {section}: {message}") from error
