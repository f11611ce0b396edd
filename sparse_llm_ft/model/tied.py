"""Weights that a model's config ties, and that its checkpoint has twice, with different values."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel

from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.plan import FULL_MODEL


def refuse_untied(model: PreTrainedModel, trained: Collection[str], name: str) -> None:
    """Refuse to train a table that the config ties to another one, while the loaded model has two.

    transformers loads both tables of such a checkpoint and ties nothing. Adapters on other modules work as ever. But
    the names and shapes of what is trained whole come from the config, by which there is one table: a checkpoint of the
    run would not be readable, and an adapter would put the one trained table in place of both.

    Args:
        model: loaded, on any device; its weights may be sharded.
        trained: modules that are trained whole (`AdapterPlan.trained`).
        name: ``model.name``, for messages.

    Raises:
        ConfigError: naming the two.
    """
    for pair in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        one, other = (model.get_parameter_or_buffer(weight) for weight in pair)
        modules = {weight.rpartition(".")[0] for weight in pair}
        if one is not other and (FULL_MODEL in trained or modules & {*trained}):
            raise ConfigError(
                "model.name",
                f"{name!r} has tie_word_embeddings in its config.json, but {pair[1]} and {pair[0]} differ",
                "expected tie_word_embeddings: false there, or a run that trains neither",
            )
