"""What is loaded and how it is computed here: each choice with its reason, each refusal in one line with the mend."""

import dataclasses
import shutil

import pytest
import torch
from conftest import BASE, TINY
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, MistralConfig

from recipes.utils.console import UserError
from recipes.utils.model import ModelOptions, check_base, check_tokens, choose_attention, find_base, load_base
from recipes.utils.model import base as module


def machine(monkeypatch, gpus, capability=(9, 0), flash=False):
    """A machine of another kind: only the questions that the choices ask torch are answered differently."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(module, "is_flash_attn_2_available", lambda: flash)


@pytest.mark.parametrize(
    ("gpus", "capability", "flash", "dtype", "chosen", "reason"),
    [
        (0, (0, 0), False, "bfloat16", "sdpa", "there is no GPU"),
        (1, (9, 0), False, "bfloat16", "varlen", "flash-attn is not installed"),
        (1, (7, 5), True, "float16", "sdpa", "older than Ampere"),
        (1, (9, 0), True, "float32", "sdpa", "no float32"),
        (1, (8, 0), True, "bfloat16", "flash_attention_2", "fastest"),
    ],
)
def test_attention_is_chosen_and_told_with_its_reason(
    monkeypatch, capsys, gpus, capability, flash, dtype, chosen, reason
):
    machine(monkeypatch, gpus, capability, flash)
    assert choose_attention(BASE, ModelOptions("x", dtype=dtype), use_cpu=gpus == 0) == chosen
    shown = capsys.readouterr().out
    assert shown.startswith(f"attention: {chosen} (")
    assert reason in shown
    if chosen == "sdpa":
        with pytest.raises(UserError, match="cannot be had"):
            choose_attention(
                BASE,
                ModelOptions("x", dtype=dtype, attn_implementation="flash_attention_2"),
                use_cpu=gpus == 0,
            )


def test_on_the_cpu_of_a_machine_with_a_gpu_the_reason_is_the_run(monkeypatch, capsys):
    machine(monkeypatch, gpus=1, flash=True)
    assert choose_attention(BASE, ModelOptions("x"), use_cpu=True) == "sdpa"
    assert "the run is on the CPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "gpus", "flash", "chosen"),
    [("gemma2", 0, False, "eager"), ("gemma2", 1, False, "eager"), ("gemma2", 1, True, "flash_attention_2"),
     ("falcon", 1, False, "sdpa"), ("gemma3_text", 1, False, "varlen"), ("gpt_neo", 0, False, "eager")],
)  # fmt: skip
def test_auto_takes_what_the_architecture_has(model_type, gpus, flash, chosen, monkeypatch, tmp_path):
    """Gemma 2's softcapping is nothing that sdpa or torch's own kernel computes."""
    machine(monkeypatch, gpus, flash=flash)
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    assert choose_attention(tmp_path, ModelOptions("x"), use_cpu=gpus == 0) == chosen
    if model_type == "gemma2":
        for name in ("sdpa", "varlen"):
            with pytest.raises(UserError, match=f"gemma2 has no {name}; auto"):
                choose_attention(tmp_path, ModelOptions("x", attn_implementation=name), use_cpu=gpus == 0)


def test_attention_that_cannot_be_had_is_refused(monkeypatch):
    for name, message in (("flash2", "unknown 'flash2'"), ("flex_attention", "cannot train on a CPU")):
        with pytest.raises(UserError, match=message):
            choose_attention(BASE, ModelOptions("x", attn_implementation=name), use_cpu=True)
    assert choose_attention(BASE, ModelOptions("x", attn_implementation="varlen"), use_cpu=True) == "varlen"
    machine(monkeypatch, gpus=1, capability=(7, 5))
    with pytest.raises(UserError, match="varlen cannot be had here: Some GPU is older than Ampere"):
        choose_attention(BASE, ModelOptions("x", attn_implementation="varlen"), use_cpu=False)


def test_a_folder_of_the_hubs_cache_is_the_snapshot_in_it(tmp_path):
    cached, commit = tmp_path / "models--some--name", 40 * "a"
    shutil.copytree(BASE, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    for given in (cached, cached / "snapshots" / commit):
        assert find_base(ModelOptions(str(given))) == cached / "snapshots" / commit
    (cached / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"in which main is not there, or not whole; give some/name, to have it"):
        find_base(ModelOptions(str(cached)))
    assert find_base(ModelOptions(str(cached)), weights=False)
    with pytest.raises(UserError, match="in which v2 is not there"):
        find_base(ModelOptions(str(cached), revision="v2"))
    for name, model in (("models--some--name", "some/name"), ("models--a--b--c", "a/b/c")):
        with pytest.raises(UserError, match=f"{name}: by its name the hub's cache of {model}, in which main is not"):
            find_base(ModelOptions(name))


def test_qwen2_in_float16_is_refused():
    with pytest.raises(UserError, match="NaN in float16"):
        check_base(BASE, ModelOptions(str(BASE), dtype="float16"), False)


def test_7b_without_a_gpu_is_said_in_one_line_and_can_be_asked_for(tmp_path, monkeypatch):
    """A folder with Mistral-7B's dimensions and no weights."""
    MistralConfig(vocab_size=32768, sliding_window=None, dtype="bfloat16").save_pretrained(tmp_path)
    options = ModelOptions(str(tmp_path))
    with pytest.raises(UserError, match=r"7.2 billion parameters and this machine has no GPU") as error:
        check_base(tmp_path, options, use_cpu_asked=False)
    assert len(str(error.value).splitlines()) == 1
    check_base(tmp_path, options, use_cpu_asked=True)
    machine(monkeypatch, gpus=1)
    check_base(tmp_path, options, use_cpu_asked=False)


