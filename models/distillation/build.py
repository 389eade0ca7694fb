"""The objective of a configuration, with its players, and what becomes of the trained student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, assert_never

import torch

from models.device import compute_device
from models.distillation.add import AdversarialDistillation
from models.distillation.conditioning import ConditionedDenoiser, ScalarEmbedding, folded
from models.distillation.config import (
    AddConfig,
    ConsistencyConfig,
    DistillConfig,
    DmdConfig,
    InstaFlowConfig,
    MeanFlowConfig,
    ProgressiveConfig,
    ScmConfig,
)
from models.distillation.consistency import ConsistencyDistillation, Null
from models.distillation.dmd import DistributionMatching
from models.distillation.grid import Schedule, sub_grids
from models.distillation.instaflow import InstaFlow
from models.distillation.meanflow import MeanFlow
from models.distillation.perceptual import distance_of
from models.distillation.progressive import ProgressiveDistillation
from models.distillation.scm import ContinuousConsistency
from models.engine.config import OptimizerConfig
from models.engine.loop import Trainer
from models.engine.objective import Objective
from models.engine.weights import with_weights
from models.networks.denoiser import Denoiser
from models.networks.discriminator import Critic, CriticHead
from models.networks.image_encoder import CHANNELS, ImageEncoder
from models.personalization.lora import add_lora, merge

ADVERSARIAL_BETAS = (0.0, 0.999)
FEW = (1, 2, 4)


def no_others(trainer: Trainer) -> dict[int, Denoiser]:
    """One set of weights serves every step count."""
    return {}


@dataclass(frozen=True)
class Plan:
    """An objective, and its student: averaged weights for the configured step count, others for other step counts."""

    objective: Objective
    model_of: Callable[[Trainer], Denoiser]
    sampler: Literal["euler", "renoise"]
    trained_steps: tuple[int, ...]
    others_of: Callable[[Trainer], dict[int, Denoiser]] = no_others


@dataclass(frozen=True)
class Networks:
    """Separate copies of the teacher (the student may be an earlier student), the empty prompt, the time grid's rule."""

    student: Denoiser
    teacher: Denoiser
    fake: Denoiser
    null: Null
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.teacher.depth

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.teacher.width

    @property
    def text_dim(self) -> int:
        """Channels of a text token."""
        return self.teacher.text_mean.numel()


def build(config: DistillConfig, nets: Networks) -> Plan:
    """One arm per method."""
    refuse_other_network(nets, config.name)
    match config.method:
        case ProgressiveConfig():
            return _progressive(config, config.method, nets)
        case InstaFlowConfig():
            return _instaflow(config, config.method, nets)
        case ConsistencyConfig():
            return _consistency(config, config.method, nets)
        case ScmConfig():
            objective = ContinuousConsistency(
                nets.student, nets.teacher, nets.null, config.method, config.guidance, config.train.steps
            )
            return Plan(objective, _plain(nets), "renoise", FEW)
        case DmdConfig():
            return _dmd(config, config.method, nets)
        case AddConfig():
            return _add(config, config.method, nets)
        case MeanFlowConfig():
            return _meanflow(config, config.method, nets)
        case _:
            assert_never(config.method)


def _progressive(config: DistillConfig, method: ProgressiveConfig, nets: Networks) -> Plan:
    n = config.student_steps
    objective = ProgressiveDistillation(
        nets.student, nets.teacher, nets.null, method, n, config.guidance, config.train.steps, nets.schedule
    )

    def others(trainer: Trainer) -> dict[int, Denoiser]:
        return {k: with_weights(nets.student, w) for k, w in objective.finished.items() if k != n}

    return Plan(objective, _plain(nets), "euler", tuple(objective.targets), others)


def _instaflow(config: DistillConfig, method: InstaFlowConfig, nets: Networks) -> Plan:
    distance = distance_of(method.perceptual) if method.perceptual_share > 0 else None
    n = config.student_steps
    objective = InstaFlow(nets.student, method, n, config.train.steps, distance, nets.schedule)
    flow = method.reflow_share == 1  # a 2-rectified flow stays a flow: any number of Euler steps
    return Plan(objective, _plain(nets), "euler", tuple(sorted({*FEW, 8, n})) if flow else (n,))


