"""Adapter into base, tensor by tensor: the weights are read, changed and written piece by piece, never all in memory.

It is planned from headers and configs alone, so that what cannot be done is refused before the first byte is written.
Each number is `base + scale · alpha/r · B·A`, added in float32 and rounded once to the base's own dtype: bit for bit
what PEFT's merge_and_unload(safe_merge=False) gives with a float32 adapter. The rest is copied as bytes. Each core has
a tensor of its own and makes B·A of a few rows at a time. bitsandbytes, slow to import, is imported where it is used.
"""

import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from recipes.utils.console import UserError, out, say, time_limit
from recipes.utils.files import read_json, sync_path, write_json
from recipes.utils.merge.export import check_space
from recipes.utils.model import (
    CHANGE_THE_BASE,
    ModelOptions,
    check_fit,
    load_onto,
    model_config,
    peft_key,
    read_adapter_config,
)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
INDEX = "model.safetensors.index.json"
PIECE = 1 << 18  # numbers at a time: few enough to stay in a core's cache from the product to the write
FEWEST_ROWS = 16  # in a piece: a product of fewer rows than 4 is summed up in another order, to other bits
MOST_WORKERS = 8  # more would wait for the disk
QUANTISED_PIECE = 1 << 22  # numbers at a time: quantising takes several float32 copies of what it is given
SECONDS = 60  # for an adapter's patterns
LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
BLOCK = 64  # numbers that share a constant in 4 bit: what bitsandbytes.nn.Linear4bit takes
# Fields of LoraConfig that are handled here or say nothing about the weights; with any other one set, PEFT merges.
UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip
PARTS = r"lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?"


class NotStreamable(Exception):
    """Why an adapter has to be merged by PEFT, in memory."""


class Stored(NamedTuple):
    """Where a tensor lies in a safetensors file: `size` bytes from `start`."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: list[int]


class Plan(NamedTuple):
    """The files to write, each with the base's tensors in order; `untied`: the head is no longer the embedding."""

    files: dict[str, dict[str, Stored]]
    changes: dict[str, tuple[dict[str, Stored], float]]  # by tensor: the adapter's parts for it, and their scaling
    shards: dict | None  # the content of the index
    untied: bool
    dtype: str
    size: int  # bytes of all tensors


def merge_weights(record: dict, base: Path, adapter: Path, output: Path, kind: str, scale: float) -> tuple[bool, str]:
    """`stream_merge`, or for an adapter that is no plain LoRA the same by PEFT, with the whole base in memory."""
    try:
        return stream_merge(record, base, adapter, output, kind, scale)
    except NotStreamable as reason:
        if kind == "dequantized":
            raise UserError(f"--base dequantized: {reason}, which only PEFT merges, into --base original") from None
        say(f"merging through PEFT, with the whole model in memory: {reason}")
    return merge_in_memory(record, base, adapter, output)


def merge_in_memory(record: dict, base: Path, adapter: Path, output: Path) -> tuple[bool, str]:
    """As `stream_merge`, with the whole base in memory; `output` holds configs too, which are to be written anew."""
    check_fit(adapter, base, ModelOptions(**record["model"]))

    def sums(model) -> dict[str, float]:  # a change moves them, and where something is not finite, neither are they
        return {name: tensor.sum(dtype=torch.float64).item() for name, tensor in model.state_dict().items()}

    trust = record["model"].get("trust_remote_code", False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True, trust_remote_code=trust)
    tied, dtype, before = model.config.tie_word_embeddings, model.dtype, sums(model)
    settings, head = read_adapter_config(adapter), model.get_output_embeddings()
    if tied and not settings.get("trainable_token_indices") and not settings.get("ensure_weight_tying"):
        model.config.tie_word_embeddings = False  # what the adapter does to the embedding it does not do to the head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    merged = load_onto(model, adapter).merge_and_unload(safe_merge=False).to(dtype)
    untied = tied and not torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)
    merged.config.tie_word_embeddings = tied and not untied
    merged.tie_weights()
    after = sums(merged)
    if wrong := [name for name, total in after.items() if not math.isfinite(total)]:
        raise UserError(f"{wrong[0]}: the merged weights are not finite; the adapter is broken, or {dtype} too small")
    if before == after:
        raise UserError("the adapter changes no weight: is it trained?")
    check_space(output, sum(tensor.nbytes for tensor in merged.state_dict().values()))
    merged.save_pretrained(output)
    for path in output.glob("*.safetensors"):  # which the library lets nobody else read
        path.chmod((output / "config.json").stat().st_mode)
    return untied, str(dtype).removeprefix("torch.")


