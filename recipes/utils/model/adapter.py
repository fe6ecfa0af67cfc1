"""A LoRA adapter: where it may begin, what is trained and in which precision, and how it is saved: whole or not."""

import contextlib
import re
import shutil
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from recipes.utils.console import RunEnded, UserError, is_main_process, say
from recipes.utils.files import read_json, sync, sync_path, write_json
from recipes.utils.model.base import ModelOptions, loading, on_hub, skeleton

CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # when they begin: not linear in their scale
SETS = ("target_modules", "exclude_modules", "modules_to_save")
NO_PLAIN_START = (*CHANGE_THE_BASE, "eva")
# Keys of other versions of PEFT, and of state dicts that were saved as they are, to those of today.
OTHER_KEYS = {r"\.modules_to_save(\.default)?(?=\.)": "", r"(\.lora_(?:embedding_)?[AB])\.(?!weight|bias)\w+": r"\1"}
# Keys of adapter_config.json that every reader has known for years; a newer one is written where it says something,
# since older versions of PEFT end at a key that they do not know.
KNOWN_TO_ALL = """
    auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layers_pattern
    layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r revision target_modules task_type""".split()  # noqa: SIM905


def check_start(lora: dict, adapter: str | None) -> None:
    """Raise `UserError` for an initialisation (lora.init_lora_weights) that these recipes do not carry from training to
    the saved adapter, and where `adapter` (model.adapter) is no adapter, or one that training cannot go on from."""
    start = str(lora.get("init_lora_weights", True))
    if start.startswith(NO_PLAIN_START):
        need = "a base that it quantises itself" if start == "loftq" else "a pass over the data"
        why = f"needs {need}, which these recipes do not make"
        why = "changes the base, so its adapter fits no published one" if start[:5] in ("pissa", "olora") else why
        mend = "use gaussian, or leave the key out; tuned, all variants are within 1-2 % (arXiv 2602.04998)"
        raise UserError(f"lora.init_lora_weights: {start} {why}: {mend}")
    if adapter is None:
        return
    if not Path(adapter, "adapter_config.json").is_file():
        raise UserError(f"model.adapter: {adapter} is no adapter folder (it has no adapter_config.json)")
    if not Path(adapter, "adapter_model.safetensors").is_file():
        why = "pickled weights are not loaded, since they can run code"
        raise UserError(f"model.adapter: {adapter} has no adapter_model.safetensors; {why}")
    start = str(read_adapter_config(Path(adapter)).get("init_lora_weights", True))
    if start.startswith(NO_PLAIN_START):
        mend = "convert it with PEFT's path_initial_model_for_weight_conversion first"
        raise UserError(f"model.adapter: {adapter} began with {start} and is no plain LoRA; {mend}")


def check_lora(base: Path, options: ModelOptions, lora: Mapping) -> None:
    """Raise `UserError`, before weights are read, where `options.adapter` does not fit the base, or the section `lora`
    of a new adapter has a name or a layer that the base has not: PEFT is content if one of several is there."""
    if options.adapter:
        return check_fit(Path(options.adapter), base, options)
    model = skeleton(base, options)
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, one in modules.items() if isinstance(one, (torch.nn.Linear, torch.nn.Embedding, Conv1D))]
    layers = [number[1] for name in modules if (number := re.fullmatch(r"\D*\.(\d+)", name))]
    there = dict.fromkeys(("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"), linear)
    there |= {"modules_to_save": [name for name in modules if not name[-1].isdigit()], "layers_to_transform": layers}
    there |= {"target_parameters": [name for name, _ in model.named_parameters()]}
    there |= {"layers_pattern": [name.rpartition(".")[0] for name in modules if name[-1].isdigit()]}
    for key, names in there.items():
        given = lora.get(key) if lora.get(key) != "all-linear" else None
        given = [given] if key == "layers_pattern" and isinstance(given, str) else given
        one = isinstance(given, (str, int))  # a string is a regular expression, as the keys of a pattern are
        for name in map(str, [given] if one else given or ()):
            pattern = name if one else rf"(.*\.)?({name if isinstance(given, dict) else re.escape(name)})"
            with contextlib.suppress(re.error):
                if any(re.fullmatch(pattern, each) for each in names):
                    continue
            ends = {each.rpartition(".")[2] for each in names}
            near = sorted(ends, key=lambda end: (-SequenceMatcher(None, name, end).ratio(), end))[:9]
            form = "; all-linear, without brackets, is every one but the head" * name.startswith("all")
            form += f"; several are written [{name.replace(',', ', ')}]" * (one and set(name.split(",")) <= ends)
            raise UserError(f"lora.{key}: {name!r} matches nothing in this model, which has {', '.join(near)}{form}")
    return None


