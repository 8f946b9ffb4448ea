"""The report of a run in words, tables and pictures: what every rendering of it shows.

Figures are put into words here and nowhere else, so that the page, its Markdown and the terminal
say the same. All of it is plain text: a rendering escapes what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from gpt.base.labels import class_key
from pipeline.data.facts import RawSource
from pipeline.project.secrets import without_credentials
from pipeline.project.stage_table import STAGES
from pipeline.report.facts import (
    Answer,
    Facts,
    Judged,
    Score,
    Scores,
)
from pipeline.show.console import seconds_in_words
from pipeline.show.markdown import NOTHING, Cell, name_of
from pipeline.verdict.promotion import Decision

BASES = ("pretrain", "gpt2")
MODELS = {"base": "pretrain", "classifier": "classifier", "assistant": "assistant"}
"""A registered model, and by what name the evaluation knows it."""

_SHOWN_ANSWERS = 6
_COUNTED = {"base": "windows of text", "classifier": "messages", "assistant": "records"}
_IN_NATS = ("loss", "perplexity", "bits_per_byte")
"""The scores that are no shares."""


# --- what a page is made of -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heading:
    """Of a part of a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Plain text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True, slots=True)
class Grid:
    """A table: headings, rows, and `l` (words), `r` (figures) or `c` (code) a column."""

    kind: ClassVar[str] = "grid"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    align: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A file in the folder of the report's pictures, and what it shows."""

    kind: ClassVar[str] = "picture"
    file: str
    title: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures that may stand side by side."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One model: its score, and what became of it (`promoted`, `kept`, `open`)."""

    model: str
    state: str
    verdict: str
    score: str
    of: str
    """What the score is."""
    why: Sequence[str]


