"""`params.yaml` into the stages' dataclasses; whatever is wrong in it is named by its path.

A stage's module is imported only when its section is validated, so that whoever asks for the names
of the sections alone does not wait for the code of the stages.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from gpt.base.errors import InputError, shown
from pipeline.project.stage_table import STAGES
from pipeline.project.yaml_files import read_yaml

if TYPE_CHECKING:
    from pipeline.project.settings import FlowParams, JudgeParams, PromotionParams, TrackingParams
    from stages.download.sources import DownloadParams, Source
    from stages.evaluate import EvaluateParams
    from stages.finetune_classifier import FinetuneClassifierParams
    from stages.finetune_instruct import FinetuneInstructParams
    from stages.load_gpt2 import LoadGPT2Params
    from stages.pretrain import PretrainParams
    from stages.tokenize import TokenizeParams
    from stages.tune_preferences import TunePreferencesParams

PARAMS_FILE = "params.yaml"

_PLACE = ("file", "folder", "glob", "urls", "member", "members")
"""The parameters of a source that say where it is."""

_MOST_PROBLEMS = 5
"""The maximum number of problems listed in one message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """The whole of `params.yaml`: one field a stage, and what is no stage's.

    Optional stages may have no section, and nor need what comes after them.
    """

    download: DownloadParams
    tokenize: TokenizeParams
    pretrain: PretrainParams
    load_gpt2: LoadGPT2Params
    finetune_classifier: FinetuneClassifierParams
    finetune_instruct: FinetuneInstructParams
    evaluate: EvaluateParams
    tune_preferences: TunePreferencesParams | None = None
    promotion: PromotionParams | None = None
    judge: JudgeParams | None = None
    tracking: TrackingParams | None = None
    flow: FlowParams | None = None


_OTHERS = ("flow", "promotion", "judge", "tracking")
"""The sections that are no stage's: `pipeline.project.settings` has their dataclasses."""

SECTIONS = tuple(field.name for field in fields(Params) if field.name not in _OTHERS)
"""The sections of `params.yaml` that are named after the stages."""

_SECTION_NAMES = (*SECTIONS, *_OTHERS)
_EXAMPLE_FILES = {"judge": "docs/judge.md"}
_REQUIRED = tuple(field.name for field in fields(Params) if field.default is MISSING)


def params_class(name: str) -> Any:
    """The dataclass of a section; imports the stage's module."""
    # Under `from __future__ import annotations` a field's type is its source text: one table.
    (annotation,) = (field.type for field in fields(Params) if field.name == name)
    module = importlib.import_module(
        "pipeline.project.settings" if name in _OTHERS else f"stages.{name}"
    )
    return getattr(module, str(annotation).split(" | ")[0])


def section(params: Params, name: str) -> Any:
    """The parameters of a stage, or of what comes after the stages.

    Raises:
        InputError: the section may be left out, and is.
    """
    own = getattr(params, name)
    if own is None:
        raise InputError(
            f"{PARAMS_FILE}: {name}: missing, and {name} needs it; add the section "
            f"({_EXAMPLE_FILES.get(name, 'presets/book.yaml')} has one)"
        )
    return own


def read_params(path: Path) -> dict[Any, Any]:
    """The sections as they stand in the file, unchecked.

    Raises:
        InputError: the file is missing, no YAML, or holds no sections.
    """
    remedy = "put a preset in place (gpt-pipeline preset NAME)"
    raw = read_yaml(path, path.name, missing=f"not there; {remedy}")
    if not isinstance(raw, dict):
        raise InputError(
            f"{path.name}: must hold the sections {', '.join(SECTIONS)}; write them, or {remedy}"
        )
    return raw


def load_params(path: Path) -> Params:
    """Read and check the file: see `check_params`.

    Raises:
        InputError: also where the file is missing or is not YAML.
    """
    return check_params(read_params(path), path.name)


