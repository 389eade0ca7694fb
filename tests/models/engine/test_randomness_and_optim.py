import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.ema import PowerEma
from models.engine.muon import Muon, orthogonalise
from models.engine.optim import PlayerOptimizer, rate_factor, split_parameters
from models.engine.randomness import Randomness, derive_seed, shuffled


def test_draws_depend_on_the_slot_not_on_who_draws_it() -> None:
    whole = Randomness(1, 7, (0, 1, 2, 3)).normal("noise", (2, 2))
    parts = [Randomness(1, 7, slots).normal("noise", (2, 2)) for slots in ((0, 1), (2, 3))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, Randomness(1, 8, (0, 1, 2, 3)).normal("noise", (2, 2)))
    assert not torch.equal(whole, Randomness(1, 7, (0, 1, 2, 3)).normal("other", (2, 2)))


def test_stratified_numbers_leave_no_gap_and_are_uniform_one_by_one() -> None:
    slots = tuple(range(12))
    rows = torch.stack([Randomness(3, step, slots).stratified("time") for step in range(2000)])
    ordered = rows.sort(1).values
    gaps = torch.cat([ordered.diff(dim=1), ordered[:, :1] + 1 - ordered[:, -1:]], 1)
    assert gaps.max() < 2 / 12  # independent draws leave a gap of 0.26 on average
    for column in rows.T:
        assert (column.sort().values - torch.linspace(0, 1, 2000)).abs().max() < 1.63 / 2000**0.5  # KS, 1 %
    parts = [Randomness(3, 5, part).stratified("time") for part in (slots[:5], slots[5:])]
    assert torch.equal(torch.cat(parts), rows[5])


def test_derived_seeds_are_stable_across_processes() -> None:
    assert derive_seed(0, "noise", 3, 1) == 1944017832763747053
    assert derive_seed(1, "a") != derive_seed(1, "b")


def test_every_epoch_shows_every_row_once_in_an_order_of_its_own() -> None:
    rows = shuffled(3, "rows", 7, range(21)).tolist()
    epochs = [rows[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert shuffled(3, "rows", 7, [13, 2]).tolist() == [rows[13], rows[2]]
    assert shuffled(3, "others", 7, range(21)).tolist() != rows


def test_learning_rate_warms_up_stays_and_falls() -> None:
    config = OptimizerConfig(warmup_steps=10, decay_from=0.5, final_ratio=0.01)
    factors = [rate_factor(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:51] == [1.0] * 41
    assert factors[-1] == pytest.approx(0.01)
    assert all(a >= b for a, b in pairwise(factors[50:]))


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    stack = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(stack))
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(2, 16, 40), (2, 40, 16), (2, 16, 16)])
def test_newton_schulz_on_the_gram_matrix_is_newton_schulz(shape) -> None:
    """Oracle: X <- a X + b (X X^T) X + c (X X^T)^2 X, five times, on the matrices themselves, in double precision."""
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = stack.double() / stack.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
    torch.testing.assert_close(orthogonalise(stack).double(), x, atol=2e-4, rtol=0)


def test_muon_moves_as_torch_muon_does_up_to_its_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 20, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.02)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(12, 20, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved


def test_only_hidden_matrices_go_to_muon(tiny) -> None:
    matrices, others = split_parameters(tiny(0))
    assert len(matrices) == 3 * 6  # qkv, text kv, out, gate, up, down of each block
    assert all(p.ndim == 2 for p in matrices)
    assert others


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    optimizer = PlayerOptimizer(layer, OptimizerConfig(muon_lr=None), 10)
    layer.weight.grad = torch.full_like(layer.weight, math.nan)
    _, moved = optimizer.step(0)
    assert not moved
    assert torch.equal(layer.weight, before)


def test_power_ema_equals_the_written_out_sum() -> None:
    layer = nn.Linear(1, 1, bias=False)
    ema = PowerEma(layer, gamma=3.0)
    expected = layer.weight.item()
    for k, value in enumerate([2.0, -1.0, 0.5], start=1):
        with torch.no_grad():
            layer.weight.fill_(value)
        ema.update()
        beta = (1 - 1 / (k + 1)) ** 3
        expected = beta * expected + (1 - beta) * value
    assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-5)


def test_checkpoints_between_log_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint_every=50 is not a multiple of log_every=20"):
        TrainConfig(log_every=20, checkpoint_every=50)
