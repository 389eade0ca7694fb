"""Optimizers: Muon (Jordan 2024) for hidden matrices, AdamW for the rest; warm-up, plateau, linear decay."""

from __future__ import annotations

import torch
from torch import nn

from models.engine.config import OptimizerConfig
from models.engine.muon import Muon
from models.engine.shard import clip_parts, cut, is_cut, part_of, whole

MUON_EXCLUDED = ("img_in", "txt_in", "time_in", "modulation", "final_layer", "embed", "norm", "head", "projector.out")


def rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate at `step` over its peak: linear warm-up, plateau, linear decay to `final_ratio`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    start = max(config.warmup_steps, round(config.decay_from * steps))
    if step < start or steps - 1 <= start:
        return 1.0
    done = (step - start) / (steps - 1 - start)
    return 1.0 + done * (config.final_ratio - 1.0)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(hidden matrices for Muon, everything else for AdamW) among the trainable parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = parameter.ndim == 2 and not any(word in name for word in MUON_EXCLUDED)
        (matrices if hidden else others).append(parameter)
    return matrices, others


class PlayerOptimizer:
    """The optimizers and the schedule of one player."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        trained = [p for p in module.parameters() if p.requires_grad]
        parts = {p: nn.Parameter(part_of(p)) for p in trained if is_cut(p)}  # the optimizers move these, in p's memory
        self.cut_from = {part: p for p, part in parts.items()}
        self.parameters = [parts.get(p, p) for p in trained]
        matrices, others = ([parts.get(p, p) for p in group] for group in split_parameters(module))
        if config.muon_lr is None:
            matrices, others = [], matrices + others
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices and config.muon_lr is not None:
            self.optimizers.append(
                Muon(matrices, config.muon_lr, momentum=0.95, weight_decay=config.weight_decay, cut_from=self.cut_from)
            )
        if others:
            self.optimizers.append(
                torch.optim.AdamW(
                    others,
                    lr=config.adamw_lr,
                    betas=config.betas,
                    weight_decay=config.weight_decay,
                    fused=others[0].is_cuda,
                    foreach=not others[0].is_cuda,
                )
            )
        self.peaks = [group["lr"] for opt in self.optimizers for group in opt.param_groups]

    def step(self, step: int) -> tuple[float, bool]:
        """Clip, set the rates, move; returns (gradient norm before clipping, whether the step was taken)."""
        norm = self._clipped()
        finite = bool(torch.isfinite(norm))
        if finite:
            factor = rate_factor(step % self.steps, self.steps, self.config)
            groups = [group for opt in self.optimizers for group in opt.param_groups]
            for group, peak in zip(groups, self.peaks, strict=True):
                group["lr"] = peak * factor
            for optimizer in self.optimizers:
                optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        return float(norm), finite

    def _clipped(self) -> torch.Tensor:
        """Scale the gradients down where their norm is too large; returns the norm."""
        if not self.cut_from:
            norm: torch.Tensor = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
            return norm
        for part, source in self.cut_from.items():
            part.grad, source.grad = None if source.grad is None else part_of(source.grad), None
        complete = [p for p in self.parameters if p not in self.cut_from]
        return clip_parts(list(self.cut_from), complete, self.config.clip_norm)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Optimizer state as named whole tensors (for safetensors); all workers must ask where weights are cut."""
        flat: dict[str, torch.Tensor] = {}
        for i, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensor = torch.as_tensor(value)
                    like = self._source(optimizer, index)
                    flat[f"{i}/{index}/{key}"] = whole(tensor, like) if tensor.ndim else tensor
        return flat

    def _source(self, optimizer: torch.optim.Optimizer, index: int) -> torch.Tensor:
        """The module's parameter behind the one at this place of an optimizer's state."""
        parameter: torch.nn.Parameter = optimizer.param_groups[0]["params"][index]
        return self.cut_from.get(parameter, parameter)

    def load_tensors(self, flat: dict[str, torch.Tensor]) -> None:
        """Inverse of `tensors`."""
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in flat.items():
                owner, index, key = name.split("/")
                if int(owner) == i:
                    own = cut(value, self._source(optimizer, int(index))) if value.ndim else value
                    state.setdefault(int(index), {})[key] = own
            full = optimizer.state_dict()
            full["state"] = state
            optimizer.load_state_dict(full)
