"""Install a wheel as users do, with each extra in a fresh environment, and use what it brings.

python .ci/try_wheel.py dist/partial_embedding-0.1.0-py3-none-any.whl [lightning ...]
"""

import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

TRIED = {
    "": "from partial_embedding import Rows; assert Rows.parse([3]).resolve(5).tolist() == [3]",
    "torch": "import partial_embedding.torch",
    "lightning": "import partial_embedding.callbacks.lightning, partial_embedding.torch",
    "tensorflow": "import partial_embedding.callbacks.keras, partial_embedding.tensorflow",
    "vectors": "import gensim, partial_embedding.recipes.vectors",
    "lightning,text": "from partial_embedding.cli import main; main(['fit', '--help'])",
    "transformers": "import accelerate, partial_embedding.callbacks.transformers",
    "all": "import partial_embedding.callbacks.lightning, partial_embedding.callbacks.transformers",
}


def try_wheel(wheel: Path, extras: str) -> None:
    """Install and import in an environment of its own, from a folder without the sources."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        wanted = f"{wheel.resolve()}[{extras}]" if extras else str(wheel.resolve())
        subprocess.run([python, "-m", "pip", "install", "--quiet", wanted], check=True)
        # `main` ends the process after its help, well.
        tried = [python, "-I", "-c", TRIED[extras]]
        subprocess.run(tried, check=True, cwd=folder, stdout=sys.stderr)
        print(f"installed and used: {wheel.name}[{extras}]", flush=True)


if __name__ == "__main__":
    settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    declared = set(settings["project"]["optional-dependencies"])
    assert declared == {name for key in TRIED if key for name in key.split(",")}, "an extra is new"
    wheel, *chosen = sys.argv[1:]
    for extras in chosen or TRIED:
        try_wheel(Path(wheel), extras)
