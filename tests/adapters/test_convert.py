"""Export to a LoRA that PEFT alone loads: checked by a process that never imports this package."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from helpers.tiny_models import IDS, LLAMA_MODULES, adapters_of, llama, logits, with_adapters
from sparse_llm_ft.adapters import is_omega, peft_adapter, save_peft_adapter, to_stock_lora, write_peft_adapter
from sparse_llm_ft.errors import TrainingError
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, uniform_plan

LAYERS, WIDTH = 12, 16
MODULES = [f"model.layers.{i}.{module}" for i in range(LAYERS) for module in LLAMA_MODULES]
ONE, ELEVEN = "model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj"
OFF = "model.layers.3.mlp.up_proj"


def mixed():
    """Ranks 1 to 4, two alphas, trained omegas, every ninth module untouched."""
    modules = {}
    for i, name in enumerate(MODULES):
        modules[name] = None if i % 9 == 8 else ModuleAdapter(1 + i % 4, (2.0, 3.0)[i % 5 == 0], train_omega=True)
    return AdapterPlan(modules, lora_dropout=0.1)


def layers_1_and_11():
    """One module name is the other's with a digit more; each has a rank and an alpha of its own."""
    modules = {name: ModuleAdapter(3, 6.0) for name in MODULES if ".mlp." in name}
    return AdapterPlan(modules | {ONE: ModuleAdapter(2, 1.0), ELEVEN: ModuleAdapter(5, 10.0)})


def fixed():
    """Constant omegas, one of them negative."""
    omegas = {MODULES[0]: 0.5, MODULES[20]: 2.0, OFF: -1.0, MODULES[83]: 1.0}
    return AdapterPlan({name: ModuleAdapter(4, 8.0, omega=omega) for name, omega in omegas.items()})


def uniform():
    """One rank and one alpha, on the last layers alone."""
    return uniform_plan(dict.fromkeys((ELEVEN, ELEVEN.replace("q_proj", "o_proj")), (WIDTH, WIDTH)), 4, 8.0)


PLANS = {plan.__name__: plan() for plan in (mixed, layers_1_and_11, fixed, uniform)}

LOAD_WITH_PEFT_ALONE = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

