"""Files to training rows in one pass: read, checked, rendered, tokenised and labelled once, and kept for the next run."""

import dataclasses
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from recipes.utils.config_keys import DataOptions
from recipes.utils.console import UserError, say
from recipes.utils.control_tokens import control_tokens
from recipes.utils.dataset import Report, held_out, stream_chats
from recipes.utils.encoding import documents, encode_documents
from recipes.utils.jsonl import BadRow, data_files, file_hash
from recipes.utils.row_cache import cached, content_key
from recipes.utils.row_identity import fingerprint

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter

BATCH = 1000
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "where": datasets.Value("string"),  # file:line
        "fingerprint": datasets.Value("int64"),  # of the text, normalised: equal for copies of a chat
    }
)


COUNTS = ("rows", "tokens", "trained_tokens", "over_length", "lost_tokens", "dropped", "split", "no_stop")


class Prepared(NamedTuple):
    """Rows that SFTTrainer takes as they are (and `where`, `fingerprint`), what preparing them counted, and the files that
    they came from with the SHA-256 of each."""

    rows: datasets.Dataset
    counts: dict
    files: dict[str, str]


def prepare(data: DataOptions, args, tokenizer, part: str) -> Prepared | None:
    """The rows of `part` ("train" or "validation") of the data, memory-mapped; None if the data has no such part.

    `args` is the SFTConfig, of which `max_length` and `seed` count here.

    counts: `rows`, `tokens`, `trained_tokens`; `over_length` and `lost_tokens` (rows over max_length and their tokens
    beyond it, or all of them where they are dropped), `dropped` (rows), `length_99` (tokens that 99 % of the rows fit
    in), `split` (rows that are one answer of a chat), `no_stop` (answers whose last token is no control token), and from
    reading `shapes`, `ignored_keys`, `trimmed`, `blank`, `bad`.

    Raises:
        UserError: listing every bad row as file:line, unless data.on_bad_row is skip; or if no row is left.
    """
    if part == "validation" and data.validation is None:
        return None
    share, max_length, seed = isinstance(data.validation, float), args.max_length, args.seed
    if share and not 0 < data.validation < 1:
        raise UserError(f"data.validation: {data.validation} is not a share between 0 and 1, nor a file")
    paths = data.train if share or part == "train" else data.validation
    files = {str(path): file_hash(path) for path in data_files(paths)}
    key = content_key(files, tokenizer, [repr(_that_make_rows(data)), max_length, part, seed])
    rows, counts = cached(key, lambda path: _write(path, paths, data, tokenizer, max_length, part, seed))
    if not counts["rows"]:
        raise UserError(_nothing_left(counts, data, part, max_length))
    return Prepared(rows, counts, files)


def _that_make_rows(data: DataOptions) -> DataOptions:
    """`data` without the switches that change nothing in the rows."""
    return dataclasses.replace(data, ledger=True, samples=0)


def _nothing_left(counts: dict, data: DataOptions, part: str, max_length: int) -> str:
    if counts["over_length"]:
        return (
            f"no {part} row is left to use: {counts['over_length']} are over training.max_length {max_length}; 99 % "
            f"would fit in {counts['length_99']}"
        )
    if counts["bad"]:
        bad = counts["bad"][0]
        return f"no {part} row is left to use: all {len(counts['bad'])} are bad, such as {bad['where']}: {bad['error']}"
    if isinstance(data.validation, float):
        return (
            f"data.validation: with a share of {data.validation} no {part} row is left; give another share, or a file"
        )
    return f"data.{part}: names no rows"


def _write(path: Path, paths, data: DataOptions, tokenizer, max_length: int, part: str, seed: int) -> dict:
    """Write the rows to an Arrow file and return the counts."""
    report, counts, lengths = Report(), Counter(), []
    control = control_tokens(tokenizer)
    chats = _texts(stream_chats(paths, report, data.system == "merge"), report, tokenizer, control, data, part, seed)
    started = told = time.monotonic()
    with ArrowWriter(features=FEATURES, path=str(path)) as writer:
        for batch, encoded in _encoded(chats, tokenizer, control):
            kept = {name: [] for name in FEATURES}
            for (
                row,
                (document, print_),
            ) in zip(encoded, batch, strict=True):
                ids, labels = row.input_ids, row.labels
                lengths.append(len(ids))
                counts["split"] += document.split
                counts["no_stop"] += not row.stops
                if len(ids) > max_length:
                    counts["over_length"] += 1
                    counts["lost_tokens"] += len(ids) - (max_length if data.over_length == "truncate" else 0)
                    if data.over_length == "error":
                        raise UserError(
                            f"{row.where}: {len(ids)} tokens, over training.max_length {max_length}; raise it, or "
                            "--data.over_length drop"
                        )
                    ids, labels = ids[:max_length], labels[:max_length]
                trained = row.trained if len(ids) == len(row.input_ids) else len(labels) - labels.count(-100)
                if (len(row.input_ids) > max_length and data.over_length == "drop") or not trained:
                    counts["dropped"] += 1
                    continue
                counts["rows"] += 1
                counts["tokens"] += len(ids)
                counts["trained_tokens"] += trained
                for name, value in zip(FEATURES, (ids, labels, row.where, print_), strict=True):
                    kept[name].append(value)
            writer.write_batch(kept)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                say(f"prepared {len(lengths):,} rows, {len(lengths) / (told - started):,.0f} a second")
        writer.finalize()
    if data.on_bad_row == "error":
        report.raise_if_bad()
    return {
        **dict.fromkeys(COUNTS, 0),
        **counts,
        "all_tokens": sum(lengths),
        "length_99": int(np.percentile(lengths, 99, method="higher")) if lengths else 0,
        "length_histogram": dict(
            zip(("rows", "edges"), (part.tolist() for part in np.histogram(lengths, 16)), strict=True)
        ),
        "shapes": report.shapes,
        "ignored_keys": sorted(report.ignored_keys),
        "trimmed": report.trimmed,
        "blank": report.blank,
        "bad": report.bad,
    }


def _encoded(chats, tokenizer, control):
    """Yield (batch, its rows as token ids): one batch is tokenised in a thread, outside Python's lock, while the next one is
    read and rendered."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        while batch := list(islice(chats, BATCH)):
            job = batch, pool.submit(encode_documents, [row for row, _ in batch], tokenizer, control)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = job
        if waiting:
            yield waiting[0], waiting[1].result()


def _texts(chats, report: Report, tokenizer, control, data: DataOptions, part: str, seed: int):
    """(document, fingerprint) for each training row of `chats` that belongs to `part`; bad ones go to `report`."""
    for chat in chats:
        if isinstance(data.validation, float) and held_out(chat, data.validation, seed) != (part == "validation"):
            continue
        try:
            for document in documents(chat, tokenizer, control, data.train_on, data.control_tokens == "escape"):
                yield document, fingerprint(chat)
        except BadRow as error:
            report.add_bad(chat.where, error, chat.line)
