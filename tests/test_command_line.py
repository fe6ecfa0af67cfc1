"""What a person meets at the terminal: exit codes, one-line errors, nothing left behind."""

import os
import signal

from recipes.utils import console
from recipes.utils.config import load_config, parse_command_line
from recipes.utils.config_keys import REFUSED, SECTIONS, ModelOptions, key_names
from recipes.utils.console import UserError
from recipes.utils.model import check_machine, choose_attention, load_base_model, load_model_config

import pytest
import torch
from conftest import ROOT, TINY, run_script, write_jsonl

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if path.name != "__init__.py")


@pytest.fixture
def no_torch(tmp_path):
    """An environment in which nothing can import torch, and so none of the libraries that take seconds."""
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "torch.py").write_text("raise SystemExit('torch was imported')")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path / "without"), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_each_recipe_shows_the_command_to_type_before_it_imports_torch(recipe, no_torch):
    result = run_script(recipe, "--help", **no_torch)
    assert result.returncode == 0
    assert f"python recipes/{recipe.name}" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("model:\n  name_or_path: [x\n", [], "my.yaml:3: not YAML"),
        ("modell:\n  name_or_path: x\n", [], "my.yaml:2: unknown section `modell`; did you mean `model`?"),
        (None, [], "my.yaml: no such config file"),
        ("data:\n  train: my.yaml\n", ["--lora.r=8", "--lora.r=16"], "--lora.r is given twice"),
        ("data:\n  train: gone.jsonl\n", [], "gone.jsonl: no such data file"),
        ("data:\n  train: gone.jsonl\n", ["--data.train", "gone/*.jsonl"], "gone/*.jsonl: no file matches"),
    ],
    ids=["syntax", "section", "config", "flag", "data", "glob"],
)
def test_slips_in_files_and_flags_are_told_before_torch_is_imported(text, flags, message, no_torch, tmp_path):
    if text:
        (tmp_path / "my.yaml").write_text(text)
    reads_rows = ["sft_lora", "sft_qlora", "inspect_data"]
    # a plan reads no rows, and a sweep takes lists of files
    for recipe in reads_rows if "gone" in message else [*reads_rows, "plan_run", "sweep"]:
        result = run_script(ROOT / "recipes" / f"{recipe}.py", "my.yaml", *flags, cwd=tmp_path, **no_torch)
        assert result.returncode == 2, recipe
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_during_the_imports_is_one_word(config_file, no_torch, tmp_path):
    (tmp_path / "without" / "torch.py").write_text("raise KeyboardInterrupt")
    result = run_script("recipes/sft_lora.py", config_file(), **no_torch)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "interrupted\n")


@pytest.mark.parametrize(
    "words",
    [
        ["sft_lora.py", "CONFIG"],
        ["sft_lora.py", "--training.max_steps", "-1", "CONFIG"],
        ["sft_lora.py", "--from-run", "some/run.json", "--training.output_dir", "elsewhere"],
        ["sft_lora.py", "CONFIG", "--data.train", "[1, 2]"],
        ["sft_lora.py", "CONFIG", "--data.validation", "'0.05'"],
        ["sweep.py", "CONFIG", "--data.train", "a.jsonl,b.jsonl"],
        ["sweep.py", "CONFIG", "--data.validation", "0.05..0.1"],
        ["plan_run.py", "CONFIG", "--data.train", "gone.jsonl"],
        ["plan_run.py"],
        ["merge_adapter.py"],
    ],
    ids=" ".join,
)
def test_what_only_the_libraries_can_judge_is_left_to_them(config_file, no_torch, words):
    recipe, *words = [str(config_file()) if word == "CONFIG" else word for word in words]
    result = run_script(f"recipes/{recipe}", *words, **no_torch)
    assert (result.returncode, result.stderr) == (1, "torch was imported\n")


