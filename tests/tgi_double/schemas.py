"""Checks bodies against the schemas of TGI's OpenAPI file: of JSON Schema as much as that file uses.

Where the file and tgi.md differ, tgi.md wins: `ALSO_NULL` are numbers that TGI may write as null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMAS: dict[str, Any] = json.loads(Path(__file__).with_name("tgi-openapi.json").read_text())["components"]["schemas"]
ALSO_NULL = {"logprob"}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}


def problems(value: Any, name: str) -> list[str]:
    """Return what is wrong with a value that should be a `name`; nothing if it is one."""
    return list(_problems(value, SCHEMAS[name], name))


def _problems(value: Any, schema: Any, where: str) -> Iterator[str]:
    if "$ref" in schema:
        yield from _problems(value, SCHEMAS[schema["$ref"].rpartition("/")[2]], where)
        return
    if value is None and (schema.get("nullable") or where.rpartition(".")[2] in ALSO_NULL):
        return
    for part in schema.get("allOf", []):
        yield from _problems(value, part, where)
    if "oneOf" in schema:
        fits = [not list(_problems(value, part, where)) for part in schema["oneOf"]]
        if sum(fits) != 1:
            yield f"{where}: fits {sum(fits)} of {len(fits)} schemas"
    yield from _mistyped(value, schema, where)
    if isinstance(value, dict):
        yield from _wrong_members(value, schema, where)
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _problems(item, schema.get("items", {}), f"{where}[{number}]")


def _mistyped(value: Any, schema: Any, where: str) -> Iterator[str]:
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{where}: {value!r} is no {kind}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    elif "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: {value!r} is below {schema['minimum']}"


def _wrong_members(value: dict[str, Any], schema: Any, where: str) -> Iterator[str]:
    for name in schema.get("required", []):
        if name not in value:
            yield f"{where}: {name} is missing"
    for name, part in schema.get("properties", {}).items():
        if name in value:
            yield from _problems(value[name], part, f"{where}.{name}")
