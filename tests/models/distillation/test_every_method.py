"""What holds for every method: two workers agree with one, and what cannot work is refused."""

import copy

import pytest
import torch

from models.distillation.build import Networks, build
from models.distillation.config import DistillConfig
from models.engine.randomness import Randomness
from models.networks import prx
from models.networks.config import PrxConfig

NULL = (torch.zeros(1, 2, 16), torch.ones(1, 2, dtype=torch.bool))
METHODS = {
    "progressive": {"kind": "progressive", "teacher_steps": 8},
    "instaflow": {"kind": "instaflow", "perceptual_share": 0.3},
    "consistency": {"kind": "consistency", "teacher_steps": 4},
    "lcm": {"kind": "consistency", "guidance_range": [1.0, 3.0]},
    "lcm-lora": {"kind": "consistency", "lora": {"rank": 4}, "target_decay": 0.0},
    "scm": {"kind": "scm"},
    "dmd": {"kind": "dmd", "fake_steps": 3, "gan_weight": 0.05, "regression_weight": 0.2},
    "add": {"kind": "add"},
    "ladd": {"kind": "add", "features": "teacher"},
    "meanflow": {"kind": "meanflow"},
}


def plan_of(tiny, name, **settings):
    train = {"steps": 9, "batch_size": 4, "log_every": 1, "checkpoint_every": 1}
    config = DistillConfig.model_validate({"method": METHODS[name], "train": train} | settings)
    return build(config, Networks(tiny(0), tiny(3), tiny(3), NULL))


def part_of(batch, slots):
    part = copy.deepcopy(batch)
    rows = list(slots)
    part.images, part.tokens, part.mask = part.images[rows], part.tokens[rows], part.mask[rows]
    part.extra = {name: value[rows] for name, value in part.extra.items()}
    part.slots = slots
    return part


def gradients(objective, player, batch, slots, step):
    for module in objective.players.values():
        for parameter in module.parameters():
            parameter.grad = None
    prepared = objective.prepare(part_of(batch, slots), Randomness(0, step, slots))
    objective.loss(player, prepared).total.backward()
    named = objective.players[player].named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_two_workers_have_the_gradient_of_one(tiny, batches, name) -> None:
    """S5: the mean of both halves' gradients is the whole batch's, for every player."""
    objective, step = plan_of(tiny, name).objective, 6
    batch = batches(0)
    batch.extra["noise"] = torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    for player in objective.turns(step):
        whole = gradients(objective, player, batch, (0, 1, 2, 3), step)
        halves = [gradients(objective, player, batch, slots, step) for slots in ((0, 1), (2, 3))]
        largest = max(float(g.abs().max()) for g in whole.values())
        for key, gradient in whole.items():
            mean = (halves[0][key] + halves[1][key]) / 2
            assert float((mean - gradient).abs().max()) < 1e-4 * max(largest, 1.0), (player, key)


def test_a_student_of_another_network_is_refused(tiny) -> None:
    other = prx.build(PrxConfig(hidden_size=64, depth=3, num_heads=2, text_dim=16), torch.zeros(16), torch.ones(16), 0)
    with pytest.raises(ValueError, match=r"shapes differ \(transformer"):
        build(DistillConfig(), Networks(other, tiny(0), tiny(0), NULL))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"kind": "dmd", "gan_weight": 0.1, "gan_layer": 3}, "gan_layer=3 but the network has blocks 0 to 2"),
        ({"kind": "add", "features": "teacher", "layer": 9}, "layer=9 but the network has blocks 0 to 2"),
    ],
)
def test_blocks_that_are_not_there_are_refused(tiny, method, message) -> None:
    with pytest.raises(ValueError, match=message):
        build(DistillConfig(method=method), Networks(tiny(0), tiny(0), tiny(0), NULL))


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 0.5}, {"guidance": float("nan")}, {"student_steps": 0}, {"method": {"kind": "dmd", "fake_steps": 0}},
        {"method": {"kind": "guess"}}, {"method": {"kind": "progressive", "huber": 0.1}},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings) -> None:
    with pytest.raises(ValueError):
        DistillConfig.model_validate(settings)


def test_a_method_shows_only_its_own_fields() -> None:
    config = DistillConfig.model_validate({"method": {"kind": "dmd"}})
    assert set(config.method.model_dump()) >= {"fake_steps", "gan_weight"}
    assert "target_decay" not in config.method.model_dump()


def test_every_method_says_how_it_is_sampled(tiny) -> None:
    assert {name: (plan_of(tiny, name).sampler, plan_of(tiny, name).trained_steps) for name in METHODS} == {
        "progressive": ("euler", (4, 2, 1)), "instaflow": ("euler", (1,)), "consistency": ("renoise", (1, 2, 4)),
        "lcm": ("renoise", (1, 2, 4)), "lcm-lora": ("renoise", (1, 2, 4)), "scm": ("renoise", (1, 2, 4)),
        "dmd": ("renoise", (1,)), "add": ("renoise", (1,)), "ladd": ("renoise", (1,)), "meanflow": ("euler", (1, 2, 4)),
    }  # fmt: skip
    assert plan_of(tiny, "dmd", student_steps=4).trained_steps == (1, 2, 4)