def stream_merge(record: dict, base: Path, adapter: Path, output: Path, kind: str, scale: float) -> tuple[bool, str]:
    """Write the merged weights into the folder `output`; returns (the head is untied now, the weights' dtype). `kind`:
    `dequantized` is the base as the Q-LoRA run of `record` saw it. Raises as `check_space`, planning and writing do."""
    plan = plan_merge(base, adapter, scale)
    check_space(output, plan.size)
    write_merge(plan, output, RoundTrip(record, base) if kind == "dequantized" else None)
    return plan.untied, plan.dtype


def plan_merge(base: Path, adapter: Path, scale: float = 1.0) -> Plan:
    """What is to be written, from headers alone. Raises `NotStreamable` for what only PEFT can merge, and `UserError`
    for a base whose weights are quantised, an adapter of another base, or a file that is not whole."""
    base_config, config = read_json(base / "config.json"), read_adapter_config(adapter)
    if "quantization_config" in base_config:
        needed = "the model that it was made from is needed as base"
        why = "its weights are quantised, and merging there would round the adapter away"
        raise UserError(f"{base}: {why}; {needed}: --base-model PATH_OR_NAME")
    if config["peft_type"] != "LORA":
        raise NotStreamable(f"the adapter is {config['peft_type']}, not LoRA")
    if str(config.get("init_lora_weights")).startswith(CHANGE_THE_BASE):
        raise NotStreamable(f"{config['init_lora_weights']} changed the base when it began")
    if other := [key for key, value in config.items() if value and key not in UNDERSTOOD]:
        raise NotStreamable(f"the adapter has {other[0]} set")
    files, index = read_weights(base)
    shard_of = {name: file for file, tensors in files.items() for name in tensors}
    changes = _changes(adapter)
    if any({"lora_embedding_A", "lora_magnitude_vector"} <= set(parts) for parts in changes.values()):
        raise NotStreamable("the adapter has DoRA on an embedding")
    tied = base_config.get("tie_word_embeddings") or "lm_head.weight" not in shard_of
    untied = bool(tied) and any(name == "lm_head.weight" or name.endswith("embed_tokens.weight") for name in changes)
    if untied:  # the head is written apart, from what the embedding was
        embedding = next((name for name in shard_of if name.endswith("embed_tokens.weight")), None)
        if embedding is None:
            raise NotStreamable("the base's embedding has no known name")
        shard = shard_of["lm_head.weight"] = shard_of[embedding]
        files[shard]["lm_head.weight"] = files[shard][embedding]
        if index:
            index["weight_map"]["lm_head.weight"] = shard
    targets = config.get("target_modules") or ""
    by_choice = config.get("layers_to_transform") or config.get("exclude_modules") or isinstance(targets, str)
    by_choice = by_choice or any("." in name for name in targets)
    if not by_choice and _some_layers_only(changes, shard_of):
        raise NotStreamable("the adapter has nothing for some of the base's layers")  # PEFT knows whether it has to
    for name, parts in changes.items():
        if name not in shard_of:
            raise NotStreamable(f"the base's file has no {name}")
        if ("lora_A" in parts) != ("lora_B" in parts):
            raise NotStreamable(f"the adapter has half of what belongs to {name}")
        source = files[shard_of[name]][name]
        if source.dtype not in DTYPES:
            raise UserError(f"{base}: {name} is {source.dtype}; a base in 16 or 32 bit is needed")
        if "lora_A" in parts and [parts["lora_B"].shape[0], parts["lora_A"].shape[1]] != source.shape:
            product = f"{parts['lora_B'].shape} · {parts['lora_A'].shape}: the adapter belongs to another base"
            raise UserError(f"{base}: {name} is {source.shape} and the adapter's part for it {product}")
        if "full" in parts and parts["full"].shape != source.shape:
            if parts["full"].shape[1:] == source.shape[1:]:
                raise NotStreamable("its vocabulary was resized")
            shapes = f"{name} is {source.shape} and the adapter's {parts['full'].shape}"
            raise UserError(f"{base}: {shapes}: the adapter belongs to another base")
    with time_limit(SECONDS, UserError(f"{adapter}: a regular expression of its patterns does not end")):
        scaled = {name: (parts, _scaling(config, name, parts, scale)) for name, parts in changes.items()}
    every = [stored for tensors in files.values() for stored in tensors.values()]
    dtype = max(DTYPES, key=lambda dtype: sum(stored.size for stored in every if stored.dtype == dtype))
    return Plan(files, scaled, index, untied, str(DTYPES[dtype]).removeprefix("torch."), sum(one.size for one in every))


