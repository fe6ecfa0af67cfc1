"""Files to training rows: hashed, then read, checked, rendered, tokenised and labelled once, and kept for the next run.
datasets is imported where rows are made or read: a merge and a chat, which import this package, can spare it."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rensa import RMinHash
from transformers import AutoTokenizer

from recipes.utils.console import UserError, find_data_files, say
from recipes.utils.data.chats import Chat, DataOptions, Reading, Think, held_out, stream_chats
from recipes.utils.data.encode import Document, Encoded, Encoder
from recipes.utils.data.shapes import BadRow
from recipes.utils.data.template import embedding_rows, read_thoughts
from recipes.utils.files import file_hash, read_json, sync, sync_path, write_json

BATCH = 1000  # rows
ROWS_COMPARED = 200  # of the user's own, against what inference sends
ROWS_SIGNED = 20_000  # of either part, to look for near copies; about two seconds
CANDIDATES = 20  # train rows compared with each validation row
NEAR = 0.8  # share of three-word runs that two chats have in common
PERMUTATIONS, BAND = 128, 8  # hashes of a signature, and how many must agree for two rows to be compared
UNUSED, LEFT = 30 * 24 * 3600, 24 * 3600  # seconds until an entry of the cache goes, and what a kill has left there
NO_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalnum())


class Finding(NamedTuple):
    """What was found: `level` is "stop" (cannot be right), "drop" (rows left out) or "warn" (unwise)."""

    level: str
    message: str


def report_findings(findings: Iterable[Finding]) -> None:
    """Print the warnings and what was left out; raise a `UserError` with what cannot be right; each but once."""
    findings = list(dict.fromkeys(findings))  # what holds of the tokenizer is found with train and validation rows
    for finding in findings:
        if finding.level != "stop":
            say(f"{'left out' if finding.level == 'drop' else 'warning'}: {finding.message}")
    if stops := [finding.message for finding in findings if finding.level == "stop"]:
        raise UserError("\n".join(stops))


@dataclass
class Counts(Reading):
    """What was counted of one part of the data, beside what reading its files found."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    over_length: int = 0  # rows over max_length
    lost_tokens: int = 0  # their tokens beyond it, or all of them where they are dropped
    dropped: int = 0  # rows, for their length or because no answer is left in them
    split: int = 0  # rows that are one answer of a chat
    duplicates: int = 0  # rows that stand here before, to the letter
    duplicate: str = ""  # the first of them, file:line
    think: Think | None = None  # what became of thoughts: keep, mask, drop, or None where nothing was to be decided
    no_stop: int = 0  # rows with an answer whose last token is no control token
    largest_id: int = 0  # of a token
    all_tokens: int = 0  # of all rows, the dropped ones too
    length_99: int = 0  # tokens that 99 % of the rows fit in
    length_histogram: dict = field(default_factory=dict)  # {"rows": [16], "edges": [17]}
    mixture: dict = field(default_factory=dict)  # {path: rows an epoch} where data.train has shares or repeats


