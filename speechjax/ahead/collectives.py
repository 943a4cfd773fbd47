"""What devices say to each other in a compiled program, read from its HLO text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
         "ragged-all-to-all")  # fmt: skip

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_SET = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_CONDITION, _BODY = re.compile(r"\bcondition=%?([\w.\-]+)"), re.compile(r"\bbody=%?([\w.\-]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Traffic(NamedTuple):
    """How often a step does one kind of collective, and how many `bytes` of a device take part in all of them.

    Of each the larger of what goes in and what comes out: the gathered array, or the one to be scattered.
    """

    count: int
    bytes: float


@dataclass
class _Computation:
    own: list[tuple[str, float]] = field(default_factory=list)  # kind and bytes of its collectives
    calls: list[tuple[str, int]] = field(default_factory=list)  # other computations, and how often
    loops: list[tuple[str, str]] = field(default_factory=list)  # condition and body, where the text has no count
    lines: dict[str, tuple[str, str]] = field(default_factory=dict)  # operation and the rest, by what they define
    root: str = ""


def collectives(hlo: str) -> dict[str, Traffic]:
    """{kind: traffic of one run} of a compiled module.

    Loops count as often as they turn, once where that cannot be read; of a conditional all branches count.
    """
    computations, entry = _computations(hlo)
    for computation in computations.values():
        for condition, body in computation.loops:
            turns = _turns(*(computations.get(name, _Computation()) for name in (condition, body)))
            computation.calls += [(condition, turns), (body, turns)]
    found: dict[str, Traffic] = {}

    def add(name: str, times: int) -> None:
        computation = computations.get(name, _Computation())
        for kind, size in computation.own:
            count, total = found.get(kind, Traffic(0, 0.0))
            found[kind] = Traffic(count + times, total + times * size)
        for called, turns in computation.calls:
            add(called, times * turns)

    add(entry, 1)
    return {kind: found[kind] for kind in KINDS if kind in found}


def _computations(hlo: str) -> tuple[dict[str, _Computation], str]:
    """All computations of a module by name, and the name of the one where it begins."""
    computations: dict[str, _Computation] = {}
    entry, here, sizes = "", _Computation(), {}
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            here, sizes = computations.setdefault(head[2], _Computation()), {}
            entry = head[2] if head[1] else entry
        elif begin := _LINE.match(line):
            result, operation, rest = _split(line[begin.end() :])
            sizes[begin[1]] = _bytes(result)
            here.lines[begin[1]] = operation, rest
            here.root = begin[1] if "ROOT" in line[: begin.start(1)] else here.root
            kind, start = operation.removesuffix("-start"), operation.endswith("-start")
            if kind in KINDS:
                into = sum(sizes.get(name, 0.0) for name in _operands(rest))
                # What a start returns has its operands in it, or nothing else.
                out = sizes[begin[1]] - into if start else sizes[begin[1]]
                here.own.append((kind, max(into, out)))
            turns = _TURNS.search(rest) if operation == "while" else None
            if operation == "while" and not turns:
                here.loops.append((_CONDITION.findall(rest)[0], _BODY.findall(rest)[0]))
            elif not operation.endswith(("-done", "-update")):
                here.calls += [(name, int(turns[1]) if turns else 1) for name in _called(rest)]
    return computations, entry


def _turns(condition: _Computation, body: _Computation) -> int:
    """Of a loop that counts from 0 by a constant, up to a constant; 1 of any other.

    Compilers for TPUs do not write the number down, and make such loops of sharded products, two turns in one.
    """

    def constant(computation: _Computation, name: str) -> int | None:
        operation, rest = computation.lines.get(name, ("", ""))
        return int(rest.partition(")")[0]) if operation == "constant" else None

    operation, rest = condition.lines.get(condition.root, ("", ""))
    if operation != "compare" or "direction=LT" not in rest:
        return 1
    counter, end = _operands(rest)
    place, bound = _INDEX.search(condition.lines.get(counter, ("", ""))[1]), constant(condition, end)
    if not place or bound is None:
        return 1
    operation, rest = body.lines.get(body.root, ("", ""))
    following = list(_operands(rest))[int(place[1])] if operation == "tuple" else ""
    operation, rest = body.lines.get(following, ("", ""))
    by = [constant(body, name) for name in _operands(rest)] if operation == "add" else []
    return -(-bound // next((step for step in by if step), 1))


def _split(text: str) -> tuple[str, str, str]:
    """`TYPE OPERATION(REST` in three."""
    end, depth = 0, 0
    for end, letter in enumerate(text):  # noqa: B007
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and depth == 0:
            break
    operation, _, rest = text[end + 1 :].partition("(")
    return text[:end], operation, rest


def _operands(rest: str) -> Iterator[str]:
    depth = 1
    for end, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            yield from re.findall(r"%([\w.\-]+)", rest[:end])
            return


def _called(rest: str) -> list[str]:
    many = [name.strip().lstrip("%") for names in _CALLED_SET.findall(rest) for name in names.split(",")]
    return [*_CALLED.findall(rest), *many]


def _bytes(shape: str) -> float:
    """Of an array, or of all arrays of a tuple; a layout may follow each."""
    total = 0.0
    for dtype, sizes in _ARRAY.findall(shape):
        elements = 1
        for size in filter(None, sizes.replace("<=", "").split(",")):
            elements *= int(size)
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += elements * bits / 8
    return total
