import copy
import hashlib
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.precision import autocast
from models.engine.randomness import Randomness
from models.networks.config import LoraConfig
from models.personalization.lora import add_lora
from models.posttraining.config import DpoConfig
from models.posttraining.diffusion_dpo import DiffusionDpo, winners_fell

SLOTS = (0, 1, 2, 3)


def prepared(objective: DiffusionDpo, batches):
    return objective.prepare(batches(0), Randomness(0, 0, SLOTS))


@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
def test_loss_at_the_reference_is_ln_2_for_any_beta(tiny, batches, beta) -> None:
    objective = DiffusionDpo(tiny(0), tiny(0), DpoConfig(beta_per_element=beta, anchor=0.0))
    loss = objective.loss("denoiser", prepared(objective, batches))
    assert loss.total.item() == pytest.approx(math.log(2), abs=1e-7)
    assert float(loss.parts["implicit_accuracy"]) == 0.5


def gradients(objective: DiffusionDpo, batch) -> torch.Tensor:
    objective.denoiser.zero_grad()
    objective.loss("denoiser", batch).total.backward()
    return torch.cat([p.grad.reshape(-1) for p in objective.denoiser.parameters() if p.grad is not None])


def test_swapping_winner_and_loser_flips_the_gradient(tiny, batches) -> None:
    objective = DiffusionDpo(tiny(0), tiny(0), DpoConfig(anchor=0.0))
    batch = batches(0)
    forward = gradients(objective, objective.prepare(batch, Randomness(0, 0, SLOTS)))
    batch.images, batch.extra = batch.extra["loser"], {"loser": batch.images}
    backward = gradients(objective, objective.prepare(batch, Randomness(0, 0, SLOTS)))
    assert forward.norm() > 0
    assert (forward + backward).norm() < 1e-5 * forward.norm()  # the pictures change places in the sums over the batch


def test_beta_scales_the_first_gradient_exactly(tiny, batches) -> None:
    once, twice = (DiffusionDpo(tiny(0), tiny(0), DpoConfig(beta_per_element=beta, anchor=0.0)) for beta in (0.4, 0.8))
    assert torch.equal(2 * gradients(once, prepared(once, batches)), gradients(twice, prepared(twice, batches)))


@pytest.mark.parametrize("size", [(8, 12), (16, 8)])
def test_beta_per_element_is_beta_over_sums_at_any_size(tiny, batches, size) -> None:
    """The loss written out with sums of squared velocity errors, whatever the size, for a policy that has moved."""
    objective = DiffusionDpo(tiny(0), tiny(1), DpoConfig(beta_per_element=0.01, anchor=0.0))
    rng = Randomness(3, 0, SLOTS)
    pictures = [rng.uniform(name, (3, *size)) * 2 - 1 for name in ("winner", "loser")]
    batch = replace(batches(0), images=pictures[0], extra={"loser": pictures[1]})
    batch = objective.prepare(batch, rng)
    t, eps = batch.extra["t"].view(-1, 1, 1, 1), batch.extra["eps"]

    def summed(net, x_0):
        x_t = (1 - t) * x_0 + t * eps
        predicted, _ = net(x_t, batch.extra["t"], batch.tokens, batch.mask)
        return ((predicted - x_0) / t.clamp_min(0.05)).square().sum((1, 2, 3))

    with torch.no_grad():
        winner, loser = (summed(objective.denoiser, x) - summed(objective.reference, x) for x in pictures)
        expected = -F.logsigmoid(-0.01 / 2 * (winner - loser)).mean()
        found = objective.loss("denoiser", batch).total
    assert abs(found - math.log(2)) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_winner_and_loser_get_the_same_noise_and_time(tiny, batches) -> None:
    objective, seen = DiffusionDpo(tiny(0), tiny(0), DpoConfig()), []
    for net in (objective.denoiser, objective.reference):
        net.register_forward_pre_hook(lambda _, given: seen.append(given))
    batch = prepared(objective, batches)
    objective.loss("denoiser", batch)
    assert len(seen) == 2
    pictures, noises = torch.cat([batch.images, batch.extra["loser"]]), []
    for x_t, t, tokens, mask in seen:
        assert torch.equal(*t.chunk(2))
        assert torch.equal(*tokens.chunk(2))
        assert torch.equal(*mask.chunk(2))
        noises += ((x_t - (1 - t.view(-1, 1, 1, 1)) * pictures) / t.view(-1, 1, 1, 1)).chunk(2)
    assert len(noises) == 4
    for noise in noises:
        torch.testing.assert_close(noise, batch.extra["eps"], atol=1e-3, rtol=1e-3)


def test_half_precision_starts_at_ln_2_too(tiny, batches) -> None:
    half = TrainConfig(steps=1, batch_size=4, log_every=1, checkpoint_every=1, precision="bf16")
    objective = DiffusionDpo(tiny(0), tiny(0), DpoConfig(anchor=0.0, train=half))
    batch = prepared(objective, batches)
    with autocast(torch.device("cpu"), "bf16"):  # as the loop has it around the loss
        assert objective.loss("denoiser", batch).total.item() == pytest.approx(math.log(2), abs=1e-7)


def test_identical_pictures_give_no_gradient(tiny, batches) -> None:
    objective = DiffusionDpo(tiny(0), tiny(0), DpoConfig(anchor=0.0))
    batch = batches(0)
    ordinary = gradients(objective, objective.prepare(batch, Randomness(0, 0, SLOTS))).norm()
    batch.extra = {"loser": batch.images.clone()}
    assert gradients(objective, objective.prepare(batch, Randomness(0, 0, SLOTS))).norm() < 1e-5 * ordinary


