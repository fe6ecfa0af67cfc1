"""Which keys a config may hold and which values they take: those of the library class behind each section."""

import dataclasses
import difflib
import inspect
import re
import typing
from typing import Literal

from recipes.utils.command_line import near_section
from recipes.utils.config_file import SECTION_NAMES
from recipes.utils.console import UserError

import torch
from jsonargparse import ArgumentError, ArgumentParser
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig


def _key(default, meaning: str):
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass
class ModelOptions:
    """What to load."""

    name_or_path: str = _key("", "required: a folder, or a name on the Hugging Face hub")
    revision: str | None = _key(None, "of a name on the hub: a branch, tag or commit")
    dtype: Literal["bfloat16", "float16", "float32"] = _key("bfloat16", "of the base's weights and of the arithmetic")
    attn_implementation: str = _key("auto", "auto is the fastest here that keeps packed chats apart")
    chat_template: str = _key("auto", "auto is the model's own, with loss marks; or mistral, qwen2, a .jinja file")
    adapter: str | None = _key(None, "a LoRA folder to go on from")
    adapter_input_cast: bool = _key(False, "PEFT's cast of each adapter's input to float32: same losses, more memory")
    compile_layers: bool = _key(False, "torch.compile of each decoder layer")
    trust_remote_code: bool = _key(False, "run code that comes with the model")


@dataclasses.dataclass
class DataOptions:
    """Which rows to train on, and what to do with those that cannot be used as they are."""

    train: str | list[str] = _key("", "required: a path, a list, or a glob of JSONL files")
    validation: float | str | list[str] | None = _key(None, "the same, or a share of the train rows, such as 0.05")
    test: str | list[str] | None = _key(None, "what evaluate_adapter.py scores; the validation rows when null")
    over_length: Literal["drop", "truncate", "error"] = _key("drop", "what becomes of rows over training.max_length")
    max_over_length: float = _key(0.1, "the share of rows or tokens that may be lost to it before the run stops")
    on_bad_row: Literal["error", "skip"] = _key("error", "skip: bad rows are listed in RUN/bad_rows.jsonl")
    train_on: Literal["all", "last"] = _key("all", "answers of a chat that carry loss")
    system: Literal["keep", "merge"] = _key("keep", "merge: into the user turn that follows")
    control_tokens: Literal["refuse", "escape"] = _key("refuse", "escape: typed ones are encoded as plain text")
    ledger: bool = _key(True, "keep the loss of each training row at each epoch, in RUN/ledger.jsonl")
    samples: int = _key(3, "validation prompts that are answered at each evaluation, into RUN/samples.jsonl")


_CLASSES = (ModelOptions, DataOptions, LoraConfig, SFTConfig, BitsAndBytesConfig)
SECTIONS = dict(zip(SECTION_NAMES, _CLASSES, strict=True))

RENAMED = {
    "training.max_seq_length": "training.max_length",
    "training.evaluation_strategy": "training.eval_strategy",
    "training.warmup_ratio": "training.warmup_steps, which takes a share of all steps below 1",
    "training.group_by_length": "training.packing",
    "training.no_cuda": "training.use_cpu",
    "training.overwrite_output_dir": "nothing: a folder that holds a run is never overwritten",
    "training.save_safetensors": "nothing: safetensors are always written",
    "training.torch_dtype": "model.dtype",
    "model.torch_dtype": "model.dtype",
    "model.model_name_or_path": "model.name_or_path",
    "model.attn_impl": "model.attn_implementation",
    "lora.lora_r": "lora.r",
    "lora.alpha": "lora.lora_alpha",
    "lora.dropout": "lora.lora_dropout",
    "lora.lora_target_modules": "lora.target_modules",
    "training.batch_size": "training.per_device_train_batch_size",
    "training.epochs": "training.num_train_epochs",
    "training.resume_from_checkpoint": "the flag --resume [CHECKPOINT]",
}

_LABELS_ARE_MADE = "rows reach TRL with token ids and labels (answers only), so this key would change nothing"
REFUSED = {
    **{
        f"training.{key}": _LABELS_ARE_MADE
        for key in (
            "assistant_only_loss",
            "completion_only_loss",
            "eos_token",
            "pad_token",
            "dataset_text_field",
            "dataset_kwargs",
            "truncation_mode",
            "formatting_func",
        )
    },
    "training.chat_template_path": "use model.chat_template",
    "training.model_init_kwargs": "use the section `model`",
    "training.trust_remote_code": "use model.trust_remote_code",
    "training.bf16": "it follows model.dtype",
    "training.fp16": "it follows model.dtype",
    "training.do_train": "a recipe trains; recipes/evaluate_adapter.py evaluates",
    "training.do_eval": "use training.eval_strategy",
    "training.do_predict": "use recipes/evaluate_adapter.py",
    "training.hub_token": "it would be written into every checkpoint; use: hf auth login",
    "training.push_to_hub": "a run writes to its folder alone; afterwards: hf upload NAME RUN_FOLDER",
    "training.save_only_model": "a run could not go on from such a checkpoint",
    "training.ignore_data_skip": "a resumed run would see rows twice",
    "training.auto_find_batch_size": "it begins again in silence; an out-of-memory error says what to turn down",
    "training.eval_on_start": "recipes/evaluate_adapter.py scores the base",
    "training.restore_callback_states_from_checkpoint": "a resume has what it needs without it",
    "training.dataloader_num_workers": "rows are ready, so workers gain nothing, and a stop signal would end them first",
    "training.enable_jit_checkpoint": "SIGTERM, SIGINT and SIGUSR1 end a run with a checkpoint already",
    "lora.task_type": "it is CAUSAL_LM here",
    "lora.revision": "it follows model.revision",
    "lora.inference_mode": "an adapter that is trained is not in inference mode",
    "lora.trainable_token_indices": "TRL's fused head cannot train single rows; use --lora.modules_to_save '[lm_head]'",
}


