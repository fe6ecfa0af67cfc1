"""Every key of a config is honoured or refused, with the place and the mend."""

import os
import shlex
from pathlib import Path

from recipes.utils.config import load_config, parse_command_line
from recipes.utils.console import UserError

import pytest
from conftest import ROOT

BASE = """\
model:
  name_or_path: some/model
data:
  train: train.jsonl
training:
  learning_rate: 2e-4
"""


def load(tmp_path, text, overrides=None, method="lora"):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return load_config(path, overrides or {}, method)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_each_shipped_config_is_parsed(path, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(path, {}, method)
    assert config.name == path.stem
    assert config.training["output_dir"] == f"runs/{path.stem}-{method}"
    assert config.lora["r"] == 16


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_shipped_7b_configs_hold_the_values_that_were_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "configs" / f"{name}.yaml", {}, "lora")
    training = config.training
    assert config.model.dtype == "bfloat16"
    assert config.lora["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (4, 4)
    assert (training["learning_rate"], training["num_train_epochs"], training["bf16"]) == (2e-4, 3, True)


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    assert load(tmp_path, BASE).training["learning_rate"] == 2e-4


@pytest.mark.parametrize(
    ("extra", "line", "mend"),
    [
        ("  learning_rat: 3\n", 7, "did you mean `training.learning_rate`?"),
        ("  lora_alpha: 3\n", 7, "did you mean `lora.lora_alpha`?"),
        ("  max_seq_length: 3\n", 7, "training.max_length"),
        ("  evaluation_strategy: steps\n", 7, "training.eval_strategy"),
        ("  warmup_ratio: 0.1\n", 7, "training.warmup_steps"),
        ("  learning_rate: 3\n", 7, "given twice, first in line 6"),
        ("training:\n  packing: true\n", 7, "`training` is given twice, first in line 5"),
        ("  packing: maybe\n", 7, "training.packing: expected bool, got 'maybe'"),
        ("  per_device_train_batch_size: 4.5\n", 7, "expected int, got 4.5"),
        ("  lr_scheduler_type: cosin\n", 7, "did you mean 'cosine'?"),
        ("  optim: adamw_torc\n", 7, "did you mean 'adamw_torch'?"),
        ("  eval_strategy: stepz\n", 7, "did you mean 'steps'?"),
        ("  packing: [\n", 8, "not YAML"),
        ("  assistant_only_loss: true\n", 7, "refused"),
        ("  resume_from_checkpoint: x\n", 7, "--resume"),
        ("lorra:\n  r: 3\n", 8, "did you mean `lora`?"),
        ("learning_rate: 3\n", 7, "did you mean `training.learning_rate`?"),
        ("lora: 16\n", 7, "is a section"),
        ("lora:\n  r: many\n", 8, "lora.r: expected int, got 'many'"),
        ("lora:\n  init_lora_weights: pisa\n", 8, "'pissa'"),
        ("quantization:\n  load_in_4bit: true\n", 8, "recipes/sft_qlora.py"),
    ],
)  # fmt: skip
def test_a_bad_key_or_value_is_named_with_its_line_and_mend(tmp_path, extra, line, mend):
    with pytest.raises(UserError) as error:
        load(tmp_path, BASE + extra)
    assert str(error.value).startswith(f"{tmp_path}/my.yaml:{line}: ")
    assert mend in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value", "mend"),
    [
        ("bnb_4bit_quant_type", "nf5", "nf4"),
        ("bnb_4bit_compute_dtype", "bfloat17", "bfloat16"),
        ("load_in_4bit", "yes please", "true or false"),
    ],
)
def test_quantization_values_that_the_class_would_take_in_silence_are_refused(tmp_path, key, value, mend):
    with pytest.raises(UserError, match=mend):
        load(tmp_path, BASE, {f"quantization.{key}": value}, "qlora")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--training.per_device_train_batch_size 0", "is not between 1 and"),
        ("--training.gradient_accumulation_steps 0", "is not between 1 and"),
        ("--training.learning_rate -1", "is not between"),
        ("--training.learning_rate null", "needs a value"),
        ("--lora.r 0", "is not between 1 and"),
        ("--lora.lora_dropout 2", "is not between 0 and"),
        ("--data.train null", "needs a value"),
        ("--model.dtype null", "needs a value"),
        ("--training.packing_strategy bdf", "did you mean 'bfd'?"),
        ("--training.loss_type foo", "is not one of nll"),
        ("--training.hub_token secret", "hf auth login"),
        ("--lora.inference_mode true", "not in inference mode"),
        ("--lora.trainable_token_indices '[1]'", "modules_to_save"),
        ("--training.output_dir /etc/hostname", "is a file, not a folder"),
    ],
)
def test_values_that_the_libraries_would_fall_over_are_refused(tmp_path, flags, message):
    (tmp_path / "my.yaml").write_text(BASE)
    with pytest.raises(UserError, match=message):
        parse_command_line([str(tmp_path / "my.yaml"), *shlex.split(flags)], "lora", "")


@pytest.mark.parametrize("value", [False, None])
def test_qlora_without_a_4_bit_base_is_refused(tmp_path, value):
    key = "load_in_4bit" if value is False else "load_in_8bit"
    with pytest.raises(UserError, match="recipes/sft_lora.py"):
        load(tmp_path, BASE, {f"quantization.{key}": value is None}, "qlora")


