"""A base model and its adapter."""

from recipes.utils.model.adapter import adapter_shapes, base_of, check_adapter, check_initialisation, check_linear
from recipes.utils.model.adapter import load_adapter, load_adapter_tokenizer, newest_run, prepare_adapter, publish_base
from recipes.utils.model.adapter import read_adapter, read_run, save_adapter, set_scale, stored_shapes
from recipes.utils.model.attention import VARLEN
from recipes.utils.model.base import ModelOptions, check_base, check_tokens, choose_attention, commit_of, find_base
from recipes.utils.model.base import attention_and_reason, load_base, model_config, name_of
from recipes.utils.model.generate import Answer, batches, generate_answers
