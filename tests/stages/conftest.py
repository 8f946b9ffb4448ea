"""Small raw folders and a small base model for the tests of the model stages.

What has the scope of the session is read only; a test that breaks something copies it first.
"""

import contextlib
import json
import os
import signal

import pytest
import torch

from gpt.base.errors import InputError
from gpt.base.events import Metrics
from gpt.base.files import sha256_of
from gpt.model.config import GPTConfig
from gpt.model.model import GPT
from gpt.model.weights import save_model
from gpt.text.records import RawFile, write_sources
from gpt.tokens.tokenizer import byte_tokenizer
from stages.tokenize import TokenizeParams, tokenize

FORMS = {
    "jsonl": ("documents", "jsonl"),
    "messages": ("messages", "tsv"),
    "instructions": ("instructions", "json"),
    "conversations": ("instructions", "jsonl"),
}


def write_raw(folder, form, content):
    """A raw folder of one file."""
    folder.mkdir(parents=True)
    path = folder / f"{form}.data"
    path.write_bytes(content)
    kind, format_ = FORMS[form]
    file = RawFile(
        name=form,
        file=path.name,
        kind=kind,
        format=format_,
        bytes=len(content),
        sha256=sha256_of(path),
    )
    write_sources(folder, [file])
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """A function that writes a raw folder: documents, (label, text) pairs, records, or bytes."""

    def write(format_, content):
        if format_ == "jsonl" and not isinstance(content, bytes):
            content = "".join(json.dumps({"text": text}) + "\n" for text in content)
        elif format_ == "messages" and not isinstance(content, bytes):
            content = "".join(f"{label}\t{text}\n" for label, text in content)
        elif format_ == "instructions" and not isinstance(content, bytes):
            content = json.dumps(content)
        elif format_ == "conversations":
            content = "".join(json.dumps({"messages": said}) + "\n" for said in content)
        if isinstance(content, str):
            content = content.encode()
        return write_raw(tmp_path_factory.mktemp("raw") / format_, format_, content)

    return write


@pytest.fixture(scope="session")
def documents():
    return [f"Document {i} tells of {i * 7 % 13} cats and {i * 5 % 11} dogs." for i in range(60)]


@pytest.fixture(scope="session")
def tokens(raw, documents, tmp_path_factory):
    """Token files of bytes: some 2,000 for training, some 400 for validation."""
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    tokenize(
        TokenizeParams(tokenizer="bytes", validation=0.2),
        corpus=raw("jsonl", documents),
        vocabulary=None,
        out=out,
        metrics=out.with_name("metrics.json"),
        report=out.with_name("report.json"),
    )
    return out


@pytest.fixture(scope="session")
def message_rows():
    """60 ham and 40 spam of very different length; what makes a spam is one word in it."""
    ham = [("ham", f"see you at {i} then" + " and later" * (i % 4)) for i in range(60)]
    spam = [("spam", f"win £{i} now" + " call us today" * (i % 3)) for i in range(40)]
    return [row for pair in zip(ham, spam, strict=False) for row in pair] + ham[40:]


@pytest.fixture(scope="session")
def messages(raw, message_rows):
    return raw("messages", message_rows)


@pytest.fixture(scope="session")
def records():
    """40 instruction records, every other one with an input."""
    return [
        {
            "instruction": f"Say {i}." if i % 2 else "Double it.",
            "input": "" if i % 2 else str(i),
            "output": f"It is {i}." if i % 2 else f"{2 * i}",
        }
        for i in range(40)
    ]


@pytest.fixture(scope="session")
def instructions(raw, records):
    return raw("instructions", records)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory):
    """A function from changes of the architecture to a small base model's directory.

    The weights are larger than at initialization, so that the model has opinions.
    """

    def make(tokenizer=None, **changes):
        tokenizer = tokenizer or byte_tokenizer()
        torch.manual_seed(5)
        sizes = {"context_length": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}
        model = GPT(GPTConfig(**{**sizes, **changes}, vocab_size=tokenizer.vocab_size))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        out = tmp_path_factory.mktemp("base") / "base"
        save_model(model.eval(), out, tokenizer=tokenizer)
        return out

    return make


@pytest.fixture(scope="session")
def base(make_base):
    return make_base()


@pytest.fixture(scope="session")
def everything():
    """A function from a folder to the bytes of every file below it, by path."""

    def read(folder):
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read


@pytest.fixture(scope="session")
def interrupt_at():
    """A function from a step to a listener that sends SIGINT when that step is heard."""

    def listener(step):
        def log(event):
            if isinstance(event, Metrics) and "train_loss" in event.values and event.step == step:
                os.kill(os.getpid(), signal.SIGINT)

        return log

    return listener


@pytest.fixture
def refused(tmp_path):
    """A context that expects one line of refusal that matches, and nothing new in the folder `o`
    of the outputs, or anywhere beside it.
    """

    @contextlib.contextmanager
    def expect(complaint, error=InputError):
        (tmp_path / "o").mkdir(exist_ok=True)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=complaint) as caught:
            yield
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    return expect
