"""What does a merge take? This project's against PEFT's merge_and_unload and a copy of the same bytes, in one run.

    python benchmarks/merge.py                    a generated model of 1.2 billion parameters, in bfloat16
    python benchmarks/merge.py --layers 4 --rounds 1

Each is a process of its own, in turn, on all cores and files that were just read, and ends when its bytes are on the
disk. The result goes to benchmarks/results/merge.json. It needs about 8 GB of disk (--folder).
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1 / 3  # of PEFT's time, imports included

OURS = """
import sys, time
from recipes.merge_adapter import merge_adapter
began = time.perf_counter()
merge_adapter(sys.argv[1], sys.argv[3], verify=False)
print(time.perf_counter() - began)
"""
PEFT = """
import os, sys, time
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[3])
for path in Path(sys.argv[3]).iterdir():
    os.fsync(os.open(path, os.O_RDONLY))
print(time.perf_counter() - began)
"""
COPY = """
import os, shutil, sys, time
began = time.perf_counter()
os.mkdir(sys.argv[3])
shutil.copyfile(sys.argv[2] + "/model.safetensors", sys.argv[3] + "/model.safetensors")
os.fsync(os.open(sys.argv[3] + "/model.safetensors", os.O_RDONLY))
print(time.perf_counter() - began)
"""


def make_model(folder: Path, layers: int) -> tuple[Path, Path, dict]:
    """A random bfloat16 model of Mistral's architecture and a rank-64 adapter on all its linear layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=32768, hidden_size=2048, intermediate_size=7168, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, sliding_window=None, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    base, adapter = folder / "base", folder / "adapter"
    adapter.mkdir()
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(base)
    weights = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03) for name, shape in shapes.items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "examples" / "tiny" / "base" / name, base / name)
    parts = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            parts[f"{module}.lora_A.weight"] = torch.randn(64, shape[1]) * 0.02
            parts[f"{module}.lora_B.weight"] = torch.randn(shape[0], 64) * 0.02
    save_file(parts, adapter / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.split(".")[-2] for name in shapes if name.endswith("_proj.weight")})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 64, "lora_alpha": 64, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    sizes = [shape.numel() for shape in shapes.values()]
    return base, adapter, {"parameters": sum(sizes), "largest_tensor_float32_mb": max(sizes) * 4 / 1e6}


def measure(script: str, *words) -> dict:
    """Seconds of the whole process and of its work after the imports; peak resident memory in MB."""
    environment = {
        name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"
    }  # each core for each way
    began = time.perf_counter()
    command = [sys.executable, "-c", script, *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed:\n{output}")
    seconds = time.perf_counter() - began
    cpu = usage.ru_utime + usage.ru_stime  # what a busy machine does not change much
    return {
        "process_s": seconds,
        "process_cpu_s": cpu,
        "work_s": float(output.splitlines()[-1]),
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def same_weights(first: Path, second: Path) -> bool:
    """True if all tensors of both folders are the same bytes."""
    from safetensors import safe_open

    one, other = (safe_open(folder / "model.safetensors", "pt") for folder in (first, second))
    return set(one.keys()) == set(other.keys()) and all(
        one.get_tensor(name).equal(other.get_tensor(name)) for name in set(one.keys())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="the median of each counts")
    parser.add_argument("--folder", help="where the model is generated (the system's temporary folder)")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}")
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # the peak of a process begins with its parent's
            base, adapter, model = pool.apply(make_model, (folder, options.layers))
        found = {}
        for number in range(1 + options.rounds):  # the first, not counted, warms caches and a virtual machine's memory
            for way, script in (("copy", COPY), ("this project", OURS), ("peft", PEFT)):
                shutil.rmtree(folder / way, ignore_errors=True)
                os.sync()
                seconds = measure(script, adapter, base, folder / way)
                print("warm-up:" if number == 0 else "", way, seconds, flush=True)
                if number > 0:
                    found.setdefault(way, []).append(seconds)
        same = same_weights(folder / "this project", folder / "peft")
    medians = {way: {key: round(median(run[key] for run in runs), 2) for key in runs[0]} for way, runs in found.items()}
    ours, peft = medians["this project"], medians["peft"]
    result = {
        "machine": options.machine, "load average before": load, "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        **model, "rounds": options.rounds, **medians,
        "same bytes as peft": same,
        "share of peft's time, whole process": round(ours["process_s"] / peft["process_s"], 3),
        "limit of that share": round(LIMIT, 3),
        "share of peft's time, after imports": round(ours["work_s"] / peft["work_s"], 3),
        "share of peft's processor time": round(ours["process_cpu_s"] / peft["process_cpu_s"], 3),
        "share of peft's memory": round(ours["peak_mb"] / peft["peak_mb"], 3),
        "times the copy, after imports": round(ours["work_s"] / medians["copy"]["work_s"], 2),
        "memory allowed, MB": round(2 * model["largest_tensor_float32_mb"] + 400, 1),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    output = ROOT / "benchmarks" / "results" / "merge.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
