"""Does a run fit: the memory of its steps against that of a GPU, in tables and flags; the speed that was measured."""

import dataclasses
import os
import re
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from rich.table import Table
from trl import SFTConfig

from recipes.utils.config import Config
from recipes.utils.console import UserError, out
from recipes.utils.files import read_json
from recipes.utils.model import VARLEN, attention_and_reason, attentions_of, fast_lora, has_fast_lora
from recipes.utils.planning.memory import Memory, Step, on_meta, predict

MEASURED = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "train_gpu.json"  # by train_gpu.py there
RESERVE = 0.06  # of a card, for CUDA, its libraries' workspaces and the allocator's rounding; allowed, not measured
ENOUGH = 8192  # tokens a micro-batch; more fill a GPU no better
FEW = 4096  # and with fewer it idles, which recomputing activations costs less than
GPUS = {  # GB, as they are sold
    "T4": 16, "V100": 16, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32, "A10": 24, "A10G": 24, "L4": 24, "L40": 48,
    "L40S": 48, "A40": 48, "A6000": 48, "RTX 6000 Ada": 48, "A100-40": 40, "A100-80": 80, "A100": 80, "H100": 80,
    "H200": 141, "B200": 180,
}  # fmt: skip
OLDER_THAN_AMPERE = ("T4", "V100")
PARTS = {
    "weights": "weights", "adapter": "adapter, its gradients and optimizer", "activations": "saved activations",
    "working": "working set of one layer *", "head": "LM head tile *", "total": "peak",
}  # fmt: skip
WAYS = {  # (method, activation checkpointing) -> head of a column
    ("lora", True): "LoRA, checkpointing", ("lora", False): "LoRA",
    ("qlora", True): "Q-LoRA, checkpointing", ("qlora", False): "Q-LoRA",
}  # fmt: skip


def fits(memory: Memory, available: int) -> bool:
    return memory.total <= available * (1 - RESERVE)


def lora_of(config: Config) -> LoraConfig:
    """The adapter that the run trains: a new one, or the one that it goes on from."""
    own = config.model.adapter
    return fast_lora(PeftConfig.from_pretrained(own) if own else LoraConfig(**config.lora), config.model)


def memory_of_steps(config: Config, model_config, attention: str, sizes: list[int]) -> dict[tuple, Memory]:
    """{(method, activation checkpointing, rows): memory} of a training step with each of `sizes` rows a micro-batch."""
    args = SFTConfig(**config.training)
    common = {
        "dtype": config.model.dtype, "attention": attention, "length": args.max_length, "packed": args.packing,
        "input_cast": config.model.adapter_input_cast, "optimizer": str(args.optim),
        "double_quantisation": config.quantization.get("bnb_4bit_use_double_quant", True),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }  # fmt: skip
    steps = [Step(checkpointing=way, rows=rows, **common) for way in (True, False) for rows in sizes]
    found = zip(steps, predict(model_config, lora_of(config), steps), strict=True)
    return {(method, step.checkpointing, step.rows): both[method] for step, both in found for method in both}


def choose(sizes: list[int], length: int, room: set[tuple[bool, int]]) -> tuple[int, bool]:
    """(rows a micro-batch, checkpointing): without it if some size fits so, the first of `sizes` (rising) with tokens
    enough or else the largest that fits; the smallest, with it, if none does. `room`: pairs that fit."""
    best = None
    for checkpointing in (False, True):
        if fitting := [rows for rows in sizes if (checkpointing, rows) in room]:
            best = next((rows for rows in fitting if rows * length >= ENOUGH), fitting[-1]), checkpointing
        if best and (best[0] * length >= FEW or best[0] == sizes[-1]):
            break
    return best or (sizes[0], True)


def memory_of_gpu(gpu: str | None) -> tuple[int, str]:
    """(bytes, name) of the GPU that is named, by its model or its size; without one, what is free on this machine's."""
    if gpu is None:
        if not torch.cuda.is_available():
            raise UserError('this machine has no GPU that torch sees; name one: --gpu 24GB, --gpu "RTX 4090"')
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    if name := {name.lower(): name for name in GPUS}.get(gpu.lower()):
        return int(GPUS[name] * 1e9), name
    try:
        return int(float(gpu.upper().removesuffix("GB")) * 1e9), gpu
    except ValueError:
        raise UserError(f"--gpu {gpu!r} is not known; give its size, as 24GB, or one of: {', '.join(GPUS)}") from None


