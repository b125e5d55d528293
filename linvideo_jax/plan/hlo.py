"""XLA's text of a compiled program: its computations, instructions, sizes and loops."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(, .*)?$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_COPIES = ("copy", "bitcast", "convert", "reshape")


@dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape operation(operands), attributes`."""

    name: str
    shape: str
    operation: str
    operands: str
    attributes: str
    is_root: bool

    @property
    def operand_names(self) -> list[str]:
        """Names of the operands, in order."""
        return _NAME.findall(self.operands)

    def called(self, kind: str) -> list[str]:
        """Computations under an attribute such as "body", "calls" or "branch_computations"."""
        for name, value in _CALLED.findall(self.attributes):
            if name == kind:
                return [one.strip().lstrip("%") for one in value.strip("{}").split(",")]
        return []


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """Computations by name, instructions of each by name, in their order."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` prints."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None:
            if match := _HEADER.match(line):
                current = computations[match[2]] = {}
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
            root, name, shape, operation, operands, attributes = match.groups()
            current[name] = Instruction(
                name, shape, operation, operands, attributes or "", root is not None
            )
    return Program(computations, entry)


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple, such as `(bf16[8,128]{1,0}, pred[])`."""
    return sum(array_bytes(shape))


def array_bytes(shape: str) -> Iterator[int]:
    """Bytes of each array of a shape."""
    shape = re.sub(r"\{[^}]*\}", "", shape)
    for kind, bits, sides in _ARRAY.findall(shape):
        width = int(bits) if bits else 8 * (kind == "pred")
        yield math.prod(int(side) for side in sides.split(",") if side) * width // 8


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs; None where the text does not say.

    XLA's own note where there is one; else a counter that rises by one to a constant.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition = program.computations[loop.called("condition")[0]]
    root = next(one for one in condition.values() if one.is_root)
    if root.operation != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, limit = (condition.get(name) for name in root.operand_names)
    limit = constant(condition, limit)
    if counter is None or counter.operation != "get-tuple-element" or limit is None:
        return None
    start = computation.get(loop.operand_names[0])
    if start is not None and start.operation == "tuple":
        start = computation.get(start.operand_names[tuple_index(counter)])
    return limit - (constant(computation, start) or 0)


def tuple_index(instruction: Instruction) -> int:
    """Of a `get-tuple-element`."""
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def constant(computation: Computation, instruction: Instruction | None) -> int | None:
    """The integer behind an instruction, through copies; None if it is no constant."""
    while instruction is not None and instruction.operation in _COPIES:
        instruction = computation.get(instruction.operand_names[0])
    if instruction is None or instruction.operation != "constant":
        return None
    return int(instruction.operands) if re.fullmatch(r"-?\d+", instruction.operands) else None
