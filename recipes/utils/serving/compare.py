"""Served answers against those of the evaluation: equal or not, from where on, and what is likely to be the cause."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jinja2 import TemplateError

from recipes.utils.console import GATE_FAILED, OK, TOO_FEW_ROWS, UserError, print_table, say
from recipes.utils.data import Encoder, render
from recipes.utils.evaluation import SCORES, compare, score_text, show_interval
from recipes.utils.files import evaluation_of, read_json, read_jsonl
from recipes.utils.serving.client import Endpoint, Reply

TEMPLATES = Path(__file__).resolve().parents[3] / "configs" / "chat_templates"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST = "{{ messages[-1].content }}"
SYSTEMS = (  # what published templates say where a conversation has no system message
    "You are a helpful assistant.", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful assistant",
)  # fmt: skip
OF_ANSWERS = ("exact_match", "rouge_l", "chrf", "valid_json")
SHOWN = (*OF_ANSWERS, "stopped", "answer_tokens")
NEARLY_ALL = 0.9  # of the answers equal: what rounding in another order may change
HARDLY = 0.1  # of an answer's tokens equal, on average: no rounding does that
FEWEST_ROWS = 20  # below these, scores say nothing
LIKE: dict[bool | None, dict] = {  # an answer to a prompt that asks for a thought, and to one that asks for none
    True: {"role": "assistant", "content": "a", "reasoning_content": "b"}, False: {"role": "assistant", "content": "a"},
}  # fmt: skip


class Cause(NamedTuple):
    """Why the served model may not be the evaluated one, and how to mend that."""

    what: str
    mend: str


def scored_rows(run_folder: Path, encoder: Encoder, max_rows: int) -> list[dict]:
    """The first `max_rows` rows of RUN/evaluation/predictions.jsonl that have answers, each with `tokens_of_prompt`,
    the `template` of its prompt, and in `asked_thought` what a request has to switch thinking to, if anything. Says
    which are left out. Raises `UserError` where the run was not scored, or by a version that left out tools."""
    path = Path(run_folder) / "evaluation" / "predictions.jsonl"
    every = read_jsonl(path) if evaluation_of(run_folder) else []
    rows = [row for row in every if any("answer" in row.get(name, {}) for name in ("adapter", "merged"))]
    again = f"first: python recipes/evaluate_adapter.py {run_folder}"
    if not rows:
        raise UserError(f"{path}: has no answers to compare with; {again}")
    if max_rows < 1:
        raise UserError("--max-rows: at least one answer must be asked for")
    if "tools" not in rows[0]:
        raise UserError(f"{path}: was written by an older version, without the tools of its rows; {again}")
    plain, known, fixed = Encoder(encoder.tokenizer), list[dict](), 0
    for row in rows[:max_rows]:
        thinks: bool | None = row.get("thinks")  # None where the template knows no difference
        template = encoder.template if thinks is None else encoder.thoughts.on if thinks else encoder.thoughts.off
        if not template.endswith(encoder.template):  # it is no switch that a request can set
            fixed += 1
            continue
        ids = plain.prompt_ids(row["prompt"], row["tools"], LIKE.get(thinks))
        if ids == encoder.prompt_ids(row["prompt"], row["tools"], LIKE.get(thinks)):
            asked = thinks if template != encoder.template else None
            known.append(row | {"tokens_of_prompt": len(ids), "template": template, "asked_thought": asked})
    if fixed:
        say(f"left out: {fixed} rows that were asked in another mode of thinking, which no request to a server can set")
    if typed := min(max_rows, len(rows)) - len(known) - fixed:
        say(f"left out: {typed} rows with typed control tokens, which training reads as text and servers do not")
    if not known:
        raise UserError(f"{path}: every row is left out; a server would read other prompts")
    return known


def ask(endpoint: Endpoint, rows: list[dict]) -> tuple[list[Reply], bool]:
    """(the greedy answer of `endpoint` to each of `rows`, with as much room as the evaluation gave; whether the first
    prompt is answered alike when it is asked again)."""
    own = [row[name] for row in rows for name in _names(row)]
    cut = [one["answer_tokens"] for one in own if not one["stopped"]]
    room, replies, told = max(cut) if cut else max(one["answer_tokens"] for one in own) + 16, [], time.monotonic()
    for row in rows:
        replies.append(endpoint.ask(row["prompt"], row["tools"], room, row["asked_thought"]))
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(f"asked {len(replies)} of {len(rows)}")
    again = endpoint.ask(rows[0]["prompt"], rows[0]["tools"], room, rows[0]["asked_thought"])
    steady = (again.text, again.calls) == (replies[0].text, replies[0].calls)
    return [_first_turn(endpoint, row, reply) for row, reply in zip(rows, replies, strict=True)], steady


def _first_turn(endpoint: Endpoint, row: dict, reply: Reply) -> Reply:
    """Of an answer that runs on into further turns, a server may hand out the last alone (`transformers serve` does);
    asked for no more tokens than the evaluated answer has, it gives the first: its text then, if that is the same."""
    own = row[_names(row)[0]]
    if reply.stopped or not own["stopped"] or _goes_on(own, reply):
        return reply
    first = endpoint.ask(row["prompt"], row["tools"], own["answer_tokens"], row["asked_thought"])
    return reply._replace(text=first.text) if first.text.strip() == own["answer"].strip() else reply


def compare_served(
    run_folder: Path, encoder: Encoder, rows: list[dict], replies: list[Reply], steady: bool = True
) -> dict:
    """What `ask` gave for `rows` says: {"of": the model of the evaluation that they are nearest to, adapter or merged,
    "rows", "equal": {model: rows answered alike}, "first_difference": the mean place, in tokens, of those that differ,
    "agreement": {model: the mean share of an answer's tokens before it differs}, "stopped", "own_stopped": rows,
    "prompt_tokens": [the least, the most] that the server counts beyond training, "steady", "scores": `compare` of the
    served answers against the model's, "causes": [{"what", "mend"}], "verdict", "status": 0, 4 not the same, 5 too few
    rows to say}."""
    names = _names(rows[0]) + ["base"] * ("answer" in rows[0].get("base", {}))
    parts = {
        name: [_common(encoder, row[name], reply) for row, reply in zip(rows, replies, strict=True)] for name in names
    }
    equal = {name: sum(place is None for place, _ in found) for name, found in parts.items()}
    agreement = {name: fmean(share for _, share in found) for name, found in parts.items()}
    of = max(_names(rows[0]), key=lambda name: (equal[name], agreement[name]))
    own = [row[of] for row in rows]
    served = [_scored(row, one, reply, encoder) for row, one, reply in zip(rows, own, replies, strict=True)]
    places = [place for place, _ in parts[of] if place is not None]
    extra = [r.prompt_tokens - row["tokens_of_prompt"] for row, r in zip(rows, replies, strict=True) if r.prompt_tokens]
    found: dict[str, Any] = {
        "of": of, "rows": len(rows), "equal": equal, "first_difference": fmean(places) if places else None,
        "agreement": agreement, "stopped": sum(reply.stopped for reply in replies),
        "own_stopped": sum(one["stopped"] for one in own), "prompt_tokens": [min(extra), max(extra)] if extra else None,
        "steady": steady, "scores": compare(served, own),
    }  # fmt: skip
    causes = [*_prompt_cause(encoder, rows, replies, equal[of] == len(rows)), *_base_cause(found)]
    causes += _stop_cause(encoder, rows, of, replies)
    found["verdict"], found["causes"], found["status"] = _verdict(found, causes, _penalty(run_folder))
    return found


def _verdict(found: dict, causes: list[Cause], penalty: str) -> tuple[str, list[dict], int]:
    """(the verdict, its causes, the exit status)."""
    of, rows, scores = found["of"], found["rows"], found["scores"]
    equal, worse = found["equal"][of], [name for name in OF_ANSWERS if scores.get(name, {}).get("verdict") == "worse"]
    if not causes and equal == rows:
        return "the model that was evaluated: every answer is equal", [], OK
    from_token = f"equal up to token {found['first_difference'] or 0:.0f} on average where they differ"
    if not causes and equal >= NEARLY_ALL * rows:
        return f"the model that was evaluated: {equal} of {rows} answers are equal, others {from_token}", [], OK
    if not causes and (worse or found["agreement"][of] < HARDLY):
        named = f", and worse in {' and '.join(SCORES[name].label for name in worse)}" if worse else ""
        mend = "serve more bits (f16, q8_0), or the folder that was evaluated, with no penalty on repetition"
        why = "weights rounded to few bits, or other weights"
        if not found["steady"]:
            why, mend = "one prompt is answered in two ways: it samples", "have it honour temperature 0"
        unseen = " (it counts no prompt tokens, so it may be the template)" if found["prompt_tokens"] is None else ""
        causes = [Cause(f"answers are {from_token}{named}: {why}{unseen}", mend + penalty)]
    if causes:
        return "not the model that was evaluated", [cause._asdict() for cause in causes], GATE_FAILED
    if rows < FEWEST_ROWS:
        return f"too few rows to say: answers are {from_token}; ask more (--max-rows)", [], TOO_FEW_ROWS
    within = "; ".join(
        f"{SCORES[name].label} {show_interval(name, scores[name])}" for name in OF_ANSWERS if name in scores
    )
    as_good = f"as good as what was evaluated: answers are {from_token}: numerics or quantisation"
    return f"{as_good}; scores within {within}{penalty}", [], OK


def print_served(found: dict) -> None:
    """Print what `compare_served` returned, for people."""
    rows, extra = found["rows"], found["prompt_tokens"]
    same = {(0, 0): "as many as in training"}
    table: dict[str, object] = {
        f"equal to the {name}'s answers": f"{n} of {rows}" for name, n in found["equal"].items()
    }
    table |= {"first difference": found["first_difference"] and f"token {found['first_difference']:.1f} on average"}
    table |= {"ended by themselves": f"{found['stopped']} of {rows} (the {found['of']}'s: {found['own_stopped']})"}
    told = "the server counts none" if extra is None else same.get(tuple(extra), f"{_range(extra)} than in training")
    table |= {"prompt tokens": told}
    for name in [name for name in SHOWN if name in found["scores"]]:
        table[f"{SCORES[name].label}, served − {found['of']}"] = show_interval(name, found["scores"][name])
    print_table("\nserved against evaluated", table)
    say(f"\nverdict: {found['verdict']}")
    for cause in found["causes"]:
        say(f"cause:   {cause['what']}\nmend:    {cause['mend']}")


def _names(row: dict) -> list[str]:
    return [name for name in ("merged", "adapter") if "answer" in row.get(name, {})]


def _range(extra: list[int]) -> str:
    least, most = extra
    if least == most:
        return f"{abs(most)} {'more' if most > 0 else 'fewer'}"
    return f"from {least:+} to {most:+} others"


def _common(encoder: Encoder, own: dict, reply: Reply) -> tuple[int | None, float]:
    """(the token of `own`'s answer at which the served one differs, None for none; the share of tokens before it)."""
    text, served = own["answer"].strip(), reply.text.strip()
    if reply.calls:
        return (None, 1.0) if _same_calls(text, reply.calls) else (0, 0.0)
    if "</think>" in text and "</think>" not in served:  # the server has cut out what was thought
        text = text.rpartition("</think>")[2].strip()
    if text == served or (not own["stopped"] and text and served.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))):
        return None, 1.0
    ours, theirs = (encoder.tokenizer.encode(one, add_special_tokens=False) for one in (text, served))
    place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return place, place / max(1, len(ours))


