"""Real servers on this machine: what they answer is the model that was evaluated, and each planted fault is named.

`pip install "transformers[serving]"` brings the first, `pip install xllamacpp` llama.cpp's. Its converter is looked for
in LLAMA_CPP, the folder of llama.cpp's source, which llama-cpp-python's carries in vendor/:
`pip download --no-deps --no-binary :all: llama-cpp-python`."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from served import CHATML, DEFAULT, ROWS, scored_run
from transformers.utils.import_utils import is_serve_available

from recipes.chat import chat
from recipes.check_served import check_served

LLAMA = Path(os.environ.get("LLAMA_CPP", "/nowhere"))
# The converter knows a pre-tokenizer by a hash of what it gives, and has never seen the tiny base; it is Qwen2's. That
# base knows bytes alone, and llama.cpp wants a merge: one of two bytes that no text has side by side. The converter
# writes 8 bits at least; the library that it writes with has 4, as llama-quantize makes them.
CONVERT = """
import runpy, sys
source, few_bits = sys.argv[1], sys.argv[2] == "q4_0"
sys.path[:0] = [source, source + "/gguf-py"]
import gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
load = gguf.SpecialVocab.__init__
def with_a_merge(self, *words, **named):
    load(self, *words, **named)
    self.merges = self.merges or ["\u0141 \u0143"]
gguf.SpecialVocab.__init__ = with_a_merge
if few_bits:
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    TextModel.tensor_force_quant = lambda self, name, new, bid, dims: q4_0 if dims == 2 and "blk." in new else False
sys.argv[1:3] = []
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""
SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 2048, 1, 1
server = xllamacpp.Server(params)
time.sleep(3600)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return scored_run(tmp_path_factory.mktemp("served"))


@contextlib.contextmanager
def running(log: Path, *command):
    """The address of the server that `command` starts, once it answers; {port} in it is a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(word).replace("{port}", str(port)) for word in command]
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def spoilt(folder: Path, merged: Path, fault: str) -> Path:
    """A copy of the merged folder with `fault`."""
    copy = shutil.copytree(merged, folder / fault.replace(" ", "-"))
    if fault == "another template":
        write_template(copy, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    if fault == "BOS twice":
        write_template(copy, "{{ bos_token }}{{ bos_token }}" + DEFAULT + plain(CHATML))
    if fault == "no stop id":
        for name in ("generation_config.json", "config.json"):
            settings = json.loads((copy / name).read_text())
            (copy / name).write_text(json.dumps(settings | {"eos_token_id": 300}))  # a token that nothing has taught
    if fault == "few bits":
        weights = load_file(copy / "model.safetensors")
        save_file({name: rounded(weight) if "proj" in name else weight for name, weight in weights.items()},
                  copy / "model.safetensors", {"format": "pt"})  # fmt: skip
    return copy


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """To 2 bits, with a scale a row; a bias as it is."""
    step = weight.abs().amax(-1, keepdim=True)
    return (weight / step).round() * step if weight.dim() == 2 else weight


def plain(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def write_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))


CAUSES = {
    "another template": "another chat template",
    "BOS twice": "BOS (<|endoftext|>) twice",
    "no stop id": "the stop token <|im_end|> is not set",
    "the base": "answers are the base's",
    "few bits": "weights rounded to few bits",
}


@pytest.mark.skipif(not is_serve_available(), reason='pip install "transformers[serving]" brings the server')
@pytest.mark.parametrize("fault", ["", *CAUSES])
def test_transformers_serve(scored, tmp_path, fault, capsys):
    merged = scored / "merged"
    folder = scored.parent / "base" if fault == "the base" else spoilt(tmp_path, merged, fault) if fault else merged
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", folder]
    with running(tmp_path / "log", *command, "--port", "{port}", "--host", "127.0.0.1", "--device", "cpu") as url:
        found = check_served(scored, url, str(folder))
        capsys.readouterr()
        talk = chat(url=url, model=str(folder), max_new_tokens=60, lines=["Hello", "/reset", "42 places to Naples."])
        answered = capsys.readouterr().out
        here = chat(folder, max_new_tokens=60, lines=["Hello", "/reset", "42 places to Naples."])
    if fault:
        assert found["status"] == 4
        assert CAUSES[fault] in found["causes"][0]["what"]
        return
    assert found["status"] == 0
    assert found["equal"]["merged" if "merged" in found["equal"] else "adapter"] == ROWS
    assert found["prompt_tokens"] == [0, 0]
    assert talk == here
    assert answered == capsys.readouterr().out


def gguf(folder: Path, model: Path, kind: str) -> Path:
    """`model` as GGUF, with weights of that `kind`."""
    path = folder / f"{kind}.gguf"
    command = [sys.executable, "-c", CONVERT, LLAMA, kind, model, "--outfile", path]
    command += ["--outtype", "f32" if kind == "q4_0" else kind]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return path


LLAMA_CASES = {
    "f32": ("f32", "", None), "f16": ("f16", "", None), "q8_0": ("q8_0", "", None),
    "q4_0": ("q4_0", "", None),
    **{fault: ("f32", fault, cause) for fault, cause in CAUSES.items()},
    "no stop id": ("f32", "no stop id", None),  # which it knows by its name, <|im_end|>
}  # fmt: skip


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="pip install xllamacpp brings the server")
@pytest.mark.skipif(not (LLAMA / "convert_hf_to_gguf.py").is_file(), reason="LLAMA_CPP names no source of llama.cpp")
@pytest.mark.parametrize("case", LLAMA_CASES)
def test_llama_cpp(scored, tmp_path, case):
    kind, fault, cause = LLAMA_CASES[case]
    merged = scored / "merged"
    folder = scored.parent / "base" if fault == "the base" else spoilt(tmp_path, merged, fault) if fault else merged
    with running(tmp_path / "log", sys.executable, "-c", SERVE, gguf(tmp_path, folder, kind), "{port}") as url:
        found = check_served(scored, url)
    assert found["status"] == (4 if cause else 0), found
    assert not cause or cause in found["causes"][0]["what"], found
