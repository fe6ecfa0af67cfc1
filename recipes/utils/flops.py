"""How much arithmetic a training step is, for a model with an adapter: the numerator of MFU."""

from typing import NamedTuple

import torch


class Flops(NamedTuple):
    """FLOPs of training: `token` for each token, `label` more for each token with a label, `pair` more for each pair of a
    token and one that it attends to (half the square of a document's length, less outside of a sliding window)."""

    token: int
    label: int
    pair: int
    window: int | None  # tokens that one attends to at most

    def of(self, lengths, labels) -> float:
        """FLOPs of documents of these `lengths` with `labels` labelled tokens in all."""
        beyond = (lengths - self.window).clip(min=0) if self.window else 0 * lengths
        return float(
            self.token * lengths.sum() + self.label * labels + self.pair * ((lengths**2 - beyond**2) / 2).sum()
        )


def count_flops(model) -> Flops:
    """The FLOPs that training `model` needs, recomputation left out, as MFU is defined (PaLM, arXiv 2204.02311, appendix B).

    Each weight of a linear layer takes 2 FLOPs a token forward and 2 for the gradient of its input; a weight that is
    trained takes 2 more for its own gradient, a frozen one does not. So with N frozen weights, r of the adapter and H of the
    head: 4N + 6r a token, and 4H a labelled token, since only those go through TRL's fused head (6H where the head is
    trained). Attention takes 4 FLOPs a pair, head and dimension forward (query by key, weight by value), twice that
    backward. The gradient of the first layer's input, which nobody needs, is counted: 1 part in the number of layers at most.
    """
    head = model.get_output_embeddings()
    skipped = {id(module) for module in head.modules()}
    token = 0
    for name, module in model.named_modules():
        # original_module: the untrained copy that PEFT keeps of a module that is trained whole
        if isinstance(module, torch.nn.Linear) and id(module) not in skipped and "original_module" not in name:
            # by its features: a 4-bit weight is stored packed
            token += _each(module) * module.in_features * module.out_features
    config = model.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return Flops(
        token=token,
        label=_each(head) * config.hidden_size * config.vocab_size,
        pair=3 * 4 * width * config.num_hidden_layers,
        window=getattr(config, "sliding_window", None),
    )


def _each(module) -> int:
    return 6 if module.weight.requires_grad else 4
