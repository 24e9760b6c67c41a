"""Print the oldest versions that pyproject.toml declares, as constraints for pip."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
# Keras has one floor, and the tests run on it.
declared = [*project["dependencies"]]
declared += [line for name, lines in extras.items() if name != "tensorflow" for line in lines]
for name, floor in re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)$", "\n".join(declared), re.M):
    print(f"{name}=={floor}")
