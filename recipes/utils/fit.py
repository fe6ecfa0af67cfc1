"""Does a run fit: the memory model against the memory that is there, and the settings that are left to it."""

import functools
import os

from recipes.utils.config import Config
from recipes.utils.console import UserError, say
from recipes.utils.memory import Memory, predict
from recipes.utils.memory_trace import Step
from recipes.utils.model import load_model_config

import torch
from peft import LoraConfig, PeftConfig
from trl import SFTConfig

# What CUDA, its libraries' workspaces and the allocator's rounding take of a card. An allowance, not measured.
RESERVE = 0.06
ENOUGH = 8192  # tokens a micro-batch; more fill a GPU no better
FEW = 4096  # and with fewer it idles, which recomputing activations costs less than


def memory_there(use_cpu: bool) -> int:
    """Bytes that are free on this process's GPU, or the machine's memory. With several processes, all of the GPU: they
    must come to the same choice."""
    if use_cpu:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free, all_of_it = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))
    return all_of_it if int(os.environ.get("WORLD_SIZE", 1)) > 1 else free


def fits(memory: Memory, there: int) -> bool:
    return memory.total <= there * (1 - RESERVE)


def step_of(config: Config, attention: str, rows: int, checkpointing: bool, on_gpu: bool = True) -> Step:
    """The training step of `config` with `rows` rows a micro-batch."""
    args = SFTConfig(**config.training)
    return Step(
        dtype=config.model.dtype, attention=attention, rows=rows, length=args.max_length, packed=args.packing,
        checkpointing=checkpointing, input_cast=config.model.adapter_input_cast, double_quantisation=config.quantization.get("bnb_4bit_use_double_quant", True),
        optimizer=str(args.optim), on_gpu=on_gpu, processes=int(os.environ.get("WORLD_SIZE", 1)),
    )  # fmt: skip


def lora_of(config: Config) -> LoraConfig:
    """The adapter that the run trains: a new one, or the one that it goes on from."""
    return PeftConfig.from_pretrained(config.model.adapter) if config.model.adapter else LoraConfig(**config.lora)


def settle_memory(config: Config, attention: str) -> dict[str, str]:
    """Decide what the config leaves to memory (`auto`), warn if the run will not fit, and return rows for the run table.

    Sets the micro-batch, the accumulation (their product stays) and activation checkpointing in `config.training`. On a
    CPU nothing is predicted unless something is left to memory.
    """
    training, args = config.training, SFTConfig(**config.training)
    if args.use_cpu and not config.auto:
        return {}
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if config.auto:
            raise UserError("auto: memory is not predicted under FSDP; give the micro-batch and checkpointing")
        return {"memory": "not predicted under FSDP"}
    model_config, lora, there = load_model_config(config.model), lora_of(config), memory_there(args.use_cpu)
    a_step = config.auto.get("rows", args.per_device_train_batch_size * args.gradient_accumulation_steps)
    sizes = _divisors(a_step) if "rows" in config.auto else [args.per_device_train_batch_size]
    ways = [False, True] if "checkpointing" in config.auto else [args.gradient_checkpointing]

    @functools.cache
    def of_both(rows, checkpointing):
        step = step_of(config, attention, rows, checkpointing, on_gpu=not args.use_cpu)
        return predict(model_config, lora, [step])[0]

    def memory(rows, checkpointing, method=config.method):
        return of_both(rows, checkpointing)[method]

    try:
        rows, checkpointing = choose(sizes, ways, args.max_length, lambda *way: fits(memory(*way), there))
        taken = memory(rows, checkpointing)
    except Exception as error:  # a model or an adapter of another kind: that is no reason not to train it
        why = f"not predicted for this model: {str(error).splitlines()[0]}"
        if config.auto:
            raise UserError(f"auto: the memory is {why}; give the micro-batch and checkpointing") from error
        return {"memory": why}
    rows_of_table = {"memory": f"{taken.total / 1e9:.1f} GB predicted, {there / 1e9:.1f} GB there"}
    if config.auto:
        training["activation_checkpointing"] = checkpointing
        training["per_device_train_batch_size"], training["gradient_accumulation_steps"] = rows, a_step // rows
        chosen = [f"{rows} rows a micro-batch"] if "rows" in config.auto else []
        chosen += [f"activation checkpointing {'on' if checkpointing else 'off'}"] * ("checkpointing" in config.auto)
        why = "fits, by the memory model" if fits(taken, there) else "the smallest; it does not fit"
        rows_of_table["auto"] = f"{', '.join(chosen)}: {why}"
    if not fits(taken, there):
        smaller = [(n, True) for n in reversed(_divisors(a_step)) if n <= rows]
        mend = next((way for way in smaller if fits(memory(*way), there)), None)
        say(
            f"warning: the run will probably not fit: {rows_of_table['memory']}; " + _mend(mend, a_step, config, memory)
        )
    return rows_of_table


def choose(sizes: list[int], ways: list[bool], length: int, fit) -> tuple[int, bool]:
    """(rows a micro-batch, activation checkpointing): without checkpointing if a micro-batch of some size fits so, the
    first of `sizes` that has tokens enough or else the largest that fits; the smallest of all if nothing does.

    `fit(rows, checkpointing)` tells; `sizes` are in rising order, `ways` the settings of checkpointing to try in turn.
    """
    best = None
    for checkpointing in ways:
        for rows in sizes:
            if not fit(rows, checkpointing):
                break
            best = rows, checkpointing
            if rows * length >= ENOUGH:
                break
        if best and (best[0] * length >= FEW or best[0] == sizes[-1]):
            break
    return best or (sizes[0], ways[-1])


def flags(rows: int, accumulation: int, checkpointing: bool) -> str:
    """The settings as a command line takes them."""
    return (
        f"--training.per_device_train_batch_size {rows} --training.gradient_accumulation_steps {accumulation} "
        f"--training.gradient_checkpointing {str(checkpointing).lower()}"
    )


def _mend(way, a_step: int, config: Config, memory) -> str:
    if way:
        return f"it fits with {flags(way[0], a_step // way[0], way[1])}"
    if config.method == "lora":
        return f"the smallest micro-batch does not either; recipes/sft_qlora.py takes {memory(1, True, 'qlora').total / 1e9:.1f} GB there"
    return "nor does the smallest micro-batch: a shorter --training.max_length, fewer --lora.target_modules"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
