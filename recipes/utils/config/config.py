"""One YAML file and `--section.key value` flags to the arguments of SFTConfig, LoraConfig and BitsAndBytesConfig.

Every key is honoured or refused, by a `UserError` that names the line, before any data or model is read.
"""

import os
import re
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from recipes.utils.config.keys import SECTIONS, RunOptions, check_classes, check_value, did_you_mean, known_key
from recipes.utils.console import CommandLine, UserError, read_yaml
from recipes.utils.data import DataOptions
from recipes.utils.files import file_hash, read_json
from recipes.utils.model import ModelOptions, check_start
from recipes.utils.names import placed

FLAGS = ("dry_run", "resume", "accept_changes", "max_hours")
# In run.json and not in a config: what follows from model.dtype, and where the run went.
RESOLVED = ("training.output_dir", "training.bf16", "training.fp16", "lora.task_type")


@dataclass(frozen=True)
class Config:
    """What a run is to be; `lora`, `training` and `quantization` are the keyword arguments of the libraries' classes.
    What is decided later (folder, checkpoint, commit of the base) is in the `Run`."""

    name: str
    method: str  # lora or qlora
    model: ModelOptions
    data: DataOptions
    lora: Mapping
    training: Mapping  # all of SFTConfig's but output_dir
    quantization: Mapping
    run: RunOptions
    output_dir: str | None = None  # training.output_dir as it was given
    trackers: tuple[str, ...] = ()  # training.report_to, which is none for the trainer itself
    dry_run: bool = False
    resume: str | None = None  # a checkpoint, or latest
    accept_changes: bool = False
    max_hours: float | None = None
    use_cpu_asked: bool = False

    def sections(self) -> dict[str, dict]:
        """The sections in full, as plain dicts: what run.json keeps, and what `load_config` reads there."""
        return {
            "model": asdict(self.model), "data": asdict(self.data), "lora": dict(self.lora),
            "training": {**self.training, "report_to": list(self.trackers) or "none"},
            "quantization": dict(self.quantization), "run": asdict(self.run),
        }  # fmt: skip


def read_config(given: CommandLine, method: str) -> Config:
    """The config of a recipe's command line: its YAML with its flags laid over it, or a run's record (--from-run)."""
    flags = {name: given.options[name] for name in FLAGS if name in given.options}
    path = given.options.get("from_run") or given.options["config"]
    return load_config(path, given.flags, method, given.yaml, **flags)


def _read_record(path: Path, method: str) -> tuple[str, dict[str, tuple[object, str]]]:
    """(the config's name, {section.key: (value, path)}) of a run.json. Raises `UserError` for one that cannot be read,
    one of the other `method`, and data files that are not there as the run had them."""
    try:
        record = read_json(path)
        name, recorded, hashes = record["name"], record["method"], record["data_sha256"]
        sections = {section: record.get(section, {}) if section == "run" else record[section] for section in SECTIONS}
    except (UserError, KeyError) as error:
        raise UserError(f"{path}: is no record of a run (run.json): {error}") from error
    if recorded != method:
        raise UserError(f"{path}: is of a {recorded} run: recipes/sft_{recorded}.py")
    for file, digest in hashes.items():
        if not Path(file).is_file() or file_hash(Path(file)) != digest:
            raise UserError(f"{path}: {file} is not there as the run had it; paths are relative to where this runs")
    sections["model"].setdefault("fast_lora", False)  # of a run from before it was a setting
    if record.get("commit"):
        sections["model"]["revision"] = record["commit"]
    given = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return name, {key: (value, str(path)) for key, value in given.items() if value is not None and key not in RESOLVED}


