"""Called from Python, the recipes speak of arguments and calls; in a notebook they have one display, which wraps."""

import functools
import html
import re

import pytest
from conftest import ROOT, TINY, read_jsonl, write_jsonl
from rich.table import Table
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

import finetune
from recipes.utils.console import UserError, out, print_table, say
from recipes.utils.monitoring import Progress
from recipes.utils.notebook import Page, in_notebook, in_python

words = functools.partial(in_python, names=finetune.ARGUMENTS)


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("This gives more: --training.max_steps -1", "This gives more: training={'max_steps': -1}"),
        ("99 % fit in --training.max_length 1024.", "99 % fit in training={'max_length': 1024}."),
        (
            "--training.per_device_train_batch_size 1 --training.packing false    the same",
            "batch_size=1, training={'packing': False}    the same",
        ),
        ("one for full fine-tuning: --training.learning_rate 2e-4", "one for full fine-tuning: learning_rate=0.0002"),
        ("needs rows: --data.validation 0.05, or a file", "needs rows: val_dataset_path=0.05, or a file"),
        (
            "without: --training.eval_strategy no --training.load_best_model_at_end false",
            "without: training={'eval_strategy': 'no', 'load_best_model_at_end': False}",
        ),
        (
            "the head: --lora.modules_to_save '[lm_head]' (1 GB)",
            "the head: lora={'modules_to_save': ['lm_head']} (1 GB)",
        ),
        ("--lora.r: 0 is not between 1 and 9", "lora_rank: 0 is not between 1 and 9"),
        ("--lora.lora_alpha: 0 is not", "lora.lora_alpha: 0 is not"),
        ("give a folder as model.name_or_path", "give a folder as model_name"),
        ("my.yaml:3: data.train: names no rows", "my.yaml:3: data.train: names no rows"),
        ("the same command with --resume goes on", 'the same command with resume="latest" goes on'),
        ("or go on with --accept-changes", "or go on with accept_changes=True"),
        ("elsewhere: --base-model PATH_OR_NAME", "elsewhere: base_model=PATH_OR_NAME"),
        ("is over --max-kl 0.5; nothing", "is over max_kl=0.5; nothing"),
        ("next:  python recipes/evaluate_adapter.py runs/x", "next:  evaluate_adapter('runs/x')"),
        (
            "next: python recipes/evaluate_adapter.py 'my runs/x' --model m",
            "next: evaluate_adapter('my runs/x', model='m')",
        ),
        ("go on with: python recipes/sft_lora.py CONFIG --resume", 'go on with: train_lora(..., resume="latest")'),
        ("in 4 bit: recipes/sft_qlora.py takes it", "in 4 bit: train_qlora takes it"),
        ("python recipes/chat.py runs/x", "python recipes/chat.py runs/x"),
        ("rows -- of two -- end-of-turn --- 1", "rows -- of two -- end-of-turn --- 1"),
    ],
)
def test_flags_and_commands_are_arguments_and_calls_at_python(told, meant):
    assert words(told) == meant


def test_a_command_that_is_no_call_can_be_run_from_a_cell_of_a_notebook():
    told = "merged: m\nnext: python recipes/evaluate_adapter.py r\n      python recipes/chat.py m"
    assert words(told, shell="!") == "merged: m\nnext: evaluate_adapter('r')\n      !python recipes/chat.py m"


def test_errors_and_lines_of_a_call_are_pythons_and_those_of_the_command_line_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = str(write_jsonl(tmp_path / "rows.jsonl", read_jsonl(TINY / "train.jsonl")[:8]))
    for wrong, told in (
        ({"training": {"eval_strategy": "epoch"}}, "needs validation rows: val_dataset_path=0.05, or"),
        ({"lora_rank": 0}, "lora_rank: 0 is not between"),
        ({"learning_rate": "fast"}, "learning_rate: expected float"),
    ):
        with pytest.raises(UserError) as error:
            finetune.train_lora(str(TINY / "base"), rows, **wrong)
        assert told in str(error.value)
        assert "--" not in str(error.value)
        assert error.value._render_traceback_() == [f"UserError: {error.value}"], "a notebook shows it alone"
    finetune.train_lora(str(TINY / "base"), rows, epochs=1, dry_run=True, learning_rate=1e-5)
    told = capsys.readouterr().out
    assert "learning_rate=0.0002" in told
    assert not re.search(r"--[a-z]", told)
    say("as on the command line: --lora.r 8")
    assert "--lora.r 8" in capsys.readouterr().out


