"""Learnt words and LoRAs on text encoders: a tiny random SD3 pipeline with both CLIPs, under the one loop; stock diffusers agrees."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import ConfigError
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import Trainer, train
from models.engine.randomness import Randomness
from models.networks import sd3
from models.networks.config import LoraConfig
from models.networks.denoiser import Denoiser
from models.networks.sd3 import unpacked
from models.networks.text_features import Sd3Text
from models.personalization import lora_files, lora_import
from models.personalization.config import TextTuningConfig
from models.personalization.dreambooth import Pictures, mixed_batches
from models.personalization.lora import add_lora, merge
from models.personalization.pivotal import PivotalDreamBooth
from models.personalization.text_tuning import TextTuning, save_rows, stock, tunes_text
from models.pretraining.config import TimestepConfig

WORDS = ("rex", "rex_1")
OWN, CLASS = ["a rex rex_1 cat", "one rex rex_1 cat"], ["a cat", "a dog on a mat"]
FAST = OptimizerConfig(muon_lr=None, adamw_lr=0.05, warmup_steps=0)
LORA = LoraConfig(rank=2, alpha=4, targets=("q_proj", "v_proj"))
BOTH = {"vectors": 2, "lora": LORA, "alone": 0.34, "until": 0.67, "token_optimizer": FAST, "lora_optimizer": FAST}


class Killed(Exception):
    pass


def tuning(folder: Path, **settings) -> TextTuning:
    config = TextTuningConfig(**{**BOTH, **settings})
    return TextTuning(Sd3Text(folder, 8, 32), config, WORDS if config.vectors else (), "cat", 0)


def adapted(folder: Path) -> Denoiser:
    denoiser = sd3.load(folder / "transformer")
    add_lora(denoiser, LoraConfig(rank=2, targets=("to_q", "to_v", "add_q_proj")), 0)
    return denoiser


def objective(folder: Path, **settings) -> PivotalDreamBooth:
    text = tuning(folder, **settings)
    base = sd3.load(folder / "transformer")
    return PivotalDreamBooth(adapted(folder), TimestepConfig(), base, text, [*OWN, *CLASS], 6)


def batches_of(text: TextTuning) -> Callable:
    sides = [Pictures(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(number)),
                      *(part.detach() for part in text(prompts))) for number, prompts in enumerate((OWN, CLASS))]  # fmt: skip
    return mixed_batches(sides[0], sides[1], 1.0, (0, 1, 2, 3), 0)


def run(folder: Path, scratch: Path, kill: int | None = None, **settings) -> tuple[Trainer, PivotalDreamBooth]:
    learning = objective(folder, **settings)
    made = batches_of(learning.text)

    def asked(step: int):
        if step == kill:
            raise Killed
        return made(step)

    config = TrainConfig(steps=6, batch_size=4, log_every=1, checkpoint_every=1, ema_gamma=0.0, optimizer=FAST)
    return train(learning, asked, config, scratch), learning


@pytest.fixture(scope="module")
def trained(sd3_folder, tmp_path_factory) -> tuple[Trainer, PivotalDreamBooth]:
    return run(sd3_folder, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("kills", [(1, 3), (5,)])
def test_killed_and_resumed_is_the_same_to_the_bit(kills, trained, sd3_folder, tmp_path) -> None:
    for kill in kills:
        with pytest.raises(Killed):
            run(sd3_folder, tmp_path, kill)
    straight, again = trained[0], run(sd3_folder, tmp_path)[0]
    assert again.rows == straight.rows
    for name, player in straight.players.items():
        ours = dict(again.players[name].named_parameters())
        assert all(torch.equal(value, ours[key]) for key, value in player.named_parameters())


def test_the_text_moves_first_and_stays_at_last(trained) -> None:
    straight, learning = trained
    assert [learning.turns(step) for step in range(6)] == [
        ("token", "text_encoder"), ("token", "text_encoder"), *[("token", "text_encoder", "denoiser")] * 2,
        ("denoiser",), ("denoiser",),
    ]  # fmt: skip
    assert ["token/loss" in row for row in straight.rows] == [True, True, True, True, False, False]
    assert ["denoiser/loss" in row for row in straight.rows] == [False, False, True, True, True, True]


def test_gradient_reaches_only_the_player_whose_turn_it_is(sd3_folder) -> None:
    learning = objective(sd3_folder)
    batch = learning.prepare(batches_of(learning.text)(0), Randomness(0, 0, (0, 1, 2, 3)))
    parameters = {name: [p for p in each.parameters() if p.requires_grad] for name, each in learning.players.items()}
    for turn in parameters:
        for name, group in parameters.items():
            for parameter in group:
                parameter.grad = None
                parameter.requires_grad_(name == turn)
        learning.loss(turn, batch).total.backward()
        for name, group in parameters.items():
            assert all((p.grad is not None) == (name == turn) for p in group)
    tables = [each.table.weight for each in learning.text.tables.values()]
    assert all(table.grad is None for table in tables)


def test_nothing_trained_changes_nothing_and_words_start_as_the_class(sd3_folder) -> None:
    text, plain = tuning(sd3_folder), Sd3Text(sd3_folder, 8, 32)
    assert torch.equal(text(CLASS)[0], plain(CLASS)[0])
    for name, table in text.tables.items():
        ids = plain.towers[name][1]("cat", add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(table.rows[1], table.table.weight[ids].mean(0))


def test_rows_keep_the_spread_of_the_table(sd3_folder) -> None:
    text = tuning(sd3_folder)
    table = text.tables["text_encoder"]
    with torch.no_grad():
        table.rows.mul_(8)
    before, own = float(table.rows.detach().std()), float(table.table.weight.std())
    text.pull()
    assert float(table.rows.detach().std()) == pytest.approx(before * (own / before) ** 0.1)


def test_rows_alone_learn_a_target_that_a_row_makes(sd3_folder) -> None:
    """A hidden row made the features; gradient descent on the learnt row alone comes back to them."""
    hidden, text = tuning(sd3_folder, lora=None), tuning(sd3_folder, lora=None)
    with torch.no_grad():
        for each in hidden.tables.values():
            each.rows.add_(0.1 * torch.randn(each.rows.shape, generator=torch.Generator().manual_seed(3)))
        want = hidden(OWN)[0]
    rows = [each.rows for each in text.tables.values()]
    optimizer, errors = torch.optim.Adam(rows, 0.01), []
    for _ in range(150):
        error = (text(OWN)[0] - want).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert errors[-1] < 0.02 * errors[0]


@pytest.fixture(scope="module")
def drawn(sd3_folder, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What training says, under `ours.`, and what stock diffusers draws in a new process with the files."""
    root, ours = tmp_path_factory.mktemp("stock-text"), dict[str, torch.Tensor]()
    shutil.copytree(sd3_folder, root / "base")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    save_file({"latents": latents}, root / "inputs.safetensors")
    for name, settings in (("rows", {"lora": None}), ("lora", {"vectors": 0}), ("both", {})):
        _, learning = run(sd3_folder, root / f"{name}-scratch", **settings)
        denoiser, text = learning.denoiser, learning.text
        adapter = lora_files.from_module(denoiser.transformer, {})
        lora_files.save_diffusers(adapter, root / name, text.adapters())
        save_rows(root / name, text.words, text.rows())
        with torch.no_grad():
            tokens, pooled = unpacked(text.text.features([OWN[0]])[0], 32)
            full = torch.cat([tokens[:, :16], torch.zeros(1, 256, 32)], 1)  # stock pads an absent T5 to 256
            noise = denoiser.transformer(latents, full, pooled, torch.tensor([500.0])).sample
        ours |= {f"ours.{name}.tokens": full, f"ours.{name}.pooled": pooled, f"ours.{name}.noise": noise}
    shutil.copytree(sd3_folder, root / "exported")
    text.save(root / "exported")
    merge(denoiser).save(root / "exported" / "transformer")
    script = Path(__file__).with_name("stock_text.py")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(script), str(root), OWN[0]], check=True, env=clean, cwd=root)
    return ours | load_file(root / "drawn.safetensors")


