"""What a kill, a full disk or a flipped byte leaves behind: never a wrong result without a word."""

import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sparsekit.errors import SparsekitError
from sparsekit.pruning.events import StepCompleted
from sparsekit.registry.installed import load_registry
from sparsekit.runs.run import execute
from sparsekit.runs.settings import resolve

REGISTRY = load_registry()


def settings(output):
    raw = {
        "estimator": {"name": "diagonal", "examples": 64},
        "sparsity": [0.5, 0.8],
        "steps": 1,
        "finetune": {"epochs": 0.1},
        "output": str(output),
        "tracking": {"enabled": False},
    }
    return resolve(raw, REGISTRY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """A finished run, its weights, and the output folder of one that was interrupted in its second step."""
    finished = execute(settings(tmp_path_factory.mktemp("finished")), REGISTRY)
    begun = tmp_path_factory.mktemp("begun")

    def interrupt(event):
        if isinstance(event, StepCompleted) and event.step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(settings(begun), REGISTRY, listener=interrupt)
    return finished, load_file(finished.path / "weights.safetensors"), begun


def is_right(outcome, weights):
    found = load_file(outcome.path / "weights.safetensors")
    return outcome.record.status == "finished" and all(torch.equal(found[name], weights[name]) for name in weights)


def again(output, weights, **how):
    """The run once more: the right result, or a refusal in one sentence. `--fresh` then always gives the right one."""
    try:
        assert is_right(execute(settings(output), REGISTRY, **how), weights)
    except SparsekitError as error:
        assert "\n" not in str(error)
        assert is_right(execute(settings(output), REGISTRY, fresh=True), weights)
        return "refused"
    return "right"


FLIPS = 60


@pytest.mark.parametrize("name", ["record.json", "run.yaml", "mask.safetensors", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "emptied", "cut short", "deleted"])
def test_a_finished_run_whose_files_are_damaged_is_refused(whole, tmp_path, name, damage):
    finished, weights, _ = whole
    draw = random.Random(name)
    content = (finished.path / name).read_bytes()
    for _ in range(FLIPS // 4 if damage == "flipped" else 1):
        copy = tmp_path / finished.path.name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(finished.path, copy)
        spoiled = bytearray(content)
        spoiled[draw.randrange(len(spoiled))] ^= 1 << draw.randrange(8)
        if damage == "deleted":
            (copy / name).unlink()
        else:
            new = {"flipped": bytes(spoiled), "emptied": b"", "cut short": content[: len(content) // 2]}[damage]
            (copy / name).write_bytes(new)
        if damage == "deleted" and name == "record.json":
            assert is_right(execute(settings(tmp_path), REGISTRY), weights)  # nothing says that it was done
        else:
            with pytest.raises(SparsekitError, match="--fresh"):
                execute(settings(tmp_path), REGISTRY)


def test_flipped_bytes_in_a_checkpoint_never_resume_to_other_figures(whole, tmp_path):
    _, weights, begun = whole
    (path,) = begun.glob("*/checkpoint/*.safetensors")
    content, draw = path.read_bytes(), random.Random(0)
    outcomes = []
    for trial in range(FLIPS):
        output = tmp_path / str(trial)
        shutil.copytree(begun, output)
        spoiled = bytearray(content)
        # half of them in the header, which is a small part of the file
        spoiled[draw.randrange(len(content) if trial % 2 else min(4096, len(content)))] ^= 1 << draw.randrange(8)
        (output / path.relative_to(begun)).write_bytes(spoiled)
        outcomes.append(again(output, weights, resume=True))
    assert "refused" in outcomes


@pytest.mark.parametrize("how", [{}, {"fresh": True}], ids=["", "--fresh"])
def test_a_stop_at_any_write_is_never_silent(whole, tmp_path, monkeypatch, how):
    """As a kill would, at every rename and removal of a run; then the same command again, with --resume."""
    finished, weights, _ = whole
    replace, rmtree = os.replace, shutil.rmtree

    class Killed(BaseException):
        pass

    for stop in range(40):
        output, calls = tmp_path / str(stop), iter(range(1000))
        shutil.copytree(finished.path.parent, output) if how else output.mkdir()

        def dying(real, calls=calls, stop=stop):
            def called(*given, **named):
                if next(calls) == stop:
                    raise Killed
                return real(*given, **named)

            return called

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying(replace))
            patch.setattr(shutil, "rmtree", dying(rmtree))
            try:
                execute(settings(output), REGISTRY, **how)
                break
            except Killed:
                pass
        again(output, weights, resume=True)
    else:
        raise AssertionError("the run has more writes than were tried")
    assert stop > 4
