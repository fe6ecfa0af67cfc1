"""Levers on speed leave the losses as they are."""

from recipes.utils import model as model_module
from recipes.utils.config_keys import ModelOptions
from recipes.utils.console import UserError
from recipes.utils.evaluation import generate_answers
from recipes.utils.memory_trace import LoraConfig
from recipes.utils.speed import speed_up

import pytest
import torch
from conftest import TINY, read_jsonl
from peft import get_peft_model
from test_attention import packed, small_model
from test_sft import adapter_of, same, train
from transformers import AutoModelForCausalLM


def adapted(model, checkpointing=False):
    """`model` with an adapter that does something."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_without_the_input_cast_a_run_is_the_same_bit_for_bit(config_file, tmp_path, method, capsys):
    """In bfloat16, where PEFT would cast: losses, evaluations and the adapter."""
    path = config_file(model={"name_or_path": str(TINY / "base"), "dtype": "bfloat16"}, training={"max_steps": 4})
    found = []
    for cast in (True, False):
        overrides = {"model.adapter_input_cast": cast, "training.output_dir": str(tmp_path / f"cast-{cast}")}
        folder = train(path, method, overrides=overrides)
        lines = read_jsonl(folder / "metrics.jsonl")
        found.append(([line.get("loss", line.get("eval_loss")) for line in lines], adapter_of(folder)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert "adapter inputs uncast" in capsys.readouterr().out


def test_the_cast_is_what_costs_memory():
    """What autograd keeps in bfloat16 is less without it."""
    kept = []
    for cast in (True, False):
        model = adapted(small_model("mistral", "sdpa").to(torch.bfloat16))
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "lora_" in name else parameter.data
        speed_up(model, ModelOptions(adapter_input_cast=cast))
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            model(**packed(30, 34))
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert kept[1] < kept[0]


def test_generation_outside_of_autocast_still_casts():
    base = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    speed_up(model, ModelOptions())
    assert model.generate(input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2).shape[1] > 3


def losses(model):
    found = []
    for lengths in ((7, 12, 1, 9), (6, 10), (20, 5, 5)):
        batch = packed(*lengths)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        found.append(loss.item())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return found, gradients


def test_answers_while_training_compile_nothing():
    """Each length of the cache would be compiled for, and beyond torch's limit training itself would go uncompiled."""
    torch._dynamo.reset()
    tokenizer, _ = model_module.load_tokenizer(ModelOptions(str(TINY / "base")))
    model = adapted(AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32))
    speed_up(model, ModelOptions(compile_layers=True), "eager")
    losses(model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert len(generate_answers(model, tokenizer, [[5, 6, 7], [8, 9]], 6)) == 2
    losses(model.train())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "checkpointing"), [("mistral", True), ("qwen2", False)])
def test_compiled_layers_have_the_losses_and_names_of_plain_ones(family, checkpointing, backend):
    torch._dynamo.reset()
    plain, compiled = (adapted(small_model(family, "sdpa"), checkpointing) for _ in range(2))
    assert "compiled" in speed_up(compiled, ModelOptions(compile_layers=True), backend)
    torch._dynamo.utils.counters.clear()
    (one, gradients), (other, others) = losses(plain), losses(compiled)
    assert one == pytest.approx(other, abs=1e-4)
    for gradient, its in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, its, atol=1e-4, rtol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert plain.state_dict().keys() == compiled.state_dict().keys()


def test_liger_where_it_cannot_run_is_refused_with_the_reason(config_file, monkeypatch):
    with pytest.raises(UserError, match="on a GPU alone"):
        train(config_file(training={"use_liger_kernel": True}))


def test_liger_that_is_not_installed_is_refused(config_file, monkeypatch):
    from recipes.utils.config import load_config

    config = load_config(config_file(training={"use_liger_kernel": True}), {}, "lora")
    config.training["use_cpu"] = False
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(model_module, "is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match="pip install liger-kernel"):
        model_module.check_machine(config)
