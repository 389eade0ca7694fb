"""Pre-training's switches one by one, REPA by depth, size and stop, and the shipped recipe against a plain one; three seeds.

Every arm trains the demo's network from scratch on the demo's basic pictures and is asked the held-out prompts, drawn with the
averaged weights. Arms at equal time take as many steps as their cost on a CPU allows, which `costs` measures in turns on one
core; REPA's teacher is paid for once a picture. So results do not depend on what else the machine that trains does.

    python -m benchmarks.ablations prepare ENCODED JUDGE FOLDER   the pictures and captions it needs, from a demo's stages
    python -m benchmarks.ablations costs FOLDER                   seconds a step of every recipe, into FOLDER/costs.json
    python -m benchmarks.ablations run FOLDER [ARM ...]           train all arms or some, on the GPU where there is one

It is not part of `make bench`: the arms take hours on two cores. What is done is kept in FOLDER/results.jsonl: a run that was stopped goes on, and says what it has.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file, save_file

from benchmarks.ablation_arms import ARMS, LOOKS, STEPS, cpu_seconds, recipe, steps_of, with_teacher
from benchmarks.ablation_report import summarise
from data_curation.dataset import TrainingSet
from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.manifest import write_table
from models.device import compute_device
from models.engine.loop import Trainer, train
from models.engine.randomness import Randomness
from models.evaluation.judge import Judge
from models.networks import families
from models.networks.checkpoint import SamplingCard
from models.networks.codec import Pixels
from models.networks.families import Surroundings
from models.networks.image_encoder import ImageEncoder
from models.posttraining.reward import judge_reward
from models.pretraining.baselines import Predictor
from models.pretraining.config import FlowMatchingConfig
from models.pretraining.curriculum import phases_of
from models.pretraining.flow_matching import FlowMatching
from models.sampling.generate import Generator
from tasks.evaluate_prompts import Prompts, prompt_set
from tasks.training import alignment, averaged, card_of, curriculum_batches
from tasks.training_data import TrainingData, to_model

SEEDS = range(int(os.environ.get("T2I_ABLATION_SEEDS", "3")))
PROCESSES = int(os.environ.get("T2I_ABLATION_PROCESSES", "1"))
SECONDS = float(os.environ.get("T2I_ABLATION_SECONDS", "inf"))  # no arm begins after so long
PROMPTS = 320
SIDES = (32, 40)
COST_ROUNDS = 40


class StoredText:
    """Text features of the captions of a prepared folder."""

    def __init__(self, data: TrainingSet) -> None:
        self.data, self.places = data, {caption: place for place, caption in enumerate(data.captions)}
        self.longest = int(np.diff(load_file(data.folder / "text.safetensors")["offsets"]).max())

    def __call__(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and mask of prompts."""
        tokens, mask = self.data.text([self.places[prompt] for prompt in prompts], self.longest)
        return torch.from_numpy(tokens).float(), torch.from_numpy(mask)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt."""
        return int(self([prompt])[1].sum())


class Accuracy:
    """Held-out prompts, drawn at every look: strictly right or not, and the demo's reward, which ranks weak models too."""

    def __init__(self, folder: Path, side: int) -> None:
        self.judge, self.side = Judge.load(folder / "judge"), side
        self.asked: Prompts = prompt_set("held_out_basic", PROMPTS, 0)
        self.around = Surroundings(StoredText(TrainingSet.open(folder)), Pixels())

    def __call__(self, trainer: Trainer, objective: FlowMatching, card: SamplingCard) -> tuple[float, float]:
        """Share of right pictures of the averaged weights, and the colour judge's mean log-likelihood."""
        denoiser = averaged(trainer, "denoiser", objective.denoiser, "denoiser.")
        if objective.objective.kind != "x_0":
            denoiser = Predictor(denoiser, objective.objective)
        generator = Generator(denoiser, card, around=self.around)
        size = PROMPTS if generator.device.type == "cuda" else 8
        pictures = generator.sample(self.asked.texts, self.asked.seeds, self.side, self.side, batch_size=size)
        right = self.judge.score(pictures, self.asked.scenes)["all"]
        return float(right.mean()), float(judge_reward(self.judge, pictures, self.asked.scenes).mean())


def objective_of(config: FlowMatchingConfig, data: TrainingData) -> FlowMatching:
    """A fresh network and its objective."""
    denoiser = families.build(config.network, None, data.text_mean, data.text_std, SIDES[0], config.train.seed)
    phases = phases_of(config)
    repa = alignment(config, denoiser, data, phases)
    return FlowMatching(denoiser, config.timesteps, repa, config.objective, phases)


