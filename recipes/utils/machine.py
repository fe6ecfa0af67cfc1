"""What this machine can run: versions, GPU, 4-bit arithmetic, disk and trackers, each tried and not only looked for."""

import importlib.metadata
import netrc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HOME

PINS = Path(__file__).resolve().parents[2] / "requirements.txt"
BASE_GB = 15  # a 7B base in 16 bit


class Check(NamedTuple):
    """One line: `state` is ok, missing (with the mend in `text`) or optional (not there, and not needed)."""

    state: str
    name: str
    text: str


def check_everything() -> list[Check]:
    return [*check_versions(), *check_gpu(), check_four_bit(), *check_disk(), *check_trackers()]


def check_versions() -> list[Check]:
    """Python and the libraries against the versions that were tested."""
    python = sys.version.split()[0]
    mend = "" if sys.version_info >= (3, 10) else ": Python 3.10 or newer is needed"
    checks = [Check("missing" if mend else "ok", "Python", python + mend)]
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", PINS.read_text(), flags=re.M) if PINS.is_file() else []
    for name, tested in pins:
        found = _version(name)
        if not found:
            checks.append(Check("missing", name, "pip install -r requirements.txt"))
            continue
        same = found.partition("+")[0] == tested
        text = found if same else f"{found}, tested with {tested}: pip install {name}=={tested}"
        checks.append(Check("ok" if same else "missing", name, text))
    return checks


def check_gpu() -> list[Check]:
    """The GPU, what it computes in, its driver, and the attention for packed rows."""
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is a CPU build"
        return [
            Check(
                "missing",
                "GPU",
                f"torch sees none ({built}); nvidia-smi shows whether there is one. Without one, the demo runs",
            )
        ]
    properties, capability = torch.cuda.get_device_properties(0), torch.cuda.get_device_capability()
    free = torch.cuda.mem_get_info(0)[0]
    count = f" × {torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else ""
    text = f"{properties.name}{count}, {properties.total_memory / 1e9:.1f} GB, {free / 1e9:.1f} free, compute capability {capability[0]}.{capability[1]}"
    why = no_kernels()
    checks = [Check("missing" if why else "ok", "GPU", text + (why or ""))]
    driver = (
        shutil.which("nvidia-smi")
        and subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.split()
    )
    checks.append(Check("ok", "driver", f"{driver[0] if driver else 'unknown'}, CUDA {torch.version.cuda} in torch"))
    if torch.cuda.is_bf16_supported(including_emulation=False):
        checks.append(Check("ok", "bfloat16", "yes"))
    else:
        checks.append(
            Check("missing", "bfloat16", "--model.dtype float16, or float32 for Qwen2, which gives NaN in float16")
        )
    if _version("flash-attn"):
        checks.append(Check("ok", "flash-attn", _version("flash-attn")))
    elif capability[0] >= 8:
        checks.append(Check("optional", "flash-attn", "not installed; packed rows go through torch's own kernel"))
    else:
        checks.append(
            Check("optional", "flash-attn", "not for GPUs before Ampere; packed rows go through sdpa with a mask")
        )
    return checks


def no_kernels() -> str | None:
    """What to do where this torch holds no kernels for this GPU (those for CUDA 13 begin with Turing), or None. Kernels
    run on later GPUs of the same generation: 8.6's on 8.9."""
    generation, minor = torch.cuda.get_device_capability()
    built = [divmod(int(name[3:]), 10) for name in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", name)]
    if any(major == generation and least <= minor for major, least in built):
        return None
    return f": torch {torch.__version__} holds no kernels for it; install the same version as built for CUDA 12.6"


def check_four_bit() -> Check:
    """Quantise a matrix to NF4 on the device that trains, multiply with it, and compare with the dequantised one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        import bitsandbytes  # here, so that its absence is a line and no traceback

        weight, x = torch.randn(128, 128, device=device), torch.randn(4, 128, device=device)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        near = bitsandbytes.functional.dequantize_4bit(packed, state)
        product = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
        wrong = (product - x @ near.t()).abs().max().item()
        rounding = ((near - weight).norm() / weight.norm()).item()
    except Exception as error:  # a missing library, an unknown GPU: whatever it is, the user is told
        return Check("missing", "4 bit", f"bitsandbytes cannot compute on {device}: {str(error).splitlines()[0]}; pip install -U bitsandbytes")  # fmt: skip
    if wrong > 1e-3 or rounding > 0.2:
        return Check("missing", "4 bit", f"bitsandbytes computes wrongly on {device} (off by {wrong:.2g}): Q-LoRA will not train; pip install -U bitsandbytes")  # fmt: skip
    return Check("ok", "4 bit", f"NF4 on {device}: quantised and multiplied, {rounding:.0%} rounding")


def check_disk() -> list[Check]:
    """Room for checkpoints where the command runs, and for a base model where the hub's files go."""
    checks = []
    for name, folder, needed in (("disk here", Path.cwd(), 2), ("disk of HF_HOME", Path(HF_HOME), BASE_GB)):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free / 1e9
        mend = "" if free >= needed else f"; {needed} GB are needed" + ("" if needed == 2 else ": set HF_HOME")
        checks.append(Check("missing" if mend else "ok", name, f"{free:.0f} GB free{mend}"))
    return checks


def check_trackers() -> list[Check]:
    """Which trackers are installed, and whether there is a login; never what it is."""
    checks = [
        Check("ok", "Hugging Face", "logged in")
        if get_token()
        else Check("optional", "Hugging Face", "not logged in; gated models want: hf auth login")
    ]
    for name in ("wandb", "tensorboard", "mlflow", "trackio"):
        if not _version(name):
            checks.append(Check("optional", name, "not installed"))
        elif name == "wandb" and not _wandb_login():
            checks.append(Check("missing", name, "not logged in: wandb login, or WANDB_MODE=offline"))
        else:
            checks.append(Check("ok", name, _version(name) + (", logged in" if name == "wandb" else "")))
    return checks


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
