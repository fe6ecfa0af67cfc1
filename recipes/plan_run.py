"""What this machine can run; will this config fit, and how long will it take. No weights are read.

    python recipes/plan_run.py                                              what this machine can run
    python recipes/plan_run.py configs/mistral.yaml                         what fits this machine's GPU
    python recipes/plan_run.py configs/qwen2.yaml --qlora --gpu "RTX 4090"  what fits another
    python recipes/plan_run.py configs/mistral.yaml --gpu H100 --price 2.5  hours and cost, at 2.50 an hour

The memory is worked out from the model's own config and the run's settings; any key can be given as a flag, as to the
recipes. Speed is told where it was measured, on the GPU that is named; elsewhere give --tokens-per-second.
"""

import os
import sys
from argparse import ArgumentParser

from recipes.utils.console import CommandLine, UserError, first_look, out, print_table, recipe_parser, run_main, say


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, such as configs/mistral.yaml")
    parser.add_argument("--gpu", metavar="GPU", help="the GPU to plan for: 24GB, or a name; this machine's without it")
    parser.add_argument("--qlora", action="store_true", help="plan for sft_qlora.py: its flags and its speed")
    parser.add_argument("--price", type=float, metavar="N", help="of the GPU, an hour: what the training costs")
    speed = "train tokens a second, where the GPU's speed was not measured; a run prints it"
    parser.add_argument("--tokens-per-second", type=float, metavar="N", help=speed)
    return parser


if __name__ == "__main__":  # --help and slips are answered before the imports below, which take seconds
    given = first_look(command_line(), data_files=False)

from trl import SFTConfig

import recipes.utils.planning as planning
from recipes.utils.config import Config, read_config
from recipes.utils.model import find_base, model_config


def plan_run(config: Config, gpu=None, price: float | None = None, tokens_per_second: float | None = None) -> None:
    """Print memory by part, what fits `gpu` (a name, or a size such as 24GB), the flags to paste and the speed; with
    `price` an hour, or with the user's own `tokens_per_second`, also hours and cost of the run, a curve and a sweep."""
    for flag, value in {"--price": price, "--tokens-per-second": tokens_per_second}.items():
        if value is not None and not value > 0:
            raise UserError(f"{flag}: a number above 0")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        say("memory: not predicted under FSDP")
        return

    # 1. The GPU, the model's shape, and the sizes of a micro-batch that come into question.
    available, name = planning.memory_of_gpu(gpu)
    shape = model_config(find_base(config.model, weights=False), config.model)
    config, attention, dtype_flag = planning.on_gpu(config, shape, gpu, name)
    args = SFTConfig(**config.training)
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    sizes = sorted({size for size in (1, 2, 4, 8) if a_step % size == 0} | {args.per_device_train_batch_size})

    # 2. Their memory, for both methods, with and without activation checkpointing.
    try:
        memory = planning.memory_of_steps(config, shape, attention, sizes)
    except Exception as error:  # a model or an adapter of another kind: that is no reason not to train it
        say("memory: not predicted for this model: " + str(error).partition("\n")[0])
        return
    say(f"{config.model.name_or_path}, {config.model.dtype}, attention {attention}\n")
    if args.use_liger_kernel:
        say("Liger's kernels are not known to what follows; with them a step takes less, a fifth on one H100\n")
    planning.print_memory(memory, args, name, available)

    # 3. What to run, also on a base in 4 bit where a 16-bit one has no room.
    for method in dict.fromkeys((config.method, "qlora")):
        room = {key[1:] for key, peak in memory.items() if key[0] == method and planning.fits(peak, available)}
        rows, checkpointing = planning.choose(sizes, args.max_length, room)
        fit = (checkpointing, rows) in room
        peak = memory[(method, checkpointing, rows)].total
        plan: dict[str, object] = {"fits" if fit else "does not fit": f"{peak / 1e9:.1f} GB"}
        if fit:
            batch = f"per_device_train_batch_size {rows} --training.gradient_accumulation_steps {a_step // rows}"
            recompute = f"gradient_checkpointing {str(checkpointing).lower()}"
            plan["flags"] = f"--training.{batch} --training.{recompute}{dtype_flag}"
            plan["speed"], measured = planning.measured_speed(config, shape, method, name, checkpointing)
        print_table(f"\n{config.name} · {method}", plan)
        if fit and (price or tokens_per_second):
            why = str(plan["speed"]).partition(";")[0]
            tokens = planning.trained_tokens(config, args)
            print_table("\non one GPU", planning.price_table(tokens, tokens_per_second or measured, price, why))
        if fit:
            break


def main(given: CommandLine) -> None:
    gpu, qlora, money = (given.options[name] for name in ("gpu", "qlora", "price"))
    speed = given.options["tokens_per_second"]
    if given.options["config"]:
        plan_run(read_config(given, "qlora" if qlora else "lora"), gpu, money, speed)
    elif given.flags or gpu or qlora or money or speed:
        command_line().error("name a CONFIG")
    else:
        for state, what, text in planning.check_machine():
            out.print(f"{state:9}{what:18}{text}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_main(main, given))
