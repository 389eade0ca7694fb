"""Subjects with a learnt word and a tuned text encoder through the stage function, at toy size with the real text encoder."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from infra.errors import ConfigError
from models.networks import prx
from models.networks.checkpoint import read_card
from models.networks.export import export_pipeline
from models.personalization import lora_files, lora_import
from models.personalization.text_tuning import tunes_text
from models.sampling.generate import load_generator
from tasks.export import export_adapter

WORD = {
    "text": {
        "vectors": 2,
        "alone": 0.5,
        "until": 0.5,
        "token_optimizer": {"muon_lr": None, "adamw_lr": 0.3, "warmup_steps": 0},
    }
}
TEXT_LORA = {"rank": 2, "targets": ["query", "value"]}


@pytest.mark.parametrize("lora", [None, TEXT_LORA])
def test_a_learnt_word_lies_in_tokenizer_encoder_and_a_file_and_stock_draws_it(
    lora, places, pictures_of, learn
) -> None:
    facts, out = learn("dreambooth-my-toy", pictures_of(), text=WORD["text"] | {"lora": lora})
    assert facts["token"] == read_card(out).trigger == "mytoy0 mytoy0_1"
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    rows = load_file(out / "adapter" / lora_files.ROWS_FILE)["mytoy0"]
    table = load_file(out / "text_encoder" / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert tokenizer.tokenize("A mytoy0 mytoy0_1 toy") == ["a", "mytoy0", "mytoy0_1", "toy"]
    assert torch.equal(table[tokenizer.convert_tokens_to_ids(["mytoy0", "mytoy0_1"])], rows)
    assert (rows - table[tokenizer.convert_tokens_to_ids("toy")]).abs().max() > 0.1
    forms = sorted(path.name for path in (out / "adapter").iterdir())
    assert (lora_files.PEFT_FILE in forms) == (lora is None)
    export_pipeline(out, places["root"] / "stock")
    pipeline = DiffusionPipeline.from_pretrained(places["root"] / "stock")
    pipeline.set_progress_bar_config(disable=True)
    prompt, own = "a mytoy0 mytoy0_1 toy", load_generator(out)
    with torch.no_grad():
        noise = torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(3))
        stock = pipeline(prompt, num_inference_steps=2, guidance_scale=2.0, latents=noise, height=32, width=32,
                         use_resolution_binning=False, output_type="np").images  # fmt: skip
    np.testing.assert_allclose(stock[0], own.sample([prompt], [3])[0] / 255, atol=0.51 / 255)
    assert np.abs(own.draw([prompt], [3]) - own.draw(["a toy"], [3])).max() > 1e-3
    export_adapter(out, places["root"] / "exported", "toy")
    assert sorted(path.name for path in (places["root"] / "exported").iterdir()) == forms
    assert tunes_text(out / "adapter")
    base = prx.load(places["init"] / "transformer")
    with pytest.raises(ValueError, match=r"learned_embeds.safetensors .*; take the checkpoint"):
        lora_import.read(out / "adapter", base.transformer)


def test_a_learnt_word_must_be_new(places, pictures_of, learn) -> None:
    for token, message in (("cats", "'cats' is in captions"), ("dog", "'dog' is a word the tokenizer has already")):
        with pytest.raises(ConfigError, match=message):
            learn(f"word-{token}", pictures_of(f"pictures-{token}"), token=token, **WORD)