def check_fit(folder: Path, base: Path, options: ModelOptions) -> None:
    """Raise `UserError`, before weights are read, unless the keys of the adapter in `folder` are, by name and shape,
    those that PEFT looks for in this base: it drops the ones that do not fit, and goes on without those that lack."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    read_adapter_config(folder)
    try:
        model, stored = skeleton(base, options), stored_shapes(folder)
    except SafetensorError as error:
        raise UserError(f"{folder}/adapter_model.safetensors: is not whole ({error}); copy it again") from error
    fit_vocabulary(model, stored)
    config = PeftConfig.from_pretrained(str(folder))
    config.init_lora_weights = False  # none are computed
    try:
        model = PeftModel(model, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: cannot be put on {options.name_or_path}: {str(error).splitlines()[0]}") from error
    wanted = {key: list(it.shape) for key, it in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    known = {key: list(it.shape) for key, it in model.state_dict().items()} | wanted  # embeddings may be saved beside
    odd = [key for key in stored if known.get(key) != stored[key]] + [key for key in wanted if key not in stored]
    if not odd:
        return
    fitting, key = sum(known.get(key) == shape for key, shape in stored.items()), odd[0]
    why = "has no place there: is it of another architecture, or saved by a version that names layers otherwise?"
    if key in known:
        why = f"is {stored.get(key, 'not in its file')}, and {known[key]} there: is it of another base, or cut?"
    count = f"{fitting} of {len(stored)} keys of the adapter fit {options.name_or_path}, which takes {len(wanted)}"
    raise UserError(f"{folder}: {count}; the first that does not, {key}, {why}")


def fit_vocabulary(model, shapes: dict[str, list[int]]) -> None:
    """Resize the vocabulary of `model` to that of an adapter with these `shapes`, if it has an embedding or a head."""
    parts = [id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())]
    for name in [f"base_model.model.{name}" for name, module in model.named_modules() if id(module) in parts]:
        sizes = shapes.get(f"{name}.weight") or shapes.get(f"{name}.lora_embedding_A", [])[::-1]
        if sizes and sizes[0] != (before := model.get_input_embeddings().num_embeddings):
            model.resize_token_embeddings(sizes[0], mean_resizing=False)  # all rows will be the adapter's
            if model.device.type != "meta":
                say(f"vocabulary: {sizes[0]:,} rows, as the adapter has it, in the place of the base's {before:,}")


def load_onto(model, folder: Path | str, config=None):
    """The adapter in `folder` on `model`, a base that `check_fit` has let pass, with the adapter's vocabulary; to be
    trained further, with its `config`."""
    from peft import PeftModel

    fit_vocabulary(model, stored_shapes(Path(folder)))
    how = {"config": config, "is_trainable": config is not None}
    how["key_mapping"] = {**getattr(model, "_checkpoint_conversion_mapping", {}), **OTHER_KEYS}
    with loading(str(folder)):
        return PeftModel.from_pretrained(model, folder, **how)


def fast_lora(config, options: ModelOptions):
    """`config` (a LoraConfig), by which PEFT builds layers that move less memory than its own and compute the same,
    unless `options.fast_lora` is false or it has what they do not know: PEFT's classes with another forward pass, so
    that names, files and merges are as they were. PEFT calls this hook experimental; nothing of it is saved."""
    from bitsandbytes.nn import Linear4bit as BaseLinear4bit
    from peft.tuners.lora import Linear, Linear4bit  # here: PEFT takes seconds, and a merge needs none of it

    pairs = {torch.nn.Linear: Linear, BaseLinear4bit: Linear4bit}  # not their subclasses: layers in 8 bit are some
    kinds = {base: type(f"Fast{kind.__name__}", (FastForward, kind), {}) for base, kind in pairs.items()}

    def layer(target, adapter_name: str, config, **kwargs):
        """The adapter's layer around `target`, which may have one already; None leaves it to PEFT."""
        kind = kinds.get(type(target.get_base_layer() if hasattr(target, "get_base_layer") else target))
        return kind(target, adapter_name, config=config, **kwargs) if kind and not config.fan_in_fan_out else None

    others = config.lora_dropout, config.use_dora, config.lora_bias, options.compile_layers
    if options.fast_lora and not any(others):
        config._register_custom_module({torch.nn.Linear: layer})
    return config


