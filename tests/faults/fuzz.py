"""Files of any content end in what was read or in a `UserError`, in bounded time: JSONL, YAML and flags, safetensors
headers, manifests, records of runs, settings of adapters.

    python tests/faults/fuzz.py --minutes 5               all of them, each for so long
    python tests/faults/fuzz.py --only yaml --seed 7
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from recipes.utils.console import UserError, read_flags, read_yaml, time_limit
from recipes.utils.data import Reading, stream_chats
from recipes.utils.evaluation import newest_run, read_adapter, read_record
from recipes.utils.files import keep_steps, read_jsonl
from recipes.utils.merge.stream import read_header, read_weights
from recipes.utils.model import read_adapter_config
from recipes.utils.training.checkpoint import fault

SECONDS = 60  # for one file, on a machine that is busy
NUMBERS = st.integers() | st.sampled_from([2**63, 2**64, -(2**64), 10**400]) | st.floats()
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20) | st.sampled_from(["../a", "/etc/passwd", "a\0b"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}], "tools": [
       {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}], "tag": "x"}  # fmt: skip
OTHERS = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "b", "output": "c"},
          {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]  # fmt: skip
HEADER = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
          "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}, "__metadata__": {"format": "pt"}}  # fmt: skip
INDEX = {"metadata": {"total_size": 24}, "weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}
MANIFEST = {"step": 4, "written": "now", "processes": 1, "evaluation_due": False, "run": {"seed": 1}, "sha256": "0",
            "files": {"adapter_model.safetensors": {"bytes": 3, "sha256": "0"}}}  # fmt: skip
MODEL = {"name_or_path": "base", "revision": None, "dtype": "bfloat16", "attn_implementation": "auto",
         "chat_template": "auto", "adapter": None, "trust_remote_code": False}  # fmt: skip
RECORD = {"name": "a", "method": "lora", "status": "finished", "finished": "2026", "commit": None, "model": MODEL,
          "data": {"train": "a.jsonl", "validation": 0.1}, "quantization": {}, "rows": {}, "seed": 1}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 8, "lora_alpha": 16, "target_modules": ["q"],
           "rank_pattern": {"q": 2}, "alpha_pattern": {"v.*": 4}, "bias": "none", "revision": None}  # fmt: skip
YAML = "model:\n  name_or_path: &a base\ndata:\n  train: [*a, b]\nlora: {r: 8, <<: {}}\ntraining:\n  seed: 0x1F\n"
TOKENS = st.sampled_from([
    "&a ", "*a", "!!int ", "!!binary ", "!!timestamp ", "<<: ", "? ", ": ", "- ", "[", "{", "]", "}", "\n", "  ", "|\n",
    ">-\n", "'", '"', "\\0", "0x_", "1_", ".inf", "1:30", "%YAML 9", "---\n", "#", "\t", "@", "`", "\x07", "\x85",
    "\u2028", "2024-13-45", "=", "~", "model:", "lora.r",
])  # fmt: skip


def places(value, path=()):
    """Every path within a JSON value, itself first."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


@st.composite
def changed(draw, *documents):
    """One of the documents as bytes, with a few values put in the place of others, cut, or with bytes that are odd."""
    value = json.loads(json.dumps(draw(st.sampled_from(documents))))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(places(value))))
        new, at = draw(VALUES), value
        if not path:
            value = new
            continue
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = new
    text = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["whole", "whole", "cut", "bytes", "deep"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text)))]
    if kind == "bytes":
        place = draw(st.integers(0, len(text)))
        return text[:place] + draw(st.binary(max_size=4)) + text[place + draw(st.integers(0, 3)) :]
    return text.replace(b"[", b"[" * draw(st.sampled_from([900, 5000, 100_000])), 1) if kind == "deep" else text


def lines(folder: Path, parts: list[bytes]) -> None:
    (folder / "a.jsonl").write_bytes(b"\n".join(parts))
    reading = Reading()
    for chat in stream_chats(str(folder / "a.jsonl"), reading):
        assert chat.messages[-1]["role"] == "assistant"
    assert all(isinstance(bad["error"], str) for bad in reading.bad)
    read_jsonl(folder / "a.jsonl")
    keep_steps(folder / "a.jsonl", 3)


def yaml(folder: Path, text: str) -> None:
    (folder / "a.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        list(read_yaml(folder / "a.yaml"))
    read_flags(["--lora.r", text])


def weights(folder: Path, drawn: tuple[bytes, int, bytes]) -> None:
    header, length, index = drawn
    length = len(header) if length < 0 else length
    (folder / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\0" * 24)
    (folder / "model.safetensors.index.json").write_bytes(index)
    with contextlib.suppress(UserError):
        for stored in read_header(folder / "a.safetensors").values():
            assert 0 <= stored.start <= stored.start + stored.size <= (folder / "a.safetensors").stat().st_size
    files, _ = read_weights(folder)
    assert all((folder / name).resolve().parent == folder.resolve() for name in files)


def manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert fault(folder)


def record(folder: Path, content: bytes) -> None:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "run.json").write_bytes(content)
    with contextlib.suppress(UserError):
        read_adapter(folder / "run")
    with contextlib.suppress(UserError):
        newest_run(folder)
    read_record(folder / "run" / "run.json")


def adapter(folder: Path, content: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(content)
    (folder / "adapter_model.safetensors").write_bytes(b"")
    read_adapter_config(folder)
    read_adapter(folder)


LENGTHS = st.just(-1) | st.integers(0, 2**64 - 1)
FUZZERS = {
    "lines": (lines, st.lists(changed(ROW, *OTHERS) | st.binary(max_size=40), max_size=4)),
    "yaml": (yaml, st.lists(TOKENS | st.text(max_size=5) | st.just(YAML), max_size=12).map("".join)),
    "weights": (weights, st.tuples(changed(HEADER), LENGTHS, changed(INDEX))),
    "manifest": (manifest, changed(MANIFEST)),
    "record": (record, changed(RECORD)),
    "adapter": (adapter, changed(ADAPTER)),
}


def fuzz(name: str, examples: int, number: int) -> None:
    """Try `examples` contents; raises what is no `UserError`, with the content made small."""
    read, strategy = FUZZERS[name]

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def tried(content):
        late = AssertionError(f"it takes longer than {SECONDS} seconds")
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError), time_limit(SECONDS, late):
            read(Path(folder), content)

    tried()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--only", choices=FUZZERS)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for name in [chosen.only] if chosen.only else FUZZERS:
        end, number, tried = time.monotonic() + 60 * chosen.minutes, chosen.seed, 0
        while time.monotonic() < end:
            fuzz(name, 500, number)
            number, tried = number + 1, tried + 500
        print(f"{name}: {tried:,} contents, no finding", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
