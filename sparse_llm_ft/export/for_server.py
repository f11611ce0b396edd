"""Fits an adapter to one server: zero pairs where it needs some, and a refusal in one line where it cannot hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparse_llm_ft.errors import UserError
from sparse_llm_ft.plan import ModuleName, Shape
from sparse_llm_ft.serving.commands import GGUF_SERVERS
from sparse_llm_ft.serving.facts import PREFIX, A, AdapterFacts, B, PairShape
from sparse_llm_ft.serving.rules import missing_siblings
from sparse_llm_ft.serving.servers import SERVERS, judge


def facts_of(
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    layers: int | None = None,
    architecture: str | None = None,
) -> AdapterFacts:
    """The facts of an adapter that is not written yet; see `AdapterFacts`."""
    modules = [name.removeprefix(PREFIX).removesuffix(A) for name in weights if name.endswith(A)]
    pairs = {}
    for module in modules:
        a, b = weights[f"{PREFIX}{module}{A}"], weights[f"{PREFIX}{module}{B}"]
        pairs[module] = PairShape(a.shape[0], a.shape[1], b.shape[0])
    others = tuple(name for name in weights if not name.endswith((A, B)))
    return AdapterFacts(config, pairs, others, layers, architecture)


def fit(
    server: str,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    linear: Mapping[str, Shape],
    layers: int | None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The adapter with the zero pairs that the server needs; ΔW is unchanged.

    Args:
        config: of a uniform LoRA.
        linear: every linear module of the base -> (d_out, d_in).
        layers: number of layers of the base.

    Raises:
        UserError: the server would refuse it or compute something else.
    """
    config, weights = dict(config), dict(weights)
    for module in _needed(server, facts_of(config, weights).pairs, linear):
        d_out, d_in = linear[module]
        like = next(iter(weights.values()))
        weights[f"{PREFIX}{module}{A}"] = like.new_zeros(config["r"], d_in)
        weights[f"{PREFIX}{module}{B}"] = like.new_zeros(d_out, config["r"])
        config["target_modules"] = sorted({*config["target_modules"], module})
    check_server(server, facts_of(config, weights, layers))
    return config, weights


def check_server(server: str, facts: AdapterFacts) -> None:
    """Raise UserError, in one line, unless the server computes what PEFT does with this adapter."""
    verdict = judge(facts, SERVERS["llama.cpp" if server in GGUF_SERVERS else server])
    if not verdict.right:
        raise UserError(
            f"--for {server}: {verdict.server.label} would not compute what was trained ({verdict}); use --to merged"
        )


def _needed(server: str, pairs: Mapping[str, PairShape], linear: Mapping[str, Shape]) -> list[str]:
    """The base's modules that need a zero pair beside those of the adapter."""
    if server == "sglang":
        return [name for name in missing_siblings(pairs) if name in linear]
    if server != "tgi":
        return []
    # TGI drops a type of module that a layer lacks.
    names = [ModuleName.parse(name) for name in pairs]
    types = {(name.stack, name.rest) for name in names if name.number is not None}
    parsed = {name: ModuleName.parse(name) for name in linear}
    return [n for n, part in parsed.items() if (part.stack, part.rest) in types and n not in pairs]
