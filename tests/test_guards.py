"""Each guard stops, drops or warns where it should, with a flag to paste, and is silent on normal data."""

import copy
from types import SimpleNamespace

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
from recipes.sft_lora import train_lora
from recipes.utils.config import load_config
from recipes.utils.console import UserError
from recipes.utils.guards import check_model, check_rows, heed
from recipes.utils.leakage import Finding
from recipes.utils.prepare import prepare

import pytest
import torch
from conftest import TINY, chat, read_jsonl, write_jsonl
from test_chat_template import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig


@pytest.fixture
def found(config_file, tmp_path):
    """A function: findings for train and validation rows, with a tokenizer and settings of choice."""

    def check(train, validation=None, tokenizer=None, data=None, training=None):
        data = {"train": str(write_jsonl(tmp_path / "t.jsonl", train)), "validation": None, **(data or {})}
        training = {"eval_strategy": "no", "load_best_model_at_end": False, **(training or {})}
        if validation:
            data["validation"] = str(write_jsonl(tmp_path / "v.jsonl", validation))
        config = load_config(config_file(data=data, training=training), {}, "lora")
        args, tokenizer = SFTConfig(**config.training), tokenizer or FAMILIES["qwen2"][0]()
        parts = [prepare(config.data, args, tokenizer, part) for part in ("train", "validation")]
        return check_rows(*parts, config, tokenizer)

    return check


def messages(findings, level):
    return [finding.message for finding in findings if finding.level == level]


NORMAL = [chat(f"What is {number} and {number}?", f"It is {2 * number}, of course.") for number in range(40)]


def test_normal_data_meets_no_guard(found):
    findings, validation = found(NORMAL, [chat("Who wrote Faust?", "Goethe did.")])
    assert findings == []
    assert len(validation.rows) == 1


def test_too_much_lost_to_max_length_stops_with_the_length_that_keeps_99_percent(found):
    rows = NORMAL[:10] + [chat("Tell me more", "word " * 100)] * 10
    findings, _ = found(rows)
    (message,) = messages(findings, "stop")
    assert "10 of 20 train rows are over training.max_length 320" in message
    length = message.split("--training.max_length ")[1].split(",")[0]
    assert found(rows, training={"max_length": int(length)})[0] == []
    assert found(rows, data={"max_over_length": 1.0})[0] == []


def test_an_end_of_turn_token_without_loss_stops(found):
    tokenizer = FAMILIES["qwen2"][0]()
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert tokenizer.chat_template != before
    (message,) = messages(found(NORMAL, tokenizer=tokenizer)[0], "stop")
    assert "never learn to stop" in message


def test_a_beginning_twice_stops(found):
    tokenizer = copy.deepcopy(FAMILIES["mistral v3"][0]())
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token }}", "{{- bos_token + bos_token }}")
    assert any(
        "begins with <s> twice" in message for message in messages(found(NORMAL, tokenizer=tokenizer)[0], "stop")
    )


def test_a_saved_tokenizer_that_sends_other_tokens_stops(found, monkeypatch):
    """The template that is saved is read back: one that loses its generation prompt on the way is noticed."""
    tokenizer = FAMILIES["qwen2"][0]()
    save = type(tokenizer).save_pretrained

    def lossy(self, folder, **options):
        other = copy.deepcopy(self)
        other.chat_template = self.chat_template.replace("You are a helpful assistant.", "You are helpful.")
        return save(other, folder, **options)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", lossy)
    (message,) = messages(found(NORMAL, tokenizer=tokenizer)[0], "stop")
    assert "t.jsonl:1: the training row does not begin with the tokens that inference sends" in message


def test_validation_rows_that_are_in_training_are_left_out_and_counted(found):
    copies = [NORMAL[3], chat("what is 5 and 5", "IT IS 10 -- OF COURSE"), chat("Who wrote Faust?", "Goethe did.")]
    findings, validation = found(NORMAL, copies)
    (message,) = messages(findings, "drop")
    assert message.startswith("2 of 3 validation rows are in training")
    assert [row["where"].rpartition(":")[2] for row in validation.rows] == ["3"]
    assert any("nothing would be measured" in message for message in messages(found(NORMAL, NORMAL[:2])[0], "stop"))


def test_near_duplicates_are_named_with_both_lines(found):
    story = (
        "Once upon a time there lived a miller who had three sons and a mill and a donkey and a cat of great wit " * 3
    )
    train = [*NORMAL, chat("Tell a story", story)]
    findings, _ = found(train, [chat("Tell a story", story + "and a dog")], training={"max_length": 1024})
    (message,) = messages(findings, "warn")
    assert "v.jsonl:1 is nearly" in message
    assert "t.jsonl:41" in message


