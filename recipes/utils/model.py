"""Tokenizer, base model and attention, each choice with its reason."""

import os

from recipes.utils.adapter import CHANGE_THE_BASE
from recipes.utils.attention import VARLEN
from recipes.utils.chat_template import choose_chat_template
from recipes.utils.config import Config, ModelOptions
from recipes.utils.console import UserError, out, say
from recipes.utils.hub import hub_errors, pin_revision, say_download

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

INSTALL_FLASH = "pip install --no-build-isolation -r requirements-gpu.txt"


def check_machine(config: Config) -> None:
    """Refuse a run that this machine cannot do, before data or weights are read; of a base on the hub, take one commit.

    Raises:
        UserError: several GPUs without a launcher; a precision that the model does not stand; Liger's kernels where they
            cannot run; billions of parameters without a GPU; sharding (FSDP) that would not take place.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if config.training["use_cpu"]:
            raise UserError("FSDP was asked for, and without GPUs it would be plain data parallelism: use ddp.yaml")
        if str(config.lora.get("init_lora_weights")).startswith(CHANGE_THE_BASE):
            raise UserError(
                "lora.init_lora_weights: an adapter that changes the base cannot be saved from FSDP's parts"
            )
        storage = config.quantization.get("bnb_4bit_quant_storage")
        if config.method == "qlora" and storage != config.model.dtype:
            raise UserError(
                "FSDP leaves 4-bit weights that are kept as bytes whole on each GPU: "
                f"--quantization.bnb_4bit_quant_storage {config.model.dtype}"
            )
    gpus = 0 if config.training["use_cpu"] else torch.cuda.device_count()
    recipe = f"recipes/sft_{config.method}.py"
    if gpus > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"{gpus} GPUs are visible and no launcher was used: accelerate launch --num_processes {gpus} {recipe} ..., "
            f"or one GPU: CUDA_VISIBLE_DEVICES=0 python {recipe} ..."
        )
    if config.model.trust_remote_code:
        out.print(f"[bold red]model.trust_remote_code: code that comes with {config.model.name_or_path} is run here[/]")
    pin_revision(config.model)
    model_config = load_model_config(config.model)
    if config.model.dtype == "float16" and model_config.model_type.startswith("qwen2"):
        raise UserError("model.dtype: Qwen2 gives NaN in float16; use bfloat16, or float32 on a GPU without bfloat16")
    if config.training.get("use_liger_kernel") and not (gpus and is_liger_kernel_available()):
        why = "it is not installed: pip install liger-kernel" if gpus else "its kernels run on a GPU alone"
        raise UserError(f"training.use_liger_kernel: {why}; or leave the key out")
    billions = count_parameters(model_config) / 1e9
    if not torch.cuda.is_available() and billions > 1 and not config.cpu_asked_for:
        raise UserError(
            f"{config.model.name_or_path} has {billions:.1f} billion parameters and this machine has no GPU that torch "
            "sees (nvidia-smi shows whether there is one); --training.use_cpu true trains on the CPU all the same"
        )


def check_sharded(trainer) -> None:
    """Raise `UserError` if the launcher was to shard the model (FSDP) and `trainer` does not."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise UserError("FSDP was asked for and is not in use: launch with configs/accelerate/fsdp2.yaml as it is")


def load_model_config(options: ModelOptions):
    """The base model's own configuration, without its weights."""
    with hub_errors(options.name_or_path, options.revision):
        return AutoConfig.from_pretrained(
            options.name_or_path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )


def count_parameters(model_config) -> int:
    """Parameters of the model that `model_config` describes; no memory is taken for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(model_config).parameters())


def load_tokenizer(options: ModelOptions) -> tuple:
    """(tokenizer with the chat template that will be trained and saved, one line that says which and why)."""
    with hub_errors(options.name_or_path, options.revision):
        tokenizer = AutoTokenizer.from_pretrained(
            options.name_or_path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    if not tokenizer.is_fast:
        raise UserError(f"{options.name_or_path}: has no fast tokenizer (tokenizer.json)")
    if prepends_blanks(tokenizer):
        tokenizer.backend_tokenizer.normalizer = None
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        say(
            "tokenizer: the base's legacy form puts a blank after every control token; mended, as mistral-common has it"
        )
    template, reason = choose_chat_template(tokenizer, options.chat_template, load_model_config(options).model_type)
    tokenizer.chat_template = template
    return tokenizer, reason


def prepends_blanks(tokenizer) -> bool:
    """True for the legacy form of sentencepiece tokenizers, which puts a blank before every stretch of text between
    control tokens, and not before the first one alone."""
    tokens = tokenizer.backend_tokenizer.encode(f"{tokenizer.eos_token}a", add_special_tokens=False).tokens
    return tokens[-1].startswith("▁")


def choose_attention(options: ModelOptions, use_cpu: bool) -> tuple[str, str]:
    """(the attention implementation, why): `auto` is the fastest one here that keeps packed chats apart.

    Raises:
        UserError: if the one asked for cannot be had here; another is never taken in its place.
    """
    setting = options.attn_implementation
    if use_cpu or not torch.cuda.is_available():
        missing = "there is no GPU" if not torch.cuda.is_available() else "the run is on the CPU"
    elif torch.cuda.get_device_capability()[0] < 8:
        missing = f"{torch.cuda.get_device_name()} is older than Ampere"
    elif options.dtype == "float32":
        missing = "it has no float32"
    else:
        missing = None
    no_flash = missing or (None if is_flash_attn_2_available() else "flash-attn is not installed")
    if setting == "auto":
        if not no_flash:
            return "flash_attention_2", "fastest"
        if not missing:
            return VARLEN, f"torch's own, chat by chat; {no_flash}"
        return "sdpa", f"no faster one here: {missing}"
    if setting == "flash_attention_2" and no_flash:
        raise UserError(
            f"model.attn_implementation: flash_attention_2 cannot be had here: {no_flash}. It wants an Ampere or newer "
            f"GPU and: {INSTALL_FLASH}; auto takes what is there"
        )
    on_cpu = use_cpu or not torch.cuda.is_available()
    if setting == VARLEN and missing and not on_cpu:
        raise UserError(f"model.attn_implementation: varlen cannot be had here: {missing}; auto takes what is there")
    if setting == "flex_attention" and use_cpu:
        raise UserError("model.attn_implementation: flex_attention cannot train on a CPU; use auto")
    if setting not in ("sdpa", "eager", VARLEN, "flash_attention_2", "flash_attention_3", "flex_attention"):
        raise UserError(
            f"model.attn_implementation: unknown {setting!r}; use auto, varlen, sdpa, eager or flash_attention_2"
        )
    return setting, "as asked for"


def load_base_model(options: ModelOptions, attention: str, use_cpu: bool, quantization_config=None):
    """The base model in `options.dtype` on this process's device, 4-bit if `quantization_config` says so."""
    device = "cpu" if use_cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with hub_errors(options.name_or_path, options.revision):
        say_download(options)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                options.name_or_path,
                revision=options.revision,
                trust_remote_code=options.trust_remote_code,
                dtype=getattr(torch, options.dtype),
                attn_implementation=attention,
                device_map={"": device},
                quantization_config=quantization_config,
                use_safetensors=True,
            )
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{options.name_or_path}: its weights do not fit what is free on {device}; nvidia-smi shows what else runs "
                "there, recipes/plan_run.py what would fit"
            ) from error
    keep_nf4_as_packed(model)
    fit_to_save(model)
    return model


def fit_to_save(model) -> None:
    """Clear sampling settings without do_sample from generation_config: with them, the very last save raises."""
    if not model.generation_config.do_sample:
        model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None


def keep_nf4_as_packed(model) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first evaluation on CPUs with AVX512-BF16: it never packs
    them back, which moves the logits and makes a resumed run another run."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_run_base(record: dict):
    """The base model of a run, in the precision that it was trained on; `record` is the run's run.json."""
    options, use_cpu = ModelOptions(**record["model"]), not torch.cuda.is_available()
    quantization_config = BitsAndBytesConfig(**record["quantization"]) if record["method"] == "qlora" else None
    return load_base_model(options, choose_attention(options, use_cpu)[0], use_cpu, quantization_config)
