"""An adapter belongs to a base, and its settings to a model: what does not fit is told before weights are read."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import BASE as SMALL
from conftest import TINY, copy_run, run_recipe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen2Config

from recipes.chat import chat as talk
from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
from recipes.utils.console import UserError
from recipes.utils.evaluation import load_adapter, load_adapter_tokenizer, read_adapter
from recipes.utils.model import (
    ModelOptions,
    check_base,
    check_fit,
    check_lora,
    context_of,
    find_base,
    load_base,
    load_onto,
    on_hub,
    stored_shapes,
)

BASE = TINY / "base"
OPTIONS = ModelOptions(str(BASE), dtype="float32")
ROWS = str(TINY / "validation.jsonl")


def adapter_of_another_tool(folder, resize=None, keys=None, base=BASE, config=None, **options):
    """An adapter that does something, as PEFT saves it; `keys` renames what is in its file."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter) * (1 if "lora_B" in name else 0.2)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": str(base), **(config or {})}
    path.write_text(json.dumps(config))
    if keys:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({keys(key): tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def without_layer(number):
    """Renames the keys of a layer, as another version of transformers does."""
    return lambda key: key.replace(f"model.model.layers.{number}.", f"model.language_model.layers.{number}.")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, r"'v_porj' matches nothing .* has v_proj, "),
        ({"target_modules": "q_proj,v_proj"}, r"'q_proj,v_proj' .*; several are written \[q_proj, v_proj\]$"),
        ({"target_modules": "q_proj"}, r"'q_proj' matches nothing.*written \[q_proj\]$"),
        ({"target_modules": "all"}, r"'all' matches nothing .*; all-linear, without brackets"),
        ({"target_modules": ["all-linear"]}, r"'all-linear' matches nothing .*; all-linear, without brackets"),
        ({"target_modules": r".*layers\.9\..*q_proj"}, r"9.*q_proj' matches nothing"),
        ({"target_modules": "*q_proj"}, r"'\*q_proj' matches nothing"),
        ({"target_modules": ["query_key_value"]}, r"which has .*k_proj"),
        ({"modules_to_save": ["lm_heed"]}, r"'lm_heed' .* has lm_head, "),
        ({"modules_to_save": ["score"]}, "'score' matches nothing"),
        ({"exclude_modules": ["down_porj"]}, r"'down_porj' .* has down_proj, "),
        ({"exclude_modules": "down"}, "'down' matches nothing"),
        ({"layers_to_transform": [0, 99]}, r"'99' matches nothing .* has 0, 1, 2, 3, 4$"),
        ({"layers_to_transform": 5}, "'5' matches nothing"),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, "'blocks' matches nothing .* has layers$"),
        ({"rank_pattern": {"q_porj": 4}}, r"'q_porj' .* has q_proj, "),
        (
            {"alpha_pattern": {"layers.7.self_attn.q_proj": 4}},
            "'layers.7.self_attn.q_proj' match",
        ),
        ({"target_parameters": ["q_proj.wieght"]}, "'q_proj.wieght' matches nothing"),
    ],
    ids=str,
)
def test_each_name_has_to_match_and_the_models_own_are_named_nearest_first(lora, message):
    with pytest.raises(UserError, match=rf"lora\.\w+: .*{message}"):
        check_lora(BASE, OPTIONS, lora)


