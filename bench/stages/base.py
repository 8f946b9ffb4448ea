"""What fine-tuning starts from: one model directory and one raw folder for all alternatives."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from bench.harness import Settings, Skipped
from gpt.base.files import sha256_of
from gpt.model.config import GPT2_SIZES
from gpt.model.model import GPT
from gpt.model.weights import load_base, save_model
from gpt.text.records import Format, Kind, RawFile, write_sources
from gpt.tokens.tokenizer import load_tokenizer

SAMPLES = Path(__file__).parents[2] / "samples"


def write_base(settings: Settings, out: Path) -> str:
    """Write the model directory `out`; return what a table calls it.

    Raises:
        Skipped: there is neither a model nor GPT-2's vocabulary.
    """
    folder = settings.weights or (SAMPLES / "gpt2-nano" if settings.quick else None)
    if folder is not None:
        (model, tokenizer), name = load_base(folder), folder.name
    elif settings.vocabulary is not None:
        tokenizer, name = load_tokenizer(settings.vocabulary), "124M, random weights"
        torch.manual_seed(0)
        model = GPT(replace(GPT2_SIZES["124M"], vocab_size=tokenizer.vocab_size))
    else:
        raise Skipped(
            "needs GPT-2's vocabulary: set GPT_PIPELINE_MIRROR to a folder that holds gpt2/, "
            "or name one with --vocabulary"
        )
    # two loops draw their dropout differently, and would no longer learn the same
    model.config = replace(model.config, dropout=0.0)
    save_model(model, out, tokenizer=tokenizer)
    return name


def real_file(settings: Settings, name: str, sample: str) -> Path:
    """The file `name` of the mirror, or the `sample` of a quick run.

    Raises:
        Skipped: there is no mirror, or it lacks the file.
    """
    if settings.quick:
        return SAMPLES / sample
    if settings.mirror is None or not (settings.mirror / name).is_file():
        raise Skipped(f"needs real data: set GPT_PIPELINE_MIRROR to a folder that holds {name}")
    return settings.mirror / name


def write_raw_file(file: Path, kind: Kind, form: Format, folder: Path) -> None:
    """A raw folder of one file, as the stage `download` leaves it."""
    folder.mkdir(parents=True)
    copy = folder / file.name
    shutil.copyfile(file, copy)
    raw = RawFile(
        name=file.stem,
        file=file.name,
        kind=kind,
        format=form,
        bytes=copy.stat().st_size,
        sha256=sha256_of(copy),
    )
    write_sources(folder, [raw])
