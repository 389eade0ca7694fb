"""Intent is kept by code whatever the language model says; the small model resumes to the bit and carries new words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.networks.prompt_enhancer import SPECIAL, CaptionModel, InstructModel, build, example, train_tokenizer
from models.posttraining.caption_pairs import PairSource, addable, vocabulary
from models.posttraining.intent import Intent, looping
from models.posttraining.prompt_enhancement import (
    Enhancer,
    InstructRewriter,
    PromptRewriting,
    SlotRewriter,
    answer_of,
    batch_of,
)

ADVERSARIAL = [
    'a sign that says "Open 24h"', "three cats", "7 red balloons", "a dog without a collar", "no people in a street",
    "sks dog", "a photo of ohwx person", "eine rote Katze", "красный кот", "猫が三匹", "a cat 🐱 on a mat",
    "Ada Lovelace at a desk", "a <token> vase", "it isn't raining", "two blue birds, not green", "v2.5 logo", "",
]  # fmt: skip
ANSWERS = [
    "",
    "a picture",
    "a big cat on a blue background",
    "ein großer Hund auf dem Tisch und eine Katze",
    "cat cat cat cat",
]


class Says:
    """A rewriter that always gives one answer."""

    def __init__(self, answer: str) -> None:
        self.answer, self.asked = answer, 0

    def rewrite(self, prompt: str) -> tuple[str | None, str | None]:
        self.asked += 1
        return self.answer.format(prompt=prompt), None


@pytest.mark.parametrize("prompt", ADVERSARIAL)
def test_every_protected_span_comes_back_whatever_is_answered(prompt: str) -> None:
    intent = Intent(triggers=("sks", "ohwx"))
    for answer in [*ANSWERS, "{prompt}, on a wooden table in soft light", "soft light"]:
        made = Enhancer(Says(answer), intent, "x").enhance(prompt)
        assert all(span.lower() in made.revised.lower() for span in intent.protected(made.original))
        assert (made.revised == prompt) == (made.reason is not None)
    if prompt:
        assert intent.protected(prompt)


@pytest.mark.parametrize(
    ("prompt", "revised", "why"),
    [
        ("a cat", "three cats in a row", "invents the number 'three'"),
        ("a red ball", "a red ball on a blue floor", "invents the colour 'blue'"),
        ("a red ball", "a ball on the floor", "colour 'red' is not"),
        ("two dogs", "dogs on a meadow", "number 'two' is not"),
        ("a dog without a hat", "a dog on a meadow", "'without a hat' is not"),
        ("a dog", "a dog, no people", "denies 'no people'"),
        ("a dog", "a dog under a banner that reads 'Hi'", "invents a quotation"),
        ("a heart", "a heart above a heart", "says 'heart' 2 times"),
        ("the cat on the mat", "eine Katze liegt auf der Matte und sie ist ein Tier", "language is de"),
        ("a cat", "кот a cat", "cyrillic letters"),
        ("a cat", "a cat in the sun in the sun in the sun in the sun", "repeats itself"),
        ("a cat", "a cat " + "of very soft and warm light " * 2 + "x " * 70, "tokens, the text encoder reads 64"),
        ("eels robot", "a big robot", "'eels' is not"),
    ],
)
def test_a_rewrite_that_changes_the_intent_is_refused_with_its_reason(prompt: str, revised: str, why: str) -> None:
    made = Enhancer(Says(revised), Intent(triggers=("eels",)), "x").enhance(prompt)
    assert made.revised == prompt
    assert made.reason is not None
    assert why in made.reason


def test_details_may_be_added_and_frames_may_go() -> None:
    enhancer = Enhancer(Says("a small cat in the top left corner on a blue background"), Intent(), "x")
    made = enhancer.enhance("a picture of a cat")
    assert made.reason is None
    assert made.original == "a picture of a cat"
    assert not looping(made.revised)


def test_each_prompt_is_asked_once_and_the_stored_answer_has_the_same_bytes(tmp_path: Path) -> None:
    says = Says("a cat on a mat")
    first = Enhancer(says, Intent(), "model", tmp_path)
    made = first.enhance("a cat")
    (file,) = tmp_path.iterdir()
    stored = file.read_bytes()
    assert first.enhance("a cat") is made
    assert Enhancer(says, Intent(), "model", tmp_path).enhance("a cat") == made
    assert says.asked == 1
    assert file.read_bytes() == stored
    Enhancer(says, Intent(), "other model", tmp_path).enhance("a cat")
    assert says.asked == 2


def toy() -> list[tuple[str, str]]:
    captions = [f"a {s} {o} on a {c} background" for s in ("big", "small") for o in ("cat", "key", "tree", "ball")
                for c in ("red", "blue")]  # fmt: skip
    return [(text, text) for text in captions]


def trained(folder: Path, steps: int, stop: int | None = None) -> tuple[CaptionModel, Intent, torch.Tensor]:
    captions = toy()
    intent = Intent(vocabulary(captions), addable(captions, 0))
    tokenizer = train_tokenizer((text for pair in captions for text in pair), 300)
    model = build(len(tokenizer), 64, 2, 2, 0)
    source = PairSource(captions, intent, 0)

    class Killed(Exception):
        pass

    def batches(step: int):
        if step == stop:
            raise Killed
        rows = np.random.default_rng(step).integers(len(captions), size=16)
        pairs = [source.pair(step, slot, int(row)) for slot, row in enumerate(rows)]
        return batch_of([example(tokenizer, p.short, p.long) for p in pairs], tuple(range(16)), SPECIAL.index("<pad>"))

    optimizer = OptimizerConfig(muon_lr=0.02, adamw_lr=5e-3, warmup_steps=5)
    config = TrainConfig(steps=steps, batch_size=16, log_every=4, checkpoint_every=4, ema_gamma=6, optimizer=optimizer)
    try:
        train(PromptRewriting(model), batches, config, folder)
    except Killed:
        return trained(folder, steps)
    return CaptionModel(model, tokenizer), intent, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_resumes_to_the_bit(tmp_path: Path) -> None:
    assert torch.equal(trained(tmp_path / "whole", 12)[2], trained(tmp_path / "killed", 12, stop=9)[2])


def test_a_trained_model_completes_prompts_carries_unread_words_and_is_a_stock_folder(tmp_path: Path) -> None:
    model, intent, _ = trained(tmp_path / "run", 300)
    enhancer = Enhancer(SlotRewriter(model, intent), intent, "x")
    made = [enhancer.enhance(text) for text in ("key, red", "tree", "small ball", "zebra on blue", "ohwx zebra, red")]
    assert sum(e.reason is None and e.revised.endswith("background") for e in made) >= 4
    assert "zebra" in made[3].revised
    assert "ohwx zebra" in made[4].revised
    assert enhancer.enhance("a cat without ears").reason is not None
    model.save(tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stock")
    ids = torch.tensor([tokenizer.encode("key, red", add_special_tokens=False)])
    torch.testing.assert_close(stock(ids).logits, model.model(ids).logits)
    assert CaptionModel.load(tmp_path / "stock").complete("key, red", 40) == model.complete("key, red", 40)


def test_a_chat_model_goes_through_the_same_rules(tmp_path: Path) -> None:
    model, _, _ = trained(tmp_path / "run", 2)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<to>{% endfor %}"
    model.save(tmp_path / "chat")
    chat = InstructModel(str(tmp_path / "chat"), seconds=20)
    made = Enhancer(InstructRewriter(chat, 8), Intent(), "x").enhance("a red cat")
    assert made.revised == "a red cat"
    assert made.reason is not None
    assert answer_of("<think>hm</think> so <answer> a “red”\ncat </answer>") == 'a "red" cat'
    assert answer_of("<think>never ends") == ""
    assert answer_of("a cat") == "a cat"


def test_a_model_that_fails_gives_the_prompt_back() -> None:
    class Broken:
        def answer(self, system: str, prompt: str, new_tokens: int) -> str:
            raise RuntimeError("out of memory")

    made = Enhancer(InstructRewriter(Broken(), 8), Intent(), "x").enhance("a cat")
    assert (made.revised, made.reason) == ("a cat", "the language model failed: RuntimeError")
    assert json.dumps(made.__dict__)
