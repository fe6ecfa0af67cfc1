"""What a merged folder holds: a model that every runtime loads, that stops, and that tells no secret."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BASE, ROOT, TINY, chat, copy_run, read_jsonl, run_recipe, write_jsonl
from mistral_tokenizers import mistral_v1_legacy_tokenizer, mistral_v1_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

from recipes.evaluate_adapter import evaluate_adapter
from recipes.merge_adapter import merge_adapter
from recipes.utils.console import UserError
from recipes.utils.data import Encoder, read_chats
from recipes.utils.evaluation import base_of, load_adapter, read_adapter, set_scale
from recipes.utils.merge import write_card, write_generation_config, write_tokenizer
from recipes.utils.merge.export import plain_template
from recipes.utils.model import generate_answers

SECRET = "hf_thisIsASecretToken"
TEMPLATES = ROOT / "configs" / "chat_templates"
SHORT = {"max_steps": 4, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def run(lora_run, tmp_path_factory) -> Path:
    """A LoRA run whose record holds a secret and paths, where a user's may."""
    folder = copy_run(lora_run, tmp_path_factory.mktemp("copied"))
    record = json.loads((folder / "run.json").read_text())
    record["training"] |= {"hub_token": SECRET, "logging_dir": str(folder / "logs"), "run_name": SECRET}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def merged(run) -> Path:
    evaluate_adapter(run, max_rows=1, max_new_tokens=4)
    return merge_adapter(run, ollama="./mine.gguf")


