"""WeightLoRA's rule on plain tensors: what is fixed, disconnected, grown, and what is kept of the moments."""

from __future__ import annotations

import pytest
import torch

from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.config import parse_config
from sparse_llm_ft.errors import ConfigError, TrainingError
from sparse_llm_ft.methods.chain import Chain, build_methods
from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import uniform_plan

TARGETS = {"layers.0.q": (6, 8), "layers.0.up": (12, 8), "layers.1.q": (6, 8), "layers.1.up": (12, 8)}


def config(name: str = "weight_lora", **method: object):
    return parse_config(
        {
            "model": {"name": "org/base"},
            "task": {"name": "custom"},
            "output_dir": "x",
            "adapter": {"r": 2, "lora_alpha": 6},
            "method": {"name": name, "keep": 2, "steps": 5} | method,
        }
    )


def rules(settings) -> Chain:
    return build_methods(settings, total_steps=20)


def first_phase(chain: Chain, targets: dict = TARGETS) -> Phase:
    return chain.first(uniform_plan(targets, 2, 6.0), targets)


def state(phase: Phase, omegas: list[float]) -> TrainState:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for (name, shape), omega in zip(TARGETS.items(), omegas, strict=True):
        tensors[f"{name}.lora_A"] = torch.randn(2, shape[1], generator=generator)
        tensors[f"{name}.lora_B"] = torch.randn(shape[0], 2, generator=generator)
        tensors[f"{name}.lora_omega"] = torch.tensor([omega])
    moments = {
        name: {key: torch.rand(t.shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")}
        for name, t in tensors.items()
        if not name.endswith("omega")
    }
    steps, callback = {"adapter": 5, "omega": 5}, {"moved": [f"{name}.lora_omega" for name in TARGETS], "kept": []}
    return TrainState(tensors, moments, steps, Progress(5, 80, 0, 5), phase.to_dict(), callback)


def delta(phase: Phase, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """omega * alpha / r * B A by hand."""
    adapter = phase.plan.active[name]
    trained = tensors.get(f"{name}.lora_omega")
    omega = adapter.omega if trained is None else float(trained)
    return omega * adapter.lora_alpha / adapter.r * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]


def test_the_first_phase_trains_all_adapters_with_omega_one() -> None:
    phase = first_phase(rules(config()), TARGETS)
    assert list(phase.plan.active) == list(TARGETS) and phase.steps == 5
    assert all(a.train_omega and a.omega == 1.0 for a in phase.plan.active.values())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("weight_lora", {}),
        ("weight_lora_plus", {"expansion": "qr"}),
        ("weight_lora_plus", {"expansion": "gaussian"}),
    ],
)
def test_disconnecting_leaves_the_survivors_delta_unchanged(name: str, method: dict) -> None:
    callback = rules(config(name, **method))
    first = first_phase(callback)
    before = state(first, [0.9, 0.0, 1.2, -0.1])
    result = callback.next(first, before, None, TARGETS)
    assert result is not None
    phase, after = result
    survivors = ["layers.0.q", "layers.1.q"]
    assert list(phase.plan.active) == survivors
    assert phase.plan.modules["layers.0.up"] is None and phase.plan.modules["layers.1.up"] is None
    assert set(after.tensors) == {f"{n}.{part}" for n in survivors for part in ("lora_A", "lora_B")}
    for survivor in survivors:
        old, new = delta(first, before.tensors, survivor), delta(phase, after.tensors, survivor)
        assert (new - old).norm() / old.norm() < 1e-6
    assert callback.next(phase, after, None, TARGETS) is None


def test_without_growth_parameters_moments_and_step_count_of_survivors_are_bit_equal() -> None:
    callback = rules(config())
    first = first_phase(callback)
    before = state(first, [0.0, 0.7, 1.2, 0.0])
    phase, after = callback.next(first, before, None, TARGETS)
    for name, tensor in after.tensors.items():
        assert torch.equal(tensor, before.tensors[name])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(after.moments[name][key], before.moments[name][key])
    assert set(after.moments) == set(after.tensors)
    assert after.optimizer_steps == {"adapter": 5}
    assert phase.plan.active["layers.1.q"].omega == pytest.approx(1.2) and after.callback is None


def test_growth_uses_the_warm_up_budget_and_keeps_the_scaling() -> None:
    callback = rules(config("weight_lora_plus"))
    first = first_phase(callback)
    phase, after = callback.next(first, state(first, [1.0, 0.0, 1.0, 0.0]), None, TARGETS)
    budget = sum(2 * sum(shape) for shape in TARGETS.values())
    used = sum(a.r * sum(TARGETS[name]) for name, a in phase.plan.active.items())
    assert budget - min(map(sum, TARGETS.values())) < used <= budget
    for name, adapter in phase.plan.active.items():
        assert adapter.r > 2 and adapter.scaling == pytest.approx(3.0)
        assert after.tensors[f"{name}.lora_A"].shape == (adapter.r, TARGETS[name][1])
    assert after.moments == {} and after.optimizer_steps == {}  # qr turns the coordinates: restart


