"""The kinds of value that models.yaml and the environment hold, and the words for one that is wrong.

Each kind is an annotated type, which pydantic checks. A rule says what the value must be, and never the value itself:
that may be a secret.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from posixpath import normpath
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, WithJsonSchema

# ---- amounts with units ---------------------------------------------------------------------------------------------

LONGEST_S = 365 * 24 * 3600.0
LARGEST_BYTES = 2**50
LEAST_GPU_BYTES = 64 * 2**20
"""No GPU has less, and no model runs on less: whoever says so has forgotten the unit."""
_SECONDS_IN = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES_IN = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES_IN |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_AMOUNT = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")


def parse_seconds(value: object) -> float:
    """Return a duration in seconds: `90s`, `15m`, `2h`, `500ms`, or a bare number of seconds.

    Raises:
        ValueError: it is no duration, not above 0, or longer than a year.
    """
    seconds = _amount(value, _SECONDS_IN)
    if seconds is None:
        raise ValueError("must be a duration such as 90s, 15m, 2h or 500ms (a bare number is seconds)")
    if not 0 < seconds <= LONGEST_S:
        raise ValueError("must be above 0 and at most 8760h")
    return float(seconds)


def parse_bytes(value: object) -> int:
    """Return a size in bytes: `14GiB`, `512MiB`, `2GB`, or a bare number of bytes.

    Raises:
        ValueError: it is no size, below 1 byte, or above 1024 TiB.
    """
    size_bytes = _amount(value, _BYTES_IN)
    if size_bytes is None:
        raise ValueError("must be a size such as 14GiB, 512MiB or 2GB (a bare number is bytes)")
    if not 1 <= size_bytes <= LARGEST_BYTES:
        raise ValueError("must be at least 1 byte and at most 1024TiB")
    return int(size_bytes)


def _gpu_bytes(value: object) -> int:
    size_bytes = parse_bytes(value)
    if size_bytes < LEAST_GPU_BYTES:
        raise ValueError("must be at least 64MiB, with its unit, such as 14GiB: a bare number is bytes")
    return size_bytes


def _amount(value: object, units: Mapping[str, float]) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    found = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[2] not in units:
        return None
    return float(found[1]) * units[found[2]]


def _seconds_or_never(value: object) -> float | None:
    return None if value is None or value == "never" else parse_seconds(value)


# `gateway.catalog_schema` puts what people may write in the place of these formats.
_DURATION_SCHEMA = {"format": "duration"}
_SIZE_SCHEMA = {"format": "size"}
_GPU_SIZE_SCHEMA = {"format": "gpu-size"}
_DURATION_OR_NEVER_SCHEMA = {"anyOf": [_DURATION_SCHEMA, {"const": "never"}]}

Seconds = Annotated[float, BeforeValidator(parse_seconds), WithJsonSchema(_DURATION_SCHEMA)]
SecondsOrNever = Annotated[float | None, BeforeValidator(_seconds_or_never), WithJsonSchema(_DURATION_OR_NEVER_SCHEMA)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema(_SIZE_SCHEMA)]
GpuBytes = Annotated[int, BeforeValidator(_gpu_bytes), WithJsonSchema(_GPU_SIZE_SCHEMA)]

# ---- text -----------------------------------------------------------------------------------------------------------


def _matches(pattern: str, rule: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(rule)
        return text

    return AfterValidator(check)


def _one_line(text: str) -> str:
    if not 0 < len(text) <= 1000 or text != text.strip() or any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ValueError("must be one line of text, at most 1000 characters, without spaces around it")
    return text


def _secret_line(secret: SecretStr) -> SecretStr:
    _one_line(secret.get_secret_value())  # it goes out in a header
    return secret


def _no_spaces(text: str) -> str:
    if any(char.isspace() for char in text):
        raise ValueError("must not contain spaces")
    return text


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain the character NUL")
    return text


def _web_address(text: str) -> str:
    try:
        url = urlsplit(text)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable or "?" in text or "#" in text:
        raise ValueError("must be an address such as http://10.0.0.5:8080, without query")
    if "@" in url.netloc:
        raise ValueError("must not contain a user or password: use api_key")
    return text.rstrip("/")


_VOLUME = re.compile(r"(?P<source>[^:]+):(?P<target>/[^:]*?)(?::(?P<mode>ro|rw))?")
_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]+")
SECRETS_TARGET = "/run/tgi-gateway-secrets"
"""Where a container finds its secrets."""


def volume_parts(text: str) -> tuple[str, str, bool]:
    """Return a volume's source, its target in the shortest way to write it, and whether it is read-only.

    Raises:
        ValueError: no container can have it.
    """
    found = _VOLUME.fullmatch(text)
    if found is None:
        raise ValueError("must be SOURCE:/PATH/IN/CONTAINER, with :ro at the end to make it read-only")
    source, target = found["source"], "/" + normpath(found["target"]).lstrip("/")
    if not (source.startswith("/") or _VOLUME_NAME.fullmatch(source)):
        raise ValueError("must have an absolute path, or the name of a volume of two letters or more, as its source")
    if target in ("/", "/dev", "/proc", SECRETS_TARGET) or target.startswith("/proc/"):
        raise ValueError(f"must not be mounted on /, /dev, /proc or {SECRETS_TARGET}: no container starts with that")
    return source, target, found["mode"] == "ro"


def _volume(text: str) -> str:
    volume_parts(text)
    return text


def _different_targets(volumes: tuple[str, ...]) -> tuple[str, ...]:
    targets = [target for _, target, _ in map(volume_parts, volumes)]
    if twice := sorted({target for target in targets if targets.count(target) > 1}):
        raise ValueError(f"has more than one for {', '.join(twice)}: give each a target of its own")
    return volumes


def _one_or_more(value: object) -> object:
    return [value] if isinstance(value, str) else value


ID_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"
_ID_RULE = "an id is 1 to 63 of a-z, 0-9, `.`, `_` and `-`, and begins with a letter or digit"
_TEXTS_SCHEMA = {"type": ["string", "array"], "items": {"type": "string", "minLength": 1}, "minLength": 1}

Id = Annotated[str, _matches(ID_PATTERN, _ID_RULE)]
Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[Line, AfterValidator(_no_spaces)]
Secret = Annotated[SecretStr, AfterValidator(_secret_line)]
Url = Annotated[Word, AfterValidator(_web_address)]
Volume = Annotated[Line, AfterValidator(_volume)]
Volumes = Annotated[tuple[Volume, ...], AfterValidator(_different_targets)]
Sha256 = Annotated[str, _matches(r"[0-9A-Fa-f]{64}", "must be 64 hexadecimal digits"), AfterValidator(str.lower)]
Template = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]
Texts = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(_one_or_more), WithJsonSchema(_TEXTS_SCHEMA)
]

# ---- where weights lie ----------------------------------------------------------------------------------------------

_IN_PACKAGE = re.compile(r"package:([A-Za-z_][A-Za-z0-9_]*)/(.+)")


def _inside_its_package(text: str) -> str:
    found = _IN_PACKAGE.fullmatch(text)
    if text.startswith("package:") and (found is None or _leaves_its_folder(Path(found[2]))):
        raise ValueError("must be a path, or package:NAME/FILE with a file inside an installed Python package")
    return text


def _leaves_its_folder(file: Path) -> bool:
    return file.is_absolute() or ".." in file.parts


WeightsSource = Annotated[str, AfterValidator(_inside_its_package), AfterValidator(_one_line)]


def weights_path(source: str, folder: Path) -> Path | None:
    """Return the file that `source` means in a catalog of this folder, or None if its package is not installed."""
    found = _IN_PACKAGE.fullmatch(source)
    if found is None:
        return None if source.startswith("package:") else (folder / source).absolute()
    package = _package_folder(found[1])
    return package / found[2] if package else None


def _package_folder(name: str) -> Path | None:
    try:
        package = find_spec(name)  # of a top-level name: nothing is imported
    except (ImportError, ValueError):
        return None
    folders = package.submodule_search_locations if package else None
    return Path(next(iter(folders))).absolute() if folders else None


# ---- numbers, true and false, GPUs ----------------------------------------------------------------------------------


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _true_or_false(value: object) -> object:
    flags = {"true": True, "false": False}  # as text, they come from the environment
    value = flags.get(value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


GPU_IDS = "0, 0:1, GPU-... or MIG-..., as `nvidia-smi -L` tells them"
GPU_ID = "(0|[1-9][0-9]{0,2})(:(0|[1-9][0-9]{0,2}))?|(GPU|MIG)-[A-Za-z0-9/-]{1,99}"


def is_gpu_id(text: str) -> bool:
    """Say whether this names one device of NVIDIA's. `all`, `none` and `void` would mean others than it says."""
    return re.fullmatch(GPU_ID, text) is not None


