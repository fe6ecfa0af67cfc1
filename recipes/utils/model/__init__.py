"""A base model and its adapter."""

from recipes.utils.model.adapter import CHANGE_THE_BASE, adapter_shapes, check_fit, check_lora, check_start
from recipes.utils.model.adapter import fast_lora, fit_vocabulary, has_fast_lora, holds_adapter, load_onto
from recipes.utils.model.adapter import peft_key, prepare_adapter, publish_base, read_adapter_config, save_adapter
from recipes.utils.model.adapter import stored_shapes
from recipes.utils.model.base import ModelOptions, check_base, check_tokens, choose_attention, find_base
from recipes.utils.model.base import VARLEN, attention_and_reason, attentions_of, context_of, load_base, model_config
from recipes.utils.model.base import base_hashes, loading, on_hub, register_varlen
from recipes.utils.model.generate import NEVER_STOPS, Answer, generate_answers, in_batches
