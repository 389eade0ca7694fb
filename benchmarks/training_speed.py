"""The training loop against a plain one as diffusers' examples write it, and against its own limit.

value: samples per second of our loop, `train()` itself (sampler, noise, flow matching, AdamW, average, meter, rows of the log);
peer: the plain loop on the same network and the same precomputed arrays: DataLoader, text padded to the prompt's length,
EMAModel. Figures in `detail`: the share of a measured matmul peak of a large block, waiting for data, checkpoints at the
demo's pace, and what `train()` adds to bare forward, backward and step, checkpoints apart. Steps of all loops are taken in
turn: `train()` runs in a thread of its own that stands still between its steps. What it does once, as counting the
arithmetic of a new shape, falls out of the medians; a row of the log counts with its share of the steps.

On a CPU: the demo's network on one thread, ours in `precision: bf16` where the CPU multiplies faster in it, the plain loop in float32, the
examples' default; ours in float32 and the plain loop in torch's bfloat16 autocast are told beside it. On a GPU: a larger network, both
loops in autocast, ours with compiled blocks and the fused optimizer as its settings offer them; the result is `training_speed_gpu`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.numpy import save_file
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.in_turn import Turns
from benchmarks.record import record
from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.manifest import write_table
from models.device import compute_device
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.meter import matmul_peak, settle
from models.engine.objective import Batch
from models.engine.optim import PlayerOptimizer
from models.engine.precision import autocast
from models.engine.randomness import Randomness
from models.engine.shard import prepare_blocks
from models.networks import prx
from models.networks.config import PrxConfig
from models.networks.denoiser import Denoiser
from models.pretraining.config import SelectConfig, TimestepConfig
from models.pretraining.flow_matching import FlowMatching, velocity_error
from tasks.training_data import TrainingData

PICTURES, LENGTHS, PADDED, SIDE, ROUNDS = 512, (6, 24), 64, 32, 60
CHECKPOINT_EVERY = 200  # steps, as in presets/demo.yaml
OPTIMIZER = OptimizerConfig(muon_lr=None)
DEVICE = compute_device()
GPU = DEVICE.type == "cuda"
BATCH = 128 if GPU else 12
NETWORK = PrxConfig(hidden_size=1024, depth=12, num_heads=16, patch_size=2) if GPU else PrxConfig(depth=4)
LARGE = PrxConfig(hidden_size=2048 if GPU else 1024, depth=1, num_heads=16, patch_size=2)
LARGE_BATCH = 64 if GPU else 4
FAST_HALF = 1.5  # products in bfloat16 are that much faster than in float32, or are not used
SETTINGS = TrainConfig(
    steps=10_000, batch_size=BATCH, optimizer=OPTIMIZER, compile=GPU, loader_threads=2 if GPU else 0,
    checkpoint_every=10_000,
)  # fmt: skip
WARM_UP = 20 if GPU else 5  # rounds that compile and wake up
BARS = {"samples_ratio": 1.3, "mfu": 0.55, "data_wait": 0.02, "checkpoint_stall": 0.02, "loop_overhead": 0.03}


def write_set(folder: Path) -> None:
    """A training set of random pictures and text features, a caption a picture, in the form of the encode stage."""
    rng = np.random.default_rng(0)
    lengths = np.array([2, *rng.integers(LENGTHS[0], LENGTHS[1] + 1, PICTURES)])
    index = [
        {"row_id": str(i), "resolution": SIDE, "width": SIDE, "height": SIDE, "position": i, "caption_short": i + 1,
         "caption_long": i + 1, "domain": "basic", "split": "train"} for i in range(PICTURES)
    ]  # fmt: skip
    write_table(index, INDEX_SCHEMA, folder / "index.parquet")
    captions = [{"id": i, "text": f"picture {i}"} for i in range(PICTURES + 1)]
    write_table(captions, CAPTIONS_SCHEMA, folder / "captions.parquet")
    tokens = rng.standard_normal((int(lengths.sum()), 384)).astype(np.float16)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    statistics_ = {"mean": np.zeros(384, np.float32), "std": np.ones(384, np.float32)}
    save_file({"tokens": tokens, "offsets": offsets, **statistics_}, folder / "text.safetensors")
    images = rng.integers(0, 256, (PICTURES, SIDE, SIDE, 3), np.uint8)
    teacher = np.zeros((PICTURES, 1, 1, 0), np.float16)
    save_file({"images": images, "teacher": teacher}, folder / f"images-{SIDE}x{SIDE}.safetensors")


def network(config: PrxConfig = NETWORK) -> Denoiser:
    """A network from random weights."""
    return prx.build(config, torch.zeros(384), torch.ones(384), seed=0).to(DEVICE)


def objective() -> FlowMatching:
    """Flow matching of a network from random weights."""
    return FlowMatching(network(), TimestepConfig())


def settings() -> TrainConfig:
    """Ours: bfloat16 where it gains."""
    half = GPU or matmul_peak(torch.bfloat16) > FAST_HALF * matmul_peak()
    return SETTINGS.model_copy(update={"precision": "bf16" if half else "fp32"})


def plain_loop(data: TrainingData, half: bool) -> Callable[[], None]:
    """One step of a loop as diffusers' examples write it, with `half` in torch's autocast."""
    pictures = data.set.select((SIDE,))
    rows = pictures.batch(0, PICTURES, 0)
    images = torch.from_numpy(data.set.gather(rows).images).permute(0, 3, 1, 2).contiguous()
    tokens, mask = data.text(data.set.gather(rows).short, PADDED)
    loader = DataLoader(TensorDataset(images, tokens, mask), BATCH, shuffle=True, drop_last=True, pin_memory=GPU)
    transformer = network().transformer
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=OPTIMIZER.adamw_lr, betas=OPTIMIZER.betas)
    ema = EMAModel(transformer.parameters(), decay=0.9999)
    batches = iter(loader)

    def step() -> None:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        pictures, text, real = (part.to(DEVICE, non_blocking=True) for part in batch)
        x_0 = pictures.float() / 127.5 - 1
        t, noise = torch.sigmoid(torch.randn(BATCH, device=DEVICE)), torch.randn_like(x_0)
        x_t = (1 - t.view(-1, 1, 1, 1)) * x_0 + t.view(-1, 1, 1, 1) * noise
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            predicted = transformer(x_t, t, text, attention_mask=real, return_dict=False)[0]
        torch.autograd.backward(velocity_error(predicted.float(), x_0, t).mean())
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(transformer.parameters())

    return step


def bare(batches: Callable[[int], Batch], config: TrainConfig) -> Callable[[], None]:
    """Forward, backward and step on prepared batches, nothing else."""
    flow = objective()
    prepare_blocks(flow.players["denoiser"], config)
    optimizer = PlayerOptimizer(flow.players["denoiser"], OPTIMIZER, 10_000)
    given = [batches(place).to(DEVICE) for place in range(ROUNDS)]
    prepared = [flow.prepare(b, Randomness(0, i, b.slots, DEVICE)) for i, b in enumerate(given)]
    steps = iter(range(ROUNDS))

    def step() -> None:
        place = next(steps)
        with autocast(DEVICE, config.precision):
            total = flow.loss("denoiser", prepared[place]).total
        torch.autograd.backward(total)
        optimizer.step(place)

    return step


def seconds(action: Callable[[], object]) -> float:
    """How long it takes, the device's work included."""
    began = time.perf_counter()
    action()
    settle(DEVICE)
    return time.perf_counter() - began


