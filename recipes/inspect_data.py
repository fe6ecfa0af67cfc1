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
from collections import Counter
from itertools import pairwise
from pathlib import Path

from recipes.utils.console import ArgumentParser, CommandLine, UserError, first_look, recipe_parser, run_main, say


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
from recipes.utils.data import prepare, read_tokenizer
from recipes.utils.model import find_base
from recipes.utils.monitoring import read_ledger
from recipes.utils.page import write_page
from recipes.utils.show import print_data, token_pieces
from recipes.utils.training import check_settings, steps_of

WORST = 20  # rows of a ledger that are listed


def inspect_data(config: Config, rows=3, row=None, pick=False, ledger=None) -> dict:
    """What `config` would train on: {"train", "validation", "lengths", "findings", "rows", ...}, all of it plain JSON.
    Shown are the first `rows`, by `pick` random ones; or `row`, a file:line; or what the run `ledger` learnt worst."""
    # 1. The rows as the recipes prepare them, and what is found in them; what would stop a run does not stop here.
    args = SFTConfig(**config.training)
    base, model = find_base(config.model, weights=False), config.model
    tokenizer, template_reason = read_tokenizer(base, model.chat_template, model.trust_remote_code, model.adapter)
    train, validation = prepare(config.data, tokenizer, args, report=False)

    # 2. Packed and counted at this config.
    columns, packed, packing = train.rows.select_columns(["input_ids", "labels"]), len(train.rows), None
    if args.packing:
        packed = len(pack_dataset(columns, args.max_length, args.packing_strategy))
        packing = {"rows": packed, "fill": train.counts.tokens / (packed * args.max_length)}
    findings = train.findings + (validation.findings if validation else []) + check_settings(args, packed, len(columns))
    steps, steps_an_epoch = steps_of(args, packed)
    lengths, answers = list[int](), Counter[int]()  # an answer begins where loss does
    for batch in columns.iter(1000):
        lengths += map(len, batch["labels"])
        answers.update(sum(a == -100 != b for a, b in pairwise([-100, *labels])) for labels in batch["labels"])
    bars, edges = np.histogram(lengths, bins=min(12, max(lengths) - min(lengths) + 1))

    # 3. The rows that are shown: several of a file:line where the answers of a chat are split.
    count, worst = min(rows, len(columns)), read_ledger(ledger)[:WORST] if ledger else []
    shown = random.sample(range(len(columns)), count) if pick else list(range(count))
    if ledger or row:
        shown = []
        for place in dict.fromkeys(entry.where for entry in worst[:rows]) if ledger else [row]:
            found = [index for index, where in enumerate(train.rows["where"]) if where == os.path.relpath(place)]
            if not found:
                named = f"rows are named as the config names the file, such as {train.rows[0]['where']}"
                raise UserError(f"--row {place}: no such row is trained on; {named}, and dropped ones are not shown")
            shown += found
    return {
        "chat_template": template_reason, "packing": packing, "max_length": args.max_length,
        "train": vars(train.counts), "validation": vars(validation.counts) if validation else None,
        "lengths": {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 25, 50, 75, 90, 95, 99, 100)},
        "histogram": [{"from": int(start), "to": int(end), "rows": int(count)}
                      for start, end, count in zip(edges[:-1], edges[1:], bars, strict=True)],
        "answers_a_row": dict(answers), "steps": steps, "steps_an_epoch": steps_an_epoch,
        "findings": [finding._asdict() for finding in findings], "ledger": [entry._asdict() for entry in worst],
        "rows": [{"where": item["where"], "tokens": token_pieces(tokenizer, item["input_ids"], item["labels"])}
                 for item in train.rows.select(shown)],
    }  # fmt: skip


def main(given: CommandLine) -> None:
    html, as_json, *shown = (given.options[name] for name in ("html", "as_json", "rows", "row", "pick", "ledger"))
    if html and not Path(html).absolute().parent.is_dir():
        raise UserError(f"--html {html}: there is no such folder")
    method = "qlora" if any(key.startswith("quantization") for key in {**given.yaml, **given.flags}) else "lora"
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # it is for the JSON alone then
        config = read_config(given, method)
        report = inspect_data(config, *shown)
        if html:
            write_page(Path(html), "inspect_data.html", config=config, report=report)
            say(f"written: {html}")
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    elif not html:
        print_data(config.name, report)


if __name__ == "__main__":
    sys.exit(run_main(main, given))
