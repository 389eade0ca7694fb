"""bfloat16 on a CPU: the products of linear layers, forward and backward, and nothing else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.engine.precision import autocast, half_linear

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_a_product_is_of_rounded_numbers_and_so_are_its_gradients(shape: tuple[int, ...]) -> None:
    x, weight, bias = numbers(*shape).requires_grad_(), numbers(8, 16, seed=1).requires_grad_(), numbers(8, seed=2)
    out = half_linear(x, weight, bias)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.linear(rounded(x), rounded(weight), bias), rtol=2**-8, atol=1e-6)
    g = numbers(*out.shape, seed=3)
    out.backward(g)
    flat = rounded(g).flatten(0, -2)
    torch.testing.assert_close(x.grad, (flat @ rounded(weight)).view(shape), rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(weight.grad, flat.T @ rounded(x).flatten(0, -2), rtol=2**-8, atol=1e-6)


def test_a_block_computes_linear_layers_so_and_leaves_the_rest_alone() -> None:
    layer, x = nn.Linear(16, 8), numbers(4, 16)
    plain = layer(x).detach()
    with autocast(CPU, "bf16"):
        half = layer(x).detach()
        assert torch.equal(x @ layer.weight.T, x @ layer.weight.T)
        assert (x @ layer.weight.T).dtype == torch.float32
        attended = F.scaled_dot_product_attention(x[None], x[None], x[None])
        assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))
    assert torch.equal(attended, F.scaled_dot_product_attention(x[None], x[None], x[None]))
    assert 0 < float((half - plain).abs().max()) < 0.05
    with autocast(CPU, "fp32"):
        assert torch.equal(layer.float()(x), plain)


def test_a_gradient_of_a_gradient_is_there() -> None:
    """R1 penalties: d/dW of |d out / dx|^2 summed is 2 n W for one output a row, all rounded."""
    x, weight = numbers(4, 16).requires_grad_(), numbers(1, 16, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(half_linear(x, weight).sum(), x, create_graph=True)
    first.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * 4 * rounded(weight), rtol=2**-7, atol=1e-6)
