"""Everything that MegaRL knows of one model family."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from megarl.families.base import weight_blocks
from megarl.families.base.architecture import Architecture
from megarl.families.base.config_json import ConfigJson
from megarl.families.base.engine_rules import EngineLayout, EngineName, EngineRule
from megarl.families.base.weight_rules import LeftOut, Rule


class Family(ABC):
    """One model family. Its file has one subclass, and an object of it named ``FAMILY``.

    Attributes:
        never_tied_by: engines that give the family an output layer of its own, tied or not.
        experts_everywhere_in: engines that give each of the family's layers experts, whatever config.json says.
    """

    never_tied_by: ClassVar[tuple[EngineName, ...]] = ()
    experts_everywhere_in: ClassVar[tuple[EngineName, ...]] = ()

    @abstractmethod
    def read(self, config: ConfigJson) -> Architecture:
        """Read the family's config.json.

        Raises:
            ConfigError: a size is missing or does not fit another.
        """

    @abstractmethod
    def weight_rules(self, model: Architecture) -> tuple[Rule, ...]:
        """Return the table of parameters: the Hugging Face tensors of each, and how tensor parallel ranks share it."""

    @abstractmethod
    def engine_rules(self, model: Architecture, engines: EngineLayout) -> tuple[EngineRule, ...]:
        """Return the table of what engines hold; a rule holds where the model has all its tensors."""

    def left_out(self, model: Architecture) -> tuple[LeftOut, ...]:
        """Return the tensors of checkpoints that no parameter takes."""
        return weight_blocks.left_out(model)

    def completed(self, values: Mapping[str, object]) -> dict[str, Any]:
        """Return a config.json to be written, with what transformers needs of the family and a file may leave out."""
        return dict(values)

    def refusals(self, model: Architecture) -> Iterator[str]:
        """Say what of this family's models the trainer does not compute; one line, without the file's name, for each."""
        yield from ()

    def engine_refusals(self, model: Architecture, engine: EngineName) -> Iterator[str]:
        """Say what the engine computes otherwise than transformers and the trainer; one line for each."""
        yield from ()
