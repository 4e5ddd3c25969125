"""Sentences to train on, lines of a text file or a column of a Hugging Face dataset, and their tokens."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastvae.train import files, hub
from fastvae.train.errors import InputError

from .settings import TextSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "END",
    "PAD",
    "START",
    "UNKNOWN",
    "Batch",
    "Corpus",
    "Rows",
    "Vocabulary",
    "batch",
    "load",
    "read",
    "rows",
    "save",
]

PAD, UNKNOWN, START, END = range(4)
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
# Words, with the apostrophes, hyphens and points inside them, and single marks or runs of one mark.
_WORD = r"\w+(?:['’.\-]\w+)*|([^\w\s])\1*"
# str.splitlines would also split at line separators (U+2028), form feeds and others, which stand in scraped text.
_LINE_END = re.compile(r"\r\n|\n|\r")
_BLANK = "▁"  # what BPE writes for the blank before a word


class Batch(NamedTuple):
    """Sentences of T tokens at most, int64, padded with PAD."""

    words: Tensor
    """(B, T): the sentence, for the encoder."""
    before: Tensor
    """(B, T + 1): START and the sentence, some words hidden: what the decoder has read before it writes..."""
    after: Tensor
    """(B, T + 1): ...the sentence and END."""


class Corpus(NamedTuple):
    """Lines of text."""

    name: str
    train: list[str]
    held_out: list[str]
    notes: tuple[str, ...] = ()
    """Lines to tell the user: what was left out."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load(settings: TextSettings) -> Corpus:
    """The lines of `--data`: a text file, or the name of a Hugging Face dataset.

    A sixth of the lines of a file, drawn by the seed, is held out; of a dataset its split `test` or `validation`, or
    else the same. Lines with too few or too many words are left out, and `notes` says how many.

    Raises InputError for what cannot be read, and where too few lines are left.
    """
    spec = settings.data
    path = Path(spec).expanduser()
    if not spec:
        raise InputError(
            "--data is missing: a .txt file with a sentence on each line, or a Hugging Face dataset"
        )
    if path.is_dir():
        raise InputError(f"{spec}: a folder; --data takes a .txt file with a sentence on each line")
    if path.exists() or path.suffix == ".txt":
        name, train, held_out = path.name, read(path), None
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", spec):
        name, (train, held_out) = spec, _hugging_face(spec, settings.column)
    else:
        raise InputError(f"{spec}: no such file")

    pieces = _tokenizer(settings)
    lines = len(train) + len(held_out or ())
    train, short, long = _within(train, pieces, settings)
    if held_out is None:
        _enough(spec, train, settings, short, long, 2)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        few = max(1, len(train) // 6)
        train, held_out = [train[i] for i in order[few:]], [train[i] for i in order[:few]]
    else:
        held_out, more_short, more_long = _within(held_out, pieces, settings)
        short, long = short + more_short, long + more_long
        _enough(spec, train, settings, short, long, 1)
        _enough(f"{spec}, its held-out split", held_out, settings, short, long, 1)
    left_out = [
        f"{count} with {what} than {bound} words ({option})"
        for count, what, bound, option in (
            (short, "fewer", settings.min_words, "--min-words"),
            (long, "more", settings.max_words, "--max-words"),
        )
        if count
    ]
    notes = (f"of {lines} lines {' and '.join(left_out)} are left out",) if left_out else ()
    return Corpus(name, train, held_out, notes)


def read(path: Path) -> list[str]:
    """The lines of a text file, without blank ones. Raises InputError where there are none, or it cannot be read."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: not a text in UTF-8: byte 0x{raw[error.start]:02x} in line {line}"
        ) from error
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = "no such file" if missing else f"cannot be read: {files.reason(error)}"
        raise InputError(f"{path}: {what}") from error
    lines = [line.strip() for line in _LINE_END.split(text) if line.strip()]
    if not lines:
        raise InputError(f"{path}: there is no text in this file: it must have a sentence on each line")
    return lines


def save(path: Path, lines: Sequence[str]) -> None:
    """Write them as a text file. Raises InputError where that fails."""
    files.write(path, ("\n".join(lines) + "\n").encode())


def _hugging_face(name: str, column: str) -> tuple[list[str], list[str] | None]:
    splits = hub.splits(name)
    features = splits["train"].features
    texts = [
        key for key, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    if column and column not in texts:
        raise InputError(
            f"--column {column}: {name} has no such column of texts, only {', '.join(texts) or 'others'}"
        )
    if not texts:
        raise InputError(f"{name}: this dataset has no column of texts, only {', '.join(features)}")
    named = [key for key in ("text", "sentence") if key in texts]
    column = column or (named or texts)[0]
    other = next((key for key in ("test", "validation") if key in splits), None)

    def lines(split: str) -> list[str]:
        return [" ".join(text.split()) for text in splits[split][column] if text and text.strip()]

    return lines("train"), lines(other) if other else None


def _within(lines: list[str], tokenizer: "Tokenizer", settings: TextSettings) -> tuple[list[str], int, int]:
    """Those of a length that is wanted, and how many were shorter and longer."""
    kept, short, long = [], 0, 0
    for line in lines:
        n = count_words(tokenizer, line)
        short += n < settings.min_words
        long += n > settings.max_words
        if settings.min_words <= n <= settings.max_words:
            kept.append(line)
    return kept, short, long


def _enough(where: str, lines: list[str], settings: TextSettings, short: int, long: int, least: int) -> None:
    if len(lines) < least:
        if not short and not long:
            found = f"{len(lines)} sentence{'s' if len(lines) != 1 else ''}"
            raise InputError(
                f"{where}: it has {found}, one on a line, and {least} are needed: one to train on and one to hold out"
            )
        why = f"{short} have fewer than {settings.min_words} words and {long} more than {settings.max_words}"
        raise InputError(
            f"{where}: {len(lines) or 'no'} line{'s' if len(lines) != 1 else ''} left to train on and hold out: {why} "
            "(--min-words, --max-words)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def _tokenizer(settings: TextSettings) -> "Tokenizer":
    """Untrained."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    words = settings.tokens == "words"
    unknown = _SPECIAL[UNKNOWN]
    tokenizer = Tokenizer(models.WordLevel(unk_token=unknown) if words else models.BPE(unk_token=unknown))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), *([normalizers.Lowercase()] if settings.lowercase else [])]
    )
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_BLANK)
    return tokenizer


