"""What a run is made of besides data and weights: known from the architecture alone, before anything slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_llm_ft.adapters import find_targets
from sparse_llm_ft.evaluation import Objective, make_objective
from sparse_llm_ft.fitting import Expected
from sparse_llm_ft.methods import Chain, make_methods
from sparse_llm_ft.modeling import empty_model, head_modules, load_tokenizer
from sparse_llm_ft.plan import AdapterPlan, Shape, uniform_plan
from sparse_llm_ft.training.display import Display
from sparse_llm_ft.training.prepare import Prepared


@dataclass(frozen=True)
class Setup:
    """Model architecture, tokenizer, objective and methods of a run.

    Attributes:
        empty: the base on the meta device.
        labels: how many the task has; None where it is no classification.
        targets: every target module, in the model's order: name -> (out_features, in_features).
        plan: the uniform plan over them, which the methods start from.
    """

    empty: PreTrainedModel
    labels: int | None
    targets: dict[str, Shape]
    plan: AdapterPlan
    methods: Chain
    tokenizer: PreTrainedTokenizerBase
    objective: Objective[Any]

    @property
    def expected(self) -> Expected:
        """What a checkpoint of this run must fit."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.empty.named_parameters()}
        return Expected(self.targets, shapes, len(self.methods.methods))

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
        labels = prepared.task.classes
        empty = empty_model(config.model, config.model.attn_implementation, labels)
        heads = head_modules(empty)
        found = find_targets(empty, adapter.target_modules)
        # A fresh pooler is trained whole, and gets no adapter beside that.
        targets = {n: shape for n, shape in found.items() if not any(n == h or n.startswith(f"{h}.") for h in heads)}
        plan = uniform_plan(targets, adapter.r, adapter.lora_alpha, adapter.lora_dropout, heads)
        tokenizer = load_tokenizer(config.model, labels)
        return cls(
            empty,
            labels,
            targets,
            plan,
            make_methods(config, prepared.schedule.total_steps),
            tokenizer,
            make_objective(empty, tokenizer, prepared.task),
        )
