"""Settings of the server."""

from __future__ import annotations

from pydantic import Field

from infra.config import Config


class ServeConfig(Config):
    """How much a server takes on at once."""

    batch: int = Field(default=8, ge=1, le=256, description="Most pictures drawn by one call")
    queue: int = Field(default=64, ge=1, le=100_000, description="Pictures waiting before requests are refused (429)")
    pictures: int = Field(default=8, ge=1, le=64, description="Most pictures of one request")
    largest: float = Field(default=4.0, ge=1, le=64, description="Greatest area, times the model's own")
    mixes: int = Field(default=8, ge=1, le=1000, description="Mixes of LoRAs kept ready")
    threads: int = Field(default=2, ge=1, le=1024, description="CPU threads that draw")
    follow_seconds: float = Field(default=5.0, gt=0, description="How often the served run is looked at for a change")
    drain_seconds: float = Field(default=30.0, ge=0, description="Time running requests get when the server ends")