SMALLEST = 1e-12  # above zero
RANGES = {
    "training.per_device_train_batch_size": (1, 100_000),
    "training.per_device_eval_batch_size": (1, 100_000),
    "training.gradient_accumulation_steps": (1, 1_000_000),
    "training.learning_rate": (SMALLEST, 1e3),
    "training.num_train_epochs": (SMALLEST, 1e6),
    "training.max_length": (2, 10_000_000),
    "lora.r": (1, 100_000),
    "lora.lora_dropout": (0, 0.999),
    "data.max_over_length": (0, 1),
    "data.samples": (0, 64),
}


def known_key(key: str, method: str) -> tuple[str, str]:
    """("training", "learning_rate") for a real key; raises with the mend for any other."""
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        homes = [f"{s}.{section}" for s in SECTIONS if not name and section in key_names(s)]
        mend = homes[0] if homes else ", ".join(SECTIONS)
        raise UserError(near_section(section) or f"unknown section `{section}`; did you mean `{mend}`?")
    if section == "quantization" and method == "lora":
        raise UserError("a `quantization` section is Q-LoRA's: run recipes/sft_qlora.py, or remove it")
    if key in RENAMED:
        raise UserError(f"`{key}` is not a key of these libraries any more; now: {RENAMED[key]}")
    if key in REFUSED:
        raise UserError(f"`{key}` is refused: {REFUSED[key]}")
    names = key_names(section)
    if not name:
        raise UserError(f"`{section}` is a section: write its keys below it, indented")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        elsewhere = [f"{s}.{name}" for s in SECTIONS if name in key_names(s)]
        mend = elsewhere[0] if elsewhere else (f"{section}.{near[0]}" if near else None)
        raise UserError(f"unknown key `{key}`" + (f"; did you mean `{mend}`?" if mend else ""))
    return section, name


def key_names(section: str) -> list[str]:
    """The keys of a section: the arguments of its class."""
    return [name for name in inspect.signature(SECTIONS[section]).parameters if name != "kwargs"]


def type_checker() -> ArgumentParser:
    checker = ArgumentParser(exit_on_error=False)
    for section, section_class in SECTIONS.items():
        checker.add_class_arguments(section_class, section)
    return checker


def check_value(checker: ArgumentParser, section: str, name: str, value):
    """`value` as the type that the library class declares for it."""
    key = f"{section}.{name}"
    declared = inspect.signature(SECTIONS[section]).parameters[name]
    if value is None and declared.default is not None and type(None) not in typing.get_args(declared.annotation):
        raise UserError(f"{key}: needs a value; leave the key out for the default")
    if key in RANGES and isinstance(value, (int, float)) and not RANGES[key][0] <= value <= RANGES[key][1]:
        raise UserError(f"{key}: {value} is not between {RANGES[key][0]} and {RANGES[key][1]}")
    if name == "init_lora_weights" and re.fullmatch(r"pissa_niter_\d+", str(value)):
        return value  # declared as a Literal that spells out a placeholder
    if name.endswith(("_dtype", "_storage")) and section == "quantization":
        if not isinstance(getattr(torch, str(value), None), torch.dtype):
            raise UserError(f"{key}: {value!r} is not a torch dtype; use bfloat16")
        return value
    if name == "bnb_4bit_quant_type" and value not in ("nf4", "fp4"):
        raise UserError(f"{key}: {value!r} is not nf4 or fp4")
    if name.startswith(("load_in_", "bnb_4bit_use")) and not isinstance(value, bool):
        raise UserError(f"{key}: expected true or false, got {value!r}")
    field = getattr(SECTIONS[section], "__dataclass_fields__", {}).get(name)
    choices = field.metadata.get("choices") if field else None
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise UserError(
            f"{key}: {value!r} is not one of {', '.join(choices)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        return getattr(checker.parse_object({section: {name: value}}, defaults=False)[section], name)
    except ArgumentError as error:
        declared = declared.annotation
        expected = declared.__name__ if isinstance(declared, type) else re.sub(r"[\w.]+\.", "", str(declared))
        raise UserError(f"{key}: expected {expected}, got {value!r}") from error


def class_error(error: Exception, section: str, given: dict, path) -> str:
    """The class's own message, with the line of the key whose value it names and the nearest of the values it lists."""
    message = str(error).splitlines()[0]
    for key, (value, where) in given.items():
        if key.startswith(f"{section}.") and message.startswith(f"{value} "):
            near = difflib.get_close_matches(str(value), re.findall(r"'([^']+)'", message), n=1)
            return f"{where}: {key}: {f'{value!r} is unknown; did you mean {near[0]!r}?' if near else message}"
    return f"{path}: {section}: {message}"
