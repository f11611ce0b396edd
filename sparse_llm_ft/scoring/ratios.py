"""Given ratios: one for all modules, falling with depth, or from a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeGuard

from sparse_llm_ft.errors import ConfigError
from sparse_llm_ft.plan import ModuleName, Shape

Ratio = tuple[float, float]
"""(p_row, p_col)"""

SETTING = "method.ratios"


def balanced(names: Iterable[str], p: float) -> dict[str, Ratio]:
    """The same p for rows and columns of every module (Frankle & Carbin; section 5.3)."""
    return dict.fromkeys(names, (p, p))


def pyramidal(names: Iterable[str], p: float) -> dict[str, Ratio]:
    """p_l = p^l in the l-th layer, counted from 1 (Liu et al.; section 5).

    l is the layer's own number in the model plus 1, even if lower layers are not targets. A decoder after an encoder
    counts from 1 again. A module in no numbered layer has p, as in the first layer.
    """
    ratios = {}
    for name in names:
        number = ModuleName.parse(name).number
        value = p ** (1 if number is None else number + 1)
        ratios[name] = (value, value)
    return ratios


def with_share(ratios: Mapping[str, Ratio], shapes: Mapping[str, Shape], share: float) -> dict[str, Ratio]:
    """The ratios times one factor, none above 1, so that adapters of one rank keep `share` of their values (ours).

    Ratios of 0 stay 0. If the others cannot hold the share, they are 1.

    Args:
        shapes: module -> (out_features, in_features).
        share: of the sum of all sides.
    """
    sides = [(p, size) for name, shape in shapes.items() for p, size in zip(ratios[name], shape, strict=True)]
    wanted = share * sum(size for _, size in sides)
    low, high = 0.0, 1 / min((p for p, _ in sides if p), default=1.0)  # at `high` all but zeros are 1
    for _ in range(100):
        middle = (low + high) / 2
        enough = sum(min(1.0, middle * p) * size for p, size in sides) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return {name: (min(1.0, high * ratios[name][0]), min(1.0, high * ratios[name][1])) for name in shapes}


def ratios_from_table(table: Mapping[str, object], names: Iterable[str]) -> dict[str, Ratio]:
    """Ratios from a table: module name, or ending of names -> p or [p_row, p_col].

    ``q_proj: 0.5`` applies to every module whose name ends in ``.q_proj``. The longest ending that fits decides.

    Raises:
        ConfigError: a value is no ratio; an entry fits no module, or a module no entry.
    """
    known = {key: _ratio(key, value) for key, value in table.items()}
    used: set[str] = set()
    ratios = {}
    for name in names:
        fitting = [key for key in known if name == key or name.endswith("." + key)]
        if not fitting:
            raise ConfigError(SETTING, f"the table has no entry for module {name!r}", "expected one, or an ending")
        used |= set(fitting)
        ratios[name] = known[max(fitting, key=len)]
    unused = [key for key in known if key not in used]
    if unused:
        raise ConfigError(
            SETTING, f"the table's {unused[0]!r} is not a target module", "expected module names or endings of them"
        )
    return ratios


def _ratio(key: str, value: object) -> Ratio:
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) == 2 and _is_share(pair[0]) and _is_share(pair[1]):
        return float(pair[0]), float(pair[1])
    raise ConfigError(SETTING, f"the table's {key} is {value!r:.60}", "expected p or [p_row, p_col] in 0 to 1")


def _is_share(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0  # NaN is not
