"""Rewards of the hub: stock scores, declared range, one interface, a gradient that a rollout can follow."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from models.engine.objective import Batch
from models.evaluation.config import HubReward
from models.posttraining.clip_reward import ClipReward, hub_scores
from models.posttraining.config import GrpoConfig, PairsConfig, RewardTerm
from models.posttraining.guard_config import GuardConfig
from models.posttraining.reward import Composite, Measured, Weighted

PROMPTS = ("a cat", "two dogs", "rocket")


def asked(rows: list[int]) -> Batch:
    n = len(rows)
    return Batch(torch.zeros(n, 3, 8, 8), torch.zeros(n, 1, 4), torch.ones(n, 1, dtype=torch.bool), tuple(range(n)),
                 extra={"scene": torch.tensor(rows)})  # fmt: skip


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)


def stock_cosines(folder, images, prompts) -> tuple[np.ndarray, float]:
    """Of each picture with its own prompt, and the scale, as PickScore's page computes them."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder, use_fast=False)
    seen = processor(images=[Image.fromarray(i) for i in images], return_tensors="pt")
    read = processor(text=list(prompts), padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        logits = model(**seen, **read).logits_per_image
        scale = float(model.logit_scale.exp())
    return (logits.diagonal() / scale).numpy(), scale


def test_scores_are_stock(clip_folder, images) -> None:
    prompts = [PROMPTS[i] for i in (0, 1, 2, 1, 0)]
    cosines, scale = stock_cosines(clip_folder, images, prompts)
    for kind, factor in (("pickscore", scale), ("hps", 1.0), ("clip", 1.0)):
        config = HubReward(model=str(clip_folder), kind=kind, batch_size=2)
        np.testing.assert_allclose(hub_scores(config, images, prompts), factor * cosines, atol=2e-5 * factor)
        reward = ClipReward(config, PROMPTS)
        pictures = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        ours = reward(pictures, asked([0, 1, 2, 1, 0]))
        np.testing.assert_allclose(ours, factor * cosines, atol=2e-3 * factor)  # resized in torch, not by Pillow
        assert (reward.card.name, reward.card.high, reward.card.role) == (kind, pytest.approx(factor), "trained")
        assert reward.card.low <= ours.min()
        assert ours.max() <= reward.card.high


def test_the_gradient_raises_the_reward_and_batches_do_not_change_it(clip_folder, images) -> None:
    reward = ClipReward(HubReward(model=str(clip_folder), batch_size=2), PROMPTS)
    pictures = (torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).requires_grad_()
    rows = asked([0, 1, 2, 1, 0])
    before = reward(pictures, rows)
    torch.testing.assert_close(before.detach(), reward(pictures.detach(), rows), atol=1e-5, rtol=0)
    (slope,) = torch.autograd.grad(before.sum(), pictures)
    step = 1e-3 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    rise = (reward(pictures.detach() + step, rows) - reward(pictures.detach() - step, rows)) / 2e-3
    torch.testing.assert_close(rise, slope.flatten(1).norm(dim=1), rtol=0.05, atol=0)
    with torch.no_grad():
        assert not reward(pictures, rows).requires_grad


def test_it_stands_where_any_reward_does(clip_folder, images) -> None:
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    reward = ClipReward(HubReward(model=str(clip_folder), name="taste"), PROMPTS)
    measured = Measured.on(reward, pictures, asked([0, 1, 2, 1, 0]))
    both = Composite((Weighted(measured), Weighted(measured, 0.5)))
    assert both.card.name == "taste+taste"
    assert abs(float(both(pictures, asked([0, 1, 2, 1, 0])).mean())) < 1e-4
    watching = ClipReward(HubReward(model=str(clip_folder), role="held_out"), PROMPTS)
    with pytest.raises(ValueError, match="held out and only watches"):
        Weighted(watching)
    with pytest.raises(ValueError, match="5 pictures but 3 prompts"):
        hub_scores(HubReward(model=str(clip_folder)), images, PROMPTS)


def test_its_processor_may_lie_elsewhere(clip_folder, images, tmp_path) -> None:
    """PickScore's weights come without a processor; its page takes that of the CLIP it started from."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    there = hub_scores(HubReward(model=str(tmp_path), processor={"model": str(clip_folder)}), images, ["a cat"] * 5)
    np.testing.assert_array_equal(there, hub_scores(HubReward(model=str(clip_folder)), images, ["a cat"] * 5))


def test_settings_that_cannot_be_meant_are_refused(clip_folder, mask2former_folder) -> None:
    there = {"model": str(clip_folder)}
    with pytest.raises(ValueError, match=r"is of type 'mask2former'; one of clip"):
        HubReward(model=str(mask2former_folder("cat")))
    with pytest.raises(ValueError, match="kind hub and a model under hub go together"):
        RewardTerm(kind="hub")
    with pytest.raises(ValueError, match="kind hub and a model under hub go together"):
        RewardTerm.model_validate({"kind": "judge", "hub": there})
    with pytest.raises(ValueError, match="'hps' is held out"):
        RewardTerm.model_validate({"kind": "hub", "hub": there | {"kind": "hps", "role": "held_out"}})
    with pytest.raises(ValueError, match="set its role to held_out"):
        GrpoConfig.model_validate({"guard": {"held_out": there}})
    with pytest.raises(ValueError, match="which is trained on too"):
        GrpoConfig.model_validate(
            {"rewards": [{"kind": "hub", "hub": there}], "guard": {"held_out": there | {"role": "held_out"}}}
        )
    with pytest.raises(ValueError, match="asks no reward"):
        PairsConfig.model_validate({"source": "data", "hub": there})
    assert GuardConfig.model_validate({"held_out": there | {"role": "held_out"}}).held_out is not None