def _consistency(config: DistillConfig, method: ConsistencyConfig, nets: Networks) -> Plan:
    teacher = nets.teacher if method.use_teacher else None
    if method.lora is not None:
        if method.lora.base == "int8":
            raise ValueError(f"{config.name}: a student is merged from its own weights; set method.lora.base to fp32")
        add_lora(nets.student, method.lora, config.train.seed)
    if method.guidance_range is not None:
        told = ConditionedDenoiser(nets.student, ScalarEmbedding(nets.width))
        objective = ConsistencyDistillation(told, teacher, nets.null, method, config.guidance, nets.schedule)
        return Plan(objective, lambda trainer: at_scalar(trainer, told, config.guidance), "renoise", FEW)
    objective = ConsistencyDistillation(nets.student, teacher, nets.null, method, config.guidance, nets.schedule)
    plain = _plain(nets)
    return Plan(objective, plain if method.lora is None else lambda trainer: merge(plain(trainer)), "renoise", FEW)


def _dmd(config: DistillConfig, method: DmdConfig, nets: Networks) -> Plan:
    head, regression, optimizer = None, None, config.train.optimizer
    if method.gan_weight > 0:
        check_layer(method.gan_layer, nets.depth, "gan_layer")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            head = CriticHead(nets.width, nets.text_dim)
    if method.regression_weight > 0:
        regression = distance_of(method.regression_loss)
    rates = {"fake": scaled(optimizer, method.fake_rate, optimizer.betas)}
    objective = DistributionMatching(
        nets.student, nets.teacher, nets.fake, nets.null, method, config.student_steps, config.guidance, nets.schedule,
        head, regression, rates,
    )  # fmt: skip
    return Plan(objective, _plain(nets), "renoise", sub_grids(config.student_steps))


def _add(config: DistillConfig, method: AddConfig, nets: Networks) -> Plan:
    check_layer(method.layer, nets.depth, "layer")
    pixels = method.features == "image_encoder"
    critic = Critic(CHANNELS if pixels else (nets.width,), nets.text_dim, config.train.seed)
    rates = {"critic": scaled(config.train.optimizer, method.critic_rate, ADVERSARIAL_BETAS)}
    objective = AdversarialDistillation(
        nets.student, nets.teacher, critic, ImageEncoder().to(compute_device()) if pixels else None, nets.null, method, config.student_steps,
        config.guidance, nets.schedule, rates,
    )  # fmt: skip
    return Plan(objective, _plain(nets), "renoise", sub_grids(config.student_steps))


def _meanflow(config: DistillConfig, method: MeanFlowConfig, nets: Networks) -> Plan:
    told = ConditionedDenoiser(nets.student, ScalarEmbedding(nets.width))
    objective = MeanFlow(told, nets.teacher, nets.null, method, config.guidance)
    n = config.student_steps
    counts = tuple(sorted({*FEW, n}))

    def others(trainer: Trainer) -> dict[int, Denoiser]:
        return {k: at_scalar(trainer, told, 1 / k) for k in counts if k != n}

    return Plan(objective, lambda trainer: at_scalar(trainer, told, 1 / n), "euler", counts, others)


def _plain(nets: Networks) -> Callable[[Trainer], Denoiser]:
    return lambda trainer: with_weights(nets.student, trainer.emas["student"].average)


def at_scalar(trainer: Trainer, told: ConditionedDenoiser, scalar: float) -> Denoiser:
    """The averaged student for one value of its extra scalar."""
    averaged = with_weights(told, trainer.emas["student"].average)
    return folded(averaged.denoiser, averaged.embedding, scalar)


def scaled(optimizer: OptimizerConfig, rate: float, betas: tuple[float, float]) -> OptimizerConfig:
    """The same schedule at other rates."""
    muon = None if optimizer.muon_lr is None else optimizer.muon_lr * rate
    return optimizer.model_copy(update={"muon_lr": muon, "adamw_lr": optimizer.adamw_lr * rate, "betas": betas})


def check_layer(layer: int, depth: int, name: str) -> None:
    """Refuse a block that is not there."""
    if layer >= depth:
        raise ValueError(f"{name}={layer} but the network has blocks 0 to {depth - 1}; choose one of them")


def refuse_other_network(nets: Networks, stage: str) -> None:
    """Student and teacher must be one architecture."""
    own = {name: tuple(p.shape) for name, p in nets.student.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in nets.teacher.named_parameters()}
    wrong = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if wrong:
        shown = ", ".join(f"{name}: {own.get(name)} against {theirs.get(name)}" for name in wrong[:3])
        raise ValueError(
            f"{stage}: the student's network is not the teacher's, {len(wrong)} shapes differ ({shown}); "
            "start from a student of the same teacher"
        )
