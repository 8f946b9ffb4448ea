"""Bases: their loss on the validation text, and what they make of messages untrained."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from gpt.base.errors import InputError
from gpt.base.events import Log, Message, discard
from gpt.base.labels import in_short
from gpt.batches.data import WindowDataset, batches
from gpt.batches.metrics import bits_per_byte, check_finite, perplexity, target_losses
from gpt.batches.metrics import mean_loss as mean_loss_of
from gpt.model.model import GPT
from gpt.model.weights import load_base
from gpt.scores.bootstrap import mean_loss
from gpt.scores.likelihood import Example, NoRoomError, classify_by_likelihood, draw_examples
from gpt.tokens.token_files import open_tokens, read_manifest
from gpt.tokens.tokenizer import Tokenizer, load_tokenizer
from stages.evaluate.classifier import messages_by_part
from stages.evaluate.intervals import Bounds, class_figures, figures_of
from stages.evaluate.training import read_training


def measure_base(
    directory: Path, tokens: Path, device: torch.device, batch_size: int, seed: int, of: Bounds
) -> tuple[dict[str, float], pd.DataFrame]:
    """The loss of a base on the validation text, in all and by source.

    Args:
        directory: its model directory.
        tokens: the folder of token files, whose text is encoded anew for a base of another
            tokenizer.
        device: where.
        batch_size: windows at once.
        seed: of the untrained model that it is compared with.
        of: how intervals are drawn: over the windows.

    Returns:
        The figures: losses in nats a token, bits a byte of text. And a table, a row a window and
        source: how many `tokens` of the source were predicted in it, and their summed `loss`.

    Raises:
        InputError: the directory or the tokens cannot be used, or there is too little text.
    """
    model, tokenizer = load_base(directory)
    sources = _texts(tokens, tokenizer)
    windows = _windows(directory, model, tokens, sources)
    table = _losses(directory, model.to(device), windows, sources, batch_size)
    by_window = table.groupby("window")[["loss", "tokens"]].sum()
    loss = of(mean_loss(by_window["loss"], by_window["tokens"]))
    counts = read_manifest(tokens).splits["validation"]
    n_tokens = sum(map(len, sources.values()))
    figures = figures_of("loss", loss) | {"perplexity": perplexity(loss.value)}
    for name in ("", "_low", "_high"):
        value = bits_per_byte(figures[f"loss{name}"], n_tokens, counts.total.bytes)
        figures[f"bits_per_byte{name}"] = value
    for source, rows in table.groupby("source", sort=False):
        own = float(rows["loss"].sum() / rows["tokens"].sum())
        n_bytes = counts.sources[str(source)].bytes
        figures[f"loss/{source}"] = own
        figures[f"bits_per_byte/{source}"] = bits_per_byte(own, len(sources[str(source)]), n_bytes)
    torch.manual_seed(seed)
    untrained = GPT(model.config).to(device).eval()
    # near the logarithm of the vocabulary's size on any text: one batch tells
    figures["untrained_loss"] = mean_loss_of(untrained, islice(batches(windows, batch_size), 1))
    return figures, table


def window_losses(
    directory: Path, tokens: Path, device: torch.device, batch_size: int
) -> pd.DataFrame:
    """The table of `measure_base` alone, of any base."""
    model, tokenizer = load_base(directory)
    sources = _texts(tokens, tokenizer)
    windows = _windows(directory, model, tokens, sources)
    return _losses(directory, model.to(device), windows, sources, batch_size)


def _windows(
    directory: Path, model: GPT, tokens: Path, sources: dict[str, np.ndarray]
) -> WindowDataset:
    ids = np.concatenate(list(sources.values()))
    context = model.config.context_length
    windows = WindowDataset(ids, context, context)
    if len(windows) == 0:
        raise InputError(
            f"{tokens}: the validation split has {len(ids)} tokens, fewer than one context of "
            f"{directory} and its target ({context} + 1); add text or raise tokenize.validation"
        )
    return windows


def _losses(
    directory: Path,
    model: GPT,
    windows: WindowDataset,
    sources: dict[str, np.ndarray],
    batch_size: int,
) -> pd.DataFrame:
    losses = np.stack(target_losses(model, batches(windows, batch_size)))  # (windows, T)
    check_finite(losses, directory)
    return _by_source(losses, sources)


def _texts(tokens: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The ids of the validation text by source, in the order of the shards."""
    written_by = load_tokenizer(tokens)
    sources: dict[str, list[np.ndarray]] = {}
    for shard in read_manifest(tokens).splits["validation"].shards:
        sources.setdefault(shard.source, [])
    texts = {name: open_tokens(tokens, "validation", name)[:] for name in sources}
    if not texts:
        return {"": np.empty(0, np.int64)}
    if written_by.hash == tokenizer.hash:
        return texts
    return {name: _in_other_tokens(ids, written_by, tokenizer) for name, ids in texts.items()}