def large_block_mfu() -> float:
    """Forward and backward of one large block: arithmetic per second over a matmul's, in turn; the median."""
    denoiser, b = network(LARGE), LARGE_BATCH
    prepare_blocks(denoiser, SETTINGS)
    x, t, tokens = torch.randn(b, 3, SIDE, SIDE), torch.rand(b), torch.randn(b, LENGTHS[1], 384)
    given = [part.to(DEVICE) for part in (x, t, tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))]

    def whole() -> None:
        with autocast(DEVICE, "bf16" if GPU else "fp32"):
            error = denoiser(*given)[0].square().mean()
        torch.autograd.backward(error)
        denoiser.zero_grad(set_to_none=True)

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(LARGE)(*given)
    flops = 3.0 * counter.get_total_flops()
    for _ in range(3):
        whole()
    return statistics.median(
        flops / seconds(whole) / matmul_peak(torch.bfloat16 if GPU else torch.float32) for _ in range(7)
    )


def amortised(each: Sequence[float]) -> float:
    """Mean of `train()`'s steps, a row of the log having its share: of both kinds, with and without one, the median."""
    rows = {step for step in range(ROUNDS) if (step + 1) % SETTINGS.log_every == 0}
    with_row = [value for step, value in enumerate(each, WARM_UP) if step in rows]
    without = statistics.median(value for step, value in enumerate(each, WARM_UP) if step not in rows)
    return without + (statistics.median(with_row) - without) / SETTINGS.log_every if with_row else without


