"""How fast a 7B model trains on one GPU: a ladder of settings, with stock TRL and Unsloth in the same run.

    python benchmarks/train_gpu.py mistral                      every rung that is not measured yet, some nine minutes
    python benchmarks/train_gpu.py mistral                      ... and again, until it says that all are done
    python benchmarks/train_gpu.py qwen2 --only "packed" "packed, no checkpointing"
    python benchmarks/train_gpu.py mistral --unsloth /folder/with/unsloth     its own versions, first on the path
    python benchmarks/train_gpu.py --table                      what results/train_gpu.json holds
    python benchmarks/train_gpu.py tiny --json /tmp/tiny.json   the same on a CPU, to see that it runs

Speed does not depend on what weights say: the model has the published shape and random weights, made once below
--folder (15 GB). Rows are token ids with chat-like lengths: log-normal, median 420 tokens, cut at 4,096, 55 % of a
row labelled. Each rung is a process of its own: 3 optimizer steps to warm up, 8 timed (stock TRL 2 and 4), the GPU
synchronised before and after; the next one's imports are done meanwhile. MFU is held against the rate of matrix
products at the model's own shape, measured in the same process. The first rung of this project runs again at the end,
so that drift shows. Packed rungs see the same rows in the same order: their losses are compared. A rung that was to
be packed and whose micro-batch is not one full row is refused.
"""

import argparse
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "train_gpu.json"
SHAPES = {  # as the models' pages have them
    "mistral": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
        "rope_theta": 1e6, "max_position_embeddings": 32768,
    },
    "qwen2": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "rope_theta": 1e6, "max_position_embeddings": 32768,
    },
    "tiny": {
        "model_type": "mistral", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip
WARM_UP, TIMED = 3, 8
MAX_LENGTH, MEDIAN, LABELLED = 4096, 420, 0.55
TINY_SCALE = 32  # lengths are divided by it
GRACE = 2.5  # minutes that the last rung of a call may take on top
# Packed rungs see the same rows, so that their losses are equal but for rounding in bfloat16.
LOSSES_APART = 5e-3

# What a rung sets; the rest stands in DEFAULTS. `kind`: trl as its documentation starts it, ours, or unsloth.
DEFAULTS = {
    "kind": "ours", "method": "lora", "packing": True, "attention": "varlen", "cast": False, "checkpointing": True,
    "compile": False, "liger": False, "fast_lora": False, "targets": "all linear", "max_length": MAX_LENGTH,
    "rows": None,
}  # fmt: skip
TARGETS = {"qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"]}
TARGETS["all linear"] = [*TARGETS["qkvo"], "gate_proj", "up_proj", "down_proj"]
BEST = {"checkpointing": False, "compile": True}
FAST = {"checkpointing": False, "fast_lora": True}
RUNGS = {
    "TRL, stock": {"kind": "trl", "packing": False},
    "bfloat16, padded": {"packing": False, "attention": "sdpa", "cast": True},
    "packed, sdpa": {"attention": "sdpa", "cast": True},
    "packed, varlen": {"cast": True},
    "packed": {},
    "packed, fast LoRA": {"fast_lora": True},
    "config": {"targets": "qkvo", "max_length": 2048, "rows": 4},  # what configs/*.yaml have
    "packed, flash-attn": {"attention": "flash_attention_2"},
    "packed, Liger": {"liger": True},
    "packed, no checkpointing": {"checkpointing": False},
    "packed, no checkpointing, fast LoRA": FAST,
    "packed, no checkpointing, fast LoRA, Liger": {**FAST, "liger": True},
    "packed, no checkpointing, compiled": BEST,
    "TRL Q-LoRA, stock": {"kind": "trl", "method": "qlora", "packing": False},
    "Q-LoRA, packed": {"method": "qlora"},
    "Q-LoRA, packed, fast LoRA": {"method": "qlora", "fast_lora": True},
    "Q-LoRA, no checkpointing": {"method": "qlora", "checkpointing": False},
    "Q-LoRA, no checkpointing, fast LoRA": {"method": "qlora", **FAST},
    "Q-LoRA, no checkpointing, compiled": {"method": "qlora", **BEST},
    "Unsloth": {"kind": "unsloth"},
    "Unsloth Q-LoRA": {"kind": "unsloth", "method": "qlora"},
    "packed, again": {},
}


def make_model(name: str, folder: Path) -> Path:
    """The model of that shape with random weights in bfloat16 and the tiny base's tokenizer, saved once."""
    target = folder / name
    if (target / "done").exists():
        return target
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = dict(SHAPES[name])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, dtype="bfloat16")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny" / "base").save_pretrained(target)
    (target / "done").touch()
    return target


