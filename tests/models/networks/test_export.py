"""Exported folders run with stock diffusers in a process that cannot import this repository, and give our pixels."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from infra.artifacts import folder_digest
from models.engine.distribute import one_thread
from models.networks import prx, text_encoder
from models.networks.checkpoint import SamplingCard, read_card, write_checkpoint
from models.networks.config import PrxConfig
from models.networks.export import export_pipeline, scheduler_of
from models.sampling.generate import Generator, load_generator

PROMPTS = ["a big apple on a blue background", "three cats, one below two others, on a plain green background"]
FULL = "a big apple, " * 12 + "on blue"  # no padding: longer than any prompt may be, so it is cut

STRANGER = """
import json, sys
import torch
from safetensors.torch import save_file
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("flows", "tasks", "models", "data_curation", "infra"):
            raise ImportError(name + " must not be needed")
sys.path = [p for p in sys.path if p not in ("", sys.argv[1])]
sys.meta_path.insert(0, Refuse())
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
asked, times, pictures = json.loads(sys.argv[2]), {}, {}
for name, (steps, guidance, sampler, _) in asked["cases"].items():
    pipe = DiffusionPipeline.from_pretrained(name + "/export", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    seen, drawn = [], []
    record = lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0]))
    pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    for seed, prompt in enumerate(asked["prompts"]):  # diffusers 0.42.1 cannot guide more than one prompt at a time
        seen.clear()
        torch.manual_seed(seed)  # noise between the steps comes from here, and the first too where no generator is given
        generator = None if sampler == "renoise" else torch.Generator().manual_seed(seed)
        drawn.append(pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, output_type="np",
                          generator=generator, use_resolution_binning=False).images[0])
    times[name], pictures[name] = seen, torch.stack([torch.from_numpy(picture) for picture in drawn]).contiguous()
save_file(pictures, "drawn.safetensors")
print(json.dumps(times))
"""

Case = tuple[int, float, str, dict[str, Any]]  # steps, guidance, sampler, how times are shifted
CASES: dict[str, Case] = {
    "euler": (8, 2.0, "euler", {}),
    "heun": (5, 2.0, "heun", {}),
    "student-4": (4, 1.0, "euler", {}),
    "student-1": (1, 1.0, "euler", {}),
    "renoise-4": (4, 1.0, "renoise", {}),
    "renoise-2": (2, 1.0, "renoise", {}),
    "sqrt": (6, 2.0, "euler", {"side": 48}),  # 144 tokens: k = 1.5
    "exponential": (6, 2.0, "euler", {"side": 48, "shift": "exponential", "base_tokens": 64, "max_tokens": 1024}),
}
MAX_TOKENS = 32


def write_case(folder: Path, case: Case) -> None:
    """A checkpoint of random weights to be sampled so, and its export."""
    steps, guidance, sampler, shift = case
    config = PrxConfig(hidden_size=64, depth=2, num_heads=2, prompt_max_tokens=MAX_TOKENS)
    generator = torch.Generator().manual_seed(0)
    denoiser = prx.build(config, torch.randn(384, generator=generator), 0.5 + torch.rand(384, generator=generator), 0)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    distilled = guidance == 1.0
    card = SamplingCard(
        steps=1 if distilled else steps, guidance=guidance, prompt_max_tokens=MAX_TOKENS, distilled=distilled,
        sampler=sampler, trained_steps=(1, steps) if distilled else None, method="dmd" if distilled else None,
        teacher="abc", distilled_guidance=2.0 if distilled else None, **shift,
    )  # fmt: skip
    write_checkpoint(folder / "checkpoint", denoiser, card)
    if steps == 4:  # other weights for this number of steps
        with torch.no_grad():
            denoiser.transformer.time_in.out_layer.bias.add_(0.3)
        denoiser.save(folder / "checkpoint" / "transformer-4")
    export_pipeline(folder / "checkpoint", folder / "export", steps)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]], dict[str, torch.Tensor]]:
    """All cases' folders, the times stock diffusers asked at and what it drew, float [N, H, W, 3], in one new process."""
    root = tmp_path_factory.mktemp("stock")
    with one_thread():
        for name, case in CASES.items():
            write_case(root / name, case)
    (root / "stranger.py").write_text(STRANGER)
    asked = json.dumps({"cases": CASES, "prompts": [*PROMPTS, FULL]})
    repository = str(Path(__file__).resolve().parents[3])
    command = [sys.executable, "stranger.py", repository, asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root, json.loads(done.stdout.strip().splitlines()[-1]), load_file(root / "drawn.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_stock_diffusers_draws_our_pixels(name: str, stock) -> None:
    """In float32: to 1e-5, and to the bit where both sides compute in the same order."""
    root, times, pictures = stock
    steps, guidance, sampler, shift = CASES[name]
    k = {"sqrt": 1.5, "exponential": math.exp(0.5 + 0.65 * (144 - 64) / (1024 - 64))}.get(name, 1.0)
    looks = [k * t / (1 + (k - 1) * t) for t in (1 - i / steps for i in range(steps))]
    if sampler == "heun":
        looks = [looks[0], *(t for t in looks[1:] for _ in range(2))]
    assert times[name] == pytest.approx(looks, abs=1e-6)
    with one_thread():
        drawn = load_generator(root / name / "checkpoint").draw(
            [*PROMPTS, FULL], [0, 1, 2], steps=steps, batch_size=1, num_tokens=MAX_TOKENS
        )
    ours = (drawn / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)
    theirs = pictures[name].numpy()
    assert theirs.shape == ours.shape == (3, shift.get("side", 32), shift.get("side", 32), 3)
    assert ours.std() > 0.04
    gaps = np.abs(theirs - ours).max((1, 2, 3))
    assert gaps.max() <= 1e-5
    if guidance == 1.0:  # the stock pipeline pads the text before the encoder, we after it; `FULL` has no padding
        assert gaps[2] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1] == 1.0])
