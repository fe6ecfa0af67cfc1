"""Two runs on the same rows: what the newer one has learnt on its own, and what it kept of the older one's."""

from pathlib import Path

from transformers import AutoTokenizer

from recipes.utils.console import UserError, print_table, say
from recipes.utils.data import Encoder
from recipes.utils.evaluation.evaluate import evaluate, rows_to_score
from recipes.utils.evaluation.runs import load_adapter, read_run
from recipes.utils.evaluation.scores import score_of
from recipes.utils.evaluation.statistics import compare, figures
from recipes.utils.evaluation.verdicts import sentence, show, show_interval
from recipes.utils.files import adapter_sha256, write_json

PAIR = "adapter against old adapter"


def score_against(run_folder: Path, old_folder: Path, data: str | None, max_rows: int, max_new_tokens=None) -> dict:
    """Score the adapters of two runs on the test rows of both (or on `data` alone): {"against": the old folder, "of":
    the new adapter's hash, "new test": {"old adapter": `figures`, "adapter": the same, "differences": {"adapter against
    old adapter": `compare`}}, "old test": the same}, where the second is left out if both have the same rows. Written
    to RUN/evaluation/against.json. Each adapter is asked with the template of its own training."""
    folders = {"old adapter": Path(old_folder), "adapter": Path(run_folder)}
    if folders["adapter"].resolve() == folders["old adapter"].resolve():
        raise UserError(f"--against {old_folder}: is the run itself; name the one before it")
    records = {name: read_run(folder) for name, folder in folders.items()}
    rows = {"new test": rows_to_score(records["adapter"], data)}
    if data is None:
        rows["old test"] = rows_to_score(records["old adapter"])
    contents = {part: [(chat.messages, chat.tools) for chat in chats] for part, chats in rows.items()}
    if contents.get("old test") == contents["new test"]:
        del rows["old test"]
    scored: dict[str, dict[str, list[dict]]] = {part: {} for part in rows}
    for name, folder in folders.items():
        live = load_adapter(folder, records[name])
        encoder = Encoder(AutoTokenizer.from_pretrained(folder, local_files_only=True), escape=True)
        for part, chats in rows.items():
            scored[part][name] = evaluate(live, encoder, chats, max_rows, max_new_tokens)
        del live
    found: dict = {"against": str(old_folder), "of": {"adapter_sha256": adapter_sha256(folders["adapter"])}}
    for part, own in scored.items():
        differences = {PAIR: compare(own["adapter"], own["old adapter"])}
        found[part] = {name: figures(one) for name, one in own.items()} | {"differences": differences}
    (folders["adapter"] / "evaluation").mkdir(exist_ok=True)
    write_json(folders["adapter"] / "evaluation" / "against.json", found)
    for part in rows:
        _print(part, found[part])
    return found


def _print(part: str, found: dict) -> None:
    table: dict[str, object] = {}
    for name, one in found["differences"][PAIR].items():
        before, now = (show(name, found[model][name]) for model in ("old adapter", "adapter"))
        table[score_of(name).label] = f"{before} → {now}   {show_interval(name, one)}   {one['verdict']}"
    counts = f"{found['adapter']['rows']:,} rows, answers to {found['adapter']['generated_rows']:,}"
    print_table(f"\n{part}, {counts}: old adapter → adapter, difference with its 95 % interval", table)
    say(sentence(PAIR, found["differences"][PAIR]))
