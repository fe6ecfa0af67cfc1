"""By what a row is found again: its tokens once it is packed, its text where copies of it are looked for."""

import hashlib
import json

from recipes.utils.dataset import Chat

import datasets
import numpy as np

BATCH = 1000
NO_LETTERS = bytes(byte for byte in range(128) if not chr(byte).isalnum())


def document_hash(input_ids) -> bytes:
    """A key for a row by its token ids, which is all that is left of it once it is packed."""
    return hashlib.blake2b(np.asarray(input_ids, dtype=np.int32).tobytes(), digest_size=8).digest()


def locate(rows: datasets.Dataset) -> dict[bytes, str]:
    """{`document_hash`: file:line} for each of the rows, to find packed documents again; the first of equal ones."""
    places = {}
    for batch in rows.select_columns(["input_ids", "where"]).with_format("numpy").iter(BATCH):
        for ids, where in zip(batch["input_ids"], batch["where"], strict=True):
            places.setdefault(document_hash(ids), str(where))
    return places


def fingerprint(chat: Chat) -> int:
    """The same number for chats that differ in case, space and (ASCII) punctuation alone."""
    digest = hashlib.blake2b(digest_size=8)
    for message in chat.messages:
        calls = json.dumps(message["tool_calls"]) if "tool_calls" in message else ""
        text = message["content"] + calls
        digest.update(message["role"].encode() + text.casefold().encode().translate(None, NO_LETTERS) + b"\n")
    return int.from_bytes(digest.digest(), "big", signed=True)
