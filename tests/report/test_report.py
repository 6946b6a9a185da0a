"""What is written: one page that stands alone, Markdown, and data."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from matplotlib.text import Text

from sparsekit import checksums
from sparsekit.compare.plan import RUNS
from sparsekit.errors import RecordError
from sparsekit.report import export, write_report
from sparsekit.report.drawing import literal

VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="session")
def folder(comparison, tmp_path_factory):
    return write_report(comparison, tmp_path_factory.mktemp("report")).parent


@pytest.fixture(scope="session")
def page(folder):
    return (folder / "report.html").read_text()


class Tree(HTMLParser):
    """Elements that are open, all attributes, and what is closed that was not open."""

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.ids, self.wrong = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *item) for item in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_all_files_are_there(folder):
    assert {path.name for path in folder.iterdir()} == {
        "report.html",
        "report.md",
        "results.csv",
        "costs.csv",
        "results.json",
    }


def test_the_page_loads_nothing(page):
    assert "<script" not in page and "@import" not in page and "url(http" not in page
    loads = [a for a in Tree(page).attributes if a[1] in ("src", "href", "xlink:href", "srcset", "data")]
    assert loads and all(value.startswith("#") for _, _, value in loads)


def test_the_page_is_well_formed(page):
    tree = Tree(page)
    assert tree.wrong == [] and tree.open == []


def test_ids_are_unique_and_links_arrive(page):
    tree = Tree(page)
    assert len(tree.ids) == len(set(tree.ids))
    targets = {value[1:] for _, name, value in tree.attributes if name == "href"}
    assert targets <= set(tree.ids)


def drawings(page):
    return {m[0]: ET.fromstring(m[1]) for m in re.findall(r'<figure id="([^"]*)">.*?(<svg.*?</svg>)', page, re.DOTALL)}


def test_every_figure_is_there(page):
    names = {f"task-0-{name}" for name in ("pruned", "pareto-pruned", "increase", "layers")}
    names |= {f"task-1-{name}" for name in ("pruned", "pareto-pruned", "finetuned", "pareto-finetuned", "increase")}
    assert set(drawings(page)) == names | {"task-1-layers", "task-1-refinement"}


def test_figures_are_told_to_who_cannot_see_them(page):
    space = "{http://www.w3.org/2000/svg}"
    for svg in drawings(page).values():
        assert svg.get("role") == "img"
        assert svg.find(f"{space}title").text and svg.find(f"{space}desc").text


def test_what_is_not_drawn_is_counted(page):
    assert "Left out, because one of the two is not positive or not defined: 45." in page


def test_failed_unfinished_and_degraded_runs_are_listed(page):
    section = page[page.index('<section id="mishaps"') :]
    assert "the run&#39;s memory ran out" in section
    assert "begun, levels reached: 50 %, 80 %; in no table" in section
    assert "exact compensation stopped after 100 products" in section


def test_runs_are_counted(page):
    assert "69 planned: 67 finished, 1 failed, 1 unfinished; 1 degraded" in page


def test_text_is_escaped(page):
    assert "fewer than three &lt;b&gt;" in page and "Traceback: &lt;here&gt;" in page


def test_a_point_that_lacks_seeds_says_so(page):
    assert page.count("2 of 3 seeds") > 1


def test_untuned_methods_are_marked(page):
    marked = re.findall(r"<th[^>]*>(\w+) <small>untuned</small>", page)
    assert "diagonal" in marked and "obs" not in marked


def test_small_tasks_are_called_small(page):
    assert "digits is a small task (10,500 prunable weights)" in page
    assert "cifar10 is a small task" not in page


def test_what_seeds_share_is_said(page):
    assert "bands show calibration noise only" in page


def test_shared_statistics_are_counted_and_told(page, folder):
    assert "These statistics were shared" in page
    found = [row for row in rows((folder / "costs.csv").read_text()) if row["method"] == "fishleg"]
    shared = [row for row in found if float(row["shared_seconds"])]
    assert shared and all(float(row["curvature_seconds"]) >= 40 for row in shared)


def test_the_command_and_the_file_are_there(page, comparison):
    assert f"sparsekit report {comparison}" in page
    assert "seeds: 3" in page


def test_the_csv_has_a_row_for_each_run_level_and_phase(folder):
    found = rows((folder / "results.csv").read_text())
    assert len(found) == (63 - 2) * 5 + 6 * 5 * 2
    assert {row["phase"] for row in found} == {"pruned", "finetuned"}


def test_the_csv_knows_nothing_of_time(folder):
    heads = (folder / "results.csv").read_text().splitlines()[0]
    assert not re.search("second|memory|mebibyte|when", heads)


def test_another_execution_gives_the_same_csv(comparison, folder, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(comparison, again)
    for path in (again / RUNS).glob("*/record.json"):
        record = json.loads(path.read_text())
        record |= {"started": "2027-01-01T00:00:00+00:00", "peak_memory_bytes": 1}
        record["seconds"] = {name: 2 * value for name, value in record["seconds"].items()}
        record.pop(checksums.KEY)
        path.write_text(json.dumps(record))
    second = write_report(again).parent
    assert (second / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()


def test_the_same_records_give_the_same_bytes(comparison, folder, tmp_path):
    again = write_report(comparison, tmp_path).parent
    for name in ("results.json", "costs.csv"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    command = re.compile(r"sparsekit report .*")
    for name in ("report.html", "report.md"):
        texts = [command.sub("", (place / name).read_text()) for place in (again, folder)]
        assert texts[0] == texts[1]


def test_the_json_is_strict_and_holds_the_figures(folder):
    def refuse(name):
        raise AssertionError(name)

    found = json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    (digits, cifar10) = found["tasks"]
    assert digits["metric"] == "accuracy"
    assert digits["points"][0]["levels"][0]["predicted_increase"]["mean"] is None  # magnitude predicts nothing
    assert cifar10["points"][0]["levels"][0]["finetuned"]["accuracy"]["n"] == 3


def test_markdown_has_the_tables(folder):
    text = (folder / "report.md").read_text()
    assert "### Top-1 accuracy in %, pruned" in text
    widths = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        widths[block[:40]] = counts
    assert widths and all(len(counts) == 1 for counts in widths.values())


def test_one_seed_shows_no_interval(desk, axes_of):
    desk.point(axes_of("magnitude"), 0.4)
    desk.point(axes_of("fishleg"), 0.9)
    text = (write_report(desk.done()).parent / "report.md").read_text()
    assert "+50.0 (n 1)" in text
    assert "95 % +" not in text and "+50.0 better" not in text


def test_a_comparison_without_accuracy(desk, axes_of, level_record, run_record):
    axes = axes_of("magnitude", task="autoencoder")
    for seed in range(3):
        level = level_record(0.9, 0.5, pruned={"loss": 200.0 + seed})
        desk.run(axes, seed, run_record(axes, seed, [level], dense={"loss": 58.6}))
    text = write_report(desk.done()).read_text()
    assert "Loss (mean per example, lower is better), pruned" in text and "58.6" in text
    assert "accuracy" not in text.lower().replace("results", "")


def test_a_network_that_broke_down_is_shown(desk, axes_of, level_record, run_record):
    axes = axes_of("fishleg")
    level = level_record(0.9, 0.1, pruned={"loss": math.nan, "accuracy": math.nan}, measured_increase=math.inf)
    desk.run(axes, 0, run_record(axes, 0, [level]))
    path = write_report(desk.done())
    assert "not finite" in path.read_text()


def test_a_comparison_in_which_nothing_finished(desk, axes_of):
    desk.run(axes_of("fishleg"), 0)
    assert "digits: no run has finished" in write_report(desk.done()).read_text()


def test_a_comparison_without_a_reference(desk, axes_of):
    desk.point(axes_of("fishleg"), 0.9, 0.8, 0.7)
    desk.plan = {"reference": None}
    assert "the comparison names no reference" in write_report(desk.done()).read_text()


@pytest.fixture
def named(desk, axes_of):
    """CHANGES of the axes -> the folder of a report on a comparison with them."""

    def write(**axes):
        desk.point(axes_of(**{"method": "magnitude", **axes}), 0.9, 0.8)
        return write_report(desk.done()).parent

    return write


@pytest.mark.parametrize("method", ["$x_{$", "$$", "\\$x_{$", "a$b", "_hidden", "[/b]", "{{ 1 / 0 }}", "{% endraw"])
def test_a_name_is_drawn_as_it_stands(named, method):
    assert "<svg" in (named(method=method) / "report.html").read_text()


def test_a_formula_in_a_layers_name_is_drawn_as_it_stands(desk, axes_of, level_record, run_record):
    level = level_record(0.9, 0.9, layer_sparsity={"$x_{$": 0.5})
    axes = axes_of("magnitude")
    desk.run(axes, 0, run_record(axes, 0, [level]))
    assert "Layer-wise" in (write_report(desk.done()).parent / "report.html").read_text()


def test_markdown_has_no_raw_html_of_a_name(named):
    text = (named(method="<script>x</script>") / "report.md").read_text()
    assert "<script>" not in text
    assert "&lt;script>" in text


def test_what_is_drawn_of_a_dollar_is_a_dollar():
    text = Text(0, 0, literal(r"\$a$"))
    assert text._preprocess_math(text.get_text()) == (r"\$a$", False)


def test_a_directory_that_is_no_comparison(tmp_path):
    with pytest.raises(RecordError, match="there is no comparison in"):
        write_report(tmp_path)


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

MEASURE = """<script>
const size = s => { const r = s.getBoundingClientRect(); return [s.closest('figure').id, r.width, r.height]; };
document.body.dataset.sizes = JSON.stringify([...document.querySelectorAll('figure svg')].map(size));
document.body.dataset.wide = document.documentElement.scrollWidth;
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_every_figure_and_complains_of_nothing(page, tmp_path, width):
    copy = tmp_path / "report.html"
    copy.write_text(page.replace("</body>", MEASURE))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--window-size={width},2000", f"--user-data-dir={tmp_path / 'profile'}", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    values = {name: value for tag, name, value in Tree(done.stdout).attributes if tag == "body"}
    sizes = json.loads(values["data-sizes"])
    assert {name for name, _, _ in sizes} == set(drawings(page))
    assert all(wide > 300 and tall > 100 for _, wide, tall in sizes)
    assert int(values["data-wide"]) <= width  # what is wider than the page scrolls in its own box


def test_a_name_is_no_formula_in_a_spreadsheet():
    rows = [["=cmd()", "@x", "-1 pruned", -0.5, "plain"]]
    assert export._csv(["a"], rows).splitlines()[1] == "'=cmd(),'@x,'-1 pruned,-0.5,plain"
