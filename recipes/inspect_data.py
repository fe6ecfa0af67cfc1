"""What the model will really be trained on, token by token, before a GPU is paid for.

    python recipes/inspect_data.py configs/mistral.yaml
    python recipes/inspect_data.py configs/mistral.yaml --data.train my_chats.jsonl --random --rows 5
    python recipes/inspect_data.py configs/mistral.yaml --row my_chats.jsonl:17
    python recipes/inspect_data.py configs/mistral.yaml --html data.html
    python recipes/inspect_data.py configs/mistral.yaml --json
    python recipes/inspect_data.py configs/mistral.yaml --ledger runs/mistral-lora     the rows that it could not learn

Takes the keys of a config as flags, as the training recipes do. Loads no model weights and needs no GPU.
"""

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

from recipes.utils.command_line import ArgumentParser, first_look, parse, recipe_parser


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


if __name__ == "__main__":  # --help and slips are answered before the imports, which take seconds
    first_look(command_line())

from recipes.utils.config import Config, load_config
from recipes.utils.console import UserError, out, run, say
from recipes.utils.guards import check_rows, check_settings
from recipes.utils.ledger import read_ledger
from recipes.utils.model import load_tokenizer
from recipes.utils.page import write_data_page
from recipes.utils.prepare import Prepared, prepare
from recipes.utils.run_table import steps_of
from recipes.utils.token_view import print_data, token_pieces

import numpy as np
from trl import SFTConfig
from trl.data_utils import pack_dataset

BINS = 12
WORST = 20  # rows of a ledger that are listed


def inspect_data(config: Config, rows=3, row=None, pick=False, html=None, as_json=False, ledger=None) -> dict:
    """Print what `config` would train on, and return it: {"files", "train", "validation", "lengths", "findings", "rows"}.

    `row` is a file:line to show, `pick` shows random rows in the place of the first `rows`, and `ledger`, a run's folder,
    those that the run could not learn.
    """
    out.stderr = as_json  # standard output is for the JSON alone then
    # 1. The rows as the recipes prepare them, and what the guards say.
    args = SFTConfig(**config.training)
    tokenizer, template_reason = load_tokenizer(config.model)
    train, validation = (prepare(config.data, args, tokenizer, part) for part in ("train", "validation"))
    findings, validation = check_rows(train, validation, config, tokenizer)

    # 2. Packed and counted at this config.
    lengths = np.array(
        [len(ids) for batch in train.rows.select_columns("input_ids").iter(1000) for ids in batch["input_ids"]]
    )
    trainer_rows = len(train.rows)
    if args.packing:
        trainer_rows = len(
            pack_dataset(train.rows.select_columns(["input_ids", "labels"]), args.max_length, args.packing_strategy)
        )
    findings += check_settings(args, trainer_rows, train.counts)
    steps, steps_an_epoch = steps_of(args, trainer_rows)
    worst = read_ledger(ledger)[:WORST] if ledger else []
    if ledger:
        places = dict.fromkeys(entry.where for entry in worst[:rows])
        shown = [found for place in places for found in _rows_at(train, place)]
    elif row:
        shown = _rows_at(train, row)
    else:
        indices, count = range(len(train.rows)), min(rows, len(train.rows))
        shown = [train.rows[index] for index in (random.sample(indices, count) if pick else indices[:count])]
    report = {
        "chat_template": template_reason,
        "train": train.counts, "validation": validation.counts if validation else None,
        "lengths": {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 90, 95, 99, 100)},
        "histogram": _histogram(lengths),
        "answers_a_row": dict(Counter(_answers(labels) for labels in train.rows["labels"])),
        "packing": {"rows": trainer_rows, "fill": train.counts["tokens"] / (trainer_rows * args.max_length)} if args.packing else None,
        "steps": steps, "steps_an_epoch": steps_an_epoch, "max_length": args.max_length,
        "findings": [finding._asdict() for finding in findings],
        "ledger": [entry._asdict() for entry in worst],
        "rows": [{"where": item["where"], "tokens": token_pieces(tokenizer, item["input_ids"], item["labels"])} for item in shown],
    }  # fmt: skip

    # 3. For a machine, a browser, or the person at the terminal.
    if html and not Path(html).absolute().parent.is_dir():
        raise UserError(f"--html {html}: there is no such folder")
    if html:
        write_data_page(Path(html), config, report)
        say(f"written: {html}")
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    elif not html:
        print_data(config.name, report)
    return report


def _rows_at(train: Prepared, where: str) -> list[dict]:
    """The rows of a file:line: several where the answers of a chat are split."""
    places = [index for index, place in enumerate(train.rows["where"]) if place == os.path.relpath(where)]
    if not places:
        raise UserError(
            f"--row {where}: no such row is trained on; rows are named as the config names the file, such as "
            f"{train.rows[0]['where']}, and dropped ones are not shown"
        )
    return [train.rows[index] for index in places]


def _answers(labels: list[int]) -> int:
    return sum(label != -100 and before == -100 for before, label in zip([-100, *labels[:-1]], labels, strict=True))


def _histogram(lengths: np.ndarray) -> list[dict]:
    counts, edges = np.histogram(lengths, bins=BINS)
    return [
        {"from": int(a), "to": int(b), "rows": int(n)} for n, a, b in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def main(argv: list[str]) -> None:
    options, keys = parse(command_line(), argv)
    path = Path(options.pop("config"))
    words = " ".join(keys) + (path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")
    inspect_data(load_config(path, keys, "qlora" if "quantization" in words else "lora", new_run=False), **options)


if __name__ == "__main__":
    sys.exit(run(main))
