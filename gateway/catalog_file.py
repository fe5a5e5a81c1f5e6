"""Reads models.yaml: `load_catalog` returns its catalog, or reports everything that is wrong with it at once.

A complaint names the file, the model, the key and the rule, and never the value: that may be a secret.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from pydantic import ValidationError

from gateway.catalog import MODEL_KEYS, Catalog, ModelSpec, RequestParameters, clashes, contradictions
from gateway.catalog_values import did_you_mean, faults, shown, unknown_key
from gateway.errors import CatalogError

_TOP_KEYS = ("default_model", "defaults", "models")
_MAPPING_RULE = "must be a mapping of keys to values"


def load_catalog(path: Path, environ: Mapping[str, str], content: bytes | None = None) -> Catalog:
    """Return the catalog that the file holds, with `${VARIABLES}` taken from `environ`.

    With `content`, that is what the file says, and it is not read again.

    Raises:
        CatalogError: with a complaint for everything that is wrong with the file.
    """
    return _Reading(path, environ, content).catalog()


def read_catalog(path: Path) -> bytes:
    """Return what the file holds. Never waits for somebody to write into it, as a pipe would have us do.

    Raises:
        CatalogError: it cannot be read, is too large, or is no regular file.
    """
    return _Reading(path, {}).regular_content()


class _Fault(NamedTuple):
    section: str
    """A model, `defaults`, or another key at the top; empty for the file as a whole."""
    key: str
    rule: str


class _Reading:
    """One reading of one file. It notes every fault, and goes on as long as there is anything to look at."""

    def __init__(self, path: Path, environ: Mapping[str, str], content: bytes | None = None) -> None:
        self._path = path
        self._environ = environ
        self._content = content
        self._faults: list[_Fault] = []

    def catalog(self) -> Catalog:
        """Return the catalog, or raise CatalogError."""
        top = self._known("", self._document(), _TOP_KEYS)
        default_model = self._default_model(top)
        defaults = self._entry("defaults", top.get("defaults", {}))
        models = self._models(top.get("models"), defaults, self._faultless(defaults))
        for section, rule in clashes(models):
            self._note(section, "", rule)
        if self._faults:
            raise self._error()
        return Catalog(path=self._path, default_model=default_model, models=models)

    def regular_content(self) -> bytes:
        """Return what the file holds if it is a regular one, or raise CatalogError."""
        return self._told(lambda: _read(self._path, opener=_open_regular))

    def content(self) -> bytes:
        """Return what the file holds, or raise CatalogError."""
        return self._told(lambda: _read(self._path) if self._content is None else self._content)

    def _told(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except ValueError as error:
            self._note("", "", str(error))
            raise self._error() from None

    def _note(self, section: str, key: str, rule: str) -> None:
        self._faults.append(_Fault(section, key, rule))

    def _note_news(self, section: str, wrong: Iterable[tuple[str, str]]) -> None:
        """Note each (key, rule), but for the keys with a fault already: one is enough."""
        faulty = self._faulty_keys(section)
        for key, rule in wrong:
            if key not in faulty:
                self._note(section, key, rule)

    def _faulty_keys(self, section: str) -> set[str]:
        return {fault.key for fault in self._faults if fault.section == section}

    def _error(self) -> CatalogError:
        file = shown(str(self._path), 4096)
        return CatalogError([": ".join([file, *filter(None, fault)]) for fault in self._faults])

    def _document(self) -> dict[Any, Any]:
        content = self.content()
        try:
            document, repeated = _parse(_text_of(content))
            self._faults += [_Fault("", "", rule) for rule in repeated]
            if document is None:
                raise ValueError("is empty: write `models:` and at least one model under it")
            if not isinstance(document, dict):
                raise ValueError(_MAPPING_RULE)
        except ValueError as error:
            self._note("", "", str(error))
            raise self._error() from None
        return document

    def _known(self, section: str, written: object, known: tuple[str, ...]) -> dict[str, Any]:
        """Return what is written under known keys."""
        if not isinstance(written, dict):
            self._note(section, "", _MAPPING_RULE)
            return {}
        for key in written:
            if key not in known:
                self._note(section, shown(key), unknown_key(key, known))
        return {key: value for key, value in written.items() if key in known}

    def _default_model(self, top: Mapping[str, Any]) -> str | None:
        if "default_model" not in top:
            return None
        written, models = top["default_model"], top.get("models")
        name = self._filled("default_model", "", written)
        if not isinstance(name, str):
            self._note("default_model", "", "must be the id of a model")
            return None
        if isinstance(models, dict) and name not in models:
            rule = f"there is no model {shown(written)}{did_you_mean(name, models)}"  # not what its ${VARIABLE} holds
            self._note_news("default_model", [("", rule)])
        return name

    def _entry(self, section: str, written: object) -> dict[str, Any]:
        """Return the model keys of one section, ${VARIABLES} replaced; the faulty ones are among them."""
        values = self._known(section, written, MODEL_KEYS)
        for key, value in values.items():
            if value is None:
                self._note(section, key, "has no value: give it one, or remove the line")
        return {key: self._filled(section, key, value) for key, value in values.items()}

    def _filled(self, section: str, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: self._filled(section, f"{key}.{shown(inner)}", item) for inner, item in value.items()}
        if isinstance(value, list):
            return [self._filled(section, f"{key}.{position}", item) for position, item in enumerate(value)]
        try:
            return _interpolate(value, self._environ) if isinstance(value, str) else value
        except ValueError as error:
            self._note(section, key, str(error))
            return value

    def _faultless(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults that are right; complain of the others here, not once a model."""
        _, wrong = self._spec("defaults", defaults)
        self._note_news("defaults", wrong)
        faulty = {key.split(".")[0] for key in self._faulty_keys("defaults")}
        return {key: value for key, value in defaults.items() if key not in faulty}

    def _models(
        self, written: object, defaults: Mapping[str, Any], faultless: Mapping[str, Any]
    ) -> dict[str, ModelSpec]:
        if not isinstance(written, dict) or not written:
            self._note("models", "", "must be a mapping of at least one model by its id")
            return {}
        specs = [self._model(model, entry, defaults, faultless) for model, entry in written.items()]
        return {spec.id: spec for spec in specs if spec is not None}

    def _model(
        self, model: object, written: object, defaults: Mapping[str, Any], faultless: Mapping[str, Any]
    ) -> ModelSpec | None:
        section = shown(model)
        own = self._entry(section, written)
        if not isinstance(written, dict):
            return None
        spec, wrong = self._spec(model, {**faultless, **own})
        self._note_news(section, wrong)
        said = {**defaults, **own}
        self._note_news(section, contradictions({**said, "weights_source": said.get("weights")}))
        return spec

    def _spec(self, model: object, values: Mapping[str, Any]) -> tuple[ModelSpec | None, list[tuple[str, str]]]:
        """Return a model, or None and (key, rule) for what is wrong with single keys; the id is no key of the file."""
        try:
            return ModelSpec.model_validate({"id": model, **values}, context={"folder": self._path.parent}), []
        except ValidationError as error:
            as_written = {"id": "", "weights_source": "weights"}
            wrong = faults(error, RequestParameters.__annotations__)
            return None, [(as_written.get(key, key), rule) for key, rule in wrong]


