"""A calculator as a tool: the policy may ask for values of expressions before it answers."""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Literal

from megarl.builtin.environments.base import BaseEnvironment
from megarl.builtin.environments.protocol import Environment
from megarl.section import key

MAX_CHARACTERS = 200  # of an expression; with them no result has more digits than a turn has room for


class CalculatorEnvironment(BaseEnvironment):
    """A calculator as a tool."""

    type: Literal["calculator"] = key("calculator", "-", "Answers each turn that asks for the value of an expression.")

    def load(self) -> Callable[..., Environment]:
        """Return the environment's class."""
        return Calculator


_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: dict[type[ast.unaryop], Callable[[Fraction], Fraction]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Calculator:
    """A turn that calls it is answered with the value; a turn that does not is the policy's answer and ends the episode.

    It gives no reward: the scorers read the last turn.
    """

    def __init__(self, pattern: str = r"<calculator>(.*?)</calculator>", answer: str = "{value}") -> None:
        """Prepare it: ``pattern``'s first group is the expression; ``answer`` is what the policy reads, with {value} in it."""
        self._pattern = re.compile(pattern, re.DOTALL)
        if self._pattern.groups == 0:
            raise ValueError(f"pattern {pattern!r} has no group; put the expression's part in ( )")
        if "{value}" not in answer:
            raise ValueError(f"answer {answer!r} has no {{value}} in it")
        self._answer = answer

    def reset(self, prompt: str, reference: Mapping[str, object], seed: int) -> None:
        """Do nothing, as the prompt says all."""

    def step(self, response: str) -> tuple[str | None, float | None, bool]:
        """Return the value of the turn's last call; an expression that has none is told so."""
        calls = self._pattern.findall(response)
        if not calls:
            return None, None, True
        call = calls[-1] if isinstance(calls[-1], str) else calls[-1][0]
        return self._answer.replace("{value}", calculate(call)), None, False


def calculate(expression: str) -> str:
    """Return the exact value of an expression of numbers, + - * / and brackets, a fraction as such; ``error`` if there is none."""
    if len(expression) > MAX_CHARACTERS:
        return "error"
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    raise ValueError(f"{ast.unparse(node)} is no number")
