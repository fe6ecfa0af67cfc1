"""Base against adapter on the test rows: loss, perplexity, token accuracy, exact match, and answers side by side.

    python recipes/evaluate_adapter.py                                the newest finished run
    python recipes/evaluate_adapter.py runs/mistral-lora --max-rows 50
    python recipes/evaluate_adapter.py runs/mistral-lora --model runs/mistral-lora/merged
    python recipes/evaluate_adapter.py runs/mistral-lora --scales 0,0.5,0.75,1,1.25 --forgetting general.jsonl

Writes metrics.json and predictions.jsonl into RUN/evaluation/. A LoRA adapter is linear in its scale: --scales turns it
down or up without training again, and merge_adapter.py --scale merges it at the one you choose (into scales.json).
"""

import argparse
import json
import sys
from pathlib import Path

from recipes.utils.adapter_folder import load_adapter
from recipes.utils.console import UserError, out, run, say
from recipes.utils.dataset import Chat, read_chats
from recipes.utils.evaluation import evaluate, rows_to_score
from recipes.utils.run_record import newest_run, read_run
from recipes.utils.scale import check_linear, score_scales

from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = 3


def evaluate_adapter(run_folder=None, model=None, data=None, max_rows=200, max_new_tokens=None, scales=None, forgetting=None) -> dict:  # fmt: skip
    """Score a run's base and adapter, or the plain model in the folder `model`, on the run's test rows.

    Returns {"base": {...}, "adapter": {...}} or {"merged": {...}}; `evaluation.evaluate` says what the figures are.
    With `scales` (a list of numbers) {"0.5": {...}, ...}, the adapter's figures at each, with `forgetting_loss`
    (nats a token) on the rows of the JSONL file `forgetting`, if given: rows that the base is good at.
    """
    # 1. The run, and the rows to score.
    run_folder = Path(run_folder or newest_run())
    record = read_run(run_folder)
    if max_rows < 1:
        raise UserError("--max-rows: at least one answer must be generated")
    if (scales and model) or (forgetting and not scales):
        raise UserError("--scales scores the adapter, so not with --model; --forgetting goes with --scales alone")
    if model and not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model}: is no model folder (it has no config.json)")
    chats = rows_to_score(record, data)
    say(f"{run_folder}: {len(chats):,} rows, answers to {min(max_rows, len(chats)):,} of them")

    # 2. One model in memory: the adapter is switched off for the base's turn.
    results, tokenizer = {}, AutoTokenizer.from_pretrained(run_folder)
    if scales:
        for scale in scales:
            check_linear(run_folder, scale)
        old_chats = read_chats(forgetting) if forgetting else []
        live = load_adapter(run_folder, record)
        metrics = score_scales(live, tokenizer, chats, scales, old_chats, max_rows, max_new_tokens)
        _write_json(run_folder / "evaluation" / "scales.json", metrics)
        _print_table(metrics)
        best = min(metrics, key=lambda scale: metrics[scale]["loss"])
        say(f"\nlowest loss at scale {best}; next: python recipes/merge_adapter.py {run_folder} --scale {best}")
        return metrics
    if model:
        plain = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto")
        results["merged"] = evaluate(plain, tokenizer, chats, max_rows, max_new_tokens)
    else:
        live = load_adapter(run_folder, record)
        results["adapter"] = evaluate(live, tokenizer, chats, max_rows, max_new_tokens)
        with live.disable_adapter():
            results["base"] = evaluate(live, tokenizer, chats, max_rows, max_new_tokens)

    # 3. The figures, for people and for machines.
    metrics = {name: results[name][0] for name in ("base", "adapter", "merged") if name in results}
    _write(run_folder / "evaluation", metrics, results, chats)
    _print(metrics, results, chats)
    say(f"\nwritten: {run_folder / 'evaluation'}")
    if not model:
        say(f"next:    python recipes/merge_adapter.py {run_folder}")
    return metrics


def _write(folder: Path, metrics: dict, results: dict, chats: list[Chat]) -> None:
    """metrics.json keeps what an earlier evaluation wrote under other names; predictions.jsonl is of this one."""
    path = folder / "metrics.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    _write_json(path, {**earlier, **metrics})
    name = "predictions-merged.jsonl" if "merged" in metrics else "predictions.jsonl"
    with open(folder / name, "w", encoding="utf-8") as file:
        for index, answers in enumerate(zip(*(results[name][1] for name in metrics), strict=True)):
            row = {
                "where": chats[index].where,
                "prompt": chats[index].messages[:-1],
                "expected": chats[index].messages[-1]["content"],
            }
            row |= {name: answer.text for name, answer in zip(metrics, answers, strict=True)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _print_table(metrics: dict) -> None:
    table = Table("", *metrics, box=None, padding=(0, 2), header_style="bold")
    for name in ("loss", "perplexity", "token_accuracy", "exact_match", "stopped", "forgetting_loss"):
        form = "{:.4f}" if name in ("loss", "perplexity", "forgetting_loss") else "{:.1%}"
        cells = [form.format(scores[name]) for scores in metrics.values() if name in scores]
        if cells:
            table.add_row(name.replace("_", " "), *cells)
    out.print(table)


def _print(metrics: dict, results: dict, chats: list[Chat]) -> None:
    _print_table(metrics)
    for index in range(min(EXAMPLES, len(results[next(iter(metrics))][1]))):
        say(f"\nprompt    {chats[index].messages[-2]['content']}\nexpected  {chats[index].messages[-1]['content']}")
        for name in metrics:
            say(f"{name:<9} {results[name][1][index].text}")


def _scales(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="a run folder; the newest finished one without it")
    parser.add_argument("--model", metavar="DIR", help="score this plain (merged) model instead of base and adapter")
    parser.add_argument("--data", metavar="FILE", help="a JSONL file to score instead of the run's test rows")
    parser.add_argument(
        "--max-rows", type=int, default=200, help="how many answers to generate (200); losses use all rows"
    )
    parser.add_argument("--max-new-tokens", type=int, help="longest answer; half as long again as the longest expected")
    parser.add_argument("--scales", metavar="0.5,1,...", type=_scales, help="score the adapter at each of these scales")
    parser.add_argument("--forgetting", metavar="FILE", help="with --scales: rows that the base must not unlearn")
    evaluate_adapter(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(run(main))
