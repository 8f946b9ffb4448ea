"""Byte-level BPE in GPT-2's form: published, newly trained, or plain bytes.

All three are kept on disk in one layout, GPT-2's `vocab.json` and `merges.txt`, and all three
encode through one `tiktoken.Encoding`. The plain-bytes tokenizer is the case without merges.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from gpt.base.errors import InputError, shown
from gpt.base.files import read_json, whole_file

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into words before merging (`r50k_pat_str` in tiktoken).
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_PART = 1 << 16
"""Characters that are cut into words at once, about: a gap of a million blanks is too long for
tiktoken's regular expressions, and it panics, which is no `Exception`."""
_LONGEST_PART = 1 << 20
"""Characters after which a text is cut even within a word: tiktoken takes some fifty bytes of
memory for each byte of one."""
_BLANK = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # tiktoken's `\s`
_CUT = re.compile(f"[{_BLANK}](?=[^{_BLANK}])")
_LONGEST_WORD = 1000
"""Bytes of a word that are learnt from as one: learning takes a word's length squared."""
_ENDLESS_TO_LEARN = 1 << 20
"""Characters of words longer than `_LONGEST_PART` that are learnt from, in all."""


def _byte_symbols() -> list[str]:
    """The printable symbol that stands for each byte in GPT-2's files, in the order of bytes.

    Printable bytes stand for themselves; the others are moved up to U+0100 and on, so that a
    vocabulary file holds no blanks or control characters.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


_SYMBOL_OF = _byte_symbols()
_BYTE_OF = {symbol: byte for byte, symbol in enumerate(_SYMBOL_OF)}


class Tokenizer:
    """Text to token ids and back.

    >>> tokenizer = gpt.load_tokenizer(directory)
    >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
    'Once upon a time'

    Args:
        vocab: every token's id; tokens are written in byte symbols, the ids are 0 … n - 1.
        merges: the pairs that may be joined, the earliest-learnt first.

    Raises:
        InputError: vocabulary and merges do not fit together.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> None:
        _check(vocab, merges)
        self._vocab = vocab
        self.vocab_size = len(vocab)
        """The number of tokens, `<|endoftext|>` among them."""
        self.merges = list(merges)
        """The pairs that may be joined, the earliest-learnt first."""
        self.eot = vocab[END_OF_TEXT]
        """The id of `<|endoftext|>`, which stands between documents and ends an answer."""
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=_WORDS,
            mergeable_ranks={
                bytes(_BYTE_OF[symbol] for symbol in token): rank
                for token, rank in vocab.items()
                if token != END_OF_TEXT
            },
            special_tokens={END_OF_TEXT: self.eot},
        )

    @functools.cached_property
    def tokens(self) -> list[str]:
        """Every token, in byte symbols and in the order of ids."""
        return sorted(self._vocab, key=self._vocab.__getitem__)

    @property
    def hash(self) -> str:
        """The sha256 of vocabulary and merges: equal hashes mean equal ids for every text."""
        content = json.dumps([self.tokens, self.merges])
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; a literal `<|endoftext|>` in it is text like any other."""
        return [*itertools.chain.from_iterable(map(self._encoding.encode_ordinary, _parts(text)))]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` into an array, (n,) uint32: without a Python number for each id."""
        parts = [self._encoding.encode_to_numpy(p, disallowed_special=()) for p in _parts(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, (vocab_size,); none for `<|endoftext|>`."""
        lengths = [len(token) for token in self.tokens]
        lengths[self.eot] = 0
        return np.array(lengths, np.min_scalar_type(max(lengths)))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` for many texts; the result does not depend on the number of threads."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that do not form a character become U+FFFD."""
        return self._encoding.decode(list(ids), errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of `ids`: what to gather when a character may span two tokens."""
        return self._encoding.decode_bytes(list(ids))

    def save(self, directory: Path | str) -> None:
        """Write `vocab.json` and `merges.txt` into `directory`; equal tokenizers, equal bytes."""
        directory = Path(directory)
        vocab = {token: rank for rank, token in enumerate(self.tokens)}
        merges = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges)]
        for name, lines in (
            ("vocab.json", [json.dumps(vocab, ensure_ascii=False)]),
            ("merges.txt", merges),
        ):
            with whole_file(directory / name) as partial:
                partial.write_text("\n".join([*lines, ""]), encoding="utf-8", newline="\n")


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Read a tokenizer from GPT-2's vocabulary files.

    >>> gpt.load_tokenizer(directory).vocab_size
    4096

    Args:
        directory: holds `vocab.json` and `merges.txt`, or the same files under the names of
            their first publication, `encoder.json` and `vocab.bpe`; or all of it in the
            `tokenizer.json` of Hugging Face's library.

    Raises:
        InputError: a file is missing, unreadable, of another kind of tokenizer, or does not fit
            the other.
    """
    directory = Path(directory)
    whole = directory / "tokenizer.json"
    if whole.is_file() and not any((directory / each).is_file() for each in _VOCABULARIES):
        vocab_file, (vocab, merges) = whole, _read_whole(whole)
    else:
        vocab_file = _find(directory, *_VOCABULARIES)
        vocab = _checked_vocab(vocab_file, _read_json(vocab_file))
        merges = _read_merges(_find(directory, "merges.txt", "vocab.bpe"))
    kept = {token: token for token in vocab}  # a token's text is held once, not in each merge
    pairs = [(kept.get(left, left), kept.get(right, right)) for left, right in merges]
    try:
        return Tokenizer(vocab, pairs)
    except InputError as error:
        raise InputError(f"{vocab_file}: {error}") from None


_VOCABULARIES = ("vocab.json", "encoder.json")
_LONGEST_FILE = 1 << 30
"""Bytes: a vocabulary of a million tokens has some twenty million, the largest a few hundred."""


def _read_json(path: Path) -> dict[str, Any]:
    remedy = "fetch the file again"
    return read_json(path, missing="no such file", remedy=remedy, longest=_LONGEST_FILE)


def _checked_vocab(path: Path, vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(type(rank) is int for rank in vocab.values()):
        raise InputError(f"{path}: not a table of tokens and their ids; fetch the file again")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error}); fetch the file again") from None
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise InputError(
                f"{path}: line {number}: {line!r} is not a pair of tokens; fetch the file again"
            )
        merges.append((left, right))
    return merges


# what tokenizer.json says beside vocabulary and merges -> what it may, in GPT-2's form
_PRE_TOKENIZER = {"type": ("ByteLevel",), "add_prefix_space": (False,), "use_regex": (True, None)}
_MODEL = {
    "type": ("BPE", None),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False, None),
    "ignore_merges": (False, None),
}


def _read_whole(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a `tokenizer.json`, if it encodes as GPT-2's does."""
    read = _read_json(path)
    for name, allowed in (("pre_tokenizer", _PRE_TOKENIZER), ("model", _MODEL)):
        part = read[name] if isinstance(read.get(name), dict) else {}
        for key, values in allowed.items():
            if part.get(key) not in values:
                raise InputError(
                    f"{path}: {name}.{key} is {shown(part.get(key))}; only a byte-level BPE as "
                    f"GPT-2's can be used, with {values[0]!r} there"
                )
    if read.get("normalizer") is not None:
        raise InputError(
            f"{path}: changes a text before it is encoded (normalizer); GPT-2's do not"
        )
    try:
        model = read["model"]
        added = {each["content"]: each["id"] for each in read.get("added_tokens") or ()}
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        vocab = {**model["vocab"], **added}
        pairs = [(left + "", right + "") for left, right in merges]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"{path}: not a table of tokens and pairs of them ({error}); fetch the file again"
        ) from None
    if others := added.keys() - {END_OF_TEXT}:
        raise InputError(
            f"{path}: adds the token {shown(min(others, key=str))}; only {END_OF_TEXT} can be added"
        )
    return _checked_vocab(path, vocab), pairs


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE from `texts` (Sennrich et al., 2016; over bytes as in GPT-2).

    Args:
        texts: read once, in order; not kept in memory. Of words of more than a million characters
            a million are learnt from in all.
        vocab_size: the number of tokens wanted, `<|endoftext|>` (the last id) among them. A short
            text may not hold that many pairs; the tokenizer is smaller then.

    Raises:
        InputError: `vocab_size` has no room for the 256 bytes and `<|endoftext|>`.
    """
    # Imported here: only training needs it, and whoever reads a tokenizer should not wait for it.
    import tokenizers

    if vocab_size < 257:
        raise InputError(
            f"vocab_size: {vocab_size} is too few; 256 bytes and {END_OF_TEXT} make 257"
        )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            tokenizers.pre_tokenizers.FixedLength(_LONGEST_WORD),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_to_learn(texts), trainer)
    vocab = model.get_vocab(with_added_tokens=False)
    # Every way to build a token counts as a merge, because tiktoken knows tokens, not pairs:
    # so a reader of merges.txt joins exactly what tiktoken joins.
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(vocab, key=vocab.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return Tokenizer({**vocab, END_OF_TEXT: len(vocab)}, merges)


def byte_tokenizer() -> Tokenizer:
    """The tokenizer whose ids are the bytes of the text, and 256 for `<|endoftext|>`."""
    return Tokenizer({**{s: byte for byte, s in enumerate(_SYMBOL_OF)}, END_OF_TEXT: 256}, [])


def _to_learn(texts: Iterable[str]) -> Iterator[str]:
    """The texts in parts, with only the first of the endless words: a trainer keeps every word in
    fifty times its size, and endless words do not recur."""
    left = _ENDLESS_TO_LEARN
    for part in itertools.chain.from_iterable(map(_parts, texts)):
        if len(part) == _LONGEST_PART:  # cut within a word
            part = part[:left]
            left -= len(part)
        yield part


def _parts(text: str) -> Iterator[str]:
    """A text split into parts, so that its words stay the same.

    Only a word of more than `_LONGEST_PART` characters is cut.

    A blank before something else always begins a word (`_WORDS`): the blanks before it are one
    word by themselves, at the end of a part as before it. A half of a surrogate pair, which no
    UTF-8 can hold, becomes U+FFFD, as tiktoken has it.
    """
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    start = 0
    while len(text) - start > _PART:
        cut = _CUT.search(text, start + _PART, start + _LONGEST_PART)
        if not cut and len(text) - start <= _LONGEST_PART:
            break
        end = cut.start() if cut else start + _LONGEST_PART
        yield text[start:end]
        start = end
    yield text[start:]


def _find(directory: Path, *names: str) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"{directory}: no {' or '.join(names)} here; a tokenizer needs it")


def _check(vocab: dict[str, int], merges: Sequence[tuple[str, str]]) -> None:
    """Refuse what tiktoken would encode in another way than its vocabulary files say."""
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise InputError(f"the ids are not 0 to {len(vocab) - 1}, each once; fetch the files again")
    missing = [token for token in (*_SYMBOL_OF, END_OF_TEXT) if token not in vocab]
    if missing:
        raise InputError(f"{missing[0]!r} has no id; the vocabulary must be a byte-level one")
    made, last = set(), -1
    for left, right in merges:
        rank = vocab.get(left + right)
        if rank is None or left not in vocab or right not in vocab:
            raise InputError(
                f"the merge of {left!r} and {right!r} is not in the vocabulary; "
                "take both files from one tokenizer"
            )
        if rank < last:  # tiktoken joins the pair of lowest id first
            raise InputError(
                f"the merge of {left!r} and {right!r} is not in the order of ids; "
                "only vocabularies numbered in the order of merging can be used"
            )
        made.add(left + right)
        last = rank
    unmade = next(
        (t for t in vocab if t not in made and t not in _BYTE_OF and t != END_OF_TEXT), None
    )
    if unmade is not None:
        raise InputError(
            f"no merge makes {unmade!r}; take both files from one tokenizer, without added tokens"
        )
