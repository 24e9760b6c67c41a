"""What the README, the pages of the site and the configs show is run."""

import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from partial_embedding import Schedule

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "diff", "yaml", "bash"}
# A block in a tab is indented. A comment before it ties it to the one before (`continues: 1`, to
# the first of the page), or says why it is not run.
_FENCE = re.compile(
    r"(?:^(?P<comment>[ ]*<!-- (?:continues(?:: 1)?|not run: [^\n]+) -->)\n+)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_TENSORFLOW = re.compile(
    r"^\s*(?:import|from) (?:keras|tensorflow|\S+\.(?:keras|tensorflow))\b", re.M
)


@dataclass(frozen=True)
class Snippet:
    """A fenced block: its language, its code, the line it starts on, and what comes before it."""

    language: str
    code: str
    line: int
    before: "Snippet | None" = None
    not_run: str = ""

    @property
    def for_tensorflow(self) -> bool:
        """Whether this or what it continues imports TensorFlow."""
        earlier = self.before is not None and self.before.for_tensorflow
        return earlier or bool(_TENSORFLOW.search(self.code))


def snippets_of(text: str) -> list[Snippet]:
    """The fenced blocks of a Markdown text; `<!-- continues -->` ties one to the one before."""
    found: list[Snippet] = []
    last: dict[str, Snippet] = {}
    for match in _FENCE.finditer(text):
        language, comment = match["language"], (match["comment"] or "").strip(" <>!-")
        code = re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        before = None
        if comment.startswith("continues"):
            assert language in last, f"nothing comes before the {language} block that continues"
            first = next(s for s in found if s.language == language)
            before = first if comment.endswith(": 1") else last[language]
        line = text.count("\n", 0, match.start("code")) + 1
        reason = comment.removeprefix("not run: ") if comment.startswith("not run") else ""
        last[language] = Snippet(language, code, line, before, reason)
        found.append(last[language])
    return found


def versions_of(snippet: Snippet) -> Iterator[Snippet]:
    """The Python of a block: one text, or what a diff leads from and to."""
    if snippet.language != "diff":
        yield snippet
        return
    for sign, other in ("-+", "+-"):
        lines = snippet.code.splitlines()
        # A line that is not of this version stays as an empty one, for the numbers of lines.
        kept = ["" if line.startswith(other) else line.removeprefix(sign) for line in lines]
        kept = [line.removeprefix(" ") if line == lines[i] else line for i, line in enumerate(kept)]
        yield replace(snippet, language="python", code="\n".join(kept) + "\n")


def execute(snippet: Snippet, name: str) -> dict[str, Any]:
    """Run a block of Python in the names of those it continues; a traceback shows its own line."""
    namespace = execute(snippet.before, name) if snippet.before else {"__name__": "page"}
    padded = "\n" * (snippet.line - 1) + snippet.code
    exec(compile(padded, name, "exec"), namespace)
    return namespace


SNIPPETS = {path: snippets_of(path.read_text(encoding="utf-8")) for path in PAGES}


