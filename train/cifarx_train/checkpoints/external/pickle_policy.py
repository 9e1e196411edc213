"""Decide which names a checkpoint may contain.

No name in a file is imported or called, whatever it is; see `pickle_machine`. A file that would run code in another
reader is refused all the same, because its author meant harm or its weights were not saved as weights. The border:

- Names of the standard library are refused, except for types of data such as `datetime.datetime`. So `os.system`,
  `subprocess.Popen` and `builtins.eval` are refused wherever they occur, and `builtins.getattr` where it is called,
  except to name a method of an object that the file contains, or a function such as `torch.relu`.
- Functions of PyTorch, torchvision and NumPy that are called are refused, except for those with which these libraries
  save their own tensors and arrays. The classes of `torch.nn` are refused if they are called: PyTorch saves a module
  without a call.
- Functions that packages such as `cloudpickle` make from byte code are refused.
- Any other name belongs to a package or a script that is unknown here: a class of the user, a configuration, a logger.
  Its objects and calls become stubs, which are inert. What is needed to run a network is checked when the network is
  built from them; see `whole_model`.
"""

import re
import sys
from typing import Final

from cifarx_train.checkpoints.external.pickle_machine import COMPUTED_NAME, Evaluation

_STANDARD_DATA: Final = re.compile(
    r"""
      builtins\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|iter|list|object|range|set|slice|str|tuple)
    | builtins\.\w*(Error|Exception|Interrupt|Warning)
    | collections\.(ChainMap|Counter|OrderedDict|UserDict|UserList|UserString|defaultdict|deque)
    | datetime\.(date|datetime|time|timedelta|timezone)
    | pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path
    | copyreg\.(__newobj__|__newobj_ex__|_reconstructor) | _codecs\.encode | re\._compile
    | argparse\.Namespace | contextlib\.nullcontext | types\.SimpleNamespace | functools\.partial
    | array\.(array|_array_reconstructor) | decimal\.Decimal | fractions\.Fraction | random\.Random
    | uuid\.(UUID|SafeUUID) | time\.struct_time | ipaddress\.\w+ | itertools\.(chain|count|cycle|repeat)
    | logging\.(Logger|getLogger) | platform\.uname_result | string\.Template | typing\.[A-Z]\w*
    """,
    re.VERBOSE,
)

_LIBRARIES: Final = frozenset({"numpy", "torch", "torchvision"})
_CALLED_FUNCTIONS: Final = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2|torch\.serialization\._get_layout"
    r"|torch\.(device|dtype)|torch\.nn\.backends\.thnn\._get_thnn_function_backend"
    r"|numpy\._?core\.(multiarray\.(_reconstruct|scalar|_frombuffer)|numeric\._frombuffer)|numpy\.(ndarray|dtype)"
    r"|numpy\.random\.(_pickle\.__\w+_ctor|\w+\.__pyx_unpickle_\w+)|numpy\.ma\.core\._mareconstruct"
)
_CLASS: Final = re.compile(r"(\w+\.)+_*[A-Z]\w*")
_NEVER_CALLED: Final = re.compile(r"torch\.(nn\.modules|nn\.parallel|fx|hub|jit|package)\..*")
_FROM_BYTE_CODE: Final = frozenset({"cloudpickle", "dill"})


def refused_names(evaluation: Evaluation) -> list[str]:
    """Return the names for which a file is refused, sorted."""
    return sorted(name for name in evaluation.imported if not _is_allowed(name, name in evaluation.called))


def format_names(names: list[str]) -> str:
    """Return at most three names as text, with the public names of functions: a file contains `posix.system`."""
    public = [re.sub(r"[^\w. ]", "?", re.sub(r"^(posix|nt)\.", "os.", name))[:100] for name in names[:3]]
    return ", ".join(public) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _is_allowed(name: str, called: bool) -> bool:
    if name == COMPUTED_NAME or not re.fullmatch(r"\w+(\.\w+)+", name):
        return False
    root = name.partition(".")[0]
    if root in _LIBRARIES:
        if not called or _CALLED_FUNCTIONS.fullmatch(name):
            return True
        return bool(_CLASS.fullmatch(name)) and not _NEVER_CALLED.fullmatch(name)
    if root in sys.stdlib_module_names and root != "__main__":
        return _STANDARD_DATA.fullmatch(name) is not None
    return root not in _FROM_BYTE_CODE
