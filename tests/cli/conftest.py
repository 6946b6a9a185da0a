import sys

import pytest

from sparsekit.cli import main


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """sparsekit ARGS -> (exit code, standard output, standard error); output goes under tmp_path."""

    def call(*args, output=True):
        extra = ["--output", str(tmp_path / "runs")] if output else []
        monkeypatch.setattr(sys, "argv", ["sparsekit", *args, *extra])
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code or 0, captured.out, captured.err

    return call
