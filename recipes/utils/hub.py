"""The Hugging Face hub, which is asked for a base that is named and is no folder, at one commit, and for nothing else."""

import contextlib
from pathlib import Path

from recipes.utils import OFFLINE_ASKED_FOR
from recipes.utils.console import UserError, say
from recipes.utils.jsonl import read_json

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import enable_progress_bars

# No consolidated.safetensors, no pickles: what the index names, and small files.
WEIGHTS = "model*.safetensors"
FILES = ["*.json", WEIGHTS, "tokenizer*", "*.jinja", "*.txt", "*.py"]


@contextlib.contextmanager
def offline(switch: bool = True):
    """No network for the hub's client in here, or with a `switch` of False its network; what was set before comes back."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, switch
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def hub_errors(name: str, revision: str | None):
    """Turn what the hub client raises about `name` into a line that says what to do. With a `name` that is no folder and
    not whole in the cache, the network may be used in here, unless HF_HUB_OFFLINE is set."""
    there = Path(name).is_dir() or cached_base(name, revision)
    with offline(bool(OFFLINE_ASKED_FOR or there)):
        try:
            yield
        except (OSError, RevisionResolutionError, HFValidationError) as error:
            raise UserError(f"{name}{_what_to_do(error, name)}") from error


def _what_to_do(error: Exception, name: str) -> str:
    chain = (error, error.__cause__, error.__context__)
    text = " ".join(map(str, chain)).lower()

    def found(*kinds) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if found(GatedRepoError):
        return f" is gated: accept its licence at https://huggingface.co/{name}, then: hf auth login"
    if found(RepositoryNotFoundError):
        return ": no such folder here, and no such model on the Hugging Face hub; if it is a private one: hf auth login"
    if found(RevisionNotFoundError):
        return ": the Hugging Face hub has no such model.revision; it is a branch, a tag or a commit"
    if found(HFValidationError):
        return ": there is no such folder; paths are relative to where the command runs"
    if found(RevisionResolutionError, LocalEntryNotFoundError, ConnectionError) or "connect" in text:
        return (
            ": there is no such folder here, and the Hugging Face hub cannot be reached; give a folder as "
            "model.name_or_path"
        )
    if "safetensors" in text:
        return (
            ": has no safetensors weights; pickled ones are not loaded, since they can run code. Convert them: "
            "transformers' from_pretrained and save_pretrained, on a machine that you can spare"
        )
    return f": {str(error).splitlines()[0]}"


def cached_base(name: str, revision: str | None) -> Path | None:
    """The snapshot of a hub's model in the cache, if its configuration, tokenizer and weights are all there."""
    try:
        base = Path(snapshot_download(name, revision=revision, allow_patterns=FILES, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):  # not there, or no name that could be
        return None
    index, weights = base / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        weights = set(read_json(index)["weight_map"].values())
    tokenizer = any((base / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    return base if tokenizer and all((base / file).is_file() for file in ("config.json", *weights)) else None


def keep_revision(config) -> None:
    """Training that goes on takes the commit of its base that it began with, whatever the hub has by now: a resumed run that of
    its run.json, unless model.revision was given anew, and a run with model.adapter that adapter's, unless it is given."""
    model = config.model
    if config.resume and (config.run_folder / "run.json").is_file():
        record = read_json(config.run_folder / "run.json")
        if (record["model"]["name_or_path"], record.get("revision_asked")) == (
            model.name_or_path,
            config.revision_asked,
        ):
            model.revision = record["model"]["revision"]
    if model.adapter and model.revision is None:
        settings = read_json(Path(model.adapter) / "adapter_config.json")
        if settings.get("base_model_name_or_path") == model.name_or_path:
            model.revision = settings.get("revision")


def pin_revision(options) -> None:
    """Make `options.revision` (of `ModelOptions`) the commit that it stands for today, where the base is on the hub. The
    run, its resumes, evaluations and merges all take that one, whatever is pushed meanwhile.

    Raises:
        UserError: if there is no such model, or the hub cannot be reached and the cache does not know it.
    """
    if not Path(options.name_or_path).is_dir():
        # also where the cache has it: a branch may have moved since
        with hub_errors(options.name_or_path, None), offline(OFFLINE_ASKED_FOR):
            options.revision = HfApi().resolve_revision(options.name_or_path, revision=options.revision).resolved


def say_download(options) -> None:
    """Say how much of the base's weights will be fetched from the hub, if any, and let the client show its bars."""
    if not constants.HF_HUB_OFFLINE:
        files = snapshot_download(options.name_or_path, revision=options.revision, allow_patterns=WEIGHTS, dry_run=True)
        size = sum(file.file_size for file in files if file.will_download)
        say(f"base: fetching {size / 1e9:,.2f} GB of {options.name_or_path} from the Hugging Face hub, once")
        enable_progress_bars()
