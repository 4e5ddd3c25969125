"""Sentences from a text file or a Hugging Face dataset, and their tokens."""

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
    "TokenTable",
    "Vocabulary",
    "load",
    "make_batch",
    "read_lines",
    "token_table",
    "write_lines",
]

PAD, UNKNOWN, START, END = range(4)
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
# Words, including apostrophes, hyphens and dots inside them, and punctuation marks, repeated ones as a single token.
_WORD = r"\w+(?:['’.\-]\w+)*|([^\w\s])\1*"
# str.splitlines would also split at line separators (U+2028), form feeds and others, which occur in scraped text.
_LINE_END = re.compile(r"\r\n|\n|\r")
_BLANK = "▁"  # the symbol that BPE uses for a blank before a word


class Batch(NamedTuple):
    """Sentences of at most T tokens, int64, padded with PAD."""

    words: Tensor
    """(B, T): the sentence, for the encoder."""
    before: Tensor
    """(B, T + 1): START and the sentence with some words hidden, which is the input of the decoder."""
    after: Tensor
    """(B, T + 1): the sentence and END, which is the target of the decoder."""


class Corpus(NamedTuple):
    """Lines of text in a training and a validation part."""

    name: str
    train: list[str]
    val: list[str]
    notes: tuple[str, ...] = ()
    """Messages for the user about what was skipped."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load(settings: TextSettings) -> Corpus:
    """Load the lines of `--data`: a text file, or the name of a Hugging Face dataset.

    A sixth of the lines of a file, drawn by the seed, is for validation. So is a sixth of a dataset that has no
    split `test` or `validation`. Lines with too few or too many words are skipped; `notes` has their number.

    Raises InputError if the data cannot be read, or if too few lines are left.
    """
    spec = settings.data
    path = Path(spec).expanduser()
    if not spec:
        raise InputError(
            "--data is missing: give a .txt file with one sentence per line, or a Hugging Face dataset"
        )
    if path.is_dir():
        raise InputError(f"{spec}: this is a folder; --data takes a .txt file with one sentence per line")
    if path.exists() or path.suffix == ".txt":
        name, train, val = path.name, read_lines(path), None
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", spec):
        name, (train, val) = spec, _load_hugging_face(spec, settings.column)
    else:
        raise InputError(f"{spec}: no such file")

    pieces = _make_tokenizer(settings)
    lines = len(train) + len(val or ())
    train, short, long = _filter_by_length(train, pieces, settings)
    if val is None:
        _check_enough_lines(spec, train, settings, short, long, 2)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed)).tolist()
        num_val = max(1, len(train) // 6)
        train, val = [train[i] for i in order[num_val:]], [train[i] for i in order[:num_val]]
    else:
        val, more_short, more_long = _filter_by_length(val, pieces, settings)
        short, long = short + more_short, long + more_long
        _check_enough_lines(spec, train, settings, short, long, 1)
        _check_enough_lines(f"{spec}, validation split", val, settings, short, long, 1)
    skipped = [
        f"{count} with {what} than {bound} words ({option})"
        for count, what, bound, option in (
            (short, "fewer", settings.min_words, "--min-words"),
            (long, "more", settings.max_words, "--max-words"),
        )
        if count
    ]
    notes = (f"skipped {short + long} of {lines} lines: {' and '.join(skipped)}",) if skipped else ()
    return Corpus(name, train, val, notes)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file without blank ones. Raises InputError if it has none or cannot be read."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: not UTF-8 text: byte 0x{raw[error.start]:02x} in line {line}") from error
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        what = "no such file" if missing else f"cannot be read: {files.error_reason(error)}"
        raise InputError(f"{path}: {what}") from error
    lines = [line.strip() for line in _LINE_END.split(text) if line.strip()]
    if not lines:
        raise InputError(f"{path}: this file contains no text; it must have one sentence per line")
    return lines


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file. Raises InputError if that fails."""
    files.write(path, ("\n".join(lines) + "\n").encode())


