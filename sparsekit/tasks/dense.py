"""Dense networks that tasks train themselves: kept in the cache, trained epoch by epoch."""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sparsekit.errors import DataError
from sparsekit.interfaces import Task
from sparsekit.models import load_checkpoint
from sparsekit.tasks.images import into_cache


@dataclass(frozen=True)
class Recipe:
    """Adam with decoupled weight decay; the learning rate falls to zero along a half cosine."""

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float = 0.0

    @property
    def hash(self) -> str:
        """For a cached network's name, so that a changed recipe is never answered by an old network."""
        return hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:8]


def dense_network(task: Task, cached: Callable[[], Path], train: Callable[[nn.Module], None]) -> nn.Module:
    """The task's network with the weights of its `checkpoint`, else of `cached`, else trained here and cached.

    Raises:
        DataError: the checkpoint does not fit, or the cache cannot be written.
    """
    model = task.network()
    if task.settings.checkpoint is not None:
        load_checkpoint(model, Path(task.settings.checkpoint))
        return model.eval()
    path = cached()
    try:
        load_checkpoint(model, path)
    except DataError:  # not there yet, or not whole
        with into_cache(path) as temporary:  # a cache that cannot be written is said before training
            train(model)
            save_file(model.state_dict(), temporary)
        _unfinished(path).unlink(missing_ok=True)
    return model.eval()


def train(model: nn.Module, task: Task, recipe: Recipe, cached: Path) -> None:
    """Train in place on the task's training examples; an interruption loses the present epoch at most.

    What is drawn is drawn anew from (seed, epoch), so that going on equals never having stopped. After each epoch
    the weights and the optimiser's state lie beside `cached`, until `dense_network` has written that.
    """
    unfinished, seed, device = _unfinished(cached), task.settings.seed, next(model.parameters()).device
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    steps = math.ceil(task.size("train") / recipe.batch_size)
    total = recipe.epochs * steps
    model.train()
    with torch.random.fork_rng(devices=[]):
        for epoch in range(_go_on(unfinished, model, optimiser), recipe.epochs):
            torch.manual_seed(seed * recipe.epochs + epoch)  # dropout
            generator = torch.Generator().manual_seed(seed * recipe.epochs + epoch)
            batches = task.batches("train", batch_size=recipe.batch_size, generator=generator, augment=True)
            for done, (inputs, targets) in enumerate(batches, epoch * steps):
                for group in optimiser.param_groups:
                    group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done / total))
                optimiser.zero_grad(set_to_none=True)
                task.likelihood.losses(model(inputs.to(device)), targets.to(device)).mean().backward()
                optimiser.step()
                task.progress(done + 1, total)
            state = {"epochs": epoch + 1, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
            with into_cache(unfinished) as temporary:
                torch.save(state, temporary)
    optimiser.zero_grad(set_to_none=True)


def _go_on(unfinished: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Epochs that an interrupted training has done, its state restored; 0 where there is none."""
    try:
        state: dict[str, Any] = torch.load(unfinished, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # not there, or not whole
        return 0
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["epochs"])


def _unfinished(cached: Path) -> Path:
    return cached.with_suffix(".unfinished")
