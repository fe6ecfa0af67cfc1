"""Scores on answer tokens and greedy answers, for any causal LM: base, adapter or merged; row by row and summed up."""

import copy
import hashlib
import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence

from recipes.utils.console import UserError, out, say
from recipes.utils.data import (
    Chat,
    DataOptions,
    Encoded,
    Encoder,
    Reading,
    held_out,
    stream_chats,
    train_paths,
    without_excluded,
)
from recipes.utils.evaluation.baseline import BASELINES
from recipes.utils.evaluation.runs import set_scale
from recipes.utils.evaluation.scores import FIELD, METRIC, SCORES, score_names, score_of, score_text
from recipes.utils.evaluation.shown import distributions, examples
from recipes.utils.evaluation.statistics import compare, compare_score, figures, mark_luck
from recipes.utils.evaluation.verdicts import BEST, in_short, note_of, sentence, show, show_interval
from recipes.utils.files import adapter_sha256, read_jsonl, replace_folder, write_json, write_jsonl
from recipes.utils.model import NEVER_STOPS, generate_answers, in_batches

MODELS = (*BASELINES, "adapter", "merged")
SHARED = ("expected", "expected_tokens", "tokens", "thinks")  # of the row, whichever model answered
SHOWN_PAIRS = (f"adapter against {BEST}", "adapter against base", "merged against base", "merged against adapter")
WORST_FIELDS, MOST_TAGS_SHOWN = 8, 20  # on the terminal
FIELDS, MOST_FIELDS = "fields of the JSON answers", 100  # in the report
MOST_TAGS = 100
TOKENS_COMPARED = 64  # of the fused head's with the model's own logits


def rows_to_score(record: dict, data: str | list[str] | None = None) -> list[Chat]:
    """The rows to score a run on: `data`, else its data.test, else its validation rows; `record` is its run.json."""
    options = DataOptions(**record["data"])
    paths, share = data or options.test or options.validation, 1.0
    if isinstance(paths, float):
        share, paths = paths, train_paths(options.train)
    if paths is None:
        raise UserError("the run has no test or validation rows; name a JSONL file with --data")
    reading = Reading()
    streamed = stream_chats(paths, reading, options.system == "merge")
    chats = list(without_excluded(streamed, None if data else options.exclude, reading))
    if options.on_bad_row == "error":
        reading.raise_if_bad()
    return [chat for chat in chats if share == 1 or held_out(chat, share, record["seed"])]


def within_limit(encoder: Encoder, chats: list[Chat], record: dict) -> list[Chat]:
    """Those of `chats` that the run with that `record` would have trained on: they fit in its max_length, and have an
    answer that carries loss. Says how many have not. Raises `UserError` if none is left."""
    limit = record["training"].get("max_length") or 1024  # SFTConfig's
    lengths: dict[str, int] = {}
    for row in encoder.encode(chats, record["data"]["train_on"]):  # a chat may be several rows
        lengths[row.where] = max(lengths.get(row.where, 0), len(row.input_ids))
    kept = [chat for chat in chats if 0 < lengths.get(chat.where, 0) <= limit]
    if not kept:
        raise UserError(f"no row fits in the run's training.max_length of {limit:,} tokens")
    if len(kept) < len(chats):
        over = f"{len(chats) - len(kept):,} of {len(chats):,} rows are over the run's max_length of {limit:,} tokens"
        say(f"left out: {over}, or no answer of them carries loss")
    return kept


