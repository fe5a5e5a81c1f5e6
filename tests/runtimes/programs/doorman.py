"""Listens on the port given, with SO_REUSEPORT, and greets whoever comes."""
# ruff: noqa: T201

import socket
import sys

with socket.socket() as door:
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    door.bind(("127.0.0.1", int(sys.argv[1])))
    door.listen()
    print("up", flush=True)
    while True:
        guest, _ = door.accept()
        with guest:
            guest.sendall(b"hello")
