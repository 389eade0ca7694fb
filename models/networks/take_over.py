"""A foreign pipeline as a checkpoint of ours: its files, and a sampling card that samples it as its own pipeline does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from infra.errors import ConfigError
from models.networks.checkpoint import SamplingCard
from models.networks.codec import load_vae
from models.networks.diffusers_folder import FROZEN, Found, find, take

SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def take_over(source: str, target: Path, settings: dict[str, Any]) -> tuple[SamplingCard, dict[str, Any]]:
    """Write the checkpoint of a foreign pipeline; its card and its origin. `settings` are fields of the card."""
    found = find(source)
    take(found.folder, target, ("transformer", *FROZEN), link=found.revision is not None)
    origin = {
        "source": source if found.revision else found.folder.name, "pipeline": found.pipeline, "revision": found.revision,
        "sha256": weights_hash(target / "transformer"),
    }  # fmt: skip
    if settings.get("side") is None:
        settings = settings | {"side": own_side(target)}
    prediction = "x_0" if found.family == "prx-pixel" else "velocity"
    scheduler = kept_scheduler(found)
    fields = settings | {"family": found.family, "prediction": prediction, "scheduler": scheduler, "origin": origin}
    card = SamplingCard(**{"shift": "static", "static_shift": float(scheduler.get("shift", 1.0))} | fields)
    (target / "sampling.json").write_text(card.model_dump_json(indent=2))
    return card, origin


def own_side(checkpoint: Path) -> int:
    """The side its own pipeline draws by default: the transformer's sample size in the VAE's units."""
    told = json.loads((checkpoint / "transformer" / "config.json").read_text()).get("sample_size")
    if told is None:
        raise ConfigError(f"model {checkpoint}: its transformer names no sample_size; set model.side")
    return int(told) * (load_vae(checkpoint / "vae").factor if (checkpoint / "vae").is_dir() else 1)


def kept_scheduler(found: Found) -> dict[str, Any]:
    """The scheduler's configuration; only flow matching by Euler steps is known here."""
    path = found.folder / "scheduler" / "scheduler_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {found.folder}: {path} cannot be read ({error}); copy the whole folder") from error
    if config.get("_class_name") != SCHEDULER:
        raise ConfigError(
            f"model {found.folder}: scheduler {config.get('_class_name')} is not supported, only {SCHEDULER}"
        )
    return config


def weights_hash(folder: Path) -> str:
    """sha256 over a component's weights, file by file in order."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