def measured(folder: Path) -> tuple[dict[str, list[float]], list[float], float, str]:
    """Seconds of every loop's steps, taken in turn; ours waiting for data; a checkpoint; the precision of ours."""
    write_set(folder)
    data, config = TrainingData(folder), settings()
    batches = data.batches(SelectConfig(), BATCH, 0, teacher=False)
    ours = {"ours": Turns(objective(), batches, config, folder / "ours")}
    others = {"bare": bare(batches, config), "plain": plain_loop(data, half=GPU)}
    if not GPU:
        ours["ours, fp32"] = Turns(objective(), batches, SETTINGS, folder / "other")
        others["plain, bf16"] = plain_loop(data, half=True)
    times: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(ROUNDS):
        for turns in ours.values():
            turns.step()
        for name, action in others.items():
            times[name].append(seconds(action))
    trainers = [turns.end() for turns in ours.values()]
    times |= {name: turns.seconds for name, turns in ours.items()}
    save = statistics.median(seconds(trainers[0].save) for _ in range(3))
    waits = ours["ours"].waits[WARM_UP:]
    return {name: each[WARM_UP:] for name, each in times.items()}, waits, save, config.precision


def main() -> dict[str, Any]:
    """Take steps of the loops in turn, then save, then the large block."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        times, waits, save, precision = measured(Path(name))
    middle = {
        name: amortised(each) if name.startswith("ours") else statistics.median(each) for name, each in times.items()
    }
    ours, theirs = middle["ours"], middle["plain"]
    added = amortised([a - b for a, b in zip(times["ours"], times["bare"], strict=True)])
    figures = {
        "samples_ratio": theirs / ours, "mfu": large_block_mfu(), "data_wait": statistics.median(waits) / ours,
        "checkpoint_stall": save / (save + CHECKPOINT_EVERY * ours), "loop_overhead": added / middle["bare"],
    }  # fmt: skip
    met = {n: value >= BARS[n] if n in ("samples_ratio", "mfu") else value <= BARS[n] for n, value in figures.items()}
    detail = {
        "batch_size": BATCH, "seconds_per_step": {**middle, "save": save}, "precision": precision,
        "text_tokens": {"ours": f"longest of a batch, {LENGTHS[0]} to {LENGTHS[1]}", "plain": PADDED},
        "figures": [{"name": n, "value": round(v, 4), "bar": BARS[n], "met": met[n]} for n, v in figures.items()],
        "gpu": torch.cuda.get_device_name() if GPU else None,
    }  # fmt: skip
    if not GPU:
        detail["beside"] = {"ours in fp32 against plain": theirs / middle["ours, fp32"],
                            "ours against plain in bf16 autocast": middle["plain, bf16"] / ours}  # fmt: skip
    value, peer, bar = BATCH / ours, BATCH / theirs, BARS["samples_ratio"]
    return record("training_speed_gpu" if GPU else "training_speed", [0], value, peer, bar, all(met.values()), detail)


if __name__ == "__main__":
    print(json.dumps(main()))
