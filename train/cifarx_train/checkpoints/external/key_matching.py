"""Match the keys of a state dict in a file with those of a network, which may have other prefixes."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

from cifarx_serve.errors import UsageError

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]

_COUNTER: Final = "num_batches_tracked"  # not saved by PyTorch before 0.4.1, and not used for inference
_COMPILED: Final = "_orig_mod"
_PARALLEL: Final = "module"
_WRAPPERS: Final = frozenset({_COMPILED, _PARALLEL, "model", "net", "network", "backbone"})
"""The attributes in which a module commonly stores the network."""

_AVERAGE: Final = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")
# What training adds to a network: losses and their weights, auxiliary heads, metrics, and the counters of profilers and
# of averaging. A network gives the same answers without them.
_TRAINING_ONLY: Final = re.compile(
    r"(.*\.)?(total_ops|total_params|n_averaged|num_batches_tracked)"
    r"|(aux|loss|criterion|metric)\w*(\..*)?|(train|val|valid|test)_(acc|loss|metric|f1|auc)\w*(\..*)?|\w*_?loss(\..*)?",
    re.IGNORECASE,
)
_LISTED: Final = 5


class KeyMatch(NamedTuple):
    """How the keys of a network correspond to those of a file.

    Attributes:
        keys: the key in the file for each key of the network. Missing counters have none.
        prefix: the prefix of the network's keys in the file, such as `model.`.
        missing: the keys of the network that the file does not have.
        unexpected: the keys of the file that belong to other layers of the same network.
        left_out: the keys of the file that do not belong to the network, or are used in training only.
        alternatives: the prefixes under which the file contains the network again.
    """

    keys: dict[str, str]
    prefix: str
    missing: list[str]
    unexpected: list[str]
    left_out: list[str]
    alternatives: list[str]

    @property
    def distance(self) -> int:
        """The number of keys that do not fit."""
        return len(self.missing) + len(self.unexpected)


def match_keys(own: Iterable[str], file: Iterable[str], weights_key: str | None = None, path: object = "") -> KeyMatch:
    """Match the keys of a network with those of a file, and return the closest match.

    Args:
        own: the keys of the network's state dict.
        file: the keys of the state dict in the file.
        weights_key: the prefix that the user chose, if the file contains the network several times.
        path: the file, for messages.

    Raises:
        UsageError: the file contains the network several times, and `weights_key` is None or fits none of them.
    """
    own = list(own)
    in_file = _without_wrappers(own, file)
    unchanged = _match({key: key for key in own}, in_file, weights_key, path)
    common = common_prefix(own)
    if not unchanged.distance or not common:
        return unchanged
    stripped = _match({key: key.removeprefix(common) for key in own}, in_file, weights_key, path)
    return min(unchanged, stripped, key=lambda match: match.distance)


def describe_mismatches(match: KeyMatch, wrong_shapes: list[str]) -> str:
    """Return the missing, unexpected and misshapen keys: five of each kind, and how many more."""
    kinds = (("missing ", match.missing), ("unexpected ", match.unexpected), ("", wrong_shapes))
    return "; ".join(f"{kind}{list_names(items)}" for kind, items in kinds if items)


def list_names(names: list[str]) -> str:
    """Return the first five names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def wrong_shapes(match: KeyMatch, own: Shapes, file: Shapes) -> list[str]:
    """Return a description of each tensor whose shape in the file is not that of the network."""
    return [
        f"{key} has shape {list(file[key])} instead of {list(own[own_key])}"
        for own_key, key in match.keys.items()
        if file[key] != own[own_key]
    ]


# --- prefixes


def _without_wrappers(own: list[str], file: Iterable[str]) -> dict[str, str]:
    """Map the keys without the segments that compilation and parallel training add to the keys in the file."""
    file = list(file)
    added = {_COMPILED, _PARALLEL} - {segment for key in own for segment in key.split(".")}
    short = {".".join(part for part in key.split(".") if part not in added): key for key in file}
    return short if len(short) == len(file) else {key: key for key in file}


def common_prefix(keys: list[str]) -> str:
    """Return the prefix that all keys share: `model.` for the keys of Lzh."""
    first = keys[0].split(".")[:-1] if keys else []
    while first and not all(key.startswith(".".join(first) + ".") for key in keys):
        first.pop()
    return ".".join(first) + "." if first else ""


def splits(key: str) -> Iterator[tuple[str, str]]:
    """Yield every way to split a key into a prefix and the rest."""
    yield "", key
    position = key.find(".")
    while position >= 0:
        yield key[: position + 1], key[position + 1 :]
        position = key.find(".", position + 1)


def _match(own: dict[str, str], in_file: dict[str, str], weights_key: str | None, path: object) -> KeyMatch:
    """Match keys of a network, given as `key: key without common prefix`, with those of a file."""
    required = {short for key, short in own.items() if not key.endswith(_COUNTER)}
    counts = Counter(prefix for key in in_file for prefix, rest in splits(key) if rest in required)
    complete = [prefix for prefix, count in counts.items() if count == len(required)]
    if len(complete) > 1:
        prefix = _choose_prefix(complete, weights_key, path)
    else:
        prefix = max(counts, key=lambda prefix: counts[prefix], default="")
    alternatives = [other for other in complete if other != prefix]
    found = {key: prefix + short for key, short in own.items() if prefix + short in in_file}
    # A part of the network may have another prefix, for example if only a part of it is compiled.
    used, missing = set(found.values()), {short: key for key, short in own.items() if key not in found}
    for key in in_file:
        for other, rest in splits(key):
            if key not in used and rest in missing and set(other.split(".")[:-1]) <= _WRAPPERS:
                found[missing.pop(rest)] = key
                used.add(key)
    extra = [key for key in in_file if key not in used and not key.startswith(tuple(alternatives))]
    unexpected = [key for key in extra if key.startswith(prefix) and not _TRAINING_ONLY.fullmatch(key[len(prefix) :])]
    return KeyMatch(
        {key: in_file[found[key]] for key in own if key in found},
        prefix,
        [key for key in own if key not in found and not key.endswith(_COUNTER)],
        [in_file[key] for key in unexpected],
        [in_file[key] for key in extra if key not in unexpected],
        alternatives,
    )


def _choose_prefix(prefixes: list[str], weights_key: str | None, path: object) -> str:
    """Return one of several prefixes under which the file contains the whole network."""
    if weights_key is not None:
        chosen = [prefix for prefix in prefixes if f".{prefix}".endswith(f".{weights_key}.")]
    else:
        chosen = [prefix for prefix in prefixes if _AVERAGE.search(prefix)]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(prefix.rstrip(".") or "without a prefix" for prefix in prefixes)
    raise UsageError(f"{path} contains the network several times ({names})", "choose one of them with --weights-key")
