"""Adapter into base, tensor by tensor: the weights are read, changed and written piece by piece, never all in memory.

Each number is `base + scale · alpha/r · B·A`, added in float32 and rounded once to the base's own dtype: bit for bit what
PEFT's merge_and_unload(safe_merge=False) gives with the adapter in float32. What the adapter does not touch is copied as
bytes. The largest thing held is one weight's B·A in float32.
"""

import json
import os
from pathlib import Path

from recipes.utils.console import UserError
from recipes.utils.export import check_space
from recipes.utils.merge_plan import DTYPES, Plan, Stored, Target, plan_merge
from recipes.utils.round_trip import RoundTrip

import torch

PIECE = 1 << 22  # bytes read, changed and written at a time: small enough to stay in the processor's cache


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
    changed = 0
    for file_name, tensors in plan.files.items():
        header, place = {"__metadata__": {"format": "pt"}}, 0
        for name, (source, _, _) in tensors.items():
            header[name] = {"dtype": source.dtype, "shape": source.shape, "data_offsets": [place, place + source.size]}
            place += source.size
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)  # the data begins at a multiple of 8, as readers that map the file expect
        with open(output / file_name, "wb", buffering=0) as file:
            _write(file, len(head).to_bytes(8, "little") + head)
            for name, target in tensors.items():
                changed += _write_tensor(file, name, target, round_trip)
                if hasattr(os, "posix_fadvise"):  # let the disk begin now, and not at the fsync
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.fsync(file.fileno())
    if plan.index:
        plan.index.setdefault("metadata", {})["total_size"] = plan.size
        (output / "model.safetensors.index.json").write_text(json.dumps(plan.index, indent=2) + "\n", encoding="utf-8")
    if not changed:
        raise UserError(
            "the adapter changes no weight: is it trained, and is the scale large enough for the base's dtype?"
        )
    return changed


def _write_tensor(file, name: str, target: Target, round_trip) -> bool:
    """Write one tensor piece by piece; True if the adapter changed it."""
    source, parts, scaling = target
    with open(source.file, "rb", buffering=0) as base:
        through_4_bit = round_trip is not None and name in round_trip.names
        if not parts and not through_4_bit:
            for start in range(0, source.size, PIECE):
                _write(file, _read(base, source.start + start, min(PIECE, source.size - start)))
            return False
        dtype, rows = DTYPES[source.dtype], source.shape[0]
        row_size = source.size // rows
        whole = None
        if "full" in parts:
            whole = _load(parts["full"]).to(dtype)
        elif through_4_bit:
            whole = round_trip.apply(_load(source)).to(dtype)
        changed = "full" in parts and not torch.equal(whole, _load(source))
        delta = _delta(parts, scaling)
        magnitude = _load(parts["lora_magnitude_vector"]).float() if "lora_magnitude_vector" in parts else None
        step = max(1, PIECE // row_size)
        for start in range(0, rows, step):
            here = slice(start, min(start + step, rows))
            if whole is not None:
                old = whole[here]
            else:
                piece = _read(base, source.start + here.start * row_size, (here.stop - here.start) * row_size)
                old = torch.frombuffer(piece, dtype=dtype).view(-1, *source.shape[1:])
            if delta is None:
                new = old
            else:
                new = delta[here].add_(old)  # float32, in the place of the delta
                if magnitude is not None:
                    new *= (magnitude[here] / torch.linalg.norm(new, dim=1)).view(-1, 1)
                new = new.to(dtype)
            if not new.sum(dtype=torch.float32).isfinite():
                raise UserError(
                    f"{name}: the merged weights are not finite; the adapter is broken, or {dtype} too small"
                )
            changed = changed or (new is not old and not torch.equal(new, old))
            _write(file, new.contiguous().view(torch.uint8).numpy())
    return changed


def _delta(parts: dict[str, Stored], scaling: float) -> torch.Tensor | None:
    """What is added to the base's tensor, float32 and of its shape; the product in one piece, as PEFT takes it."""
    if "lora_A" in parts:
        return (_load(parts["lora_B"]).float() @ _load(parts["lora_A"]).float()).mul_(scaling)
    if "lora_embedding_A" in parts:
        return (_load(parts["lora_embedding_B"]).float() @ _load(parts["lora_embedding_A"]).float()).mul_(scaling).T
    if "lora_B.bias" in parts:
        return _load(parts["lora_B.bias"]).float() * scaling
    return None


def _load(stored: Stored) -> torch.Tensor:
    """A whole tensor."""
    with open(stored.file, "rb", buffering=0) as file:
        return torch.frombuffer(_read(file, stored.start, stored.size), dtype=DTYPES[stored.dtype]).view(stored.shape)


def _read(file, start: int, size: int) -> bytearray:
    data, done = bytearray(size), 0
    file.seek(start)
    while done < size:  # one call reads at most 2 GB
        done += file.readinto(memoryview(data)[done:])
    return data


def _write(file, data) -> None:
    view = memoryview(data).cast("B")
    while view:  # a full disk may take a part and refuse the rest
        view = view[file.write(view) :]
