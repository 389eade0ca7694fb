"""Long captions: composed from metadata, or by a model, and always with who wrote them and what stood there before."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_curation.captioners import Subject, captioner, composed
from data_curation.filter_config import RecaptionConfig, VisionLanguageModel
from data_curation.manifest import ROWS_SCHEMA, Row, read_manifest, write_table
from data_curation.recaption import recaption
from data_curation.scenes import Scene, draw
from infra.errors import ConfigError
from infra.stages import StageContext

Make = Callable[..., StageContext]


def row(number: int, short: str, long: str, metadata: str | None = None, decision: str = "keep") -> Row:
    file = io.BytesIO()
    name = ("cat", "car", "key")[number % 3]
    draw(Scene("big", (name,), "blue"), 64, 64, np.random.default_rng(number)).save(file, "PNG")
    return {"row_id": f"r{number}", "image": file.getvalue(), "caption_short": short, "caption_long": long,
            "metadata": metadata, "decision": decision, "reasons": [] if decision == "keep" else ["blurred"]}  # fmt: skip


def ran(root: Path, context: Make, rows: list[Row], config: RecaptionConfig) -> tuple[dict[str, Any], dict[str, Row]]:
    (root / "download").mkdir()
    write_table(rows, ROWS_SCHEMA, root / "download" / "rows-00000.parquet")
    facts = recaption(config, context(root, "out", rows="download", images="download"))
    return facts, {found["row_id"]: found for found in read_manifest(root / "out")}


def test_composed_captions_say_each_thing_once() -> None:
    said = composed("a red  ball", {"title": "A red ball.", "description": "It lies on grass!", "tags": "toy, garden"})
    assert said == "a red ball. It lies on grass! Tags: toy, garden."
    assert composed("a red ball", {"alt": "Red ball"}) == ""
    assert composed("", {"Title": "Evening\nat sea"}) == "Evening at sea."
    assert composed("", {}) == ""


def test_only_missing_long_captions_are_composed(tmp_path: Path, context: Make) -> None:
    told = '{"description": "It lies on grass."}'
    rows = [row(0, "a ball", "a ball", told), row(1, "a ball", "a ball that was described", told),
            row(2, "a ball", "", None), row(3, "a ball", "a ball", told, "drop")]  # fmt: skip
    facts, found = ran(tmp_path, context, rows, RecaptionConfig())
    assert [found[f"r{i}"]["caption_long"] for i in range(4)] == [
        "a ball. It lies on grass.", "a ball that was described", "", "a ball",
    ]  # fmt: skip
    assert (found["r0"]["caption_long_before"], found["r0"]["caption_long_model"]) == ("a ball", "composed 1")
    assert found["r1"]["caption_long_model"] is None
    assert facts | {"captioner": "composed 1", "written": 1, "nothing_to_say": 1, "kept": 3, "received": 4} == facts


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLIP that speaks eight words."""
    import torch
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    spoken = ("a", "red", "ball", "cat", "dog", "on", "grass", "the")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *spoken]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = BertTokenizerFast(vocab=vocabulary, additional_special_tokens=["[DEC]"])
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 1.0,
    }  # so that different pictures get different words
    text = small | {"vocab_size": len(words), "encoder_hidden_size": 32, "bos_token_id": 5, "eos_token_id": 3,
                    "sep_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 40, "projection_dim": 16}  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prompt", ["", "a red"])
def test_a_model_of_transformers_writes(tmp_path: Path, context: Make, blip_folder: Path, prompt: str) -> None:
    config = VisionLanguageModel(model=str(blip_folder), prompt=prompt, max_new_tokens=5, batch_size=2)
    rows = [row(i, "a ball", "told before") for i in range(3)]
    facts, found = ran(tmp_path, context, rows, RecaptionConfig(captioner=config, rows="all"))
    assert facts["written"] == 3
    assert len({row["caption_long"] for row in found.values()}) > 1  # it looks at the pictures
    new = [row for row in found.values() if row["caption_long_model"]]
    assert all(row["caption_long_before"] == "told before" for row in new)
    assert all(
        set(row["caption_long"].split()) <= {"a", "red", "ball", "cat", "dog", "on", "grass", "the"} for row in new
    )
    assert prompt == "" or all(row["caption_long"].startswith(prompt) for row in new)  # BLIP goes on from its prompt
    assert new[0]["caption_long_model"].startswith(f"blip {blip_folder}, weights ")
    assert config.fingerprint


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a folder of an image-to-text model"):
        captioner(VisionLanguageModel(model=str(tmp_path)))


def test_pictures_are_decoded_only_when_asked_for() -> None:
    def never() -> Any:
        raise AssertionError

    from data_curation.filter_config import ComposedCaptions

    assert captioner(ComposedCaptions())([Subject("a", {"title": "b"}, never)]) == ["a. b."]
