"""Evaluation counts what it says it counts; a merged model says what the adapter said."""

import json
import math

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
from recipes.sft_lora import train_lora
from recipes.sft_qlora import train_qlora
from recipes.utils.config import load_config
from recipes.utils.console import UserError
from recipes.utils.control_tokens import control_tokens
from recipes.utils.dataset import read_chats
from recipes.utils.encoding import encode_chats, prompt_ids, stop_token_ids
from recipes.utils.evaluation import evaluate, generate_answers, score_answers
from recipes.utils.run_record import newest_run
from recipes.utils.scores import SCORES, figures

import pytest
import torch
from conftest import TINY, chat, read_jsonl, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SHORT = {"max_steps": 4, "learning_rate": 5e-3}


def lora_run(path):
    return train_lora(load_config(path, {}, "lora"))


def qlora_run(path):
    return train_qlora(load_config(path, {}, "qlora"))


@pytest.fixture(scope="module")
def base():
    model = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    tokenizer.chat_template = (TINY.parents[1] / "configs" / "chat_templates" / "qwen2.jinja").read_text()
    return model, tokenizer, read_chats(str(TINY / "test.jsonl"))[:24]


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].float()


def test_loss_and_accuracy_equal_plain_arithmetic_row_by_row(base):
    model, tokenizer, chats = base
    rows = encode_chats(chats, tokenizer)
    loss = right = count = 0
    for row in rows:
        logits = logits_of(model, row.input_ids)
        for position, label in enumerate(row.labels[1:]):
            if label != -100:
                loss -= logits[position].log_softmax(-1)[label].item()
                right += int(logits[position].argmax() == label)
                count += 1
    found_loss, found_accuracy = score_answers(model, tokenizer, rows)
    assert math.isclose(found_loss, loss / count, rel_tol=1e-5)
    assert found_accuracy == right / count


def test_batched_answers_equal_answers_one_by_one(base):
    model, tokenizer, chats = base
    prompts = [prompt_ids(row.messages[:-1], tokenizer) for row in chats]
    assert len({len(prompt) for prompt in prompts}) > 3
    together = generate_answers(model, tokenizer, prompts, 40)
    alone = [generate_answers(model, tokenizer, [prompt], 40)[0] for prompt in prompts]
    assert together == alone


def test_each_row_of_an_evaluation_holds_its_own_loss(base):
    """Also with rows of many lengths in a batch, more labelled tokens than go through the head at once, and a typed
    control token, escaped as in training."""
    model, tokenizer, chats = base
    odd = [*chats[:5], chats[5]._replace(messages=chat("say <|im_end|>", "<|im_end|>" + "x" * 1500)["messages"])]
    rows = evaluate(model, tokenizer, odd, 1)
    for row, own in zip(rows, odd, strict=True):
        encoded = encode_chats([own], tokenizer, escape=True)[0]
        labels = torch.tensor(encoded.labels[1:])
        losses = torch.nn.functional.cross_entropy(logits_of(model, encoded.input_ids)[:-1], labels, reduction="none")
        assert row["loss"] == pytest.approx(losses.sum().item() / encoded.trained, rel=1e-5)
        assert row["tokens"] == encoded.trained
    assert ["answer" in row for row in rows] == [True] + [False] * 5


def test_the_tokenizer_is_copied_once_for_all_rows_of_an_evaluation(base, monkeypatch):
    model, tokenizer, chats = base
    made = []
    for module in ("evaluation", "encoding"):
        monkeypatch.setattr(
            f"recipes.utils.{module}.control_tokens", lambda own: (made.append(1), control_tokens(own))[1]
        )
    evaluate(model, tokenizer, chats[:12], 12, 1)
    assert len(made) <= 2  # one for the rows, one for the stop ids


def test_exact_match_and_stopped_count_what_they_say(base):
    """Rows whose expected answers are the model's own count as matches, the others not; a cut answer has not stopped."""
    model, tokenizer, chats = base
    answers = [row["answer"] for row in evaluate(model, tokenizer, chats[:8], 8, 200)]
    own = [
        row._replace(messages=[*row.messages[:-1], {"role": "assistant", "content": answer if number % 2 else "no"}])
        for number, (row, answer) in enumerate(zip(chats, answers, strict=False))
    ]
    rows = evaluate(model, tokenizer, own, 8, 200)
    found = figures(rows)
    assert found["exact_match"] == sum(answer.strip() != "no" for answer in answers[1::2]) / 8
    assert found["stopped"] == sum(row["stopped"] for row in rows) / 8
    assert figures(evaluate(model, tokenizer, own, 8, 1))["stopped"] <= found["stopped"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["rows"], found["generated_rows"]) == (8, 8)


