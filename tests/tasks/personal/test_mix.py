"""Subjects of one's own through the stage functions: mix, distil, sweep, at toy size with the real text encoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_curation.scenes import BACKGROUNDS, LAYOUTS, OBJECTS, SUBJECT_OBJECTS
from infra.errors import ConfigError
from models.evaluation.judge import Judge, Vocabulary
from models.networks import prx, text_encoder
from models.networks.checkpoint import read_card
from models.personalization import lora_files, lora_import
from models.personalization.config import DreamBoothConfig, FusionConfig, MixConfig, SweepConfig
from models.personalization.rare_token import rarest
from models.sampling.generate import load_generator
from tasks.distill_mix import distill_mix
from tasks.mix import mix, subject_prompts
from tasks.personalize import dreambooth
from tasks.subject_sweep import sweep_grid


def test_a_mix_of_two_draws_the_sum_and_says_how_exact_it_is(
    places, context, pictures_of, learn, captions, short
) -> None:
    subject = pictures_of()
    outs = {name: learn(name, subject, train={**short["train"], "seed": i})[1] for i, name in enumerate(("one", "two"))}
    inputs = {"init": places["init"], **outs}
    with pytest.raises(ConfigError, match="one and two have the same token"):
        mix(MixConfig(adapters={"one": 1.0, "two": 0.5}), context("clash", **inputs))
    tokens = list(rarest(text_encoder.modules()[1], captions, "toy", 40))
    _, outs["two"] = learn("three", subject, token=tokens[-1], train={**short["train"], "seed": 1})
    ctx = context("both", **{**inputs, **outs})
    facts = mix(MixConfig(adapters={"one": 1.0, "two": 0.5}), ctx)
    assert facts["error"] == 0
    weights = [
        prx.load(p / "transformer").transformer.state_dict()
        for p in (places["init"], outs["one"], outs["two"], ctx.out)
    ]
    for name, base in weights[0].items():
        want = (weights[1][name] - base) + 0.5 * (weights[2][name] - base)
        assert float((weights[3][name] - base - want).abs().max()) <= 1e-5
    assert read_card(ctx.out).trigger == f"{facts['triggers']['one']} and {tokens[-1]}"
    adapter = lora_import.read(
        ctx.out / "adapter", prx.load(places["init"] / "transformer").transformer, "digest of init"
    )
    assert set(adapter.ranks.values()) == {4}
    record = json.loads((ctx.out / "mix.json").read_text())
    assert 0 <= record["interference"]["one + two"]["output_overlap"] <= 1 + 1e-9
    ties = context("ties", **{**inputs, **outs})
    assert mix(MixConfig(adapters={"one": 1.0, "two": 0.5}, method="ties"), ties)["error"] > 0.05
    assert not (ties.out / "adapter").exists()

    fitted = context("fitted", init=places["init"], data=places["data"], one=outs["one"])
    settings = FusionConfig(prompts=8, ordinary=8, ordinary_weight=0, steps=2, ridge=1e-6)
    mix(MixConfig(adapters={"one": 1.0}, method="fused", fusion=settings), fitted)

    def drawn(folder: Path) -> np.ndarray:
        return load_generator(folder).draw([f"a {facts['triggers']['one']} toy"] * 4, range(4))

    alone, start = drawn(outs["one"]), drawn(places["init"])
    assert (
        np.abs(drawn(fitted.out) - alone).mean() < 0.05 * np.abs(start - alone).mean()
    )  # on its inputs it is the adapter
    adapter = lora_import.read(fitted.out / "adapter", prx.load(places["init"] / "transformer").transformer)
    assert set(adapter.ranks.values()) == {2}  # a fit of one rank-2 change
    live = load_generator(places["init"])
    lora_files.attach(live.denoiser.transformer, adapter)
    prompt = [f"a {facts['triggers']['one']} toy"] * 4
    np.testing.assert_allclose(live.draw(prompt, range(4)), drawn(fitted.out), atol=1e-4)


def test_a_share_of_a_subjects_prompts_are_the_captions_it_was_taught_with() -> None:
    own, known = ["a big vox toy", "one vox toy"], ["a cat beside an apple", "an apple", "a dog"]
    about = {"trigger": "vox", "class": "toy", "captions": json.dumps(own)}
    for share, count in ((0.5, 4), (0.0, 0), (1.0, 8)):
        asked = subject_prompts(about, known, 8, np.random.default_rng(0), "apple", share)
        assert len(asked) == 8
        assert [text in own for text in asked] == [True] * count + [False] * (8 - count)
        assert set(asked[count:]) <= {"a cat beside an vox toy", "an vox toy"}
        assert share == 0 or {asked.count(text) for text in own} == {count // 2}
    old = {name: value for name, value in about.items() if name != "captions"}  # an adapter made before they were kept
    without = subject_prompts(about, known, 8, np.random.default_rng(0), "apple", 0.0)
    assert subject_prompts(old, known, 8, np.random.default_rng(0), "apple", 0.5) == without


FUSION = {"prompts": 6, "ordinary": 6, "steps": 2, "ordinary_weight": 1000}  # so that the fit does next to nothing


def guesses(folder: Path, prompt: str) -> torch.Tensor:
    """What a checkpoint makes of pictures halfway to noise, guided as they are drawn."""
    generator = load_generator(folder)
    x_t, t = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(9)), torch.full((8,), 0.7)
    with torch.no_grad():
        asked, empty = (generator.denoiser(x_t, t, *generator.features([text] * 8))[0] for text in (prompt, ""))
    guided: torch.Tensor = empty + generator.card.guidance * (asked - empty)
    return guided


@pytest.fixture
def two(places, pictures_of, learn, captions, short) -> dict[str, Path]:
    """Two adapters with tokens of their own and their base."""
    subject, tokens = pictures_of(), list(rarest(text_encoder.modules()[1], captions, "toy", 9))
    train = {**short["train"], "steps": 6}
    outs = {
        name: learn(name, subject, token=tokens[i], train={**train, "seed": i})[1]
        for i, name in enumerate(("one", "two"))
    }
    return {"init": places["init"], "data": places["data"], **outs}


def distilled(context, name: str, two: dict[str, Path], steps: int = 12, left: Path | None = None) -> tuple[dict, Path]:
    train = {"steps": steps, "batch_size": 6, "ema_gamma": 0.0, "log_every": 4, "checkpoint_every": 4,
             "optimizer": {"muon_lr": None, "adamw_lr": 0.002, "warmup_steps": 0}}  # fmt: skip
    config = MixConfig.model_validate({
        "name": "mix", "adapters": {"one": 1.0, "two": 1.0}, "method": "distilled", "distillation": {"train": train},
        "fusion": FUSION,
    })  # fmt: skip
    ctx = context(name, **two)
    if left is not None:
        shutil.copytree(left, ctx.scratch, dirs_exist_ok=True)
    return distill_mix(config, ctx), ctx.out


def test_a_distilled_mix_comes_closer_to_its_teachers_and_is_one_adapter(two, context) -> None:
    facts, out = distilled(context, "distilled", two, steps=240)
    config = MixConfig.model_validate({"adapters": {"one": 1.0, "two": 1.0}, "method": "fused", "fusion": FUSION})
    start = context("start", **two)
    mix(config, start)
    off = {start.out: 0.0, out: 0.0}
    for name, token in facts["triggers"].items():
        taught = guesses(two[name], f"a {token} toy")
        off |= {place: before + float((guesses(place, f"a {token} toy") - taught).square().mean())
                for place, before in off.items()}  # fmt: skip
    assert off[out] < 0.9 * off[start.out]
    assert facts["error"] == json.loads((out / "mix.json").read_text())["error"] > 0.05
    adapter = lora_import.read(out / "adapter", prx.load(two["init"] / "transformer").transformer, "digest of init")
    assert set(adapter.ranks.values()) == {4}  # the sum of both
    live, prompt = load_generator(two["init"]), [f"a {facts['triggers']['one']} toy"] * 2
    lora_files.attach(live.denoiser.transformer, adapter)
    np.testing.assert_allclose(live.draw(prompt, [3, 4]), load_generator(out).draw(prompt, [3, 4]), atol=1e-4)


def test_a_distilled_mix_that_was_killed_ends_in_the_same_bytes(places, two, context) -> None:
    _, whole = distilled(context, "whole", two)
    whole, scratch = whole.rename(places["root"] / "first"), places["root"] / "whole-scratch"
    shutil.rmtree(sorted((scratch / "checkpoints").iterdir())[-1])  # as if killed before the last step
    left = scratch.rename(places["root"] / "left")
    _, again = distilled(context, "whole", two, left=left)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(names) >= 8
    assert [name for name in names if (whole / name).read_bytes() != (again / name).read_bytes()] == []


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    """An untrained one of the demo's vocabulary."""
    names = Vocabulary(tuple(sorted(OBJECTS | SUBJECT_OBJECTS)), tuple(sorted(LAYOUTS)), tuple(sorted(BACKGROUNDS)))
    folder = tmp_path_factory.mktemp("judge")
    Judge.build(names, 4, 8, 0.5).save(folder)
    return folder


