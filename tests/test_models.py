"""A tiny random twin of each model that has a YAML, with the model's chat template: trained, evaluated, merged, read
again. What carries loss is exact, the losses of adapter and merged model agree, and its answers stop."""

import pytest
import torch
from conftest import ROOT, chat, read_jsonl, run_recipe, write_jsonl
from families import trained_texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from twins import MORE, TWINS, make_twin

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
from recipes.utils.data import Chat, Encoder

ROWS = [chat(f"Say {number}", "Yes.") for number in range(24)]


def train_on_twin(name, config, folder, *flags):
    twin = make_twin(name, folder / "twin")
    rows = write_jsonl(folder / "rows.jsonl", ROWS)
    settings = {
        "model.name_or_path": twin, "model.dtype": "float32", "data.train": rows, "data.validation": 0.2,
        "data.samples": 0, "training.output_dir": folder / "run", "training.num_train_epochs": 4,
        "training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 1,
        "training.max_length": 320, "training.learning_rate": 1e-2, "training.gradient_checkpointing": "false",
        "training.packing": "false", "training.eval_steps": 0.5, "training.save_steps": 0.5,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    assert run_recipe("sft_lora", ROOT / "configs" / f"{config}.yaml", *words, *flags) == 0


def all_the_way(name, config, folder):
    train_on_twin(name, config, folder)

    # What carries loss, after the very ids that inference sends.
    _, _, end, _, begins = {**TWINS, **MORE}[name]
    tokenizer = AutoTokenizer.from_pretrained(folder / "run")  # its template asks for no thoughts, as no row has one
    for messages in (ROWS[0]["messages"], chat("Say 1", "Yes.", "And 2?", "No.\n\nNo.")["messages"]):
        for row in (encoder := Encoder(tokenizer)).encode([Chat(messages, "f:1")]):
            for place, text in enumerate(texts := trained_texts(tokenizer, row)):
                answers = [message["content"] for message in messages[1::2]]
                expected = answers[place] if len(texts) == len(answers) else text.removeprefix(begins)[: -len(end)]
                assert text.removeprefix(begins) in (expected + end, " " + expected + end)
                assert expected in answers
            prompts = [encoder.prompt_ids(messages[:place]) for place in range(1, len(messages), 2)]
            first = next(place for place, label in enumerate(row.labels) if label != -100)
            assert row.input_ids[:first] in prompts

    merged = merge_adapter(folder / "run", rows=2)
    metrics = evaluate_adapter(folder / "run", model=merged, max_rows=2, max_new_tokens=24)
    assert metrics["merged"]["loss"] == pytest.approx(metrics["adapter"]["loss"], rel=1e-3)
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"] / 2
    assert metrics["merged"]["stopped"] == metrics["adapter"]["stopped"] == 1.0

    # As a stranger serves it: what the folder itself says is all there is.
    model = AutoModelForCausalLM.from_pretrained(merged)
    prompt = torch.tensor([encoder.prompt_ids(ROWS[0]["messages"][:1])])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)[0]
    assert tokenizer.convert_ids_to_tokens(answer[-1].item()) == end
    assert read_jsonl(folder / "run" / "evaluation" / "predictions.jsonl")[0]["merged"]["answer"].endswith("Yes.")


@pytest.mark.parametrize("name", TWINS)
def test_each_yaml_trains_its_twin_which_is_evaluated_merged_and_stops(name, tmp_path):
    all_the_way(name, name, tmp_path)


OTHERS = {"mistral_all_linear": "mistral", "qwen2_all_linear": "qwen2"}  # further settings for a model that has a YAML


@pytest.mark.parametrize("config", OTHERS)
def test_a_models_other_yaml_is_judged_on_its_twin(config, tmp_path, capsys):
    train_on_twin(OTHERS[config], config, tmp_path, "--dry-run")
    shown = " ".join(capsys.readouterr().out.split())
    assert "rank 32, alpha 32, on model.layers.0.mlp.down_proj" in shown
    assert not (tmp_path / "run").exists()


def test_no_yaml_is_untried():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == {*TWINS, *OTHERS, "tiny"}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_models_without_a_yaml_of_their_own_go_the_same_way(name, tmp_path):
    all_the_way(name, "llama3_1", tmp_path)