def test_remote_code_is_off_and_said_in_red_when_it_is_on(capsys):
    assert ModelOptions().trust_remote_code is False
    options = ModelOptions(str(BASE), trust_remote_code=True)
    check_base(BASE, options, use_cpu_asked=True)
    assert "trust_remote_code: code that comes with" in capsys.readouterr().out


def test_a_gpu_that_others_fill_is_one_line(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(UserError, match="nvidia-smi shows what else runs there"):
        load_base(BASE, ModelOptions(str(BASE)), "sdpa", use_cpu=False)


def test_pickled_weights_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled ones are not loaded"):
        load_base(tmp_path, ModelOptions(str(tmp_path), dtype="float32"), "sdpa")


def test_a_folder_is_taken_as_it_is_given_and_one_that_holds_no_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(TINY)
    assert str(find_base(ModelOptions("base"))) == "base"
    with pytest.raises(UserError, match=r"no config.json"):
        find_base(ModelOptions(str(tmp_path)))
    with pytest.raises(UserError, match="there is no such folder; paths are relative to where the command runs"):
        find_base(ModelOptions("/nowhere/at/all"))


def test_options_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelOptions("x").revision = "main"


def test_a_loaded_base_can_be_saved_and_keeps_its_nf4_weights_as_they_are(tmp_path):
    """Also with sampling settings that do not sample, on which the very last save would fail."""
    base = shutil.copytree(BASE, tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "top_k": 5}')
    options = ModelOptions(str(base), dtype="float32")
    load_base(base, options, "sdpa").save_pretrained(tmp_path / "saved")
    four_bit = load_base(base, options, "sdpa", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    flags = [m.support_avx512bf16_for_cpu for m in four_bit.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert flags
    assert not any(flags)


def test_control_tokens_that_a_base_never_learnt_are_named(tmp_path):
    model = load_base(BASE, ModelOptions(str(BASE), dtype="float32"), "sdpa").requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    rows = Dataset.from_list([{"input_ids": [start, 5, end], "labels": [-100, 5, end]}])
    assert check_tokens(model, rows, tokenizer) == []
    model.get_input_embeddings().weight.data[end] *= 1e-3
    (finding,) = check_tokens(model, rows, tokenizer)
    assert finding.level == "warn"
    assert "<|im_end|>" in finding.message
    assert "<|im_start|>" not in finding.message
    assert "--lora.modules_to_save '[lm_head]'" in finding.message


def test_a_control_token_among_those_that_nobody_has_used_is_named_whatever_its_norm():
    """Never trained, such rows keep the direction that the vocabulary's common drift has given them, at its norm."""
    model = load_base(BASE, ModelOptions(str(BASE), dtype="float32"), "sdpa").requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    rows = Dataset.from_list([{"input_ids": [start, 5, end], "labels": [-100, 5, end]}])
    weight = model.get_input_embeddings().weight.data
    torch.manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(weight.shape[1]), dim=0)
    middle = weight.norm(dim=1).median()
    unused = torch.arange(280, 320)  # no token has these ids
    weight[unused] = middle * torch.nn.functional.normalize(common + 0.005 * torch.randn(40, weight.shape[1]), dim=1)
    assert check_tokens(model, rows, tokenizer) == []
    weight[end] = middle * common
    (finding,) = check_tokens(model, rows, tokenizer)
    assert "<|im_end|> (as 40 others, cosine over 0.95): the embedding row looks untrained" in finding.message
    assert "<|im_start|>" not in finding.message
