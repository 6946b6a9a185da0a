"""Dense networks that tasks train themselves. They are cached, and an interrupted training is continued."""

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
from torch.optim.lr_scheduler import LRScheduler

from sparsekit.errors import DataError
from sparsekit.methods.interfaces import Task
from sparsekit.models import load_checkpoint
from sparsekit.problem.objective import Batch
from sparsekit.pruning.training import descend, half_cosine, stepwise
from sparsekit.tasks.images import cache_directory, into_cache

#: Seconds of training that an interruption loses at most.
SAVE_EVERY = 120.0


def check_checkpoint(path: str | None, *, trains: bool = True) -> None:
    """Refuse a checkpoint that is not a file.

    Args:
        path: of the checkpoint; None where none was given.
        trains: whether the task trains its network where none is given.

    Raises:
        DataError: there is no file at the path.
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
        """Part of a cached network's file name, so that a network trained by another recipe is never used."""
        return hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:8]

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of all of the model's parameters."""
        return torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)

    def schedule(self, optimiser: torch.optim.Optimizer, total: int, steps: int, done: int) -> LRScheduler:
        """The learning rate of each step, of `total` in all and `steps` in an epoch, from step `done` on."""
        return half_cosine(optimiser, self.learning_rate, total, done=done)


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


@dataclass(frozen=True)
class StepwiseRecipe(MomentumRecipe):
    """The same at a learning rate that falls to a tenth after every `decay_every` epochs; 0: it is constant."""

    decay_every: int = 0

    def schedule(self, optimiser: torch.optim.Optimizer, total: int, steps: int, done: int) -> LRScheduler:
        return stepwise(optimiser, self.learning_rate, self.decay_every * steps or total, done=done)


#: The usual recipe for residual networks on small images; tasks set the number of epochs.
RESIDUAL = MomentumRecipe(epochs=100, learning_rate=0.1, batch_size=128, weight_decay=5e-4)


def cached_network(task: Task, name: str, recipe: Recipe, data: str) -> Path:
    """The path of a dense network in the cache.

    Args:
        task: its seed is part of the file's name.
        name: of task and architecture, with a version that is raised when either changes.
        recipe: part of the file's name.
        data: a hash of the training examples, so that other data in the same format have their own network.
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
    except DataError:  # it does not exist yet, or is damaged
        with into_cache(path) as temporary:  # fails before training where the cache cannot be written
            train(model.to(task.device))
            save_file(model.cpu().state_dict(), temporary)
        _unfinished(path).unlink(missing_ok=True)
    return model.eval()


def train(model: nn.Module, task: Task, recipe: Recipe, cached: Path) -> None:
    """Train in place on the task's training examples; an interruption loses `SAVE_EVERY` seconds at most.

    All random numbers follow from the seed and the epoch or step, so that a continued training equals an uninterrupted
    one. After each epoch, and every `SAVE_EVERY` seconds, the weights and the optimiser's state are written beside
    `cached`; `dense_network` deletes them at the end.

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
        schedule = recipe.schedule(optimiser, total, steps, begun)
        first = task.settings.seed * recipe.epochs * steps  # each step's dropout has a seed of its own
        torch.manual_seed(first + begun)
        for epoch in range(begun // steps, recipe.epochs):
            batches = _batches(task, recipe, epoch, steps=steps, begun=begun)
            for done in descend(model, task.likelihood, batches, optimiser, schedule, advice=advice):
                torch.manual_seed(first + done)
                task.progress(done, total)
                if done % steps == 0 or time.perf_counter() - saved > SAVE_EVERY:
                    state = {"steps": done, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
                    with into_cache(unfinished) as temporary:
                        torch.save(state, temporary)
                    saved = time.perf_counter()
    optimiser.zero_grad(set_to_none=True)


def _batches(task: Task, recipe: Recipe, epoch: int, *, steps: int, begun: int) -> Iterator[Batch]:
    """An epoch's batches from step `begun` on."""
    generator = torch.Generator().manual_seed(task.settings.seed * recipe.epochs + epoch)
    batches = task.batches("train", batch_size=recipe.batch_size, generator=generator, augment=True)
    for done, batch in enumerate(batches, epoch * steps):
        if done >= begun:  # earlier ones are drawn too, because the generator's state depends on them
            yield batch


def _go_on(unfinished: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Restore an interrupted training and return the number of its steps; 0 without one."""
    try:
        state: dict[str, Any] = torch.load(unfinished, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):  # it does not exist, or is damaged
        return 0
    if "steps" not in state:  # of a version that counted epochs
        return 0
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["steps"])


def _unfinished(cached: Path) -> Path:
    return cached.with_suffix(".unfinished")
