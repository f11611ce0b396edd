"""The loaders by name: which rules hold for each, and its verdict on an adapter."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.serving import rules
from sparse_llm_ft.serving.facts import AdapterFacts
from sparse_llm_ft.serving.rules import Finding, Kind, Rule


@dataclass(frozen=True)
class Server:
    """A loader of PEFT adapters.

    Attributes:
        name: as it is typed.
        label: with its versions, for people.
        rules: what it does with an adapter.
    """

    name: str
    label: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Verdict:
    """What a server makes of an adapter."""

    server: Server
    findings: tuple[Finding, ...]

    @property
    def right(self) -> bool:
        """Whether it computes what PEFT does, maybe with an option."""
        return not any(finding.kind in ("refused", "wrong", "unknown") for finding in self.findings)

    def __str__(self) -> str:
        texts: dict[Kind, list[str]] = {"refused": [], "wrong": [], "unknown": [], "option": [], "note": []}
        for finding in self.findings:
            texts[finding.kind].append(finding.text)
        if texts["refused"]:
            return "refused: " + "; ".join(texts["refused"])
        if texts["wrong"]:
            wrong = sorted(texts["wrong"], key=lambda text: not text.startswith(_PLACES))
            return f"wrong{' ' if wrong[0].startswith(_PLACES) else ': '}{'; '.join(wrong)}"
        if texts["unknown"]:
            return "not known: " + "; ".join(texts["unknown"])
        loads = f"loads with {' '.join(texts['option'])}" if texts["option"] else "loads"
        return ", ".join((loads, *texts["note"]))


_PLACES = ("by ", "in ")
"""How texts begin that go on from "wrong"."""

_PEFT = (rules.peft_type, rules.peft_shapes)
_READ = (rules.not_a_lora, rules.covers_writers, rules.covers_modules)
_VLLM = (rules.vllm_features, rules.vllm_names, rules.vllm_rank)

SERVERS = {
    server.name: server
    for server in (
        Server("peft", "PEFT", _PEFT),
        Server(
            "vllm",
            "vLLM from 0.32 on",
            (rules.not_a_lora, rules.covers_vllm, rules.covers_modules, *_VLLM, rules.vllm_heads),
        ),
        Server(
            "vllm-0.31",
            "vLLM up to 0.31",
            (*_READ, *_VLLM, rules.vllm_no_modules_to_save, rules.vllm_ignores_alpha_pattern),
        ),
        Server(
            "sglang",
            "SGLang 0.5.23",
            (
                *_READ,
                rules.sglang_features,
                rules.sglang_ranks,
                rules.sglang_siblings,
                rules.sglang_scaling,
                rules.sglang_drops,
            ),
        ),
        Server(
            "llama.cpp",
            "llama.cpp, by its converter",
            (*_READ, rules.llama_cpp_names, rules.llama_cpp_transposed, rules.llama_cpp_scaling),
        ),
        Server(
            "ollama",
            "Ollama, by its own import",
            (
                *_READ,
                rules.ollama_alpha,
                rules.ollama_architecture,
                rules.ollama_names,
                rules.llama_cpp_scaling,
                rules.ollama_permutation,
                rules.ollama_orientation,
            ),
        ),
        Server(
            "tgi",
            "TGI and LoRAX, on one GPU",
            (
                rules.tgi_type,
                rules.covers_writers,
                rules.covers_modules,
                rules.tgi_stack,
                rules.tgi_layers,
                rules.tgi_scaling,
                rules.tgi_drops,
                rules.tgi_rank,
            ),
        ),
    )
}


def find_servers(names: str | None, option: str = "--for") -> list[Server]:
    """The servers of a comma-separated list; None: all.

    Raises:
        UserError: there is no such server.
    """
    if names is None:
        return list(SERVERS.values())
    if unknown := [name for name in names.split(",") if name not in SERVERS]:
        raise UserError(f"{option} {unknown[0]:.60}: expected {', '.join(SERVERS)}")
    return [SERVERS[name] for name in dict.fromkeys(names.split(","))]


def judge(facts: AdapterFacts, server: Server) -> Verdict:
    """Apply a server's rules."""
    return Verdict(server, tuple(finding for rule in server.rules for finding in rule(facts)))
