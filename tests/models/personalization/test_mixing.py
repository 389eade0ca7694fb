"""Mixes of adapters against slow, obvious formulas; run-time mixing against the merged weights."""

import itertools
import math

import pytest
import torch

from models.personalization import lora_files, lora_import
from models.personalization.interference import interference
from models.personalization.lora_files import Adapter
from models.personalization.mixing import Part, concatenated, dare, factors, mix, reduced, set_strengths, ties

LAYER = "transformer_blocks.0.attn.to_q"
WEIGHTS = {"one": 0.7, "two": -0.4, "three": 1.3}
VARIANT = {"one": "alpha-r", "two": "mixed", "three": "rslora"}


@pytest.fixture
def parts(adapter) -> dict[str, Part]:
    return {name: Part(adapter(VARIANT[name], seed=10 + i), WEIGHTS[name]) for i, name in enumerate(WEIGHTS)}


def merged(module, changes):
    weights = module.state_dict()
    module.load_state_dict(weights | {f"{n}.weight": weights[f"{n}.weight"] + change for n, change in changes.items()})
    return module


def attached(module, parts):
    for name, part in parts.items():
        lora_files.attach(module, part.adapter, name)
    set_strengths(module, parts)
    return module


def worst(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())


def test_sum_is_the_sum_of_the_changes(parts, base) -> None:
    """Test 15: three adapters of different ranks and scales, one weighted negatively."""
    found = mix(parts, base().state_dict())
    for layer, change in found.changes.items():
        want = sum(
            w * parts[n].adapter.layers[layer][1] @ parts[n].adapter.layers[layer][0] for n, w in WEIGHTS.items()
        )
        assert worst(change, want) <= 1e-6
    assert found.error == 0


def test_run_time_mix_merged_weights_and_one_file_draw_the_same(parts, base, tmp_path, draw) -> None:
    """Test 15: layers of peft at run time, changed weights, and the concatenated adapter after a trip through a file."""
    live = draw(attached(base(), parts))
    fused = draw(merged(base(), mix(parts, base().state_dict()).changes))
    one_file = base()
    lora_files.save_diffusers(concatenated(parts, {}), tmp_path)
    lora_import.load(one_file, tmp_path)
    assert worst(live, fused) <= 1e-5
    assert worst(draw(one_file), fused) <= 1e-5
    assert worst(live, draw(base())) > 1e-2


def test_run_time_mix_follows_new_weights_and_weight_zero_changes_no_bit(parts, base, draw) -> None:
    module = attached(base(), parts)
    zero = {name: Part(part.adapter, 0.0) for name, part in parts.items()}
    set_strengths(module, zero)
    assert torch.equal(draw(module), draw(base()))
    assert torch.equal(draw(merged(base(), mix(zero, base().state_dict()).changes)), draw(base()))
    alone = {"two": Part(parts["two"].adapter, 0.5)}
    set_strengths(module, zero | alone)
    assert worst(draw(module), draw(merged(base(), mix(alone, base().state_dict()).changes))) <= 1e-5


@pytest.mark.parametrize("method", ["sum", "ties", "dare"])
def test_order_does_not_matter_to_the_bit(method, parts, base, draw) -> None:
    weights = base().state_dict()
    mixes = [mix(dict(order), weights, method) for order in itertools.permutations(parts.items())]
    assert all(torch.equal(m.changes[n], c) for m in mixes[1:] for n, c in mixes[0].changes.items())
    draws = [draw(attached(base(), dict(order))) for order in itertools.permutations(parts.items())]
    assert max(worst(d, draws[0]) for d in draws) <= 1e-5


def test_blocks_are_weighted_by_the_longest_prefix(parts, base, draw) -> None:
    one = Part(parts["one"].adapter, 2.0, {"transformer_blocks.0": 0.5, LAYER: 0.0})
    changes = mix({"one": one}, base().state_dict()).changes
    assert LAYER not in changes
    other, third = "transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.to_k"
    for layer, strength in ((other, 1.0), (third, 2.0)):
        a, b = one.adapter.layers[layer]
        assert worst(changes[layer], strength * b @ a) <= 1e-6
    assert worst(draw(attached(base(), {"one": one})), draw(merged(base(), changes))) <= 1e-5