def make_rows(count: int, vocabulary: int, scale: int = 1, longest: int = MAX_LENGTH):
    """`count` rows of token ids with labels on their last part, the same at each call."""
    from datasets import Dataset

    draw, rows = random.Random(0), {"input_ids": [], "labels": []}
    for _ in range(count):
        length = max(8, min(longest, round(draw.lognormvariate(math.log(MEDIAN), 0.9))) // scale)
        ids = [draw.randrange(10, vocabulary) for _ in range(length)]
        asked = round(length * (1 - LABELLED))
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * asked + ids[asked:])
    return Dataset.from_dict(rows)


def make_lora(rung: dict):
    """The adapter of a rung."""
    from peft import LoraConfig

    lora = LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS[rung["targets"]], task_type="CAUSAL_LM")
    if rung["kind"] == "ours":
        from recipes.utils.model import fast_lora

        fast_lora(lora, options_of(rung))
    return lora


def options_of(rung: dict):
    """The recipes' section `model` of a rung."""
    from recipes.utils.model import ModelOptions  # here: Unsloth has other packages in the place of the recipes'

    return ModelOptions(
        adapter_input_cast=rung["cast"], compile_layers=rung["compile"], fast_lora=rung["fast_lora"]
    )  # fmt: skip


def build_model(rung: dict, model: Path, use_cpu: bool, lora):
    """(what SFTTrainer takes as the model, its peft_config)."""
    import torch
    from transformers import BitsAndBytesConfig

    four_bit = None
    if rung["method"] == "qlora":
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    if rung["kind"] == "trl" and four_bit is None:
        return str(model), lora
    if rung["kind"] == "trl":
        from transformers import AutoModelForCausalLM

        device = {"": "cpu" if use_cpu else 0}
        return AutoModelForCausalLM.from_pretrained(model, quantization_config=four_bit, device_map=device), lora
    if rung["kind"] == "unsloth":
        from unsloth import FastLanguageModel

        loaded, _ = FastLanguageModel.from_pretrained(
            str(model), max_seq_length=MAX_LENGTH, dtype=torch.bfloat16, load_in_4bit=rung["method"] == "qlora"
        )
        return FastLanguageModel.get_peft_model(
            loaded, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS[rung["targets"]],
            use_gradient_checkpointing="unsloth",
        ), None  # fmt: skip
    from recipes.utils.model import ModelOptions, load_base

    return load_base(model, ModelOptions(str(model)), rung["attention"], four_bit, use_cpu), lora