@pytest.mark.parametrize("case", ["rows", "lora", "both"])
def test_stock_diffusers_draws_the_same_in_a_new_process(case, drawn) -> None:
    for what in ("tokens", "pooled", "noise"):
        assert float((drawn[f"{case}.{what}"] - drawn[f"ours.{case}.{what}"]).abs().max()) <= 1e-6
        assert float((drawn[f"{case}.{what}"] - drawn[f"plain.{what}"]).abs().max()) > 1e-3


def test_the_exported_pipeline_holds_row_and_merged_lora(drawn) -> None:
    for what in ("tokens", "pooled", "noise"):
        assert float((drawn[f"exported.{what}"] - drawn[f"ours.both.{what}"]).abs().max()) <= 1e-5


def test_the_file_comes_back_and_half_of_it_is_refused(trained, sd3_folder, tmp_path) -> None:
    learning = trained[1]
    adapter = lora_files.from_module(learning.denoiser.transformer, {})
    lora_files.save_diffusers(adapter, tmp_path, learning.text.adapters())
    assert tunes_text(tmp_path)
    net = sd3.load(sd3_folder / "transformer").transformer
    with pytest.raises(ValueError, match=r"text_encoder\.text_model.* is for text_encoder, which the base at hand"):
        lora_import.read(tmp_path, net)
    encoders = {name: stock(each) for name, each in learning.text.encoders.items()}
    own, on_text = lora_import.read_with_text(tmp_path, net, encoders)
    for again, source in ((own, adapter), *((on_text[name], a) for name, a in learning.text.adapters().items())):
        assert again.layers.keys() == source.layers.keys()
        assert all(
            torch.equal(x, y) for n in source.layers for x, y in zip(again.layers[n], source.layers[n], strict=True)
        )
    broken = load_file(tmp_path / lora_files.DIFFUSERS_FILE)
    key = next(name for name in broken if name.startswith("text_encoder_2") and "lora_B" in name)
    save_file({name: value for name, value in broken.items() if name != key}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="B is not; the file is incomplete"):
        lora_import.read_with_text(tmp_path / "half.safetensors", net, encoders)
    lora_files.save_diffusers(adapter, tmp_path)
    assert not tunes_text(tmp_path)
    save_rows(tmp_path, WORDS, learning.text.rows())
    assert tunes_text(tmp_path)
    with pytest.raises(ValueError, match=r"learned_embeds.safetensors .*; take the checkpoint"):
        lora_import.read(tmp_path, net)