def load_config(path: str | Path, overrides: Mapping[str, object], method: str, given=None, **flags) -> Config:
    """`path` (a YAML file, a run's folder or its run.json), with `overrides` laid over it ({"training.max_steps": 10})
    and what follows from them and this machine. `given` is the YAML where it was read already, `flags` are those of
    `FLAGS`. Raises `UserError` for what is no key of the library class behind its section, or no value of its type."""
    path = Path(path)
    path = path / "run.json" if path.is_dir() else path
    if path.suffix == ".json":
        name, given = _read_record(path, method)
        if flags.get("resume") == "latest":
            overrides = {"training.output_dir": str(path.parent), **overrides}
    else:
        name, given = path.stem, given or {key: (value, f"{path}:{line}") for key, value, line in read_yaml(path)}
    given = given | {key: (value, f"--{key}") for key, value in overrides.items()}
    sections: dict[str, dict] = {section: {} for section in SECTIONS}
    problems = []
    for full, (value, where) in given.items():
        try:
            section, key = known_key(full, method)
            sections[section][key] = check_value(section, key, _relative(value))
        except UserError as error:
            problems.append(placed(where, full, str(error)))
    problems += [f"{path}: {key} is missing" for key in ("model.name_or_path", "data.train") if key not in given]
    if problems:
        raise UserError("\n".join(problems))
    model, data, training = ModelOptions(**sections["model"]), DataOptions(**sections["data"]), sections["training"]
    lora, quantization = {"task_type": "CAUSAL_LM", **sections["lora"]}, sections["quantization"]
    run = RunOptions(**sections["run"])
    output_dir, use_cpu_asked = training.pop("output_dir", None), bool(training.get("use_cpu"))
    trackers = _trackers(training.get("report_to"), path)
    training = {
        "use_cpu": not torch.cuda.is_available(),
        "ddp_timeout": 600,  # seconds until the others give up on a process that has died
        "ddp_find_unused_parameters": False,  # a look at the whole graph a step, for nothing
        "logging_nan_inf_filter": False,  # the filter would log a NaN loss as 0.0 and train on
        **training,
    }
    # Mixed precision follows the base's dtype: the adapter stays in float32 and is stepped there.
    training |= {"bf16": model.dtype == "bfloat16", "fp16": model.dtype == "float16", "report_to": "none"}
    if torch.cuda.is_available() and not training["use_cpu"]:
        _check_gpus()  # here already: SFTConfig connects the processes, each to its GPU
    if training["bf16"] and not training["use_cpu"] and not torch.cuda.is_bf16_supported(including_emulation=False):
        mend = "use --model.dtype float16, or float32 for Qwen2, which gives NaN in float16"
        raise UserError(f"{path}: model.dtype: {torch.cuda.get_device_name()} has no bfloat16; {mend}")
    check_start(lora, model.adapter)
    check_classes({"training": training, "lora": lora, "quantization": quantization}, given, path)
    _check_together(data, training, quantization, run, path)
    return Config(
        name=name, method=method, model=model, data=data, lora=MappingProxyType(lora),
        training=MappingProxyType(training), quantization=MappingProxyType(quantization), output_dir=output_dir,
        run=run, trackers=trackers, use_cpu_asked=use_cpu_asked, **flags,
    )  # fmt: skip


def _relative(value):
    """An absolute path as one relative to where the command runs: paths end up in the run folder and in trackers, and
    where a home folder or a customer's data lies is nobody's business to whom the adapter is given. What Python gives
    as a `Path` or a tuple is what a YAML would hold."""
    if isinstance(value, (list, tuple)):
        return [_relative(each) for each in value]
    if isinstance(value, dict) and isinstance(value.get("path"), (str, Path)):  # an entry of data.train
        return value | {"path": _relative(value["path"])}
    value = str(value) if isinstance(value, Path) else value
    return os.path.relpath(value) if isinstance(value, str) and os.path.isabs(value) else value


def _trackers(names: str | list[str] | None, path: Path) -> tuple[str, ...]:
    """The trackers that `training.report_to` names. Raises `UserError` for one that transformers has none of."""
    names = [names] if isinstance(names, str) else names or []
    if "all" in names:
        names = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK and name != "none":
            mend = did_you_mean(name, INTEGRATION_TO_CALLBACK) or f"; there are {', '.join(INTEGRATION_TO_CALLBACK)}"
            raise UserError(f"{path}: training.report_to: {name!r} is unknown{mend}")
    return tuple(name for name in names if name != "none")


