"""Two small networks that say whether a picture shows what its prompt asked for.

The colour judge reads RGB and names layout, objects and background; the shape judge reads one centred, scaled channel
and names the objects from their outline alone. Both may refuse a picture. A picture is right (strict) only when every
head of both names the truth and neither refuses, so right colours at the right place do not pass for shape.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.errors import ArtifactCorrupted
from models.device import compute_device

SIDE = 32
LUMA = (0.299, 0.587, 0.114)
PAIRS = ("beside", "above")  # layouts that hold two named objects
BATCH = 256


class SceneLike(Protocol):
    """What a judge needs to know about a scene."""

    @property
    def layout(self) -> str:
        """Name of the arrangement."""

    @property
    def objects(self) -> tuple[str, ...]:
        """One name, or two where the layout holds two objects."""

    @property
    def background(self) -> str:
        """Name of the background colour."""


@dataclass(frozen=True)
class Vocabulary:
    """The names the heads choose from, in head order."""

    objects: tuple[str, ...]
    layouts: tuple[str, ...]
    backgrounds: tuple[str, ...]

    @classmethod
    def of(cls, scenes: Sequence[SceneLike]) -> Vocabulary:
        """Every name that occurs in the scenes, sorted."""
        objects = sorted({name for scene in scenes for name in scene.objects})
        layouts, backgrounds = {scene.layout for scene in scenes}, {scene.background for scene in scenes}
        return cls(tuple(objects), tuple(sorted(layouts)), tuple(sorted(backgrounds)))

    def labels(self, scenes: Sequence[SceneLike]) -> dict[str, Tensor]:
        """Class numbers [N] of each head; -1 where the scene has no second object or the name is unknown."""

        def index(names: tuple[str, ...], name: str) -> int:
            return names.index(name) if name in names else -1

        rows = [
            (index(self.layouts, s.layout), index(self.objects, s.objects[0]),
             index(self.objects, s.objects[-1]) if s.layout in PAIRS else -1, index(self.backgrounds, s.background))
            for s in scenes
        ]  # fmt: skip
        columns = torch.tensor(rows, dtype=torch.int64).view(-1, 4).unbind(1)
        return dict(zip(("layout", "object_1", "object_2", "background"), columns, strict=True))


def _block(inside: int, outside: int, stride: int, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())


class JudgeNetwork(nn.Module):
    """Convolutions down to 4x4, one feature vector, and one linear head per question."""

    def __init__(self, channels: int, heads: dict[str, int], width: int, feature_size: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            _block(channels, width, 2, 5), _block(width, 2 * width, 1), _block(2 * width, 3 * width, 2),
            _block(3 * width, 3 * width, 1), _block(3 * width, 4 * width, 2), nn.Flatten(),
            nn.Linear(4 * width * 16, feature_size), nn.BatchNorm1d(feature_size), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(feature_size, size) for name, size in heads.items()})

    def features(self, pictures: Tensor) -> Tensor:
        """Penultimate features [B, F] of pictures [B, C, 32, 32]."""
        return self.trunk(pictures)  # type: ignore[no-any-return]

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits of every head."""
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}


def shape_channel(pictures: Tensor, mix: Tensor) -> Tensor:
    """One channel [B, 1, H, W] of RGB [B, 3, H, W] mixed by [B, 3], less its median, divided by its deviation."""
    mixed = torch.einsum("bchw,bc->bhw", pictures, mix)
    centred = mixed - mixed.flatten(1).median(1).values.view(-1, 1, 1)
    return (centred / (centred.flatten(1).std(1).view(-1, 1, 1) + 0.02))[:, None]


def luma_channel(pictures: Tensor) -> Tensor:
    """The shape judge's input at test time."""
    return shape_channel(pictures, pictures.new_tensor(LUMA).expand(pictures.shape[0], 3))


