"""The command `partial-embedding`: it runs recipes from YAML files, and shows what they do."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec

from partial_embedding.errors import FrozenRowsMoved, InputError, did_you_mean
from partial_embedding.files import shown
from partial_embedding.rows.token_text import printable

_HELP = """\
usage: partial-embedding COMMAND [options]

  fit        train from a configuration: --config configs/quickstart.yaml
  validate   measure a checkpoint on the validation side
  test       measure it on other texts: --ckpt_path best --data.test_path FILE
  predict    write what it says of texts: --ckpt_path best --data.test_path FILE
  compare    train frozen, missing, all rows and by schedule, and say which was best
  schedule   show which rows a schedule trains when, before any training
  report     make one page of what a run did to its rows

partial-embedding COMMAND --help lists the options of one."""
_RUNS = ("fit", "validate", "test", "predict")
_OTHERS = ("compare", "schedule", "report")
# What an optional package comes with.
_EXTRAS = {
    "torch": "lightning,text",
    "pytorch_lightning": "lightning,text",
    "lightning_fabric": "lightning,text",
    "tensorflow": "tensorflow",
    "keras": "tensorflow",
    "gensim": "vectors",
    "transformers": "transformers",
    "safetensors": "transformers",
    "jsonargparse": "lightning,text",
    "torchmetrics": "lightning,text",
    "tensorboard": "text",
    "rich": "lightning,text",
}
# What the system says with more regard to itself than to the reader.
_WRONG_KIND = {
    errno.EISDIR: "a folder where a file is meant",
    errno.EEXIST: "a file where a folder is meant",
    errno.ENOTDIR: "a file where a folder is meant",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: The arguments, by default those of the process.

    Returns:
        0, 1 when frozen rows moved, 2 when the input is refused, or 130 when it was interrupted;
        each of these prints one line.
    """
    args = sys.argv[1:] if args is None else list(args)
    try:
        if args in (["-h"], ["--help"]):
            print(_HELP)
        else:
            _command(args)(args[1:])
    except FrozenRowsMoved as error:
        return _complain(error, 1)
    except InputError as error:
        return _complain(error, 2)
    except OSError as error:
        return _complain(_refused_path(error), 2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        extra = f"partial-embedding[{_EXTRAS[package]}]"
        return _complain(f"{args[0]} needs {package}. Received none. Install {extra}.", 2)
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "interrupted", 130)
    return 0


def _complain(error: Exception | str, code: int) -> int:
    # What files hold is quoted in it, and may hold what a terminal obeys.
    print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return code


def _refused_path(error: OSError) -> str:
    if error.errno is None:
        return str(error)  # of a package that cannot reach a model or a file, in its own words
    reason = _WRONG_KIND.get(error.errno) or error.strerror or str(error)
    place = "" if error.filename is None else f" for {shown(error.filename)}"
    return (
        f"files and folders can be read and written. Received: {reason}{place}. Check the path, "
        "its permissions and the room on the disk."
    )


def _command(args: Sequence[str]) -> Callable[[Sequence[str]], object]:
    given = args[0] if args else ""
    # What a command needs is imported with it: each runs where its own packages are installed.
    if given in _RUNS:
        if find_spec("pytorch_lightning") is None and find_spec("keras") is not None:
            from partial_embedding.recipes.keras_commands import fit_command, measure_command

            return fit_command if given == "fit" else partial(measure_command, given)
        from partial_embedding.recipes.lightning_cli import run_lightning

        return partial(run_lightning, given)
    if given in _OTHERS:
        module = import_module(f"partial_embedding.recipes.{given}_command")
        command: Callable[[Sequence[str]], object] = getattr(module, f"{given}_command")
        return command
    known = [*_RUNS, *_OTHERS]
    raise InputError(
        f"a command is one of {', '.join(known)}. Received: {given or 'none'}."
        f"{did_you_mean(given, known)} See partial-embedding --help."
    )


if __name__ == "__main__":
    sys.exit(main())