def test_one_step_makes_winners_likelier_and_losers_less_likely(tiny, batches) -> None:
    """Each on its own, with pictures whose gradients do not point the same way."""
    objective = DiffusionDpo(tiny(0), tiny(0), DpoConfig(anchor=0.0))
    batch = batches(0)
    batch = replace(batch, images=batch.images / 4 + 0.6, extra={"loser": batch.extra["loser"] / 4 - 0.6})
    batch = objective.prepare(batch, Randomness(0, 0, SLOTS))
    gradients(objective, batch)
    with torch.no_grad():
        for parameter in objective.denoiser.parameters():
            if parameter.grad is not None:
                parameter -= 1e-5 * parameter.grad
    loss = objective.loss("denoiser", batch)
    assert loss.parts["winner_change"] < 0 < loss.parts["loser_change"]
    assert loss.total < math.log(2)
    assert loss.parts["implicit_accuracy"] > 0.5


def digest(tensors) -> str:
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.replace(".base_layer", "").encode() + value.detach().numpy().tobytes())
    return found.hexdigest()


def base_of(net) -> dict[str, torch.Tensor]:
    return {name: value for name, value in net.state_dict().items() if "lora_" not in name}


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["all weights", "lora"])
def test_training_leaves_the_reference_and_an_adapter_s_base_alone(tiny, batches, tmp_path, lora) -> None:
    denoiser, reference = tiny(0), tiny(0)
    assert digest(base_of(denoiser)) == digest(reference.state_dict())
    if lora is not None:
        add_lora(denoiser, lora, 0)
    start = copy.deepcopy(denoiser.state_dict())
    optimizer = OptimizerConfig(muon_lr=None, adamw_lr=1e-3, warmup_steps=0)
    config = TrainConfig(steps=3, batch_size=4, log_every=1, checkpoint_every=3, optimizer=optimizer)
    objective = DiffusionDpo(denoiser, reference, DpoConfig(train=config))
    trainer = train(objective, batches, config, tmp_path)
    assert trainer.rows[-1]["dpo"] != pytest.approx(math.log(2), abs=1e-4)
    assert digest(reference.state_dict()) == digest(tiny(0).state_dict())
    moved = {name for name, value in denoiser.state_dict().items() if not torch.equal(value, start[name])}
    assert moved
    assert (digest(base_of(denoiser)) == digest(reference.state_dict())) == (lora is not None)
    assert (lora is None) or all("lora_" in name for name in moved)


def rows_of(*rows: tuple[float, float]) -> list[dict[str, float]]:
    """Rows of the log, ten steps each, from the winners' mean change and the share that is worse."""
    return [{"step": 10.0 * (i + 1), "winner_change": mean, "winners_worse": share}
            for i, (mean, share) in enumerate(rows)]  # fmt: skip


def test_the_alarm_asks_for_three_rows_of_worse_winners() -> None:
    better, noise, worse = (-0.1, 0.4), (0.1, 0.57), (0.1, 0.63)  # of 100 pairs: a standard error is .05
    assert winners_fell(rows_of(*[better] * 9), 100) is None
    assert winners_fell(rows_of(*[noise] * 9), 100) is None
    assert winners_fell(rows_of(*[(-0.1, 0.63)] * 9), 100) is None  # a few became much better
    assert winners_fell(rows_of(worse, worse, noise, worse, worse), 100) is None
    assert winners_fell(rows_of(better, worse, worse, worse, worse), 100) == 40
    assert winners_fell(rows_of(*[noise] * 9), 10_000) == 30  # the same share of many more pairs
    assert winners_fell(rows_of(*[worse] * 2), 100) is None


def test_the_log_of_a_run_that_spoils_its_winners_raises_the_alarm(tiny, batches, tmp_path) -> None:
    """A policy that is trained away from both pictures; with a strong anchor on the winners it stays silent."""
    optimizer = OptimizerConfig(muon_lr=None, adamw_lr=2e-3, warmup_steps=0, decay_from=1.0)
    config = TrainConfig(steps=12, batch_size=4, log_every=2, checkpoint_every=12, optimizer=optimizer)

    class Spoiled(DiffusionDpo):
        def loss(self, player, batch):
            found = super().loss(player, batch)
            return replace(found, total=-self._errors(self.denoiser, batch).mean())  # pulls both down

    def found(objective) -> int | None:
        return winners_fell(train(objective, batches, config, tmp_path / type(objective).__name__).rows, 8)

    assert found(Spoiled(tiny(0), tiny(0), DpoConfig(train=config))) is not None
    assert found(DiffusionDpo(tiny(0), tiny(0), DpoConfig(train=config, anchor=4.0))) is None


def test_anchor_is_flow_matching_on_the_winner_in_units_of_half_beta(tiny, batches) -> None:
    config = DpoConfig(beta_per_element=0.2, anchor=0.5)
    objective, plain = (DiffusionDpo(tiny(0), tiny(0), config.model_copy(update={"anchor": a})) for a in (0.5, 0.0))
    batch = prepared(objective, batches)
    winner = objective._errors(objective.denoiser, batch).chunk(2)[0].mean()
    half_beta = 0.2 * batch.images[0].numel() / 2
    added = objective.loss("denoiser", batch).total - plain.loss("denoiser", batch).total
    torch.testing.assert_close(added, 0.5 * half_beta * winner)
