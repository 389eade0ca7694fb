"""The strict import refuses every file that a permissive loader would load in part or wrongly, and names the key."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.personalization import lora_files, lora_import

LAYER = "transformer_blocks.0.attn.to_q"
BASE = "sha256:0123"  # what conftest writes
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
    "one magnitude": (
        lambda t: t | {f"transformer.{LAYER}.lora_magnitude_vector": torch.ones(32)}, "has no DoRA magnitude, other layers",
    ),
    "a magnitude alone": (
        lambda t: t | {f"transformer.{LAYER[:-1]}k_extra.lora_magnitude_vector": torch.ones(32)}, "matches 0 layers",
    ),
    "LoKr": (lambda t: t | {f"transformer.{LAYER}.lokr_w1": torch.ones(2, 2)}, "lokr_w1 is no part of a LoRA or DoRA"),
    "empty": (lambda t: {}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_key_named(case, tmp_path, base, adapter) -> None:
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
def test_kohya_refused_with_the_key_named(case, tmp_path, base, adapter) -> None:
    spoil, message = REFUSED_KOHYA[case]
    file = tmp_path / "x.safetensors"
    lora_files.save_kohya(adapter(), file, "sd3")
    save_file(spoil(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        lora_import.read(file, base())


def test_wrong_base_is_refused_and_an_unknown_one_logged(tmp_path, caplog, base, adapter) -> None:
    lora_files.save_diffusers(adapter(), tmp_path / "a")
    with pytest.raises(ValueError, match=f"t2i.base is {BASE}, the base at hand is sha256:9"):
        lora_import.read(tmp_path / "a", base(), "sha256:9")
    lora_files.save_diffusers(lora_files.Adapter(adapter().layers, {}), tmp_path / "b")
    lora_import.load(base(), tmp_path / "b", "sha256:9")
    assert "base not compared, the file names none" in caplog.text
    lora_import.load(base(), tmp_path / "a")
    assert "base not compared, no digest was given" in caplog.text


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.ckpt"])
def test_pickles_are_never_opened(name, tmp_path, base) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name}: .* is a pickle"):
            lora_import.read(path, base())


def test_a_dora_file_must_be_whole(tmp_path, base, adapter) -> None:
    file = lora_files.save_diffusers(adapter("dora"), tmp_path)
    tensors, key = load_file(file), f"transformer.{LAYER}.lora_magnitude_vector"
    for value, message in (
        (torch.ones(48), r"\(48,\), not \(32,\)"),
        (poisoned(tensors[key], float("nan")), "has NaN"),
    ):
        save_file(tensors | {key: value}, file)
        with pytest.raises(ValueError, match=message):
            lora_import.read(file, base())
    save_file({k: v for k, v in tensors.items() if "magnitude" not in k}, tmp_path / "x.safetensors",
              metadata={"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4,
                                                              "transformer.use_dora": True})})  # fmt: skip
    with pytest.raises(ValueError, match="has no DoRA magnitudes, but use_dora is True"):
        lora_import.read(tmp_path / "x.safetensors", base())


def test_broken_and_missing_files(tmp_path, base) -> None:
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
        ({"use_dora": True}, "has no DoRA magnitudes, but use_dora is True"),
        ({"lora_bias": True}, "lora_bias"),
        ([], "is a list"),
        (None, "adapter_config.json: missing"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message, tmp_path, base, adapter) -> None:
    lora_files.save_peft(adapter(), tmp_path)
    config = tmp_path / "adapter_config.json"
    if change is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=message):
        lora_import.read(tmp_path, base())
