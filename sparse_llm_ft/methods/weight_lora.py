"""WeightLoRA (Veprikov et al.): train and cut omega, disconnect adapters with omega 0, continue with the others.

phase "select":  h_i x = W_i x + omega_i (alpha / r) B_i A_i x, omega trained and cut to the K largest (eq. 3-4)
phase "train":   the survivors with a fixed omega, the others gone (WeightLoRA+ grows their ranks, eq. 5)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, StrictInt

from sparse_llm_ft.config.budget import GivenBudget
from sparse_llm_ft.config.method_settings import MethodSettings
from sparse_llm_ft.config.types import Float
from sparse_llm_ft.errors import ConfigError, TrainingError
from sparse_llm_ft.methods.cost_choice import Allowed, Memory, allowed
from sparse_llm_ft.methods.method import Method
from sparse_llm_ft.phase import CutRule, Phase
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, Shape, is_matrix, with_omega

if TYPE_CHECKING:
    from sparse_llm_ft.checkpoint.state import TrainState
    from sparse_llm_ft.scoring.scores import Scores


class WeightLoraSettings(MethodSettings):
    """WeightLoRA (section 3.3).

    Attributes:
        keep: K, how many adapters stay.
        steps: T, optimizer steps with trained omega; then the others are disconnected.
        cut_every: optimizer steps between two cuts (the paper cuts after each step).
        cut_after: optimizer steps before the first cut. A cut adapter hardly ever comes back, so these steps decide
            which adapters are kept.
        omega_lr, omega_optimizer: learning rate, which ignores `training.schedule`, and optimizer of omega.
        choose: ``omega`` keeps the largest; ``cost`` the largest of those that `budget` allows (ours); ``random`` is
            the paper's ablation RLoRA.
        budget: of ``cost``: what the survivors' phase may need (cost_choice.py); a number is a `Budget.step_time`.
        batch_growth: how the batch uses the freed memory. ``keep_global``: larger micro-batch, fewer accumulation
            steps, the same updates. ``grow_global``: larger micro-batch and global batch. Left out, it is
            ``keep_global``, or ``none`` for a model whose memory cannot be planned.
        lr_scaling: how the learning rate follows a grown global batch.
    """

    composes = "weighs"

    keep: StrictInt = Field(ge=1)
    steps: StrictInt = Field(ge=1)
    cut_every: StrictInt = Field(1, ge=1)
    cut_after: StrictInt = Field(0, ge=0)
    omega_lr: Float = Field(0.1, gt=0)
    omega_optimizer: Literal["sgd", "adamw"] = "sgd"
    choose: Literal["omega", "random", "cost"] = "omega"
    budget: GivenBudget = None
    batch_growth: Literal["none", "keep_global", "grow_global"] = "keep_global"
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"

    @classmethod
    def example(cls, adapters: int, total_steps: int) -> dict[str, object]:
        """A tenth of the adapters, after a tenth of the steps."""
        return {"keep": max(1, adapters // 10), "steps": max(2, total_steps // 10)}

    @property
    def grows_batch(self) -> bool:
        """Whether the survivors' phase may get a larger micro-batch."""
        return self.batch_growth != "none"

    @property
    def memory_budget(self) -> int | None:
        """Of `budget`."""
        return None if self.budget is None else self.budget.memory

    @property
    def open_keys(self) -> frozenset[str]:
        """Batch growth, if it is on by default alone."""
        return frozenset({"batch_growth"}) - self.model_fields_set

    def without_growth(self) -> Self:
        """The survivors keep the micro-batch."""
        return self.model_copy(update={"batch_growth": "none"})

    def remarks(self, epoch_steps: int) -> list[str]:
        """Warn of a T beyond one epoch."""
        if self.steps <= epoch_steps:
            return []
        return [
            f"method.steps is {self.steps}, more than the {epoch_steps} steps of one epoch; the paper trains omega for "
            "at most one (section 3.3)"
        ]

    def check(self, total_steps: int | None) -> None:
        """Refuse a first cut after T, a T before omega moves or after the run's end, `cost` without a budget, and
        settings without effect.
        """
        if self.cut_after >= self.steps:
            raise ConfigError(
                "method.cut_after",
                f"{self.cut_after} leaves no cut before step {self.steps}",
                "expected less than method.steps",
            )
        if self.steps == 1 and self.choose != "random":
            raise ConfigError(
                "method.steps",
                "1, and no omega has a gradient in the first step, in which every B is 0",
                "expected 2 or more",
            )
        if (self.choose == "cost") != (self.budget is not None):
            known = "left out" if self.budget is None else str(self.budget)
            right = "a share such as 0.7" if self.budget is None else "choose: cost, or no budget"
            raise ConfigError("method.budget", f"{known}, and method.choose is {self.choose}", f"expected {right}")
        if self.memory_budget is not None and self.batch_growth == "grow_global":
            raise ConfigError(
                "method.batch_growth",
                "grow_global, and method.budget limits memory, into which the micro-batch alone may grow",
                "expected keep_global or none",
            )
        if self.lr_scaling != "none" and self.batch_growth != "grow_global":
            raise ConfigError(
                "method.lr_scaling",
                f"{self.lr_scaling!r} has no effect under batch_growth {self.batch_growth}",
                "expected none, or batch_growth: grow_global",
            )
        if total_steps is not None and self.steps >= total_steps:
            raise ConfigError(
                "method.steps",
                f"{self.steps} is not before the run's end at step {total_steps}",
                f"expected 1 to {total_steps - 1}, or more training.max_steps or epochs",
            )