def area_average(images: np.ndarray, side: int) -> np.ndarray:
    """Square pictures uint8 [N, S, S, 3] averaged by area down to [N, side, side, 3]."""
    _, height, width, channels = images.shape
    if height != width or height < side or channels != 3:
        raise ValueError(f"pictures are {width}x{height}x{channels}; the judge reads RGB squares of {side} px or more")
    if height == side:
        return images
    edges = np.arange(side + 1) * height / side
    low, high = edges[:-1, None], edges[1:, None]
    cells = np.arange(height)[None]
    weights = np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, 1) * side / height  # [side, S]
    averaged = np.einsum("ih,nhwc,jw->nijc", weights, images.astype(np.float32), weights, optimize=True)
    small: np.ndarray = np.clip(np.rint(averaged), 0, 255).astype(np.uint8)
    return small


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [N, S, S, 3] as float [N, 3, 32, 32] in 0..1."""
    small = area_average(images, SIDE)
    return torch.from_numpy(np.ascontiguousarray(small.transpose(0, 3, 1, 2))).float() / 255


@dataclass
class Judge:
    """Both networks with the vocabulary they were trained on."""

    colour: JudgeNetwork
    shape: JudgeNetwork
    vocabulary: Vocabulary
    settings: dict[str, Any]
    calibration: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(cls, vocabulary: Vocabulary, width: int, feature_size: int, reject_above: float) -> Judge:
        """An untrained judge."""
        objects = {"object_1": len(vocabulary.objects), "object_2": len(vocabulary.objects)}
        places = {"layout": len(vocabulary.layouts), "background": len(vocabulary.backgrounds)}
        return cls(
            JudgeNetwork(3, places | objects | {"reject": 1}, width, feature_size),
            JudgeNetwork(1, objects | {"reject": 1}, width, feature_size),
            vocabulary,
            {"width": width, "feature_size": feature_size, "reject_above": reject_above},
        )

    def save(self, folder: Path) -> None:
        """Write judge.safetensors and judge.json."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"colour.{k}": v for k, v in self.colour.state_dict().items()}
        tensors |= {f"shape.{k}": v for k, v in self.shape.state_dict().items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "judge.safetensors")
        record = {"vocabulary": asdict(self.vocabulary), "settings": self.settings, "calibration": self.calibration}
        (folder / "judge.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read what `save` wrote."""
        try:
            record = json.loads((folder / "judge.json").read_text())
            tensors = load_file(folder / "judge.safetensors")
        except (OSError, ValueError) as error:
            raise ArtifactCorrupted(f"judge in {folder} cannot be read ({error}); run the judge stage again") from error
        names = {k: tuple(v) for k, v in record["vocabulary"].items()}
        judge = cls.build(Vocabulary(**names), **record["settings"])
        for prefix, network in (("colour.", judge.colour), ("shape.", judge.shape)):
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            network.to(compute_device()).eval()
        judge.calibration = record["calibration"]
        return judge

    @property
    def device(self) -> torch.device:
        """Where both networks are."""
        return next(self.colour.parameters()).device

    @torch.inference_mode()
    def logits(self, images: np.ndarray) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Logits of the colour and of the shape judge for uint8 [N, S, S, 3]."""
        self.colour.eval(), self.shape.eval()
        colour, shape = [], []
        for start in range(0, len(images), BATCH):
            pictures = to_float(images[start : start + BATCH]).to(self.device)
            colour.append(self.colour(pictures))
            shape.append(self.shape(luma_channel(pictures)))
        return _join(colour), _join(shape)

    def score(self, images: np.ndarray, scenes: Sequence[SceneLike]) -> dict[str, np.ndarray]:
        """Per picture: are layout, object, background and shape right, does it pass unrefused, and is `all` right."""
        if len(images) != len(scenes):
            raise ValueError(f"{len(images)} pictures but {len(scenes)} scenes; give one scene per picture")
        truth = self.vocabulary.labels(scenes)
        colour, shape = self.logits(images)

        def right(logits: dict[str, Tensor], head: str) -> Tensor:
            return logits[head].argmax(1) == truth[head]

        def objects(logits: dict[str, Tensor]) -> Tensor:
            single = torch.tensor([scene.layout not in PAIRS for scene in scenes], dtype=torch.bool)
            return right(logits, "object_1") & (single | right(logits, "object_2"))

        limit = self.settings["reject_above"]
        accepted = [torch.sigmoid(logits["reject"][:, 0]) <= limit for logits in (colour, shape)]
        verdict = {
            "layout": right(colour, "layout"), "object": objects(colour), "background": right(colour, "background"),
            "shape": objects(shape) & accepted[1], "accepted": accepted[0] & accepted[1],
        }  # fmt: skip
        verdict["all"] = torch.stack(list(verdict.values())).all(0)
        return {name: value.numpy() for name, value in verdict.items()}

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Penultimate features of the colour judge, float32 [N, F]: the space of kernel distance and diversity."""
        self.colour.eval()
        starts = range(0, len(images), BATCH)
        parts = [self.colour.features(to_float(images[start : start + BATCH]).to(self.device)) for start in starts]
        return torch.cat(parts).cpu().numpy() if parts else np.zeros((0, self.settings["feature_size"]), np.float32)


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
