"""The base model: a folder, or a snapshot of the hub at one commit; how it is computed here; loaded as asked for."""

import contextlib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, constants, errors, snapshot_download
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from recipes.utils.console import UserError, is_main_process, out, say
from recipes.utils.data import Finding
from recipes.utils.files import file_hash, is_within, read_json, write_json

VARLEN = "varlen"  # attention.py; with "flash" in it, transformers would look for that package
ATTENTIONS = ("sdpa", "eager", VARLEN, "flash_attention_2", "flash_attention_3", "flex_attention")
SAME_WAY, MANY = 0.95, 20  # the cosine of two rows, and how many rows of never-used tokens point the same way
SMALL_FILES = ["*.json", "tokenizer*", "*.jinja", "*.txt", "*.py"]  # all of a model but its weights
PICKLED = (
    "has no safetensors weights; pickled ones are not loaded, since they can run code. Convert them: transformers' "
    "from_pretrained and save_pretrained, on a machine that you can spare"
)


@dataclass(frozen=True)
class ModelOptions:
    """What to load."""

    name_or_path: str = ""  # required: a folder, or a name on the Hugging Face hub
    revision: str | None = None  # of a name on the hub: a branch, tag or commit
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the base's weights and of the arithmetic
    attn_implementation: str = "auto"  # auto is the fastest here that keeps packed chats apart
    chat_template: str = "auto"  # auto is the model's own; or a name (mistral, chatml, llama3 ...), a .jinja file
    adapter: str | None = None  # a LoRA folder to go on from
    adapter_input_cast: bool = False  # PEFT's cast of each adapter's input to float32: same losses, more memory
    fast_lora: bool = True  # LoRA layers that move less memory than PEFT's and compute the same
    compile_layers: bool = False  # torch.compile of each decoder layer
    trust_remote_code: bool = False  # run code that comes with the model


def find_base(options: ModelOptions, commit: str | None = None, weights: bool = True) -> Path:
    """The folder of the base: `name_or_path` itself, or a snapshot of the hub at one commit, with configuration,
    tokenizer, template and, unless `weights` is False, the safetensors that its index names. The commit is `commit`;
    else that of `options.adapter`, unless there is an `options.revision`; else what the revision stands for today. The
    cache serves what it has whole. The network is used here and nowhere else. Raises `UserError` if there is no such
    folder or model, or the hub cannot be reached and the cache has it not whole."""
    folder, (name, snapshot) = Path(options.name_or_path), on_hub(options.name_or_path)
    if (folder / "config.json").is_file():
        return folder
    if snapshot:  # of another machine's cache, as its adapters name their base
        commit = snapshot
    elif folder.name.startswith("models--"):
        name, revision = folder.name.removeprefix("models--").replace("--", "/"), commit or options.revision or "main"
        if base := _cached(name, revision, weights, folder.parent):
            return base
        what = f"by its name the hub's cache of {name}, in which {revision} is not there, or not whole"
        raise UserError(f"{folder}: {what}; give {name}, to have it fetched, or another model.revision")
    elif folder.is_dir():
        raise UserError(f"{name}: is no model folder (it has no config.json)")
    if commit is None and options.adapter and options.revision is None:
        adapter = read_json(Path(options.adapter) / "adapter_config.json")
        commit = adapter.get("revision") if adapter.get("base_model_name_or_path") == name else None
    with loading(name):
        # Asked also where the cache has the branch, which may have moved since.
        commit = commit or HfApi().resolve_revision(name, revision=options.revision).resolved
        base = _cached(name, commit, weights) or _download(name, commit, weights)
    if base is None:
        why = PICKLED if weights else "has no config.json and tokenizer"
        offline = "is not whole in the cache, and HF_HUB_OFFLINE keeps the Hugging Face hub out of reach"
        raise UserError(f"{name}: {offline if constants.HF_HUB_OFFLINE else why}")
    return base