@pytest.mark.parametrize(
    "lora",
    [
        {}, {"target_modules": None}, {"target_modules": "all-linear", "exclude_modules": ["down_proj", "lm_head"]},
        {"target_modules": ["q_proj", "self_attn.v_proj", "model.layers.0.mlp.up_proj"]},
        {"target_modules": r".*layers\.(0|1)\..*(q|v)_proj", "layers_to_transform": [0, 4]},
        {"modules_to_save": ["lm_head", "norm", "embed_tokens"], "layers_to_transform": 2, "layers_pattern": "layers"},
        {"rank_pattern": {"q_proj": 4, r"layers\.[01]\.mlp\.up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 4}},
        {"target_parameters": ["self_attn.q_proj.weight"]},
    ],
    ids=str,
)  # fmt: skip
def test_names_that_match_are_taken(lora):
    check_lora(BASE, OPTIONS, lora)


def test_a_run_with_such_a_name_ends_before_its_base_is_read(config_file, capsys, tmp_path):
    bare = shutil.copytree(BASE, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    path = config_file(model={"name_or_path": str(bare)}, lora={"target_modules": ["q_proj", "v_porj"]})
    assert run_recipe("sft_lora", path) == 2
    message = "error: lora.target_modules: 'v_porj' matches nothing in this model, which has v_proj, "
    assert capsys.readouterr().err.startswith(message)


def small(folder, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def test_an_adapter_that_fits_in_part_is_refused_everywhere_with_the_first_key_that_does_not(
    config_file, tmp_path, capsys
):
    folder = adapter_of_another_tool(tmp_path / "half", keys=without_layer(3))
    key = r"base_model\.model\.language_model\.layers\.3\.self_attn\.q_proj\.lora_A\.weight"
    message = rf"16 of 20 keys of the adapter fit .*, which takes 20; the first that does not, {key}, has no place"
    for verify in (True, False):
        with pytest.raises(UserError, match=message):
            merge_adapter(folder, output=tmp_path / "merged", data=ROWS, verify=verify)
        assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match=message):
        talk(folder, lines=["hello"])
    capsys.readouterr()
    assert run_recipe("sft_lora", config_file(model={"name_or_path": str(BASE), "adapter": str(folder)})) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_adapter_of_another_base_is_refused_by_what_is_wrong(tmp_path):
    shape = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2}  # fmt: skip
    whole = adapter_of_another_tool(tmp_path / "whole")
    check_fit(whole, BASE, OPTIONS)
    for name, config, message in (
        ("deeper", Qwen2Config(num_hidden_layers=6, **shape), r"20 of 20 .* takes 24; .*layers.5.*is not in its file"),
        ("shallower", Qwen2Config(num_hidden_layers=4, **shape), r"16 of 20 .* takes 16; .*layers.4.*has no place"),
        ("narrower", Qwen2Config(num_hidden_layers=5, **(shape | {"hidden_size": 64})),
         r"0 of 20 keys .*is \[4, 128\], and \[4, 64\] there: is it of another base"),
        ("gpt2", GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4), "cannot be put on|0 of 20 keys"),
    ):  # fmt: skip
        base = small(tmp_path / name, config)
        with pytest.raises(UserError, match=message):
            check_fit(whole, base, ModelOptions(str(base)))
        for verify in (False, True):
            with pytest.raises(UserError):
                merge_adapter(whole, output=tmp_path / "no", data=ROWS, verify=verify, base_model=str(base))
    tensors = load_file(whole / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"]
    save_file(tensors, whole / "adapter_model.safetensors")
    for verify in (False, True):
        with pytest.raises(UserError, match=r"19 of 19 keys .* takes 20; .*v_proj.lora_B.weight, is not in its file"):
            merge_adapter(whole, output=tmp_path / "no", data=ROWS, verify=verify)


KINDS = {
    "plain": {}, "all linear": {"target_modules": "all-linear"}, "dora": {"use_dora": True}, "biases": {"bias": "all"},
    "lora biases": {"bias": "lora_only"}, "head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]}, "norms": {"modules_to_save": ["norm"]},
    "lora on the embedding": {"target_modules": ["embed_tokens", "q_proj"]}, "rslora": {"use_rslora": True},
    "layers": {"layers_to_transform": [0, 2]}, "regex": {"target_modules": r".*layers\.(0|1)\..*(q|v)_proj"},
    "patterns": {"rank_pattern": {"q_proj": 2}},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
    "single tokens": {"trainable_token_indices": {"embed_tokens": [257, 258]}},
    "parameters": {"target_parameters": ["mlp.gate_proj.weight"]}, "pissa": {"init_lora_weights": "pissa"},
}  # fmt: skip


@pytest.mark.parametrize("options", KINDS.values(), ids=list(KINDS))
def test_what_peft_saves_of_this_base_fits_it(tmp_path, options):
    check_fit(adapter_of_another_tool(tmp_path, **options), BASE, OPTIONS)


def test_an_adapter_that_was_cut_in_a_copy_is_told(tmp_path, config_file, capsys):
    path = adapter_of_another_tool(tmp_path / "cut") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"adapter_model.safetensors: is not whole .*; copy it again"):
        talk(path.parent, lines=["hello"])
    assert run_recipe("sft_lora", config_file(model={"name_or_path": str(BASE), "adapter": str(path.parent)})) == 2
    assert "is not whole" in capsys.readouterr().err


def head_in_the_old_form(key):
    return key.replace("lm_head.weight", "lm_head.modules_to_save.weight")


def as_in_a_raw_state_dict(key):
    key = re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", key)
    return key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


@pytest.mark.parametrize("keys", [head_in_the_old_form, as_in_a_raw_state_dict])
def test_keys_of_other_versions_of_peft_load_and_merge_to_the_same(tmp_path, keys):
    today = adapter_of_another_tool(tmp_path / "today", modules_to_save=["lm_head"])
    other = adapter_of_another_tool(tmp_path / "other", modules_to_save=["lm_head"], keys=keys)
    names = [set(load_file(each / "adapter_model.safetensors")) for each in (today, other)]
    assert names[0] != names[1]
    merged = [load_file(merge_adapter(each, verify=False) / "model.safetensors") for each in (today, other)]
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())
    live = [load_adapter(each, read_adapter(each)).state_dict() for each in (today, other)]
    assert all(torch.equal(tensor, live[1][name]) for name, tensor in live[0].items())