def read_weights(folder: Path) -> tuple[dict[str, dict[str, Stored]], dict | None]:
    """({file name: its tensors}, the index of a sharded model). By the index: a folder may hold other weights too.
    Raises `UserError` without safetensors, or where it names files outside the folder: merged ones get these names."""
    path, alone = folder / INDEX, folder / "model.safetensors"
    if not path.is_file() and not alone.is_file():
        raise UserError(f"{folder}: has no safetensors weights; pickled ones are not loaded, since they can run code")
    if not path.is_file():
        return {alone.name: read_header(alone)}, None
    content = read_json(path)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{path}: names no weights (weight_map); download it again")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{path}: names {name!r}, which is no safetensors file of its folder")
    return {name: read_header(folder / name) for name in sorted(set(shards.values()))}, content


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, in the order in which they lie there. Raises `UserError` if it is not there,
    or not whole: one that was cut in a copy looks whole from its header."""
    try:
        with open(path, "rb") as file:
            size, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size, LONGEST_HEADER)))
        header.pop("__metadata__", None)
        found = []
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            found.append((name, Stored(path, 8 + length + start, end - start, entry["dtype"], entry["shape"])))
        missing = max(stored.start + stored.size for _, stored in found) - size
        if not 0 < missing < 1 << 60:
            with safe_open(path, "pt"):  # its own checks: offsets, shapes, types
                pass
    except FileNotFoundError:
        raise UserError(f"{path}: is not there, though the index of its folder names it; copy it again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        raise UserError(f"{path}: is no safetensors file; copy or download it again") from None
    if missing > 0:
        raise UserError(f"{path}: its last {missing:,} bytes are missing; copy or download it again")
    return dict(sorted(found, key=lambda pair: pair[1].start))


def _changes(adapter: Path) -> dict[str, dict[str, Stored]]:
    """Base tensor name -> what the adapter holds for it, by part: lora_A, ..., or `full` for a whole tensor."""
    changes: dict[str, dict[str, Stored]] = {}
    for key, stored in read_header(adapter / "adapter_model.safetensors").items():
        name, part = peft_key(key).removeprefix("base_model.model.").replace(".base_layer.", "."), "full"
        if match := re.fullmatch(rf"(.*)\.({PARTS})", name):
            module, part = match.groups()
            name = f"{module}.bias" if part == "lora_B.bias" else f"{module}.weight"
        changes.setdefault(name, {})[part.removesuffix(".weight")] = stored
    return changes


def _some_layers_only(changes: Iterable[str], weights: Iterable[str]) -> bool:
    """Whether some layers of the base have `weights` of the kinds that are changed, and are not changed."""

    def numbers(names) -> dict[str, int]:
        return Counter(re.sub(r"\.\d+\.", ".N.", name) for name in names)

    own, there = numbers(changes), numbers(weights)
    return any(own[kind] < there[kind] for kind in own)


def _scaling(config: dict, name: str, parts: dict[str, Stored], scale: float) -> float:
    """scale · alpha / r (or / √r), alpha by the first pattern that fits the module's name, as PEFT matches it."""
    module = name.rpartition(".")[0]

    def by_pattern(key: str, default: str):
        patterns = config.get(key) or {}
        return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", module)), config[default])

    down = parts.get("lora_A") or parts.get("lora_embedding_A")
    rank = down.shape[0] if down else by_pattern("rank_pattern", "r")
    return scale * by_pattern("alpha_pattern", "lora_alpha") / (math.sqrt(rank) if config.get("use_rslora") else rank)