def run_arm(folder: Path, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one arm with one seed; accuracy and reward at equally spaced looks, the last one at the end."""
    torch.set_num_threads(1)
    config = recipe(ARMS[name][0], steps, seed)
    data, began = TrainingData(folder), time.perf_counter()
    objective, accuracy = objective_of(config, data), Accuracy(folder, config.sampling.side)
    card, curve = card_of(config, None), list[tuple[int, float, float]]()
    batches = curriculum_batches(data, phases_of(config), seed, with_teacher(name))
    every = max(1, steps // LOOKS)
    settings = config.train.model_copy(
        update={"sample_every": every, "checkpoint_every": 10**6 * config.train.log_every}
    )

    def look(step: int, trainer: Trainer) -> None:
        if steps - step >= every or step == steps:
            curve.append((step, *accuracy(trainer, objective, card)))

    with tempfile.TemporaryDirectory() as scratch:
        trainer = train(objective, batches, settings, Path(scratch), on_sample=look)
    if not curve or curve[-1][0] != steps:
        curve.append((steps, *accuracy(trainer, objective, card)))
    return {"arm": name, "seed": seed, "steps": steps, "curve": curve, "loss": trainer.rows[-1]["loss"],
            "seconds": time.perf_counter() - began}  # fmt: skip


def costs(folder: Path) -> dict[str, float]:
    """Seconds a step of every arm on one core, steps of all arms in turn, and of the teacher a picture."""
    torch.set_num_threads(1)
    data, runs = TrainingData(folder), dict[str, Any]()
    scratch = Path(tempfile.mkdtemp())
    for name, (changes, _) in ARMS.items():
        config = recipe(changes, STEPS, 0)
        trainer = Trainer(objective_of(config, data), config.train, scratch / name)
        runs[name] = trainer, curriculum_batches(data, phases_of(config), 0, with_teacher(name))
    spent: dict[str, list[float]] = {name: [] for name in ARMS}
    for place in range(COST_ROUNDS):
        for name, (trainer, batches) in runs.items():
            step = place * STEPS // COST_ROUNDS  # over the whole run: REPA stops, a curriculum grows
            batch, trainer.step = batches(step), step
            began = time.perf_counter()
            trainer.move(trainer.objective.prepare(batch, Randomness(0, step, batch.slots)))
            spent[name].append(time.perf_counter() - began)
    encoder, pictures = ImageEncoder(), data.set.select((SIDES[0],), ("basic",)).batch(0, 64, 0)
    images = to_model(data.set.gather(pictures).images)
    timed = []
    for _ in range(5):
        began = time.perf_counter()
        with torch.no_grad():
            encoder(images)
        timed.append((time.perf_counter() - began) / len(images))
    shutil.rmtree(scratch)
    mean = {name: statistics.fmean(sorted(times)[2:-2]) for name, times in spent.items()}
    return mean | {"teacher": statistics.median(timed)}


def prepare(encoded: Path, judge: Path, folder: Path) -> None:
    """The basic squares of two sizes with their short captions, the held-out prompts, and the judge."""
    folder.mkdir(parents=True)
    data, asked = TrainingSet.open(encoded), prompt_set("held_out_basic", PROMPTS, 0)
    index = pq.read_table(encoded / "index.parquet").to_pylist()
    chosen = [r for r in index if r["domain"] == "basic" and r["width"] == r["height"] and r["resolution"] in SIDES]
    texts = ["", *sorted({data.captions[r["caption_short"]] for r in chosen})]
    places = {text: place for place, text in enumerate(texts)}
    tokens = [data.text([data.captions.index(text)])[0][0] for text in texts]
    if new := [text for text in dict.fromkeys(asked.texts) if text not in places]:
        from models.networks import text_encoder

        features, mask = text_encoder.encode(new, 64)
        tokens += [x[m].numpy() for x, m in zip(features, mask, strict=True)]
        texts += new
    for side in SIDES:
        rows = [r for r in chosen if r["resolution"] == side]
        kept, name = [r["position"] for r in rows], f"images-{side}x{side}.safetensors"
        save_file({key: array[kept] for key, array in load_file(encoded / name).items()}, folder / name)
        for position, row in enumerate(rows):
            caption = places[data.captions[row["caption_short"]]]
            row |= {"position": position, "caption_short": caption, "caption_long": caption}
    offsets = np.cumsum([0, *map(len, tokens)])
    save_file({"tokens": np.concatenate(tokens).astype(np.float16), "offsets": offsets, "mean": data.mean, "std": data.std},
              folder / "text.safetensors")  # fmt: skip
    write_table(chosen, INDEX_SCHEMA, folder / "index.parquet")
    write_table([{"id": i, "text": text} for i, text in enumerate(texts)], CAPTIONS_SCHEMA, folder / "captions.parquet")
    shutil.copytree(judge, folder / "judge")


def main(folder: Path, arms: Sequence[str] = ()) -> dict[str, Any]:
    """Train the arms seed by seed, so that an early end leaves whole seeds; the summary is of all that is done."""
    told = json.loads((folder / "costs.json").read_text())
    pictures, kept = len(TrainingSet.open(folder).index), folder / "results.jsonl"
    found = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(each["arm"], each["seed"], each["steps"]) for each in found}
    work = [(name, seed, steps_of(name, told, pictures)) for seed in SEEDS for name in arms or ARMS]
    until = time.time() + SECONDS
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(_in_time, folder, *each, until) for each in work if each not in done}
        for future in as_completed(pending):
            if (result := future.result()) is not None:
                found.append(result)
                with kept.open("a") as stream:
                    stream.write(json.dumps(result) + "\n")
    asked = {(name, steps_of(name, told, pictures)) for name in ARMS}
    found = [each for each in found if (each["arm"], each["steps"]) in asked]
    seconds = {name: cpu_seconds(name, steps_of(name, told, pictures), told, pictures) for name in ARMS}
    gpu = compute_device().type == "cuda"
    about = {"steps": STEPS, "prompts": PROMPTS, "cost": told, "gpu": torch.cuda.get_device_name() if gpu else None}
    return summarise(found, seconds, about)


def _in_time(folder: Path, name: str, seed: int, steps: int, until: float) -> dict[str, Any] | None:
    return run_arm(folder, name, seed, steps) if time.time() < until else None


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare", encoded, judge, folder]:
            prepare(Path(encoded), Path(judge), Path(folder))
        case ["costs", folder]:
            Path(folder, "costs.json").write_text(json.dumps(costs(Path(folder)), indent=1) + "\n")
        case ["run", folder, *arms]:
            print(json.dumps(main(Path(folder), arms)))
        case _:
            sys.exit(__doc__)
