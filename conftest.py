"""What pytest leaves out where TensorFlow is not installed: the half that needs it.

`make test` runs that half in an environment of its own, by name.
"""

from importlib.util import find_spec

collect_ignore_glob = []
if find_spec("tensorflow") is None:
    collect_ignore_glob += ["partial_embedding/tensorflow/*", "tests/tensorflow/*"]
    collect_ignore_glob += ["*/callbacks/keras*.py", "*/recipes/keras_*.py"]
