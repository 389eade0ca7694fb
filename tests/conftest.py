"""Tiny random pipelines of the real families, made here: byte-level CLIP tokenizers, random encoders, a random VAE."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def clip_tokenizer(folder: Path) -> Any:
    import tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def clip(seed: int) -> Any:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, projection_dim=16, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )
    ).eval()  # fmt: skip


def tiny_vae(seed: int = 3) -> Any:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, layers_per_block=1, scaling_factor=0.7, shift_factor=0.1,
    ).eval()  # fmt: skip


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory) -> Path:
    """A StableDiffusion3Pipeline without T5 that draws 16 x 16 px, static shift 3."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    root = tmp_path_factory.mktemp("sd3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
            pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
        ).eval()  # fmt: skip
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(),
            text_encoder=clip(1), text_encoder_2=clip(2), text_encoder_3=None, tokenizer=clip_tokenizer(root / "t"),
            tokenizer_2=clip_tokenizer(root / "t"), tokenizer_3=None,
        )  # fmt: skip
    pipeline.save_pretrained(root / "pipeline")
    return root / "pipeline"


@pytest.fixture(scope="session")
def vae() -> Callable[[], Any]:
    return tiny_vae


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A random CLIP of 16 features that sees 16 x 16 px."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    root = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": 514, "max_position_embeddings": 16, "bos_token_id": 512, "eos_token_id": 513,
                    "pad_token_id": 513}  # fmt: skip
    vision = small | {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(root / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, clip_tokenizer(root / "t")).save_pretrained(root / "clip")
    return root / "clip"


@pytest.fixture(scope="session")
def mask2former_folder(tmp_path_factory) -> Callable[..., Path]:
    """A random Mask2Former of 6 queries that knows the given names; the same names give the same folder."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*names: str) -> Path:
        import torch
        from transformers import (
            Mask2FormerConfig,
            Mask2FormerForUniversalSegmentation,
            Mask2FormerImageProcessorPil,
            SwinConfig,
        )

        if names not in made:
            made[names] = folder = tmp_path_factory.mktemp("mask2former")
            swin = SwinConfig(
                image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
                out_features=["stage1", "stage2", "stage3", "stage4"],
            )  # fmt: skip
            config = Mask2FormerConfig(
                backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
                encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=6,
                id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
            Mask2FormerImageProcessorPil(size={"height": 64, "width": 64}, size_divisor=32).save_pretrained(folder)
        return made[names]

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[[Path], Any]:
    """A CLIP tokenizer of single bytes, made in a folder."""
    return clip_tokenizer
