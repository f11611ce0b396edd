"""Keep out of sight what the libraries below say to each other and no user can act on."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Call before torch is imported.

    Silenced are bitsandbytes' note on an optional CPU kernel, and warnings about calls that torch and transformers
    make to themselves. (DeepSpeed sets its own level on import; engine.py follows it.)
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers)\.")
