"""A base model and its adapter."""

from recipes.utils.model.adapter import CHANGE_THE_BASE, adapter_shapes, base_of, check_adapter, check_initialisation
from recipes.utils.model.adapter import check_linear, load_adapter, load_adapter_tokenizer, newest_run, prepare_adapter
from recipes.utils.model.adapter import publish_base, read_adapter, read_run, save_adapter, set_scale, stored_shapes
from recipes.utils.model.base import ModelOptions, check_base, check_tokens, choose_attention, commit_of, find_base
from recipes.utils.model.base import VARLEN, attention_and_reason, load_base, model_config, name_of, register_varlen
from recipes.utils.model.generate import Answer, batches, generate_answers