def on_hub(base: Path | str) -> tuple[str, str | None]:
    """(the hub's name, the commit) of a snapshot in a cache of the hub; (its path, None) of any other folder."""
    found = re.fullmatch(r"(?:.*/)?models--([^/]+)/snapshots/([0-9a-f]{40})/?", str(base))
    return (found[1].replace("--", "/"), found[2]) if found else (str(base), None)


def _cached(name: str, revision: str, weights: bool, cache: Path | None = None) -> Path | None:
    """The snapshot in the cache, if its configuration, tokenizer and, where asked for, weights are all there."""
    how: dict[str, Any] = {"allow_patterns": SMALL_FILES, "local_files_only": True, "cache_dir": cache}
    try:
        base = Path(snapshot_download(name, revision=revision, **how))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    tokenizer = any((base / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    needed = ["config.json", *(_weights(base) if weights else [])]
    return base if tokenizer and all((base / file).is_file() for file in needed) else None


def _weights(base: Path) -> list[str]:
    """The files that the index names: what else lies there (Mistral's consolidated.safetensors) is the same twice.
    Raises `UserError` for an index that is none, or that names files elsewhere."""
    index = base / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    names = read_json(index, {"weight_map": dict})["weight_map"].values()
    if wrong := [name for name in names if not is_within(name) or not name.endswith(".safetensors")]:
        raise UserError(f"{index}: names {wrong[0]!r}, which is no safetensors file of its folder")
    return sorted(set(names))


def base_hashes(base: Path) -> dict[str, str]:
    """{file: SHA-256} of the configuration and the weights in `base`. The cache keeps them by place, size and times,
    since 15 GB take some ten seconds."""
    memory = Path(constants.HF_HOME) / "lora-recipes" / "sha256.json"
    known = {}
    with contextlib.suppress(UserError):
        known = read_json(memory)

    def look(path: Path) -> tuple[str, list]:
        stat = path.stat()
        now = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        kept = known.get(str(path))
        return str(path), kept if isinstance(kept, list) and kept[:-1] == now else [*now, file_hash(path)]

    names = [name for name in ("config.json", *_weights(base)) if (base / name).is_file()]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(look, [(base / name).resolve() for name in names]))
    # what was changed a moment ago may be changed again without another time
    old = {path: entry for path, entry in found if time.time_ns() - max(entry[2:4]) > 2e9}
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, known | old)
    return {name: entry[-1] for name, (_, entry) in zip(names, found, strict=True)}


def _download(name: str, commit: str, weights: bool) -> Path | None:
    how = {"revision": commit, "allow_patterns": SMALL_FILES}
    how["allow_patterns"] = _weights(Path(snapshot_download(name, **how)))
    if weights and not constants.HF_HUB_OFFLINE:
        size = sum(file.file_size for file in snapshot_download(name, dry_run=True, **how) if file.will_download)
        say(f"base: fetching {size / 1e9:,.2f} GB of {name} from the Hugging Face hub, once")
        snapshot_download(name, tqdm_class=tqdm if is_main_process() else None, **how)  # the libraries' bars are off
    return _cached(name, commit, weights)


@contextlib.contextmanager
def loading(name: str):
    """Turn what loading `name` raises into a line that says what to do: files that were cut in a download, or are no
    model's, fail in any way that Python and the libraries do. In here the hub's client does not report what
    it is used for: with the first request of a day it would fetch a list of AI agents, to see which one runs."""
    before, constants.HF_HUB_DISABLE_TELEMETRY = constants.HF_HUB_DISABLE_TELEMETRY, True
    try:
        yield
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UserError(name + _what_to_do(error, name)) from error
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


