"""Batches of an evaluation: as large as the limits and the memory let them be."""

import pytest
import torch

from recipes.utils.model import generate, in_batches


def test_batches_are_of_similar_length_within_the_limits_the_longest_first(monkeypatch):
    monkeypatch.setattr(generate, "TOKENS_A_BATCH", 40)
    monkeypatch.setattr(generate, "ROWS_A_BATCH", 3)
    seen = []
    in_batches([5, 30, 10, 20, 1, 2, 50], seen.append)
    assert seen == [[6], [1], [3, 2], [0, 5, 4]]


def test_a_batch_that_there_is_no_memory_for_is_halved_and_those_after_it_are_no_larger(monkeypatch):
    monkeypatch.setattr(generate, "TOKENS_A_BATCH", 80)
    tried, done = [], []

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(batch)

    in_batches([10] * 10, work)
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert sorted(done) == list(range(10))


def test_a_single_row_that_there_is_no_memory_for_is_an_error():
    def work(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        in_batches([100, 100], work)
