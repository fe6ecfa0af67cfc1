"""One YAML file and `--section.key value` flags to the arguments of SFTConfig, LoraConfig and BitsAndBytesConfig.

Every key is honoured or refused: an unknown, misspelt, renamed, wrongly typed or twice-given key is a `UserError` that
names the line, before any data or model is read.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Literal

from recipes.utils.adapter import check_continued, check_initialisation
from recipes.utils.auto import hold_effective_batch, take_auto
from recipes.utils.command_line import parse, training_parser
from recipes.utils.config_file import read_settings
from recipes.utils.config_keys import (
    SECTIONS,
    DataOptions,
    ModelOptions,
    check_value,
    class_error,
    known_key,
    type_checker,
)
from recipes.utils.console import UserError
from recipes.utils.hub import keep_revision
from recipes.utils.key_list import print_keys
from recipes.utils.run_folder import find_run_folder

import torch


@dataclasses.dataclass
class Config:
    """A run, resolved: `training`, `lora` and `quantization` are the keyword arguments of the library classes."""

    name: str
    method: Literal["lora", "qlora"]
    model: ModelOptions
    data: DataOptions
    lora: dict
    training: dict
    quantization: dict
    auto: dict = dataclasses.field(default_factory=dict)  # what is left to memory, as `take_auto` has it
    dry_run: bool = False
    resume: str | None = None
    revision_asked: str | None = None  # model.revision as it was given, before it became a commit
    accept_changes: bool = False
    max_hours: float | None = None
    cpu_asked_for: bool = False
    findings: list = dataclasses.field(default_factory=list)  # of the guards
    new_folders: list[Path] = dataclasses.field(
        default_factory=list
    )  # the run folder and parents that are not there yet

    @property
    def run_folder(self) -> Path:
        return Path(self.training["output_dir"])


def parse_command_line(argv: list[str], method: str, description: str) -> Config:
    """`CONFIG [--section.key VALUE ...] [--dry-run] [--resume [CHECKPOINT]]` to a `Config`."""
    if argv[:2] == ["--help", "all"]:
        print_keys(method)
        sys.exit()
    options, keys = parse(training_parser(description), argv)
    flags = {name: options[name] for name in ("dry_run", "resume", "accept_changes", "max_hours")}
    return load_config(options["config"] or options["from_run"], keys, method, **flags)


def load_config(path, overrides: dict[str, object], method: str, new_run=True, **flags) -> Config:
    """Read `path` (a YAML file, or a run's run.json), lay `overrides` ({"training.learning_rate": 1e-4}) over it, check
    every key and resolve what depends on this machine. `flags` are `dry_run`, `resume`, `accept_changes` and `max_hours`.
    Without `new_run` no run folder is looked for: the config is only to be read.

    Raises:
        UserError: for anything that is not a key of the library class behind its section, or not a value of its type.
    """
    name, given = read_settings(Path(path), method)
    given, auto = take_auto(given, {key: (value, f"--{key}") for key, value in overrides.items()})

    sections = {name: {} for name in SECTIONS}
    checker, problems = type_checker(), []
    for key, (value, where) in given.items():
        try:
            section, key = known_key(key, method)
            sections[section][key] = check_value(checker, section, key, value)
        except UserError as error:
            problems.append(f"{where}: {error}")
    problems += [f"{path}: {key} is missing" for key in ("model.name_or_path", "data.train") if key not in given]
    if problems:
        raise UserError("\n".join(problems))

    config = Config(
        name=name,
        method=method,
        **flags,
        model=ModelOptions(**sections["model"]),
        data=DataOptions(**sections["data"]),
        lora={"task_type": "CAUSAL_LM", **sections["lora"]},
        training=sections["training"],
        quantization=sections["quantization"],
        auto=auto,
    )
    config.revision_asked = config.model.revision
    _make_relative(config)
    hold_effective_batch(auto, config.training)
    _resolve_training(config, path)
    if new_run:
        find_run_folder(config)
    run_folder = config.run_folder if new_run else Path()
    config.new_folders = [folder for folder in (run_folder, *run_folder.parents) if not folder.exists()]
    check_initialisation(config.lora, config.method)
    check_continued(config.model.adapter)
    keep_revision(config)
    # Some values only the classes themselves can judge (names of schedulers, optimizers, strategies): build them once
    # here, where a refusal can still be told as an error in this file.
    for section in ("training", "lora", "quantization"):
        try:
            SECTIONS[section](**getattr(config, section))
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            raise UserError(class_error(error, section, given, path)) from error
    _check_together(config, path)
    return config


def _make_relative(config: Config) -> None:
    """Write absolute paths as relative ones, to where the command runs: they end up in the run folder and in trackers, and
    where a home folder or a customer's data lies is nobody's business to whom the adapter is given."""
    for options in (vars(config.model), vars(config.data), config.training):
        for name, value in options.items():
            options[name] = [_relative(each) for each in value] if isinstance(value, list) else _relative(value)


def _relative(value):
    return os.path.relpath(value) if isinstance(value, str) and os.path.isabs(value) else value


def _resolve_training(config: Config, path) -> None:
    """Fill in what follows from the model's dtype, the machine and the data section."""
    training = config.training
    config.cpu_asked_for = bool(training.get("use_cpu"))
    training.setdefault("use_cpu", not torch.cuda.is_available())
    on_gpu = not training["use_cpu"]
    if on_gpu and config.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"{path}: model.dtype: {torch.cuda.get_device_name()} has no bfloat16; use --model.dtype float16, or "
            "float32 for Qwen2, which gives NaN in float16"
        )
    # Mixed precision follows the base model's dtype: the adapter stays in float32 and is stepped there.
    training["bf16"] = config.model.dtype == "bfloat16"
    training["fp16"] = config.model.dtype == "float16"
    training.setdefault("report_to", "none")
    training.setdefault("ddp_find_unused_parameters", False)  # a look at the whole graph a step, for nothing
    training.setdefault("logging_nan_inf_filter", False)  # the filter would log a NaN loss as 0.0 and train on


def _check_together(config: Config, path) -> None:
    """Refuse settings that are fine each and wrong together."""
    training = config.training
    if config.quantization.get("load_in_4bit") is False or config.quantization.get("load_in_8bit"):
        raise UserError(f"{path}: quantization: Q-LoRA trains on a base in 4 bit; without one, run recipes/sft_lora.py")
    if training.get("packing_strategy") == "wrapped":
        raise UserError(f"{path}: training.packing_strategy: 'wrapped' lets chats see each other; use bfd")
    if training.get("max_length", 1024) is None:
        raise UserError(f"{path}: training.max_length: a length in tokens is needed, such as 2048")
    if config.data.validation is None:
        wants = [
            key for key in ("eval_strategy", "load_best_model_at_end") if training.get(key) not in (None, False, "no")
        ]
        if wants:
            raise UserError(
                f"{path}: training.{wants[0]} needs validation rows: --data.validation 0.05, or without them "
                "--training.eval_strategy no --training.load_best_model_at_end false"
            )
