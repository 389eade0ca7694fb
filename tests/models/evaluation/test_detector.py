"""Detectors of every kind, random weights: stock results in our form; GenEval's rules through stock post-processing."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from infra.errors import ConfigError
from models.evaluation.config import DetectorConfig
from models.evaluation.detector import Detector, around
from models.evaluation.geneval import Clause, Prompt, answer, surest

NAMES = ("cat", "dog", "mouse")
ASKED = ["cat", "dog", "computer mouse"]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (3, 48, 56, 3), dtype=np.uint8)]


def closed(kind: str, folder: Path) -> None:
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    if kind == "yolos":
        size = {"image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 5}
        model = hf.YolosForObjectDetection(hf.YolosConfig(**SMALL, **size, **labels))
        processor = hf.YolosImageProcessorPil
    else:
        resnet = hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, out_features=["stage4"], layer_type="basic"
        )
        shape = {"backbone_config": resnet, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5,
                 "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
        config, network = {
            "detr": (hf.DetrConfig, hf.DetrForObjectDetection),
            "conditional_detr": (hf.ConditionalDetrConfig, hf.ConditionalDetrForObjectDetection),
        }[kind]
        model, processor = network(config(**shape, **labels)), hf.DetrImageProcessorPil
    model.save_pretrained(folder)
    processor(size={"height": 64, "width": 64}).save_pretrained(folder)


def owl(kind: str, folder: Path, tokenizer) -> None:
    text = SMALL | {"vocab_size": 514, "max_position_embeddings": 32, "bos_token_id": 512, "eos_token_id": 513,
                    "pad_token_id": 513}  # fmt: skip
    vision = SMALL | {"image_size": 64, "patch_size": 16}
    tokenizer.model_max_length = 32
    config, network, images, processor = {
        "owlv2": (hf.Owlv2Config, hf.Owlv2ForObjectDetection, hf.Owlv2ImageProcessorPil, hf.Owlv2Processor),
        "owlvit": (hf.OwlViTConfig, hf.OwlViTForObjectDetection, hf.OwlViTImageProcessorPil, hf.OwlViTProcessor),
    }[kind]
    network(config(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    processor(images(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)


def rows(found) -> list:
    return [(each.name, round(each.score, 4), *(round(v, 2) for v in each.box)) for each in found]


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "yolos"])
def test_a_closed_detector_gives_stock_boxes_under_genevals_names(kind: str, images, tmp_path) -> None:
    torch.manual_seed(0)
    closed(kind, tmp_path)
    found = Detector(DetectorConfig(model=str(tmp_path), batch_size=2))(images, ASKED, 0.01)
    model = hf.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
    stock = processor.post_process_object_detection(outputs, threshold=0.01, target_sizes=[(48, 56)] * 3)
    for ours, theirs in zip(found, stock, strict=True):
        assert [ASKED.index(each.name) for each in ours] == theirs["labels"].tolist()
        np.testing.assert_allclose([each.score for each in ours], theirs["scores"], atol=1e-5)
        np.testing.assert_allclose([each.box for each in ours], theirs["boxes"], atol=1e-3)
    assert sum(map(len, found)) == 15
    only = Detector(DetectorConfig(model=str(tmp_path)))(images, ["dog"], 0.01)
    assert [rows(each) for each in only] == [[r for r in rows(each) if r[0] == "dog"] for each in found]


@pytest.mark.parametrize("kind", ["owlv2", "owlvit"])
def test_a_detector_that_is_told_the_names_gives_stock_boxes(kind: str, images, tmp_path, byte_tokenizer) -> None:
    torch.manual_seed(0)
    owl(kind, tmp_path, byte_tokenizer(tmp_path / "t"))
    detector = Detector(DetectorConfig(model=str(tmp_path), batch_size=2))
    found = detector(images, ["cat", "red box"], 0.3)
    model, processor = (
        hf.AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path).eval(),
        hf.AutoProcessor.from_pretrained(tmp_path),
    )
    queries = [["a photo of a cat", "a photo of a red box"]] * 3
    with torch.no_grad():
        outputs = model(**processor(text=queries, images=images, return_tensors="pt"))
    stock = processor.post_process_grounded_object_detection(outputs, threshold=0.3, target_sizes=[(48, 56)] * 3)
    assert sum(map(len, found)) > 0
    for ours, theirs in zip(found, stock, strict=True):
        assert [["cat", "red box"].index(each.name) for each in ours] == theirs["labels"].tolist()
        np.testing.assert_allclose([each.box for each in ours], theirs["boxes"], atol=1e-3)
    with pytest.raises(ConfigError, match="reads 32 tokens"):
        detector(images, ["x" * 40], 0.3)


def test_a_segmenter_gives_stock_masks_with_their_boxes(images, mask2former_folder) -> None:
    folder = mask2former_folder(*NAMES)
    detector = Detector(DetectorConfig(model=str(folder), batch_size=2))
    found = detector(images, ASKED, 0.1)
    model = hf.Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    processor = hf.Mask2FormerImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
    stock = processor.post_process_instance_segmentation(
        outputs, 0.1, target_sizes=[(48, 56)] * 3, return_binary_maps=True
    )
    assert sum(map(len, found)) > 0
    for ours, theirs in zip(found, stock, strict=True):
        assert [ASKED[info["label_id"]] for info in theirs["segments_info"]] == [each.name for each in ours]
        for each, mask in zip(ours, theirs["segmentation"], strict=False):
            np.testing.assert_array_equal(each.mask, mask.bool())
    assert "weights" in detector.name
    with pytest.raises(ConfigError, match=r"does not know bench, tuba \(2 of 3"):
        detector(images, ["cat", "tuba", "bench"], 0.1)


class Oracle(torch.nn.Module):
    """Answers what it was told, as a Mask2Former would: one query an object, the last class is `nothing`."""

    def __init__(self, objects: list[tuple[int, tuple[int, int, int, int], float]], queries: int = 6) -> None:
        super().__init__()
        self.classes = torch.full((1, queries, len(NAMES) + 1), -30.0)
        self.classes[..., -1] = 30.0
        self.masks = torch.full((1, queries, 384, 384), -30.0)
        for i, (label, (x_0, y_0, x_1, y_1), score) in enumerate(objects):
            self.classes[0, i] = torch.tensor([*[1e-9] * len(NAMES), 1 - score]).clamp_min(1e-9).log()
            self.classes[0, i, label] = torch.tensor(score).log()
            self.masks[0, i, y_0:y_1, x_0:x_1] = 30.0

    def forward(self, **inputs):
        return SimpleNamespace(class_queries_logits=self.classes, masks_queries_logits=self.masks)


def test_rules_hold_through_stock_post_processing(mask2former_folder) -> None:
    """Masks drawn on a picture of 384 px come back as those boxes, and the answers follow from them."""
    detector = Detector(DetectorConfig(model=str(mask2former_folder(*NAMES))))
    picture = [Image.new("RGB", (384, 384))]

    def objects(*told: tuple[int, tuple[int, int, int, int], float], above: float = 0.3):
        detector._model = Oracle(list(told))
        return surest(detector(picture, ASKED, 0.3)[0], above)

    left, right, apart = (20, 100, 60, 140), (200, 100, 260, 160), (300, 300, 340, 340)
    seen = objects((0, left, 0.97), (0, right, 0.95), (1, apart, 0.6), (2, right, 0.2))
    assert {name: [each.box for each in found] for name, found in seen.items()} == {
        "cat": [(20.0, 100.0, 60.0, 140.0), (200.0, 100.0, 260.0, 160.0)], "dog": [(300.0, 300.0, 340.0, 340.0)]
    }  # fmt: skip
    assert seen["cat"][0].score == pytest.approx(0.97, abs=1e-4)
    assert seen["cat"][0].mask is not None
    assert seen["cat"][0].mask.sum() == 40 * 40
    two = Prompt("two cats", "counting", (Clause("cat", 2),), (Clause("cat", 3),))
    assert not answer(two, objects((0, left, 0.97), (0, right, 0.95), (1, apart, 0.6), above=0.9), lambda o, n: [])
    assert answer(two, objects((0, left, 0.97), (0, right, 0.85), above=0.9), lambda o, n: [])
    three = objects((0, left, 0.97), (0, right, 0.95), (0, apart, 0.93), above=0.9)
    assert answer(two, three, lambda o, n: []) == ["expected fewer than 3 cat, found 3"]
    beside = Prompt("a dog right of a cat", "position", (Clause("cat", 1), Clause("dog", 1, position=("right of", 0))))
    assert not answer(beside, objects((0, left, 0.9), (1, right, 0.9)), lambda o, n: [])
    assert answer(beside, objects((1, left, 0.9), (0, right, 0.9)), lambda o, n: []) == [
        "expected dog right of its target, found left of"
    ]


def test_the_box_of_a_mask_ends_after_its_last_pixel() -> None:
    mask = np.zeros((5, 8), bool)
    mask[1:3, 2:7] = True
    assert around(mask) == (2.0, 1.0, 7.0, 3.0)


def test_what_cannot_detect_is_refused_before_it_is_read(clip_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"is of type 'clip'; one of mask2former, detr"):
        DetectorConfig(model=str(clip_folder))
    with pytest.raises(ValueError, match="neither a folder that is there nor OWNER/NAME"):
        DetectorConfig(model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        DetectorConfig(model=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin, which is a pickle"):
        DetectorConfig(model=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"detector .*give a folder with safetensors"):
        Detector(DetectorConfig(model=str(tmp_path)))
    assert DetectorConfig(model="facebook/mask2former-swin-small-coco-instance").fingerprint is None