folder = Path(sys.argv[1])
ids = torch.tensor(json.loads(sys.argv[2]))
for case in sorted(folder.glob("case_*")):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), case).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, case / "logits.pt")
    found = {
        name.removeprefix("base_model.model."): [module.r["default"], module.scaling["default"]]
        for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    (case / "found.json").write_text(json.dumps(found))
assert "sparse_llm_ft" not in sys.modules
"""


def trained(plan):
    """A model under `plan`, every value set as training might have left it; one trained omega is negative."""
    model = with_adapters(llama(LAYERS, WIDTH), plan=plan)
    for i, (name, parameter) in enumerate(adapters_of(model).items()):
        if is_omega(name):
            parameter.data.fill_(-0.3 if name.startswith(OFF) else 0.4 + i % 7 / 5)
    return model


def tensors_of(model):
    return {name: value.detach().float() for name, value in adapters_of(model).items()}


def case(name, patterns):
    return f"case_{name}_{'patterns' if patterns else 'uniform'}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For every plan and form the folder that was written, with what PEFT made of it, and the logits of ours."""
    folder = tmp_path_factory.mktemp("stock")
    llama(LAYERS, WIDTH).save_pretrained(folder / "base")
    expected = {}
    for name, plan in PLANS.items():
        model = trained(plan)
        expected[name] = logits(model)
        for patterns in (False, True):
            written = peft_adapter(plan, tensors_of(model), "some/base", "main", patterns=patterns)
            write_peft_adapter(folder / case(name, patterns), *written)
    command = [sys.executable, "-c", LOAD_WITH_PEFT_ALONE, str(folder), json.dumps(IDS.tolist())]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "missing" not in result.stderr.lower(), result.stderr
    return {(name, form): (folder / case(name, form), expected[name]) for name in PLANS for form in (False, True)}


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_peft_alone_computes_the_same_logits(exported, name, patterns):
    folder, expected = exported[name, patterns]
    # Twelve layers, in another order of float32 additions.
    torch.testing.assert_close(torch.load(folder / "logits.pt"), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, logits(llama(LAYERS, WIDTH)), atol=1e-2)


@pytest.mark.parametrize("name", PLANS)
def test_peft_alone_puts_the_ranks_and_scalings_of_the_plan_where_the_plan_has_them(exported, name):
    folder, _ = exported[name, True]
    on = {module: a for module, a in PLANS[name].active.items() if module != OFF or name == "layers_1_and_11"}
    assert json.loads((folder / "found.json").read_text()) == {
        module: [a.r, pytest.approx(a.scaling)] for module, a in on.items()
    }


@pytest.mark.parametrize("name", PLANS)
def test_peft_alone_gives_every_module_one_rank_and_the_scaling_1(exported, name):
    folder, _ = exported[name, False]
    on = [module for module in PLANS[name].active if module != OFF or name == "layers_1_and_11"]
    assert json.loads((folder / "found.json").read_text()) == {module: [8, 1.0] for module in on}


@pytest.mark.parametrize("patterns", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_the_saved_config_has_no_key_of_ours(exported, name, patterns):
    folder, _ = exported[name, patterns]
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert set(config) <= {field.name for field in fields(LoraConfig)}
    assert config["peft_type"] == "LORA"
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", "main")
    assert config["lora_dropout"] == PLANS[name].lora_dropout
    assert not any("omega" in key for key in load_file(folder / "adapter_model.safetensors"))


def test_the_patterns_hold_what_differs_from_the_most_frequent_pair():
    plan = layers_1_and_11()
    config, _ = to_stock_lora(plan, tensors_of(trained(plan)), patterns=True)
    assert (config["r"], config["lora_alpha"]) == (3, 6.0)
    assert config["rank_pattern"] == {ONE: 2, ELEVEN: 5}
    assert config["alpha_pattern"] == {ONE: 1.0, ELEVEN: 10.0}
    assert config["target_modules"] == sorted(plan.active)


def test_a_rank_or_alpha_that_agrees_with_the_general_one_needs_no_pattern():
    usual, other_rank, other_alpha = ModuleAdapter(4, 8.0), ModuleAdapter(2, 8.0), ModuleAdapter(4, 6.0)
    plan = AdapterPlan({MODULES[0]: usual, MODULES[7]: usual, MODULES[1]: other_rank, MODULES[2]: other_alpha})
    config, _ = to_stock_lora(plan, tensors_of(trained(plan)), patterns=True)
    assert config["rank_pattern"] == {MODULES[1]: 2}
    assert config["alpha_pattern"] == {MODULES[2]: 6.0}
    config, _ = to_stock_lora(uniform(), tensors_of(trained(uniform())), patterns=True)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


@pytest.mark.parametrize("train_omega", [True, False])
def test_omega_is_folded_into_b_and_an_adapter_that_is_off_is_left_out(train_omega):
    names = MODULES[:3]
    omegas = dict(zip(names, [0.25, -2.0, 0.0], strict=True))
    plan = AdapterPlan({n: ModuleAdapter(2, 4.0, 1.0 if train_omega else omegas[n], train_omega) for n in names})
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_A": torch.randn(2, WIDTH), f"{name}.lora_B": torch.randn(WIDTH, 2)}
        if train_omega:
            tensors[f"{name}.lora_omega"] = torch.tensor([omegas[name]])
    config, weights = to_stock_lora(plan, tensors, patterns=True)
    prefix = f"base_model.model.{names[0]}"
    assert config["target_modules"] == names[:1]
    assert set(weights) == {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
    assert torch.equal(weights[f"{prefix}.lora_A.weight"], tensors[f"{names[0]}.lora_A"])
    assert torch.equal(weights[f"{prefix}.lora_B.weight"], 0.25 * tensors[f"{names[0]}.lora_B"])


@pytest.mark.parametrize(("largest", "rank"), [(1, 8), (8, 8), (9, 16), (16, 16), (33, 48), (65, 80)])
def test_scaling_and_omega_are_folded_into_b_with_one_rounding_and_ranks_get_zeros(largest, rank):
    """B' = round(omega * scaling * B), computed here in float64, and no entry of A changes."""
    plan = AdapterPlan({MODULES[0]: ModuleAdapter(largest, 5.0, omega=0.3), MODULES[1]: ModuleAdapter(1, 7.0)})
    tensors = {}
    for name, adapter in plan.active.items():
        tensors |= {f"{name}.lora_A": torch.randn(adapter.r, 20), f"{name}.lora_B": torch.randn(30, adapter.r)}
    config, weights = to_stock_lora(plan, tensors)
    assert (config["r"], config["lora_alpha"]) == (rank, rank) and type(config["lora_alpha"]) is int
    for name, adapter in plan.active.items():
        a, b = (weights[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert a.shape == (rank, 20) and b.shape == (30, rank)
        assert torch.equal(a[: adapter.r], tensors[f"{name}.lora_A"]) and not a[adapter.r :].any()
        factor = adapter.omega * (adapter.lora_alpha / adapter.r)
        assert torch.equal(b[:, : adapter.r], (factor * tensors[f"{name}.lora_B"].double()).float())
        assert not b[:, adapter.r :].any()


@pytest.mark.parametrize("omega", [0.0, -0.5])
@pytest.mark.parametrize("train_omega", [True, False])
def test_a_plan_with_every_adapter_off_cannot_be_exported(omega, train_omega, tmp_path):
    adapter = ModuleAdapter(2, 4.0, 1.0 if train_omega else omega, train_omega)
    plan = AdapterPlan(dict.fromkeys(MODULES[:2], adapter))
    model = with_adapters(llama(LAYERS, WIDTH), plan=plan)
    for name, parameter in adapters_of(model).items():
        if is_omega(name):
            parameter.data.fill_(omega)
    with pytest.raises(TrainingError, match="no adapter is on"):
        save_peft_adapter(tmp_path / "stock", plan, tensors_of(model), "some/base", None)
    assert not (tmp_path / "stock").exists()
