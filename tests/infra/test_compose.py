"""docker-compose.yml keeps its promises: loopback ports, pinned tags, health checks, no literal secrets."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_service_is_pinned_checked_and_private(name: str) -> None:
    service = SERVICES[name]
    assert ":" in service["image"]
    assert not service["image"].endswith(":latest")
    assert service["healthcheck"]["test"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    for needed, condition in service.get("depends_on", {}).items():
        assert needed in SERVICES
        assert condition == {"condition": "service_healthy"}
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])


def test_ray_asks_for_a_token_and_its_ports_stay_inside() -> None:
    for name in ("ray-head", "ray-worker", "flows"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert not any(port.rsplit(":", 1)[-1] in ("6379", "10001") for port in published)


def test_no_secret_is_written_down() -> None:
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            secretive = any(word in key for word in ("PASSWORD", "TOKEN", "SECRET", "CREDENTIALS"))
            assert not secretive or str(value).startswith("/run/secrets/")


def test_every_command_is_known_to_the_start_script() -> None:
    script = (ROOT / "infra/deploy/start").read_text()
    for service in SERVICES.values():
        command = service.get("command", [])
        if command and command[0] == "infra/deploy/start":
            assert f"  {command[1]})" in script
