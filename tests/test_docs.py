"""What the documents show works: code, commands and links."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsekit.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "plugins").glob("*/README.md")]
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    sparsekit ")]
RUNS = [command for command in COMMANDS if command.startswith("sparsekit run") and "-dir" not in command]


@pytest.mark.filterwarnings("ignore::sparsekit.errors.DegradedWarning")
def test_the_code_of_the_readme_runs():
    names = {}
    for snippet in CODE:
        exec(compile(snippet, "README.md", "exec"), names)
    assert abs(names["pruned"].sparsity - 0.9) < 1e-3
    assert names["removal"].delta.shape == names["weights"].shape


@pytest.mark.parametrize("command", RUNS)
def test_a_run_of_the_readme_is_accepted(command, tmp_path):
    arguments = [*shlex.split(command)[1:], "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments if "--dry-run" in arguments else [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document):
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []
