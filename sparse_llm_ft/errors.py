"""The errors a user can cause, each said in one line.

A `UserError` ends a run with exit status 2 and its text on rank 0. Everything else is a fault of ours and keeps
its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST, _LONGEST_PROBLEM = 2000, 800


def one_line(text: str) -> str:
    """The text as one printable line: names and values come from files, and may hold anything. Access tokens are
    masked, control characters and halves of surrogate pairs escaped, and the middle of a very long text is left out:
    what would be right stands at its end.
    """
    text = shortened(redact(text), _LONGEST)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """At most `most` characters of a text and " ... ": its beginning and its end, where advice stands."""
    return text if len(text) <= most else f"{text[: most - most // 3]} ... {text[-(most // 3) :]}"


def reason_of(error: object, most: int = 300) -> str:
    """A library's error in one line, without its middle if it is long. Its advice, at the end, stays."""
    return shortened(" ".join(str(error).split()), most)


def describe_failure(error: Exception) -> str:
    """An error in one line: the text of one of ours, and the type and text of any other."""
    ours = isinstance(error, UserError | TrainingError)
    return one_line(str(error) if ours else f"{type(error).__name__}: {reason_of(error)}")


class UserError(Exception):
    """Something in what the user gave. The message is one line and says what would be right.

    Attributes:
        is_shared: rank 0 says it, so that no other rank need do so.
    """

    is_shared = False

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(UserError):
    """A setting, the value given, and what would be right.

    Args:
        setting: dotted name of the setting, for instance ``adapter.r``.
        problem: the value given and what is wrong with it.
        expected: what would be right.
    """

    def __init__(self, setting: str, problem: str, expected: str) -> None:
        super().__init__(f"{setting:.200}: {shortened(problem, _LONGEST_PROBLEM)}; {expected}")
        self.setting = setting


class OutOfMemoryConfigError(ConfigError):
    """A step did not fit into memory with the smallest micro-batch."""


class DataError(UserError):
    """A row of data that cannot be used, with its file and line (lines count from 1)."""

    def __init__(self, path: object, line: int, problem: str) -> None:
        super().__init__(f"{path}:{line}: {shortened(problem, _LONGEST_PROBLEM)}")


class CheckpointError(Exception):
    """A checkpoint folder that cannot be used: which one, which file, and why; in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@contextmanager
def reaching(setting: str) -> Iterator[None]:
    """The body looks at a path that the user gave for `setting`, perhaps within a folder of somebody else's.

    Raises:
        ConfigError: this user may not look there.
    """
    try:
        yield
    except PermissionError as error:
        raise ConfigError(
            setting,
            f"{error.filename!r} cannot be reached (permission denied)",
            "expected a path that this user may use",
        ) from None


_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.ENOTCONN, errno.ESHUTDOWN),
}
"""How reads and writes fail while a file server is away or restarts: NFS, Lustre, FUSE."""

_OS_ERROR = re.compile(r"(?:\(os error |\[Errno )([0-9]+)[)\]]")
"""In texts of safetensors and tokenizers, which are written in Rust, and of errors that another rank had."""

AWAY = "the file system or the hub may be away, and the same command continues when it is back"
"""What to do about an error that `may_pass`."""


def may_pass(error: BaseException) -> bool:
    """Whether a file server or a hub that is away is behind an error: the same command may work in a minute."""
    return _is_behind(error, _PASSING) or any(map(_is_of_network, _causes(error)))


def _is_of_network(error: BaseException) -> bool:
    """Whether nothing answered: refused, too late, or no name server. Not if the user has turned the network off."""
    if type(error).__name__ == "OfflineModeIsEnabled":  # huggingface_hub's, a ConnectionError
        return False
    return isinstance(error, ConnectionError | TimeoutError | socket.gaierror)


def lacks_room(error: BaseException) -> bool:
    """Whether a full disk, or a user's quota on it, is behind an error."""
    return _is_behind(error, {errno.ENOSPC, errno.EDQUOT})


def _is_behind(error: BaseException, numbers: set[int]) -> bool:
    for seen in _causes(error):
        found = _OS_ERROR.search(str(seen))
        number = seen.errno if isinstance(seen, OSError) else None
        if number is None and found:
            number = int(found[1])
        if number in numbers:
            return True
    return False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


DEVICE_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA (?:error: )?out of memory|CU[A-Z]+_STATUS_ALLOC_FAILED|Triton Error \[CUDA\]: out of memory"
)
"""In the texts of errors of torch's allocator, of CUDA, of its libraries, and of Triton."""

HOST_MEMORY = re.compile(r"DefaultCPUAllocator: can't allocate memory")
"""In the text of torch's error, which has no class of its own."""


def lacks_device_memory(error: BaseException) -> bool:
    """Whether an allocation on a GPU failed: torch's own, or one outside its allocator."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; this file does not import torch
        return True
    return isinstance(error, RuntimeError) and DEVICE_MEMORY.search(str(error)) is not None


def lacks_host_memory(error: BaseException) -> bool:
    """Whether an allocation of this process failed."""
    return isinstance(error, MemoryError) or HOST_MEMORY.search(str(error)) is not None


class TrainingError(Exception):
    """Training cannot go on (for instance a loss that is not a number). The last checkpoint is intact.

    Attributes:
        is_shared: as in `UserError`.
    """

    is_shared = False


class DivergedError(TrainingError):
    """Losses, gradients or trained values are not finite; the same run would end the same way again."""


NOTHING_NEW = "nothing new to save"
"""The message of a run that leaves without a new step."""


class PreemptionRequested(Exception):
    """A signal asked the run to leave, and everything is saved.

    Args:
        signal_name: such as ``SIGTERM``; ``SIGINT`` is Ctrl-C.
        saved: what was saved.
    """

    def __init__(self, signal_name: str, saved: str) -> None:
        super().__init__(f"{signal_name}: {saved}")
        self.signal_name = signal_name


_PATTERN = re.compile(r"hf_[A-Za-z0-9_]{20,}|(?<=://)[^/\s@]+(?=@)")
"""A token of the Hugging Face hub, or the credentials of a URL."""

_VARIABLES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_TOKEN"),
    *("MLFLOW_TRACKING_PASSWORD", "DAGSHUB_USER_TOKEN", "CLEARML_API_SECRET_KEY", "SWANLAB_API_KEY"),
    "NEPTUNE_API_TOKEN",
)
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
