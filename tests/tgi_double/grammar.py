"""Grammars (tgi.md 1.1): which are taken, and the smallest text that fits one.

TGI lets the model choose among all that fits; the double has one answer, and writes it token by token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .regex import UnknownPattern, smallest_match

Json = Any
FORMATS = {
    "date": "2000-01-01",
    "time": "00:00:00Z",
    "date-time": "2000-01-01T00:00:00Z",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "email": "a@b.c",
}


class BadGrammar(ValueError):
    """A grammar that TGI does not take; the words are the rule that it breaks."""


def smallest(grammar: Mapping[str, Any]) -> str:
    """Return the smallest text that fits.

    Raises:
        BadGrammar: it is none, or asks for more than the double knows.
    """
    if grammar["type"] == "regex":
        return _of_regex(grammar["value"])
    schema = grammar["value"]["schema"] if grammar["type"] == "json_schema" else _parsed(grammar["value"])
    if not isinstance(schema, dict) or "properties" not in schema:
        raise BadGrammar("grammar is not valid: Grammar must have a 'properties' field")
    return _Smallest(schema).text({"type": "object", **schema})


def _of_regex(pattern: str) -> str:
    try:
        return smallest_match(pattern)
    except UnknownPattern as error:
        raise BadGrammar(f"grammar is not valid: {error}") from None


def _parsed(value: Json) -> Json:
    if not isinstance(value, str):
        if isinstance(value, dict):
            return value
        raise BadGrammar("grammar is not supported")  # TGI's words for it, odd as they are
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadGrammar(f"grammar is not valid: {error}") from None


def dumps(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class _Smallest:
    """The smallest texts of the schemas in one document, whose definitions they may name."""

    def __init__(self, root: Mapping[str, Json]) -> None:
        self._root = root
        self._open: list[str] = []
        """The references that are being written: one among them again would never end."""

    def text(self, schema: Json) -> str:
        if not isinstance(schema, dict):
            return "null"
        if "$ref" in schema:
            return self._of_reference(schema["$ref"])
        if "const" in schema:
            return dumps(schema["const"])
        if "enum" in schema:
            return min(map(dumps, schema["enum"]), key=len)
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._of_any(schema[word])
        if "allOf" in schema:
            return self.text(_merged([{**schema, "allOf": None}, *schema["allOf"]]))
        if isinstance(schema.get("type"), list):
            return self._of_any([{**schema, "type": kind} for kind in schema["type"]])
        return self._of_type(schema)

    def _of_reference(self, reference: str) -> str:
        if reference in self._open:
            raise _unsupported(f"{reference} within itself")
        self._open.append(reference)
        try:
            return self.text(self._found(reference))
        finally:
            self._open.pop()

    def _found(self, reference: str) -> Json:
        place: Json = self._root
        for name in reference.removeprefix("#").split("/")[1:]:
            try:
                place = place[name.replace("~1", "/").replace("~0", "~")]
            except (KeyError, TypeError):
                raise _unsupported(f"{reference}, which is not there") from None
        return place

    def _of_any(self, schemas: Sequence[Json]) -> str:
        """Return the smallest of those that come to an end."""
        found = []
        for schema in schemas:
            try:
                found.append(self.text(schema))
            except BadGrammar as error:
                failure = error
        if not found:
            raise failure
        return min(found, key=len)

    def _of_type(self, schema: Mapping[str, Json]) -> str:
        kind = schema.get("type", "object" if "properties" in schema else "array" if "items" in schema else "null")
        if kind == "object":
            return "{" + ",".join(self._members(schema)) + "}"
        if kind == "array":
            return "[" + ",".join(self._items(schema)) + "]"
        if kind == "string":
            return dumps(_string(schema))
        if kind in ("integer", "number"):
            return dumps(_number(schema))
        if kind in ("boolean", "null"):
            return "true" if kind == "boolean" else "null"
        raise _unsupported(dumps(kind))

    def _members(self, schema: Mapping[str, Json]) -> Iterator[str]:
        required = schema.get("required", ())
        for name, member in schema.get("properties", {}).items():
            if name in required:
                yield f"{dumps(name)}:{self.text(member)}"

    def _items(self, schema: Mapping[str, Json]) -> Iterator[str]:
        first = schema.get("prefixItems", [])
        rest = max(0, schema.get("minItems", 0) - len(first))
        yield from map(self.text, [*first, *[schema.get("items", {})] * rest])


def _merged(schemas: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    whole: dict[str, Json] = {}
    for schema in schemas:
        for name, value in schema.items():
            before = whole.get(name)
            whole[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    del whole["allOf"]
    return whole


def _string(schema: Mapping[str, Json]) -> str:
    if "pattern" in schema:
        return _of_regex(schema["pattern"])
    if "format" in schema:
        return FORMATS.get(schema["format"], "")
    return "a" * int(schema.get("minLength", 0))


def _number(schema: Mapping[str, Json]) -> int | float:
    """Return the number nearest to 0 that is a multiple of one step and within the bounds."""
    step = schema.get("multipleOf", 1)
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    found: int | float = 0
    if low is not None and low >= 0:
        found = -(-low // step) * step
        found += step if found <= schema.get("exclusiveMinimum", found - 1) else 0
    elif high is not None and high <= 0:
        found = high // step * step
        found -= step if found >= schema.get("exclusiveMaximum", found + 1) else 0
    return int(found) if found == int(found) else found


def _unsupported(what: str) -> BadGrammar:
    return BadGrammar(
        f"cannot compile regex from schema: Unsupported JSON Schema structure {what} \n"
        "Make sure it is valid to the JSON Schema specification and check if it's supported by Outlines.\n"
        "If it should be supported, please open an issue."
    )
