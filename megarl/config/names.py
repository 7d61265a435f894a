"""Texts that name something: one of a list, or a user's own ``module:function``."""

from dataclasses import dataclass

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from megarl.user_functions import FUNCTION_PATTERN


@dataclass(frozen=True, slots=True)
class Name:
    """Annotates a text that is one of ``choices`` or, with ``or_function``, a user's own ``module:function``."""

    choices: tuple[str, ...]
    or_function: bool = False

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._validated, handler(source))

    def _validated(self, value: str) -> str:
        if value in self.choices or (self.or_function and FUNCTION_PATTERN.fullmatch(value)):
            return value
        raise PydanticCustomError("literal_error", "is not one of the names")  # reported as Literal's own error is

    def in_words(self) -> str:
        """Return the names as a person reads them."""
        function = ["a function of your own, `module:function`"] if self.or_function else []
        return " or ".join([*(f"`{choice}`" for choice in self.choices), *function])
