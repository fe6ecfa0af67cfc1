"""Every key of a config is honoured or refused, with the place and the mend."""

import dataclasses
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT, TINY, copy_run

from recipes.utils.config import Config, check_machine, load_config, read_config
from recipes.utils.config.config import has_kernels
from recipes.utils.config.keys import known_key
from recipes.utils.console import UserError, parse, training_parser
from recipes.utils.names import NAMES_ELSEWHERE, REFUSED

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


def read(*words, method="lora") -> Config:
    """The config of a command line, wherever its data files are."""
    return read_config(parse(training_parser(""), [str(word) for word in words], data_files=False), method)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_each_shipped_config_is_parsed(path, method):
    config = load_config(path, {}, method)
    assert (config.name, config.output_dir) == (path.stem, None)
    assert config.lora["r"] == (16 if path.stem in ("mistral", "qwen2", "tiny") else 32)


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
        ("--training.learning_rate 0", "is not between"),
        ("--lora.r 0", "is not between 1 and"),
        ("--lora.lora_alpha 0", "lora.lora_alpha: 0 is not between"),
        ("--lora.rank_pattern '{q_proj: 0}'", "each number is above zero"),
        ("--lora.alpha_pattern '{q_proj: 0}'", "each number is above zero"),
        ("--lora.lora_dropout 2", "is not between 0 and"),
        ("--data.train null", "needs a value"),
        ("--model.dtype null", "needs a value"),
        ("--training.packing_strategy bdf", "did you mean 'bfd'?"),
        ("--training.loss_type foo", "is not one of nll"),
        ("--training.hub_token secret", "hf auth login"),
        ("--lora.inference_mode true", "not in inference mode"),
        ("--lora.trainable_token_indices '[1]'", "modules_to_save"),
        ("--training.report_to wandbb", "did you mean 'wandb'?"),
    ],
)
def test_values_that_the_libraries_would_fall_over_are_refused(tmp_path, flags, message):
    (tmp_path / "my.yaml").write_text(BASE)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / "my.yaml"), *shlex.split(flags))


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--training.metric_for_best_model eval_acc",
            "metric_for_best_model: 'eval_acc' is not one of loss, eval_loss",
        ),
        ("--training.metric_for_best_model mean_token_accuracy", "is not one of loss, eval_loss"),
        ("--training.greater_is_better true", "the smaller is better"),
        ("--training.lr_scheduler_type cosine_with_min_lr", "lr_scheduler_type: cosine_with_min_lr: .*min_lr"),
        (
            "--training.lr_scheduler_type warmup_stable_decay",
            "lr_scheduler_type: warmup_stable_decay: .*decay_steps",
        ),
        ("--training.lr_scheduler_kwargs '{num_cycle: 1}'", "lr_scheduler_type: cosine: .*num_cycle"),
        ("--training.optim galore_adamw", "optim: galore_adamw: .*install"),
        ("--training.optim schedule_free_adamw", "optim: schedule_free_adamw: .*install"),
        ("--training.optim adamw_torch_8bit", "optim: adamw_torch_8bit: .*install"),
        ("--training.optim stable_adamw", "optim: stable_adamw: .*install"),
        ("--training.optim lomo", "optim: lomo: .*install"),
        ("--training.gradient_checkpointing_kwargs '{nosuch: 1}'", "gradient_checkpointing_kwargs: .*nosuch"),
        ("--training.eval_accumulation_steps 0", "is not between 1 and"),
        ("--training.weight_decay -1", "is not between 0 and"),
        ("--training.seed -1", "is not between 0 and"),
        ("--training.adam_beta1 1.5", "optim: adamw_torch_fused: Invalid beta"),
        ("--training.optim_args 'momentum' --training.optim sgd", "optim: sgd: "),
    ],
)
def test_what_only_the_trainer_would_reject_is_judged_with_the_config(tmp_path, flag, message):
    text = BASE.replace("train: train.jsonl", "train: train.jsonl\n  validation: 0.1") + "  lr_scheduler_type: cosine\n"
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read(str(tmp_path / "my.yaml"), *shlex.split(flag))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_an_optimizer_that_works_here_is_taken(tmp_path, optimizer):
    assert load(tmp_path, BASE, {"training.optim": optimizer}).training["optim"] == optimizer
    schedule = {"training.lr_scheduler_type": "warmup_stable_decay", "training.warmup_steps": 0.1}
    schedule["training.lr_scheduler_kwargs"] = {"num_decay_steps": 10}
    assert load(tmp_path, BASE, {"training.optim": optimizer, "training.max_steps": 20, **schedule})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lr", "training.learning_rate"), ("lora.rank", "lora.r"), ("training.lora_r", "lora.r"),
        ("training.train_batch_size", "training.per_device_train_batch_size"), ("training.logging_dir", "nothing"),
        ("training.use_peft", "nothing"), ("training.push_to_hub_token", "hf auth"),
        ("lora.lora_target", "lora.target_modules"),
        ("training.early_stopping_patience", "run.early_stopping_patience"), ("lr", "training.learning_rate"),
        ("model.base_model", "model.name_or_path"), ("training.cutoff_len", "training.max_length"),
    ],
)  # fmt: skip
def test_names_of_other_versions_and_tools_are_told_by_ours_and_none_is_refused_in_turn(tmp_path, key, meant):
    with pytest.raises(UserError, match=meant):
        load(tmp_path, BASE, {key: 3})


