"""What the model was given and what it answered, for each micro-batch that it is trained on: no extra pass."""

from typing import NamedTuple

import numpy as np


class MicroBatch(NamedTuple):
    """One micro-batch of this process, on the host; a document is one training row, packed with others or not."""

    documents: list[np.ndarray]  # token ids
    nll: np.ndarray  # [documents], negative log-likelihood of the trained tokens, summed, in nats
    trained: np.ndarray  # [documents], tokens with a label that the loss is taken over
    slots: int  # positions that were computed, padding included


def observe(model, *listeners) -> None:
    """Call each of `listeners` with a `MicroBatch` after every forward pass of training through TRL's fused LM head,
    which returns the log-probability of each label. Evaluation and generation are passed over."""

    def hook(module, args, inputs, outputs):
        if module.training and inputs.get("fused_lm_head"):
            batch = read(inputs, outputs)
            for listener in listeners:
                listener(batch)

    model.register_forward_hook(hook, with_kwargs=True)


def read(inputs: dict, outputs) -> MicroBatch:
    """A `MicroBatch` of a forward pass: its keyword arguments from TRL's collator and a FusedCausalLMOutput.

    Packed rows come flattened into one, [1, tokens], each document counting its positions from 0; rows that are not
    packed come padded on the right, [rows, longest]. The copies to the host cost no wait of their own: TRL waits for
    the forward pass at the same place, to log its token accuracy.
    """
    ids = inputs["input_ids"].cpu().numpy()
    nll, trained = np.zeros(ids.shape), np.zeros(ids.shape, dtype=np.int64)
    nll[:, 1:] = -outputs.log_probs.detach().float().cpu().numpy()  # zero where there is no label
    trained[:, 1:] = outputs.label_mask.cpu().numpy()
    if inputs.get("position_ids") is not None:
        starts = np.flatnonzero(inputs["position_ids"].cpu().numpy() == 0)
        lengths = np.diff(starts, append=ids.size)
    else:
        starts = np.arange(len(ids)) * ids.shape[1]
        lengths = inputs["attention_mask"].sum(1).cpu().numpy()
    trained = np.add.reduceat(trained.ravel(), starts)
    nll = np.add.reduceat(nll.ravel(), starts)
    # A row without a trained token is never made: such a stretch is padding.
    kept = np.flatnonzero(trained)
    documents = [ids.ravel()[starts[index] : starts[index] + lengths[index]] for index in kept]
    return MicroBatch(documents, nll[kept], trained[kept], ids.size)
