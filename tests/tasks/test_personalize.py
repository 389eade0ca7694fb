"""Subjects of one's own through the stage functions: read, learn, mix, at toy size with the real text encoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from data_curation.config import SubjectFolder
from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.manifest import write_table
from data_curation.scenes import BACKGROUNDS, LAYOUTS, OBJECTS, SUBJECT_OBJECTS, Scene, draw_batch
from data_curation.subject import read_subject
from infra.artifacts import Artifact
from infra.errors import ConfigError, DataRefused
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.engine.distribute import one_thread
from models.evaluation.judge import Judge, Vocabulary
from models.networks import prx, text_encoder
from models.networks.checkpoint import SamplingCard, read_card, write_checkpoint
from models.networks.config import PrxConfig
from models.personalization import lora_files, lora_import
from models.personalization.config import DreamBoothConfig, FusionConfig, MixConfig, SweepConfig
from models.personalization.rare_token import find_tokens, rarest, refuse_token
from models.sampling.generate import load_generator
from tasks.distill_mix import distill_mix
from tasks.export import export_adapter
from tasks.mix import mix
from tasks.personalize import class_prompts, dreambooth
from tasks.subject_pictures import own_subject
from tasks.subject_sweep import sweep_grid

CAPTIONS = ["", "a big apple on a blue background", "two cats side by side on a white background"]
SHORT = {
    "class_word": "toy", "class_pictures": 4, "lora": {"rank": 2},
    "train": {"steps": 2, "batch_size": 4, "ema_gamma": 0.0,
              "optimizer": {"muon_lr": None, "adamw_lr": 0.05, "warmup_steps": 0}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_core():
    with one_thread():
        yield


@pytest.fixture
def places(tmp_path) -> dict[str, Path]:
    """A random base, a training set's text part, and a folder with four pictures, two of them captioned."""
    denoiser = prx.build(PrxConfig(hidden_size=32, depth=1, num_heads=2), torch.zeros(384), torch.ones(384), 0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    write_checkpoint(tmp_path / "init", denoiser, SamplingCard(steps=2))
    data = tmp_path / "data"
    data.mkdir()
    write_table([], INDEX_SCHEMA, data / "index.parquet")
    write_table(
        [{"id": i, "text": text} for i, text in enumerate(CAPTIONS)], CAPTIONS_SCHEMA, data / "captions.parquet"
    )
    text = {"tokens": np.ones((3, 384), np.float16), "offsets": np.arange(4), "mean": np.zeros(384, np.float32)}
    save_file(text | {"std": np.ones(384, np.float32)}, data / "text.safetensors")
    own = tmp_path / "own"
    own.mkdir()
    scenes = [Scene("big", ("octopus",), color) for color in ("white", "pink", "blue", "green")]
    for i, image in enumerate(draw_batch(scenes, 64, 0)):
        Image.fromarray(image[: 64 - 8 * i]).save(own / f"{i}.png")
    (own / "0.txt").write_text("a big {subject} on a white background")
    (own / "1.txt").write_text("one {subject}")
    return {"init": tmp_path / "init", "data": data, "own": own, "root": tmp_path}


def context(places, name: str, **inputs: Path) -> StageContext:
    out, scratch = places["root"] / name, places["root"] / f"{name}-scratch"
    out.mkdir()
    scratch.mkdir()
    parents = {role: Artifact(kind="x", uri=f"file://{path}", digest=f"digest of {path.name}", stage=role, parents=())
               for role, path in inputs.items()}  # fmt: skip
    return StageContext(name, inputs, parents, out, scratch, Resources(), no_progress, fan_out_here)


def pictures_of(places, name: str = "pictures") -> Path:
    ctx = context(places, name)
    read_subject(SubjectFolder(path=places["own"]), ctx)
    return ctx.out


def learn(places, name: str, subject: Path, **settings) -> tuple[dict, Path]:
    config = DreamBoothConfig.model_validate({**SHORT, "name": name, "subject": f"{places['own']}/", **settings})
    ctx = context(places, name, init=places["init"], data=places["data"], subject=subject)
    return dreambooth(config, ctx), ctx.out


def test_a_folder_becomes_an_adapter_in_three_forms_a_checkpoint_and_a_grid(places) -> None:
    facts, out = learn(places, "dreambooth-toy", pictures_of(places))
    assert facts["instance_pictures"] == 4
    assert facts["token"] == facts["tokens_found"][0]["token"] == read_card(out).trigger
    base = prx.load(places["init"] / "transformer")
    forms = [
        out / "adapter",
        out / "adapter" / lora_files.DIFFUSERS_FILE,
        out / "adapter" / "dreambooth-toy-kohya.safetensors",
    ]
    read = [lora_import.read(form, base.transformer, "digest of init") for form in forms]
    for form in read:
        assert form.about == {"base": "digest of init", "trigger": facts["token"], "class": "toy"}
        assert all(
            torch.equal(x, y) for n in read[0].layers for x, y in zip(form.layers[n], read[0].layers[n], strict=True)
        )
    lora_files.attach(base.transformer, read[0])
    live, merged = load_generator(places["init"]), load_generator(out)
    live.denoiser = base
    prompt = [f"a {facts['token']} toy"]
    np.testing.assert_allclose(live.draw(prompt, [3]), merged.draw(prompt, [3]), atol=1e-4)
    assert np.abs(merged.draw(prompt, [3]) - load_generator(places["init"]).draw(prompt, [3])).max() > 1e-3
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (4 * 32 * 3, 3 * 32 * 3)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_products_are_learnt_merged_and_exported(kind, places) -> None:
    _, out = learn(places, "dreambooth-toy", pictures_of(places), lora={"kind": kind, "rank": 2})
    base = load_generator(places["init"])
    adapter = lora_import.read(out / "adapter", base.denoiser.transformer, "digest of init")
    assert {each.kind for each in adapter.products.values()} == {kind}
    lora_files.attach(base.denoiser.transformer, adapter)
    prompt = [f"a {adapter.about['trigger']} toy"]
    np.testing.assert_allclose(base.draw(prompt, [3]), load_generator(out).draw(prompt, [3]), atol=1e-4)
    export_adapter(out, places["root"] / "exported", "toy")
    assert sorted(path.name for path in (places["root"] / "exported").iterdir()) == [
        "adapter_config.json", lora_files.PEFT_FILE, "toy-kohya.safetensors",
    ]  # fmt: skip


def test_all_weights_can_be_trained_and_then_there_is_no_adapter(places) -> None:
    facts, out = learn(places, "dreambooth-toy", pictures_of(places), lora=None)
    before, after = (prx.load(folder / "transformer").transformer.state_dict() for folder in (places["init"], out))
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    assert not (out / "adapter").exists()
    assert (out / "grid.png").exists()
    assert facts["token"] == read_card(out).trigger


def test_learning_twice_gives_the_same_bytes(places) -> None:
    subject = pictures_of(places)
    _, one = learn(places, "dreambooth-toy", subject)
    one = one.rename(places["root"] / "first")
    (places["root"] / "dreambooth-toy-scratch").rename(places["root"] / "old")
    _, two = learn(places, "dreambooth-toy", subject)
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(names) >= 8
    assert [n for n in names if n.name != "metrics.jsonl" and (one / n).read_bytes() != (two / n).read_bytes()] == []


def test_a_mask_goes_with_its_picture_to_the_side_of_the_model(places) -> None:
    mask = Image.new("L", Image.open(places["own"] / "1.png").size)
    mask.paste(255, (0, 0, mask.width, mask.height // 2))
    mask.save(places["own"] / "1.mask.png")
    pictures = pictures_of(places)
    config = DreamBoothConfig.model_validate({**SHORT, "subject": f"{places['own']}/"})
    subject = own_subject(config, pictures, "zwx", 32, text_encoder.modules()[1], 64)
    assert subject.masks is not None
    assert [float(each.mean()) for each in subject.masks] == pytest.approx([1, 0.5, 1, 1], abs=0.01)
    assert float(subject.masks[1][:12].min()) > 0.95
    assert float(subject.masks[1][20:].max()) < 0.05
    _, masked = learn(places, "masked", pictures)
    (places["own"] / "1.mask.png").unlink()
    _, plain = learn(places, "plain", pictures_of(places, "unmasked"))
    assert (masked / "adapter/adapter_model.safetensors").read_bytes() != (
        plain / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_captions_must_name_the_subject_and_fit(places) -> None:
    (places["own"] / "1.txt").write_text("a toy on a table")
    with pytest.raises(
        DataRefused, match=r"the caption of 1.png, 'a toy on a table', does not name the subject; write \{subject\}"
    ):
        learn(places, "a", pictures_of(places))
    (places["own"] / "1.txt").write_text("a {subject} " + "and so on " * 40)
    with pytest.raises(DataRefused, match=r"the caption of 1.png has \d+ tokens, more than the model reads \(64\)"):
        learn(places, "b", pictures_of(places, "longer"))


def test_settings_that_cannot_work_are_errors(places) -> None:
    for settings, message in (
        ({"subject": "/no/where/"}, "subject folder /no/where does not exist"),
        ({"class_word": "  "}, "class_word is blank"),
        ({"token": "toy", "class_word": "toy car"}, "token 'toy' is a word of class_word"),
        ({"templates": ["a dog"]}, "template 'a dog' lacks {subject}"),
    ):
        with pytest.raises(ValueError, match=message):
            DreamBoothConfig.model_validate({**SHORT, **settings})
    ctx = context(places, "c", init=places["init"], data=places["data"])
    with pytest.raises(ConfigError, match="'unicorn' is unknown; choose one of .*octopus.*, or a folder"):
        dreambooth(DreamBoothConfig.model_validate({**SHORT, "subject": "unicorn"}), ctx)
    with pytest.raises(ConfigError, match="no scene of one object 'beside' on 'white'; layouts are big, top left"):
        dreambooth(DreamBoothConfig.model_validate({**SHORT, "subject": "robot", "scenes": [["beside", "white"]]}), ctx)


def test_tokens_that_split_are_common_or_in_use_are_refused_with_a_proposal() -> None:
    tokenizer = text_encoder.modules()[1]
    best = next(iter(rarest(tokenizer, CAPTIONS, "toy", 1)))
    for token, captions, message in (
        ("zwx", CAPTIONS, rf"'zwx' splits into 3 pieces, z ##w ##x; take {best}, "),
        ("dog", CAPTIONS, "'dog' is common: number 3899 of a vocabulary of 30522"),
        (best, [f"an old {best}."], f"'{best}' is in captions the model was trained on"),
        ("☃☃", CAPTIONS, "splits into|is unknown to the tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            refuse_token(token, tokenizer, captions, "toy")
    refuse_token(best, tokenizer, CAPTIONS, "toy")


def test_found_tokens_are_single_rare_unused_and_ranked_by_response(places) -> None:
    tokenizer, generator = text_encoder.modules()[1], load_generator(places["init"])
    taken = list(rarest(tokenizer, CAPTIONS, "toy", 2))
    found = find_tokens(generator, tokenizer, [*CAPTIONS, f"a {taken[0]}"], "toy", count=6)
    assert len(found) == 6
    assert taken[0] not in {each.token for each in found}
    assert all(tokenizer.tokenize(each.token) == [each.token] for each in found)
    assert [each.response for each in found] == sorted(each.response for each in found)
    assert 0 < found[0].response < found[-1].response


@pytest.mark.parametrize("subject", ["robot", "./own/"])
def test_prior_prompts_name_other_tokens_in_their_share_and_never_the_subjects(subject) -> None:
    settings = {"subject": subject, "fingerprint": "known", "class_word": "toy", "foreign_share": 0.25}
    others = set(rarest(text_encoder.modules()[1], CAPTIONS, "toy", 48))
    own = sorted(others)[0]
    prompts = class_prompts(DreamBoothConfig.model_validate(settings), CAPTIONS, own, 400)
    words = [set(prompt.split()) for prompt in prompts]
    assert not any(own in each for each in words)
    assert np.mean([bool(each & others) for each in words]) == pytest.approx(0.25, abs=0.08)
    assert all("{" not in prompt for prompt in prompts)
    plain = class_prompts(DreamBoothConfig.model_validate(settings | {"foreign_share": 0.0}), CAPTIONS, own, 400)
    assert not any(set(prompt.split()) & others for prompt in plain)
    assert plain != prompts
    if subject != "robot":
        assert set(plain) <= {*CAPTIONS[1:], "a toy", "a big toy", "a picture of a toy", "one toy"}


def test_a_mix_of_two_draws_the_sum_and_says_how_exact_it_is(places) -> None:
    subject = pictures_of(places)
    outs = {
        name: learn(places, name, subject, train={**SHORT["train"], "seed": i})[1]
        for i, name in enumerate(("one", "two"))
    }
    inputs = {"init": places["init"], **outs}
    with pytest.raises(ConfigError, match="one and two have the same token"):
        mix(MixConfig(adapters={"one": 1.0, "two": 0.5}), context(places, "clash", **inputs))
    tokens = list(rarest(text_encoder.modules()[1], CAPTIONS, "toy", 40))
    _, outs["two"] = learn(places, "three", subject, token=tokens[-1], train={**SHORT["train"], "seed": 1})
    ctx = context(places, "both", **{**inputs, **outs})
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
    ties = context(places, "ties", **{**inputs, **outs})
    assert mix(MixConfig(adapters={"one": 1.0, "two": 0.5}, method="ties"), ties)["error"] > 0.05
    assert not (ties.out / "adapter").exists()

    fitted = context(places, "fitted", init=places["init"], data=places["data"], one=outs["one"])
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


FUSION = {"prompts": 6, "ordinary": 6, "steps": 2, "ordinary_weight": 1000}  # so that the fit does next to nothing


def guesses(folder: Path, prompt: str) -> torch.Tensor:
    """What a checkpoint makes of pictures halfway to noise."""
    generator = load_generator(folder)
    x_t, t = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(9)), torch.full((8,), 0.7)
    with torch.no_grad():
        found: torch.Tensor = generator.denoiser(x_t, t, *generator.features([prompt] * 8))[0]
    return found


@pytest.fixture
def two(places) -> dict[str, Path]:
    """Two adapters with tokens of their own and their base."""
    subject, tokens = pictures_of(places), list(rarest(text_encoder.modules()[1], CAPTIONS, "toy", 9))
    train = {**SHORT["train"], "steps": 6}
    outs = {
        name: learn(places, name, subject, token=tokens[i], train={**train, "seed": i})[1]
        for i, name in enumerate(("one", "two"))
    }
    return {"init": places["init"], "data": places["data"], **outs}


def distilled(places, name: str, two: dict[str, Path], steps: int = 12, left: Path | None = None) -> tuple[dict, Path]:
    train = {"steps": steps, "batch_size": 6, "ema_gamma": 0.0, "log_every": 4, "checkpoint_every": 4,
             "optimizer": {"muon_lr": None, "adamw_lr": 0.002, "warmup_steps": 0}}  # fmt: skip
    config = MixConfig.model_validate({
        "name": "mix", "adapters": {"one": 1.0, "two": 1.0}, "method": "distilled", "distillation": {"train": train, "empty_share": 0.0},
        "fusion": FUSION,
    })  # fmt: skip
    ctx = context(places, name, **two)
    if left is not None:
        shutil.copytree(left, ctx.scratch, dirs_exist_ok=True)
    return distill_mix(config, ctx), ctx.out


def test_a_distilled_mix_comes_closer_to_its_teachers_and_is_one_adapter(places, two) -> None:
    facts, out = distilled(places, "distilled", two, steps=80)
    config = MixConfig.model_validate({"adapters": {"one": 1.0, "two": 1.0}, "method": "fused", "fusion": FUSION})
    start = context(places, "start", **two)
    mix(config, start)
    off = {start.out: 0.0, out: 0.0}
    for name, token in facts["triggers"].items():
        taught = guesses(two[name], f"a {token} toy")
        off |= {place: before + float((guesses(place, f"a {token} toy") - taught).square().mean())
                for place, before in off.items()}  # fmt: skip
    assert off[out] < 0.8 * off[start.out]
    assert facts["error"] == json.loads((out / "mix.json").read_text())["error"] > 0.05
    adapter = lora_import.read(out / "adapter", prx.load(two["init"] / "transformer").transformer, "digest of init")
    assert set(adapter.ranks.values()) == {4}  # the sum of both
    live, prompt = load_generator(two["init"]), [f"a {facts['triggers']['one']} toy"] * 2
    lora_files.attach(live.denoiser.transformer, adapter)
    np.testing.assert_allclose(live.draw(prompt, [3, 4]), load_generator(out).draw(prompt, [3, 4]), atol=1e-4)


def test_a_distilled_mix_that_was_killed_ends_in_the_same_bytes(places, two) -> None:
    _, whole = distilled(places, "whole", two)
    whole, scratch = whole.rename(places["root"] / "first"), places["root"] / "whole-scratch"
    shutil.rmtree(sorted((scratch / "checkpoints").iterdir())[-1])  # as if killed before the last step
    left = scratch.rename(places["root"] / "left")
    _, again = distilled(places, "whole", two, left=left)
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
def test_a_sweep_scores_every_adapter_at_every_weight_and_draws_them(own, places, judge) -> None:
    sweep = SweepConfig(name="s", stage="toy", ranks=(1, 2), steps=(3,), weights=(0.0, 1.0), prompts=4, ordinary=4)
    subject = f"{places['own']}/" if own else "robot"
    stage = DreamBoothConfig.model_validate({**SHORT, "name": "toy", "subject": subject, "pictures": 2})
    given = {"subject": pictures_of(places)} if own else {}
    outs = {}
    for variant in sweep.variants(stage):
        ctx = context(places, variant.name, init=places["init"], data=places["data"], **given)
        dreambooth(variant, ctx)
        outs[variant.name] = ctx.out
    ctx = context(places, "grid", init=places["init"], judge=judge, **given, **outs)
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


def test_an_adapter_of_another_base_is_not_mixed(places) -> None:
    _, one = learn(places, "one", pictures_of(places))
    other = places["root"] / "other"
    (places["init"]).rename(other)
    with pytest.raises(ValueError, match="t2i.base is digest of init, the base at hand is digest of other"):
        mix(MixConfig(adapters={"one": 1.0}), context(places, "m", init=other, one=one))
