"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TextIO

from flows.config import LifecycleConfig, RunConfig
from flows.plan import PlanRow, cost, estimate
from flows.run import Display, LogDisplay
from models.networks.config import PrxConfig
from models.pretraining.config import FlowMatchingConfig
from models.pretraining.curriculum import Phase, phases_of
from models.pretraining.densities import bars, histogram, shift_of

LINE_SECONDS = 10.0
HUB_FACTOR = 8  # pixels per latent along a side of the usual VAE
_chosen: ContextVar[Display | None] = ContextVar("display", default=None)


def use_display(display: Display) -> None:
    """Choose how runs started from here show themselves; a flow's parameters cannot carry it."""
    _chosen.set(display)


def current_display() -> Display:
    """The chosen display, or the log."""
    return _chosen.get() or LogDisplay()


def clock(seconds: float) -> str:
    """Seconds as 9 s, 1:05 or 2:03:04."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class LineDisplay:
    """One line when a stage starts and ends, and one every ten seconds in between."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.head, self.next = "", 0.0
        self.first: tuple[int, float] | None = None  # where and when the first progress came

    def stage(self, number: int, total: int, row: PlanRow) -> None:
        """A stage begins."""
        self.head, self.next, self.first = f"[{number}/{total}] {row.stage}", 0.0, None
        if row.state != "HIT":
            usual = f", took {clock(row.seconds)} last time" if row.seconds else ""
            self._write(f"{self.head}: starts ({row.reason}{usual})")

    def progress(self, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """A stage has got further."""
        now = time.monotonic()
        self.first = self.first or (done, now)
        if now >= self.next:
            self.next = now + LINE_SECONDS
            self._write(f"{self.head}: {self.how_far(done, total, metrics)}")

    def done(self, entry: Mapping[str, Any]) -> None:
        """A stage has ended."""
        took = f" in {clock(entry['seconds'])}" if entry["status"] == "ran" else ""
        self._write(f"{self.head}: {entry['status']}{took} {str(entry['digest'])[:12]}")

    def how_far(self, done: int, total: int, metrics: Mapping[str, float]) -> str:
        """Position, time left and the first two numbers."""
        at, when = self.first or (done, 0.0)
        left = [f"{clock((time.monotonic() - when) / (done - at) * (total - done))} left"] if done > at else []
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name != "seconds"][:2]
        return ", ".join([f"{done}/{total}", *left, *shown])

    def _write(self, text: str) -> None:
        self.stream.write(f"{text}\n")
        self.stream.flush()


class LiveDisplay(LineDisplay):
    """The same with a status line that renews itself."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        super().__init__()
        self.status = self.console.status("")

    def stage(self, number: int, total: int, row: PlanRow) -> None:
        """A stage begins."""
        super().stage(number, total, row)
        self.status.update(f"{self.head} ...")
        self.status.start()

    def progress(self, stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """A stage has got further."""
        self.first = self.first or (done, time.monotonic())
        self.status.update(f"{self.head}: {self.how_far(done, total, metrics)}")

    def done(self, entry: Mapping[str, Any]) -> None:
        """A stage has ended."""
        self.status.stop()
        super().done(entry)

    def _write(self, text: str) -> None:
        self.console.print(text, markup=False)


def plan_lines(rows: Sequence[PlanRow], run: RunConfig | None = None) -> list[str]:
    """The plan as a table, its time, and with a price its cost."""
    width = max(len(row.stage) for row in rows)
    lines = []
    for row in rows:
        usual = "?" if row.seconds is None else clock(row.seconds)
        lines.append(f"{row.stage:<{width}}  {row.state:<4}  {'' if row.state == 'HIT' else usual:>8}  {row.reason}")
    seconds, unknown = estimate(rows)
    todo = sum(row.state != "HIT" for row in rows)
    more = f", {unknown} never timed" if unknown else ""
    price = None if run is None else cost(rows, run)
    asks = "" if price is None else f", {price:.2f} to pay"
    lines.append(
        f"{todo} of {len(rows)} stages to run" + (f", about {clock(seconds)}{more}{_room(rows)}{asks}" if todo else "")
    )
    return lines


def _room(rows: Sequence[PlanRow]) -> str:
    """Memory and disk the stages to run took last, as far as it is known."""
    todo = [row for row in rows if row.state != "HIT"]
    memory, disk = max((row.memory_bytes or 0 for row in todo), default=0), sum(row.disk_bytes or 0 for row in todo)
    return (f", {memory / 1e9:.1f} GB of memory" if memory else "") + (f", {disk / 1e6:.0f} MB of disk" if disk else "")


def times_lines(config: LifecycleConfig) -> list[str]:
    """The training times of every stage of pre-training, phase by phase, at its largest side; a hub's VAE taken for one of 8 px."""
    lines = []
    for stage in config.pretrain:
        shown = []
        for phase in phases_of(stage):
            side, tokens = _largest(stage, phase, config)
            shares, k = histogram(tokens, phase.timesteps), shift_of(tokens, phase.timesteps)
            shown.append(f"{bars(shares)} at {side} px, {tokens} tokens, shift {k:.3g}")
        lines.append(f"times of {stage.name}, data to noise: {'; then '.join(shown)}")
    return lines


def _largest(stage: FlowMatchingConfig, phase: Phase, config: LifecycleConfig) -> tuple[int, int]:
    """Side in pixels and tokens of a phase's largest square."""
    latent = not isinstance(stage.network, PrxConfig) and (config.autoencoder is not None or config.model is not None)
    factor = 1 if not latent else HUB_FACTOR if config.autoencoder is None else config.autoencoder.factor
    side, patch = max(phase.select.resolutions), getattr(stage.network, "patch_size", 1)
    return side, max(1, side // factor // patch) ** 2


def run_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per run, the latest first."""
    lines = []
    for record in records:
        counts = Counter(stage["status"] for stage in record.get("stages", []))
        stages = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        lines.append(f"{record['run']}  {str(record['started'])[:19]}  {record.get('outcome')}  {stages}")
    return lines or ["no runs yet; start one: t2i run presets/demo.yaml"]


def stage_lines(record: Mapping[str, Any]) -> list[str]:
    """One line per stage of a run, then its error and progress."""
    width = max((len(stage["name"]) for stage in record["stages"]), default=0)
    lines = [f"{record['run']}: {record['outcome']}, {clock(record['wall_seconds'])}, root {record['root']}"]
    for stage in record["stages"]:
        took = clock(stage["seconds"]) if stage["status"] == "ran" else ""
        lines.append(f"{stage['name']:<{width}}  {stage['status']:<11}  {took:>8}  {str(stage['digest'] or '')[:12]}")
    if progress := record.get("progress"):
        lines.append(f"at {progress['done']} of {progress['total']} in {progress['stage']}")
    if record.get("error"):
        lines.append(f"error: {record['error']}")
    return lines
