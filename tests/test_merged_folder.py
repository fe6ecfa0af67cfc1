"""What a merged folder holds: a model that every runtime loads, that stops, and that tells no secret."""

import json
import shutil
from pathlib import Path

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
from recipes.sft_lora import train_lora
from recipes.sft_qlora import train_qlora
from recipes.utils import export
from recipes.utils.adapter_folder import find_base, load_adapter, read_adapter
from recipes.utils.chat_template import TEMPLATES
from recipes.utils.config import load_config
from recipes.utils.console import UserError, run
from recipes.utils.dataset import read_chats
from recipes.utils.encoding import prompt_ids
from recipes.utils.evaluation import generate_answers
from recipes.utils.export import plain_template
from recipes.utils.model_card import write_card
from recipes.utils.ollama import go_template
from recipes.utils.scale import set_scale

import pytest
import torch
import yaml
from conftest import ROOT, TINY, read_jsonl, write_jsonl
from mistral_tokenizers import mistral_v1_legacy_tokenizer, mistral_v1_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

SECRET = "hf_thisIsASecretToken"
QUESTIONS = ["Say hello.", "What is 7 times 8?"]


def small_run(folder: Path, method: str, **training) -> Path:
    """A run of twelve steps on the tiny base, with secrets and paths where a user's run has them."""
    rows = read_jsonl(TINY / "train.jsonl")
    config = {
        "model": {"name_or_path": str(TINY / "base"), "dtype": "float32"},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", rows[:64])),
            "validation": str(write_jsonl(folder / "validation.jsonl", rows[64:72])),
        },
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "training": {
            "output_dir": str(folder / "run"), "max_steps": 12, "learning_rate": 5e-3, "max_length": 320,
            "packing": True, "per_device_train_batch_size": 4, "gradient_checkpointing": False,
            "eval_strategy": "no", "save_strategy": "no", **training,
        },
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    train = {"lora": train_lora, "qlora": train_qlora}[method]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", SECRET)
        return train(load_config(folder / "small.yaml", {}, method))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("lora"), "lora")


@pytest.fixture(scope="module")
def merged(lora_run) -> Path:
    evaluate_adapter(lora_run, max_rows=1, max_new_tokens=4)
    return merge_adapter(lora_run, ollama="./mine.gguf")


@pytest.fixture(scope="module")
def qlora_run(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("qlora"), "qlora")


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([list(range(60, 160))])).logits[0].float()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def texts_in(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors")


def test_answers_of_the_merged_folder_equal_the_adapters(lora_run, merged):
    live, tokenizer = load_adapter(lora_run, read_adapter(lora_run)), AutoTokenizer.from_pretrained(lora_run)
    plain, own = load(merged), AutoTokenizer.from_pretrained(merged)
    for row in read_chats(str(TINY / "validation.jsonl"))[:4]:
        prompt = prompt_ids(row.messages[:-1], tokenizer)
        text = own.apply_chat_template(row.messages[:-1], add_generation_prompt=True, tokenize=False)
        assert own(text, add_special_tokens=False).input_ids == prompt
        ids = torch.tensor([prompt])
        found = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)[0, len(prompt) :].tolist()
        answer = generate_answers(live, tokenizer, [prompt], 40)[0]
        assert len(found) == answer.tokens
        assert own.decode(found, skip_special_tokens=True) == answer.text


def test_the_folder_is_complete_and_its_weights_are_as_they_were_named(merged):
    assert {path.name for path in merged.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "merge.json", "Modelfile",
    }  # fmt: skip
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == 10000.0
    assert (merged / "tokenizer.json").read_bytes() == (TINY / "base" / "tokenizer.json").read_bytes()
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "Qwen2Tokenizer"
    assert tokenizer["chat_template"] == (merged / "chat_template.jinja").read_text()
    assert "generation %}" not in tokenizer["chat_template"]


def test_neither_a_local_path_nor_a_secret_is_told(lora_run, merged):
    text = texts_in(merged)
    assert SECRET not in text
    assert str(lora_run.parent) not in text
    assert str(ROOT) not in text
    assert "/tmp" not in text
    card = (merged / "README.md").read_text()
    record = json.loads((lora_run / "run.json").read_text())
    for fact in (*record["data_sha256"].values(), "| learning_rate | 0.005 |", "| r | 8 |", "| loss |", "KL "):
        assert fact in card
    assert "base_model:" not in card, "a folder is no name on the hub"


def test_the_cards_base_is_the_hubs_name_and_revision(lora_run, merged, tmp_path):
    record = json.loads((lora_run / "run.json").read_text())
    record["model"] |= {"name_or_path": "Qwen/Qwen2-7B", "revision": "main"}
    snapshot = tmp_path / ("0123456789" * 4)
    export_to = tmp_path / "out"
    export_to.mkdir()
    write_card(export_to, record, snapshot, lora_run, {"base": "original", "scale": 1.0, "dtype": "bfloat16"}, None)
    card = (export_to / "README.md").read_text()
    assert "base_model: Qwen/Qwen2-7B\n" in card
    assert f"| base revision | {snapshot.name} |" in card


