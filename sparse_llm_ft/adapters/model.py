"""The tuner: puts a plan's adapters on a model, and a later plan's in place of them."""

from __future__ import annotations

import copy
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

    def _pre_injection_hook(self, model: nn.Module, config: SparseLoraConfig, adapter_name: str) -> None:
        # Ours is completed with this model's plan; the caller's may serve for another model.
        self.peft_config[adapter_name] = copy.copy(config)

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

        A disconnected module is its base layer again, without wrapper; a rebuilt adapter has fresh weights, in the
        type of the adapters there were. Which adapters are active, and training or evaluation mode, stay.

        Raises:
            PlanError: the plan names a module the model lacks, or a rank that does not fit.
            ValueError: adapters are merged; their base weights cannot be had back exactly.
        """
        check_plan(self.model, plan)
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, SparseLoraLayer)}
        if any(layer.merged for layer in layers.values()):
            raise ValueError("set_plan: adapters are merged; call unmerge_adapter() first")
        active, config = plan.active, self.peft_config[adapter_name]
        dropout_stays = _plan(config).lora_dropout == plan.lora_dropout
        dtype = next(
            layer.lora_A[adapter_name].weight.dtype for layer in layers.values() if adapter_name in layer.adapters
        )
        for name, layer in layers.items():
            if adapter_name in layer.adapters and name not in active:
                layer.delete_adapter(adapter_name)
                if not layer.adapters:
                    self._put(name, layer.base_layer)
        for name, adapter in active.items():
            module = self.model.get_submodule(name)
            if isinstance(module, SparseLoraLayer):
                if dropout_stays and module.adapters.get(adapter_name) == adapter:
                    continue
                module.update_layer(adapter_name, adapter, plan.lora_dropout)
            else:
                module = SparseLoraLayer(module, adapter_name, adapter, plan.lora_dropout)
                self._put(name, module)
            module.cast_adapter(adapter_name, dtype)
            module.train(self.training)
        config.plan, config.target_modules = plan, sorted(active)
        everywhere = {name for other in self.peft_config.values() for name in _plan(other).active}
        self.targeted_module_names = [name for name in layers.keys() | active.keys() if name in everywhere]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


def _plan(config: SparseLoraConfig) -> AdapterPlan:
    assert isinstance(config.plan, AdapterPlan), "the plan is made in _prepare_model"
    return config.plan
