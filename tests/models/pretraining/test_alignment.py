"""REPA's variants: no gradient where none belongs, the grid's order, the stop, and coefficient 0 is off to the bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from data_curation.encoders import teacher_features
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.routing import Route
from models.pretraining.config import FlowMatchingConfig, RepaConfig, TimestepConfig
from models.pretraining.encoder_free import Dispersive, SelfAlignment
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.repa import ConvProjector, Projector, Repa, projector_of, spatially_normed
from models.pretraining.teachers import PackagedTeacher, TransformerTeacher

SLOTS = (0, 1, 2, 3)
CONFIG = TrainConfig(steps=8, batch_size=4, log_every=5, checkpoint_every=5, optimizer=OptimizerConfig(warmup_steps=2, weight_decay=0.1))  # fmt: skip


def grid_features(h: int, w: int) -> torch.Tensor:
    """A teacher that says where it looks: [1, h, w, 2]."""
    return torch.stack(torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij"), -1)[None]


def test_coefficient_zero_is_off_to_the_bit(tiny, batches, tmp_path: Path) -> None:
    def weights(coefficient: float | None) -> dict[str, torch.Tensor]:
        repa = None if coefficient is None else Repa(RepaConfig(coefficient=coefficient), Projector(32, 8, 10, 3), 20)
        denoiser = tiny(0)
        train(FlowMatching(denoiser, TimestepConfig(), repa), batches, CONFIG, tmp_path / str(coefficient))
        return {name: value.clone() for name, value in denoiser.state_dict().items()}

    off, zero, on = weights(None), weights(0.0), weights(1.0)
    assert all(torch.equal(off[name], zero[name]) for name in off)
    assert not all(torch.equal(off[name], on[name]) for name in off)


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_a_non_square_grid_is_learnt_in_its_order(projector) -> None:
    """12 x 20: tokens that hold their place learn the coordinate teacher, and not the one that swaps height and width."""
    target = grid_features(12, 20)
    hidden = torch.cat([target.flatten(1, 2), torch.ones(1, 240, 1)], -1)

    def learnt(teacher: torch.Tensor) -> float:
        repa = Repa(RepaConfig(coefficient=1.0, projector=projector, hidden=16), projector_of(RepaConfig(projector=projector, hidden=16), 3, 2, 0), 100)  # fmt: skip
        optimizer = torch.optim.Adam(repa.projector.parameters(), 0.05)
        for _ in range(60):
            optimizer.zero_grad()
            loss = repa(hidden, teacher).mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert learnt(target) < 0.05
    assert learnt(target.transpose(1, 2).reshape(1, 12, 20, 2)) > 0.15


def test_irepa_takes_the_grids_mean_out() -> None:
    features = 3 + 2 * torch.randn(2, 240, 7, generator=torch.Generator().manual_seed(0))
    normed = spatially_normed(features, 1.0)
    assert float(normed.mean(1).abs().max()) < 1e-5
    torch.testing.assert_close(normed.std(1, correction=0), torch.ones(2, 7), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"needs the token grid \(h, w\)"):
        ConvProjector(3, 2, 0)(torch.zeros(1, 6, 3))


def test_dispersive_is_the_written_out_sum_and_falls_as_tokens_part() -> None:
    hidden = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    flat = hidden.flatten(1)
    total = sum(torch.exp(-((flat[i] - flat[j]).square().sum() / 30) / 0.5) for i in range(4) for j in range(4))
    term = Dispersive(RepaConfig(kind="dispersive", coefficient=2.0), 10)
    loss = term.term(hidden, None, None)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, (2 * (total / 16).log()).expand(4), atol=1e-5, rtol=1e-5)
    assert float(term.term(2 * hidden, None, None)[0]) < float(loss[0])  # type: ignore[arg-type]
    assert float(term.term(hidden[:1], None, None)) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dispersive", "self"])
def test_encoder_free_terms_reach_only_the_blocks_below(kind, tiny, batches) -> None:
    denoiser = tiny(0)
    config = RepaConfig(kind=kind, layer=1, coefficient=1.0, until=1.0)
    align = (
        Dispersive(config, 10) if kind == "dispersive" else SelfAlignment(config, Projector(32, 8, 32, 0), denoiser, 10)
    )
    objective = FlowMatching(denoiser, TimestepConfig(), align)
    batch = objective.prepare(replace(batches(0), teacher=None), Randomness(0, 0, SLOTS))
    _, hidden = denoiser(batch.extra["x_t"], batch.extra["t"], batch.tokens, batch.mask, 1)
    align.term(hidden, batch, None).mean().backward()
    blocks = denoiser.transformer.blocks
    assert all(float(b.gate_proj.weight.grad.abs().sum()) > 0 for b in blocks[:2])
    assert blocks[2].gate_proj.weight.grad is None
    if kind == "self":
        assert all(p.grad is None for p in align.average.parameters())


def test_routed_tokens_come_back_and_repa_sees_the_kept_ones(tiny, batches) -> None:
    denoiser, batch = tiny(0), batches(0)
    keep = torch.tensor([[0, 2, 5], [1, 2, 3], [0, 1, 4], [3, 4, 5]])
    t = torch.full((4,), 0.5)
    everything = torch.arange(6).expand(4, -1)
    plain, _ = denoiser(batch.images, t, batch.tokens, batch.mask)
    all_kept, _ = denoiser(batch.images, t, batch.tokens, batch.mask, route=Route(everything, 1, 1))
    torch.testing.assert_close(all_kept, plain)
    _, before = denoiser(batch.images, t, batch.tokens, batch.mask, 0)
    _, after = denoiser(batch.images, t, batch.tokens, batch.mask, 1, route=Route(keep, 1, 1))
    assert after.shape == (4, 3, 32)
    route = Route(keep, 1, 1)
    restored = route.restored(before, after)
    for row, kept in enumerate(keep.tolist()):
        skipped = [i for i in range(6) if i not in kept]
        assert torch.equal(restored[row, skipped], before[row, skipped])
        assert torch.equal(restored[row, kept], after[row])
    repa = Repa(RepaConfig(coefficient=1.0), Projector(32, 8, 10, 0), 10)
    by_hand = 1 - nn.functional.cosine_similarity(repa.projector(after[1]), batch.teacher[1].reshape(6, 10)[keep[1]])
    torch.testing.assert_close(repa(after, batch.teacher, route)[1], by_hand.mean())


def test_features_made_on_the_way_are_the_cached_ones() -> None:
    """Levels that are multiples of 16, so that the doubled picture the encoder sees has whole levels: the cached one's."""
    levels = 16 * torch.randint(0, 16, (3, 3, 32, 48), generator=torch.Generator().manual_seed(0)).float()
    doubled = nn.functional.interpolate(levels, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.equal(doubled, doubled.round())
    cached = torch.from_numpy(teacher_features(doubled.byte().permute(0, 2, 3, 1).numpy()))
    assert cached.dtype == torch.float16
    images, grid = levels / 127.5 - 1, (8, 12)
    fresh = PackagedTeacher()(images, grid)
    torch.testing.assert_close(fresh, cached.float(), rtol=2**-10, atol=2**-10)  # an fp16's rounding
    hidden, config = torch.randn(3, 96, 6, generator=torch.Generator().manual_seed(1)), RepaConfig()
    on_the_way = Repa(config, Projector(6, 8, 40, 0), 10, PackagedTeacher())
    stored = Repa(config, Projector(6, 8, 40, 0), 10)
    batch = Batch(images, torch.zeros(3, 1, 1), torch.ones(3, 1, dtype=torch.bool), (0, 1, 2))
    rng = Randomness(0, 0, batch.slots)
    terms = [repa.term(hidden, repa.prepare(given, rng), None)
             for repa, given in ((on_the_way, batch), (stored, replace(batch, teacher=cached)))]  # fmt: skip
    torch.testing.assert_close(terms[0], terms[1], rtol=0, atol=1e-5)


def test_a_vision_transformer_from_a_folder_on_a_non_square_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    )
    model.save_pretrained(tmp_path)
    teacher = TransformerTeacher(str(tmp_path))
    images = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = teacher(images, (6, 10))
    assert features.shape == (1, 6, 10, 16)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not torch.allclose(teacher(images.flip(3), (6, 10)), features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repa": {"layer": 6}}, "repa.layer=6 but the network has depth=6"),
        ({"repa": {"coefficient": -1}}, "greater than or equal to 0"),
        ({"repa": {"layer": -1}}, "greater than or equal to 0"),
        ({"tread": {"first": -1}}, "greater than or equal to 0"),
        ({"train": {"optimizer": {"betas": (0.9, 1.5)}}}, "less than 1"),
        ({"train": {"optimizer": {"betas": (-0.1, 0.95)}}}, "greater than or equal to 0"),
        ({"network": {"hidden_size": 130}}, "hidden_size=130 is not a multiple of 4 x num_heads=4; a head needs"),
        ({"network": {"hidden_size": 132, "num_heads": 22}}, "not a multiple of 4 x num_heads=22"),
        (
            {"network": {"kind": "sd3", "hidden_size": 130, "num_heads": 4}},
            "hidden_size=130 is not a multiple of num_heads=4",
        ),
        ({"repa": {"target_layer": 9}}, "repa.target_layer=9"),
        ({"tread": {"share": 1.0}}, "less than 1"),
        ({"tread": {"first": 1, "last": 6}}, "tread.last=6 but the network has depth=6"),
        ({"tread": {"first": 3, "last": 2}}, "tread.last=2 is before tread.first=3"),
        ({"tread": {}, "repa": {"projector": "conv"}}, "align outside, or with projector: mlp"),
    ],
)
def test_impossible_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatchingConfig.model_validate(settings)