def test_gaussian_growth_keeps_old_moments_in_their_block() -> None:
    callback = rules(config("weight_lora_plus", expansion="gaussian"))
    first = first_phase(callback)
    before = state(first, [1.0, 0.0, 1.0, 0.0])
    _, after = callback.next(first, before, None, TARGETS)
    for name, moments in after.moments.items():
        old = before.moments[name]["exp_avg"]
        rows, columns = old.shape
        assert torch.equal(moments["exp_avg"][:rows, :columns], old)
        assert moments["exp_avg"].shape == after.tensors[name].shape
        assert float(moments["exp_avg"].abs().sum()) == pytest.approx(float(old.abs().sum()))
    assert after.optimizer_steps == {"adapter": 5}


def test_keeping_all_is_plain_lora_after_t() -> None:
    callback = rules(config("weight_lora_plus", keep=4))
    first = first_phase(callback)
    phase, _ = callback.next(first, state(first, [1.0, 1.0, 1.0, 1.0]), None, TARGETS)
    assert {name: a.r for name, a in phase.plan.active.items()} == dict.fromkeys(TARGETS, 2)


def test_more_to_keep_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.keep: 5 is more than the 4 adapters .* expected 1 to 4"):
        first_phase(rules(config(keep=5)), TARGETS)


def test_no_positive_omega_is_said_plainly() -> None:
    callback = rules(config())
    first = first_phase(callback)
    with pytest.raises(TrainingError, match="every omega is 0 or negative"):
        callback.next(first, state(first, [0.0, -1.0, 0.0, -0.5]), None, TARGETS)


def test_a_phase_survives_json() -> None:
    import json

    phase = first_phase(rules(config("weight_lora_plus")), TARGETS).with_batch(2, 16, 0.5)
    assert Phase.from_dict(json.loads(json.dumps(phase.to_dict()))) == phase


def test_rank_and_alpha_of_a_small_matrix() -> None:
    """A target smaller than r gets the rank that fits, with the scaling of the others."""
    phase = first_phase(rules(config("weight_lora", keep=1)), TARGETS | {"tiny": (1, 8)})
    assert phase.plan.active["tiny"].r == 1 and phase.plan.active["tiny"].scaling == 3.0


@pytest.mark.parametrize(("max_rank", "expected"), [(2, (2, 2)), (3, (3, 3)), (4, (4, 4)), (512, (4, 4))])
def test_max_rank_caps_growth_and_the_remark_says_what_is_left(max_rank: int, expected: tuple[int, int]) -> None:
    """Budget: 2 * (14 + 20 + 14 + 20) = 136 parameters for a q of 14 and an up of 20 per rank."""
    chain = rules(config("weight_lora_plus", max_rank=max_rank))
    select = first_phase(chain)
    after, _ = chain.next(select, state(select, [0.5, 0.0, 0.0, 0.7]), None, TARGETS)
    ranks = tuple(adapter.r for adapter in after.plan.active.values())
    assert ranks == expected
    left = 136 - 14 * ranks[0] - 20 * ranks[1]
    assert all(adapter.scaling == 3.0 for adapter in after.plan.active.values())
    text = f"ranks stop at method.max_rank {max_rank}: {left} of the budget's 136 parameters are left over"
    assert chain.remark(select, after, TARGETS) == (text if left else None)
    assert chain.remark(after, after, TARGETS) is None


def test_masks_of_a_following_method_do_not_count_as_left_over() -> None:
    method = [{"name": "weight_lora_plus", "keep": 2, "steps": 5, "max_rank": 3}, {"name": "partial_lora"}]
    settings = config()
    settings = parse_config({**settings.model_dump(mode="json", exclude={"method"}), "method": method})
    chain = rules(settings)
    select = first_phase(chain)
    after, _ = chain.next(select, state(select, [0.5, 0.0, 0.0, 0.7]), None, TARGETS)
    assert after.method == 1
    assert chain.remark(select, after, TARGETS) == (
        "ranks stop at method.max_rank 3: 34 of the budget's 136 parameters are left over"
    )


def test_a_cap_below_the_initial_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^method.max_rank: 1 is less than adapter.r \(2\)"):
        config("weight_lora_plus", max_rank=1)
    tree = config("weight_lora_plus").model_dump(mode="json")  # as config.yaml has it, with the default
    tree["adapter"] |= {"r": 600}
    assert parse_config(tree).method[0].max_rank == 512


def test_more_than_one_epoch_of_selection_is_a_remark() -> None:
    """Section 3.3: T is at most one epoch."""
    (settings,) = config(steps=12).method
    assert settings.remarks(12) == []
    (line,) = settings.remarks(11)
    assert line.startswith("method.steps is 12, more than the 11 steps of one epoch")


def test_a_choice_by_position_is_refused() -> None:
    """In the first step every B is 0, and so is the gradient of every omega; RLoRA's choice needs none."""
    with pytest.raises(ConfigError, match=r"method\.steps: 1, and no omega has a gradient in the first step"):
        rules(config(steps=1))
    chain = rules(config(steps=1, choose="random"))
    before = state(first_phase(chain), [1.0, 0.0, 1.0, 0.0])
    before.callback = {"moved": [], "kept": []}
    assert chain.next(first_phase(chain), before, None, TARGETS) is not None
    chain = rules(config(omega_lr=1e-12))
    with pytest.raises(TrainingError, match=r"no omega has moved in method\.steps 5"):
        chain.next(first_phase(chain), before, None, TARGETS)
