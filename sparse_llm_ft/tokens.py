"""Access tokens: where one stands in a text, and the text without it. No setting, log or error may hold one."""

from __future__ import annotations

import os
import re

_PATTERN = re.compile(r"hf_[A-Za-z0-9_]{20,}|(?<=://)[^/\s@]+(?=@)")
"""A token of the Hugging Face hub, or the credentials of a URL."""

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values are secret, whatever they look like."""

_SHORTEST = 8  # a shorter value would be found in texts that have nothing to do with it
HIDDEN = "***"


def holds_token(text: str) -> bool:
    """Whether the text has an access token in it, or the value of a variable that holds one."""
    return redact(text) != text


def redact(text: str) -> str:
    """The text with ``***`` in place of every token."""
    for name in _VARIABLES:
        secret = os.environ.get(name, "").strip()
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, HIDDEN)
    return _PATTERN.sub(HIDDEN, text)
