"""What a run leaves on disk is whole, strict and read back as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from sparsekit import checksums, files
from sparsekit.errors import RecordError
from sparsekit.files import atomic_write
from sparsekit.problem.parameters import ParameterSpace
from sparsekit.runs import checkpoints as checkpoints_module
from sparsekit.runs.directory import RunDirectory
from sparsekit.runs.schema import SCHEMA_VERSION, LevelRecord, RunRecord, StepRecord, run_key

SPACE = ParameterSpace({"a.weight": (2, 3), "b.weight": (4, 1)})


def kept():
    return {
        "a.weight": torch.tensor([[True, False, True], [False, False, True]]),
        "b.weight": torch.ones(4, 1, dtype=torch.bool),
    }


def level(**changes):
    values = {
        "sparsity": 0.5,
        "achieved": 0.5,
        "achieved_total": 0.4,
        "pruned": {"loss": 1.0},
        "finetuned": None,
        "predicted_increase": 0.1,
        "measured_increase": 0.2,
        "layer_sparsity": {"a.weight": 0.5},
    }
    return LevelRecord(**{**values, **changes})


def step(**changes):
    values = {
        "index": 0,
        "sparsity": 0.5,
        "removed": 5,
        "refreshed": True,
        "curvature": {"trace": 2.0},
        "damping": 1e-4,
        "predicted_increase": 0.1,
        "measured_increase": 0.2,
        "iterations": 3,
        "residual": 1e-9,
        "pruned": None,
        "finetuned": None,
        "seconds": {"refresh": 0.5},
    }
    return StepRecord(**{**values, **changes})


def record(**changes):
    values = {
        "key": "0" * 64,
        "task": "digits",
        "estimator": "obs",
        "settings": {"seed": 0},
        "identity": {"seed": 0},
        "started": "2026-01-01T00:00:00+00:00",
        "machine": {"python": "3.11"},
        "plugins": [{"name": "sparsekit", "version": "0.1.0"}],
        "parameters": {"prunable": 10, "total": 12, "skipped": {"a.bias": "one dimension"}},
        "path": "sequential",
        "dense": {"loss": 0.5, "accuracy": 0.9},
    }
    return RunRecord(**{**values, **changes})


@pytest.fixture
def run(tmp_path):
    return RunDirectory.of(tmp_path / "runs", "digits", "obs", "0123456789abcdef")


def refuse(number, message):
    def refused(*args, **kwargs):
        raise OSError(number, message)

    return refused


# --- keys


def test_key_is_a_sha256_in_hexadecimal():
    assert len(run_key({"a": 1})) == 64


def test_key_does_not_depend_on_the_order():
    assert run_key({"a": 1, "b": {"c": 2, "d": 3}}) == run_key({"b": {"d": 3, "c": 2}, "a": 1})


def test_key_is_the_same_for_tuples_and_lists():
    assert run_key({"a": (1, 2)}) == run_key({"a": [1, 2]})


@pytest.mark.parametrize("other", [{"a": 2}, {"b": 1}, {"a": 1, "b": None}, {"a": "1"}, {"a": float("inf")}])
def test_key_tells_identities_apart(other):
    assert run_key(other) != run_key({"a": 1})


def test_key_is_stable_across_versions():
    # From sha256sum of the text {"a":[0.5,"Infinity"],"b":null}: a change here would lose everybody's runs.
    expected = "73a553203f1edaf9"
    assert run_key({"b": None, "a": (0.5, float("inf"))}).startswith(expected)


def test_key_refuses_what_is_not_plain_data():
    with pytest.raises(TypeError, match="plain data; object given"):
        run_key({"a": object()})


# --- the record


def test_directory_is_named_by_task_estimator_and_key(run):
    assert run.path.name == "digits-obs-0123456789ab"


def test_record_is_read_back_as_it_was(run):
    written = record(levels=[level()], steps=[step()], status="finished")
    run.write(written)
    assert run.read() == written


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_figures_are_read_back_as_floats(run, value):
    run.write(record(levels=[level(predicted_increase=value, pruned={"loss": value})]))
    assert repr(run.read().levels[0].pruned["loss"]) == repr(value)


def test_record_is_strict_json(run):
    inf = float("inf")
    run.write(record(settings={"deep": [inf]}, dense={"loss": inf}, steps=[step(residual=float("nan"))]))

    def refused(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(run.record_path.read_text(), parse_constant=refused)


def test_no_record_reads_as_none(run):
    assert run.read() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"schema_version": 1}'])
def test_a_damaged_record_is_refused_with_its_name(run, content):
    run.path.mkdir(parents=True)
    run.record_path.write_bytes(content)
    with pytest.raises(RecordError, match=r"record\.json is not a whole record .* --fresh"):
        run.read()


def test_a_record_of_another_schema_is_refused(run):
    run.path.mkdir(parents=True)
    run.record_path.write_text('{"schema_version": 99}')
    with pytest.raises(RecordError, match=f"schema version 99, this sparsekit reads {SCHEMA_VERSION}"):
        run.read()


def test_every_field_of_a_step_and_level_is_described():
    fields = {**LevelRecord.model_fields, **StepRecord.model_fields}
    assert [name for name, field in fields.items() if not field.description] == []


def test_settings_are_yaml_in_the_order_given(run):
    run.write_settings({"task": "digits", "a": {"levels": (0.5, 0.9)}, "path": Path("x")})
    text = (run.path / "run.yaml").read_text()
    assert list(yaml.safe_load(text).items()) == [
        ("task", "digits"),
        ("a", {"levels": [0.5, 0.9]}),
        ("path", "x"),
    ]


# --- writing


def test_atomic_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(files.os, "fsync", refuse(28, "No space left on device"))
    with pytest.raises(RecordError):
        atomic_write(path, b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


def test_a_failed_write_names_path_and_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", refuse(28, "No space left on device"))
    with pytest.raises(RecordError, match=f"cannot write {tmp_path}/file: No space left on device"):
        atomic_write(tmp_path / "file", b"new")


def test_a_file_in_the_place_of_the_folder_is_a_record_error(tmp_path):
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(RecordError, match="cannot write"):
        RunDirectory.of(tmp_path / "runs", "digits", "obs", "0" * 64).write(record())


def test_written_files_are_as_shared_as_the_umask_says(tmp_path):
    atomic_write(tmp_path / "file", b"")
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_written_tensors_are_as_shared_as_the_umask_says(run):
    run.write_result(SPACE, {"a": torch.ones(1)}, kept())
    (run.path / "other").touch()
    assert (run.path / "weights.safetensors").stat().st_mode == (run.path / "other").stat().st_mode


# --- results


def test_weights_are_the_whole_state(run):
    weights = {"a.weight": torch.arange(6.0).view(3, 2).T, "a.bias": torch.ones(2), "count": torch.tensor(3)}
    run.write_result(SPACE, weights, kept())
    read = load_file(run.path / "weights.safetensors")
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_tied_weights_are_written_under_both_names(run):
    tied = torch.ones(3)
    run.write_result(SPACE, {"a": tied, "b": tied}, kept())
    assert set(load_file(run.path / "weights.safetensors")) == {"a", "b"}


def test_mask_file_says_what_true_means(run):
    run.write_result(SPACE, {}, kept())
    with safe_open(run.path / "mask.safetensors", framework="pt") as file:
        assert file.metadata()["meaning"] == "True = kept"


def test_a_mask_of_other_parameters_is_not_written(run):
    with pytest.raises(RecordError, match="only one of the two has: b.weight"):
        run.write_result(ParameterSpace({"a.weight": (2, 3)}), {}, kept())


def test_a_mask_of_another_shape_is_not_written(run):
    with pytest.raises(RecordError, match=r"shape \(4, 1\); torch.bool of shape \(1, 4\)"):
        run.write_result(ParameterSpace({"a.weight": (2, 3), "b.weight": (1, 4)}), {}, kept())


def test_a_mask_that_is_not_bool_is_not_written(run):
    with pytest.raises(RecordError, match=r"'a.weight' is torch.float32"):
        run.write_result(SPACE, {}, {**kept(), "a.weight": torch.ones(2, 3)})


# --- checkpoints


def checkpoints(run):
    return sorted(path.name for path in run.checkpoints.path.iterdir())


def test_no_checkpoint_loads_as_none(run):
    assert run.checkpoints.load() is None


def test_checkpoint_is_read_back_as_it_was(run):
    tensors = {"w": torch.randn(3, 2, dtype=torch.float64).T, "rng": torch.get_rng_state()}
    run.checkpoints.save(4, tensors, {})
    _, read, _ = run.checkpoints.load()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_checkpoint_metadata_is_read_back_exactly(run):
    meta = {"level": 1, "loss": 0.1 + 0.2, "worst": float("inf"), "names": ["ä"], "none": None}
    run.checkpoints.save(4, {}, meta)
    assert run.checkpoints.load()[2] == meta


def test_the_newest_checkpoint_is_loaded(run):
    for index in (9, 10):
        run.checkpoints.save(index, {}, {})
    assert run.checkpoints.load()[0] == 10


def test_only_the_newest_checkpoint_is_kept(run):
    for index in range(3):
        run.checkpoints.save(index, {}, {})
    assert checkpoints(run) == ["00002.safetensors"]


def test_the_older_checkpoint_stays_when_the_newer_cannot_be_written(run, monkeypatch):
    run.checkpoints.save(0, {}, {})
    monkeypatch.setattr(files.os, "replace", refuse(28, "No space left on device"))
    with pytest.raises(RecordError, match="No space left"):
        run.checkpoints.save(1, {}, {})
    assert checkpoints(run) == ["00000.safetensors"]


def truncate(path, fraction):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


@pytest.mark.parametrize("fraction", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_skipped_for_an_older_one(run, fraction):
    tensors = {"w": torch.randn(50)}
    run.checkpoints.save(1, tensors, {})
    whole = (run.checkpoints.path / "00001.safetensors").read_bytes()
    run.checkpoints.save(2, tensors, {})
    (run.checkpoints.path / "00001.safetensors").write_bytes(whole)
    truncate(run.checkpoints.path / "00002.safetensors", fraction)
    assert run.checkpoints.load()[0] == 1


@pytest.fixture
def large():
    return torch.randn(checkpoints_module.LARGE // 4)


def parts(run):
    return {path.name: path.stat().st_ino for path in run.checkpoints.path.glob("*.part")}


def test_a_large_tensor_that_is_unchanged_is_not_written_again(run, large):
    run.checkpoints.save(1, {"rows": large, "w": torch.zeros(2)}, {})
    before = parts(run)
    run.checkpoints.save(2, {"rows": large, "w": torch.ones(2)}, {})
    assert parts(run) == before and len(before) == 1


def test_unchanged_large_tensors_are_read_back_beside_those_that_changed(run, large):
    other = torch.randn_like(large)
    run.checkpoints.save(1, {"rows": large, "other": other}, {})
    other += 1
    run.checkpoints.save(2, {"rows": large, "other": other, "w": torch.ones(2)}, {})
    _, read, _ = run.checkpoints.load()
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        "rows": large.tolist(), "other": other.tolist(), "w": [1.0, 1.0]
    }  # fmt: skip


def test_a_large_tensor_changed_in_place_is_written_again(run, large):
    run.checkpoints.save(1, {"rows": large}, {})
    large[3] = 7.0
    run.checkpoints.save(2, {"rows": large}, {})
    assert run.checkpoints.load()[1]["rows"][3] == 7.0


def test_a_large_tensor_that_is_gone_does_not_come_back(run, large):
    run.checkpoints.save(1, {"rows": large, "old": large + 1}, {})
    run.checkpoints.save(2, {"rows": large}, {})
    assert set(run.checkpoints.load()[1]) == {"rows"}


def test_a_large_tensor_of_inference_mode_is_written_each_time(run):
    with torch.inference_mode():
        rows = torch.zeros(checkpoints_module.LARGE // 4)
    run.checkpoints.save(1, {"rows": rows}, {})
    with torch.inference_mode():
        rows += 1
    run.checkpoints.save(2, {"rows": rows}, {})
    assert run.checkpoints.load()[1]["rows"][0] == 1


def test_checkpoints_that_were_cleared_are_not_pointed_to(run, large):
    run.checkpoints.save(1, {"rows": large}, {})
    run.checkpoints.clear()
    run.checkpoints.save(2, {"rows": large}, {})
    assert torch.equal(run.checkpoints.load()[1]["rows"], large)


def test_a_kill_between_part_and_checkpoint_leaves_the_one_before(run, large, monkeypatch):
    run.checkpoints.save(1, {"rows": large}, {})
    write = checkpoints_module.write_tensors

    def killed(path, *rest):
        if path.suffix == ".safetensors":
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(checkpoints_module, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        run.checkpoints.save(2, {"rows": large + 1}, {})
    step, read, _ = run.checkpoints.load()
    assert step == 1 and torch.equal(read["rows"], large)


def test_another_process_removes_the_part_only_with_a_checkpoint_of_its_own(run, large):
    run.checkpoints.save(1, {"rows": large}, {})
    other = RunDirectory(run.path)
    _, read, _ = other.checkpoints.load()
    other.checkpoints.save(1, read, {})
    assert len(parts(run)) == 1 and torch.equal(RunDirectory(run.path).checkpoints.load()[1]["rows"], large)


def test_a_part_of_which_most_has_changed_is_made_anew(run, large):
    more = torch.cat([large, large, large])
    run.checkpoints.save(1, {"rows": large, "more": more}, {})
    before = parts(run)
    more += 1
    run.checkpoints.save(2, {"rows": large, "more": more}, {})
    assert len(parts(run)) == 1 and parts(run).keys() != before.keys()


def test_a_part_that_is_not_whole_makes_its_checkpoint_so(run, large):
    run.checkpoints.save(1, {"rows": large}, {})
    for name in parts(run):
        truncate(run.checkpoints.path / name, 0.5)
    with pytest.raises(RecordError, match="no checkpoint in .* is whole"):
        run.checkpoints.load()


def test_no_whole_checkpoint_is_an_error(run):
    run.checkpoints.save(1, {"w": torch.ones(3)}, {})
    truncate(run.checkpoints.path / "00001.safetensors", 0.5)
    with pytest.raises(RecordError, match="no checkpoint in .* is whole; start again with --fresh"):
        run.checkpoints.load()


def test_what_a_killed_process_left_half_written_is_ignored(run):
    run.checkpoints.save(1, {}, {})
    (run.checkpoints.path / ".00002.safetensors.12345678.tmp").write_bytes(b"half")
    assert run.checkpoints.load()[0] == 1


def test_what_a_killed_process_left_half_written_goes_with_the_next_checkpoint(run):
    run.checkpoints.path.mkdir(parents=True)
    (run.checkpoints.path / ".00002.safetensors.12345678.tmp").write_bytes(b"half")
    run.checkpoints.save(2, {}, {})
    assert checkpoints(run) == ["00002.safetensors"]


def test_cleared_checkpoints_are_gone(run):
    run.checkpoints.save(1, {}, {})
    run.checkpoints.clear()
    assert not run.checkpoints.path.exists()


def test_clearing_no_checkpoints_does_nothing(run):
    run.checkpoints.clear()


def test_a_discarded_run_is_gone(run):
    run.write(record())
    run.checkpoints.save(1, {}, {})
    run.discard()
    assert not run.path.exists()


# --- locks


def test_a_locked_run_is_refused_to_others(run, tmp_path):
    other = RunDirectory.of(tmp_path / "runs", "digits", "obs", "0123456789abcdef")
    with run.lock(), pytest.raises(RecordError, match="another process is working on this run"), other.lock():
        pass


HOLD = """
import sys
from pathlib import Path
from sparsekit.runs.directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow  # a second interpreter imports torch
def test_a_run_locked_by_another_process_is_refused(run):
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RecordError, match="another process"), run.lock():
            pass
        other.stdin.close()


