"""LoHa and LoKr on a tiny random SD3 transformer: peft agrees, files come back to the bit, merges and mixes are exact."""

import json

import peft
import pytest
import torch
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors.torch import load_file, save_file

from models.networks.config import LoraConfig
from models.personalization import lora_files, lora_import
from models.personalization.interference import interference
from models.personalization.lora import add_lora, save_forms
from models.personalization.lora_files import Adapter
from models.personalization.lycoris import Product, factored
from models.personalization.mixing import Part, concatenated, mix

TARGETS = ["to_q", "to_out.0", "ff.net.0.proj"]
ABOUT = {"base": "sha256:0123", "trigger": "zwx"}
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(params=["loha", "lokr", "lokr-whole"])
def kind(request) -> str:
    return request.param


def settings(kind: str):
    if kind == "loha":
        return peft.LoHaConfig(r=2, alpha=6, target_modules=TARGETS, rank_pattern={"to_q": 3})
    return peft.LoKrConfig(r=2 if kind == "lokr" else 8, alpha=6, target_modules=TARGETS)


@pytest.fixture
def product(base):
    """The base with a LoHa or LoKr: random, or fresh and without effect."""

    def make(kind: str, fresh: bool = False):
        module = base()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            peft.inject_adapter_in_model(settings(kind), module)
            for name, parameter in module.named_parameters():
                if (".hada_" in name or ".lokr_" in name) and not fresh:
                    torch.nn.init.normal_(parameter, std=0.3)
        return module

    return make


def test_the_change_is_the_formula_and_peft_s(kind, product) -> None:
    module = product(kind)
    adapter = lora_files.from_module(module, ABOUT)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LycorisLayer)}
    assert adapter.products.keys() == layers.keys()
    for name, layer in layers.items():
        parts = adapter.products[name].parts
        if kind == "loha":
            one, two = (parts[f"hada_w{i}_a"] @ parts[f"hada_w{i}_b"] for i in (1, 2))
            slow = torch.stack([torch.stack([one[i, j] * two[i, j] for j in range(32)]) for i in range(len(one))])
        else:
            right = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
            slow = torch.cat([torch.cat([w * right for w in row], 1) for row in parts["lokr_w1"]], 0)
        assert ("lokr_w2" in parts) == (kind == "lokr-whole")
        torch.testing.assert_close(adapter.products[name].change, slow)
        torch.testing.assert_close(slow, layer.get_delta_weight("default").detach())
        a, b = adapter.layers[name]
        torch.testing.assert_close(b @ a, slow, atol=1e-6, rtol=1e-5)


def test_the_factors_have_the_rank_of_the_change() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    loha = Product("loha", 2, dict(zip(names, (some(30, 2), some(2, 20), some(30, 2), some(2, 20)), strict=True)))
    assert len(factored(loha)[0]) == 4  # R^2
    lokr = Product("lokr", 2, {"lokr_w1": some(3, 4), "lokr_w2_a": some(10, 2), "lokr_w2_b": some(2, 5)})
    assert len(factored(lokr)[0]) == 6  # 3 times 2


def test_a_fresh_one_changes_no_bit(kind, product, base, draw) -> None:
    assert torch.equal(draw(product(kind, fresh=True)), draw(base()))


