"""What would be trained on, shown at a terminal and on a page: token ids as text, each with what is done with it."""

from itertools import groupby
from pathlib import Path

from rich.text import Text

from recipes.utils.console import out, print_table, say
from recipes.utils.page import write_page

STYLES = {"trained": "black on green", "special": "bold magenta", "context": "dim"}


def token_pieces(tokenizer, input_ids: list[int], labels: list[int]) -> list[tuple[str, str]]:
    """[(text, "trained" | "special" | "context")], a pair a token; tokens that are parts of one character are joined.

    Trained control tokens (the end of a turn) count as trained: that they are learnt is what one looks for.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def kind_of(pair: tuple[int, int]) -> str:
        return "trained" if pair[1] != -100 else "special" if pair[0] in special else "context"

    pieces = []
    for kind, group in groupby(zip(input_ids, labels, strict=True), kind_of):
        held: list[int] = []
        for token, _ in group:
            held.append(token)
            if "\ufffd" not in _text(tokenizer, held):  # else the character goes on in the next token
                pieces.append((_text(tokenizer, held), kind))
                held = []
        if held:
            pieces.append((_text(tokenizer, held), kind))
    return pieces


def _text(tokenizer, ids: list[int]) -> str:
    """The text of tokens within a row: sentencepiece drops the blank of a row's first token, so another goes before."""
    blank = " " if tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁") else ""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text if text.startswith(blank) else blank + text


def print_data(name: str, report: dict) -> None:
    """Show what `inspect_data` found for the config `name`; tokens in colours or, in a file, between marks."""
    train, validation, packing = report["train"], report["validation"] or {"rows": 0}, report["packing"]
    trained, most = train["trained_tokens"], max(bar["rows"] for bar in report["histogram"])
    left_out = f"{len(train['bad']):,} bad, {train['dropped']:,} over max_length or without an answer"
    filled = f"{packing['rows']:,} rows of {report['max_length']}, {packing['fill']:.1%} filled" if packing else "off"
    print_table(f"{name}: what would be trained on", {
        "chat template": report["chat_template"],
        "files": ", ".join(f"{n:,} {shape} rows" for shape, n in train["shapes"].items()),
        "ignored keys": ", ".join(train["ignored_keys"]) or None,
        "rows": f"{train['rows']:,} train, {validation['rows']:,} validation; "
                f"left out: {left_out}; {train['blank']:,} blank lines",
        "answers a row": ", ".join(f"{n:,} rows of {k}" for k, n in sorted(report["answers_a_row"].items())),
        "tokens": f"{train['tokens']:,}, trained on {trained:,} ({trained / train['tokens']:.0%})",
        "tokens a row": ", ".join(f"{name} {value:,}" for name, value in report["lengths"].items()),
        "packing": filled,
        "steps": f"{report['steps']:,} ({report['steps_an_epoch']:,} an epoch)",
    })  # fmt: skip
    for bar in report["histogram"]:
        say(f"  {bar['from']:>6,}–{bar['to']:<6,} {'█' * round(40 * bar['rows'] / most):<40} {bar['rows']:,}")
    for finding in report["findings"]:
        say(f"{finding['level']}: {finding['message']}")
    if report["ledger"]:
        say("\nrows that stay worst: loss in nats a token at each epoch, and above the others' by")
    for entry in report["ledger"]:
        losses = " → ".join(f"{loss:.2f}" for loss in entry["losses"].values())
        say(f"  {entry['where']}  {losses}  {entry['excess']:+.2f}  {entry['tokens']} tokens")
    legend = "green is trained on, control tokens are magenta" if out.is_terminal else "«» is trained on"
    for row in report["rows"]:
        text, kinds = Text(), ["context", *(kind for _, kind in row["tokens"]), "context"]
        for place, (token, kind) in enumerate(row["tokens"], start=1):
            opens, closes = (kind == "trained" != kinds[place + step] and not out.is_terminal for step in (-1, 1))
            text.append("«" * opens + token.replace("\n", "⏎\n") + "»" * closes, STYLES[kind])
        say(f"\n{row['where']}   ({legend}; the rest is read, not learnt)")
        out.print(text, soft_wrap=True)


def write_data_page(path: Path, config, report: dict) -> None:
    """Write what `inspect_data` found to an HTML file."""
    most = max(bar["rows"] for bar in report["histogram"])
    write_page(path, "inspect_data.html", config=config, report=report, most=most)
