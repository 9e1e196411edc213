"""Read what an ExecuTorch program is made of, before the runtime opens it.

A program is a FlatBuffers document (`schema/program.fbs` of ExecuTorch 1.5). It can jump backwards, and so run forever;
call other delegates than XNNPACK; and claim any amount of memory. No export writes such a program. The runtime itself
verifies the structure of the document.
"""

import struct
from pathlib import Path
from typing import Final, NamedTuple

from cifarx_serve.errors import ModelFileError, error_message
from cifarx_serve.files.flatbuffer import Table, root_table
from cifarx_serve.files.regular_file import open_regular_file

METHOD: Final = "forward"

_DELEGATE: Final = b"XnnpackBackend"

_HEADER_MAGIC: Final = b"eh00"
_HEADER: Final = struct.Struct("<4sIQ")
_HEADER_START: Final = 8
"""Where the extended header is: a magic number, its length and the size of the program. Segments of data follow it."""

_MAX_PROGRAM_BYTES: Final = 1 << 28
_MAX_MEMORY: Final = 1 << 33

# The positions of fields in their tables.
_PLANS: Final = 1
_PLAN_NAME: Final = 0
_PLAN_CHAINS: Final = 5
_PLAN_OPERATORS: Final = 6
_PLAN_DELEGATES: Final = 7
_PLAN_MEMORY: Final = 8
_DELEGATE_ID: Final = 0
_OPERATOR_NAME: Final = 0
_CHAIN_INSTRUCTIONS: Final = 2
_INSTRUCTION_TYPE: Final = 0
_JUMP: Final = 4


class Program(NamedTuple):
    """What a program is made of.

    Attributes:
        operators: the names of the operators that run outside of a delegate, such as `aten::gelu`.
        delegates: the number of graphs that XNNPACK runs.
        memory: the bytes of the activations between them.
    """

    operators: tuple[str, ...]
    delegates: int
    memory: int


def read_program(path: Path) -> Program:
    """Read and check the program of a file.

    Raises:
        ModelFileError: it is damaged, or it is none that an export writes.
    """
    try:
        [plan] = root_table(_read_document(path)).tables(_PLANS)
        name = plan.text(_PLAN_NAME)
        delegates = [delegate.text(_DELEGATE_ID) for delegate in plan.tables(_PLAN_DELEGATES)]
        operators = tuple(operator.text(_OPERATOR_NAME).decode() for operator in plan.tables(_PLAN_OPERATORS))
        jumps = any(map(_has_jump, plan.tables(_PLAN_CHAINS)))
        memory = sum(map(int, plan.numbers(_PLAN_MEMORY, "uint64")))
    except (struct.error, ValueError) as error:  # including FlatBufferError
        raise ModelFileError(
            f"{path} is not an ExecuTorch program ({error_message(error)})", "get the file again, or export it again"
        ) from error
    others = sorted(set(delegates) - {_DELEGATE})
    for found, problem in (
        (name != METHOD.encode(), f"the method {_shown(name)} instead of {METHOD}"),
        (others, f"the delegate {_shown(b''.join(others[:1]))}"),
        (jumps, "a jump"),
        (memory > _MAX_MEMORY, f"activations of {memory / 2**30:,.1f} GiB"),
    ):
        if found:
            raise ModelFileError(f"{path} has {problem}, which no export writes", "export it again")
    return Program(operators, len(delegates), memory)


def _shown(name: bytes) -> str:
    return ascii(name[:40].decode(errors="replace"))


def _has_jump(chain: Table) -> bool:
    instructions = chain.tables(_CHAIN_INSTRUCTIONS)
    return any(instruction.number(_INSTRUCTION_TYPE, "B") == _JUMP for instruction in instructions)


def _read_document(path: Path) -> bytes:
    with open_regular_file(path) as file:
        head = file.read(_HEADER_START + _HEADER.size)
        magic, _, size = _HEADER.unpack_from(head, _HEADER_START)
        if magic != _HEADER_MAGIC or size > _MAX_PROGRAM_BYTES:
            raise ValueError("it has no header")
        return head + file.read(max(0, size - len(head)))
