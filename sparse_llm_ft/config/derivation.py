"""Settings that derive Partial-LoRA's ratios. Method, phase and scoring take them from here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool, StrictInt

from sparse_llm_ft.config.types import Section, Share

MeasureName = Literal["svd", "snip", "imp"]
FloorMetric = Literal["accuracy", "loss"]
SearchName = Literal["single", "joint"]


class ForwardPasses(Section):
    """The forward passes of a measurement.

    Attributes:
        micro_batch_size: samples in one forward pass.
    """

    micro_batch_size: StrictInt = Field(32, ge=1)


class DerivationSettings(ForwardPasses):
    """Algorithm 1 of Partial-LoRA (Damirchi et al., 2024), and a reading of it that is ours.

    Attributes:
        derivation: what a search zeroes. ``joint`` (ours): the rows, or the columns, of all modules together, of each
            the least important ones that hold one share of its importance; the search is over that share. ``single``
            (Algorithm 1): those of one module, with all others intact. docs/methods.md says why it is not the default.
        importance: the measure that ranks rows and columns: ``svd`` (eq. 4-5), ``snip`` or ``imp``.
        accuracy_floor: Algorithm 1 zeroes indices until accuracy on D_t falls below this share of the base's.
        floor_metric: ``loss`` stops when the mean loss exceeds the base's / accuracy_floor instead, for bases that
            cannot do the task yet.
        flow_preservation: add the next layer's scores to a layer's before cutting (appendix H).
    """

    derivation: SearchName = "joint"
    importance: MeasureName = "svd"
    accuracy_floor: Share = 0.9
    floor_metric: FloorMetric = "accuracy"
    flow_preservation: StrictBool = False