@dataclass(frozen=True, slots=True)
class Verdicts:
    """One model beside the other."""

    kind: ClassVar[str] = "verdicts"
    verdicts: Sequence[Verdict]


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts to be compared: what was asked, and who answered what."""

    kind: ClassVar[str] = "texts"
    task: str
    answers: Sequence[tuple[str, str]]


Block = Heading | Paragraph | Grid | Picture | Gallery | Verdicts | Texts


@dataclass(frozen=True, slots=True)
class Section:
    """A titled part of the page; the first one's title is the page's."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures that were drawn; what there was nothing to draw of is empty.

    Attributes:
        accuracies: of the classifier beside the bases.
        confusion: which classes were taken for which.
        curves: of every training.
    """

    accuracies: Sequence[Picture] = ()
    confusion: Sequence[Picture] = ()
    curves: Sequence[Picture] = ()


def sections(facts: Facts, pictures: Pictures) -> list[Section]:
    """The page, in order."""
    return [
        Section("What was built, and how good it is", _headline(facts)),
        Section("Scores", _scores(facts, pictures)),
        Section("Sample answers", _samples(facts)),
        Section("Where the classifier was most wrong", _most_wrong(facts)),
        Section("How training went", _training(pictures)),
        Section("What it was made from", _origin(facts)),
        Section("What it took", _cost(facts)),
    ]


# --- figures in words -----------------------------------------------------------------------------


_NOT_FINITE = "not finite"  # an older evaluation may say so of a damaged model


def percent(score: Score | None) -> str | None:
    """A share with its interval, `98.8 % (97.3-99.6)`; None where it was not measured."""
    if score is None:
        return None
    if not math.isfinite(score.value):
        return _NOT_FINITE
    return f"{score.value * 100:.1f} %{_interval(score, lambda end: f'{end * 100:.1f}')}"


def decimal(score: Score | None, digits: int = 3) -> str | None:
    """A figure with its interval, `4.166 (4.102-4.230)`; None where it was not measured."""
    if score is None:
        return None
    if not math.isfinite(score.value):
        return _NOT_FINITE
    return f"{score.value:,.{digits}f}{_interval(score, lambda end: f'{end:,.{digits}f}')}"


def _interval(score: Score, in_words: Callable[[float], str]) -> str:
    if score.low is None or score.high is None:
        return ""
    return f" ({in_words(score.low)}\N{EN DASH}{in_words(score.high)})"


def _in_words(name: str, value: float) -> str:
    """A score by its name, in its unit."""
    score = Score(value)
    return (decimal(score) if name in _IN_NATS else percent(score)) or NOTHING


def _difference(decision: Decision) -> str:
    """`+1.5 points (0.3 to 2.7)`, or `-0.120 (-0.150 to -0.090)` of what is no share."""
    shares = decision.score not in _IN_NATS
    scale, digits, unit = (100, 1, " points") if shares else (1, 3, "")
    if decision.difference is None:
        return NOTHING
    text = f"{decision.difference * scale:+.{digits}f}{unit}"
    if decision.low is None or decision.high is None:
        return text
    low, high = (f"{end * scale:+.{digits}f}" for end in (decision.low, decision.high))
    return f"{text} ({low} to {high})"


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _count(score: Score | None) -> int | None:
    return None if score is None else round(score.value)


# --- the headline ---------------------------------------------------------------------------------


def _headline(facts: Facts) -> list[Block]:
    return [
        Paragraph(built(facts)),
        Paragraph(_when(facts)),
        Verdicts(verdicts(facts)),
        Paragraph("In brackets: 95 % bootstrap intervals over the test examples."),
    ]


def built(facts: Facts) -> str:
    """What was built, in a sentence."""
    pretrain, gpt2 = facts.results.get("pretrain", {}), facts.results.get("load_gpt2", {})
    classifier = facts.results.get("finetune_classifier", {})
    assistant = facts.results.get("finetune_instruct", {})
    parts = [
        f"a GPT{_of(pretrain, 'parameters', 'parameters')}"
        f"{_of(pretrain, 'tokens', 'tokens', ' pretrained on')}",
        f"GPT-2 weights{_of(gpt2, 'parameters', 'parameters')}",
        f"a classifier{_from(facts, 'finetune_classifier')}"
        f"{_of(classifier, 'rows_train', 'messages', ' on')}",
        f"an assistant{_from(facts, 'finetune_instruct')}"
        f"{_of(assistant, 'records_train', 'records', ' on')}",
    ]
    return sentence(f"{', '.join(parts[:-1])} and {parts[-1]}")


def _of(figures: Mapping[str, float], name: str, unit: str, before: str = " of") -> str:
    return f"{before} {figures[name]:,.0f} {unit}" if name in figures else ""


def _from(facts: Facts, stage: str) -> str:
    base = base_of(facts, stage)
    return f" fine-tuned from {base}" if base else ""


def base_of(facts: Facts, stage: str) -> str | None:
    """The base that a stage fine-tuned."""
    recorded = facts.recorded.get(stage)
    section = recorded.params.get(stage) if recorded else None
    return section.get("base") if isinstance(section, dict) else None


def _when(facts: Facts) -> str:
    ended = [each.ended for each in facts.executions.values() if each.ended]
    evaluate = facts.executions.get("evaluate")
    text = f"Written on {facts.made:%Y-%m-%d %H:%M %Z}"
    if evaluate and evaluate.ended:
        text += f"; the models were evaluated on {evaluate.ended:%Y-%m-%d %H:%M}"
    elif ended:
        text += f"; the last stage ended on {max(ended):%Y-%m-%d %H:%M}"
    if not facts.commit:
        return f"{text}. Not in a git repository."
    state = "with uncommitted changes" if facts.dirty else "without uncommitted changes"
    return f"{text}. Commit {facts.commit}, {state}."


def verdicts(facts: Facts) -> list[Verdict]:
    """Of every model that was evaluated or compared: its score, and what became of it."""
    names = [*MODELS, *(name for name in facts.decisions if name not in MODELS)]
    return [_verdict(facts, name, facts.decisions.get(name)) for name in names]


def _verdict(facts: Facts, name: str, decision: Decision | None) -> Verdict:
    scores = facts.evaluation.get(MODELS.get(name, ""), Scores({}))
    score, of = (
        (percent(scores.get("accuracy")), "accuracy")
        if name == "classifier"
        else (decimal(scores.get("loss")), "loss, nats a token")
    )
    known = facts.versions.get(name)
    if decision is not None and known is not None and decision.version != known:
        decision = None  # of an earlier version
    version = decision.version if decision else known
    title = name.capitalize() + (f", version {version}" if version is not None else "")
    if decision is None:
        return Verdict(title, "open", "not compared yet", score or NOTHING, of, ())
    if score is None and decision.new is not None:
        score, of = _in_words(decision.score, decision.new), decision.score
    why = [sentence(decision.why)]
    if decision.old is not None and decision.new is not None:
        old, new = (_in_words(decision.score, value) for value in (decision.old, decision.new))
        on = f" on {decision.examples:,} {_COUNTED.get(name, 'examples')}"
        why.append(
            f"Champion{'' if decision.champion is None else f' (version {decision.champion})'}: "
            f"{decision.score} {old}, this version: {new}, difference {_difference(decision)}"
            f"{on if decision.examples is not None else ''}."
        )
    state, verdict = ("promoted", "promoted") if decision.promoted else ("kept", "not promoted")
    return Verdict(title, state, verdict, score or NOTHING, of, why)


# --- scores ---------------------------------------------------------------------------------------


def _scores(facts: Facts, pictures: Pictures) -> list[Block]:
    parts: list[Block] = [
        Heading("Base models, on the validation text"),
        Paragraph(
            "Loss in nats a token; untrained: that of the same architecture with random weights."
        ),
        bases(facts),
        *_by_source(facts),
        Heading("What fine-tuning buys"),
        Paragraph(
            f"All on the classifier's own test part{_rows(facts)}. Zero-shot and few-shot: the "
            "base takes the class whose name it finds most likely after the message, without and "
            "with labelled examples before it (in brackets: how many had room, in the mean)."
        ),
        what_fine_tuning_buys(facts),
        *pictures.accuracies,
        Heading("The classifier, class by class"),
        Paragraph(classifier_in_short(facts)),
        classes(facts),
        *pictures.confusion,
        Heading("The assistant, before and after fine-tuning"),
        Paragraph(assistant_in_short(facts)),
        before_and_after(facts),
    ]
    if facts.judgement:
        parts += [Heading("What a judge says"), *_judged(facts)]
    return parts


def _rows(facts: Facts) -> str:
    rows = _count(_model(facts, "classifier").get("rows"))
    return "" if rows is None else f", {rows:,} messages"


def _model(facts: Facts, name: str) -> Scores:
    return facts.evaluation.get(name, Scores({}))


def bases(facts: Facts) -> Grid:
    """The base models on the validation text."""
    return Grid(
        ["model", "loss", "perplexity", "bits per byte", "untrained"],
        [
            [
                name,
                decimal(_model(facts, name).get("loss")),
                decimal(_model(facts, name).get("perplexity"), 1),
                decimal(_model(facts, name).get("bits_per_byte")),
                decimal(_model(facts, name).get("untrained_loss")),
            ]
            for name in BASES
        ],
        "lrrrr",
    )


def _by_source(facts: Facts) -> list[Block]:
    names = list(
        dict.fromkeys(
            source
            for name in BASES
            for score in ("loss", "bits_per_byte")
            for source in _model(facts, name).parts(score)
        )
    )
    if not names:
        return []
    columns = ["source of the text"]
    columns += [f"{name}: {what}" for name in BASES for what in ("loss", "bits per byte")]
    rows: list[list[Cell]] = [
        [
            name_of(source),
            *(
                decimal(_model(facts, name).get(f"{score}/{source}"))
                for name in BASES
                for score in ("loss", "bits_per_byte")
            ),
        ]
        for source in names
    ]
    return [Grid(columns, rows, "lrrrr")]


def accuracies(facts: Facts) -> dict[str, tuple[Score, Score | None]]:
    """Accuracy and macro F1 on the classifier's test part, by who classified and how."""
    found = {}
    for name in BASES:
        scores = _model(facts, name)
        shots = decimal(scores.get("few_shot_examples"), 1)
        few = "few-shot" if shots is None else f"few-shot ({shots} examples)"
        for method, words in (("zero_shot", "zero-shot"), ("few_shot", few)):
            if accuracy := scores.get(f"{method}_accuracy"):
                found[f"{name}, {words}"] = (accuracy, scores.get(f"{method}_f1_macro"))
    fine_tuned = _model(facts, "classifier")
    if accuracy := fine_tuned.get("accuracy"):
        base = base_of(facts, "finetune_classifier")
        name = f"{base}, fine-tuned" if base else "fine-tuned"
        found[name] = (accuracy, fine_tuned.get("f1_macro"))
    return found


def what_fine_tuning_buys(facts: Facts) -> Grid:
    """Without training, with examples, and fine-tuned, on one test part."""
    rows: list[list[Cell]] = [
        [
            "always the most frequent class",
            percent(_model(facts, "classifier").get("majority_accuracy")),
            None,
        ]
    ]
    rows += [
        [name, percent(accuracy), percent(f1)] for name, (accuracy, f1) in accuracies(facts).items()
    ]
    return Grid(["model", "accuracy", "F1 (macro)"], rows, "lrr")


def classifier_in_short(facts: Facts) -> str:
    """The classifier's figures over all classes."""
    scores = _model(facts, "classifier")
    figures = {
        "accuracy": percent(scores.get("accuracy")),
        "macro F1": percent(scores.get("f1_macro")),
        "area under the ROC curve": decimal(scores.get("roc_auc")),
        "calibration error": percent(scores.get("calibration_error")),
    }
    said = [f"{name} {figure}" for name, figure in figures.items() if figure]
    text = f"On messages it never saw{_rows(facts)}: {', '.join(said)}."
    if missing := _count(scores.get("missing_classes")):
        text += (
            f" None of them is of {missing:,} of the {len(scores.labels):,} classes: of those the "
            "figures say nothing."
        )
    return text


def classes(facts: Facts, most: int = 30) -> Grid:
    """Precision, recall and F1 of every class, or of the first `most` of them."""
    scores = _model(facts, "classifier")
    rows: list[list[Cell]] = [
        [
            name_of(label),
            *(
                percent(scores.get(f"{score}_{class_key(label)}"))
                for score in ("precision", "recall", "f1")
            ),
        ]
        for label in scores.labels[:most]
    ]
    if more := len(scores.labels[most:]):
        rows.append([f"{more:,} more", None, None, None])
    return Grid(["class", "precision", "recall", "F1"], rows, "lrrr")


