"""What is there for strangers: workflows, forms, citation, addresses and the changelog."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import partial_embedding

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
CHECKED = [
    ("vendor.github-workflows", WORKFLOWS),
    ("custom.github-workflows-require-timeout", WORKFLOWS),
    ("vendor.github-issue-forms", FORMS),
    ("vendor.dependabot", [GITHUB / "dependabot.yml"]),
    ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
]


def check(schema: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """Check files against a schema that comes with the checker; no network is asked."""
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    return subprocess.run([*command, *map(str, files)], capture_output=True, text=True)


@pytest.mark.parametrize(("schema", "files"), CHECKED, ids=[schema for schema, _ in CHECKED])
def test_files_for_github_follow_its_schemas(schema: str, files: list[Path]) -> None:
    assert files
    done = check(schema, *files)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_workflow_with_a_mistake_is_seen(tmp_path: Path) -> None:
    broken = WORKFLOWS[0].read_text(encoding="utf-8").replace("runs-on:", "runs_on:")
    (tmp_path / "broken.yml").write_text(broken, encoding="utf-8")
    assert check("vendor.github-workflows", tmp_path / "broken.yml").returncode == 1


def test_workflows_and_checks_run_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = [path.read_text(encoding="utf-8") for path in [*WORKFLOWS, ROOT / ".ci/run"]]
    lines = re.findall(r"(?:run: |^)make ([^\n]+)", "\n".join(scripts), re.MULTILINE)
    halves = ("lightning", "keras")
    targets = {
        word.replace("${{ matrix.half }}", half)
        for line in lines
        for half in halves
        for word in re.sub(r"[\w-]+=\S*", "", line).replace("${{ matrix.half }}", half).split()
    }
    assert {"lint", "types", "docs", "test", "test-floors", "test-wheel"} <= targets
    for target in targets:
        written = re.sub(r"^\.venv/(\w+)/", lambda m: f"$({m[1].upper()})/", target)
        assert re.search(rf"^{re.escape(written)}:", makefile, re.MULTILINE), target


def test_a_release_publishes_what_another_job_built_and_tried_and_holds_no_secret() -> None:
    text = (GITHUB / "workflows/release.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "permissions" not in jobs["build"]
    assert "make test-wheel" in text
    assert "secrets." not in text


# One address for the repository and one for the site, written once and in what people read first.


def test_the_address_of_the_project_is_written_where_it_must_be_and_nowhere_else() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    repository, site = urls["Source"], urls["Documentation"]
    owner, name = repository.split("/")[-2:]
    address = re.compile(rf"[\w-]+\.github\.io/|github\.com/[\w-]+/{name}\b")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the files of the repository are listed by git")
    found = {
        path: set(address.findall(text))
        for path in listed.stdout.splitlines()
        if (ROOT / path).suffix in {".md", ".toml", ".yml", ".cff", ".py", ".ipynb"}
        if address.search(text := (ROOT / path).read_text(encoding="utf-8"))
    }
    ours = {f"github.com/{owner}/{name}", site.removeprefix("https://").removesuffix(f"{name}/")}
    assert set().union(*found.values()) == ours
    assert set(found) == {"README.md", "pyproject.toml"}


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == partial_embedding.__version__


def test_the_files_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|docs|benchmarks|partial_embedding)/[\w./-]*)`", text))
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


# The changelog


def test_the_changelog_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    dated = re.compile(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d")
    assert all(dated.fullmatch(version) for version in versions[1:]), versions
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert kinds
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
