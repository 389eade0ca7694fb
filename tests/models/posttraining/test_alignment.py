"""What captioned pictures teach: the contrast of twins, changes that break a picture and changes that do not."""

import math

import pytest
import torch

from models.posttraining.alignment import Neighbours, info_nce, spoilt, varied


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_info_nce_is_the_mean_of_rows_and_columns_and_forgives_twins() -> None:
    logits = torch.randn(4, 4, generator=seeded(0))
    rows, columns = (-part.log_softmax(dim).diagonal().mean() for part, dim in ((logits, 1), (logits, 0)))
    torch.testing.assert_close(info_nce(logits, torch.arange(4)), (rows + columns) / 2)
    twins = torch.tensor([0, 1, 1, 2])
    louder = logits.clone()
    louder[1, 2] += 50
    louder[2, 1] += 50
    torch.testing.assert_close(info_nce(louder, twins), info_nce(logits, twins))
    assert info_nce(louder, torch.arange(4)) > info_nce(logits, torch.arange(4)) + 5


def drawing() -> torch.Tensor:
    """32 pictures without a plain square in them."""
    return torch.rand(32, 3, 32, 32, generator=seeded(7)) * 2 - 1


@pytest.mark.parametrize("change", [varied, spoilt])
def test_every_picture_changes_within_range_and_by_the_generator_alone(change) -> None:
    pictures = drawing()
    out = change(pictures, seeded(3))
    assert out.shape == pictures.shape
    assert out.min() >= -1.001
    assert out.max() <= 1.001
    assert ((out - pictures).abs().flatten(1).max(1).values > 0.01).all()
    assert torch.equal(out, change(pictures, seeded(3)))
    assert not torch.equal(out, change(pictures, seeded(4)))
    assert torch.equal(pictures, drawing())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_small_batches_are_spoilt_too(size: int) -> None:
    assert spoilt(drawing()[:size], seeded(0)).shape == (size, 3, 32, 32)


def test_neighbours_are_pictures_of_the_nearest_other_captions() -> None:
    """Six captions at two ends of a circle, numbered with gaps; two say the same; one to three pictures each."""
    places = torch.tensor([0.0, 0.1, 0.2, math.pi, math.pi + 0.1, math.pi + 0.1])
    text = torch.zeros(12, 2)
    text[::2] = torch.stack([places.cos(), places.sin()], 1)
    short = torch.tensor([0, 0, 0, 2, 4, 4, 6, 8, 8, 10])
    near = Neighbours.of(short, text, 2)
    wanted = {0: {2, 4}, 2: {0, 4}, 4: {0, 2}, 6: {8, 10}, 8: {6, 10}, 10: {6, 8}}
    asked = torch.arange(10).repeat(300)
    found = near.beside(asked, torch.rand(3000, 2, generator=seeded(1)))
    for caption, others in wanted.items():
        drawn = found[short[asked] == caption]
        assert set(short[drawn].tolist()) == others
        assert set(drawn.tolist()) == {i for i in range(10) if int(short[i]) in others}
    assert set(
        short[Neighbours.of(short, text, 99).beside(asked, torch.rand(3000, 2, generator=seeded(2)))].tolist()
    ) == {*wanted}
    with pytest.raises(ValueError, match="near to 0"):
        Neighbours.of(torch.zeros(3, dtype=torch.int64), text, 2)