def _gpus(value: object) -> int | tuple[str, ...]:
    gpus = _gpu_ids(value) if isinstance(value, list | tuple) else _gpu_count(value)
    if gpus is None:
        raise ValueError(f"must be a count from 0 to 64, or a list of different device ids: {GPU_IDS}")
    return gpus


def _gpu_count(value: object) -> int | None:
    try:
        count = int(str(value))  # and not of the value itself: True and 1.5 are no counts
    except ValueError:
        return None
    return count if 0 <= count <= 64 else None


def _gpu_ids(value: Collection[object]) -> tuple[str, ...] | None:
    ids = tuple(str(gpu) for gpu in value if isinstance(gpu, str | int) and not isinstance(gpu, bool))
    usable = all(is_gpu_id(gpu) for gpu in ids)
    different = len(set(ids)) == len(value) > 0
    return ids if usable and different else None


_GPU_SCHEMA = {"type": ["integer", "string"], "minimum": 0, "maximum": 999, "pattern": f"^({GPU_ID})$"}
_GPUS_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": 64},
        {"type": "array", "items": _GPU_SCHEMA, "minItems": 1, "uniqueItems": True},
    ]
}

NOT_BOOL = BeforeValidator(_not_bool)
"""For a number: pydantic would take true for 1. Write it behind the number's bounds, which it would hide otherwise."""
Bool = Annotated[bool, BeforeValidator(_true_or_false)]
Gpus = Annotated[int | tuple[str, ...], BeforeValidator(_gpus), WithJsonSchema(_GPUS_SCHEMA)]

