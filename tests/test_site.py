"""Nothing that a user can name is without an entry in the documentation."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(made):
    return made.pages()


def test_every_command_and_option_has_a_meaning(made):
    silent = [
        (name, parameter.opts)
        for name, command in made.commands()
        for parameter in command.params
        if not (command.help and getattr(parameter, "help", None))
    ]
    assert silent == []


def test_every_command_stands_on_its_page(made, pages):
    assert [name for name, _ in made.commands() if f"\n## {name}\n" not in pages["reference/commands.md"]] == []


def test_every_setting_has_a_meaning(made):
    classes = {
        **made.models(),
        **{f"{kind} {name}": item.Settings for kind, name, item in made.components() if kind != "preset"},
    }
    silent = [
        (where, name) for where, model in classes.items() for name, info in made.fields(model) if not info.description
    ]
    assert silent == []


def test_every_component_stands_on_its_page(made, pages):
    page = pages["reference/components.md"]
    assert [(kind, name) for kind, name, _ in made.components() if f"{{ #{kind}-{name} }}" not in page] == []


def test_every_estimator_saliency_pattern_and_schedule_stands_among_the_methods(made):
    text = "".join(path.read_text() for path in (DOCS / "methods").glob("*.md"))
    kinds = ("estimator", "saliency", "pattern", "schedule")
    assert [(kind, name) for kind, name, _ in made.components() if kind in kinds and f"`{name}`" not in text] == []


def test_every_hook_says_what_it_is_for(made, pages):
    assert len(made.hooks()) == 6
    assert all(meaning and f"\n## {name}\n" in pages["reference/hooks.md"] for name, meaning in made.hooks().items())


@pytest.mark.parametrize("door", ["sparsekit", "curvature", "linalg", "testing"])
def test_every_public_name_stands_on_its_page(made, pages, door):
    module = made.sparsekit if door == "sparsekit" else getattr(made.sparsekit, door)
    page = pages[f"reference/{door}.md"]
    assert [name for name in made.public_names(module) if f"\n::: {module.__name__}.{name}\n" not in page] == []
    classes_and_functions = (getattr(module, name) for name in made.public_names(module))
    documented = [one for one in classes_and_functions if inspect.isclass(one) or inspect.isroutine(one)]
    assert [one.__name__ for one in documented if not inspect.getdoc(one)] == []


def test_every_variable_of_the_environment_stands_on_its_page(pages):
    code = "".join(path.read_text() for path in (ROOT / "sparsekit").rglob("*.py"))
    for name in set(re.findall(r'"(SPARSEKIT_[A-Z]+)"', code)) - {"SPARSEKIT_INTERFACE"}:
        assert f"`{name}`" in pages["reference/commands.md"]


def test_every_page_is_in_the_navigation(pages):
    nav = str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    written = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "reports" not in path.parts]
    assert [page for page in [*written, *pages] if f"'{page}'" not in nav] == []


def test_what_pages_include_is_there():
    found = [
        (page, *one)
        for page in DOCS.rglob("*.md")
        for one in re.findall(r'--8.*<.*--.*"([^":\n]+)(:[^"\n]+)?"', page.read_text())
    ]
    assert len(found) >= 10
    for page, file, section in found:
        assert f'--8<-- "{file}{section}"' in page.read_text()  # as the site's generator reads it
        text = (ROOT / file).read_text()
        assert not section or section.count(":") == 2 or f"[start:{section[1:]}]" in text
