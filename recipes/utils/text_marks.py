"""Where an answer differs from the expected one, word by word."""

import re
from difflib import SequenceMatcher

ALIKE = 0.4  # below this share of common words, marks would say no more than that it is another text
LONGEST = 3000  # characters that are compared and shown


def mark_differences(expected: str, answer: str) -> list[tuple[str, str]]:
    """[(text, "same" | "extra" | "missing")]: `answer` in pieces, with the words of `expected` that it lacks in between."""
    words = [re.findall(r"\s+|\w+|[^\w\s]", text[:LONGEST]) for text in (expected.strip(), answer.strip())]
    matcher = SequenceMatcher(None, *words, autojunk=False)
    if matcher.ratio() < ALIKE:
        return [("".join(words[1]), "extra")]
    pieces = []
    for _, start, end, own_start, own_end in matcher.get_opcodes():
        same = words[0][start:end] == words[1][own_start:own_end]
        pieces.append(
            ("".join(words[1][own_start:own_end]), "same") if same else ("".join(words[0][start:end]), "missing")
        )
        if not same:
            pieces.append(("".join(words[1][own_start:own_end]), "extra"))
    return [piece for piece in pieces if piece[0]]
