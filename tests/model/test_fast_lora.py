"""The fast LoRA layers compute what PEFT's do, and leave to PEFT what they do not know."""

import contextlib
import json

import pytest
import torch
from conftest import BASE, copy_run, read_jsonl, run_recipe
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear, Linear4bit
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig, MistralConfig

from recipes.utils.config import load_config
from recipes.utils.model import VARLEN, ModelOptions, fast_lora, load_base, prepare_adapter
from recipes.utils.model.adapter import AddsIntoBase, FastForward
from recipes.utils.planning.memory import on_meta
from recipes.utils.training.checkpoint import _digest

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def adapted(method, dtype, device, fast, checkpointing=False, **lora):
    """The tiny base with an adapter that does something, as a recipe trains it."""
    four_bit = None
    if method == "qlora":
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    base = load_base(BASE, ModelOptions(dtype=dtype), "sdpa", four_bit, device == "cpu")
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(base, fast_lora(LoraConfig(**lora), ModelOptions(fast_lora=fast))).train()
    prepare_adapter(model, ModelOptions(fast_lora=fast))
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape, generator=draw) * 0.05).to(device)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    return model


def step(model, dtype, device):
    """{name: value} of the loss and of the gradient of every trained parameter."""
    ids = torch.randint(10, 200, (2, 40), generator=torch.Generator().manual_seed(2)).to(device)
    half = dtype != "float32"
    torch.manual_seed(3)  # dropout's
    with torch.autocast(device, getattr(torch, dtype)) if half else contextlib.nullcontext():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def apart(one, other):
    """The largest distance of two steps, relative to each tensor's own length."""
    assert one.keys() == other.keys()
    return max(((one[key] - other[key]).norm() / other[key].norm()).item() for key in other)


def apart_as_a_whole(one, other):
    """The distance of all gradients taken as one vector, relative to its length."""
    distance, length = (
        sum(value.double().square().sum() for key, value in values.items() if key != "loss")
        for values in ({key: one[key] - other[key] for key in other}, other)
    )
    return (distance / length).sqrt().item()


def fast_layers(model):
    return [module for module in model.modules() if isinstance(module, FastForward)]


@pytest.fixture
def taken(monkeypatch):
    """How often the fast way was taken, and how often it was not."""
    counts = {True: 0, False: 0}
    fast = FastForward._fast

    def counted(layer, x):
        found = fast(layer, x)
        counts[found is not None] += 1
        return found

    monkeypatch.setattr(FastForward, "_fast", counted)
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("device", DEVICES)
def test_loss_and_gradients_are_pefts(device, method, checkpointing, taken):
    one, other = (
        step(adapted(method, "float32", device, fast, checkpointing), "float32", device) for fast in (True, False)
    )
    assert taken[True] > 0 == taken[False]
    assert len(other) > 10
    assert apart(one, other) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16_they_are_as_near_to_float32_as_pefts(device, method, checkpointing, taken):
    exact = step(adapted(method, "float32", device, False), "float32", device)
    one, other = (
        step(adapted(method, "bfloat16", device, fast, checkpointing), "bfloat16", device) for fast in (True, False)
    )
    assert taken[True] > 0 == taken[False]
    assert abs(one["loss"] - other["loss"]) < 2e-3 * other["loss"]
    assert 0 < apart_as_a_whole(one, exact) < 1.25 * apart_as_a_whole(other, exact)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("wrong", ["scale", "input gradient"])
def test_a_mistake_in_the_layers_is_seen(method, wrong, monkeypatch):
    def broken(ctx, gradient):
        if wrong == "scale":
            ctx.scaling = 1.0
        of_x, *others = backward(ctx, gradient)
        return (of_x * 1.001 if wrong == "input gradient" and of_x is not None else of_x, *others)

    right = step(adapted(method, "float32", "cpu", True), "float32", "cpu")
    backward = AddsIntoBase.backward
    monkeypatch.setattr(AddsIntoBase, "backward", staticmethod(broken))
    assert apart(step(adapted(method, "float32", "cpu", True), "float32", "cpu"), right) > 1e-4


