"""``method.budget``: what a run may need, for methods that choose which adapters live."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from sparse_llm_ft.config.types import Bytes, Section, Share


class Budget(Section):
    """A budget; at least one of the two.

    Attributes:
        memory: bytes of each device, as planned. The phase that trains all adapters gets the largest micro-batch up to
            ``training.micro_batch_size`` that fits; the choice makes the phase after it fit with that micro-batch
            itself.
        step_time: the largest share of a step with all adapters that a step may cost afterwards, by arithmetic.
    """

    memory: Bytes | None = Field(None, ge=1)
    step_time: Share | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.memory is None and self.step_time is None:
            raise ValueError("memory, step_time, or both")
        return self

    @model_serializer
    def _as_written(self) -> Any:
        """A number where there is only `step_time`, as it may be given."""
        if self.memory is None:
            return self.step_time
        return {"memory": self.memory} | ({} if self.step_time is None else {"step_time": self.step_time})

    def __str__(self) -> str:
        """For messages."""
        if self.memory is None:
            return f"{self.step_time:g}"
        parts = [f"memory: {self.memory / 2**30:.3g}GiB"]
        parts += [] if self.step_time is None else [f"step_time: {self.step_time:g}"]
        return f"{{{', '.join(parts)}}}"


def _from_number(value: Any) -> Any:
    return value if value is None or isinstance(value, Mapping | Budget) else {"step_time": value}


GivenBudget = Annotated[Budget | None, BeforeValidator(_from_number)]
"""A `Budget`; a plain number is its `step_time`."""
