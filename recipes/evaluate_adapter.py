"""Base against adapter on the test rows: losses, scores of the answers, and whether the difference means anything.

    python recipes/evaluate_adapter.py                                the newest finished run
    python recipes/evaluate_adapter.py runs/mistral-lora --max-rows 50
    python recipes/evaluate_adapter.py runs/mistral-lora --model runs/mistral-lora/merged
    python recipes/evaluate_adapter.py runs/mistral-lora --forgetting general.jsonl
    python recipes/evaluate_adapter.py runs/june --against runs/may --gate "old_test.exact_match >= old - 0.02"
    python recipes/evaluate_adapter.py runs/mistral-lora --scales 0,0.5,0.75,1,1.25 --forgetting general.jsonl
    python recipes/evaluate_adapter.py runs/mistral-lora --shots 4 --system "Answer in one word."
    python recipes/evaluate_adapter.py runs/mistral-lora --gate "exact_match >= base + 0.05"
    python recipes/evaluate_adapter.py runs/mistral-lora --metric my_metrics.py:f1

Writes metrics.json and predictions.jsonl into RUN/evaluation/. Rows with a key `tag` are summed up by tag as well.
--shots and --system score the base as a good prompt has it, with examples from the train rows; the adapter is then held
against the best. A gate is decided by the 95 % interval: exit status 0 all pass, 4 one fails, 5 too few rows to say.
--scales turns the adapter down or up without training again (a LoRA is linear in its scale), and writes scales.json;
merge_adapter.py --scale merges it at the one you choose. --against scores this run's adapter and an older one's on the
test rows of both, and writes against.json; a gate then names the older adapter as old, and its rows as old_test.
"""

import sys
from pathlib import Path

from recipes.utils.console import (
    GATE_FAILED,
    OK,
    TOO_FEW_ROWS,
    ArgumentParser,
    CommandLine,
    UserError,
    command,
    first_look,
    recipe_parser,
    run_main,
    say,
)


def command_line() -> ArgumentParser:
    parser = recipe_parser(__doc__)
    parser.add_argument("run_folder", nargs="?", metavar="RUN", help="a run folder; the newest finished one without it")
    elsewhere = "where the adapter's base lies now: a folder, or a name on the hub"
    parser.add_argument("--base-model", metavar="PATH_OR_NAME", help=elsewhere)
    parser.add_argument("--model", metavar="DIR", help="score this plain (merged) model as well")
    parser.add_argument("--data", metavar="FILE", help="a JSONL file to score instead of the run's test rows")
    answers = "how many answers to generate (200); losses use all rows"
    parser.add_argument("--max-rows", type=int, default=200, help=answers)
    parser.add_argument("--max-new-tokens", type=int, help="longest answer; 16 tokens more than the longest expected")
    parser.add_argument("--scales", metavar="0.5,1,...", type=_scales, help="score the adapter at each of these scales")
    parser.add_argument("--forgetting", metavar="FILE", help="rows of another kind, that the base must not unlearn")
    parser.add_argument("--shots", type=int, default=0, metavar="K", help="score the base with K examples before, too")
    parser.add_argument("--system", metavar="TEXT_OR_FILE", help="score the base with this system message, too")
    asked = "SCORE >= REFERENCE + MARGIN; a reference: base, best, shots, system, system_shots, old, a run, a number"
    parser.add_argument("--gate", action="append", metavar="GATE", help=asked)
    own = "a score of your own: function(expected, answer) -> float, more is better"
    parser.add_argument("--metric", action="append", metavar="FILE:FUNCTION", help=own)
    parser.add_argument("--against", metavar="OLD_RUN", help="score this run's adapter beside an older run's")
    return parser


