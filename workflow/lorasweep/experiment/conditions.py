"""Conditions on a point's settings, written as text: `lora_rank > 32 and lr >= 1e-3`.

They are parsed by Python's parser and evaluated here. Only the syntax that `EXPECTED` describes is evaluated.
"""

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lorasweep.util.errors import InputError, nearest

EXPECTED = "comparisons (< <= > >= == != in, not in) of keys, numbers, quoted text, lists, true, false and null, "
EXPECTED += "joined by and, or, not and parentheses; numbers can be added, subtracted, multiplied and divided"

LONGEST = 1000
"""Maximum length of a condition, in characters."""

_WORDS = {"true": True, "false": False, "null": None}
"""Constants, as YAML writes them."""

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Condition:
    """A condition on settings. Its syntax and keys are checked on construction."""

    def __init__(self, text: str, known: Collection[str], where: str) -> None:
        """Parse a condition. `known` are the keys that it may use; `where` names it in messages.

        Raises:
            InputError: The text is not a condition, or uses an unknown key.
        """
        self._text = text
        self._where = where
        if len(text) > LONGEST:
            raise InputError(f"{where}: {len(text)} characters are invalid", f"{LONGEST} at most")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._refuse(getattr(error, "msg", str(error))) from error
        self.keys = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)} - _WORDS.keys()
        for key in sorted(self.keys - set(known)):
            raise InputError(f"{where}: unknown key '{key}'{nearest(key, known)}", ", ".join(known))
        self._check(self._tree)

    def holds(self, settings: Mapping[str, Any]) -> bool:
        """Whether the settings, by key, satisfy the condition.

        Raises:
            InputError: Values cannot be compared or used in arithmetic, or the result is not a boolean.
        """
        try:
            result = self._evaluate(self._tree, settings)
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            values = ", ".join(f"{key}: {settings[key]!r}" for key in sorted(self.keys))
            raise self._refuse(f"{error} (with {values})") from error
        if not isinstance(result, bool):
            raise self._refuse(f"it is {result!r}, neither true nor false")
        return result

    def _refuse(self, why: str) -> InputError:
        return InputError(f"{self._where}: {self._text!r} is invalid: {why}", EXPECTED)

    def _check(self, tree: ast.AST) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant):
                is_supported = isinstance(node.value, bool | int | float | str | None)
            elif isinstance(node, ast.Compare):
                is_supported = all(type(comparison) in _COMPARISONS for comparison in node.ops)
            elif isinstance(node, ast.BinOp):
                is_supported = type(node.op) in _ARITHMETIC
            elif isinstance(node, ast.UnaryOp):
                is_supported = isinstance(node.op, ast.Not | ast.USub)
            else:
                is_supported = not isinstance(node, ast.expr) or isinstance(node, ast.BoolOp | ast.Name | ast.List)
            if not is_supported:
                raise self._refuse(f"{ast.unparse(node)!r} is not supported")

    def _evaluate(self, node: ast.expr, settings: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                value = _WORDS[node.id] if node.id in _WORDS else settings[node.id]
                return [*value] if isinstance(value, tuple) else value
            case ast.List():
                return [self._evaluate(item, settings) for item in node.elts]
            case ast.BoolOp():
                wanted = isinstance(node.op, ast.Or)
                # Short-circuits as Python does, so that `lora_alpha != null and lora_alpha > 16` is safe.
                return wanted if any(self._is_true(v, settings) == wanted for v in node.values) else not wanted
            case ast.UnaryOp(op=ast.Not()):
                return not self._is_true(node.operand, settings)
            case ast.UnaryOp():
                return -_number(self._evaluate(node.operand, settings))
            case ast.BinOp():
                left, right = (_number(self._evaluate(side, settings)) for side in (node.left, node.right))
                return _ARITHMETIC[type(node.op)](left, right)
            case ast.Compare():
                sides = [self._evaluate(side, settings) for side in (node.left, *node.comparators)]
                pairs = zip(node.ops, sides, sides[1:], strict=False)
                return all(_COMPARISONS[type(comparison)](left, right) for comparison, left, right in pairs)
        raise AssertionError(node)

    def _is_true(self, node: ast.expr, settings: Mapping[str, Any]) -> bool:
        result = self._evaluate(node, settings)
        if not isinstance(result, bool):
            raise TypeError(f"{ast.unparse(node)!r} is {result!r}, neither true nor false")
        return result


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value
