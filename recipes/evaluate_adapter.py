"""Base against adapter on the test rows: losses, scores of the answers, and whether the difference means anything.

    python recipes/evaluate_adapter.py                                the newest finished run
    python recipes/evaluate_adapter.py runs/mistral-lora --max-rows 50
    python recipes/evaluate_adapter.py runs/mistral-lora --model runs/mistral-lora/merged
    python recipes/evaluate_adapter.py runs/mistral-lora --forgetting general.jsonl
    python recipes/evaluate_adapter.py runs/mistral-lora --scales 0,0.5,0.75,1,1.25 --forgetting general.jsonl

Writes metrics.json and predictions.jsonl into RUN/evaluation/. Rows with a key `tag` are summed up by tag as well. A LoRA
adapter is linear in its scale: --scales turns it down or up without training again, and merge_adapter.py --scale
merges it at the one you choose (into scales.json).
"""

import sys
from pathlib import Path

from recipes.utils.command_line import ArgumentParser, first_look, recipe_parser


def _scales(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="a run folder; the newest finished one without it")
    parser.add_argument("--model", metavar="DIR", help="score this plain (merged) model as well")
    parser.add_argument("--data", metavar="FILE", help="a JSONL file to score instead of the run's test rows")
    parser.add_argument(
        "--max-rows", type=int, default=200, help="how many answers to generate (200); losses use all rows"
    )
    parser.add_argument("--max-new-tokens", type=int, help="longest answer; 16 tokens more than the longest expected")
    parser.add_argument("--scales", metavar="0.5,1,...", type=_scales, help="score the adapter at each of these scales")
    parser.add_argument("--forgetting", metavar="FILE", help="rows of another kind, that the base must not unlearn")
    return parser


if __name__ == "__main__":  # --help and slips are answered before the imports, which take seconds
    first_look(command_line())

from recipes.utils.adapter_folder import load_adapter
from recipes.utils.console import UserError, run, say
from recipes.utils.dataset import read_chats
from recipes.utils.evaluation import evaluate, rows_to_score
from recipes.utils.evaluation_record import evaluation_key, scored_before, sum_up, write_json, write_rows
from recipes.utils.report import refresh_report
from recipes.utils.run_record import newest_run, read_run
from recipes.utils.scale import check_linear, score_scales
from recipes.utils.score_table import print_evaluation, print_scores

from transformers import AutoModelForCausalLM, AutoTokenizer


def evaluate_adapter(run_folder=None, model=None, data=None, max_rows=200, max_new_tokens=None, scales=None, forgetting=None) -> dict:  # fmt: skip
    """Score a run's base and adapter and, if given, the plain model in the folder `model`, on the run's test rows.

    Returns what `evaluation_record.sum_up` says: {"base": {...}, "adapter": {...}, "merged": {...}, "differences": {...},
    "tags": {...}}, and under "forgetting" the same for the rows of the JSONL file `forgetting`: rows of another kind,
    that the base is good at. With a `model`, base and adapter are not scored again where that was done on the same rows.
    With `scales` (a list of numbers) {"0.5": {...}, ...}, the adapter's figures at each, with `forgetting_loss`
    (nats a token) on the rows of `forgetting`.
    """
    # 1. The run, and the rows to score.
    run_folder = Path(run_folder or newest_run())
    record = read_run(run_folder)
    if max_rows < 1:
        raise UserError("--max-rows: at least one answer must be generated")
    if scales and model:
        raise UserError("--scales scores the adapter, so not with --model")
    if model and not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model}: is no model folder (it has no config.json)")
    parts = {"predictions": rows_to_score(record, data)}
    if forgetting:
        parts["forgetting"] = read_chats(forgetting)
    folder, tokenizer = run_folder / "evaluation", AutoTokenizer.from_pretrained(run_folder)
    chats = parts["predictions"]
    say(f"{run_folder}: {len(chats):,} rows, answers to {min(max_rows, len(chats)):,} of them")
    if scales:
        return _score_scales(run_folder, record, tokenizer, parts, scales, max_rows, max_new_tokens)

    # 2. Base and adapter are one model in memory: the adapter is switched off for the base's turn.
    keys = {name: evaluation_key(run_folder, rows, max_rows, max_new_tokens) for name, rows in parts.items()}
    scored = {name: scored_before(folder, name, keys[name]) if model else {} for name in parts}
    if not all(scored.values()):
        live = load_adapter(run_folder, record)
        for name, rows in parts.items():
            with live.disable_adapter():
                scored[name]["base"] = evaluate(live, tokenizer, rows, max_rows, max_new_tokens)
            scored[name]["adapter"] = evaluate(live, tokenizer, rows, max_rows, max_new_tokens)
        del live
    if model:
        plain = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto", use_safetensors=True)
        for name, rows in parts.items():
            scored[name]["merged"] = evaluate(plain, tokenizer, rows, max_rows, max_new_tokens)

    # 3. The figures, for people and for machines.
    sums = {name: sum_up(scored[name], rows) | {"of": keys[name]} for name, rows in parts.items()}
    metrics = sums["predictions"]
    if forgetting:
        metrics["forgetting"] = sums["forgetting"] | {"data": str(forgetting)}
    write_json(folder / "metrics.json", metrics)
    for name, rows in parts.items():
        write_rows(folder / f"{name}.jsonl", scored[name], rows)
    print_evaluation(metrics, scored["predictions"], chats)
    say(f"\nwritten: {folder}\nreport:  {refresh_report(run_folder)}")
    if not model:
        say(f"next:    python recipes/merge_adapter.py {run_folder}")
    return metrics


def _score_scales(run_folder, record, tokenizer, parts, scales, max_rows, max_new_tokens) -> dict:
    for scale in scales:
        check_linear(run_folder, scale)
    live = load_adapter(run_folder, record)
    chats, old_chats = parts["predictions"], parts.get("forgetting", [])
    metrics = score_scales(live, tokenizer, chats, scales, old_chats, max_rows, max_new_tokens)
    write_json(run_folder / "evaluation" / "scales.json", metrics)
    print_scores(metrics)
    best = min(metrics, key=lambda scale: metrics[scale]["loss"])
    say(f"\nlowest loss at scale {best}; next: python recipes/merge_adapter.py {run_folder} --scale {best}")
    return metrics


def main(argv: list[str]) -> None:
    evaluate_adapter(**vars(command_line().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(run(main))
