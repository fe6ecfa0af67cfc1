"""Adapter into base, tensor by tensor: the weights are read, changed and written piece by piece, never all in memory.

Each number is `base + scale · alpha/r · B·A`, added in float32 and rounded once to the base's own dtype: bit for bit what
PEFT's merge_and_unload(safe_merge=False) gives with the adapter in float32. What the adapter does not touch is copied as
bytes. Each core takes a tensor of its own, and B·A is made a few rows at a time: no tensor is ever held in float32.
"""

import contextlib
import itertools
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recipes.utils.console import UserError, out
from recipes.utils.export import check_space
from recipes.utils.merge_plan import DTYPES, Plan, Stored, Target, plan_merge
from recipes.utils.round_trip import RoundTrip

import torch
from rich.progress import track

PIECE = 1 << 18  # numbers at a time: few enough to stay in a core's cache from the product to the write
FEWEST_ROWS = 16  # in a piece: a product of fewer rows than 4 is summed up in another order, to other bits
MOST_WORKERS = 8  # more would wait for the disk


def stream_merge(record: dict, base: Path, adapter: Path, output: Path, kind: str, scale: float) -> tuple[bool, str]:
    """Write the merged weights into the folder `output`; returns (the head is untied now, the weights' dtype).

    `kind` is `original`, or `dequantized` for the base as the Q-LoRA run of `record` saw it.

    Raises:
        NotStreamable: before anything is written, for what only PEFT can merge.
        UserError: if there is too little disk, or as `write_merge` says.
    """
    plan = plan_merge(base, adapter, scale)
    check_space(output, plan.size)
    write_merge(plan, output, RoundTrip(record) if kind == "dequantized" else None)
    return plan.untied, plan.dtype


def write_merge(plan: Plan, output: Path, round_trip: RoundTrip | None = None) -> int:
    """Write the planned files into the folder `output`, synced; returns how many tensors are not as they were.

    With `round_trip` (utils/round_trip.py) the base is first made what it was in 4 bit, one whole tensor at a time.

    Raises:
        UserError: if a merged weight is not finite, or none differs from the base's.
    """
    changed = 0
    with _one_thread_each() as cores, ThreadPoolExecutor(1 if round_trip else min(cores, MOST_WORKERS)) as pool:
        for file_name, tensors in plan.files.items():
            path = output / file_name
            places = _write_header(path, tensors)
            count = len(tensors)
            done = pool.map(_write_tensor, tensors, tensors.values(), places, [path] * count, [round_trip] * count)
            changed += sum(track(done, f"merging {file_name}", count, console=out, disable=not sys.stdout.isatty()))
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if plan.index:
        plan.index.setdefault("metadata", {})["total_size"] = plan.size
        (output / "model.safetensors.index.json").write_text(json.dumps(plan.index, indent=2) + "\n", encoding="utf-8")
    if not changed:
        raise UserError(
            "the adapter changes no weight: is it trained, and is the scale large enough for the base's dtype?"
        )
    return changed


@contextlib.contextmanager
def _one_thread_each():
    """Yield how many threads torch had, having given it one: for pieces this small, threads that share one take longer
    to wait for each other than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _write_header(path: Path, tensors: dict[str, Target]) -> list[int]:
    """Begin the safetensors file `path`; returns where in it each of `tensors` has its place."""
    header, places, place = {"__metadata__": {"format": "pt"}}, [], 0
    for name, (source, _, _) in tensors.items():
        header[name] = {"dtype": source.dtype, "shape": source.shape, "data_offsets": [place, place + source.size]}
        places.append(place)
        place += source.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as readers that map the file expect
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return [8 + len(text) + place for place in places]


def _write_tensor(name: str, target: Target, place: int, path: Path, round_trip: RoundTrip | None) -> bool:
    """Write one tensor into the file `path` at `place`, piece by piece; True if the adapter changed it."""
    source, parts, scaling = target
    with open(source.file, "rb", buffering=0) as base, open(path, "r+b", buffering=0) as file:
        base.seek(source.start)
        file.seek(place)
        through_4_bit = round_trip is not None and name in round_trip.names
        if not parts and not through_4_bit:
            for start in range(0, source.size, 4 * PIECE):
                _write(file, _read(base, torch.empty(min(4 * PIECE, source.size - start), dtype=torch.uint8)))
            return False
        whole = round_trip.apply(_load(source)).to(DTYPES[source.dtype]) if through_4_bit else None
        add, changed = _adding(parts, scaling), False
        for here in _pieces(source.shape):
            new = old = _load(source, here) if whole is None else whole[here]
            if "full" in parts:
                new = _load(parts["full"], here).to(old.dtype)
            if add:
                new = add(here, new)
            changed = changed or (new is not old and not torch.equal(new, old))
            if not new.sum(dtype=torch.float32).isfinite():
                raise UserError(
                    f"{name}: the merged weights are not finite; the adapter is broken, or {new.dtype} too small"
                )
            _write(file, new)
        if hasattr(os, "posix_fadvise"):  # let the disk begin now, and not at the fsync
            os.posix_fadvise(file.fileno(), place, source.size, os.POSIX_FADV_DONTNEED)
    return changed


def _pieces(shape: list[int]) -> list[slice]:
    """The rows of a tensor in pieces of nearly equal length."""
    count = -(-shape[0] // max(FEWEST_ROWS, PIECE // math.prod(shape[1:])))
    edges = [shape[0] * number // count for number in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


def _adding(parts: dict[str, Stored], scaling: float):
    """A function of some rows and the numbers there, which returns these with the adapter's added; None without one."""
    if "lora_B.bias" in parts:
        bias = _load(parts["lora_B.bias"]).float() * scaling
        return lambda here, old: (old + bias[here]).to(old.dtype)
    form = next((form for form in ("lora_{}", "lora_embedding_{}") if form.format("A") in parts), None)
    if form is None:
        return None
    up, down = (_load(parts[form.format(side)]).float() for side in "BA")
    magnitude = _load(parts["lora_magnitude_vector"]).float() if "lora_magnitude_vector" in parts else None

    def add(here, old):
        new = up[here] @ down if form == "lora_{}" else (up @ down[:, here]).T
        new.mul_(scaling).add_(old)
        if magnitude is not None:
            new *= (magnitude[here] / torch.linalg.norm(new, dim=1)).view(-1, 1)
        return new.to(old.dtype)

    return add


def _load(stored: Stored, rows: slice = slice(None)) -> torch.Tensor:
    """A tensor, or some of its rows."""
    first, last, _ = rows.indices(stored.shape[0])
    tensor = torch.empty((last - first, *stored.shape[1:]), dtype=DTYPES[stored.dtype])
    with open(stored.file, "rb", buffering=0) as file:
        file.seek(stored.start + first * (stored.size // stored.shape[0]))
        return _read(file, tensor)


def _read(file, tensor: torch.Tensor) -> torch.Tensor:
    """Fill the contiguous `tensor` with the next bytes of `file`."""
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    while view:  # one call reads at most 2 GB
        view = view[file.readinto(view) :]
    return tensor


def _write(file, tensor: torch.Tensor) -> None:
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
    while view:  # a full disk may take a part and refuse the rest
        view = view[file.write(view) :]