def check_params(raw: Mapping[str, Any], file: str = PARAMS_FILE) -> Params:
    """Check every section.

    Args:
        raw: the sections, as YAML has them.
        file: what messages call the file.

    Raises:
        InputError: a parameter is unknown, missing, of a wrong type or impossible; the problems are
            named in one line, each with its full path.
    """
    problems = _wrong_names(raw)
    values: dict[str, Any] = {}
    for name in _SECTION_NAMES:
        values[name], found = _validate(name, raw[name]) if name in raw else (None, [])
        problems += found
    _refuse(file, problems)
    params = Params(**values)
    checks = (_contexts, _missing_model, _leaks, _mixture)  # checks across sections
    _refuse(file, [problem for check in checks for problem in check(params)])
    return params


def load_section(path: Path, name: str) -> Any:
    """One section, without a look at the others; None where it may be left out, and is.

    Raises:
        InputError: the file cannot be read, or something in the section is wrong.
    """
    raw = read_params(path)
    if name not in raw:
        return None
    value, problems = _validate(name, raw[name])
    _refuse(path.name, problems)
    return value


def check_sections(path: Path) -> None:
    """Check the file's form and its sections' names only, which is quick.

    Raises:
        InputError: the file is missing or is not YAML, or a section is unknown or missing.
    """
    _refuse(path.name, _wrong_names(read_params(path)))


def check_stages(names: Iterable[str]) -> None:
    """Whether there are stages of these names.

    Raises:
        InputError: there is none of a name.
    """
    for name in names:
        if name not in SECTIONS:
            raise InputError(f"{name}: no such stage; use one of {', '.join(SECTIONS)}")


def preset_files(root: Path) -> dict[str, Path]:
    """The presets of a project by name: files that may take the place of `params.yaml`."""
    return {path.stem: path for path in sorted((root / "presets").glob("*.yaml"))}


def preset_file(root: Path, name: str) -> Path:
    """The file of a preset.

    Raises:
        InputError: there is no such preset.
    """
    known = preset_files(root)
    if name not in known:
        raise InputError(f"{name}: no such preset; there are {', '.join(known) or 'none'}")
    return known[name]


