"""Stage function that trains with flow matching: pre-training, continued training, SFT. SPMD: every worker runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter

from infra.stages import StageContext
from models.engine.config import TrainConfig
from models.engine.distribute import world
from models.engine.loop import Trainer, Watch, train, write_metrics
from models.engine.objective import Batch, Objective
from models.engine.weights import with_weights
from models.networks import prx
from models.networks.checkpoint import SamplingCard, read_card, write_checkpoint
from models.networks.denoiser import Denoiser
from models.pretraining.config import FlowMatchingConfig, ShiftConfig
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.repa import Projector, Repa
from models.sampling.generate import Generator
from tasks.training_data import TrainingData

GRID_PROMPTS = 12


def averaged(trainer: Trainer, player: str, denoiser: Denoiser, prefix: str = "") -> Denoiser:
    """A copy of `denoiser` with the player's averaged weights; `prefix` is its name inside the player."""
    average = trainer.emas[player].average
    own = {name.removeprefix(prefix): value for name, value in average.items() if name.startswith(prefix)}
    return with_weights(denoiser, own)


def run_training(
    objective: Objective,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    ctx: StageContext,
    model_of: Callable[[Trainer], Denoiser],
    card: SamplingCard,
    prompts: list[str],
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train, drawing the fixed prompts on the way, and write the checkpoint folder (rank 0); returns facts."""
    grids = ctx.scratch / "grids"

    def draw(step: int, trainer: Trainer) -> None:
        if world()[0] == 0 and prompts:
            grids.mkdir(parents=True, exist_ok=True)
            pictures = Generator(model_of(trainer), card).sample(prompts, list(range(len(prompts))))
            save_grid(pictures, grids / f"step-{step:06d}.png", columns=6)

    events = SummaryWriter(str(ctx.scratch / "tensorboard")) if world()[0] == 0 else None

    def progress(done: int, total: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            if events is not None and name != "seconds":
                events.add_scalar(f"{ctx.name}/{name}", value, done)
        ctx.progress(done, total, numbers)

    trainer = train(objective, batches, config, ctx.scratch, progress, draw, watch)
    if events is not None:
        events.close()
    if world()[0] == 0:
        write_checkpoint(ctx.out, model_of(trainer), card)
        write_metrics(trainer.rows, ctx.out / "metrics.jsonl")
        if grids.exists():
            shutil.copytree(grids, ctx.out / "grids", dirs_exist_ok=True)
    return {"steps": trainer.step, "samples": trainer.step * config.batch_size, "last": trainer.rows[-1]}


def flow_matching(config: FlowMatchingConfig, ctx: StageContext) -> dict[str, Any]:
    """Train a denoiser from scratch or from `init` on the rows the config selects."""
    data = TrainingData(ctx.inputs["data"])
    train_config = config.train
    if "init" in ctx.inputs:
        denoiser = prx.load(ctx.inputs["init"] / "transformer", data.text_mean, data.text_std)
        refuse_distilled(ctx.inputs["init"], config.name)
    else:
        denoiser = prx.build(config.network, data.text_mean, data.text_std, train_config.seed)
    repa = None
    if config.repa is not None:
        width, teacher_dim = denoiser.width, data.teacher_dim(config.select)
        projector = Projector(width, config.repa.hidden, teacher_dim, train_config.seed)
        repa = Repa(config.repa, projector, train_config.steps)
    objective = FlowMatching(denoiser, config.timesteps, repa)
    batches = data.batches(config.select, train_config.batch_size, train_config.seed, repa is not None)
    card = SamplingCard(
        steps=config.sampling.steps, guidance=config.sampling.guidance, side=config.sampling.side,
        prompt_max_tokens=config.network.prompt_max_tokens,
        **{name: getattr(config.timesteps, name) for name in ShiftConfig.model_fields},
    )  # fmt: skip

    def model_of(trainer: Trainer) -> Denoiser:
        return averaged(trainer, "denoiser", denoiser, "denoiser.")

    return run_training(objective, batches, train_config, ctx, model_of, card, fixed_prompts(data))


def fixed_prompts(data: TrainingData) -> list[str]:
    """Captions spread evenly over the training set's, for the grids."""
    captions = data.set.captions[1:]
    return [captions[i] for i in np.linspace(0, len(captions) - 1, min(GRID_PROMPTS, len(captions))).astype(int)]


def refuse_distilled(folder: Path, stage: str) -> None:
    """Training a distilled student further with a diffusion loss undoes the distillation."""
    if read_card(folder).distilled:
        raise ValueError(f"{stage}: {folder} is a distilled student; train its teacher and distil again")


def save_grid(pictures: np.ndarray, path: Path, columns: int, scale: int = 3) -> None:
    """uint8 [N, H, W, 3] as one PNG, row by row, enlarged without smoothing."""
    n, h, w, _ = pictures.shape
    rows = -(-n // columns)
    padded = np.zeros((rows * columns, h, w, 3), np.uint8)
    padded[:n] = pictures
    sheet = padded.reshape(rows, columns, h, w, 3).transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, 3)
    Image.fromarray(sheet).resize((columns * w * scale, rows * h * scale), Image.Resampling.NEAREST).save(path)