@dataclass(frozen=True)
class Prepared:
    """A `Dataset` that SFTTrainer takes as it is, with `input_ids`, `labels`, `where` (file:line) and `fingerprint` (of
    the normalised text); what was counted, the SHA-256 of each file that the rows came from, and what was found."""

    rows: Any
    counts: Counts = field(default_factory=Counts)
    files: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def prepare(options: DataOptions, tokenizer, args, report: bool = True) -> tuple[Prepared, Prepared | None]:
    """The train and the validation rows (or None), memory-mapped, by `max_length` and `seed` of the SFTConfig `args`.
    The chat template of `tokenizer` is switched to what was learnt: no thoughts, where no train row has one. `report`
    prints what was found. Raises `UserError` for bad rows, no rows, and with `report` what cannot be right."""
    share = options.validation if isinstance(options.validation, float) else None
    if share is not None and not 0 < share < 1:
        raise UserError(f"data.validation: {share} is not a share between 0 and 1, nor a file")
    entries = train_entries(options.train)
    sources: dict = {("train",) if share is None else ("train", "validation"): train_paths(options.train)}
    if not isinstance(options.validation, float | None):
        sources["validation",] = options.validation
    parts, signatures, wrong = {}, {}, []
    for names, paths in sources.items():
        files = {str(path): file_hash(path) for path in find_data_files(paths)}
        key = _key(names, files, options, tokenizer, args)
        try:
            made = _cached(key, files, names, paths, options, tokenizer, args)
        except UserError as error:  # all that is bad is told at once
            wrong.append(str(error))
            continue
        for part, (prepared, signed) in made.items():
            found = [*_wrong_with(prepared, part, options, args, tokenizer), *prepared.findings]
            parts[part], signatures[part] = replace(prepared, files=files, findings=found), signed
        if "train" in names:  # the other rows are treated as these are
            options = replace(options, think=parts["train"].counts.think)
            tokenizer.chat_template = Encoder(tokenizer, think=options.think).template
    if wrong:
        raise UserError("\n".join(wrong))
    train, validation = parts["train"], parts.get("validation")
    named = {entry for part in parts.values() for entries in part.counts.excluded.values() for entry in entries}
    named |= {row["where"] for part in parts.values() for row in part.counts.bad}
    for entry, line in read_excluded(options.exclude).items():
        if entry not in named:
            raise UserError(f"{options.exclude}:{line}: {entry} names no row of data.train and data.validation")
    if report and (train.counts.think or train.counts.thoughts):
        left_out = "left out; " * (train.counts.thoughts > 0) + "the template that is saved asks for none"
        treated = {"mask": "read, not learnt", "drop": left_out}.get(train.counts.think or "", "learnt")
        say(f"thoughts: {train.counts.thoughts:,} of {sum(train.counts.shapes.values()):,} rows have one; {treated}")
    if validation:
        validation = _without_copies(train, validation, signatures)
    if any(entry.get("repeat") != 1 for entry in entries):
        train = _mixed(train, entries, args.seed)
    if report:
        report_findings([*train.findings, *(validation.findings if validation else [])])
    return train, validation


def train_entries(train: str | list) -> list[dict]:
    """data.train as {"path", "repeat"} and {"path", "share"}. Raises `UserError` for an entry that is none."""
    named = [train] if isinstance(train, str) else train
    entries: list[dict] = [entry if isinstance(entry, dict) else {"path": entry, "repeat": 1} for entry in named]
    for entry in entries:
        path, repeat, share = (entry.get(key) for key in ("path", "repeat", "share"))
        number = (share is None and isinstance(repeat, int) and repeat > 0) or (repeat is None and 0 < (share or 0) < 1)
        if not isinstance(path, str) or len(entry) != 2 or not number:
            forms = "{path: FILE, repeat: 2} (a whole number) or {path: FILE, share: 0.2} (between 0 and 1)"
            raise UserError(f"data.train: {entry}: an entry is a path, {forms}")
    return entries


def train_paths(train: str | list) -> list[str]:
    """The paths in data.train."""
    return [entry["path"] for entry in train_entries(train)]


