"""Training of the judge: real renders with harmless changes are accepted, renders without shape are refused."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.engine.distribute import one_thread
from models.evaluation import corruptions as corrupt
from models.evaluation.config import JudgeConfig
from models.evaluation.judge import Judge, JudgeNetwork, SceneLike, Vocabulary, shape_channel, to_float

Draw = Callable[[int, int], tuple[np.ndarray, Sequence[SceneLike]]]  # (count, seed) -> uint8 [N, S, S, 3], scenes
Progress = Callable[[int, int, Mapping[str, float]], None]
Kind = Literal["colour", "shape"]


def perturb(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Changes that leave a picture right: a pixel's shift, slight bends, brightness, mild blur and noise."""
    b, c, h, w = pictures.shape
    bent = corrupt.wobble(pictures[: b // 4], 0.4, 7, generator)
    pictures = torch.cat([bent, pictures[b // 4 :]])
    shift = torch.randint(-1, 2, (2, b, 1, 1), generator=generator)
    pictures = corrupt.gather_pixels(pictures, torch.arange(h).view(1, h, 1) + shift[0] + 0 * torch.arange(w),
                                     torch.arange(w) + shift[1] + 0 * torch.arange(h).view(1, h, 1))  # fmt: skip
    pictures = corrupt.gaussian_blur(pictures, corrupt.uniform(0.01, 0.45, (b,), generator))
    gain = corrupt.uniform(0.94, 1.06, (b, 1, 1, 1), generator)
    offset = corrupt.uniform(-0.03, 0.03, (b, c, 1, 1), generator)
    noise = torch.randn((b, c, h, w), generator=generator) * corrupt.uniform(0, 0.035, (b, 1, 1, 1), generator)
    coarse = torch.randn((b, c, h // 2, w // 2), generator=generator)  # the faint texture that patch networks leave
    coarse = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise = noise + coarse * corrupt.uniform(0, 0.03, (b, 1, 1, 1), generator)
    return (pictures * gain + offset + noise).clamp(0, 1)


def jpeg(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every picture compressed and read again at a quality of 70 to 95."""
    out = np.empty_like(images)
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(70, 96)), subsampling=0)
        out[i] = np.asarray(Image.open(buffer))
    return out


class Partners:
    """For each picture another one of the same layout and background with other objects."""

    def __init__(self, scenes: Sequence[SceneLike]) -> None:
        self.objects = [scene.objects for scene in scenes]
        self.groups = [(scene.layout, scene.background) for scene in scenes]
        self.members: dict[tuple[str, str], list[int]] = defaultdict(list)
        for i, group in enumerate(self.groups):
            self.members[group].append(i)

    def pick(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Row numbers of the partners; a picture alone in its group is its own partner's neighbour in the list."""
        picks = []
        for row in rows.tolist():
            others = self.members[self.groups[row]]
            start = int(torch.randint(len(others), (1,), generator=generator))
            ring = (others[(start + step) % len(others)] for step in range(len(others)))
            different = (other for other in ring if not set(self.objects[other]) & set(self.objects[row]))
            picks.append(next(different, (row + 1) % len(self.groups)))
        return torch.tensor(picks)


def halves(first: Tensor, second: Tensor, scenes: Sequence[SceneLike], generator: torch.Generator) -> Tensor:
    """Half of each object: cut through the middle of the objects, across the axis that would leave them whole."""
    b, _, side, _ = first.shape
    sideways = torch.rand((b,), generator=generator) < 0.5
    cut = torch.full((b,), 0.5)
    for i, scene in enumerate(scenes):
        match scene.layout:
            case "beside":
                sideways[i] = False
            case "above" | "three":
                sideways[i] = True
            case "big":
                pass
            case corner:
                vertical, horizontal = corner.split()
                near = horizontal == "left" if bool(sideways[i]) else vertical == "top"
                cut[i] = 0.27 if near else 0.73
    cut = cut * side + corrupt.uniform(-1, 1, (b,), generator)
    return corrupt.join_halves(first, second, cut, sideways, corrupt.uniform(0.15, 1.0, (b,), generator))


def negatives(pictures: Tensor, partners: Tensor, scenes: Sequence[SceneLike], generator: torch.Generator) -> Tensor:
    """Pictures that must be refused: the batch split over all corruptions."""

    def shuffled(patch: int) -> Callable[[Tensor], Tensor]:
        return lambda x: corrupt.shuffle_patches(x, patch, generator)

    def displaced(patch: int, reach: int) -> Callable[[Tensor], Tensor]:
        return lambda x: corrupt.displace_patches(x, patch, reach, generator)

    def blurred(x: Tensor) -> Tensor:
        return corrupt.gaussian_blur(x, corrupt.uniform(1.1, 3.0, (x.shape[0],), generator))

    kinds: list[Callable[[Tensor], Tensor]] = [
        shuffled(2), shuffled(4), shuffled(4), shuffled(8), lambda x: corrupt.coarsen(x, 4, True),
        lambda x: corrupt.coarsen(x, 2, True), lambda x: corrupt.coarsen(x, 4, False),
        lambda x: corrupt.coarsen(x, 2, False),
        blurred, displaced(4, 3), displaced(4, 2), displaced(8, 3), displaced(2, 2),
        lambda x: corrupt.wobble(x, 1.6, 7, generator),
    ]  # fmt: skip
    b = pictures.shape[0]
    joined = max(1, b // 8)
    out = [
        halves(pictures[:joined], partners[:joined], scenes[:joined], generator),
        corrupt.blend(pictures[joined : 2 * joined], partners[joined : 2 * joined],
                      corrupt.uniform(0.35, 0.65, (max(0, min(joined, b - joined)),), generator)),
    ]  # fmt: skip
    rest = torch.arange(2 * joined, b)
    start = int(torch.randint(len(kinds), (1,), generator=generator))
    for i, rows in enumerate(torch.tensor_split(rest, len(kinds))):
        if len(rows):
            out.append(kinds[(start + i) % len(kinds)](pictures[rows]))
    return torch.cat(out)


def _loss(logits: dict[str, Tensor], labels: Mapping[str, Tensor], positives: int) -> tuple[Tensor, float]:
    total = logits["reject"].new_zeros(())
    for name in logits.keys() & labels.keys():
        total = total + F.cross_entropy(logits[name][:positives], labels[name], ignore_index=-1, label_smoothing=0.05)
    refused = torch.zeros(len(logits["reject"]))
    refused[positives:] = 1
    reject = F.binary_cross_entropy_with_logits(logits["reject"][:, 0], refused)
    return total + 3 * reject, float(reject.detach())


def train_network(
    kind: Kind,
    images: np.ndarray,
    scenes: Sequence[SceneLike],
    vocabulary: Vocabulary,
    config: JudgeConfig,
    progress: Progress,
) -> JudgeNetwork:
    """One of the two networks, trained on one thread so that the result does not depend on the machine's cores."""
    with one_thread():
        return _train_network(kind, images, scenes, vocabulary, config, progress)


def _train_network(
    kind: Kind,
    images: np.ndarray,
    scenes: Sequence[SceneLike],
    vocabulary: Vocabulary,
    config: JudgeConfig,
    progress: Progress,
) -> JudgeNetwork:
    generator = torch.Generator().manual_seed(config.seed * 2 + (kind == "shape"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed * 2 + (kind == "shape"))
        judge = Judge.build(vocabulary, config.width, config.feature_size, config.reject_above)
    network = judge.colour if kind == "colour" else judge.shape
    network.train()
    pool, labels, partners = to_float(images), vocabulary.labels(scenes), Partners(scenes)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=0.02)
    half = config.batch_size // 2
    for step in range(config.updates):
        warmth = min(1.0, (step + 1) / max(1, config.updates // 20))
        rate = config.learning_rate * warmth * 0.5 * (1 + math.cos(math.pi * step / config.updates))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(pool), (2 * half,), generator=generator)
        good, bad = rows[:half], rows[half:]
        broken = negatives(pool[bad], pool[partners.pick(bad, generator)], [scenes[int(i)] for i in bad], generator)
        batch = perturb(torch.cat([pool[good], broken]), generator)
        if kind == "shape":
            mix = -torch.log(torch.rand((len(batch), 3), generator=generator).clamp(min=1e-6))  # Dirichlet(1, 1, 1)
            batch = shape_channel(batch, mix / mix.sum(1, keepdim=True))
        logits = network(batch.contiguous(memory_format=torch.channels_last))
        loss, reject = _loss(logits, {name: value[good] for name, value in labels.items()}, half)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == config.updates - 1:
            progress(step + 1, config.updates, {"loss": float(loss.detach()), "reject": reject})
    return network.eval()


def with_jpeg(images: np.ndarray, seed: int) -> np.ndarray:
    """The pool with every tenth picture JPEG-compressed."""
    images = images.copy()
    images[::10] = jpeg(images[::10], np.random.default_rng([seed, 1]))
    return images


def assemble(colour: JudgeNetwork, shape: JudgeNetwork, vocabulary: Vocabulary, config: JudgeConfig) -> Judge:
    """A judge of two trained networks."""
    judge = Judge.build(vocabulary, config.width, config.feature_size, config.reject_above)
    judge.colour, judge.shape = colour, shape
    return judge


def train_judge(draw: Draw, config: JudgeConfig, seed: int, progress: Progress) -> Judge:
    """Render, train both networks one after the other and write the calibration figures into the judge."""
    config = config.model_copy(update={"seed": seed})
    images, scenes = draw(config.pictures, config.seed)
    images = with_jpeg(images, config.seed)
    vocabulary = Vocabulary.of(scenes)
    colour = train_network("colour", images, scenes, vocabulary, config, progress)
    shape = train_network("shape", images, scenes, vocabulary, config, progress)
    judge = assemble(colour, shape, vocabulary, config)
    judge.calibration = calibrate(judge, *draw(config.calibration_pictures, seed + 1_000_003), seed)
    return judge


def calibrate(judge: Judge, images: np.ndarray, scenes: Sequence[SceneLike], seed: int) -> dict[str, float]:
    """Share of fresh real pictures, and of corrupted ones, that the judge calls right on every head."""
    generator = torch.Generator().manual_seed(seed)
    real = to_float(images)
    partners = real[Partners(scenes).pick(torch.arange(len(real)), generator)]
    cases = {
        "real": real,
        "real_mildly_changed": perturb(real, generator),
        "shuffled_2x2": corrupt.shuffle_patches(real, 2, generator),
        "shuffled_4x4": corrupt.shuffle_patches(real, 4, generator),
        "shuffled_8x8": corrupt.shuffle_patches(real, 8, generator),
        "blurred_2x": corrupt.coarsen(real, 2, True),
        "blurred_4x": corrupt.coarsen(real, 4, True),
        "displaced_3px": corrupt.displace_patches(real, 4, 3, generator),
        "displaced_2px": corrupt.displace_patches(real, 4, 2, generator),
        "half_objects": halves(real, partners, scenes, generator),
        "blended": corrupt.blend(real, partners, torch.full((len(real),), 0.5)),
        "warped": corrupt.wobble(real, 1.6, 7, generator),
    }
    figures = {}
    for name, pictures in cases.items():
        pixels = (pictures.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        figures[name] = round(float(judge.score(pixels, scenes)["all"].mean()), 4)
    return figures
