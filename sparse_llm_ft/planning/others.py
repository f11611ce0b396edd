"""What another method would change in a planned run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pydantic import ValidationError

from sparse_llm_ft.config.registry import find_settings, method_names
from sparse_llm_ft.context.context import RunContext
from sparse_llm_ft.errors import UserError, reason_of
from sparse_llm_ft.planning.forecast import RunForecast, forecast
from sparse_llm_ft.planning.samples import SampleSizes


@dataclass(frozen=True)
class OtherMethod:
    """Another method in the place of the run's own, at its defaults.

    Attributes:
        forecast: None: the run's other settings exclude it, or its model cannot be traced.
        reason: why, if so.
    """

    name: str
    forecast: RunForecast | None
    reason: str = ""


def other_methods(context: RunContext, samples: SampleSizes, total_steps: int, on_gpu: bool) -> Iterator[OtherMethod]:
    """Every method that is not the run's, one after the other.

    Args:
        total_steps: of the run; any number if it is not known.
    """
    own = {settings.name for settings in context.config.method}
    for name in (n for n in method_names() if n not in own):
        kind = find_settings(name)
        try:
            settings = kind.model_validate({"name": name, **kind.example(len(context.targets), total_steps)})
            config = context.config.model_copy(update={"method": (settings,)})
            settings.check_run(config)
            yield OtherMethod(name, forecast(replace(context, config=config), samples=samples, on_gpu=on_gpu))
        except (UserError, ValidationError) as error:
            yield OtherMethod(name, None, reason_of(error, 120))
        except Exception as error:  # a tuner of PEFT may fail on the meta device in any way
            yield OtherMethod(name, None, f"cannot be planned ({type(error).__name__}: {reason_of(error, 80)})")
