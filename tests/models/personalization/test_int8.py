"""A frozen base in 8 bits: how far off it is, what learns on it, and that what is saved knows nothing of it."""

import pytest
import torch
from torch import nn

from models.networks import prx
from models.networks.config import LoraConfig, PrxConfig
from models.networks.denoiser import Denoiser
from models.personalization import lora_files
from models.personalization.int8 import Int8Linear, quantise
from models.personalization.lora import add_lora, merge

SMALL = PrxConfig(hidden_size=32, depth=2, num_heads=2, patch_size=4, text_dim=16)


def denoiser() -> Denoiser:
    net = prx.build(SMALL, torch.zeros(16), torch.ones(16), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return net


def asked(net: Denoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x, tokens = torch.randn(2, 3, 16, 16, generator=generator), torch.randn(2, 3, 16, generator=generator)
    return net(x, torch.tensor([0.3, 0.8]), tokens, torch.ones(2, 3, dtype=torch.bool))[0]


def test_a_weight_is_off_by_at_most_half_a_step_of_its_row() -> None:
    layer = nn.Linear(64, 8)
    with torch.no_grad():
        layer.weight[0] = 0
    small = Int8Linear(layer)
    step = layer.weight.abs().amax(1, keepdim=True) / 127
    assert ((small.weight - layer.weight).abs() <= step / 2 + 1e-7).all()
    assert small.codes.dtype == torch.int8
    assert small.codes.abs().amax(1)[1:].eq(127).all()
    x = torch.randn(5, 64)
    assert torch.equal(small(x), nn.functional.linear(x, small.weight, layer.bias))
    assert torch.equal(small.state_dict()["weight"], small.weight)
    assert not list(small.parameters()) or [name for name, _ in small.named_parameters()] == ["bias"]


def test_blocks_need_less_than_half_of_the_memory_and_draw_nearly_the_same() -> None:
    whole, small = denoiser(), denoiser()
    quantise(small.transformer)
    layers = [m for m in small.transformer.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == sum(type(m) is nn.Linear for b in whole.transformer.blocks for m in b.modules())
    held = sum(layer.codes.numel() + 4 * layer.scale.numel() for layer in layers)
    assert held < 0.4 * sum(4 * layer.codes.numel() for layer in layers)  # rows of 16 to 112 have a scale each
    apart = ((asked(small) - asked(whole)).norm() / asked(whole).norm()).detach()
    assert 0 < float(apart) < 0.02


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_the_adapter_learns_and_it_is_merged_into_the_bases_own_weights(kind: str) -> None:
    base, tuned = denoiser(), denoiser()
    add_lora(tuned, LoraConfig(kind=kind, rank=2, base="int8"), 0)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        asked(tuned).square().mean().backward()
        optimizer.step()
    adapter, own = lora_files.from_module(tuned.transformer, {}), lora_files.stock_weights(base.transformer)
    merged = lora_files.stock_weights(merge(tuned, base).transformer)
    assert any(float((b @ a).abs().max()) > 0 for a, b in adapter.layers.values())
    for name, weight in own.items():
        layer = name.removesuffix(".weight")
        change = adapter.change(layer, weight) if layer in adapter.layers else 0
        assert torch.equal(merged[name], weight + change)


def test_what_holds_no_blocks_or_moves_the_base_is_refused() -> None:
    with pytest.raises(ValueError, match="this network has none"):
        quantise(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="pissa moves part of the base"):
        LoraConfig(init="pissa", base="int8")