def assistant_in_short(facts: Facts) -> str:
    """On what the assistant was measured."""
    scores = _model(facts, "assistant")
    records, short = _count(scores.get("records")), _count(scores.get("short_records"))
    text = "On instructions it never saw"
    if records is not None:
        text += f", {records:,} records"
    if short is not None:
        text += f"; exact match over the {short:,} whose reference is short"
    return f"{text}."


_MEASURES = (
    ("loss (nats a token)", "loss", decimal),
    ("perplexity", "perplexity", lambda score: decimal(score, 1)),
    ("exact match", "exact_match", percent),
    ("ROUGE-L", "rouge_l", percent),
    ("chrF", "chrf", percent),
    ("words an answer", "length_mean", lambda score: decimal(score, 1)),
    ("length beside the reference's", "length_ratio", percent),
    ("empty answers", "empty", percent),
    ("answers cut at the token limit", "at_limit", percent),
)


def before_and_after(facts: Facts) -> Grid:
    """The assistant beside its base."""
    scores = _model(facts, "assistant")
    rows: list[list[Cell]] = [
        [words, in_words(scores.get(f"base_{name}")), in_words(scores.get(name))]
        for words, name, in_words in _MEASURES
        if scores.get(name) or scores.get(f"base_{name}")
    ]
    return Grid(["", "before fine-tuning", "after"], rows, "lrr")