def test_the_card_of_a_scaled_merge_has_the_scores_of_that_scale(lora_run, tmp_path):
    evaluate_adapter(lora_run, max_rows=1, max_new_tokens=4, scales=[0.0, 0.5, 1.0])
    scores = json.loads((lora_run / "evaluation" / "scales.json").read_text())
    card = (merge_adapter(lora_run, tmp_path / "half", scale=0.5, verify=False) / "README.md").read_text()
    assert "| score | base | adapter at scale 0.5 |" in card
    assert f"| loss | {scores['0']['loss']:.4g} | {scores['0.5']['loss']:.4g} |" in card
    card = (merge_adapter(lora_run, tmp_path / "other", scale=0.3, verify=False) / "README.md").read_text()
    assert f"{scores['1']['loss']:.4g}" not in card


def test_the_card_names_each_data_file_also_where_two_have_one_name(lora_run, tmp_path):
    record = json.loads((lora_run / "run.json").read_text())
    record["data_sha256"] = {"a/chats.jsonl": "1" * 64, "b/chats.jsonl": "2" * 64}
    how = {"base": "original", "scale": 1.0, "dtype": "bfloat16"}
    write_card(tmp_path, record, TINY / "base", lora_run, how, None)
    card = (tmp_path / "README.md").read_text()
    assert "1" * 64 in card
    assert "2" * 64 in card


def test_a_hub_snapshot_in_the_cache_is_found_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, repo = "0123456789" * 4, tmp_path / "models--someone--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(TINY / "base", repo / "snapshots" / commit)
    record = {"model": {"name_or_path": "someone/small", "revision": None}}
    assert find_base(record).name == commit
    (repo / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(UserError, match="someone/small: its weights are not all in the cache"):
        find_base(record)


def test_generation_settings_are_valid_and_hold_every_stop_id(tmp_path, merged):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [258, 256]
    assert tokenizer.convert_ids_to_tokens([258, 256]) == ["<|im_end|>", "<|endoftext|>"]
    base, output = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    output.mkdir()
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 20, "eos_token_id": [256, 7]}))  # fmt: skip
    export.write_generation_config(base, output, [258, 256])
    settings = GenerationConfig.from_pretrained(output)
    assert settings.eos_token_id == [258, 256, 7]
    settings.save_pretrained(tmp_path / "again")


