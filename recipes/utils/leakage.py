"""Validation rows that stand in training: copies are left out, near copies are named."""

import re
from itertools import islice
from typing import NamedTuple

from recipes.utils.config import Config
from recipes.utils.dataset import Report, held_out, stream_chats
from recipes.utils.prepare import Prepared
from recipes.utils.row_identity import fingerprint

import numpy as np
from rensa import RMinHash, RMinHashLSH

ROWS_HASHED = 20_000  # of either part; about two seconds
CANDIDATES = 20  # looked at for each validation row
NEAR = 0.8  # share of three-word runs that two chats have in common
PERMUTATIONS = 128


class Finding(NamedTuple):
    """`level` is "stop" (cannot be right), "drop" (rows left out) or "warn" (unwise); `message` says what and the mend."""

    level: str
    message: str


def leave_out_copies(train: Prepared, validation: Prepared) -> tuple[list[Finding], Prepared]:
    """Findings, and the validation rows without those whose text is in training but for case, space and punctuation."""
    findings = []
    known = np.isin(validation.rows["fingerprint"], train.rows["fingerprint"])
    if known.any():
        places = [validation.rows[int(index)]["where"] for index in np.flatnonzero(known)[:3]]
        findings.append(
            Finding(
                "drop",
                f"{known.sum():,} of {len(known):,} validation rows are in training, exactly or "
                f"but for case, space and punctuation: {', '.join(places)}",
            )
        )
        validation = validation._replace(
            rows=validation.rows.select(np.flatnonzero(~known)),
            counts={**validation.counts, "rows": int((~known).sum())},
        )
        if known.all():
            findings.append(
                Finding(
                    "stop",
                    "data.validation: every row is in training, so nothing would be measured; "
                    "use other rows, or a share: --data.validation 0.05",
                )
            )
    return findings, validation


def sample(config: Config, part: str, limit: int):
    """Yield up to `limit` chats of `part`, from the start of its files; bad rows are passed over."""
    data = config.data
    share = isinstance(data.validation, float)
    paths = data.train if share or part == "train" else data.validation
    chats = stream_chats(paths, Report(), data.system == "merge")
    seed = config.training.get("seed", 42)
    if share:
        chats = (chat for chat in chats if held_out(chat, data.validation, seed) == (part == "validation"))
    yield from islice(chats, limit)


def near_duplicates(config: Config) -> list[Finding]:
    """Validation rows that are nearly a train row, by MinHash over runs of three words."""
    index = RMinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS, num_bands=16)
    train = []
    for key, chat in enumerate(sample(config, "train", ROWS_HASHED)):
        train.append((_signature(chat), fingerprint(chat), chat.where))
        index.insert(key, train[-1][0])
    pairs = []
    for chat in sample(config, "validation", ROWS_HASHED):
        signature, own = _signature(chat), fingerprint(chat)
        candidates = [train[key] for key in index.query(signature)[:CANDIDATES]]
        near = [
            (signature.jaccard(other), where) for other, print_, where in candidates if print_ != own
        ]  # copies are out
        if near and max(near)[0] >= NEAR:
            pairs.append((max(near)[0], chat.where, max(near)[1]))
    if not pairs:
        return []
    shown = "; ".join(f"{a} is nearly {b} ({share:.0%})" for share, a, b in sorted(pairs, reverse=True)[:3])
    part = f" (of the first {ROWS_HASHED:,} rows)" if len(train) == ROWS_HASHED else ""
    return [
        Finding("warn", f"{len(pairs):,} validation rows{part} are nearly train rows, so their scores flatter: {shown}")
    ]


def _signature(chat) -> RMinHash:
    words = re.findall(r"\w+", " ".join(m["content"] for m in chat.messages if m["role"] != "system").casefold())
    signature = RMinHash(num_perm=PERMUTATIONS, seed=0)
    signature.update([" ".join(words[place : place + 3]) for place in range(max(1, len(words) - 2))])
    return signature
