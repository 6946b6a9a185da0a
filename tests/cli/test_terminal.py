"""What standard output does not take costs no work: it is said in one line, and in the exit code."""

import io
import os
import subprocess
import sys

import pytest

RUN = ("run", "--estimator", "identity", "--no-tracking", "--set", "finetune.epochs=0")


class Broken(io.StringIO):
    """A pipe whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture
def replaced(cli, monkeypatch):
    """(name of a stream, what it is, arguments) -> (exit code, standard output, standard error)."""

    def call(name, stream, *args):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, stream)
            return cli(*args)

    return call


def written(encoding, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


@pytest.mark.parametrize("stream", [None, Broken()], ids=["closed", "broken"])
def test_a_run_whose_output_is_lost_is_done_and_says_where_it_is(replaced, tmp_path, stream):
    code, _, err = replaced("stdout", stream, *RUN)
    (record,) = (tmp_path / "runs").glob("*/record.json")
    assert code == 3
    assert err.startswith("sparsekit: standard output could not be written (")
    assert err.endswith(f"; what was done is in {record.parent}\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("stream", [None, Broken()], ids=["closed", "broken"])
def test_a_run_whose_messages_are_lost_is_done(replaced, stream):
    code, out, _ = replaced("stderr", stream, *RUN)
    assert code == 0
    assert "Record: " in out


@pytest.mark.parametrize(
    ("encoding", "errors"), [("ascii", "strict"), ("latin-1", "strict"), ("ascii", "surrogateescape")]
)
def test_what_the_terminal_cannot_encode_is_told_by_its_number(replaced, encoding, errors):
    stream = written(encoding, errors)
    code, _, err = replaced("stdout", stream, *RUN)
    assert (code, err) == (0, "")
    assert rb"\u0394" in stream.buffer.getvalue()


def test_a_refusal_is_no_lost_output(replaced):
    code, _, err = replaced("stdout", None, "run", "--estimator", "none")
    assert code == 2
    assert "no estimator 'none'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("where", [">&-", "| true"])
def test_a_shell_sees_one_line_and_the_exit_code(where):
    script = f"set -o pipefail; \"$0\" -c 'from sparsekit.cli import main; main()' plugins --json {where}"
    done = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True, env=os.environ, check=False)
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.count(b"\n") == 1
