"""The settings of a run of text that say what it reads; the recipe adds its own."""

from dataclasses import dataclass
from typing import Literal

from fastvae.train.settings import Settings, option

__all__ = ["TextSettings"]


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """Where sentences come from, which of them are taken, and what their tokens are."""

    kind = "text"

    data: str = option(
        "", "A .txt file with a sentence on each line (UTF-8), or a Hugging Face dataset. Required.", "Data"
    )
    column: str = option(
        "", "Of a Hugging Face dataset: the column of texts, if not the first that holds some.", "Data"
    )
    tokens: Literal["words", "bpe"] = option(
        "words", "What a sentence is made of: words and punctuation, or pieces of words (BPE).", "Data"
    )
    vocabulary: int = option(10_000, "At most so many different tokens.", "Data", at_least=8)
    lowercase: bool = option(True, "Read everything in lower case.", "Data")
    min_words: int = option(1, "Shorter lines are left out.", "Data", at_least=1)
    max_words: int = option(50, "Longer lines are left out.", "Data", at_least=1)
