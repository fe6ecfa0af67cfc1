"""A dial after training: LoRA is linear in its scale, so an adapter can be turned down or up without training again."""

import json
from pathlib import Path

from recipes.utils.console import UserError
from recipes.utils.dataset import Chat
from recipes.utils.encoding import encode_chats
from recipes.utils.evaluation import evaluate, score_answers
from recipes.utils.merge_plan import CHANGE_THE_BASE
from recipes.utils.scores import figures

from peft.tuners.lora import LoraLayer


def check_linear(adapter: Path, scale: float) -> None:
    """Raise `UserError` if `scale` is not 1 and the adapter in the folder `adapter` is not linear in it."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    wrong = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices") if config.get(key)]
    wrong += ["peft_type"] * (config["peft_type"] != "LORA") + ["bias"] * (config.get("bias", "none") != "none")
    wrong += ["init_lora_weights"] * str(config.get("init_lora_weights")).startswith(CHANGE_THE_BASE)
    if scale != 1 and wrong:
        raise UserError(
            f"scale {scale:g}: this adapter ({wrong[0]}: {config[wrong[0]]}) is not linear in its scale; only 1 can be had"
        )


def set_scale(model, scale: float) -> None:
    """Make the adapter of a PEFT `model` weigh `scale` times what it was trained with."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", scale)


def score_scales(
    live, tokenizer, chats: list[Chat], scales: list[float], old_chats: list[Chat], max_rows: int, max_new_tokens=None
) -> dict:
    """The `scores.figures` of `live` (a PEFT model) at each of `scales`, by the scale as text, with
    `forgetting_loss` (nats a token) on `old_chats`, if there are any."""
    metrics, old_rows = {}, encode_chats(old_chats, tokenizer)
    for scale in scales:
        set_scale(live, scale)
        metrics[f"{scale:g}"] = figures(evaluate(live, tokenizer, chats, max_rows, max_new_tokens))
        if old_rows:
            metrics[f"{scale:g}"]["forgetting_loss"] = score_answers(live, tokenizer, old_rows)[0]
    set_scale(live, 1.0)
    return metrics
