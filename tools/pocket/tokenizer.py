"""Train the byte-level BPE tokenizer: documents in, a fast tokenizer of about three thousand entries out."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 3072
# The prompt of fine-tuning is in no document; its words are here only, so that prompts are short in tokens.
PROMPT_WORDS = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n\n### Input:\n\n### Response:\n"
)


def merge_text(document: str) -> str:
    """The document without digits and words in capitals, which shall stay single characters."""
    return re.sub(r"\d|\b[A-Z]{2,}\b", "", document)


def train_tokenizer(documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with GPT-2's pre-tokenizer: any Unicode text comes back exactly; digits are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [merge_text(document) for document in documents] + [PROMPT_WORDS] * 100
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
