"""The streaming merge gives PEFT's very bits in little memory, and leaves a whole model or nothing."""

import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from conftest import BASE, ROOT, TINY, read_jsonl, write_jsonl
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, Qwen2Config

from recipes.merge_adapter import merge_adapter
from recipes.utils.console import UserError
from recipes.utils.merge import export, stream
from recipes.utils.merge.stream import NotStreamable, RoundTrip, plan_merge, read_header, write_merge
from recipes.utils.model import ModelOptions, load_base

SHAPES = {"qwen2": Qwen2Config, "mistral": MistralConfig}
SHARED = ("lm_head.weight", "model.embed_tokens.weight")  # one weight in a tied base
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"v_proj": 32}},
    "trained head": {"modules_to_save": ["lm_head"]},
    "trained embedding": {"modules_to_save": ["embed_tokens"]},
    "biases": {"bias": "all"},
    "lora on the head": {"target_modules": ["lm_head", "q_proj"]},
    "some layers": {"target_modules": ["down_proj"], "layers_to_transform": [1]},
}


def small_base(folder: Path, shape: str = "qwen2", dtype=torch.float32, tied=False, shard_size="1GB") -> Path:
    torch.manual_seed(0)
    config = SHAPES[shape](
        vocab_size=320, hidden_size=96, intermediate_size=224, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, dtype=dtype,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.05)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def random_adapter(folder: Path, base: Path, peft_config=None, **options) -> Path:
    """An adapter with weights that are far from zero, saved as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = peft_config or LoraConfig(
        task_type="CAUSAL_LM", lora_alpha=8, **{"r": 4, "target_modules": "all-linear", **options}
    )
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape).to(parameter.dtype)
    model.save_pretrained(folder)
    return folder


def load(base: Path):
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto")


def merged_by_peft(base: Path, adapter: Path) -> dict:
    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload(safe_merge=False).state_dict()


def streamed(base: Path, adapter: Path, output: Path, scale=1.0) -> dict:
    output.mkdir()
    plan = plan_merge(base, adapter, scale)
    write_merge(plan, output)
    return {name: tensor for file in plan.files for name, tensor in load_file(output / file).items()}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([list(range(60, 160))])).logits[0].float()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_streamed_tensor_equals_pefts_merge_bit_for_bit(tmp_path, shape, dtype, tied):
    """For each option, in one file (untied) and in shards (tied)."""
    base = small_base(tmp_path / "base", shape, DTYPES[dtype], tied, "200KB" if tied else "1GB")
    assert (base / "model.safetensors.index.json").is_file() == tied
    options = dict(OPTIONS)
    if shape == "qwen2":  # whose projections have a bias
        options["lora bias"] = {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}
    for name, option in options.items():
        adapter = random_adapter(tmp_path / f"adapter {name}", base, **option)
        found, expected = streamed(base, adapter, tmp_path / name), merged_by_peft(base, adapter)
        if tied and name in ("lora on the head", "trained embedding"):
            # PEFT changes the one weight that head and embedding share; here each has its own
            expected = {key: tensor for key, tensor in expected.items() if key not in SHARED}
        before = load(base).state_dict()
        assert set(found) >= {key for key in expected if not (tied and key == "lm_head.weight")}, name
        written = {key: tensor.to(DTYPES[dtype]) for key, tensor in expected.items() if key in found}
        assert all(torch.equal(found[key], tensor) for key, tensor in written.items()), name
        assert any(not torch.equal(found[key], before[key]) for key in found), name


@pytest.mark.parametrize("rank", [1, 7, 64])
def test_the_bits_do_not_depend_on_how_the_work_is_divided(tmp_path, monkeypatch, rank):
    """Four workers, and pieces so small that a careless cut would leave one of few rows, which BLAS adds otherwise."""
    base = small_base(tmp_path / "base", "qwen2", torch.float32, shard_size="200KB")
    threads = torch.get_num_threads()
    for name, targets in (("layers", {"use_dora": True}), ("embedding", {"target_modules": ["embed_tokens"]})):
        adapter = random_adapter(tmp_path / f"adapter {name}", base, r=rank, **targets)
        whole = streamed(base, adapter, tmp_path / f"{name} whole")
        monkeypatch.setattr(stream, "PIECE", 19 * 96)
        torch.set_num_threads(4)
        divided = streamed(base, adapter, tmp_path / f"{name} divided")
        assert torch.get_num_threads() == 4, "as it was before"
        torch.set_num_threads(threads)
        monkeypatch.undo()
        assert all(torch.equal(divided[key], whole[key]) for key in whole), name


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("head", {"target_modules": ["lm_head", "q_proj"]}),
        ("embedding", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("trained embedding", {"modules_to_save": ["embed_tokens"]}),
    ],
)
def test_a_tied_head_parts_from_the_embedding_where_the_adapter_changes_one_of_them(tmp_path, name, option):
    base = small_base(tmp_path / "base", tied=True)
    adapter = random_adapter(tmp_path / "adapter", base, **option)
    plan = plan_merge(base, adapter)
    streamed(base, adapter, tmp_path / "out")
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert plan.untied
    live = PeftModel.from_pretrained(load(base), adapter)
    assert (logits_of(load(tmp_path / "out")) - logits_of(live)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_on_an_embedding_is_rounded_once(tmp_path, dtype):
    """PEFT rounds the difference before it adds it, so only float32 has its very bits."""
    base = small_base(tmp_path / "base", dtype=DTYPES[dtype])
    adapter = random_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens"])
    found, name = streamed(base, adapter, tmp_path / "out"), "model.embed_tokens"
    parts = load_file(adapter / "adapter_model.safetensors")
    down, up = (parts[f"base_model.model.{name}.lora_embedding_{side}"].float() for side in "AB")
    expected = (load(base).state_dict()[f"{name}.weight"].float() + ((up @ down) * 2).T).to(DTYPES[dtype])
    assert torch.equal(found[f"{name}.weight"], expected)
    if dtype == "float32":
        assert torch.equal(expected, merged_by_peft(base, adapter)[f"{name}.weight"])


def test_the_index_is_followed_and_other_weights_in_the_folder_are_left_alone(tmp_path):
    base = small_base(tmp_path / "base", shard_size="200KB")
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, base / "consolidated.safetensors")
    save_file({"model.norm.weight": torch.zeros(2)}, base / "model-extra.safetensors")
    adapter = random_adapter(tmp_path / "adapter", base)
    found, expected = streamed(base, adapter, tmp_path / "out"), merged_by_peft(base, adapter)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    shards = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert shards == {path.name for path in base.glob("model-0*.safetensors")}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {name: index["weight_map"][name] for name in found} == {
        name: file for file in shards for name in read_header(tmp_path / "out" / file)
    }


def test_what_the_adapter_does_not_touch_is_copied_byte_for_byte(tmp_path):
    """Also a dtype that nothing here could compute with."""
    base = small_base(tmp_path / "base", dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "unknown": torch.arange(6, dtype=torch.int16)}, base / "model.safetensors")
    twin = small_base(tmp_path / "twin", dtype=torch.bfloat16)
    adapter = random_adapter(tmp_path / "adapter", twin, target_modules=["q_proj"])
    found = streamed(base, adapter, tmp_path / "out")
    assert found["unknown"].tolist() == [0, 1, 2, 3, 4, 5]
    assert all(torch.equal(found[name], tensors[name]) for name in tensors if "q_proj.weight" not in name)
    assert sum(not torch.equal(found[name], tensors[name]) for name in tensors) == 2


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "pissa changed the base"),
        (
            {"peft_config": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])},
            "the adapter is IA3",
        ),
        ({"trainable_token_indices": [3, 4]}, "the adapter has trainable_token_indices"),
    ],
    ids=["pissa", "ia3", "token rows"],
)
def test_what_cannot_be_streamed_goes_through_peft_in_memory_and_says_so(tmp_path, capsys, option, reason):
    base = small_base(tmp_path / "base")
    copy_tokenizer(base)
    adapter = random_adapter(tmp_path / "adapter", base, **option)
    with pytest.raises(NotStreamable, match=reason):
        plan_merge(base, adapter)
    output = merge_adapter(adapter, data=str(rows_file(tmp_path)))
    assert f"merging through PEFT, with the whole model in memory: {reason}" in capsys.readouterr().out.replace(
        "\n", " "
    )
    live = PeftModel.from_pretrained(load(base), adapter)
    assert (logits_of(load(output)) - logits_of(live)).abs().max() < 1e-4
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1, "all readable by whoever may read the folder"


def test_a_merge_in_memory_that_changes_nothing_or_breaks_a_weight_is_an_error(tmp_path):
    base = small_base(tmp_path / "base")
    copy_tokenizer(base)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    adapter = random_adapter(tmp_path / "adapter", base, peft_config=config)
    path = adapter / "adapter_model.safetensors"
    for value, message in ((1.0, "changes no weight"), (float("nan"), "not finite")):
        weights = {name: torch.full_like(tensor, value) for name, tensor in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(UserError, match=message):
            merge_adapter(adapter, verify=False)
        assert sorted(file.name for file in adapter.iterdir()) == ["README.md", "adapter_config.json", path.name]


def test_on_a_tied_base_what_peft_merges_into_the_embedding_stays_out_of_the_head(tmp_path):
    base = small_base(tmp_path / "base", tied=True)
    copy_tokenizer(base)
    adapter = random_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"], use_dora=True)
    output = merge_adapter(adapter, data=str(rows_file(tmp_path)))
    live = PeftModel.from_pretrained(load(base), adapter)
    assert (logits_of(load(output)) - logits_of(live)).abs().max() < 1e-4
    assert not json.loads((output / "config.json").read_text())["tie_word_embeddings"]


def test_a_tied_base_whose_embedding_peft_leaves_alone_stays_tied(tmp_path):
    base = small_base(tmp_path / "base", tied=True)
    copy_tokenizer(base)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    output = merge_adapter(random_adapter(tmp_path / "adapter", base, config), data=str(rows_file(tmp_path)))
    assert "lm_head.weight" not in load_file(output / "model.safetensors")
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"]


def test_a_file_that_was_cut_in_a_copy_is_named_before_anything_is_written(tmp_path):
    """Its header says that all is there, and a reader would wait for the rest."""
    base = small_base(tmp_path / "base", shard_size="200KB")
    adapter = random_adapter(tmp_path / "adapter", base)
    for path in (adapter / "adapter_model.safetensors", max(base.glob("model-*.safetensors"))):
        content = path.read_bytes()
        path.write_bytes(content[:-10])
        with pytest.raises(UserError, match=f"{path.name}: its last 10 bytes are missing"):
            plan_merge(base, adapter)
        path.write_bytes(b"")
        with pytest.raises(UserError, match=f"{path.name}: is no safetensors file"):
            plan_merge(base, adapter)
        path.write_bytes(content)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}: is not there, though the index"):
        plan_merge(base, adapter)


def test_what_is_no_safetensors_file_is_named(tmp_path):
    """Such as the pointer that git leaves where large files were not fetched."""
    base = small_base(tmp_path / "base")
    adapter = random_adapter(tmp_path / "adapter", base)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14000000000\n"
    for content in (pointer, b"\x17" + bytes(7) + b'{"a": {"dtype": "F32"}}', b"\x02" + bytes(7) + b"[]"):
        (base / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="model.safetensors: is no safetensors file"):
            plan_merge(base, adapter)


@pytest.mark.parametrize("name", ["{folder}/stolen.safetensors", "../stolen.safetensors", "..", "", "config.json", 7])
def test_an_index_that_names_anything_but_files_of_its_folder_is_refused(tmp_path, name):
    """The merged files get the names of the base's, and a merge must never write outside of its folder."""
    base = small_base(tmp_path / "base", shard_size="200KB")
    copy_tokenizer(base)
    adapter = random_adapter(tmp_path / "adapter", base)
    shutil.copyfile(min(base.glob("model-*.safetensors")), tmp_path / "stolen.safetensors")
    before = (tmp_path / "stolen.safetensors").read_bytes()
    name = name.format(folder=tmp_path) if isinstance(name, str) else name
    index = json.loads((base / stream.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (base / stream.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"which is no safetensors file of its folder"):
        merge_adapter(adapter, verify=False)
    assert (tmp_path / "stolen.safetensors").read_bytes() == before
    assert not (adapter / "merged").exists()


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_weights_is_a_user_error(tmp_path, content):
    base = small_base(tmp_path / "base")
    (base / stream.INDEX).write_text(content)
    with pytest.raises(UserError, match="names no weights"):
        plan_merge(base, random_adapter(tmp_path / "adapter", small_base(tmp_path / "twin")))


def test_an_adapter_of_another_base_is_refused(tmp_path):
    base = small_base(tmp_path / "base")
    adapter = random_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    parts = load_file(path)
    parts = {name: part.repeat(1, 2).contiguous() if "lora_A" in name else part for name, part in parts.items()}
    save_file(parts, path)
    with pytest.raises(UserError, match=r"q_proj.weight is \[96, 96\].*the adapter belongs to another base"):
        plan_merge(base, adapter)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", "{", "adapter_config.json: is no JSON"),
        ("run.json", "{", "run.json: is no JSON"),
        ("adapter_config.json", None, "is no run folder and no adapter"),
        ("adapter_model.safetensors", None, "holds no adapter weights"),
    ],
)
def test_a_broken_adapter_folder_is_a_user_error(ready, file, content, message):
    if content:
        (ready / file).write_text(content)
    else:
        (ready / file).unlink()
    with pytest.raises(UserError, match=message):
        merge_adapter(ready, verify=False)


def test_a_base_or_an_output_that_cannot_be_is_a_user_error(ready, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        merge_adapter(ready, tmp_path / "file" / "merged", verify=False)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="base: the folder of the adapter's base is not there"):
        merge_adapter(ready, verify=False)


def copy_tokenizer(base: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(BASE / name, base / name)


def rows_file(folder: Path) -> Path:
    return write_jsonl(folder / "rows.jsonl", read_jsonl(TINY / "validation.jsonl")[:4])


@pytest.mark.parametrize(
    ("value", "message"), [(0.0, "changes no weight"), (float("nan"), "not finite"), (1e30, "not finite")]
)
def test_a_merge_that_changes_nothing_or_breaks_a_weight_is_an_error_and_leaves_nothing(tmp_path, value, message):
    base = small_base(tmp_path / "base", dtype=torch.float16)
    copy_tokenizer(base)
    adapter = random_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, value) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=message):
        merge_adapter(adapter, verify=False)
    assert not [file.name for file in adapter.iterdir() if "merged" in file.name]


