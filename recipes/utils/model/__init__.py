"""A base model and its adapter."""

from recipes.utils.model.adapter import CHANGE_THE_BASE, adapter_shapes, check_fit, check_lora, check_start, fast_lora
from recipes.utils.model.adapter import fit_vocabulary, has_fast_lora, holds_adapter, load_onto, peft_key
from recipes.utils.model.adapter import prepare_adapter, publish_base, read_adapter_config, save_adapter, stored_shapes
from recipes.utils.model.base import VARLEN, ModelOptions, attention_and_reason, attentions_of, base_hashes, check_base
from recipes.utils.model.base import check_tokens, choose_attention, context_of, find_base, load_base, loading
from recipes.utils.model.base import model_config, on_hub, register_varlen
from recipes.utils.model.generate import NEVER_STOPS, Answer, generate_answers, in_batches
