"""The tables of a plan: memory by part, what fits, and the speed that was measured."""

import dataclasses
import json
import re
from pathlib import Path

from recipes.utils.attention import VARLEN
from recipes.utils.config import Config
from recipes.utils.console import UserError, out
from recipes.utils.fit import RESERVE, fits, memory_there
from recipes.utils.memory import Memory
from recipes.utils.model import choose_attention, load_model_config

import torch
from rich.table import Table
from trl import SFTConfig

# What benchmarks/train_gpu.py measured; absent until it has run.
MEASURED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "train_gpu.json"
GPUS = {  # GB, as they are sold
    "T4": 16, "V100": 16, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32, "A10": 24, "A10G": 24, "L4": 24, "L40S": 48,
    "A6000": 48, "A100-40": 40, "A100-80": 80, "A100": 80, "H100": 80, "H200": 141, "B200": 180,
}  # fmt: skip
OLDER_THAN_AMPERE = ("T4", "V100")
PARTS = {
    "weights": "weights",
    "adapter": "adapter, its gradients and optimizer",
    "activations": "saved activations",
    "working": "working set of one layer *",
    "head": "LM head tile *",
    "total": "peak",
}
WAYS = {  # (method, activation checkpointing) -> head of a column
    ("lora", True): "LoRA, checkpointing",
    ("lora", False): "LoRA",
    ("qlora", True): "Q-LoRA, checkpointing",
    ("qlora", False): "Q-LoRA",
}


def memory_of_gpu(gpu: str | None) -> tuple[int, str]:
    """(bytes, name) of the GPU that is named, by its model or its size, or of this machine's."""
    if gpu is None:
        if not torch.cuda.is_available():
            raise UserError('this machine has no GPU that torch sees; name one: --gpu 24GB, --gpu "RTX 4090"')
        return memory_there(use_cpu=False), torch.cuda.get_device_name()
    known = {name.lower(): name for name in GPUS}
    if name := known.get(gpu.lower()):
        return int(GPUS[name] * 1e9), name
    try:
        return int(float(gpu.upper().removesuffix("GB")) * 1e9), gpu
    except ValueError:
        raise UserError(f"--gpu {gpu!r} is not known; give its size, as 24GB, or one of: {', '.join(GPUS)}") from None


def on_gpu(config: Config, gpu: str | None, name: str) -> tuple[Config, str, str]:
    """(`config` as the GPU called `name` can run it, what packed rows go through there, a flag that this takes or "").
    Without `gpu` it is this machine's."""
    dtype, flag = config.model.dtype, ""
    if name in OLDER_THAN_AMPERE and dtype == "bfloat16":
        qwen2 = load_model_config(config.model).model_type.startswith("qwen2")
        dtype = "float32" if qwen2 else "float16"  # Qwen2 gives NaN in float16
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, dtype=dtype),
            training={**config.training, "bf16": False, "fp16": dtype == "float16"},
        )
        flag = f" --model.dtype {dtype}"
    if gpu is None or config.model.attn_implementation != "auto":
        return config, choose_attention(config.model, use_cpu=gpu is not None)[0], flag
    return config, "sdpa" if name in OLDER_THAN_AMPERE or dtype == "float32" else VARLEN, flag


def print_parts(title: str, memory: dict[tuple, Memory]) -> None:
    """`memory` by (method, checkpointing)."""
    table = _table(title, "", memory)
    for part, name in PARTS.items():
        table.add_row(name, *(f"{getattr(found, part) / 1e9:.1f}" for found in memory.values()))
    out.print(table)
    out.print("* one after the other: the larger counts for the peak\n")


def print_fits(name: str, there: int, memory: dict[tuple, Memory], sizes: list[int], length: int) -> None:
    """`memory` by (method, checkpointing, rows), against `there` bytes."""
    title = f"peak, GB, against {there / 1e9:.1f} GB ({name}) less {RESERVE:.0%} for CUDA and rounding"
    table = _table(title, "micro-batch", WAYS)
    for rows in sizes:
        found = [memory[(*way, rows)] for way in WAYS]
        cells = [f"{one.total / 1e9:.1f} {'fits' if fits(one, there) else 'no'}" for one in found]
        table.add_row(f"{rows} rows, {rows * length:,} tokens", *cells)
    out.print(table)


def _table(title: str, first: str, ways) -> Table:
    columns = (WAYS[way] for way in ways)
    return Table(first, *columns, title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2))


def _is(device: str, gpu: str) -> bool:
    """True if the name that CUDA has for a device ("NVIDIA A100-SXM4-40GB") is of the GPU ("A100-40")."""
    return all(re.search(rf"\b{re.escape(part)}(GB)?\b", device) for part in gpu.split("-"))


def measured_speed(config: Config, method: str, gpu: str, checkpointing: bool) -> str:
    """The fastest rate measured for a model of this shape on `gpu`, and the hours that follow; or that there is none."""
    shape = load_model_config(config.model)
    shape = [shape.model_type, shape.hidden_size, shape.num_hidden_layers]
    rates = [
        run
        for run in (json.loads(MEASURED.read_text())["runs"] if MEASURED.is_file() else [])
        if run["ours"] and _is(run["gpu"], gpu) and run["shape"] == shape
        and (run["method"], run["checkpointing"]) == (method, checkpointing)
    ]  # fmt: skip
    if not rates:
        return f"not measured on this GPU ({gpu})"
    best = max(rates, key=lambda run: run["useful_tokens_per_second"])
    rate, epochs = best["useful_tokens_per_second"], SFTConfig(**config.training).num_train_epochs
    return (
        f"{rate:,.0f} tokens/s ({best['variant']}, {best['gpu']}, {best['date']}): 10 million tokens × {epochs:g} epochs "
        f"take {10e6 * epochs / rate / 3600:.1f} h; the recipe's --dry-run counts yours"
    )
