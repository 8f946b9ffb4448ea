"""Cleaning of documents: steps that repair a text, then filters that keep or remove it.

Every step and filter has a name for the counts in a report. All are off by default, except for
the lossless normalization.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import lru_cache, partial
from itertools import compress
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
NormalForm = Literal["NFC", "NFKC", "none"]

STEPS = ("mojibake", "control_characters", "unicode", "gutenberg")
"""The steps in the order in which they are applied."""

# py3langid's languages, by ISO 639 code; a test compares the list with the library.
# Loading the model only to check a parameter takes more than half a second.
_CODES = """
    ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext
    fa fi fo fr fuv fy ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja
    jv ka kab kik kk km kn ko ku ky la lb lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn
    no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si sk sl sn so sq sr st sv sw ta te tg
    th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu zxx
"""
LANGUAGES = tuple(_CODES.split())
"""The languages that the filter can detect; `zxx` is text in no language."""


# --- parameters -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Quality:
    """Bounds that separate running text from web boilerplate.

    They are Gopher's (Rae et al., "Scaling Language Models", 2021, appendix A.1) and two of
    FineWeb's (Penedo et al., 2024) with their published values, meant for languages that put
    spaces between words. A minimum of 0 or a largest share of 1 turns a rule off. Repetitions are
    counted from the second occurrence on, in characters unless the attribute says otherwise.

    Attributes:
        min_words: the fewest words; words are separated by white space.
        max_words: the most words.
        min_word_length: the smallest mean of the words' lengths, in characters.
        max_word_length: the greatest mean of the words' lengths.
        symbols: the most # and the most ellipses, each per word.
        bullet_lines: the largest share of lines that begin with a bullet.
        ellipsis_lines: the largest share of lines that end in an ellipsis.
        alphabetic_words: the smallest share of words with a letter in them.
        stop_words: words that are expected in running text (by default English).
        min_stop_words: the fewest different stop words.
        punctuated_lines: the smallest share of lines that end like a sentence (FineWeb).
        short_lines: the largest share of lines of fewer than 30 characters (FineWeb).
        repeated_lines: the largest share of repeated lines, by number of lines.
        repeated_paragraphs: the same for paragraphs.
        repeated_line_characters: the largest share of characters in repeated lines.
        repeated_paragraph_characters: the same for paragraphs.
        top_ngrams: for n-grams of 2, 3, … words, the largest share of the most frequent one.
        repeated_ngrams: for n-grams of 5, 6, … words, the largest share of all repeated ones.
    """

    min_words: Count = 50
    max_words: Count = 100_000
    min_word_length: Annotated[float, Field(ge=0)] = 3
    max_word_length: Annotated[float, Field(ge=0)] = 10
    symbols: Annotated[float, Field(ge=0)] = 0.1
    bullet_lines: Share = 0.9
    ellipsis_lines: Share = 0.3
    alphabetic_words: Share = 0.8
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    min_stop_words: Count = 2
    punctuated_lines: Share = 0.12
    short_lines: Share = 0.67
    repeated_lines: Share = 0.3
    repeated_paragraphs: Share = 0.3
    repeated_line_characters: Share = 0.2
    repeated_paragraph_characters: Share = 0.2
    top_ngrams: tuple[Share, ...] = (0.2, 0.18, 0.16)
    repeated_ngrams: tuple[Share, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)

    @model_validator(mode="after")
    def _leaves_room(self) -> Quality:
        for least, most in (("min_words", "max_words"), ("min_word_length", "max_word_length")):
            low, high = getattr(self, least), getattr(self, most)
            if low > high:
                raise ValueError(f"{least} {low} is more than {most} {high}")
        if self.min_stop_words > len(set(self.stop_words)):
            raise ValueError(
                f"min_stop_words {self.min_stop_words} is more than there are stop_words"
            )
        return self


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class CleanParams:
    """How every document is cleaned before it is encoded.

    Attributes:
        unicode: the normal form (Unicode Standard Annex 15). NFC gives equal characters one
            encoding; NFKC also replaces compatibility characters, such as ligatures and
            superscripts, which loses information.
        mojibake: repair text that was decoded with the wrong encoding, with ftfy.
        control_characters: remove control and invisible formatting characters, including terminal
            colours and a byte order mark; line ends of every kind become \\n.
        gutenberg: remove Project Gutenberg's header, licence and credits.
        min_chars: remove documents of fewer characters.
        max_chars: remove documents of more characters.
        languages: keep only documents in these languages (codes of ISO 639), with py3langid.
        language_confidence: the smallest total probability of these languages.
        language_min_chars: shorter documents are kept, since too short to identify.
        quality: remove documents outside these bounds.
        exact_duplicates: remove documents that repeat an earlier one.
        near_duplicates: remove documents whose Jaccard similarity with an earlier one is this or
            more; 0.8 is a good value.
    """

    unicode: NormalForm = "NFC"
    mojibake: bool = False
    control_characters: bool = False
    gutenberg: bool = False
    min_chars: Count | None = None
    max_chars: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    languages: tuple[str, ...] = ()
    language_confidence: Share = 0.5
    language_min_chars: Count = 100
    quality: Quality | None = None
    exact_duplicates: bool = False
    near_duplicates: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _can_be_met(self) -> CleanParams:
        shortest, longest = self.min_chars, self.max_chars
        if shortest is not None and longest is not None and shortest > longest:
            raise ValueError(f"min_chars {shortest} is more than max_chars {longest}")
        unknown = [code for code in self.languages if code not in LANGUAGES]
        if unknown:
            raise ValueError(
                f"unknown language {unknown[0]!r}; the languages are {', '.join(LANGUAGES)}"
            )
        return self


# --- the cleaner ----------------------------------------------------------------------------------


@plain_dataclass(frozen=True, slots=True)
class Cleaned:
    """The result of cleaning a document.

    Attributes:
        text: the clean text; empty if the document was removed.
        removed: the name of the filter that removed it.
        changed: for every step that changed the text: its name, and the text around the first
            difference, before and after.
    """

    text: str
    removed: str | None = None
    changed: tuple[tuple[str, str, str], ...] = ()


class Cleaner:
    """Cleans documents one at a time; models are loaded with the first document.

    A removal is named after its parameter: `min_chars`, `max_chars`, `languages`, or `quality: `
    and the rule; a document of only white space is `blank`. Duplicates are found elsewhere
    (`gpt.clean.duplicates`), since a cleaner sees one document at a time.
    """

    def __init__(self, params: CleanParams) -> None:
        # unicode comes later: a removed character may stand between a letter and its accent
        steps: tuple[tuple[str, bool, Callable[[str], str]], ...] = (
            ("mojibake", params.mojibake, repair_mojibake),
            ("control_characters", params.control_characters, remove_control_characters),
            ("unicode", params.unicode != "none", partial(normalize, params.unicode)),
            ("gutenberg", params.gutenberg, strip_gutenberg),
        )
        self._steps = [(name, step) for name, wanted, step in steps if wanted]
        self._params = params

    def __call__(self, text: str) -> Cleaned:
        """The document, cleaned."""
        changed = []
        for name, step in self._steps:
            before, text = text, step(text)
            if text is not before and text != before:
                changed.append((name, *_around_difference(before, text)))
        removed = self._removed_by(text)
        return Cleaned("" if removed else text, removed, tuple(changed))

    def _removed_by(self, text: str) -> str | None:
        params = self._params
        if not text or text.isspace():
            return "blank"
        if params.min_chars is not None and len(text) < params.min_chars:
            return "min_chars"
        if params.max_chars is not None and len(text) > params.max_chars:
            return "max_chars"
        if (
            params.languages
            and len(text) >= params.language_min_chars
            and language_probability(text, params.languages) < params.language_confidence
        ):
            return "languages"
        if params.quality is not None:
            broken = next(broken_rules(text, params.quality), None)
            return None if broken is None else f"quality: {broken}"
        return None


def _around_difference(before: str, after: str) -> tuple[str, str]:
    """At most 80 characters of each text around the first difference."""
    same, different = 0, min(len(before), len(after)) + 1
    while different - same > 1:  # the first `same` characters are equal
        middle = (same + different) // 2
        if before.startswith(after[same:middle], same):
            same = middle
        else:
            different = middle
    start = max(0, same - 20)
    return before[start : start + 80], after[start : start + 80]


# --- steps ----------------------------------------------------------------------------------------


def normalize(form: NormalForm, text: str) -> str:
    """The text in a Unicode normal form."""
    # the check is many times as fast as normalizing
    if form == "none" or text.isascii() or unicodedata.is_normalized(form, text):
        return text
    return unicodedata.normalize(form, text)


@lru_cache(maxsize=1)
def _ftfy() -> tuple[Callable[..., str], Any]:
    import ftfy

    # only the repairs of wrong decoding: ftfy's others are matters of taste
    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return ftfy.fix_text, config


def repair_mojibake(text: str) -> str:
    """The text with mojibake repaired, line by line."""
    if text.isascii():
        return text
    fix, config = _ftfy()
    return fix(text, config)


_LINE_ENDS = re.compile("\r\n?|[\v\f\x85\u2028\u2029]")
# Zero-width joiners are kept: they matter in Arabic, Indic scripts and emoji. So are visible
# formatting characters (Arabic number signs). Tag characters are removed, and so are flag emoji
# made of them.
_INVISIBLE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # a terminal's colours and cursor movements
    "|[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"
    "\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0001\U000e0020-\U000e007f"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"  # surrogates and noncharacters
)


def remove_control_characters(text: str) -> str:
    """The text without control and invisible formatting characters; its line ends are \\n."""
    if _LINE_ENDS.search(text):
        text = _LINE_ENDS.sub("\n", text)
    return _INVISIBLE.sub("", text)


# --- Project Gutenberg ----------------------------------------------------------------------------

# The markers of thirty years. The line of asterisks may break within a long title.
_MARKS = re.compile(
    r"""
    ^[ \t\r]*(?:
      (?P<start> \*{3}[ ]?START[ ]OF[ ]TH(?:E|IS)[ ](?:COPYRIGHTED[ ])?PROJECT[ ]GUTENBERG
                 [ ]E-?(?:BOOK|TEXT)
                 (?: [^\n*]*+ (?: \n(?![ \t\r]*$)[^\n*]*+ ){0,3} \*{3} )? [^\n]* )
    | (?P<end>   (?:\*{3}[ ]?)?END[ ]OF[ ](?:TH(?:E|IS)[ ])?(?:COPYRIGHTED[ ])?PROJECT[ ]GUTENBERG
                 (?: ['\u2019]S\b | [ ]E-?(?:BOOK|TEXT)\b | [ ]EDITION\b ) [^\n]* )
    | (?P<print> \*{3}START\*{2}[ ]?THE[ ]SMALL[ ]PRINT! [^\n]*
                 (?= [\s\S]*? \n[ \t\r]*\*END\*?[ ]?THE[ ]SMALL[ ]PRINT! ) )
    | (?P<after> \*END\*?[ ]?THE[ ]SMALL[ ]PRINT! [^\n]* )
    )$
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# A paragraph, but not a whole book that has no blank lines.
_CREDITS = re.compile(
    r"""
    \s*^[ \t]*(?: Produced[ ]by | E-?(?:text|book)[ ](?:prepared|produced)[ ]by
      | This[ ]e-?(?:text|book)[ ]was[ ](?:prepared|produced|transcribed)[ ]by
      | Transcribed[ ]from[ ]the )\b
    [^\n]*+ (?: \n(?![ \t\r]*$)[^\n]*+ ){0,7}
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# Before 2003 the small print came after an introduction of some thousand characters or, in a few
# books, at the end.
_INTRODUCTION = 12_000


def strip_gutenberg(text: str) -> str:
    """The text without Project Gutenberg's header, small print, licence and credits.

    Text before a start marker and after an end marker is removed, in each book if there are
    several. A text without markers is returned unchanged.
    """
    if "gutenberg" not in text.lower() and "SMALL PRINT!" not in text:
        return text
    bodies = []
    at, inside = 0, True
    for mark in _MARKS.finditer(text):
        begins = mark.lastgroup in ("start", "after")
        if mark.lastgroup == "print" and mark.start() - at < _INTRODUCTION:
            continue  # the header goes on until the small print is over
        if inside and not begins:
            bodies.append(_without_credits(text[at : mark.start()]) if at else text[: mark.start()])
        at, inside = mark.end(), begins
    if not at:
        return text
    if inside:
        bodies.append(_without_credits(text[at:]))
    return "\n\n".join(body for body in (body.strip("\r\n") for body in bodies) if body)


def _without_credits(body: str) -> str:
    while credit := _CREDITS.match(body):
        body = body[credit.end() :]
    return body


# --- languages ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import (  # type: ignore[import-untyped]
        MODEL_FILE,
        LanguageIdentifier,
    )

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_probability(text: str, languages: Sequence[str]) -> float:
    """The probability that the text is in one of `languages` (codes of `LANGUAGES`), 0 … 1.

    A long text is judged by ten excerpts of 200 characters from all over it.
    """
    if len(text) > 2_000:
        step = len(text) // 10
        text = "\n".join(text[at : at + 200] for at in range(0, 10 * step, step))
    probabilities = dict(_identifier().rank(text))
    return float(sum(probabilities[language] for language in set(languages)))


# --- quality --------------------------------------------------------------------------------------

_BULLETS = ("•", "‣", "◦", "▪", "●", "*", "-", "–", "—")  # noqa: RUF001
_ELLIPSES = ("...", "…")
_SENTENCE_ENDS = (".", "!", "?", '"', "'", "”", "’", "»", "…", "。", "！", "？", "」")  # noqa: RUF001
_SHORT_LINE = 30  # characters


def broken_rules(text: str, quality: Quality) -> Iterator[str]:
    """The names of the rules that a text breaks; cheap rules are tested first."""
    words = text.split()
    yield from _broken_by_words(text, words, quality)
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    yield from _broken_by_lines(lines, quality)
    paragraphs = [stripped for part in re.split(r"\n\s*\n", text) if (stripped := part.strip())]
    yield from _broken_by_repetition(lines, paragraphs, quality)
    yield from _broken_by_ngrams(words, quality)


def _broken_by_words(text: str, words: Sequence[str], quality: Quality) -> Iterator[str]:
    n = max(1, len(words))
    mean = sum(map(len, words)) / n
    symbols = max(text.count("#"), sum(map(text.count, _ELLIPSES))) / n
    rules = (
        ("number of words", quality.min_words <= len(words) <= quality.max_words),
        ("mean word length", quality.min_word_length <= mean <= quality.max_word_length),
        ("symbols", symbols <= quality.symbols),
    )
    yield from (name for name, kept in rules if not kept)
    alphabetic = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) / n
    if alphabetic < quality.alphabetic_words:
        yield "alphabetic words"
    if quality.min_stop_words:
        met = set(re.findall(r"\w+", text.lower())).intersection(quality.stop_words)
        if len(met) < quality.min_stop_words:
            yield "stop words"


def _broken_by_lines(lines: Sequence[str], quality: Quality) -> Iterator[str]:
    n = max(1, len(lines))
    counts = (
        ("bullet lines", sum(line.startswith(_BULLETS) for line in lines), quality.bullet_lines),
        ("ellipsis lines", sum(line.endswith(_ELLIPSES) for line in lines), quality.ellipsis_lines),
        ("short lines", sum(len(line) < _SHORT_LINE for line in lines), quality.short_lines),
    )
    yield from (name for name, count, most in counts if count / n > most)
    if sum(line.endswith(_SENTENCE_ENDS) for line in lines) / n < quality.punctuated_lines:
        yield "punctuated lines"


def _broken_by_repetition(
    lines: Sequence[str], paragraphs: Sequence[str], quality: Quality
) -> Iterator[str]:
    line, line_characters = _repeated_shares(lines)
    paragraph, paragraph_characters = _repeated_shares(paragraphs)
    shares = (
        ("repeated lines", line, quality.repeated_lines),
        ("repeated line characters", line_characters, quality.repeated_line_characters),
        ("repeated paragraphs", paragraph, quality.repeated_paragraphs),
        (
            "repeated paragraph characters",
            paragraph_characters,
            quality.repeated_paragraph_characters,
        ),
    )
    yield from (name for name, share, most in shares if share > most)


def _repeated_shares(pieces: Sequence[str]) -> tuple[float, float]:
    """The share of repeated pieces, by number and by characters."""
    first = dict.fromkeys(pieces)
    total = max(1, sum(map(len, pieces)))
    return 1 - len(first) / max(1, len(pieces)), 1 - max(1, sum(map(len, first))) / total


def _broken_by_ngrams(words: Sequence[str], quality: Quality) -> Iterator[str]:
    words = [word.lower() for word in words]
    total = max(1, sum(map(len, words)))
    for n, share in enumerate(quality.top_ngrams, start=2):
        top = Counter(_ngrams(words, n)).most_common(1)
        if top and top[0][1] > 1 and top[0][1] * sum(map(len, top[0][0])) > share * total:
            yield f"top {n}-gram"
    smallest = min(quality.repeated_ngrams, default=1.0)
    for n, share in enumerate(quality.repeated_ngrams, start=5):
        repeated = _repeated_characters(words, n) / total
        if repeated > share:
            yield f"repeated {n}-grams"
        # repeated longer n-grams lie within these, so their share is never larger
        if repeated <= smallest:
            break


def _repeated_characters(words: Sequence[str], n: int) -> int:
    """The number of characters in repeated n-grams, each word counted once."""
    seen = set()
    repeated = bytearray(len(words))
    for start, ngram in enumerate(_ngrams(words, n)):
        if ngram in seen:
            repeated[start : start + n] = b"\1" * n
        else:
            seen.add(ngram)
    return sum(map(len, compress(words, repeated)))


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)
