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
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt.base.errors import InputError, RunError, in_one_line, lacks_memory, shortened
from gpt.base.events import Log, Message, discard
from gpt.base.files import read_json, sha256_of, whole_file, write_json
from gpt.model.config import NotNegative, Positive
from gpt.model.weights import load_base
from gpt.prompts import read_template
from pipeline.show.markdown import escaped, table

RESULTS, TABLE, SAMPLES = "results.json", "results.md", "samples.jsonl"

# Resamples for the standard error of scores that have no formula for it (perplexity, F1, BLEU): it
# is known to 2 % then. The harness's own 100,000 can take longer than the model does.
_BOOTSTRAP = 1000


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class HarnessParams:
    """What is measured.

    Raises:
        pydantic.ValidationError (a ValueError): no task, or an impossible number.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the harness (tasks, groups, tags; `*` stands for anything), YAML files of tasks,
    or folders of them."""
    limit: Positive | None = None
    """Documents of each task, the first so many; None is all."""
    shots: NotNegative | None = None
    """Solved examples before each question; None is the task's own number."""
    chat: bool = False
    """Whether questions are put in the words of the model's own template."""
    online: bool = False
    """Whether data may be fetched from Hugging Face."""


def measure(params: HarnessParams, *, model: Path, out: Path, log: Log = discard) -> dict[str, Any]:
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
            no template), a task is not known, its data is not there, or `out` holds files of these
            names that were not written here.
    """
    if not all(map(importlib.util.find_spec, ("lm_eval", "accelerate"))):
        raise InputError("lm-eval is not installed: pip install '.[lm-eval]'")
    _refuse_other_files(out)
    template = read_template(model) if params.chat else None
    load_base(model)  # its errors are clearer than those of `transformers`
    _set_network(params.online)
    import lm_eval

    from pipeline.verdict.lm_eval_model import HarnessModel

    manager, names = _find_tasks(params)
    asked = HarnessModel(model, template)
    with _one_line(", ".join(params.tasks), params.online):
        found = lm_eval.simple_evaluate(
            model=asked,
            tasks=names,
            num_fewshot=params.shots,
            limit=params.limit,
            bootstrap_iters=_BOOTSTRAP,
            apply_chat_template=params.chat,
            fewshot_as_multiturn=params.chat,
            task_manager=manager,
        )
    if asked.shortened:
        text = (
            f"{asked.shortened:,} requests were longer than the context of {asked.max_length:,} "
            "tokens and lost their beginning"
        )
        log(Message(text, "warning"))
    results = {
        "model": str(model),
        "model_sha256": sha256_of(model / "model.safetensors"),
        "harness": importlib.metadata.version("lm_eval"),
        "limit": params.limit,
        "chat": params.chat,
        "shortened": asked.shortened,
        "scores": list(_scores(found)),
    }
    _write_samples(out / SAMPLES, found["samples"])
    with whole_file(out / TABLE) as partial:
        partial.write_text(markdown(results), encoding="utf-8")
    write_json(out / RESULTS, results)
    return results


def _refuse_other_files(out: Path) -> None:
    there = [name for name in (RESULTS, TABLE, SAMPLES) if (out / name).exists()]
    if not there:
        return
    with contextlib.suppress(InputError):
        if "harness" in read_json(out / RESULTS, missing="", remedy=""):
            return
    raise InputError(f"{out}: holds a {there[0]} that was not written here; choose another --out")


def _set_network(online: bool) -> None:
    """Keep Hugging Face's libraries from the network, unless they are to use it.

    They read their environment (`HF_HUB_OFFLINE`, `HF_DATASETS_OFFLINE`) once, when they are first
    imported, and that may have been before.
    """
    import datasets.config
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = not online
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = not online


@contextlib.contextmanager
def _one_line(tasks: str, online: bool) -> Iterator[None]:
    """What is wrong with a task or its data, in one line.

    A task is a file from outside, with templates and perhaps code in it: it can fail in any way.
    """
    try:
        yield
    except RunError:
        raise
    except InputError as error:
        raise InputError(f"{tasks}: {error}") from None
    except OSError as error:  # a missing file, or no way to the network
        remedy = (
            "look at the network and the task's dataset_path"
            if online
            else "add --online where there is a network, or let the task name a local file"
        )
        raise InputError(
            f"{tasks}: the data cannot be read ({shortened(in_one_line(error), 200)}); {remedy}"
        ) from error
    except Exception as error:
        if lacks_memory(error):
            raise
        raise InputError(
            f"{tasks}: not a task that the harness can run ({type(error).__name__}: "
            f"{shortened(in_one_line(error), 200)}); see docs/lm-eval.md"
        ) from error


def _is_path(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) or "/" in task or os.sep in task


def _find_tasks(params: HarnessParams) -> tuple[Any, list[str]]:
    """The harness's `TaskManager`, and the names or files under which it finds what is asked for.

    Its own tasks are some fourteen thousand files, which take half a minute to read: that is only
    done where one of them is named.
    """
    from lm_eval.tasks import TaskManager

    paths = {each: Path(each).resolve() for each in params.tasks if _is_path(each)}
    for each, path in paths.items():
        if not path.exists():
            raise InputError(f"{each}: no such file; give a task's name, its YAML file or a folder")
    manager = TaskManager(
        include_path=[path for path in paths.values() if path.is_dir()],
        include_defaults=len(paths) < len(params.tasks),
    )
    files = {name: manager.task_index[name].yaml_path for name in manager.all_subtasks}
    found: list[str] = []
    for each in params.tasks:
        if each not in paths:
            names = list(manager.match_tasks([each]))
        elif paths[each].is_file():
            names = [str(paths[each])]
        else:
            names = [name for name, file in files.items() if paths[each] in file.parents]
        if not names:
            near = difflib.get_close_matches(each, manager.all_tasks, n=4)
            hint = f"there are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them all"
            raise InputError(
                f"{each}: no such task; {hint}; a folder ends with a slash and holds YAML files "
                "with `task: NAME`, see docs/lm-eval.md"
            )
        found += names
    return manager, found


def _scores(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every score of every task and group, one after the other."""
    for task, values in {**found["results"], **found.get("groups", {})}.items():
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
                "value": float(value) if isinstance(value, Real) else str(value),
                "stderr": float(stderr) if isinstance(stderr, Real) else None,  # or "N/A"
            }


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a page."""
    columns = ["task", "version", "shots", "samples", "metric", "filter", "value", "stderr"]
    rows = [
        [f"{v:.4g}" if isinstance(v, float) else v for v in map(score.get, columns)]
        for score in results["scores"]
    ]
    lines = [
        f"{escaped(str(results['model']))} (sha256 `{results['model_sha256'][:12]}…`), "
        f"lm-evaluation-harness {results['harness']}"
        + (", in the model's own template" if results["chat"] else "")
        + (f", the first {results['limit']:,} documents of a task" if results["limit"] else "")
        + ".",
        "",
        table(columns, rows, "lrrrllrr"),
    ]
    if results["shortened"]:
        lines += [
            "",
            f"{results['shortened']:,} requests lost their beginning: the context is short.",
        ]
    return "\n".join(lines) + "\n"


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
                file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """What JSON has no form for: NumPy's numbers, and whatever a task's own code makes."""
    return value.item() if isinstance(value, np.generic) else str(value)
