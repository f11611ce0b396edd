"""The command `derive`: a run's first phase without training of adapters, for Partial-LoRA's ratios alone."""

from __future__ import annotations

from sparse_llm_ft.checkpoint.state import Progress, TrainState
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.distributed.signals import exit_if_preempted
from sparse_llm_ft.engine.build import engine_settings
from sparse_llm_ft.engine.engine import Engine, process_group
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.io.wait import Wait
from sparse_llm_ft.training.records import describe_measurement
from sparse_llm_ft.training.run import Run, prepared


def derive(context: RunContext) -> None:
    """Collective. Only derive Partial-LoRA's ratios, into the cache. Writes no run folder.

    Raises:
        UserError: as in `train`; or the run derives nothing.
    """
    scoring = context.first_phase().scoring
    if scoring is None or scoring.kind != "derivation":
        raise UserError(
            f"method.name: {context.config.method_name} derives nothing before it trains; expected partial_lora, with "
            "ratios: derived or another selection than random"
        )
    with process_group():
        _derive(prepared(context))


def _derive(run: Run) -> None:
    """Collective. Derive the ratios of the run's first phase and print them."""
    config, console, world = run.config, run.console, run.world
    # Build the model as a run would, but without a run folder.
    phase = run.data.with_steps(run.first)
    model = run.load_model(phase)
    engine = Engine(model, engine_settings(config, phase, world.size), phase.plan)
    loop = run.parts.loop(engine, phase, TrainState({}, {}, {}, Progress(), {}))
    # Fit the head, if the phase trains one; then derive.
    with Wait(console, "fitting the head", unit="steps") as wait:
        for done, _ in enumerate(loop.steps(), 1):
            wait.at(done, phase.steps or done)
            exit_if_preempted()
    scores = run.scorer(engine, phase, *run.scored(phase), engine.state_dict()["tensors"])
    engine.close()
    console.show_ratios(describe_measurement(scores, phase), getattr(scores, "ratios", {}))
