"""Intent is kept by code whatever the language model says; the small model resumes to the bit and carries new words."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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

ADVERSARIAL = {  # what must come back to the letter, by hand
    'a sign that says "Open 24h"': ['"Open 24h"'], "three cats": ["three"], "7 red balloons": ["7", "red"],
    "a dog without a collar": ["without a collar"], "no people in a street": ["no people"], "sks dog": ["sks"],
    "a photo of ohwx person": ["ohwx"], "eine rote Katze": ["Katze"], "красный кот": ["красный", "кот"],
    "猫が三匹": ["猫が三匹"], "a cat 🐱 on a mat": ["🐱"], "Ada Lovelace at a desk": ["Ada", "Lovelace"],
    "a <token> vase": ["<token>"], "it isn't raining": ["isn't raining"], "two blue birds, not green": ["two", "blue", "not green"],
    "v2.5 logo": ["v2.5"], "": [],
}  # fmt: skip
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
        return self.answer, None


@pytest.mark.parametrize("prompt", ADVERSARIAL)
def test_every_protected_span_comes_back_to_the_letter_whatever_is_answered(prompt: str) -> None:
    intent = Intent(triggers=("sks", "ohwx"))
    spoilt = [prompt.lower(), prompt.replace('"', ""), prompt.replace(" ", ""), *prompt.split()]
    tried = [*ANSWERS, "soft light", *(f"{each}, on a wooden table in soft light" for each in (prompt, *spoilt))]
    for answer in tried:
        made = Enhancer(Says(answer), intent, "x").enhance(prompt)
        assert all(span in made.revised for span in ADVERSARIAL[prompt])
        assert (made.revised == prompt) == (made.reason is not None)
    assert set(ADVERSARIAL[prompt]) <= set(intent.protected(prompt))


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


def chat_model(folder: Path, *says: str, ends: bool = True) -> str:
    """A stock Llama that says these words whatever it is asked: each word (once only) makes the next one the likeliest."""
    words = ["<pad>", "<end>", "<to>", "<unk>", *says]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}<to>"
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=len(words) * 2, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=4096, tie_word_embeddings=False, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in (
        *model.model.layers[0].self_attn.o_proj.parameters(),
        *model.model.layers[0].mlp.down_proj.parameters(),
    ):
        parameter.data.zero_()
    one_hot = torch.eye(len(words), 2 * len(words))
    model.model.embed_tokens.weight.data.copy_(one_hot)
    spoken = list(range(4, len(words)))
    follows = dict(zip([2, *spoken], [*spoken, 1 if ends else spoken[0]], strict=True))
    model.lm_head.weight.data.zero_()
    for word, following in follows.items():
        model.lm_head.weight.data[following] += one_hot[word]
    model.save_pretrained(folder)
    return str(folder)


def rewritten(model: str, prompt: str, new_tokens: int = 20, seconds: float = 20):
    return Enhancer(InstructRewriter(InstructModel(model, seconds), new_tokens), Intent(), "x").enhance(prompt)


def test_a_chat_model_s_good_answer_is_taken_and_a_bad_one_is_not(tmp_path: Path) -> None:
    good = ["<answer>", "a", "fluffy", "red", "cat", "sleeping", "under", "warm", "light", "</answer>"]
    made = rewritten(chat_model(tmp_path / "good", *good), "a red cat")
    assert (made.revised, made.reason) == ("a fluffy red cat sleeping under warm light", None)
    bad = ["<answer>", "a", "fluffy", "blue", "cat", "sleeping", "under", "warm", "light", "</answer>"]
    made = rewritten(chat_model(tmp_path / "bad", *bad), "a red cat")
    assert (made.revised, made.reason) == ("a red cat", "the colour 'red' is not in the rewrite")
    plain = ["a", "fluffy", "red", "cat", "sleeping"]
    made = rewritten(chat_model(tmp_path / "plain", *plain), "a red cat")
    assert (made.revised, made.reason) == ("a fluffy red cat sleeping", None)


def test_an_answer_that_was_cut_is_none_though_it_keeps_the_rules(tmp_path: Path) -> None:
    model = chat_model(tmp_path / "cut", *["a", "fluffy", "red", "cat", "sleeping", "under", "warm", "light"])
    made = rewritten(model, "a red cat", new_tokens=4)  # "a fluffy red cat" would pass
    assert (made.revised, made.reason) == ("a red cat", "the language model did not end within 4 tokens or its time")
    started = time.monotonic()
    endless = chat_model(tmp_path / "endless", *["a", "red", "cat"], ends=False)
    made = rewritten(endless, "a red cat", new_tokens=3900, seconds=0.05)
    assert made.revised == "a red cat"
    assert "did not end within 3900 tokens or its time" in str(made.reason)
    assert time.monotonic() - started < 30
    closed = chat_model(
        tmp_path / "closed", *["<answer>", "a", "fluffy", "red", "cat", "</answer>", "and", "more", "talk"]
    )
    assert rewritten(closed, "a red cat", new_tokens=7).revised == "a fluffy red cat"


def test_the_answer_is_what_is_marked_or_not_thought() -> None:
    assert answer_of("<think>hm</think> so <answer> a “red”\ncat </answer>") == 'a "red" cat'
    assert answer_of("<think>never ends") == ""
    assert answer_of("a cat") == "a cat"


def test_a_model_that_fails_gives_the_prompt_back() -> None:
    class Broken:
        def answer(self, system: str, prompt: str, new_tokens: int) -> tuple[str, bool]:
            raise RuntimeError("out of memory")

    made = Enhancer(InstructRewriter(Broken(), 8), Intent(), "x").enhance("a cat")
    assert (made.revised, made.reason) == ("a cat", "the language model failed: RuntimeError")
    assert json.dumps(made.__dict__)
