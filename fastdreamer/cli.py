"""Command line: options from the configuration's dataclasses, errors in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import io
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from fastdreamer.config import PRESETS, SIZES, Config
from fastdreamer.errors import UsageError, UserError

T = TypeVar("T")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing to a full disk, over a quota or past the largest file fails with."""


def parse_config(args: Sequence[str]) -> Config:
    """Configuration from command line arguments (without the program's name).

    ``--preset``, ``--recipe`` and ``--size`` set the defaults of the other options.
    Exits with status 0 after ``--help``.

    Raises:
        UsageError: unknown option or value; the message names the nearest valid ones.
    """
    preset = _choice(args, "--preset", PRESETS, "atari100k")
    config = PRESETS[preset]
    recipe = _choice(args, "--recipe", SIZES, config.recipe)
    if recipe != config.recipe:
        if f"{preset}-{recipe}" not in PRESETS:
            raise UsageError(
                f"preset {preset} is of recipe {config.recipe}; of recipe {recipe} are "
                + ", ".join(name for name, p in PRESETS.items() if p.recipe == recipe)
            )
        config = PRESETS[f"{preset}-{recipe}"]
    size = _choice(args, "--size", SIZES[recipe], config.size)
    if any(arg.partition("=")[0] == "--size" for arg in args):  # else a preset's own model
        config = dataclasses.replace(config, size=size, model=SIZES[recipe][size])
    return parse(Config, args, "python -m fastdreamer.train", config)


def parse(kind: type[T], args: Sequence[str], prog: str, default: T | None = None) -> T:
    """Parse ``args`` into a dataclass, whose fields are the options.

    Raises:
        UsageError: as in :func:`parse_config`.
    """
    import tyro

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed, unknown = tyro.cli(
                kind,
                args=list(args),
                prog=prog,
                return_unknown_args=True,
                default=tyro.MISSING if default is None else default,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(stderr.getvalue())) from None
    if unknown:
        raise UsageError(_unknown_option(unknown[0], kind))
    return parsed


def run(program: Callable[[], Any]) -> NoReturn:
    """Run a command; a user's error becomes one line on stderr and exit status 2."""
    hook, threading.excepthook = threading.excepthook, _report_unless_full
    try:
        program()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        threading.excepthook = hook
    sys.exit(0)


def _report_unless_full(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread dies of a full disk; the next event that is written raises the same."""
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in FULL):
        threading.__excepthook__(args)


def _choice(args: Sequence[str], option: str, valid: Any, default: str) -> str:
    """The last value of ``option`` in ``args``, read before the options are known."""
    value = default
    for i, arg in enumerate(args):
        if arg == option and i + 1 < len(args):
            value = args[i + 1]
        elif arg.startswith(option + "="):
            value = arg.partition("=")[2]
    if value not in valid:
        raise UsageError(f"unknown {option} {value!r}: {_nearest(value, valid)}")
    return value


def _nearest(value: str, valid: Any) -> str:
    near = difflib.get_close_matches(value, list(valid), 1, 0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid are {', '.join(map(str, valid))}"


def _unknown_option(argument: str, kind: type) -> str:
    valid = list(_option_names(kind))
    name = argument.partition("=")[0]
    if not name.startswith("--"):
        return f"unexpected argument {argument!r}: options start with --, see --help"
    near = difflib.get_close_matches(name, valid, 3, 0.5)
    # A field may be asked for without its group.
    near += [v for v in valid if v.rpartition(".")[2] == name[2:] and v not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help for the valid ones"
    return f"unknown option {name}: {hint}"


def _option_names(kind: Any, prefix: str = "--") -> Iterator[str]:
    for f in dataclasses.fields(kind):
        name = prefix + f.name.replace("_", "-")
        factory: Any = f.default_factory
        if dataclasses.is_dataclass(factory):
            yield from _option_names(factory, name + ".")
        else:
            yield name


def _one_line(text: str) -> str:
    """The first paragraph of the parser's framed message, without its title."""
    lines = [line.strip("│╭╮╰╯ ─") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    body = []
    for line in [line for line in lines if not re.fullmatch(r"[\s+|-]*", line)][1:]:
        if line.startswith(("For full helptext", "Argument helptext")):
            break
        body.append(line.strip("| "))
    return " ".join(body) or "invalid arguments, see --help"