def on_gpu(config: Config, model_config, gpu: str | None, name: str) -> tuple[Config, str, str]:
    """(`config` as the GPU `name`, this machine's without `gpu`, can run it, its attention, a flag for that or "")."""
    dtype, flag = config.model.dtype, ""
    if name in OLDER_THAN_AMPERE and dtype == "bfloat16":
        dtype = "float32" if model_config.model_type.startswith("qwen2") else "float16"  # where Qwen2 gives NaN
        training = {**config.training, "bf16": False, "fp16": dtype == "float16"}
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype), training=training)
        flag = f" --model.dtype {dtype}"
    if gpu is None or config.model.attn_implementation != "auto":
        return config, attention_and_reason(model_config, config.model, use_cpu=gpu is not None)[0], flag
    wanted, has = [VARLEN, "sdpa", "eager"], attentions_of(model_config)
    if name in OLDER_THAN_AMPERE or dtype == "float32":
        wanted.remove(VARLEN)
    return config, next(attention for attention in wanted if attention in has), flag


def print_memory(memory: dict[tuple, Memory], args: SFTConfig, name: str, available: int) -> None:
    """Print the run's micro-batch by part, and each size in `memory` against `available` bytes, those of GPU `name`."""
    own, length, packed = args.per_device_train_batch_size, args.max_length, "packed " if args.packing else ""
    new_table = partial(Table, title_justify="left", title_style="bold", box=None, padding=(0, 2))
    title = f"memory by part, GB: {own} {packed}rows of {length:,} tokens a micro-batch"
    table = new_table("", *WAYS.values(), title=title)
    for part, what in PARTS.items():
        table.add_row(what, *(f"{getattr(memory[(*way, own)], part) / 1e9:.1f}" for way in WAYS))
    out.print(table, "* one after the other: the larger counts for the peak\n", sep="\n")
    title = f"peak, GB, against {available / 1e9:.1f} GB ({name}) less {RESERVE:.0%} for CUDA and rounding"
    table = new_table("micro-batch", *WAYS.values(), title=title)
    for rows in sorted({rows for _, _, rows in memory}):
        found = [memory[(*way, rows)] for way in WAYS]
        cells = [f"{one.total / 1e9:.1f} {'fits' if fits(one, available) else 'no'}" for one in found]
        table.add_row(f"{rows} rows, {rows * length:,} tokens", *cells)
    out.print(table)


def is_gpu(device: str, gpu: str) -> bool:
    """True if the name that CUDA has for a device ("NVIDIA A100-SXM4-40GB") is of the GPU ("A100-40")."""
    if gpu not in GPUS:  # "80GB" stands in the names of several
        return device == gpu
    return all(re.search(rf"\b{re.escape(part)}(GB)?\b", device) for part in gpu.split("-"))


def measured_speed(
    config: Config, model_config, method: str, gpu: str, checkpointing: bool
) -> tuple[str, float | None]:
    """(the best rate measured on `gpu` for this shape and its settings, with hours; or the nearest; or that none is;
    the rate itself in tokens a second, None where it was not measured with these settings)."""
    shape = [model_config.model_type, model_config.hidden_size, model_config.num_hidden_layers]
    runs = read_json(MEASURED)["runs"] if MEASURED.is_file() else []
    runs = [run for run in runs if run["ours"] and run["shape"] == shape and is_gpu(run["gpu"], gpu)]
    if not runs:
        return f"not measured on this GPU ({gpu})", None
    args = SFTConfig(**config.training)
    model = on_meta(model_config, lora_of(config), config.model.dtype, layers=2)
    targets = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    asked = {
        "method": method, "targets": targets, "packing": args.packing, "checkpointing": checkpointing,
        "compile": config.model.compile_layers, "liger": args.use_liger_kernel, "cast": config.model.adapter_input_cast,
        "fast_lora": has_fast_lora(model),
        "attention": VARLEN if config.model.attn_implementation == "auto" else config.model.attn_implementation,
    }  # fmt: skip

    def others(run: dict) -> list[str]:
        has = {**run.get("settings", {}), **run, "targets": set(run["targets"])}
        return [name for name, value in asked.items() if has.get(name, False) != value]

    best = min(runs, key=lambda run: ("method" in others(run), len(others(run)), -run["useful_tokens_per_second"]))
    rate = f"{best['useful_tokens_per_second']:,.0f} tokens/s ({best['variant']}, {best['gpu']}, {best['date']})"
    if other := others(best):
        return f"not measured with this run's {', '.join(other)}; nearest: {rate}", None
    hours = 10e6 * args.num_train_epochs / best["useful_tokens_per_second"] / 3600
    long = f"10 million tokens × {args.num_train_epochs:g} epochs take {hours:.1f} h"
    return f"{rate}: {long}; the recipe's --dry-run counts yours", best["useful_tokens_per_second"]