def measure(
    name: str, rung_name: str, model: Path, micro_batch: int | None = None, hold=None, profiled: bool = False
) -> dict:
    """Train on one rung in this process and return its record. `hold` is called when all is done that needs no GPU.
    Where it is `profiled`, one more step is taken after the timed ones, and stderr gets its kernels by time taken."""
    rung = {**DEFAULTS, **RUNGS[rung_name]}
    if rung["kind"] == "unsloth":
        import unsloth  # noqa: F401  (it wants to be imported before all others)
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if rung["kind"] == "ours":
        from recipes.utils.model import prepare_adapter

        options = options_of(rung)
    use_cpu, shape = not torch.cuda.is_available(), SHAPES[name]
    scale = TINY_SCALE if name == "tiny" else 1
    warm_up, timed = (min(WARM_UP, 2), min(TIMED, 4)) if rung["kind"] == "trl" else (WARM_UP, TIMED)
    # A padded micro-batch of 8 rows holds about as many useful tokens as a packed one of 2.
    rows_a_step, longest = micro_batch or rung["rows"] or (2 if rung["packing"] else 8), rung["max_length"]
    rows = make_rows((WARM_UP + TIMED) * 8192 // MEDIAN * 3 // 2, shape["vocab_size"], scale, longest)
    tokenizer, lora = AutoTokenizer.from_pretrained(model), make_lora(rung)
    # before Liger puts its own classes in the place of the model's
    gigabytes = predicted(rung, rows_a_step, longest // scale, model, lora, on_gpu=not use_cpu)
    if hold:
        hold()
    began = time.perf_counter()
    loaded, lora = build_model(rung, model, use_cpu, lora)
    args = SFTConfig(
        output_dir=str(model.parent / "run"), max_steps=warm_up + timed + profiled, max_length=longest // scale,
        packing=rung["packing"], per_device_train_batch_size=rows_a_step, gradient_accumulation_steps=1,
        learning_rate=1e-4, gradient_checkpointing=rung["checkpointing"], use_liger_kernel=rung["liger"],
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=use_cpu, seed=0,
    )  # fmt: skip
    trainer = SFTTrainer(model=loaded, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    if rung["kind"] == "ours":
        prepare_adapter(trainer.model, options)
    ready = time.perf_counter()

    counts, losses, clock, batch = [], [], [], {}
    compute_loss = trainer.compute_loss

    def counted(model, inputs, **kwargs):
        real = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        if not counts and rung["packing"]:
            check_packed(inputs["input_ids"].shape, rows_a_step * args.max_length)
        batch.update({key: list(value.shape) for key, value in inputs.items() if hasattr(value, "shape")})
        counts.append((real, inputs["input_ids"].numel(), (inputs["labels"] != -100).sum()))
        return compute_loss(model, inputs, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in (warm_up, warm_up + timed):
                synchronise()
                clock.append(time.perf_counter())
            if state.global_step == warm_up + timed:
                with contextlib.suppress(RuntimeError):  # no CUPTI
                    profiler.start()

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    def synchronise():
        if not use_cpu:
            torch.cuda.synchronize()

    activity = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[activity.CPU if use_cpu else activity.CUDA])
    trainer.compute_loss = counted
    trainer.add_callback(Clock())
    if not use_cpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    synchronise()
    seconds = (clock[1] if profiled else time.perf_counter()) - clock[0]
    if profiled:
        with contextlib.suppress(RuntimeError, AssertionError):
            profiler.stop()
            found = profiler.key_averages()
            print(
                found.table(sort_by="self_device_time_total", row_limit=50, max_name_column_width=120), file=sys.stderr
            )
        counts, losses = counts[: warm_up + timed], losses[: warm_up + timed]
    useful, seen, trained = (sum(int(step[i]) for step in counts[warm_up:]) for i in range(3))
    lengths = [len(ids) for ids in rows["input_ids"]]
    context = sum(length**2 for length in lengths) / sum(lengths)
    peak = None if use_cpu else torch.cuda.max_memory_allocated() / 1e9
    reserved = None if use_cpu else torch.cuda.max_memory_reserved() / 1e9
    product = product_rate(shape, use_cpu)
    flops = useful * flops_a_token(shape, trained / useful, context, TARGETS[rung["targets"]])
    return {
        "model": name, "shape": [shape["model_type"], shape["hidden_size"], shape["num_hidden_layers"]],
        "variant": rung_name, "ours": rung["kind"] == "ours", "method": rung["method"],
        "checkpointing": rung["checkpointing"], "settings": rung, "micro_batch": rows_a_step,
        "max_length": args.max_length, "targets": TARGETS[rung["targets"]], "steps": timed, "gpu": device_name(),
        "date": date.today().isoformat(), "seconds": seconds,
        "seconds_to_load": ready - began,
        "useful_tokens_per_second": useful / seconds, "trained_tokens_per_second": trained / seconds,
        "padding": 1 - useful / seen, "mfu": flops / seconds / product, "product_tflops": product / 1e12,
        "peak_allocated_gb": peak, "peak_reserved_gb": reserved, "predicted_gb": gigabytes,
        "losses": losses, "batch": batch, "versions": versions(),
    }  # fmt: skip


def check_packed(shape, tokens: int) -> None:
    """Raise where a micro-batch of that shape is not one row that is nearly full: what unpacks its rows without a word
    is not measured beside what does not."""
    if shape[0] != 1 or not tokens / 2 < shape[1] <= tokens:
        raise RuntimeError(f"not packed: a micro-batch of {list(shape)} in the place of one row of up to {tokens}")


def flops_a_token(shape: dict, labelled: float, context: float, targets: list[str] = TARGETS["all linear"]) -> float:
    """What cannot be saved with a frozen base: forward and the gradient of activations, 2 FLOPs a weight each, the
    head's for labelled tokens alone; three passes through the adapter (r 16, on `targets`); causal attention over
    documents of `context` tokens as a token meets them, forward once and backward twice."""
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = dict.fromkeys(("q_proj", "o_proj"), (hidden, hidden))
    sizes |= dict.fromkeys(("k_proj", "v_proj"), (hidden, keys))
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (hidden, inner))
    linear = layers * sum(a * b for a, b in sizes.values())
    adapter = layers * 16 * sum(sum(sizes[name]) for name in targets)
    attention = 2 * context * hidden * layers
    return 4 * linear + 4 * hidden * shape["vocab_size"] * labelled + 6 * adapter + 3 * attention


def product_rate(shape: dict, use_cpu: bool) -> float:
    """FLOPs a second of bfloat16 matrix products at the model's own largest shape."""
    import torch

    device, tokens, rounds = ("cpu", 256, 3) if use_cpu else ("cuda", 8192, 50)
    a = torch.randn(tokens, shape["hidden_size"], device=device, dtype=torch.bfloat16)
    b = torch.randn(shape["hidden_size"], shape["intermediate_size"], device=device, dtype=torch.bfloat16)
    for timed in (False, True):
        if not use_cpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(rounds):
            a @ b
        if not use_cpu:
            torch.cuda.synchronize()
        if timed:
            return 2 * a.numel() * b.shape[1] * rounds / (time.perf_counter() - began)


def predicted(rung: dict, rows: int, longest: int, model: Path, lora, on_gpu: bool) -> float | None:
    """GB that the memory model says, for the rungs of this project; it knows nothing of fused kernels."""
    if rung["kind"] != "ours" or rung["compile"] or rung["liger"]:
        return None
    from transformers import AutoConfig

    from recipes.utils.planning import Step, predict

    step = Step(
        "bfloat16", rung["attention"], rows, longest, rung["packing"], rung["checkpointing"],
        input_cast=rung["cast"], on_gpu=on_gpu,
    )  # fmt: skip
    return predict(AutoConfig.from_pretrained(model), lora, [step])[0][rung["method"]].total / 1e9


def versions() -> dict:
    found = {}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "liger-kernel", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def why_not(rung: dict, unsloth: Path | None) -> str | None:
    """Why a rung cannot run here, or None."""
    import torch

    gpu = torch.cuda.is_available()
    if rung["kind"] == "unsloth" and not (gpu and (unsloth or find_spec("unsloth"))):
        return "Unsloth is not installed, or there is no GPU"
    if rung["attention"] == "flash_attention_2" and not (gpu and find_spec("flash_attn")):
        return "flash-attn is not installed"
    if rung["liger"] and not (gpu and find_spec("liger_kernel")):
        return "liger-kernel is not installed"
    return None


def print_table(runs: list[dict]) -> None:
    """Rungs in order for each model and GPU, with the distance of packed losses from the first of their kind."""
    order = list(RUNGS)
    for model, gpu in dict.fromkeys((run["model"], run["gpu"]) for run in runs):
        ours = [run for run in runs if (run["model"], run["gpu"]) == (model, gpu)]
        ours.sort(key=lambda run: order.index(run["variant"]))
        reference = {}
        print(f"\n{model} on {gpu}, {ours[0]['date']}")
        print(f"{'':44}{'tokens/s':>10}{'MFU':>7}{'peak GB':>9}{'predicted':>11}{'losses differ by':>18}")
        for run in ours:
            comparable = run["ours"] and run["settings"]["packing"] and not run["settings"].get("rows")
            first = reference.setdefault(run["method"], run["losses"]) if comparable else None
            apart = max(abs(a - b) for a, b in zip(run["losses"], first, strict=True)) if comparable else None
            cells = [
                f"{run[key]:.1f}" if run[key] is not None else "-" for key in ("peak_allocated_gb", "predicted_gb")
            ]
            print(
                f"{run['variant']:44}{run['useful_tokens_per_second']:10,.0f}{run['mfu']:7.1%}"
                + f"{cells[0]:>9}{cells[1]:>11}"
                + (f"{apart:18.1e}" if apart is not None else f"{'-':>18}")
                + ("  TOO MUCH: it computes something else" if apart and apart > LOSSES_APART else "")
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=SHAPES)
    parser.add_argument("--only", nargs="+", choices=RUNGS, metavar="RUNG", help="these rungs, measured already or not")
    parser.add_argument("--minutes", type=float, default=7, help="no rung is begun after so long (7)")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/train_gpu"), help="where the model is made")
    parser.add_argument("--unsloth", type=Path, help="a folder with Unsloth and the versions that it wants")
    parser.add_argument("--micro-batch", type=int, help="rows a micro-batch (2 packed, 8 padded)")
    parser.add_argument("--log", type=Path, help="a file that gets what the rungs' processes say")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are kept and merged")
    parser.add_argument("--table", action="store_true", help="only print what is kept")
    parser.add_argument("--profile", nargs="*", metavar="RUNG", help="rungs whose kernels go into the log")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--hold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once == "make":
        make_model(options.model, options.folder)
        return
    if options.once:
        hold, folder = sys.stdin.readline if options.hold else None, options.folder / options.model
        profiled = options.profile is not None
        record = measure(options.model, options.once, folder, options.micro_batch, hold=hold, profiled=profiled)
        print(json.dumps(record))
        return
    kept = json.loads(options.json.read_text()) if options.json.exists() else {}
    runs, failed = kept.get("runs", []), kept.get("failed", [])
    if not options.table:
        began = time.monotonic()
        if not (options.folder / options.model / "done").exists():  # in a process of its own: it fills the GPU
            ask(options, "--once", "make", check=True)
        gpu = device_name()
        done = {run["variant"] for run in runs if (run["model"], run["gpu"]) == (options.model, gpu)}
        rungs = []
        for name in options.only or [name for name in RUNGS if name not in done]:
            reason = why_not({**DEFAULTS, **RUNGS[name]}, options.unsloth)
            if reason:
                print(f"left out: {name}: {reason}", flush=True)
            else:
                rungs.append(name)
        left = []
        for name, following in zip(rungs, [*rungs[1:], None], strict=True):
            if time.monotonic() - began > options.minutes * 60:
                left.append(name)
                continue
            seconds = (options.minutes + GRACE) * 60 - (time.monotonic() - began)
            record = one_process(name, options, seconds, following)
            same = (options.model, name, gpu)
            failed = [run for run in failed if (run["model"], run["variant"], run["gpu"]) != same]
            if "failed" in record:
                failed.append({"model": options.model, "variant": name, "gpu": gpu, **record})
            else:
                runs = [run for run in runs if (run["model"], run["variant"], run["gpu"]) != same] + [record]
            options.json.parent.mkdir(parents=True, exist_ok=True)
            whole = {"runs": runs} | ({"failed": failed} if failed else {})
            beside = options.json.with_suffix(".new")
            beside.write_text(json.dumps(whole, indent=1) + "\n")
            beside.replace(options.json)
        for process in WAITING.values():
            process.kill()
        print(f"\nto do: {', '.join(left)}: call again" if left else "\nall rungs that can run here are done")
    print_table(runs)


WAITING = {}  # rung: its process, which has done its imports and waits for a line


def one_process(name: str, options, seconds: float, following: str | None = None) -> dict:
    """The record of a rung that ran in a process of its own, or {"failed": why} where it failed or took too long: the
    next still runs. The imports of the rung `following` are done meanwhile."""
    print(f"{name} ...", flush=True)
    began, seconds = time.monotonic(), max(60, seconds)
    process = WAITING.pop(name, None) or start(name, options)
    if following:
        WAITING[following] = start(following, options)
    why = None
    try:
        process.communicate("go\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        why = f"not done after {seconds:.0f} s"
    output, errors = (Path(file.name).read_text(errors="replace") for file in process.files)
    if options.log:
        with options.log.open("a") as log:
            log.write(f"==== {options.model}, {name}: {time.monotonic() - began:.0f} s\n{output}{errors}\n")
    record = [line for line in output.splitlines() if line.startswith('{"model"')]  # others may print after it
    if not record and not why:
        why = next((line for line in reversed(errors.splitlines()) if line.strip()), f"ended with {process.returncode}")
    if why:
        print(f"failed: {name}: {why}\n{errors[-2000:]}", flush=True)
        return {"failed": why, "date": date.today().isoformat()}
    record = json.loads(record[-1])
    print(
        f"    {record['useful_tokens_per_second']:,.0f} useful tokens/s, {time.monotonic() - began:.0f} s", flush=True
    )
    return record


def start(name: str, options) -> subprocess.Popen:
    """The process of a rung, which waits for a line when its imports are done."""
    words = ["--micro-batch", str(options.micro_batch)] if options.micro_batch else []
    words += ["--profile"] if name in (options.profile or ()) else []
    files = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  (pipes that nobody reads fill up)
    process = ask(
        options, "--once", name, "--hold", *words, unsloth="Unsloth" in name, call=subprocess.Popen,
        stdin=subprocess.PIPE, stdout=files[0], stderr=files[1],
    )  # fmt: skip
    process.files = files
    return process


def ask(options, *words: str, unsloth=False, call=subprocess.run, **how):
    """Run this script again with `words`, offline: TRL and Unsloth would report what they are used for. Unsloth in its
    own folder sees nothing of a PYTHONPATH, which may hold versions that are too new for it."""
    own = options.unsloth if unsloth else None
    path = [own, ROOT, None if own else os.environ.get("PYTHONPATH")]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(str(part) for part in path if part)}
    command = [sys.executable, __file__, options.model, *words, "--folder", str(options.folder)]
    return call(command, env=environment, text=True, **how)


if __name__ == "__main__":
    main()