def _in_other_tokens(ids: np.ndarray, old: Tokenizer, new: Tokenizer) -> np.ndarray:
    """The same documents, with the end of text between them, in another vocabulary."""
    ends = np.flatnonzero(ids == old.eot).tolist()
    result: list[int] = []
    start = 0
    for end in [*ends, len(ids)]:
        result += new.encode(old.decode(ids[start:end].tolist()))
        if end < len(ids):
            result.append(new.eot)
        start = end + 1
    return np.array(result, np.int64)


def _by_source(losses: np.ndarray, sources: dict[str, np.ndarray]) -> pd.DataFrame:
    """The losses of the targets, (windows, T), summed by window and source."""
    n_windows, context = losses.shape
    names = list(sources)
    source = np.repeat(np.arange(len(names)), [len(ids) for ids in sources.values()])
    # the target of the first place is the second token
    frame = pd.DataFrame(
        {
            "window": np.repeat(np.arange(n_windows), context),
            "source": source[1 : n_windows * context + 1],
            "loss": losses.ravel().astype(np.float64),
        }
    )
    table = frame.groupby(["window", "source"])["loss"].agg(["size", "sum"]).reset_index()
    table.columns = pd.Index(["window", "source", "tokens", "loss"])
    table["source"] = [names[i] for i in table["source"]]
    return table


METHODS = ("zero-shot", "few-shot")


def measure_untrained_classification(
    bases: dict[str, Path],
    classifier: Path,
    messages: Path,
    device: torch.device,
    batch_size: int,
    shots: int,
    of: Bounds,
    log: Log = discard,
) -> tuple[dict[str, dict[str, float]], pd.DataFrame]:
    """Classes by likelihood alone, on the very messages that the classifier is tested on.

    Args:
        bases: the model directories by name.
        classifier: the fine-tuned model's directory: its labels and what was held out of it.
        messages: the raw folder.
        device: where.
        batch_size: texts at once.
        shots: how many training messages of each class stand before a text in the second try; of
            no class more than the smallest has.
        of: how intervals are drawn.
        log: told of a base whose context a label fills: nothing is measured of that.

    Returns:
        Of each base the accuracy and macro F1 under `zero_shot_` and `few_shot_`, and under
        `few_shot_examples` how many had room before a message in the mean. And a table, a row a
        base, method and test message.

    Raises:
        InputError: a directory or the messages cannot be used, or do not belong together.
    """
    labels, parts = messages_by_part(classifier, messages)
    test = parts["test"]
    actual = [labels.index(label) for label in test["label"]]
    pool = [Example(*row) for row in parts["train"][["text", "label"]].itertuples(index=False)]
    counts = parts["train"].drop_duplicates(["text", "label"])["label"].value_counts()
    shots = min(shots, *(int(counts.get(label, 0)) for label in labels))
    examples = draw_examples(pool, labels, shots, read_training(classifier).split.seed)
    figures: dict[str, dict[str, float]] = {}
    tables = []
    for name, directory in bases.items():
        model, tokenizer = load_base(directory)
        model.to(device)
        figures[name] = {}
        for method, shown in zip(METHODS, ([], examples), strict=True):
            try:
                found = classify_by_likelihood(
                    model,
                    tokenizer,
                    test["text"].tolist(),
                    labels,
                    examples=shown,
                    calibrate=True,
                    batch_size=batch_size,
                )
            except NoRoomError:
                log(Message(_no_room(name, model, labels), "warning"))
                break
            check_finite(found.log_probs, directory)
            predicted = found.log_probs.argmax(1)
            scores = class_figures(actual, predicted.tolist(), len(labels), of)
            prefix = method.replace("-", "_")
            figures[name] |= {f"{prefix}_{key}": value for key, value in scores.items()}
            n_shown = len(shown) - found.dropped
            tables.append(_table(name, method, test["label"], labels, n_shown, found.log_probs))
        else:
            figures[name]["few_shot_examples"] = float(n_shown.mean())
    none = np.empty((0, len(labels)))
    return figures, pd.concat(
        tables or [_table("", "", test["label"][:0], labels, none[:, 0], none)], ignore_index=True
    )


def _no_room(name: str, model: GPT, labels: list[str]) -> str:
    return (
        f"evaluate: {name} is not asked for classes without training: the label "
        f"{in_short([max(labels, key=len)])} leaves no room for a text in its context of "
        f"{model.config.context_length} tokens; shorter labels would"
    )


def _table(
    model: str,
    method: str,
    actual: pd.Series,
    labels: list[str],
    n_shown: np.ndarray,
    log_probs: np.ndarray,
) -> pd.DataFrame:
    probabilities = np.exp(log_probs)
    columns = {
        "model": model,
        "method": method,
        "example": range(len(log_probs)),
        "shown": n_shown,
        "actual": actual,
        "predicted": [labels[i] for i in log_probs.argmax(1)],
    }
    return pd.DataFrame(
        columns
        | {f"probability_{each}": probabilities[:, i].round(6) for i, each in enumerate(labels)}
    )