def test_autograd_keeps_no_more_than_with_pefts():
    kept = []
    for fast in (True, False):
        model, storages = adapted("lora", "bfloat16", "cpu", fast), {}
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor, storages=storages, own=own):
            if tensor.untyped_storage()._cdata not in own:
                storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            step(model, "bfloat16", "cpu")
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert kept[0] <= kept[1]


class Traffic(TorchDispatchMode):
    """Counts the bytes that the operations of a step read and write, views left out."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not function.is_view and "detach" not in str(function):
            tensors = [each for each in tree_leaves((args, kwargs, output)) if isinstance(each, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return output


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_moves_less_memory_than_with_pefts(checkpointing):
    """Mistral-7B's dimensions, in tensors that hold nothing: what is read and written, without the base's weights."""
    config = MistralConfig(vocab_size=1024, sliding_window=None)
    moved = []
    for fast in (True, False):
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = on_meta(config, fast_lora(lora, ModelOptions(fast_lora=fast)), "bfloat16", 1, VARLEN)
        with FakeTensorMode():
            model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            prepare_adapter(model.train(), ModelOptions())
            if checkpointing:
                model.activation_checkpointing_enable()
                model.enable_input_require_grads()
            ids, borders = torch.zeros(1, 4096, dtype=torch.long), torch.zeros(9, dtype=torch.int32)
            packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 2048, "max_length_k": 2048}
            with Traffic() as traffic:
                with torch.autocast("cpu", torch.bfloat16):
                    hidden = model.get_base_model().base_model(input_ids=ids, use_cache=False, **packed)[0]
                hidden.backward(torch.zeros_like(hidden))
        moved.append(traffic.bytes)
    assert moved[0] < 0.87 * moved[1]


@pytest.mark.parametrize(
    ("lora", "alike"),
    [
        ({"use_dora": True}, 0), ({"lora_dropout": 0.1}, 0), ({"lora_bias": True, "target_modules": ["q_proj"]}, 0),
        ({"bias": "all"}, 1e-5), ({"use_rslora": True}, 1e-5),
    ],
)  # fmt: skip
def test_what_else_an_adapter_can_be_is_pefts_to_the_bit_or_computed_alike(lora, alike, taken, capsys):
    one, other = (step(adapted("lora", "float32", "cpu", fast, **lora), "float32", "cpu") for fast in (True, False))
    assert (taken[True] > 0) == (alike > 0)
    assert ("speed: PEFT's own LoRA layers" in capsys.readouterr().out) == (alike == 0)
    assert apart(one, other) <= alike


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_a_second_adapter_of_another_kind_is_pefts(lora, taken):
    model = adapted("lora", "float32", "cpu", True, target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **lora))
    step(model, "float32", "cpu")
    assert taken.pop(True) > 0
    taken[True] = 0
    model.set_adapter("second")
    step(model, "float32", "cpu")
    assert taken[True] == 0


def test_switched_off_merged_and_several_adapters_are_pefts(taken, tmp_path):
    model = adapted("lora", "float32", "cpu", True).eval()
    ids = torch.arange(20)[None] + 10
    with torch.no_grad():
        with_adapter = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        taken[True] = 0
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        model.unmerge_adapter()
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
        both = model(input_ids=ids).logits  # the second one is new and adds nothing
    assert taken[True] == 0
    assert not torch.allclose(base, with_adapter, atol=1e-3)
    assert torch.allclose(merged, with_adapter, atol=1e-4)
    assert torch.allclose(both, with_adapter, atol=1e-4)


def test_generation_in_bfloat16_outside_of_autocast_is_pefts(taken):
    model = adapted("lora", "bfloat16", "cpu", True).eval()
    assert model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2).shape[1] > 3
    assert taken[True] == 0


@pytest.mark.parametrize(("method", "kind"), [("lora", Linear), ("qlora", Linear4bit)])
def test_names_and_files_are_those_of_pefts_adapters(method, kind, tmp_path):
    """PEFT's hook is private: this is what these layers want of it."""
    model = adapted(method, "float32", "cpu", True)
    plain = adapted(method, "float32", "cpu", False)
    assert len(fast_layers(model)) == sum(type(module) is kind for module in plain.modules()) > 0
    assert fast_layers(plain) == []
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    for name, saved in (("fast", model), ("plain", plain)):
        saved.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_an_adapter_that_is_read_can_have_them_too(tmp_path):
    adapted("lora", "float32", "cpu", False).save_pretrained(tmp_path)
    config = fast_lora(LoraConfig.from_pretrained(tmp_path), ModelOptions())
    base = load_base(BASE, ModelOptions(dtype="float32"), "sdpa", use_cpu=True)
    model = PeftModel.from_pretrained(base, str(tmp_path), config=config, is_trainable=True)
    assert len(fast_layers(model)) == 7 * base.config.num_hidden_layers


