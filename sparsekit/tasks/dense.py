"""Dense networks that tasks train themselves: kept in the cache, trained with interruptions."""

from __future__ import annotations

import hashlib
import math
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sparsekit.errors import DataError
from sparsekit.methods.interfaces import Task
from sparsekit.models import load_checkpoint
from sparsekit.problem.objective import Batch
from sparsekit.pruning.training import descend, half_cosine
from sparsekit.tasks.images import cache_directory, into_cache

#: Seconds of training that an interruption loses at most.
SAVE_EVERY = 120.0


def check_checkpoint(path: str | None, *, trains: bool = True) -> None:
    """Refuse a checkpoint that is no file; `trains`: without one, the task trains its network.

    Raises:
        DataError: there is none where the path says.
    """
    if path is not None and not Path(path).is_file():
        raise DataError(f"there is no checkpoint file '{path}'{'; leave it out to train one' if trains else ''}")


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

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """Of all parameters."""
        return torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)


@dataclass(frozen=True)
class MomentumRecipe(Recipe):
    """The same with stochastic gradient descent, momentum and coupled weight decay."""

    momentum: float = 0.9

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=True,
        )


#: What residual networks of small images are trained by in the literature; tasks set the epochs.
RESIDUAL = MomentumRecipe(epochs=100, learning_rate=0.1, batch_size=128, weight_decay=5e-4)


def cached_network(task: Task, name: str, recipe: Recipe, data: str) -> Path:
    """Where a dense network lies.

    Args:
        task: its seed is part of the file's name.
        name: of task and architecture, with a version that is raised with a change of it.
        recipe: part of the file's name.
        data: a hash of the training examples: other data in the same format have networks of their own.
    """
    return cache_directory() / f"{name}-{recipe.hash}-{data[:8]}-seed{task.settings.seed}.safetensors"


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
            train(model.to(task.device))
            save_file(model.cpu().state_dict(), temporary)
        _unfinished(path).unlink(missing_ok=True)
    return model.eval()


def train(model: nn.Module, task: Task, recipe: Recipe, cached: Path) -> None:
    """Train in place on the task's training examples; an interruption loses `SAVE_EVERY` seconds at most.

    What is drawn is drawn anew from the seed and the epoch or step, so that going on equals never having stopped.
    After each epoch and every so many seconds the weights and the optimiser's state are put beside `cached`, until
    `dense_network` has written that.

    Raises:
        CurvatureError: the loss is not finite.
    """
    unfinished, optimiser = _unfinished(cached), recipe.optimiser(model)
    steps = math.ceil(task.size("train") / recipe.batch_size)
    total = recipe.epochs * steps
    advice = "give trained weights by --checkpoint"
    model.train()
    with torch.random.fork_rng(devices=[]):
        begun, saved = _go_on(unfinished, model, optimiser), time.perf_counter()
        schedule = half_cosine(optimiser, recipe.learning_rate, total, done=begun)
        for epoch in range(begun // steps, recipe.epochs):
            batches = _batches(task, recipe, epoch, steps=steps, begun=begun)
            for done in descend(model, task.likelihood, batches, optimiser, schedule, advice=advice):
                task.progress(done, total)
                if done % steps == 0 or time.perf_counter() - saved > SAVE_EVERY:
                    state = {"steps": done, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
                    with into_cache(unfinished) as temporary:
                        torch.save(state, temporary)
                    saved = time.perf_counter()
    optimiser.zero_grad(set_to_none=True)


def _batches(task: Task, recipe: Recipe, epoch: int, *, steps: int, begun: int) -> Iterator[Batch]:
    """An epoch's batches from step `begun` on, the global generator seeded for each step's dropout."""
    seed = task.settings.seed
    generator = torch.Generator().manual_seed(seed * recipe.epochs + epoch)
    batches = task.batches("train", batch_size=recipe.batch_size, generator=generator, augment=True)
    for done, batch in enumerate(batches, epoch * steps):
        if done >= begun:  # earlier ones are drawn all the same: the next ones follow from the generator's state
            torch.manual_seed(seed * recipe.epochs * steps + done)
            yield batch


def _go_on(unfinished: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Steps that an interrupted training has done, its state restored; 0 where there is none."""
    try:
        state: dict[str, Any] = torch.load(unfinished, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # not there, or not whole
        return 0
    if "steps" not in state:  # of a version that counted epochs
        return 0
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["steps"])


def _unfinished(cached: Path) -> Path:
    return cached.with_suffix(".unfinished")
