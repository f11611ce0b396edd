"""What `doctor` says of DeepSpeed, which no other package imports."""

from __future__ import annotations

import deepspeed
from deepspeed.accelerator import get_accelerator


def describe_library() -> str:
    """DeepSpeed's version, and the kind of device that it uses here."""
    return f"{deepspeed.__version__} uses {get_accelerator().device_name()}"
