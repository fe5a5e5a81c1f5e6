"""The ports of this machine that lead to our containers, each held from its choice until its container is gone."""

from __future__ import annotations

import socket

from gateway.errors import StartFailed

HOST = "127.0.0.1"
LAST_PORT = 65535


class Ports:
    """Who holds which port. Choosing awaits nothing, so two starts never choose the same."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._held: dict[int, str] = {}

    def choose(self, name: str, *, above: int = 0) -> int:
        """Hold for `name` the lowest port that is free, and higher than `above`.

        Raises:
            StartFailed: there is none.
        """
        self.free(name)
        for port in range(max(self._first, above + 1), LAST_PORT + 1):
            if port not in self._held and _is_free(port):
                self._held[port] = name
                return port
        raise StartFailed(f"No port from {self._first} up is free on {HOST}.")

    def take_over(self, name: str, port: int) -> None:
        """Hold a port that a container of an earlier life has."""
        self._held[port] = name

    def free(self, name: str) -> None:
        for port in [port for port, holder in self._held.items() if holder == name]:
            del self._held[port]


def _is_free(port: int) -> bool:
    """Say whether nobody listens there now. The engine finds out for good when it publishes the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
