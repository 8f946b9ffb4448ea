"""The data report: `reports/data.md` with its pictures, and the few lines of it for a terminal.

Written anew after every stage that makes data. Equal data, equal bytes: there is no clock and no
host in it. Sources' names and excerpts come from outside, so nothing of them is Markdown or HTML.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt.base.files import whole_directory, whole_file
from pipeline.data.facts import (
    Corpus,
    CorpusSource,
    DataFacts,
    Excerpt,
    Instructions,
    Lengths,
    Messages,
    RawSource,
    Row,
    data_facts,
)
from pipeline.show.console import safe_console
from pipeline.show.markdown import Cell, escaped, name_of, ratio, share_of, shown, table, visible
from pipeline.show.plots import draw_bars, draw_lengths, draw_mixture

PAGE = Path("reports/data.md")
PICTURES = Path("reports/data")

_MOST_SOURCES = 4  # named in one cell
_IN_A_LIST = 28  # characters of a name there
_MOST_CLASSES = 20  # rows of the table of classes; the rest are one row


@dataclass(frozen=True, slots=True)
class Report:
    """Where the report is."""

    page: Path
    pictures: list[Path]


def write_report(root: Path) -> Report:
    """Look at the project's data and write the report, page and pictures each as a whole.

    Raises:
        InputError: nothing was downloaded yet, or what there is cannot be read.
    """
    return _write(root, data_facts(root))


def print_data(root: Path, console: Console | None = None) -> None:
    """Write the report anew, and print where it is and what is in short.

    Raises:
        InputError: nothing was downloaded yet, or what there is cannot be read.
    """
    console = safe_console(console)
    facts = data_facts(root)
    _write(root, facts)
    columns, rows = _summary(facts)
    summary = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        summary.add_column(column, justify="right" if i else "left")
    for row in rows:
        summary.add_row(*(Text(shown(cell)) for cell in row))
    console.print(summary)
    console.print()
    for line in _at_a_glance(facts):
        console.print(Text(visible(line, limit=None)))
    console.print(Text(f"\n{PAGE.as_posix()}: the whole report, with pictures"))


def _write(root: Path, facts: DataFacts) -> Report:
    lock = root / ".pipeline" / "data_report.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # a stage may end while a person asks for the report
        with whole_directory(root / PICTURES) as folder:
            names = [path.name for path in _pictures(facts, folder)]
        with whole_file(root / PAGE) as partial:
            partial.write_text(_page(facts, set(names)), encoding="utf-8", newline="\n")
    return Report(root / PAGE, [root / PICTURES / name for name in names])


# --- pictures -------------------------------------------------------------------------------------


def _pictures(facts: DataFacts, folder: Path) -> list[Path]:
    pictures = []
    if corpus := facts.corpus:
        lengths = {each.name: each.lengths for each in corpus.sources}
        pictures += [
            draw_bars(
                folder / "tokens.png",
                "Pretraining text: tokens by source",
                {each.name: each.tokens for each in corpus.sources},
                "tokens of the documents that were kept",
            ),
            draw_lengths(
                folder / "document_lengths.png",
                "Pretraining text: how long documents are",
                _bars(lengths),
                "tokens a document",
                "documents",
            ),
        ]
        if corpus.mixture:
            pictures.append(
                draw_mixture(
                    folder / "mixture.png",
                    "The mixture: what there is, what was wanted, what it is",
                    _shares(corpus),
                )
            )
    if messages := facts.messages:
        pictures += [
            draw_bars(folder / "classes.png", "Messages by class", messages.classes, "messages"),
            draw_lengths(
                folder / "message_lengths.png",
                "How long messages are, by class",
                _bars(messages.characters),
                "characters a message",
                "messages",
            ),
        ]
    if instructions := facts.instructions:
        pictures.append(
            draw_lengths(
                folder / "answer_lengths.png",
                "How long the answers to instructions are",
                _bars(instructions.answers),
                "characters an answer",
                "records",
            )
        )
    return pictures


def _bars(lengths: Mapping[str, Lengths]) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
    return {name: (each.edges, each.counts) for name, each in lengths.items() if sum(each.counts)}


def _shares(corpus: Corpus) -> dict[str, tuple[float, float, float]]:
    """By source of the mixture: its share of the kept tokens, of the weights, of the training."""
    if corpus.mixture is None:
        return {}
    mixed = corpus.mixture.sources
    tokens = max(_total(corpus, "tokens"), 1)
    weights = sum(each.weight for each in mixed.values()) or 1.0
    return {
        each.name: (
            each.tokens / tokens,
            mixed[each.name].weight / weights,
            mixed[each.name].share,
        )
        for each in corpus.sources
        if each.name in mixed
    }


# --- the page -------------------------------------------------------------------------------------


def _page(facts: DataFacts, pictures: set[str]) -> str:
    parts = [
        "# The data",
        "What the models of this project learn from: figures of the files under `data/`, and "
        "excerpts of them. `gpt-pipeline data` writes this page anew.",
        table(*_summary(facts)),
        "\n".join(f"- {escaped(line)}" for line in _at_a_glance(facts)),
        *_corpus(facts, pictures),
        *_messages(facts, pictures),
        *_instructions(facts, pictures),
        *_not_looked_at(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(facts: DataFacts) -> tuple[list[str], list[list[Cell]]]:
    rows: list[list[Cell]] = []
    for name, sources in facts.raw.items():
        if not sources:
            continue
        records: Cell = sum(source.records for source in sources)
        kept: Cell = None  # only the corpus is filtered
        tokens: Cell = None
        if name == "corpus" and facts.corpus:
            records, kept = _total(facts.corpus, "read"), _total(facts.corpus, "kept")
            tokens = _total(facts.corpus, "tokens")
        elif name == "messages" and facts.messages:
            tokens = facts.messages.n_tokens
        elif name == "instructions" and facts.instructions:
            tokens = facts.instructions.n_tokens
        elif name == "gpt2":
            records = None
        n_bytes = sum(source.bytes for source in sources)
        rows.append([_DATA_SETS[name], len(sources), n_bytes, records, kept, tokens])
    return ["data set", "sources", "bytes on disk", "read", "kept", "tokens"], rows


_DATA_SETS = {
    "corpus": "pretraining text (documents)",
    "messages": "messages (rows)",
    "instructions": "instructions (records)",
    "gpt2": "published model (files)",
}


def _at_a_glance(facts: DataFacts) -> list[str]:
    """The report in a few sentences, as plain text."""
    lines = []
    if corpus := facts.corpus:
        read, kept = _total(corpus, "read"), _total(corpus, "kept")
        removed = f"{read - kept:,} of {read:,} documents removed ({share_of(read - kept, read)})"
        lines.append(f"Pretraining text: {removed}.")
        lines.append(f"Duplicates in it: {_duplicates(corpus)}.")
        train = sum(each.train.tokens for each in corpus.sources)
        validation = sum(each.validation.tokens for each in corpus.sources)
        text, tokens = _total(corpus, "text_bytes"), _total(corpus, "tokens")
        lines.append(
            f"Tokens: {train:,} to train on, {validation:,} for validation; "
            f"{ratio(text, tokens)} bytes per token with the tokenizer {corpus.tokenizer} "
            f"({corpus.vocab_size:,} tokens)."
        )
        lines.append(f"Contamination: {_contaminated(corpus)}.")
    elif facts.outdated:
        lines.append(
            "Pretraining text: downloaded anew since it was tokenized; "
            "gpt-pipeline run tokenize brings its figures up to date."
        )
    else:
        lines.append("Pretraining text: not looked at yet; gpt-pipeline run tokenize does.")
    if messages := facts.messages:
        total = sum(messages.classes.values())
        largest = [
            f"{name_of(name, _IN_A_LIST)} {share_of(n, total)}"
            for name, n in messages.classes.items()
        ][:4]
        more = len(messages.classes) - len(largest)
        classes = ", ".join(largest) + (f" and {more} more" if more > 0 else "")
        lines.append(f"Messages: {total:,} in {len(messages.classes)} classes: {classes}.")
        lines.append(f"Duplicates among them: {_repeats(messages)}.")
    if instructions := facts.instructions:
        total = sum(instructions.rows.values())
        without = sum(instructions.without_input.values())
        lines.append(
            f"Instructions: {total:,}, {without:,} of them ({share_of(without, total)}) without an "
            "input."
        )
        lines.append(f"Duplicates among them: {_repeats(instructions)}.")
    return lines


def _total(corpus: Corpus, figure: str) -> int:
    return sum(getattr(each, figure) for each in corpus.sources)


def _duplicates(corpus: Corpus) -> str:
    found = []
    for kind in ("exact", "near"):
        n = sum(
            n
            for each in corpus.sources
            for name, n in each.removed.items()
            if name.startswith(f"{kind} duplicate")
        )
        match corpus.looked_for(f"{kind}_duplicates", f"{kind} duplicate"):
            case True:
                found.append(f"{n:,} {kind} ones removed")
            case False:
                found.append(f"{kind} ones not looked for")
            case None:
                found.append(f"no {kind} ones removed")
    return ", ".join(found)


def _contaminated(corpus: Corpus) -> str:
    found = corpus.contamination
    if found is None:
        return "not looked for"
    return (
        f"{found.documents:,} of {found.of:,} validation documents "
        f"({share_of(found.documents, found.of)}) share {found.ngram} tokens in a row with the "
        f"training text, {found.tokens:,} tokens in all"
    )


def _repeats(rows: Messages | Instructions) -> str:
    what = (
        "texts with several classes" if isinstance(rows, Messages) else "tasks with several answers"
    )
    return (
        f"{rows.exact:,} exact, {rows.folded:,} but for case and white space; "
        f"{what}: {rows.contradictions:,}"
    )


# --- the corpus -----------------------------------------------------------------------------------


def _corpus(facts: DataFacts, pictures: set[str]) -> list[str]:
    parts = ["## Pretraining text", _places(facts.raw["corpus"], "documents")]
    corpus = facts.corpus
    if corpus is None:
        return parts
    return [
        *parts,
        "### What was kept",
        "Bytes are of the text, not of the files; a source's share is of all kept tokens.",
        table(*_kept(corpus.sources)),
        *_picture(pictures, "tokens.png", "tokens by source"),
        "### What was removed and changed",
        *_removed(corpus),
        "### What training and validation get",
        *_splits(corpus, pictures),
        "### How long documents are",
        "In tokens, of the documents that were kept.",
        _lengths({each.name: each.lengths for each in corpus.sources}, "source"),
        *_picture(pictures, "document_lengths.png", "document lengths by source"),
        "### Contamination",
        *_contamination(corpus),
        "### The longest and the oddest documents",
        *_extremes(corpus),
    ]


def _places(sources: Sequence[RawSource], records: str) -> str:
    return table(
        ["source", "files", "bytes on disk", records, "sha256", "from"],
        [
            [
                name_of(source.name),
                len(source.files),
                source.bytes,
                source.records,
                source.files[0].sha256[:12] if len(source.files) == 1 else "of each file",
                _from(source),
            ]
            for source in sources
        ],
        "lrrrll",
    )


def _from(source: RawSource) -> str:
    if not source.urls:
        return "local or built in"
    more = len(source.urls) - 1
    return source.urls[0] + (f" and {more} more" if more else "")


def _kept(sources: Sequence[CorpusSource]) -> tuple[list[str], list[list[Cell]]]:
    all_tokens = sum(each.tokens for each in sources)

    def row(name: str, read: int, kept: int, n_bytes: int, tokens: int) -> list[Cell]:
        of_all, each = share_of(tokens, all_tokens), ratio(n_bytes, tokens)
        return [name_of(name), read, kept, share_of(kept, read), n_bytes, tokens, of_all, each]

    rows = [row(e.name, e.read, e.kept, e.text_bytes, e.tokens) for e in sources]
    if len(sources) > 1:
        figures = [(e.read, e.kept, e.text_bytes, e.tokens) for e in sources]
        rows.append(row("all", *(sum(column) for column in zip(*figures, strict=True))))
    columns = ["source", "read", "kept", "of read", "bytes", "tokens", "share", "bytes per token"]
    return columns, rows


def _removed(corpus: Corpus) -> list[str]:
    parts = [
        _steps(corpus, "removed", {each.name: each.removed for each in corpus.sources}),
        _steps(corpus, "changed", {each.name: each.changed for each in corpus.sources}),
    ]
    not_asked = [
        what for what, parameter, step in _CLEANING if corpus.looked_for(parameter, step) is False
    ]
    if not_asked:
        parts.append(f"Not asked for: {', '.join(not_asked)}.")
    if corpus.examples.removed:
        parts.append("Some that were removed:")
        removed: list[list[Cell]] = [
            [name_of(e.source), e.filter, e.text] for e in corpus.examples.removed
        ]
        parts.append(table(["source", "by", "text"], removed, "lll"))
    if corpus.examples.changed:
        parts.append("Some that were changed, at the first difference:")
        changed: list[list[Cell]] = [
            [name_of(e.source), e.step, e.before, e.after] for e in corpus.examples.changed
        ]
        parts.append(table(["source", "by", "before", "after"], changed, "llll"))
    return parts


_CLEANING = (
    ("a smallest length", "min_chars", "min_chars"),
    ("a greatest length", "max_chars", "max_chars"),
    ("the language", "languages", "languages"),
    ("quality rules", "quality", "quality"),
    ("exact duplicates", "exact_duplicates", "exact duplicate"),
    ("near duplicates", "near_duplicates", "near duplicate"),
)
"""What a filter looks for, its parameter, and how its name among what was removed begins."""


def _steps(corpus: Corpus, what: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    """What each step did, in all and by source."""
    read = _total(corpus, "read")
    totals: Counter[str] = Counter()
    for each in counts.values():
        totals.update(each)
    rows: list[list[Cell]] = []
    for step, total in sorted(totals.items(), key=lambda item: (-item[1], item[0])):
        by_source = {name: each[step] for name, each in counts.items() if each.get(step)}
        most = sorted(by_source.items(), key=lambda item: -item[1])
        where = ", ".join(f"{name_of(name, _IN_A_LIST)} {n:,}" for name, n in most[:_MOST_SOURCES])
        more = len(most) - _MOST_SOURCES
        rows.append([step, total, share_of(total, read), where + (f", {more} more" * (more > 0))])
    if not rows:
        return f"No document was {what}."
    return table(["step", f"documents {what}", "of all read", "by source"], rows, "lrrl")


def _splits(corpus: Corpus, pictures: set[str]) -> list[str]:
    def row(name: str, each: Iterable[CorpusSource]) -> list[Cell]:
        parts = [(source.train, source.validation) for source in each]
        train = [part for part, _ in parts]
        validation = [part for _, part in parts]
        return [
            name_of(name),
            *(
                sum(getattr(part, figure) for part in split)
                for split in (train, validation)
                for figure in ("documents", "bytes", "tokens")
            ),
        ]

    rows = [row(each.name, [each]) for each in corpus.sources]
    if len(rows) > 1:
        rows.append(row("all", corpus.sources))
    columns = [
        f"{split} {figure}"
        for split in ("train", "validation")
        for figure in ("documents", "bytes", "tokens")
    ]
    parts = [
        "As written to `data/tokens`; the tokens count the end of each document too.",
        table(["source", *columns], rows),
    ]
    mixture = corpus.mixture
    if mixture is None:
        return [*parts, "No mixture was asked for: training gets every source once."]
    return [
        *parts,
        "Training gets a mixture. An epoch is once through a source's training text: below one "
        "the source comes in part, above it is repeated, and counts each time.",
        table(
            [
                "source",
                "of the text there is",
                "wanted (weight)",
                "of the training tokens",
                "epochs",
                "at most",
            ],
            [
                [
                    name_of(name),
                    *(f"{share:.1%}" for share in shares),
                    f"{mixture.sources[name].epochs:.2f}",
                    None if (most := mixture.sources[name].max_epochs) is None else f"{most:.2f}",
                ]
                for name, shares in _shares(corpus).items()
            ],
        ),
        *_picture(pictures, "mixture.png", "the mixture"),
    ]


def _contamination(corpus: Corpus) -> list[str]:
    found = corpus.contamination
    if found is None:
        return ["Not looked for."]
    rows: list[list[Cell]] = [
        [
            name_of(each.name),
            each.validation.documents,
            each.contamination.documents,
            share_of(each.contamination.documents, each.validation.documents),
            each.contamination.tokens,
        ]
        for each in corpus.sources
        if each.contamination
    ]
    columns = ["source", "validation documents", "contaminated", "share", "shared tokens"]
    parts = [f"{_sentence(_contaminated(corpus))}.", table(columns, rows)]
    if found.examples:
        parts += ["Some of it:", table(["source", "text"], _texts(found.examples), "ll")]
    return parts


def _texts(excerpts: Iterable[Excerpt]) -> list[list[Cell]]:
    return [[name_of(each.source), each.text] for each in excerpts]


def _extremes(corpus: Corpus) -> list[str]:
    return [
        table(
            ["the longest", "tokens", "bytes", "text"],
            [[name_of(e.source), e.tokens, e.bytes, e.text] for e in corpus.longest],
            "lrrl",
        ),
        "The oddest give the tokenizer the most work: the fewest bytes a token.",
        table(
            ["the oddest", "bytes per token", "tokens", "text"],
            [
                [name_of(e.source), f"{e.bytes_per_token:.2f}", e.tokens, e.text]
                for e in corpus.oddest
            ],
            "lrrl",
        ),
    ]


# --- messages and instructions --------------------------------------------------------------------


def _messages(facts: DataFacts, pictures: set[str]) -> list[str]:
    messages = facts.messages
    if messages is None:
        return ["## Messages", "There are none."]
    classes = messages.classes
    total = sum(classes.values())
    named = list(classes) if len(classes) <= _MOST_CLASSES else list(classes)[: _MOST_CLASSES - 1]
    rows: list[list[Cell]] = []
    for source, counts in messages.rows.items():
        n = sum(counts.values())
        rows += [
            [name_of(source), name_of(label), counts[label], share_of(counts[label], n)]
            for label in named
            if label in counts
        ]
        if rest := n - sum(counts.get(label, 0) for label in named):
            rows.append([name_of(source), "other classes", rest, share_of(rest, n)])
    if len(messages.rows) > 1:
        rows += [
            ["all", name_of(label), classes[label], share_of(classes[label], total)]
            for label in named
        ]
    smallest = min(classes.values())
    return [
        "## Messages",
        _places(facts.raw["messages"], "rows"),
        "### Class balance",
        f"The largest class has {ratio(max(classes.values()), smallest)} times as many rows as "
        "the smallest.",
        table(["source", "class", "rows", "of the source"], rows, "llrr"),
        *_picture(pictures, "classes.png", "messages by class"),
        "### How long messages are",
        "In characters:",
        _lengths({label: messages.characters[label] for label in named}, "class"),
        *_token_lengths(messages.tokens, named, "class"),
        *_picture(pictures, "message_lengths.png", "message lengths by class"),
        "### Duplicate messages",
        table(
            ["what", "how many"],
            [
                ["rows whose class and text an earlier row has", messages.exact],
                ["rows whose text an earlier row has, but for case and space", messages.folded],
                ["such texts that have several classes", messages.contradictions],
            ],
        ),
        "### The longest and the oddest messages",
        *_rows(messages.longest, messages.oddest, counted=messages.tokens is not None),
    ]


def _instructions(facts: DataFacts, pictures: set[str]) -> list[str]:
    instructions = facts.instructions
    if instructions is None:
        return ["## Instructions", "There are none."]
    without = instructions.without_input
    rows: list[list[Cell]] = [
        [name_of(name), n, without.get(name, 0), share_of(without.get(name, 0), n)]
        for name, n in instructions.rows.items()
    ]
    turns = []
    if set(instructions.turns) != {1}:
        total = sum(instructions.turns.values())
        turns = [
            "Conversations: records by their number of turns.",
            table(
                ["turns", "records", "share"],
                [[str(k), n, share_of(n, total)] for k, n in sorted(instructions.turns.items())],
            ),
        ]
    return [
        "## Instructions",
        _places(facts.raw["instructions"], "records"),
        "### Inputs and turns",
        table(["source", "records", "without an input", "share"], rows),
        *(turns or ["Every record is one question and one answer."]),
        "### How long they are",
        "In characters; inputs where there is one:",
        _lengths(instructions.characters, "part"),
        *_token_lengths(instructions.tokens, list(instructions.characters), "part"),
        *_picture(pictures, "answer_lengths.png", "answer lengths by source"),
        "### Duplicate instructions",
        "A task is all that is asked.",
        table(
            ["what", "how many"],
            [
                ["records that are equal to an earlier one", instructions.exact],
                [
                    "records whose task an earlier one has, but for case and space",
                    instructions.folded,
                ],
                ["such tasks that have several answers", instructions.contradictions],
            ],
        ),
        "### The longest and the oddest instructions",
        *_rows(instructions.longest, instructions.oddest, counted=instructions.tokens is not None),
    ]


def _token_lengths(
    lengths: Mapping[str, Lengths] | None, names: Sequence[str], what: str
) -> list[str]:
    if lengths is None:
        return ["Tokens were not counted: there is no tokenizer yet."]
    return [
        "In tokens of the tokenizer in `data/tokens`:",
        _lengths({name: lengths[name] for name in names}, what),
    ]


def _rows(longest: Sequence[Row], oddest: Sequence[Row], *, counted: bool) -> list[str]:
    labelled = any(row.label for row in longest)

    def as_table(title: str, rows: Sequence[Row], *, odd: bool) -> str:
        columns, align = [title], "l"
        if labelled:
            columns, align = [*columns, "class"], align + "l"
        columns, align = [*columns, "characters"], align + "r"
        if counted:
            columns, align = [*columns, "tokens"], align + "r"
        if odd:
            columns.append("bytes per token" if counted else "letters")
            align += "r"
        cells: list[list[Cell]] = []
        for row in rows:
            line: list[Cell] = [name_of(row.source)]
            line += [name_of(row.label)] if labelled else []
            line.append(row.characters)
            line += [row.tokens] if counted else []
            if odd:
                line.append(f"{row.figure:.2f}" if counted else f"{row.figure:.1%}")
            cells.append([*line, row.text])
        return table([*columns, "text"], cells, align + "l")

    odd = (
        "The oddest give the tokenizer the most work: the fewest bytes a token."
        if counted
        else "The oddest have the smallest share of letters."
    )
    return [
        as_table("the longest", longest, odd=False),
        odd,
        as_table("the oddest", oddest, odd=True),
    ]


def _not_looked_at(facts: DataFacts) -> list[str]:
    lines = ["near duplicates among messages and among instructions"]
    if corpus := facts.corpus:
        lines += [
            f"{what} of the pretraining text"
            for what, parameter, step in _CLEANING
            if corpus.looked_for(parameter, step) is False and "length" not in what
        ]
        if corpus.contamination is None:
            lines.append("whether the validation split stands in the training split too")
    else:
        lines.append("the documents of the pretraining text: they were not tokenized yet")
    lines += [
        "whether messages or instructions stand in the pretraining text too",
        "licences, and whether texts name real people",
    ]
    return ["## Not looked at", "\n".join(f"- {line}" for line in lines)]


# --- Markdown -------------------------------------------------------------------------------------


def _lengths(lengths: Mapping[str, Lengths], what: str) -> str:
    def figure(value: float | None) -> Cell:
        if value is None:
            return None
        return int(value) if float(value).is_integer() else f"{value:,.1f}"

    rows: list[list[Cell]] = [
        [
            name_of(name),
            sum(each.counts),
            *map(figure, (each.min, each.median, each.mean, each.p95, each.max)),
        ]
        for name, each in lengths.items()
    ]
    columns = [what, "how many", "shortest", "median", "mean", "95 % are within", "longest"]
    return table(columns, rows)


def _picture(pictures: set[str], name: str, title: str) -> list[str]:
    return [f"![{title}]({PICTURES.name}/{name})"] if name in pictures else []


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