def _same_calls(text: str, calls: list[dict]) -> bool:
    """Whether the answer `text` makes the `calls` that a server found in its own; in a form that is no JSON, whether
    their names and arguments stand in it."""
    if own := _calls(text):
        return own == calls
    words = [word for call in calls for word in (call["name"], *map(str, call["arguments"].values()))]
    return all(word in text for word in words)


def _calls(text: str) -> list[dict]:
    """The tool calls that stand in an answer as JSON: objects with `name` and `arguments`."""
    found, place, decoder = [], 0, json.JSONDecoder()
    while (place := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError:
            place += 1
            continue
        if "name" in value and "arguments" in value:
            found.append({"name": value["name"], "arguments": value["arguments"]})
    return found


def _scored(row: dict, own: dict, reply: Reply, encoder: Encoder) -> dict:
    """The served answer as `evaluate` scores one; tool calls that equal `own`'s are written as it wrote them."""
    text = reply.text
    if reply.calls:
        text = own["answer"] if _same_calls(own["answer"], reply.calls) else json.dumps(reply.calls)
    tokens = len(encoder.tokenizer.encode(text, add_special_tokens=False)) if reply.tokens is None else reply.tokens
    return {"answer": text, "stopped": reply.stopped, "answer_tokens": tokens, **score_text(row["expected"], text)}


def _prompt_cause(encoder: Encoder, rows: list[dict], replies: list[Reply], all_equal: bool) -> Iterator[Cause]:
    """Why the server counts other prompt tokens than training had: the first way to spoil a prompt that gives its
    counts in every row. Where none does and the answers are `all_equal`, it only counts in its own way."""
    counted = [(row, reply.prompt_tokens) for row, reply in zip(rows, replies, strict=True) if reply.prompt_tokens]
    extra = [count - row["tokens_of_prompt"] for row, count in counted]
    if not any(extra):
        return
    told = f"prompts are {_range([min(extra), max(extra)])} tokens"
    told = told.replace("more tokens", "tokens longer").replace("fewer tokens", "tokens shorter")
    told = told.replace(" 1 tokens", " 1 token").replace("others tokens", "tokens off")
    mend = "serve the merged folder, or give the server RUN/chat_template.jinja (vLLM: --chat-template)"
    for what, own_mend, tokens in _spoilt(encoder):
        with_none = [(_or_none(tokens, row), count) for row, count in counted]
        if all(length == count for length, count in with_none):
            yield Cause(f"{told}: {what}", own_mend or mend)
            return
    if all_equal:
        return
    part = "something that stands before the conversation" if min(extra) > 0 else "a part of it that is left out"
    yield Cause(f"{told}: another chat template, or {part}", mend)


def _or_none(tokens: Callable[[dict], int], row: dict) -> int | None:
    try:
        return tokens(row)
    except (TemplateError, TypeError):  # a template that has no place for the row, or for its tool calls
        return None


def _spoilt(encoder: Encoder) -> Iterator[tuple[str, str, Callable[[dict], int]]]:
    """(what went wrong, the mend where it is one of its own, the tokens of a row's prompt then)."""
    tokenizer = encoder.tokenizer

    def of(row: dict, messages=None, tools=True, prompt=True, template=None) -> int:
        tools, template = row["tools"] if tools else None, template or row.get("template")
        text = render(tokenizer, messages or row["prompt"], tools, prompt, template)[0]
        return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def with_system(text: str | None) -> Callable[[dict], int]:
        def tokens(row: dict) -> int:
            has_one, said = row["prompt"][0]["role"] == "system", [{"role": "system", "content": text}]
            if text is None:
                return of(row, row["prompt"][1:] if has_one else row["prompt"])
            return of(row, row["prompt"] if has_one else said + row["prompt"])

        return tokens

    def by(template: str, more: int = 0) -> Callable[[dict], int]:
        return lambda row: of(row, template=template) + more

    if bos := tokenizer.bos_token:
        if render(tokenizer, [{"role": "user", "content": "a"}], None, True)[0].startswith(bos):
            mend = "the template writes it and the tokenizer adds another: switch one of them off"
            yield f"BOS ({bos}) twice", mend, lambda row: row["tokens_of_prompt"] + 1
            mend = "let the tokenizer add it (add_bos_token), or the template write it"
            yield f"BOS ({bos}) is missing", mend, lambda row: row["tokens_of_prompt"] - 1
        else:
            mend = "switch it off in the tokenizer (add_bos_token)"
            yield f"a BOS ({bos}) that training did not have", mend, lambda row: row["tokens_of_prompt"] + 1
    mend = "have the server set add_generation_prompt"
    yield "the turn of the answer is not begun", mend, lambda row: of(row, prompt=False)
    mend = "switch tools on (vLLM: --enable-auto-tool-choice and --tool-call-parser)"
    yield "the tools are left out", mend, lambda row: of(row, tools=False)
    yield "the system message is left out", "", with_system(None)
    for text in SYSTEMS:
        yield f"a default system message ({text!r})", "", with_system(text)
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))}
    texts = {"ChatML without a default system message": CHATML, **texts, "none: the last message alone": LAST}
    for name, template in texts.items():
        yield f"another chat template ({name})", "", by(template)
        yield f"another chat template ({name}) and a BOS", "", by(template, 1)
    cut = "blanks at the ends of messages are cut off"
    yield cut, "", lambda row: of(row, [turn | {"content": turn["content"].strip()} for turn in row["prompt"]])


