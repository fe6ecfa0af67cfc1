"""What a person meets at the terminal: exit statuses, one-line errors, what is answered before the libraries load."""

import contextlib
import importlib
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_recipe, run_script, write_jsonl
from forks import command_line, fork_script
from rich.table import Table

from recipes.utils.config import key_names
from recipes.utils.console import (
    CommandLine,
    RunEnded,
    UserError,
    command,
    disk_error,
    find_data_files,
    is_main_process,
    near,
    out,
    parse,
    print_table,
    read_flags,
    read_yaml,
    recipe_parser,
    run_main,
    say,
    time_limit,
    training_parser,
)  # fmt: skip
from recipes.utils.names import NAMES_ELSEWHERE, SECTION_NAMES

GOES_ON = "a training run goes on"
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
        (
            "data:\n  train: my.yaml\n",
            ["--traning.lr=8"],
            "unknown section `traning`; did you mean `training`?",
        ),
        ("data:\n  train: my.yaml\n", ["--peft.r=8"], "--peft.r: unknown section `peft`; there are model, data, lora"),
        ("data:\n  train: gone.jsonl\n", ["--data.train", "gone/*.jsonl"], "gone/*.jsonl: no file matches"),
    ],
    ids=["syntax", "section", "config", "flag", "data", "slip", "foreign", "glob"],
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
def test_what_only_the_libraries_can_judge_is_left_to_them(config_file, words):
    recipe, *words = [str(config_file()) if word == "CONFIG" else word for word in words]
    command_line(importlib.import_module(f"recipes.{recipe.removesuffix('.py')}"), words)


def test_the_libraries_are_imported_once_the_first_look_found_no_slip(config_file, no_torch):
    result = run_script("recipes/sft_lora.py", config_file(), **no_torch)
    assert (result.returncode, result.stderr) == (1, "torch was imported\n")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--lora.rank", "8", "--lora.rank: `lora.rank` is no key of these libraries (any more); now: lora.r"),
        ("--training.lr", "1e-4", "now: training.learning_rate"),
        ("--training.bf16", "true", "--training.bf16: `training.bf16` is refused: it follows model.dtype"),
        ("--training.learning_rate", "fast", "--training.learning_rate: expected float, got 'fast'"),
        ("--lora.r", "0", "--lora.r: 0 is not between 1 and 100000"),
        ("--loar.r", "8", "--loar.r: unknown section `loar`; did you mean `lora`?"),
    ],
)
def test_a_slip_in_a_name_or_a_number_is_answered_before_the_imports(config_file, no_torch, flag, value, message):
    result = run_script("recipes/sft_lora.py", config_file(), flag, value, **no_torch)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_a_slip_in_the_file_is_answered_before_the_imports_with_its_line(config_file, no_torch):
    path = config_file(training={"learning_rate": 5000.0})
    line = path.read_text().splitlines().index("  learning_rate: 5000.0") + 1
    told = f"error: {path}:{line}: training.learning_rate: 5000.0 is not between 1e-12 and 1000.0\n"
    result = run_script("recipes/sft_lora.py", path, **no_torch)
    assert (result.returncode, result.stderr) == (2, told), "the key once"


def test_no_name_of_another_tool_is_a_key_of_the_libraries():
    """Else a real key would be refused."""
    found = {name: section for section in SECTION_NAMES for name in key_names(section) if name in NAMES_ELSEWHERE}
    assert found == {}


