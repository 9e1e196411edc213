"""What a pickle would import and call, told from its bytes alone: nothing of it is loaded, nothing runs."""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import IO, Any, NamedTuple

COMPUTED = "a name put together while loading"
"""Stands for a global whose name is not written out in the pickle."""


class Asked(NamedTuple):
    """The globals of a pickle by their full names.

    Attributes:
        named: all of them.
        called: those that are called with arguments: functions, or classes used like functions.
        wrapped: where a class stands in a persistent id, as files of PyTorch before 1.6 have it: byte ranges.
    """

    named: frozenset[str]
    called: frozenset[str]
    wrapped: tuple[tuple[int, int], ...]


class _Global(str):
    """A global on the stack, by its full name; plain text there is `str`."""

    __slots__ = ()


class _Mark(NamedTuple):
    position: int


class _Tuple(NamedTuple):
    position: int
    items: list[Any]


def scan_pickle(file: IO[bytes]) -> Asked:
    """Read one pickle to its end; `file` then stands behind it.

    Raises:
        Exception: not a pickle; damaged bytes may raise almost anything.
    """
    scan = _Scan()
    for code, argument, position in pickletools.genops(file):
        scan.step(code, argument, position or 0)
    return Asked(frozenset(scan.named), frozenset(scan.called), tuple(scan.wrapped))


class _Scan:
    """A pickle machine that holds names, texts and unknowns in place of objects."""

    def __init__(self) -> None:
        self.named: set[str] = set()
        self.called: set[str] = set()
        self.wrapped: list[tuple[int, int]] = []
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, code: pickletools.OpcodeInfo, argument: Any, position: int) -> None:
        match code.name:
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(argument)] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[int(argument)])
            case "DUP":
                self._stack.append(self._stack[-1])
            case "MARK":
                self._stack.append(_Mark(position))
            case "TUPLE":
                mark, items = self._pop_to_mark()
                self._stack.append(_Tuple(mark.position, items))
            case _:
                self._step_globals(code, argument, position)

    def _step_globals(self, code: pickletools.OpcodeInfo, argument: Any, position: int) -> None:
        match code.name:
            case "GLOBAL":
                self._stack.append(self._name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self._stack.pop(), self._stack.pop()
                self._stack.append(self._name(module, name))
            case "INST":
                self._pop_to_mark()
                self._call(self._name(*argument.split(" ", 1)))
            case "OBJ":
                self._call(self._pop_to_mark()[1][0])
            case "REDUCE":
                self._stack.pop()
                self._call(self._stack.pop())
            case "BINPERSID":
                self._persist(self._stack.pop(), position)
            case _:
                self._step_plainly(code, argument)

    def _step_plainly(self, code: pickletools.OpcodeInfo, argument: Any) -> None:
        """What only moves values: as much off the stack and onto it as the opcode's own description says."""
        before = code.stack_before
        if pickletools.markobject in before:
            self._pop_to_mark()
            before = before[: before.index(pickletools.markobject)]
        if before:
            del self._stack[-len(before) :]
        text = argument if isinstance(argument, str) else None
        self._stack += [text] * len(code.stack_after)

    def _pop_to_mark(self) -> tuple[_Mark, list[Any]]:
        items = []
        while not isinstance(top := self._stack.pop(), _Mark):
            items.append(top)
        return top, items[::-1]

    def _name(self, module: Any, name: Any) -> _Global:
        if type(module) is not str or type(name) is not str:
            found = COMPUTED
        else:
            # Pickles of PyTorch use Python 2's names of the built-in modules.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            found = f"{module}.{name}"
        self.named.add(found)
        return _Global(found)

    def _call(self, value: Any) -> None:
        """What is called without having a name was given by a call that has one."""
        if isinstance(value, _Global):
            self.called.add(str(value))
        self._stack.append(None)

    def _persist(self, value: Any, position: int) -> None:
        """`("module", class, file, source)` stands for the class."""
        kind = None
        if isinstance(value, _Tuple) and value.items[:1] == ["module"]:
            self.wrapped.append((value.position, position))
            _, kind, _, _ = value.items
        self._stack.append(kind)
