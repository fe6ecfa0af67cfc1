"""What the model was given and what it answered, micro-batch by micro-batch and document by document: no extra pass."""

from typing import NamedTuple

import numpy as np


class MicroBatch(NamedTuple):
    """One micro-batch of this process, on the host; a document is one training row, packed with others or not."""

    documents: list[np.ndarray]  # token ids
    nll: np.ndarray  # [documents], negative log-likelihood of the trained tokens, summed, in nats
    trained: np.ndarray  # [documents], tokens with a label that the loss is taken over
    slots: int  # positions that were computed, padding included


def observe(model, see, evaluating: bool = False):
    """Call `see` with a `MicroBatch` after every forward pass through TRL's fused LM head, which returns the
    log-probability of each label: of training, or of evaluation too. `remove()` of what it returns ends it."""

    def hook(module, args, inputs, outputs):
        if inputs.get("fused_lm_head") and (module.training or evaluating):
            see(read(inputs, outputs))

    return model.register_forward_hook(hook, with_kwargs=True)


def read(inputs: dict, outputs) -> MicroBatch:
    """A `MicroBatch` of a forward pass: its keyword arguments from TRL's collator and a FusedCausalLMOutput. The copies
    to the host cost no wait of their own: TRL waits for the pass at the same place, to log its token accuracy."""
    ids = inputs["input_ids"]
    nll, trained = np.zeros(ids.shape), np.zeros(ids.shape, dtype=np.int64)
    nll[:, 1:] = -outputs.log_probs.detach().float().cpu().numpy()  # zero where there is no label
    trained[:, 1:] = outputs.label_mask.cpu().numpy()
    documents, starts = documents_of(ids, inputs.get("position_ids"), inputs.get("attention_mask"))
    nll, trained = np.add.reduceat(nll.ravel(), starts), np.add.reduceat(trained.ravel(), starts)
    kept = np.flatnonzero(trained)  # a row without a trained token is never made: such a stretch is padding
    return MicroBatch([documents[index] for index in kept], nll[kept], trained[kept], ids.numel())


def documents_of(input_ids, position_ids=None, attention_mask=None) -> tuple[list[np.ndarray], np.ndarray]:
    """(the token ids of each document of a micro-batch, as they were before packing and padding; where it begins among
    the positions of all rows). All are [rows, length]: `position_ids` 0 where a packed document begins, None for rows
    that are not packed; `attention_mask` 0 on padding, None where there is none."""
    ids = input_ids.cpu().numpy().ravel()
    used = np.ones(ids.size, bool) if attention_mask is None else attention_mask.cpu().numpy().ravel().astype(bool)
    if position_ids is None:
        starts = np.arange(0, ids.size, input_ids.shape[1])
    else:
        starts = np.flatnonzero((position_ids.cpu().numpy().ravel() == 0) & used)
    stretches = zip(np.split(ids, starts[1:]), np.split(used, starts[1:]), strict=True)
    return [stretch[its_tokens] for stretch, its_tokens in stretches], starts
