"""Samples at each evaluation: the model's own greedy answers, and a run that is the same without them."""

from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, TINY, read_jsonl
from datasets import Dataset
from peft import PeftModel
from trained import adapter_of, same, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.utils.data import Encoder, load_tokenizer, read_chats
from recipes.utils.model import generate_answers
from recipes.utils.monitoring.samples import Samples, split_prompt

SHORT = {"max_steps": 6, "eval_steps": 3, "save_steps": 3}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_is_bit_for_bit_the_same_without_samples(config_file, tmp_path, method):
    """With dropout, which draws at random, and with the evaluations that samples come after."""
    lora = {"lora_dropout": 0.2}
    folders = []
    for samples in (0, 2):
        training = {**SHORT, "gradient_checkpointing": True, "output_dir": str(tmp_path / f"with-{samples}")}
        folders.append(train(config_file(lora=lora, data={"samples": samples}, training=training), method))
    without, with_samples = folders
    assert not (without / "samples.jsonl").exists()
    assert len(read_jsonl(with_samples / "samples.jsonl")) == 4
    assert same(adapter_of(without), adapter_of(with_samples))


def test_samples_are_what_the_adapter_of_that_step_answers(config_file, capsys):
    training = {**SHORT, "load_best_model_at_end": False, "learning_rate": 5e-3}
    folder = train(config_file(data={"samples": 3}, training=training))
    shown = capsys.readouterr().out
    samples = [sample for sample in read_jsonl(folder / "samples.jsonl") if sample["step"] == 6]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [read_chats(str(folder.parent / "validation.jsonl"))[index] for index in (0, 2, 5)]
    encoder = Encoder(tokenizer)
    prompts = [encoder.prompt_ids(chat.messages[:-1]) for chat in chats]
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    answers = generate_answers(PeftModel.from_pretrained(base, folder), encoder, prompts, 128)
    for sample, chat, prompt, answer in zip(samples, chats, prompts, answers, strict=True):
        assert sample["where"] == chat.where
        assert sample["prompt"] == tokenizer.decode(prompt)
        assert sample["expected"] == chat.messages[-1]["content"]
        assert (sample["answer"], sample["stopped"]) == (answer.text, answer.stopped)
        assert " ".join(answer.text.split())[:60] in shown


def test_an_answer_that_runs_away_is_marked(config_file, monkeypatch, capsys):
    monkeypatch.setattr("recipes.utils.monitoring.samples.MOST_TOKENS", 4)
    folder = train(config_file(model={"name_or_path": str(TINY / "base")}, data={"samples": 1}, training=SHORT))
    assert not any(sample["stopped"] for sample in read_jsonl(folder / "samples.jsonl"))
    assert capsys.readouterr().out.count("(did not stop)") == 2


def test_it_is_said_in_the_end_where_no_answer_ends_by_itself(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = load_tokenizer(BASE)
    args = SimpleNamespace(bf16=False, fp16=False)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    words = [tokenizer.encode(text) for text in ("hello", "good day")]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for expected, told in ((1, True), (200, False)):  # of the latter, 128 tokens say nothing
        labels = [[-100] * len(ids) + [stop] * expected for ids in words]
        rows = [{"input_ids": ids + [stop] * expected, "labels": its} for ids, its in zip(words, labels, strict=True)]
        samples = Samples(tmp_path, Dataset.from_list(rows), tokenizer, 2)
        samples.on_evaluate(args, state, None, model)
        assert not any(sample["stopped"] for sample in read_jsonl(tmp_path / "samples.jsonl"))
        capsys.readouterr()
        samples.on_train_end(args, state, None)
        warning = "warning: none of the 2 sampled answers ends by itself"
        assert (warning in capsys.readouterr().out) == told


def test_the_last_trained_answer_is_what_is_asked_for():
    row = {"input_ids": [1, 2, 3, 4, 5, 6, 7], "labels": [-100, 2, -100, -100, 5, 6, -100]}
    assert split_prompt(row) == ([1, 2, 3, 4], [5, 6])
