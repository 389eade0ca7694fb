"""The server under load: time of a one-step picture, eight clients against one, and a soak at saturation.

value: 95th percentile of the seconds of a one-step picture asked one at a time over HTTP (the demo run's `student-1`, a new
prompt each time); bar: 0.150. peer: median seconds of the network call alone, in the same process. The soak (SOAK_MINUTES,
default 30, and no fewer meet the bar) keeps more requests under way than the queue holds; only 200, 429 and 503 are allowed, and memory must not grow.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.record import record
from data_curation import scenes
from infra.storage import open_store
from tasks.serving.config import ServeConfig
from tasks.serving.engine import Job, Look, draw, text_length
from tasks.serving.lanes import Lanes
from tasks.serving.models import models_of

BAR, PORT, ROUNDS, CLIENTS, GROWTH, MINUTES = 0.150, 8917, 200, 8, 1.10, 30
IMAGES = f"http://127.0.0.1:{PORT}/v1/images/generations"


@contextmanager
def server(root: str) -> Iterator[psutil.Process]:
    """`t2i serve latest`, ready."""
    command = [sys.executable, "-m", "flows.cli", "serve", "latest", "--root", root, "--port", str(PORT)]
    with subprocess.Popen(command) as process:
        try:
            for _ in range(600):
                try:
                    httpx.get(f"http://127.0.0.1:{PORT}/healthz", timeout=5).raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def prompts() -> list[str]:
    """Captions of the demo's vocabulary."""
    return [scenes.short_caption(scene) for scene in scenes.all_scenes("full")]


def asked_alone(client: httpx.Client, texts: list[str]) -> list[float]:
    """Seconds of each request, one after another."""
    seconds = []
    for seed, text in enumerate(texts):
        began = time.perf_counter()
        client.post(IMAGES, json={"prompt": text, "model": "student-1", "seed": seed}).raise_for_status()
        seconds.append(time.perf_counter() - began)
    return seconds


def pictures_per_second(client: httpx.Client, texts: list[str], clients: int) -> float:
    """Throughput of a number of clients that each wait for their picture."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for answer in pool.map(lambda text: client.post(IMAGES, json={"prompt": text, "model": "student-1"}), texts):
            answer.raise_for_status()
    return len(texts) / (time.perf_counter() - began)


def soak(process: psutil.Process, minutes: float, texts: list[str]) -> dict[str, Any]:
    """More requests than the queue takes, of every kind, for a while."""
    statuses: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    memory: list[int] = []

    def client(number: int) -> None:
        with httpx.Client(timeout=120) as http:
            turn = number
            while time.monotonic() < until:
                turn += 1
                body = {"prompt": texts[turn * 7 % len(texts)], "n": 1 + turn % 8, "model": ("student-1", "student-4", "teacher")[turn % 3]}  # fmt: skip
                try:
                    statuses[str(http.post(IMAGES, json=body).status_code)] += 1
                except httpx.HTTPError as error:
                    statuses[type(error).__name__] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(process.memory_info().rss)
        time.sleep(2)
    third = max(1, len(memory) // 3)
    early, late = (statistics.median(part) for part in (memory[third : 2 * third], memory[2 * third :]))
    return {"minutes": minutes, "statuses": dict(statuses), "memory_mib": [m >> 20 for m in memory[:: max(1, third // 5)]],
            "growth": late / early}  # fmt: skip


def network_alone(root: str, texts: list[str]) -> float:
    """Median seconds of one call of the network, batch of the server, text features ready."""
    models = models_of(open_store(root, create=False), "latest")
    model, config = models.find("student-1"), ServeConfig()
    generator, lanes, seconds = models.generator(model, ()), Lanes(config.batch), []
    for seed, text in enumerate(texts):
        card = model.card
        look = Look(model, (), card.side, card.side, 1, 1.0, card.sampler, text_length(generator, text))
        began = time.perf_counter()
        draw([Job(look, models, text, seed)], lanes)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[5:])


def main() -> dict[str, Any]:
    """Measure a finished demo run under T2I_ROOT (default: runs)."""
    root, minutes = os.environ.get("T2I_ROOT", "runs"), float(os.environ.get("SOAK_MINUTES", str(MINUTES)))
    texts = prompts()[:: max(1, len(prompts()) // (4 * ROUNDS))]
    with server(str(Path(root).absolute())) as process, httpx.Client(timeout=60) as client:
        asked_alone(client, texts[:10])
        alone = sorted(asked_alone(client, texts[:ROUNDS]))
        one, many = (pictures_per_second(client, texts[:ROUNDS], clients) for clients in (1, CLIENTS))
        soaked = soak(process, minutes, texts)
    p95 = alone[int(0.95 * len(alone))]
    allowed = set(soaked["statuses"]) <= {"200", "429", "503"}
    met = p95 < BAR and minutes >= MINUTES and allowed and soaked["growth"] < GROWTH
    detail = {"median": statistics.median(alone), "one_client": one, "eight_clients": many, "batched_ratio": many / one, "soak": soaked}  # fmt: skip
    return record("serving", [0], p95, network_alone(root, texts[:50]), BAR, met, detail)


if __name__ == "__main__":
    print(json.dumps(main()))
