"""Take rows out of a run: train it anew without them, and write a receipt of the deletion that can be checked.

    python recipes/forget_rows.py runs/mistral-lora --rows train.jsonl:17,train.jsonl:1204 --dry-run
    python recipes/forget_rows.py runs/mistral-lora --rows-file rows.txt
    python recipes/forget_rows.py runs/mistral-lora --match "Jane Doe"
    python recipes/forget_rows.py --verify runs/mistral-lora-forgot/deletion.json

The new run is one on files that never held the rows: on a CPU, bit for bit. Copies of a row (equal but for case, space
and punctuation) go along; near copies are listed, for you to name too. RUN is left as it is: the receipt says what else
holds the rows, with the commands that remove it. --verify ends with 4 where a receipt does not hold.
"""

import sys
from argparse import ArgumentParser
from pathlib import Path

from recipes.utils.console import (
    GATE_FAILED,
    OK,
    CommandLine,
    UserError,
    first_look,
    print_table,
    recipe_parser,
    run_main,
    say,
)


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="a finished run")
    parser.add_argument("--rows", default="", metavar="FILE:LINE,...", help="rows to take out, or their fingerprints")
    parser.add_argument("--rows-file", metavar="FILE", help="the same, one a line")
    parser.add_argument("--match", metavar="TEXT", help="take out every row that holds this text")
    parser.add_argument("--unseen", metavar="FILE", help="rows of their kind, never trained on (the run's test rows)")
    parser.add_argument("--output", metavar="DIR", help="the new run's folder (RUN-forgot)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be taken out and what it costs")
    parser.add_argument("--verify", metavar="RECEIPT", help="check a receipt (deletion.json), in the place of RUN")
    return parser


if __name__ == "__main__":
    given = first_look(command_line())  # --help and slips are answered before the imports below, which take seconds

import recipes.utils.deletion as deletion
from recipes import sft_lora, sft_qlora
from recipes.utils.config import load_config
from recipes.utils.data import fingerprint, fingerprint_text, read_excluded
from recipes.utils.evaluation import read_run, rows_to_score


def forget_rows(
    run_folder=None, rows="", rows_file=None, match=None, unseen=None, output=None, dry_run=False, verify=None
) -> dict:
    """Train the run in `run_folder` anew without `rows` (file:line or fingerprints, with commas; those in `rows_file`
    and those that hold the text `match` as well). Returns {"run": the new folder, "measured": what `deletion.measure`
    says}, {} for a `dry_run`; with `verify`, a receipt in the place of all else, {"wrong": what of it does not hold}.
    Raises `UserError` for rows that the run has not, or that a run before it was trained on too."""
    if verify:
        if run_folder or rows or rows_file or match or unseen or output or dry_run:
            raise UserError("--verify takes a receipt alone")
        return {"wrong": deletion.verify(Path(verify))}
    if not run_folder:
        raise UserError("name the run to take rows out of")
    # 1. The rows, their copies, and what it costs.
    old = Path(run_folder)
    record = read_run(old)
    lines = [line.strip() for line in rows.split(",") if line.strip()] + list(read_excluded(rows_file))
    if not lines and match is None:
        raise UserError("name the rows to take out: --rows FILE:LINE, --rows-file FILE or --match TEXT")
    found = deletion.find_rows(record, lines, match)
    deletion.check_parents(record, found)
    seconds = None if record.get("resumed") else record.get("train", {}).get("train_runtime")  # of its last session
    gone = len(found.rows) + len(found.copies)
    table: dict[str, object] = {
        "rows": f"{len(found.rows):,} of {found.total:,}: {_some([chat.where for chat in found.rows])}",
        "copies, which go along": _some([chat.where for chat in found.copies]) or None,
        "near copies, which stay": _some([f"{a} of {b} ({share:.0%})" for a, b, share in found.near]) or None,
        "cost": "the run again" + (f"; the old one took {seconds:,.0f} s" if seconds else ""),
    }
    print_table(f"{old}: to be taken out", table)
    if gone == found.total:
        raise UserError("no row would be left")
    if dry_run:
        return {}

    # 2. The same run on what is left, into a folder of its own.
    new = Path(output) if output else _free(old)
    if new.exists() and any(new.iterdir()):
        raise UserError(f"--output {new}: is there already")
    new.mkdir(parents=True, exist_ok=True)
    excluded = list(read_excluded(record["data"].get("exclude"))) + sorted(map(fingerprint_text, found.fingerprints))
    (new / "excluded.txt").write_text("\n".join(excluded) + "\n", encoding="utf-8")
    settings = {"data.exclude": str(new / "excluded.txt"), "training.output_dir": str(new)}
    config = load_config(old, settings, record["method"])
    train = {"lora": sft_lora.train_lora, "qlora": sft_qlora.train_qlora}[record["method"]]
    train(config)

    # 3. Is it gone? Measured, and written down with what else holds the rows.
    others = rows_to_score(record, unseen) if unseen or record["data"]["test"] or record["data"]["validation"] else []
    others = [chat for chat in others if fingerprint(chat) not in found.fingerprints][:200]
    measured = deletion.measure(old, new, found.rows + found.copies, others) if others else {}
    receipt = deletion.make_receipt(old, new, found, measured)
    if measured:
        deletion.print_measured(measured)
    else:
        say("not measured: the run has no test or validation rows; --unseen FILE names rows that were never trained on")
    say(f"\nreceipt: {receipt}\nnext:    python recipes/forget_rows.py --verify {receipt}")
    return {"run": new, "measured": measured}


def _some(places: list[str]) -> str:
    return ", ".join(places[:5]) + (f" and {len(places) - 5:,} more" if len(places) > 5 else "")


def _free(old: Path) -> Path:
    names = [old.with_name(f"{old.name}-forgot"), *(old.with_name(f"{old.name}-forgot-{n}") for n in range(2, 1000))]
    return next(path for path in names if not path.exists())


def main(given: CommandLine) -> int:
    found = forget_rows(**{name: value for name, value in given.options.items() if name != "traceback"})
    return GATE_FAILED if found.get("wrong") else OK


if __name__ == "__main__":
    sys.exit(run_main(main, given))
