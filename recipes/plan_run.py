"""What this machine can run; will this config fit, and how long will it take. No weights are read.

    python recipes/plan_run.py                                              what this machine can run
    python recipes/plan_run.py configs/mistral.yaml                         what fits this machine's GPU
    python recipes/plan_run.py configs/qwen2.yaml --qlora --gpu "RTX 4090"  what fits another
    python recipes/plan_run.py configs/mistral.yaml --probe                 three real steps, on the weights

The memory is worked out from the model's own config and the run's settings; any key can be given as a flag, as to the
recipes. Speed is told where it was measured, on the GPU that is named.
"""

import dataclasses
import json
import random
import resource
import sys
import tempfile
from pathlib import Path

from recipes.utils.command_line import ArgumentParser, first_look, parse, recipe_parser


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, such as configs/mistral.yaml")
    parser.add_argument("--gpu", metavar="GPU", help="the GPU to plan for: 24GB, or a name; this machine's without it")
    parser.add_argument("--qlora", action="store_true", help="plan for sft_qlora.py: its flags and its speed")
    parser.add_argument("--probe", action="store_true", dest="probing", help="take three real steps on this machine")
    return parser


if __name__ == "__main__":  # --help and slips are answered before the imports, which take seconds
    first_look(command_line(), data=False)

from recipes.utils.config import Config, load_config
from recipes.utils.config_keys import DataOptions
from recipes.utils.console import out, print_table, run, say
from recipes.utils.fit import choose, fits, flags, lora_of, step_of
from recipes.utils.machine import check_everything
from recipes.utils.memory import predict
from recipes.utils.model import load_model_config
from recipes.utils.plan import WAYS, measured_speed, memory_of_gpu, on_gpu, print_fits, print_parts

import torch
from trl import SFTConfig

PROBE_STEPS = 3


def plan_run(config: Config | None, gpu: str | None = None, probing: bool = False) -> None:
    """Print what the machine can run, or the plan of a run: memory by part, what fits `gpu` (a name, or a size such as
    24GB), the flags to paste and the speed. With `probing`, what three real steps take on this machine."""
    if config is None:
        for check in check_everything():
            out.print(f"{check.state:9}{check.name:18}{check.text}", markup=False, soft_wrap=True)
        return
    if probing:
        print_table(f"probe: {PROBE_STEPS} steps at the longest row", probe(config))
        return

    # 1. The steps that come into question: these rows a micro-batch, with and without activation checkpointing.
    there, name = memory_of_gpu(gpu)
    config, attention, dtype_flag = on_gpu(config, gpu, name)
    args = SFTConfig(**config.training)
    a_step = config.auto.get("rows", args.per_device_train_batch_size * args.gradient_accumulation_steps)
    sizes = sorted({size for size in (1, 2, 4, 8) if a_step % size == 0} | {args.per_device_train_batch_size})
    steps = {(ck, rows): step_of(config, attention, rows, ck) for ck in (True, False) for rows in sizes}

    # 2. Their memory, for both methods.
    found = predict(load_model_config(config.model), lora_of(config), list(steps.values()))
    memory = {(method, *step): both[method] for step, both in zip(steps, found, strict=True) for method in both}
    rows = args.per_device_train_batch_size
    packed = "packed rows" if args.packing else "rows"
    say(f"{config.model.name_or_path}, {config.model.dtype}, attention {attention}\n")
    print_parts(
        f"memory by part, GB: {rows} {packed} of {args.max_length:,} tokens a micro-batch",
        {way: memory[(*way, rows)] for way in WAYS},
    )
    print_fits(name, there, memory, sizes, args.max_length)

    # 3. What to run, also on a base in 4 bit where a 16-bit one has no room.
    for method in dict.fromkeys((config.method, "qlora")):
        rows, checkpointing = choose(
            sizes,
            [False, True],
            args.max_length,
            lambda rows, ck, method=method: fits(memory[(method, ck, rows)], there),
        )
        peak = memory[(method, checkpointing, rows)]
        rows_of_table = {"fits" if fits(peak, there) else "does not fit": f"{peak.total / 1e9:.1f} GB"}
        if fits(peak, there):
            rows_of_table["flags"] = flags(rows, a_step // rows, checkpointing) + dtype_flag
            rows_of_table["speed"] = measured_speed(config, method, name, checkpointing)
        print_table(f"\n{config.name} · {method}", rows_of_table)
        if fits(peak, there):
            break


def probe(config: Config) -> dict[str, str]:
    """Train for three steps on rows as long as they get, in a folder that goes, and say what that took."""
    from recipes.sft_lora import train_lora  # here: a plan has no use for what they import
    from recipes.sft_qlora import train_qlora

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        args, draw = SFTConfig(**config.training), random.Random(0)
        rows = PROBE_STEPS * args.per_device_train_batch_size * args.gradient_accumulation_steps
        with open(data, "w") as file:
            for _ in range(rows):
                answer = " ".join(str(draw.random()) for _ in range(args.max_length))  # cut to max_length
                turns = [{"role": "user", "content": "Numbers?"}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")
        probed = dataclasses.replace(
            config,
            data=DataOptions(train=str(data), over_length="truncate", max_over_length=1.0),
            training={
                **config.training, "output_dir": f"{folder}/run", "max_steps": PROBE_STEPS, "eval_strategy": "no",
                "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none",
            },
        )  # fmt: skip
        on_gpu = torch.cuda.is_available() and not args.use_cpu
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        run_folder = {"lora": train_lora, "qlora": train_qlora}[config.method](probed)
        seconds = json.loads((run_folder / "run.json").read_text())["train"]["train_runtime"]
    tokens = rows * args.max_length
    speed = {"speed": f"{tokens / seconds:,.0f} tokens/s, the first step's warm-up included"}
    if not on_gpu:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        return {"memory": f"{resident:.1f} GB resident at the most, libraries and all", **speed}
    peaks = (torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9)
    return {"memory": "{:.1f} GB allocated at the most, {:.1f} GB reserved".format(*peaks), **speed}


def main(argv: list[str]) -> None:
    options, keys = parse(command_line(), argv)
    gpu, probing = options["gpu"], options["probing"]
    if probing and gpu:
        command_line().error("--probe runs on this machine; leave --gpu out")
    config = None
    if options["config"]:
        config = load_config(options["config"], keys, "qlora" if options["qlora"] else "lora", new_run=False)
    elif keys or gpu or probing or options["qlora"]:
        command_line().error("name a CONFIG")
    plan_run(config, gpu, probing)


if __name__ == "__main__":
    sys.exit(run(main))
