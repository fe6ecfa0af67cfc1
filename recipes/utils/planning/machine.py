"""What this machine can run: versions, GPU, 4-bit arithmetic, compiler and disk, each tried and not only looked for."""

import importlib.metadata
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME

from recipes.utils.config import c_compiler

PINS = Path(__file__).resolve().parents[3] / "requirements.txt"
ROOM = {"disk here": (Path("."), 2, ""), "disk of HF_HOME": (Path(HF_HOME), 15, ": set HF_HOME")}  # GB, for a 7B base


def check_machine() -> Iterator[tuple[str, str, str]]:
    """Yield (state, part, text) of each part: ok, or missing, with the mend in the text, or optional."""
    for name, tested in re.findall(r"^([\w.-]+)==([\w.]+)", PINS.read_text(), re.M) if PINS.is_file() else []:
        found = next((package.version for package in importlib.metadata.distributions(name=name)), None)
        if found and found.partition("+")[0] != tested:
            yield "missing", name, f"{found}, tested with {tested}: pip install {name}=={tested}"
        else:
            yield "ok" if found else "missing", name, found or "pip install -r requirements.txt"
    if torch.cuda.is_available():
        gpu, count, free = torch.cuda.get_device_properties(0), torch.cuda.device_count(), torch.cuda.mem_get_info(0)[0]
        text = f"{gpu.name}{f' × {count}' if count > 1 else ''}, {gpu.total_memory / 1e9:.1f} GB, {free / 1e9:.1f} free"
        yield "ok", "GPU", f"{text}, compute capability {gpu.major}.{gpu.minor}"
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        mend = "--model.dtype float16, or float32 for Qwen2, which gives NaN in float16"
        yield "ok" if bfloat16 else "missing", "bfloat16", "yes" if bfloat16 else mend
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is a CPU build"
        yield "missing", "GPU", f"torch sees none ({built}); nvidia-smi shows whether there is one. The demo needs none"
    yield check_four_bit()
    if compiler := c_compiler():
        yield "ok", "C compiler", compiler
    else:
        why = "none, or no Python.h: on a GPU, Triton needs both at the first step: apt install gcc python3-dev"
        yield "missing" if torch.cuda.is_available() else "optional", "C compiler", why
    for name, (folder, needed, mend) in ROOM.items():
        free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free / 1e9
        lacks = "" if free >= needed else f"; {needed} GB are needed{mend}"
        yield "missing" if lacks else "ok", name, f"{free:.0f} GB free{lacks}"


def check_four_bit() -> tuple[str, str, str]:
    """Quantise a matrix to NF4 on the device that trains, multiply with it, and compare with the dequantised one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        import bitsandbytes  # here, so that its absence is a line and no traceback

        weight, x = torch.randn(128, 128, device=device), torch.randn(4, 128, device=device)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        near = bitsandbytes.functional.dequantize_4bit(packed, state)
        wrong = (bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state) - x @ near.t()).abs().max().item()
        rounding = ((near - weight).norm() / weight.norm()).item()
        if wrong > 1e-3 or rounding > 0.2:
            raise ArithmeticError(f"its products are off by {wrong:.2g}")
    except Exception as error:  # a missing library, an unknown GPU: whatever it is, the user is told
        why = str(error).partition("\n")[0]
        old = "no kernel image" in why  # torch's for CUDA 13 begin with Turing
        mend = "install the same torch as built for CUDA 12.6" if old else "pip install -U bitsandbytes"
        return "missing", "4 bit", f"bitsandbytes cannot compute on {device}: {why}: Q-LoRA will not train; {mend}"
    return "ok", "4 bit", f"NF4 on {device}: quantised and multiplied, {rounding:.0%} rounding"
