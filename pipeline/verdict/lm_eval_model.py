"""A model directory's GPT as EleutherAI's lm-evaluation-harness asks a model.

The harness asks in three ways: how likely a continuation is, how likely a whole text is, and what
the model writes. Its page "docs/model_guide.md" says what each of them returns; where a request is
longer than the context, it is cut as the harness's own model for Hugging Face's cuts it.

This module needs the extra `lm-eval`; `pipeline.verdict.lm_eval` imports it when it measures.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from gpt.base.errors import InputError
from gpt.base.events import Log, Progress, discard
from gpt.generation import Sampling, stream
from gpt.model.model import GPT
from gpt.prompts import TOKENIZER_FILE, Template, render_prompts
from gpt.tokens.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

BATCH = 16
"""Rows that are computed together."""
MAX_NEW_TOKENS = 256
"""Of an answer, where the task names no number: the harness's own default."""

_HEAD = 1024  # positions whose logits are held at once: 200 MB for GPT-2's vocabulary
Row = TypeVar("Row")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""A context and a continuation: as text where there is one, and as token ids."""


class _Asked(NamedTuple):
    """How a task wants its answers written."""

    sampling: Sampling
    until: tuple[str, ...]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """One GPT, for `lm_eval.simple_evaluate(model=…)`.

    Args:
        model: a language model, where it is to be computed.
        tokenizer: its own.
        template: what it was taught to read, for conversations; None for a base model.
        batch_size: rows that are computed together.
        log: hears how far it is.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        template: Template | None = None,
        batch_size: int = BATCH,
        log: Log = discard,
    ) -> None:
        super().__init__()
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._template = template
        self._batch_size = batch_size
        self._log = log
        self.shortened = 0
        """Requests so far that lost their beginning, for the context was too short for them."""

    @property
    def eot_token_id(self) -> int:
        """The id of `<|endoftext|>`: stands before what has no context."""
        return self._tokenizer.eot

    @property
    def max_length(self) -> int:
        """Tokens that the context holds."""
        return self._model.config.context_length

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of an answer where the task names no number: half the context at most."""
        return min(MAX_NEW_TOKENS, self.max_length // 2)

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """The token ids of a text; in a conversation `<|endoftext|>` is the mark, not its letters.

        There it stands behind every earlier response, where the template put it.
        """
        if self._template is None:
            return self._tokenizer.encode(string)
        first, *others = self._tokenizer.encode_batch(string.split(END_OF_TEXT))
        return [*first, *(id for ids in others for id in (self.eot_token_id, *ids))]

    # --- likelihood -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-probability in nats, and whether greedy decoding writes it.

        What reads the same up to its last token (answers of one token to one question) is computed
        once.

        Raises:
            InputError: a continuation has no token of its own, or more than the context holds.
        """
        reading: dict[tuple[int, ...], list[int]] = defaultdict(list)  # the model's input: requests
        for i, (text, context, continuation) in enumerate(requests):
            self._check(text, continuation)
            whole = [*(context or [self.prefix_token_id]), *continuation]
            self.shortened += len(whole) > self.max_length + 1
            reading[tuple(whole[-(self.max_length + 1) : -1])].append(i)
        scores: dict[int, tuple[float, bool]] = {}
        for rows in self._batches(sorted(reading, key=len, reverse=True)):
            hidden = self._model.hidden(self._padded(rows))  # (B, T, C)
            asked = [(b, len(row), i) for b, row in enumerate(rows) for i in reading[row]]
            targets = [requests[i][2] for _, _, i in asked]
            ends = [
                hidden[b, length - len(continuation) : length]
                for (b, length, _), continuation in zip(asked, targets, strict=True)
            ]
            known = self._known(torch.cat(ends), list(itertools.chain(*targets)))
            each = torch.split(known, [len(continuation) for continuation in targets], dim=1)
            for (_, _, i), (log_probs, greedy) in zip(asked, each, strict=True):
                scores[i] = log_probs.sum().item(), bool(greedy.all())
            self._progress("likelihoods", len(scores), len(requests))
        return [scores[i] for i in range(len(requests))]

    def _check(self, text: tuple[str, str] | None, continuation: Sequence[int]) -> None:
        shown = repr(text[1][:40]) if text else "a text"
        if not continuation:
            raise InputError(
                f"{shown}: the tokenizer joins it with the text before it, and no token is left to "
                "score; let the task's target_delimiter or its choices begin with a blank"
            )
        if len(continuation) > self.max_length:
            raise InputError(
                f"{shown}: a continuation of {len(continuation)} tokens, and the context holds "
                f"{self.max_length}; shorten the task's choices or take a model of a longer context"
            )

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows as (B, T), T the longest; no position sees the padding, which is on the right."""
        longest = max(map(len, rows))
        filled = [[*row, *[self.eot_token_id] * (longest - len(row))] for row in rows]
        return torch.tensor(filled, device=self._model.device)

    def _known(self, hidden: Tensor, targets: Sequence[int]) -> Tensor:
        """The log-probability of each target after its hidden state, and whether none is likelier.

        Args:
            hidden: (N, C).
            targets: N token ids.

        Returns:
            (2, N) on the CPU, the second 0 or 1.
        """
        found = []
        of = torch.tensor(targets, device=hidden.device)
        for states, ids in zip(torch.split(hidden, _HEAD), torch.split(of, _HEAD), strict=True):
            logits = self._model.head(states).float()  # (n, V)
            log_probs = logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]  # (n,)
            found.append(torch.stack((log_probs, (logits.argmax(dim=-1) == ids).float())))
        return torch.cat(found, dim=1).cpu()

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each whole text in nats, from `<|endoftext|>` on.

        A text longer than the context is read in windows, each token predicted once
        (`lm_eval.utils.get_rolling_token_windows`).
        """
        windows: list[Scored] = []
        owners = []
        for i, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += log_prob
        return totals

    # --- writing ----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the task's stop texts.

        `<|endoftext|>` ends every answer. The context's end stays where there is no room for all of
        it beside the answer. What is sampled does not depend on the rows beside it.

        Raises:
            InputError: a setting that we do not know, or an answer as long as the context.
        """
        alike: dict[_Asked, list[tuple[int, list[int]]]] = defaultdict(list)
        for i, request in enumerate(requests):
            context, settings = request.args
            asked = self._asked(settings)
            room = self.max_length - asked.sampling.max_new_tokens
            ids = self.tok_encode(context) or [self.prefix_token_id]
            self.shortened += len(ids) > room
            alike[asked].append((i, ids[-room:]))
        texts: dict[int, str] = {}
        for asked, prompts in alike.items():
            size = 1 if asked.sampling.temperature else None
            longest_first = sorted(prompts, key=lambda prompt: len(prompt[1]), reverse=True)
            for rows in self._batches(longest_first, size):
                written = self._write([ids for _, ids in rows], asked, seed=rows[0][0])
                for (i, _), text in zip(rows, written, strict=True):
                    texts[i] = text
                self._progress("answers", len(texts), len(requests))
        return [texts[i] for i in range(len(requests))]

    def _asked(self, settings: Mapping[str, Any]) -> _Asked:
        """A task's `generation_kwargs`, under the names that the harness gives them."""
        given = {name: value for name, value in settings.items() if value is not None}
        until = given.pop("until", [])
        lengths = [int(given.pop(name)) for name in _LENGTHS if name in given]
        length = lengths[0] if lengths else self.max_gen_toks
        if length >= self.max_length:
            raise InputError(
                f"max_gen_toks: the task asks for {length} tokens and the context holds "
                f"{self.max_length}, its question too; set less in the task's generation_kwargs or "
                "take a model of a longer context"
            )
        temperature = float(given.pop("temperature", 1.0 if given.get("do_sample") else 0.0))
        if not given.pop("do_sample", temperature > 0):
            temperature = 0.0
        top_k = int(given.pop("top_k", 0))
        if given.get("num_beams") == 1:  # one beam is none
            del given["num_beams"]
        sampling = Sampling(
            max_new_tokens=length,
            temperature=temperature,
            top_k=top_k or None,  # 0 is none
            top_p=given.pop("top_p", None),
            repetition_penalty=given.pop("repetition_penalty", 1.0),
            stop=(self.eot_token_id,),
        )
        if given:
            raise InputError(
                f"generation_kwargs: {', '.join(sorted(given))} cannot be set for this model; "
                "leave it out in a task file of your own"
            )
        texts = [until] if isinstance(until, str) else until
        return _Asked(sampling, tuple(text for text in texts if text))

    def _write(self, rows: Sequence[Sequence[int]], asked: _Asked, seed: int) -> list[str]:
        """What is written after each row of ids; all of them end where the last of them does."""
        written = [list[int]() for _ in rows]
        texts = [""] * len(rows)
        ended = [False] * len(rows)
        sampling = replace(asked.sampling, seed=seed)
        # no engine: a score must not depend on whether there is a compiler
        for step in stream(self._model, rows, sampling):
            for i, token in enumerate(step):
                if ended[i]:
                    continue
                if token is None or token.id in sampling.stop:
                    ended[i] = True
                    continue
                written[i].append(token.id)
                texts[i] = self._tokenizer.decode(written[i])
                ended[i] = any(stop in texts[i] for stop in asked.until)
            if all(ended):
                break
        return [_before(text, asked.until) for text in texts]

    def _batches(self, rows: Sequence[Row], size: int | None = None) -> Iterator[Sequence[Row]]:
        size = size or self._batch_size
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def _progress(self, task: str, done: int, total: int) -> None:
        self._log(Progress(f"lm-eval {task}", done, total, unit="request"))

    # --- conversations ----------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness may keep requests."""
        return self._tokenizer.hash

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's template in Jinja, for the harness's own record; empty for a base model."""
        if self._template is None:
            return ""
        return str(self._template.files[TOKENIZER_FILE]["chat_template"])

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the model was taught to read it.

        Args:
            chat_history: messages of a `role` and a `content`: perhaps `system`, then `user` and
                `assistant` in turn.
            add_generation_prompt: False where the last message begins the answer.

        Raises:
            InputError: the roles come in another order.
        """
        assert self._template is not None
        turns = list(chat_history)
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
        roles = [turn["role"] for turn in turns]
        if not turns or roles != (["user", "assistant"] * len(turns))[: len(turns)]:
            raise InputError(
                f"a conversation of {', '.join(roles) or 'nothing'}: it must be user and assistant "
                "in turn; change the task or leave --chat out"
            )
        asked = [turn["content"] for turn in turns[::2]]
        said = [turn["content"] + END_OF_TEXT for turn in turns[1::2]]
        if said and not add_generation_prompt:
            said[-1] = said[-1].removesuffix(END_OF_TEXT)
        prompts = render_prompts(self._template, asked, system=system)
        pairs = itertools.zip_longest(prompts, said, fillvalue="")
        return "".join(prompt + response for prompt, response in pairs)


def _before(text: str, until: Sequence[str]) -> str:
    """A text up to the first of the stop texts."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=None)]
