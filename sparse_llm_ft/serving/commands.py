"""The commands that serve an adapter."""

from __future__ import annotations

import shlex
from pathlib import Path

from sparse_llm_ft.serving.facts import AdapterFacts, read_facts
from sparse_llm_ft.serving.ranks import VLLM_DEFAULT_RANK, max_lora_rank
from sparse_llm_ft.serving.servers import SERVERS, judge

GGUF_SERVERS = ("llama.cpp", "ollama")
"""Loaders of GGUF. Both run llama.cpp's code, so the rules of llama.cpp's converter are those of both."""

_OF_PEFT = ("vllm", "sglang", "tgi")
"""Servers that take PEFT's form."""


def run_lines(folder: Path) -> list[str]:
    """A line for people on how vLLM serves a run's own adapter. Servers take adapters of causal language models only.

    Args:
        folder: the run's ``adapter/``.
    """
    facts = read_facts(folder)
    if facts.config.get("task_type") != "CAUSAL_LM":
        return []
    return commands_for(facts, str(facts.config["base_model_name_or_path"]), str(folder), "vllm")


def commands_for(facts: AdapterFacts, base: str, adapter: str, server: str | None) -> list[str]:
    """A line for each server that computes what PEFT does: its name and command. Without one, a line that says why.

    Args:
        base, adapter: as in `serve_command`.
        server: the only one of interest; None: all that take PEFT's form.
    """
    verdicts = [judge(facts, SERVERS[name]) for name in ((server,) if server else _OF_PEFT)]
    rank, revision = facts.largest_rank, facts.config.get("revision")
    lines = [
        f"{verdict.server.name}: {serve_command(verdict.server.name, base, adapter, rank, revision=revision)}"
        for verdict in verdicts
        if verdict.right
    ]
    return lines or [f"{verdicts[0].server.label}: {verdicts[0]}; `sparse-llm-ft export --to merged` is for any server"]


def serve_command(
    server: str, base: str, adapter: str, rank: int, name: str = "tuned", revision: str | None = None
) -> str:
    """The command line that serves an adapter.

    Args:
        server: name of the server.
        base: the base model's name or folder.
        adapter: the adapter's folder or, on the hub, its name; for llama.cpp and Ollama the folder of the GGUF.
        rank: of the adapter.
        name: under which requests ask for the adapter.
        revision: of the base on the hub; servers of PEFT's form have an option of this name for it.
    """
    base, adapter = shlex.quote(base), shlex.quote(adapter)
    if revision is not None and server not in GGUF_SERVERS:
        base += f" --revision {shlex.quote(revision)}"
    if server.startswith("vllm"):
        largest = max_lora_rank(rank) or rank
        option = f" --max-lora-rank {largest}" if largest > VLLM_DEFAULT_RANK else ""
        return f"vllm serve {base} --enable-lora{option} --lora-modules {name}={adapter}"
    if server == "sglang":
        return f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {name}={adapter}"
    if server == "llama.cpp":
        return f"llama-server --model BASE.gguf --lora {adapter}/adapter.gguf"
    if server == "ollama":
        return f"ollama create {name} --file {adapter}/Modelfile"
    if server == "tgi":
        return f"text-generation-launcher --model-id {base} --lora-adapters {name}={adapter}"
    raise ValueError(f"no command for {server}")
