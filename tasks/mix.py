"""Stage function that mixes adapters of several personalize stages into one checkpoint of their common base."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from typing import Any

from infra.errors import ConfigError
from infra.stages import StageContext
from models.networks import families
from models.networks.checkpoint import read_card, write_checkpoint
from models.personalization import lora_files, lora_import, mixing
from models.personalization.config import MixConfig
from models.personalization.interference import interference
from models.personalization.lora import save_forms, with_changes
from models.personalization.mixing import Part


def mix(config: MixConfig, ctx: StageContext) -> dict[str, Any]:
    """Write the merged checkpoint, mix.json, and for sum and svd the mix as one adapter in three forms."""
    init = ctx.inputs["init"]
    card, digest = read_card(init), ctx.parents["init"].digest
    base = families.load(init / "transformer", card)
    parts = {
        name: Part(lora_import.read(ctx.inputs[name] / "adapter", base.transformer, digest), weight,
                   config.blocks.get(name, {}))
        for name, weight in config.adapters.items()
    }  # fmt: skip
    triggers = {name: part.adapter.about.get("trigger", "") for name, part in parts.items()}
    for one, two in itertools.combinations(sorted(triggers), 2):
        if triggers[one] and triggers[one] == triggers[two]:
            raise ConfigError(
                f"mix {config.name}: {one} and {two} have the same token {triggers[one]!r}; give each its own"
            )
    weights = lora_files.stock_weights(base.transformer)
    mixed = mixing.mix(parts, weights, config.method, config.rank, config.density, config.seed)
    words = " and ".join(trigger for _, trigger in sorted(triggers.items()) if trigger)
    write_checkpoint(ctx.out, with_changes(base, mixed.changes), card.model_copy(update={"trigger": words}), init)
    about = {"base": digest, "trigger": words}
    match config.method:
        case "sum" if not any(part.adapter.magnitudes for part in parts.values()):
            save_forms(mixing.concatenated(parts, about), ctx.out / "adapter", config.name)
        case "svd":
            save_forms(mixing.reduced(mixed.changes, config.rank or 1, about), ctx.out / "adapter", config.name)
        case _:
            pass  # no low rank
    pairs = {
        f"{one} + {two}": asdict(interference(parts[one].adapter, parts[two].adapter))
        for one, two in itertools.combinations(sorted(parts), 2)
    }
    record = {"method": config.method, "weights": config.adapters, "error": mixed.error, "triggers": triggers,
              "error_by_layer": mixed.error_by_layer, "interference": pairs}  # fmt: skip
    (ctx.out / "mix.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return {"method": config.method, "error": mixed.error, "triggers": triggers, "interference": pairs}
