"""What a run has done so far, phase by phase. A checkpoint holds it, and the summary is written from it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from sparse_llm_ft.phase import Phase

_MANY_KEYS = 10_000


def _few(value: Any) -> Any:
    """Refuse an object of very many keys before each wrong value in it becomes an error of its own."""
    if isinstance(value, dict) and len(value) > _MANY_KEYS:
        raise ValueError(f"more than {_MANY_KEYS:,} keys")
    return value


FEW_KEYS = BeforeValidator(_few)

Count = Annotated[int, Field(ge=0, lt=2**62)]
"""Below 2**62: more steps or samples than any run has, and little enough for a torch integer."""

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PhaseRecord(BaseModel):
    """What is reported of a phase.

    Attributes:
        adapters: modules with an adapter.
        trainable_parameters: trained values, without those that a mask holds at zero.
        steps, samples, tokens: of the optimizer steps done.
        seconds: of the optimizer steps, without evaluation or saving.
        measured: what was measured at the phase's end, in a line; None before, or where nothing was.
    """

    model_config = ConfigDict(strict=True)

    name: str
    adapters: Count
    trainable_parameters: Count
    optimizer_bytes_per_rank: Count
    micro_batch_size: Count
    global_batch_size: Count
    steps: Count = 0
    samples: Count = 0
    tokens: Count = 0
    seconds: Seconds = 0.0
    measured: str | None = None

    @classmethod
    def of(cls, phase: Phase, before: PhaseRecord | None, parameters: int, optimizer_bytes: int) -> PhaseRecord:
        """The record of a phase that begins.

        Args:
            before: its record in the checkpoint from which it continues; the counts go on from there.
        """
        counted = {} if before is None else before.model_dump(include={"steps", "samples", "tokens", "seconds"})
        return cls(
            name=phase.name,
            adapters=len(phase.plan.active),
            trainable_parameters=parameters,
            optimizer_bytes_per_rank=optimizer_bytes,
            micro_batch_size=phase.micro_batch_size,
            global_batch_size=phase.global_batch_size,
            **counted,
        )

    def add(self, samples: int, tokens: int, seconds: float) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self.samples += samples
        self.tokens += tokens
        self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """0 before the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0


class RunRecord(BaseModel):
    """A run's past.

    Attributes:
        run: `RunFolder.identity` of the settings that the run began with.
        samples: `Splits.key` of the samples that it began with.
        micro_batch_size: that of the settings when the run was started last.
        before: metrics before training; None where nothing was measured.
        phases: the finished phases.
        current: the phase that is being trained; None between two phases.
    """

    model_config = ConfigDict(strict=True)

    run: str
    samples: str
    micro_batch_size: Count
    before: Annotated[dict[str, float] | None, FEW_KEYS] = None
    phases: Annotated[list[PhaseRecord], FailFast()] = []
    current: PhaseRecord | None = None

    @classmethod
    def empty(cls) -> RunRecord:
        """That of a state which belongs to no run."""
        return cls(run="", samples="", micro_batch_size=0)

    def with_current(self, current: PhaseRecord) -> RunRecord:
        """The record with a copy of `current`, which may count on."""
        return self.model_copy(update={"current": current.model_copy()})

    def next_phase(self, measured: str | None) -> RunRecord:
        """The record once the current phase has ended.

        Args:
            measured: at its end.
        """
        assert self.current is not None, "a phase has been trained"
        finished = self.current.model_copy(update={"measured": measured})
        return self.model_copy(update={"phases": [*self.phases, finished], "current": None})


def first_problem(error: ValidationError) -> str:
    """The first of the errors, in one line: the dotted name, and the value that is wrong."""
    problem = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"{name!r:.100} is missing"
    return f"{name!r:.100} is {problem['input']!r:.60}"