def test_svd_reports_the_error_that_is_there(parts, base) -> None:
    """Test 15: reported = measured, the root of the squared singular values left out; all ranks together are exact."""
    weights = base().state_dict()
    total, small = mix(parts, weights), mix(parts, weights, "svd", rank=2)
    left = torch.linalg.svdvals(total.changes[LAYER])
    want = float(left[2:].square().sum().sqrt() / left.square().sum().sqrt())
    assert small.error_by_layer[LAYER] == pytest.approx(want, rel=1e-4)
    assert 0.05 < small.error < 1
    assert mix(parts, weights, "svd", rank=12).error < 1e-6
    as_file = reduced(total.changes, 2, {})
    assert set(as_file.ranks.values()) == {2}
    a, b = as_file.layers[LAYER]
    assert worst(b @ a, small.changes[LAYER]) <= 1e-6


def test_factors_of_a_low_rank_change_give_it_back() -> None:
    change = torch.randn(6, 2) @ torch.randn(2, 5)
    a, b = factors(change, 2)
    assert a.shape == (2, 5)
    assert b.shape == (6, 2)
    torch.testing.assert_close(b @ a, change)


def test_ties_on_a_case_done_by_hand() -> None:
    """Of 4 entries the larger 2 stay: [5 0 0 -4], [-3 0 2 0], [1 0 0 -6]; signs + . + -; means of those that agree."""
    stack = torch.tensor([[[5.0, 1.0, 0.5, -4.0]], [[-3.0, 1.0, 2.0, 0.5]], [[1.0, 0.5, -0.2, -6.0]]])
    assert ties(stack, 0.5).tolist() == [[3.0, 0.0, 2.0, -5.0]]


def test_ties_of_one_adapter_and_of_equal_adapters_is_that_adapter() -> None:
    change = torch.randn(1, 4, 5)
    assert torch.equal(ties(change, 1.0), change[0])
    torch.testing.assert_close(ties(change.expand(3, 4, 5), 1.0), change[0])
    assert ties(torch.stack([change[0], -change[0]]), 1.0).abs().max() == 0  # no sign wins


