"""Adapters that are no plain LoRA, merged by PEFT with the whole base in memory."""

import json
import math
from pathlib import Path

from recipes.utils.config import ModelOptions
from recipes.utils.console import UserError
from recipes.utils.export import check_space
from recipes.utils.model import hub_errors

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def merge_in_memory(record: dict, adapter: Path, output: Path) -> tuple[bool, str]:
    """Write the weights of the merged model into the folder `output`; returns (the head is untied now, its dtype).

    `record` names the base.

    Raises:
        UserError: if a merged weight is not finite, or none differs from the base's.
    """
    options = ModelOptions(**record["model"])
    with hub_errors(options.name_or_path, options.revision):
        model = AutoModelForCausalLM.from_pretrained(
            options.name_or_path,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            dtype="auto",
            use_safetensors=True,
        )
    tied, dtype = model.config.tie_word_embeddings, model.dtype
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if tied and not config.get("trainable_token_indices") and not config.get("ensure_weight_tying"):
        # what the adapter does to the embedding it does not do to the head, so PEFT must not merge it into both
        model.config.tie_word_embeddings = False
        model.get_output_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    before = {name: _digest(tensor) for name, tensor in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=False).to(dtype)
    untied = tied and not torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)
    merged.config.tie_word_embeddings = tied and not untied
    merged.tie_weights()
    after = {name: _digest(tensor) for name, tensor in merged.state_dict().items()}
    if wrong := [name for name, digest in after.items() if not math.isfinite(digest[0])]:
        raise UserError(f"{wrong[0]}: the merged weights are not finite; the adapter is broken, or {dtype} too small")
    if before == after:
        raise UserError("the adapter changes no weight: is it trained?")
    check_space(output, sum(tensor.nbytes for tensor in merged.state_dict().values()))
    merged.save_pretrained(output)
    for name in ("config.json", "generation_config.json"):  # written from the base's own, as after streaming
        (output / name).unlink(missing_ok=True)
    return untied, str(dtype).removeprefix("torch.")


def _digest(tensor: torch.Tensor) -> tuple[float, float]:
    """Two sums that a change of the tensor moves, and that something not finite makes so."""
    numbers = tensor.detach().flatten().double()
    return numbers.sum().item(), (numbers * torch.arange(len(numbers), dtype=torch.float64)).sum().item()
