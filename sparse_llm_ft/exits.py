"""How a process ends when something is wrong: one line, once, and an exit status that says whose fault it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sparse_llm_ft.distributed import World
from sparse_llm_ft.errors import TrainingError, UserError

USER_ERROR, TRAINING_ERROR, INTERRUPTED = 2, 1, 130
_GRACE_SECONDS = 5.0


@contextmanager
def one_line_errors(world: World) -> Iterator[None]:
    """Turn a `UserError` into its line and exit status 2, a `TrainingError` into its line and status 1, Ctrl-C
    into a line and status 130.

    All ranks meet the same error, and rank 0 says it. The others wait a moment before they leave: launchers kill
    everyone when the first process fails, and that must not be before rank 0 has spoken. If then the first process of
    another node is still alive, the error may be its own (a file missing there), and it says so too.
    """
    try:
        yield
    except (UserError, TrainingError) as error:
        status = USER_ERROR if isinstance(error, UserError) else TRAINING_ERROR
        if world.rank != 0:
            time.sleep(_GRACE_SECONDS)
        if world.local_rank == 0:
            where = f"rank {world.rank}: " if world.rank else ""
            print(f"error: {where}{error}", file=sys.stderr, flush=True)
        sys.exit(status)
    except KeyboardInterrupt:
        if world.rank == 0:
            print("interrupted; the same command continues from the last checkpoint", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
