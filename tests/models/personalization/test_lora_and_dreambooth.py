import json
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from models.distillation.config import ConsistencyConfig
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.randomness import Randomness
from models.networks.config import LoraConfig
from models.personalization import lora_files
from models.personalization.config import DreamBoothConfig
from models.personalization.dreambooth import DreamBooth, Pictures, focus_of, mixed_batches
from models.personalization.lora import add_lora, load_adapter, merge, save_adapter
from models.pretraining.config import TimestepConfig
from models.pretraining.flow_matching import FlowMatching

CONFIG = LoraConfig(rank=4)


def output(denoiser, batch):
    with torch.no_grad():
        return denoiser(batch.images, torch.full((4,), 0.5), batch.tokens, batch.mask)[0]


def shake(denoiser) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_fresh_adapter_changes_no_bit(tiny, batches) -> None:
    plain, adapted = tiny(0), tiny(0)
    add_lora(adapted, CONFIG, 0)
    assert torch.equal(output(plain, batches(0)), output(adapted, batches(0)))


def test_merged_weights_draw_what_the_adapter_draws(tiny, batches) -> None:
    adapted = tiny(0)
    add_lora(adapted, CONFIG, 0)
    shake(adapted)
    merged = merge(adapted)
    assert not torch.allclose(output(tiny(0), batches(0)), output(adapted, batches(0)), atol=1e-3)
    torch.testing.assert_close(output(merged, batches(0)), output(adapted, batches(0)), atol=2e-5, rtol=1e-4)
    assert merged.transformer.state_dict().keys() == tiny(0).transformer.state_dict().keys()


def test_saved_adapter_loads_strictly(tiny, batches, tmp_path) -> None:
    adapted = tiny(0)
    add_lora(adapted, CONFIG, 0)
    shake(adapted)
    save_adapter(adapted, tmp_path, {"base": "abc"})
    again = tiny(0)
    load_adapter(again, tmp_path, base="abc")
    assert torch.equal(output(again, batches(0)), output(adapted, batches(0)))
    with pytest.raises(ValueError, match="t2i.base is abc, the base at hand is other"):
        load_adapter(tiny(0), tmp_path, base="other")
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        load_adapter(again, tmp_path)


FAMILY = {
    "rslora": {"kind": "rslora", "alpha": 2.0},
    "dora": {"kind": "dora"},
    "patterns": {"alpha": 8.0, "rank_pattern": {"to_out.0": 2}, "alpha_pattern": {"up_proj": 3.0}},
    "gaussian": {"init": "gaussian"},
    "pissa": {"init": "pissa"},
    "loha": {"kind": "loha", "alpha": 8.0},
    "lokr": {"kind": "lokr"},
}


@pytest.mark.parametrize("member", FAMILY)
def test_every_member_trains_saves_loads_and_merges(member, tiny, batches, tmp_path) -> None:
    config = LoraConfig.model_validate({"rank": 4, **FAMILY[member]})
    adapted, plain = tiny(0), output(tiny(0), batches(0))
    add_lora(adapted, config, 0)
    torch.testing.assert_close(output(adapted, batches(0)), plain, atol=1e-5 if member == "pissa" else 0, rtol=0)
    start = lora_files.from_module(adapted.transformer, {}) if member == "pissa" else None
    fast = OptimizerConfig(muon_lr=None, adamw_lr=0.05, warmup_steps=0)
    train(
        FlowMatching(adapted, TimestepConfig()), batches, TrainConfig(steps=3, batch_size=4, optimizer=fast), tmp_path
    )
    drawn = output(adapted, batches(0))
    assert float((drawn - plain).abs().max()) > 1e-2
    save_adapter(adapted, tmp_path / "adapter", {"base": "abc"}, start)
    again = tiny(0)
    load_adapter(again, tmp_path / "adapter", base="abc")
    torch.testing.assert_close(output(again, batches(0)), drawn, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output(merge(again), batches(0)), drawn, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output(merge(adapted), batches(0)), drawn, atol=2e-5, rtol=1e-4)


