"""The fit of a fused mix in closed form, and that it keeps what a sum spoils."""

import torch
from torch import nn

from models.personalization.fusion import fused, second_moments


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.double().T @ x.double() / len(x)


def near(g: torch.Generator, directions: torch.Tensor, count: int) -> torch.Tensor:
    """Inputs [count, I] in the span of some directions [R, I]."""
    return torch.randn(count, len(directions), generator=g) @ directions


def test_moments_are_those_of_the_layer_s_inputs_and_the_hooks_go() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    x = torch.randn(2, 7, 5)
    found = second_moments(net, ["1"], lambda: (net(x), net(2 * x)))
    seen = torch.cat([net[0](x), net[0](2 * x)]).reshape(-1, 4)
    torch.testing.assert_close(found["1"], moment(seen.detach()))
    assert not net[1]._forward_pre_hooks


def test_apart_inputs_give_each_its_own_change_and_ordinary_ones_none() -> None:
    g = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=g)).Q
    inputs = {name: near(g, basis[4 * i : 4 * i + 4], 50) for i, name in enumerate(("one", "two", "plain"))}
    changes = {name: torch.randn(6, 12, generator=g) for name in ("one", "two")}
    moments = {name: moment(inputs[name]) for name in changes}
    found = fused(changes, moments, moment(inputs["plain"]), ridge=1e-9)
    for name, change in changes.items():
        torch.testing.assert_close(inputs[name] @ found.T, inputs[name] @ change.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(inputs["plain"] @ found.T, torch.zeros(50, 6), atol=1e-4, rtol=0)
    total = sum(changes.values())
    assert (inputs["one"] @ (total - changes["one"]).T).abs().mean() > 0.5  # a sum is off by the other's change


def test_it_is_the_least_squares_optimum_where_inputs_overlap() -> None:
    g = torch.Generator().manual_seed(2)
    inputs = {name: torch.randn(40, 8, generator=g) for name in ("one", "two", "plain")}
    changes = {name: torch.randn(5, 8, generator=g) for name in ("one", "two")}
    moments = {name: moment(inputs[name]) for name in changes}
    ridge, weight = 0.01, 0.5
    found = fused(changes, moments, moment(inputs["plain"]), weight, ridge).double().requires_grad_()
    scale = ridge * (sum(moments.values()) + weight * moment(inputs["plain"])).diagonal().mean()
    loss = sum((inputs[n].double() @ (found - changes[n].double()).T).square().sum() / 40 for n in changes)
    loss = loss + weight * (inputs["plain"].double() @ found.T).square().sum() / 40 + scale * found.square().sum()
    (slope,) = torch.autograd.grad(loss, found)
    assert slope.abs().max() < 1e-5


def test_an_adapter_without_a_change_here_wants_none_on_its_inputs() -> None:
    g = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    one, two = near(g, basis[:4], 30), near(g, basis[4:], 30)
    change = torch.ones(3, 8)
    found = fused({"one": change}, {"one": moment(one), "two": moment(two)}, torch.zeros(8, 8), ridge=1e-9)
    torch.testing.assert_close(one @ found.T, one @ change.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(two @ found.T, torch.zeros(30, 3), atol=1e-4, rtol=0)
