"""What an answer is worth against the expected one: the scores, and those that the user brings."""

import functools
import importlib.util
import inspect
import itertools
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from recipes.utils.console import UserError, near

# Scripts written without blanks between words: each character counts as a word.
UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORDS = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\W_])+")


class Score(NamedTuple):
    """A figure: its name for people, how it is written, which way is better (+1 up, -1 down, 0 neither), and the most
    that it can be, the least being 0 (None where nothing bounds it)."""

    label: str
    form: str
    better: int
    most: float | None = None


SCORES = {
    "loss": Score("loss", ".4f", -1), "perplexity": Score("perplexity", ".4f", -1),
    "token_accuracy": Score("token accuracy", ".1%", 1, 1), "exact_match": Score("exact match", ".1%", 1, 1),
    "rouge_l": Score("ROUGE-L", ".1%", 1, 1), "chrf": Score("chrF", ".1f", 1, 100),
    "valid_json": Score("valid JSON", ".1%", 1, 1), "field_accuracy": Score("JSON fields right", ".1%", 1, 1),
    "stopped": Score("stopped", ".1%", 1, 1), "answer_tokens": Score("answer tokens", ".1f", 0),
}  # fmt: skip
BY_TOKEN = ("loss", "perplexity", "token_accuracy")  # weighted by a row's answer tokens; the others count rows
FIELD, METRIC = "field.", "metric."  # how the scores of a JSON field (field.address.city), and the user's own, begin


def score_of(name: str) -> Score:
    """What is known of the score `name`: one of `SCORES`, of a field of JSON answers, or of the user's own."""
    if name.startswith(FIELD):
        return Score(name.removeprefix(FIELD), ".1%", 1, 1)
    return SCORES[name] if name in SCORES else Score(name.removeprefix(METRIC), ".4f", 1)


def score_names(rows: list[dict]) -> list[str]:
    """The scores that some of `rows` have: the user's own first, then `SCORES`, then the fields of JSON answers."""
    found = dict.fromkeys(name for row in rows for name in row)
    own, fields = ([name for name in found if name.startswith(start)] for start in (METRIC, FIELD))
    return own + [name for name in SCORES if name in found or (name == "perplexity" and "loss" in found)] + fields