def evaluate(
    model, encoder: Encoder, chats: list[Chat], max_rows: int, max_new_tokens=None, train_on: str = "all"
) -> list[dict]:
    """What `model` makes of `chats`, a dict each: `loss` (nats a token) and `token_accuracy` on its answer tokens (of
    the last answer alone, if the run was to `train_on` it), and their number `tokens`. The first `max_rows` have also
    the greedy `answer` to their last prompt, whether it ended by itself (`stopped`), its `answer_tokens`, what was
    `expected`, `expected_tokens`, what `score_text` gives, and whether the prompt asks for a thought (`thinks`; only
    where the template can ask for none)."""
    encoded = encoder.encode(chats, train_on)
    losses = score_rows(model, encoder, encoded)
    rows: list[dict] = []
    # A chat may have been split into several rows; they follow each other.
    for _, group in itertools.groupby(range(len(encoded)), key=lambda index: encoded[index].where):
        loss, right, tokens = losses[list(group)].sum(0)
        rows.append({"loss": loss / tokens, "token_accuracy": right / tokens, "tokens": int(tokens)})

    asked = [chat._replace(messages=[{**turn, "weight": 1} for turn in chat.messages]) for chat in chats[:max_rows]]
    last = encoder.encode(asked, train_on="last")
    wanted = [[label for label in row.labels if label != -100] for row in last]
    prompts = [encoder.prompt_ids(chat.messages[:-1], chat.tools, chat.messages[-1]) for chat in asked]
    if max_new_tokens is None:  # room for the longest expected answer, its thought and some more, so that babble shows
        ends = [max(place for place, label in enumerate(row.labels) if label != -100) for row in last]
        max_new_tokens = min(1024, max(end + 1 - len(ids) for end, ids in zip(ends, prompts, strict=True)) + 16)
    with _as_in_training(model):
        answers = generate_answers(model, encoder, prompts, max_new_tokens)
    for row, chat, ids, answer in zip(rows, asked, wanted, answers, strict=False):
        if (thinks := encoder.asks_thought(chat.messages[-1])) is not None:
            row["thinks"] = thinks
        expected = encoder.tokenizer.decode(ids, skip_special_tokens=True)
        row |= {"expected": expected, "expected_tokens": len(ids), "answer": answer.text, "stopped": answer.stopped}
        expected, said = (text.rpartition("</think>")[2].strip() for text in (expected, answer.text))  # not the thought
        row |= {"answer_tokens": answer.tokens, **score_text(expected, said)}
    return rows


def score_answers(model, encoder: Encoder, encoded: list[Encoded]) -> tuple[float, float]:
    """(mean loss in nats, share of tokens predicted right) over all labelled tokens of `encoded`."""
    loss, right, tokens = score_rows(model, encoder, encoded).sum(0)
    return loss / tokens, right / tokens


@torch.no_grad()
def score_rows(model, encoder: Encoder, encoded: list[Encoded]) -> np.ndarray:
    """(rows, 3): of each row's labelled tokens the summed loss in nats, how many were predicted right, how many they
    are; by the fused head that training has too, so no full logits are held. Raises as `fused` does."""
    scores = np.zeros((len(encoded), 3))

    def score(batch: list[int]) -> None:
        rows = [torch.tensor(encoded[index].input_ids, device=model.device) for index in batch]
        ids = pad_sequence(rows, batch_first=True, padding_value=encoder.tokenizer.pad_token_id or 0)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = [torch.tensor(encoded[index].labels, device=model.device) for index in batch]
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        found = head(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        by_token = torch.stack([-found.log_probs, found.is_top1, found.label_mask], -1)  # 0 where there is no label
        scores[batch] = by_token.double().sum(1).cpu().numpy()

    if not encoded:
        return scores
    with _as_in_training(model):
        head = fused(model, encoded[0].input_ids)
        in_batches([len(row.input_ids) for row in encoded], score)
    return scores


def _as_in_training(model):
    """What was trained is float32 beside a base in 16 bit: autocast joins them as it did in a step, and for samples."""
    dtype = model.config.dtype
    return torch.autocast(model.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))


