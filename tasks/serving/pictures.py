"""One request for pictures: what it comes to, waiting for it to be drawn, and the answer."""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
import time
from typing import Any

import numpy as np
from fastapi import HTTPException, Request
from PIL import Image
from starlette.concurrency import run_in_threadpool

from infra.errors import ConfigError
from models.networks.checkpoint import check_steps
from tasks.lineage import stamp
from tasks.serving.config import ServeConfig
from tasks.serving.engine import Busy, Ending, Engine, Job, Look, text_length
from tasks.serving.models import Models
from tasks.serving.schema import ImagesRequest

LOOK_AGAIN = 0.05  # seconds between looks whether a client is still there


async def pictures(engine: Engine, config: ServeConfig, asked: ImagesRequest, request: Request) -> dict[str, Any]:
    """The answer to a request; an HTTPException says why there is none."""
    models = engine.models
    try:
        look, prompt = await run_in_threadpool(look_of, models, config, asked)
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        seeds = [seed + number for number in range(asked.n)]
        jobs = engine.submit(models, look, prompt, seeds)
    except (ConfigError, ValueError) as error:
        raise HTTPException(400, str(error)) from error
    except Busy as error:
        raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
    except Ending as error:
        raise HTTPException(503, str(error), {"Retry-After": "5"}) from error
    drawn = await _drawn(jobs, request)
    files = await run_in_threadpool(lambda: [_png(picture, job) for picture, job in zip(drawn, jobs, strict=True)])
    field, head = ("url", "data:image/png;base64,") if asked.response_format == "url" else ("b64_json", "")
    data = [
        {field: head + base64.b64encode(file).decode(), "revised_prompt": job.prompt, "seed": job.seed}
        for file, job in zip(files, jobs, strict=True)
    ]
    return {
        "created": int(time.time()), "data": data, "output_format": "png", "size": f"{look.width}x{look.height}",
        "model": look.model.name, "steps": look.steps, "guidance": look.guidance, "sampler": look.sampler,
    }  # fmt: skip


def look_of(models: Models, config: ServeConfig, asked: ImagesRequest) -> tuple[Look, str]:
    """What the request comes to, and the prompt to draw, enhanced where the run can; ConfigError or ValueError says what cannot be done and what can."""
    model = models.find(asked.model)
    card = model.card
    if asked.n > config.pictures:
        raise ConfigError(f"n={asked.n} pictures are asked for, at most {config.pictures} are drawn at once; ask fewer")
    fitting = models.fitting(model)
    for name in asked.loras:
        if name not in fitting:
            known = ", ".join(fitting) or "none"
            raise ConfigError(f"LoRA {name!r} does not go with model {model.name!r}; these do: {known}")
    width, height = asked.pixels(card.side)
    alias = asked.model.removeprefix("student-") if asked.model and asked.model in models.aliases else ""
    steps = asked.steps or (int(alias) if alias.isdigit() else card.steps)
    guidance = card.guidance if asked.guidance is None else asked.guidance
    check_steps(card, steps, guidance, asked.sampler)
    loras = tuple(sorted((name, weight) for name, weight in asked.loras.items() if weight))
    generator = models.generator(model, loras)
    denoiser, factor = generator.denoiser, generator.around.codec.factor
    patch = denoiser.stride * factor
    if (
        width % patch
        or height % patch
        or min(width, height) < 2 * patch
        or width * height > config.largest * card.side**2
    ):
        raise ConfigError(
            f"size {width}x{height} cannot be drawn; sides are multiples of {patch} from {2 * patch} on, and the area is "
            f"at most {config.largest:g} times {card.side}x{card.side}"
        )
    if denoiser.longest_side is not None and max(width, height) > (most := denoiser.longest_side * factor):
        raise ConfigError(
            f"size {width}x{height} cannot be drawn; {model.name!r} has positions for {most} px along a side"
        )
    encode = generator.around.encode
    if (count := encode.count(asked.prompt)) > encode.longest:
        raise ConfigError(f"the prompt has {count} tokens, the model reads {encode.longest}; shorten it")
    prompt = models.enhanced(asked.prompt, model, loras).revised if asked.enhance else asked.prompt
    prompt = prompt if encode.count(prompt) <= encode.longest else asked.prompt
    sampler = asked.sampler or card.sampler
    return Look(model, loras, width, height, steps, guidance, sampler, text_length(generator, prompt)), prompt


async def _drawn(jobs: list[Job], request: Request) -> list[np.ndarray]:
    """The pictures; when the client goes away, what is still queued is taken out."""
    waiting = asyncio.gather(*(asyncio.wrap_future(job.done) for job in jobs))
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=LOOK_AGAIN)
            if not waiting.done() and await request.is_disconnected():
                raise HTTPException(499, "the client has gone")
        return list(waiting.result())
    except asyncio.CancelledError:
        raise HTTPException(503, "the server ended before this was drawn; ask again", {"Retry-After": "5"}) from None
    finally:
        for job in jobs:
            job.done.cancel()
        waiting.cancel()


def _png(picture: np.ndarray, job: Job) -> bytes:
    out = io.BytesIO()
    look = job.look
    about = {
        "prompt": job.prompt,
        "seed": job.seed,
        "steps": look.steps,
        "guidance": look.guidance,
        "sampler": look.sampler,
        "loras": dict(look.loras),
    }
    Image.fromarray(picture).save(out, "PNG", pnginfo=stamp(look.model.artifact, **about))
    return out.getvalue()