def test_patterns_set_rank_and_scale_of_their_layers(tiny) -> None:
    denoiser = tiny(0)
    add_lora(denoiser, LoraConfig.model_validate({"rank": 4, **FAMILY["patterns"]}), 0)
    layers = {n: m for n, m in denoiser.transformer.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        rank = 2 if name.endswith("to_out.0") else 4
        scale = 3 / 4 if name.endswith("up_proj") else 2.0
        assert (layer.r["default"], layer.scaling["default"]) == (rank, pytest.approx(scale)), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"to_uot.0": 2}}, "lora pattern 'to_uot.0' matches no target layer"),
        ({"alpha_pattern": {"norm": 2}}, "lora pattern 'norm' matches no target layer"),
        ({"rank_pattern": {"up_proj": 64}}, "lora.rank_pattern.up_proj=64 exceeds the smaller side of blocks.0"),
    ],
)
def test_patterns_that_do_not_fit_are_errors(settings, message, tiny) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(tiny(0), LoraConfig.model_validate({"rank": 4, **settings}), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"up_proj": 0}}, "lora.rank_pattern.up_proj=0 is not above 0"),
        ({"alpha_pattern": {"up_proj": -1.0}}, "lora.alpha_pattern.up_proj=-1.0 is not above 0"),
        ({"init": "pissa", "kind": "dora"}, "lora.init=pissa changes the base, whose rows dora measures"),
        ({"kind": "oft"}, "oft"),
    ],
)
def test_settings_without_meaning_are_errors(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig.model_validate(settings)


def test_pissa_is_refused_where_the_base_is_the_reference() -> None:
    pissa = {"lora": {"init": "pissa"}}
    with pytest.raises(ValueError, match="lora.init=pissa .* prior"):
        DreamBoothConfig.model_validate({"prior": "prediction", **pissa})
    DreamBoothConfig.model_validate({"prior": "pictures", **pissa})
    DreamBoothConfig.model_validate({"prior_weight": 0.0, **pissa})
    with pytest.raises(ValueError, match="lora.init=pissa"):
        ConsistencyConfig.model_validate(pissa)


def test_training_moves_the_adapter_and_not_the_base(tiny, batches, tmp_path) -> None:
    adapted, base = tiny(0), tiny(0)
    add_lora(adapted, CONFIG, 0)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if ".lora_" in n}
    config = TrainConfig(
        steps=3, batch_size=4, log_every=1, checkpoint_every=3, optimizer=OptimizerConfig(muon_lr=None)
    )
    train(FlowMatching(adapted, TimestepConfig()), batches, config, tmp_path)
    assert any(not torch.equal(before[n], p) for n, p in adapted.named_parameters() if n in before)
    frozen = {n.replace(".base_layer", ""): p for n, p in adapted.named_parameters() if ".lora_" not in n}
    assert all(torch.equal(p, frozen[n]) for n, p in base.named_parameters())


def pictures(count: int, value: float) -> Pictures:
    return Pictures(torch.full((count, 3, 8, 8), value), torch.zeros(count, 2, 16), torch.ones(count, 2).bool())


def test_batch_mean_is_instance_loss_plus_weighted_prior_loss() -> None:
    slots = tuple(range(8))
    batch = mixed_batches(pictures(3, 1.0), pictures(5, -1.0), 0.25, slots, 0)(0)
    own = batch.images[:, 0, 0, 0] > 0
    assert own.tolist() == [True, False] * 4
    assert batch.weight is not None
    per_sample = torch.where(own, 3.0, 7.0)  # L(instance) = 3, L(prior) = 7
    assert float((per_sample * batch.weight).mean()) == pytest.approx(3.0 + 0.25 * 7.0)
    alone = mixed_batches(pictures(3, 1.0), pictures(0, 0.0), 1.0, slots, 0)(0)
    assert alone.weight is not None
    assert alone.weight.tolist() == [1.0] * 8


@pytest.mark.parametrize("reference", [True, False], ids=["prediction", "pictures"])
def test_the_loss_is_instance_plus_weight_times_prior(reference, tiny) -> None:
    """Test 16: L(w) = L_instance + w L_prior, each the mean over its own half; w = 0 leaves the subject alone."""
    generator = torch.Generator().manual_seed(5)

    def some(count: int) -> Pictures:
        return Pictures(torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1,
                        torch.randn(count, 2, 16, generator=generator), torch.ones(count, 2).bool())  # fmt: skip

    instance, prior, slots = some(3), some(5), tuple(range(8))
    adapted = tiny(0)
    add_lora(adapted, CONFIG, 0)
    shake(adapted)
    objective = DreamBooth(adapted, TimestepConfig(), tiny(0) if reference else None)

    def loss(weight: float, keep: bool | None = None) -> float:
        batch = mixed_batches(instance, prior, weight, slots, 0)(0)
        if keep is not None:
            batch.weight = 2.0 * (batch.extra["prior"] == keep)
        return float(objective.loss("denoiser", objective.prepare(batch, Randomness(0, 0, slots))).total.detach())

    of_instance, of_prior = loss(1.0, keep=False), loss(1.0, keep=True)
    assert of_prior > 1e-3
    for weight in (0.0, 0.25, 3.0):
        assert loss(weight) == pytest.approx(of_instance + weight * of_prior, abs=1e-6, rel=1e-6)


