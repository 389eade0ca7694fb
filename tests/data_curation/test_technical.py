"""Borders, clipped pixels and overlaid text are told from what pictures have by nature."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from data_curation.filter_config import QualityConfig, RedecideConfig
from data_curation.quality_scores import scores
from data_curation.scenes import all_scenes, draw
from data_curation.technical import border, clipped, overlay
from infra.config import versioned


def greys(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"), np.float32)


def sound(count: int) -> list[Image.Image]:
    scenes = all_scenes("full")
    return [
        draw(scenes[i * len(scenes) // count], 180, 150, np.random.default_rng(i)).resize((180, 150))
        for i in range(count)
    ]


@pytest.mark.parametrize("sides", [(20, 0), (0, 20), (12, 12)])
def test_a_frame_is_a_border_of_its_size(sides: tuple[int, int]) -> None:
    inside = Image.fromarray(np.random.default_rng(0).integers(60, 255, (100, 140, 3), dtype=np.uint8))
    framed = Image.new("RGB", (140 + 2 * sides[0], 100 + 2 * sides[1]), "black")
    framed.paste(inside, sides)
    wanted = max(2 * sides[0] / framed.width, 2 * sides[1] / framed.height)
    assert border(greys(framed)) == pytest.approx(wanted)
    assert border(greys(inside)) == 0
    assert border(np.full((50, 60), 7, np.float32)) == 0  # nothing but ground


def test_flat_grounds_of_drawings_are_no_borders() -> None:
    found = [border(greys(picture)) for picture in sound(60)]
    assert sum(value > 0.02 for value in found) <= 1


def test_clipped_is_the_share_of_extreme_pixels() -> None:
    grey = np.full((10, 10), 100, np.float32)
    grey[:2], grey[9:] = 255, 0
    assert clipped(grey) == pytest.approx(0.3)


def test_a_line_of_text_has_more_strokes_than_the_rows_beside_it() -> None:
    plain, told = [], []
    for picture in sound(40):
        plain.append(overlay(greys(picture)))
        ImageDraw.Draw(picture).text((8, 120), "www.example-shop.com", fill="yellow", stroke_fill="black",
                                     stroke_width=1, font=ImageFont.load_default(16))  # fmt: skip
        told.append(overlay(greys(picture)))
    assert np.median(told) > 22 > np.quantile(plain, 0.95)
    assert overlay(np.zeros((5, 5), np.float32)) == 0


def test_they_are_measured_only_when_asked_for() -> None:
    file = io.BytesIO()
    sound(1)[0].save(file, "PNG")
    assert set(scores(file.getvalue(), True)) - set(scores(file.getvalue())) == {"border", "clipped", "overlay"}
    assert not QualityConfig().measures_more and QualityConfig(max_border=0.02).measures_more
    assert (
        not {"max_border", "max_clipped", "max_overlay"}
        & (versioned(QualityConfig()) | versioned(RedecideConfig())).keys()
    )
