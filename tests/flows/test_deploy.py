"""Deployments: the values of every preset fit the form that Prefect makes of the flows' parameters."""

from pathlib import Path
from typing import Any

import pytest

from flows.config import LifecycleConfig
from flows.deploy import deployments
from infra.config import load_yaml, parse

pytestmark = pytest.mark.prefect
PRESETS = sorted((Path(__file__).resolve().parents[2] / "presets").glob("*.yaml"))
NETWORKS: list[dict[str, Any]] = [{}, {"kind": "prx-latent"}, {"kind": "sd3"}, {"kind": "unet"}]


def problems(config: LifecycleConfig) -> list[str]:
    """What the server would object to in a deployment's defaults."""
    from prefect.utilities.schema_tools import validate

    lifecycle, nightly, _ = deployments(config, None)
    found: list[str] = []
    for each in (lifecycle, nightly):
        schema = each._parameter_openapi_schema.model_dump_for_openapi()
        found += [
            error.message for error in validate(each.parameters, schema, raise_on_error=False, ignore_required=True)
        ]
    return found


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_fits_its_form(preset: Path) -> None:
    settings = ["model=somewhere"] if preset.stem == "posttrain-hub" else []
    assert problems(parse(LifecycleConfig, load_yaml(preset, settings), str(preset))) == []


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.get("kind", "prx-pixel"))
def test_every_family_is_one_alternative_of_the_form(network: dict[str, Any]) -> None:
    config = LifecycleConfig.model_validate({"pretrain": [{"network": network, "repa": None}]})
    assert problems(config) == []
