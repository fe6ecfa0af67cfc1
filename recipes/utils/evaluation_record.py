"""RUN/evaluation/: what was scored, row by row and summed up, and reading it again."""

import hashlib
import itertools
import json
from pathlib import Path

from recipes.utils.dataset import Chat
from recipes.utils.intervals import compare
from recipes.utils.jsonl import file_hash
from recipes.utils.scores import figures

MODELS = ("base", "adapter", "merged")
SHARED = ("expected", "expected_tokens", "tokens")  # of the row, whichever model answered


def evaluation_key(run_folder: Path, chats: list[Chat], max_rows: int, max_new_tokens: int | None) -> dict:
    """What must be equal for two sets of scores to be of the same adapter on the same rows."""
    rows = json.dumps([[chat.messages, chat.tools] for chat in chats], ensure_ascii=False)
    return {
        "rows_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "adapter_sha256": file_hash(run_folder / "adapter_model.safetensors"),
        "max_rows": max_rows,
        "max_new_tokens": max_new_tokens,
    }


def sum_up(scored: dict[str, list[dict]], chats: list[Chat]) -> dict:
    """{"base": figures, "adapter": figures, ..., "differences": {"adapter against base": `intervals.compare`, ...},
    "tags": {tag: the same for the rows with that `tag`}} of what `evaluation.evaluate` gave for each model."""
    found = _figures_and_differences(scored)
    tags = [_tag(chat) for chat in chats]
    for tag in sorted({tag for tag in tags if tag}):
        rows = {name: [row for row, own in zip(rows, tags, strict=True) if own == tag] for name, rows in scored.items()}
        found.setdefault("tags", {})[tag] = _figures_and_differences(rows)
    return found


def _figures_and_differences(scored: dict) -> dict:
    names = [name for name in MODELS if name in scored]
    pairs = [(ours, theirs) for theirs, ours in itertools.combinations(names, 2)]
    differences = {f"{ours} against {theirs}": compare(scored[ours], scored[theirs]) for ours, theirs in pairs}
    return {name: figures(scored[name]) for name in names} | {"differences": differences}


def _tag(chat: Chat) -> str:
    tag = json.loads(chat.line).get("tag") if chat.line else None
    return "" if tag is None else str(tag)


def write_rows(path: Path, scored: dict[str, list[dict]], chats: list[Chat]) -> None:
    """One object a row: where, tag, prompt, expected, and each model's answer and scores."""
    with open(path, "w", encoding="utf-8") as file:
        for chat, *rows in zip(chats, *scored.values(), strict=True):
            line = {"where": chat.where, "tag": _tag(chat), "prompt": chat.messages[:-1]}
            line |= {key: rows[0][key] for key in SHARED if key in rows[0]}
            for name, row in zip(scored, rows, strict=True):
                line[name] = {key: value for key, value in row.items() if key not in SHARED}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> dict[str, list[dict]]:
    """What `write_rows` was given as `scored`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = [name for name in MODELS if name in lines[0]]
    return {name: [line[name] | {key: line[key] for key in SHARED if key in line} for line in lines] for name in names}


def scored_before(folder: Path, name: str, key: dict) -> dict[str, list[dict]]:
    """Base and adapter as an earlier evaluation scored them, where it was of the same adapter, rows and settings."""
    if not (folder / "metrics.json").is_file() or not (folder / f"{name}.jsonl").is_file():
        return {}
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    if (metrics if name == "predictions" else metrics.get(name, {})).get("of") != key:
        return {}
    return {model: rows for model, rows in read_rows(folder / f"{name}.jsonl").items() if model != "merged"}


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
