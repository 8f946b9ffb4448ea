"""A model directory as a model of EleutherAI's lm-evaluation-harness, through its class `HFLM`.

This module needs the extra `lm-eval`; `pipeline.verdict.lm_eval` imports it when it measures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from gpt.base.errors import InputError
from gpt.model.device import pick_device
from gpt.prompts import TOKENIZER_FILE, Template


class HarnessModel(HFLM):  # type: ignore[misc]
    """`HFLM` on a model directory, which counts the requests that the context was too short for.

    Args:
        directory: of a language model.
        template: of its prompts, for conversations; None for a base model.
    """

    def __init__(self, directory: Path, template: Template | None = None) -> None:
        # a line for every request that is cut; they are counted here
        logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
        device = str(pick_device())
        super().__init__(str(directory), device=device, dtype="float32", batch_size=16)
        if template is not None:  # a directory of an earlier version names its template only
            self.tokenizer.chat_template = template.files[TOKENIZER_FILE]["chat_template"]
        self.shortened = 0
        """Requests so far that lost their beginning."""

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where the task names no number: at most half the context."""
        return int(min(super().max_gen_toks, self.max_length // 2))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"{text[1][:40]!r}: a continuation of {len(continuation)} tokens, and it must "
                    f"have 1 to {self.max_length}, the context; change the task's choices or its "
                    "target_delimiter"
                )
            self.shortened += len(context) + len(continuation) > self.max_length + 1
        whole = [(text, context or [self.prefix_token_id], end) for text, context, end in requests]
        return super()._loglikelihood_tokens(whole, *args, **kwargs)  # type: ignore[no-any-return]

    def tok_batch_encode(
        self, strings: Sequence[str], *args: Any, left_truncate_len: int, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The token ids of contexts to generate after, cut to a length, and their mask."""
        self.shortened += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(  # type: ignore[no-any-return]
            strings, *args, left_truncate_len=left_truncate_len, **kwargs
        )