def test_a_quantised_base_is_refused(tmp_path):
    base = small_base(tmp_path / "base")
    adapter = random_adapter(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised"):
        plan_merge(base, adapter)


@pytest.mark.parametrize("piece", [1 << 22, 4096], ids=["in one piece", "in pieces"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_round_trip_through_4_bit_equals_the_live_models_weights(monkeypatch, dtype, double, piece):
    monkeypatch.setattr(stream, "QUANTISED_PIECE", piece)
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    quantization["bnb_4bit_use_double_quant"] = double
    options = ModelOptions(str(BASE), dtype=dtype)
    live = load_base(BASE, options, "sdpa", BitsAndBytesConfig(**quantization), use_cpu=True)
    trip = RoundTrip({"model": vars(options), "quantization": quantization}, BASE)
    base = load_file(BASE / "model.safetensors")
    layers = {f"{name}.weight": layer for name, layer in live.named_modules() if isinstance(layer, Linear4bit)}
    assert trip.names == set(layers)
    assert "lm_head.weight" not in trip.names
    for name, layer in layers.items():
        expected = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(trip.apply(base[name].clone()), expected), name


CHILD = '''
import itertools, json, os, random, resource, signal, sys
from pathlib import Path
from recipes.merge_adapter import merge_adapter
from recipes.utils.files import file_hash
from recipes.utils.merge.stream import plan_merge, write_merge
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])

# Each merge in a fork of its own: this process has never had a second thread, whose locks forks would copy.
if os.fork() == 0:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_merge(plan_merge(folder / "large base", folder / "large adapter"), folder / "large")
    (folder / "grown").write_text(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
    os._exit(0)
os.wait()
grown = float((folder / "grown").read_text())

def merge_and_die(output, last):
    """Merge in a fork that kills itself at the last-th file that it opens, renames, ... from the first in its folder;
    without one, count them."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    count, begun = itertools.count(1), []

    def die(event, about):
        if event == "open" or event.startswith(("os.", "shutil.")):
            begun[:] = begun or [0] * (".partial" in str(about))  # the libraries' imports before that are no merge
            if begun and next(count) == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    merge_adapter(folder / "adapter", output, verify=False)
    moments = next(count) - 1
    (folder / "moments").write_text(str(moments))
    os._exit(0)

def hashes(output):
    return {path.name: file_hash(path) for path in output.iterdir()}

merge_and_die(folder / "whole", None)
whole, moments = hashes(folder / "whole"), int((folder / "moments").read_text())
states, dice = [], random.Random(0)
for number in range(rounds):
    output = folder / str(number)
    merge_and_die(output, dice.randint(1, moments) if number else moments)
    states.append("absent" if not output.exists() else "whole" if hashes(output) == whole else "half")
weights = file_hash(folder / "whole" / "model.safetensors")
left = list(folder.glob(".*.partial"))
models = [path for path in left if (path / "config.json").exists() and file_hash(path / "model.safetensors") != weights]
print(json.dumps({"grown": grown, "states": states, "left": len(left), "half with a config": len(models)}))
'''


def in_a_child(folder: Path, rounds: int) -> dict:
    """One process, since its imports take longest: merge a model of 128 MB with weights of at most 16 MB in float32,
    and say how much memory that took; then merge a small one and kill it, again and again."""
    for name in ("large base", "large adapter", "large"):
        (folder / name).mkdir()
    weights = {f"model.layers.{n}.mlp.up_proj.weight": torch.full((2048, 2048), 0.5).bfloat16() for n in range(16)}
    save_file(weights, folder / "large base" / "model.safetensors")
    (folder / "large base" / "config.json").write_text("{}")
    parts = {}
    for name in weights:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        parts |= {f"{module}.lora_A.weight": torch.ones(4, 2048), f"{module}.lora_B.weight": torch.ones(2048, 4)}
    save_file(parts, folder / "large adapter" / "adapter_model.safetensors")
    (folder / "large adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    base = small_base(folder / "base")
    copy_tokenizer(base)
    random_adapter(folder / "adapter", base)
    command = [sys.executable, "-c", CHILD, folder, str(rounds)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    return in_a_child(tmp_path_factory.mktemp("child"), 8)


def test_memory_grows_by_the_largest_weight_and_not_by_the_model(child):
    """The promise is twice the largest weight in float32 and 400 MB, most of which the imports take."""
    assert child["grown"] < 2 * 16 + 32


def test_killed_at_random_moments_no_half_model_is_found(child):
    assert child["states"][0] == "whole", "killed at the last moment, after the rename"
    assert set(child["states"]) == {"absent", "whole"}
    assert child["half with a config"] == 0


@pytest.mark.slow
def test_killed_at_50_random_moments_no_half_model_is_found(tmp_path):
    found = in_a_child(tmp_path, 50)
    print({state: found["states"].count(state) for state in ("absent", "whole", "half")}, "left:", found["left"])
    assert set(found["states"]) <= {"absent", "whole"}
    assert found["half with a config"] == 0
    assert found["left"] >= 40, "nearly all kills must have come in the middle of a merge"


@pytest.fixture
def ready(tmp_path):
    """An adapter that merges into 700 kB."""
    base = small_base(tmp_path / "base")
    copy_tokenizer(base)
    return random_adapter(tmp_path / "adapter", base)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs with the options given and returns its folder; where that is not permitted, it
    has `otherwise` imitate such a disk."""
    mounted = []

    def mount(options: str, otherwise) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            otherwise()
        else:
            mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_too_little_disk_is_noticed_before_the_first_byte_with_the_number_needed(ready, small_disk, monkeypatch):
    room = shutil.disk_usage("/")._replace(free=20 << 20)
    disk = small_disk("size=20m", lambda: monkeypatch.setattr(shutil, "disk_usage", lambda _: room))
    with pytest.raises(UserError, match=r"disk: the merged model needs 0.07 GB and 0.02 GB are free"):
        merge_adapter(ready, disk / "merged", verify=False)
    assert list(disk.iterdir()) == []


def test_a_disk_that_is_full_in_the_middle_ends_with_a_line_and_leaves_nothing(ready, small_disk, monkeypatch):
    """Room for the bytes, but after the folder and its weights no entry for another file."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    disk = small_disk("size=100m,nr_inodes=4", lambda: monkeypatch.setattr(export.shutil, "copyfile", full))
    with pytest.raises(UserError, match="No space left on device; nothing is left there"):
        merge_adapter(ready, disk / "merged", verify=False)
    assert list(disk.iterdir()) == []


def test_a_quota_reached_inside_the_weights_ends_with_a_line_and_leaves_nothing(ready, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large; nothing is left there"):
            merge_adapter(ready, tmp_path / "quota" / "merged", verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "quota").iterdir()) == []


def test_a_base_that_shrinks_while_it_is_read_ends_the_merge(ready, monkeypatch):
    base, adapter = ready.parent / "base", ready
    plan = plan_merge(base, adapter)
    for path in base.glob("*.safetensors"):
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
    (base / "out").mkdir()
    with pytest.raises(UserError, match="became shorter while it was read"):
        write_merge(plan, base / "out")


def header(**entries) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | entries}).encode()


@pytest.mark.parametrize(
    "text",
    [
        b"[]", b"7", b"{}", b'{"a": 3}', b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"9" * 9999 + b"}",
        header(data_offsets=[-8, 8]), header(data_offsets=[16, 0]), header(data_offsets=[0, 2**64]),
        header(data_offsets=[0.5, 16.5]), header(data_offsets="ab"), header(data_offsets=[0, 16, 32]),
        header(shape=[4, 4]), header(shape=[-2, -2]), header(shape=[2**40, 2**40]), header(shape="ab"),
        header(shape=None), header(dtype="F33"), header(dtype=None), header(dtype=["F32"]),
    ],
    ids=range(21),
)  # fmt: skip
@pytest.mark.parametrize("length", [None, 2**64 - 1, 2**40, 0], ids=["", "endless", "long", "none"])
def test_a_header_of_any_form_is_an_error_of_the_file(tmp_path, text, length):
    length = len(text) if length is None else length
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + text + b"\0" * 16)
    with pytest.raises(UserError, match=r"a\.safetensors: (is no safetensors file|its last .* bytes are missing)"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r and rank_pattern are whole numbers above 0"),
        ({"r": -1}, "whole numbers above 0"),
        ({"r": True}, "`r` is true, not int"),
        ({"r": "8"}, '`r` is "8", not int'),
        ({"rank_pattern": {"q_proj": 0}}, "whole numbers above 0"),
        ({"rank_pattern": [1]}, "`rank_pattern` is"),
        ({"lora_alpha": "16"}, "`lora_alpha` is"),
        ({"lora_alpha": float("nan")}, "lora_alpha and alpha_pattern numbers"),
        ({"alpha_pattern": {"q_proj": None, "v_proj": []}}, "alpha_pattern numbers"),
        ({"alpha_pattern": {"(": 8}}, "is no regular expression"),
        ({"target_modules": "(((("}, "is no regular expression"),
        ({"peft_type": None}, "`peft_type` is missing"),
        ({"peft_type": 3}, "`peft_type` is 3"),
    ],
)
def test_an_adapter_config_of_which_no_adapter_can_be_made_is_an_error_of_the_file(ready, settings, message):
    base, adapter = ready.parent / "base", ready
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=r"adapter_config\.json: ") as error:
        plan_merge(base, adapter)
    assert message in str(error.value)


def test_a_pattern_that_never_ends_ends_the_merge(ready, monkeypatch):
    base, adapter = ready.parent / "base", ready
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"alpha_pattern": {r"([a-z_.0-9]+)+!": 3}}
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(stream, "SECONDS", 0.2)
    with pytest.raises(UserError, match="a regular expression of its patterns does not end"):
        plan_merge(base, adapter)