@pytest.mark.parametrize("path", ["runs/x/run.json", "runs/x"])
def test_a_run_in_the_place_of_a_config_is_answered_with_the_flag_for_it(path, no_torch, tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "run.json").write_text("{}")
    result = run_script(ROOT / "recipes/sft_lora.py", path, cwd=tmp_path, **no_torch)
    assert (result.returncode, f"--from-run {path}\n" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("sections", "flags", "message"),
    [
        ({"training": {"learning_rat": 1}}, [], "did you mean `training.learning_rate`?"),
        ({}, ["--training.learning_rate", "fast"], "error: --training.learning_rate: expected float"),
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
    """In one process, through the very function that the scripts call; the next test goes through the script."""
    assert run_recipe("sft_lora", config_file(**sections), *flags) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 2
    assert not (tmp_path / "run").exists()


def test_a_bad_json_line_ends_the_script_with_status_2_and_its_place(config_file, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion"}\n')
    result = fork_script("recipes/sft_lora.py", config_file(data={"train": str(tmp_path / "bad.jsonl")}), folder=ROOT)
    where = os.path.relpath(tmp_path / "bad.jsonl", ROOT)
    told = f"error: {where}:2: not JSON: Expecting ':' delimiter (column 29); mend this line, or remove it\n"
    assert (result.returncode, result.stderr) == (2, told)
    assert not (tmp_path / "run").exists()


def test_alpaca_rows_of_a_folder_say_to_name_the_files(config_file, tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [])
    assert run_recipe("sft_lora", config_file(data={"train": str(tmp_path)})) == 2
    assert "it is a folder" in capsys.readouterr().err


def words(*argv, **options) -> CommandLine:
    return parse(recipe_parser("", **options), list(argv))


def raises(error):
    def main(given):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("broken"), 2, "error: broken\n"),
        (RunEnded("failed", "no room"), 1, "failed: no room\n"),
        (RunEnded("diverged", "NaN at step 3"), 3, "diverged: NaN at step 3\n"),
        (RunEnded("stopped", "stopped after checkpoint-4"), 75, "stopped after checkpoint-4\n"),
        (
            KeyboardInterrupt(),
            1,
            "interrupted; a training run goes on from its last complete checkpoint with --resume\n",
        ),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_a_recipe_raises_is_a_line_and_a_status(error, status, said, capsys):
    assert run_main(raises(error), words()) == status
    assert capsys.readouterr().err == said


def test_what_a_recipe_returns_is_its_status():
    assert [run_main(lambda given, status=status: status, words()) for status in (None, 0, 4, 5)] == [0, 0, 4, 5]


def test_traceback_shows_where_a_user_error_arose(capsys):
    assert run_main(raises(UserError("broken")), words("--traceback")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(raises(ZeroDivisionError()), words())


def test_another_process_tells_what_it_alone_has_met_and_nothing_else(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()
    say("hello")
    print_table("table", {"a": 1})
    assert run_main(raises(RunEnded("stopped", "stopped")), words()) == 75
    assert run_main(raises(UserError("broken")), words()) == 2
    assert capsys.readouterr() == ("", "[process 1] error: broken\n")


def test_files_that_are_not_utf_8_are_told_by_line_or_name(tmp_path):
    (tmp_path / "my.yaml").write_bytes(b"model:\n  name_or_path: caf\xe9\n")
    with pytest.raises(UserError, match="my.yaml:2: is not UTF-8; save the file as UTF-8"):
        list(read_yaml(tmp_path / "my.yaml"))
    (tmp_path / "my.yaml").write_text("model:\n  name_or_path: x\n", encoding="utf-8-sig")
    assert list(read_yaml(tmp_path / "my.yaml")) == [("model.name_or_path", "x", 2)]
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl")).write_text("{}")
    with pytest.raises(UserError, match=r"caf.udce9.jsonl': this name is not UTF-8; rename the file"):
        find_data_files(str(tmp_path / "*.jsonl"))


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_no_letter_that_a_terminal_lacks_ends_anything(encoding, monkeypatch, tmp_path):
    """In lines and tables a question mark stands in its place."""
    written = tmp_path / "log"
    with open(written, "w", encoding=encoding) as log:
        monkeypatch.setattr(sys, "stdout", log)
        run_main(
            lambda _: say("这是 0 号 · × ▁ é") or print_table("№", {"数": "値"}),
            CommandLine({"traceback": False}, {}, {}),
        )
        assert log.errors == "strict"
    assert "?? 0 ? " in written.read_text(encoding=encoding)


def test_lines_go_where_standard_output_goes_at_the_time(capsys):
    with contextlib.redirect_stdout(sys.stderr):
        say("to standard error [bold] as it stands")
        print_table("title", {"shown": 1, "left out": None})
    say("to standard output")
    told, errors = capsys.readouterr()
    assert told == "to standard output\n"
    assert "to standard error [bold] as it stands\n" in errors
    assert ("shown" in errors, "left out" in errors) == (True, False)
    assert (out.stderr, out._file) == (False, None)


def test_a_wide_line_is_not_broken():
    with contextlib.redirect_stdout(io.StringIO()) as told:
        say("x" * 500)
    assert told.getvalue() == "x" * 500 + "\n"


def test_the_nearest_name_is_found_where_one_is_near():
    assert near("learning_rat", ["max_steps", "learning_rate"]) == "learning_rate"
    assert near("xyz", ["max_steps"]) is None


def test_a_command_line_is_read_once(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("model:\n  name_or_path: x\nlora:\n  r: 8\n")
    given = parse(training_parser(""), [str(path), "--training.max_steps", "-1", "--dry-run", "--lora.r=4"])
    assert given.options == {
        "config": str(path), "from_run": None, "dry_run": True, "resume": None, "accept_changes": False,
        "max_hours": None, "traceback": False,
    }  # fmt: skip
    assert given.flags == {"training.max_steps": -1, "lora.r": 4}
    assert given.yaml == {"model.name_or_path": ("x", f"{path}:2"), "lora.r": (8, f"{path}:4")}


@pytest.mark.parametrize(
    "argv", [["--dry"], ["--max-hours", "long", "my.yaml"], [], ["a.yaml", "--from-run", "b"]], ids=" ".join
)
def test_words_that_no_recipe_takes_end_with_status_2(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, UserError)) as ended:
        parse(training_parser(""), argv)
    assert ended.type is UserError or ended.value.code == 2


def test_a_recipe_without_a_config_takes_no_keys(capsys):
    for argv in (["--lora.r", "3"], ["stray"], ["--lora.r=3"]):
        with pytest.raises(SystemExit) as ended:
            parse(recipe_parser(""), argv)
        assert ended.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_flags_are_read_as_yaml():
    flags = read_flags(["--training.learning_rate", "2e-4", "--lora.target_modules=[q_proj, k_proj]", "--data.x", "no"])
    assert flags == {"training.learning_rate": 2e-4, "lora.target_modules": ["q_proj", "k_proj"], "data.x": "no"}
    assert read_flags(["--data.train", "*.jsonl", "--a.b=1=2"]) == {"data.train": "*.jsonl", "a.b": "1=2"}


def test_each_value_of_a_file_comes_with_its_line(tmp_path):
    (tmp_path / "a.yaml").write_text("data:\n  train: [a, b]\n\n  share: 1_000\nmodel: {dtype: float32}\nlora:\n")
    found = list(read_yaml(tmp_path / "a.yaml"))
    assert found == [("data.train", ["a", "b"], 2), ("data.share", 1000, 4), ("model.dtype", "float32", 5)]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("lora:\n  r: 0x_\n", 2, "`lora.r`: not a value that YAML has"),
        ("lora:\n  r: !!int a\n", 2, "`lora.r`: not a value that YAML has"),
        ("lora:\n  r: !!timestamp soon\n", 2, "`lora.r`: not a value that YAML has"),
        ("lora:\n  r: !!python/name:os.system\n", 2, "`lora.r`: not a value that YAML has"),
        ("lora:\n  ? [r]\n  : 1\n", 2, "a key must be a word"),
        ("? {a: b}\n: {c: d}\n", 1, "a key must be a word"),
        ("data:\n  train: " + "[" * 5000 + "]" * 5000, 2, "nested too deeply"),
        ("data:\n  train: &x [*x]\n", 2, "an alias stands within what it names"),
        (BOMB, 5, "over 10,000 values, aliases written out"),
        (BOMB.replace("[", "{<<: [").replace("]\n", "]}\n"), 5, "over 10,000 values"),
        ('model:\n  name_or_path: "a\\0b"\n', 2, "a NUL, or half a character"),
        ('model:\n  name_or_path: "\\ud800"\n', 2, "a NUL, or half a character"),
        ("model:\n  name_or_path: \x07\n", 2, "special characters are not allowed"),
        (b"model:\n  name_or_path: \xff\n", 2, "is not UTF-8"),
    ],
)
def test_yaml_that_holds_no_config_is_an_error_of_the_file_and_its_line(text, line, message, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with time_limit(60, AssertionError("it takes too long")), pytest.raises(UserError) as error:
        list(read_yaml(path))
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_too_large_for_a_config_is_not_read_as_one(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"a: b\n" * 300_000)
    with pytest.raises(UserError, match=r"a\.yaml: has 1,500,000 bytes, which no config has"):
        list(read_yaml(tmp_path / "a.yaml"))


def test_a_day_is_a_word_as_people_mean_it(tmp_path):
    (tmp_path / "a.yaml").write_text("training:\n  run_name: 2024-01-31\n  project: 2024-13-45\n")
    assert [value for _, value, _ in read_yaml(tmp_path / "a.yaml")] == ["2024-01-31", "2024-13-45"]


@pytest.mark.parametrize("value", ["0x_", "!!int a", "[" * 5000 + "]" * 5000])
def test_a_flag_without_a_value_that_yaml_has_is_a_user_error(value):
    with pytest.raises(UserError, match=r"^--lora\.r: (not a value that YAML has|nested too deeply)"):
        read_flags(["--lora.r", value])


ESCAPES = "\x1b]52;c;ZWNobyBoaQ==\x07 \x9b2J \u202eback\x7f"


def test_what_a_terminal_would_act_upon_is_shown_and_never_sent(capsys):
    say(f"answer {ESCAPES}\n\tkept")
    print_table(f"title {ESCAPES}", {f"name {ESCAPES}": f"value {ESCAPES}"})
    assert run_main(raises(UserError(f"row {ESCAPES}")), words()) == 2
    shown = "".join(capsys.readouterr())
    assert not set("\x1b\x07\x9b\u202e\x7f") & set(shown)
    assert shown.count(r"\x1b]52;c;ZWNobyBoaQ==\x07") == 5
    assert "\n\tkept" in shown.replace("        kept", "\tkept")


def test_a_command_to_paste_is_quoted():
    assert command("chat", "my run; rm -rf x") == "python recipes/chat.py 'my run; rm -rf x'"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "a/b"), "a/b: No space left on device"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "failed writing file"),
        (ValueError("something else"), None),
        (BrokenPipeError(32, "Broken pipe"), None),
    ],
)
def test_a_disk_that_fails_is_one_line_whichever_library_met_it(error, said, capsys):
    if said is None:
        assert disk_error(error) is None
        return
    assert said in disk_error(error)
    assert run_main(raises(error), words()) == 1
    assert capsys.readouterr().err.startswith("failed: ")