def test_an_exported_student_says_how_it_is_to_be_called(name: str, stock) -> None:
    steps, _, sampler, _ = CASES[name]
    record = json.loads((stock[0] / name / "export" / "distill.json").read_text())
    assert record["grid"] == pytest.approx([1 - i / steps for i in range(steps)])
    told = {key: record[key] for key in ("steps", "sampler", "guidance", "guidance_scale", "teacher", "method")}
    assert told == {"steps": steps, "sampler": sampler, "guidance": 2.0, "guidance_scale": 1.0, "teacher": "abc",
                    "method": "dmd"}  # fmt: skip


def test_a_student_is_not_sampled_as_it_was_not_trained(tiny, tmp_path: Path) -> None:
    card = SamplingCard(
        steps=1, guidance=1.0, distilled=True, trained_steps=(1, 2), method="dmd", distilled_guidance=2.0
    )
    generator = Generator(tiny(0), card)
    with pytest.raises(ValueError, match=r"steps=3 was not trained: this dmd student takes \[1, 2\] steps"):
        generator.sample(["a"], [0], steps=3)
    with pytest.raises(ValueError, match=r"guidance=2\.0 on a distilled student would be applied twice"):
        generator.sample(["a"], [0], guidance=2.0)
    write_checkpoint(tmp_path, tiny(0), card)
    with pytest.raises(ValueError, match="steps=8 was not trained"):
        export_pipeline(tmp_path, tmp_path / "out", 8)


def test_saved_denoiser_predicts_the_same_with_and_without_standardisation(tiny, batches, tmp_path: Path) -> None:
    denoiser = tiny(0)
    write_checkpoint(tmp_path, denoiser, SamplingCard())
    batch, t = batches(0), torch.full((4,), 0.7)
    expected = denoiser(batch.images, t, batch.tokens, batch.mask)[0]
    folded = prx.load(tmp_path / "transformer")
    unfolded = prx.load(tmp_path / "transformer", denoiser.text_mean, denoiser.text_std)
    for loaded in (folded, unfolded):
        torch.testing.assert_close(loaded(batch.images, t, batch.tokens, batch.mask)[0], expected, atol=1e-5, rtol=1e-4)