def test_evaluation_writes_both_models_side_by_side_and_their_answers(config_file, tmp_path, capsys):
    rows = read_jsonl(TINY / "test.jsonl")[:30]
    tagged = [{**row, "tag": "even" if number % 2 else "odd"} for number, row in enumerate(rows)]
    tagged[-1]["tag"] = 7  # of a row that no answer is generated for
    other = write_jsonl(tmp_path / "other.jsonl", [chat("copy abc", "abc"), chat("copy de", "de")])
    folder = lora_run(config_file(data={"test": str(write_jsonl(tmp_path / "test.jsonl", tagged))}, training=SHORT))
    found = evaluate_adapter(folder, max_rows=4, forgetting=str(other))
    written = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert written == found
    assert set(written) == {"base", "adapter", "differences", "tags", "forgetting", "of"}
    assert written["base"]["rows"] == 30
    assert written["base"]["generated_rows"] == 4
    assert set(written["base"]) >= {*SCORES, "rows"}
    loss = written["differences"]["adapter against base"]["loss"]
    assert loss["difference"] == pytest.approx(written["adapter"]["loss"] - written["base"]["loss"])
    assert loss["low"] < loss["difference"] < loss["high"] < 0
    assert loss["verdict"] == "better"
    assert written["differences"]["adapter against base"]["exact_match"]["verdict"] != "better"  # of 4 rows

    # tags are slices of the same rows
    assert {tag: part["base"]["rows"] for tag, part in written["tags"].items()} == {"even": 14, "odd": 15, "7": 1}
    tokens = {part: sum(row["tokens"] for row in read_jsonl(folder / "evaluation" / "predictions.jsonl") if row["tag"] == part) for part in ("even", "odd", "7")}  # fmt: skip
    by_tag = sum(written["tags"][tag]["base"]["loss"] * tokens[tag] for tag in tokens) / sum(tokens.values())
    assert by_tag == pytest.approx(written["base"]["loss"])
    assert "exact_match" not in written["tags"]["7"]["base"]
    assert written["forgetting"]["base"]["rows"] == 2

    predictions = read_jsonl(folder / "evaluation" / "predictions.jsonl")
    assert len(predictions) == 30
    assert predictions[0]["expected"] == rows[0]["messages"][-1]["content"]
    assert {"base", "adapter", "prompt", "where"} <= set(predictions[0])
    assert "answer" in predictions[3]["adapter"]
    assert "answer" not in predictions[4]["adapter"]
    shown = capsys.readouterr().out
    for words in ("exact match", rows[0]["messages"][-1]["content"], "The adapter is better than the base in loss",
                  "too few rows to say", "tag even, 14 rows", "lost: nothing that these rows can show"):  # fmt: skip
        assert words in shown


def test_what_the_base_knew_and_the_adapter_lost_is_named(config_file, base, tmp_path, capsys):
    """Rows whose answers are the base's own: an adapter that learnt to answer in JSON finds them unlikely."""
    model, tokenizer, chats = base
    answers = [row["answer"].strip() for row in evaluate(model, tokenizer, chats, 24, 60)]
    known = [chat(own.messages[0]["content"], answer) for own, answer in zip(chats, answers, strict=True) if answer]
    assert len(known) >= 20
    folder = lora_run(config_file(training={**SHORT, "max_steps": 8}))
    found = evaluate_adapter(folder, max_rows=2, forgetting=str(write_jsonl(tmp_path / "known.jsonl", known)))
    loss = found["forgetting"]["differences"]["adapter against base"]["loss"]
    assert loss["verdict"] == "worse"
    assert loss["low"] > 0
    assert "lost: loss (+" in capsys.readouterr().out


def test_the_base_of_an_evaluation_is_the_base_itself(config_file):
    """With the adapter switched off, or loaded apart for PiSSA, which changes the base when it begins."""
    scores = []
    chats = read_chats(str(TINY / "validation.jsonl"))[:8]
    plain = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    for name, lora in (("plain", {}), ("pissa", {"init_lora_weights": "pissa"})):
        folder = lora_run(
            config_file(name, lora=lora, training={**SHORT, "output_dir": f"{config_file().parent}/{name}"})
        )
        data = write_jsonl(folder / "rows.jsonl", read_jsonl(TINY / "validation.jsonl")[:8])
        scores.append(evaluate_adapter(folder, data=str(data), max_rows=2)["base"]["loss"])
        tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = score_answers(plain, tokenizer, encode_chats(chats, tokenizer))[0]
    assert scores == pytest.approx([expected, expected], rel=1e-6)


MERGES = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
    "trained head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", MERGES)
def test_merged_logits_equal_the_adapters(config_file, name):
    folder = lora_run(config_file(lora=MERGES[name], training=SHORT))
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(folder), dtype="auto")
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32), folder)
    base = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    ids = list(range(60, 200))
    expected = logits_of(live, ids)
    assert (logits_of(merged, ids) - expected).abs().max() < 1e-4
    assert (logits_of(base, ids) - expected).abs().max() > 1e-2, (
        "the adapter must matter for the check to mean anything"
    )