def test_what_cannot_work_is_refused(sd3_folder) -> None:
    for settings, message in (
        ({"vectors": 0, "lora": None}, "text.vectors=0 without text.lora learns nothing"),
        ({"alone": 0.8}, "text.alone=0.8 is beyond text.until=0.67"),
        ({"lora": LORA.model_copy(update={"kind": "dora"})}, "text.lora kind=dora .* set kind to lora or rslora"),
    ):
        with pytest.raises(ValueError, match=message):
            TextTuningConfig(**{**BOTH, **settings})
    with pytest.raises(ConfigError, match=r"text.lora.targets: 'query' matches no linear layer; there are .*q_proj"):
        tuning(sd3_folder, lora=LORA.model_copy(update={"targets": ("query",)}))
    with pytest.raises(ConfigError, match="token 'a' is a word the tokenizer has already; give a new word"):
        TextTuning(Sd3Text(sd3_folder, 8, 32), TextTuningConfig(), ["a"], "cat", 0)
    learning = objective(sd3_folder)
    batch = learning.prepare(batches_of(learning.text)(0), Randomness(0, 0, (0, 1, 2, 3)))
    del batch.extra["prompt"]
    with pytest.raises(ValueError, match=r"cached text features and no extra\['prompt'\], so a text encoder cannot"):
        learning.loss("token", batch)