@pytest.mark.parametrize("flag", ["--training.eval_strategy no", "--training.save_strategy no", "--data.train *.jsonl"])
def test_words_that_yaml_would_read_as_something_else_stay_words(tmp_path, flag):
    (tmp_path / "my.yaml").write_text(BASE)
    name, value = flag.split()
    config = parse_command_line([str(tmp_path / "my.yaml"), name, value], "lora", "")
    section, key = name.removeprefix("--").split(".")
    found = getattr(config, section)
    assert (found[key] if isinstance(found, dict) else getattr(found, key)) == value


def test_no_in_a_file_is_a_word_too(tmp_path):
    assert load(tmp_path, BASE + "  eval_strategy: no\n").training["eval_strategy"] == "no"


@pytest.mark.parametrize(
    "text", ["\x00", "? [a, b]\n: c\n", "model:\n  ? [a]\n  : b\n", "model:\n  dtype: !!python/object:os.system x\n"]
)
def test_yaml_that_is_no_config_is_a_user_error(tmp_path, text):
    with pytest.raises(UserError, match="my.yaml"):
        load(tmp_path, text)


def test_a_checkpoint_of_another_folder_is_refused(tmp_path):
    (tmp_path / "a" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "a" / "checkpoint-1" / "trainer_state.json").touch()
    (tmp_path / "my.yaml").write_text(BASE)
    with pytest.raises(UserError, match="leave one of the two out"):
        load_config(
            tmp_path / "my.yaml", {"training.output_dir": "b"}, "lora", resume=str(tmp_path / "a" / "checkpoint-1")
        )


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        load(tmp_path, BASE + "  packin: true\nlora:\n  r: x\n", {"training.max_length": "long"})
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in lines] == [
        "my.yaml:7",
        "my.yaml:9",
        "--training.max_length",
    ]


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_that_is_no_config_says_so(tmp_path, text):
    with pytest.raises(UserError, match="expected sections"):
        load(tmp_path, text)


def test_missing_sections_are_named(tmp_path):
    with pytest.raises(UserError, match=r"model.name_or_path is missing\n.*data.train is missing"):
        load(tmp_path, "training:\n  learning_rate: 1e-4\n")


def test_a_missing_config_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.yaml: no such config file"):
        load_config(tmp_path / "nowhere.yaml", {}, "lora")


def test_evaluation_without_validation_rows_is_refused_with_the_flags_to_paste(tmp_path):
    with pytest.raises(UserError, match=r"--data.validation 0.05.*--training.eval_strategy no"):
        load(tmp_path, BASE + "  eval_strategy: steps\n")


@pytest.mark.parametrize(("key", "value"), [("max_length", None), ("packing_strategy", "wrapped")])
def test_a_value_that_cannot_be_right_here_is_refused(tmp_path, key, value):
    with pytest.raises(UserError, match=f"training.{key}"):
        load(tmp_path, BASE, {f"training.{key}": value})


def test_everything_loraconfig_has_reaches_it(tmp_path):
    lora = {"use_rslora": True, "init_lora_weights": "pissa_niter_16", "bias": "none", "lora_dropout": 0.1}
    config = load(tmp_path, BASE, {f"lora.{key}": value for key, value in lora.items()})
    assert {key: config.lora[key] for key in lora} == lora


def test_flags_override_the_file_and_are_typed(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(BASE)
    words = [str(path), "--training.learning_rate", "1e-5", "--lora.r=32", "--lora.target_modules=[q_proj, k_proj]",
             "--dry-run"]  # fmt: skip
    config = parse_command_line(words, "lora", "")
    assert (config.training["learning_rate"], config.lora["r"], config.dry_run) == (1e-5, 32, True)
    assert config.lora["target_modules"] == ["q_proj", "k_proj"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.learning_rat", "1"], "--training.learning_rat: unknown key"),
        (["--training.learning_rate"], "needs a value"),
        (["--learning_rate", "1"], "--section.key"),
        (["--lora.r=1", "--lora.r=2"], "given twice"),
        (["stray"], "stray"),
    ],
)
def test_a_bad_flag_is_named(tmp_path, words, message):
    (tmp_path / "my.yaml").write_text(BASE)
    with pytest.raises(UserError, match=message):
        parse_command_line([str(tmp_path / "my.yaml"), *words], "lora", "")


def test_the_default_run_folder_is_numbered_when_a_run_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/my-lora", "runs/my-lora-2", "runs/my-lora-3"):
        assert load(tmp_path, BASE).training["output_dir"] == expected
        Path(expected).mkdir(parents=True)
        (Path(expected) / "run.json").touch()


def test_an_explicit_folder_that_holds_a_run_is_refused(tmp_path):
    (tmp_path / "used" / "checkpoint-10").mkdir(parents=True)
    with pytest.raises(UserError, match=r"used: holds a run already.*--resume"):
        load(tmp_path, BASE, {"training.output_dir": str(tmp_path / "used")})


def test_resume_takes_the_run_of_the_config_that_was_written_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(BASE)
    config = load_config("my.yaml", {}, "lora", resume="latest")
    assert (config.resume, config.training["output_dir"]) == (None, "runs/my-lora")
    assert "the run begins at its first step" in capsys.readouterr().out
    for number, name in enumerate(["runs/my-lora", "runs/my-lora-3", "runs/my-lora-2", "runs/other-lora"]):
        Path(name).mkdir(parents=True)
        Path(name, "run.json").touch()
        os.utime(Path(name, "run.json"), (number, number))
    config = load_config("my.yaml", {}, "lora", resume="latest")
    assert (config.resume, config.training["output_dir"]) == (None, "runs/my-lora-2")
    with pytest.raises(UserError, match="there is no such folder"):
        load_config("my.yaml", {}, "lora", resume="runs/my-lora/checkpoint-2")