def test_a_shared_system_prompt_makes_no_near_duplicates(found):
    prompt = "You are the assistant of a shop and answer in the words of the handbook and never otherwise. " * 20
    train = [chat(f"Question {number} of its own?", f"Answer {number}.", system=prompt) for number in range(20)]
    validation = [chat("Where is the till?", "By the door.", system=prompt)]
    assert found(train, validation, training={"max_length": 4096})[0] == []


def test_all_tokens_trained_warns(found):
    tokenizer = FAMILIES["qwen2"][0]()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert any("every token" in message for message in messages(found(NORMAL, tokenizer=tokenizer)[0], "warn"))


def test_a_stop_is_a_user_error_and_a_warning_is_a_line(capsys):
    config = SimpleNamespace(findings=[])
    heed([Finding("warn", "mind this"), Finding("drop", "two rows")], config)
    assert [finding.message for finding in config.findings] == ["mind this", "two rows"]
    assert capsys.readouterr().out == "warning: mind this\nleft out: two rows\n"
    with pytest.raises(UserError, match="cannot be"):
        heed([Finding("stop", "this cannot be")], config)


@pytest.mark.parametrize(
    ("training", "warning"),
    [
        ({"learning_rate": 2e-5}, "--training.learning_rate 2e-4"),
        ({"warmup_steps": 50}, "--training.warmup_steps 0.03"),
        ({}, "few steps: 2"),
        ({"save_strategy": "no", "load_best_model_at_end": False}, "--training.save_strategy steps"),
    ],
)
def test_unwise_settings_are_warned_of_with_a_flag(config_file, capsys, training, warning):
    train_lora(load_config(config_file(training={"max_steps": 2, **training}), {}, "lora", dry_run=True))
    assert warning in capsys.readouterr().out


def test_the_flags_that_few_steps_prints_give_a_hundred(config_file, capsys):
    path = config_file(
        training={"max_steps": -1, "num_train_epochs": 8, "per_device_train_batch_size": 8, "packing": False}
    )
    train_lora(load_config(path, {}, "lora", dry_run=True))
    words = capsys.readouterr().out.split("This gives more: ")[1].split()
    flags = {words[0].removeprefix("--"): int(words[1]), words[2].removeprefix("--"): int(words[3])}
    train_lora(load_config(path, flags, "lora", dry_run=True))
    assert "few steps" not in capsys.readouterr().out


def test_ten_steps_on_five_rows_run_without_a_fight(config_file, tmp_path):
    data = {"train": str(write_jsonl(tmp_path / "five.jsonl", NORMAL[:5])), "validation": None}
    training = {"max_steps": 10, "eval_strategy": "no", "load_best_model_at_end": False}
    folder = train_lora(load_config(config_file(data=data, training=training), {}, "lora"))
    assert (folder / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def untrained_stop(tmp_path_factory):
    """The tiny base, untied, with an <|im_end|> that it never saw: a zero row in the embedding and in the head."""
    folder = tmp_path_factory.mktemp("untrained")
    model = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    row = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for weight in (model.lm_head.weight, model.model.embed_tokens.weight):
        weight.data[row] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_control_token_that_the_base_never_saw_is_warned_of(found, untrained_stop, config_file):
    tokenizer = FAMILIES["qwen2"][0]()
    config = load_config(config_file(), {}, "lora")
    rows = prepare(config.data, SFTConfig(**config.training), tokenizer, "train").rows
    healthy, broken = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (TINY / "base", untrained_stop)
    )
    assert check_model(healthy, rows, tokenizer) == []
    findings = messages(check_model(broken, rows, tokenizer), "warn")
    assert len(findings) == 2
    assert all("<|im_end|> (norm 0)" in text and "--lora.modules_to_save '[lm_head]'" in text for text in findings)


def test_the_mend_for_an_untrained_stop_token_trains_merges_and_makes_the_model_stop(
    untrained_stop, config_file, tmp_path
):
    rows = read_jsonl(TINY / "train.jsonl")[56:120]
    data = {
        "train": str(write_jsonl(tmp_path / "t.jsonl", rows)),
        "test": str(write_jsonl(tmp_path / "e.jsonl", rows[:8])),
    }
    training = {"max_steps": 60, "learning_rate": 5e-3, "eval_steps": 60, "save_steps": 60}
    model = {"name_or_path": str(untrained_stop)}
    folder = train_lora(
        load_config(
            config_file(model=model, data=data, training=training, lora={"modules_to_save": ["lm_head"]}), {}, "lora"
        )
    )
    scores = evaluate_adapter(folder, max_rows=8, max_new_tokens=150)
    merged = evaluate_adapter(folder, model=merge_adapter(folder), max_rows=8, max_new_tokens=150)["merged"]
    assert scores["base"]["stopped"] == 0
    assert scores["adapter"]["stopped"] > 0.5
    assert merged["stopped"] == scores["adapter"]["stopped"]
