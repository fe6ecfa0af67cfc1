"""Evaluation counts what it says it counts."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import trl
from conftest import BASE, TINY, chat, copy_run, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.utils.console import UserError
from recipes.utils.data import Encoder, read_chats
from recipes.utils.evaluation import (
    evaluate,
    figures,
    load_adapter,
    read_rows,
    read_run,
    rows_to_score,
    score_scales,
    sum_up,
    write_evaluation,
)
from recipes.utils.evaluation.evaluate import score_answers
from recipes.utils.files import file_hash
from recipes.utils.model import generate_answers


@pytest.fixture(scope="module")
def base():
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (TINY.parents[1] / "configs" / "chat_templates" / "qwen2.jinja").read_text()
    return model, Encoder(tokenizer, escape=True), read_chats(str(TINY / "test.jsonl"))[:24]


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float()


def test_loss_and_accuracy_equal_plain_arithmetic_row_by_row(base):
    model, encoder, chats = base
    rows = encoder.encode(chats)
    loss = right = count = 0
    for row in rows:
        logits = logits_of(model, row.input_ids)
        for position, label in enumerate(row.labels[1:]):
            if label != -100:
                loss -= logits[position].log_softmax(-1)[label].item()
                right += int(logits[position].argmax() == label)
                count += 1
    found_loss, found_accuracy = score_answers(model, encoder, rows)
    assert math.isclose(found_loss, loss / count, rel_tol=1e-5)
    assert found_accuracy == right / count


def test_batched_answers_equal_answers_one_by_one(base):
    model, encoder, chats = base
    prompts = [encoder.prompt_ids(row.messages[:-1]) for row in chats]
    assert len({len(prompt) for prompt in prompts}) > 3
    together = generate_answers(model, encoder, prompts, 40)
    alone = [generate_answers(model, encoder, [prompt], 40)[0] for prompt in prompts]
    assert together == alone


def test_each_row_of_an_evaluation_holds_its_own_loss(base):
    """Also with rows of many lengths in a batch, more labelled tokens than go through the head at once, and a typed
    control token, escaped as in training."""
    model, encoder, chats = base
    odd = [*chats[:5], chats[5]._replace(messages=chat("say <|im_end|>", "<|im_end|>" + "x" * 1500)["messages"])]
    rows = evaluate(model, encoder, odd, 1)
    for row, own in zip(rows, odd, strict=True):
        encoded = encoder.encode([own])[0]
        labels = torch.tensor(encoded.labels[1:])
        losses = torch.nn.functional.cross_entropy(logits_of(model, encoded.input_ids)[:-1], labels, reduction="none")
        assert row["loss"] == pytest.approx(losses.sum().item() / encoded.trained, rel=1e-5)
        assert row["tokens"] == encoded.trained
    assert ["answer" in row for row in rows] == [True] + [False] * 5


def test_a_row_says_whether_it_was_asked_for_a_thought(base, tmp_path):
    model, encoder, chats = base
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3_training.jinja").read_text()
    thoughtful = [*chats[0].messages[:-1], {**chats[0].messages[-1], "reasoning_content": "Hm."}]
    asked = [chats[0]._replace(messages=thoughtful), chats[1]]
    rows = evaluate(model, Encoder(tokenizer, think="mask"), asked, 2, 1)
    assert [row["thinks"] for row in rows] == [True, False]
    assert "thinks" not in evaluate(model, encoder, chats[:1], 1, 1)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bit_is_scored_and_answered_under_autocast_as_it_is_trained(base, dtype):
    _, encoder, chats = base
    model, seen = AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype), set()
    model.model.layers[0].register_forward_hook(
        lambda *_: seen.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
    )
    evaluate(model, encoder, chats[:2], 1, 2)
    assert seen == {dtype if dtype == torch.bfloat16 else False}
    assert not torch.is_autocast_enabled("cpu")


def test_the_tokenizer_is_copied_once_for_all_rows_of_an_evaluation(base, monkeypatch):
    model, encoder, chats = base
    made, begin = [], Encoder.__init__

    def counted(self, *args, **kwargs):
        made.append(self)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(Encoder, "__init__", counted)
    evaluate(model, encoder, chats[:12], 12, 1)
    assert made == []


def test_exact_match_and_stopped_count_what_they_say(base):
    """Rows whose expected answers are the model's own count as matches, others do not; a cut answer has not stopped."""
    model, encoder, chats = base
    answers = [row["answer"] for row in evaluate(model, encoder, chats[:8], 8, 200)]
    own = [
        row._replace(messages=[*row.messages[:-1], {"role": "assistant", "content": answer if number % 2 else "no"}])
        for number, (row, answer) in enumerate(zip(chats, answers, strict=False))
    ]
    rows = evaluate(model, encoder, own, 8, 200)
    found = figures(rows)
    assert found["exact_match"] == sum(answer.strip() != "no" for answer in answers[1::2]) / 8
    assert found["stopped"] == sum(row["stopped"] for row in rows) / 8
    assert figures(evaluate(model, encoder, own, 8, 1))["stopped"] <= found["stopped"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["rows"], found["generated_rows"]) == (8, 8)