def fused(model, ids: list[int]):
    """A model that shares all with `model`, or with the base that its adapter is on, and has TRL's fused LM head, which
    knows what an architecture does to its logits after the head (a scale, a soft cap). Raises `UserError` where it does
    not give the model's own log-probabilities of `ids`, at the first `TOKENS_COMPARED` positions."""
    from trl.trainer.utils import add_fused_lm_head  # here: a merge and a chat, which import this package, can spare it

    model.eval()
    shared = copy.copy(model.get_base_model() if hasattr(model, "get_base_model") else model)
    add_fused_lm_head(shared, outputs=("log_probs", "is_top1"))
    head = torch.tensor([ids[: TOKENS_COMPARED + 1]], device=model.device)
    own = model(input_ids=head, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    own = own.gather(-1, head[:, 1:, None].to(own.device))[..., 0]
    apart = (own - shared(input_ids=head, labels=head, fused_lm_head=True).log_probs).abs().mean().item()
    limit = 1e-3 if model.dtype == torch.float32 else 0.1  # in 16 bit, a scale or a cap rounds the logits again
    if not apart <= limit:
        why = f"TRL's fused head gives other log-probabilities than the model itself, {apart:.2g} nats a token apart"
        raise UserError(f"{type(shared).__name__}: {why}, so its losses would be wrong; it cannot be scored here")
    return shared


def score_scales(run_folder: Path, live, encoder: Encoder, chats, scales: list[float], old_chats, *settings) -> dict:
    """The `figures` of `live` (a PEFT model) on `chats` at each of `scales`, by the scale as text, with
    `forgetting_loss` (nats a token) on `old_chats`, if any; `settings`: as for `evaluate`. Written to scales.json."""
    by_scale, old_rows = {}, encoder.encode(old_chats)
    for scale in scales:
        set_scale(live, scale)
        lost = {"forgetting_loss": score_answers(live, encoder, old_rows)[0]} if old_rows else {}
        by_scale[f"{scale:g}"] = figures(evaluate(live, encoder, chats, *settings)) | lost
    set_scale(live, 1.0)
    (Path(run_folder) / "evaluation").mkdir(exist_ok=True)
    of = {"of": {"adapter_sha256": adapter_sha256(run_folder)}}
    write_json(Path(run_folder) / "evaluation" / "scales.json", by_scale | of)
    _print(_table("", by_scale, {}))
    return by_scale


def write_evaluation(run_folder: Path, parts: dict[str, list[Chat]], scored: dict, forgetting="", **more) -> dict:
    """Write RUN/evaluation/, whole or not at all: PART.jsonl for each of `parts` (the `predictions`, and the rows
    `forgetting` of the file of that name), an object a row with where, tag, prompt, tools, expected, and each model's
    answer and scores; then metrics.json. `scored` is, by part and model, what `evaluate` gave. Returns what
    metrics.json holds: `sum_up` of the predictions, under "forgetting" the same of those, `more` as it is, under
    "report" what report.html shows, and under "of" which adapter it is."""
    final, folder = Path(run_folder) / "evaluation", Path(run_folder) / ".evaluation"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part, chats in parts.items():
        lines = []
        for chat, *rows in zip(chats, *scored[part].values(), strict=True):
            line = {"where": chat.where, "tag": _tag(chat), "prompt": chat.messages[:-1], "tools": chat.tools}
            line |= {key: rows[0][key] for key in SHARED if key in rows[0]}
            for name, row in zip(scored[part], rows, strict=True):
                line[name] = {key: value for key, value in row.items() if key not in SHARED}
            lines.append(line)
        write_jsonl(folder / f"{part}.jsonl", lines)
        if part == "predictions":
            shown = {"examples": examples(lines), "distributions": distributions(lines)}
    metrics = sum_up(scored["predictions"], parts["predictions"]) | more
    titled = {"": metrics} | {f"tag {tag}": part for tag, part in metrics.get("tags", {}).items()}
    if "forgetting" in parts:
        lost = sum_up(scored["forgetting"], parts["forgetting"]) | {"data": str(forgetting)}
        metrics["forgetting"] = titled[f"forgetting, on {forgetting}"] = lost
    models = scored["predictions"]
    tables = []
    for title, own in titled.items():  # of the rows of another kind, the base is scored as it is alone
        tables.append(_table(title, {name: own[name] for name in models if name in own}, own["differences"]))
    if fields := _fields_table(metrics, list(models)):
        tables.append(fields)
    metrics["verdict"] = in_short(*next(iter(metrics["differences"].items())))
    if "forgetting" in metrics and (in_what := _lost(metrics)):
        metrics["verdict"] += f"; but on {forgetting} it lost {in_what}"
    said = [metrics["verdict"], *(f"Gate, {gate['verdict']}: {gate['text']}" for gate in more.get("gates", ()))]
    said += [sentence(*pair) for pair in metrics["differences"].items()]
    metrics["report"] = {"verdicts": said, "tables": tables, **shown}
    metrics["of"]["adapter_sha256"] = adapter_sha256(run_folder)
    write_json(folder / "metrics.json", metrics)
    for name in ("scales.json", "against.json", "curve.json"):  # which name what they are of themselves
        if (final / name).is_file():
            shutil.copyfile(final / name, folder / name)
    replace_folder(folder, final)
    return metrics


def read_rows(path: Path) -> dict[str, list[dict]]:
    """By model, the rows that `evaluate` gave, of a file that `write_evaluation` wrote."""
    lines = read_jsonl(path)
    names = [name for name in MODELS if name in lines[0]]
    return {name: [line[name] | {key: line[key] for key in SHARED if key in line} for line in lines] for name in names}


def sum_up(scored: dict[str, list[dict]], chats: list[Chat]) -> dict:
    """{"base": figures, "adapter": figures, ..., "differences": {"adapter against base": `compare`, ...}, "tags": {tag:
    the same for the rows with that `tag`}, "of": which rows they are} of what `evaluate` gave for each of `MODELS`. Of
    several baselines, "adapter against best" comes first: score by score, against the one that does best."""
    found, tags = _figures_and_differences(scored), [_tag(chat) for chat in chats]
    common = Counter(tag for tag in tags if tag).most_common()
    if len(common) > MOST_TAGS:
        say(f"tags: {len(common):,} of them; the {MOST_TAGS} with the most rows are summed up")
    for tag in sorted(tag for tag, _ in common[:MOST_TAGS]):
        rows = {name: [row for row, own in zip(rows, tags, strict=True) if own == tag] for name, rows in scored.items()}
        found.setdefault("tags", {})[tag] = _figures_and_differences(rows)
    for pair, comparison in found["differences"].items():
        mark_luck([part["differences"][pair] for part in found.get("tags", {}).values() if pair in part["differences"]])
        mark_luck([{"field": one} for name, one in comparison.items() if name.startswith(FIELD)])
    return found | {"of": {"rows_sha256": rows_digest(chats)}}


def rows_digest(chats: list[Chat]) -> str:
    """SHA-256 of what is asked and expected, by which evaluations of the same rows are known."""
    text = json.dumps([[chat.messages, chat.tools] for chat in chats], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def best_baselines(scored: dict[str, list[dict]]) -> dict[str, str]:
    """By score, which baseline does best; the base as it is, where they are alike."""
    found, by_name = {}, {name: figures(rows) for name, rows in scored.items() if name in BASELINES}
    for name in score_names(scored["base"]):
        better = score_of(name).better
        # one that is no number is below any other
        rank = {model: better * own.get(name, math.nan) for model, own in by_name.items()}
        found[name] = max(rank, key=lambda model: -math.inf if math.isnan(rank[model]) else rank[model])
    return found


def _figures_and_differences(scored: dict) -> dict:
    pairs = list(itertools.combinations([name for name in ("base", "adapter", "merged") if name in scored], 2))
    pairs[1:1] = [(name, "adapter") for name in BASELINES if name in scored and name != "base" and "adapter" in scored]
    differences = {f"{ours} against {theirs}": compare(scored[ours], scored[theirs]) for theirs, ours in pairs}
    if "adapter" in scored and len([name for name in scored if name in BASELINES]) > 1:
        best = {
            name: found | {"against": other}
            for name, other in best_baselines(scored).items()
            if (found := compare_score(scored["adapter"], scored[other], name))
        }
        differences = {f"adapter against {BEST}": best} | differences
    return {name: figures(rows) for name, rows in scored.items()} | {"differences": differences}


def _tag(chat: Chat) -> str:
    tag = json.loads(chat.line).get("tag") if chat.line else None
    return "" if tag is None else str(tag)


def _table(title: str, by_name: dict[str, dict], differences: dict[str, dict]) -> dict:
    """Figures by model or scale as text; a row is [label, [figure], [[difference and interval, verdict, note]]]."""
    rows, first = [], next(iter(by_name.values()))
    pairs = [pair for pair in differences if pair in SHOWN_PAIRS]
    for name in [name for name in first if name in SCORES or name.startswith(METRIC)]:
        label = score_of(name).label
        label += f" (expected {first['expected_tokens']:.1f})" if name == "answer_tokens" else ""
        found = [differences[pair].get(name) for pair in pairs]
        cells = [[show_interval(name, one), one["verdict"], note_of(name, one)] if one else [""] * 3 for one in found]
        best = found[0].get("against") if found and found[0] else None
        having = {model: show(name, own[name]) if name in own else "" for model, own in by_name.items()}
        shown = [text + " *" * (model == best) for model, text in having.items()]
        rows.append([label, shown, cells])
    if "forgetting_loss" in first:
        rows.append(["forgetting loss", [f"{own['forgetting_loss']:.4f}" for own in by_name.values()], []])
    counts = f"{first['rows']:,} rows, answers to {first['generated_rows']:,}"
    models = [BASELINES.get(name, name) for name in by_name]
    return {"title": title, "models": models, "pairs": pairs, "rows": rows, "counts": counts}


def _worst_fields(metrics: dict) -> list[str]:
    """The fields of JSON answers, those first that the adapter gets wrong most often."""
    fields = [name for name in metrics["adapter"] if name.startswith(FIELD)]
    return sorted(fields, key=lambda name: metrics["adapter"][name])


def _fields_table(metrics: dict, models: list[str]) -> dict | None:
    """In the form of `_table`, a row a field of the JSON answers."""
    pair, fields = next(iter(metrics["differences"])), _worst_fields(metrics)[:MOST_FIELDS]
    rows = []
    for name in fields:
        found = metrics["differences"][pair][name]
        shown = [show(name, metrics[model][name]) for model in models]
        cell = [show_interval(name, found), found["verdict"], note_of(name, found)]
        rows.append([score_of(name).label, shown, [cell]])
    heads, counts = [BASELINES.get(name, name) for name in models], f"the {len(fields)} that are wrong most often first"
    return {"title": FIELDS, "models": heads, "pairs": [pair], "rows": rows, "counts": counts} if rows else None


def _print(table: dict) -> None:
    """Of the differences, those of the adapter from the base, or from the best baseline; below the figures, as a table
    of their own, where one is too wide."""
    say(f"\n{table['title']}, {table['counts']}" if table["title"] else "")
    best = f"adapter against {BEST}" in table["pairs"]
    heads = [f"adapter − {'best *' if best else 'base'}, 95 % interval", ""] if table["pairs"] else []
    figures_of = {label: own for label, own, _ in table["rows"]}
    judged = {label: [cells[0][0], _judged(*cells[0][1:])] for label, _, cells in table["rows"] if cells}
    whole = _columns(table["models"] + heads, figures_of, judged)
    if _fits(whole):
        out.print(whole, markup=False)
        return
    out.print(_columns(table["models"], figures_of), markup=False)
    say("")
    out.print(_columns(heads, judged), markup=False)


def _fits(table: Table) -> bool:
    """Whether the table is no wider than the terminal."""
    return out.measure(table, options=out.options.update(width=1_000)).maximum <= out.width


def _columns(heads: list[str], *parts: dict[str, list[str]]) -> Table:
    """A line for each label of the first of `parts`, each of which has columns by label."""
    shown = Table("", *heads, box=None, padding=(0, 2), header_style="bold")
    for label in parts[0]:
        shown.add_row(label, *itertools.chain(*(part.get(label, []) for part in parts)))
    return shown


def _judged(verdict: str, note: str) -> str:
    return f"{verdict} ({note})" if note else verdict


def _print_slices(metrics: dict) -> None:
    """A line a tag, and a line for each of the fields of JSON answers that the adapter gets wrong most often."""
    pair, models = next(iter(metrics["differences"])), ("base", "adapter")
    lines: dict[str, list] = {"tag": [], "field of the JSON answers": []}
    tags = sorted(metrics.get("tags", {}).items(), key=lambda item: -item[1]["base"]["rows"])
    for tag, part in tags[:MOST_TAGS_SHOWN]:
        found = part["differences"].get(pair, {})
        names = [name for name in found if name.startswith(METRIC) or name in ("exact_match", "loss")][-2:]
        lines["tag"] += [(tag, name, part, found[name]) for name in names]
    fields = _worst_fields(metrics)
    for name in fields[:WORST_FIELDS]:
        lines["field of the JSON answers"].append(
            (score_of(name).label, name, metrics, metrics["differences"][pair][name])
        )
    for title, found in lines.items():
        if not found:
            continue
        every, shown = {"tag": len(tags)}.get(title, len(fields)), len({line[0] for line in found})
        of = f"{every:,} {'tags' if title == 'tag' else 'fields'}"
        of += f", the {shown} {'largest' if title == 'tag' else 'that are wrong most often'}" * (shown < every)
        say(f"\nby {title} ({of}; so many looks make some luck: Benjamini-Hochberg):")
        heads = "", "rows", "", *models, "difference, 95 % interval", ""
        table = Table(*heads, box=None, padding=(0, 2), header_style="bold")
        for label, name, own, one in found:
            score = "" if name.startswith(FIELD) else score_of(name).label
            figures_of = [show(name, own[model][name]) for model in models]
            judged = _judged(one["verdict"], note_of(name, one))
            table.add_row(label, f"{one['rows']:,}", score, *figures_of, show_interval(name, one), judged)
        if _fits(table):
            out.print(table, markup=False)
            continue
        for label, *parts in zip(*(column.cells for column in table.columns), strict=True):
            named = [f"{head}: {part}" if head else part for head, part in zip(heads[1:], parts, strict=True) if part]
            say("\n  ".join([str(label), *named]))


def _lost(metrics: dict) -> str:
    """In what the adapter is worse than the base on the rows of another kind."""
    found = metrics["forgetting"]["differences"]["adapter against base"]
    worse = [(name, one) for name, one in found.items() if one["verdict"] == "worse" and not name.startswith(FIELD)]
    return ", ".join(f"{score_of(name).label} ({show_interval(name, one)})" for name, one in worse)


def print_evaluation(metrics: dict, scored: dict, chats: list[Chat]) -> None:
    """Print what `write_evaluation` returned, the summary first, and a few answers: `scored` are the rows by model, of
    the `chats`."""
    tables = [one for one in metrics["report"]["tables"] if not one["title"].startswith(("tag ", FIELDS))]
    _print(tables[0])
    for pair, comparison in metrics["differences"].items():
        if pair in SHOWN_PAIRS:
            say("\n" + sentence(pair, comparison))
    for table in tables[1:]:
        _print(table)
    if "forgetting" in metrics:
        say(f"\nlost: {_lost(metrics) or 'nothing that these rows can show'}")
    _print_slices(metrics)
    for name in [name for name in scored if name in ("adapter", "merged")]:
        answered = [row for row in scored[name] if "answer" in row]
        if all(not row["stopped"] and row["expected_tokens"] < row["answer_tokens"] for row in answered):
            say(f"\nwarning: none of the {len(answered):,} answers of the {name} ends by itself; {NEVER_STOPS}")
    for index in range(min(3, metrics["base"]["generated_rows"])):
        say(f"\nprompt      {chats[index].messages[-2]['content']}\nexpected    {scored['base'][index]['expected']}")
        for name, rows in scored.items():
            say(f"{BASELINES.get(name, name):<11} {rows[index]['answer']}")
