"""The shapes of the models that the recipes are made for."""

from transformers import MistralConfig, Qwen2Config

PUBLISHED = {  # the dimensions on the models' pages at huggingface.co
    "Mistral-7B-v0.3": MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, sliding_window=None,
    ),
    "Qwen2-7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    ),
}  # fmt: skip
