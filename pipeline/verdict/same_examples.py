"""What the model at hand and the champion make of the same test examples.

The stage `evaluate` has written down what the model at hand made of them; the champion is asked
here. Import this module only to compare: it loads PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from gpt.model.device import prepare_device
from gpt.scores.bootstrap import Score, accuracy, macro_f1, mean, mean_loss
from gpt.scores.text_scores import score_texts
from gpt.tokens.tokenizer import load_tokenizer
from pipeline.project.settings import PromotionParams
from stages.evaluate import EvaluateParams
from stages.evaluate.assistant import answer_records, records_by_part
from stages.evaluate.bases import window_losses
from stages.evaluate.classifier import messages_by_part, predict_classes
from stages.training_file import read_training


class NotComparableError(Exception):
    """The two models cannot be compared, and why."""


@dataclass(frozen=True, slots=True)
class ScorePair:
    """The scores of both models on the same examples."""

    new: Score
    old: Score
    answers: pd.DataFrame | None = None
    """What the champion answered, if it writes texts: `example`, `asked`, `answer`."""


@dataclass(frozen=True, slots=True)
class SameExamples:
    """A model at hand and the champion of its name.

    Attributes:
        root: the project.
        predictions: the folder of what `evaluate` wrote down.
        here: the directory of the model at hand.
        champion: the directory of the champion.
        rule: by which score they are compared.
        params: how `evaluate` asked the model at hand.
    """

    root: Path
    predictions: Path
    here: Path
    champion: Path
    rule: PromotionParams
    params: EvaluateParams

    def scores(self, name: str) -> ScorePair:
        """The scores of a registered model: `base`, `classifier` or `assistant`.

        Raises:
            InputError: the champion cannot be asked.
            NotComparableError: the examples are not the same for both.
            OSError: what `evaluate` wrote cannot be read.
        """
        by_name = {"base": self.bases, "classifier": self.classifiers}
        return by_name.get(name, self.assistants)()

    def bases(self) -> ScorePair:
        """By the loss on the windows of the validation text."""
        different = (
            "its tokenizer or context is another than the champion's, so they read no equal "
            "windows; compare their bits a byte, and promote by hand"
        )
        self._check_tokenizer(different)
        new = self._predictions("pretrain").astype({"window": int, "tokens": int, "loss": float})
        device = prepare_device(self.params.device, self.params.threads)
        old = window_losses(
            self.champion, self.root / "data/tokens", device, self.params.batch_size
        )
        where = ["window", "source", "tokens"]
        if not new[where].equals(old[where]):
            raise NotComparableError(different)
        one, other = (each.groupby("window")[["loss", "tokens"]].sum() for each in (new, old))
        return ScorePair(
            mean_loss(one["loss"], one["tokens"]), mean_loss(other["loss"], other["tokens"])
        )

    def classifiers(self) -> ScorePair:
        """By accuracy or macro F1 on the test messages."""
        self._check_split()
        labels, parts = messages_by_part(self.here, self.root / "data/raw/messages")
        new = self._predictions("classifier")
        if new["actual"].nunique() < 2:
            raise NotComparableError(
                f"the test part has messages of one class alone, {new['actual'].iloc[0]!r}, so its "
                "scores say nothing; add messages, or promote by hand"
            )
        device = prepare_device(self.params.device, self.params.threads)
        old, _ = predict_classes(self.champion, parts["test"], device, self.params.batch_size)
        # a class that only the champion knows is always wrong, and has no part in the mean
        number = {label: i for i, label in enumerate(dict.fromkeys([*labels, *old["predicted"]]))}
        actual, one, other = (
            [number[label] for label in column]
            for column in (new["actual"], new["predicted"], old["predicted"])
        )
        if self.rule.classifier == "accuracy":
            return ScorePair(accuracy(actual, one), accuracy(actual, other))
        n = len(labels)
        return ScorePair(
            macro_f1(actual, one, n), macro_f1(actual, other, n, others=len(number) - n)
        )

    def assistants(self) -> ScorePair:
        """By the loss of the reference responses, or by the answers, on the test records."""
        params, score = self.params, self.rule.assistant
        self._check_split()
        different = (
            "its tokenizer or context is another than the champion's, so their losses are of other "
            "tokens; set promotion.assistant to rouge_l or chrf"
        )
        if score == "loss":
            self._check_tokenizer(different)
        test = records_by_part(self.here, self.root / "data/raw/instructions")["test"]
        new = self._predictions("assistant")
        device = prepare_device(params.device, params.threads)
        old, _ = answer_records(
            self.champion, test, device, params.batch_size, params.max_new_tokens
        )
        shown = {"asked": new["instruction"], "answer": old["answer"].to_numpy()}
        answers = pd.DataFrame(shown).rename_axis("example").reset_index()
        if score == "loss":
            tokens = new["tokens"].astype(int)
            if tokens.tolist() != old["tokens"].tolist():
                raise NotComparableError(different)
            held = tokens > 0
            one, other = (
                mean_loss(each["loss"].astype(float)[held], tokens[held]) for each in (new, old)
            )
            return ScorePair(one, other, answers)
        scored = score_texts(old["answer"].tolist(), [record.output.strip() for record in test])
        return ScorePair(mean(new[score].astype(float)), mean(getattr(scored, score)), answers)

    def _check_tokenizer(self, different: str) -> None:
        if load_tokenizer(self.here).hash != load_tokenizer(self.champion).hash:
            raise NotComparableError(different)

    def _check_split(self) -> None:
        here, there = (read_training(each) for each in (self.here, self.champion))
        if (here.split, here.balance) != (there.split, there.balance):
            raise NotComparableError(
                "the champion learnt from another split and may know the test examples; promote by "
                "hand"
            )

    def _predictions(self, name: str) -> pd.DataFrame:
        path = self.predictions / f"{name}.csv"
        return pd.read_csv(path, keep_default_na=False, dtype=str)
