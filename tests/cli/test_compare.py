"""sparsekit compare and track: a file in, a report out, and refusals before any work."""

import json

import pytest

FILE = """
name: c
run: {task: digits, schedule: one-shot, sparsity: [0.5, 0.9], finetune: {epochs: 0}, estimator: {examples: 64}}
methods:
  obs: {estimator: obs}
  magnitude: {estimator: identity, saliency: magnitude, compensation: none}
seeds: [0]
"""


@pytest.fixture
def compare(cli, tmp_path):
    (tmp_path / "c.yaml").write_text(FILE)

    def call(*more, text=None):
        if text is not None:
            (tmp_path / "c.yaml").write_text(text)
        return cli("compare", str(tmp_path / "c.yaml"), "--workers", "1", *more)

    return call


@pytest.fixture
def done(compare, tmp_path):
    code, out, err = compare("--no-tracking")
    assert code == 0, err
    return tmp_path / "runs" / "c", out


def test_a_file_becomes_a_report(done):
    folder, out = done
    assert "2 of 2 runs are finished." in out
    assert f"Report: {folder}/report/report.html" in out
    assert (folder / "report" / "report.html").exists()
    plan = json.loads((folder / "plan.json").read_text())
    assert [run["axes"]["method"] for run in plan["runs"]] == ["obs", "magnitude"]


def test_what_is_tracked_later_is_said(done, cli):
    folder, _ = done
    code, out, _ = cli("track", str(folder), output=False)
    assert code == 0
    assert out.startswith("2 runs were told, of 2 that are finished. MLflow: mlflow ui")


def test_a_dry_run_shows_the_plan_and_writes_nothing(compare, tmp_path):
    code, _, err = compare("--dry-run")
    assert code == 0
    assert "2 runs, on 1 worker(s): about" in " ".join(err.split())
    assert "2 sparsities are compared; at least five" in " ".join(err.split())
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_is_told_and_the_exit_code_too(compare):
    code, out, _ = compare(
        "--no-tracking", text=FILE.replace("estimator: obs", "estimator: {name: obs, damping: 1.0e-30}")
    )
    assert code == 1
    assert "1 of 2 runs are finished." in out
    assert "failed: obs, compensation joint, seed 0:" in out
    assert "--retry-failed does them again." in out


@pytest.mark.parametrize(
    ("more", "text", "sentence"),
    [
        (["--executor", "slurm"], None, "there is no executor 'slurm'; known: local, ray"),
        (["--set", "seeds"], None, "--set needs KEY=VALUE"),
        (["--set", "seed=1"], None, "there is no setting 'seed'; did you mean 'seeds'?"),
        ([], "name: c\n", "methods"),
        ([], FILE.replace("obs}", "obss}"), "obs: no estimator 'obss'; did you mean 'obs'?"),
        ([], FILE.replace("run: {", "run: 3\nran: {"), "there is no setting 'ran'; did you mean 'run'?"),
        ([], FILE.replace("examples: 64", "examples: 9999999"), "obs:"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(compare, more, text, sentence, tmp_path):
    code, _, err = compare(*more, text=text)
    assert code == 2
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_not_there_is_said(cli):
    code, _, err = cli("compare", "nowhere.yaml")
    assert code == 2
    assert "the configuration file 'nowhere.yaml' cannot be read" in err


NAMED = """
name: c
run: {task: digits, schedule: one-shot, sparsity: [0.5], finetune: {epochs: 0}, estimator: {examples: 64}}
axes: {"[/a]": {"[/b]": {split: tuning}, "[red]": {split: reporting}}}
methods: {"$x_{$ [/m]": {estimator: identity, saliency: magnitude, compensation: none}}
seeds: [0]
"""


def test_names_that_look_like_markup_or_a_formula_are_printed_and_drawn_as_they_stand(compare):
    code, out, err = compare("--no-tracking", text=NAMED)
    assert code == 0
    assert "2 of 2 runs are finished." in out
    assert all(name in err for name in ("[/a]", "[/b]", "[red]", "$x_{$ [/m]"))