def _base_cause(found: dict) -> Iterator[Cause]:
    base, own = (found["agreement"].get(name, 0.0) for name in ("base", found["of"]))
    if base > own + HARDLY or (base > own and found["equal"]["base"] > found["equal"][found["of"]]):
        alike = f"{found['equal']['base']} of {found['rows']} to the letter"
        mend = (
            "serve the merged folder, or ask for the adapter by its name (vLLM: --lora-modules mine=RUN, --model mine)"
        )
        yield Cause(f"answers are the base's ({alike}): the adapter is not in what is served", mend)


def _stop_cause(encoder: Encoder, rows: list[dict], of: str, replies: list[Reply]) -> Iterator[Cause]:
    """Answers that run on where the evaluated ones ended, or are cut before."""
    pairs = [(row[of], reply) for row, reply in zip(rows, replies, strict=True) if row[of]["stopped"]]
    endless = [(own, reply) for own, reply in pairs if not reply.stopped]
    short = [reply for own, reply in endless if reply.tokens is not None and reply.tokens < own["answer_tokens"]]
    onward = [pair for pair in pairs if _goes_on(*pair)]
    if len(short) > len(pairs) / 2:
        what = f"{len(short)} of {len(pairs)} answers are cut off by the server"
        yield Cause(what, "raise its limit on the tokens of an answer, or its context")
    elif len(onward) > len(pairs) / 2:
        what = "none of" if len(endless) == len(pairs) else f"{len(pairs) - len(onward)} of"
        stop, ids = encoder.tokenizer.convert_ids_to_tokens(encoder.stop_ids[0]), ", ".join(map(str, encoder.stop_ids))
        mend = f"give the server the merged folder's generation_config.json (eos_token_id {ids}), or send `stop`"
        yield Cause(
            f"{what} {len(pairs)} stopped where it did in the evaluation: the stop token {stop} is not set", mend
        )


def _goes_on(own: dict, reply: Reply) -> bool:
    """Whether the served answer is `own`'s and does not end there."""
    text, served = own["answer"].strip(), reply.text.strip()
    return served.startswith(text) and (served != text or not reply.stopped)


def _penalty(run_folder: Path) -> str:
    """What the merged folder's generation settings hold that an evaluation does not, and servers apply."""
    path = Path(run_folder) / "merged" / "generation_config.json"
    penalty = read_json(path).get("repetition_penalty") if path.is_file() else None
    return f". {path} has repetition_penalty {penalty}, which servers apply, the evaluation did not" if penalty else ""
