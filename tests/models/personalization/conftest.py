"""A tiny random SD3 transformer of stock diffusers, and LoRA and DoRA adapters on it."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel

from models.engine.distribute import one_thread
from models.personalization.lora_files import Adapter, from_module

TARGETS = ["to_q", "to_k", "add_v_proj", "to_out.0", "ff.net.0.proj", "proj_out"]
VARIANTS = {
    "alpha-r": {"r": 4, "lora_alpha": 4},
    "alpha-4r": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "mixed": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2, "ff.net.0.proj": 3}, "alpha_pattern": {"to_k": 5},
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    """With two threads the rounding of equal arithmetic depends on where tensors lie (1.5e-7 seen)."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def base() -> Callable[[], SD3Transformer2DModel]:
    return _base


@pytest.fixture(scope="session")
def lora_settings() -> Callable[[str], dict[str, Any]]:
    """peft's arguments of a variant."""
    return lambda variant: {"target_modules": TARGETS, **VARIANTS[variant]}


@pytest.fixture(scope="session")
def adapted() -> Callable[..., SD3Transformer2DModel]:
    """The base with an adapter of a variant: random, or fresh and without effect."""
    return _adapted


@pytest.fixture(scope="session")
def adapter() -> Callable[..., Adapter]:
    about = {"base": "sha256:0123", "trigger": "zwx"}
    return lambda variant="alpha-r", seed=2: from_module(_adapted(variant, seed=seed), about)


def _base() -> SD3Transformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
        ).eval()  # fmt: skip


def _adapted(variant: str = "alpha-r", fresh: bool = False, seed: int = 2) -> SD3Transformer2DModel:
    module = _base()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS, **VARIANTS[variant]), module)
        for name, parameter in module.named_parameters():
            if ".lora_B." in name and not fresh:
                torch.nn.init.normal_(parameter, std=0.1)
            if ".lora_magnitude_vector." in name and not fresh:
                parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape))
    return module


@pytest.fixture(scope="session")
def draw() -> Callable[[Any], torch.Tensor]:
    """What a transformer predicts from fixed noise."""
    return _draw


def _draw(module: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 64)}
    noise = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    with torch.no_grad():
        found: torch.Tensor = module(**noise, timestep=torch.tensor([900.0, 300.0])).sample
    return found
