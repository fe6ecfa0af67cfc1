"""How much data: train on nested shares of the rows, and say what twice the rows would bring.

    python recipes/learning_curve.py configs/mistral.yaml
    python recipes/learning_curve.py configs/mistral.yaml --qlora --shares 1/16,1/8,1/4,1/2 --html curve.html

Each share is a run folder of its own, for the same epochs, small ones first; each holds the rows of those before it,
drawn by the rows' own text. All are scored on the same validation and test rows, and a power law with a floor goes
through what they reach. Any key of the config can be given as a flag. A curve that was stopped goes on where it was:
give the same command again.
"""

import gc
import hashlib
import sys
from argparse import ArgumentParser
from json import dumps
from json import loads as decoded
from pathlib import Path

from recipes.utils.console import CommandLine, RunEnded, UserError, first_look, out, recipe_parser, run_main, say


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/mistral.yaml")
    parser.add_argument("--qlora", action="store_true", help="train as recipes/sft_qlora.py does")
    parser.add_argument("--shares", default="1/8,1/4,1/2,1", help="of the train rows (1/8,1/4,1/2,1); four at least")
    parser.add_argument("--folder", metavar="DIR", help="where the runs go; runs/CONFIG-METHOD-curve without it")
    parser.add_argument("--max-rows", type=int, default=200, help="how many answers to generate (200)")
    parser.add_argument("--html", metavar="FILE", help="write the curve as a page that opens from disk")
    parser.add_argument("--json", metavar="FILE", help="write its points and what they foretell")
    return parser


if __name__ == "__main__":
    given = first_look(command_line())  # --help and slips are answered before the imports below, which take seconds

import numpy as np
import torch
from rich.table import Table

import recipes.utils.evaluation as scoring
from recipes import sft_lora, sft_qlora
from recipes.utils.config import Config, load_config
from recipes.utils.data import Encoder, read_chats
from recipes.utils.files import locked, read_json, whole_file, write_json
from recipes.utils.page import write_page
from recipes.utils.planning import read_shares, split_rows, twice

STEPS = {"training.eval_steps": 0.2, "training.save_steps": 0.2}  # in the place of absolute ones: a share of all steps
TASK = ("exact_match", "rouge_l")  # the task's score: the first of which some answer has any


def learning_curve(
    config, flags: dict, qlora=False, shares="1/8,1/4,1/2,1", folder=None, max_rows=200, html=None, json=None
) -> dict:
    """Train, score and foretell. Returns what --json writes: {"points": [{"rows", "validation_loss" (nats a token),
    "task"}], "task_score": its name, "forecasts": {"validation loss": ..., ...} (None where the points cannot tell),
    "says": [...]}. `flags` are keys of the config with their values. Raises `UserError` for what no curve can be had
    of, `RunEnded` where a run is stopped; the same call goes on."""
    # 1. Settings that mean the same for few rows as for many.
    method, parts = "qlora" if qlora else "lora", read_shares(shares)
    for path in (html, json):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: there is no such folder")
    if "training.output_dir" in flags:
        raise UserError("--training.output_dir: each run has its own; the curve's folder is --folder")
    whole = load_config(config, flags, method)
    check_settings(whole)
    flags = flags | {key: value for key, value in STEPS.items() if whole.training.get(key.partition(".")[2], 500) >= 1}

    # 2. The rows: one set for validation, and nested sets for training, as files of the curve's own.
    folder = Path(folder or f"runs/{whole.name}-{method}-curve")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        sets, validation = split_rows(whole.data, whole.training.get("seed", 42), parts)
        files = {name: "".join(row + "\n" for row in rows) for name, rows in {**sets, "validation": validation}.items()}
        remember(folder, whole, method, files)
        for name, text in files.items():
            with whole_file(folder / f"{name}.jsonl") as file:
                file.write(text)

        # 3. Train, small ones first. What is finished stays; what was stopped goes on from its checkpoint.
        train = sft_qlora.train_qlora if qlora else sft_lora.train_lora
        for number, (name, rows) in enumerate(sets.items(), start=1):
            run = folder / name
            if (run / "run.json").is_file() and read_json(run / "run.json")["status"] == "finished":
                continue
            say(f"\ncurve: run {number} of {len(sets)}, on {len(rows):,} rows")
            own: dict = {"data.train": str(folder / f"{name}.jsonl"), "data.exclude": None}
            own["data.validation"] = str(folder / "validation.jsonl")
            own |= {**flags, "training.output_dir": str(run)} | own
            try:
                train(load_config(config, own, method, resume="latest" if run.is_dir() else None))
            except RunEnded as error:
                raise RunEnded(error.word, f"{error}\nto go on with the curve, give its own command again") from error
            gc.collect()
            torch.cuda.empty_cache()  # the next one needs it

        # 4. Score them on the same rows: losses on the validation rows, answers to the test rows if there are any.
        points = [score(folder / name, folder / "validation.jsonl", max_rows) for name in sets]

    # 5. The law, and what it foretells.
    found = look_ahead(points)
    for line in found["says"]:
        say("\n" + line)
    if json:
        write_json(Path(json), found)
        say(f"written: {json}")
    if html:
        write_page(Path(html), "learning_curve.html", name=str(folder), plots=plots(found), **found)
        say(f"written: {html}")
    return found