@pytest.mark.parametrize("rows", [328, 264], ids=["larger", "smaller"])
def test_a_resized_vocabulary_is_merged_with_the_tokenizer_that_belongs_to_it(tmp_path, rows, capsys):
    folder = adapter_of_another_tool(tmp_path / "resized", resize=rows, modules_to_save=["embed_tokens", "lm_head"])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|tool|>"]})
    tokenizer.save_pretrained(folder)
    merged = merge_adapter(folder, data=ROWS, rows=2)
    shown = capsys.readouterr().out
    assert f"vocabulary: {rows} rows, as the adapter has it, in the place of the base's 320" in shown
    assert "tokenizer: the adapter's own, of 264 tokens; its base's has 263" in shown
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == rows
    live = load_adapter(folder, read_adapter(folder))
    ids = torch.arange(60, 90)[None]
    with torch.no_grad():
        found, expected = (each.eval()(input_ids=ids).logits for each in (model, live))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert "<|tool|>" in AutoTokenizer.from_pretrained(merged).get_vocab()


def test_training_goes_on_from_an_adapter_with_a_resized_vocabulary(config_file, tmp_path):
    folder = adapter_of_another_tool(tmp_path / "resized", resize=328, modules_to_save=["embed_tokens", "lm_head"])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<|tool|>"]})
    tokenizer.save_pretrained(folder)
    short = {"max_steps": 1, "eval_steps": 1, "save_steps": 1}
    assert (
        run_recipe("sft_lora", config_file(model={"name_or_path": str(BASE), "adapter": str(folder)}, training=short))
        == 0
    )
    assert stored_shapes(tmp_path / "run") == stored_shapes(folder)
    assert "<|tool|>" in AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab()
    evaluate_adapter(tmp_path / "run", max_rows=1, max_new_tokens=2)


