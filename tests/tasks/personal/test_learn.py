"""Subjects of one's own through the stage functions: read, learn, at toy size with the real text encoder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from infra.errors import ConfigError, DataRefused
from models.networks import prx, text_encoder
from models.networks.checkpoint import read_card
from models.personalization import lora_files, lora_import
from models.personalization.config import DreamBoothConfig
from models.personalization.rare_token import find_tokens, rarest, refuse_token
from models.sampling.generate import load_generator
from tasks.export import export_adapter
from tasks.personalize import class_prompts, dreambooth
from tasks.subject_pictures import own_subject


def test_a_folder_becomes_an_adapter_in_three_forms_a_checkpoint_and_a_grid(places, pictures_of, learn) -> None:
    facts, out = learn("dreambooth-toy", pictures_of())
    assert facts["instance_pictures"] == 4
    assert facts["token"] == facts["tokens_found"][0]["token"] == read_card(out).trigger
    base, phrase = prx.load(places["init"] / "transformer"), f"{facts['token']} toy"
    taught = [
        f"a big {phrase} on a white background",
        f"one {phrase}",
        f"a picture of a {phrase}",
    ]  # the fourth is the second
    forms = [
        out / "adapter",
        out / "adapter" / lora_files.DIFFUSERS_FILE,
        out / "adapter" / "dreambooth-toy-kohya.safetensors",
    ]
    read = [lora_import.read(form, base.transformer, "digest of init") for form in forms]
    for form in read:
        assert form.about == {
            "base": "digest of init", "trigger": facts["token"], "class": "toy", "captions": json.dumps(taught),
        }  # fmt: skip
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
def test_products_are_learnt_merged_and_exported(kind, places, pictures_of, learn) -> None:
    _, out = learn("dreambooth-toy", pictures_of(), lora={"kind": kind, "rank": 2})
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


def test_all_weights_can_be_trained_and_then_there_is_no_adapter(places, pictures_of, learn) -> None:
    facts, out = learn("dreambooth-toy", pictures_of(), lora=None)
    before, after = (prx.load(folder / "transformer").transformer.state_dict() for folder in (places["init"], out))
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    assert not (out / "adapter").exists()
    assert (out / "grid.png").exists()
    assert facts["token"] == read_card(out).trigger


def test_learning_twice_gives_the_same_bytes(places, pictures_of, learn) -> None:
    subject = pictures_of()
    _, one = learn("dreambooth-toy", subject)
    one = one.rename(places["root"] / "first")
    (places["root"] / "dreambooth-toy-scratch").rename(places["root"] / "old")
    _, two = learn("dreambooth-toy", subject)
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(names) >= 8
    assert [n for n in names if n.name != "metrics.jsonl" and (one / n).read_bytes() != (two / n).read_bytes()] == []


def test_a_mask_goes_with_its_picture_to_the_side_of_the_model(places, pictures_of, learn, short) -> None:
    mask = Image.new("L", Image.open(places["own"] / "1.png").size)
    mask.paste(255, (0, 0, mask.width, mask.height // 2))
    mask.save(places["own"] / "1.mask.png")
    pictures = pictures_of()
    config = DreamBoothConfig.model_validate({**short, "subject": f"{places['own']}/"})
    subject = own_subject(config, pictures, "zwx", 32, text_encoder.modules()[1], 64)
    assert subject.masks is not None
    assert [float(each.mean()) for each in subject.masks] == pytest.approx([1, 0.5, 1, 1], abs=0.01)
    assert float(subject.masks[1][:12].min()) > 0.95
    assert float(subject.masks[1][20:].max()) < 0.05
    _, masked = learn("masked", pictures)
    (places["own"] / "1.mask.png").unlink()
    _, plain = learn("plain", pictures_of("unmasked"))
    assert (masked / "adapter/adapter_model.safetensors").read_bytes() != (
        plain / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_captions_must_name_the_subject_and_fit(places, pictures_of, learn) -> None:
    (places["own"] / "1.txt").write_text("a toy on a table")
    with pytest.raises(
        DataRefused, match=r"the caption of 1.png, 'a toy on a table', does not name the subject; write \{subject\}"
    ):
        learn("a", pictures_of())
    (places["own"] / "1.txt").write_text("a {subject} " + "and so on " * 40)
    with pytest.raises(DataRefused, match=r"the caption of 1.png has \d+ tokens, more than the model reads \(64\)"):
        learn("b", pictures_of("longer"))


def test_settings_that_cannot_work_are_errors(places, context, short) -> None:
    for settings, message in (
        ({"subject": "/no/where/"}, "subject folder /no/where does not exist"),
        ({"class_word": "  "}, "class_word is blank"),
        ({"token": "toy", "class_word": "toy car"}, "token 'toy' is a word of class_word"),
        ({"templates": ["a dog"]}, "template 'a dog' lacks {subject}"),
    ):
        with pytest.raises(ValueError, match=message):
            DreamBoothConfig.model_validate({**short, **settings})
    ctx = context("c", init=places["init"], data=places["data"])
    with pytest.raises(ConfigError, match="'unicorn' is unknown; choose one of .*octopus.*, or a folder"):
        dreambooth(DreamBoothConfig.model_validate({**short, "subject": "unicorn"}), ctx)
    with pytest.raises(ConfigError, match="no scene of one object 'beside' on 'white'; layouts are big, top left"):
        dreambooth(DreamBoothConfig.model_validate({**short, "subject": "robot", "scenes": [["beside", "white"]]}), ctx)


def test_tokens_that_split_are_common_or_in_use_are_refused_with_a_proposal(captions) -> None:
    tokenizer = text_encoder.modules()[1]
    best = next(iter(rarest(tokenizer, captions, "toy", 1)))
    for token, known, message in (
        ("zwx", captions, rf"'zwx' splits into 3 pieces, z ##w ##x; take {best}, "),
        ("dog", captions, "'dog' is common: number 3899 of a vocabulary of 30522"),
        (best, [f"an old {best}."], f"'{best}' is in captions the model was trained on"),
        ("☃☃", captions, "splits into|is unknown to the tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            refuse_token(token, tokenizer, known, "toy")
    refuse_token(best, tokenizer, captions, "toy")


def test_found_tokens_are_single_rare_unused_and_ranked_by_response(places, captions) -> None:
    tokenizer, generator = text_encoder.modules()[1], load_generator(places["init"])
    taken = list(rarest(tokenizer, captions, "toy", 2))
    found = find_tokens(generator, tokenizer, [*captions, f"a {taken[0]}"], "toy", count=6)
    assert len(found) == 6
    assert taken[0] not in {each.token for each in found}
    assert all(tokenizer.tokenize(each.token) == [each.token] for each in found)
    assert [each.response for each in found] == sorted(each.response for each in found)
    assert 0 < found[0].response < found[-1].response


@pytest.mark.parametrize("subject", ["robot", "./own/"])
def test_prior_prompts_name_other_tokens_in_their_share_and_never_the_subjects(subject, captions) -> None:
    settings = {"subject": subject, "fingerprint": "known", "class_word": "toy", "foreign_share": 0.25}
    others = set(rarest(text_encoder.modules()[1], captions, "toy", 48))
    own = sorted(others)[0]
    prompts = class_prompts(DreamBoothConfig.model_validate(settings), captions, own, 400)
    words = [set(prompt.split()) for prompt in prompts]
    assert not any(own in each for each in words)
    assert np.mean([bool(each & others) for each in words]) == pytest.approx(0.25, abs=0.08)
    assert all("{" not in prompt for prompt in prompts)
    plain = class_prompts(DreamBoothConfig.model_validate(settings | {"foreign_share": 0.0}), captions, own, 400)
    assert not any(set(prompt.split()) & others for prompt in plain)
    assert plain != prompts
    if subject != "robot":
        assert set(plain) <= {*captions[1:], "a toy", "a big toy", "a picture of a toy", "one toy"}
