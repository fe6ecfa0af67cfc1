"""Two runs on the same rows: what the newer one has learnt on its own, and what it kept of the older one's."""

from collections.abc import Sequence
from pathlib import Path

from recipes.utils.console import UserError, print_table, say
from recipes.utils.data import Encoder
from recipes.utils.evaluation.baseline import trained_rows
from recipes.utils.evaluation.evaluate import evaluate, rows_to_score, within_limit
from recipes.utils.evaluation.gates import Gate, decide, print_gates, read_gate
from recipes.utils.evaluation.runs import load_adapter, load_adapter_tokenizer, read_run
from recipes.utils.evaluation.scores import field_names, score_of
from recipes.utils.evaluation.statistics import compare, figures
from recipes.utils.evaluation.verdicts import in_short, sentence, show, show_interval
from recipes.utils.files import adapter_sha256, write_json

PAIR = "adapter against old adapter"
NEW, OLD = "new test", "old test"


def score_against(
    run_folder: Path, old_folder: Path, data: str | None, max_rows: int, max_new_tokens=None, gates: Sequence[str] = ()
) -> dict:
    """Score the adapters of two runs on the test rows of both (or on `data` alone): {"against": the old folder, "of":
    the new adapter's hash, "new test": {"old adapter": `figures`, "adapter": the same, "differences": {"adapter against
    old adapter": `compare`}}, "old test": the same, "gates": what `decide` says of each}; the old test is left out if
    both have the same rows, and a gate on it is one on those. Written to RUN/evaluation/against.json. Each adapter is
    asked with the template of its own training; rows are scored as the run scores them whose they are."""
    folders = {"old adapter": Path(old_folder), "adapter": Path(run_folder)}
    if folders["adapter"].resolve() == folders["old adapter"].resolve():
        raise UserError(f"--against {old_folder}: is the run itself; name the one before it")
    records = {name: read_run(folder) for name, folder in folders.items()}
    of = {NEW: records["adapter"]} | ({OLD: records["old adapter"]} if data is None else {})
    rows = {part: rows_to_score(record, data) for part, record in of.items()}
    contents = {part: [(chat.messages, chat.tools) for chat in chats] for part, chats in rows.items()}
    if contents.get(OLD) == contents[NEW]:
        del rows[OLD]
    every = [chat for chats in rows.values() for chat in chats[:max_rows]]
    fields = {name for chat in every for name in field_names(chat.messages[-1]["content"])}
    asked = [_read_gate(text, folders["old adapter"], sorted(fields)) for text in gates]
    encoders = {
        name: Encoder(load_adapter_tokenizer(folder, records[name]), True, records[name]["data"].get("think"))
        for name, folder in folders.items()
    }
    for part, chats in rows.items():  # those that both would train on, so that they are the same for both
        for encoder in encoders.values():
            rows[part] = chats = within_limit(encoder, chats, of[part])
    warnings = [line for name, own in records.items() for line in trained_rows(own, rows, f" by the {name}")[1]]
    for line in warnings:
        say(line)
    scored: dict[str, dict[str, list[dict]]] = {part: {} for part in rows}
    for name, folder in folders.items():
        live = load_adapter(folder, records[name])
        for part, chats in rows.items():
            learnt = of[part]["data"]["train_on"]
            scored[part][name] = evaluate(live, encoders[name], chats, max_rows, max_new_tokens, learnt)
        del live
    found: dict = {"against": str(old_folder), "of": {"adapter_sha256": adapter_sha256(folders["adapter"])}}
    for part, own in scored.items():
        differences = {PAIR: compare(own["adapter"], own["old adapter"])}
        found[part] = {name: figures(one) for name, one in own.items()} | {"differences": differences}
    of_gate = {"predictions": scored[NEW], OLD: scored.get(OLD, scored[NEW])}
    of_gate = {part: {"adapter": own["adapter"], "old": own["old adapter"]} for part, own in of_gate.items()}
    if asked:
        found["gates"] = [decide(gate, of_gate[gate.part], {}, None) for gate in asked]
    path = folders["adapter"] / "evaluation" / "against.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, found)
    for part in rows:
        _print(part, found[part])
    say(f"\nwritten: {path}\n")
    for part in rows:
        say(f"verdict on the {part}: {in_short(PAIR, found[part]['differences'][PAIR])}")
    for line in warnings:
        say(line)
    print_gates(found.get("gates", []))
    return found


def _read_gate(text: str, old: Path, fields: list[str]) -> Gate:
    gate = read_gate(text, ["old"], [], fields, OLD)
    if gate.reference not in ("", "old"):
        if Path(gate.reference).resolve() != old.resolve():
            raise UserError(f"--gate {text!r}: with --against, a reference is old (that run's adapter) or a number")
        gate = gate._replace(reference="old")
    return gate


def _print(part: str, found: dict) -> None:
    table: dict[str, object] = {}
    for name, one in found["differences"][PAIR].items():
        before, now = (show(name, found[model][name]) for model in ("old adapter", "adapter"))
        table[score_of(name).label] = f"{before} → {now}   {show_interval(name, one)}   {one['verdict']}"
    counts = f"{found['adapter']['rows']:,} rows, answers to {found['adapter']['generated_rows']:,}"
    print_table(f"\n{part}, {counts}: old adapter → adapter, difference with its 95 % interval", table)
    say(sentence(PAIR, found["differences"][PAIR]))
