"""What the model will really be trained on, token by token, before a GPU is paid for.

    python recipes/inspect_data.py configs/mistral.yaml
    python recipes/inspect_data.py configs/mistral.yaml --data.train my_chats.jsonl --random --rows 5
    python recipes/inspect_data.py configs/mistral.yaml --row my_chats.jsonl:17
    python recipes/inspect_data.py configs/mistral.yaml --html data.html
    python recipes/inspect_data.py configs/mistral.yaml --json
    python recipes/inspect_data.py configs/mistral.yaml --ledger runs/mistral-lora     the rows that it could not learn

Takes the keys of a config as flags, as the training recipes do. Loads no model weights and needs no GPU.
"""

import argparse
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

from recipes.utils.command_line import first_look


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
from recipes.utils.config_file import read_flags
from recipes.utils.console import UserError, out, print_table, run, say
from recipes.utils.guards import check_rows, check_settings
from recipes.utils.ledger import read_ledger
from recipes.utils.model import load_tokenizer
from recipes.utils.page import write_data_page
from recipes.utils.prepare import Prepared, prepare
from recipes.utils.run_table import steps_of
from recipes.utils.token_view import token_pieces

import numpy as np
from rich.text import Text
from trl import SFTConfig
from trl.data_utils import pack_dataset

STYLES = {"trained": "black on green", "special": "bold magenta", "context": "dim"}
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
    shown = _rows_to_show(train, row, rows, pick)
    if ledger:
        shown = [
            item
            for where in dict.fromkeys(entry.where for entry in worst[:rows])
            for item in _rows_to_show(train, where, 1, False)
        ]
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
        _print(config, report)
    return report


def _rows_to_show(train: Prepared, where: str | None, count: int, pick: bool) -> list[dict]:
    if where:
        places = [index for index, place in enumerate(train.rows["where"]) if place == os.path.relpath(where)]
        if not places:
            raise UserError(
                f"--row {where}: no such row is trained on; rows are named as the config names the file, such as "
                f"{train.rows[0]['where']}, and dropped ones are not shown"
            )
        return [train.rows[index] for index in places]
    indices = range(len(train.rows))
    chosen = random.sample(indices, min(count, len(indices))) if pick else indices[:count]
    return [train.rows[index] for index in chosen]


def _answers(labels: list[int]) -> int:
    return sum(label != -100 and before == -100 for before, label in zip([-100, *labels[:-1]], labels, strict=True))


def _histogram(lengths: np.ndarray) -> list[dict]:
    counts, edges = np.histogram(lengths, bins=BINS)
    return [
        {"from": int(a), "to": int(b), "rows": int(n)} for n, a, b in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def _print(config: Config, report: dict) -> None:
    train, packing = report["train"], report["packing"]
    print_table(f"{config.name}: what would be trained on", {
        "chat template": report["chat_template"],
        "files": ", ".join(f"{n:,} {shape} rows" for shape, n in train["shapes"].items()),
        "ignored keys": ", ".join(train["ignored_keys"]) or None,
        "rows": f"{train['rows']:,} train, {(report['validation'] or {'rows': 0})['rows']:,} validation; left out: "
                f"{len(train['bad']):,} bad, {train['dropped']:,} over max_length or without an answer; {train['blank']:,} blank lines",
        "answers a row": ", ".join(f"{n:,} rows of {k}" for k, n in sorted(report["answers_a_row"].items())),
        "tokens": f"{train['tokens']:,}, trained on {train['trained_tokens']:,} ({train['trained_tokens'] / train['tokens']:.0%})",
        "tokens a row": ", ".join(f"{name} {value:,}" for name, value in report["lengths"].items()),
        "packing": f"{packing['rows']:,} rows of {report['max_length']}, {packing['fill']:.1%} filled" if packing else "off",
        "steps": f"{report['steps']:,} ({report['steps_an_epoch']:,} an epoch)",
    })  # fmt: skip
    most = max(bar["rows"] for bar in report["histogram"])
    for bar in report["histogram"]:
        say(f"  {bar['from']:>6,}–{bar['to']:<6,} {'█' * round(40 * bar['rows'] / most):<40} {bar['rows']:,}")
    for finding in report["findings"]:
        say(f"{finding['level']}: {finding['message']}")
    if report["ledger"]:
        say("\nrows that stay worst: loss in nats a token at each epoch, and above the others' by")
    for entry in report["ledger"]:
        losses = " → ".join(f"{loss:.2f}" for loss in entry["losses"].values())
        say(f"  {entry['where']}  {losses}  {entry['excess']:+.2f}  {entry['tokens']} tokens")
    for row in report["rows"]:
        text = Text()
        kinds = ["context", *(kind for _, kind in row["tokens"]), "context"]
        for place, (token, kind) in enumerate(row["tokens"], start=1):
            opens, closes = (kind == "trained" != kinds[place + step] and not out.is_terminal for step in (-1, 1))
            text.append("«" * opens + token.replace("\n", "⏎\n") + "»" * closes, STYLES[kind])
        legend = "green is trained on, control tokens are magenta" if out.is_terminal else "«» is trained on"
        say(f"\n{row['where']}   ({legend}; the rest is read, not learnt)")
        out.print(text, soft_wrap=True)


def main(argv: list[str]) -> None:
    options, rest = command_line().parse_known_args(argv)
    path = Path(options.config)
    words = " ".join(rest) + (path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")
    method = "qlora" if "quantization" in words else "lora"
    config = load_config(path, read_flags(rest), method, new_run=False)
    inspect_data(config, options.rows, options.row, options.pick, options.html, options.as_json, options.ledger)


if __name__ == "__main__":
    sys.exit(run(main))
