"""What is trained beside adapters: heads, modules that a setting names, and rows of embeddings for new tokens."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_llm_ft.adapters import base_options, tuner_of
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.linear import linear_shape
from sparse_llm_ft.model.loading import head_modules
from sparse_llm_ft.model.resizing import new_rows
from sparse_llm_ft.plan import FULL_MODEL, AdapterPlan, IndexMask


def modules_to_save(config: RunConfig, empty: PreTrainedModel) -> tuple[str, ...]:
    """The modules that are trained whole, in the model's order: task heads and ``adapter.modules_to_save``.

    Raises:
        ConfigError: a name matches no module, one without weights, a shared weight, or a 4-bit one.
    """
    setting, heads = "adapter.modules_to_save", head_modules(empty)
    names = [name for name, _ in empty.named_modules() if name]
    found: set[str] = set(heads)
    for ending in config.adapter.modules_to_save:
        matches = [name for name in names if name == ending or name.endswith(f".{ending}")]
        if not matches or not all(any(True for _ in empty.get_submodule(name).parameters()) for name in matches):
            raise ConfigError(setting, f"{ending!r} matches no module with weights", f"found: {_examples(empty)}")
        found.update(matches)
    own = {name for name, _ in empty.named_parameters()}
    head = empty.get_output_embeddings()
    for name in sorted(found):
        module = empty.get_submodule(name)
        for part, _ in module.named_parameters():
            if f"{name}.{part}" not in own:
                raise ConfigError(
                    setting,
                    f"{name} shares its weight with {_name_of(empty, empty.get_input_embeddings())}",
                    "expected that one alone: it trains both",
                )
        quantized = config.model.quantization != "none" and name not in heads and module is not head
        if quantized and any(linear_shape(part) is not None for part in module.modules()):
            raise ConfigError(
                setting,
                f"{name}, which is in 4 bit under model.quantization {config.model.quantization}",
                "expected embeddings, norms or the output head",
            )
    return tuple(name for name in names if name in found)


def token_rows(
    config: RunConfig, empty: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: Collection[str]
) -> dict[str, IndexMask]:
    """The rows that ``adapter.trainable_tokens`` trains: of the embeddings, and of an output head with weights of its
    own, without which no model would write a new token. Module name -> rows.

    Args:
        trained: modules that are trained whole.

    Raises:
        ConfigError: a token is not in the vocabulary or has no row, or its module is trained whole anyway.
    """
    setting = "adapter.trainable_tokens"
    if not config.adapter.trainable_tokens:
        return {}
    embeddings, head = empty.get_input_embeddings(), empty.get_output_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise ConfigError(setting, "the model has no table of embeddings", "expected adapter.modules_to_save")
    vocabulary, found = tokenizer.get_vocab(), set()
    for token in config.adapter.trainable_tokens:
        number = vocabulary.get(token) if isinstance(token, str) else token
        if number is None:
            raise ConfigError(
                setting,
                f"{token!r} is no token of the vocabulary",
                "expected tokens, written as the tokenizer has them",
            )
        if not 0 <= number < embeddings.num_embeddings:
            raise ConfigError(
                setting,
                f"{token!r} is number {number}, and the model has embeddings for {embeddings.num_embeddings} tokens",
                "set model.resize_embeddings: true, or choose a model that was resized with its tokenizer",
            )
        found.add(number)
    tables = [embeddings]
    if isinstance(head, nn.Linear) and head.weight is not embeddings.weight:
        tables.append(head)  # type: ignore[arg-type]
        if head.bias is not None:
            raise ConfigError(setting, "the model's head has a bias, which PEFT drops", "expected modules_to_save")
    rows = {_name_of(empty, table): IndexMask(table.weight.shape[0], tuple(sorted(found))) for table in tables}
    for name in rows:
        if name in trained:
            raise ConfigError(setting, f"{name} is trained whole by adapter.modules_to_save", "expected one of the two")
    return rows


def check_trained(config: RunConfig, plan: AdapterPlan, empty: PreTrainedModel) -> None:
    """Refuse settings of this file that the run's first plan cannot follow.

    Raises:
        ConfigError: the whole model is trained anyway, or PEFT's form of the tuner cannot hold what is trained.
    """
    adapter, tuner = config.adapter, tuner_of(plan)
    if config.training.head_learning_rate is not None and (FULL_MODEL in plan.trained or not plan.trained):
        why = "the whole model is trained" if plan.trained else "nothing is trained whole beside the adapters"
        raise ConfigError(
            "training.head_learning_rate", f"has no effect where {why}", "expected training.learning_rate alone"
        )
    setting = "adapter.modules_to_save" if adapter.modules_to_save else "adapter.trainable_tokens"
    if FULL_MODEL in plan.trained:
        if adapter.modules_to_save or adapter.trainable_tokens:
            raise ConfigError(setting, "has no effect where the whole model is trained", "expected to leave it out")
        return
    if tuner.takes_rows:
        return
    if plan.rows:
        raise ConfigError(
            "adapter.trainable_tokens",
            f"tuner {tuner.name} has no such rows in PEFT",
            "expected adapter.modules_to_save, or another method",
        )
    if base_options(empty, plan).repeated:
        raise ConfigError(
            setting,
            f"embeddings whose weight the output head shares, which PEFT does not tie under tuner {tuner.name}",
            "expected another method",
        )


def remark_on_new_rows(plan: AdapterPlan, empty: PreTrainedModel) -> list[str]:
    """A log line about rows that ``model.resize_embeddings`` has added, and whether the plan trains them."""
    added = new_rows(empty)
    if not added:
        return []
    name = _name_of(empty, empty.get_input_embeddings())
    trained = set(plan.rows[name].indices) if name in plan.rows else {*added} if covers(plan.trained, name) else set()
    line = f"model.resize_embeddings: {len(added)} rows are new in {name}, {added[0]} to {added[-1]}"
    left = [row for row in added if row not in trained]
    fix = "; adapter.trainable_tokens or adapter.modules_to_save would"
    return [line + (f"; nothing trains {len(left)} of them{fix}" if left else "")]


def covers(trained: Collection[str], name: str) -> bool:
    """Whether modules that are trained whole hold the module `name`."""
    return any(module == FULL_MODEL or name == module or name.startswith(f"{module}.") for module in trained)


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def _examples(model: PreTrainedModel) -> str:
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return ", ".join(_name_of(model, module) for module in found if module is not None)
