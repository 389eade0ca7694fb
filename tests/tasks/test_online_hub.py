"""Rewards of the hub as targets, judges of pairs and held-out rewards of guards, with the demo's judge and without it."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from infra.errors import ConfigError
from models.evaluation.config import HubReward
from models.networks.checkpoint import read_card
from models.posttraining.clip_reward import hub_scores
from models.posttraining.config import DpoConfig, GrpoConfig, NftConfig, PairsConfig, ReflConfig
from models.posttraining.preference_pairs import read_pairs
from models.posttraining.refl import Refl
from models.posttraining.reward import Composite
from tasks.online import Start, grpo, nft, refl
from tasks.preference import dpo, make_pairs

TRAIN = {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 1}
SMALL = {"train": TRAIN, "prompts": {"count": 6}, "steps": 2}
METHODS = {
    "grpo": (grpo, GrpoConfig, {"group": 2, "window": 1}),
    "nft": (nft, NftConfig, {"group": 2}),
    "refl": (refl, ReflConfig, {}),
}


@pytest.fixture(scope="session")
def other_clip(clip_folder, tmp_path_factory):
    """Another random CLIP with the same processor."""
    folder = tmp_path_factory.mktemp("other") / "clip"
    shutil.copytree(clip_folder, folder)
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p)) if p.ndim > 1 else None
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(clip_folder, other_clip) -> dict:
    rewards = [{"kind": "hub", "hub": {"model": str(clip_folder)}}, {"kind": "sharpness", "weight": 0.5}]
    held_out = {"model": str(other_clip), "kind": "hps", "role": "held_out"}
    return SMALL | {"rewards": rewards, "guard": {"every": 1, "prompts": 2, "seeds": 2, "held_out": held_out}}


def without_judge(inputs: dict) -> dict:
    return {role: folder for role, folder in inputs.items() if role != "judge"}


@pytest.mark.parametrize("own", [False, True], ids=["demo", "own data"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_train_on_one_and_are_watched_by_another(name, own, settings, inputs, context, tmp_path) -> None:
    run, kind, more = METHODS[name]
    ctx = context(name, without_judge(inputs) if own else inputs, tmp_path)
    facts = run(kind.model_validate(settings | more), ctx)
    guard = json.loads((ctx.out / "guard.json").read_text())
    assert len(guard["looks"]) == 3
    assert -1 <= guard["looks"][0]["held_out"] <= 1  # a cosine, not the shape judge's log-likelihood
    assert guard["looks"][0]["change"] == 0
    assert np.isfinite([facts["last"][key] for key in facts["last"]]).all()
    if name != "refl":
        assert {"pickscore", "sharpness"} <= facts["last"].keys()
    before, after = (
        load_file(p / "transformer" / "diffusion_pytorch_model.safetensors") for p in (inputs["init"], ctx.out)
    )
    assert any(not torch.equal(before[key], after[key]) for key in before) == (guard["taken"] > 0)
    assert read_card(ctx.out) == read_card(inputs["init"])


def test_refl_follows_the_rewards_own_gradient(clip_folder, inputs, context, tmp_path) -> None:
    """The gradient of the hinge at the last layer is that of the same loss written out, and it is not nothing."""
    config = ReflConfig.model_validate(
        SMALL
        | {
            "rewards": [{"kind": "hub", "hub": {"model": str(clip_folder)}}],
            "guard": None,
            "pretraining": 0.0,
            "weight": 1.0,
        }
    )
    start = Start.of(config, context("refl", inputs, tmp_path))
    objective = Refl(start.denoiser, Composite(start.rewards), start.sampling, config)
    weight = start.denoiser.transformer.final_layer.linear.weight.requires_grad_(True)
    asked = start.prompts.batch(torch.arange(4), range(4), 32)
    noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def rewarded() -> torch.Tensor:
        x_0 = start.sampling.x_0(start.denoiser, noise, 0.5, asked)
        return objective.reward(x_0, asked).sum()

    (slope,) = torch.autograd.grad(rewarded(), weight)
    assert slope.norm() > 0
    size = 1e-3
    with torch.no_grad():
        weight += size * slope / slope.norm()
        up = rewarded()
        weight -= 2 * size * slope / slope.norm()
        down = rewarded()
    assert float((up - down) / (2 * size)) == pytest.approx(float(slope.norm()), rel=0.05)


@pytest.mark.parametrize("own", [False, True], ids=["demo", "own data"])
def test_pairs_are_the_best_and_worst_of_their_groups(own, clip_folder, inputs, context, tmp_path) -> None:
    given = without_judge(inputs) if own else inputs
    config = PairsConfig.model_validate(
        {"prompts": 6, "group": 3, "steps": 1, "min_gap": 0.0, "hub": {"model": str(clip_folder)}}
    )
    ctx = context("pairs", given, tmp_path)
    make_pairs(config, ctx)
    pairs, table = read_pairs(ctx.out), pq.read_table(ctx.out / "pairs.parquet").to_pydict()
    reward = HubReward(model=str(clip_folder))
    np.testing.assert_allclose(hub_scores(reward, pairs.winner, pairs.prompts), table["reward_winner"], atol=1e-4)
    np.testing.assert_allclose(hub_scores(reward, pairs.loser, pairs.prompts), table["reward_loser"], atol=1e-4)
    assert all(w > x for w, x in zip(table["reward_winner"], table["reward_loser"], strict=True))
    assert all(scene == "" for scene in table["scene"]) == own


def test_dpo_on_data_of_ones_own_is_guarded_by_a_hub_reward(settings, clip_folder, inputs, context, tmp_path) -> None:
    own, pairs = without_judge(inputs), context("pairs", without_judge(inputs), tmp_path)
    make_pairs(PairsConfig.model_validate(
        {"prompts": 6, "group": 2, "steps": 1, "min_gap": 0.0, "hub": {"model": str(clip_folder)}}), pairs)  # fmt: skip
    given = {**own, "pairs": pairs.out}
    facts = dpo(DpoConfig.model_validate({"train": TRAIN, "guard": settings["guard"]}), context("dpo", given, tmp_path))
    assert len(facts["guard"]["looks"]) == 3
    with pytest.raises(ConfigError, match="captions have no pair, the guard asks 40"):
        many = settings["guard"] | {"prompts": 40}
        dpo(DpoConfig.model_validate({"train": TRAIN, "guard": many}), context("many", given, tmp_path))


def test_what_own_data_lack_is_said(settings, inputs, context, tmp_path) -> None:
    own = without_judge(inputs)
    with pytest.raises(ConfigError, match=r"on data of your own set guard\.held_out"):
        grpo(
            GrpoConfig.model_validate(settings | {"guard": {"every": 1}, "group": 2, "window": 1}),
            context("a", own, tmp_path),
        )
    crowded = settings["guard"] | {"prompts": 30}
    with pytest.raises(ConfigError, match="11 captions leave none beside the guard's 30"):
        grpo(
            GrpoConfig.model_validate(settings | {"guard": crowded, "group": 2, "window": 1}),
            context("b", own, tmp_path),
        )
    with pytest.raises(ConfigError, match=r"set pairs\.hub to a reward"):
        make_pairs(PairsConfig(prompts=4, group=2, steps=1), context("c", own, tmp_path))