def check_settings(config: Config) -> None:
    """Raise `UserError` for settings that would train a run on few rows otherwise than one on many."""
    if config.training.get("max_steps", -1) > 0:
        raise UserError("training.max_steps: the runs of a curve have equal epochs: --training.max_steps -1")
    if config.training.get("warmup_steps", 0) >= 1:
        raise UserError("training.warmup_steps: few rows have few steps, so give a share: --training.warmup_steps 0.03")
    if config.data.validation is None:
        raise UserError("a curve is of the validation loss: --data.validation 0.05, or a file")


def remember(folder: Path, config: Config, method: str, files: dict[str, str]) -> None:
    """Write what the curve is of, so that it goes on with nothing else. Raises `UserError` where it would."""
    path = folder / "curve.json"
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    settings = {"method": method, "sections": decoded(dumps(config.sections(), default=str)), "rows": digests}
    if path.is_file():
        before = read_json(path)
        rows = {name: before["rows"].get(name, digest) for name, digest in digests.items()}
        if {**settings, "rows": rows} != {**settings, "rows": digests} or before["sections"] != settings["sections"]:
            raise UserError(f"{folder}: holds a curve of other settings or rows; give another --folder")
        settings["rows"] = before["rows"] | digests
    write_json(path, settings)


def score(run: Path, validation: Path, max_rows: int) -> dict:
    """Of a run: its `rows`, and of the validation rows their `losses` (nats a token) and `tokens`; of the test rows, or
    else of the validation rows, the scores in `TASK`. Kept in RUN/evaluation/curve.json."""
    record, kept = scoring.read_run(run), run / "evaluation" / "curve.json"
    asked = scoring.rows_to_score(record) if record["data"]["test"] else []
    chats = asked + read_chats(str(validation), record["data"]["system"] == "merge")
    of = {"rows_sha256": scoring.rows_digest(chats), "max_rows": max_rows, "finished": record["finished"]}
    if kept.is_file() and (found := read_json(kept))["of"] == of:
        return found
    say(f"{run}: scored on {len(chats):,} rows")
    encoder = Encoder(scoring.load_adapter_tokenizer(run, record), escape=True, think=record["data"].get("think"))
    live = scoring.load_adapter(run, record)
    rows = scoring.evaluate(live, encoder, chats, min(max_rows, len(asked) or len(chats)))
    found = {"of": of, "rows": record["rows"]["train"]["rows"]}
    found |= {key: [row[key] for row in rows[len(asked) :]] for key in ("loss", "tokens")}
    found |= {name: [float(row[name]) for row in rows if name in row] for name in TASK}
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, found)
    return found


def look_ahead(points: list[dict]) -> dict:
    """What `learning_curve` returns, and its table on the terminal."""
    counts = [point["rows"] for point in points]
    losses, tokens = np.array([point["loss"] for point in points]), np.array(points[0]["tokens"], float)
    task = next((name for name in TASK if any(sum(point[name]) for point in points)), TASK[0])
    answers = np.array([point[task] for point in points])
    label = scoring.SCORES[task].label
    table = Table("rows", "validation loss", label, box=None, padding=(0, 2), header_style="bold")
    lines = []
    for count, loss, right in zip(counts, losses, answers, strict=True):
        mean, share = float(np.average(loss, weights=tokens)), float(right.mean())
        lines.append({"rows": count, "validation_loss": mean, "task": share})
        table.add_row(f"{count:,}", f"{mean:.4f}", f"{share:.1%}")
    say("")
    out.print(table)
    # A law of what is wrong; half an answer more, so that none wrong is not the end of it.
    wrong = 1 - answers + 0.5 / answers.shape[1]
    wrongly = f"answers wrong by {label}"
    curves = {"validation loss": (losses, tokens, ".4f"), wrongly: (wrong, np.ones(len(wrong[0])), ".1%")}
    forecasts, says = {}, []
    for what, (values, weights, form) in curves.items():
        forecast, text = twice(what, counts, values, weights, form)
        forecasts[what] = forecast._asdict() if forecast else None
        says.append(text)
    return {"points": lines, "task_score": task, "forecasts": forecasts, "says": says}


def plots(found: dict) -> list[dict]:
    """For the page: each curve as places in a box of 600 by 240, the rows on a logarithmic scale, with its forecast."""
    made = []
    for (what, ahead), key in zip(found["forecasts"].items(), ("validation_loss", "task"), strict=True):
        values = [1 - point[key] if key == "task" else point[key] for point in found["points"]]
        rows = [point["rows"] for point in found["points"]] + ([ahead["rows"]] if ahead else [])
        ends = [ahead["low"], ahead["high"]] if ahead else []
        top, low, high = max([*values, *ends]) or 1.0, np.log(rows[0]), np.log(rows[-1])
        x = [60 + 500 * float((np.log(row) - low) / max(high - low, 1e-9)) for row in rows]
        y = [220 - 200 * value / top for value in values]
        whisker = [220 - 200 * end / top for end in ends]
        seen = zip(x, y, rows, values, strict=False)  # the forecast has no value yet
        spots = [{"x": one, "y": two, "rows": row, "value": value} for one, two, row, value in seen]
        made.append({"what": what, "spots": spots, "ahead": {**ahead, "x": x[-1], "ends": whisker} if ahead else None})
    return made


def main(given: CommandLine) -> None:
    options = {name: value for name, value in given.options.items() if name not in ("traceback", "config")}
    learning_curve(given.options["config"], given.flags, **options)


if __name__ == "__main__":
    sys.exit(run_main(main, given))