def test_stock_peft_loads_the_folder_and_both_forms_come_back_to_the_bit(kind, product, base, tmp_path, draw) -> None:
    module = product(kind)
    adapter = lora_files.from_module(module, ABOUT)
    save_forms(adapter, tmp_path, "toy")
    assert not (tmp_path / lora_files.DIFFUSERS_FILE).exists()
    with pytest.raises(ValueError, match="diffusers loads no LoHa and no LoKr"):
        lora_files.save_diffusers(adapter, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(draw(loaded.base_model.model), draw(module), atol=1e-6, rtol=0)
    for form in (tmp_path, tmp_path / "toy-kohya.safetensors"):
        again = lora_import.read(form, base(), "sha256:0123")
        assert again.about == ABOUT
        for name, each in adapter.products.items():
            assert (again.products[name].kind, again.products[name].parts.keys()) == (each.kind, each.parts.keys())
            assert all(torch.equal(again.products[name].parts[part], value) for part, value in each.parts.items())
    live = base()
    lora_files.attach(live, again)
    torch.testing.assert_close(draw(live), draw(module), atol=2e-5, rtol=0)
    assert float((draw(live) - draw(base())).abs().max()) > 1e-2


def test_kohya_s_alpha_scales_it(product, base, tmp_path) -> None:
    adapter = lora_files.from_module(product("loha"), ABOUT)
    lora_files.save_kohya(adapter, tmp_path / "a.safetensors", "sd3")
    tensors = load_file(tmp_path / "a.safetensors")
    save_file({k: 3 * v if k.endswith(".alpha") else v for k, v in tensors.items()}, tmp_path / "b.safetensors")
    thrice = lora_import.read(tmp_path / "b.safetensors", base())
    torch.testing.assert_close(thrice.products[LAYER].change, 3 * adapter.products[LAYER].change)


def test_it_mixes_with_a_lora_exactly(kind, product, adapter, base) -> None:
    own, other = lora_files.from_module(product(kind), ABOUT), adapter("alpha-r")
    weights = lora_files.stock_weights(base())
    found = mix({"own": Part(own, 0.5), "other": Part(other, -1.0)}, weights)
    a, b = other.layers[LAYER]
    torch.testing.assert_close(found.changes[LAYER], 0.5 * own.products[LAYER].change - b @ a, atol=1e-5, rtol=0)
    assert 0 <= interference(own, other).input_overlap <= 1 + 1e-9
    a, b = concatenated({"own": Part(own, 0.5), "other": Part(other, -1.0)}, {}).layers[LAYER]
    torch.testing.assert_close(b @ a, found.changes[LAYER], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "key", "change", "message"),
    [
        ("loha", "hada_w2_a", lambda v: None, "hada_w1_a, hada_w1_b, hada_w2_b are not the parts of one LoHa"),
        ("loha", "hada_w1_a", lambda v: v[:, :1], r"hada_w1_a \(32, 1\) and hada_w1_b \(3, 32\) do not fit"),
        ("loha", "hada_w1_a", lambda v: v[:16], r"loha makes .*, the layer is \(32, 32\); it is of another base"),
        ("lokr", "lokr_w1", lambda v: torch.cat([v, v]), r"lokr makes \[\(64, 32\)\], the layer is \(32, 32\)"),
        ("lokr", "lokr_w2_b", lambda v: v * float("nan"), "lokr_w2_b has NaN or infinite values"),
        ("lokr", "lokr_w1", lambda v: v.unsqueeze(2), "are not all matrices; convolutions are not read"),
    ],
)
def test_damaged_files_are_refused_with_layer_and_part(kind, key, change, message, product, base, tmp_path) -> None:
    lora_files.save_peft(lora_files.from_module(product(kind), ABOUT), tmp_path)
    file = tmp_path / lora_files.PEFT_FILE
    tensors = load_file(file)
    name = f"base_model.model.{LAYER}.{key}"
    tensors |= {name: None if (new := change(tensors[name])) is None else new.contiguous()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file)
    with pytest.raises(ValueError, match=message):
        lora_import.read(tmp_path, base())


def test_foreign_keys_and_settings_are_refused(product, base, tmp_path) -> None:
    lora_files.save_peft(lora_files.from_module(product("loha"), ABOUT), tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"peft_type": "LOKR"}))
    with pytest.raises(ValueError, match="is a loha, its settings say LOKR"):
        lora_import.read(tmp_path, base())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"r": 5, "rank_pattern": {}}))
    with pytest.raises(ValueError, match="has rank [23], its settings say 5"):
        lora_import.read(tmp_path, base())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    tensors = load_file(tmp_path / lora_files.PEFT_FILE)
    save_file(tensors | {f"base_model.model.{LAYER}.lora_A.weight": torch.ones(2, 32)}, tmp_path / lora_files.PEFT_FILE)
    with pytest.raises(ValueError, match="hada_w1_a is no part of a LoRA or DoRA"):
        lora_import.read(tmp_path, base())


@pytest.mark.parametrize("member", ["loha", "lokr"])
def test_settings_make_them_and_only_with_a_start_at_zero(member, tiny) -> None:
    denoiser = tiny(0)
    add_lora(denoiser, LoraConfig.model_validate({"kind": member, "rank": 2, "alpha": 4}), 0)
    adapter: Adapter = lora_files.from_module(denoiser.transformer, {})
    assert {each.kind for each in adapter.products.values()} == {member}
    assert all(p.requires_grad == (".hada_" in n or ".lokr_" in n) for n, p in denoiser.named_parameters())
    with pytest.raises(ValueError, match=f"lora.init=gaussian is for one pair of factors; .* kind={member}"):
        LoraConfig.model_validate({"kind": member, "init": "gaussian"})
