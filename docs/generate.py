"""What the site takes from elsewhere in the repository: tables, drawings and whole pages.

MkDocs calls the functions `on_…` of this module. `<!-- generated: torch_optimizers -->` in a page
stands for what `GENERATED` makes of the tests' own data, so that no page says more than is tested.
The addresses of the repository, `REPOSITORY` in a page, and of the site are in pyproject.toml.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import site_tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from schedule_drawing import schedule_drawings

ROOT = Path(__file__).resolve().parents[1]
GENERATED: dict[str, Callable[[], str]] = {
    "torch_optimizers": site_tables.torch_optimizers,
    "other_optimizers": site_tables.other_optimizers,
    "refused_optimizers": site_tables.refused_optimizers,
    "keras_optimizers": site_tables.keras_optimizers,
    "torch_doors": site_tables.torch_doors,
    "torch_checkpoints": site_tables.torch_checkpoints,
    "keras_doors": site_tables.keras_doors,
    "command_help": site_tables.command_help,
    "cost": site_tables.cost,
    "examples": site_tables.examples,
    "schedules": schedule_drawings,
}
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the addresses from where they are written once."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    config.site_url, config.repo_url = urls["Documentation"], urls["Source"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the changelog and the reports of the benchmarks, where they are, as pages."""
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for path in sorted((ROOT / "benchmarks").rglob("*.*")):
        if path.suffix in (".md", ".png"):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is generated, and let links to other files lead to the repository."""
    markdown = _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)
    markdown = markdown.replace("git+REPOSITORY", f"git+{config.repo_url}")
    if page.file.src_uri == "changelog.md":
        folder = ROOT
    elif page.file.src_uri.startswith("benchmarks/"):
        folder = (ROOT / page.file.src_uri).parent
    else:
        folder = (ROOT / "docs" / page.file.src_uri).parent

    def lead(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return link[0]  # MkDocs says what is wrong with it
        inside = target.relative_to(ROOT)
        name = str(inside.relative_to("docs")) if inside.parts[0] == "docs" else str(inside)
        if files.get_file_from_path(name):
            up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)
            return f"{link[1]}{up}{name}{link[3]}"
        kind = "tree" if target.is_dir() else "blob"
        return f"{link[1]}{config.repo_url}/{kind}/main/{inside}{link[3]}"

    return _LINK.sub(lead, markdown)