def _check_together(data: DataOptions, training: dict, quantization: dict, run: RunOptions, path: Path) -> None:
    """Refuse settings that are fine each and wrong together."""
    if quantization.get("load_in_4bit") is False or quantization.get("load_in_8bit"):
        raise UserError(f"{path}: quantization: Q-LoRA trains on a base in 4 bit; without one, run recipes/sft_lora.py")
    if training.get("packing_strategy") == "wrapped":
        raise UserError(f"{path}: training.packing_strategy: 'wrapped' lets chats see each other; use bfd")
    if training.get("train_sampling_strategy") == "group_by_length":
        why = "group_by_length draws another order at a resume: rows would be trained on twice, or never"
        raise UserError(f"{path}: training.train_sampling_strategy: {why}; use training.packing")
    if training.get("max_length", 1024) is None:
        raise UserError(f"{path}: training.max_length: a length in tokens is needed, such as 2048")
    for key in ("eval_strategy", "load_best_model_at_end") if data.validation is None else ():
        if training.get(key) not in (None, False, "no"):
            mend = "or without them --training.eval_strategy no --training.load_best_model_at_end false"
            raise UserError(f"{path}: training.{key} needs validation rows: --data.validation 0.05, {mend}")
    if training.get("greater_is_better"):
        raise UserError(f"{path}: training.greater_is_better: losses are compared, of which the smaller is better")
    if run.early_stopping_patience and not training.get("load_best_model_at_end"):
        mend = "--training.eval_strategy epoch --training.save_strategy epoch --training.load_best_model_at_end true"
        raise UserError(f"{path}: run.early_stopping_patience needs evaluations and the best checkpoint: {mend}")


def _check_gpus() -> None:
    """Raise `UserError` for more processes than GPUs, and for a GPU that this torch has no kernels for."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        flags = f"--num_processes {gpus}; torchrun: --nproc-per-node {gpus}"
        raise UserError(f"{processes} processes and {gpus} GPU{'s' * (gpus > 1)}: {flags}")
    capability, built = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not has_kernels(capability, built):
        number, name = "{}.{}".format(*capability), torch.cuda.get_device_name()
        why = f"{name} has compute capability {number}, and this torch has kernels for {', '.join(built)}"
        raise UserError(f"{why}: install the same torch as built for another CUDA (12.6 for older GPUs)")


def has_kernels(capability: tuple[int, int], built: list[str]) -> bool:
    """True if a GPU of that compute capability runs what torch was `built` for (torch.cuda.get_arch_list()): kernels
    (sm_86) of its own major version that are no newer, or code (compute_90) that is no newer, for the driver."""
    parts = re.findall(r"(\w+)_(\d+)(\d)", " ".join(built))
    made = [(kind, (int(major), int(minor))) for kind, major, minor in parts]  # none on ROCm
    return not made or any(own <= capability and (kind == "compute" or own[0] == capability[0]) for kind, own in made)


def c_compiler() -> str | None:
    """The C compiler that Triton would take, which compiles its launchers with it and with Python.h; None where one of
    the two is not there."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang")), None)
    header = Path(sysconfig.get_paths()["include"], "Python.h").is_file()
    return shutil.which(compiler) if compiler and header else None


def check_machine(config: Config) -> None:
    """Raise `UserError`, before data or a base is looked for, where this machine cannot do the run."""
    use_cpu, dtype, recipe = config.training["use_cpu"], config.model.dtype, f"recipes/sft_{config.method}.py"
    gpus, sharded = 0 if use_cpu else torch.cuda.device_count(), os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and use_cpu:
        raise UserError("FSDP was asked for, and without GPUs it would be plain data parallelism: use ddp.yaml")
    if sharded and config.method == "qlora" and config.quantization.get("bnb_4bit_quant_storage") != dtype:
        raise UserError(f"FSDP spreads no bytes, as 4-bit weights are: --quantization.bnb_4bit_quant_storage {dtype}")
    if gpus > 1 and "WORLD_SIZE" not in os.environ:
        launch, one = f"accelerate launch --num_processes {gpus} {recipe}", f"CUDA_VISIBLE_DEVICES=0 python {recipe}"
        raise UserError(f"{gpus} GPUs are visible and no launcher was used: {launch} ..., or one GPU: {one} ...")
    if gpus and not c_compiler():
        raise UserError("Triton compiles with gcc and Python.h at the first step: apt-get install gcc python3-dev")
    if config.training.get("use_liger_kernel") and not (gpus and is_liger_kernel_available()):
        why = "it is not installed: pip install liger-kernel" if gpus else "its kernels run on a GPU alone"
        raise UserError(f"training.use_liger_kernel: {why}; or leave the key out")
