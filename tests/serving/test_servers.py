"""Real servers on this machine: what they answer is the model that was evaluated, and each planted fault is named.

`pip install "transformers[serving]"` brings the first. llama.cpp's is looked for in the folder LLAMA_CPP, which holds
its source and build/bin: `pip download --no-deps --no-binary :all: llama-cpp-python` brings the source, in vendor/;
`cmake -B build && cmake --build build --target llama-server llama-quantize` builds it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from conftest import ROOT
from served import CHATML, DEFAULT, ROWS, scored_run
from transformers.utils.import_utils import is_serve_available

from recipes.chat import chat
from recipes.check_served import check_served

LLAMA = Path(os.environ.get("LLAMA_CPP", "/nowhere"))
# The converter knows a pre-tokenizer by a hash of what it gives, and has never seen the tiny base; it is Qwen2's.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(0, sys.argv[1] + "/gguf-py")
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
del sys.argv[1]
runpy.run_path(sys.path[1] + "/convert_hf_to_gguf.py", run_name="__main__")
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
    return copy


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
    """`model` as GGUF: converted as f32 or f16, then quantised to any other `kind`."""
    path, first = folder / f"{kind}.gguf", kind if kind in ("f32", "f16") else "f16"
    whole = folder / f"{first}.gguf"
    convert = [sys.executable, "-c", CONVERT, LLAMA, model, "--outfile", whole, "--outtype", first]
    commands = [convert] + [[LLAMA / "build/bin/llama-quantize", whole, path, kind]] * (kind != first)
    for command in commands:
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    return path


LLAMA_CASES = {
    "f32": ("f32", "", None), "f16": ("f16", "", None), "q8_0": ("q8_0", "", None),
    "few bits": ("q4_0", "", "weights rounded to few bits"),
    **{fault: ("f32", fault, cause) for fault, cause in CAUSES.items()},
}  # fmt: skip


@pytest.mark.skipif(not (LLAMA / "build/bin/llama-server").is_file(), reason="LLAMA_CPP names no built llama.cpp")
@pytest.mark.parametrize("case", LLAMA_CASES)
def test_llama_cpp(scored, tmp_path, case):
    kind, fault, cause = LLAMA_CASES[case]
    merged = scored / "merged"
    folder = scored.parent / "base" if fault == "the base" else spoilt(tmp_path, merged, fault) if fault else merged
    model = gguf(tmp_path, folder, kind)
    command = [LLAMA / "build/bin/llama-server", "-m", model, "--jinja", "--port", "{port}", "-c", "2048", "-t", "1"]
    with running(tmp_path / "log", *command) as url:
        found = check_served(scored, url)
    assert found["status"] == (4 if cause else 0), found
    assert not cause or cause in found["causes"][0]["what"], found
