"""The receipt of a deletion: what was taken out (salted, no text), what was made anew, what else holds the rows, and a
measurement: an adapter that was trained on a row finds it likelier than a row of its kind that it never saw (membership
inference by loss, Yeom et al. 2018, arXiv 1709.01604)."""

import gc
import hashlib
import json
import os
import secrets
import shlex
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from recipes.utils.console import UserError, print_table, say
from recipes.utils.data import Chat, Encoder, Reading, fingerprint, without_excluded
from recipes.utils.deletion.rows import chats_of, run_files
from recipes.utils.evaluation import load_adapter, load_adapter_tokenizer, read_run, score_rows
from recipes.utils.files import file_hash, read_json, write_json

RECEIPT, FORMAT = "deletion.json", 1
MODELS = ("base", "old", "new")
DRAWS = 999  # of the bootstrap
HELD = {  # in a run's folder, what holds rows or was made of them
    "adapter_model.safetensors": "the adapter that was trained on them", "checkpoint-*": "checkpoints of it",
    "unused-checkpoint-*": "checkpoints of it", "ledger.jsonl": "their losses, by file:line",
    "samples.jsonl": "answers of the adapter", "evaluation": "answers of the adapter", "report.html": "answers of it",
    "bad_rows.jsonl": "rows as they are in the files",
}  # fmt: skip


def salted(salt: str, number: int) -> str:
    """A fingerprint that only who has the row can find again."""
    return hashlib.blake2b(f"{number}".encode(), key=bytes.fromhex(salt), digest_size=16).hexdigest()


def make_receipt(old: Path, new: Path, found, measured: dict) -> Path:
    """Write NEW/deletion.json, and return its path."""
    salt, before, after = secrets.token_hex(16), read_run(old), read_run(new)
    removed = found.fingerprints
    on_cpu = bool(after["training"]["use_cpu"])
    content = {
        "format": FORMAT, "written": datetime.now(timezone.utc).isoformat(timespec="seconds"), "salt": salt,
        "rows": sorted(salted(salt, number) for number in removed), "lines": len(found.rows) + len(found.copies),
        "old": {"run": str(old), "adapter_sha256": _adapter_hash(old), "started": before["started"]},
        "new": {"run": str(new), "adapter_sha256": _adapter_hash(new), "started": after["started"]},
        "equals": "a run on files that never held the rows: " + ("bit for bit" if on_cpu else (
            "in law, not in bits, since kernels of a GPU add in any order")),
        "configuration_sha256": _configuration(after), "data_sha256": after["data_sha256"],
        "versions": after["versions"], "measured": measured,
        "still_held": list(holders(old, before, _adapter_hash(old), lambda number: number in removed)),
    }  # fmt: skip
    write_json(new / RECEIPT, content)
    return new / RECEIPT


def _adapter_hash(folder: Path) -> str:
    return file_hash(Path(folder) / "adapter_model.safetensors")


def _configuration(record: dict) -> str:
    """A digest of the settings of a run, but for which rows it leaves out and where it went."""
    sections = {name: dict(record[name]) for name in ("model", "data", "lora", "training", "quantization")}
    sections["data"].pop("exclude", None)
    sections["training"].pop("output_dir", None)
    return hashlib.sha256(json.dumps(sections, sort_keys=True, default=str).encode()).hexdigest()


def holders(old: Path, record: dict, digest: str, is_removed: Callable[[int], bool]) -> Iterator[dict]:
    """{"path", "holds", "remove": a command} of what holds the removed rows or was made of them: the data files in the
    `record` of a run, the run in `old`, whose adapter has (or had) the SHA-256 `digest`, merged models and runs made of
    that, other runs on the same files, and the cache of rows."""
    for file in run_files(record):
        held = [chat.where.rpartition(":")[2] for chat in chats_of(record, file) if is_removed(fingerprint(chat))]
        remove = f"sed -i '{'d;'.join(held)}d' {shlex.quote(file)}"
        if not file.endswith(".jsonl"):  # a row may be no line there
            remove = f"write {file} again without its rows {', '.join(held)}"
        if held:
            yield _held(file, f"the rows themselves, in {len(held)} lines", remove)
    for pattern, holds in HELD.items():
        for path in sorted(old.glob(pattern)):
            yield _held(path, holds)
    around = [path for folder in {old, old.parent} for path in folder.glob("*/merge.json")]
    for path in sorted({*around, *old.parent.glob("*/*/merge.json")}):
        if read_json(path).get("adapter_sha256") == digest:
            yield _held(path.parent, "a model that the old adapter was merged into")
    for path in sorted(old.parent.glob("*/run.json")):
        other = read_json(path)
        same = set(other.get("data_sha256", {}).values()) & set(record.get("data_sha256", {}).values())
        if (other.get("continues") or {}).get("adapter_sha256") == digest:
            yield _held(path.parent, "a run that goes on from the old adapter")
        elif path.parent != old and same and not other["data"].get("exclude"):
            again = f"python recipes/forget_rows.py {shlex.quote(str(path.parent))} ..."
            yield _held(path.parent, "another run on the same files", again)
    yield from _cached(is_removed)


def _held(path: Path | str, holds: str, remove: str | None = None) -> dict:
    return {"path": str(path), "holds": holds, "remove": remove or f"rm -r {shlex.quote(str(path))}"}