def _what_to_do(error: Exception, name: str) -> str:
    chain, hub = (error, error.__cause__, error.__context__), "the Hugging Face hub"
    private = f"no such model on {hub}; if it is a private one: hf auth login"
    unreached = (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, ConnectionError)
    mends = {  # the first that fits: some kinds are kinds of another
        errors.GatedRepoError: f" is gated: accept its licence at https://huggingface.co/{name}, then: hf auth login",
        errors.RepositoryNotFoundError: f": no such folder here, and {private}",
        errors.RevisionNotFoundError: f": {hub} has no such model.revision; it is a branch, a tag or a commit",
        errors.HFValidationError: ": there is no such folder; paths are relative to where the command runs",
        unreached: f": there is no such folder here, and {hub} cannot be reached; give a folder as model.name_or_path",
    }
    for kinds, mend in mends.items():
        if any(isinstance(one, kinds) for one in chain):
            return mend
    if isinstance(error, OSError) and str(error.filename).startswith(constants.HF_HOME):
        return f": {error.filename} cannot be written: {error.strerror}; name another cache: export HF_HOME=FOLDER"
    text = " ".join(map(str, chain)).lower()
    if "trust_remote_code" in text:
        return " comes with code of its own: read it, and where you trust it, --model.trust_remote_code true"
    if isinstance(error, SafetensorError):
        return f": its weights are cut or damaged ({error}); copy or download them again"
    if "connect" in text:
        return mends[unreached]
    first = (str(error).splitlines() or [type(error).__name__])[0]
    no_weights = "safetensors" in text and isinstance(error, OSError)
    return f": {PICKLED}" if no_weights else f": cannot be loaded: {first}"


def model_config(base: Path, options: ModelOptions):
    """The base's own configuration, without its weights."""
    with loading(options.name_or_path):
        return AutoConfig.from_pretrained(base, trust_remote_code=options.trust_remote_code, local_files_only=True)


def skeleton(base: Path, options: ModelOptions):
    """The model of `base` without its weights, on torch's device `meta`: no memory is taken."""
    config = model_config(base, options)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)


def check_base(base: Path, options: ModelOptions, use_cpu_asked: bool, method: str = "lora", max_length: int = 0):
    """Raise `UserError` for a base that cannot be trained here: Qwen2 in float16; billions of parameters without a GPU,
    unless `use_cpu_asked` for; weights that are quantised, but for 4 bit and the `method` qlora; fewer positions than
    `max_length`, each with an embedding. Says that code of the model's own is run, where it is."""
    if options.trust_remote_code and is_main_process():
        out.print(f"[bold red]model.trust_remote_code: code that comes with {options.name_or_path} is run here[/]")
    config = model_config(base, options)
    if options.dtype == "float16" and config.model_type.startswith("qwen2"):
        raise UserError("model.dtype: Qwen2 gives NaN in float16; use bfloat16, or float32 on a GPU without bfloat16")
    if quantised := read_json(base / "config.json").get("quantization_config"):
        _check_quantised(options.name_or_path, quantised, method)
    model, positions = skeleton(base, options), context_of(config) or max_length
    vocabulary = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not vocabulary]
    if max_length > positions and {positions, positions + 2} & set(tables):  # OPT's has two more, for padding
        only = f"{options.name_or_path} has an embedding for each of {positions:,} positions and no more"
        raise UserError(f"training.max_length: {max_length:,}, and {only}: --training.max_length {positions}")
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    if billions > 1 and not use_cpu_asked and not torch.cuda.is_available():
        why = "this machine has no GPU that torch sees (nvidia-smi shows whether there is one)"
        mend = "--training.use_cpu true trains on the CPU all the same"
        raise UserError(f"{options.name_or_path} has {billions:.1f} billion parameters and {why}; {mend}")


