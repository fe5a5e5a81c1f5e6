"""Imports go down, one floor or more at a time (README, "The house"); and every module has a floor."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gateway"

FLOORS = [
    [
        "gateway.errors",
        "gateway.lifecycle",
        "gateway.catalog_values",
        "gateway.runtimes.leash",
        "gateway.engines.embedded_server",
        "gateway.gguf",
        "gateway.machine",
        "gateway.devices",
        "gateway.aside",
        "gateway.counts",
    ],
    ["gateway.catalog", "gateway.generation", "gateway.departure", "gateway.outcome", "gateway.waiting"],
    [
        "gateway.catalog_file",
        "gateway.catalog_schema",
        "gateway.bodies",
        "gateway.facts",
        "gateway.keys",
        "gateway.shapes",
    ],
    [
        "gateway.settings",
        "gateway.catalog_watch",
        "gateway.runtimes.base",
        "gateway.conversation",
        "gateway.tgi_events",
    ],
    ["gateway.engines.base"],
    ["gateway.engines", "gateway.runtimes"],
    ["gateway.fleet"],
    ["gateway.writers", "gateway.dialects.openai", "gateway.figures"],
    ["gateway.relay"],
    ["gateway.http11"],
    ["gateway.dialing"],
    ["gateway.upstream", "gateway.probe", "gateway.dialects", "gateway.passage"],
    ["gateway.api"],
    ["gateway.app", "gateway.connection"],
    ["gateway.serving", "gateway.doctor"],
    ["gateway.terminal"],
    ["gateway.commands"],
    ["gateway.remote"],
    ["gateway.cli"],
    ["gateway.__main__"],
]
ALONE = {
    "gateway.client",
    "gateway.runtimes.leash",
    "gateway.engines.embedded_server",
    "gateway.errors",
    "gateway.gguf",
    "gateway.machine",
    "gateway.devices",
    "gateway.aside",
    "gateway.counts",
}
"""These import nothing of the package: programs and values that stand by themselves."""
SIDE_BY_SIDE = {"gateway.fleet", "gateway.api", "gateway.engines", "gateway.runtimes"}
"""Rooms whose own modules may import one another; all others are files that know nothing of their neighbours."""


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] != "__init__":
            found[".".join(parts)] = path
    return found


def room_of(module: str) -> str | None:
    """Return the longest entry of FLOORS that this module is or lies in."""
    entries = [entry for floor in FLOORS for entry in floor if module == entry or module.startswith(entry + ".")]
    return max(entries, key=len, default=None)


def floor_of(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room_of(module) in floor)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    known = modules()
    return {name for name in found if name in known}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    imported = imports_of(modules()[module])

    if module in ALONE:
        assert imported == set()
        return
    assert room_of(module), f"{module} has no floor: give it one in FLOORS"
    room, floor = room_of(module), floor_of(module)
    upward = {
        other
        for other in imported
        if other not in ALONE | {"gateway.client"}
        and not (room_of(other) == room and room in SIDE_BY_SIDE)
        and floor_of(other) >= floor
    }
    assert upward == set()


def test_the_rooms_of_the_fleet_and_the_api_have_no_import_cycle() -> None:
    edges = {module: imports_of(path) for module, path in modules().items()}

    def reaches(start: str, seen: frozenset[str]) -> bool:
        return any(other in seen or reaches(other, seen | {other}) for other in edges[start])

    assert [module for module in edges if reaches(module, frozenset({module}))] == []


def test_only_the_composition_root_names_concrete_engines_and_runtimes() -> None:
    concrete = {
        "gateway.engines.llamacpp",
        "gateway.engines.openai",
        "gateway.engines.tgi",
        "gateway.runtimes.docker.runtime",
        "gateway.runtimes.nvml",
        "gateway.runtimes.external",
        "gateway.runtimes.process",
        "gateway.upstream",
    }

    users = {module for module, path in modules().items() if imports_of(path) & concrete}

    assert users <= {"gateway.app"}
