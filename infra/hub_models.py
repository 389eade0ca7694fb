"""Models of transformers that stages ask: read once, safetensors only, no code of theirs, on the best device there is."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from infra.config import Config
from infra.errors import ConfigError
from infra.local_files import fingerprint, weights_digest

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class HubModel(Config):
    """A model of transformers by its place; a folder's digest is part of the stage key."""

    model: str = Field(min_length=1, description="Folder, or hub id OWNER/NAME.")
    revision: str | None = Field(default=None, description="Commit of the hub; a folder is known by its weights.")
    fingerprint: str | None = Field(default=None, description="Digest of the folder; None: taken when this is read.")

    @model_validator(mode="before")
    @classmethod
    def _take_fingerprint(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("model"), str) or data.get("fingerprint"):
            return data
        return data | {"fingerprint": fingerprint(Path(data["model"]))}


class KnownModel(HubModel):
    """A model whose folder is looked into when the configuration is read, so that a plan refuses what cannot be loaded."""

    types: ClassVar[tuple[str, ...]] = ()  # model_type of config.json that the code can ask

    @model_validator(mode="after")
    def _can_be_read(self) -> KnownModel:
        refuse_unreadable(self.model, self.types)
        return self


@dataclass(frozen=True)
class Loaded:
    """A model with its processor, where it runs, and what it is: kind, place and what pins it."""

    model: Any
    processor: Any
    device: str
    name: str


def refuse_unreadable(model: str, types: tuple[str, ...]) -> None:
    """ValueError for what is neither a hub id nor a folder with safetensors and a config.json of one of the types."""
    folder = Path(model)
    if not folder.is_dir():
        if HUB_ID.fullmatch(model) is None:
            raise ValueError(f"{model!r} is neither a folder that is there nor OWNER/NAME of the Hub; give one of them")
        return
    try:
        found = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{model} has no readable config.json with a model_type ({type(error).__name__}); "
            "give a folder that save_pretrained of transformers wrote"
        ) from error
    refuse_type(model, found, types)
    if not any(folder.glob("*.safetensors")):
        pickled = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))]
        raise ValueError(
            f"{model} holds no *.safetensors{f', only {pickled[0]}, which is a pickle and not read' if pickled else ''}; "
            "convert it where you trust it: model.save_pretrained(FOLDER)"
        )


def refuse_type(model: str, found: str, types: tuple[str, ...]) -> None:
    """ValueError for a model_type that is not one of these."""
    if found not in types:
        raise ValueError(f"{model} is of type {found!r}; one of {', '.join(types)} can be asked here")


@contextmanager
def reading(role: str, place: str, wanted: str) -> Iterator[None]:
    """What transformers cannot read becomes a ConfigError with what the role needs instead."""
    try:
        yield
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:300]
        raise ConfigError(f"{role} {place}: {words}; give {wanted}, or a hub id") from error


def load(
    role: str, config: HubModel, model_class: Any, processor_class: Any, wanted: str, beside: HubModel | None = None,
    **settings: Any,
) -> Loaded:  # fmt: skip
    """Read a model, its processor from `beside` if that is given; ConfigError says what its `role` needs instead (`wanted`)."""
    import torch

    place = beside or config
    with reading(role, config.model, wanted):
        processor = processor_class.from_pretrained(place.model, **pinned(place), **settings)
        model = model_class.from_pretrained(config.model, use_safetensors=True, **pinned(config))
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
