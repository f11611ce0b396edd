"""What every method's settings have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from sparse_llm_ft.config.types import Section

if TYPE_CHECKING:
    from sparse_llm_ft.config.schema import RunConfig


class MethodSettings(Section):
    """The keys of a ``method`` section, and what the method requires of the rest of the config.

    Each method's settings are a subclass, in the file of its rule. Neither this class nor a subclass needs torch, so
    the run reports a wrong setting within a second.

    Attributes:
        name: the method's name.
        composes: ``shares`` adapters between modules, ``masks`` rows and columns, ``weighs`` adapters with omega:
            methods of different kinds can follow each other, see `check_chain`. ``alone`` composes with none.
        why_alone: completes "<name> ..." if `composes` is ``alone``.
        free: keys that change how a run is carried out and not what it computes; a resumed run may differ in them.
    """

    composes: ClassVar[Literal["alone", "shares", "masks", "weighs"]] = "alone"
    why_alone: ClassVar[str] = "does not say how it composes"
    free: ClassVar[frozenset[str]] = frozenset()

    name: str

    @property
    def alone(self) -> str | None:
        """Why these settings compose with no other method, as text behind the name; None if they compose."""
        return self.why_alone if self.composes == "alone" else None

    @classmethod
    def example(cls, adapters: int, total_steps: int) -> dict[str, object]:
        """Values of the keys that have no default, for a comparison with other methods.

        Args:
            adapters: number of target modules.
            total_steps: optimizer steps of the run.
        """
        return {}

    @property
    def draws_samples(self) -> bool:
        """Whether the method needs a part of all training samples, which a stream cannot give."""
        return False

    @property
    def memory_budget(self) -> int | None:
        """Bytes of each device that every phase must fit into, as planned; None: no limit."""
        return None

    @property
    def grows_batch(self) -> bool:
        """Whether a later phase may get a larger micro-batch."""
        return False

    @property
    def open_keys(self) -> frozenset[str]:
        """Keys that the user has left out, and for which the run may choose another value than the default."""
        return frozenset()

    def without_growth(self) -> Self:
        """These settings, under which no phase gets a larger micro-batch."""
        return self

    def with_files(self) -> Self:
        """These settings with the contents of the files that they name, so that a run's config.yaml is complete.

        Raises:
            ConfigError: a file cannot be read.
        """
        return self

    def remarks(self, epoch_steps: int) -> list[str]:
        """Log lines about settings that are allowed and differ from the method's paper.

        Args:
            epoch_steps: optimizer steps of one pass over the training set.
        """
        return []

    def check(self, total_steps: int | None) -> None:
        """Refuse settings that contradict each other or the run's length.

        Args:
            total_steps: optimizer steps of the run; None while they are unknown.

        Raises:
            ConfigError: naming the setting.
        """

    def check_run(self, config: RunConfig) -> None:
        """Refuse settings of other sections that the method excludes.

        Raises:
            ConfigError: naming the setting.
        """