class RoundTrip:
    """The `base` as the Q-LoRA run of `record` saw it: which weights went through NF4 (`names`), and how (`apply`)."""

    def __init__(self, record: dict, base: Path):
        from bitsandbytes.nn import Linear4bit
        from transformers.quantizers import AutoHfQuantizer

        options = ModelOptions(**record["model"])
        self.config, self.dtype = BitsAndBytesConfig(**record["quantization"]), getattr(torch, options.dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config(base, options))
        # transformers decides which layers stay as they are (the head, and what the config skips), so it is asked
        AutoHfQuantizer.from_config(self.config).preprocess_model(model=model, dtype=self.dtype, device_map={"": "cpu"})
        self.names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)}

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` quantised and dequantised, in the precision that the run held the base in; may be done in its place.
        Equal to the live model's: blocks are independent, so go piece by piece; quantised constants go all together."""
        from bitsandbytes import functional

        device = "cuda" if torch.cuda.is_available() else "cpu"  # as the run, which rounds as it does, and faster
        kind, flat = self.config.bnb_4bit_quant_type, weight.reshape(-1).to(device, self.dtype)
        pieces = flat.split(QUANTISED_PIECE)
        packed = [functional.quantize_4bit(piece, blocksize=BLOCK, quant_type=kind) for piece in pieces]
        constants = torch.cat([state.absmax for _, state in packed])
        if self.config.bnb_4bit_use_double_quant:
            mean = constants.mean()
            constants = functional.dequantize_blockwise(*functional.quantize_blockwise(constants - mean, blocksize=256))
            constants = (constants + mean).float()
        for piece, (codes, state), own in zip(pieces, packed, constants.split(QUANTISED_PIECE // BLOCK), strict=True):
            state.absmax = own.contiguous()
            piece.copy_(functional.dequantize_4bit(codes, state).view(-1))  # in place: one copy is enough
        return flat.view(weight.shape).to(weight.device)


def write_merge(plan: Plan, output: Path, round_trip: RoundTrip | None = None) -> None:
    """Write the planned files into the folder `output`, synced. With `round_trip` the base is first made what it was in
    4 bit, a whole tensor at a time. Raises `UserError` if a merged weight is not finite, or none is another now."""
    changed, threads = 0, torch.get_num_threads()
    torch.set_num_threads(1)  # threads that share a piece this small wait longer for each other than they compute
    try:
        with ThreadPoolExecutor(1 if round_trip else min(threads, MOST_WORKERS)) as pool:
            for name, tensors in plan.files.items():
                path, count = output / name, len(tensors)
                write = partial(_write_tensor, path, plan, round_trip)
                done = pool.map(write, tensors, tensors.values(), _write_header(path, tensors))
                changed += sum(track(done, f"merging {name}", count, console=out, disable=not sys.stdout.isatty()))
                sync_path(path)
    finally:
        torch.set_num_threads(threads)
    if plan.shards:
        plan.shards.setdefault("metadata", {})["total_size"] = plan.size
        write_json(output / INDEX, plan.shards)
    if not changed:
        raise UserError("the adapter changes no weight: is it untrained, or the scale too small for the base's dtype?")


def _write_header(path: Path, tensors: dict[str, Stored]) -> list[int]:
    """Begin the safetensors file `path`; returns where in it each of `tensors` has its place."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    places = list(itertools.accumulate((stored.size for stored in tensors.values()), initial=0))
    for (name, stored), span in zip(tensors.items(), itertools.pairwise(places), strict=True):
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as readers that map the file expect
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return [8 + len(text) + place for place in places[:-1]]


def _write_tensor(path: Path, plan: Plan, trip: RoundTrip | None, name: str, source: Stored, place: int) -> bool:
    """Write one tensor into the file `path` at `place`, piece by piece; True if the adapter changed it."""
    parts, scaling = plan.changes.get(name, ({}, 0.0))
    with open(path, "r+b", buffering=0) as file:
        file.seek(place)
        trip = trip if trip and name in trip.names else None
        if not parts and not trip:
            raw = source._replace(dtype="U8", shape=[source.size])
            for start in range(0, source.size, 4 * PIECE):
                _write(file, _load(raw, slice(start, start + 4 * PIECE)))
            return False
        whole = trip.apply(_load(source)).to(DTYPES[source.dtype]) if trip else None
        add, changed = _adding(parts, scaling), False
        count = -(-source.shape[0] // max(FEWEST_ROWS, PIECE // math.prod(source.shape[1:])))
        edges = [source.shape[0] * number // count for number in range(count + 1)]  # of pieces of nearly equal length
        for rows in itertools.starmap(slice, itertools.pairwise(edges)):
            new = old = _load(source, rows) if whole is None else whole[rows]
            if "full" in parts:
                new = _load(parts["full"], rows).to(old.dtype)
            new = add(rows, new) if add else new
            changed = changed or (new is not old and not torch.equal(new, old))
            if not new.sum(dtype=torch.float32).isfinite():
                why = f"the adapter is broken, or {new.dtype} too small"
                raise UserError(f"{name}: the merged weights are not finite; {why}")
            _write(file, new)
        if hasattr(os, "posix_fadvise"):  # let the disk begin now, and not at the fsync
            os.posix_fadvise(file.fileno(), place, source.size, os.POSIX_FADV_DONTNEED)
    return changed


def _adding(parts: dict[str, Stored], scaling: float) -> Callable[[slice, torch.Tensor], torch.Tensor] | None:
    """A function of some rows and the numbers there, which returns these with the adapter's added; None without one."""
    if "lora_B.bias" in parts:
        bias = _load(parts["lora_B.bias"]).float() * scaling
        return lambda rows, old: (old + bias[rows]).to(old.dtype)
    form = next((form for form in ("lora_{}", "lora_embedding_{}") if form.format("A") in parts), None)
    if form is None:
        return None
    up, down = (_load(parts[form.format(side)]).float() for side in "BA")
    magnitude = _load(parts["lora_magnitude_vector"]).float() if "lora_magnitude_vector" in parts else None

    def add(rows: slice, old: torch.Tensor) -> torch.Tensor:
        new = up[rows] @ down if form == "lora_{}" else (up @ down[:, rows]).T
        new.mul_(scaling).add_(old)
        if magnitude is not None:
            new *= (magnitude[rows] / torch.linalg.norm(new, dim=1)).view(-1, 1)
        return new.to(old.dtype)

    return add


def _load(stored: Stored, rows: slice = slice(None)) -> torch.Tensor:
    """A tensor, or some of its rows."""
    first, last, _ = rows.indices(stored.shape[0])
    tensor = torch.empty((last - first, *stored.shape[1:]), dtype=(DTYPES | {"U8": torch.uint8})[stored.dtype])
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    with open(stored.file, "rb", buffering=0) as file:
        file.seek(stored.start + first * (stored.size // stored.shape[0]))
        while view:  # one call reads at most 2 GB
            if not (count := file.readinto(view)):
                raise UserError(f"{stored.file}: became shorter while it was read")
            view = view[count:]
    return tensor


def _write(file, tensor: torch.Tensor) -> None:
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    while view:  # a full disk may take a part and refuse the rest
        view = view[file.write(view) :]