def context_of(config) -> int | None:
    """How many tokens a model was made for, by its `config`, also where YaRN stretches it; None if it does not say."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    stretched = int((rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or 0))
    return max(getattr(text, "max_position_embeddings", None) or 0, stretched) or None


def _check_quantised(name: str, settings: dict, method: str) -> None:
    of = re.sub("[-_](unsloth-)?bnb-4bit$", "", name)  # as they are named on the hub
    whole, flag = (of, of) if of != name else ("the 16-bit model that it was made from", "NAME")
    if not settings.get("load_in_4bit"):
        kind = settings.get("quant_method")
        raise UserError(f"{name}: its weights are quantised already ({kind}); adapters are trained here on {whole}")
    if method == "lora":
        why = "its weights are in 4 bit already, and LoRA wants them in 16 or 32 bit"
        raise UserError(f"{name}: {why}: recipes/sft_qlora.py takes it; or train on {whole}")
    say(f"base: in 4 bit already, whatever the section `quantization` says. A merge will want {whole}:")
    say(f"      python recipes/merge_adapter.py RUN --base-model {flag}")


def choose_attention(base: Path, options: ModelOptions, use_cpu: bool, packing: bool = False) -> str:
    """The attention implementation, told with its reason; `auto` is the fastest here that keeps packed chats apart and
    that the architecture has. Raises `UserError` if the one asked for cannot be had; another is never taken for it."""
    attention, reason = attention_and_reason(model_config(base, options), options, use_cpu, packing)
    say(f"attention: {attention} ({reason})")
    return attention


def attentions_of(architecture) -> tuple[str, ...]:
    """The attention implementations that the model class of a configuration has; all, where its code is its own.
    `varlen` is right where sdpa is, which knows no softcapping (Gemma 2) and no sinks (gpt-oss)."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(architecture), None)
    if kind is None:
        return ATTENTIONS
    has = {"sdpa": kind._supports_sdpa, VARLEN: kind._supports_sdpa and kind._supports_attention_backend, "eager": True}
    has |= {"flex_attention": kind._supports_flex_attn}
    return tuple(name for name in ATTENTIONS if has.get(name, kind._supports_flash_attn))


def attention_and_reason(architecture, options: ModelOptions, use_cpu: bool, packing: bool = False) -> tuple[str, str]:
    """What `choose_attention` takes and says, for a model of the configuration `architecture`."""
    has, model_type = attentions_of(architecture), architecture.model_type
    setting, on_cpu = options.attn_implementation, use_cpu or not torch.cuda.is_available()
    missing = "it has no float32" if options.dtype == "float32" else None
    if on_cpu:
        missing = "the run is on the CPU" if torch.cuda.is_available() else "there is no GPU"
    elif torch.cuda.get_device_capability()[0] < 8:
        missing = f"{torch.cuda.get_device_name()} is older than Ampere"
    no_flash = missing or (None if is_flash_attn_2_available() else "flash-attn is not installed")
    if setting == "auto" and on_cpu and packing and VARLEN in has:
        return VARLEN, f"chat by chat; {missing}"
    if setting == "auto" and not no_flash and "flash_attention_2" in has:
        return "flash_attention_2", "fastest"
    if setting == "auto" and not missing and VARLEN in has:
        return VARLEN, f"torch's own, chat by chat; {no_flash or f'{model_type} has no flash attention'}"
    if setting == "auto":
        faster = f"no faster one here: {missing}" if missing else f"{model_type} has no varlen; {no_flash}"
        return ("sdpa", faster) if "sdpa" in has else ("eager", f"{model_type} has no sdpa; {no_flash}")
    if setting not in ATTENTIONS:
        wrong = f"unknown {setting!r}; use auto, varlen, sdpa, eager or flash_attention_2"
    elif setting not in has:
        wrong = f"{model_type} has no {setting}; auto takes what is there"
    elif setting == "flash_attention_2" and no_flash:
        wants = "an Ampere or newer GPU and: pip install --no-build-isolation -r requirements-gpu.txt"
        wrong = f"flash_attention_2 cannot be had here: {no_flash}. It wants {wants}; auto takes what is there"
    elif setting == VARLEN and missing and not on_cpu:
        wrong = f"varlen cannot be had here: {missing}; auto takes what is there"
    elif setting == "flex_attention" and use_cpu:
        wrong = "flex_attention cannot train on a CPU; use auto"
    else:
        return setting, "as asked for"
    raise UserError(f"model.attn_implementation: {wrong}")


def register_varlen() -> None:
    """Make `varlen` known to transformers; apart, since what it imports takes seconds."""
    import recipes.utils.model.attention  # noqa: F401


