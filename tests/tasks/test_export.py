import shutil
from pathlib import Path

import torch

from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import LoraConfig, PrxConfig
from models.personalization import lora_files, lora_import
from models.personalization.lora import add_lora, merge, save_adapter
from tasks.export import export_adapter

TINY = PrxConfig(hidden_size=32, depth=2, num_heads=2, patch_size=4, text_dim=16, mlp_ratio=2.0, prompt_max_tokens=16)


def test_an_adapter_is_exported_in_all_forms(tmp_path: Path) -> None:
    denoiser = prx.build(TINY, torch.zeros(16), torch.ones(16), seed=0)
    add_lora(denoiser, LoraConfig(rank=2), seed=0)
    about = {"base": "abc", "trigger": "zwx"}
    save_adapter(denoiser, tmp_path / "checkpoint" / "adapter", about)
    write_checkpoint(tmp_path / "checkpoint", merge(denoiser), SamplingCard())
    export_adapter(tmp_path / "checkpoint", tmp_path / "out", "dreambooth-robot")
    shutil.rmtree(tmp_path / "checkpoint")
    names = ("", lora_files.DIFFUSERS_FILE, "dreambooth-robot-kohya.safetensors")
    forms = [lora_import.read(tmp_path / "out" / name, denoiser.transformer, "abc") for name in names]
    want = lora_files.from_module(denoiser.transformer, about)
    for form in forms:
        assert form.about == about
        assert form.layers.keys() == want.layers.keys()
        assert all(torch.equal(form.layers[n][i], want.layers[n][i]) for n in want.layers for i in (0, 1))
