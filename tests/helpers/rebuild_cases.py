"""Two-rank cases of engines built again and again around one base. See cases.py."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch

from helpers.case_tools import MODEL, WORLD, base_model, engine_settings, long_case, make_loop, plan_for
from sparse_llm_ft.adapters import add_adapters, count_parameters
from sparse_llm_ft.adapters.build import change_plan
from sparse_llm_ft.checkpoint.state import Progress
from sparse_llm_ft.config import ModelConfig
from sparse_llm_ft.engine.engine import Engine
from sparse_llm_ft.model.loading import load_model
from sparse_llm_ft.plan import AdapterPlan

REBUILDS = 20


def storage_bytes(expected: int | None) -> int:
    """Bytes of all tensors that are alive, each storage once: the least within two seconds, or the expected ones.

    gloo's thread lets go of what it has sent a moment after the call returns.
    """
    gc.collect()
    least = count_bytes()
    for _ in range(200):
        if least == expected:
            break
        time.sleep(0.01)
        least = min(least, count_bytes())
    return least


def count_bytes() -> int:
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) or type(thing).__name__ == "Params4bit":
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def resident_mib() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def base_storages(model: torch.nn.Module) -> dict[str, int]:
    """Where the bytes of every frozen parameter lie on this rank, and that none of a sharded one lies elsewhere."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and not parameter.requires_grad:
            sharded = getattr(parameter, "ds_tensor", None)
            persists = getattr(parameter, "ds_persist", False)
            assert sharded is None or persists or parameter.data.numel() == 0, f"{name} is whole on this rank"
            found[name.replace(".base_layer", "")] = (parameter if sharded is None else sharded).data_ptr()
    return found


@long_case
def twenty_changes_of_plan_leave_base_and_memory_as_they_are() -> None:
    """At stages 2 and 3, bfloat16 and nf4: the base stays where it is, and after each second change exactly as many
    bytes are alive as after the second one.
    """
    for stage in (2, 3):
        for quantization in ("none", "nf4"):
            base = load_model(ModelConfig(name=MODEL, dtype="bfloat16", quantization=quantization))
            plan = plan_for(base)
            first = next(name for name in plan.modules if "q_proj" in name)
            smaller = AdapterPlan({name: plan.modules[name] if name == first else None for name in plan.modules})
            model, before = add_adapters(base, plan), plan
            places, alive, resident = {}, {}, []
            for i in range(REBUILDS):
                current = (plan, smaller)[i % 2]
                model = change_plan(model, before, current) if i else model
                engine = Engine(model, engine_settings(stage, 4, "bfloat16"))
                for _ in zip(range(1), make_loop(engine, current, 4, Progress()).steps(), strict=False):
                    pass
                # The rank with the larger shard; the other's bytes differ by padding.
                places[i] = base_storages(engine.module)
                bytes_now = engine.optimizer_bytes()
                engine.close()
                assert bytes_now == alive.setdefault(("optimizer", i % 2), bytes_now)
                del engine
                before = current
                if i >= 2:
                    now = storage_bytes(alive.get(("alive", i % 2)))
                    assert now == alive.setdefault(("alive", i % 2), now), (
                        stage,
                        quantization,
                        i,
                        now,
                        alive,
                        WORLD.rank,
                    )
                resident.append(resident_mib())
            assert all(place == places[1] for i, place in places.items() if i), (stage, quantization)
            assert resident[-1] - resident[5] < 8, (stage, quantization, resident)
            del model, base


@long_case
def optimizer_bytes_follow_the_plan_after_a_change() -> None:
    """Twelve bytes a trained value, in two shards, before and after most adapters are gone."""
    base = base_model(torch.bfloat16)
    plan = plan_for(base)
    shapes = {name: (m.out_features, m.in_features) for name, m in base.named_modules() if name in plan.modules}
    first = next(name for name in plan.modules if "q_proj" in name)
    smaller = AdapterPlan({name: plan.modules[name] if name == first else None for name in plan.modules})
    model = add_adapters(base, plan)
    for stage in (1, 2, 3):
        for before, current in ((smaller, plan), (plan, smaller)):
            model = change_plan(model, before, current)
            engine = Engine(model, engine_settings(stage, 4, "bfloat16"))
            excess = engine.optimizer_bytes() - 12 * count_parameters(current, shapes) / WORLD.size
            assert 0 <= excess < 12 * 64, (stage, excess)
            engine.close()
