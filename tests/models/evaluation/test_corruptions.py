import torch

from models.evaluation import corruptions as corrupt


def pictures(count: int = 4, side: int = 16) -> torch.Tensor:
    return torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(0))


def test_shuffle_keeps_every_patch_and_its_colours() -> None:
    before = pictures()
    after = corrupt.shuffle_patches(before, 4, torch.Generator().manual_seed(1))
    assert not torch.equal(before, after)
    for y in range(0, 16, 4):
        for x in range(0, 16, 4):
            old = before[2, :, y : y + 4, x : x + 4].reshape(3, 16)
            new = after[2, :, y : y + 4, x : x + 4].reshape(3, 16)
            assert sorted(map(tuple, old.T.tolist())) == sorted(map(tuple, new.T.tolist()))


def test_displaced_patches_show_what_lies_within_reach() -> None:
    before = pictures(1)
    after = corrupt.displace_patches(before, 4, 3, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(before, (3, 3, 3, 3), mode="replicate")
    for y in range(0, 16, 4):
        for x in range(0, 16, 4):
            patch = after[0, :, y : y + 4, x : x + 4]
            near = [padded[0, :, y + i : y + i + 4, x + j : x + j + 4] for i in range(7) for j in range(7)]
            assert any(torch.equal(patch, candidate) for candidate in near)


def test_blur_equals_a_slow_gaussian() -> None:
    before = pictures(1, 9)
    blurred = corrupt.gaussian_blur(before, torch.tensor([0.8]))
    weight = torch.tensor([[torch.exp(-0.5 * torch.tensor(((i - 4) ** 2 + (j - 3) ** 2) / 0.64)) for j in range(9)]
                           for i in range(9)])  # fmt: skip
    expected = (before[0] * weight / weight.sum()).sum((1, 2))
    assert torch.allclose(blurred[0, :, 4, 3], expected, atol=1e-5)


def test_coarsening_leaves_one_value_a_block() -> None:
    coarse = corrupt.coarsen(pictures(), 4, smooth=False)
    assert torch.allclose(coarse[:, :, 0, 0], pictures()[:, :, :4, :4].mean((2, 3)))
    assert torch.equal(coarse[:, :, 0, 0], coarse[:, :, 3, 3])


def test_halves_come_from_both_pictures_and_share_a_background() -> None:
    first, second = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.6)
    first[:, :, 6:10, 6:10], second[:, :, 6:10, 6:10] = 1.0, 0.0
    joined = corrupt.join_halves(first, second, torch.tensor([8.0]), torch.tensor([True]), torch.tensor([0.05]))
    assert torch.allclose(joined[0, :, 0], torch.tensor(0.5), atol=1e-4)
    assert joined[0, 0, 8, 6] > 0.9
    assert joined[0, 0, 8, 9] < 0.1


def test_no_bend_and_no_offset_change_nothing() -> None:
    before = pictures()
    still = corrupt.wobble(before, 0.0, 5, torch.Generator().manual_seed(0))
    assert torch.allclose(still, before, atol=1e-4)
