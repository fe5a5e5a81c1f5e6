"""Which right an address needs (contract section 7)."""

from __future__ import annotations

import re

from gateway.keys import Right

_OPEN = re.compile(
    r"/health(/.*)?|/(docs|docs/oauth2-redirect|redoc|openapi\.json)"
    r"|/models/[^/]+/((llm-service|api-server)/(docs|redoc|openapi\.json)|tgi/(docs|redoc|api-doc/openapi\.json))"
)
_MANAGE = re.compile(r"/models/[^/]+/(start|stop|restart|pull|logs)\s*$")
"""More than the router takes: its own patterns let a line feed stand at the end."""


def right_for(path: str) -> Right | None:
    """Return the right that an address needs, as the router sees it: below the root path, without slash at the end."""
    if _OPEN.fullmatch(path):
        return None
    return "manage" if _MANAGE.match(path) else "generate"
