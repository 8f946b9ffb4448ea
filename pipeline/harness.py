"""EleutherAI's lm-evaluation-harness on a model directory: scores that others can compare with.

The harness is the optional extra `lm-eval`, and is imported only when something is measured with
it. Nothing is fetched unless that is asked for: in a closed network tasks are local YAML files, or
those whose data is in the cache of Hugging Face's `datasets`.

Gao et al. (2024), "The Language Model Evaluation Harness", https://zenodo.org/records/12608602.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt.device import pick_device
from gpt.errors import InputError
from gpt.events import Log, Message, discard
from gpt.files import sha256_of, whole_file, write_json
from gpt.prompts import read_template
from gpt.weights import load_base
from pipeline.markdown import Cell, table

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

RESULTS, TABLE, SAMPLES = "results.json", "results.md", "samples.jsonl"

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
# the same, where a library has read its environment already
_READ = {
    "huggingface_hub.constants": ("HF_HUB_OFFLINE",),
    "datasets.config": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
    "evaluate.config": ("HF_EVALUATE_OFFLINE",),
}
_YAML = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class HarnessParams:
    """What is measured.

    Raises:
        pydantic.ValidationError (a ValueError): no task, or an impossible number.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the harness (tasks, groups, tags; `*` stands for anything), YAML files of tasks,
    or folders of them."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Documents of each task, the first so many; None is all."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Solved examples before each question; None is the task's own number."""
    chat: bool = False
    """Whether questions are put in the words of the model's own template."""
    online: bool = False
    """Whether data may be fetched from Hugging Face."""


def measure(
    params: HarnessParams, *, model: Path, out: Path, log: Log = discard
) -> dict[str, Any]:
    """Measure a language model with the harness.

    Args:
        params: what is measured.
        model: a model directory.
        out: a folder, for `results.json`, `results.md` and `samples.jsonl`, each written whole; the
            last has a line for each question of each task, as `pandas.read_json(lines=True)` reads.
        log: hears how far it is.

    Returns:
        What `results.json` holds.

    Raises:
        InputError: the harness is not installed, `model` holds no language model (or, for `chat`,
            no template), a task is not known, or its data is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-eval is not installed: pip install '.[lm-eval]'")
    template = read_template(model) if params.chat else None
    network, tokenizer = load_base(model)
    with _network(params.online):
        import lm_eval

        from pipeline.harness_model import HarnessModel

        names, manager = _find_tasks(params.tasks)
        asked = HarnessModel(network.to(pick_device()), tokenizer, template=template, log=log)
        try:
            found = lm_eval.simple_evaluate(
                model=asked,
                tasks=names,
                task_manager=manager,
                limit=params.limit,
                num_fewshot=params.shots,
                apply_chat_template=params.chat,
                fewshot_as_multiturn=params.chat,
            )
        except OSError as error:  # a missing file, or no way to the network
            raise InputError(_no_data(params, error)) from None
    results = {
        "model": str(model),
        "model_sha256": sha256_of(model / "model.safetensors"),
        "harness": importlib.metadata.version("lm_eval"),
        "limit": params.limit,
        "shots": params.shots,
        "chat": params.chat,
        "shortened": asked.shortened,
        "scores": list(_scores(found)),
    }
    if asked.shortened:
        log(
            Message(
                f"{asked.shortened} requests were longer than the context of {asked.max_length} "
                "tokens and lost their beginning",
                "warning",
            )
        )
    _write_samples(out / SAMPLES, found["samples"])
    with whole_file(out / TABLE) as partial:
        partial.write_text(markdown(results), encoding="utf-8")
    write_json(out / RESULTS, results)
    return results


@contextlib.contextmanager
def _network(online: bool) -> Iterator[None]:
    """Keep Hugging Face's libraries from the network, unless they are to use it."""
    if online:
        yield
        return
    before = {name: os.environ.get(name) for name in _OFFLINE}
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    read = [
        (sys.modules[module], name, getattr(sys.modules[module], name))
        for module, names in _READ.items()
        for name in names
        if hasattr(sys.modules.get(module), name)
    ]
    for module, name, _ in read:
        setattr(module, name, True)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        for module, name, value in read:
            setattr(module, name, value)


def _find_tasks(asked: Sequence[str]) -> tuple[list[str], TaskManager]:
    """The names under which the harness knows what is asked for, and where it looks them up.

    Its own tasks are some ten thousand files; they are only read where one of them is named.
    """
    from lm_eval.tasks import TaskManager

    paths = {each: Path(each) for each in asked if _is_path(each)}
    for each, path in paths.items():
        if not path.exists():
            raise InputError(f"{each}: no such file; give a task's name, or its YAML file or folder")
    folders = {path if path.is_dir() else path.parent for path in paths.values()}
    manager = TaskManager(
        include_path=[str(folder.resolve()) for folder in sorted(folders)],
        include_defaults=len(paths) < len(asked),
    )
    names: list[str] = []
    for each in asked:
        found = _in_path(paths[each], manager) if each in paths else manager.match_tasks([each])
        if not found and each in paths:
            raise InputError(
                f"{each}: holds no task that the harness can read; a task file has `task: NAME`, "
                "see docs/lm-eval.md"
            )
        if not found:
            near = difflib.get_close_matches(each, manager.all_tasks, n=4)
            hint = f"there are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
            raise InputError(f"{each}: no such task; {hint}")
        names += [name for name in found if name not in names]
    return names, manager


def _is_path(task: str) -> bool:
    return task.endswith(_YAML) or "/" in task or os.sep in task or Path(task).is_dir()


def _no_data(params: HarnessParams, error: OSError) -> str:
    first = str(error).strip().partition("\n")[0]
    where = ", ".join(params.tasks)
    if params.online:
        remedy = "look at the network and at the task's dataset_path"
    else:
        remedy = "add --online where there is a network, or name a local file in a task file"
    return f"{where}: the data cannot be read ({first}); {remedy}"


def _scores(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every score of every task and group, one after the other."""
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filter = key.partition(",")
            if not filter or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filter}")
            yield {
                "task": task,
                "version": found["versions"].get(task),
                "shots": found["n-shot"].get(task),
                "samples": found["n-samples"].get(task, {}).get("effective"),
                "metric": metric,
                "filter": filter,
                "value": value,
                "stderr": stderr if isinstance(stderr, float) else None,  # "N/A" is none
            }


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a page."""
    columns = ["task", "version", "shots", "samples", "metric", "filter", "value", "stderr"]
    rows = [[_cell(score[column]) for column in columns] for score in results["scores"]]
    lines = [
        f"`{results['model']}` (sha256 `{results['model_sha256'][:12]}…`), "
        f"lm-evaluation-harness {results['harness']}"
        + (", in the model's own template" if results["chat"] else "")
        + (f", the first {results['limit']:,} documents of a task" if results["limit"] else "")
        + ".",
        "",
        table(columns, rows, "lrrrllrr"),
    ]
    if results["shortened"]:
        lines += ["", f"{results['shortened']:,} requests lost their beginning: the context is short."]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> Cell:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1 else f"{value:.4f}"
    return value if isinstance(value, int | str | None) else str(value)


def _write_samples(path: Path, samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """A line for each question of each task and filter: what was asked, answered and right."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for task, records in samples.items():
            for record in records:
                row = {
                    "task": task,
                    "doc_id": record["doc_id"],
                    "filter": record["filter"],
                    "target": record["target"],
                    "requests": record["arguments"],
                    "responses": record["resps"],
                    "filtered": record["filtered_resps"],
                    **{name: record[name] for name in record["metrics"]},
                }
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
