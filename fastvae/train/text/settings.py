"""The data settings of a run of text; the recipe adds its own."""

from dataclasses import dataclass
from typing import Literal

from fastvae.train.settings import Settings, option

__all__ = ["TextSettings"]


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """Where the sentences come from, how they are filtered, and how they are split into tokens."""

    kind = "text"

    data: str = option(
        "", "A .txt file with one sentence per line (UTF-8), or a Hugging Face dataset. Required.", "Data"
    )
    column: str = option(
        "", "Text column of a Hugging Face dataset. Defaults to text, sentence, or the first one.", "Data"
    )
    tokens: Literal["words", "bpe"] = option(
        "words", "Tokens: words (and punctuation marks), or bpe (subwords).", "Data"
    )
    vocabulary: int = option(10_000, "Maximum size of the vocabulary.", "Data", at_least=8)
    lowercase: bool = option(True, "Convert the text to lower case.", "Data")
    min_words: int = option(1, "Skip lines with fewer words.", "Data", at_least=1)
    max_words: int = option(50, "Skip lines with more words.", "Data", at_least=1)