def load_base(base: Path, options: ModelOptions, attention: str, quantization_config=None, use_cpu: bool | None = None):
    """The model in `base`, in `options.dtype` or by `quantization_config` in 4 bit, on this process's GPU or CPU."""
    use_cpu = not torch.cuda.is_available() if use_cpu is None else use_cpu
    if attention == VARLEN:
        register_varlen()
    # A 16-bit base that is to be spread over GPUs may not fit on each; FSDP takes it from memory, layer by layer.
    spread = os.environ.get("ACCELERATE_USE_FSDP") == "true" and quantization_config is None
    device = "cpu" if use_cpu or spread else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    how = {"dtype": getattr(torch, options.dtype), "attn_implementation": attention, "device_map": {"": device}}
    how |= {"trust_remote_code": options.trust_remote_code, "use_safetensors": True, "local_files_only": True}
    try:
        with loading(options.name_or_path):
            how |= {"quantization_config": quantization_config, "output_loading_info": True}
            model, info = AutoModelForCausalLM.from_pretrained(base, **how)
    except torch.OutOfMemoryError as error:
        mend = "nvidia-smi shows what else runs there, recipes/plan_run.py what would fit"
        raise UserError(f"{options.name_or_path}: its weights do not fit what is free on {device}; {mend}") from error
    if lacking := sorted(info["missing_keys"]):  # the library would begin them at random
        some = f"{len(lacking)} weights of the model are not in its files, such as {lacking[0]}"
        raise UserError(f"{options.name_or_path}: {some}; copy or download it again")
    model.config._name_or_path = options.name_or_path  # what model cards say; PEFT reads the folder's own config.json
    # On CPUs with AVX512-BF16 the first evaluation would repack 4-bit weights for good, which moves the logits and
    # makes a resumed run another run.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # Sampling settings without do_sample make the very last save raise.
    if not model.generation_config.do_sample:
        model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    return model


def check_tokens(model, rows, tokenizer) -> list[Finding]:
    """Control tokens of `rows` (a Dataset with `input_ids` and `labels`) whose embedding or head row looks untrained in
    this base: by its norm, a third of the vocabulary's median or less, or because it is one of many rows that point the
    same way, as those of tokens that were never used do. The head row decides when the model stops: none where the head
    is trained, which is the mend."""
    sample = rows.select(range(min(len(rows), 200)))  # enough to see which control tokens are used
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    read = special & {token for ids in sample["input_ids"] for token in ids}
    learnt = special & {label for labels in sample["labels"] for label in labels}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    findings = []
    for name, weight, used in (("embedding", embedding, read), ("head", head, learnt)) * (not head.requires_grad):
        if name == "head" and head is embedding:  # tied, and told already
            continue
        norms = torch.linalg.vector_norm(weight.detach(), dim=-1, dtype=torch.float32)
        middle, odd = norms.median().item(), {}
        for index in sorted(used):
            row = weight[index].detach().float() / norms[index]
            cosines = torch.cat([part.float() @ row for part in weight.detach().split(1 << 15)]) / norms
            alike = int((cosines > SAME_WAY).sum()) - 1
            if norms[index] < middle / 3 or not torch.isfinite(norms[index]):
                odd[index] = f"norm {norms[index]:.2g}, the vocabulary's median is {middle:.2g}"
            elif alike >= MANY:
                odd[index] = f"as {alike:,} others, cosine over {SAME_WAY}"
        if odd:
            named = ", ".join(f"{tokenizer.convert_ids_to_tokens(index)} ({why})" for index, why in odd.items())
            cost = head.numel() * 16 / 1e9  # a trained copy in float32, its gradient, and Adam's two moments
            mend = f"train the head: --lora.modules_to_save '[lm_head]' ({cost:.1f} GB more)"
            so = f"so the model may not learn to stop. Start from the Instruct model, or {mend}"
            findings.append(Finding("warn", f"{named}: the {name} row looks untrained in this base, {so}"))
    return findings