class _Words:
    """Words of any script. The library's tokenizer keeps a-z and 0-9 alone: all else scores 0. They agree on ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text.lower())


@functools.cache
def _scorers() -> tuple:
    from rouge_score.rouge_scorer import RougeScorer  # here: these take a second, and a merge scores nothing
    from sacrebleu.metrics import CHRF

    return RougeScorer(["rougeL"], tokenizer=_Words()), CHRF()


def score_text(expected: str, answer: str) -> dict:
    """`exact_match` (blanks at the ends aside), `rouge_l` (F1 of the longest common subsequence of words, 0 to 1),
    `chrf` (of the row, 0 to 100, sacrebleu's default settings: characters up to 6, no words, beta 2) and, where
    `expected` is a JSON object or array, `valid_json`: `answer` is one too; `field.PATH` for each field of `expected`,
    whether it is the same in `answer`; and `field_accuracy`, the share of the fields of both that are."""
    expected, answer = expected.strip(), answer.strip()
    rouge, chrf = _scorers()
    scores = {"exact_match": answer == expected, "rouge_l": rouge.score(expected, answer)["rougeL"].fmeasure}
    scores["chrf"] = chrf.sentence_score(answer, [expected]).score
    wanted, given = _json(expected), _json(answer)
    if wanted is None:
        return scores
    right = json_fields(wanted, given)
    scores |= {"valid_json": given is not None, "field_accuracy": sum(right.values()) / len(right)}
    return scores | {name: right[name.removeprefix(FIELD)] for name in field_names(expected)}


def field_names(expected: str) -> list[str]:
    """`field.PATH` of each field of an answer that is a JSON object or array; [] for any other."""
    wanted = _json(expected)
    return [] if wanted is None else [FIELD + path for path in _leaves(wanted)]


def _json(text: str) -> dict | list | None:
    """The object or the array that `text` is: a bare number or word in quotes is JSON by chance."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def json_fields(wanted, given) -> dict[str, bool]:
    """{dotted path: whether it holds the same in both} for the fields of two JSON values. The objects of a list share
    their paths (`items[].price`), and such a field is right where it is in all of them. 1 is 1.0, and is not true."""
    ours, theirs = _leaves(wanted), _leaves(given)
    return {path: ours.get(path) == theirs.get(path) for path in {**ours, **theirs}}


def _leaves(value) -> dict[str, list]:
    found: dict[str, list] = {}
    for path, leaf in _walk(value, ""):
        # Python's True equals 1; a list keeps its length, and an empty one is something else than none.
        found.setdefault(path or "(all)", []).append((isinstance(leaf, bool), leaf))
    return found


def _walk(value, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _walk(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for part in value:
            yield from _walk(part, path + "[]")
    elif value is not None or path:
        yield path, value


def read_metrics(places: list[str]) -> dict[str, Callable[[str, str], float]]:
    """{"metric.NAME": function} of the user's own metrics, each given as `my_file.py:function`. Raises `UserError` for
    a file that is not there or cannot be run, and for what is no function of (expected, answer)."""
    found: dict[str, Callable] = {}
    for place in places:
        file, colon, name = place.rpartition(":")
        if not colon or not name.isidentifier():
            raise UserError(f"--metric {place}: expected FILE:FUNCTION, such as my_metrics.py:f1")
        if not Path(file).is_file():
            raise UserError(f"--metric {place}: there is no file {file}; paths are relative to where the command runs")
        module = _run_file(Path(file), place)
        function = getattr(module, name, None)
        if not inspect.isfunction(function):
            meant = near(name, [key for key, value in vars(module).items() if inspect.isfunction(value)])
            mend = f"; did you mean {meant}?" if meant else ""
            raise UserError(f"--metric {place}: {file} has no function {name}{mend}")
        try:
            inspect.signature(function).bind("expected", "answer")
        except TypeError as error:
            raise UserError(f"--metric {place}: must take (expected, answer): {error}") from error
        if name in SCORES or METRIC + name in found:
            raise UserError(f"--metric {place}: there is a score {name} already; give the function another name")
        found[METRIC + name] = function
    return found


def _run_file(path: Path, place: str):
    """The module that a file makes; what stands beside it can be imported by it."""
    spec = importlib.util.spec_from_file_location(f"metric_file_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--metric {place}: {path} is no Python file (.py)")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{_line_of(error, path)}: cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _line_of(error: BaseException, path: Path) -> str:
    """The deepest file:line of `path` in an error's traceback."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f"{path}:{lines[-1]}" if lines else str(path)


def add_metrics(rows: list[dict], metrics: dict[str, Callable[[str, str], float]], places: list[str]) -> None:
    """Score each row of `evaluate` that has an answer with the user's own `metrics`, which see texts without blanks at
    their ends; `places` are the rows' file:line. Raises `UserError` where one raises or gives no finite number."""
    for (name, function), (row, place) in itertools.product(metrics.items(), zip(rows, places, strict=True)):
        if "answer" not in row:
            continue
        try:
            value = function(row["expected"].strip(), row["answer"].strip())
        except Exception as error:
            where = _line_of(error, Path(inspect.getsourcefile(function) or name))
            raise UserError(f"{where}: {type(error).__name__}: {error}, for the answer to {place}") from error
        if (not isinstance(value, (bool, int, float)) and not hasattr(value, "__float__")) or not math.isfinite(value):
            what = f"gave {value!r} for the answer to {place}; a finite number is needed"
            raise UserError(f"--metric {name.removeprefix(METRIC)}: {what}")
        row[name] = float(value)