def test_dare_keeps_the_share_rescales_it_and_is_right_on_average() -> None:
    change = torch.full((100, 100), 2.0)
    kept = dare({"a": change}, LAYER, 0.25, 0)[0]
    assert set(kept.unique().tolist()) == {0.0, 8.0}
    assert float((kept != 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(kept.mean()) == pytest.approx(2.0, abs=0.15)
    assert torch.equal(dare({"a": change}, LAYER, 1.0, 0)[0], change)
    both = dare({"a": change, "b": change}, LAYER, 0.25, 0)
    assert torch.equal(both[0], kept)  # whatever else is mixed
    assert not torch.equal(both[1], kept)


def test_errors_are_told_for_ties_and_dare(parts, base) -> None:
    weights = base().state_dict()
    total = mix(parts, weights).changes
    for method in ("ties", "dare"):
        found = mix(parts, weights, method, density=0.5)
        off = sum(float((found.changes[n] - total[n]).square().sum()) for n in total)
        size = sum(float(total[n].square().sum()) for n in total)
        assert found.error == pytest.approx(math.sqrt(off / size), rel=1e-4)
        assert found.error > 0.1


def test_dora_merges_by_its_change_and_is_refused_where_it_would_be_wrong(parts, adapter, base, draw) -> None:
    dora = {"dora": Part(adapter("dora", seed=20), 1.0)}
    both = dora | {"one": parts["one"]}
    weights = base().state_dict()
    change = mix(both, weights).changes[LAYER]
    want = (
        dora["dora"].adapter.change(LAYER, weights[f"{LAYER}.weight"])
        + mix({"one": parts["one"]}, weights).changes[LAYER]
    )
    assert worst(change, want) <= 1e-6
    assert worst(draw(attached(base(), dora)), draw(merged(base(), mix(dora, weights).changes))) <= 1e-5
    for wrong in (both, {"dora": Part(dora["dora"].adapter, 0.5)}):
        with pytest.raises(ValueError, match="adapter dora is a DoRA, which peft can only draw alone with weight 1"):
            attached(base(), wrong)
    assert torch.equal(draw(attached(base(), {"dora": Part(dora["dora"].adapter, 0.0)})), draw(base()))
    with pytest.raises(ValueError, match="adapter dora is a DoRA, whose change has no low rank"):
        concatenated(both, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": float("nan")}, "weight nan of adapter one as a whole is no number"),
        ({"blocks": {"transformer_blocks.0": math.inf}}, "weight inf of adapter one transformer_blocks.0"),
        (
            {"blocks": {"transformer_blocks.7": 1.0}},
            "block 'transformer_blocks.7' of adapter one fits none of its layers",
        ),
        ({"adapter": Adapter({LAYER: (torch.ones(2, 48), torch.ones(32, 2))}, {})}, "they are of other bases"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(change, message, parts, base) -> None:
    one = Part(**({"adapter": parts["one"].adapter} | change))
    with pytest.raises(ValueError, match=message):
        mix({"one": one, "two": parts["two"]}, base().state_dict())


def test_no_adapters_bad_density_and_unknown_names_are_refused(parts, base) -> None:
    with pytest.raises(ValueError, match="no adapters to mix"):
        mix({}, base().state_dict())
    with pytest.raises(ValueError, match="density=0 is not above 0"):
        mix(parts, base().state_dict(), "ties", density=0)
    module = attached(base(), {"one": parts["one"]})
    with pytest.raises(ValueError, match=r"no adapter 'two', only \['one'\]"):
        set_strengths(module, {"two": parts["two"]})


def layers(*pairs) -> Adapter:
    return Adapter({f"layer{i}": (torch.tensor(a), torch.tensor(b)) for i, (a, b) in enumerate(pairs)}, {})


def test_interference_of_known_subspaces() -> None:
    x, y, both = [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    column = [[1.0], [0.0], [0.0], [0.0]]
    other = [[0.0], [2.0], [0.0], [0.0]]
    same = interference(layers((x, column)), layers((x, column)))
    assert (same.cosine, same.output_overlap, same.input_overlap) == pytest.approx((1.0, 1.0, 1.0))
    assert (same.sign_conflict, same.norm_ratio) == pytest.approx((0.0, 1.0))
    apart = interference(layers((x, column)), layers((y, other)))
    assert (apart.cosine, apart.output_overlap, apart.input_overlap) == pytest.approx((0.0, 0.0, 0.0))
    assert (apart.output_chance, apart.input_chance) == pytest.approx((1 / 4, 1 / 3))
    assert apart.norm_ratio == pytest.approx(0.5)
    against = interference(layers((x, column)), layers((x, [[-1.0], [0.0], [0.0], [0.0]])))
    assert (against.cosine, against.sign_conflict, against.output_overlap) == pytest.approx((-1.0, 1.0, 1.0))
    slanted = interference(layers((x, column)), layers((x, [[1.0], [1.0], [0.0], [0.0]])))
    assert slanted.output_overlap == pytest.approx(0.5)  # cos^2 of 45 degrees
    held = interference(layers((x, column)), layers((both, [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])))
    assert (held.output_overlap, held.input_overlap) == pytest.approx((1.0, 1.0))


def test_a_fresh_adapter_interferes_with_nothing(adapter, adapted) -> None:
    fresh = lora_files.from_module(adapted(fresh=True), {})
    found = interference(fresh, adapter())
    assert (found.cosine, found.output_overlap, found.sign_conflict, found.norm_ratio) == (0, 0, 0, 0)