def test_no_key_is_sent_to_one_that_is_refused_or_is_none():
    for name, home in NAMES_ELSEWHERE.items():
        section, dot, key = home.split(",")[0].partition(".")
        if dot and " " not in section:
            assert known_key(f"{section}.{key}", "lora") == (section, key)
        with pytest.raises(UserError, match=re.escape(home)):
            known_key(f"training.{name}", "lora")
    for key in REFUSED:
        with pytest.raises(UserError) as error:
            known_key(f"{key}x", "lora")
        assert not any(f"`{refused}`" in str(error.value) for refused in REFUSED)


def test_anchors_and_merges_are_yaml_as_people_write_it(tmp_path):
    text = """
x-common: &common
  learning_rate: 1e-4
  max_length: 512
model: {name_or_path: some/model}
data: {train: train.jsonl}
training:
  <<: *common
  max_length: &length 256
lora: {r: 4, lora_alpha: 8}
"""
    config = load(tmp_path, text)
    assert (config.training["learning_rate"], config.training["max_length"]) == (1e-4, 256)
    with pytest.raises(UserError, match=r"my.yaml:3: .*`training.learning_rat`"):
        load(tmp_path, text.replace("learning_rate", "learning_rat"))
    with pytest.raises(UserError, match="my.yaml:10: `training.max_length` is given twice, first in line 9"):
        load(tmp_path, text.replace("lora:", "  max_length: 3\nlora:"))
    with pytest.raises(UserError, match="my.yaml:8: not YAML: found undefined alias"):
        load(tmp_path, text.replace("*common", "*commons"))
    with pytest.raises(UserError, match="not YAML"):
        load(tmp_path, text.replace("*common", "3"))


def test_early_stopping_needs_what_it_judges_by(tmp_path):
    flags = {"run.early_stopping_patience": 2}
    with pytest.raises(UserError, match="needs evaluations and the best checkpoint: --training.eval_strategy epoch"):
        load(tmp_path, BASE, flags)
    with pytest.raises(UserError, match="run.early_stopping_patience: 0 is not between 1 and"):
        load(tmp_path, BASE, {"run.early_stopping_patience": 0})
    best = {"data.validation": 0.1, "training.load_best_model_at_end": True}
    best |= {"training.eval_strategy": "epoch", "training.save_strategy": "epoch"}
    assert load(tmp_path, BASE, flags | best).run.early_stopping_patience == 2


@pytest.mark.parametrize("value", [False, None])
def test_qlora_without_a_4_bit_base_is_refused(tmp_path, value):
    key = "load_in_4bit" if value is False else "load_in_8bit"
    with pytest.raises(UserError, match="recipes/sft_lora.py"):
        load(tmp_path, BASE, {f"quantization.{key}": value is None}, "qlora")


@pytest.mark.parametrize("flag", ["--training.eval_strategy no", "--training.save_strategy no", "--data.train *.jsonl"])
def test_words_that_yaml_would_read_as_something_else_stay_words(tmp_path, flag):
    (tmp_path / "my.yaml").write_text(BASE)
    name, value = flag.split()
    config = read(str(tmp_path / "my.yaml"), name, value)
    section, key = name.removeprefix("--").split(".")
    assert config.sections()[section][key] == value


def test_no_in_a_file_is_a_word_too(tmp_path):
    assert load(tmp_path, BASE + "  eval_strategy: no\n").training["eval_strategy"] == "no"


