"""A preset to start from: for data that are there, with the source found by looking; or a plain one in a new folder."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from data_curation.config import DataConfig
from flows.config import LifecycleConfig, PosttrainConfig
from infra.config import parse
from infra.errors import ConfigError
from models.posttraining.config import PairsConfig
from tasks.config import ReportConfig

PRESET = "lifecycle.yaml"


def new_preset(folder: str, out: Path | None) -> tuple[Path, str]:
    """Write the preset; where it lies, and what was found. It never goes among the data: their fingerprint would change."""
    place = Path(folder).expanduser()
    remote = folder.startswith("s3://")
    if (
        not remote
        and not place.is_file()
        and not (place.is_dir() and {path.name for path in place.iterdir()} - {PRESET})
    ):
        return _write(LifecycleConfig(name="mine"), out or place / PRESET), "a preset of the demo's kind"
    from data_curation.layouts import look

    found = look(folder if remote else str(place.resolve()))
    name = re.sub(r"[^a-z0-9]+", "-", place.name.split(".")[0].lower()).strip("-") or "mine"
    data = parse(DataConfig, {"source": found.settings}, f"what was found in {folder}")
    post = PosttrainConfig(pairs=PairsConfig(source="data"))
    target = out or Path(f"{name}.yaml")
    if place.is_dir() and target.resolve().is_relative_to(place.resolve()):
        raise ConfigError(f"{target} lies among the data; give another place with --out, or go to another folder")
    own = LifecycleConfig(name=name, data=data, judge=None, posttrain=post, report=ReportConfig(data_source="own"))
    return _write(own, target), found.says


def _write(config: LifecycleConfig, target: Path) -> Path:
    if target.exists():
        raise ConfigError(f"{target} is there already; choose another place with --out or edit that file")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    return target
