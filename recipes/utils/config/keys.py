"""Which keys a config may hold and which values they take: those of the library class behind each section."""

import copy
import inspect
import re
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentError, ArgumentParser
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, Trainer, get_scheduler
from trl import SFTConfig

import recipes.utils.names as names
from recipes.utils.console import UserError
from recipes.utils.data import DataOptions
from recipes.utils.model import ModelOptions


@dataclass(frozen=True)
class RunOptions:
    """What is of the run as a whole, and of no library's class."""

    early_stopping_patience: int | None = None  # evaluations in a row without a better validation loss until it ends


_CLASSES: tuple[type, ...] = (ModelOptions, DataOptions, LoraConfig, SFTConfig, BitsAndBytesConfig, RunOptions)
SECTIONS = dict(zip(names.SECTION_NAMES, _CLASSES, strict=True))
CHECKER = ArgumentParser(exit_on_error=False)  # made once: reading the classes' signatures takes tenths of a second
for _section, _class in SECTIONS.items():
    CHECKER.add_class_arguments(_class, _section)

CHOICES = {"bnb_4bit_quant_type": ("nf4", "fp4"), "metric_for_best_model": ("loss", "eval_loss")}  # not told by classes


def key_names(section: str) -> list[str]:
    """The keys of a section: the arguments of its class."""
    return [name for name in inspect.signature(SECTIONS[section]).parameters if name != "kwargs"]


def known_key(key: str, method: str) -> tuple[str, str]:
    """("training", "learning_rate") for a real key; raises `UserError` with the mend for any other."""
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        homes = [f"{s}.{section}" for s in SECTIONS if not name and section in key_names(s)]
        mend = homes[0] if homes else ", ".join(SECTIONS)
        mend = names.NAMES_ELSEWHERE.get(section, mend) if not name else mend
        raise UserError(names.slip_of_section(section) or f"unknown section `{section}`; did you mean `{mend}`?")
    if section == "quantization" and method == "lora":
        raise UserError("a `quantization` section is Q-LoRA's: run recipes/sft_qlora.py, or remove it")
    if message := names.slip_of_key(key):
        raise UserError(message)
    if not name:
        raise UserError(f"`{section}` is a section: write its keys below it, indented")
    if name not in key_names(section):
        free = {s: [each for each in key_names(s) if f"{s}.{each}" not in names.REFUSED] for s in SECTIONS}
        close = names.near(name, free[section])
        meant = [f"{s}.{name}" for s in free if name in free[s]] + ([f"{section}.{close}"] if close else [])
        raise UserError(f"unknown key `{key}`" + (f"; did you mean `{meant[0]}`?" if meant else ""))
    return section, name


def check_value(section: str, name: str, value):
    """`value` as the type that its library class declares. Raises `UserError` if it is none."""
    key, declared = f"{section}.{name}", inspect.signature(SECTIONS[section]).parameters[name]
    if value is None and declared.default is not None and type(None) not in typing.get_args(declared.annotation):
        raise UserError(f"{key}: needs a value; leave the key out for the default")
    if isinstance(value, (int, float)) and (message := names.slip_of_number(key, value)):
        raise UserError(message)
    if name in ("rank_pattern", "alpha_pattern") and any(not number > 0 for number in (value or {}).values()):
        raise UserError(f"{key}: {value}: each number is above zero; lora.exclude_modules leaves a module out")
    if name == "init_lora_weights" and re.fullmatch(r"pissa_niter_\d+", str(value)):
        return value  # declared as a Literal that spells out a placeholder
    if name.endswith(("_dtype", "_storage")) and not isinstance(getattr(torch, str(value), None), torch.dtype):
        raise UserError(f"{key}: {value!r} is not a torch dtype; use bfloat16")
    if name.startswith(("load_in_", "bnb_4bit_use")) and not isinstance(value, bool):
        raise UserError(f"{key}: expected true or false, got {value!r}")
    field = getattr(SECTIONS[section], "__dataclass_fields__", {}).get(name)
    choices = CHOICES.get(name) or (field.metadata.get("choices") if field else None)
    if choices and value is not None and value not in choices:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")
    try:
        return getattr(CHECKER.parse_object({section: {name: value}}, defaults=False)[section], name)
    except ArgumentError as error:
        kind = declared.annotation
        expected = kind.__name__ if isinstance(kind, type) else re.sub(r"[\w.]+\.", "", str(kind))
        raise UserError(f"{key}: expected {expected}, got {value!r}") from error


def did_you_mean(value: object, known: typing.Iterable[str]) -> str:
    close = names.near(value, known)
    return f"; did you mean {close!r}?" if close else ""


def check_classes(arguments: dict[str, dict], given: dict[str, tuple[object, str]], path: Path) -> None:
    """Build the class of each section with its `arguments`, since some values only the classes can judge (the names of
    schedulers, optimizers, strategies); their refusal is told with the line of the key whose value it names."""
    for section, values in arguments.items():
        try:
            made = SECTIONS[section](**values)
        except (ValueError, TypeError, AttributeError, ImportError) as error:
            message = str(error).splitlines()[0]
            for key, (value, where) in given.items():
                if key.startswith(f"{section}.") and message.startswith(f"{value} "):
                    meant = did_you_mean(value, re.findall(r"'([^']+)'", message))
                    said = f"{key}: {value!r} is unknown{meant}" if meant else f"{key}: {message}"
                    raise UserError(names.placed(where, key, said)) from error
            raise UserError(f"{path}: {section}: {message}") from error
        if isinstance(made, SFTConfig):
            _check_steps(made, given, path)


def _check_steps(args: SFTConfig, given: dict[str, tuple[object, str]], path: Path) -> None:
    """Build the optimizer and its schedule as the trainer will, for one small layer: a package that is not installed,
    an argument that is missing or wrong, would else be told when the base's weights are read."""
    layer, args, key, value = torch.nn.Sequential(torch.nn.Linear(32, 32)), copy.copy(args), "optim", args.optim
    args.optim_target_modules = "all-linear" if args.optim_target_modules else None  # the adapter's are not there yet
    total = args.max_steps if args.max_steps > 0 else 100_000
    try:
        kind, how = Trainer.get_optimizer_cls_and_kwargs(args, layer)
        parameters = how.pop("params", None) or how.pop("optimizer_dict", None) or how.pop("model", layer.parameters())
        optimizer = kind(parameters, **how)
        if args.use_cpu:  # those of a GPU can be built without one
            layer(torch.ones(1, 32)).sum().backward()
            optimizer.step()
        key, value = "gradient_checkpointing_kwargs", args.gradient_checkpointing_kwargs
        if args.gradient_checkpointing:
            checkpoint(layer, torch.ones(1, 32), **{"use_reentrant": False, **(value or {})})
        key, value, warmup = "lr_scheduler_type", args.lr_scheduler_type, args.get_warmup_steps(total)
        schedule = get_scheduler(value, optimizer, warmup, total, args.lr_scheduler_kwargs)
        for rate in getattr(schedule, "lr_lambdas", ()):
            _ = [rate(step) for step in (0, 1, warmup, total // 2, total - 1, total)]
    except Exception as error:  # whatever the libraries raise, it is about the settings
        message, key = (str(error).splitlines() or [type(error).__name__])[0], f"training.{key}"
        where = given.get(key, (None, str(path)))[1]
        raise UserError(names.placed(where, key, f"{key}: {getattr(value, 'value', value)}: {message}")) from error
