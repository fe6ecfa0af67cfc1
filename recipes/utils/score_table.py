"""Scores of models side by side at a terminal, and whether the differences mean anything."""

from recipes.utils.console import out, say
from recipes.utils.evaluation_record import MODELS
from recipes.utils.intervals import sentence, show_interval
from recipes.utils.scores import SCORES, show

from rich.table import Table

EXAMPLES = 3


def print_scores(by_name: dict, difference: dict | None = None) -> None:
    """Figures by model or scale, and the differences of the adapter from the base."""
    extra = ["adapter − base, 95 % interval", ""] if difference else []
    table = Table("", *by_name, *extra, box=None, padding=(0, 2), header_style="bold")
    first = next(iter(by_name.values()))
    for name, score in SCORES.items():
        if name in first:
            label = score.label + (f" (expected {first['expected_tokens']:.1f})" if name == "answer_tokens" else "")
            found = (difference or {}).get(name)
            cells = [show_interval(name, found), found["verdict"]] if found else []
            table.add_row(label, *(show(name, figures[name]) for figures in by_name.values()), *cells)
    if "forgetting_loss" in first:
        table.add_row("forgetting loss", *(f"{figures['forgetting_loss']:.4f}" for figures in by_name.values()))
    out.print(table)


def print_evaluation(metrics: dict, scored: dict, chats: list) -> None:
    """The figures of an evaluation, also of each tag and of the rows that must not be unlearnt, what they mean, and a few
    answers: `metrics` as `sum_up` returns them, `scored` the rows by model, `chats` what was asked."""
    for title, part in [("", metrics), *((f"tag {tag}", part) for tag, part in metrics.get("tags", {}).items())]:
        say(f"\n{title}, {part['base']['rows']:,} rows" if title else "")
        print_scores({name: part[name] for name in MODELS if name in part}, part["differences"]["adapter against base"])
    for pair, found in metrics["differences"].items():
        say("\n" + sentence(pair, found))
    if "forgetting" in metrics:
        part = metrics["forgetting"]
        say(f"\nforgetting, on {part['data']}, {part['base']['rows']:,} rows")
        print_scores({name: part[name] for name in MODELS if name in part}, part["differences"]["adapter against base"])
        found = part["differences"]["adapter against base"]
        lost = [name for name in found if found[name]["verdict"] == "worse"]
        named = ", ".join(f"{SCORES[name].label} ({show_interval(name, found[name])})" for name in lost)
        say(f"\nlost: {named or 'nothing that these rows can show'}")
    for index in range(min(EXAMPLES, metrics["base"]["generated_rows"])):
        say(f"\nprompt    {chats[index].messages[-2]['content']}\nexpected  {scored['base'][index]['expected']}")
        for name, rows in scored.items():
            say(f"{name:<9} {rows[index]['answer']}")
