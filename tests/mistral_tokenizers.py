"""Mistral-7B's two tokenizers in Hugging Face form, built offline from mistral_common's sentencepiece files.

They have the vocabulary, the special tokens and the begin-of-sequence rule of the published ones, and give the same ids
as sentencepiece (test_chat_template_files.py compares them). Like the originals they have no padding token. They come
without a chat template: a test sets the one that it is about, on a copy, since the tokenizers are cached.
"""

from functools import cache
from pathlib import Path

import mistral_common
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

V1_FILE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
V3_FILE = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"

# Piece types in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


@cache
def mistral_v1_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral-7B v0.1 and v0.2: 32,000 tokens, `[INST]` is ordinary text."""
    return _build(V1_FILE)


@cache
def mistral_v3_tokenizer() -> PreTrainedTokenizerFast:
    """Mistral-7B v0.3: 32,768 tokens, `[INST]`, `[/INST]` and 746 others are control tokens."""
    return _build(V3_FILE)


@cache
def mistral_v1_legacy_tokenizer() -> PreTrainedTokenizerFast:
    """The v1 vocabulary with the older Llama blanks: one is put before every stretch of text between special tokens."""
    return _build(V1_FILE, legacy=True)


def _build(sentencepiece_file: Path, legacy: bool = False) -> PreTrainedTokenizerFast:
    pieces = ModelProto.FromString(sentencepiece_file.read_bytes()).pieces
    vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}

    tokenizer = Tokenizer(BPE(vocabulary, _merges(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        # No split: a run of blanks is one stretch of text to sentencepiece, and has tokens of its own.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )

    # User-defined pieces are found in plain text by sentencepiece too, so they are added tokens but not special ones.
    for piece in pieces:
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            special = piece.type != USER_DEFINED
            added = [AddedToken(piece.piece, normalized=False, special=special)]
            tokenizer.add_special_tokens(added) if special else tokenizer.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _merges(pieces) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, in the order in which sentencepiece would do it.

    sentencepiece joins the two neighbours whose joint piece has the best score, and the leftmost ones among equals.
    Only the pieces for runs of blanks have equal scores; there, leftmost means that a run grows from its left end,
    which an order with the longest left part first repeats.
    """
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    splits = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                splits.append((-score, -cut, left, right))
    return [(left, right) for _, _, left, right in sorted(splits)]
