"""Adapters for `check-adapter` as files of which only config and header are real: the weights are a hole in the file.

`python tests/helpers/served_adapters.py FOLDER` writes those of the table in docs/serving.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_llm_ft.adapters.tuners import rank_settings
from sparse_llm_ft.methods.rank_growth import grow_ranks
from sparse_llm_ft.plan import AdapterPlan, ModuleAdapter, Shape
from sparse_llm_ft.serving.ranks import served_rank

LLAMA_3_8B: dict[str, Shape] = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
"""(d_out, d_in) of each linear layer; 32 layers."""

TARGETS = {f"model.layers.{i}.{kind}": shape for i in range(32) for kind, shape in LLAMA_3_8B.items()}

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": None}


def write_adapter(
    folder: Path,
    pairs: Mapping[str, tuple[int, int, int]],
    others: Mapping[str, list[int]] | None = None,
    **config: Any,
) -> Path:
    """Write an adapter of zeros without writing the zeros.

    Args:
        pairs: module -> (rank, d_in, d_out).
        others: further tensors, name -> shape.
        config: keys of adapter_config.json.
    """
    shapes = dict(others or {})
    for module, (rank, d_in, d_out) in pairs.items():
        shapes[f"base_model.model.{module}.lora_A.weight"] = [rank, d_in]
        shapes[f"base_model.model.{module}.lora_B.weight"] = [d_out, rank]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    settings = {**LORA, "target_modules": sorted(pairs), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def sizes(ranks: Mapping[str, int], targets: Mapping[str, Shape]) -> dict[str, tuple[int, int, int]]:
    return {name: (rank, targets[name][1], targets[name][0]) for name, rank in ranks.items()}


def grown(keep: int, r: int = 8) -> dict[str, int]:
    """Ranks after WeightLoRA+ at Llama-3-8B's shapes: every (224 / keep)-th module survives, from rank r."""
    budget = r * sum(sum(shape) for shape in TARGETS.values())
    survivors = [name for i, name in enumerate(TARGETS) if i * keep % len(TARGETS) < keep]
    return grow_ranks(dict.fromkeys(survivors, r), TARGETS, budget, 512)


def stock(folder: Path) -> None:
    """PEFT's own files of a LoRA on the quickstart's base whose queries have another rank, and our form of the same."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from sparse_llm_ft.adapters import peft_adapter, trained_parameters, write_peft_adapter

    base = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 33},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.normal_(std=0.1)
    model.save_pretrained(folder / "stock")
    tensors = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
    ranks = {n.rpartition(".")[0]: t.shape[0] for n, t in tensors.items() if n.endswith("lora_A")}
    plan = AdapterPlan({name: ModuleAdapter(r, 32.0) for name, r in ranks.items()}, tuner="lora")
    write_peft_adapter(folder / "stock-uniform", *peft_adapter(plan, tensors, str(base), None))


def main(folder: Path) -> None:
    plus = grown(keep=45)
    for method, ranks in (("weight_lora", dict.fromkeys(plus, 8)), ("weight_lora_plus", plus)):
        alike, name = served_rank(max(ranks.values())), f"llama-{method}"
        adapters = {module: ModuleAdapter(r, 2.0 * r) for module, r in ranks.items()}  # lora_alpha 16 at r 8: scaling 2
        write_adapter(folder / f"{name}-patterns", sizes(ranks, TARGETS), **rank_settings(adapters))
        write_adapter(folder / name, sizes(dict.fromkeys(ranks, alike), TARGETS), r=alike, lora_alpha=alike)
        for server in ("sglang", "tgi"):
            write_fitted(folder / f"{name}-{server}", server, ranks, alike)
    stock(folder)


def write_fitted(folder: Path, server: str, ranks: Mapping[str, int], rank: int) -> None:
    """What `export --for` adds to the adapter of rank `rank`, on tensors without values."""
    import torch

    from sparse_llm_ft.export.for_server import fit

    shapes = {}
    for name in ranks:
        d_out, d_in = TARGETS[name]
        shapes |= {
            f"base_model.model.{name}.lora_A.weight": (rank, d_in),
            f"base_model.model.{name}.lora_B.weight": (d_out, rank),
        }
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = {**LORA, "r": rank, "lora_alpha": rank, "target_modules": sorted(ranks)}
    config, fitted = fit(server, config, weights, TARGETS, 32)
    modules = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in fitted if "lora_A" in name
    ]
    write_adapter(folder, sizes(dict.fromkeys(modules, rank), TARGETS), **config)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
