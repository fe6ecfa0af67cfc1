"""A base model and its adapter."""

from recipes.utils.model.adapter import CHANGE_THE_BASE, adapter_shapes, check_adapter, check_initialisation
from recipes.utils.model.adapter import fast_lora, has_fast_lora, prepare_adapter, publish_base, read_adapter_config
from recipes.utils.model.adapter import save_adapter, stored_shapes
from recipes.utils.model.base import ModelOptions, check_base, check_tokens, choose_attention, commit_of, find_base
from recipes.utils.model.base import VARLEN, attention_and_reason, attentions_of, load_base, model_config, name_of
from recipes.utils.model.base import base_hashes, loading, register_varlen
from recipes.utils.model.generate import Answer, generate_answers, in_batches
