"""What a server offers: the checkpoints and adapters of a run, loaded when first asked for, mixes of LoRAs kept ready."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.artifacts import Artifact
from infra.errors import ConfigError
from infra.pointers import champion_of, moves
from infra.storage import Store
from models.networks import families
from models.networks.checkpoint import SamplingCard, read_card
from models.personalization import lora_files, lora_import, mixing
from models.personalization.lora import with_changes
from models.personalization.mixing import Part
from models.personalization.text_tuning import tunes_text
from models.posttraining.enhancer_files import load_enhancer
from models.posttraining.prompt_enhancement import Enhanced, Enhancer
from models.sampling.generate import Generator, load_generator

Loras = tuple[tuple[str, float], ...]  # (name, weight), sorted by name
CHAMPION = "champion"


@dataclass(frozen=True)
class Served:
    """One checkpoint: its artifact, its verified folder, how it is sampled, and the digest its adapter goes on."""

    name: str
    artifact: Artifact
    folder: Path
    card: SamplingCard
    base: str | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """Step counts it takes; empty: any."""
        return () if not self.card.distilled else self.card.trained_steps or (self.card.steps,)


@dataclass(frozen=True)
class Models:
    """The models of a run at one moment; a swap replaces the whole."""

    run: str
    served: Mapping[str, Served]
    loras: Mapping[str, Served]  # checkpoints that carry an adapter
    default: str
    aliases: Mapping[str, str] = field(default_factory=dict)
    enhancer: Path | None = None  # folder of the run's prompt enhancer
    champion: str | None = None  # digest
    mixes: int = 8
    _enhancers: dict[tuple[str, ...], Enhancer] = field(default_factory=dict)  # by trigger words
    _ready: OrderedDict[tuple[str, Loras], Generator] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, name: str | None) -> Served:
        """The checkpoint of a name or alias."""
        asked = self.default if name is None else self.aliases.get(name, name)
        if asked not in self.served:
            known = ", ".join([*self.aliases, *self.served])
            raise ConfigError(f"model {name!r} is not served; choose one of {known}")
        return self.served[asked]

    def fitting(self, model: Served) -> dict[str, bool]:
        """Adapters that go with a model -> whether they were trained on it (False: on its teacher)."""
        bases = {name: lora.base for name, lora in self.loras.items() if lora.base is not None}
        return {name: base == model.artifact.digest for name, base in bases.items()
                if base in (model.artifact.digest, model.card.teacher)}  # fmt: skip

    def enhanced(self, prompt: str, model: Served, loras: Loras) -> Enhanced:
        """The prompt as the run's enhancer rewrites it for this model; words that call a LoRA or a subject stay."""
        if self.enhancer is None:
            return Enhanced(prompt, prompt, "the run has no prompt enhancer")
        cards = (model.card, *(self.loras[name].card for name, _ in loras))
        triggers = tuple(sorted({card.trigger for card in cards if card.trigger}))
        with self._lock:
            if triggers not in self._enhancers:
                self._enhancers[triggers] = load_enhancer(self.enhancer, triggers)
            return self._enhancers[triggers].enhance(prompt)

    def generator(self, model: Served, loras: Loras) -> Generator:
        """The model ready to draw, with the LoRAs' changes added to its weights."""
        with self._lock:
            key = (model.name, loras)
            if key not in self._ready:
                self._ready[key] = _load(model, {name: (self.loras[name], weight) for name, weight in loras})
            self._ready.move_to_end(key)
            mixed = [each for each in self._ready if each[1]]
            for old in mixed[: max(0, len(mixed) - self.mixes)]:
                del self._ready[old]
            return self._ready[key]


def _load(model: Served, loras: Mapping[str, tuple[Served, float]]) -> Generator:
    if not loras:
        return load_generator(model.folder)
    base = families.load(model.folder / "transformer", model.card)
    parts = {
        name: Part(lora_import.read(lora.folder / "adapter", base.transformer, lora.base), weight)
        for name, (lora, weight) in loras.items()
    }
    mixed = mixing.mix(parts, lora_files.stock_weights(base.transformer))
    around = families.surroundings(model.folder, model.card)
    return Generator(with_changes(base, mixed.changes), model.card, around=around)


def champion(store: Store, lifecycle: str) -> Artifact | None:
    """What the champion pointer of a lifecycle is at; None before the first night."""
    past = moves(store, champion_of(lifecycle))
    return past[-1].artifact if past else None


def models_of(store: Store, run: str, mixes: int = 8, best: Artifact | None = None) -> Models:
    """Everything that can be served from a run, every byte checked; the one-step student comes first where there is one.

    `best` is served as `champion` beside the run's own, whichever run made it.
    """
    record = store.read_run(run)
    entries = {entry["name"]: entry for entry in record["stages"] if entry.get("digest")}
    found = {name: store.find(name, entry["key"]) for name, entry in entries.items()}
    served: dict[str, Served] = {}
    for name, artifact in found.items():
        if artifact is not None and artifact.kind == "checkpoint":
            served[name] = _served(store, name, artifact)
    if not served:
        raise ConfigError(f"run {record['run']} has no checkpoint to serve yet; finish it: t2i run PRESET")
    adapted = [name for name, each in served.items() if (each.folder / "adapter").is_dir() and not each.card.distilled]
    loras = {name: served[name] for name in adapted if not tunes_text(served[name].folder / "adapter")}
    enhancers = [artifact for artifact in found.values() if artifact is not None and artifact.kind == "enhancer"]
    enhancer = store.local(enhancers[-1]) if enhancers else None
    aliases = _aliases(served)
    if best is not None:
        own = next((name for name, each in served.items() if each.artifact.digest == best.digest), None)
        if own is None:
            served[CHAMPION] = _served(store, CHAMPION, best)
        else:
            aliases[CHAMPION] = own
    default = next(
        (aliases[name] for name in ("student-1", "student-4", "teacher") if name in aliases), next(iter(served))
    )
    return Models(
        str(record["run"]), served, loras, default, aliases, enhancer, None if best is None else best.digest, mixes
    )


def _served(store: Store, name: str, artifact: Artifact) -> Served:
    folder = store.local(artifact)
    return Served(name, artifact, folder, read_card(folder), _base(artifact, folder / "adapter"))


def _base(artifact: Artifact, adapter: Path) -> str | None:
    """As the adapter says: one that goes on from another is for that one's base; else what it was trained from."""
    if not adapter.is_dir():
        return None
    return lora_import.base_of(adapter) or artifact.facts.get("inputs", {}).get("init")


def _aliases(served: Mapping[str, Served]) -> dict[str, str]:
    """student-N: the last student that takes N steps; teacher: what the students were distilled from."""
    aliases: dict[str, str] = {}
    digests = {each.artifact.digest: name for name, each in served.items()}
    for name, each in served.items():
        for steps in each.steps:
            aliases[f"student-{steps}"] = name
        if each.card.teacher in digests:
            aliases["teacher"] = digests[each.card.teacher]
    return {name: stage for name, stage in sorted(aliases.items()) if name not in served}


def describe(models: Models, model: Served) -> dict[str, Any]:
    """A model as the list shows it: OpenAI's fields, then ours."""
    card = model.card
    return {
        "id": model.name, "object": "model", "created": 0, "owned_by": models.run,
        "aliases": sorted(alias for alias, name in models.aliases.items() if name == model.name),
        "steps": list(model.steps) or None, "default_steps": card.steps, "guidance": card.guidance,
        "side": card.side, "distilled": card.distilled, "method": card.method, "trigger": card.trigger,
        "loras": models.fitting(model), "digest": model.artifact.digest,
    }  # fmt: skip
