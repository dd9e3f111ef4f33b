"""How often the loops of a compiled program run.

The text has no trip counts. They follow from a loop's condition, the state that it starts from and
what an iteration makes of it, so the few scalar operations that the condition depends on are run
here until it is false. Constants reach a loop in many ways (in its own text, through the state of
the loops around it, through copies and fusions), and a reader that guesses 1 where it does not
recognise one drops whole layers.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable

from internvl_jax.plan.hlo import Computation, HloError, Module, Op


class TripCountError(HloError):
    """How often a loop runs does not follow from constants in the text."""


Value = int | Callable[[int], "Value"] | None  # a scalar, a tuple's elements, or not known

_INTEGER: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_SAME = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "broadcast"}
_MOST_TRIPS = 100_000


@dataclasses.dataclass(frozen=True)
class Scope:
    """A computation with what is known of its arguments."""

    module: Module
    computation: Computation
    arguments: Callable[[int], Value] = lambda _: None

    def value(self, name: str) -> Value:
        """The integer that an operation gives, its tuple of values, or None where unknown."""
        op = self.computation.by_name[name]
        read = lambda i: self.value(op.operands[i])
        if op.opcode == "constant":
            if op.literal in ("true", "false"):
                return int(op.literal == "true")
            return int(op.literal) if re.fullmatch(r"-?\d+", op.literal) else None
        if op.opcode == "parameter":
            return self.arguments(int(op.literal))
        if op.opcode == "tuple":
            return read
        if op.opcode == "get-tuple-element":
            elements = read(0)
            return elements(op.integers("index")[0]) if callable(elements) else None
        if op.opcode in _SAME:
            return read(0)
        if op.opcode in _INTEGER or op.opcode == "compare":
            a, b = read(0), read(1)
            if not (isinstance(a, int) and isinstance(b, int)):
                return None
            if op.opcode == "compare":
                return int(_COMPARE[op.attribute("direction") or ""](a, b))
            return _INTEGER[op.opcode](a, b)
        if op.opcode in ("fusion", "call"):
            return self.enter(op).result()
        if op.opcode == "while":
            return self.body(op).arguments(0)
        return None

    def result(self) -> Value:
        return self.value(self.computation.root.name)

    def enter(self, op: Op) -> Scope:
        """The scope inside a fusion or call of this one."""
        callee = self.module.fused(op)
        return Scope(self.module, callee, lambda i: self.value(op.operands[i]))

    def branches(self, op: Op) -> list[Scope]:
        """The scopes of a conditional's branches."""
        names = op.called("branch_computations", "true_computation", "false_computation")
        return [
            Scope(self.module, self.module.computation(name), lambda _, a=a: self.value(a))
            for name, a in zip(names, op.operands[1:])
        ]

    def body(self, op: Op) -> Scope:
        """The scope inside a loop: of its state, what no iteration changes is known."""
        body = self.module.computation(op.called("body")[0])
        state = self.value(op.operands[0])

        def element(i: int) -> Value:
            if not callable(state) or body.root.opcode != "tuple":
                return None
            source = body.by_name[body.root.operands[i]]
            while source.opcode in ("copy", "bitcast"):
                source = body.by_name[source.operands[0]]
            kept = source.opcode == "get-tuple-element" and source.integers("index") == (i,)
            kept = kept and body.by_name[source.operands[0]].opcode == "parameter"
            return state(i) if kept else None

        return Scope(self.module, body, lambda _: element)

    def trips(self, op: Op) -> int:
        """How often the body of a `while` of this scope runs.

        Raises:
            TripCountError: the condition depends on data.
        """
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.attributes)
        if known:
            return int(known[1])
        condition = self.module.computation(op.called("condition")[0])
        body = self.module.computation(op.called("body")[0])
        state = self.value(op.operands[0])
        before: dict[int, Value] = {}
        for trips in range(_MOST_TRIPS):
            read: dict[int, Value] = {}
            again = Scope(
                self.module, condition, lambda _, state=state, read=read: _recorded(state, read)
            ).result()
            if not isinstance(again, int):
                raise TripCountError(
                    f"Loop {op.name} in {self.computation.name} ({op.op_name or 'no source'}): its "
                    f"condition {condition.name} depends on data, so how often it runs is unknown "
                    "before it runs. Give the loop a bound that is a constant."
                )
            if not again:
                return trips
            if read == before:
                break
            before = read
            state = _next(Scope(self.module, body, lambda _, state=state: state))
        raise TripCountError(
            f"Loop {op.name} in {self.computation.name} does not end within {_MOST_TRIPS} times: "
            f"its condition {condition.name} or its step was misread."
        )


def _recorded(state: Value, read: dict[int, Value]) -> Value:
    """The state of a loop; what is read of it is noted in `read`."""
    if not callable(state):
        return state

    def element(i: int) -> Value:
        read[i] = state(i)
        return read[i]

    return element


def _next(body: Scope) -> Value:
    """State after one more iteration; an element is computed when the condition asks for it."""
    result = body.result()
    return functools.cache(result) if callable(result) else result
