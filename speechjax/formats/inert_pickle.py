"""Pickles read without running anything in them.

A pickle is a program, and Python's own reader imports and calls whatever it names; forbidding names one by one has
failed often.  Here the instructions are carried out by a machine that has no way to import or to call: what would have
been an object becomes an inert `Stub` that says what it would have been.  Settings become plain data:
`argparse.Namespace`, ordered dictionaries and the configurations of omegaconf are dicts.

Nothing here recurses, so that no depth of nesting exhausts the stack; nothing hashes or compares what a pickle nests;
and what a file can ask for in memory is bounded by its size.
"""

import io
import pickletools
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LIMIT = 1 << 23  # bytes of a pickle; one can ask for 80 of memory.  Published checkpoints have less than 2**20
_COPIES = 1 << 20  # entries that objects may take over from others; a list named again costs a pickle two bytes
BROKEN = (AttributeError, EOFError, IndexError, KeyError, OverflowError, TypeError, ValueError, struct.error)
_SCALARS = (str, bytes, int, float, bool, type(None))


class DamagedError(Exception):
    """What is wrong with a file, in a few words."""


@dataclass(eq=False)  # told apart by identity, so that it can be a key
class Stub:
    """What would have been an object: its class or function `name`, the `args` it was to be called with.

    `args` is None for a class or function itself.  `attributes` are those that the pickle sets, `items` what it
    appends, (key, value) for entries.
    """

    name: str
    args: tuple[Any, ...] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Stub({self.name!r})"  # no more: what it holds may hold it


class _Namespace(dict):
    """An `argparse.Namespace`: its attributes are its entries."""


class _DictConfig(dict):
    """An `omegaconf.DictConfig`, of whose attributes only the values count."""


class _ListConfig(list):
    """An `omegaconf.ListConfig`."""


_EMPTY = {
    "argparse.Namespace": _Namespace,
    "omegaconf.dictconfig.DictConfig": _DictConfig,
    "omegaconf.listconfig.ListConfig": _ListConfig,
}
_DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")


