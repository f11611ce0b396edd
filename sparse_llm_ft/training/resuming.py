"""Where a run goes on: its newest valid checkpoint, the same on every rank."""

from __future__ import annotations

from sparse_llm_ft.distributed import World
from sparse_llm_ft.errors import UserError
from sparse_llm_ft.fitting import Expected
from sparse_llm_ft.state import TrainState
from sparse_llm_ft.training.agreement import from_rank_zero, on_every_rank, on_rank_zero
from sparse_llm_ft.training.checkpoints import checkpoint_folder, load_checkpoint, newest_valid
from sparse_llm_ft.training.display import Display
from sparse_llm_ft.training.run_folder import RunFolder


def newest_state(folder: RunFolder, run: str, world: World, display: Display, real: Expected) -> TrainState | None:
    """The newest valid checkpoint; None where there is none. Rank 0 chooses, all ranks continue from the same one.

    Args:
        run: whose checkpoint it must be (`RunFolder.identity`).
        real: what a checkpoint's claims are held against.

    Raises:
        UserError: there are checkpoints, and none can be used.
    """
    chosen = -1

    def choose() -> None:
        nonlocal chosen
        newest, complaints = newest_valid(folder.checkpoints, real, run)
        if newest is None and complaints:
            raise UserError(
                f"no checkpoint can be used ({complaints[0].rpartition(';')[0]}); "
                f"to start anew, choose another output_dir than {folder.path}"
            )
        for complaint in complaints:
            display.say(complaint)
        chosen = int(newest.name.removeprefix("step-")) if newest else -1

    on_rank_zero(world, choose)
    step = from_rank_zero(chosen)
    if step < 0:
        return None
    display.say(f"resuming from step {step}")
    states: list[TrainState] = []
    path = checkpoint_folder(folder.checkpoints, step)
    hint = "all nodes must share the file system of output_dir"
    on_every_rank(lambda: states.append(load_checkpoint(path, real, run)[0]), hint)
    return states[0]
