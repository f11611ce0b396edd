"""Writes the folder to upload: an export, a model card and the run's settings, without local paths and secrets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml

from sparse_llm_ft.errors import UserError, holds_token
from sparse_llm_ft.export.export import MODELFILE, check_form, write_export, write_output
from sparse_llm_ft.export.model_card import model_card
from sparse_llm_ft.export.options import ExportOptions, refuse_existing
from sparse_llm_ft.export.sanitize import public_name, public_settings
from sparse_llm_ft.export.serve_lines import serve_lines
from sparse_llm_ft.inference.trained_run import TrainedRun
from sparse_llm_ft.io.atomic import MANIFEST, draft_of
from sparse_llm_ft.run_folder import CONFIG_FILE
from sparse_llm_ft.serving.commands import GGUF_SERVERS

CARD = "README.md"


def stage(run: TrainedRun, output: Path, repo_id: str, options: ExportOptions) -> dict[str, int]:
    """Write everything to upload into the new folder `output`, atomically. Returns name in the folder -> bytes.

    Raises:
        UserError: `output` exists or cannot be written, the run does not have this form, or a file would reveal a
            local path or an access token.
    """
    refuse_existing(output)
    check_form(run, options)
    base = public_name(run.config.model.name)

    def fill(folder: Path) -> None:
        remarks = write_export(folder, run, options, base)
        adapter = repo_id.partition("/")[2] if options.server in GGUF_SERVERS else repo_id
        commands = serve_lines(run, folder, options, base, adapter)
        settings = yaml.safe_dump(public_settings(run.config), sort_keys=False, allow_unicode=True)
        (folder / CONFIG_FILE).write_text(settings, encoding="utf-8")
        (folder / CARD).write_text(model_card(run, repo_id, options, remarks[:1], commands), encoding="utf-8")
        _check_private(folder, run)

    write_output(output, fill)
    files = {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()}
    return {name: path.stat().st_size for name, path in files.items() if name != MANIFEST}


@contextmanager
def staged(run: TrainedRun, repo_id: str, options: ExportOptions) -> Iterator[Path]:
    """`stage` into a temporary folder inside the run's."""
    with ExitStack() as opened:
        try:
            folder = opened.enter_context(draft_of(run.folder.path / "push"))
        except OSError as error:
            raise UserError(f"{run.folder.path}: cannot be written ({error.strerror})") from error
        stage(run, folder / "files", repo_id, options)
        yield folder / "files"


def _check_private(folder: Path, run: TrainedRun) -> None:
    """Refuse settings, card and configs with a local path or a token. Vocabularies are not checked."""
    config = run.config
    local = [Path(name).absolute() for name in (config.model.name, config.task.path) if name and Path(name).exists()]
    paths = {str(path) for path in (*local, run.folder.path.absolute(), Path(config.output_dir).absolute())}
    for name in (CARD, CONFIG_FILE, "adapter_config.json", "config.json", "tokenizer_config.json", MODELFILE):
        path = folder / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if holds_token(text):
            raise UserError(f"{name} would contain an access token; remove it from the run's settings")
        if found := next((local for local in sorted(paths) if len(local) > 1 and local in text), None):
            raise UserError(f"{name} would contain the local path {found}; nothing is uploaded")