def _judged(facts: Facts) -> list[Block]:
    judgement = facts.judgement
    if judgement is None:
        return []
    whose = {"base": "before fine-tuning", "assistant": "after"}
    order = [name for name in whose if name in judgement.summaries]
    order += [name for name in judgement.summaries if name not in whose]

    def row(name: str, judged: Judged) -> list[Cell]:
        mean = None
        if judged.mean is not None:
            mean = decimal(Score(judged.mean), 1)
        counts = (judged.judged, judged.unparsable, judged.failed)
        return [whose.get(name, name), mean, *counts, judged.n]

    return [
        Paragraph(
            f"The model {judgement.judge.model} gave each answer 0 to 100; the mean is over the "
            f"answers that it gave a mark. Its prompt has the sha256 {judgement.judge.prompt}."
        ),
        Grid(
            ["answers", "mean", "judged", "not understood", "failed", "of records"],
            [row(name, judgement.summaries[name]) for name in order],
            "lrrrrr",
        ),
    ]


# --- answers and messages -------------------------------------------------------------------------


def _samples(facts: Facts) -> list[Block]:
    return [
        Paragraph(
            f"{min(_SHOWN_ANSWERS, len(facts.answers))} of {len(facts.answers)} test records, at "
            "equal distances: none was picked."
        ),
        *(
            Texts(
                answer.task,
                [
                    (who, text)
                    for who, text in (
                        ("reference", answer.reference),
                        ("before fine-tuning", answer.base),
                        (_champion(facts), answer.champion),
                        ("this version", answer.assistant),
                    )
                    if text is not None
                ],
            )
            for answer in spread(facts.answers, _SHOWN_ANSWERS)
        ),
    ]


def _champion(facts: Facts) -> str:
    decision = facts.decisions.get("assistant")
    if decision is None or decision.champion is None:
        return "previous champion"
    return f"previous champion, version {decision.champion}"


