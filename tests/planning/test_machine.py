"""What this machine can run: each part is tried, told in a line, and no secret with it."""

import bitsandbytes
import pytest
import torch
from conftest import run_recipe

from recipes.utils.config import config
from recipes.utils.planning import machine


def test_the_machine_is_told_line_by_line_and_no_secret_with_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-mine")
    monkeypatch.setenv("HF_TOKEN", "hf_anothersecret")
    monkeypatch.setattr(machine, "PINS", tmp_path / "pins.txt")
    machine.PINS.write_text(f"torch=={torch.__version__.partition('+')[0]}\npeft==0.0.1\nno-such-package==1.0\n")
    assert run_recipe("plan_run") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"ok torch {torch.__version__}" in text
    assert ", tested with 0.0.1: pip install peft==0.0.1" in text
    assert "missing no-such-package pip install -r requirements.txt" in text
    assert "ok 4 bit NF4 on cpu" in text
    assert "GB free" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        ("CUDA error: no kernel image is available for execution on the device\nCompile with ...", "for CUDA 12.6"),
        ("", "pip install -U bitsandbytes"),
    ],
)
def test_what_cannot_be_computed_with_is_told_with_the_mend(monkeypatch, error, mend):
    def fails(*_, **__):
        raise RuntimeError(error)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", fails)
    state, _, text = machine.check_four_bit()
    assert state == "missing"
    assert text.endswith(mend)
    assert "Compile" not in text


def test_4_bit_arithmetic_is_tried_and_not_only_looked_for(monkeypatch):
    assert machine.check_four_bit()[0] == "ok"
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda x, weight, quant_state: x * 2)
    assert machine.check_four_bit()[0] == "missing"


def test_a_compiler_is_looked_for_where_triton_would(monkeypatch, tmp_path):
    def compiler() -> tuple[str, str]:
        return next((state, text) for state, part, text in machine.check_machine() if part == "C compiler")

    (tmp_path / "mycc").write_text("#!/bin/sh\n")
    (tmp_path / "mycc").chmod(0o755)
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(config.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", str(tmp_path / "mycc"))
    assert compiler() == ("ok", str(tmp_path / "mycc"))
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler()[0] != "ok"  # cc alone: Triton asks for gcc and clang
    (tmp_path / "mycc").rename(tmp_path / "clang")
    assert compiler() == ("ok", str(tmp_path / "clang"))
    (tmp_path / "Python.h").unlink()
    state, text = compiler()
    assert state == ("missing" if torch.cuda.is_available() else "optional")
    assert "apt install gcc python3-dev" in text
