"""What the images API takes and gives: OpenAI's fields, then ours (seed, steps, guidance, sampler, loras, enhance)."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

SIZE = re.compile(r"^(\d{1,5})x(\d{1,5})$")


class ImagesRequest(BaseModel):
    """POST /v1/images/generations. OpenAI's fields without a meaning here (quality, style, ...) are taken and ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=4000)
    model: str | None = None
    n: int = Field(default=1, ge=1)
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=1, le=30)
    sampler: Literal["euler", "heun"] | None = None
    loras: dict[str, float] = Field(default_factory=dict, max_length=8)
    enhance: bool = True

    @field_validator("size")
    @classmethod
    def _a_size(cls, size: str | None) -> str | None:
        if size is not None and size != "auto" and not SIZE.match(size):
            raise ValueError(f"size {size!r} is not WIDTHxHEIGHT or auto")
        return size

    @field_validator("loras")
    @classmethod
    def _within(cls, loras: dict[str, float]) -> dict[str, float]:
        for name, weight in loras.items():
            if abs(weight) > 2:
                raise ValueError(f"weight {weight} of LoRA {name!r} is outside -2 to 2")
        return loras

    def pixels(self, side: int) -> tuple[int, int]:
        """Width and height; the model's own side where none is asked for."""
        found = SIZE.match(self.size or "")
        return (int(found[1]), int(found[2])) if found else (side, side)


def problem(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
