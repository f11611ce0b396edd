"""The commands that serve an export, for the terminal and for the model card."""

from __future__ import annotations

from pathlib import Path

from sparse_llm_ft.data.chat import ChatFormat
from sparse_llm_ft.export.options import ExportOptions
from sparse_llm_ft.inference.trained_run import TrainedRun
from sparse_llm_ft.serving.commands import GGUF_SERVERS, commands_for, serve_command
from sparse_llm_ft.serving.facts import read_facts


def serve_lines(run: TrainedRun, folder: Path, options: ExportOptions, base: str, adapter: str) -> list[str]:
    """A line for each server that loads an export: its name and command. A line says why, if none does. The last one
    names the token that ends completions, if servers would not stop at it.

    Only for adapters of causal language models; servers take no others.

    Args:
        folder: where the export lies now.
        base, adapter: how the command names the two.
    """
    if options.to != "peft" or run.task_mode.mode != "causal_lm":
        return []
    if options.server in GGUF_SERVERS:
        lines = [f"{options.server}: {serve_command(options.server, base, adapter, 0)}"]
    else:
        lines = commands_for(read_facts(folder), base, adapter, options.server)
    chat = ChatFormat.of(run.context.tokenizer, run.config.task)
    if (end := chat.end_token_id) != chat.tokenizer.eos_token_id:
        token = chat.tokenizer.convert_ids_to_tokens(end)
        lines.append(f"# completions end with {token}: give it with each request (stop_token_ids: [{end}])")
    return lines
