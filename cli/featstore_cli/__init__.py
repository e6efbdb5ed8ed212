"""The command line: arguments, messages, progress. What it does is done elsewhere."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import click

from .display import say_error


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta["debug"] = value or context.meta.get("debug", False)  # one `meta` for the group and its commands


_DEBUG: dict[str, Any] = {"is_flag": True, "expose_value": False, "callback": _set_debug,
                          "help": "Show where an error came from."}


class Command(click.Command):
    """A command that takes --debug, as the group does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(click.Option(["--debug"], **_DEBUG))


class Commands(click.Group):
    """Turns what featstore refuses into one message and an exit status: 1 the data, 2 the command line is at fault."""

    command_class = Command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # whoever reads has seen enough: `featstore ls ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
            context.exit(0)
        except KeyboardInterrupt:
            say_error("stopped at once; what was committed before is kept")
            context.exit(130)
        except Exception as error:
            if context.meta.get("debug") or not _foreseen(error):
                raise
            say_error(_said(error))
            context.exit(_status(error))

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which they are used


def _foreseen(error: Exception) -> bool:
    from featstore.errors import FeatstoreError
    from featstore_extractors import RequestError

    return isinstance(error, FeatstoreError | RequestError | ImportError | OSError)


def _said(error: Exception) -> str:
    from featstore.errors import FeatstoreError

    if isinstance(error, OSError) and not isinstance(error, FeatstoreError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}"
    return str(error)


def _status(error: Exception) -> int:
    from featstore import errors
    from featstore_extractors import RequestError

    command_line = (errors.BadRequest, errors.IdentityMismatch, errors.NotAStore, errors.MissingFeature,
                    errors.MissingUtterance, errors.MissingWeights, errors.CannotLoad, RequestError, ImportError,
                    PermissionError)
    return 2 if isinstance(error, command_line) else 1


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", **_DEBUG)
@click.version_option(package_name="featstore")
def cli() -> None:
    """Extract features of speech and singing once into a keyed Zarr store that knows what made every number.

    \b
    Example: featstore extract wavs/ songs.zarr -f log-mel -f f0
    """


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.formatwarning = lambda message, *_: f"Note: {message}\n"
    cli(prog_name="featstore")


from . import store as _store  # noqa: E402  - its commands register themselves with `cli`
from . import upkeep as _upkeep  # noqa: E402
from . import weights as _weights  # noqa: E402
from . import zoo as _zoo  # noqa: E402

# isort: split
from . import evaluation as _evaluation  # noqa: E402  - after what it judges
from . import judge as _judge  # noqa: E402

__all__ = ["_evaluation", "_judge", "_store", "_upkeep", "_weights", "_zoo", "cli", "main"]
