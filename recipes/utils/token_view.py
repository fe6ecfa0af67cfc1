"""Token ids as text that can be read, each token with what is done with it."""


def token_pieces(tokenizer, input_ids: list[int], labels: list[int]) -> list[tuple[str, str]]:
    """[(text, "trained" | "special" | "context")], a pair a token; tokens that are parts of one character are joined.

    Trained control tokens (the end of a turn) count as trained: that they are learnt is what one looks for.
    """
    pieces, held, held_kind = [], [], None
    for token, label in zip(input_ids, labels, strict=True):
        added = tokenizer.added_tokens_decoder.get(token)
        kind = "trained" if label != -100 else ("special" if added and added.special else "context")
        if held and (kind != held_kind or kind == "special"):
            pieces.append((tokenizer.decode(held, clean_up_tokenization_spaces=False), held_kind))
            held = []
        held, held_kind = [*held, token], kind
        text = _text(tokenizer, held)
        if "\ufffd" not in text:  # else the character goes on in the next token
            pieces.append((text, kind))
            held = []
    if held:
        pieces.append((_text(tokenizer, held), held_kind))
    return pieces


def _text(tokenizer, ids: list[int]) -> str:
    """The text of tokens within a row: sentencepiece drops the blank of a row's first token, so another goes before."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    blank = " " if tokens[0].startswith("▁") else ""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text if text.startswith(blank) else blank + text
