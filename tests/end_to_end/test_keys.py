"""A real gateway with keys: who is answered, and that no key is ever seen."""

from __future__ import annotations

from pathlib import Path

from gateway.keys import add_key
from tests.end_to_end.gateway import serving

IDLE = {"engine": "openai", "runtime": "external", "url": "http://127.0.0.1:9"}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_every_address_asks_for_a_key_and_none_is_ever_seen(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice = add_key(file, "alice", ["generate"])
    hasty = add_key(file, "hasty", ["generate"], requests_per_minute=1)
    operator = add_key(file, "operator", ["manage"])
    with serving(tmp_path, {"GATEWAY_API_KEYS_FILE": str(file)}, m=IDLE) as gateway:
        assert gateway.get("/health").status_code == gateway.get("/docs/").status_code == 200
        refused = [gateway.get("/models"), gateway.get("/models", **bearer("gw_wrong-key"))]
        assert [(each.status_code, each.headers["www-authenticate"]) for each in refused] == [(401, "Bearer")] * 2
        assert gateway.get("/models", **bearer(alice)).status_code == 200
        lacking = [gateway.post("/models/m/stop/", **bearer(alice)), gateway.get("/models", **bearer(operator))]
        assert [each.json()["error_code"] for each in lacking] == ["FORBIDDEN"] * 2
        assert gateway.post("/models/m/stop", **bearer(operator)).json()["error_code"] == "MODEL_NOT_RUNNING"
        assert gateway.get("/models", **bearer(hasty)).status_code == 200
        limited = gateway.get("/models", **bearer(hasty))
        assert (limited.status_code, limited.json()["error_code"]) == (429, "RATE_LIMITED")
        assert 1 <= int(limited.headers["retry-after"]) <= 60
        process = Path(f"/proc/{gateway.process.pid}")
        seen = (process / "cmdline").read_text() + (process / "environ").read_text()
        seen += "".join(each.text for each in [*refused, *lacking, limited])
    seen += "".join(gateway.log)

    assert " key alice\n" in seen
    assert not [token for token in (alice, hasty, operator, "gw_wrong-key") if token in seen]