def of(*languages: str) -> list[Any]:
    return [
        pytest.param(path, snippet, id=f"{path.name}_{snippet.line}")
        for path, snippets in SNIPPETS.items()
        for snippet in snippets
        if snippet.language in languages
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_block_of_a_page_is_overlooked(path: Path) -> None:
    fences = re.findall(r"^ *```", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(SNIPPETS[path])
    assert {snippet.language for snippet in SNIPPETS[path]} <= LANGUAGES, "it would not be run"


def test_what_is_not_run_says_why() -> None:
    reasons = {s.not_run for snippets in SNIPPETS.values() for s in snippets if s.not_run}
    assert reasons == {
        "TensorFlow Addons has ended, and does not install beside TensorFlow 2.21",
        "it is started by accelerate launch, on as many processes as there are devices",
    }


@pytest.mark.parametrize(("path", "snippet"), of("python", "diff"))
def test_python_in_a_page_runs(
    path: Path, snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if snippet.not_run:
        pytest.skip(snippet.not_run)
    framework = "tensorflow" if snippet.for_tensorflow else "torch"
    if find_spec(framework) is None:
        pytest.skip(f"this snippet runs in the {framework} environment")
    if snippet.for_tensorflow and "torch" in sys.modules:
        pytest.skip("torch and TensorFlow in one process can crash; runs where torch is not loaded")
    monkeypatch.chdir(tmp_path)
    for version in versions_of(snippet):
        execute(version, path.name)


@pytest.mark.parametrize(("path", "snippet"), of("yaml"))
def test_yaml_in_a_page_is_accepted(path: Path, snippet: Snippet, tmp_path: Path) -> None:
    written = tmp_path / "page.yaml"
    written.write_text(snippet.code, encoding="utf-8")
    assert_accepted(written)


def assert_accepted(path: Path) -> None:
    """A file is a schedule, or a configuration of the command line whose schedule is one."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if {"stages", "preset"} & content.keys():
        assert Schedule.parse(path).stages
        return
    assert Schedule.parse(content["rows"]["schedule"]).stages
    if find_spec("jsonargparse") is None or find_spec("pytorch_lightning") is None:
        pytest.skip("the command line is not installed: the text extra brings it")
    if content.get("recipe") == "language_model" and find_spec("transformers") is None:
        pytest.skip("this recipe needs the transformers extra")
    from partial_embedding.cli import main

    # The command ends after it has printed what it made of the file.
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(path), "--print_config"])
    assert ended.value.code in (None, 0)


# Each is run by a test of the command line; a file that is added here needs one. All schedules are
# run by one test, tests/lightning/test_configs.py.
CONFIGS = {"new_tokenizer.yaml", "new_tokens.yaml", "quickstart.yaml", "text_classification.yaml"}


def test_each_config_is_known_to_the_tests() -> None:
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} == CONFIGS
    others = {path.name for path in (ROOT / "configs").iterdir()} - CONFIGS
    assert others == {"schedules"}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_configs_are_accepted_and_come_back_as_they_were_written(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "configs" / name
    assert_accepted(path)
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert Schedule.parse(printed["rows"]["schedule"]) == Schedule.parse(
        written["rows"]["schedule"]
    )
    for part in ("trainer", "model", "data"):
        assert_within(written.get(part, {}), printed[part], part)


def assert_within(written: Any, printed: Any, where: str) -> None:
    """What was written is in what was printed, where classes have whole names, 1e-2 is a number."""
    if isinstance(written, dict):
        for key, value in written.items():
            assert_within(value, printed[key], f"{where}.{key}")
    elif isinstance(printed, float):
        assert float(written) == printed, where
    elif where.endswith("class_path"):
        assert printed.split(".")[-1] == written.split(".")[-1], where
    else:
        assert printed == written, where


@pytest.mark.parametrize(("path", "snippet"), of("bash"))
def test_commands_in_a_page_exist(path: Path, snippet: Snippet) -> None:
    commands = re.findall(r"^(\w[\w-]*) ([^\s]+)", snippet.code, re.MULTILINE)
    assert commands
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for program, argument in commands:
        if program == "make":
            assert re.search(rf"^{argument}:", makefile, re.MULTILINE), argument
        elif program == "partial-embedding":
            assert argument in {
                "fit", "validate", "test", "predict", "compare", "schedule", "report",
            }  # fmt: skip
        else:
            assert program in {"pip", "python", "git", "cd"}
    for config in re.findall(r"configs/[\w./-]+", snippet.code):
        assert (ROOT / config).is_file(), config


def commands_of(snippet: Snippet) -> list[list[str]]:
    lines = snippet.code.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("partial-embedding")]


@pytest.mark.parametrize(
    ("path", "snippet"), [block for block in of("bash") if commands_of(block.values[1])]
)
def test_options_of_a_page_are_taken(
    path: Path, snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("jsonargparse") is None or find_spec("pytorch_lightning") is None:
        pytest.skip("the command line is not installed: the text extra brings it")
    from partial_embedding.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tokens = "".join(f"word{i}\t{1000 - i}\t{int(i > 700)}\n" for i in range(800))
    (tmp_path / "vocabulary.tsv").write_text(f"token\tcount\tmissing\n{tokens}", encoding="utf-8")
    for command in commands_of(snippet):
        if command[0] == "schedule":
            assert main(command) == 0, command
        elif command[0] == "fit":
            # The command ends after it has printed what it made of its options.
            with pytest.raises(SystemExit) as ended:
                main([*command, "--print_config"])
            assert ended.value.code in (None, 0), command


WRITTEN = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_no_line_becomes_a_heading_by_its_number(path: Path) -> None:
    assert re.findall(r"^#\d.*", path.read_text(encoding="utf-8"), re.MULTILINE) == []


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_links_lead_to_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built so that a warning is an error."""
    if find_spec("torch") is None:
        pytest.skip("tables are made of data of torch's tests: built in the torch environment")
    mkdocs = pytest.importorskip("mkdocs.config")
    from mkdocs.commands.build import build

    folder = tmp_path_factory.mktemp("site")
    # In this process, which has imported what its tables are made of.
    build(mkdocs.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_the_site_has_each_page_and_nothing_is_left_to_generate(site: Path) -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"([\w/-]+)\.md$", config.partition("\nnav:\n")[2], re.MULTILINE)
    assert len(pages) > 20
    for page in pages:
        html = site / page.removesuffix("index") / "index.html"
        text = html.read_text(encoding="utf-8")
        assert "generated:" not in text, page
        # Nothing is loaded from elsewhere, nor is GitHub asked for stars, as the theme would.
        assert 'data-md-component="source"' not in text, page
        assert re.findall(r'(?:src|rel="stylesheet" href)="(https?:[^"]+)"', text) == [], page


def test_the_reference_has_all_public_names(site: Path) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (site / "api").rglob("index.html"))
    for module in ("", ".torch", ".tensorflow"):
        source = ROOT / "partial_embedding" / module.strip(".") / "__init__.py"
        names = re.findall(r'^    "(\w+)",$', source.read_text(encoding="utf-8"), re.MULTILINE)
        assert names
        for name in set(names) - {"__version__", "gradients"}:
            assert f'id="partial_embedding{module}.{name}"' in text, f"{module}.{name}"


# What a module shows, and the package that it needs.
SHOWN = {
    "partial_embedding": None,
    "partial_embedding.rows": None,
    "partial_embedding.schedule": None,
    "partial_embedding.torch": "torch",
    "partial_embedding.torch.row_files": "safetensors",
    "partial_embedding.callbacks.lightning": "pytorch_lightning",
    "partial_embedding.callbacks.transformers": "transformers",
    "partial_embedding.tensorflow": "tensorflow",
    "partial_embedding.tensorflow.gradients": "tensorflow",
    "partial_embedding.callbacks.keras": "tensorflow",
}


@pytest.mark.parametrize(("module", "needs"), SHOWN.items(), ids=SHOWN)
def test_what_is_shown_says_what_it_is_and_has_an_example(module: str, needs: str | None) -> None:
    if needs is not None and find_spec(needs) is None:
        pytest.skip(f"this module is read where {needs} is installed")
    if needs == "tensorflow" and "torch" in sys.modules:
        pytest.skip("torch and TensorFlow in one process can crash; runs where torch is not loaded")
    shown = importlib.import_module(module)
    names = getattr(shown, "__all__", None) or [
        name
        for name, value in vars(shown).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module
    ]
    values = [getattr(shown, name) for name in names]
    values = [value for value in values if inspect.isclass(value) or inspect.isfunction(value)]
    assert values
    for value in values:
        assert value.__doc__, value
        is_error = inspect.isclass(value) and issubclass(value, Exception)
        assert is_error or "Example:" in value.__doc__, value
        # What a class inherits from one of this package is public with it.
        bases = inspect.getmro(value) if inspect.isclass(value) else ()
        own = [base for base in bases if base.__module__.startswith("partial_embedding")]
        for name, method in [item for base in own for item in vars(base).items()]:
            described = isinstance(method, property | staticmethod | classmethod)
            if (described or inspect.isfunction(method)) and not name.startswith("_"):
                assert method.__doc__, f"{value.__name__}.{name}"


def test_no_page_says_anything_on_the_console_of_a_browser(
    site: Path, console: Callable[..., list[str]]
) -> None:
    pages = [str(path.relative_to(site)) for path in site.rglob("index.html")]
    assert len(pages) > 20
    assert console(site, *pages) == []


# The runner itself: it must not pass by running nothing.

SAMPLE = """
```python
x = 1
```

text

<!-- continues -->
```python
assert x == 1
y = x + 1
```

```yaml
stages: []
```

<!-- continues -->
```python
assert y == 2, "chained"
raise RuntimeError("reached")
```
"""


def test_the_runner_chains_blocks_and_fails_where_they_fail() -> None:
    first, second, third, fourth = snippets_of(SAMPLE)
    assert [s.language for s in (first, second, third, fourth)] == ["python"] * 2 + [
        "yaml",
        "python",
    ]
    assert execute(second, "sample")["y"] == 2
    with pytest.raises(NameError):
        execute(Snippet("python", second.code, second.line), "sample")
    with pytest.raises(RuntimeError, match="reached") as failed:
        execute(fourth, "sample.md")
    last = failed.traceback[-1]
    assert Path(last.path).name == "sample.md"
    assert SAMPLE.splitlines()[last.lineno] == 'raise RuntimeError("reached")'


def test_the_runner_reads_blocks_in_tabs_and_both_sides_of_a_diff() -> None:
    text = """
=== "Tab"

    ```python
    if True:
        x = 1
    ```

```diff
 x = 1
-y = x + 1
+y = x + 2
 assert y == 2
```

<!-- not run: it has no package -->
```python
import missing
```
"""
    tab, diff, missing = snippets_of(text)
    assert execute(tab, "sample")["x"] == 1
    before, after = versions_of(diff)
    assert execute(before, "sample")["y"] == 2
    with pytest.raises(AssertionError):
        execute(after, "sample")
    assert (tab.not_run, missing.not_run) == ("", "it has no package")


def test_the_runner_knows_which_blocks_are_for_tensorflow() -> None:
    for line in ("import keras", "from keras import layers", "import tensorflow as tf"):
        assert _TENSORFLOW.search(line)
    assert _TENSORFLOW.search("x = 1\nfrom partial_embedding.tensorflow import PartialEmbedding")
    assert _TENSORFLOW.search("from partial_embedding.callbacks.keras import RowUnfreezing")
    assert not _TENSORFLOW.search("from partial_embedding.torch import rowwise")
