"""The command `partial-embedding`: it runs recipes from YAML files, and shows what they do."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning_fabric.utilities.exceptions import MisconfigurationException

from partial_embedding.errors import FrozenRowsMoved, InputError
from partial_embedding.recipes.report_command import report_command
from partial_embedding.recipes.schedule_command import schedule_command
from partial_embedding.recipes.text_cli import SUBCOMMANDS, TextCLI

# What needs no trainer.
_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "report": report_command,
    "schedule": schedule_command,
}
_HELP = """\
usage: partial-embedding COMMAND [options]

  fit        train from a configuration: --config configs/quickstart.yaml
  validate   measure a checkpoint on the validation side
  test       measure a checkpoint on other texts
  predict    write what a checkpoint says of texts
  schedule   show which rows a schedule trains when, before any training
  report     make one page of what a run did to its rows

partial-embedding COMMAND --help lists the options of one."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: The arguments, by default those of the process.

    Returns:
        0, 1 when frozen rows moved, or 2 when the input is refused; each of these prints one line.
    """
    _quieten()
    args = sys.argv[1:] if args is None else list(args)
    try:
        if args in (["-h"], ["--help"]):
            print(_HELP)
        elif args and (command := _COMMANDS.get(args[0])) is not None:
            command(args[1:])
        else:
            _check_command(args)
            _cli_of(_recipe(args))(args)
    except FrozenRowsMoved as error:
        return _complain(error, 1)
    except (InputError, OSError, ArgumentError, MisconfigurationException) as error:
        return _complain(error, 2)
    return 0


def _complain(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _check_command(args: Sequence[str]) -> None:
    known = [*SUBCOMMANDS, *_COMMANDS]
    # Options may come before the command.
    if not args or (args[0] not in known and not args[0].startswith("-")):
        given = repr(args[0]) if args else "none"
        raise InputError(
            f"a command is one of {', '.join(known)}. Received: {given}. See "
            "partial-embedding --help."
        )


def _recipe(args: Sequence[str]) -> str:
    """Which recipe is meant: that of the command line, or of its last configuration file."""
    recipe = TextCLI.recipe
    named = None
    for option, following in zip_longest(args, args[1:], fillvalue=""):
        name, equals, value = option.partition("=")
        value = value if equals else following
        if name == "--recipe":
            named = value
        elif name in ("--config", "-c") and value:
            content = _read_config(value)
            recipe = content.get("recipe", recipe) if isinstance(content, dict) else recipe
    return named or recipe


def _read_config(path: str) -> Any:
    """Refuse a configuration file by its name, which the parser's messages leave out."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: a configuration is YAML in UTF-8. Received: {error}.") from None
    except OSError as error:
        raise InputError(
            f"{path}: the configuration cannot be read: {error.strerror}. Check the path."
        ) from None


def _cli_of(recipe: str) -> type[TextCLI]:
    if recipe == TextCLI.recipe:
        return TextCLI
    if recipe == "language_model":
        if find_spec("transformers") is None:
            raise InputError(
                "the recipe language_model needs transformers. Received none. "
                "Install partial-embedding[transformers]."
            )
        # Text classification does without.
        from partial_embedding.recipes.language_model_cli import LanguageModelCLI

        return LanguageModelCLI
    raise InputError(f"a recipe is 'text' or 'language_model'. Received: {recipe!r}.")


def _quieten() -> None:
    """Leave out what tells a user of this command nothing."""
    # Advertisements of other packages, and the seed, which stands in the configuration.
    for logger in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed"):
        logging.getLogger(logger).addFilter(_tells_something)
    for message in (
        # Lightning's own use of what its dependencies deprecate.
        r"\s*``instantiate_classes`` was deprecated",
        r"\s*By default only one JsonargparseDeprecationWarning",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        # A resumed run goes on in its own folder.
        r"Checkpoint directory .* exists and is not empty",
        # `test` writes no checkpoints of its own.
        r"The dirpath has changed from",
    ):
        warnings.filterwarnings("ignore", message=message)


def _tells_something(record: logging.LogRecord) -> bool:
    return not re.match("💡|Seed set to", record.getMessage())


if __name__ == "__main__":
    sys.exit(main())
