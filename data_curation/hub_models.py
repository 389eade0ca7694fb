"""Models of transformers that curation asks: read once, safetensors only, no code of theirs, on the best device there is."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_curation.filter_config import HubModel
from infra.errors import ConfigError
from infra.local_files import weights_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, where it runs, and what it is: kind, place and what pins it."""

    model: Any
    processor: Any
    device: str
    name: str


def load(role: str, config: HubModel, model_class: Any, processor_class: Any, wanted: str, **settings: Any) -> Loaded:
    """Read a model; ConfigError says what its `role` needs instead (`wanted`)."""
    import torch

    try:
        processor = processor_class.from_pretrained(config.model, **pinned(config), **settings)
        model = model_class.from_pretrained(config.model, use_safetensors=True, **pinned(config))
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        raise ConfigError(f"{role} {config.model}: {words}; give {wanted}, or a hub id") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log.info("%s %s runs on %s", role, config.model, device)
    name = f"{model.config.model_type} {config.model}, {revision_of(config, model)}"
    return Loaded(model.eval().to(device), processor, device, name)


def pinned(config: HubModel) -> dict[str, str]:
    """The commit of a hub model, where one is named."""
    return {"revision": config.revision} if config.revision else {}


def revision_of(config: HubModel, model: Any) -> str:
    """What pins a model: the hub's commit, or for a folder the sha256 of its weights."""
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        return f"revision {getattr(model.config, '_commit_hash', None) or config.revision or 'unknown'}"
    return f"weights {weights_digest(folder)[:12]}"
