"""The tuner: puts a plan's adapters on a model, and a later plan's in place of them."""

from __future__ import annotations

from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from sparse_llm_ft.adapters.config import SparseLoraConfig
from sparse_llm_ft.adapters.layer import SparseLoraLayer
from sparse_llm_ft.adapters.targets import check_plan, find_targets
from sparse_llm_ft.plan import AdapterPlan, uniform_plan


class SparseLoraModel(BaseTuner):
    """PEFT tuner driven by an `AdapterPlan`. A module without adapter in the plan is the untouched base layer."""

    prefix = "lora_"
    tuner_layer_cls = SparseLoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_model(self, peft_config: SparseLoraConfig, model: nn.Module) -> None:
        """Complete the config's plan and check it against the model, before anything is changed."""
        if peft_config.plan is None:
            targets = find_targets(model, peft_config.target_modules or "all-linear")
            peft_config.plan = uniform_plan(
                targets, peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout, peft_config.train_omega
            )
        else:
            check_plan(model, _plan(peft_config))
        # PEFT wants target modules to be there; the plan decides (see _check_target_module_exists).
        peft_config.target_modules = sorted(_plan(peft_config).active)

    @staticmethod
    def _check_target_module_exists(peft_config: SparseLoraConfig, key: str) -> bool:
        return key in _plan(peft_config).active

    def _create_and_replace(
        self,
        peft_config: SparseLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **optional_kwargs: Any,
    ) -> None:
        plan = _plan(peft_config)
        adapter = plan.active[current_key]
        if isinstance(target, SparseLoraLayer):
            target.update_layer(adapter_name, adapter, plan.lora_dropout, peft_config.inference_mode)
            return
        layer = SparseLoraLayer(target, adapter_name, adapter, plan.lora_dropout)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is activated
        self._replace_module(parent, target_name, layer, target)

    def set_plan(self, plan: AdapterPlan, adapter_name: str = "default") -> None:
        """Change the model to `plan`: disconnect the adapters it lacks, build those that differ anew, leave the rest.

        A disconnected module is its base layer again, without wrapper; a rebuilt adapter has fresh weights.

        Raises:
            PlanError: the plan names a module the model lacks, or a rank that does not fit.
        """
        check_plan(self.model, plan)
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, SparseLoraLayer) or adapter_name not in module.adapters:
                continue
            if name not in plan.active:
                module.delete_adapter(adapter_name)
                if not module.adapters:
                    parent, _, child = name.rpartition(".")
                    setattr(self.model.get_submodule(parent), child, module.base_layer)
        for name, adapter in plan.active.items():
            module = self.model.get_submodule(name)
            if isinstance(module, SparseLoraLayer) and module.adapters.get(adapter_name) == adapter:
                continue
            parent, _, child = name.rpartition(".")
            config = SparseLoraConfig(plan=plan)
            self._create_and_replace(config, adapter_name, module, child, self.model.get_submodule(parent), name)
        config = self.peft_config[adapter_name]
        config.plan = plan
        config.target_modules = sorted(plan.active)
        self.targeted_module_names = list(plan.active)


def _plan(config: SparseLoraConfig) -> AdapterPlan:
    assert isinstance(config.plan, AdapterPlan), "the plan is made in _prepare_model"
    return config.plan
