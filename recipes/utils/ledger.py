"""Which rows are wrong? The loss of each training row at each epoch, kept from the passes that train it.

A row that the model cannot predict when it predicts the others is wrong, or alone of its kind ("Dataset Cartography",
Swayamdipta et al., 2020, arXiv 2009.10795, which takes the mean over the epochs).
"""

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from recipes.utils.console import UserError
from recipes.utils.jsonl import append_lines, file_hash, keep_steps, read_json
from recipes.utils.micro_batch import MicroBatch
from recipes.utils.row_identity import document_hash, locate

from accelerate.utils import gather_object
from transformers import TrainerCallback

LEDGER = "ledger.jsonl"
TOGETHER = 16  # rows that a median is taken over


class Ledger(TrainerCallback):
    """Writes ledger.jsonl: an object each time a row was trained on, `step` (the optimizer step that it went into),
    `epoch` (from 1), `where` (file:line), `loss` (nats a trained token, mean) and `tokens` (trained ones).

    `observe(model, ledger.see)` feeds it. Every process keeps its own micro-batches; the first one writes them all, before
    each checkpoint and at the end of an epoch. After a resume the lines of steps past the checkpoint go.
    """

    def __init__(self, run_folder: Path, rows):
        self.path, self.rows, self.places = run_folder / LEDGER, rows, {}
        self.step, self.pending = [], []  # [(hash of the token ids, nats, tokens)] of this step; with step and epoch

    def see(self, batch: MicroBatch) -> None:
        self.step += zip(map(document_hash, batch.documents), batch.nll.tolist(), batch.trained.tolist(), strict=True)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.places = locate(self.rows)
            keep_steps(self.path, state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        epoch = math.ceil(state.epoch)
        self.pending += [(state.global_step, epoch, *seen) for seen in self.step]
        self.step.clear()
        if control.should_save:
            self._write(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._write(state)

    on_save = on_train_end = on_epoch_end

    def _write(self, state) -> None:
        pending, self.pending = gather_object(self.pending), []
        if state.is_world_process_zero:
            append_lines(
                self.path,
                [
                    {"step": step, "epoch": epoch, "where": self.places[key], "loss": round(nll / tokens, 6), "tokens": tokens}
                    for step, epoch, key, nll, tokens in pending
                ],
            )  # fmt: skip


class Row(NamedTuple):
    """What a run's ledger says of one training row: `losses` is {epoch: nats a trained token}; `excess` is what rows are
    ranked by."""

    where: str
    losses: dict[int, float]
    tokens: int
    excess: float


def read_ledger(run_folder) -> list[Row]:
    """The rows of a run's ledger, the worst first. Raises `UserError` where the run kept none, or where a data file is no
    longer the one that the run was trained on, so that its lines may be others.

    Rows are ranked by how far their loss is above the median of the rows trained on at the same time, in the mean over
    the epochs: the loss itself falls as a run goes on, so that it would rank a row by when its turn was. Rows of the same
    tokens share one entry, the first one's, since nothing tells them apart; the answers of a chat that is split have one each.
    """
    path = Path(run_folder) / LEDGER
    if not path.is_file():
        raise UserError(f"{run_folder}: has no {LEDGER}; a run keeps one unless data.ledger is false")
    record = read_json(path.parent / "run.json")
    for name, digest in record["data_sha256"].items():
        if Path(name).is_file() and file_hash(Path(name)) != digest:
            raise UserError(
                f"{name}: has changed since the run in {run_folder}; the lines of its ledger may be others now"
            )
    entries = {}  # (where, tokens) -> [(epoch, loss, excess)]
    for together in _trained_together([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]):
        usual = statistics.median(seen["loss"] for seen in together)
        for seen in together:
            entry = seen["epoch"], seen["loss"], seen["loss"] - usual
            entries.setdefault((seen["where"], seen["tokens"]), []).append(entry)
    rows = []
    for (where, tokens), seen in entries.items():
        losses = {}  # an epoch's last batch may be filled up with rows that it has seen
        for epoch, loss, _ in seen:
            losses.setdefault(epoch, []).append(loss)
        losses = {epoch: statistics.fmean(values) for epoch, values in losses.items()}
        rows.append(Row(where, losses, tokens, statistics.fmean(excess for *_, excess in seen)))
    return sorted(rows, key=lambda row: -row.excess)


def _trained_together(lines: list[dict]):
    """Yield the lines of successive steps, `TOGETHER` or more at a time."""
    together = []
    for _, step in itertools.groupby(sorted(lines, key=lambda line: line["step"]), key=lambda line: line["step"]):
        together += step
        if len(together) >= TOGETHER:
            yield together
            together = []
    if together:
        yield together