@pytest.mark.parametrize(
    "text", ["\x00", "? [a, b]\n: c\n", "model:\n  ? [a]\n  : b\n", "model:\n  dtype: !!python/object:os.system x\n"]
)
def test_yaml_that_is_no_config_is_a_user_error(tmp_path, text):
    with pytest.raises(UserError, match="my.yaml"):
        load(tmp_path, text)


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
    lora = {"use_rslora": True, "init_lora_weights": "gaussian", "bias": "none", "lora_dropout": 0.1}
    config = load(tmp_path, BASE, {f"lora.{key}": value for key, value in lora.items()})
    assert {key: config.lora[key] for key in lora} == lora


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "eva", "loftq"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_initialisation_that_changes_the_base_or_needs_more_is_refused(tmp_path, start, method):
    with pytest.raises(UserError, match=f"lora.init_lora_weights: {start}"):
        load(tmp_path, BASE, {"lora.init_lora_weights": start}, method)


def test_flags_override_the_file_and_are_typed(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(BASE)
    words = [str(path), "--training.learning_rate", "1e-5", "--lora.r=32", "--lora.target_modules=[q_proj, k_proj]",
             "--dry-run"]  # fmt: skip
    config = read(*words)
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
        read(str(tmp_path / "my.yaml"), *words)


def test_a_config_is_read_only(tmp_path):
    config = load(tmp_path, BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "another"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.train = "another.jsonl"
    for section in (config.lora, config.training, config.quantization):
        with pytest.raises(TypeError):
            section["r"] = 1


def test_what_follows_from_the_rest_is_filled_in(tmp_path):
    training = load(tmp_path, BASE, {"model.dtype": "float16", "training.report_to": ["wandb", "tensorboard"]}).training
    assert (training["bf16"], training["fp16"], training["report_to"]) == (False, True, "none")
    assert training["use_cpu"] is not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("given", "trackers"),
    [(None, ()), ("none", ()), ("wandb", ("wandb",)), (["wandb", "tensorboard"], ("wandb", "tensorboard"))],
)
def test_trackers_are_ours_to_run_and_the_output_folder_the_runs_to_take(tmp_path, given, trackers):
    keys = {"training.output_dir": "some/run"} | ({"training.report_to": given} if given else {})
    config = load(tmp_path, BASE, keys)
    assert (config.trackers, config.output_dir, "output_dir" in config.training) == (trackers, "some/run", False)


def test_absolute_paths_become_relative_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {"data.train": [str(tmp_path / "a.jsonl")], "model.name_or_path": str(tmp_path / "base"),
            "training.output_dir": str(tmp_path / "run")}  # fmt: skip
    config = load(tmp_path, BASE, keys)
    assert (config.data.train, config.model.name_or_path, config.output_dir) == (["a.jsonl"], "base", "run")


def test_a_run_is_run_again_by_its_record(lora_run):
    """By its folder or its run.json: the same sections, but for where the run went; flags are laid over it."""
    small = load_config(lora_run.parent / "small.yaml", {}, "lora")
    for words in ((lora_run,), (lora_run / "run.json", "--training.max_steps", "3")):
        again = read("--from-run", *words)
        steps = 3 if len(words) > 1 else 8
        assert again.name == "small"
        assert again.output_dir is None
        assert again.sections() == {**small.sections(), "training": {**small.training, "max_steps": steps}}


def test_a_record_of_other_data_or_of_the_other_method_is_refused(lora_run, tmp_path):
    folder = copy_run(lora_run, tmp_path)
    record = json.loads((folder / "run.json").read_text())
    with pytest.raises(UserError, match=r"of a lora run: recipes/sft_lora.py"):
        read("--from-run", folder, method="qlora")
    file = next(iter(record["data_sha256"]))
    record["data_sha256"][file] = "0" * 64
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="is not there as the run had it"):
        read("--from-run", folder)
    for text in ("{", "[]", "{}"):
        (folder / "run.json").write_text(text)
        with pytest.raises(UserError, match="is no record of a run"):
            read("--from-run", folder)


