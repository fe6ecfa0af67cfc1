"""Which rows are wrong? The loss of each training row at each epoch, kept from the passes that train it.

A row that the model cannot predict when it predicts the others is wrong, or alone of its kind ("Dataset Cartography",
Swayamdipta et al., 2020, arXiv 2009.10795, which takes the mean over the epochs).
"""

import functools
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import gather_object
from transformers import TrainerCallback

from recipes.utils.console import UserError, say
from recipes.utils.data import document_hash, locate
from recipes.utils.files import append_jsonl, file_hash, keep_steps, read_jsonl, record_of

LEDGER = "ledger.jsonl"
TOGETHER = 16  # rows that a median is taken over


class Ledger(TrainerCallback):
    """Writes `folder`/ledger.jsonl: an object each time a row was trained on, `step` (the optimizer step that it went
    into), `epoch` (from 1), `where` (file:line; rows[index] without one), `loss` (nats a trained token, mean) and
    `tokens` (trained ones). `rows` is a Dataset with `input_ids`, by which a row is found again once it is packed.

    Every process keeps its own micro-batches; the first one writes them all after each step, so that they are there
    before a checkpoint is. After a resume the lines of steps past the checkpoint go. A line says what cannot be kept.
    """

    def __init__(self, folder: Path, rows, on: bool = True):
        known = hasattr(rows, "__len__") and "input_ids" in (getattr(rows, "column_names", None) or ())
        self.path, self.rows, self.on = Path(folder) / LEDGER, rows, on and known
        self.say_once = functools.cache(say)
        self.step: list[dict] = []  # the lines of this step, by the hash of their token ids
        if on and not known:
            say("ledger: none is kept, since its rows are no Dataset of token ids")

    def see(self, batch) -> None:
        """Keep what a `MicroBatch` says of its documents."""
        for ids, nll, tokens in zip(batch.documents, batch.nll.tolist(), batch.trained.tolist(), strict=True):
            self.step.append({"where": document_hash(ids), "loss": round(nll / tokens, 6), "tokens": tokens})

    def on_train_begin(self, args, state, control, model, **kwargs):
        from recipes.utils.training import observe  # here: who reads a ledger needs no trainer

        if self.on:
            self.hook, self.places, rows = observe(model, self.see), {}, self.rows
        if self.on and state.is_world_process_zero:
            if "where" not in rows.column_names:
                rows = rows.add_column("where", [f"rows[{index}]" for index in range(len(rows))])
            self.places = locate(rows)
            keep_steps(self.path, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.on and not self.step:
            self.say_once("ledger: the loss goes round TRL's fused LM head, so that of single rows is not known")
        lines, self.step = gather_object(self.step) if self.on else [], []
        if state.is_world_process_zero and lines:
            when = {"step": state.global_step, "epoch": math.ceil(state.epoch)}
            known = [{**when, **line, "where": self.places[line["where"]]} for line in lines
                     if line["where"] in self.places]  # fmt: skip
            append_jsonl(self.path, known)
            if len(known) < len(lines):
                self.say_once("ledger: rows that were trained on otherwise than given, such as cut ones, are left out")

    def on_train_end(self, args, state, control, **kwargs):
        if self.on:
            self.hook.remove()


class Row(NamedTuple):
    """What a ledger says of a row: `losses` is {epoch: nats a trained token}, `excess` is what rows are ranked by."""

    where: str
    losses: dict[int, float]
    tokens: int
    excess: float


def read_ledger(folder: Path) -> list[Row]:
    """The rows of a run's ledger, the worst first. Raises `UserError` where the run kept none, or where a data file is
    not the one any more that the run was trained on, so that its lines may be others.

    Rows are ranked by how far their loss is above the median of the rows trained on at the same time, in the mean over
    the epochs: the loss itself falls as a run goes on, and would rank a row by when its turn was. Rows of the same
    tokens share the first one's entry; the answers of a chat that is split have one each."""
    path = Path(folder) / LEDGER
    if not path.is_file():
        raise UserError(f"{folder}: has no {LEDGER}; a run keeps one unless data.ledger is false")
    files = record_of(folder, {"data_sha256": dict | None}).get("data_sha256") or {}
    for name, digest in files.items():
        if Path(name).is_file() and file_hash(Path(name)) != digest:
            raise UserError(f"{name}: has changed since the run in {folder}; the lines of its ledger may be others now")
    lines, start = sorted(read_jsonl(path), key=lambda line: line["step"]), 0
    entries: dict[tuple[str, int], list[tuple]] = {}  # (where, tokens) -> [(epoch, loss, excess)]
    for end in range(1, len(lines) + 1):  # whole steps, as many as hold `TOGETHER` rows
        if end == len(lines) or (end - start >= TOGETHER and lines[end]["step"] > lines[end - 1]["step"]):
            usual = statistics.median(line["loss"] for line in lines[start:end])
            for line in lines[start:end]:
                seen = line["epoch"], line["loss"], line["loss"] - usual
                entries.setdefault((line["where"], line["tokens"]), []).append(seen)
            start = end
    rows = []
    for (where, tokens), times in entries.items():
        # an epoch's last batch may be filled up with rows that it has seen
        losses = {epoch: statistics.fmean(loss for at, loss, _ in times if at == epoch) for epoch, *_ in times}
        rows.append(Row(where, losses, tokens, statistics.fmean(excess for *_, excess in times)))
    return sorted(rows, key=lambda row: -row.excess)
