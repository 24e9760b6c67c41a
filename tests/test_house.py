"""The house: what an import loads, what is packaged, and the habits that no linter knows."""

import ast
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import partial_embedding

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = frozenset({"torch", "tensorflow", "keras", "jax", "pytorch_lightning", "lightning"})
# The link to `callbacks/` is left out: its files are listed under their own folder.
SOURCES = sorted(
    path
    for folder in ("partial_embedding", "callbacks")
    for path in (ROOT / folder).rglob("*.py")
    if (ROOT / "partial_embedding" / "callbacks") not in path.parents
)


def python(*arguments: str, cwd: Path | None = None) -> str:
    """What a fresh Python process prints."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def frameworks_after(module: str, folder: Path) -> set[str]:
    """The frameworks that a fresh process has loaded after an import."""
    probe = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(python("-c", probe, cwd=folder))
    assert module in loaded
    return {name.partition(".")[0] for name in loaded} & {*FRAMEWORKS, "gensim"}


# The page that is read before the code


def test_the_map_names_each_file_of_both_halves() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2:4] for line in page.partition("## Where what is")[2].splitlines()]
    for half, column in (("torch", 0), ("tensorflow", 1)):
        told = re.findall(r"`(\w+\.py)`", " ".join(row[column] for row in rows if len(row) == 2))
        there = {path.name for path in (ROOT / "partial_embedding" / half).glob("[!_]*.py")}
        assert set(told) == there, half


def test_the_page_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    for told in re.findall(r"`([\w/]+\.py)`", page):
        assert any(name == told or name.endswith(f"/{told}") for name in names), told


# Imports


# What a fresh process has then loaded, of frameworks and of what takes as long.
LOADED = {
    "partial_embedding": set(),
    "partial_embedding.recipes.text": set(),
    # These show, too, that the probe sees what there is.
    "partial_embedding.recipes.prepare_texts": {"gensim"},
    "partial_embedding.recipes.vectors": {"gensim"},
    "partial_embedding.torch": {"torch"},
    "partial_embedding.callbacks.lightning": {"torch", "pytorch_lightning"},
}


@pytest.mark.parametrize("module", LOADED)
def test_an_import_loads_no_framework_but_its_own(module: str, tmp_path: Path) -> None:
    for package in LOADED[module]:
        pytest.importorskip(package)
    # Either package of Lightning may bring the other.
    assert frameworks_after(module, tmp_path) - {"lightning"} == LOADED[module]


# From the ground up: a room imports rooms below its own floor, and no others.
FLOORS = (
    {"errors", "version"},
    {"files"},
    {"rows"},
    {"schedule"},
    {"monitor"},
    {"torch", "tensorflow"},
    {"callbacks"},
    {"recipes"},
    {"cli"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PURE = ("errors", "version", "files", "rows", "schedule", "monitor")
FRAMEWORKS_OF = {"torch": {"torch"}, "tensorflow": {"tensorflow", "keras"}}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("partial_embedding", *parts) if parts[0] == "callbacks" else parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imported_names(path: Path) -> set[str]:
    """All that a file imports, also inside functions, and for types alone."""
    tree: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room_of(module) for module in MODULES} - {""}
    assert rooms == set(FLOOR_OF)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_lead_downstairs(path: Path) -> None:
    own = room_of(module_of(path))
    if not own:
        return  # the package itself, which shows what lies below
    used = {room_of(name) for name in imported_names(path) if name in MODULES} - {own, ""}
    assert {room for room in used if FLOOR_OF[room] >= FLOOR_OF[own]} == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_framework_appears_only_in_its_own_half(path: Path) -> None:
    own = room_of(module_of(path))
    if own in FRAMEWORKS_OF:
        closed = FRAMEWORKS - FRAMEWORKS_OF[own]
    elif own in PURE or not own:
        closed = FRAMEWORKS
    else:  # callbacks and recipes are for one half or the other
        closed = FRAMEWORKS_OF["torch" if "keras" in path.name else "tensorflow"]
    names = imported_names(path)
    assert not {name for name in names if name.partition(".")[0] in closed}
    if own not in PURE and own not in FRAMEWORKS_OF:
        other = "torch" if "keras" in path.name else "tensorflow"
        assert other not in {room_of(name) for name in names if name in MODULES}


def test_no_module_is_reached_from_itself() -> None:
    graph = {
        module: {name for name in imported_names(path) if name in MODULES}
        # A package stands for what it shows, and its own modules import each other directly.
        - {module.rpartition(".")[0]}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    graph = {module: used & graph.keys() for module, used in graph.items()}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({**graph, "a": {"b"}, "b": {"a"}}).prepare()
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "package", [module for module, path in MODULES.items() if path.name == "__init__.py"]
)
def test_no_module_has_the_name_of_what_its_package_shows(package: str) -> None:
    shown = {
        alias.asname or alias.name
        for node in ast.parse(MODULES[package].read_text(encoding="utf-8")).body
        # `from package import module` shows the module itself.
        if isinstance(node, ast.ImportFrom) and node.module != package
        for alias in node.names
    }
    assert {name for name in shown if f"{package}.{name}" in MODULES} == set()


# Packaging


def test_the_installed_version_is_the_packages() -> None:
    assert metadata.version("partial-embedding") == partial_embedding.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", partial_embedding.__version__)


def declared_packages() -> set[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(settings["tool"]["setuptools"]["packages"])


def packages_that_exist() -> set[str]:
    folders = {path.parent.relative_to(ROOT) for path in SOURCES if path.name == "__init__.py"}
    return {
        "partial_embedding.callbacks" if str(folder) == "callbacks" else ".".join(folder.parts)
        for folder in folders
    }


def test_the_packages_that_are_declared_are_those_that_exist() -> None:
    assert declared_packages() == packages_that_exist()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """The names of the files in the sdist, and in the wheel that is built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    # A copy, since a build leaves its traces beside the sources.
    source.mkdir()
    for name in tracked_files():
        target = source / name.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, target, follow_symlinks=False)
    # Without isolation nothing is downloaded, where setuptools is new enough.
    major = int(metadata.version("setuptools").partition(".")[0])
    isolation = ["--no-isolation"] if major >= 77 else []
    python("-m", "build", *isolation, "--outdir", str(folder), str(source), cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    stem = f"partial_embedding-{partial_embedding.__version__}"
    assert sdist.name == f"{stem}.tar.gz"
    assert wheel.name == f"{stem}-py3-none-any.whl"
    pytest.importorskip("twine")
    # What an index would show: metadata, and the README as the long description.
    assert "WARNING" not in python("-m", "twine", "check", "--strict", str(sdist), str(wheel))
    with tarfile.open(sdist) as archive:
        in_sdist = {member.partition("/")[2] for member in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    return in_sdist, in_wheel


def installed_name(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    return f"partial_embedding/{name}" if name.startswith("callbacks/") else name


def test_the_wheel_holds_the_package_whole_and_nothing_else(
    distributions: tuple[set[str], set[str]],
) -> None:
    _, wheel = distributions
    info = f"partial_embedding-{partial_embedding.__version__}.dist-info"
    assert {name.partition("/")[0] for name in wheel} == {"partial_embedding", info}
    assert "partial_embedding/callbacks/lightning.py" in wheel
    modules = {installed_name(path) for path in SOURCES}
    modules |= {"partial_embedding/py.typed", "partial_embedding/monitor/page.html.j2"}
    assert {name for name in wheel if not name.startswith(info)} == modules
    assert any("LICENSE" in name for name in wheel)


def test_the_sdist_holds_what_a_build_needs_and_no_part_of_the_tests(
    distributions: tuple[set[str], set[str]],
) -> None:
    sdist, _ = distributions
    sources = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    needed = {"pyproject.toml", "README.md", "LICENSE", "partial_embedding/py.typed"} | sources
    assert needed - sdist == set()
    # setuptools would add tests/test_*.py and leave out all that they import.
    assert not {name for name in sdist if name.startswith("tests")}


# Habits


def written(node: ast.expr) -> str:
    """A text of the sources, with an ellipsis for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    return "".join(map(written, node.values)) if isinstance(node, ast.JoinedStr) else "…"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_error_that_says_what_was_received_says_what_to_do(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    said = [written(n.args[0]) for n in calls if getattr(n.func, "id", "") == "InputError"]
    received = [text.rpartition("Received") for text in said if "Received" in text]
    # A sentence follows, or what was put together elsewhere.
    lacking = [text for *_, text in received if not re.search(r"[.?](…| \S)|: …$", text)]
    assert lacking == []


MAKES_TENSORS = {
    "arange",
    "empty",
    "full",
    "ones",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "partial_embedding" / "torch").glob("*.py")), ids=lambda path: path.name
)
def test_a_tensor_is_made_where_it_is_needed(path: Path) -> None:
    """Else it would lie on the default device, which is the user's to choose."""
    made = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in MAKES_TENSORS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
    )
    assert [n.lineno for n in made if "device" not in {k.arg for k in n.keywords}] == []


def test_no_file_needs_a_table_of_contents() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCES
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > 510} == {}


# What the field calls otherwise, and what names in the code are made of instead.
OTHER_WORDS = {
    "pace": "lr_scale and warmup_steps",
    "paces": "lr_scale and warmup_steps",
    "awake": "trainable",
    "wake": "unfreeze",
    "woke": "unfrozen",
    "live": "trainable",
    "anatomy": "state layout",
    "examine": "inspect",
    "trial": "dry run",
    "lend": "gather",
    "surgery": "replace",
    "listening": "measure",
    "agreement": "rank consistency",
    "touched": "sparse update",
    "moment": "stage state",
    "turn": "cycle",
}


def names_in(path: Path) -> set[str]:
    """All names that a file makes: of classes, functions, arguments, variables and attributes."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.arg(arg=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def words_of(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_made_of_the_fields_words(path: Path) -> None:
    assert words_of("_lendState") == {"lend", "state"}
    found = {name for name in names_in(path) | {path.stem} if words_of(name) & OTHER_WORDS.keys()}
    assert found == set(), [OTHER_WORDS[w] for n in found for w in words_of(n) if w in OTHER_WORDS]


# Words that could mean several things: what each means here, and the rooms and files with names of
# it. A file by itself comes before its room.
MEANINGS: dict[str, dict[str, str]] = {
    "watch": {"keep what frozen rows hold, for an audit": "schedule/adapter torch tensorflow"},
    "report": {"the page of runs": "recipes/report_command"},
    "slot": {
        "a row's place in the tensor of the rows that train, or may": "torch tensorflow "
        "callbacks/keras_monitor"
    },
    "group": {
        "a parameter group of an optimizer": "torch callbacks/lightning_monitor",
        "a process group": "torch/ddp torch/shards torch/split torch/trainable_rows torch/whole",
    },
}


@pytest.mark.parametrize("word", MEANINGS)
def test_a_word_of_several_meanings_stands_where_one_of_them_is_said_to(word: str) -> None:
    places = [place for one in MEANINGS[word].values() for place in one.split()]
    found = [
        path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("partial_embedding/")
        for path in SOURCES
        for words in [set().union(*map(words_of, names_in(path) | {path.stem}))]
        if any(one.startswith(word) for one in words)
    ]

    def lies_in(file: str, place: str) -> bool:
        return f"{file}/".startswith(f"{place}/")

    assert [f for f in found if not any(lies_in(f, place) for place in places)] == []
    assert [place for place in places if not any(lies_in(f, place) for f in found)] == []


def tracked_files() -> list[Path]:
    """The files of the repository, or of a copy of it without git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        folders = ("partial_embedding", "callbacks", "tests", "configs", "benchmarks", "docs")
        paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
        paths += [*ROOT.glob("*.*"), ROOT / "LICENSE", ROOT / "Makefile"]
    found = [path for path in paths if path.is_file() and "__pycache__" not in path.parts]
    links = [path for path in paths if path.is_symlink() and path not in found]
    return sorted({*found, *links})


MACHINE_PATH = re.compile(r"(?<![\w.~>)}])/(?:home|root|Users|work|tmp|mnt|workspace)/[\w.]")


def test_a_machine_path_is_recognised() -> None:
    # Put together here, so that this file holds none.
    for folder in ("home", "tmp"):
        assert MACHINE_PATH.search(f"see '{'/' + folder}/me/data.csv'")
        own = f"runs/{folder}/out, ../{folder}/x and https://a.org/{folder}/page"
        assert not MACHINE_PATH.search(own)


def test_no_text_file_names_a_path_of_one_machine() -> None:
    found = []
    paths = tracked_files()
    assert ROOT / "pyproject.toml" in paths
    for path in paths:
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture
        name = path.relative_to(ROOT)
        found += [f"{name}:{i}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert found == []
