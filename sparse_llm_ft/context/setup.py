"""What a run is made of besides data, methods and weights: known from the architecture, before anything slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_llm_ft.adapters import find_targets
from sparse_llm_ft.checkpoint.validation import Expected
from sparse_llm_ft.context.preflight import Prepared
from sparse_llm_ft.data.tasks import Task
from sparse_llm_ft.io.console import Console
from sparse_llm_ft.methods.chain import build_methods
from sparse_llm_ft.model.architecture import TaskMode
from sparse_llm_ft.model.limits import check_lengths, tokenizer_for
from sparse_llm_ft.model.loading import empty_model, find_model_task_mode, head_modules
from sparse_llm_ft.objectives.base import Objective
from sparse_llm_ft.objectives.build import build_objective, check_packing
from sparse_llm_ft.plan import AdapterPlan, Shape, uniform_plan


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
    task_mode: TaskMode
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
            Console(prepared.world.rank).log(
                f"model.trust_remote_code is set: code that {config.model.name} brings along, at revision "
                f"{config.model.revision or 'main'}, runs in this process"
            )
        task_mode = find_model_task_mode(config.model, prepared.task, config.task.mode)
        empty = empty_model(config.model, config.model.attn_implementation, task_mode)
        heads = head_modules(empty)
        found = find_targets(empty, adapter.target_modules)
        # A fresh pooler is trained whole, and gets no adapter beside that.
        targets = {n: shape for n, shape in found.items() if not any(n == h or n.startswith(f"{h}.") for h in heads)}
        plan = uniform_plan(targets, adapter.r, adapter.lora_alpha, adapter.lora_dropout, heads)
        if config.training.max_steps is not None:  # else the data say how long the run is, and `Course` checks it then
            build_methods(config, config.training.max_steps).first(plan, targets)
        check_lengths(config, prepared.task, task_mode, empty)
        tokenizer = tokenizer_for(config.model, task_mode, empty)
        if config.task.packing:
            check_packing(empty)
        return cls(
            empty,
            prepared.task,
            task_mode,
            targets,
            plan,
            len(config.method),
            tokenizer,
            build_objective(empty, tokenizer, prepared.task),
        )