def test_the_hook_of_peft_that_builds_them_is_as_it_was():
    """It is private: an upgrade that changes it fails here, and not in a run that is slower without a word."""
    config = LoraConfig(target_modules=["first", "second"])
    assert config._custom_modules is None
    plain = config.to_dict()
    fast_lora(config, ModelOptions(fast_lora=False))
    assert config._custom_modules is None
    assert fast_lora(config, ModelOptions()) is config
    assert list(config._custom_modules) == [torch.nn.Linear]
    assert config.to_dict() == plain
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4), "second": torch.nn.Embedding(4, 4)})
    kinds = {name: type(module) for name, module in get_peft_model(model, config).base_model.model.items()}
    assert issubclass(kinds["first"], (FastForward, Linear))
    assert not issubclass(kinds["second"], FastForward)


def test_a_run_without_them_learns_the_same(lora_run, config_file):
    path = config_file()
    assert run_recipe("sft_lora", path, "--model.fast_lora", "false") == 0
    lines, others = (read_jsonl(folder / "metrics.jsonl") for folder in (lora_run, path.parent / "run"))
    for line, other in zip(lines, others, strict=True):
        for key in {"loss", "eval_loss", "grad_norm"} & set(line):
            assert line[key] == pytest.approx(other[key], rel=1e-4)
    adapter, its = (load_file(folder / "adapter_model.safetensors") for folder in (lora_run, path.parent / "run"))
    assert adapter.keys() == its.keys()
    for name, weight in adapter.items():
        torch.testing.assert_close(weight, its[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_that_goes_on_from_an_adapter_has_them(config_file, lora_run, method, capsys):
    words = ("--model.adapter", lora_run, "--dry-run")
    assert run_recipe(f"sft_{method}", config_file(), *words) == 0
    assert "speed: fast LoRA layers" in capsys.readouterr().out
    assert run_recipe(f"sft_{method}", config_file(), *words, "--model.fast_lora", "false") == 0
    assert "fast LoRA" not in capsys.readouterr().out


def test_a_resume_does_not_change_the_layers_in_silence(lora_run, tmp_path, capsys):
    """Nor that of a run from before they were a setting, which had PEFT's."""
    folder = copy_run(lora_run, tmp_path)
    words = (tmp_path / "small.yaml", "--resume", "--training.max_steps", "9")
    assert run_recipe("sft_lora", *words, "--model.fast_lora", "false") == 2
    assert "model.fast_lora: true in the checkpoint, false now" in capsys.readouterr().err
    manifest = folder / "checkpoint-8" / "manifest.json"
    known = json.loads(manifest.read_text())
    del known["run"]["model.fast_lora"], known["sha256"]
    manifest.write_text(json.dumps({**known, "sha256": _digest(known)}))
    assert run_recipe("sft_lora", *words) == 2
    assert "model.fast_lora: false in the checkpoint, true now" in capsys.readouterr().err
    assert run_recipe("sft_lora", *words, "--model.fast_lora", "false") == 0


def test_a_record_from_before_they_were_a_setting_says_that_there_were_none(lora_run, tmp_path):
    record = copy_run(lora_run, tmp_path) / "run.json"
    assert load_config(record, {}, "lora").model.fast_lora
    known = json.loads(record.read_text())
    del known["model"]["fast_lora"]
    record.write_text(json.dumps(known))
    assert not load_config(record, {}, "lora").model.fast_lora