def has_fast_lora(model) -> bool:
    return any(isinstance(module, FastForward) for module in model.modules())


class FastForward:
    """The forward pass of a LoRA layer, before whose class in PEFT it goes. That class keeps what this is not for: no
    adapter or several, merged ones, DoRA and its like, dropout, a trained base layer, mixed batches, dtypes that have
    to be brought together, and compilation, which joins the passes over memory by itself."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        found = None if args or kwargs else self._fast(x)
        return super().forward(x, *args, **kwargs) if found is None else found  # type: ignore[misc]

    def _fast(self, x: torch.Tensor) -> torch.Tensor | None:
        layer: Any = self
        name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
        if name not in layer.lora_A or name in layer.lora_variant or layer.disable_adapters or layer.merged:
            return None
        base, a, b, device = layer.base_layer, layer.lora_A[name], layer.lora_B[name], x.device.type
        drops = layer.training and not isinstance(layer.lora_dropout[name], torch.nn.Identity)
        trained = b.bias is not None or any(parameter.requires_grad for parameter in base.parameters())
        if drops or trained or torch.compiler.is_compiling():
            return None
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else a.weight.dtype
        if hasattr(base, "compute_dtype"):  # in 4 bit
            fits = x.dtype == dtype and base.compute_dtype in (None, dtype)
        else:
            fits = autocast or x.dtype == base.weight.dtype == dtype
        weights = a.weight.to(dtype), b.weight.to(dtype)
        return AddsIntoBase.apply(x.to(dtype), *weights, layer.scaling[name], base) if fits else None


class AddsIntoBase(torch.autograd.Function):
    """base(x) + scaling · x Aᵀ Bᵀ for a frozen `base`. PEFT multiplies the full-width product by the scale, adds it to
    the base's output in a third tensor, and has autograd do that again backward and sum two gradients of x: together a
    fifth of a 7B model's step. Here the scale goes to the narrow x Aᵀ, and the matrix products make both sums."""

    @staticmethod
    def forward(ctx, x, a, b, scaling: float, base):
        output = base(x)
        narrow = (x.reshape(-1, x.shape[-1]) @ a.t()).mul_(scaling)
        output.view(-1, output.shape[-1]).addmm_(narrow, b.t())
        ctx.save_for_backward(x, narrow, a if ctx.needs_input_grad[0] else None, b)
        # The weight is looked up backward: where it is spread over processes, it lies elsewhere by then.
        ctx.scaling, ctx.base, ctx.state = scaling, base, getattr(base.weight, "quant_state", None)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, narrow, a, b = ctx.saved_tensors
        gradient, weight, of_x = gradient.reshape(-1, gradient.shape[-1]), ctx.base.weight, None
        inner = (gradient @ b).mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            if ctx.state is not None:
                from bitsandbytes.functional import dequantize_4bit

                weight = dequantize_4bit(weight.data, ctx.state)
            of_x = (gradient @ weight.to(gradient.dtype)).addmm_(inner, a).view(x.shape)
        return of_x, inner.t() @ x.reshape(-1, x.shape[-1]), gradient.t() @ narrow, None, None