def count_words(tokenizer: "Tokenizer", line: str) -> int:
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(line)))


class Vocabulary:
    """The tokens of a run: sentences to numbers and back."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, lines: Sequence[str], settings: TextSettings) -> "Vocabulary":
        from tokenizers import trainers

        tokenizer = _tokenizer(settings)
        kind = trainers.WordLevelTrainer if settings.tokens == "words" else trainers.BpeTrainer
        trainer = kind(vocab_size=settings.vocabulary, special_tokens=list(_SPECIAL), show_progress=False)
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer)

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Raises InputError for a file that is not there, or holds no tokenizer of a run."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
            special = [tokenizer.id_to_token(i) for i in range(len(_SPECIAL))]
        except FileNotFoundError:
            raise InputError(f"{path}: no such file: it belongs to the run") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {files.reason(error)}") from error
        except Exception as error:  # what tokenizers raises has no class of its own
            raise InputError(f"{path}: not a tokenizer, or damaged") from error
        if special != list(_SPECIAL):
            raise InputError(
                f"{path}: not the tokenizer of a run: its first tokens must be {' '.join(_SPECIAL)}"
            )
        return cls(tokenizer)

    def write(self, path: Path) -> None:
        files.write(path, self.tokenizer.to_str(pretty=True).encode())

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def numbers(self, lines: Sequence[str]) -> list[list[int]]:
        """Each line's tokens."""
        encodings = self.tokenizer.encode_batch(list(lines), add_special_tokens=False)
        # A text may hold "</s>" as well, and must not end there.
        return [[UNKNOWN if n in (PAD, START, END) else n for n in encoding.ids] for encoding in encodings]

    def text(self, numbers: Sequence[int]) -> str:
        """The sentence of tokens up to END; an unknown word is <unk>."""
        tokens = []
        for number in numbers:
            if number == END:
                break
            tokens.append(str(self.tokenizer.id_to_token(int(number))))
        if type(self.tokenizer.model).__name__ == "BPE":
            return "".join(tokens).replace(_BLANK, " ").strip()
        return " ".join(tokens)


class Rows(NamedTuple):
    """Sentences as one table."""

    tokens: Tensor
    """(N, longest), int32, padded with PAD."""
    lengths: Tensor
    """(N,)"""

    @property
    def tokens_each(self) -> float:
        """How many a sentence has in the mean, with END."""
        return self.lengths.double().mean().item() + 1


def rows(numbers: Sequence[Sequence[int]]) -> Rows:
    lengths = torch.tensor([len(line) for line in numbers])
    tokens = torch.full((len(numbers), int(lengths.max())), PAD, dtype=torch.int32)
    for row, line in enumerate(numbers):
        tokens[row, : len(line)] = torch.tensor(line, dtype=torch.int32)
    return Rows(tokens, lengths)


def batch(some: Rows, hidden: float = 0.0, draws: torch.Generator | None = None) -> Batch:
    """The batch of these rows, a share of the words hidden from the decoder: drawn one by one, they become UNKNOWN."""
    n, longest = len(some.lengths), int(some.lengths.max())
    words = some.tokens[:, :longest].long()
    before = torch.cat((torch.full((n, 1), START), words), 1)
    after = torch.cat((words, torch.full((n, 1), PAD)), 1)
    after[torch.arange(n), some.lengths] = END
    if hidden:
        drawn = torch.rand(words.shape, generator=draws) < hidden
        before[:, 1:][drawn & (words != PAD)] = UNKNOWN
    return Batch(words, before, after)


def unigram_perplexity(train: Rows, held_out: Rows, vocabulary: int) -> float:
    """Of the held-out rows by a unigram model: each token and END with its share in the training rows, one added to
    every count.
    """

    def counts(some: Rows) -> Tensor:
        found = torch.bincount(some.tokens[some.tokens != PAD].long(), minlength=vocabulary).double()
        found[END] = len(some.lengths)
        return found

    shares = counts(train) + 1
    shares[[PAD, START]] = 0  # never to be written
    log_probs = (shares / shares.sum()).log().nan_to_num(neginf=0.0)
    seen = counts(held_out)
    return float(torch.exp(-(seen * log_probs).sum() / seen.sum()))
