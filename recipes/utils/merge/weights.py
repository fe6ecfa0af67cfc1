"""The merged weights: streamed, or for an adapter that is no plain LoRA made by PEFT with the whole base in memory."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from recipes.utils.console import UserError, say
from recipes.utils.files import read_json
from recipes.utils.merge.export import check_space
from recipes.utils.merge.stream import NotStreamable, stream_merge


def merge_weights(record: dict, base: Path, adapter: Path, output: Path, kind: str, scale: float) -> tuple[bool, str]:
    """Write the merged weights into the folder `output`; returns (the head is untied now, the weights' dtype).

    `kind` of the base: `original`, or `dequantized`, as the Q-LoRA run of `record` saw it.

    Raises:
        UserError: if the base or the adapter does not fit, the disk is full, a merged weight is not finite, or none is
            another than the base's.
    """
    try:
        return stream_merge(record, base, adapter, output, kind, scale)
    except NotStreamable as reason:
        if kind == "dequantized":
            only = "which only PEFT merges, and that into --base original"
            raise UserError(f"--base dequantized: {reason}, {only}") from None
        say(f"merging through PEFT, with the whole model in memory: {reason}")
    return merge_in_memory(record, base, adapter, output)


def merge_in_memory(record: dict, base: Path, adapter: Path, output: Path) -> tuple[bool, str]:
    """As `stream_merge`, with the whole base in memory; `output` holds configs too, which are to be written anew."""
    from peft import PeftModel  # here: importing it takes longer than streaming a model of a billion parameters

    def sums(model) -> dict[str, float]:  # a change moves them, and where something is not finite, neither are they
        return {name: tensor.sum(dtype=torch.float64).item() for name, tensor in model.state_dict().items()}

    trust = record["model"].get("trust_remote_code", False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True, trust_remote_code=trust)
    tied, dtype, before = model.config.tie_word_embeddings, model.dtype, sums(model)
    settings, embedding = read_json(adapter / "adapter_config.json"), model.get_input_embeddings().weight
    if tied and not settings.get("trainable_token_indices") and not settings.get("ensure_weight_tying"):
        model.config.tie_word_embeddings = False  # what the adapter does to the embedding it does not do to the head
        model.get_output_embeddings().weight = torch.nn.Parameter(embedding.detach().clone())
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=False).to(dtype)
    untied = tied and not torch.equal(merged.get_output_embeddings().weight, merged.get_input_embeddings().weight)
    merged.config.tie_word_embeddings = tied and not untied
    merged.tie_weights()
    after = sums(merged)
    if wrong := [name for name, total in after.items() if not math.isfinite(total)]:
        raise UserError(f"{wrong[0]}: the merged weights are not finite; the adapter is broken, or {dtype} too small")
    if before == after:
        raise UserError("the adapter changes no weight: is it trained?")
    check_space(output, sum(tensor.nbytes for tensor in merged.state_dict().values()))
    merged.save_pretrained(output)
    for path in output.glob("*.safetensors"):  # which the library lets nobody else read
        path.chmod((output / "config.json").stat().st_mode)
    return untied, str(dtype).removeprefix("torch.")
