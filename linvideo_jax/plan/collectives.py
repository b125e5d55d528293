"""Communication of a compiled program, counted from its text: kinds, groups and bytes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from linvideo_jax.plan import hlo

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# A TPU's asynchronous collective stands in several fusions: its start, with -1 here, its steps
# beside other work, and its end.
_LATER_PART = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(?!-1")')


@dataclass(frozen=True)
class Collective:
    """One instruction. operand, result: bytes on one chip; group: chips that take part together;
    times: how often it runs in one call of the program (a fraction where a branch is not always
    taken)."""

    kind: str
    operand: int
    result: int
    group: int
    times: float

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in one call of the program, by the ring's algorithms."""
        share = (self.group - 1) / self.group
        once = {
            "all-gather": share * self.result,
            "reduce-scatter": share * self.operand,
            "all-reduce": 2 * share * self.operand,
            "all-to-all": share * self.operand,
            "collective-permute": self.operand,
        }[self.kind]
        return self.times * once


@dataclass(frozen=True)
class Communication:
    """All of a program; unknown_loops: loops of unknown length, each counted `loops` times."""

    collectives: tuple[Collective, ...]
    unknown_loops: int
    loops: float = 1.0

    def by_kind(self) -> dict[str, tuple[float, float]]:
        """{kind: (calls, bytes that a chip sends)} of one call of the program."""
        totals = dict.fromkeys(KINDS, (0.0, 0.0))
        for one in self.collectives:
            calls, sent = totals[one.kind]
            totals[one.kind] = (calls + one.times, sent + one.sent)
        return {kind: total for kind, total in totals.items() if total[0]}

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in one call of the program."""
        return sum(one.sent for one in self.collectives)


def count(
    text: str,
    num_devices: int,
    branches: Sequence[float] | None = None,
    partitioned: bool = False,
    loops: float = 1.0,
) -> Communication:
    """Counts the collectives of `compiled.as_text()`, bodies of loops times their trip counts.

    num_devices: of the program, for instructions whose group is everyone. branches: how often each
    branch is taken in conditionals that have so many; in all others, the branch that sends most.
    partitioned: the text is what the partitioner gave and compilers for GPUs go on from: they make
    a reduce-scatter of an all-reduce of which each device keeps a part. loops: how often a loop of
    unknown length runs.
    """
    program = hlo.parse(text)
    unknown = []

    def walk(name: str) -> list[Collective]:
        computation, found = program.computations[name], []
        for instruction in computation.values():
            match instruction.operation:
                case "while":
                    trips = hlo.trip_count(program, computation, instruction)
                    if trips is None:
                        unknown.append(instruction.name)
                    times = loops if trips is None else trips
                    inside = walk(instruction.called("body")[0])
                    found += [replace(one, times=one.times * times) for one in inside]
                case "conditional":
                    found += branch(instruction)
                case "call":
                    found += walk(instruction.called("to_apply")[0])
                case "fusion" | "async-start":
                    called = instruction.called("calls")[0]
                    inside = walk(called)
                    if called.startswith("all-reduce-scatter"):  # how a TPU's program writes it
                        inside = [replace(one, kind="reduce-scatter") for one in inside]
                    found += inside
                case _:
                    found += one_instruction(computation, instruction)
        return found

    def branch(instruction: hlo.Instruction) -> list[Collective]:
        names = instruction.called("branch_computations") or [
            *instruction.called("true_computation"),
            *instruction.called("false_computation"),
        ]
        each = [walk(name) for name in names]
        if branches is None or len(branches) != len(each):
            return max(each, key=lambda ones: sum(one.sent for one in ones))
        return [
            replace(one, times=one.times * weight)
            for ones, weight in zip(each, branches, strict=True)
            for one in ones
            if weight
        ]

    def one_instruction(computation, instruction) -> list[Collective]:
        kind = instruction.operation.removesuffix("-start")
        if kind not in KINDS or _LATER_PART.search(instruction.attributes):
            return []
        operands = (computation.get(name) for name in instruction.operand_names)
        operand = sum(hlo.shape_bytes(one.shape) for one in operands if one is not None)
        group = _group(instruction.attributes, num_devices)
        result = hlo.shape_bytes(instruction.shape)
        if partitioned and kind == "all-reduce" and hlo.is_cut(computation, instruction):
            kind = "reduce-scatter"
        if instruction.operation.endswith("-start") and kind != "all-reduce":
            # The tuple holds the operands too. A GPU's program gathers several arrays as one.
            result = operand * group if kind == "all-gather" else operand
        return [Collective(kind, operand, result, group, 1.0)]

    collectives = walk(program.entry)
    return Communication(tuple(one for one in collectives if one.group > 1), len(unknown), loops)


def _group(attributes: str, num_devices: int) -> int:
    """Devices of one group, from either of XLA's three spellings."""
    if match := re.search(r"replica_groups=mesh\[([^]]*)\].*? \{('[^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    # A permutation names pairs: no group, and each sends what it holds.
    return num_devices