def test_a_run_json_in_the_place_of_a_config_is_answered_with_the_flag_for_it(no_torch):
    result = run_script("recipes/sft_lora.py", "runs/x/run.json", **no_torch)
    assert (result.returncode, "--from-run runs/x/run.json" in result.stderr) == (2, True)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_help_all_lists_every_key_that_a_config_may_hold(method, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command_line(["--help", "all"], method, "")
    assert not ended.value.code
    listed = {word[2:] for word in capsys.readouterr().out.split() if word.startswith("--") and "." in word}
    sections = [section for section in SECTIONS if (section, method) != ("quantization", "lora")]
    taken = {f"{section}.{name}" for section in sections for name in key_names(section)} - set(REFUSED)
    assert listed == taken
    assert "training.learning_rate" in listed


@pytest.mark.parametrize(
    ("sections", "flags", "message"),
    [
        ({"training": {"learning_rat": 1}}, [], "did you mean `training.learning_rate`?"),
        ({}, ["--training.learning_rate", "fast"], "--training.learning_rate: training.learning_rate: expected float"),
        ({"data": {"train": "nowhere.jsonl"}}, [], "nowhere.jsonl: no such data file"),
        ({"quantization": {"load_in_4bit": True}}, [], "recipes/sft_qlora.py"),
        ({"model": {"name_or_path": "nowhere/model"}}, [], "nowhere/model"),
        ({"model": {"attn_implementation": "flash_attention_2"}}, [], "pip install"),
        ({"model": {"adapter": "nowhere"}}, [], "nowhere is no adapter folder"),
        ({"lora": {"target_modules": ["nope"]}}, [], "nope"),
        ({"lora": {"target_modules": ["lm_head"]}}, [], "lm_head"),
        ({"training": {"report_to": "comet_ml"}}, [], "comet"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_ends_with_status_2_one_line_and_no_folder(config_file, tmp_path, sections, flags, message, capsys):
    """In one process, through the very function that the scripts call; the next test goes through a real script."""
    from recipes import sft_lora

    path = config_file(**sections)
    assert console.run(sft_lora.main, [str(path), *flags]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 2
    assert not (tmp_path / "run").exists()


def test_a_bad_json_line_ends_a_real_script_with_status_2_and_its_place(config_file, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"}\n')
    path = config_file(data={"train": str(tmp_path / "bad.jsonl")})
    result = run_script("recipes/sft_lora.py", path)
    assert (result.returncode, result.stdout) == (2, "")
    where = os.path.relpath(tmp_path / "bad.jsonl", ROOT)
    assert (
        result.stderr
        == f"error: {where}:2: not JSON: Expecting ':' delimiter (column 29); mend this line, or remove it\n"
    )
    assert not (tmp_path / "run").exists()


def test_traceback_shows_where_a_user_error_arose(capsys):
    def main(argv):
        assert argv == []
        raise UserError("broken")

    assert console.run(main, ["--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        console.run(main, [])


def machine(monkeypatch, gpus, capability=(9, 0), bfloat16=True, flash=False):
    """A machine of another kind: only the questions that the checks ask torch are answered differently."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setattr("recipes.utils.model.is_flash_attn_2_available", lambda: flash)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


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
def test_attention_is_chosen_with_its_reason(monkeypatch, gpus, capability, flash, dtype, chosen, reason):
    machine(monkeypatch, gpus, capability, flash=flash)
    found, why = choose_attention(ModelOptions("x", dtype=dtype), use_cpu=gpus == 0)
    assert found == chosen
    assert reason in why
    if chosen == "sdpa":
        with pytest.raises(UserError, match="cannot be had"):
            choose_attention(ModelOptions("x", dtype=dtype, attn_implementation="flash_attention_2"), use_cpu=gpus == 0)


def test_attention_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="unknown 'flash2'"):
        choose_attention(ModelOptions("x", attn_implementation="flash2"), use_cpu=True)


def checked(config_file, monkeypatch, model=None, training=None, **kind):
    """`check_machine` for a config, on a machine of some kind; the config itself is read on this one."""
    config = load_config(config_file(model=model or {}, training=training or {}), {}, "lora")
    config.training["use_cpu"] = config.cpu_asked_for or kind["gpus"] == 0
    machine(monkeypatch, **kind)
    check_machine(config)


def test_several_gpus_without_a_launcher_are_refused_with_the_command(config_file, monkeypatch):
    with pytest.raises(UserError, match=r"2 GPUs .*accelerate launch --num_processes 2 .*CUDA_VISIBLE_DEVICES=0"):
        checked(config_file, monkeypatch, gpus=2)


def test_bfloat16_on_a_card_without_it_is_refused_with_the_dtypes_that_work(config_file, monkeypatch):
    machine(monkeypatch, gpus=1, bfloat16=False)
    with pytest.raises(UserError, match="Some GPU has no bfloat16; use --model.dtype float16, or float32 for Qwen2"):
        load_config(config_file(model={"dtype": "bfloat16"}), {}, "lora")


def test_qwen2_in_float16_is_refused(config_file, monkeypatch):
    with pytest.raises(UserError, match="NaN in float16"):
        checked(config_file, monkeypatch, gpus=1, model={"dtype": "float16"})


@pytest.fixture
def seven_billion(tmp_path):
    """A folder with Mistral-7B's dimensions and no weights."""
    from transformers import MistralConfig

    MistralConfig(vocab_size=32768, sliding_window=None, dtype="bfloat16").save_pretrained(tmp_path / "7b")
    return str(tmp_path / "7b")


def test_7b_without_a_gpu_is_said_in_one_line_and_can_be_asked_for(config_file, monkeypatch, seven_billion):
    with pytest.raises(UserError, match=r"7.2 billion parameters and this machine has no GPU") as error:
        checked(config_file, monkeypatch, gpus=0, model={"name_or_path": seven_billion})
    assert len(str(error.value).splitlines()) == 1
    checked(config_file, monkeypatch, gpus=0, model={"name_or_path": seven_billion}, training={"use_cpu": True})


def test_a_gpu_that_others_fill_is_one_line(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr("recipes.utils.model.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(UserError, match="nvidia-smi shows what else runs there"):
        load_base_model(ModelOptions(str(TINY / "base")), "sdpa", use_cpu=False)


def test_a_hub_name_without_network_is_one_line():
    with pytest.raises(
        UserError, match="mistralai/none: there is no such folder here, and the Hugging Face hub"
    ) as error:
        load_model_config(ModelOptions("mistralai/none"))
    assert len(str(error.value).splitlines()) == 1


def test_alpaca_rows_of_a_folder_say_to_name_the_files(config_file, tmp_path, capsys):
    from recipes import sft_lora

    write_jsonl(tmp_path / "a.jsonl", [])
    assert console.run(sft_lora.main, [str(config_file(data={"train": str(tmp_path)}))]) == 2
    assert "it is a folder" in capsys.readouterr().err


def test_the_tiny_splits_share_no_row():
    rows = {name: (TINY / f"{name}.jsonl").read_text().splitlines() for name in ("train", "validation", "test")}
    assert len(set().union(*rows.values())) == sum(len(part) for part in rows.values())
