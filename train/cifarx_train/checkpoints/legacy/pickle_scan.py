"""Find the globals that a pickle imports and calls, without loading it or running any code."""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import IO, Any, NamedTuple

COMPUTED_NAME = "a name that is computed while loading"
"""Stands for a global whose name is not a constant in the pickle."""


class PickleGlobals(NamedTuple):
    """The globals of a pickle, by their fully qualified names.

    Attributes:
        imported: all globals.
        called: the globals that are called with arguments: functions, or classes used like functions.
        class_ids: the byte ranges of persistent ids that contain a class, which PyTorch wrote before 1.6.
    """

    imported: frozenset[str]
    called: frozenset[str]
    class_ids: tuple[tuple[int, int], ...]


class _Global(str):
    """The fully qualified name of a global on the stack. A string on the stack is a plain `str`."""

    __slots__ = ()


class _Mark(NamedTuple):
    position: int


class _Tuple(NamedTuple):
    position: int
    items: list[Any]


def scan_pickle(file: IO[bytes]) -> PickleGlobals:
    """Read a pickle and leave the file position after its end.

    Raises:
        Exception: this is not a pickle. Damaged bytes can raise almost any exception.
    """
    machine = _Machine()
    for code, argument, position in pickletools.genops(file):
        machine.step(code, argument, position or 0)
    return PickleGlobals(frozenset(machine.imported), frozenset(machine.called), tuple(machine.class_ids))


class _Machine:
    """A pickle machine whose stack contains names, strings and None instead of objects."""

    def __init__(self) -> None:
        self.imported: set[str] = set()
        self.called: set[str] = set()
        self.class_ids: list[tuple[int, int]] = []
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
                self._step_other(code, argument)

    def _step_other(self, code: pickletools.OpcodeInfo, argument: Any) -> None:
        """Pop and push as many values as the description of the opcode states."""
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
            full_name = COMPUTED_NAME
        else:
            # PyTorch's pickles contain Python 2's names of built-in modules.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            full_name = f"{module}.{name}"
        self.imported.add(full_name)
        return _Global(full_name)

    def _call(self, value: Any) -> None:
        """A called value without a name is the result of another call, which has been recorded."""
        if isinstance(value, _Global):
            self.called.add(str(value))
        self._stack.append(None)

    def _persist(self, value: Any, position: int) -> None:
        """The persistent id `("module", class, file, source)` stands for the class."""
        loaded = None
        if isinstance(value, _Tuple) and value.items[:1] == ["module"]:
            self.class_ids.append((value.position, position))
            _, loaded, _, _ = value.items
        self._stack.append(loaded)
