"""Every objective of the repository resumes to the bit, twice in a row."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.distillation.build import Networks, build
from models.distillation.config import DistillConfig
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import Trainer, train
from models.engine.objective import Batch, Objective
from models.engine.state import load_state
from models.networks.config import LoraConfig
from models.networks.denoiser import Denoiser
from models.personalization.dreambooth import DreamBooth
from models.personalization.lora import add_lora
from models.personalization.mix_distillation import MixDistillation
from models.posttraining.config import DpoConfig, GrpoConfig, NftConfig, ReflConfig
from models.posttraining.diffusion_dpo import DiffusionDpo
from models.posttraining.diffusion_nft import DiffusionNft
from models.posttraining.flow_grpo import FlowGrpo
from models.posttraining.refl import Refl
from models.posttraining.reward import Composite, Sharpness, Weighted
from models.posttraining.rollout import Sampling
from models.pretraining.config import RepaConfig, TimestepConfig
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.repa import Projector, Repa

CONFIG = TrainConfig(
    steps=9, batch_size=4, log_every=1, checkpoint_every=1, optimizer=OptimizerConfig(warmup_steps=2), ema_gamma=3.0
)
NULL = (torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))


def flow(tiny: Callable[[int], Denoiser]) -> Objective:
    repa = Repa(RepaConfig(layer=1, until=0.5), Projector(32, 8, 10, 3), CONFIG.steps)
    return FlowMatching(tiny(0), TimestepConfig(base_tokens=4), repa)


def dreambooth(**lora: object) -> Callable[[Callable[[int], Denoiser]], Objective]:
    def make(tiny: Callable[[int], Denoiser]) -> Objective:
        denoiser = tiny(0)
        add_lora(denoiser, LoraConfig.model_validate({"rank": 4, **lora}), 0)
        return DreamBooth(denoiser, TimestepConfig(), tiny(0))

    return make


ADAPTERS = {
    "dreambooth": dreambooth(),
    "rslora": dreambooth(kind="rslora", alpha=2.0),
    "dora": dreambooth(kind="dora"),
    "patterns": dreambooth(rank_pattern={"to_out.0": 2}, alpha_pattern={"up_proj": 8.0}),
    "pissa": dreambooth(init="pissa"),
    "loha": dreambooth(kind="loha"),
    "lokr": dreambooth(kind="lokr"),
}


def dpo(tiny: Callable[[int], Denoiser]) -> Objective:
    return DiffusionDpo(tiny(0), tiny(0), DpoConfig())


def mix(tiny: Callable[[int], Denoiser]) -> Objective:
    denoiser = tiny(0)
    add_lora(denoiser, LoraConfig(rank=4), 0)
    return MixDistillation(denoiser, TimestepConfig(), [tiny(0), tiny(3)], NULL, 2.0)


SHARP = (Weighted(Sharpness()),)
GUIDED = Sampling(NULL, 1.5)
ONLINE = {"train": CONFIG.model_dump(), "guard": None}


def grpo(tiny: Callable[[int], Denoiser]) -> Objective:
    settings = {"group": 2, "kl": 0.01, "updates": 2, "window_moves": "random"}
    return FlowGrpo(tiny(0), tiny(0), SHARP, GUIDED, GrpoConfig.model_validate({**ONLINE, **settings}))


def nft(tiny: Callable[[int], Denoiser]) -> Objective:
    config = NftConfig.model_validate({**ONLINE, "group": 2, "old_rate": 0.05})
    return DiffusionNft(tiny(0), tiny(0), SHARP, GUIDED, config)


def refl(tiny: Callable[[int], Denoiser]) -> Objective:
    return Refl(tiny(0), Composite(SHARP), GUIDED, ReflConfig.model_validate(ONLINE))


ONLINES = {"grpo": grpo, "nft": nft, "refl": refl}


def student(method: dict, **settings: int) -> Callable[[Callable[[int], Denoiser]], Objective]:
    def make(tiny: Callable[[int], Denoiser]) -> Objective:
        config = DistillConfig.model_validate({"method": method, "train": CONFIG.model_dump(), **settings})
        return build(config, Networks(tiny(0), tiny(3), tiny(3), NULL)).objective

    return make


STUDENTS = {
    "progressive": student({"kind": "progressive", "teacher_steps": 8}),  # killed inside the second and third halving
    "instaflow": student({"kind": "instaflow", "reflow_share": 0.5, "perceptual_share": 0.3}),
    "consistency": student({"kind": "consistency", "teacher_steps": 4}),
    "lcm": student({"kind": "consistency", "guidance_range": [1.0, 3.0]}),
    "lcm-lora": student({"kind": "consistency", "lora": {"rank": 4}, "target_decay": 0.0}),
    "scm": student({"kind": "scm"}),
    "dmd": student({"kind": "dmd", "fake_steps": 2, "gan_weight": 0.05}, student_steps=4),  # killed between two moves
    "dmd1": student({"kind": "dmd", "fake_steps": 3, "regression_weight": 0.2}),
    "add": student({"kind": "add"}),
    "ladd": student({"kind": "add", "features": "teacher"}, student_steps=2),
    "meanflow": student({"kind": "meanflow"}),
}


class KilledError(Exception):
    """Stands for a killed process."""


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, module in trainer.players.items():
        tensors |= {f"{name}/{k}": v.detach().clone() for k, v in module.state_dict().items()}
        tensors |= {f"{name}/ema/{k}": v.clone() for k, v in trainer.emas[name].average.items()}
        tensors |= {f"{name}/optimizer/{k}": v.clone() for k, v in trainer.optimizers[name].tensors().items()}
    return tensors


@pytest.mark.parametrize(
    "make",
    [flow, dpo, mix, *ADAPTERS.values(), *ONLINES.values(), *STUDENTS.values()],
    ids=["flow", "dpo", "mix", *ADAPTERS, *ONLINES, *STUDENTS],
)
def test_resuming_twice_gives_the_same_bits(make, tiny, batches, tmp_path: Path) -> None:
    def with_noise(step: int) -> Batch:
        batch = batches(step)
        noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(step))
        taught = torch.tensor([slot % 2 for slot in batch.slots])
        beside = {
            "teacher": taught,
            "empty": taught == 2,
            "real": batch.images,
            "real_tokens": batch.tokens,
            "real_mask": batch.mask,
        }
        return replace(batch, extra={**batch.extra, **beside, "noise": noise})

    straight = train(make(tiny), with_noise, CONFIG, tmp_path / "straight")

    def dying_at(limit: int) -> Callable[[int], Batch]:
        def batch(step: int) -> Batch:
            if step == limit:
                raise KilledError
            return with_noise(step)

        return batch

    for limit in (3, 7):
        with pytest.raises(KilledError):
            train(make(tiny), dying_at(limit), CONFIG, tmp_path / "broken")
    resumed = train(make(tiny), with_noise, CONFIG, tmp_path / "broken")

    expected, got = everything(straight), everything(resumed)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert straight.rows == resumed.rows


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tiny, batches, tmp_path: Path) -> None:
    train(flow(tiny), batches, CONFIG, tmp_path)
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    with (newest / "denoiser.weights.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\xff\xff\xff\xff")
    found = load_state(tmp_path / "checkpoints")
    assert found is not None
    assert found[0] == CONFIG.steps - 1


def test_a_grid_whose_drawing_was_killed_is_drawn_again(tiny, batches, tmp_path: Path) -> None:
    config, drawn = CONFIG.model_copy(update={"sample_every": 2}), []

    def killed(step: int, _: Trainer) -> None:
        if step == 4:
            raise KilledError
        drawn.append(step)

    with pytest.raises(KilledError):
        train(flow(tiny), batches, config, tmp_path, on_sample=killed)
    train(flow(tiny), batches, config, tmp_path, on_sample=lambda step, _: drawn.append(step))
    assert drawn == [2, 4, 6, 8]


def test_running_a_finished_training_again_does_nothing(tiny, batches, tmp_path: Path) -> None:
    first = train(flow(tiny), batches, CONFIG, tmp_path)

    def refuse(step: int) -> Batch:
        raise AssertionError(f"step {step} was run again")

    again = train(flow(tiny), refuse, CONFIG, tmp_path)
    assert again.rows == first.rows
