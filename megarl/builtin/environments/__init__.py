"""The environments: a new one is a class with its section in a file here, and its name in ``EnvironmentConfig``.

Worker processes import this, so it stays light.
"""

from typing import Annotated

from pydantic import Field

from megarl.builtin.environments.base import BaseEnvironment, PythonEnvironment
from megarl.builtin.environments.calculator import CalculatorEnvironment
from megarl.builtin.environments.tower_of_hanoi import TowerOfHanoiEnvironment
from megarl.section import ByType

EnvironmentConfig = Annotated[
    PythonEnvironment | CalculatorEnvironment | TowerOfHanoiEnvironment,
    Field(discriminator="type"),
    ByType(),
]

__all__ = ["BaseEnvironment", "CalculatorEnvironment", "EnvironmentConfig", "PythonEnvironment", "TowerOfHanoiEnvironment"]
