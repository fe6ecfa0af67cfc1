"""An adapter: levers on speed leave the losses as they are; what is saved is whole, and found again."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import BASE, TINY, copy_run, read_jsonl, run_recipe
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_attention import packed, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from recipes.utils.console import RunEnded, UserError
from recipes.utils.data import Encoder
from recipes.utils.evaluation import (
    check_linear,
    load_adapter,
    load_adapter_tokenizer,
    newest_run,
    read_adapter,
    read_run,
    set_scale,
)
from recipes.utils.model import (
    ModelOptions,
    adapter_shapes,
    check_start,
    generate_answers,
    load_base,
    prepare_adapter,
    publish_base,
    save_adapter,
    stored_shapes,
)
from recipes.utils.model.adapter import KNOWN_TO_ALL


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
    path = config_file(model={"name_or_path": str(BASE), "dtype": "bfloat16"}, training={"max_steps": 4})
    found = []
    for cast in ("true", "false"):
        folder = tmp_path / f"cast-{cast}"
        words = ["--model.fast_lora", "false", "--model.adapter_input_cast", cast, "--training.output_dir", folder]
        assert run_recipe(f"sft_{method}", path, *words) == 0
        lines = read_jsonl(folder / "metrics.jsonl")
        losses = [line.get("loss", line.get("eval_loss")) for line in lines]
        found.append((losses, load_file(folder / "adapter_model.safetensors")))
    (one, adapter), (other, its) = found
    assert one == other
    assert adapter.keys() == its.keys()
    assert all(torch.equal(adapter[name], its[name]) for name in adapter)
    assert capsys.readouterr().out.count("speed: no float32 copy of each adapter's input") == 1


def test_the_cast_is_what_costs_memory():
    """What autograd keeps in bfloat16 is less without it."""
    kept = []
    for cast in (True, False):
        model = adapted(small_model("mistral", "sdpa").to(torch.bfloat16))
        prepare_adapter(model, ModelOptions(adapter_input_cast=cast))
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            model(**packed(30, 34))
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert kept[1] < kept[0]


def test_generation_outside_of_autocast_still_casts():
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    prepare_adapter(model, ModelOptions())
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
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (TINY.parents[1] / "configs" / "chat_templates" / "qwen2.jinja").read_text()
    model = adapted(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32))
    prepare_adapter(model, ModelOptions(compile_layers=True), "eager")
    losses(model)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert len(generate_answers(model, Encoder(tokenizer), [[5, 6, 7], [8, 9]], 6)) == 2
    losses(model.train())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("family", "checkpointing"), [("mistral", True), ("qwen2", False)])
def test_compiled_layers_have_the_losses_and_names_of_plain_ones(family, checkpointing, backend, capsys):
    torch._dynamo.reset()
    plain, compiled = (adapted(small_model(family, "sdpa"), checkpointing) for _ in range(2))
    prepare_adapter(compiled, ModelOptions(compile_layers=True), backend)
    assert "decoder layers compiled" in capsys.readouterr().out
    torch._dynamo.utils.counters.clear()
    (one, gradients), (other, others) = losses(plain), losses(compiled)
    assert one == pytest.approx(other, abs=1e-4)
    for gradient, its in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, its, atol=1e-4, rtol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert plain.state_dict().keys() == compiled.state_dict().keys()


class Saver:
    """What `save_adapter` asks of a trainer."""

    state, args = TrainerState(global_step=8), SimpleNamespace(learning_rate=1e-3)

    def __init__(self, model):
        self.model = model

    def save_model(self, folder):
        self.model.save_pretrained(folder)
        torch.save({}, f"{folder}/training_args.bin")


def test_an_adapter_is_saved_whole_or_not_at_all(tmp_path):
    saver = Saver(adapted(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)))
    save_adapter(saver, tmp_path)
    assert stored_shapes(tmp_path) == adapter_shapes(saver.model)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1, "safetensors leaves its file to its owner"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip

    class Sharded(Saver):
        """As a sharded run might: a tensor is empty, and another one is missing."""

        def save_model(self, folder):
            super().save_model(folder)
            tensors = load_file(f"{folder}/adapter_model.safetensors")
            first, second, *_ = tensors
            del tensors[second]
            save_file({**tensors, first: torch.empty(0)}, f"{folder}/adapter_model.safetensors")

    (tmp_path / "sharded").mkdir()
    with pytest.raises(RunEnded, match="is not whole; its checkpoints are kept"):
        save_adapter(Sharded(saver.model), tmp_path / "sharded")
    assert not (tmp_path / "sharded" / "adapter_config.json").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_is_trained_is_float32_whatever_the_base_is_in():
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.bfloat16}
    prepare_adapter(model, ModelOptions())
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


def test_an_adapter_names_the_base_that_it_is_on(tmp_path):
    """Of one to go on from: the folder of its base, which PEFT can look into without asking the hub."""
    model = adapted(load_base(BASE, ModelOptions("someone/tiny", dtype="float32"), "sdpa"))
    model.peft_config["default"].base_model_name_or_path = "someone/tiny"
    model.peft_config["default"].revision = "0" * 40
    prepare_adapter(model, ModelOptions())
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == (str(BASE), None)


def test_a_snapshot_of_the_hub_is_named_as_the_hub_does(tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--tiny-it" / "snapshots" / ("ab" * 20)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(snapshot), "r": 4}))
    (tmp_path / "adapter_model.safetensors").touch()
    publish_base(tmp_path, {"steps": 8, "best validation loss": None})
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found == {"base_model_name_or_path": "someone/tiny-it", "revision": "ab" * 20, "r": 4}
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "someone/tiny-it"
    assert f"| base | someone/tiny-it at {'ab' * 20} |\n| rank | 4 |" in card
    assert ("| steps | 8 |" in card, "None" in card) == (True, False)
    plain = json.dumps({"base_model_name_or_path": "examples/tiny/base", "revision": None})
    (tmp_path / "adapter_config.json").write_text(plain)
    publish_base(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == json.loads(plain)
    card = (tmp_path / "README.md").read_text()
    assert ("# A LoRA adapter for base\n" in card, "base_model" in card) == (True, False), "no path of this machine"


def test_the_card_of_a_run_says_what_it_is_and_has_no_form_to_fill_in(lora_run):
    record = json.loads((lora_run / "run.json").read_text())
    for folder in (lora_run, *lora_run.glob("checkpoint-*")):
        card = (folder / "README.md").read_text()
        assert "More Information Needed" not in card
        assert all(line in card for line in ("| base | base |", "| rank | 4 |", "mlp.down_proj"))
    card = (lora_run / "README.md").read_text()
    assert f"| best validation loss | {record['best_validation_loss']} |" in card
    assert "| steps | 8 |\n| learning rate | 0.001 |" in card


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("pissa", "changes the base"),
        ("pissa_niter_16", "changes the base"),
        ("olora", "changes the base"),
        ("eva", "eva needs a pass over the data"),
        ("corda", "corda needs a pass over the data"),
        ("lora_ga", "lora_ga needs a pass over the data"),
        ("loftq", "loftq needs a base that it quantises itself"),
    ],
)
def test_an_initialisation_that_is_not_carried_to_the_end_is_refused_with_its_reason(tmp_path, start, message):
    with pytest.raises(UserError, match=rf"lora.init_lora_weights: .*{message}.*arXiv 2602.04998"):
        check_start({"init_lora_weights": start}, None)
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "init_lora_weights": start}))
    with pytest.raises(UserError, match=f"began with {start} and is no plain LoRA"):
        check_start({}, str(tmp_path))
    if start != "eva":  # which takes directions from the data and leaves the base as it is
        with pytest.raises(UserError, match="not linear in its scale"):
            check_linear(tmp_path, 0.5)
    check_linear(tmp_path, 1.0)


def test_other_initialisations_are_taken():
    for start in (True, "gaussian", "orthogonal"):
        check_start({"init_lora_weights": start}, None)
    check_start({}, None)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"peft_type": "LOHA"}]
)
def test_an_adapter_that_is_not_linear_in_its_scale_can_be_had_at_1_alone(tmp_path, settings):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    check_linear(tmp_path, 1.0)
    with pytest.raises(UserError, match=f"scale 0.5: this adapter \\({next(iter(settings))}"):
        check_linear(tmp_path, 0.5)


def test_a_scale_is_a_share_of_what_was_trained():
    model = adapted(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)).eval()
    ids = torch.arange(60, 90)[None]
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    found = {}
    for scale in (0.0, 1.0, 0.5, 1.0):
        set_scale(model, scale)
        with torch.no_grad():
            found[scale] = model(input_ids=ids).logits
    torch.testing.assert_close(found[0.0], base)
    assert (found[0.5] - base).abs().max() > 1e-3
    assert (found[1.0] - found[0.5]).abs().max() > 1e-3


def test_a_pickled_or_absent_adapter_is_refused(tmp_path):
    for function, message in (
        (partial(check_start, {}), "is no adapter folder"),
        (read_adapter, "is no run folder and no adapter"),
    ):
        with pytest.raises(UserError, match=message):
            function(str(tmp_path))
    config = {"peft_type": "LORA", "base_model_name_or_path": "base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights are not loaded"):
        check_start({}, str(tmp_path))
    with pytest.raises(UserError, match="pickled ones are not loaded"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_tool_is_read_by_its_own_config(lora_run, tmp_path):
    folder = copy_run(lora_run, tmp_path)
    expected = load_file(folder / "adapter_model.safetensors")
    (folder / "run.json").unlink()
    shutil.rmtree(folder / "checkpoint-8")
    record = read_adapter(folder)
    assert (record["name"], record["method"], record["commit"]) == ("run", "lora", None)
    assert record["model"]["dtype"] == "float32"
    assert "data" not in record
    live = load_adapter(folder, record)
    assert isinstance(live, PeftModel)
    found = {name.replace(".default", ""): tensor for name, tensor in live.state_dict().items() if "lora_" in name}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "generation" in load_adapter_tokenizer(folder, record).chat_template
    moved = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "not/there"}
    (folder / "adapter_config.json").write_text(json.dumps(moved))
    with pytest.raises(UserError, match="not/there: the folder of the adapter's base is not there"):
        read_adapter(folder)


def test_a_checkpoint_is_read_by_its_runs_record(lora_run):
    assert read_adapter(lora_run / "checkpoint-8") == read_adapter(lora_run) == read_run(lora_run)


MODEL = {"name_or_path": "b", "dtype": "float32", "chat_template": "auto", "attn_implementation": "auto",
         "trust_remote_code": False}  # fmt: skip
RECORD = {"name": "small", "method": "lora", "model": MODEL, "data": {"train": "t"}}


def test_a_run_that_has_not_finished_is_a_user_error(tmp_path, capsys):
    with pytest.raises(UserError, match=r"is no run folder \(it has no run.json\)"):
        read_run(tmp_path)
    record = RECORD | {"status": "stopped"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="holds no adapter yet"):
        read_run(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    assert read_run(tmp_path) == record
    assert "its run was taken up again and is stopped" in capsys.readouterr().out


def test_without_a_path_the_newest_finished_run_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished run"):
        newest_run()
    finished = {"a": ("finished", "2026-01-02"), "b": ("finished", "2026-01-03"), "c": ("running", None)}
    for name, (status, date) in finished.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(RECORD | {"status": status, "finished": date}))
    assert str(newest_run()) == "runs/b"


def test_a_saved_adapter_has_no_key_that_says_nothing_and_older_readers_do_not_know(lora_run):
    """Those of PEFT 0.6 (2023), and none that is left out of the defaults."""
    config = json.loads((lora_run / "adapter_config.json").read_text())
    assert set(config) == set(KNOWN_TO_ALL)
    again = LoraConfig.from_pretrained(lora_run)
    assert (again.r, again.lora_alpha, again.use_dora, again.qalora_group_size) == (4, 8, False, 16)


def test_a_key_that_says_something_is_written(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {"base_model_name_or_path": "b", "r": 8, "use_rslora": True, "use_dora": False, "rank_pattern": {"q": 2}}
        )
    )
    publish_base(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": "b", "r": 8, "use_rslora": True, "rank_pattern": {"q": 2}}