def read_adapter_config(folder: Path) -> dict:
    """adapter_config.json of the adapter in `folder`. Raises `UserError` for one that no adapter can be made of."""
    path = Path(folder) / "adapter_config.json"
    kinds: dict[str, Any] = dict.fromkeys(("base_model_name_or_path", "revision", "bias"), str | None)
    kinds |= dict.fromkeys(("target_modules", "modules_to_save"), str | list | None)
    kinds |= dict.fromkeys(("rank_pattern", "alpha_pattern"), dict | None)
    config = read_json(path, kinds | {"peft_type": str, "r": int | None, "lora_alpha": int | float | None})
    ranks = [1 if config.get("r") is None else config["r"], *(config.get("rank_pattern") or {}).values()]
    alphas = [config.get("lora_alpha") or 0, *(config.get("alpha_pattern") or {}).values()]
    whole = all(type(rank) is int and rank > 0 for rank in ranks)
    if not whole or not all(type(alpha) in (int, float) and abs(alpha) < 1e9 for alpha in alphas):
        raise UserError(f"{path}: r and rank_pattern are whole numbers above 0, lora_alpha and alpha_pattern numbers")
    targets = config.get("target_modules")
    patterns = [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    for pattern in [*patterns, *([targets] if isinstance(targets, str) else ())]:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{path}: {pattern[:60]!r} is no regular expression: {error}") from error
    return config


def prepare_adapter(model, options: ModelOptions, backend: str = "inductor") -> None:
    """Make a model with its adapter ready to train: what is trained in float32, since in 16 bit small steps are rounded
    away, and the levers on speed of `options`, which leave the losses as they are. Call it when the trainer is built,
    which casts an adapter on a 4-bit base to bfloat16. `backend` is torch.compile's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    base = getattr(model.get_base_model(), "name_or_path", "")
    for config in model.peft_config.values():
        # An adapter to go on from names its base as the hub does, and PEFT would ask the hub for it at each save.
        config.base_model_name_or_path, config.revision = base or None, on_hub(base)[1]
    if options.fast_lora:
        others = "PEFT's own LoRA layers, which dropout, DoRA, lora_bias and compiled layers need"
        say(f"speed: {'fast LoRA layers' if has_fast_lora(model) else others}")
    if not options.adapter_input_cast:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module._cast_input_dtype = cast_outside_autocast
        say("speed: no float32 copy of each adapter's input")
    if options.compile_layers:
        from transformers.modeling_layers import GradientCheckpointingLayer  # here: it brings accelerate and scipy

        backbone = model.get_base_model().base_model
        backbone.register_forward_pre_hook(for_one_graph, with_kwargs=True)
        for layer in backbone.modules():
            if isinstance(layer, GradientCheckpointingLayer):  # what transformers calls a decoder layer, by any name
                layer.compile(backend=backend)  # in place: no name in a checkpoint changes
        say("speed: decoder layers compiled, which the first steps pay for")


def for_one_graph(module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
    """What the compiled layers of `module` would be compiled anew for at each packed row: how many chats it holds, and
    how long the longest is, which the kernel takes as a bound."""
    for name in {"cu_seq_lens_q", "cu_seq_lens_k"} & inputs.keys():
        torch._dynamo.maybe_mark_dynamic(inputs[name], 0)
    for name in {"max_length_q", "max_length_k"} & inputs.keys():
        inputs[name] = max(4096, 1 << (int(inputs[name]) - 1).bit_length())
    return args, inputs


def cast_outside_autocast(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """PEFT casts each adapter's input to float32, and autocast casts it back: the same values, a copy in memory more.
    Outside of autocast (generation) the cast is needed."""
    return x if x is None or torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def adapter_shapes(model) -> dict[str, list[int]]:
    """{name in the adapter's file: shape} of the adapter of `model`."""
    from peft import get_peft_model_state_dict

    return {peft_key(name): list(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}


def holds_adapter(folder: Path | str, model) -> bool:
    """Whether the adapter file in `folder` has the tensors of the adapter of `model`, by name and shape."""
    return stored_shapes(Path(folder)) == adapter_shapes(model)


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """{name, as PEFT has it now: shape} of the adapter file in `folder`."""
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return {peft_key(name): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def peft_key(name: str) -> str:
    """The `name` of a tensor in an adapter's file, as PEFT has it now."""
    for pattern, now in OTHER_KEYS.items():
        name = re.sub(pattern, now, name)
    return name


def save_adapter(trainer, folder: Path) -> None:
    """Write adapter, tokenizer and template into `folder`, each whole and adapter_config.json last: it stands for all.
    Raises `RunEnded` if tensors of the adapter are missing or flattened, as sharded training can leave them."""
    staging, last = Path(folder) / ".adapter", Path(folder) / "adapter_config.json"
    try:
        trainer.save_model(str(staging))
        if not is_main_process():
            return
        if not holds_adapter(staging, trainer.model):
            raise RunEnded("failed", f"{staging}: the adapter that was written is not whole; its checkpoints are kept")
        (staging / "training_args.bin").unlink()  # a pickle, with the paths of this machine
        steps, rate, best = trainer.state.global_step, trainer.args.learning_rate, trainer.state.best_metric
        publish_base(staging, {"steps": steps, "learning rate": rate, "best validation loss": best})
        sync(staging)
        last.unlink(missing_ok=True)  # of a run that was taken up again: never beside weights of another time
        sync_path(Path(folder))
        for path in sorted(staging.iterdir(), key=lambda path: path.name == last.name):
            path.replace(Path(folder) / path.name)
        sync_path(Path(folder))
    finally:
        if is_main_process():
            shutil.rmtree(staging, ignore_errors=True)


def publish_base(folder: Path, facts: dict | None = None) -> None:
    """Make a saved adapter fit to be given away: safetensors leaves its file to its owner alone, PEFT writes sets in an
    order of each process's own, and a base from the hub is named as this machine's cache keeps it; here as the hub
    does, with its commit. Keys that say nothing go; the card, a form to fill in, becomes one that tells the `facts`."""
    from peft import LoraConfig

    says_nothing = vars(LoraConfig())
    path = Path(folder) / "adapter_config.json"
    path.with_name("adapter_model.safetensors").chmod(path.stat().st_mode)
    config: dict[str, Any] = read_json(path)
    config |= {key: sorted(config[key]) for key in SETS if isinstance(config.get(key), list)}
    config = {key: value for key, value in config.items() if key in KNOWN_TO_ALL or value != says_nothing.get(key)}
    name, commit = on_hub(config["base_model_name_or_path"] or "")
    config |= {"base_model_name_or_path": name, "revision": commit} if commit else {}
    write_json(path, config)
    name, targets = name if commit else Path(name).name, config.get("target_modules") or []
    on = targets if isinstance(targets, str) else ", ".join(targets)
    shown = {"base": f"{name} at {commit}" if commit else name, "rank": config.get("r"), "on": on, **(facts or {})}
    lines = ["---", *([f"base_model: {name}"] if commit else []), "library_name: peft", "tags: [lora, sft, trl]", "---"]
    lines += ["", f"# A LoRA adapter for {name}", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in shown.items() if value is not None]
    lines += ["", "`run.json` of its run has each setting, its data's hashes, versions and results. PEFT loads it:"]
    lines += ["`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)`", ""]
    path.with_name("README.md").write_text("\n".join(lines), encoding="utf-8")