CHATS = [
    [{"role": "user", "content": " a "}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
]  # fmt: skip


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_a_template_without_its_loss_marks_renders_the_same_text(path):
    template = path.read_text()
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    plain = plain_template(template)
    assert "generation %}" in template
    assert "generation %}" not in plain
    answered = [*CHATS, *([*chat, {"role": "assistant", "content": "d "}] for chat in CHATS)]
    for messages in answered:
        prompt = messages[-1]["role"] == "user"
        rendered = [
            render_jinja_template(conversations=[messages], chat_template=text, add_generation_prompt=prompt, **tokens)[
                0
            ]
            for text in (template, plain)
        ]
        assert rendered[0] == rendered[1]


@pytest.mark.parametrize("legacy", [False, True], ids=["as published", "mended"])
def test_mistrals_tokenizer_is_written_under_a_name_that_all_know_and_with_the_trained_ids(tmp_path, legacy, capsys):
    trained = AutoTokenizer.from_pretrained(saved(mistral_v1_tokenizer(), tmp_path / "trained"))
    trained.chat_template = (TEMPLATES / "mistral_v1.jinja").read_text()
    base = saved(mistral_v1_legacy_tokenizer() if legacy else mistral_v1_tokenizer(), tmp_path / "base")
    (tmp_path / "out").mkdir()
    export.write_tokenizer(base, tmp_path / "out", trained)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert ("trained one is written" in capsys.readouterr().out) == legacy
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<s> [INST]  two  blanks [/INST] Yes.</s>\n [INST]"
    assert found(text).input_ids == trained(text).input_ids


def saved(tokenizer, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scale", [0.25, 0.75, 1.5])
def test_merged_at_a_scale_equals_the_live_adapter_at_that_scale(lora_run, tmp_path, scale):
    live = load_adapter(lora_run, read_adapter(lora_run))
    full = logits_of(live)
    set_scale(live, scale)
    output = merge_adapter(lora_run, tmp_path / "out", scale=scale, rows=2)
    assert (logits_of(load(output)) - logits_of(live)).abs().max() < 1e-4
    assert (logits_of(load(output)) - full).abs().max() > 1e-2
    assert json.loads((output / "merge.json").read_text())["mean_kl"] < 1e-9


def test_scales_are_scored_without_training_again(lora_run, tmp_path):
    old = write_jsonl(tmp_path / "old.jsonl", read_jsonl(TINY / "test.jsonl")[:4])
    metrics = evaluate_adapter(lora_run, max_rows=1, max_new_tokens=4, scales=[0.0, 0.5, 1.0], forgetting=str(old))
    plain = evaluate_adapter(lora_run, max_rows=1, max_new_tokens=4)
    assert list(metrics) == ["0", "0.5", "1"]
    assert metrics["0"]["loss"] == pytest.approx(plain["base"]["loss"], rel=1e-6)
    assert metrics["1"]["loss"] == plain["adapter"]["loss"]
    assert metrics["1"]["loss"] < metrics["0.5"]["loss"] < metrics["0"]["loss"]
    assert metrics["0"]["forgetting_loss"] != metrics["1"]["forgetting_loss"]
    assert json.loads((lora_run / "evaluation" / "scales.json").read_text()) == metrics


def test_flags_that_would_be_ignored_are_refused(lora_run, merged):
    with pytest.raises(UserError, match="--scales scores the adapter, so not with --model"):
        evaluate_adapter(lora_run, scales=[1.0], model=merged)
    with pytest.raises(UserError, match="--rows: at least one"):
        merge_adapter(lora_run, rows=0)


def test_too_little_disk_for_the_comparison_is_an_error_that_says_how_much(lora_run, tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)
    asked = iter([room, room._replace(free=64 << 20)])  # for the weights, and for the predictions
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: next(asked))
    with pytest.raises(
        UserError, match=r"comparing with the adapter \(less with fewer --rows\) needs 0.07 GB and 0.07"
    ):
        merge_adapter(lora_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_linear_in_its_scale_is_refused(lora_run, tmp_path):
    adapter = shutil.copytree(lora_run, tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    for call in (lambda: merge_adapter(adapter, scale=0.5), lambda: evaluate_adapter(adapter, scales=[0.5])):
        with pytest.raises(UserError, match="use_dora: True.* is not linear in its scale"):
            call()


def test_the_dequantised_base_is_the_nearer_one_after_qlora_and_the_run_says_so(qlora_run, tmp_path, capsys):
    drifts = {}
    for base in ("original", "dequantized"):
        output = merge_adapter(qlora_run, tmp_path / base, base=base)
        drifts[base] = json.loads((output / "merge.json").read_text())
        assert drifts[base]["base"] == base
        shown = capsys.readouterr().out
        assert "nearer to the adapter on these rows: --base dequantized" in shown
        assert ("as merged" in shown) == (base == "dequantized")
    assert drifts["dequantized"]["mean_kl"] < 1e-3 * drifts["original"]["mean_kl"]
    assert not list(tmp_path.glob(".*")), "the other base is only tried"


def test_merging_into_4_bit_weights_is_not_offered(qlora_run, lora_run, capsys):
    from recipes.merge_adapter import main

    with pytest.raises(SystemExit):
        main([str(qlora_run), "--base", "4bit"])
    assert "invalid choice" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is nothing to dequantise"):
        merge_adapter(lora_run, base="dequantized")


def test_a_drift_over_max_kl_is_an_error_and_leaves_nothing(qlora_run, tmp_path, capsys):
    from recipes.merge_adapter import main

    words = [str(qlora_run), "--output", str(tmp_path / "out"), "--max-kl", "1e-9"]
    assert run(main, words) == 2
    assert "over --max-kl 1e-09; nothing was kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run(main, [*words, "--base", "dequantized"]) == 0


def test_without_verifying_no_model_is_loaded(lora_run, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    output = merge_adapter(lora_run, tmp_path / "out", verify=False)
    assert "mean_kl" not in json.loads((output / "merge.json").read_text())


def test_another_tools_adapter_is_merged_on_rows_that_are_named(lora_run, tmp_path):
    adapter = tmp_path / "foreign"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(lora_run / name, adapter / name)
    with pytest.raises(UserError, match="--data FILE compares on yours, --no-verify"):
        merge_adapter(adapter)
    output = merge_adapter(adapter, data=str(TINY / "validation.jsonl"), rows=2)
    assert json.loads((output / "merge.json").read_text())["mean_kl"] < 1e-9


def test_a_checkpoint_of_a_run_is_merged_with_the_runs_record(lora_run, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-12"
    shutil.copytree(lora_run, checkpoint, ignore=shutil.ignore_patterns("merged", "evaluation", "run.json"))
    shutil.copyfile(lora_run / "run.json", tmp_path / "run" / "run.json")
    drift = json.loads((merge_adapter(checkpoint, rows=2) / "merge.json").read_text())
    assert drift["adapter"] == "small"
    assert drift["mean_kl"] < 1e-9


def test_the_modelfile_holds_the_template_the_stops_and_the_gguf_file(merged):
    lines = (merged / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./mine.gguf"
    assert lines[-2:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"']
    assert lines[1] == f'TEMPLATE """{go_template(AutoTokenizer.from_pretrained(merged))}"""'
