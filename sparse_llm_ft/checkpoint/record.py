"""`RunRecord`: what a run has done, phase by phase. Checkpoints hold it, and the summary is written from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from sparse_llm_ft.phase import Phase
from sparse_llm_ft.plan import FEW_KEYS

Count = Annotated[int, Field(ge=0, lt=2**62)]
"""Below 2**62: more than any run's steps or samples, and within torch's integers."""

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_COUNTED = {"steps", "samples", "tokens", "seconds", "flops", "possible_flops", "out_of_memory"}


class PhaseRecord(BaseModel):
    """The numbers of one phase for checkpoint and summary.

    Attributes:
        adapters: modules with an adapter.
        trainable_parameters: trained values, without masked ones.
        optimizer_bytes_per_rank: of masters, moments and indices, see `Engine.optimizer_bytes`.
        base_bytes_per_rank, adapter_bytes_per_rank: of frozen and of trained weights, see `Engine.weight_bytes`; 0 in
            checkpoints of releases that did not count them.
        steps, samples: of the optimizer steps done.
        tokens: without padding, of all ranks.
        seconds: in optimizer steps, without evaluation or saving.
        flops, possible_flops: operations that steps cannot do without, and those that the devices could do meanwhile
            (model/flops.py); 0 where one of them is not known.
        out_of_memory: how often a step ran out of memory, so that the micro-batch became smaller.
        measured: the scores at the phase's end, in a line; None before it, or without scores.
    """

    model_config = ConfigDict(strict=True)

    name: str
    adapters: Count
    trainable_parameters: Count
    optimizer_bytes_per_rank: Count
    base_bytes_per_rank: Count = 0
    adapter_bytes_per_rank: Count = 0
    micro_batch_size: Count
    global_batch_size: Count
    steps: Count = 0
    samples: Count = 0
    tokens: Count = 0
    seconds: Seconds = 0.0
    flops: Seconds = 0.0
    possible_flops: Seconds = 0.0
    out_of_memory: Count = 0
    measured: str | None = None

    @classmethod
    def of(
        cls,
        phase: Phase,
        before: PhaseRecord | None,
        parameters: int,
        optimizer_bytes: int,
        weight_bytes: tuple[int, int] = (0, 0),
    ) -> PhaseRecord:
        """The record of a phase that begins.

        Args:
            before: its record in the checkpoint from which it continues; counting continues from there.
            weight_bytes: of frozen and of trained weights.
        """
        counted = {} if before is None else before.model_dump(include=_COUNTED)
        return cls(
            name=phase.name,
            adapters=len(phase.plan.active),
            trainable_parameters=parameters,
            optimizer_bytes_per_rank=optimizer_bytes,
            base_bytes_per_rank=weight_bytes[0],
            adapter_bytes_per_rank=weight_bytes[1],
            micro_batch_size=phase.micro_batch_size,
            global_batch_size=phase.global_batch_size,
            **counted,
        )

    def add(self, samples: int, tokens: int, seconds: float, flops: float = 0.0, possible_flops: float = 0.0) -> None:
        """Count one optimizer step."""
        self.steps += 1
        self.flops += flops
        self.possible_flops += possible_flops
        self.samples += samples
        self.tokens += tokens
        self.seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        """Mean over the phase; 0 before the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Mean share of the devices' peak over the phase, 0 to 1; None where it is not known."""
        return self.flops / self.possible_flops if self.possible_flops else None


class BestStep(BaseModel):
    """The best validation so far.

    Attributes:
        step: of the run.
        value: None: no value was finite.
        waited: validations since.
    """

    model_config = ConfigDict(strict=True)

    step: Count
    value: Annotated[float, Field(allow_inf_nan=False)] | None
    waited: Count = 0


class StepLine(BaseModel):
    """A step's line for metrics.jsonl, see `step_line` in training/records.py; further numbers are extra fields."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, bool | int | float | dict[str, float] | None]

    step: Count
    phase: str
    loss: float | None
    tokens_per_second: Seconds


class RunRecord(BaseModel):
    """A run's past.

    Attributes:
        run: `RunFolder.identity` of the settings that the run began with.
        samples: `Splits.key` of the samples that it began with.
        micro_batch_size: the configured one when the run was last started.
        before: metrics before training; None without evaluation.
        phases: the finished phases.
        current: the phase in training; None between two phases.
        trackers: experiment tracker -> the id of its run.
        best: of the current phase; None without `training.keep_best` and `early_stopping`.
        unvalidated: the last step's line, if the run was asked to leave before the validation behind this step was
            done; the line is not logged yet.
    """

    model_config = ConfigDict(strict=True)

    run: str
    samples: str
    micro_batch_size: Count
    before: Annotated[dict[str, float] | None, FEW_KEYS] = None
    phases: Annotated[list[PhaseRecord], FailFast()] = []
    current: PhaseRecord | None = None
    trackers: Annotated[dict[str, str], FEW_KEYS] = {}
    best: BestStep | None = None
    unvalidated: StepLine | None = None

    @classmethod
    def empty(cls) -> RunRecord:
        """The record of a state that belongs to no run."""
        return cls(run="", samples="", micro_batch_size=0)

    def with_current(
        self,
        current: PhaseRecord,
        trackers: Mapping[str, str] | None = None,
        best: BestStep | None = None,
        unvalidated: Mapping[str, object] | None = None,
    ) -> RunRecord:
        """The record with a copy of `current`, which continues to count.

        Args:
            trackers: ids that are known by now; None: those of before.
        """
        return self.model_copy(
            update={
                "current": current.model_copy(),
                "trackers": self.trackers if trackers is None else dict(trackers),
                "best": best,
                "unvalidated": None if unvalidated is None else StepLine.model_validate(unvalidated),
            }
        )

    def shrunk(self, micro_batch_size: int) -> RunRecord:
        """The record after a step of the current phase ran out of memory, which continues with this micro-batch."""
        assert self.current is not None, "a phase is being trained"
        counted = self.current.out_of_memory + 1
        current = self.current.model_copy(update={"micro_batch_size": micro_batch_size, "out_of_memory": counted})
        return self.model_copy(update={"current": current})

    def next_phase(self, measured: str | None) -> RunRecord:
        """The record after the end of the current phase.

        Args:
            measured: its scores in a line.
        """
        assert self.current is not None, "a phase has been trained"
        finished = self.current.model_copy(update={"measured": measured})
        return self.model_copy(update={"phases": [*self.phases, finished], "current": None, "best": None})


def first_problem(error: ValidationError) -> str:
    """The first error in one line: the dotted name and the wrong value."""
    problem = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"{name!r:.100} is missing"
    return f"{name!r:.100} is {problem['input']!r:.60}"
