"""Adapter into base, tensor by tensor: the weights are read, changed and written piece by piece, never all in memory.

Each number is `base + scale · alpha/r · B·A`, added in float32 and rounded once to the base's own dtype: bit for bit what
PEFT's merge_and_unload(safe_merge=False) gives with the adapter in float32. What the adapter does not touch is copied as
bytes. The largest thing held is one weight's B·A in float32.
"""

import contextlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recipes.utils.console import UserError
from recipes.utils.export import check_space
from recipes.utils.merge_plan import DTYPES, Plan, Stored, Target, plan_merge
from recipes.utils.round_trip import RoundTrip

import torch

PIECE = 1 << 19  # numbers read, changed and written at a time: few enough to stay in the processor's cache


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

    With `round_trip` (utils/round_trip.py) the base is first made what it was in 4 bit.

    Raises:
        UserError: if a merged weight is not finite, or none differs from the base's.
    """
    changed, space = 0, {}
    with _one_thread(), ThreadPoolExecutor(1) as ahead:
        deltas = _deltas([target for tensors in plan.files.values() for target in tensors.values()], ahead, space)
        for file_name, tensors in plan.files.items():
            header, place = {"__metadata__": {"format": "pt"}}, 0
            for name, (source, _, _) in tensors.items():
                header[name] = {
                    "dtype": source.dtype,
                    "shape": source.shape,
                    "data_offsets": [place, place + source.size],
                }
                place += source.size
            head = json.dumps(header, separators=(",", ":")).encode()
            head += b" " * (-len(head) % 8)  # the data begins at a multiple of 8, as readers that map the file expect
            with open(output / file_name, "wb", buffering=0) as file:
                _write(file, len(head).to_bytes(8, "little") + head)
                for name, target in tensors.items():
                    start = file.tell()
                    changed += _write_tensor(file, name, target, next(deltas), round_trip, space)
                    if hasattr(os, "posix_fadvise"):  # let the disk begin now, and not at the fsync
                        os.posix_fadvise(file.fileno(), start, target.source.size, os.POSIX_FADV_DONTNEED)
                os.fsync(file.fileno())
    if plan.index:
        plan.index.setdefault("metadata", {})["total_size"] = plan.size
        (output / "model.safetensors.index.json").write_text(json.dumps(plan.index, indent=2) + "\n", encoding="utf-8")
    if not changed:
        raise UserError(
            "the adapter changes no weight: is it trained, and is the scale large enough for the base's dtype?"
        )
    return changed


def _write_tensor(file, name: str, target: Target, delta, round_trip: RoundTrip | None, space: dict) -> bool:
    """Write one tensor piece by piece, with `delta` scaled and added; True if the adapter changed it. `space` is memory
    used again and again: to get it anew for each tensor takes longer than to compute."""
    source, parts, scaling = target
    with open(source.file, "rb", buffering=0) as base:
        through_4_bit = round_trip is not None and name in round_trip.names
        if not parts and not through_4_bit:
            for start in range(0, source.size, 4 * PIECE):
                piece = _room(space, "bytes", min(4 * PIECE, source.size - start), torch.uint8)
                _write(file, _read(base, source.start + start, piece))
            return False
        dtype, rows = DTYPES[source.dtype], source.shape[0]
        row_size, row_length = source.size // rows, math.prod(source.shape[1:])
        whole = None
        if "full" in parts:
            whole = _load(parts["full"]).to(dtype)
        elif through_4_bit:
            whole = round_trip.apply(_load(source)).to(dtype)
        changed = False
        magnitude = _load(parts["lora_magnitude_vector"]).float() if "lora_magnitude_vector" in parts else None
        step = max(1, PIECE // row_length)
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            shape = (here.stop - here.start, *source.shape[1:])
            if whole is None or "full" in parts:
                old = _read(base, source.start + here.start * row_size, _room(space, "old", shape, dtype))
            if whole is not None:
                changed = changed or ("full" in parts and not torch.equal(whole[here], old))
                old = whole[here]
            new = old
            if delta is not None:
                total = _room(space, "sum", shape, torch.float32).copy_(old).add_(delta[here].mul_(scaling))
                if magnitude is not None:
                    total *= (magnitude[here] / torch.linalg.norm(total, dim=1)).view(-1, 1)
                new = _room(space, "new", shape, dtype).copy_(total)
            if not new.sum(dtype=torch.float32).isfinite():
                raise UserError(
                    f"{name}: the merged weights are not finite; the adapter is broken, or {dtype} too small"
                )
            changed = changed or (new is not old and not torch.equal(new, old))
            _write(file, new)
    return changed


def _deltas(targets: list[Target], ahead: ThreadPoolExecutor, space: dict):
    """Yield what is to be added to each of `targets`, having begun with the next one; never more than one of them and
    the next where both together are larger than the model's largest tensor."""
    largest, coming = max(math.prod(target.source.shape) for target in targets), None
    for number, target in enumerate(targets):
        delta = coming.result() if coming else _delta(target.parts, {}, 0)
        coming, following = None, targets[number + 1 : number + 2]
        if following and sum(math.prod(each.source.shape) for each in (target, *following)) <= largest:
            coming = ahead.submit(_delta, following[0].parts, space, (number + 1) % 2)
        yield delta


def _delta(parts: dict[str, Stored], space: dict, place: int) -> torch.Tensor | None:
    """What is to be scaled and added to the base's tensor, float32 and of its shape; B·A in one piece, as PEFT has it."""
    if "lora_A" in parts:
        up, down = _load(parts["lora_B"]).float(), _load(parts["lora_A"]).float()
        return torch.mm(up, down, out=_room(space, f"delta {place}", (len(up), down.shape[1]), torch.float32))
    if "lora_embedding_A" in parts:
        return (_load(parts["lora_embedding_B"]).float() @ _load(parts["lora_embedding_A"]).float()).T
    return _load(parts["lora_B.bias"]).float() if "lora_B.bias" in parts else None


@contextlib.contextmanager
def _one_thread():
    """For pieces of half a million numbers, waiting for other threads takes longer than what they would do; the second
    core has the next product to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _room(space: dict, name: str, shape, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor in the memory that `space` keeps under `name`; what is in it is left over."""
    size = math.prod(shape) if isinstance(shape, tuple) else shape
    if name not in space or space[name].dtype != dtype or space[name].numel() < size:
        space.pop(name, None)  # first, so that both are never held
        space[name] = torch.empty(size, dtype=dtype)
    return space[name][:size].view(shape)


def _load(stored: Stored) -> torch.Tensor:
    """A whole tensor."""
    with open(stored.file, "rb", buffering=0) as file:
        return _read(file, stored.start, torch.empty(stored.shape, dtype=DTYPES[stored.dtype]))


def _read(file, start: int, tensor: torch.Tensor) -> torch.Tensor:
    """Fill the contiguous `tensor` with the bytes that stand in `file` from `start`."""
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    file.seek(start)
    while view:  # one call reads at most 2 GB
        view = view[file.readinto(view) :]
    return tensor


def _write(file, data: torch.Tensor | bytes) -> None:
    if isinstance(data, torch.Tensor):
        data = data.reshape(-1).view(torch.uint8).numpy()
    view = memoryview(data)
    while view:  # a full disk may take a part and refuse the rest
        view = view[file.write(view) :]
