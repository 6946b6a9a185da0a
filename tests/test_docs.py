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
    made = "reference/"  # pages that are made with the site, which looks after links to them
    assert [link for link in links if made not in link and not (document.parent / link).exists()] == []


def rooms():
    """Room -> names that the table in docs/architecture.md gives for its modules, {} for single files."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        room, modules, _ = line.strip("|").split("|")
        for name in re.findall(r"`([\w./]+)`", room):
            yield name, re.findall(r"`(\w+/?)`", modules)


def test_every_room_and_module_of_the_architecture_exists():
    package = ROOT / "sparsekit"
    missing = [
        f"{room}{module}"
        for room, modules in rooms()
        for module in [*modules, ""]
        if not any((package / f"{room}{module}{end}").exists() for end in ("", ".py"))
    ]
    assert missing == []


def test_every_module_stands_in_the_architecture():
    package, named = ROOT / "sparsekit", {room.rstrip("/"): modules for room, modules in rooms()}
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py", "_moved.py"}
    assert set(named) == folders | files
    whole = {"curvature", "pruning", "reconstruction", "compare", "registry", "report", "cli"}  # listed one by one
    for room in whole:
        assert {path.stem for path in (package / room).glob("*.py")} - {"__init__"} == set(named[room]), room
