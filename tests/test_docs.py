"""What the README and the configs show is run."""

import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from partial_embedding import Schedule

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
_FENCE = re.compile(
    r"(?P<continues><!-- continues -->\n+)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
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


def snippets_of(text: str) -> list[Snippet]:
    """The fenced blocks of a Markdown text; `<!-- continues -->` ties one to the one before."""
    found: list[Snippet] = []
    last: dict[str, Snippet] = {}
    for match in _FENCE.finditer(text):
        language, code = match["language"], match["code"]
        before = None
        if match["continues"]:
            assert language in last, f"nothing comes before the {language} block that continues"
            before = last[language]
        line = text.count("\n", 0, match.start("code")) + 1
        last[language] = Snippet(language, code, line, before)
        found.append(last[language])
    return found


def execute(snippet: Snippet, name: str) -> dict[str, Any]:
    """Run a block of Python in the names of those it continues; a traceback shows its own line."""
    namespace = execute(snippet.before, name) if snippet.before else {"__name__": "readme"}
    padded = "\n" * (snippet.line - 1) + snippet.code
    exec(compile(padded, name, "exec"), namespace)
    return namespace


SNIPPETS = snippets_of(README.read_text(encoding="utf-8")) if README.exists() else []


def of(language: str) -> list[Any]:
    chosen = [snippet for snippet in SNIPPETS if snippet.language == language]
    return [pytest.param(snippet, id=f"line_{snippet.line}") for snippet in chosen]


def test_the_readme_shows_python_yaml_and_commands() -> None:
    languages = {snippet.language for snippet in SNIPPETS}
    assert {"python", "yaml", "bash"} <= languages
    # Each fence is opened and closed, and none was overlooked.
    fences = README.read_text(encoding="utf-8").count("\n```")
    assert fences == 2 * len(SNIPPETS)
    assert languages <= {"python", "yaml", "bash"}, "a block of another language would not be run"


@pytest.mark.parametrize("snippet", of("python"))
def test_python_in_the_readme_runs(
    snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for_tensorflow = bool(_TENSORFLOW.search(snippet.code))
    framework = "tensorflow" if for_tensorflow else "torch"
    if find_spec(framework) is None:
        pytest.skip(f"this snippet runs in the {framework} environment")
    if for_tensorflow and "torch" in sys.modules:
        pytest.skip("torch and TensorFlow in one process can crash; runs where torch is not loaded")
    monkeypatch.chdir(tmp_path)
    execute(snippet, "README.md")


@pytest.mark.parametrize("snippet", of("yaml"))
def test_yaml_in_the_readme_is_accepted(snippet: Snippet, tmp_path: Path) -> None:
    path = tmp_path / "readme.yaml"
    path.write_text(snippet.code, encoding="utf-8")
    assert_accepted(path)


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
CONFIGS = {"new_tokens.yaml", "quickstart.yaml", "text_classification.yaml"}


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
        for key, value in written.get(part, {}).items():
            assert printed[part][key] == value, f"{part}.{key}"


def test_commands_in_the_readme_exist() -> None:
    bash = "\n".join(snippet.code for snippet in SNIPPETS if snippet.language == "bash")
    commands = re.findall(r"^(\w[\w-]*) ([\w-]+)", bash, re.MULTILINE)
    assert commands
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for program, argument in commands:
        if program == "make":
            assert re.search(rf"^{argument}:", makefile, re.MULTILINE), argument
        elif program == "partial-embedding":
            assert argument in {"fit", "validate", "test", "predict", "schedule", "report"}
        else:
            assert program in {"pip", "python", "git", "cd"}
    for config in re.findall(r"configs/[\w./-]+", bash):
        assert (ROOT / config).is_file(), config


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_to_files_that_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


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


def test_the_runner_knows_which_blocks_are_for_tensorflow() -> None:
    for line in ("import keras", "from keras import layers", "import tensorflow as tf"):
        assert _TENSORFLOW.search(line)
    assert _TENSORFLOW.search("x = 1\nfrom partial_embedding.tensorflow import PartialEmbedding")
    assert _TENSORFLOW.search("from partial_embedding.callbacks.keras import RowUnfreezing")
    assert not _TENSORFLOW.search("from partial_embedding.torch import rowwise")
