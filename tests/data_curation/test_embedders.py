"""Embedders say what they are, give stock features, and like pictures are alike."""

import hashlib

import numpy as np
import torch
from PIL import Image
from transformers import BitImageProcessor, CLIPModel, CLIPProcessor, Dinov2Config, Dinov2Model

from data_curation.embedders import embedder
from data_curation.filter_config import HubEmbedder, PackagedEmbedder
from data_curation.scenes import Scene, draw_batch


def test_the_packaged_one_knows_its_weights_and_like_pictures_are_alike() -> None:
    found = embedder(PackagedEmbedder(side=128))
    scenes = [Scene("big", ("cat",), "blue"), Scene("big", ("cat",), "blue"), Scene("big", ("rocket",), "white")]
    a, b, c = found([Image.fromarray(image) for image in draw_batch(scenes, 32, 0)])
    assert "weights 579344248a93" in found.name
    assert len(a) == 1280
    assert a @ b > a @ c + 0.05
    assert found.texts(["a cat"]) is None


def test_clip_gives_stock_features_of_pictures_and_texts(clip_folder) -> None:
    found = embedder(HubEmbedder(model=str(clip_folder)))
    images = [Image.fromarray(each) for each in np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)]
    stock, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    asked = processor(images=images, text=["a", "bc", "def"], return_tensors="pt", padding=True)
    with torch.no_grad():
        want = stock(**asked)
    np.testing.assert_allclose(found(images), want.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.texts(["a", "bc", "def"]), want.text_embeds.numpy(), atol=1e-5)
    weights = hashlib.sha256((clip_folder / "model.safetensors").read_bytes()).hexdigest()
    assert found.name.endswith(f"weights {weights[:12]}")


def test_a_vision_model_without_texts_gives_its_pooled_features(tmp_path) -> None:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28))
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    found = embedder(HubEmbedder(model=str(tmp_path)))
    assert found([Image.new("RGB", (30, 30))] * 2).shape == (2, 16)
    assert found.texts(["a"]) is None
    assert found.name.startswith("dinov2")