# ---- keys and values of mappings ------------------------------------------------------------------------------------


def _flag_value(value: object) -> object:
    if isinstance(value, str):
        return _no_nul(value)
    if isinstance(value, int | float) and abs(value) < 2**63:
        return value
    raise ValueError("must be text, a number, true or false")


def _variable_value(value: object) -> object:
    if isinstance(value, bool | float):
        raise ValueError("must be text: put it in quotes")
    return str(value) if isinstance(value, int) and abs(value) < 2**63 else value


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, TypeError):
        raise ValueError("must hold only text, finite numbers, true, false, null, lists and mappings") from None
    return dict(json.loads(text))


_FLAG_NAME_RULE = "an engine's flag is written without its leading dashes"
_FLAG_VALUE_SCHEMA = {"type": ["string", "number", "boolean"]}
_VARIABLE_NAME_RULE = "an environment variable's name holds letters, digits and `_` only"
_VARIABLE_VALUE_SCHEMA = {"type": ["string", "integer"]}

FlagName = Annotated[str, _matches(r"[A-Za-z0-9][A-Za-z0-9_-]*", _FLAG_NAME_RULE)]
FlagValue = Annotated[str | int | float | bool, BeforeValidator(_flag_value), WithJsonSchema(_FLAG_VALUE_SCHEMA)]
VariableName = Annotated[str, _matches(r"[A-Za-z_][A-Za-z0-9_]*", _VARIABLE_NAME_RULE)]
VariableValue = Annotated[
    str, BeforeValidator(_variable_value), AfterValidator(_no_nul), WithJsonSchema(_VARIABLE_VALUE_SCHEMA)
]
PlainJson = Annotated[dict[str, Any], AfterValidator(_plain_json)]

# ---- names: shown, and nearly known ---------------------------------------------------------------------------------


def shown(name: object, longest: int = 100) -> str:
    """Return a name from outside, short and harmless to a terminal."""
    if not isinstance(name, str):
        return f"<{type(name).__name__}>" if isinstance(name, int) and abs(name) > 2**63 else str(name)
    short = name if len(name) <= longest else name[:longest] + "..."
    return short if short.isprintable() else ascii(short)


def nearest(name: object, known: Iterable[object], likeness: float = 0.6) -> list[str]:
    """Return up to three known names that are like `name`, the most alike first (a likeness of 1 is the same)."""
    names = [other for other in known if isinstance(other, str) and len(other) <= 100]
    return difflib.get_close_matches(name[:100], names, n=3, cutoff=likeness) if isinstance(name, str) else []


def did_you_mean(name: object, known: Iterable[object], likeness: float = 0.6) -> str:
    """Return `; did you mean ...?` with the known name most like `name`, or nothing."""
    near = nearest(name, known, likeness)
    return f"; did you mean {shown(near[0])}?" if near else ""


def unknown_key(key: object, known: Iterable[object]) -> str:
    """Return the rule that a key breaks which is none of the known ones."""
    return f"unknown key{did_you_mean(key, known)}"


# ---- what pydantic finds wrong --------------------------------------------------------------------------------------

_RULES = {
    "string_type": "must be text: put it in quotes",
    "path_type": "must be text: put it in quotes",
    "invalid_key": "every key in it must be text: put it in quotes",
    "dict_type": "must be a mapping of keys to values",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "bool_parsing": "must be true or false",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "value_error": "{error}",
}


def faults(error: ValidationError, known: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Yield (key, rule) for every key that pydantic found wrong by itself, in our words and without its value.

    A key inside a key is `env.NAME`. `known` are the keys that an unknown one may have been meant for.
    """
    for fault in error.errors(include_input=False, include_url=False):
        key = ".".join(shown(step) for step in fault["loc"] if step != "[key]")
        if key and fault["type"] != "default_factory_not_called":  # as it needs another key, which is wrong
            yield key, _rule(fault, known)


def _rule(fault: Mapping[str, Any], known: Collection[str]) -> str:
    if fault["type"] == "extra_forbidden":
        return unknown_key(fault["loc"][-1], known)
    return _RULES.get(fault["type"], "is not usable").format(**fault.get("ctx", {}))
