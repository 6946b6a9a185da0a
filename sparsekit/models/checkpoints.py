"""Dense weights from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsekit.errors import DataError


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model, in place.

    Args:
        model: of the architecture that the file was saved from.
        path: a safetensors file, or a torch file that holds a state dict, bare or under 'state_dict';
            prefixes `module.` of data-parallel training are dropped.

    Raises:
        DataError: the file is missing, holds no state dict, or does not fit the model.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in read_state_dict(path).items()}
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    surplus = [name for name in state if name not in expected]
    if missing or surplus:
        differences = [f"missing: {', '.join(missing[:5])}"] * bool(missing)
        differences += [f"not in the model: {', '.join(surplus[:5])}"] * bool(surplus)
        raise DataError(
            f"the checkpoint '{path}' does not fit {type(model).__name__} ({'; '.join(differences)}); "
            "give a checkpoint of this architecture"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise DataError(
                f"the checkpoint '{path}' does not fit {type(model).__name__}: '{name}' has shape "
                f"{tuple(tensor.shape)}, {tuple(expected[name].shape)} was needed; "
                "give a checkpoint of this architecture"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"the checkpoint '{path}' holds values in '{name}' that are not finite; give another one")
    model.load_state_dict(state, strict=False)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, on the CPU, under their names in the file.

    Args:
        path: a safetensors file, or a torch file that holds a state dict, bare or under 'state_dict'.

    Raises:
        DataError: the file is missing or holds no state dict.
    """
    if not path.is_file():
        raise DataError(f"there is no checkpoint file '{path}'; give the file of the dense weights")
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # for damaged bytes the unpickler may raise any error
        raise DataError(
            f"'{path}' cannot be read as a checkpoint ({type(error).__name__}); a state dict saved by torch.save "
            "or safetensors was needed: save the dense weights anew"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise DataError(
            f"'{path}' holds no state dict; a mapping from parameter names to tensors was needed: "
            "save model.state_dict()"
        )
    return {str(name): _plain(tensor, str(name), path) for name, tensor in content.items()}


def _plain(tensor: Tensor, name: str, path: Path) -> Tensor:
    """The tensor as a dense one, also if it is sparse or quantised."""
    if tensor.is_meta:
        raise DataError(f"the checkpoint '{path}' has no values of '{name}', a meta tensor; save the weights")
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return tensor.to_dense() if tensor.layout != torch.strided else tensor