@pytest.mark.parametrize("own", [True, False], ids=["folder", "demo subject"])
def test_a_sweep_scores_every_adapter_at_every_weight_and_draws_them(
    own, places, judge, context, pictures_of, short
) -> None:
    sweep = SweepConfig(name="s", stage="toy", ranks=(1, 2), steps=(3,), weights=(0.0, 1.0), prompts=4, ordinary=4)
    subject = f"{places['own']}/" if own else "robot"
    stage = DreamBoothConfig.model_validate({**short, "name": "toy", "subject": subject, "pictures": 2})
    given = {"subject": pictures_of()} if own else {}
    outs = {}
    for variant in sweep.variants(stage):
        ctx = context(variant.name, init=places["init"], data=places["data"], **given)
        dreambooth(variant, ctx)
        outs[variant.name] = ctx.out
    ctx = context("grid", init=places["init"], judge=judge, **given, **outs)
    facts = sweep_grid(sweep.grid(stage), ctx)
    cells = {(cell["adapter"], cell["weight"]): cell for cell in facts["cells"]}
    assert list(cells) == [(name, weight) for name in ("s-r1-s3", "s-r2-s3") for weight in (0.0, 1.0)]
    assert all(cells[name, 0.0]["class_drift"] == (0 if facts["ordinary_before"] else 1) for name in outs)
    if own:  # at weight 0 both are the base, and closeness to the pictures says so
        assert cells["s-r1-s3", 0.0]["similarity"] == cells["s-r2-s3", 0.0]["similarity"]
        assert all(-1 <= cell["similarity"] <= 1 for cell in facts["cells"])
    assert json.loads((ctx.out / "sweep.json").read_text()) == facts["cells"]
    with Image.open(ctx.out / "grid.png") as sheet:
        half, whole = (np.asarray(sheet)[16:, x : x + 192] for x in (96, 96 + 196))
        assert np.array_equal(half[16:64], half[84:132])  # weight 0 of both rows
        assert not np.array_equal(whole[16:64], half[16:64])


def test_an_adapter_of_another_base_is_not_mixed(places, context, pictures_of, learn) -> None:
    _, one = learn("one", pictures_of())
    other = places["root"] / "other"
    (places["init"]).rename(other)
    with pytest.raises(ValueError, match="t2i.base is digest of init, the base at hand is digest of other"):
        mix(MixConfig(adapters={"one": 1.0}), context("m", init=other, one=one))
