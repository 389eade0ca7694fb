"""Files of LoRA adapters on a tiny random SD3 transformer (and PRX): stock loaders agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.networks.config import LoraConfig
from models.personalization import lora_files, lora_import
from models.personalization.lora import add_lora

LAYER = "transformer_blocks.0.attn.to_q"
BASE = "sha256:0123"  # what conftest writes
VARIANTS = ("alpha-r", "alpha-4r", "rslora", "dora", "mixed")


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 64)}
    noise = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return noise | {"timestep": torch.tensor([900.0, 300.0])}


def draw(module) -> torch.Tensor:
    with torch.no_grad():
        return module(**inputs()).sample


def error(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())


@pytest.fixture(scope="module")
def stock(tmp_path_factory, base, adapted, adapter) -> dict[str, torch.Tensor]:
    """What stock diffusers draws in a new process with each file, with metadata and stripped of it."""
    root = tmp_path_factory.mktemp("stock")
    base().save_pretrained(root / "base")
    save_file(inputs(), root / "inputs.safetensors")
    for variant in VARIANTS:
        file = lora_files.save_diffusers(adapter(variant), root / f"variant-{variant}")
        stripped = root / f"variant-{variant}-stripped"
        stripped.mkdir()
        save_file(load_file(file), stripped / file.name)
    fresh = lora_files.from_module(adapted(fresh=True), {})
    lora_files.save_diffusers(fresh, root / "variant-fresh")
    unfolded = {}  # negative control: what a plain dump of B would have been
    for name, (a, b) in adapter("alpha-4r").layers.items():
        unfolded |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b / 4}
    (root / "variant-unfolded").mkdir()
    save_file(unfolded, root / "variant-unfolded" / lora_files.DIFFUSERS_FILE)
    script = Path(__file__).with_name("stock_lora.py")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(script), str(root)], check=True, env=clean, cwd=root)
    return load_file(root / "drawn.safetensors")


@pytest.mark.parametrize("suffix", ["", "-stripped"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_diffusers_draws_the_same_in_a_new_process(stock, variant, suffix, base, adapted) -> None:
    want = draw(adapted(variant))
    assert error(stock[f"variant-{variant}{suffix}"], want) <= 1e-6
    assert error(want, draw(base())) > 1e-2


def test_a_lost_scale_would_be_seen(stock, adapted) -> None:
    assert error(stock["variant-unfolded"], draw(adapted("alpha-4r"))) > 1e-2


def test_fresh_adapter_and_weight_zero_change_no_bit(stock, base, adapted) -> None:
    assert torch.equal(stock["variant-fresh"], stock["plain-variant-fresh"])
    assert torch.equal(draw(adapted(fresh=True)), draw(base()))
    zeros = {name.removeprefix("zero-"): value for name, value in stock.items() if name.startswith("zero-")}
    assert len(zeros) == 2 * len(VARIANTS) + 2
    plain = {name: value for name, value in zeros.items() if "dora" not in name}  # diffusers leaves DoRA's m in force
    assert len(plain) == len(zeros) - 2
    assert all(torch.equal(value, stock[f"plain-{name}"]) for name, value in plain.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_comes_back_to_the_bit(variant, tmp_path, base, adapted, adapter) -> None:
    source = adapter(variant)
    lora_files.save_peft(source, tmp_path / "peft")
    lora_files.save_diffusers(source, tmp_path / "diffusers")
    lora_files.save_kohya(source, tmp_path / "kohya.safetensors", "sd3")
    for form in ("peft", "diffusers", "kohya.safetensors"):
        module = base()
        again = lora_import.load(module, tmp_path / form, BASE)
        assert again.about == source.about
        assert again.layers.keys() == source.layers.keys()
        for name, (a, b) in source.layers.items():
            assert torch.equal(again.layers[name][0], a)
            assert torch.equal(again.layers[name][1], b)
            assert torch.equal(module.get_submodule(name).get_delta_weight("default"), b @ a)
        assert again.magnitudes.keys() == source.magnitudes.keys()
        assert all(torch.equal(again.magnitudes[name], m) for name, m in source.magnitudes.items())
        assert error(draw(module), draw(adapted(variant))) <= 1e-6


def test_stock_peft_loads_the_peft_folder(tmp_path, base, adapted, adapter) -> None:
    lora_files.save_peft(adapter("mixed"), tmp_path)
    assert error(draw(peft.PeftModel.from_pretrained(base(), tmp_path)), draw(adapted("mixed"))) <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_peft_folder_of_others_keeps_its_scale(variant, tmp_path, base, adapted, lora_settings) -> None:
    """Saved by stock peft: the scale is not folded in, it is in adapter_config.json."""
    model = peft.get_peft_model(base(), peft.LoraConfig(**lora_settings(variant)))
    values = adapted(variant).state_dict()
    model.load_state_dict({f"base_model.model.{name}": value for name, value in values.items()})
    model.save_pretrained(tmp_path)
    module = base()
    lora_import.load(module, tmp_path)
    assert error(draw(module), draw(adapted(variant))) <= 1e-6


def test_a_diffusers_file_of_others_keeps_its_scale(tmp_path, base, adapted) -> None:
    """As StableDiffusion3Pipeline.save_lora_weights writes it: plain tensors, the scale in the header."""
    values = {n.replace(".default", ""): p.detach() for n, p in adapted("alpha-4r").named_parameters() if ".lora_" in n}
    said = {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.use_rslora": False}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(said)}
    save_file({f"transformer.{n}": v for n, v in values.items()}, tmp_path / "x.safetensors", metadata=header)
    module = base()
    lora_import.load(module, tmp_path / "x.safetensors")
    assert error(draw(module), draw(adapted("alpha-4r"))) <= 1e-6


def test_a_kohya_file_of_others_keeps_its_alpha(tmp_path, base, adapter) -> None:
    lora_files.save_kohya(adapter(), tmp_path / "a.safetensors", "sd3", prefix="lora_unet_")
    tensors = load_file(tmp_path / "a.safetensors")
    halved = {k: v / 2 if k.endswith(".alpha") else v for k, v in tensors.items()}
    save_file(halved, tmp_path / "b.safetensors")
    read = lora_import.read(tmp_path / "b.safetensors", base())
    assert torch.equal(read.layers[LAYER][1], adapter().layers[LAYER][1] / 2)


def test_kohya_header_and_deterministic_bytes(tmp_path, adapter) -> None:
    for folder in ("one", "two"):
        lora_files.save_kohya(adapter("mixed"), tmp_path / folder / "x.safetensors", "sd3")
        lora_files.save_diffusers(adapter("mixed"), tmp_path / folder)
        lora_files.save_peft(adapter("mixed"), tmp_path / folder)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(names) == 4
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    with safe_open(tmp_path / "one" / "x.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["ss_network_dim"] == "Dynamic"
    assert header["ss_network_module"] == "networks.lora"
    assert header["modelspec.architecture"] == "sd3/lora"
    assert header["modelspec.trigger_phrase"] == "zwx"
    assert json.loads(header["t2i"]) == {"base": BASE, "trigger": "zwx"}


def test_all_forms_on_prx(tiny, batches, tmp_path) -> None:
    denoiser, batch = tiny(0), batches(0)
    add_lora(denoiser, LoraConfig(rank=4), 0)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.05)
        t = torch.full((4,), 0.5)
        want = denoiser(batch.images, t, batch.tokens, batch.mask)[0]
        source = lora_files.from_module(denoiser.transformer, {})
        lora_files.save_diffusers(source, tmp_path)
        lora_files.save_kohya(source, tmp_path / "kohya.safetensors", "prx")
        for path in (tmp_path, tmp_path / "kohya.safetensors"):
            again = tiny(0)
            lora_import.load(again.transformer, path)
            assert torch.equal(again(batch.images, t, batch.tokens, batch.mask)[0], want)


def test_dora_changes_the_weight_by_equation_5(base, adapted, adapter) -> None:
    """The merged weight is m (W + B A) / |W + B A|, row by row, and draws what peft's layers draw."""
    dora, weights = adapter("dora"), base().state_dict()
    w, (a, b) = weights[f"{LAYER}.weight"], dora.layers[LAYER]
    for row in range(3):
        moved = w[row] + sum(b[row, k] * a[k] for k in range(4))
        want = dora.magnitudes[LAYER][row] * moved / moved.square().sum().sqrt()
        torch.testing.assert_close(w[row] + dora.change(LAYER, w)[row], want)
    merged = base()
    merged.load_state_dict({n: v for n, v in weights.items()} | {
        f"{n}.weight": weights[f"{n}.weight"] + dora.change(n, weights[f"{n}.weight"]) for n in dora.layers
    })  # fmt: skip
    assert error(draw(merged), draw(adapted("dora"))) <= 1e-5
    assert torch.equal(draw(adapted("dora", fresh=True)), draw(base()))


def test_what_has_no_file_form_is_not_saved(base) -> None:
    with pytest.raises(ValueError, match="the module has no adapter 'default'"):
        lora_files.from_module(base(), {})
    module = base()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"], r=2, lora_bias=True), module)
    with pytest.raises(ValueError, match="attn.to_q: only LoRA and DoRA"):
        lora_files.from_module(module, {})