def _refuse(file: str, problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        also = f"; and {more} more" if more > 0 else ""
        raise InputError(f"{file}: {'; '.join(problems[:_MOST_PROBLEMS])}{also}")


def _wrong_names(raw: Mapping[str, Any]) -> list[str]:
    """Problems with the names of the sections."""
    problems = [_unknown(str(key), _SECTION_NAMES) for key in raw if key not in _SECTION_NAMES]
    if missing := [name for name in _REQUIRED if name not in raw]:
        problems.append(f"{', '.join(missing)}: missing; each stage has a section")
    return problems


def _unknown(path: str, known: Sequence[str]) -> str:
    """`path` is no parameter; its last part is compared with those that there are."""
    near = difflib.get_close_matches(path.rpartition(".")[2], known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"{path}: unknown parameter; {hint}"


def _validate(name: str, raw: Any) -> tuple[Any, list[str]]:
    """The section's dataclass, and what is wrong with its values."""
    cls = params_class(name)
    try:
        # A section without a value (`evaluate:`) holds the defaults.
        value = TypeAdapter(cls).validate_python({} if raw is None else raw)
    except ValidationError as error:
        return None, [_problem(name, cls, raw, details) for details in error.errors()]
    return value, list(_misread(raw, value, name))


def _misread(raw: Any, value: Any, path: str) -> Iterator[str]:
    """What pydantic lets pass: true and false as 1 and 0, and numbers that are not finite."""
    if isinstance(raw, bool) and not isinstance(value, bool):
        yield f"{path}: should be a number (got {str(raw).lower()})"
    elif isinstance(raw, float) and not math.isfinite(raw):
        yield f"{path}: must be a finite number (got {raw})"
    elif isinstance(raw, dict):
        for key, below in raw.items():
            yield from _misread(below, getattr(value, str(key), below), f"{path}.{key}")
    elif isinstance(raw, list):
        for index, (below, item) in enumerate(zip(raw, value, strict=True)):
            yield from _misread(below, item, f"{path}[{index}]")


def _problem(name: str, cls: Any, raw: Any, details: Any) -> str:
    """One of pydantic's findings as a person would say it, with the parameter's full path."""
    path, at, parent = name, raw, cls
    location = details["loc"]
    for depth, part in enumerate(location):
        # Pydantic also names the branches of a union; those are no keys of the file.
        if isinstance(at, list) and isinstance(part, int):
            path, at = f"{path}[{part}]", at[part]
        elif isinstance(at, dict) and (part in at or depth == len(location) - 1):
            path, at = f"{path}.{part}", at.get(part)
            if depth < len(location) - 1:
                parent = _field_class(parent, str(part))
    kind, message = details["type"], details["msg"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [field.name for field in fields(parent)] if parent else []
        return _unknown(path, known) if known else f"{path}: unknown parameter; remove it"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: is missing; add it"
    if kind in ("dataclass_type", "dataclass_exact_type"):
        return f"{path}: must hold parameters, each with its name (got {shown(at)})"
    if kind == "value_error":  # a dataclass's own check, which says what would be right
        return f"{path}: {details['ctx']['error']}"
    message = message.removeprefix("Input ")
    return f"{path}: {message} (got {shown(at)})"


def _field_class(parent: Any, name: str) -> Any:
    """The dataclass of a nested field, looked up only to name what is known there."""
    if parent is None or not is_dataclass(parent):
        return None
    hint = get_type_hints(parent).get(name)
    candidates = [hint, *get_args(hint)]
    return next((each for each in candidates if is_dataclass(each)), None)


def _contexts(params: Params) -> Iterator[str]:
    """Texts longer than their base model's context."""
    for name, spec in STAGES.items():
        own = getattr(params, name)
        longest = getattr(own, "max_length", None)
        if longest is None:
            continue
        base = _context(params, spec.input_paths(own))
        if base and longest > base[1]:
            yield (
                f"{name}.max_length: at most the base's context of {base[1]} tokens "
                f"({base[0]}) is possible (got {longest})"
            )


def _context(params: Params, inputs: Mapping[str, str]) -> tuple[str, int] | None:
    """The parameter that says how long the context of a stage's base model is, and its length."""
    from gpt.model.config import GPT2_SIZES

    makers = {path: name for name, spec in STAGES.items() for path in spec.outputs.values()}
    maker = makers[next(path for path in inputs.values() if path.startswith("models/"))]
    if maker == "pretrain":
        return "pretrain.model.context_length", params.pretrain.model.context_length
    if maker == "load_gpt2":
        published = GPT2_SIZES.get(params.load_gpt2.size)
        return ("load_gpt2.size", published.context_length) if published else None
    return _context(params, STAGES[maker].input_paths(getattr(params, maker)))


def _missing_model(params: Params) -> Iterator[str]:
    """A stage that wants the published model where none is fetched."""
    if params.download.gpt2:
        return
    for path, choice in (
        ("tokenize.tokenizer", params.tokenize.tokenizer),
        ("finetune_classifier.base", params.finetune_classifier.base),
        ("finetune_instruct.base", params.finetune_instruct.base),
    ):
        if choice == "gpt2":
            yield f"{path}: gpt2 needs the published model's files; list them in download.gpt2"


def _leaks(params: Params) -> Iterator[str]:
    """Labelled data in the corpus that a fine-tuned model is later tested on."""
    labelled: dict[str, tuple[str, Any, Sequence[Source]]] = {
        "messages": ("finetune_classifier", params.finetune_classifier, params.download.messages),
        "instructions": (
            "finetune_instruct",
            params.finetune_instruct,
            params.download.instructions,
        ),
    }
    for index, source in enumerate(params.download.corpus):
        if source.kind not in labelled:
            continue
        name, stage, data = labelled[source.kind]
        same_file = any(_place(source) == _place(each) for each in data)
        balance = getattr(stage, "balance", "none")
        if same_file and (source.split != stage.split or source.balance != balance):
            yield (
                f"download.corpus[{index}]: holds rows that {name} is tested on; give it "
                f"part: train and the split and balance of {name}"
            )


def _place(source: Source) -> tuple[Any, ...]:
    return tuple(getattr(source, name) for name in _PLACE)


def _mixture(params: Params) -> Iterator[str]:
    """Weights of sources that the corpus does not have, or sources without a weight."""
    from stages.tokenize.splits import weights_problem

    if params.tokenize.mixture:
        names = [source.name for source in params.download.corpus]
        if problem := weights_problem(params.tokenize.mixture.weights, names):
            yield f"tokenize.mixture.weights: {problem}"