def test_our_forward_is_the_stock_forward(tiny, batches) -> None:
    denoiser, batch, t = tiny(0), batches(0), torch.tensor([0.1, 0.4, 0.8, 1.0])
    text = (batch.tokens - denoiser.text_mean) / denoiser.text_std
    stock = denoiser.transformer(batch.images, t, text, attention_mask=batch.mask).sample
    ours, hidden = denoiser(batch.images, t, batch.tokens, batch.mask, hidden_layer=1)
    assert torch.equal(ours, stock)
    assert hidden is not None
    assert hidden.shape == (4, 6, 32)


def test_padding_beyond_the_mask_changes_nothing(tiny, batches) -> None:
    denoiser, batch, t = tiny(0), batches(0), torch.full((4,), 0.5)
    more = torch.cat([batch.tokens, torch.randn(4, 5, 16)], 1)
    mask = torch.cat([batch.mask, torch.zeros(4, 5, dtype=torch.bool)], 1)
    torch.testing.assert_close(
        denoiser(batch.images, t, more, mask)[0], denoiser(batch.images, t, batch.tokens, batch.mask)[0]
    )


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_card(tmp_path)


def test_prompts_are_cleaned_as_the_pipeline_cleans_them() -> None:
    assert text_encoder.clean("  a caf\u00c3\u00a9 &amp;amp; tea ") == "a caf\u00e9 & tea"


def test_an_export_does_not_know_what_its_process_did_before(tmp_path: Path) -> None:
    denoiser = prx.build(PrxConfig(hidden_size=32, depth=1, num_heads=2), torch.zeros(384), torch.ones(384), 0)
    write_checkpoint(tmp_path / "checkpoint", denoiser, SamplingCard())
    digests = []
    for max_tokens in (8, 16):  # a tokenizer keeps how it was called last, and would be written so
        text_encoder.encode(PROMPTS, max_tokens)
        export_pipeline(tmp_path / "checkpoint", tmp_path / str(max_tokens))
        digests.append(folder_digest(tmp_path / str(max_tokens))[0])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(("steps", "sampler"), [(1, "euler"), (2, "renoise"), (4, "euler"), (4, "renoise")])
def test_the_stock_sd3_pipeline_sees_the_trained_times_too(steps: int, sampler: str) -> None:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    nothing = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    card = SamplingCard(steps=steps, guidance=1.0, distilled=True, sampler=sampler)
    pipe = StableDiffusion3Pipeline(transformer, scheduler_of(card, steps), **nothing)
    pipe.set_progress_bar_config(disable=True)
    seen: list[float] = []
    transformer.register_forward_pre_hook(lambda _, __, kw: seen.append(float(kw["timestep"][0])), with_kwargs=True)
    pipe(
        prompt_embeds=torch.zeros(1, 3, 16), pooled_prompt_embeds=torch.zeros(1, 16), height=64, width=64,
        num_inference_steps=steps, guidance_scale=1.0, output_type="latent",
    )  # fmt: skip
    assert seen == pytest.approx([1000 * (1 - i / steps) for i in range(steps)], abs=1e-3)


def test_heun_is_refused_where_the_stock_pipeline_would_draw_other_pictures(tiny, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "shifted", tiny(0), SamplingCard(sampler="heun", side=64))
    with pytest.raises(ValueError, match="times of 64 px are shifted by 2, and FlowMatchHeun"):
        export_pipeline(tmp_path / "shifted", tmp_path / "out")
    with pytest.raises(ValueError, match="cannot sample sd3 by Heun's method"):
        scheduler_of(SamplingCard(family="sd3", sampler="heun"), 4)