def test_masks_weigh_the_pixels_of_the_subject_and_leave_the_class_alone(tiny) -> None:
    """The loss of each row is mean(w e), w in the ratio 1 : unmasked with mean 1; without masks and with white ones mean(e)."""
    generator, slots = torch.Generator().manual_seed(6), tuple(range(4))
    masks = (torch.rand(3, 8, 8, generator=generator) > 0.6).float()
    focus = focus_of(masks, 0.25)
    torch.testing.assert_close(focus.mean((1, 2)), torch.ones(3))
    inside, outside = focus[0][masks[0] == 1], focus[0][masks[0] == 0]
    assert float(inside[0] / outside[0]) == pytest.approx(4.0)
    own = Pictures(torch.rand(3, 3, 8, 8, generator=generator), torch.randn(3, 2, 16, generator=generator),
                   torch.ones(3, 2).bool())  # fmt: skip
    objective = DreamBooth(tiny(0), TimestepConfig(), None)

    def errors(pictures: Pictures):
        batch = objective.prepare(mixed_batches(pictures, own, 1.0, slots, 0)(0), Randomness(0, 0, slots))
        output = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(7))
        return objective.error(output, batch), output, batch

    found, output, batch = errors(replace(own, focus=focus))
    each = ((output - batch.images) / batch.extra["t"].clamp_min(0.05).view(-1, 1, 1, 1)).square()
    weights = batch.extra["focus"]
    torch.testing.assert_close(found, (weights.unsqueeze(1) * each).mean((1, 2, 3)))
    assert bool((weights[batch.extra["prior"]] == 1).all())
    assert float((weights[~batch.extra["prior"]] - 1).abs().max()) > 0.5
    plain = errors(own)[0]
    torch.testing.assert_close(errors(replace(own, focus=focus_of(torch.ones(3, 8, 8), 0.25)))[0], plain)


def class_gradient(objective: DreamBooth, batch) -> float:
    """Norm of the adapter's gradient when only class pictures count."""
    prepared = objective.prepare(batch, Randomness(0, 0, batch.slots))
    loss = objective.loss("denoiser", prepared).total
    loss.backward()
    named = dict(objective.denoiser.named_parameters())
    norm = sum(float(p.grad.square().sum()) for n, p in named.items() if ".lora_" in n and p.grad is not None) ** 0.5
    objective.denoiser.zero_grad()
    return norm


def test_prediction_prior_pulls_nothing_until_the_adapter_has_moved_the_class(tiny) -> None:
    generator = torch.Generator().manual_seed(3)
    prior = Pictures(torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1,
                     torch.randn(4, 2, 16, generator=generator), torch.ones(4, 2).bool())  # fmt: skip
    batch = mixed_batches(prior, prior, 1.0, (0, 1, 2, 3), 0)(0)
    batch.weight = batch.extra["prior"].float()  # the subject's half does not count
    adapted = tiny(0)
    add_lora(adapted, CONFIG, 0)
    prediction = DreamBooth(adapted, TimestepConfig(), tiny(0))
    paper = DreamBooth(adapted, TimestepConfig(), None)
    assert class_gradient(prediction, batch) < 1e-6
    assert class_gradient(paper, batch) > 1e-3
    shake(adapted)
    assert class_gradient(prediction, batch) > 1e-3


def test_no_pictures_of_the_subject_is_an_error() -> None:
    with pytest.raises(ValueError, match="no instance pictures"):
        mixed_batches(pictures(0, 0.0), pictures(2, 0.0), 1.0, (0,), 0)


def test_a_rank_above_the_layers_is_an_error(tiny) -> None:
    with pytest.raises(
        ValueError, match=r"lora.rank=64 exceeds the smaller side of blocks.0.attention.img_qkv_proj, 32 to 96"
    ):
        add_lora(tiny(0), LoraConfig(rank=64), 0)
    add_lora(tiny(0), LoraConfig(rank=32), 0)


def test_targets_that_match_nothing_are_an_error(tiny) -> None:
    with pytest.raises(
        ValueError, match=r"lora.targets: 'to_q' matches no linear layer; there are .*img_qkv_proj.*to_out.0"
    ):
        add_lora(tiny(0), LoraConfig(rank=2, targets=("up_proj", "to_q")), 0)


def test_saved_adapters_are_equal_to_the_byte(tiny, tmp_path) -> None:
    """An adapter's digest is its identity; safetensors writes several metadata keys in an order of its own."""
    denoiser = tiny(0)
    add_lora(denoiser, LoraConfig(rank=2), seed=0)
    about = {f"key {i}": "value" for i in range(8)}
    for name in ("one", "two"):
        save_adapter(denoiser, tmp_path / name, about)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
    with safe_open(tmp_path / "one" / "adapter_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["t2i"]) == about