def _cached(is_removed: Callable[[int], bool]) -> Iterator[dict]:
    import datasets  # here: it takes seconds, and --help none

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "lora-recipes"
    for entry in sorted(cache.glob("*")) if cache.is_dir() else ():
        parts = [path for path in (entry / "train.arrow", entry / "validation.arrow") if path.is_file()]
        if any(is_removed(number) for path in parts for number in datasets.Dataset.from_file(str(path))["fingerprint"]):
            yield _held(os.path.relpath(entry), "prepared rows")


def measure(old: Path, new: Path, removed: list[Chat], unseen: list[Chat]) -> dict:
    """The mean loss (nats a token) of the `removed` rows and of `unseen` ones, which were never trained on, under the
    base, the old and the new adapter; and `auroc`: how often a removed row is likelier than an unseen one (0.5: as
    often as not), with the 95 % interval of the bootstrap over rows."""
    record, losses = read_run(old), {}
    encoder = Encoder(load_adapter_tokenizer(old, record), escape=True)
    groups = {"removed": removed, "unseen": unseen}
    for folder in (old, new):
        live = load_adapter(folder, record)
        if folder == old:
            with live.disable_adapter():
                losses["base"] = {name: _losses(live, encoder, chats) for name, chats in groups.items()}
        losses["old" if folder == old else "new"] = {n: _losses(live, encoder, chats) for n, chats in groups.items()}
        del live
        gc.collect()
    measured: dict = {"rows": {name: len(chats) for name, chats in groups.items()}}
    for name in MODELS:
        own, others = losses[name]["removed"], losses[name]["unseen"]
        draw = np.random.default_rng(0)
        drawn = [auroc(draw.choice(own, len(own)), draw.choice(others, len(others))) for _ in range(DRAWS)]
        low, high = (float(np.quantile(drawn, share)) for share in (0.025, 0.975))
        means = {"removed": float(own.mean()), "unseen": float(others.mean())}
        measured[name] = {"loss": means, "auroc": auroc(own, others), "low": low, "high": high}
    return measured


def _losses(model, encoder: Encoder, chats: list[Chat]) -> np.ndarray:
    """The loss of each chat, nats a token."""
    encoded = encoder.encode(chats)
    scores, places = score_rows(model, encoder, encoded), [row.where for row in encoded]
    sums = {where: np.zeros(2) for where in places}  # a chat may have been split into several rows
    for where, (loss, _, tokens) in zip(places, scores, strict=True):
        sums[where] += loss, tokens
    return np.array([loss / tokens for loss, tokens in sums.values()])


def auroc(members: np.ndarray, others: np.ndarray) -> float:
    """The share of pairs in which a member's loss is below the other's, and half of those in which they are equal."""
    ordered = np.sort(others)
    above, at_least = (len(others) - np.searchsorted(ordered, members, side) for side in ("right", "left"))
    return float((above + at_least).mean() / 2 / len(others))


def print_measured(measured: dict) -> None:
    """Print what `measure` returned."""
    rows: dict[str, object] = {}
    for name in MODELS:
        one = measured[name]
        told = f"loss {one['loss']['removed']:.3f}, of unseen rows {one['loss']['unseen']:.3f}"
        rows[name] = f"{told}; likelier than unseen in {one['auroc']:.1%} ({one['low']:.1%} to {one['high']:.1%})"
    counts = measured["rows"]
    print_table(f"\nthe removed rows ({counts['removed']}) beside rows never trained on ({counts['unseen']})", rows)
    say("50 % is what a model gives that has never seen the removed rows, where both are rows of one kind")


def verify(path: Path) -> list[str]:
    """What of the receipt at `path` does not hold; each line of it that does, and what is left to remove, is told."""
    receipt = read_json(path)
    if receipt.get("format") != FORMAT:
        raise UserError(f"{path}: is no receipt of forget_rows.py")
    old, new, wrong = Path(receipt["old"]["run"]), Path(receipt["new"]["run"]), []
    removed = set(receipt["rows"])

    def is_removed(number: int) -> bool:
        return salted(receipt["salt"], number) in removed

    def check(what: str, holds: bool, why: str) -> None:
        say(f"{'ok ' if holds else 'NOT'}   {what}" + ("" if holds else f": {why}"))
        wrong.extend([] if holds else [f"{what}: {why}"])

    record = read_run(new)
    check("the new adapter", _adapter_hash(new) == receipt["new"]["adapter_sha256"], f"{new} has another one now")
    check("its configuration", _configuration(record) == receipt["configuration_sha256"], f"{new}/run.json has others")
    check("its data files", record["data_sha256"] == receipt["data_sha256"], f"{new}/run.json names others")
    for file, digest in receipt["data_sha256"].items():
        if not Path(file).is_file() or file_hash(Path(file)) != digest:
            say(f"      {file} is not as the new run had it (the rows may have been taken out of it since)")
    chats = without_excluded(chats_of(record), record["data"]["exclude"], Reading())
    left = [chat.where for chat in chats if is_removed(fingerprint(chat))]
    check("no removed row among those of the new run", not left, ", ".join(left[:3]))
    if (old / "adapter_model.safetensors").is_file():
        same = _adapter_hash(old) == receipt["old"]["adapter_sha256"]
        check("the old adapter, which is still there", same, f"{old} has another one now")
    still = list(holders(old, record, receipt["old"]["adapter_sha256"], is_removed))
    print_held(still)
    return wrong


def print_held(held: list[dict]) -> None:
    """Print what else holds the rows, with the commands that remove it."""
    say("\nthe rows, or what was made of them, are still in:" if held else "\nnothing else holds the rows here")
    for one in held:
        say(f"  {one['path']}: {one['holds']}\n      {one['remove']}")
