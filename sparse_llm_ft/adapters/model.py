"""The tuner: puts a plan's adapters on a model, and later replaces them by another plan's."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from sparse_llm_ft.adapters.config import SparseLoraConfig
from sparse_llm_ft.adapters.layer import SparseLoraLayer
from sparse_llm_ft.adapters.parts import Pair
from sparse_llm_ft.adapters.targets import check_plan, find_targets
from sparse_llm_ft.adapters.tuners import SPARSE_LORA
from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.model.buffers import fixed_parameters
from sparse_llm_ft.model.linear import LinearLayer, refuse_shared_weights, sides
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, PlanError, uniform_plan, with_omega

Linear = LinearLayer | SparseLoraLayer


class SparseLoraModel(BaseTuner):
    """PEFT tuner driven by an `AdapterPlan`. A module without an adapter in the plan stays the base layer."""

    prefix = "lora_"
    tuner_layer_cls = SparseLoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _pre_injection_hook(self, model: nn.Module, config: SparseLoraConfig, adapter_name: str) -> None:
        # A copy, completed with this model's plan: the caller may use the original for another model.
        self.peft_config[adapter_name] = copy.copy(config)

    def _prepare_model(self, peft_config: SparseLoraConfig, model: nn.Module) -> None:
        """Complete the config's plan and check that it fits the model, before anything changes."""
        if peft_config.plan is None:
            if peft_config.r < 1:
                raise ValueError(f"SparseLoraConfig.r: {peft_config.r} is not allowed; expected 1 or more")
            try:
                targets = find_targets(model, peft_config.target_modules or "all-linear")
            except ConfigError as error:  # PEFT's callers expect what its own tuners raise
                raise ValueError(str(error)) from error
            peft_config.plan = uniform_plan(targets, peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout)
            if peft_config.train_omega:
                peft_config.plan = with_omega(peft_config.plan)
        else:
            plan = _plan(peft_config)
            if plan.tuner != SPARSE_LORA:  # other tuners have ranks larger than a matrix
                raise PlanError(f"the plan is for tuner {plan.tuner}; expected {SPARSE_LORA}")
            check_plan(model, plan)
        # PEFT requires target modules; the plan decides (see _check_target_module_exists).
        peft_config.target_modules = sorted(_plan(peft_config).active) or DUMMY_TARGET_MODULES

    def _post_injection_hook(self, model: nn.Module, config: SparseLoraConfig, adapter_name: str) -> None:
        if not config.inference_mode:
            train_whole(model, _plan(self.peft_config[adapter_name]))

    @staticmethod
    def _check_target_module_exists(peft_config: SparseLoraConfig, key: str) -> bool:
        return key in _plan(peft_config).active

    def _create_and_replace(
        self,
        peft_config: SparseLoraConfig,
        adapter_name: str,
        target: Linear,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **optional_kwargs: object,
    ) -> None:
        plan = _plan(peft_config)
        adapter = plan.built(plan.active[current_key])
        shared, owns = self._shared_pair(adapter_name, plan, current_key, adapter, target)
        if isinstance(target, SparseLoraLayer):
            target.update_layer(adapter_name, adapter, plan.lora_dropout, peft_config.inference_mode, shared, owns)
            return
        layer = SparseLoraLayer(target, adapter_name, adapter, plan.lora_dropout, shared, owns)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a second adapter is not trained before it is activated
        self._replace_module(parent, target_name, layer, target)

    def _shared_pair(
        self, adapter_name: str, plan: AdapterPlan, name: str, adapter: ModuleAdapter, target: Linear
    ) -> tuple[Pair | None, bool]:
        """The pair of the module's group, None without a group; and whether the module is the group's first.

        The first module that is built makes the pair, which need not be the one that registers it.

        Args:
            adapter: the module's, as its layer is built.
        """
        if adapter.group is None:
            return None, False
        members = plan.groups[adapter.group]
        built = (self.model.get_submodule(member) for member in members)
        pair = next(
            (
                layer._shared[adapter_name]
                for layer in built
                if isinstance(layer, SparseLoraLayer) and adapter_name in layer._shared
            ),
            None,
        )
        if pair is None:
            base: LinearLayer = target.base_layer if isinstance(target, SparseLoraLayer) else target
            pair = Pair(*sides(base), adapter)
            if not next(pair.parameters()).is_meta:  # low_cpu_mem_usage: the values come with the checkpoint
                pair.to(base.weight.device)
        return pair, name == members[0]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SparseLoraConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The adapters, each shared pair once, and fully trained modules."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        whole = tuple(f"base_model.model.{name}." for name in _plan(config).trained)
        return found | {key: value for key, value in state_dict.items() if key.startswith(whole)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SparseLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As in PEFT. Release 0.1 saved a group's pair as ``base_model.lora_shared.<group>.lora_A.weight``."""
        plan, renamed = _plan(config), {}
        for group, members in plan.groups.items():
            for part in ("lora_A", "lora_B"):
                renamed[f"base_model.lora_shared.{group}.{part}.weight"] = (
                    f"base_model.model.{members[0]}.{part}.weight"
                )
        state_dict = {renamed.get(key, key): value for key, value in state_dict.items()}
        found: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return found

    def _enable_peft_forward_hooks(self, *args: object, **kwargs: object) -> AbstractContextManager[None]:
        """Refuse PEFT's choice of an adapter for each row of a batch, which would be ignored."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: one adapter for each row is not supported; expected None, and set_adapter")
        return nullcontext()

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, SparseLoraLayer)}
        refuse_shared_weights(self.model, layers)

    def set_plan(self, plan: AdapterPlan, adapter_name: str = "default", fresh: bool = False) -> None:
        """Change the model to `plan`: remove the adapters that it lacks, rebuild those that differ, keep the rest.

        A module without an adapter becomes its base layer again, without a wrapper. A rebuilt adapter has fresh
        weights in the type of the adapters before. Active adapters and training or evaluation mode stay.

        Args:
            fresh: rebuild all adapters.

        Raises:
            PlanError: the plan names a module that the model lacks, or a rank that does not fit.
            ValueError: adapters are merged; the base weights cannot be restored exactly.
        """
        check_plan(self.model, plan)
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, SparseLoraLayer)}
        if any(layer.merged for layer in layers.values()):
            raise ValueError("set_plan: adapters are merged; call unmerge_adapter() first")
        active, config = plan.layers, self.peft_config[adapter_name]
        same_groups = _plan(config).groups == plan.groups
        stays = not fresh and same_groups and _plan(config).lora_dropout == plan.lora_dropout
        dtype = self._adapter_dtype(adapter_name)
        for name, layer in layers.items():
            if not (stays and _same_pair(layer.adapters.get(adapter_name), active.get(name))):
                layer.drop_shared(adapter_name)
        # Remove the adapters that the plan lacks.
        for name, layer in layers.items():
            if adapter_name in layer.adapters and name not in active:
                layer.delete_adapter(adapter_name)
                if not layer.adapters:
                    self._put(name, layer.base_layer)
        # Build those that differ.
        for name, adapter in active.items():
            module = self.model.get_submodule(name)
            if isinstance(module, SparseLoraLayer):
                if stays and module.adapters.get(adapter_name) == adapter:
                    continue
                shared, owns = self._shared_pair(adapter_name, plan, name, adapter, module)
                module.update_layer(adapter_name, adapter, plan.lora_dropout, shared=shared, owns_shared=owns)
            else:
                shared, owns = self._shared_pair(adapter_name, plan, name, adapter, module)
                module = SparseLoraLayer(module, adapter_name, adapter, plan.lora_dropout, shared, owns)
                self._put(name, module)
            module.cast_adapter(adapter_name, dtype)
            module.train(self.training)
        # Update fully trained modules, the configuration and PEFT's list of targets.
        for whole in set(_plan(config).trained) - set(plan.trained):
            self.model.get_submodule(whole).requires_grad_(False)
        config.plan, config.target_modules = plan, sorted(active) or DUMMY_TARGET_MODULES
        everywhere = {name for other in self.peft_config.values() for name in _plan(other).active}
        self.targeted_module_names = [name for name in dict.fromkeys((*layers, *active)) if name in everywhere]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        train_whole(self.model, plan)

    def _adapter_dtype(self, adapter_name: str) -> torch.dtype:
        """The type of the present adapters, or else of other trained parameters."""
        for layer in self.model.modules():
            if isinstance(layer, SparseLoraLayer) and adapter_name in layer.adapters:
                return layer.pair(adapter_name)[0].weight.dtype
        return next(p.dtype for p in self.model.parameters() if p.requires_grad)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


def _same_pair(before: ModuleAdapter | None, after: ModuleAdapter | None) -> bool:
    """Whether a module's shared A and B can stay: its group is the same, and omega, u and v are the module's own."""
    if before is None or after is None:
        return False
    own = replace(before, omega=after.omega, train_omega=after.train_omega, train_vectors=after.train_vectors)
    return own == after


def train_whole(model: nn.Module, plan: AdapterPlan) -> None:
    """Let the plan's fully trained modules require gradients, without parameters that are never trained."""
    fixed = fixed_parameters(model)
    for module in plan.trained:
        for name, parameter in model.get_submodule(module).named_parameters(prefix=module):
            parameter.requires_grad_(name not in fixed)


def _plan(config: SparseLoraConfig) -> AdapterPlan:
    assert isinstance(config.plan, AdapterPlan), "the plan is made in _prepare_model"
    return config.plan
