"""What a run is made of besides data, methods and weights: known from the architecture, before anything slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_llm_ft.adapters import find_targets
from sparse_llm_ft.config import RunConfig
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.evaluation import Objective, check_packing, make_objective
from sparse_llm_ft.fitting import Expected
from sparse_llm_ft.methods import make_methods
from sparse_llm_ft.modeling import empty_model, find_model_use, head_modules, load_tokenizer
from sparse_llm_ft.modes import Use
from sparse_llm_ft.plan import AdapterPlan, Shape, uniform_plan
from sparse_llm_ft.training.display import Display
from sparse_llm_ft.training.prepare import Prepared


@dataclass(frozen=True)
class Setup:
    """Model architecture, tokenizer and objective of a run.

    Attributes:
        empty: the base on the meta device.
        task: the registry's, with the config's settings in place.
        use: how the model learns it.
        targets: every target module, in the model's order: name -> (out_features, in_features).
        plan: the uniform plan over them, which the methods start from.
        methods: how many methods follow each other.
    """

    empty: PreTrainedModel
    task: Task
    use: Use
    targets: dict[str, Shape]
    plan: AdapterPlan
    methods: int
    tokenizer: PreTrainedTokenizerBase
    objective: Objective[Any]

    @property
    def expected(self) -> Expected:
        """What a checkpoint of this run must fit."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.empty.named_parameters()}
        return Expected(self.targets, shapes, self.methods)

    @classmethod
    def of(cls, prepared: Prepared) -> Setup:
        """All of it.

        Raises:
            ConfigError: what the architecture shows to be wrong.
        """
        config, adapter = prepared.config, prepared.config.adapter
        if config.model.trust_remote_code:
            Display(prepared.world.rank).say(
                f"model.trust_remote_code is set: code that {config.model.name} brings along, at revision "
                f"{config.model.revision or 'main'}, runs in this process"
            )
        use = find_model_use(config.model, prepared.task, config.task.mode)
        empty = empty_model(config.model, config.model.attn_implementation, use)
        heads = head_modules(empty)
        found = find_targets(empty, adapter.target_modules)
        # A fresh pooler is trained whole, and gets no adapter beside that.
        targets = {n: shape for n, shape in found.items() if not any(n == h or n.startswith(f"{h}.") for h in heads)}
        plan = uniform_plan(targets, adapter.r, adapter.lora_alpha, adapter.lora_dropout, heads)
        if config.training.max_steps is not None:  # else the data say how long the run is, and `Course` checks it then
            make_methods(config, config.training.max_steps).first(plan, targets)
        check_lengths(config, use, empty)
        tokenizer = load_tokenizer(config.model, use)
        if config.task.packing:
            check_packing(empty)
        return cls(
            empty,
            prepared.task,
            use,
            targets,
            plan,
            len(config.method),
            tokenizer,
            make_objective(empty, tokenizer, prepared.task),
        )


def check_lengths(config: RunConfig, use: Use, model: PreTrainedModel) -> None:
    """Refuse samples, and texts that are written behind prompts, that a model has no positions for.

    A head's texts are cut to what their tokenizer says the model can take.

    Raises:
        ConfigError: naming the setting.
    """
    if config.task.streaming and use.mode == "question_answering":
        raise ConfigError("task.streaming", "true, and a context has several windows", "expected false")
    settings = model.config.get_text_config()
    relative = hasattr(settings, "relative_attention_num_buckets")  # T5: any distance will do
    limit = getattr(settings, "max_position_embeddings", None) or getattr(settings, "n_positions", None)
    if use.has_head or relative or not isinstance(limit, int):
        return
    if config.task.max_length > limit:
        raise ConfigError(
            "task.max_length",
            f"{config.task.max_length}, and {config.model.name!r} has {limit} positions",
            f"expected at most {limit}",
        )
    if getattr(settings, "rope_parameters", None):
        return  # beyond its positions a rotary model computes on, and the text behind a prompt may be a little longer
    written = config.evaluation.max_new_tokens + (0 if use.mode == "seq2seq_lm" else config.task.max_length)
    if config.evaluation.samples and written > limit + 1:  # of the last token no position is asked
        raise ConfigError(
            "evaluation.max_new_tokens",
            f"{config.evaluation.max_new_tokens} behind prompts of up to task.max_length {config.task.max_length}, and "
            f"{config.model.name!r} has {limit} positions",
            "expected less of one of them",
        )
