"""Evaluate a pickle without importing or calling anything that it names.

Python's own unpickler imports the globals of a file and calls them. This machine executes the same instructions, but a
global is only its name, and an object is only a stub that stores what the file says about it. A small table of
constructors, given by the caller, makes plain values such as an `OrderedDict` or a tensor from the arguments in a file.
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Final, NamedTuple, TypeAlias

COMPUTED_NAME: Final = "a name that is computed while loading"
"""Stands for a global whose name is not a constant in the pickle."""

_GETATTR: Final = "builtins.getattr"
_TORCH_FUNCTIONS: Final = "torch._C._VariableFunctionsClass"
_RECONSTRUCTOR: Final = "copyreg._reconstructor"
_MAX_KEY_ITEMS: Final = 1000

# The instructions whose argument is a number, a string or bytes.
_LITERALS: Final = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)

Constructor: TypeAlias = Callable[..., Any]
_Arguments: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a file names, such as `torch.nn.functional.relu`. It was not imported."""

    name: str


class ObjectStub:
    """Stands for an object in a file. It stores what the file says about the object and does nothing.

    Attributes:
        name: the fully qualified name of the object's class, or of the function that returns it.
        called: whether the file calls `name`, instead of creating an object of this class without a call.
        arguments: the positional arguments of the class or function.
        keywords: its keyword arguments.
        state: the state of the object, which is usually the dict of its attributes, or None.
        items: what was appended, if the object is a list or a set.
        mapping: what was set by key, if the object is a dict.
    """

    __slots__ = ("arguments", "called", "items", "keywords", "mapping", "name", "state")

    def __init__(
        self,
        name: str,
        arguments: _Arguments = (),
        keywords: dict[str, Any] | None = None,
        *,
        called: bool = False,
    ) -> None:
        self.name = name
        self.called = called
        self.arguments = arguments
        self.keywords = keywords or {}
        self.state: Any = None
        self.items: list[Any] = []
        self.mapping: dict[Any, Any] = {}


class Evaluation(NamedTuple):
    """The result of evaluating a pickle.

    Attributes:
        value: the value, made of plain types, the results of constructors, `Global` and `ObjectStub`.
        imported: the fully qualified names of all globals.
        called: those that are called: functions, or classes used like functions.
    """

    value: Any
    imported: frozenset[str]
    called: frozenset[str]


def evaluate_pickle(
    file: IO[bytes], constructors: Mapping[str, Constructor], load_persistent: Callable[[Any], Any]
) -> Evaluation:
    """Evaluate a pickle and leave the file position after its end.

    Args:
        file: the pickle.
        constructors: functions that take the arguments of a call in the file, by the name that is called. They must be
            safe for any arguments.
        load_persistent: returns the value of a persistent id.

    Raises:
        Exception: this is not a pickle. Damaged bytes can raise almost any exception.
    """
    machine = _Machine(constructors, load_persistent)
    for code, argument, _ in pickletools.genops(file):
        machine.step(code.name, argument)
    return Evaluation(machine.result, frozenset(machine.imported), frozenset(machine.called))


def require_key(key: Any) -> Any:
    """Return the key of a dict or the item of a set, if it is hashed in little time.

    Nested tuples that share their items could take forever.

    Raises:
        ValueError: the key has too many items.
    """
    pending, count = [key], 0
    while pending:
        item = pending.pop()
        count += 1
        if count > _MAX_KEY_ITEMS:
            raise ValueError(f"a key of more than {_MAX_KEY_ITEMS} items")
        if type(item) in (tuple, frozenset):
            pending.extend(item)
    return key


class _Mark:
    """A mark on the stack."""


_MARK: Final = _Mark()


