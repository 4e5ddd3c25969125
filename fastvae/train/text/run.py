"""An opened run of text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastvae.train.kind import Run

from .recipe import Text
from .sentences import Corpus, Vocabulary

if TYPE_CHECKING:
    from .module import TextVAE

__all__ = ["TextRun"]


@dataclass
class TextRun(Run[Text, Vocabulary, Corpus]):
    """A run of text."""

    model: "TextVAE"

    @property
    def vocabulary(self) -> Vocabulary:
        return self.form

    @property
    def corpus(self) -> Corpus:
        """The data of the run."""
        return self.data
