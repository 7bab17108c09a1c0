"""A byte-level BPE learned on a run's own text: no download, any text round-trips (bytes and emoji included)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxrlhf.data.read_report import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS = "<|pad|>", "<|endoftext|>", "<|startoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` ids: PAD 0, EOS 1, (BOS 2), the 256 bytes, then merges. The same texts give the same tokenizer.

    `bos` puts a BOS in front of every text. Small corpora run out of pairs and give fewer ids: `len(tokenizer)` is the number to build a
    model for. Raises DataError if `vocab_size` has no room for the bytes.
    """
    # Importing transformers takes seconds: who makes no tokenizer does without.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = [PAD, EOS, *([BOS] if bos else [])]
    if vocab_size < 256 + len(specials):
        raise DataError(
            f"vocab_size {vocab_size} has no room for 256 bytes and {len(specials)} special tokens; use {256 + len(specials)} or more."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS if bos else None,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
