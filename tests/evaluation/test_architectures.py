"""Evaluation says what training says: the same validation loss, whatever an architecture does after its head."""

import copy
import json

import pytest
import torch
from conftest import BASE, TINY, chat, read_jsonl, run_recipe, write_jsonl
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
from recipes.utils.console import UserError
from recipes.utils.data import DataOptions, Encoder, load_tokenizer, prepare, read_chats
from recipes.utils.evaluation.evaluate import score_answers, score_rows
from recipes.utils.training import ResumableTrainer

SMALL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": 256,
         "pad_token_id": 256, "bos_token_id": None}  # fmt: skip
ARCHITECTURES = {
    "qwen2": {}, "qwen3": {"head_dim": 16}, "mistral": {}, "llama": {}, "phi3": {}, "olmo2": {}, "gpt_neox": {},
    "gemma3_text": {"head_dim": 16},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 50.0},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
}  # fmt: skip
ANSWERS = ["no", "yes, " * 12, "b", "a long way round, by the river and over three hills", "c d", "e" * 40]


def small_model(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SMALL if name != "gpt2" else {"vocab_size": 320}), **ARCHITECTURES[name])
    attention = "eager" if name == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(a path of rows whose answers are of very different lengths, the tokenizer)"""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    questions = [row["messages"][0]["content"] for row in read_jsonl(TINY / "train.jsonl")[: len(ANSWERS)]]
    write_jsonl(path, [chat(*pair) for pair in zip(questions, ANSWERS, strict=True)])
    return path, load_tokenizer(BASE)


def trainer_of(model, rows, folder, **settings):
    """A trainer on those rows whose adapter does something."""
    path, tokenizer = rows
    args = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, max_length=320, report_to="none",
                     per_device_eval_batch_size=4, gradient_checkpointing=False, **settings)  # fmt: skip
    data = prepare(DataOptions(train=str(path)), tokenizer, args, report=False)[0].rows
    trainer = ResumableTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    torch.manual_seed(1)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return trainer


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_evaluation_and_training_have_one_validation_loss(name, rows, tmp_path):
    """Both are the mean over all answer tokens, which is neither that of rows nor that of batches."""
    trainer, encoder = trainer_of(small_model(name), rows, tmp_path), Encoder(rows[1])
    trained = trainer.evaluate()["eval_loss"]
    encoded = encoder.encode(read_chats(str(rows[0])))
    assert score_answers(trainer.model, encoder, encoded)[0] == pytest.approx(trained, abs=1e-4)

    # and it is that of the model's own logits
    total = tokens = 0.0
    with torch.no_grad():
        for row in encoded:
            logits = trainer.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum").item()
            tokens += row.trained
    assert trained == pytest.approx(total / tokens, abs=1e-4)


def test_packed_rows_weigh_by_their_answer_tokens_too(rows, tmp_path):
    trainer, encoder = trainer_of(small_model("qwen2"), rows, tmp_path, packing=True), Encoder(rows[1])
    expected = score_answers(trainer.model, encoder, encoder.encode(read_chats(str(rows[0]))))[0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_the_model_that_is_scored_stays_as_it_is(rows):
    model, encoder = small_model("granite"), Encoder(rows[1])
    before = dict(model.__dict__)
    score_rows(model, encoder, encoder.encode(read_chats(str(rows[0])))[:1])
    assert model.__dict__.keys() == before.keys()
    assert "fused" not in model.forward.__qualname__


def test_a_head_that_the_fused_one_does_not_know_is_refused(rows):
    """A model that does something of its own to its logits."""
    model, encoder = small_model("qwen2"), Encoder(rows[1])
    odd = copy.deepcopy(model)
    odd.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 3)
    encoded = encoder.encode(read_chats(str(rows[0])))
    score_rows(model, encoder, encoded[:1])
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM: TRL's fused head gives other log-probabilities"):
        score_rows(odd, encoder, encoded[:1])


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_model_whose_backbone_has_another_name_is_trained_evaluated_and_merged(name, config_file, tmp_path):
    small_model(name).save_pretrained(tmp_path / name)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / name)
    short = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "learning_rate": 5e-2, "packing": False}
    model = {"name_or_path": str(tmp_path / name), "dtype": "float32"}
    assert run_recipe("sft_lora", config_file(model=model, training=short)) == 0
    run = tmp_path / "run"
    merged = merge_adapter(run, rows=4)
    scores = evaluate_adapter(run, model=merged, max_rows=1, max_new_tokens=2)
    trained = json.loads((run / "run.json").read_text())["best_validation_loss"]
    assert scores["adapter"]["loss"] == pytest.approx(trained, abs=1e-4)
    assert scores["merged"]["loss"] == pytest.approx(trained, abs=1e-3)
    assert abs(scores["base"]["loss"] - trained) > 0.01
    assert json.loads((merged / "merge.json").read_text())["mean_kl"] < 1e-6