def test_a_run_on_a_base_of_the_hub_is_run_again_on_its_commit(lora_run, tmp_path):
    folder = copy_run(lora_run, tmp_path)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"commit": "a" * 40}))
    assert read("--from-run", folder).model.revision == "a" * 40


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes torch see so many GPUs."""

    def see(number: int, bfloat16: bool = True, compiler: str | None = "cc"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90a"])
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
        monkeypatch.setattr("recipes.utils.config.config.c_compiler", lambda: compiler)
        monkeypatch.delenv("WORLD_SIZE", raising=False)

    return see


def on_gpus(config: Config) -> Config:
    """`config`, read here, as it would be with GPUs."""
    return dataclasses.replace(config, training={**config.training, "use_cpu": False})


def test_several_gpus_without_a_launcher_are_refused_with_the_command(tmp_path, gpus, monkeypatch):
    config = on_gpus(load(tmp_path, BASE))
    gpus(2)
    with pytest.raises(UserError, match=r"2 GPUs .*accelerate launch --num_processes 2 .*CUDA_VISIBLE_DEVICES=0"):
        check_machine(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_machine(config)


@pytest.mark.parametrize("number", [1, 2])
def test_more_processes_than_gpus_are_refused_with_the_number_before_one_asks_for_its_gpu(
    tmp_path, gpus, monkeypatch, number
):
    gpus(number)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match=rf"^8 processes and {number} GPUs?: --num_processes {number}; torchrun: --npr"):
        load(tmp_path, BASE)


def test_a_process_that_has_died_is_given_up_after_ten_minutes(tmp_path):
    assert load(tmp_path, BASE).training["ddp_timeout"] == 600
    assert load(tmp_path, BASE, {"training.ddp_timeout": 60}).training["ddp_timeout"] == 60


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 9), ["sm_80", "sm_86", "sm_90"], True),
        ((8, 0), ["sm_86", "sm_90"], False),
        ((7, 0), ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"], False),
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((12, 1), ["sm_90", "sm_120"], True),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((7, 5), ["compute_80"], False),
        ((9, 4), ["gfx942"], True),
    ],
)
def test_a_gpu_runs_kernels_of_its_own_major_version_and_code_that_is_older(capability, built, runs):
    assert has_kernels(capability, built) is runs


def test_a_gpu_that_this_torch_has_no_kernels_for_is_refused_before_anything_is_read(tmp_path, gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(UserError, match=r"Some GPU has compute capability 7.0, .* kernels for sm_80, sm_90a: install"):
        load(tmp_path, BASE)


def test_a_gpu_without_a_compiler_is_told_before_a_base_is_looked_for(tmp_path, gpus):
    config = on_gpus(load(tmp_path, BASE))
    gpus(1, compiler=None)
    with pytest.raises(UserError, match="apt-get install gcc python3-dev"):
        check_machine(config)
    gpus(1)
    check_machine(config)
    gpus(0, compiler=None)
    check_machine(config)


def test_bfloat16_on_a_card_without_it_is_refused_with_the_dtypes_that_work(tmp_path, gpus):
    gpus(1, bfloat16=False)
    with pytest.raises(UserError, match="Some GPU has no bfloat16; use --model.dtype float16, or float32 for Qwen2"):
        load(tmp_path, BASE)


def test_sharding_that_would_not_take_place_is_refused(tmp_path, gpus, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="plain data parallelism"):
        check_machine(load(tmp_path, BASE, {"training.use_cpu": True}))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")  # the library would ask for GPUs when it is read
    whole = on_gpus(load(tmp_path, BASE, {}, "qlora"))
    parts = on_gpus(load(tmp_path, BASE, {"quantization.bnb_4bit_quant_storage": "bfloat16"}, "qlora"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    gpus(1)
    with pytest.raises(UserError, match="--quantization.bnb_4bit_quant_storage bfloat16"):
        check_machine(whole)
    check_machine(parts)


def test_ligers_kernels_are_refused_where_they_cannot_run(tmp_path):
    with pytest.raises(UserError, match="its kernels run on a GPU alone"):
        check_machine(load(tmp_path, BASE, {"training.use_liger_kernel": True, "training.use_cpu": True}))


def test_the_tiny_splits_share_no_row():
    rows = {name: (TINY / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation", "test")}
    assert len(set().union(*rows.values())) == sum(len(part) for part in rows.values())


@pytest.mark.parametrize(
    ("key", "value"), [("training.learning_rate", "fast"), ("training.learning_rate", 5000), ("lora.r", 2.5),
                       ("training.logging_steps", "often"), ("lora.bias", "some")],
)  # fmt: skip
def test_an_error_names_its_key_once(tmp_path, key, value):
    section, name = key.split(".")
    for text, overrides in ((f"{BASE}{section}2:\n", {key: value}), (f"{section}: {{{name}: {value}}}\n", {})):
        base = "model: {name_or_path: some/model}\ndata: {train: train.jsonl}\n"
        with pytest.raises(UserError) as error:
            load(tmp_path, text.replace(f"{section}2:\n", "") if overrides else base + text, overrides)
        assert str(error.value).count(key) == 1, str(error.value)
