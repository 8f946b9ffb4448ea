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
from gpt.model.config import GPTConfig
from gpt.model.model import GPT
from gpt.model.weights import load_base
from gpt.scores.bootstrap import mean_loss
from gpt.scores.likelihood import Example, NoRoomError, classify_by_likelihood, draw_examples
from gpt.tokens.token_files import open_tokens, read_manifest
from gpt.tokens.tokenizer import Tokenizer, load_tokenizer
from stages.evaluate.classifier import messages_by_part
from stages.evaluate.intervals import Bounds, class_figures, figures_of
from stages.training_file import read_training


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
    config, windows, sources, table = _read_losses(directory, tokens, device, batch_size)
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
    untrained = GPT(config).to(device).eval()
    # near the logarithm of the vocabulary's size on any text: one batch tells
    figures["untrained_loss"] = mean_loss_of(untrained, islice(batches(windows, batch_size), 1))
    return figures, table


def window_losses(
    directory: Path, tokens: Path, device: torch.device, batch_size: int
) -> pd.DataFrame:
    """The table of `measure_base` alone, of any base."""
    return _read_losses(directory, tokens, device, batch_size)[-1]


def _read_losses(
    directory: Path, tokens: Path, device: torch.device, batch_size: int
) -> tuple[GPTConfig, WindowDataset, dict[str, np.ndarray], pd.DataFrame]:
    """A base's architecture, the windows that it read, the ids by source, and its losses."""
    model, tokenizer = load_base(directory)
    context = model.config.context_length
    names = list(read_manifest(tokens).splits["validation"].sources)
    sources = {name: open_tokens(tokens, "validation", name)[:] for name in names}
    written_by = load_tokenizer(tokens)
    if written_by.hash != tokenizer.hash:
        for name in names:
            sources[name] = _in_other_tokens(sources[name], written_by, tokenizer)
    ids = np.concatenate([np.empty(0, np.int64), *sources.values()])
    windows = WindowDataset(ids, context, context)
    if len(windows) == 0:
        raise InputError(
            f"{tokens}: the validation split has {len(ids)} tokens, fewer than one context of "
            f"{directory} and its target ({context} + 1); add text or raise tokenize.validation"
        )
    losses = np.stack(target_losses(model.to(device), batches(windows, batch_size)))
    check_finite(losses, directory)
    source = np.repeat(np.arange(len(names)), [len(each) for each in sources.values()])
    frame = pd.DataFrame(
        {
            "window": np.repeat(np.arange(len(windows)), context),
            "source": source[1 : losses.size + 1],  # the target of the first place is the second id
            "loss": losses.ravel().astype(np.float64),
        }
    )
    table = frame.groupby(["window", "source"])["loss"].agg(["size", "sum"]).reset_index()
    table.columns = pd.Index(["window", "source", "tokens", "loss"])
    table["source"] = [names[i] for i in table["source"]]
    return model.config, windows, sources, table


def _in_other_tokens(ids: np.ndarray, old: Tokenizer, new: Tokenizer) -> np.ndarray:
    """The same documents, with the end of text between them, in another vocabulary."""
    result: list[int] = []
    for document in np.split(ids, np.flatnonzero(ids == old.eot)):
        if len(document) and document[0] == old.eot:
            result.append(new.eot)
            document = document[1:]
        result += new.encode(old.decode(document.tolist()))
    return np.array(result, np.int64)


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
                longest = in_short([max(labels, key=len)])
                log(
                    Message(
                        f"evaluate: {name} is not asked for classes without training: the label "
                        f"{longest} leaves no room for a text in its context of "
                        f"{model.config.context_length} tokens; shorter labels would",
                        "warning",
                    )
                )
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