class WeightLora(Method[WeightLoraSettings]):
    """Select adapters by omega, then train the survivors."""

    settings_class: ClassVar[type[MethodSettings]] = WeightLoraSettings

    def begin(self, phase: Phase, state: TrainState, targets: Mapping[str, Shape]) -> tuple[Phase, TrainState]:
        """All adapters, each with a trained omega that starts at 1."""
        settings, n = self.settings, len(phase.plan.active)
        if settings.keep > n:
            raise ConfigError(
                "method.keep",
                f"{settings.keep} is more than the {n} adapters that adapter.target_modules gives",
                f"expected 1 to {n}",
            )
        cut = CutRule(
            settings.keep,
            settings.steps,
            settings.cut_every,
            settings.cut_after,
            "random" if settings.choose == "random" else "omega",
            self.inputs.seed,
            0 if (reach := self._allowed(phase.plan, targets)) is None else reach.first,
        )
        select = replace(
            phase,
            name="select",
            plan=with_omega(phase.plan),
            steps=settings.steps,
            cut=cut,
            omega_lr=settings.omega_lr,
            omega_algorithm=settings.omega_optimizer,
        )
        return select, state

    def next(
        self, phase: Phase, state: TrainState, scores: Scores, targets: Mapping[str, Shape]
    ) -> tuple[Phase, TrainState] | None:
        """The survivors with a fixed omega; adapters with omega <= 0 are disconnected."""
        if phase.cut is None:
            return None
        if phase.cut.choose == "omega" and state.callback is not None and not state.callback["moved"]:
            raise TrainingError(
                f"no omega has moved in method.steps {phase.cut.steps}, so none is larger than another; "
                "raise method.omega_lr"
            )
        budget = sum(a.matrices(targets[name]) for name, a in phase.plan.active.items())
        plan = _disconnect(phase.plan, state)
        plan, state = self.grown(plan, _only(plan, state), targets, budget)
        return self._after(phase, plan), state

    def foresee(self, phase: Phase, targets: Mapping[str, Shape]) -> tuple[Phase, str] | None:
        """K survivors where they need most: the first adapter that may stay, and the largest of the others."""
        cut = phase.cut
        if cut is None:
            return None
        active = phase.plan.active
        may_stay = list(active)[cut.first :]
        plan = self._survivors(phase.plan, may_stay, targets)
        lowest = self.inputs.cost and self.inputs.cost.layer(self.inputs.cost.lowest(may_stay[:1]))
        return self._after(phase, plan), (
            f"{len(plan.active)} of {len(active)} adapters survive, the first of them in {lowest or may_stay[0]}, the "
            "others among the largest"
        )

    def _survivors(self, plan: AdapterPlan, may_stay: Sequence[str], targets: Mapping[str, Shape]) -> AdapterPlan:
        """The K survivors that need most: the first of those that may stay, and the largest of the others."""
        active = plan.active
        budget = sum(a.matrices(targets[name]) for name, a in active.items())
        first, *others = may_stay
        others.sort(key=lambda name: -active[name].matrices(targets[name]))  # stable: the lower of equals first
        kept = {first, *others[: self.settings.keep - 1]}
        modules = {
            name: replace(adapter, omega=1.0, train_omega=False) if adapter and name in kept else None
            for name, adapter in plan.modules.items()
        }
        ranks = self.grown_ranks(replace(plan, modules=modules), targets, budget)
        for name, adapter in modules.items():
            if adapter is not None:
                modules[name] = replace(adapter, r=ranks[name], lora_alpha=adapter.scaling * ranks[name])
        return replace(plan, modules=modules)

    def _after(self, phase: Phase, plan: AdapterPlan) -> Phase:
        return replace(
            phase,
            name="train",
            plan=plan,
            steps=None,
            cut=None,
            omega_lr=0.0,
            batch_growth=self.settings.batch_growth,
            lr_scaling=self.settings.lr_scaling,
        )

    def grown_ranks(self, plan: AdapterPlan, targets: Mapping[str, Shape], budget: int) -> dict[str, int]:
        """The survivors' ranks, unchanged; as `grown`."""
        return {name: adapter.r for name, adapter in plan.active.items()}

    def outlook(self, phase: Phase, targets: Mapping[str, Shape]) -> str | None:
        """Under ``cost``: where survivors may be, and what a step then costs."""
        reach = None if phase.cut is None else self._allowed(phase.plan, targets)
        if reach is None or self.inputs.cost is None:
            return None
        return (
            f"method.choose cost: survivors may be from {self.inputs.cost.layer(reach.layer)} up; a step then costs at "
            f"most {reach.share:.3f} of one with all adapters (method.budget {self.settings.budget}, by arithmetic)"
        )

    def remark(self, before: Phase, after: Phase, targets: Mapping[str, Shape]) -> str | None:
        """Where the lowest survivor is, and what a step costs by arithmetic."""
        cost = self.inputs.cost
        if before.cut is None or cost is None:
            return None
        plan = after.target_plan or after.plan
        share = cost.of(plan, targets) / cost.of(before.plan, targets)
        return (
            f"the lowest survivor is in {cost.layer(cost.lowest(plan.active))}: a step costs {share:.3f} of one with "
            "all adapters, by arithmetic"
        )

    def _allowed(self, plan: AdapterPlan, targets: Mapping[str, Shape]) -> Allowed | None:
        """Which adapters of the plan may stay; None: all."""
        if self.settings.budget is None:
            return None
        cost = self.inputs.cost
        assert cost is not None, "a run's context knows its base"
        works, trained = cost.adapters(plan, targets), cost.lowest(plan.trained)
        depths = [cost.depths[name] for name in works]
        whole = cost.of(plan, targets)
        shares = {
            layer: cost.step(min(layer, trained), self.survivors_work(works, [d >= layer for d in depths])) / whole
            for layer in set(depths)
        }
        return allowed(depths, shares, self.settings.keep, self.settings.budget, self._memory(plan, depths, targets))

    def _memory(self, plan: AdapterPlan, depths: Sequence[int], targets: Mapping[str, Shape]) -> Memory | None:
        """What survivors from a layer up need at most, as `foresee` assumes them; None where nothing can be planned."""
        planned, at = self.inputs.memory, dict(zip(plan.active, depths, strict=True))
        if planned is None:
            return None
        return lambda layer: planned(self._survivors(plan, [name for name in at if at[name] >= layer], targets))

    def survivors_work(self, works: Mapping[str, float], stay: Sequence[bool]) -> float:
        """The most that survivors cost in a step.

        Args:
            works: each adapter's operations.
            stay: for each whether it may survive.
        """
        return sum(sorted(itertools.compress(works.values(), stay), reverse=True)[: self.settings.keep])

    def grown(
        self, plan: AdapterPlan, state: TrainState, targets: Mapping[str, Shape], budget: int
    ) -> tuple[AdapterPlan, TrainState]:
        """The survivors' plan and state, unchanged; WeightLoRA+ grows ranks here.

        Args:
            budget: number of parameters in A and B of all adapters before.
        """
        return plan, state


