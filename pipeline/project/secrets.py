"""Texts and addresses without the passwords, tokens and keys that they may hold."""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|sig|signature|passw|pwd|auth|credential)[\w.-]*=)"
    r"[^\s&#'\"<>,}\])]+",
    re.IGNORECASE,
)
"""A part of an address behind its `?` that opens a door."""


def without_credentials(text: str) -> str:
    """A text in which no address names a user and a password, or what stands behind its `?`."""
    text = re.sub(r"(?<=://)\S*@(?=[^@\s]*)", "", text)
    return re.sub(r"(://[^\s?]*)\?\S*", r"\1", text)


def without_secrets(text: str) -> str:
    """A text whose addresses name no user and no password, and no token behind their `?`.

    Unlike `without_credentials` it leaves an address whole that holds none.
    """
    return _SECRET.sub(r"\1***", re.sub(r"(?<=://)[^\s/?#@'\"]*@", "", text))
