"""Derivations of Partial-LoRA that an earlier run, or `sparse-llm-ft derive`, has left in the cache."""

from __future__ import annotations

from functools import lru_cache

from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.planning.samples import cached_training_set
from sparse_llm_ft.scoring import Derivation
from sparse_llm_ft.scoring.cache import derivation_key, derivations_folder, hash_model, load


def known_derivation(context: RunContext, phase: Phase) -> Derivation | None:
    """The derivation at the end of `phase`, if it is in the cache under what is known without loading a weight: the
    base's files and the tokenised samples, which must be here.

    None too where its key needs values that only a run has: those of a head that is not fitted for it, of embeddings
    that are trained, or of what an earlier method has trained.
    """
    spec = phase.scoring
    if spec is None or spec.kind != "derivation":
        return None
    unknown = phase.target_plan is None and (phase.method > 0 or bool(phase.plan.trained))
    folder = derivations_folder(spec.cache_dir)
    if unknown or not folder.is_dir() or not any(folder.iterdir()):
        return None
    data = cached_training_set(context)
    if data is None:
        return None
    phase = data.with_steps(phase)
    scored, names = phase.scored, list((phase.target_plan or phase.plan).active)
    fitted = () if scored == phase.subset else data.subset(phase.subset)
    try:
        base = _hash_base(context.config.model)
    except OSError:  # no weights here: a forecast does not need them
        return None
    return load(folder, derivation_key(context.config, phase, base, names, data.subset(scored), fitted, {}))


@lru_cache(maxsize=8)
def _hash_base(model: ModelConfig) -> str:
    """`hash_model`, which reads all files of a local base; a search over settings asks for it many times."""
    return hash_model(model)
