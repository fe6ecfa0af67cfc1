"""What the model will really be trained on, token by token, before a GPU is paid for.

    python recipes/inspect_data.py configs/mistral.yaml
    python recipes/inspect_data.py configs/mistral.yaml --data.train my_chats.jsonl --random --rows 5
    python recipes/inspect_data.py configs/mistral.yaml --row my_chats.jsonl:17
    python recipes/inspect_data.py configs/mistral.yaml --html data.html
    python recipes/inspect_data.py configs/mistral.yaml --json
    python recipes/inspect_data.py configs/mistral.yaml --ledger runs/mistral-lora     the rows that it could not learn

Takes the keys of a config as flags, as the training recipes do. Loads no model weights and needs no GPU.
"""

import contextlib
import json
import os
import random
import sys
from argparse import ArgumentParser
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from recipes.utils.console import CommandLine, UserError, first_look, recipe_parser, run_main, say


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("config", help="a YAML file, such as configs/mistral.yaml")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to show token by token (3)")
    parser.add_argument("--row", metavar="FILE:LINE", help="show this row")
    parser.add_argument("--random", dest="pick", action="store_true", help="show random rows")
    parser.add_argument("--ledger", metavar="RUN", help="show the rows that this run could not learn, the worst first")
    parser.add_argument("--html", metavar="FILE", help="write the same as a page that opens from disk")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print the same for a machine")
    return parser


if __name__ == "__main__":
    given = first_look(command_line())  # --help and slips are answered before the imports below, which take seconds

import numpy as np
from trl import SFTConfig
from trl.data_utils import pack_dataset

from recipes.utils.config import Config, read_config
from recipes.utils.data import Prepared, prepare, print_data, read_tokenizer, token_pieces, write_data_page
from recipes.utils.model import find_base
from recipes.utils.monitoring import read_ledger
from recipes.utils.training import check_settings, steps_of

WORST = 20  # rows of a ledger that are listed


def inspect_data(config: Config, rows=3, row=None, pick=False, ledger=None) -> dict:
    """What `config` would train on: {"train", "validation", "lengths", "findings", "rows", ...}, all of it plain JSON.
    `row` is a file:line to show, `pick` shows random rows in the place of the first `rows`, and `ledger`, a run's
    folder, those that the run could not learn."""
    # 1. The rows as the recipes prepare them, and what is found in them; what would stop a run does not stop here.
    args = SFTConfig(**config.training)
    base, model = find_base(config.model, weights=False), config.model
    tokenizer, template_reason = read_tokenizer(base, model.chat_template, model.trust_remote_code)
    train, validation = prepare(config.data, tokenizer, args, report=False)

    # 2. Packed and counted at this config.
    columns, packed, packing = train.rows.select_columns(["input_ids", "labels"]), len(train.rows), None
    if args.packing:
        packed = len(pack_dataset(columns, args.max_length, args.packing_strategy))
        packing = {"rows": packed, "fill": train.counts.tokens / (packed * args.max_length)}
    findings = train.findings + (validation.findings if validation else []) + check_settings(args, packed, len(columns))
    steps, steps_an_epoch = steps_of(args, packed)
    counted = [(len(labels), _answers(labels)) for batch in columns.iter(1000) for labels in batch["labels"]]
    lengths, answers = zip(*counted, strict=True)
    bars, edges = np.histogram(lengths, bins=12)

    # 3. The rows that are shown.
    worst = read_ledger(ledger)[:WORST] if ledger else []
    if ledger or row:
        places = dict.fromkeys(entry.where for entry in worst[:rows]) if ledger else [row]
        shown = [found for place in places for found in _rows_at(train, place)]
    else:
        indices, count = range(len(columns)), min(rows, len(columns))
        shown = [train.rows[index] for index in (random.sample(indices, count) if pick else indices[:count])]
    return {
        "chat_template": template_reason,
        "train": asdict(train.counts), "validation": asdict(validation.counts) if validation else None,
        "lengths": {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 90, 95, 99, 100)},
        "histogram": [{"from": int(start), "to": int(end), "rows": int(count)}
                      for start, end, count in zip(edges[:-1], edges[1:], bars, strict=True)],
        "answers_a_row": dict(Counter(answers)), "packing": packing, "max_length": args.max_length,
        "steps": steps, "steps_an_epoch": steps_an_epoch,
        "findings": [finding._asdict() for finding in findings], "ledger": [entry._asdict() for entry in worst],
        "rows": [{"where": item["where"], "tokens": token_pieces(tokenizer, item["input_ids"], item["labels"])}
                 for item in shown],
    }  # fmt: skip


def _rows_at(train: Prepared, where: str) -> list[dict]:
    """The rows of a file:line: several where the answers of a chat are split."""
    places = [index for index, place in enumerate(train.rows["where"]) if place == os.path.relpath(where)]
    if not places:
        named = f"rows are named as the config names the file, such as {train.rows[0]['where']}"
        raise UserError(f"--row {where}: no such row is trained on; {named}, and dropped ones are not shown")
    return [train.rows[index] for index in places]


def _answers(labels: list[int]) -> int:
    return sum(label != -100 and before == -100 for before, label in zip([-100, *labels[:-1]], labels, strict=True))


def main(given: CommandLine) -> None:
    html, as_json, *shown = (given.options[name] for name in ("html", "as_json", "rows", "row", "pick", "ledger"))
    if html and not Path(html).absolute().parent.is_dir():
        raise UserError(f"--html {html}: there is no such folder")
    method = "qlora" if any(key.startswith("quantization") for key in {**given.yaml, **given.flags}) else "lora"
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # it is for the JSON alone then
        config = read_config(given, method)
        report = inspect_data(config, *shown)
        if html:
            write_data_page(Path(html), config, report)
            say(f"written: {html}")
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    elif not html:
        print_data(config.name, report)


if __name__ == "__main__":
    sys.exit(run_main(main, given))
