import subprocess
import sys

from sparsekit.compare.plan import PLAN, Plan, write


def plan(directory):
    empty = {"warnings": [], "seeds_vary": [], "seeds_share": [], "multiply_adds": {}, "runs": []}
    write(Plan(name="nothing yet", file={}, reference=None, **empty), directory / PLAN)


def test_the_report_lies_in_the_comparisons_directory(cli, tmp_path):
    plan(tmp_path)
    code, out, _ = cli("report", str(tmp_path), output=False)
    assert code == 0
    assert out == f"Report: {tmp_path / 'report' / 'report.html'}\n"
    assert "nothing yet" in (tmp_path / "report" / "report.html").read_text()


def test_the_report_lies_where_it_is_told_to(cli, tmp_path):
    plan(tmp_path)
    cli("report", str(tmp_path), "--output", str(tmp_path / "elsewhere"), output=False)
    assert (tmp_path / "elsewhere" / "results.csv").is_file() and not (tmp_path / "report").exists()


def test_a_directory_that_is_no_comparison_is_one_sentence(cli, tmp_path):
    code, out, err = cli("report", str(tmp_path), output=False)
    assert (code, out) == (2, "")
    assert err == f"sparsekit: there is no comparison in '{tmp_path}' (no plan.json); give a directory of one\n"


def test_other_commands_start_without_drawing():
    code = "import sys, sparsekit.cli; sys.exit(any(m in sys.modules for m in ('matplotlib', 'jinja2', 'scipy.stats')))"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
