"""DreamBooth that moves the text encoders too: the text alone, then both, then the adapter alone (pivotal tuning).

Roich et al. 2021 (arXiv:2106.05744) invert first and tune the generator around the pivot; diffusers' advanced DreamBooth moves
both and stops the text after a share of the steps. `alone` and `until` are those two points. Every mover has its own optimizer
and its own pass, so a step of both costs two. Features are computed in the step: of the subject's prompts, and with a LoRA on the
encoders of the class' too, whose target stays what the base predicts from its own features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.engine.config import OptimizerConfig
from models.engine.objective import Batch, Loss
from models.networks.denoiser import Denoiser
from models.personalization.dreambooth import DreamBooth
from models.personalization.text_tuning import TextTuning
from models.pretraining.config import TimestepConfig


class PivotalDreamBooth(DreamBooth):
    """DreamBooth whose rows' prompts, `prompts[extra["prompt"]]`, are encoded by what is being tuned."""

    def __init__(
        self, denoiser: Denoiser, timesteps: TimestepConfig, base: Denoiser | None, text: TextTuning,
        prompts: Sequence[str], steps: int,
    ) -> None:  # fmt: skip
        super().__init__(denoiser, timesteps, base)
        self.text, self.prompts = text, list(prompts)
        self.movers = text.players
        self.alone, self.until = (round(share * steps) for share in (text.config.alone, text.config.until))

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """The denoiser, and what is learnt of the text."""
        return {**super().players, **self.movers}

    @property
    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        """The text has rates of its own."""
        return {"token": self.text.config.token_optimizer, "text_encoder": self.text.config.lora_optimizer}

    def turns(self, step: int) -> Sequence[str]:
        """Who moves in this step."""
        denoiser = super().turns(step)
        movers = tuple(self.movers) if step < self.until else ()
        return movers if step < self.alone else (*movers, *denoiser)

    def loss(self, player: str, batch: Batch) -> Loss:
        """That of DreamBooth, on features as they are now."""
        if "prompt" not in batch.extra:
            raise ValueError(
                "this batch has cached text features and no extra['prompt'], so a text encoder cannot be tuned on it; "
                "make it by mixed_batches, or set text to null"
            )
        everyone = "text_encoder" in self.movers
        live = torch.ones_like(batch.extra["prior"]) if everyone else ~batch.extra["prior"]
        asked = [self.prompts[number] for number in batch.extra["prompt"][live].tolist()]
        tokens = batch.tokens.clone()
        if asked:
            with torch.set_grad_enabled(player != "denoiser" and torch.is_grad_enabled()):
                tokens[live] = self.text(asked)[0][:, : tokens.shape[1]].to(tokens)
        return super().loss(player, replace(batch, tokens=tokens))

    def after_step(self, step: int) -> None:
        """Keep the spread of learnt rows near the table's."""
        super().after_step(step)
        if step < self.until:
            self.text.pull()
