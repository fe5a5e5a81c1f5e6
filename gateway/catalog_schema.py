"""The JSON Schema of models.yaml, for editors: made of `ModelSpec`, but of what people write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.catalog import MODEL_KEYS, ModelSpec
from gateway.catalog_values import ID_PATTERN, LARGEST_BYTES, LEAST_GPU_BYTES, LONGEST_S


def catalog_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of models.yaml as a person writes it."""
    model = ModelSpec.model_json_schema()
    parameters = model["$defs"]["RequestParameters"]
    definitions = {
        "Model": _mapping_schema({key: model["properties"][key] for key in MODEL_KEYS}),
        "RequestParameters": _mapping_schema(parameters["properties"]) | {"description": parameters["description"]},
        **_VALUE_SCHEMAS,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "models.yaml",
        **_mapping_schema(_TOP_SCHEMAS),
        "required": ["models"],
        "$defs": definitions,
    }


_SIZE_TEXT_SCHEMA = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?(B|[kK]B|[MGT]B|[KMGT]iB)?$"}
_VALUE_SCHEMAS: dict[str, Any] = {
    "Duration": {
        "description": "90s, 15m, 2h, 500ms, or a number of seconds.",
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_S},
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?(ms|s|m|h)?$"},
        ],
    },
    "Size": {
        "description": "14GiB, 512MiB, 2GB, or a number of bytes.",
        "anyOf": [{"type": "number", "minimum": 1, "maximum": LARGEST_BYTES}, _SIZE_TEXT_SCHEMA],
    },
    "GpuSize": {
        "description": "14GiB, 512MiB, 2GB, or a number of bytes; at least 64MiB.",
        "anyOf": [{"type": "number", "minimum": LEAST_GPU_BYTES, "maximum": LARGEST_BYTES}, _SIZE_TEXT_SCHEMA],
    },
    "Variable": {"description": "${NAME} or ${NAME:-default}.", "type": "string", "pattern": r"\$\{"},
}
_NAMED_SCHEMAS = {
    "duration": {"$ref": "#/$defs/Duration"},
    "size": {"$ref": "#/$defs/Size"},
    "gpu-size": {"$ref": "#/$defs/GpuSize"},
}
_TOP_SCHEMAS: dict[str, Any] = {
    "default_model": {"type": "string", "description": "Answers requests that name no model. Default: none."},
    "defaults": {"$ref": "#/$defs/Model", "description": "Any key of a model, for all of them; a model's own wins."},
    "models": {
        "type": "object",
        "description": "The models by id.",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{ID_PATTERN}$"},
        "additionalProperties": {"$ref": "#/$defs/Model"},
    },
}


def _mapping_schema(keys: Mapping[str, Any]) -> dict[str, Any]:
    properties = {key: _key_schema(schema) for key, schema in keys.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _key_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return pydantic's schema of a key as editors need it: no null, named units, and ${VARIABLE} in every place."""
    about = {"description": " ".join(schema["description"].split())}
    if schema.get("default") is not None:
        about["default"] = schema["default"]
    kinds = _kinds({word: said for word, said in schema.items() if word not in ("title", "description", "default")})
    if not any(_holds_any_text(kind) for kind in kinds):
        kinds.append({"$ref": "#/$defs/Variable"})
    return about | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _kinds(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of which a value must fit one."""
    if "anyOf" in schema:
        return [kind for part in schema["anyOf"] for kind in _kinds(part)]
    if schema == {"type": "null"}:
        return []
    return [_NAMED_SCHEMAS.get(schema.get("format", ""), schema)]


def _holds_any_text(schema: Mapping[str, Any]) -> bool:
    mapping = schema.get("type") == "object" or schema.get("$ref") in ("#/$defs/Model", "#/$defs/RequestParameters")
    return mapping or ("string" in schema.get("type", ()) and "enum" not in schema)
