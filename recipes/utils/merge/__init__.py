"""An adapter and its base become a plain model that every runtime loads."""

from recipes.utils.merge.drift import compare_with_adapter, rows_to_compare
from recipes.utils.merge.export import make_modelfile, staged, write_card, write_config
from recipes.utils.merge.export import write_generation_config, write_tokenizer
from recipes.utils.merge.stream import merge_weights