def test_what_the_report_shows_stands_ready_in_metrics_json(base, tmp_path):
    """Sentences, and tables of texts: of all rows, of each tag, of the rows that the base is good at."""
    model, encoder, _ = base
    rows = [{**chat("Hello", "world"), "tag": "short"}, *read_jsonl(TINY / "test.jsonl")[:3]]
    own = read_chats(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    scored = {"base": evaluate(model, encoder, own, 2, 4), "adapter": evaluate(model, encoder, own, 2, 4)}
    parts = {"predictions": own, "forgetting": own[:1]}
    less = {name: rows[:1] for name, rows in scored.items()}
    metrics = write_evaluation(tmp_path, parts, {"predictions": scored, "forgetting": less}, "general.jsonl")
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == metrics
    assert read_rows(tmp_path / "evaluation" / "predictions.jsonl") == scored
    assert read_rows(tmp_path / "evaluation" / "forgetting.jsonl") == less
    report = metrics["report"]
    assert [text[:42] for text in report["verdicts"]] == [
        "TOO FEW ROWS TO SAY whether it is better o",
        "The adapter against the base: too few rows",
    ]
    whole, tag, forgetting, fields = report["tables"]
    assert [label for label, _, _ in fields["rows"]] == ["name", "count", "city", "day"]
    assert (whole["title"], tag["title"]) == ("", "tag short")
    assert forgetting["title"] == "forgetting, on general.jsonl"
    assert (whole["models"], whole["pairs"]) == (["base", "adapter"], ["adapter against base"])
    assert whole["counts"] == "4 rows, answers to 2"
    labels = [label for label, _, _ in whole["rows"]]
    assert labels[:3] == ["loss", "perplexity", "token accuracy"]
    assert labels[-1].startswith("answer tokens (expected ")
    for _, own_figures, cells in whole["rows"]:
        assert len(own_figures) == 2
        assert [verdict for _, verdict, _ in cells] == ["too few rows to say"], "of four rows"
    assert sum_up(scored, own)["of"] | {"adapter_sha256": None} == metrics["of"]


def test_the_rows_to_score_are_the_test_rows_else_the_validation_rows_else_their_share(tmp_path):
    paths = {}
    for name, count in (("train", 40), ("validation", 3), ("test", 2), ("other", 1)):
        paths[name] = str(write_jsonl(tmp_path / f"{name}.jsonl", [chat(f"{name} {i}", "yes") for i in range(count)]))
    record = {"data": {name: paths[name] for name in ("train", "validation", "test")}, "seed": 42}
    assert len(rows_to_score(record)) == 2
    assert len(rows_to_score(record, paths["other"])) == 1
    record["data"]["test"] = None
    assert len(rows_to_score(record)) == 3
    record["data"]["validation"] = 0.5
    share = rows_to_score(record)
    assert 5 < len(share) < 35
    assert share == rows_to_score(record)
    assert len(rows_to_score(record, paths["other"])) == 1
    record["data"]["validation"] = None
    with pytest.raises(UserError, match="no test or validation rows"):
        rows_to_score(record)


def test_a_bad_row_is_told_or_skipped_as_the_run_did(tmp_path):
    path = write_jsonl(tmp_path / "odd.jsonl", [chat("a", "b")])
    path.write_text("{\n" + path.read_text())
    record = {"data": {"train": "", "validation": str(path)}, "seed": 42}
    with pytest.raises(UserError, match=r"odd.jsonl:1"):
        rows_to_score(record)
    record["data"]["on_bad_row"] = "skip"
    assert [own.where for own in rows_to_score(record)] == [f"{path}:2"]


def test_scales_are_the_adapter_turned_down(base, lora_run, tmp_path):
    """At 0 it is the base, at 1 the adapter as trained, and afterwards it is as it was."""
    _, _, chats = base
    folder = copy_run(lora_run, tmp_path)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), escape=True)
    live = load_adapter(folder, read_run(folder))
    with live.disable_adapter():
        plain = figures(evaluate(live, encoder, chats[:6], 2, 8))
    trained = figures(evaluate(live, encoder, chats[:6], 2, 8))
    found = score_scales(folder, live, encoder, chats[:6], [0, 0.5, 1], chats[6:9], 2, 8)
    written = json.loads((folder / "evaluation" / "scales.json").read_text())
    assert written.pop("of") == {"adapter_sha256": file_hash(folder / "adapter_model.safetensors")}
    assert written == found
    assert list(found) == ["0", "0.5", "1"]
    for scale, expected in (("0", plain), ("1", trained)):
        assert {name: found[scale][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["1"]["loss"] < found["0.5"]["loss"] < found["0"]["loss"]
    assert found["1"]["forgetting_loss"] < found["0"]["forgetting_loss"]
    assert figures(evaluate(live, encoder, chats[:6], 2, 8)) == trained
