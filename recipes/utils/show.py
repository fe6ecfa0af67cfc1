"""What would be trained on, at a terminal: token ids as text, each with what is done with it."""

from itertools import groupby

from rich.text import Text

from recipes.utils.console import out, print_table, say

STYLES = {"trained": "black on green", "special": "bold magenta", "context": "dim"}


def token_pieces(tokenizer, input_ids: list[int], labels: list[int]) -> list[tuple[str, str]]:
    """[(text, "trained" | "special" | "context")], a pair a token; tokens that are parts of one character are joined.
    Trained control tokens (the end of a turn) count as trained: that they are learnt is what one looks for."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}

    def kind_of(pair: tuple[int, int]) -> str:
        return "trained" if pair[1] != -100 else "special" if pair[0] in special else "context"

    pieces = []
    for kind, group in groupby(zip(input_ids, labels, strict=True), kind_of):
        held: list[int] = []
        for token, _ in group:
            held.append(token)
            text = tokenizer.decode(held, clean_up_tokenization_spaces=False)
            if tokenizer.convert_ids_to_tokens(held[0]).startswith("▁") and not text.startswith(" "):
                text = f" {text}"  # sentencepiece drops the blank of what it takes for a row's first token
            if "\ufffd" not in text:  # else the character goes on in the next token
                pieces.append((text, kind))
                held = []
        if held:
            pieces.append((text, kind))
    return pieces


def print_data(name: str, report: dict) -> None:
    """Show what `inspect_data` found for the config `name`; tokens in colours or, in a file, between marks."""
    train, validation, packing = report["train"], report["validation"] or {"rows": 0}, report["packing"]
    trained, most = train["trained_tokens"], max(bar["rows"] for bar in report["histogram"])
    left_out = f"{sum(train['bad_kinds'].values()):,} bad, {train['dropped']:,} over max_length or without an answer"
    filled = f"{packing['rows']:,} rows of {report['max_length']}, {packing['fill']:.1%} filled" if packing else "off"
    print_table(f"{name}: what would be trained on", {
        "chat template": report["chat_template"],
        "files": ", ".join(f"{n:,} {shape} rows" for shape, n in train["shapes"].items()),
        "thoughts": f"{train['thoughts']:,} rows with one: {train['think'] or 'keep'}" if train["think"] else None,
        "ignored keys": ", ".join(train["ignored_keys"]) or None,
        "rows": f"{train['rows']:,} train, {validation['rows']:,} validation; "
                f"left out: {left_out}; {train['blank']:,} blank lines",
        "answers a row": ", ".join(f"{n:,} rows of {k}" for k, n in sorted(report["answers_a_row"].items())),
        "tokens": f"{train['tokens']:,}, trained on {trained:,} ({trained / train['tokens']:.0%})",
        "tokens a row": ", ".join(f"{name} {value:,}" for name, value in report["lengths"].items()),
        "packing": filled, "steps": f"{report['steps']:,} ({report['steps_an_epoch']:,} an epoch)",
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
        text = Text()
        for kind, group in groupby(row["tokens"], lambda token: token[1]):
            shown = "".join(token for token, _ in group).replace("\n", "⏎\n")
            text.append(f"«{shown}»" if kind == "trained" and not out.is_terminal else shown, STYLES[kind])
        say(f"\n{row['where']}   ({legend}; the rest is read, not learnt)")
        out.print(text, soft_wrap=True)