class Kept(Page):
    """A page that nothing shows."""

    def _draw(self):
        self.drawn += 1


@pytest.fixture
def page(monkeypatch):
    page = Kept(words)
    monkeypatch.setattr(out, "page", page)
    return page


def test_what_is_printed_goes_to_the_one_display_and_not_to_the_output(page, capsys):
    say("more: --lora.r 8, <b>")
    print_table("the run", {"model": "a" * 300, "not used": None, "mend": "--resume"})
    scores = Table("", "base", "adapter", title="scores")
    scores.add_row("loss", "1.0", "0.5")
    out.print(scores, markup=False)
    shown = page.picture()
    assert capsys.readouterr().out == ""
    text = re.sub(r"<[^>]+>", "\n", shown["text/html"])
    for part in ("more: lora_rank=8, <b>", "the run", "a" * 300, 'resume="latest"', "scores", "adapter", "0.5"):
        assert part in html.unescape(text)
        assert part in shown["text/plain"] or part == "adapter"
    lines = re.findall(r"<(?:div|td|th) [^>]*>", shown["text/html"])[1:]
    assert len(lines) == 3 + 4 + 6, "a line and two titles, cells"
    assert all("white-space:pre;" not in line and "overflow-wrap" in line for line in lines), "they wrap"


def test_the_progress_of_a_run_is_a_bar_of_the_display(page, config_file, capsys):
    from recipes.sft_lora import train_lora
    from recipes.utils.config import load_config

    run = train_lora(load_config(config_file(training={"max_steps": 4}), {}, "lora"))
    shown = page.picture()["text/html"]
    assert shown.count("<progress") == 1
    assert 'max="4" value="4"' in shown
    assert shown.index("<progress") < shown.index(f"adapter: {run}"), "what comes after the run stands below it"
    assert "validation loss" in shown
    assert capsys.readouterr().out == "", "not a line beside it"


def test_the_librarys_own_display_is_left_out_whichever_it_is():
    """In a notebook it is a table that grows beside ours."""
    assert DEFAULT_PROGRESS_CALLBACK in Progress.in_place_of
    assert not in_notebook()


@pytest.mark.slow
def test_in_a_real_notebook_each_call_has_one_output(tmp_path):
    """With nbclient and ipykernel, where they are installed."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    rows = write_jsonl(tmp_path / "rows.jsonl", read_jsonl(TINY / "train.jsonl")[:24])
    base = f"{str(TINY / 'base')!r}, {str(rows)!r}"
    cells = [
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})",
        "from finetune import evaluate_adapter, merge_adapter, train_lora",
        f"run = train_lora({base}, val_dataset_path=0.2, epochs=4, batch_size=1, model={{'dtype': 'float32'}})",
        "scores = evaluate_adapter(run, max_rows=2)",
        "merged = merge_adapter(run, rows=2)",
        f"train_lora({base}, lora_alpha=32)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300, allow_errors=True).execute(cwd=str(tmp_path))
    first, second, *calls, wrong = [cell.outputs for cell in notebook.cells]
    assert first == second == []
    for outputs in calls:
        assert [output.output_type for output in outputs] == ["display_data"], outputs
        assert not re.search(r"(?<!-)--[a-z]", outputs[0].data["text/plain"])
    assert "".join(wrong[0].traceback).startswith("UserError: lora_alpha: further settings are given by section")