def test_the_lock_is_free_again_after_an_error(run):
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock():
        pass


def test_a_run_can_be_discarded_while_it_is_locked(run):
    run.write(record())
    with run.lock():
        run.discard()
    assert not run.path.exists()


def test_an_error_of_the_run_is_not_taken_for_one_of_the_lock(run):
    with pytest.raises(FileNotFoundError), run.lock():
        raise FileNotFoundError("data")


def test_a_lock_that_cannot_be_made_is_a_record_error(tmp_path):
    (tmp_path / "runs").write_text("in the way")
    lock = RunDirectory.of(tmp_path / "runs", "digits", "obs", "0" * 64).lock()
    with pytest.raises(RecordError, match="cannot lock"), lock:
        pass


def test_what_a_killed_process_was_writing_is_swept(run):
    run.path.mkdir(parents=True, exist_ok=True)
    ours, safetensors = run.path / ".record.json.12345678.tmp", run.path / ".tmpOeJnVn"
    for stray in (ours, safetensors):
        stray.write_bytes(b"half")
    with run.lock():
        assert not ours.exists() and not safetensors.exists()


def test_what_safetensors_was_writing_is_swept_from_checkpoints(run):
    stray = run.checkpoints.path / ".tmpAbCdEf"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half")
    run.checkpoints.save(1, {}, {})
    assert not stray.exists()


RECORDS = sorted((Path(__file__).parent / "data").glob("record-*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_of_every_schema_stay_readable(path):
    """`record-N.json` was written by `sparsekit run` when the schema was N; it is never written anew."""
    record = RunRecord.model_validate_json(checksums.unsealed(path.read_bytes()))
    assert record.schema_version == int(path.stem.removeprefix("record-"))
    assert [level.sparsity for level in record.levels] == [0.5, 0.9]
    assert (
        record.steps[-1].reconstruction.layers[0].error_after < record.steps[-1].reconstruction.layers[0].error_before
    )
    assert record.levels[-1].finetuned["accuracy"] > 0.9
    assert run_key(record.identity) == record.key


def test_the_present_schema_has_a_record():
    assert f"record-{SCHEMA_VERSION}" in [path.stem for path in RECORDS]
