"""MLflow shows what a run said, and its failures are not the run's."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from sparsekit.runs import tracking
from sparsekit.runs.tracking import NullTracker, Tracker
from sparsekit.runs.tracking_store import default_uri


@pytest.fixture
def tracker(uri):
    tracker = Tracker(uri)
    tracker.start("a run", {}, {})
    assert tracker.failure is None
    return tracker


@pytest.fixture
def seen(client, tracker):
    return lambda: client.get_run(tracker.run_id)


# --- what is passed on


def test_parameters_are_flat(uri, client):
    tracker = Tracker(uri)
    tracker.start("p", {"task": "digits", "fit": {"steps": 3, "levels": [0.5, 0.9]}, "none": None}, {})
    assert client.get_run(tracker.run_id).data.params == {
        "task": "digits",
        "fit.steps": "3",
        "fit.levels": "[0.5, 0.9]",
        "none": "null",
    }


def test_long_parameters_are_cut_visibly(uri, client):
    tracker = Tracker(uri)
    tracker.start("p", {"long": "x" * 7000}, {})
    value = client.get_run(tracker.run_id).data.params["long"]
    assert (len(value), value[-1]) == (6000, "…")


def test_more_parameters_than_one_request_takes_arrive(uri, client):
    tracker = Tracker(uri)
    tracker.start("p", {f"p{i}": i for i in range(250)}, {f"t{i}": "" for i in range(120)})
    assert len(client.get_run(tracker.run_id).data.params) == 250


def test_tags_and_name_arrive(uri, client):
    tracker = Tracker(uri)
    tracker.start("the name", {}, {"key": "abc"})
    run = client.get_run(tracker.run_id)
    assert (run.info.run_name, run.data.tags["key"]) == ("the name", "abc")


def test_metrics_arrive_with_their_steps(tracker, client):
    for step, value in enumerate([3.0, 2.0]):
        tracker.metrics({"loss": value}, step)
    history = client.get_metric_history(tracker.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 3.0), (1, 2.0)]


def test_more_metrics_than_one_request_takes_arrive(tracker, seen):
    tracker.metrics({f"m{i}": i for i in range(1100)})
    assert len(seen().data.metrics) == 1100


def test_final_metrics_are_prefixed(tracker, seen):
    tracker.final({"accuracy": 0.5})
    assert seen().data.metrics == {"final/accuracy": 0.5}


@pytest.mark.parametrize("text", ["inf", "-inf", "nan"])
def test_non_finite_metrics_are_tags(tracker, seen, text):
    tracker.metrics({"loss": float(text)})
    assert seen().data.tags["nonfinite.loss"] == text


def test_non_finite_metrics_are_not_numbers(tracker, seen):
    tracker.metrics({"loss": float("inf"), "other": 1.0})
    assert seen().data.metrics == {"other": 1.0}


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("layer1.0/conv: a-b_c", "layer1.0/conv: a-b_c"),
        ("increase(γ)%", "increase_____"[:12]),
        ("/a//b/../c/", "a/b/c"),
        ("..", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_become_what_mlflow_takes(tracker, seen, name, cleaned):
    tracker.metrics({name: 1.0})
    assert list(seen().data.metrics) == [cleaned]


def test_artifacts_are_stored(tracker, client, output, tmp_path):
    (tmp_path / "record.json").write_text("{}")
    tracker.artifact(tmp_path / "record.json")
    assert len(list((output / "mlartifacts" / tracker.run_id).rglob("record.json"))) == 1


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_end_is_told(tracker, seen, status):
    tracker.finish(status)
    assert seen().info.status == status


def test_an_interrupted_run_goes_on(tracker, uri, client):
    tracker.finish("KILLED")
    again = Tracker(uri)
    again.start("a run", {}, {}, run_id=tracker.run_id)
    assert (again.run_id, client.get_run(again.run_id).info.status) == (tracker.run_id, "RUNNING")


def test_a_run_that_goes_on_keeps_its_parameters(uri, client):
    first, again = Tracker(uri), Tracker(uri)
    first.start("a run", {"output": "here"}, {})
    again.start("a run", {"output": "moved"}, {}, run_id=first.run_id)
    assert (again.failure, client.get_run(first.run_id).data.params) == (None, {"output": "here"})


def test_a_run_that_is_gone_is_begun_anew(uri):
    tracker = Tracker(uri)
    tracker.start("a run", {}, {}, run_id="0" * 32)
    assert (tracker.failure, tracker.run_id == "0" * 32) == (None, False)


# --- failures


def test_a_start_that_fails_is_kept(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    tracker = Tracker(default_uri(tmp_path))
    tracker.start("a run", {}, {})
    assert "file is not a database" in tracker.failure


@pytest.fixture
def hanging():
    """The address of a server that takes connections and never answers but for its health."""

    class Hanging(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/health":
                released.wait(30)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *args):
            pass

    released = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hanging)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    released.set()
    server.shutdown()
    server.server_close()


def test_a_server_that_hangs_is_waited_for_once_and_not_long(hanging, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    tracker = Tracker(hanging)
    begun = time.monotonic()
    tracker.start("a run", {}, {})
    tracker.metrics({"loss": 1.0})
    tracker.artifact(tmp_path)
    tracker.finish()
    assert time.monotonic() - begun < 5
    assert tracker.failure == "tracking stopped while starting the run: MLflow has not answered for 0 s"


def _break(tracker, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(tracker, "_client", SimpleNamespace(log_batch=broken, set_terminated=broken))


def test_a_failure_on_the_way_is_kept(tracker, monkeypatch):
    _break(tracker, monkeypatch, ConnectionError("the server went away\nand more"))
    tracker.metrics({"loss": 1.0})
    assert tracker.failure == "tracking stopped while logging metrics: the server went away"


def test_the_first_failure_is_the_one_kept(tracker, monkeypatch):
    _break(tracker, monkeypatch, ConnectionError("first"))
    tracker.metrics({"loss": 1.0})
    _break(tracker, monkeypatch, ConnectionError("second"))
    tracker.finish()
    assert "first" in tracker.failure


def test_nothing_is_tracked_after_a_failure(tracker, seen, tmp_path):
    tracker.artifact(tmp_path / "missing")
    tracker.metrics({"loss": 1.0})
    assert seen().data.metrics == {}


def test_a_broken_database_is_a_failure_of_tracking_only(tmp_path, uri, output, caplog):
    # A copy, made by SQLite itself, of the database whose making takes seconds.
    with sqlite3.connect(output / "mlflow.db") as source, sqlite3.connect(tmp_path / "mlflow.db") as copy:
        source.backup(copy)
    source.close()
    copy.close()
    tracker = Tracker(default_uri(tmp_path))
    tracker.start("a run", {}, {})
    with sqlite3.connect(tmp_path / "mlflow.db") as broken:
        broken.execute("DROP TABLE metrics")
    broken.close()
    tracker.metrics({"loss": 1.0})
    assert tracker.failure == "tracking stopped while logging metrics: no such table: metrics"
    assert caplog.text == ""  # one sentence, not mlflow's page


def test_a_mistake_of_ours_is_not_hidden(tracker, monkeypatch):
    _break(tracker, monkeypatch, TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        tracker.metrics({"loss": 1.0})


def test_the_null_tracker_takes_all_that_the_tracker_takes(tmp_path):
    tracker = NullTracker()
    tracker.start("a run", {"a": 1}, {"b": "c"}, run_id=None)
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.final({"loss": 1.0})
    tracker.artifact(tmp_path)
    tracker.finish("FAILED")
    assert (tracker.run_id, tracker.failure) == (None, None)


# --- manners


def test_global_state_is_left_alone(tracker, uri):
    import mlflow

    assert (mlflow.get_tracking_uri() == uri, mlflow.active_run()) == (False, None)


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, sparsekit.runs.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow  # a second interpreter imports mlflow and makes a database
def test_tracking_a_first_run_says_nothing_and_sends_nothing(tmp_path):
    # With the environment as a user has it: what other tests have set would hide what this one is about.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    code = (
        "import os; from sparsekit.runs.tracking import Tracker; "
        f"t = Tracker({default_uri(tmp_path)!r}); t.start('r', {{}}, {{}}); t.finish(); "
        "assert t.failure is None; assert os.environ['MLFLOW_DISABLE_TELEMETRY'] == 'true'; "
        "from mlflow.telemetry import get_telemetry_client; assert get_telemetry_client() is None"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_password_is_in_no_message_of_a_server_that_is_not_there():
    tracker = Tracker("http://me:hunter2@127.0.0.1:9")
    tracker.start("a run", {}, {})
    assert "no MLflow server answers" in tracker.failure and "hunter2" not in tracker.failure