def _load_hugging_face(name: str, column: str) -> tuple[list[str], list[str] | None]:
    splits = hub.load_splits(name)
    features = splits["train"].features
    texts = [
        key for key, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    if column and column not in texts:
        raise InputError(
            f"--column {column}: {name} has no text column of this name, only {', '.join(texts) or 'other types'}"
        )
    if not texts:
        raise InputError(f"{name}: this dataset has no text column, only {', '.join(features)}")
    named = [key for key in ("text", "sentence") if key in texts]
    column = column or (named or texts)[0]
    other = next((key for key in ("test", "validation") if key in splits), None)

    def lines(split: str) -> list[str]:
        return [" ".join(text.split()) for text in splits[split][column] if text and text.strip()]

    return lines("train"), lines(other) if other else None


def _filter_by_length(
    lines: list[str], tokenizer: "Tokenizer", settings: TextSettings
) -> tuple[list[str], int, int]:
    """Return the lines of an accepted length, and the numbers of shorter and longer ones."""
    accepted, short, long = [], 0, 0
    for line in lines:
        n = count_words(tokenizer, line)
        short += n < settings.min_words
        long += n > settings.max_words
        if settings.min_words <= n <= settings.max_words:
            accepted.append(line)
    return accepted, short, long


def _check_enough_lines(
    where: str, lines: list[str], settings: TextSettings, short: int, long: int, minimum: int
) -> None:
    if len(lines) < minimum:
        if not short and not long:
            found = f"{len(lines)} sentence{'s' if len(lines) != 1 else ''}"
            raise InputError(
                f"{where}: expected at least {minimum} sentences, one per line, for training and validation, got "
                f"{found}"
            )
        why = f"{short} have fewer than {settings.min_words} words and {long} more than {settings.max_words}"
        raise InputError(
            f"{where}: {len(lines) or 'no'} line{'s' if len(lines) != 1 else ''} left for training and validation: "
            f"{why} (--min-words, --max-words)"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def _make_tokenizer(settings: TextSettings) -> "Tokenizer":
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
    """The tokens of a run: encodes sentences as numbers and decodes them."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, lines: Sequence[str], settings: TextSettings) -> "Vocabulary":
        from tokenizers import trainers

        tokenizer = _make_tokenizer(settings)
        kind = trainers.WordLevelTrainer if settings.tokens == "words" else trainers.BpeTrainer
        trainer = kind(vocab_size=settings.vocabulary, special_tokens=list(_SPECIAL), show_progress=False)
        tokenizer.train_from_iterator(lines, trainer)
        return cls(tokenizer)

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Read a tokenizer. Raises InputError if the file is missing or is not the tokenizer of a run."""
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
            special = [tokenizer.id_to_token(i) for i in range(len(_SPECIAL))]
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; the run needs it") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {files.error_reason(error)}") from error
        except Exception as error:  # tokenizers raises no class of its own
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

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each line."""
        encodings = self.tokenizer.encode_batch(list(lines), add_special_tokens=False)
        # If a text contains "</s>" literally, it must not end there.
        return [[UNKNOWN if n in (PAD, START, END) else n for n in encoding.ids] for encoding in encodings]

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the sentence that the tokens up to END stand for; an unknown word becomes <unk>."""
        tokens = []
        for number in numbers:
            if number == END:
                break
            tokens.append(str(self.tokenizer.id_to_token(int(number))))
        if type(self.tokenizer.model).__name__ == "BPE":
            return "".join(tokens).replace(_BLANK, " ").strip()
        return " ".join(tokens)


class TokenTable(NamedTuple):
    """Sentences in one table."""

    tokens: Tensor
    """(N, longest), int32, padded with PAD."""
    lengths: Tensor
    """(N,)"""

    @property
    def mean_tokens(self) -> float:
        """The mean number of tokens per sentence, including END."""
        return self.lengths.double().mean().item() + 1


def token_table(numbers: Sequence[Sequence[int]]) -> TokenTable:
    lengths = torch.tensor([len(line) for line in numbers])
    tokens = torch.full((len(numbers), int(lengths.max())), PAD, dtype=torch.int32)
    for row, line in enumerate(numbers):
        tokens[row, : len(line)] = torch.tensor(line, dtype=torch.int32)
    return TokenTable(tokens, lengths)


def make_batch(table: TokenTable, hidden: float = 0.0, draws: torch.Generator | None = None) -> Batch:
    """Return a batch of these sentences, in which a share `hidden` of the decoder's words becomes UNKNOWN."""
    n, longest = len(table.lengths), int(table.lengths.max())
    words = table.tokens[:, :longest].long()
    before = torch.cat((torch.full((n, 1), START), words), 1)
    after = torch.cat((words, torch.full((n, 1), PAD)), 1)
    after[torch.arange(n), table.lengths] = END
    if hidden:
        is_hidden = torch.rand(words.shape, generator=draws) < hidden
        before[:, 1:][is_hidden & (words != PAD)] = UNKNOWN
    return Batch(words, before, after)


def unigram_perplexity(train: TokenTable, val: TokenTable, vocabulary: int) -> float:
    """Return the perplexity of `val` under a unigram model of `train`.

    The probability of each token and of END is its share in the training sentences, with one added to each count.
    """

    def counts(table: TokenTable) -> Tensor:
        found = torch.bincount(table.tokens[table.tokens != PAD].long(), minlength=vocabulary).double()
        found[END] = len(table.lengths)
        return found

    shares = counts(train) + 1
    shares[[PAD, START]] = 0  # these are never predicted
    log_probs = (shares / shares.sum()).log().nan_to_num(neginf=0.0)
    val_counts = counts(val)
    return float(torch.exp(-(val_counts * log_probs).sum() / val_counts.sum()))
