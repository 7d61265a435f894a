"""What every environment has in common, and the one that is a class of the user's own."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

from megarl.builtin.environments.protocol import Environment
from megarl.builtin.sandbox import SandboxConfig
from megarl.errors import ConfigError, one_line
from megarl.section import Section, key
from megarl.user_functions import FUNCTION_PATTERN, import_function

CLASS_EXAMPLE = "for example my_package.environments:Shop"


class BaseEnvironment(Section):
    """An environment that answers the policy's turns (docs/environments.md).

    Attributes:
        plays: the task of reasoning_gym whose rows it needs; None where any row will do.
    """

    plays: ClassVar[str | None] = None

    type: str = key(..., "-", "Which environment.")
    options: dict[str, object] = key(dict, "-", "Keyword arguments of the class.")
    max_turns: int = key(8, "turns", "The episode ends after so many turns of the policy.", ge=1)
    timeout: float = key(10.0, "seconds", "Time one reset or step may take.", gt=0)
    in_process: bool = key(
        False,
        "-",
        "Run it on the trainer's event loop, for async environments that cannot be pickled; else in worker processes, where a "
        "time-out kills what never returns.",
    )
    sandbox: SandboxConfig = key(SandboxConfig, "-", "What its worker processes may do; in_process has no use for it.")
    weight: float = key(1.0, "-", "Factor of the episode's summed rewards in the reward of a response.")
    role: Literal["user", "tool"] = key("user", "-", "Role of its messages in the tokenizer's chat template.")
    observation_template: str | None = key(
        None, "-", "A text with {observation} in it that follows a turn; the tokenizer's chat template when not given."
    )

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.type

    @property
    def user_module(self) -> str | None:
        """The module of the user's own that it imports."""
        return None

    def mistakes(self) -> Iterator[str]:
        """Yield one line for each mistake that its own keys show, beginning with the key."""
        yield from ()

    @abstractmethod
    def load(self) -> Callable[..., Environment]:
        """Return the class; raises ConfigError where it cannot be imported."""

    def build(self) -> Callable[[], Environment]:
        """Return what makes the environment of one episode at each call.

        Raises:
            ConfigError: the class cannot be imported, or refuses the options.
        """
        factory = self.load()

        def build() -> Environment:
            return factory(**self.options)

        try:
            build()
        except Exception as error:  # the user's class may raise anything
            raise ConfigError(f"rollout.environment: {self.title} refuses options {self.options}: {one_line(error)}") from error
        return build


class PythonEnvironment(BaseEnvironment):
    """A class of your own."""

    type: Literal["python"] = key("python", "-", "Makes an object of a class for each episode.")
    function: str = key(..., "module:Class", "A class with reset and step, sync or async.", give=CLASS_EXAMPLE)

    @property
    def title(self) -> str:
        """The class, as messages call it."""
        return self.function

    @property
    def user_module(self) -> str | None:
        """The module of the user's own that it imports."""
        return self.function.partition(":")[0]

    def mistakes(self) -> Iterator[str]:
        """Yield a line for each mistake that its own keys show."""
        if not FUNCTION_PATTERN.fullmatch(self.function):
            yield f"function: {self.function!r} is not module:Class for type python; give {CLASS_EXAMPLE}"

    def load(self) -> Callable[..., Environment]:
        """Return the environment's class."""
        factory = import_function(self.function, "rollout.environment.function")
        if not all(callable(getattr(factory, method, None)) for method in ("reset", "step")):
            raise ConfigError(f"rollout.environment.function: {self.function} has no reset and step; see docs/environments.md")
        return factory
