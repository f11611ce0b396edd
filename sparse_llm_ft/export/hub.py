"""Uploads to the Hugging Face hub, with its errors in one line each.

huggingface_hub finds the token in ``HF_TOKEN`` or from `hf auth login`; this module never reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_llm_ft.errors import UserError, reason_of
from sparse_llm_ft.io.atomic import MANIFEST
from sparse_llm_ft.run_folder import CONFIG_FILE

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_MODEL_FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "adapter.gguf", "Modelfile", "truncation.json"),
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
)
"""What an export may have put into a repository, beside tokenizer, card and settings."""
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"


def check_name(repo_id: str) -> None:
    """Raise UserError unless `repo_id` has the form ``NAMESPACE/NAME``."""
    if not _NAME.fullmatch(repo_id) or len(repo_id) > 96 or "--" in repo_id or ".." in repo_id:
        raise UserError(f"{repo_id}: not a repository name; expected NAMESPACE/NAME, such as your-name/your-model")


def check_repository(repo_id: str, private: bool, update: bool) -> None:
    """Check token and repository before a long export.

    Raises:
        UserError: there is no token, the hub is unreachable, or the repository exists and `update` is not given, or it
            is public and `private` is given: an upload would not make it private.
    """
    from huggingface_hub import HfApi, get_token

    check_name(repo_id)
    if not get_token():
        raise UserError(f"{repo_id}: no access token for the hub; {_LOG_IN}")
    with _one_line(repo_id):
        exists = HfApi().repo_exists(repo_id)
        is_private = exists and HfApi().repo_info(repo_id).private
    if exists and not update:
        raise UserError(f"{repo_id}: exists; choose another name, or give --update to upload into it")
    if exists and private and not is_private:
        raise UserError(f"{repo_id}: is public; make it private on the hub first, or leave out --private")


def upload(folder: Path, repo_id: str, private: bool, update: bool) -> str:
    """Create the repository and upload the folder without its manifest. Returns the repository's URL.

    Args:
        update: upload into a repository that exists. If this package has uploaded into it before, the model's files of
            that time which are not written again are removed in the same commit: a loader that finds them first would
            load the older model.

    Raises:
        UserError: the hub refuses or is unreachable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    with _one_line(repo_id):
        url = api.create_repo(repo_id, private=private or None, exist_ok=update)
    with _one_line(repo_id, " (the repository exists now; retry with --update)"):
        ours = update and CONFIG_FILE in api.list_repo_files(repo_id)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload the trained model",
            ignore_patterns=[MANIFEST],
            delete_patterns=list(_MODEL_FILES) if ours else None,  # but those that are uploaded again
        )
    return str(url)


@contextmanager
def _one_line(repo_id: str, hint: str = "") -> Iterator[None]:
    """Turn huggingface_hub's errors into a `UserError`."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        answer = reason_of(error.server_message or error, 200)
        reason = {
            401: f"the hub does not accept the access token; {_LOG_IN}",
            403: f"the access token has no write access there ({answer}); {_LOG_IN}",
            409: "exists; choose another name, or give --update to upload into it",
        }.get(status, f"the hub answered {status} ({answer})")
        raise UserError(f"{repo_id}: {reason}{hint}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # the last two: refused uploads
        reason = reason_of(error)
        raise UserError(f"{repo_id}: the hub cannot be used ({type(error).__name__}: {reason}){hint}") from error