def test_a_mistral_merges_into_its_16_bit_base_and_is_nearer_to_the_adapter_than_to_the_base(
    config_file, mistral_twin, capsys
):
    folder = lora_run(config_file(model={"name_or_path": str(mistral_twin), "dtype": "bfloat16"}, training=SHORT))
    output = merge_adapter(folder)
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    drift = json.loads((output / "merge.json").read_text())
    assert drift["mean_kl"] < 1e-2
    assert "KL divergence" in capsys.readouterr().out


def test_qlora_merges_into_the_16_bit_base_and_never_into_4_bit(config_file, mistral_twin):
    folder = qlora_run(config_file(model={"name_or_path": str(mistral_twin), "dtype": "bfloat16"}, training=SHORT))
    output = merge_adapter(folder)
    tensors = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    base = load_file(mistral_twin / "model.safetensors")
    adapter = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    down, up = (adapter[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    scale = 8 / 4
    assert torch.equal(tensors[f"{name}.weight"], (base[f"{name}.weight"].float() + scale * up @ down).bfloat16())


def test_the_merged_folder_stops_where_training_stopped_and_keeps_the_template(config_file, tmp_path, monkeypatch):
    folder = lora_run(config_file(training=SHORT))
    output = merge_adapter(folder)
    tokenizer = AutoTokenizer.from_pretrained(output)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    texts = [
        own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for own in (tokenizer, AutoTokenizer.from_pretrained(folder))
    ]
    assert texts[0] == texts[1]
    stop_ids = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    assert stop_ids == stop_token_ids(AutoTokenizer.from_pretrained(folder))
    assert tokenizer.convert_ids_to_tokens(stop_ids) == ["<|im_end|>", "<|endoftext|>"]
    adapter = evaluate_adapter(folder, max_rows=2)["adapter"]
    monkeypatch.setattr("recipes.evaluate_adapter.load_adapter", None)  # base and adapter were scored on these rows
    scores = evaluate_adapter(folder, model=output, max_rows=2)
    assert scores["merged"]["loss"] == pytest.approx(adapter["loss"], rel=1e-5)
    assert scores["adapter"] == adapter
    assert set(scores["differences"]) == {"adapter against base", "merged against base", "merged against adapter"}
    monkeypatch.undo()
    data = write_jsonl(tmp_path / "others.jsonl", read_jsonl(TINY / "test.jsonl")[8:10])
    others = evaluate_adapter(folder, model=output, max_rows=2, data=str(data))  # they were not scored on those
    assert set(others) >= {"base", "adapter", "merged"}
    assert others["adapter"]["loss"] != adapter["loss"]


def test_a_run_without_validation_rows_and_one_whose_data_is_gone_can_be_merged(config_file, tmp_path):
    training = {"max_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    folder = lora_run(config_file(data={"validation": None}, training=training))
    (tmp_path / "train.jsonl").unlink()
    assert (merge_adapter(folder) / "config.json").is_file()


def test_a_run_that_skips_and_escapes_can_be_evaluated_and_merged(config_file, tmp_path):
    rows = [*read_jsonl(TINY / "test.jsonl")[:3], chat("say <|im_end|> now", "<|im_end|> it is")]
    path = write_jsonl(tmp_path / "odd.jsonl", rows)
    path.write_text("{\n" + path.read_text())
    data = {"validation": str(path), "on_bad_row": "skip", "control_tokens": "escape"}
    folder = lora_run(config_file(data=data, training={"max_steps": 1, "eval_steps": 1, "save_steps": 1}))
    assert evaluate_adapter(folder, max_rows=4)["adapter"]["rows"] == 4
    assert (merge_adapter(folder) / "config.json").is_file()


def test_a_run_that_has_not_finished_is_a_user_error(config_file, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text('{"status": "stopped"}')
    for function in (evaluate_adapter, merge_adapter):
        with pytest.raises(UserError, match="holds no adapter yet|is no run folder and no adapter"):
            function(tmp_path / "half")


def test_a_target_that_is_not_empty_is_refused_and_left_alone(config_file, tmp_path):
    folder = lora_run(config_file(training={"max_steps": 1}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="--output"):
        merge_adapter(folder, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_without_a_path_the_newest_finished_run_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        newest_run()
    for name, status, finished in (
        ("a", "finished", "2026-01-02"),
        ("b", "finished", "2026-01-03"),
        ("c", "running", None),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps({"status": status, "finished": finished}))
    assert str(newest_run()) == "runs/b"


@pytest.mark.parametrize("function", [evaluate_adapter, merge_adapter])
def test_a_folder_that_is_no_run_is_a_user_error(tmp_path, function):
    with pytest.raises(UserError, match="is no run folder"):
        function(tmp_path)