def _scales(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


if __name__ == "__main__":
    given = first_look(command_line())  # --help and slips are answered before the imports below, which take seconds

from transformers import AutoModelForCausalLM

import recipes.utils.evaluation as scoring
from recipes.utils.data import Encoder, read_chats
from recipes.utils.model import load_onto, loading
from recipes.utils.monitoring import refresh_report


def evaluate_adapter(
    run_folder=None, model=None, data=None, max_rows=200, max_new_tokens=None, scales=None, forgetting=None, shots=0,
    system=None, gate=None, metric=None, against=None, base_model=None,
) -> dict:  # fmt: skip
    """Score a run's base and adapter and, if given, the plain model in the folder `model`, on the run's test rows.
    Returns what `write_evaluation` says: {"base": {...}, "adapter": {...}, "merged": {...}, "differences": {...},
    "tags": {...}}, and under "forgetting" the same for the rows of that JSONL file, which are of another kind and which
    the base is good at. With `scales` {"0.5": {...}, ...}: figures at each, and `forgetting_loss` (nats a token).
    `shots` examples and the message `system` (text, or a file) make further baselines; each `gate` is decided, under
    "gates"; each `metric` ("my_file.py:function") is a further score. With `against`
    (the folder of an older run) what `score_against` says."""
    # 1. The run, the rows to score, and what they are held against; a slip is found before anything is loaded.
    run_folder = Path(run_folder or scoring.newest_run())
    record = scoring.read_run(run_folder, base_model)
    if max_rows < 1:
        raise UserError("--max-rows: at least one answer must be generated")
    if shots < 0:
        raise UserError("--shots: a number of examples, such as 4")
    if against and (scales or model or forgetting or shots or system or metric):
        raise UserError("--against scores two adapters, so not with other flags than --data, --gate, those of answers")
    if against:
        return scoring.score_against(run_folder, against, data, max_rows, max_new_tokens, gate or ())
    others = {"--model": model, "--shots": shots, "--system": system, "--gate": gate, "--metric": metric}
    for flag, value in others.items():
        if scales and value:
            raise UserError(f"--scales scores the adapter, so not with {flag}")
    if model and not (Path(model) / "config.json").is_file():
        raise UserError(f"--model {model}: is no model folder (it has no config.json)")
    metrics_of_user, system = scoring.read_metrics(metric or []), scoring.read_system(system)
    learnt = record["data"]["train_on"]
    chats, settings = scoring.rows_to_score(record, data), (max_rows, max_new_tokens, learnt)
    parts = {"predictions": chats} | ({"forgetting": read_chats(forgetting)} if forgetting else {})
    tokenizer = scoring.load_adapter_tokenizer(run_folder, record)
    encoder = Encoder(tokenizer, escape=True, think=record["data"].get("think"))
    parts = {name: scoring.within_limit(encoder, rows, record) for name, rows in parts.items()}
    chats = parts["predictions"]
    files = ", ".join(dict.fromkeys(chat.where.rpartition(":")[0] for chat in chats))
    say(f"{run_folder}: {len(chats):,} rows of {files}, answers to {min(max_rows, len(chats)):,} of them")
    seen, warnings = scoring.trained_rows(record, parts)
    for line in warnings:
        say(line)
    for scale in scales or ():
        scoring.check_linear(run_folder, scale)
    wanted = {"base": True, "system": system, "shots": shots, "system_shots": shots and system}
    baselines = [name for name, value in wanted.items() if value]
    fields = [name for chat in chats[:max_rows] for name in scoring.field_names(chat.messages[-1]["content"])]
    known = [*baselines, "best"], [*metrics_of_user], [*dict.fromkeys(fields)], "forgetting" * bool(forgetting)
    gates = [scoring.read_gate(text, *known) for text in gate or []]
    digests = {part: scoring.rows_digest(rows) for part, rows in parts.items()}
    count = lambda part: sum(row.trained for row in encoder.encode(parts[part], learnt))  # noqa: E731
    of_runs = scoring.rows_of_runs(gates, digests, count)
    prompts, prompted = scoring.prompts_of(record, encoder, chats, shots, system, max_new_tokens)

    # 2. Base and adapter are one model in memory, and the base comes first: with the adapter switched off, what was
    # trained beside it (biases) would stay.
    base = scoring.load_adapters_base(run_folder, record)
    if scales:
        live = load_onto(base, run_folder)
        figures = scoring.score_scales(run_folder, live, encoder, chats, scales, parts.get("forgetting", []), *settings)
        best = min(figures, key=lambda scale: figures[scale]["loss"])
        say(f"\nlowest loss at scale {best}; next: {command('merge_adapter', run_folder, '--scale', best)}")
        return figures
    scored = {name: {"base": scoring.evaluate(base, encoder, rows, *settings)} for name, rows in parts.items()}
    for baseline, asked in prompts.items():
        scored["predictions"][baseline] = scoring.evaluate(base, encoder, asked, *settings)
    live = load_onto(base, run_folder)
    for name, rows in parts.items():
        scored[name]["adapter"] = scoring.evaluate(live, encoder, rows, *settings)
    del base, live
    if model:
        how = {"dtype": "auto", "device_map": "auto", "use_safetensors": True, "local_files_only": True}
        with loading(str(model)):
            plain = AutoModelForCausalLM.from_pretrained(model, **how)
        for name, rows in parts.items():
            scored[name]["merged"] = scoring.evaluate(plain, encoder, rows, *settings)
    for answered in scored["predictions"].values():
        scoring.add_metrics(answered, metrics_of_user, [chat.where for chat in chats])

    # 3. The figures, for people and for machines.
    best_of = {part: scoring.best_baselines(models) for part, models in scored.items()}
    decided = [scoring.decide(one, scored[one.part], best_of[one.part], of_runs.get(one)) for one in gates]
    found = {"baselines": prompted, "gates": decided, "rows_trained_on": seen.get("predictions")}
    more = {name: value for name, value in found.items() if value}
    metrics = scoring.write_evaluation(run_folder, parts, scored, forgetting, **more)
    scoring.print_evaluation(metrics, scored["predictions"], chats)
    refresh_report(run_folder)
    say(f"\nwritten: {run_folder / 'evaluation'}\nreport:  {run_folder / 'report.html'}")
    if not model and metrics["verdict"].startswith(("BETTER", "MIXED")):
        say(f"next:    {command('merge_adapter', run_folder)}")
    say(f"\nverdict: {metrics['verdict']}")
    for line in warnings:
        say(line)
    scoring.print_gates(decided)
    return metrics


def main(given: CommandLine) -> int:
    metrics = evaluate_adapter(**{name: value for name, value in given.options.items() if name != "traceback"})
    verdicts = [gate["verdict"] for gate in (metrics or {}).get("gates", ())]
    return GATE_FAILED if "fail" in verdicts else TOO_FEW_ROWS if scoring.FEW in verdicts else OK


if __name__ == "__main__":
    sys.exit(run_main(main, given))
