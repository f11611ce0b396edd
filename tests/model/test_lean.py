"""Lean element-wise parts: the same values and gradients as transformers', what they keep, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from sparse_llm_ft.adapters import add_adapters, find_targets
from sparse_llm_ft.model.lean import make_lean, rms_norm, swiglu
from sparse_llm_ft.model.recompute import recipe_of
from sparse_llm_ft.plan import uniform_plan

SIZES: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "pad_token_id": 0,
}
IDS = torch.tensor([[3, 4, 5, 6], [1, 2, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(6, eps=1e-5).requires_grad_(False)
    norm.weight.normal_()
    norm.to(dtype)
    x = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    own, expected = rms_norm(x, norm.weight, 1e-5), norm(x)
    assert torch.equal(own, expected)
    outer = torch.randn_like(own)
    pair = [torch.autograd.grad(y, x, outer)[0] for y in (own, expected)]
    torch.testing.assert_close(*pair, **({} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


def test_derivatives() -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    x, weight = torch.randn(3, 4, requires_grad=True), torch.rand(4)
    plain = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1) * weight
    pair = [torch.autograd.grad(y.square().sum(), x)[0] for y in (rms_norm(x, weight, 0.1), plain)]
    torch.testing.assert_close(*pair)


def test_recipes_give_the_outputs_again_unless_those_have_changed() -> None:
    x, gate, up = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    for output in (rms_norm(x, torch.rand(4), 1e-5), swiglu(gate, up)):
        recipe = recipe_of(output)
        assert recipe is not None
        recipe.value.add_user()
        assert torch.equal(recipe.value(*recipe.inputs), output)
        with torch.no_grad():
            output.add_(1.0)
        assert recipe_of(output) is None
    with torch.no_grad():
        assert recipe_of(swiglu(gate, up)) is None


def build(kind: str) -> Any:
    torch.manual_seed(0)
    made: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)),
    }[kind]()
    return made.requires_grad_(False)


@pytest.mark.parametrize(("kind", "changed"), [("llama", 2 * 4 + 2), ("qwen2", 2 * 4 + 2), ("gemma2", 2)])
def test_which_modules_are_changed(kind: str, changed: int) -> None:
    """Norms, SwiGLUs, attentions and the head; Gemma has another norm, another activation and caps its logits."""
    model = build(kind)
    before = model(input_ids=IDS).logits
    state = torch.get_rng_state()
    assert make_lean(model) == changed
    assert torch.equal(torch.get_rng_state(), state)
    assert make_lean(model) == 0
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_of_adapters_are_those_of_the_plain_model(dropout: float, checkpointed: bool) -> None:
    results = []
    for lean in (False, True):
        model = build("llama")
        if lean:
            make_lean(model)
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted = add_adapters(model, uniform_plan(find_targets(model, "all-linear"), 2, 4, dropout))
        adapted.train()
        torch.manual_seed(1)
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            nn.init.normal_(parameter, std=0.2)
        loss = adapted(input_ids=IDS).logits.float().logsumexp(-1).sum()
        results.append([loss, *torch.autograd.grad(loss, list(trained.values()))])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


def test_kept_bytes_of_a_layer() -> None:
    """Per token: two residuals (d each), q (d), k and v (d / 2 each), attention's output (d), gate and up (f each)."""
    model = build("llama")
    make_lean(model)
    adapted = add_adapters(model, uniform_plan(find_targets(model, "all-linear"), 2, 4, 0.1))
    adapted.train()
    own = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        adapted.base_model.model.model(input_ids=IDS)
    wide = sum(v.untyped_storage().nbytes() for v in kept.values() if v.untyped_storage().nbytes() >= IDS.numel() * 16)
    d, f, layers, tokens = 8, 12, 2, IDS.numel()
    per_layer = 2 * d + d + d + d + 2 * f
    assert wide == 4 * tokens * (layers * per_layer + d)  # and the last norm's input


def test_trained_norms_are_computed_as_transformers_does() -> None:
    model = build("llama")
    make_lean(model)
    norm = next(m for m in model.modules() if isinstance(m, LlamaRMSNorm))
    norm.weight.requires_grad_(True)
    norm(torch.randn(2, 8)).sum().backward()
    assert norm.weight.grad is not None


def test_a_mlp_that_computes_something_else_is_left_alone() -> None:
    class Swapped(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))  # type: ignore[no-any-return]

    assert make_lean(nn.ModuleList([Swapped(LlamaConfig(**SIZES))])) == 0
    assert make_lean(nn.ModuleList([LlamaMLP(LlamaConfig(**SIZES))])) == 1
    assert make_lean(nn.ModuleList([LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu"))])) == 0