def test_what_takes_too_long_ends_and_outer_limits_stay():
    with time_limit(60, AssertionError()):
        with pytest.raises(ValueError, match="too long"), time_limit(0.05, ValueError("too long")):
            re.match("(a+)+$", "a" * 40 + "b")
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


TALKS = """
import sys, time
from recipes.utils.console import CommandLine, run_main, say
def main(given):
    for number in range(2000):
        say(f"line {number}")
    open("done", "w").close()
sys.exit(run_main(main, CommandLine({"traceback": False}, {}, {})))
"""


@pytest.mark.parametrize("sink", ["| head -1", "> /dev/full", "2>&1 | head -1", ">&-", ">&- 2>&-"])
def test_outputs_that_go_away_end_no_work(sink, tmp_path):
    (tmp_path / "talks.py").write_text(TALKS)
    command = f"{sys.executable} talks.py {sink}; echo ${{PIPESTATUS[0]}} > status"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (tmp_path / "done").exists(), result.stderr
    assert (tmp_path / "status").read_text() == "0\n"
    full = "warning: not all that was printed could be written: No space left on device\n"
    assert result.stderr == (full if "full" in sink else "")


def test_a_table_on_a_narrow_terminal_wraps_and_loses_nothing(monkeypatch):
    from recipes.utils import console

    narrow = console._Console(file=io.StringIO(), width=44, highlight=False)
    monkeypatch.setattr("recipes.utils.console.out", narrow)
    table = Table("", "per_device_train_batch_size_of_the_first", "difference, 95 % interval", box=None)
    table.add_row("gradient_accumulation_steps_and_more", "a" * 50, "−3.2655, −3.4114 to −3.1207")
    narrow.print(table)
    print_table("run", {"name": "b" * 90})
    shown = narrow.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 44
    assert "…" not in shown
    assert (shown.count("a") >= 50, shown.count("b")) == (True, 90 + 1), "and the b of batch"