def _mixed(train: Prepared, entries: list[dict], seed: int) -> Prepared:
    """`train` with the rows of each entry as often as it says: each `repeat` times, or as many as make up its `share`,
    drawn by `seed`, each once until all are used up, then once more. The rows are the same ones in every epoch."""
    files = np.array([where.rpartition(":")[0] for where in train.rows["where"]])
    places = [np.flatnonzero(np.isin(files, [str(file) for file in find_data_files(one["path"])])) for one in entries]
    shares = sum(one.get("share", 0) for one in entries)
    whole = sum(len(own) * one.get("repeat", 0) for own, one in zip(places, entries, strict=True))
    if shares >= 1 or not whole or not all(map(len, places)) or sum(map(len, places)) > len(files):
        raise UserError("data.train: a share needs rows beside it, shares are below 1 together, a file is in one entry")
    draw, chosen = np.random.default_rng(seed), list[np.ndarray]()
    for own, one in zip(places, entries, strict=True):
        number = round(whole * one["share"] / (1 - shares)) if "share" in one else len(own) * one["repeat"]
        chosen.append(np.concatenate([draw.permutation(own) for _ in range(number // len(own) + 1)])[:number])
    rows, lengths = train.rows.select(np.concatenate(chosen)), np.array([0, 0])
    for labels in rows.with_format("numpy").select_columns(["labels"]).iter(BATCH):
        lengths += np.array([[len(row), (row != -100).sum()] for row in labels["labels"]]).sum(0)
    mixture = {one["path"]: len(own) for one, own in zip(entries, chosen, strict=True)}
    tokens, trained = lengths.tolist()
    counts = replace(train.counts, rows=len(rows), tokens=tokens, trained_tokens=trained, mixture=mixture)
    return replace(train, rows=rows, counts=counts)


def read_excluded(path: str | None) -> dict[str, int]:
    """{file:line or fingerprint: its line} of a data.exclude file. Raises `UserError` if it names none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n") if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.exclude: {path}: cannot be read: {error}") from error
    found = {line.strip(): number for number, line in enumerate(lines, start=1) if line.strip()}
    if path and not found:
        raise UserError(f"data.exclude: {path}: names no rows; file:line or a fingerprint, one a line")
    return found


def without_excluded(chats: Iterable[Chat], path: str | None, reading: Reading) -> Iterator[Chat]:
    """`chats` but for those that the file `path` names, which `reading` takes."""
    excluded = read_excluded(path).keys()
    for chat in chats:
        if hits := excluded and excluded & {chat.where, fingerprint_text(fingerprint(chat))}:
            reading.excluded[chat.where] = sorted(hits)
        else:
            yield chat


class _Part:
    """The train or the validation rows while they are prepared."""

    def __init__(self, path: Path, options: DataOptions, max_length: int):
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        self.path, self.options, self.max_length = path, options, max_length
        ids, where, text = List(Value("int32")), Value("string"), Value("int64")
        features = Features({"input_ids": ids, "labels": ids, "where": where, "fingerprint": text})
        self.writer = ArrowWriter(features=features, path=str(path))
        self.counts, self.findings, self.lengths = Counts(), list[Finding](), list[int]()  # of all rows, in tokens
        self.seen = set[int]()  # hashes of the texts of rows
        self.signed: dict[str, list[int]] = {}  # file:line: [the row's number, its signature]

    def add(self, chat: Chat, document: Document, row: Encoded) -> Encoded | None:
        """Keep the row, and return it as it is kept; None if it is dropped."""
        counts, limit, length, over = self.counts, self.max_length, len(row.input_ids), self.options.over_length
        self.lengths.append(length)
        counts.split += document.split
        counts.no_stop += not row.stops
        if length > limit:
            counts.over_length += 1
            counts.lost_tokens += length - (limit if over == "truncate" else 0)
            if over == "error":
                mend = "raise it, or --data.over_length drop"
                raise UserError(f"{row.where}: {length} tokens, over training.max_length {limit}; {mend}")
            labels = row.labels[:limit]
            trained = len(labels) - labels.count(-100) if over == "truncate" else 0
            row = row._replace(input_ids=row.input_ids[:limit], labels=labels, trained=trained)
        if not row.trained:
            counts.dropped += 1
            return None
        if self.options.validation is not None and len(self.signed) < ROWS_SIGNED and row.where not in self.signed:
            self.signed[row.where] = [counts.rows, *signature(chat)]
        if (text := hash(tuple(document.pieces))) in self.seen:
            counts.duplicates += 1
            counts.duplicate = counts.duplicate or row.where
        self.seen.add(text)
        counts.rows += 1
        counts.largest_id = max(counts.largest_id, max(row.input_ids))
        counts.tokens += len(row.input_ids)
        counts.trained_tokens += row.trained
        values = {"input_ids": row.input_ids, "labels": row.labels, "where": row.where}
        self.writer.write({**values, "fingerprint": fingerprint(chat)}, writer_batch_size=BATCH)
        return row

    def finish(self, reading: Reading, think: Think | None) -> list:
        """Complete the files of the part; [its counts, what was found]."""
        self.writer.finalize()
        np.save(self.path.with_suffix(".npy"), np.array(list(self.signed.values()), np.uint32))
        self.counts.all_tokens, self.counts.think = sum(self.lengths), think
        self.counts.length_99 = int(np.percentile(self.lengths, 99, method="higher")) if self.lengths else 0
        rows, edges = np.histogram(self.lengths, 16)
        self.counts.length_histogram = {"rows": rows.tolist(), "edges": edges.tolist()}
        return [vars(self.counts) | vars(reading), self.findings]


def _write(folder: Path, names: tuple[str, ...], paths, options: DataOptions, tokenizer, args) -> dict:
    """Write the rows that `paths` hold to an Arrow file a part in `folder`, and return {part: [counts, findings]}."""
    thoughts, think, reading = read_thoughts(tokenizer), options.think, Reading()
    if not think and thoughts.on != thoughts.off:  # else the template has no switch, and a thought can only be kept
        chats = stream_chats(paths, reading, options.system == "merge")
        think = "keep" if any(reading.thoughts for _ in chats) else "drop"
    encoder = Encoder(tokenizer, options.control_tokens == "escape", think)
    reading, tokenizer.chat_template = Reading(), encoder.template
    share = options.validation if isinstance(options.validation, float) else None
    parts = {part: _Part(folder / f"{part}.arrow", options, args.max_length) for part in names}
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        served = AutoTokenizer.from_pretrained(saved)
    started = told = time.monotonic()
    for number, ((chat, document), row) in enumerate(_encoded(paths, reading, encoder, options), start=1):
        part = names[held_out(chat, share, args.seed)] if share else names[0]
        kept = parts[part].add(chat, document, row)
        # a typed control token that was escaped is a real one to a server that reads text
        if kept and part == "train" and number <= ROWS_COMPARED and not parts[part].findings and not document.escaped:
            parts[part].findings = _prompt_parity(chat, kept, served, encoder)
        if number % BATCH == 0 and time.monotonic() - told > 10:
            told = time.monotonic()
            say(f"prepared {number:,} rows, {number / (told - started):,.0f} a second")
    if options.on_bad_row == "error":
        reading.raise_if_bad()
    return {name: part.finish(reading, think) for name, part in parts.items()}


def _encoded(paths, reading: Reading, encoder: Encoder, options: DataOptions) -> Iterator[tuple]:
    """((chat, document), `Encoded`) of each training row; chats that the template cannot carry go to `reading`. A batch
    is tokenised in a thread, outside Python's lock, while the next one is read and rendered."""

    def rendered() -> Iterator[tuple[Chat, Document]]:
        chats = stream_chats(paths, reading, options.system == "merge")
        for chat in without_excluded(chats, options.exclude, reading):
            try:
                yield from ((chat, document) for document in encoder.documents(chat, options.train_on))
                first = next(turn["role"] for turn in chat.messages if turn["role"] != "system")
                reading.opened += first == "assistant"
            except BadRow as error:
                reading.add_bad(chat.where, error, chat.line)

    documents, waiting = rendered(), None
    with ThreadPoolExecutor(max_workers=1) as pool:
        while (batch := list(islice(documents, BATCH))) or waiting:
            job = pool.submit(encoder.encode_documents, [document for _, document in batch])
            if waiting:
                yield from zip(waiting[0], waiting[1].result(), strict=True)
            waiting = (batch, job) if batch else None


def _prompt_parity(chat: Chat, row: Encoded, served, encoder: Encoder) -> list[Finding]:
    """A finding where a trained answer follows none of the prompts that inference sends, by the tokenizer `served`."""
    served_as = partial(served.apply_chat_template, tools=chat.tools, add_generation_prompt=True, return_dict=False)
    prompts = [served_as(messages, chat_template=template) for messages, template in encoder.prompts(chat)]
    starts = [place for place, label in enumerate(row.labels) if label != -100 and row.labels[place - 1] == -100]
    masked = encoder.think == "mask"  # a thought stands between the two
    found = all(any(row.input_ids[: len(ids) if masked else start] == ids for ids in prompts) for start in starts)
    odd = f"{chat.where}: the training row does not begin with the tokens that inference sends for its prompt"
    stop = Finding("stop", f"{odd}; the chat template and the saved tokenizer do not agree")
    return [] if found else [stop]


def signature(chat: Chat) -> list[int]:
    """MinHash over runs of three words."""
    words = re.findall(r"\w+", " ".join(m["content"] for m in chat.messages if m["role"] != "system").casefold())
    found = RMinHash(num_perm=PERMUTATIONS, seed=0)
    found.update([" ".join(words[place : place + 3]) for place in range(max(1, len(words) - 2))])
    return found.digest()


def _wrong_with(prepared: Prepared, part: str, options: DataOptions, args, tokenizer) -> Iterator[Finding]:
    """What is wrong with the prepared rows of a part. Raises a `UserError` if no row is left."""
    counts, nothing = prepared.counts, f"no {part} row is left"
    if not counts.rows and counts.over_length:
        over = f"{counts.over_length} are over training.max_length {args.max_length}"
        raise UserError(f"{nothing} to use: {over}; 99 % would fit in {counts.length_99}")
    if not counts.rows and counts.bad:
        bad = f"{counts.bad[0]['where']}: {counts.bad[0]['error']}"
        raise UserError(f"{nothing} to use: all {sum(counts.bad_kinds.values()):,} are bad, such as {bad}")
    if not counts.rows:
        share = f"data.validation: with a share of {options.validation} {nothing}; give another share, or a file"
        raise UserError(share if isinstance(options.validation, float) else f"data.{part}: names no rows")
    all_rows, lost = counts.rows + counts.dropped, counts.lost_tokens / counts.all_tokens
    if max(counts.over_length / all_rows, lost) > options.max_over_length:
        over = f"{counts.over_length:,} of {all_rows:,} {part} rows are over training.max_length {args.max_length}"
        mend = f"99 % of the rows fit in --training.max_length {counts.length_99}, or take the loss"
        yield Finding("stop", f"{over}, and {lost:.0%} of the tokens would be lost; {mend}: --data.max_over_length 1.0")
    if counts.no_stop:
        endless = f"{counts.no_stop:,} {part} rows have an answer whose last trained token ends no turn"
        mend = "put the end-of-turn token inside the template's {% generation %} marks"
        yield Finding("stop", f"{endless}, so the model would never learn to stop: {mend}")
    size, padding = embedding_rows(tokenizer), -1 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if size is not None and max(counts.largest_id, padding) >= size:
        token = counts.largest_id if counts.largest_id >= size else padding
        where = next((row["where"] for row in prepared.rows if token in row["input_ids"]), "padding")
        beyond = f"{where}: {tokenizer.convert_ids_to_tokens(token)!r} is token {token} and the base has {size} of them"
        mend = "resize the model to its tokenizer (resize_token_embeddings) and save it, or take its own tokenizer"
        yield Finding("stop", f"{beyond}, counted from 0: {mend}")
    if counts.duplicates and part == "train":
        copies = f"{counts.duplicates:,} of {counts.rows:,} train rows are copies of others, to the letter"
        yield Finding("warn", f"{copies}, such as {counts.duplicate}: each is learnt again; remove them if not meant")
    if counts.trained_tokens == counts.tokens:
        yield Finding("warn", f"every token of the {part} rows carries loss, prompts too; mark the answers alone")
    first, bos = prepared.rows[0], tokenizer.bos_token_id
    if bos is not None and first["input_ids"][:2] == [bos] * 2:
        twice = f"{first['where']}: begins with {tokenizer.bos_token} twice"
        yield Finding("stop", f"{twice}; remove it from the text or from the chat template")


def _without_copies(train: Prepared, validation: Prepared, signatures: dict[str, np.ndarray]) -> Prepared:
    """The validation rows without those whose text is in training but for case, space and punctuation."""
    copied = np.isin(validation.rows["fingerprint"], train.rows["fingerprint"])
    findings = [*validation.findings, *_near_copies(train, validation, signatures, copied)]
    if copied.any():
        places = ", ".join(validation.rows[int(index)]["where"] for index in np.flatnonzero(copied)[:3])
        copies = f"{copied.sum():,} of {len(copied):,} validation rows are in training"
        findings.append(Finding("drop", f"{copies}, exactly or but for case, space and punctuation: {places}"))
    if copied.all():
        nothing = "data.validation: every row is in training, so nothing would be measured"
        findings.append(Finding("stop", f"{nothing}; use other rows, or a share: --data.validation 0.05"))
    rows = validation.rows.select(np.flatnonzero(~copied))
    return replace(validation, rows=rows, counts=replace(validation.counts, rows=len(rows)), findings=findings)


def _near_copies(train, validation, signatures: dict[str, np.ndarray], copied: np.ndarray) -> Iterator[Finding]:
    """Validation rows that are nearly a train row: where a band of their signatures is the same, as locality-sensitive
    hashing has it, the share of equal hashes is the share of common runs (Broder 1997)."""
    known, pairs = defaultdict(list), []
    for number, signature in enumerate(signatures["train"]):
        for band in enumerate(map(bytes, signature[1:].reshape(-1, BAND))):
            known[band].append(number)
    for signature in signatures["validation"]:
        bands = enumerate(map(bytes, signature[1:].reshape(-1, BAND)))
        found = dict.fromkeys(number for band in bands for number in known.get(band, ()))
        others = signatures["train"][list(found)[:CANDIDATES]]
        near = max(((float((signature[1:] == other[1:]).mean()), int(other[0])) for other in others), default=(0.0, 0))
        if near[0] >= NEAR and not copied[signature[0]]:
            pairs.append((near[0], validation.rows[int(signature[0])]["where"], train.rows[near[1]]["where"]))
    if pairs:
        shown = "; ".join(f"{a} is nearly {b} ({share:.0%})" for share, a, b in sorted(pairs, reverse=True)[:3])
        part = f" (of the first {ROWS_SIGNED:,} rows)" if len(signatures["train"]) == ROWS_SIGNED else ""
        flatter = f"{len(pairs):,} validation rows{part} are nearly train rows, so their scores flatter"
        yield Finding("warn", f"{flatter}: {shown}")


def _cached(key: str, files: dict[str, str], *sources) -> dict[str, tuple[Prepared, np.ndarray]]:
    """{part: (rows, signatures)} of the cache's entry `key`, found again by content, so that an edit is noticed. Where
    there is none, or a damaged one, one process of a machine makes it of `sources`, as `_write` takes them. Raises
    `UserError` where one of `files` has another hash after it was read than before."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lora-recipes" / key
    # The others wait here: a barrier would give up after its timeout; where the one fails, the launcher ends them.
    while not (kept := _kept(folder)) and int(os.environ.get("LOCAL_RANK", 0)) != 0:
        time.sleep(0.2)
    if kept:
        return kept
    if folder.exists() and not _kept(folder):  # asked twice: another process may have just made it
        say(f"rows are prepared again: those in {folder} are damaged")
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made_in = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{key}.", ignore_cleanup_errors=True)
    except OSError as error:
        why = f"prepared rows cannot be kept there: {error.strerror}"
        raise UserError(f"{folder.parent}: {why}; name a folder that can be written: export HF_HOME=FOLDER") from error
    with made_in as temporary:
        made = Path(temporary, "rows")  # in it, since what tempfile itself makes is closed to other users of the cache
        made.mkdir()
        parts = _write(made, *sources)
        if changed := [name for name, digest in files.items() if file_hash(Path(name)) != digest]:
            raise UserError(f"{changed[0]}: was changed while it was read; run again when it is written")
        digests = {path.name: file_hash(path) for path in sorted(made.iterdir())}
        write_json(made / "counts.json", {"parts": parts, "sha256": digests})
        sync(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster; its rows are the same
                raise
        sync_path(folder.parent)
    for entry in folder.parent.iterdir():  # each edit of a file or a setting leaves one; runs keep what they have open
        with contextlib.suppress(OSError):  # another process removes it, too
            if time.time() - entry.stat().st_mtime > (UNUSED if "." not in entry.name else LEFT):
                shutil.rmtree(entry)
    if not (kept := _kept(folder)):
        raise UserError(f"{folder}: these prepared rows are damaged and cannot be replaced; remove the folder")
    return kept


def _kept(folder: Path) -> dict | None:
    """The parts of a cache entry; None if there is none, or a damaged one."""
    from datasets import Dataset

    parts: dict[str, tuple] = {}
    try:
        content = read_json(folder / "counts.json", {"parts": dict, "sha256": dict})
        if any(file_hash(folder / name) != digest for name, digest in content["sha256"].items()):
            return None
        for part, (counts, found) in content["parts"].items():
            rows = Dataset.from_file(str(folder / f"{part}.arrow"))
            prepared = Prepared(rows, Counts(**counts), findings=[Finding(*each) for each in found])
            parts[part] = prepared, np.load(folder / f"{part}.npy")
    except (OSError, UserError, ValueError, TypeError, EOFError):  # pyarrow's errors are ValueErrors
        return None
    with contextlib.suppress(OSError):  # in a cache that one may only read
        os.utime(folder)  # used today
    return parts


def _key(names: tuple[str, ...], files: dict[str, str], options: DataOptions, tokenizer, args) -> str:
    """A digest of all that prepared rows depend on: files, template, tokenizer, settings, libraries, this package."""
    changes_no_row = {"train", "validation", "test", "ledger", "samples", "max_over_length"}
    settings = {key: value for key, value in vars(options).items() if key not in changes_no_row}
    settings |= {"names": names, "share": options.validation if len(names) > 1 else options.validation is not None}
    settings |= {"max_length": args.max_length, "seed": args.seed, "exclude": sorted(read_excluded(options.exclude))}
    versions = [importlib.metadata.version(name) for name in ("datasets", "transformers", "tokenizers", "rensa")]
    code = [module.read_bytes() for module in sorted(Path(__file__).parent.glob("*.py"))]
    today = time.strftime("%F") if "strftime_now" in tokenizer.chat_template else None  # such a template writes it
    texts = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items())
    return hashlib.sha256(repr([settings, versions, files, code, today, texts]).encode()).hexdigest()[:32]


def document_hash(input_ids) -> bytes:
    """A key for a row by its token ids, which is all that is left of it once it is packed."""
    return hashlib.blake2b(np.asarray(input_ids, dtype=np.int32).tobytes(), digest_size=8).digest()


def locate(rows) -> dict[bytes, str]:
    """{`document_hash`: file:line} for each of the rows, to find packed documents again; the first of equal ones."""
    places: dict[bytes, str] = {}
    for batch in rows.select_columns(["input_ids", "where"]).with_format("numpy").iter(BATCH):
        for ids, where in zip(batch["input_ids"], batch["where"], strict=True):
            places.setdefault(document_hash(ids), str(where))
    return places


def fingerprint(chat: Chat) -> int:
    """The same number for chats that differ in case, space and (ASCII) punctuation alone."""
    digest = hashlib.blake2b(digest_size=8)
    for message in chat.messages:
        text = message["content"] + (json.dumps(message["tool_calls"]) if "tool_calls" in message else "")
        digest.update(message["role"].encode() + text.casefold().encode().translate(None, NO_LETTERS) + b"\n")
    return int.from_bytes(digest.digest(), "big", signed=True)


def fingerprint_text(number: int) -> str:
    """A fingerprint as a line of data.exclude has it: 16 hexadecimal digits."""
    return f"{number % 2**64:016x}"