def spread(answers: Sequence[Answer], n: int) -> list[Answer]:
    """At most `n` of the answers, at equal distances from the first on."""
    n = min(n, len(answers))
    return [answers[len(answers) * i // n] for i in range(n)]


def _most_wrong(facts: Facts) -> list[Block]:
    if not facts.wrong:
        return [Paragraph("It was wrong about no test message.")]
    rows: list[list[Cell]] = [
        [each.text, name_of(each.actual), name_of(each.predicted), percent(Score(each.probability))]
        for each in facts.wrong
    ]
    return [
        Paragraph(
            "Test messages that it took for another class, the most certain mistakes first: those "
            "are hard, or labelled wrong."
        ),
        Grid(["message", "labelled", "taken for", "probability of its label"], rows, "lllr"),
    ]


def _training(pictures: Pictures) -> list[Block]:
    if not pictures.curves:
        return [Paragraph("No training left a history.")]
    return [Gallery(pictures.curves)]


# --- origin and cost ------------------------------------------------------------------------------


def _origin(facts: Facts) -> list[Block]:
    return [
        Heading("Data"),
        *_data(facts),
        Heading("Inputs and outputs of every stage"),
        *_files(facts),
        Heading("What differs from the run before"),
        *_changes(facts),
    ]


def origin(source: RawSource) -> str:
    """Where a source is published: the first of its addresses."""
    return without_credentials(source.urls[0]) if source.urls else "local or built in"


def checksum(source: RawSource) -> str:
    """The sha256 of a source's file."""
    n = len(source.files)
    return source.files[0].sha256 if n == 1 else f"of {n:,} files"


def _data(facts: Facts) -> list[Block]:
    rows: list[list[Cell]] = [
        [
            name,
            name_of(source.name),
            source.records or None,
            source.bytes,
            checksum(source),
            origin(source),
        ]
        for name, sources in facts.sources.items()
        for source in sources
    ]
    if not rows:
        return [Paragraph("There is no raw data here.")]
    several = any(len(each.files) > 1 for sources in facts.sources.values() for each in sources)
    more = " Of a source of several files each one's sha256 and address is in there."
    return [
        Paragraph(f"As data/raw/*/sources.json has it.{more if several else ''}"),
        Grid(["for", "source", "records", "bytes", "sha256", "from"], rows, "llrrcl"),
    ]


def _files(facts: Facts) -> list[Block]:
    rows: list[list[Cell]] = []
    for name, stage in facts.recorded.items():
        rows += [[name, "reads", path, md5] for path, md5 in stage.inputs.items()]
        rows += [[name, "writes", path, md5] for path, md5 in stage.outputs.items()]
    if not rows:
        return [Paragraph("There is no dvc.lock.")]
    return [
        Paragraph(
            "As dvc.lock has it: the md5 of a file, or of a folder's listing (.dir). The code that "
            "each stage depends on is recorded there too."
        ),
        Grid(["stage", "", "path", "md5"], rows, "lllc"),
    ]


def _changes(facts: Facts) -> list[Block]:
    known = {name: each for name, each in facts.executions.items() if each.ended}
    if not known:
        return [Paragraph(f"{NOTHING} {facts.tracking or 'No run is recorded'}.")]
    rows: list[list[Cell]] = [
        [
            f"{name} (since {each.before})",
            d.what,
            _shorter(d.what, d.before),
            _shorter(d.what, d.now),
        ]
        for name, each in known.items()
        for d in each.differences
    ]
    first = [name for name, each in known.items() if each.before is None]
    same = [name for name, each in known.items() if each.before and not each.differences]
    blocks: list[Block] = []
    if rows:
        blocks.append(Grid(["stage", "what", "before", "now"], rows, "llll"))
    if same:
        blocks.append(Paragraph(f"Nothing differs: {', '.join(same)}."))
    if first:
        blocks.append(Paragraph(f"Ran for the first time: {', '.join(first)}."))
    return blocks


def _shorter(what: str, value: str | None) -> str | None:
    """A checksum by its first digits: two of them are to be told apart, not compared."""
    checksum = what.startswith("input.") or what == "git.commit"
    if value is None:
        return None
    return value[:12] if checksum else without_credentials(value)


def _cost(facts: Facts) -> list[Block]:
    note = [Paragraph(f"{facts.tracking}.")] if facts.tracking else []
    return [costs(facts), *note]


def costs(facts: Facts) -> Grid:
    """How long each stage took when it last ran to its end, and what it needed."""

    def row(name: str) -> list[Cell]:
        each = facts.executions[name]
        code = each.commit[:7] + (" with changes" if each.dirty else "") if each.commit else None
        return [
            name,
            None if each.ended is None else f"{each.ended:%Y-%m-%d %H:%M}",
            None if each.seconds is None else seconds_in_words(each.seconds),
            None if each.peak_memory is None else f"{each.peak_memory:,.0f} MB",
            each.tokens,
            code,
        ]

    rows = [row(name) for name in STAGES if name in facts.executions]
    known = [each for each in facts.executions.values() if each.seconds is not None]
    if len(known) > 1:
        seconds = sum(each.seconds or 0.0 for each in known)
        rows.append(["all", None, seconds_in_words(seconds), None, None, None])
    return Grid(["stage", "ended", "took", "peak memory", "tokens", "code"], rows, "lrrrrc")
