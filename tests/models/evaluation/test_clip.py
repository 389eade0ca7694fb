"""The CLIP with a gradient sees what the stock processor sees; colours are told by the pixels of an object alone."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor
from transformers.image_utils import PILImageResampling

from infra.errors import ConfigError
from models.evaluation.clip import Clip, Preprocess, centre
from models.evaluation.colours import Colours, crop
from models.evaluation.config import ClipConfig
from models.evaluation.geneval import COLOURS, Found


def processor(side: int, cut: int, resample: int = PILImageResampling.BICUBIC, **more) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": cut, "width": cut}, resample=resample, **more
    )


def as_tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("resample", [PILImageResampling.BICUBIC, PILImageResampling.BILINEAR])
@pytest.mark.parametrize(
    ("side", "cut", "shape"),
    [(16, 16, (40, 40)), (64, 64, (32, 32)), (224, 224, (512, 512)), (16, 24, (20, 17)), (15, 10, (30, 64))],
)
def test_pixels_are_the_stock_processors_to_the_rounding_of_levels(side, cut, shape, resample) -> None:
    """White noise, the worst case: Pillow rounds to levels of 255 after each pass, this does not."""
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    stock = processor(side, cut, resample)
    want = torch.from_numpy(np.stack(stock(images=[Image.fromarray(i) for i in images])["pixel_values"]))
    got = Preprocess.of(stock)(as_tensor(images))
    levels = (got - want) * torch.tensor(stock.image_std).view(1, 3, 1, 1) * 255
    assert got.shape == want.shape
    assert levels.abs().max() < 1.2
    assert levels.abs().mean() < 0.4


def test_without_resizing_the_pixels_are_equal() -> None:
    stock = processor(16, 16, do_resize=False)
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 19, 3), dtype=np.uint8)
    want = np.stack(stock(images=[Image.fromarray(i) for i in images])["pixel_values"])
    np.testing.assert_allclose(Preprocess.of(stock)(as_tensor(images)), want, atol=1e-6)


def test_the_middle_is_padded_as_stock_does_it() -> None:
    stock = processor(9, 12)
    image = np.full((9, 13, 3), 255, np.uint8)
    want = np.stack(stock(images=[Image.fromarray(image)])["pixel_values"])
    np.testing.assert_allclose(Preprocess.of(stock)(as_tensor(image[None])), want, atol=1e-5)
    assert centre(torch.ones(1, 1, 4, 4), 2, 6).sum() == 8


def test_the_gradient_is_that_of_finite_differences() -> None:
    steps = Preprocess.of(processor(6, 5))

    x = torch.rand(1, 3, 8, 9, generator=torch.Generator().manual_seed(0)) - 0.5  # inside, where nothing is clipped
    weights = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))

    def value(pictures: torch.Tensor) -> float:
        return float((steps(pictures).double() * weights).sum())

    leaf = x.clone().requires_grad_()
    (steps(leaf) * weights).sum().backward()
    assert leaf.grad is not None
    for place in [(0, 0, 4, 4), (0, 1, 0, 5), (0, 2, 7, 3)]:
        moved = torch.zeros_like(x)
        moved[place] = 0.05
        slope = (value(x + moved) - value(x - moved)) / 0.1
        assert float(leaf.grad[place]) == pytest.approx(slope, abs=2e-4)


def test_other_processors_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not scale to 0..1"):
        Preprocess.of(processor(16, 16, do_normalize=False))
    with pytest.raises(ConfigError, match="bicubic or bilinear are known"):
        Preprocess.of(processor(16, 16, PILImageResampling.LANCZOS))


def test_features_are_stock_and_reach_the_picture(clip_folder) -> None:
    clip = Clip(ClipConfig(model=str(clip_folder)))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)  # its own side: no resizing
    texts = ["a", "a cat", "x" * 60]  # the last is cut
    stock, reader = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    asked = reader(images=[Image.fromarray(i) for i in images], text=texts, return_tensors="pt", padding=True,
                   truncation=True, max_length=16)  # fmt: skip
    with torch.no_grad():
        want = stock(**asked)
    pictures = as_tensor(images).requires_grad_()
    torch.testing.assert_close(clip.features(pictures), want.image_embeds, atol=2e-5, rtol=0)
    torch.testing.assert_close(
        clip.of_images([Image.fromarray(i) for i in images]), want.image_embeds, atol=2e-5, rtol=0
    )
    torch.testing.assert_close(clip.texts(texts), want.text_embeds, atol=2e-5, rtol=0)
    assert clip.scale == pytest.approx(float(stock.logit_scale.detach().exp()))
    (clip.features(pictures) * want.text_embeds).sum().backward()
    assert pictures.grad is not None
    assert (pictures.grad.abs().amax((1, 2, 3)) > 0).all()
    assert not any(p.requires_grad for p in clip.model.parameters())


def test_weights_stored_in_halves_are_read_in_full(clip_folder, tmp_path) -> None:
    shutil.copytree(clip_folder, tmp_path / "half")
    CLIPModel.from_pretrained(clip_folder).half().save_pretrained(tmp_path / "half")
    pictures = as_tensor(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)).requires_grad_()
    full, half = (Clip(ClipConfig(model=str(folder))) for folder in (clip_folder, tmp_path / "half"))
    torch.testing.assert_close(half.features(pictures), full.features(pictures), atol=5e-3, rtol=0)
    torch.testing.assert_close(half.texts(["a"]), full.texts(["a"]), atol=5e-3, rtol=0)


RGB = {"red": (255, 0, 0), "orange": (255, 140, 0), "yellow": (255, 255, 0), "green": (0, 128, 0), "blue": (0, 0, 255),
       "purple": (128, 0, 128), "pink": (255, 150, 190), "brown": (120, 60, 20), "black": (0, 0, 0), "white": (255, 255, 255)}  # fmt: skip


class MeanColour:
    """Stands for a CLIP that looks at nothing but the mean colour of a picture, with one more number so that black counts."""

    def vector(self, colour: np.ndarray) -> torch.Tensor:
        x = torch.as_tensor(np.asarray(colour, np.float32)) / 255 - 0.5
        return torch.nn.functional.normalize(torch.cat([x, torch.tensor([1.0 - float(x.square().sum())])]), dim=0)

    def of_images(self, images) -> torch.Tensor:
        return torch.stack([self.vector(np.asarray(image, np.float32).mean((0, 1))) for image in images])

    def texts(self, texts) -> torch.Tensor:
        return torch.stack([self.vector(next(rgb for name, rgb in RGB.items() if name in text)) for text in texts])


def test_the_colour_is_that_of_the_object_not_of_what_lies_around_it() -> None:
    pixels = np.full((60, 200, 3), RGB["green"], np.uint8)
    masks = np.zeros((2, 60, 200), bool)
    masks[0, 5:55, 0:100], masks[1, 5:55, 100:200] = True, True
    pixels[5:55, 0:100], pixels[5:55, 100:200] = RGB["red"], RGB["blue"]
    image, names = Image.fromarray(pixels), Colours(MeanColour())
    boxes = [(0.0, 5.0, 100.0, 55.0), (100.0, 5.0, 200.0, 55.0)]
    objects = [Found("cow", 0.9, box, mask) for box, mask in zip(boxes, masks, strict=True)]
    assert names.of_objects(image, objects, "cow") == ["red", "blue"]
    assert names.of_objects(image, [], "cow") == []
    both = Found("cow", 0.9, (0.0, 0.0, 200.0, 60.0), masks[1])  # the mask says which of the box is the object's
    seen = np.asarray(crop(image, both))
    assert (seen[30, 150] == RGB["blue"]).all()
    assert (seen[30, 50] == 0x99).all()
    assert (seen[0, 0] == 0x99).all()
    assert crop(image, Found("cow", 0.9, (199.8, 59.9, 199.9, 60.0))).size == (1, 1)  # never empty
    assert names.of_grounds([Image.new("RGB", (9, 9), RGB["pink"]), Image.new("RGB", (9, 9))], ("pink", "black")) == [
        "pink",
        "black",
    ]


def test_a_class_is_asked_with_genevals_templates_by_a_stock_clip(clip_folder) -> None:
    clip = Clip(ClipConfig(model=str(clip_folder)))
    images = [Image.fromarray(i) for i in np.random.default_rng(1).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)]
    found = [Found("cow", 0.9, (2.0, 3.0, 20.0, 22.0))]
    got = [Colours(clip).of_objects(image, found, "cow")[0] for image in images]
    words = []
    for colour in COLOURS:
        each = clip.texts(
            [f"a photo of a {colour} cow", f"a photo of a {colour}-colored cow", f"a photo of a {colour} object"]
        )
        words.append(each.mean(0) / each.mean(0).norm())
    want = [int((clip.of_images([image.crop((2, 3, 20, 22))]) @ torch.stack(words).T).argmax()) for image in images]
    assert got == [COLOURS[i] for i in want]
