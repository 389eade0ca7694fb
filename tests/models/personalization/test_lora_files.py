"""Files of LoRA adapters on a tiny random SD3 transformer (and PRX): stock loaders agree, the strict import refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.personalization import lora_files, lora_import
from models.personalization.config import LoraConfig
from models.personalization.lora import add_lora

TARGETS = ["to_q", "to_k", "add_v_proj", "to_out.0", "ff.net.0.proj", "proj_out"]
VARIANTS = {
    "alpha-r": {"r": 4, "lora_alpha": 4},
    "alpha-4r": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "mixed": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2, "ff.net.0.proj": 3}, "alpha_pattern": {"to_k": 5},
    },
}  # fmt: skip
LAYER = "transformer_blocks.0.attn.to_q"
BASE = "sha256:0123"


def base() -> SD3Transformer2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64,
        ).eval()  # fmt: skip


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 64)}
    noise = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return noise | {"timestep": torch.tensor([900.0, 300.0])}


def draw(module) -> torch.Tensor:
    with torch.no_grad():
        return module(**inputs()).sample


def adapted(variant: str = "alpha-r", fresh: bool = False) -> SD3Transformer2DModel:
    module = base()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS, **VARIANTS[variant]), module)
        for name, parameter in module.named_parameters():
            if ".lora_B." in name and not fresh:
                torch.nn.init.normal_(parameter, std=0.1)
    return module


def adapter(variant: str = "alpha-r") -> lora_files.Adapter:
    return lora_files.from_module(adapted(variant), {"base": BASE, "trigger": "zwx"})


def error(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> dict[str, torch.Tensor]:
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
def test_stock_diffusers_draws_the_same_in_a_new_process(stock, variant, suffix) -> None:
    want = draw(adapted(variant))
    assert error(stock[f"variant-{variant}{suffix}"], want) <= 1e-6
    assert error(want, draw(base())) > 1e-2


def test_a_lost_scale_would_be_seen(stock) -> None:
    assert error(stock["variant-unfolded"], draw(adapted("alpha-4r"))) > 1e-2


def test_fresh_adapter_and_weight_zero_change_no_bit(stock) -> None:
    assert torch.equal(stock["variant-fresh"], stock["plain-variant-fresh"])
    assert torch.equal(draw(adapted(fresh=True)), draw(base()))
    zeros = {name.removeprefix("zero-"): value for name, value in stock.items() if name.startswith("zero-")}
    assert len(zeros) == 2 * len(VARIANTS) + 2
    assert all(torch.equal(value, stock[f"plain-{name}"]) for name, value in zeros.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_comes_back_to_the_bit(variant, tmp_path) -> None:
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
        assert error(draw(module), draw(adapted(variant))) <= 1e-6


def test_stock_peft_loads_the_peft_folder(tmp_path) -> None:
    lora_files.save_peft(adapter("mixed"), tmp_path)
    assert error(draw(peft.PeftModel.from_pretrained(base(), tmp_path)), draw(adapted("mixed"))) <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_peft_folder_of_others_keeps_its_scale(variant, tmp_path) -> None:
    """Saved by stock peft: the scale is not folded in, it is in adapter_config.json."""
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=TARGETS, **VARIANTS[variant]))
    values = adapted(variant).state_dict()
    model.load_state_dict({f"base_model.model.{name}": value for name, value in values.items()})
    model.save_pretrained(tmp_path)
    module = base()
    lora_import.load(module, tmp_path)
    assert error(draw(module), draw(adapted(variant))) <= 1e-6


def test_a_diffusers_file_of_others_keeps_its_scale(tmp_path) -> None:
    """As StableDiffusion3Pipeline.save_lora_weights writes it: plain tensors, the scale in the header."""
    values = {n.replace(".default", ""): p.detach() for n, p in adapted("alpha-4r").named_parameters() if ".lora_" in n}
    said = {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.use_rslora": False}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(said)}
    save_file({f"transformer.{n}": v for n, v in values.items()}, tmp_path / "x.safetensors", metadata=header)
    module = base()
    lora_import.load(module, tmp_path / "x.safetensors")
    assert error(draw(module), draw(adapted("alpha-4r"))) <= 1e-6


def test_a_kohya_file_of_others_keeps_its_alpha(tmp_path) -> None:
    lora_files.save_kohya(adapter(), tmp_path / "a.safetensors", "sd3", prefix="lora_unet_")
    tensors = load_file(tmp_path / "a.safetensors")
    halved = {k: v / 2 if k.endswith(".alpha") else v for k, v in tensors.items()}
    save_file(halved, tmp_path / "b.safetensors")
    read = lora_import.read(tmp_path / "b.safetensors", base())
    assert torch.equal(read.layers[LAYER][1], adapter().layers[LAYER][1] / 2)


def test_kohya_header_and_deterministic_bytes(tmp_path) -> None:
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


KEY_A, KEY_B = f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight"
KOHYA = "lora_transformer_" + LAYER.replace(".", "_")


def without(tensors, key):
    return {k: v for k, v in tensors.items() if k != key}


def poisoned(value: torch.Tensor, poison: float) -> torch.Tensor:
    value = value.clone()
    value.view(-1)[-1] = poison
    return value


REFUSED = {
    "wrong prefix": (lambda t: {f"unet.{k}": v for k, v in t.items()}, r"unet\.transformer\..* matches 0 layers"),
    "no prefix": (lambda t: {k.removeprefix("transformer."): v for k, v in t.items()}, r"lora_A.weight matches 0 layers"),
    "renamed module": (
        lambda t: without(t, KEY_A) | {KEY_A.replace("to_q", "query"): t[KEY_A]}, r"attn\.query\.lora_A.* matches 0",
    ),
    "text encoder": (lambda t: t | {"text_encoder.q.lora_A.weight": torch.ones(4, 32)}, r"text_encoder\.q\.lora_A"),
    "no B": (lambda t: without(t, KEY_B), rf"{KEY_A} is there but {LAYER}'s B is not"),
    "no A": (lambda t: without(t, KEY_A), rf"{KEY_B} is there but {LAYER}'s A is not"),
    "NaN": (lambda t: t | {KEY_B: poisoned(t[KEY_B], float("nan"))}, rf"{KEY_B} has NaN"),
    "infinite": (lambda t: t | {KEY_A: poisoned(t[KEY_A], float("inf"))}, rf"{KEY_A} has NaN or inf"),
    "other base's inputs": (lambda t: t | {KEY_A: torch.ones(4, 48)}, rf"{KEY_A} has shape \(4, 48\), not \(4, 32\)"),
    "other base's outputs": (lambda t: t | {KEY_B: torch.ones(48, 4)}, rf"{KEY_B} has shape \(48, 4\), not \(32, 4\)"),
    "ranks differ": (lambda t: t | {KEY_B: torch.ones(32, 3)}, rf"{KEY_B} has shape \(32, 3\), not \(32, 4\)"),
    "one number": (lambda t: t | {KEY_A: torch.tensor(1.0)}, rf"{KEY_A} has shape \(\)"),
    "DoRA": (lambda t: t | {f"transformer.{LAYER}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector is no part"),
    "empty": (lambda t: {}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_key_named(case, tmp_path) -> None:
    spoil, message = REFUSED[case]
    file = lora_files.save_diffusers(adapter(), tmp_path)
    save_file({k: v.contiguous() for k, v in spoil(load_file(file)).items()}, file)
    module = base()
    with pytest.raises(ValueError, match=message):
        lora_import.load(module, tmp_path)
    assert not any(".lora_" in name for name, _ in module.named_parameters())


REFUSED_KOHYA = {
    "alpha": (lambda t: t | {f"{KOHYA}.alpha": torch.tensor(0.0)}, rf"{KOHYA}\.alpha is \[0.0\]"),
    "no down": (lambda t: without(t, f"{KOHYA}.lora_down.weight"), f"{KOHYA}.*A is not"),
    "hada": (lambda t: t | {f"{KOHYA}.hada_w1_a": torch.ones(2)}, rf"{KOHYA}\.hada_w1_a is no part"),
    "text encoder": (lambda t: t | {"lora_te1_q.alpha": torch.ones(())}, r"lora_te1_q\.alpha matches 0 layers"),
    "twice": (
        lambda t: t | {f"lora_unet_{KOHYA[17:]}.alpha": torch.tensor(4.0)},
        rf"lora_unet_{KOHYA[17:]}\.alpha and {KOHYA}\.alpha are the same part",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_KOHYA)
def test_kohya_refused_with_the_key_named(case, tmp_path) -> None:
    spoil, message = REFUSED_KOHYA[case]
    file = tmp_path / "x.safetensors"
    lora_files.save_kohya(adapter(), file, "sd3")
    save_file(spoil(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        lora_import.read(file, base())


def test_wrong_base_is_refused_and_an_unknown_one_logged(tmp_path, caplog) -> None:
    lora_files.save_diffusers(adapter(), tmp_path / "a")
    with pytest.raises(ValueError, match=f"t2i.base is {BASE}, the base at hand is sha256:9"):
        lora_import.read(tmp_path / "a", base(), "sha256:9")
    lora_files.save_diffusers(lora_files.Adapter(adapter().layers, {}), tmp_path / "b")
    lora_import.load(base(), tmp_path / "b", "sha256:9")
    assert "base not compared, the file names none" in caplog.text
    lora_import.load(base(), tmp_path / "a")
    assert "base not compared, no digest was given" in caplog.text


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.ckpt"])
def test_pickles_are_never_opened(name, tmp_path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name}: .* is a pickle"):
            lora_import.read(path, base())


def test_broken_and_missing_files(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such adapter"):
        lora_import.read(tmp_path, base())
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="x.safetensors: not a safetensors file"):
        lora_import.read(tmp_path / "x.safetensors", base())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "has rank 4, its settings say 8"),
        ({"lora_alpha": -1}, "lora_alpha of .* is -1"),
        ({"use_dora": True}, "use_dora"),
        ([], "is a list"),
        (None, "adapter_config.json: missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message, tmp_path) -> None:
    lora_files.save_peft(adapter(), tmp_path)
    config = tmp_path / "adapter_config.json"
    if change is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=message):
        lora_import.read(tmp_path, base())


def test_what_has_no_file_form_is_not_saved() -> None:
    with pytest.raises(ValueError, match="the module has no adapter 'default'"):
        lora_files.from_module(base(), {})
    module = base()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS, r=2, use_dora=True), module)
    with pytest.raises(ValueError, match="attn.to_q: only plain LoRA"):
        lora_files.from_module(module, {})
