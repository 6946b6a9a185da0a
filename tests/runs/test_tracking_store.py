"""The place where MLflow keeps runs: its address, and how it is made ready."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from sparsekit.runs import tracking_store
from sparsekit.runs.addresses import TrackingError
from sparsekit.runs.tracking_store import default_uri, initialise, resolve_uri, ui_command

# --- addresses


def test_default_is_an_absolute_sqlite_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_uri(Path("runs")) == f"sqlite:///{tmp_path.resolve()}/runs/mlflow.db"


def test_an_explicit_address_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert resolve_uri("http://explicit", tmp_path) == "http://explicit"


def test_the_environment_comes_before_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert resolve_uri(None, tmp_path) == "http://environment"


def test_otherwise_the_default_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None, tmp_path) == default_uri(tmp_path)


def test_ui_command_names_the_store():
    assert ui_command("sqlite:////a/mlflow.db") == "mlflow ui --backend-store-uri sqlite:////a/mlflow.db"


def test_ui_command_is_quoted_for_the_shell():
    assert ui_command("sqlite:////it's/m.db").endswith("""'sqlite:////it'"'"'s/m.db'""")


def test_a_server_is_its_own_ui():
    assert ui_command("http://host:5000") == "http://host:5000"


# --- initialising


def test_the_database_lies_where_it_was_asked_for(output, uri):
    assert (output / "mlflow.db").is_file()


def test_artifacts_lie_beside_the_database(output, client, uri):
    assert client.get_experiment_by_name("sparsekit").artifact_location == (output / "mlartifacts").as_uri()


def test_initialising_again_changes_nothing(client, uri):
    before = client.get_experiment_by_name("sparsekit").experiment_id
    initialise(uri)
    assert client.get_experiment_by_name("sparsekit").experiment_id == before


def test_the_artifact_folder_can_be_chosen(client, uri, tmp_path):
    initialise(uri, "elsewhere", tmp_path / "kept")
    assert client.get_experiment_by_name("elsewhere").artifact_location == (tmp_path / "kept").as_uri()


def test_a_deleted_experiment_is_explained(client, uri):
    initialise(uri, "gone")
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(TrackingError, match="'gone' .* was deleted; restore it"):
        initialise(uri, "gone")


def test_no_server_is_said_at_once():
    with pytest.raises(TrackingError, match="no MLflow server answers at http://127.0.0.1:9 .*--no-tracking"):
        initialise("http://127.0.0.1:9")


def test_an_unknown_scheme_is_explained():
    with pytest.raises(TrackingError, match="cannot track runs at nowhere://x: .*nowhere"):
        initialise("nowhere://x")


def test_a_file_that_is_no_database_is_explained(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(TrackingError, match="file is not a database"):
        initialise(default_uri(tmp_path))


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrackingError, match="cannot track runs at .*file"):
        initialise(default_uri(tmp_path / "file"))


@pytest.mark.slow  # two interpreters import mlflow
def test_two_processes_may_initialise_at_once(tmp_path):
    script = "import sys; from sparsekit.runs.tracking_store import initialise; initialise(sys.argv[1])"
    command = [sys.executable, "-c", script, default_uri(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.mark.parametrize("uri", ["http://", "http://a b", "http://host:port", "http://[::1", "htp://localhost"])
def test_what_can_be_no_address_is_refused_before_any_work(uri, tmp_path):
    with pytest.raises(TrackingError, match=r"not valid|knows no addresses"):
        resolve_uri(uri, tmp_path)


def test_what_the_user_set_is_kept(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    tracking_store.mlflow_module()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


def test_telemetry_is_off(uri):
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_the_lock_lies_beside_the_database(uri):
    assert Path(unquote(uri.removeprefix("sqlite:///")) + ".lock").is_file()


def test_a_database_that_was_not_finished_is_in_nobodys_way(tmp_path, monkeypatch):
    uri = default_uri(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tracking_store.os, "replace", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            initialise(uri)
    (tmp_path / ".mlflow.db.0.new").write_bytes(b"half a database")
    assert not (tmp_path / "mlflow.db").exists()
    initialise(uri)
    assert (tmp_path / "mlflow.db").exists() and not list(tmp_path.glob(".mlflow.db.*new*"))


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:hunter2@host:5000/x", "http://***@host:5000/x"),
        ("https://host/x?token=hunter2", "https://host/x?***"),
        ("http://host/#access_token=hunter2", "http://host/?***"),
        ("http://u:p/hunter2@h:5000/x", "http://***@h:5000/x"),
        ("postgresql://u:pa#hunter2@h/db", "postgresql://***@h/db"),
        ("http://u:a@host/api", "http://***@host/api"),
        ("postgresql://me:hunter2@host/db", "postgresql://***@host/db"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
        ("runs", "runs"),
    ],
)
def test_what_is_secret_in_an_address_is_not_shown(uri, shown):
    assert tracking_store.addresses.redacted(uri) == shown
    assert "hunter2" not in tracking_store.ui_command(uri)


class Healthy(BaseHTTPRequestHandler):
    """Answers at /health alone."""

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 500)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_server_is_found_at_an_address_with_credentials():
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tracking_store._check_server(f"http://me:hunter2@127.0.0.1:{server.server_port}")
        server.shutdown()