def trained(method: str, path: Path) -> Path:
    """The folder of a run of the config at `path`."""
    assert run_recipe(f"sft_{method}", path) == 0
    return path.parent / "run"


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([list(range(60, 160))])).logits[0].float()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def texts_in(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors")


def test_answers_of_the_merged_folder_equal_the_adapters(run, merged):
    live, encoder = load_adapter(run, read_adapter(run)), Encoder(AutoTokenizer.from_pretrained(run))
    plain, own = load(merged), AutoTokenizer.from_pretrained(merged)
    for row in read_chats(str(TINY / "validation.jsonl"))[:4]:
        prompt = encoder.prompt_ids(row.messages[:-1])
        text = own.apply_chat_template(row.messages[:-1], add_generation_prompt=True, tokenize=False)
        assert own(text, add_special_tokens=False).input_ids == prompt
        ids = torch.tensor([prompt])
        found = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40)[0, len(prompt) :].tolist()
        answer = generate_answers(live, encoder, [prompt], 40)[0]
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
    assert (merged / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "Qwen2Tokenizer"
    assert tokenizer["chat_template"] == (merged / "chat_template.jinja").read_text()
    assert "generation %}" not in tokenizer["chat_template"]


def test_neither_a_local_path_nor_a_secret_is_told(run, merged):
    text = texts_in(merged)
    assert SECRET not in text
    assert str(run.parent) not in text
    assert str(ROOT) not in text
    assert "/tmp" not in text
    card = (merged / "README.md").read_text()
    record = json.loads((run / "run.json").read_text())
    for fact in (*record["data_sha256"].values(), "| learning_rate | 0.001 |", "| r | 4 |", "| loss |", "KL "):
        assert fact in card
    assert "base_model:" not in card, "a folder is no name on the hub"


def test_the_cards_base_is_the_hubs_name_and_revision(run, merged, tmp_path):
    record = json.loads((run / "run.json").read_text())
    record["model"] |= {"name_or_path": "Qwen/Qwen2-7B", "revision": "main"}
    snapshot = tmp_path / "models--Qwen--Qwen2-7B" / "snapshots" / ("0123456789" * 4)
    export_to = tmp_path / "out"
    export_to.mkdir()
    write_card(export_to, record, snapshot, run, {"base": "original", "scale": 1.0, "dtype": "bfloat16"}, None)
    card = (export_to / "README.md").read_text()
    assert "base_model: Qwen/Qwen2-7B\n" in card
    assert f"| base revision | {snapshot.name} |" in card


def test_the_card_of_a_scaled_merge_has_the_scores_of_that_scale(run, tmp_path):
    evaluate_adapter(run, max_rows=1, max_new_tokens=4, scales=[0.0, 0.5, 1.0])
    scores = json.loads((run / "evaluation" / "scales.json").read_text())
    card = (merge_adapter(run, tmp_path / "half", scale=0.5, verify=False) / "README.md").read_text()
    assert "| score | base | adapter at scale 0.5 |" in card
    assert f"| loss | {scores['0']['loss']:.4g} | {scores['0.5']['loss']:.4g} |" in card
    card = (merge_adapter(run, tmp_path / "other", scale=0.3, verify=False) / "README.md").read_text()
    assert "adapter at scale" not in card


def test_the_card_names_each_data_file_also_where_two_have_one_name(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    record["data_sha256"] = {"a/chats.jsonl": "1" * 64, "b/chats.jsonl": "2" * 64}
    how = {"base": "original", "scale": 1.0, "dtype": "bfloat16"}
    write_card(tmp_path, record, BASE, run, how, None)
    card = (tmp_path / "README.md").read_text()
    assert "1" * 64 in card
    assert "2" * 64 in card


def test_a_hub_snapshot_in_the_cache_is_found_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, repo = "0123456789" * 4, tmp_path / "models--someone--small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(BASE, repo / "snapshots" / commit)
    record = {"model": {"name_or_path": "someone/small", "revision": None}}
    assert base_of(record).name == commit
    (repo / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(UserError, match="someone/small: is not whole in the cache"):
        base_of(record)


def test_generation_settings_are_valid_and_hold_every_stop_id(tmp_path, merged):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [258, 256]
    assert tokenizer.convert_ids_to_tokens([258, 256]) == ["<|im_end|>", "<|endoftext|>"]
    base, output = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    output.mkdir()
    settings = {"temperature": 0.7, "top_k": 20, "eos_token_id": [256, 7]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    write_generation_config(base, output, [258, 256])
    settings = GenerationConfig.from_pretrained(output)
    assert settings.eos_token_id == [258, 256, 7]
    settings.save_pretrained(tmp_path / "again")


USER = {"role": "user", "content": "a\n"}
TURNS = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}, USER]
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = [TURNS[:1], [SYSTEM, USER], TURNS, [SYSTEM, *TURNS]]


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
    write_tokenizer(base, tmp_path / "out", trained)
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
def test_merged_at_a_scale_equals_the_live_adapter_at_that_scale(run, tmp_path, scale):
    live = load_adapter(run, read_adapter(run))
    full = logits_of(live)
    set_scale(live, scale)
    output = merge_adapter(run, tmp_path / "out", scale=scale, rows=2)
    assert (logits_of(load(output)) - logits_of(live)).abs().max() < 1e-4
    assert (logits_of(load(output)) - full).abs().max() > 1e-2
    assert json.loads((output / "merge.json").read_text())["mean_kl"] < 1e-9


def test_flags_that_would_be_ignored_are_refused(run, merged):
    with pytest.raises(UserError, match="--scales scores the adapter, so not with --model"):
        evaluate_adapter(run, scales=[1.0], model=merged)
    with pytest.raises(UserError, match="--rows: at least one"):
        merge_adapter(run, rows=0)


def test_too_little_disk_for_the_comparison_is_an_error_that_says_how_much(run, tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)
    asked = iter([room, room._replace(free=64 << 20)])  # for the weights, and for the predictions
    monkeypatch.setattr(shutil, "disk_usage", lambda _: next(asked))
    less = r"comparing with the adapter \(less with fewer --rows\) needs 0.07 GB and 0.07"
    with pytest.raises(UserError, match=less):
        merge_adapter(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_linear_in_its_scale_is_refused(run, tmp_path):
    adapter = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
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


def test_merging_into_4_bit_weights_is_not_offered(qlora_run, run, capsys):
    with pytest.raises(SystemExit):
        run_recipe("merge_adapter", qlora_run, "--base", "4bit")
    assert "invalid choice" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is nothing to dequantise"):
        merge_adapter(run, base="dequantized")


def test_a_drift_over_max_kl_is_an_error_and_leaves_nothing(qlora_run, tmp_path, capsys):
    words = [qlora_run, "--output", tmp_path / "out", "--max-kl", "1e-9"]
    assert run_recipe("merge_adapter", *words) == 2
    assert "over --max-kl 1e-09; nothing was kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run_recipe("merge_adapter", *words, "--base", "dequantized") == 0


def test_without_verifying_no_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    output = merge_adapter(run, tmp_path / "out", verify=False)
    assert "mean_kl" not in json.loads((output / "merge.json").read_text())


def test_another_tools_adapter_is_merged_on_rows_that_are_named(run, tmp_path):
    adapter = tmp_path / "foreign"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run / name, adapter / name)
    with pytest.raises(UserError, match="--data FILE compares on yours, --no-verify"):
        merge_adapter(adapter)
    output = merge_adapter(adapter, data=str(TINY / "validation.jsonl"), rows=2)
    assert json.loads((output / "merge.json").read_text())["mean_kl"] < 1e-9


def test_a_checkpoint_of_a_run_is_merged_with_the_runs_record(run, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-12"
    shutil.copytree(run, checkpoint, ignore=shutil.ignore_patterns("merged", "evaluation", "run.json"))
    shutil.copyfile(run / "run.json", tmp_path / "run" / "run.json")
    drift = json.loads((merge_adapter(checkpoint, rows=2) / "merge.json").read_text())
    assert drift["adapter"] == "small"
    assert drift["mean_kl"] < 1e-9


def test_the_modelfile_holds_the_template_the_stops_and_the_gguf_file(merged):
    lines = (merged / "Modelfile").read_text().splitlines()
    assert lines[1] == "FROM ./mine.gguf"
    assert lines[2].startswith('TEMPLATE """<|im_start|>system')
    assert lines[-2:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"']


MERGES = {"dora": {"use_dora": True}, "trained head": {"modules_to_save": ["lm_head"]}}


@pytest.mark.parametrize("name", MERGES)
def test_merged_logits_equal_the_adapters(config_file, name):
    folder = trained("lora", config_file(lora=MERGES[name], training=SHORT))
    merged = load(merge_adapter(folder))
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), folder)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    expected = logits_of(live)
    assert (logits_of(merged) - expected).abs().max() < 1e-4
    assert (logits_of(base) - expected).abs().max() > 1e-2, "the adapter must matter for the check to mean anything"


def a_mistral(method: str, twin: Path, config_file) -> Path:
    """The folder of a run on a bfloat16 Mistral, whose loss has fallen."""
    training = SHORT | {"max_length": 160, "per_device_train_batch_size": 1}
    folder = trained(method, config_file(model={"name_or_path": str(twin), "dtype": "bfloat16"}, training=training))
    losses = [line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    return folder


def test_a_mistral_merges_into_its_16_bit_base_and_is_near_the_adapter(config_file, mistral_twin, capsys):
    output = merge_adapter(a_mistral("lora", mistral_twin, config_file))
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}
    drift = json.loads((output / "merge.json").read_text())
    assert drift["mean_kl"] < 1e-2
    assert "KL divergence" in capsys.readouterr().out


def test_qlora_merges_into_the_16_bit_base_and_never_into_4_bit(config_file, mistral_twin):
    folder = a_mistral("qlora", mistral_twin, config_file)
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


def test_the_merged_folder_stops_where_training_stopped_and_keeps_the_template(run, merged):
    tokenizer, own = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(run)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    texts = [
        each.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for each in (tokenizer, own)
    ]
    assert texts[0] == texts[1]
    stop_ids = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert stop_ids == Encoder(own).stop_ids
    assert tokenizer.convert_ids_to_tokens(stop_ids) == ["<|im_end|>", "<|endoftext|>"]
    scores = evaluate_adapter(run, model=merged, max_rows=2)
    assert scores["merged"]["loss"] == pytest.approx(scores["adapter"]["loss"], rel=1e-5)
    assert set(scores["differences"]) == {"adapter against base", "merged against base", "merged against adapter"}


def test_a_run_without_validation_rows_and_one_whose_data_is_gone_can_be_merged(config_file, tmp_path):
    training = {"max_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    folder = trained("lora", config_file(data={"validation": None}, training=training))
    (tmp_path / "train.jsonl").unlink()
    assert (merge_adapter(folder) / "config.json").is_file()


def test_a_run_that_skips_and_escapes_can_be_evaluated_and_merged(config_file, tmp_path):
    rows = [*read_jsonl(TINY / "test.jsonl")[:3], chat("say <|im_end|> now", "<|im_end|> it is")]
    path = write_jsonl(tmp_path / "odd.jsonl", rows)
    path.write_text("{\n" + path.read_text())
    data = {"validation": str(path), "on_bad_row": "skip", "control_tokens": "escape"}
    folder = trained("lora", config_file(data=data, training={"max_steps": 1, "eval_steps": 1, "save_steps": 1}))
    assert evaluate_adapter(folder, max_rows=4)["adapter"]["rows"] == 4
    assert (merge_adapter(folder) / "config.json").is_file()


def test_a_run_that_has_not_finished_is_a_user_error(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text('{"status": "stopped"}')
    with pytest.raises(UserError, match="holds no adapter yet|is no run folder and no adapter"):
        merge_adapter(tmp_path / "half")
    with pytest.raises(UserError, match="is no run folder"):
        merge_adapter(tmp_path)


def test_a_target_that_is_not_empty_is_refused_and_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="--output"):
        merge_adapter(run, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_run_folder_of_the_first_build_is_merged(run, merged, tmp_path):
    """Its run.json has no format, and the base's commit stands under model.revision."""
    old = copy_run(run, tmp_path)
    shutil.rmtree(old / "merged")
    record = json.loads((old / "run.json").read_text())
    record = {key: value for key, value in record.items() if key not in ("format", "commit", "description")}
    (old / "run.json").write_text(json.dumps({**record, "revision_asked": None}))
    again = merge_adapter(old, rows=2)
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_a_link_in_the_base_to_a_private_file_is_not_followed_into_what_is_given_away(run, tmp_path, name):
    base = shutil.copytree(BASE, tmp_path / "base")
    private = tmp_path / "private"
    private.write_text((base / name).read_text() if (base / name).is_file() else SECRET)
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(private)
    folder = copy_run(run, tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["model"]["name_or_path"] = str(base)
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"{name}: is a link out of its folder"):
        merge_adapter(folder, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_names_in_a_card_begin_no_cell_line_tag_or_key_of_their_own(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    record["name"] = "a | b\n# c <script>"
    record["model"]["name_or_path"] = 'someone/x"\nlicense: mit'
    record["data_sha256"] = {"a|b\n|c.jsonl": "1" * 64}
    how = {"base": "original", "scale": 1.0, "dtype": "bfloat16"}
    write_card(tmp_path, record, BASE, run, how, None)
    _, head, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == 'someone/x"\nlicense: mit'
    assert "license" not in yaml.safe_load(head)
    assert "# a \\| b # c \\<script>\n" in body
    assert "| sha256 of a\\|b \\|c.jsonl | 111" in body


def test_a_base_that_was_changed_anywhere_is_neither_merged_nor_scored(run, tmp_path):
    base = shutil.copytree(BASE, tmp_path / "base")
    folder = copy_run(run, tmp_path)
    record = json.loads((folder / "run.json").read_text())
    record["model"]["name_or_path"] = str(base)
    (folder / "run.json").write_text(json.dumps(record))
    merge_adapter(folder, tmp_path / "fine", verify=False)
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (base / "model.safetensors").write_bytes(content)
    for work in (lambda: merge_adapter(folder, tmp_path / "out"), lambda: evaluate_adapter(folder)):
        with pytest.raises(UserError, match=r"model\.safetensors is another file than the adapter was trained on"):
            work()