def _disconnect(plan: AdapterPlan, state: TrainState) -> AdapterPlan:
    """The plan with a constant omega for survivors, and None for the rest."""
    modules: dict[str, ModuleAdapter | None] = {}
    for name, adapter in plan.modules.items():
        omega = float(state.tensors[f"{name}.lora_omega"]) if adapter is not None else 0.0
        modules[name] = replace(adapter, omega=omega, train_omega=False) if adapter and omega > 0 else None
    if not any(modules.values()):
        raise TrainingError(
            "every omega is 0 or negative after method.steps: no adapter is left to train; "
            "lower method.omega_lr or raise method.cut_after"
        )
    return replace(plan, modules=modules)


def _only(plan: AdapterPlan, state: TrainState) -> TrainState:
    """The remaining part of the state: the survivors' A and B, and fully trained modules, without omega."""
    from sparse_llm_ft.adapters import is_omega

    names = [n for n in state.tensors if (not is_matrix(n) or n.rpartition(".")[0] in plan.active) and not is_omega(n)]
    steps = {group: count for group, count in state.optimizer_steps.items() if group != "omega"}
    return replace(
        state,
        tensors={n: state.tensors[n] for n in names},
        moments={n: state.moments[n] for n in names},
        optimizer_steps=steps,
        callback=None,
    )
