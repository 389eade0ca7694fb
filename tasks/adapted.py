"""Training of adapters within a stage: put on, merged for sampling, written as files that load on the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from infra.errors import ConfigError
from infra.stages import StageContext
from models.engine.distribute import world
from models.engine.loop import Trainer
from models.networks import families
from models.networks.checkpoint import SamplingCard, read_card
from models.networks.config import LoraConfig
from models.networks.denoiser import Denoiser
from models.personalization import lora_files
from models.personalization.lora import add_lora, merge, save_forms, stacked
from models.personalization.lora_import import read as read_adapter


def architecture_of(card: SamplingCard) -> str:
    """What kohya's form calls the network."""
    return "sd3" if card.family == "sd3" else "prx"


def adapt(denoiser: Denoiser, lora: LoraConfig | None, seed: int, init: Path | None) -> None:
    """Put fresh adapters on a denoiser, if they are asked for."""
    if lora is None:
        return
    if init is None:
        raise ConfigError("lora adapts a trained model; give a model or a stage to start from, or set lora to null")
    if denoiser.depth == 0:
        raise ConfigError("lora files name the layers of a transformer; a UNet is trained whole, set lora to null")
    if lora.init == "pissa" or (lora.kind == "dora" and (init / "adapter").is_dir()):
        raise ConfigError(
            f"lora kind={lora.kind} init={lora.init} cannot be stacked on the adapter before; use plain LoRA"
        )
    add_lora(denoiser, lora, seed)


def merged(adapted: Denoiser, lora: LoraConfig, init: Path) -> Denoiser:
    """The adapter in the weights of `init`, its own ones where they were kept in 8 bits for the time of training."""
    if lora.base == "fp32":
        return merge(adapted)
    return merge(
        adapted, families.load(init / "transformer", read_card(init), adapted.text_mean.cpu(), adapted.text_std.cpu())
    )


class Finished:
    """The trained denoiser of a trainer as it is sampled, adapters merged; keeps the last one for its adapter files."""

    def __init__(self, trained: Callable[[Trainer], Denoiser], lora: LoraConfig | None, init: Path | None) -> None:
        self.trained, self.lora, self.init = trained, lora, init
        self.last: Denoiser | None = None

    def __call__(self, trainer: Trainer) -> Denoiser:
        """The denoiser to sample and save."""
        self.last = self.trained(trainer)
        if self.lora is None or self.init is None:
            return self.last
        return merged(self.last, self.lora, self.init)

    def write_adapter(self, ctx: StageContext) -> None:
        """adapter/ in three forms: what all stages since the base added, so that it loads on the base itself."""
        if self.lora is None or self.last is None or self.init is None or world()[0] != 0:
            return
        about = {"base": ctx.parents["init"].digest}
        adapter = lora_files.from_module(self.last.transformer, about)
        if (self.init / "adapter").is_dir():
            card = read_card(self.init)
            before = read_adapter(self.init / "adapter", families.load(self.init / "transformer", card).transformer)
            adapter = stacked(before, adapter)
        save_forms(adapter, ctx.out / "adapter", ctx.name, architecture_of(read_card(self.init)))
