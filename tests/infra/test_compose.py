"""docker-compose.yml and the cluster files fit their schemas and keep their promises: loopback, pinned, no literal secrets."""

import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
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


def test_prometheus_asks_services_that_are_there() -> None:
    path = ROOT / "infra/deploy/prometheus.yml"
    scraped = [place for each in yaml.safe_load(path.read_text())["scrape_configs"] for place in each["dns_sd_configs"]]
    assert {name for place in scraped for name in place["names"]} == {"ray-head", "ray-worker", "serve"}
    assert {place["port"] for place in scraped} == {8080, 8000}  # what infra/deploy/start gives them
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "config", "--syntax-only", str(path)], check=True, capture_output=True)


def test_it_fits_the_compose_specification() -> None:
    schema = json.loads(Path(__file__).with_name("compose-spec.json").read_text())
    jsonschema.validate(COMPOSE, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(COMPOSE | {"services": {"s3": {"imago": "x"}}}, schema)


@pytest.mark.parametrize("service", ["prefect-server", "ray-head", "ray-worker", "flows", "serve"])
@pytest.mark.parametrize("content", [None, ""])
def test_no_service_starts_without_its_secrets(service: str, content: str | None, tmp_path: Path) -> None:
    if content is not None:
        for name in COMPOSE["secrets"]:
            (tmp_path / name).write_text(content)
    done = subprocess.run(
        [str(ROOT / "infra/deploy/start"), service], env={"SECRETS": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is missing or empty" in done.stderr


def test_ray_up_s_file_fits_ray_s_schema_and_asks_for_a_token() -> None:
    cluster = yaml.safe_load((ROOT / "infra/deploy/ray-cluster.yaml").read_text())
    jsonschema.validate(cluster, json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text()))
    assert cluster["head_node_type"] in cluster["available_node_types"]
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][1]


def test_kuberay_pods_ask_for_the_token_and_run_without_rights() -> None:
    cluster, job = yaml.safe_load_all((ROOT / "infra/deploy/kuberay.yaml").read_text())
    assert (cluster["kind"], job["kind"]) == ("RayCluster", "RayJob")
    spec = cluster["spec"]
    pods = [spec["headGroupSpec"]["template"]["spec"], *(g["template"]["spec"] for g in spec["workerGroupSpecs"])]
    for pod in pods:
        (container,) = pod["containers"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert not pod["automountServiceAccountToken"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert not container["image"].endswith("latest")
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert job["spec"]["entrypoint"].startswith("t2i run ")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert spec["rayVersion"] in (ROOT / "requirements.lock").read_text()


def test_prefect_yaml_names_flows_that_are_there() -> None:
    import importlib

    found = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {each["name"] for each in found} >= {"lifecycle", "nightly", "stage"}
    for each in found:
        module, _, name = each["entrypoint"].rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
        assert each["tags"] == ["t2i"]