class Machine:
    """Carries out a pickle's instructions on a stack, as the notes in `pickletools` describe them.

    `calls` are what may take the place of functions, {name: function of their arguments}; `persistent` is what stands
    for an object outside the pickle, of its identity there.  Both may raise DamagedError.
    """

    def __init__(self, calls: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any]):
        self._calls, self._persistent = calls, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}  # a list would be as long as the largest number that a file names
        self._left = _COPIES

    def run(self, stream: io.BytesIO) -> Any:
        """The value of the pickle that `stream` is at, which it is then behind; raises DamagedError."""
        try:
            with warnings.catch_warnings():  # of escapes in text, which mean nothing to who reads a damaged file
                warnings.simplefilter("ignore")
                return self._run(stream)
        except BROKEN as error:
            raise DamagedError(f"its pickle is broken: {one_line(error)}") from None

    def _run(self, stream: io.BytesIO) -> Any:
        for code, argument, _ in pickletools.genops(stream):
            if code.name == "STOP":
                return self._stack.pop()
            if not (self._plain(code.name, argument) or self._object(code.name, argument)):
                raise DamagedError(f"its pickle has the instruction {code.name}")
        raise DamagedError("its pickle has no end")

    def _plain(self, code: str, argument: Any) -> bool:
        """The instructions for plain values; whether `code` is one of them."""
        push, pop = self._stack.append, self._stack.pop
        match code:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(self._stack))
            case "POP" if self._marks and self._marks[-1] == len(self._stack):
                self._marks.pop()
            case "POP":
                pop()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                push(self._stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code])
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_TUPLE" | "EMPTY_SET":
                push({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}[code]())
            case "LIST" | "TUPLE":
                push({"LIST": list, "TUPLE": tuple}[code](self._since_mark()))
            case "FROZENSET":
                push(frozenset(map(_key, self._since_mark())))
            case "DICT":
                push(_enter({}, self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([pop() for _ in range(int(code[-1]))][::-1]))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [pop()] if code == "APPEND" else self._since_mark()
                _append(self._stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = [pop(), pop()][::-1] if code == "SETITEM" else self._since_mark()
                _enter(self._stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if code == "MEMOIZE" else argument] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self._memo[argument])
            case _ if code.startswith(("INT", "BININT", "LONG", "FLOAT", "BINFLOAT")):
                push(argument)
            case _ if code.endswith(("STRING", "UNICODE", "UNICODE8", "BYTES", "BYTES8")):
                push(argument)
            case _:
                return False
        return True

    def _object(self, code: str, argument: Any) -> bool:
        """The instructions for objects; whether `code` is one of them."""
        push, pop = self._stack.append, self._stack.pop
        match code:
            case "GLOBAL":
                push(Stub(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(Stub(f"{text(module)}.{text(name)}"))
            case "INST":
                push(self._call(Stub(argument.replace(" ", ".")), tuple(self._since_mark())))
            case "OBJ":
                callee, *arguments = self._since_mark()
                push(self._call(callee, tuple(arguments)))
            case "REDUCE" | "NEWOBJ" | "NEWOBJ_EX":
                if code == "NEWOBJ_EX":
                    pop()  # arguments by name
                arguments, callee = pop(), pop()
                push(self._call(callee, arguments))
            case "BUILD":
                state = pop()
                self._set_state(self._stack[-1], state)
            case "BINPERSID":
                push(self._persistent(pop()))
            case _:
                return False
        return True

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _call(self, callee: Any, arguments: Any) -> Any:
        """What stands for `callee(*arguments)`."""
        if not isinstance(callee, Stub) or callee.args is not None or type(arguments) is not tuple:
            return Stub("unknown", ())
        if callee.name in ("copyreg._reconstructor", "copy_reg._reconstructor"):  # (class, its base, state of that)
            callee, arguments = arguments[0], ()
        if callee.name in self._calls:
            return self._calls[callee.name](*arguments)
        if callee.name in _EMPTY:
            return _EMPTY[callee.name]()
        if callee.name in _DICTS:
            given = arguments[-1] if arguments else ()
            pairs = given if isinstance(given, list) else given.items() if isinstance(given, dict) else ()
            self._spend(len(pairs))
            return _enter({}, [part for key, value in pairs for part in (key, value)])
        return Stub(callee.name, arguments)

    def _set_state(self, target: Any, state: Any) -> None:
        """What setting the state of an object would have done to its attributes."""
        parts = [part for part in (state if type(state) is tuple else (state,)) if isinstance(part, dict)]
        self._spend(sum(map(len, parts)))
        attributes = {name: value for part in parts for name, value in part.items()}  # __dict__ and __slots__
        content = attributes.get("_content")
        match target:
            case _Namespace():
                target.update(attributes)
            case _DictConfig() if isinstance(content, dict):
                self._spend(len(content))
                target.update((_key(_value(key)), _value(value)) for key, value in content.items())
            case _ListConfig() if isinstance(content, list):
                self._spend(len(content))
                target.extend(map(_value, content))
            case Stub():
                target.attributes.update(attributes if parts else {"state": state})

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise DamagedError("its pickle makes far more than it holds")


def _append(target: Any, items: Sequence[Any]) -> None:
    if type(target) is set:
        target.update(map(_key, items))
    elif isinstance(target, (list, Stub)):
        (target.items if isinstance(target, Stub) else target).extend(items)
    else:
        raise DamagedError(f"its pickle appends to {type(target).__name__}")


def _enter(target: Any, items: Sequence[Any]) -> Any:
    """`target`, with `items`, keys and values by turns, entered."""
    pairs = zip(items[::2], items[1::2], strict=True)
    if isinstance(target, Stub):
        target.items.extend(pairs)
    elif isinstance(target, dict):
        target.update((_key(key), value) for key, value in pairs)
    else:
        raise DamagedError(f"its pickle enters into {type(target).__name__}")
    return target


def _value(node: Any) -> Any:
    """The value in a node of omegaconf; of an Enum, that of its member."""
    if isinstance(node, Stub) and "_val" in node.attributes:
        node = node.attributes["_val"]
    if isinstance(node, Stub) and node.args and len(node.args) == 1 and isinstance(node.args[0], _SCALARS):
        return node.args[0]
    return node


def _key(key: Any) -> Any:
    """`key`, if hashing it takes a bounded time; raises DamagedError."""
    flat = key if type(key) is tuple else (key,)
    if not all(isinstance(part, (*_SCALARS, Stub)) for part in flat):
        raise DamagedError(f"its pickle has a key of type {type(key).__name__}")
    return key


def text(value: Any) -> str:
    """`value`, if it is text; raises DamagedError."""
    if type(value) is not str:
        raise DamagedError(f"its pickle has {type(value).__name__} where text belongs")
    return value


def one_line(error: Exception) -> str:
    """What an exception says, for the end of a line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