def test_an_adapters_own_template_and_tokenizer_go_before_its_bases(tmp_path, capsys):
    folder = adapter_of_another_tool(tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    own = (
        "{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT: {% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}\n{% else %}{{ m.role|upper }}: {{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    record = read_adapter(folder)
    assert "ASSISTANT" not in load_adapter_tokenizer(folder, record).chat_template
    assert "its base has another one" not in capsys.readouterr().out
    (folder / "chat_template.jinja").write_text(own)  # alone
    assert load_adapter_tokenizer(folder, record).chat_template == own
    tokenizer.chat_template = own
    tokenizer.save_pretrained(folder)
    merged = merge_adapter(folder, data=ROWS, rows=2)
    assert "chat template: the adapter's own; its base has another one" in capsys.readouterr().out
    asked = [{"role": "user", "content": "Why?"}]
    text = AutoTokenizer.from_pretrained(merged).apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == "USER: Why?\nASSISTANT: "
    (folder / "chat_template.jinja").unlink()  # a tokenizer without one has its base's
    assert "im_start" in load_adapter_tokenizer(folder, record).chat_template


def test_a_base_that_lies_elsewhere_or_is_not_named_is_given_by_a_flag(lora_run, tmp_path, capsys):
    moved = shutil.copytree(BASE, tmp_path / "moved")
    for name in (None, "", "/data/models/Qwen2-7B-Instruct"):
        folder = adapter_of_another_tool(tmp_path / f"of-{len(str(name))}", config={"base_model_name_or_path": name})
        assert run_recipe("merge_adapter", folder, "--no-verify") == 2
        assert "--base-model PATH_OR_NAME" in capsys.readouterr().err
        merged = tmp_path / f"merged-{len(str(name))}"
        words = ["--base-model", moved, "--output", merged, "--data", ROWS, "--rows", 2]
        assert run_recipe("merge_adapter", folder, *words) == 0
        assert (merged / "config.json").is_file()
    assert len(talk(folder, lines=["hello"], max_new_tokens=3, base_model=str(moved))) in (1, 2)
    run, moved = copy_run(lora_run, tmp_path), shutil.copytree(SMALL, tmp_path / "small")
    here = evaluate_adapter(run, max_rows=1, max_new_tokens=2)
    record = json.loads((run / "run.json").read_text())
    record["model"]["name_or_path"] = "/data/models/Qwen2-7B-Instruct"
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="If it lies elsewhere: --base-model PATH_OR_NAME"):
        evaluate_adapter(run, max_rows=1)
    there = evaluate_adapter(run, max_rows=1, max_new_tokens=2, base_model=str(moved))
    assert (there["base"], there["adapter"]) == (here["base"], here["adapter"])
    with pytest.raises(UserError, match="is a whole model, which has no base"):
        talk(moved, base_model=str(moved))


@pytest.mark.parametrize("kind", ["the model's folder", "a snapshot", "of another machine"])
def test_the_names_of_the_hubs_cache_are_names_of_models(tmp_path, monkeypatch, kind):
    commit, model = "ab" * 20, tmp_path / "models--someone--tiny-it"
    shutil.copytree(BASE, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    name = {"the model's folder": model, "a snapshot": model / "snapshots" / commit}.get(kind)
    if name is None:  # where this machine has its cache otherwise
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        name = f"/home/else/.cache/huggingface/hub/models--someone--tiny-it/snapshots/{commit}"
    base = find_base(ModelOptions(str(name)))
    assert base.resolve() == (model / "snapshots" / commit).resolve()
    assert on_hub(base) == ("someone/tiny-it", commit)


@pytest.fixture(scope="module")
def in_4_bit(tmp_path_factory):
    from transformers import BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("hub") / "tiny-bnb-4bit"
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(BASE, quantization_config=quantization).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def test_a_base_that_is_in_4_bit_already_is_for_qlora_which_says_what_a_merge_will_want(
    in_4_bit, config_file, tmp_path, capsys
):
    short = {"max_steps": 1, "eval_steps": 1, "save_steps": 1}
    path = config_file(model={"name_or_path": str(in_4_bit)}, training=short)
    assert run_recipe("sft_lora", path) == 2
    found = capsys.readouterr().err
    assert "in 4 bit already, and LoRA wants them in 16 or 32 bit: recipes/sft_qlora.py takes it" in found
    assert run_recipe("sft_qlora", path) == 0
    whole = os.path.relpath(in_4_bit).removesuffix("-bnb-4bit")
    assert f"python recipes/merge_adapter.py RUN --base-model {whole}" in capsys.readouterr().out
    assert run_recipe("merge_adapter", tmp_path / "run", "--rows", 2) == 2
    assert "--base-model PATH_OR_NAME" in capsys.readouterr().err
    assert run_recipe("merge_adapter", tmp_path / "run", "--rows", 2, "--base-model", BASE) == 0
    assert (tmp_path / "run" / "merged" / "config.json").is_file()


def test_weights_that_are_quantised_otherwise_are_refused(tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for settings, kind in (({"quant_method": "gptq", "bits": 4}, "gptq"),
                           ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes")):  # fmt: skip
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        for method in ("lora", "qlora"):
            with pytest.raises(UserError, match=rf"its weights are quantised already \({kind}\)"):
                check_base(base, ModelOptions(str(base)), True, method)


def test_a_length_that_a_model_has_no_positions_for_is_refused_and_one_over_its_context_known(tmp_path):
    small(tmp_path, GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=256))
    check_base(tmp_path, ModelOptions(str(tmp_path)), True, "lora", 256)
    with pytest.raises(UserError, match="--training.max_length 256$"):
        check_base(tmp_path, ModelOptions(str(tmp_path)), True, "lora", 257)
    config = AutoConfig.for_model("qwen2", max_position_embeddings=32768)
    assert context_of(config) == 32768
    check_base(BASE, OPTIONS, True, "lora", 10**6)  # which a rotary embedding can count to
    many = Qwen2Config(
        vocab_size=256,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
    )  # as many tokens: Mistral-7B-v0.3 has 32,768
    small(tmp_path / "as-many", many)
    check_base(tmp_path / "as-many", ModelOptions(str(tmp_path / "as-many")), True, "lora", 257)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    assert context_of(AutoConfig.for_model("qwen2", max_position_embeddings=32768, rope_parameters=yarn)) == 131072


def test_a_loaded_adapter_is_the_one_that_was_saved(tmp_path):
    folder = adapter_of_another_tool(tmp_path, target_modules="all-linear")
    live = load_onto(load_base(BASE, OPTIONS, "sdpa"), folder)
    assert isinstance(live, PeftModel)
    expected = load_file(folder / "adapter_model.safetensors")
    found = {name.replace(".default", ""): tensor for name, tensor in live.state_dict().items() if "lora_" in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
