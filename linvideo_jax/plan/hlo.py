"""XLA's text of a compiled program: its computations, instructions, sizes and loops."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(, .*)?$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
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
    """The program that `compiled.as_text()` prints.

    Raises: ValueError for an instruction that cannot be read, which might be what is counted.
    """
    computations, entry, current = {}, "", None
    for line in _whole_lines(text):
        if current is None:
            if match := _HEADER.match(line):
                current = computations[match[2]] = {}
                entry = match[2] if match[1] else entry
            elif _INSTRUCTION.match(line):
                raise ValueError(f"an instruction of no computation: {line.strip()[:200]}")
        elif _END.match(line):
            current = None
        elif match := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
            root, name, shape, operation, operands, attributes = match.groups()
            current[name] = Instruction(
                name, shape, operation, operands, attributes or "", root is not None
            )
        elif line.strip():
            raise ValueError(f"no instruction of a compiled program: {line.strip()[:200]}")
    return Program(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those joined between which an attribute breaks: Pallas kernels may have such ones."""
    whole = ""
    for line in text.splitlines():
        if whole and (line.startswith(" ") or not whole.startswith(" ") or _END.match(line)):
            yield whole
            whole = ""
        whole += line
    if whole:
        yield whole


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

    XLA's own note where there is one; else a counter that rises by a constant to another: by two
    where the compiler unrolled a product that it overlaps with its exchange.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition, body = (program.computations[loop.called(name)[0]] for name in ("condition", "body"))
    root = _root(condition)
    if root.operation != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, limit = (condition.get(name) for name in root.operand_names)
    limit = constant(condition, limit)
    if counter is None or counter.operation != "get-tuple-element" or limit is None:
        return None
    index = tuple_index(counter)
    step = _rise(body, _element(body, _root(body), index), index)
    if not step:
        return None
    start = constant(computation, _element(computation, computation[loop.operand_names[0]], index))
    return -(-(limit - (start or 0)) // step)


def _root(computation: Computation) -> Instruction:
    return next(one for one in computation.values() if one.is_root)


def _element(computation: Computation, value: Instruction, index: int) -> Instruction | None:
    """What stands at an index of a tuple; None if the text does not say."""
    return computation.get(value.operand_names[index]) if value.operation == "tuple" else None


def _rise(body: Computation, value: Instruction | None, index: int) -> int | None:
    """By how much a value of a loop's body is above the counter; None if that is not known."""
    while value is not None and value.operation in _COPIES:
        value = body.get(value.operand_names[0])
    if value is None or value.operation not in ("add", "get-tuple-element"):
        return None
    if value.operation == "get-tuple-element":
        of = body.get(value.operand_names[0])
        return 0 if of and of.operation == "parameter" and tuple_index(value) == index else None
    first, second = (body.get(name) for name in value.operand_names)
    base, more = _rise(body, first, index), constant(body, second)
    return None if base is None or more is None else base + more


def is_cut(computation: Computation, value: Instruction) -> bool:
    """Whether all that becomes of a value is that a part of it is taken."""
    users = [one for one in computation.values() if value.name in one.operand_names]
    if value.is_root or len(users) != 1:
        return False
    if users[0].operation in (*_COPIES, "transpose"):
        return is_cut(computation, users[0])
    return users[0].operation == "dynamic-slice" and users[0].operand_names[0] == value.name


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
