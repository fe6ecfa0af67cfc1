"""Runs of the two recipes, and their adapters, for the tests of what watches them."""

from pathlib import Path

import torch
from conftest import ROOT  # noqa: F401, which sets threads and caches
from safetensors.torch import load_file

from recipes import sft_lora, sft_qlora
from recipes.utils.config import load_config

RECIPES = {"lora": sft_lora.train_lora, "qlora": sft_qlora.train_qlora}


def train(path: Path, method: str = "lora", overrides=None, **options) -> Path:
    """The folder of a run of the config at `path`."""
    return RECIPES[method](load_config(path, overrides or {}, method, **options))


def adapter_of(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
