"""Stage function that trains an AutoencoderKL on the curated pictures. SPMD."""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.stages import StageContext
from models.engine.distribute import world
from models.engine.loop import train
from models.engine.objective import Batch, write_metrics
from models.engine.weights import with_weights
from models.networks.checkpoint import SamplingCard
from models.networks.codec import Vae
from models.networks.prx import forget_paths
from models.pretraining.autoencoder import Autoencoder, build, measure
from models.pretraining.autoencoder_config import AutoencoderConfig
from models.pretraining.config import SelectConfig
from tasks.training import save_grid
from tasks.training_data import TrainingData

MEASURED_STEPS = 16  # batches behind scale, shift and PSNR
SHOWN = 8


def autoencoder(config: AutoencoderConfig, ctx: StageContext) -> dict[str, Any]:
    """vae/ with measured scale and shift, a card that makes the folder the surroundings of a latent PRX, and a picture."""
    data = TrainingData(ctx.inputs["data"])
    select = SelectConfig(resolutions=config.resolutions, empty_captions=0.0)
    batches = data.batches(select, config.train.batch_size, config.train.seed, teacher=False)
    objective = Autoencoder(build(config, config.train.seed), config)
    trainer = train(objective, batches, config.train, ctx.scratch, ctx.progress)
    vae = with_weights(objective.vae, trainer.emas["vae"].average).eval()
    measured = measure(vae, batches, MEASURED_STEPS, config.train.seed)
    if world()[0] == 0:
        vae.save_pretrained(ctx.out / "vae")
        forget_paths(ctx.out / "vae")
        card = SamplingCard(family="prx-latent", prediction="velocity", prompt_max_tokens=config.prompt_max_tokens)
        (ctx.out / "sampling.json").write_text(card.model_dump_json(indent=2))
        write_metrics(trainer.rows, ctx.out / "metrics.jsonl")
        show(Vae(vae), batches(0), ctx)
    return {"steps": trainer.step, "last": trainer.rows[-1], "factor": config.factor, **measured}


def show(vae: Vae, batch: Batch, ctx: StageContext) -> None:
    """reconstructions.png: pictures above, what comes back below."""
    from models.sampling.generate import to_uint8

    pictures = batch.images[:SHOWN]
    rows = [to_uint8(pictures), to_uint8(vae.pictures(vae.x_0(pictures)))]
    save_grid(np.concatenate(rows), ctx.out / "reconstructions.png", columns=len(pictures))
