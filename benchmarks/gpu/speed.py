"""One system's training step on a random Llama: time, tokens/s, share of the card's peak, bytes. One JSON line.

    python benchmarks/gpu/speed.py --system lora --quantization none [--device cpu --tiny]

A system has its process to itself, so that what one leaves in the allocator is not counted as another's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parent))

from base import llama_config, peak_tflops, profile, random_base, step_flops, times

RANK, ALPHA = 16, 32
Step = Callable[[], Any]


class Setup:
    """What all systems train on: the base and one batch, whose samples are half prompt and half completion."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.config = llama_config(options.tiny)
        self.batch: int = 2 if options.tiny else options.batch
        self.length: int = 32 if options.tiny else options.length
        self.prompt = self.length // 2
        self.base = random_base(self.config, options.quantization, self.device)
        draw = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(3, self.config.vocab_size, (self.batch, self.length), generator=draw)
        self.labels = self.tokens.clone()
        self.labels[:, : self.prompt] = -100

    @property
    def layers(self) -> int:
        """Of the base."""
        return self.config.num_hidden_layers


def stock_peft(setup: Setup, dropout: float) -> Step:
    """PEFT with its defaults, torch's AdamW, autocast as the Trainer has it, the model's own loss over all logits."""
    model = _peft(setup, dropout, autocast_adapter_dtype=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens, labels = setup.tokens.to(setup.device), setup.labels.to(setup.device)
    mask = torch.ones_like(tokens)

    def step() -> float:
        with torch.autocast(setup.device.type, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def tuned_peft(setup: Setup, dropout: float) -> Step:
    """PEFT as one who knows it sets it: bf16 adapters, logits where there is a loss, foreach AdamW."""
    model = _peft(setup, dropout, autocast_adapter_dtype=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
    tokens, labels = setup.tokens.to(setup.device), setup.labels.to(setup.device)
    mask = torch.ones_like(tokens)
    positions = torch.arange(setup.prompt - 1, setup.length - 1, device=setup.device)

    def step() -> float:
        logits = model(input_ids=tokens, attention_mask=mask, logits_to_keep=positions).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, positions + 1].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _peft(setup: Setup, dropout: float, autocast_adapter_dtype: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(setup.base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    model.train()
    return model


def bare_base(setup: Setup, lowest: int) -> Step:
    """Forward, and backward to the input of layer `lowest`, without any adapter: the floor."""
    tokens = setup.tokens.to(setup.device)
    labels = setup.labels.to(setup.device)
    positions = torch.arange(setup.prompt - 1, setup.length - 1, device=setup.device)
    layer: Any = setup.base.model.layers[lowest]

    def require_grad(module: Any, args: tuple[torch.Tensor, ...], kwargs: Any) -> Any:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs

    layer.register_forward_pre_hook(require_grad, with_kwargs=True)

    def step() -> float:
        logits = setup.base(input_ids=tokens, logits_to_keep=positions).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, positions + 1].flatten())
        loss.backward()
        return loss.item()

    return step


def ours(setup: Setup, dropout: float, omega: bool, lowest: int) -> Step:
    """This toolkit: its tuner, its engine and its loop; adapters in the layers from `lowest` on."""
    from sparse_llm_ft.adapters import add_adapters, find_targets
    from sparse_llm_ft.checkpoint.state import Progress
    from sparse_llm_ft.config import TrainingConfig
    from sparse_llm_ft.data.samples import Sample
    from sparse_llm_ft.distributed.world import find_world
    from sparse_llm_ft.engine.engine import Engine, EngineSettings, init_distributed
    from sparse_llm_ft.objectives.language_modeling import CompletionObjective
    from sparse_llm_ft.phase import Phase
    from sparse_llm_ft.plan import AdapterPlan, ModuleName, uniform_plan, with_omega
    from sparse_llm_ft.training.loop import Loop
    from sparse_llm_ft.training.schedule import Schedule

    world = find_world()
    init_distributed()
    plan = uniform_plan(find_targets(setup.base, "all-linear"), RANK, ALPHA, dropout)
    numbers = {name: ModuleName.parse(name).number or 0 for name in plan.modules}
    plan = AdapterPlan({name: a if numbers[name] >= lowest else None for name, a in plan.modules.items()}, dropout)
    if omega:
        plan = with_omega(plan)
    model = add_adapters(setup.base, plan)
    engine = Engine(model, EngineSettings(2, "bfloat16", setup.batch, 1, 1.0, 0.0, 0.01, "sgd", {}))
    count = 64
    samples = [
        Sample(tuple(row[: setup.prompt].tolist()), tuple(row[setup.prompt :].tolist()))
        for row in setup.tokens.repeat(count, 1)
    ]
    training = TrainingConfig(
        max_steps=count, micro_batch_size=setup.batch, global_batch_size=setup.batch, learning_rate=1e-4
    )
    phase = Phase("speed", plan, steps=count).with_batch(setup.batch, setup.batch)
    loop = Loop(
        engine,
        phase,
        None,
        samples,
        CompletionObjective(pad_token_id=0, keeps_logits=True),
        Schedule(training, len(samples)),
        Progress(),
        world,
        seed=0,
        max_skipped_updates=0,
    )
    steps = loop.steps()
    return lambda: next(steps).loss


SYSTEMS: dict[str, tuple[Callable[[Setup], Step], bool]] = {
    "stock PEFT": (lambda s: stock_peft(s, 0.0), False),
    "stock PEFT, dropout .05": (lambda s: stock_peft(s, 0.05), False),
    "PEFT tuned": (lambda s: tuned_peft(s, 0.0), False),
    "bare base": (lambda s: bare_base(s, 0), False),
    "bare base, top tenth": (lambda s: bare_base(s, _top_tenth(s)), True),
    "lora": (lambda s: ours(s, 0.0, False, 0), False),
    "lora, dropout .05": (lambda s: ours(s, 0.05, False, 0), False),
    "weight_lora before T": (lambda s: ours(s, 0.0, True, 0), False),
    "weight_lora after T, top tenth": (lambda s: ours(s, 0.0, False, _top_tenth(s)), True),
}
"""Name -> how its step is made, and whether it has adapters in the top tenth of the layers alone."""


def _top_tenth(setup: Setup) -> int:
    return setup.layers - max(1, setup.layers // 10)


def main() -> None:
    """Measure one system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--quantization", choices=("none", "nf4"), default="none")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    began = time.perf_counter()
    setup = Setup(options)
    make, top = SYSTEMS[options.system]
    cuda = setup.device.type == "cuda"
    base_bytes = torch.cuda.memory_allocated() if cuda else None
    step = make(setup)
    losses = [step()]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = times(step, setup.device, warmup=2, count=options.steps)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    losses.append(step())
    milliseconds = statistics.median(found)
    tokens = setup.batch * setup.length
    supervised = 1 - setup.prompt / setup.length
    flops = step_flops(setup.config, tokens, setup.length, supervised, _top_tenth(setup) if top else 0)
    rate = flops / milliseconds / 1e9
    card = peak_tflops(setup.device)
    result = {
        "system": options.system,
        "base": options.quantization,
        "batch": setup.batch,
        "length": setup.length,
        "step_ms": milliseconds,
        "all_ms": found,
        "tokens_per_second": 1000 * tokens / milliseconds,
        "tflops": rate,
        "mfu": None if card is None else rate / card,
        "base_bytes": base_bytes,
        "peak_bytes": peak,
        "losses": losses,
        "profile": profile(step, setup.device),
        "seconds": time.perf_counter() - began,
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