# ---- YAML into plain values -----------------------------------------------------------------------------------------

_LARGEST_FILE_BYTES = 2**20
_MOST_VALUES = 100_000
_DEEPEST = 50
_CORE_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """YAML's plain core: text, numbers, true and false, null, lists and mappings. A date stays text."""

    yaml_constructors: ClassVar[Any] = {
        tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _CORE_TAGS
    }
    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class declares it
        first: [(tag, looks) for tag, looks in resolvers if tag in _CORE_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except (ValueError, ArithmeticError, LookupError):  # such as `!!int x`, a number of 5,000 digits, "\\ud800"
            raise yaml.MarkedYAMLError(problem="a value cannot be read", problem_mark=node.start_mark) from None
        return value


@dataclass
class _Nodes:
    """A walk over a YAML document before its values are made: finds what would be lost or would grow without bound."""

    repeated: list[str] = field(default_factory=list)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """Return how many values a node stands for with its aliases written out, and how deeply they nest.

        Raises:
            MarkedYAMLError: it contains itself, or either number is too large.
        """
        if id(node) not in self.sizes:
            self.sizes[id(node)] = (_MOST_VALUES + 1, 1)  # what an alias to a node still being measured counts
            self.sizes[id(node)] = self._sum(node)
        return self.sizes[id(node)]

    def _sum(self, node: yaml.Node) -> tuple[int, int]:
        measured = [self.measure(child) for child in self._children(node)]
        size = 1 + sum(size for size, _ in measured)
        depth = 1 + max((depth for _, depth in measured), default=0)
        if size > _MOST_VALUES or depth > _DEEPEST:
            problem = f"more than {_MOST_VALUES} values (with aliases written out), or nested more than {_DEEPEST} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return size, depth

    def _children(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.MappingNode):
            self._find_repeated([key for key, _ in node.value])
            return [child for pair in node.value for child in pair]
        return node.value if isinstance(node, yaml.SequenceNode) else []

    def _find_repeated(self, keys: list[yaml.Node]) -> None:
        first: dict[str, int] = {}
        for key in keys:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                self.repeated.append(f"line {line}: the key {shown(key.value)} is already on line {first[key.value]}")
            first.setdefault(key.value, line)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no regular file")
    return descriptor


def _read(path: Path, opener: Callable[[str, int], int] | None = None) -> bytes:
    """Return the file's bytes, or raise ValueError in words."""
    try:
        with open(path, "rb", opener=opener) as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
        if len(content) > _LARGEST_FILE_BYTES:
            raise ValueError(f"is larger than {_LARGEST_FILE_BYTES} bytes")
        return content
    except FileNotFoundError:
        hint = "name another with --catalog or GATEWAY_CATALOG"
        raise ValueError(f"there is no such file ({shown(str(path.absolute()), 4096)}); {hint}") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _text_of(content: bytes) -> str:
    """Return the text that these bytes are, or raise ValueError in words."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None


def _parse(text: str) -> tuple[object, list[str]]:
    """Return a YAML text's plain value and a complaint for each repeated key, or raise ValueError in words."""
    nodes = _Nodes()
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None, []
        nodes.measure(root)
        return loader.construct_document(root), nodes.repeated
    except yaml.YAMLError as error:
        raise ValueError(_yaml_fault(error, text)) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _yaml_fault(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"line {text.count(chr(10), 0, error.position) + 1}: a character that YAML does not allow"
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "not YAML"
    # What the parser quotes may be part of a secret (`api_key: *abc`); single characters and its own <words> may stay.
    problem = re.sub(r"'[^']*'|\"[^\"]*\"", lambda quoted: _harmless(quoted[0]), problem)
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _harmless(quoted: str) -> str:
    return quoted if len(quoted) <= 3 or quoted[1] in "<\\" else "..."


# ---- ${VARIABLE} ----------------------------------------------------------------------------------------------------

_REFERENCE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")


def _interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Return `text` with ${NAME} and ${NAME:-default} replaced and $${ unescaped.

    Raises:
        ValueError: a variable without default is not set, or a `${` begins no reference.
    """
    return _REFERENCE.sub(lambda found: _referenced(found, environ), text)


def _referenced(found: re.Match[str], environ: Mapping[str, str]) -> str:
    if found[0] == "$${":
        return "${"
    if found[1] is None:
        raise ValueError("`${` must begin ${NAME} or ${NAME:-default}; write $${ for the characters themselves")
    value = environ.get(found[1])
    if value is None and found[2] is None:
        raise ValueError(f"the variable {shown(found[1])} is not set: set it, or write ${{{shown(found[1])}:-default}}")
    return _utf8(found[1], value or found[2] or "")


def _utf8(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the variable {shown(name)} is not UTF-8 text") from None
    return value
