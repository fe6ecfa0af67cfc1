"""What to give a run: the rule that chooses, and the names of GPUs."""

import pytest
from conftest import ROOT
from transformers import AutoConfig

from recipes.utils.config import load_config
from recipes.utils.planning.fit import choose, is_gpu, memory_of_steps, on_gpu


def test_a_model_without_sdpa_is_planned_by_the_attention_that_it_has():
    """Gemma 2, whose softcapping neither sdpa nor torch's own kernel computes."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320, "head_dim": 16}
    gemma = AutoConfig.for_model("gemma2", num_attention_heads=4, num_key_value_heads=2, **shape)
    config, attention, _ = on_gpu(load_config(ROOT / "configs" / "qwen2.yaml", {}, "lora"), gemma, "A10", "A10")
    assert attention == "eager"
    assert all(memory.total > 0 for memory in memory_of_steps(config, gemma, attention, [1]).values())


@pytest.mark.parametrize(
    ("fit_at_all", "fit_without", "expected"),
    [
        (16, 16, (4, False)),  # 8,192 tokens are enough
        (16, 2, (2, False)),  # 4,096 without recomputing
        (16, 1, (4, True)),  # too few without
        (2, 0, (2, True)),
        (0, 0, (1, True)),  # nothing: the smallest
    ],
)
def test_the_rule(fit_at_all, fit_without, expected):
    sizes = [1, 2, 4, 8, 16]
    room = {(way, rows) for way, most in ((True, fit_at_all), (False, fit_without)) for rows in sizes if rows <= most}
    assert choose(sizes, 2048, room) == expected


@pytest.mark.parametrize(
    ("device", "gpu", "same"),
    [
        ("NVIDIA A100-SXM4-80GB", "A10", False),
        ("NVIDIA L40S", "L4", False),
        ("NVIDIA A100-SXM4-40GB", "A100-40", True),
        ("NVIDIA A100-SXM4-80GB", "A100-40", False),
        ("NVIDIA H200", "H200", True),
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA H100 80GB HBM3", "80GB", False),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", True),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB", True),
    ],
)
def test_a_measured_speed_is_of_that_gpu_and_of_no_other(device, gpu, same):
    assert is_gpu(device, gpu) is same
