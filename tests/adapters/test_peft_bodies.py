"""What PEFT's own tests ask of a tuner, on models of the four kinds that they take, for every kind of adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from helpers.peft_bodies import BODIES, Body
from helpers.tiny_models import adapters_of, randomize
from sparse_llm_ft.adapters import SparseLoraConfig, SparseLoraLayer, find_targets
from sparse_llm_ft.plan import AdapterPlan, IndexMask, ModuleAdapter, Shape


def half(size: int) -> IndexMask:
    return IndexMask(size, tuple(range(0, size, 2)))


def grouped(targets: dict[str, Shape]) -> dict[str, ModuleAdapter | None]:
    """One pair for all modules of one shape."""
    return {name: ModuleAdapter(2, 4.0, group="x".join(map(str, shape))) for name, shape in targets.items()}


PLANS: dict[str, Callable[[dict[str, Shape]], dict[str, ModuleAdapter | None]]] = {
    "plain": lambda targets: dict.fromkeys(targets, ModuleAdapter(2, 4.0)),
    "omega": lambda targets: dict.fromkeys(targets, ModuleAdapter(2, 4.0, omega=0.5, train_omega=True)),
    "masked": lambda targets: {
        name: ModuleAdapter(2, 4.0, rows=half(shape[0]), cols=half(shape[1])) for name, shape in targets.items()
    },
    "grouped": grouped,
}


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest) -> Body:
    return BODIES[request.param]


@pytest.fixture(params=PLANS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def bodies(which: Callable[[Body], bool]) -> pytest.MarkDecorator:
    found = {name: body for name, body in BODIES.items() if which(body)}
    return pytest.mark.parametrize("body", found.values(), ids=found)


def config(base: nn.Module, kind: str) -> SparseLoraConfig:
    return SparseLoraConfig(plan=AdapterPlan(PLANS[kind](find_targets(base, "all-linear"))))


def adapted(body: Body, kind: str = "plain", dtype: torch.dtype = torch.float32, **options: bool) -> PeftModel:
    base = body.build(dtype)
    model = get_peft_model(base, config(base, kind), **options)
    randomize(model)
    return model.eval()


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-3)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_all_linear_layers_are_found_and_fresh_adapters_change_nothing(body: Body, kind: str) -> None:
    base = body.build()
    model = get_peft_model(base, config(base, kind)).eval()
    assert sum(isinstance(module, SparseLoraLayer) for module in model.modules()) == body.targets
    assert torch.equal(body(model), body(body.build()))


def test_save_and_load(body: Body, kind: str, tmp_path: Path) -> None:
    model = adapted(body, kind)
    expected = body(model)
    assert far(expected, body(body.build()))
    model.save_pretrained(tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(body(PeftModel.from_pretrained(body.build(), tmp_path).eval()), expected)
    under_a_name = PeftModel.from_pretrained(body.build(), tmp_path, adapter_name="other").eval()
    assert torch.equal(body(under_a_name), expected)
    beside = adapted(body)
    beside.load_adapter(tmp_path, "other")
    beside.set_adapter("other")
    assert torch.equal(body(beside.eval()), expected)


def test_a_copy_is_a_model_of_its_own(body: Body, kind: str) -> None:
    model = adapted(body, kind)
    other = copy.deepcopy(model)
    expected = body(model)
    assert torch.equal(body(other), expected)
    randomize(other, seed=9)
    assert far(body(other), expected) and torch.equal(body(model), expected)


def test_merging_there_and_back_many_times(body: Body, kind: str) -> None:
    model = adapted(body, kind)
    expected = body(model)
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        close(body(model), expected)
        with model.disable_adapter():
            close(body(model), body(body.build()))
        model.merge_adapter()
        model.unmerge_adapter()
        close(body(model), expected)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, SparseLoraLayer) for module in merged.modules())
    assert set(merged.state_dict()) == set(body.build().state_dict())
    close(body(merged), expected)


def test_disabled_and_unloaded_it_is_the_base(body: Body, kind: str) -> None:
    expected, model = body(body.build()), adapted(body, kind)
    with model.disable_adapter():
        assert torch.equal(body(model), expected)
    assert far(body(model), expected)
    plain = model.unload()
    assert not any(isinstance(module, SparseLoraLayer) for module in plain.modules())
    assert torch.equal(body(plain), expected)


def test_adapters_come_and_go(body: Body, kind: str) -> None:
    model = adapted(body, kind)
    first = body(model)
    model.add_adapter("other", config(body.build(), kind))
    randomize(model, seed=7, adapter_name="other")
    model.eval()
    assert torch.equal(body(model), first)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    assert all(parameter.requires_grad for parameter in adapters_of(model, "other").values())
    assert not any(parameter.requires_grad for parameter in adapters_of(model).values())
    second = body(model)
    assert far(first, second)
    model.merge_adapter(adapter_names=["other"])
    close(body(model), second)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not adapters_of(model) and set(model.peft_config) == {"other"}
    close(body(model), second)
    model.add_adapter("default", config(body.build(), kind))
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and not adapters_of(model, "other")
    close(body(model.eval()), body(body.build()))


def test_a_step_changes_the_adapter_and_nothing_else(body: Body, kind: str) -> None:
    model = adapted(body, kind).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in adapters_of(model).values()}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    body.output(model(**body.given())).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained)
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name and not name.endswith("lora_omega.default")} | {
        name for name in before if name.endswith("lora_omega.default") and kind == "omega"
    }


@bodies(lambda body: isinstance(body.build(), PreTrainedModel))
def test_gradient_checkpointing_gives_the_same_gradients(body: Body, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(body, kind).train()
        base = model.get_base_model()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert base.is_gradient_checkpointing
        body.output(model(**body.given())).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in adapters_of(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@bodies(lambda body: body.writes)
def test_texts_are_those_of_the_merged_model(body: Body, kind: str) -> None:
    model = adapted(body, kind)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    ids = body.given()["input_ids"]
    texts = [model.generate(input_ids=ids, **settings), model.generate(ids, **settings)]
    with model.disable_adapter():
        bare = model.generate(input_ids=ids, **settings)
    assert torch.equal(bare, body.build().generate(input_ids=ids, **settings))
    texts.append(model.merge_and_unload().generate(input_ids=ids, **settings))
    assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_inputs_of_half_precision(body: Body, kind: str, dtype: torch.dtype, autocast: bool) -> None:
    model = adapted(body, kind, dtype, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in adapters_of(model).values()} == {torch.float32 if autocast else dtype}
    expected, found = body(copy.deepcopy(model).float()), body(model, dtype)
    assert found.dtype == dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05 * scale)
    with model.disable_adapter():
        assert torch.equal(body(model, dtype), body(body.build(dtype), dtype))


class Twice(nn.Module):
    """A layer under two names, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.same = self.one
        self.two, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.two.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.two(self.same(self.one(x))))


def test_a_layer_under_two_names_is_refused_and_a_shared_weight_is_not_merged() -> None:
    with pytest.raises(ValueError, match="one and same are one layer, and an adapter would be on one of them alone"):
        get_peft_model(Twice(), SparseLoraConfig(r=2))
    model = get_peft_model(Twice(), SparseLoraConfig(r=2, target_modules=["two", "tied"]))
    randomize(model)
    before = model.base_model.model.two.base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="two and tied share one weight"):
            merge()
    assert torch.equal(model.base_model.model.two.base_layer.weight, before)