class _Machine:
    """The stack and the memo of a pickle that is being evaluated."""

    def __init__(self, constructors: Mapping[str, Constructor], load_persistent: Callable[[Any], Any]) -> None:
        self.imported: set[str] = set()
        self.called: set[str] = set()
        self.result: Any = None
        self._constructors = constructors
        self._load_persistent = load_persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, code: str, argument: Any) -> None:
        """Execute one instruction."""
        match code:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                self.result = self._stack.pop()
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[int(argument)] = self._stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self._stack.append(self._memo[int(argument)])
            case "MARK":
                self._stack.append(_MARK)
            case "DUP":
                self._stack.append(self._stack[-1])
            case "POP":
                self._stack.pop()
            case "POP_MARK":
                self._pop_to_mark()
            case _:
                self._make_value(code, argument)

    def _make_value(self, code: str, argument: Any) -> None:
        match code:
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(code))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(code[-1])
                self._stack[-count:] = [tuple(self._stack[-count:])]
            case "TUPLE" | "EMPTY_TUPLE":
                self._stack.append(tuple(self._pop_to_mark()) if code == "TUPLE" else ())
            case "LIST" | "EMPTY_LIST":
                self._stack.append(self._pop_to_mark() if code == "LIST" else [])
            case "DICT" | "EMPTY_DICT":
                self._stack.append(_set_items({}, self._pop_to_mark() if code == "DICT" else []))
            case "EMPTY_SET":
                self._stack.append(set())
            case "FROZENSET":
                self._stack.append(frozenset(map(require_key, self._pop_to_mark())))
            case _ if code in _LITERALS:
                self._stack.append(argument)
            case _:
                self._change_value(code, argument)

    def _change_value(self, code: str, argument: Any) -> None:
        match code:
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [self._stack.pop()] if code == "APPEND" else self._pop_to_mark()
                _add_items(self._stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = [self._stack.pop(-2), self._stack.pop()] if code == "SETITEM" else self._pop_to_mark()
                _set_items(self._stack[-1], items)
            case "BUILD":
                state = self._stack.pop()
                _set_state(self._stack[-1], state)
            case "PERSID" | "BINPERSID":
                self._stack.append(self._load_persistent(self._stack.pop() if code == "BINPERSID" else argument))
            case _:
                self._make_object(code, argument)

    def _make_object(self, code: str, argument: Any) -> None:
        match code:
            case "GLOBAL":
                self._stack.append(self._global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = self._stack.pop(), self._stack.pop()
                self._stack.append(self._global(module, name))
            case "INST":
                self._call(self._global(*argument.split(" ", 1)), tuple(self._pop_to_mark()))
            case "OBJ":
                called, *arguments = self._pop_to_mark()
                self._call(called, tuple(arguments))
            case "REDUCE":
                arguments = self._stack.pop()
                self._call(self._stack.pop(), arguments)
            case "NEWOBJ":
                arguments = self._stack.pop()
                self._create(self._stack.pop(), arguments, {})
            case "NEWOBJ_EX":
                keywords, arguments = self._stack.pop(), self._stack.pop()
                self._create(self._stack.pop(), arguments, keywords)
            case _:
                raise ValueError(f"unsupported pickle instruction {code}")

    def _pop_to_mark(self) -> list[Any]:
        position = len(self._stack) - 1
        while self._stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise ValueError("no mark on the stack")
        items = self._stack[position + 1 :]
        del self._stack[position:]
        return items

    def _global(self, module: Any, name: Any) -> Global:
        if type(module) is not str or type(name) is not str:
            full_name = COMPUTED_NAME
        else:
            # PyTorch's pickles contain Python 2's names of built-in modules.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            full_name = f"{module}.{name}"
        if full_name != _GETATTR:  # recorded when it is called, because one use of it is allowed
            self.imported.add(full_name)
        return Global(full_name)

    def _call(self, called: Any, arguments: Any) -> None:
        """Push a plain value if there is a constructor, or a stub. The result of another call can be called too."""
        name = called.name if isinstance(called, Global) else COMPUTED_NAME
        if name == _GETATTR and (method := _method(arguments)):
            self._stack.append(method)
            return
        self.imported.add(name)
        self.called.add(name)
        if name == _RECONSTRUCTOR and type(arguments) is tuple and type(arguments[0]) is Global:
            self._stack.append(ObjectStub(arguments[0].name))  # the way in which pickle protocols 0 and 1 make objects
        elif constructor := self._constructors.get(name):
            self._stack.append(constructor(*arguments))
        else:
            self._stack.append(ObjectStub(name, _require_tuple(arguments), called=True))

    def _create(self, kind: Any, arguments: Any, keywords: Any) -> None:
        """Push a new object of a class."""
        name = kind.name if isinstance(kind, Global) else COMPUTED_NAME
        self.imported.add(name)
        if not arguments and name in self._constructors:
            self._stack.append(self._constructors[name]())
            return
        self._stack.append(ObjectStub(name, _require_tuple(arguments), dict(keywords)))


def _method(arguments: Any) -> Global | ObjectStub | None:
    """Return what `getattr` returns in the two cases in which pickles of PyTorch need it, or None.

    The function `torch.relu` is saved as `getattr(torch._C._VariableFunctionsClass, "relu")`, and a method as
    `getattr(object, name)`.
    """
    match arguments:
        case (Global(name=owner), str() as name) if owner == _TORCH_FUNCTIONS and name.isidentifier():
            return Global(f"torch.{name}")
        case (ObjectStub(called=False, name=owner), str() as name) if name.isidentifier() and name[0] != "_":
            return ObjectStub(f"{owner}.{name}", called=True)
    return None


def _require_tuple(arguments: Any) -> _Arguments:
    if type(arguments) is not tuple:
        raise ValueError("arguments that are not a tuple")
    return arguments


def _add_items(target: Any, items: list[Any]) -> None:
    if type(target) is list:
        target.extend(items)
    elif type(target) is set:
        target.update(map(require_key, items))
    elif isinstance(target, ObjectStub):
        target.items.extend(items)
    else:
        raise ValueError(f"items of a {type(target).__name__}")


def _set_items(target: Any, items: list[Any]) -> Any:
    mapping = target.mapping if isinstance(target, ObjectStub) else target
    if type(mapping) not in (dict, OrderedDict):
        raise ValueError(f"items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        mapping[require_key(key)] = value
    return target


def _set_state(target: Any, state: Any) -> None:
    """Store the state of a stub. That of plain values is ignored, except for the versions in a state dict."""
    if isinstance(target, ObjectStub):
        target.state = state
    elif type(target) is OrderedDict and type(state) is dict and (versions := _versions(state.get("_metadata"))):
        target._metadata = versions  # type: ignore[attr-defined]  # `nn.Module.load_state_dict` reads it


def _versions(metadata: Any) -> dict[str, dict[str, int]]:
    """Return the version of each module in the metadata of a state dict."""
    if type(metadata) not in (dict, OrderedDict):
        return {}
    return {
        name: {"version": entry["version"]}
        for name, entry in metadata.items()
        if type(name) is str and type(entry) is dict and type(entry.get("version")) is int
    }
