"""Environments of one's own by import path: `my.module:make_env`, found from where one stands."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import traceback
from types import ModuleType
from typing import Any

import gymnasium

from fastdreamer.envs.base import FORMS, TaskError, nearest
from fastdreamer.envs.gym import Factory

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*", re.ASCII)


def is_import_path(task: str) -> bool:
    """Whether a task has the form `module:name`, both of them dotted Python names."""
    module, colon, name = task.partition(":")
    return bool(colon and _PATH.fullmatch(module) and _PATH.fullmatch(name))


def module_exists(task: str) -> bool:
    """Whether the module of `module:name` can be found; it is not run, but its parents are."""
    module = task.partition(":")[0]
    _look_here()
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # a parent package that is missing or fails: its import says why
        return True


def factory_by_path(task: str) -> Factory:
    """The function or class `module:name`, which makes one `gymnasium.Env` when called.

    Raises:
      TaskError: the module or the name is missing (with the nearest names) or cannot be called;
        when called: it raises, or returns something else.
    """
    module_name, _, name = task.partition(":")
    module = _import(task, module_name)
    made: Any = module
    for part in name.split("."):
        if not hasattr(made, part):
            raise TaskError(f"task '{task}': {_missing(made, part)}")
        made = getattr(made, part)
    if not callable(made):
        raise TaskError(
            f"task '{task}': '{name}' is {type(made).__name__}, not a function or class that"
            " makes a gymnasium.Env"
        )

    def make() -> gymnasium.Env[Any, Any]:
        try:
            env = made()
        except Exception as error:
            raise TaskError(f"task '{task}' cannot be made: {explain(error)}") from error
        if not isinstance(env, gymnasium.Env):
            kind = type(env).__name__
            raise TaskError(f"task '{task}': '{name}' must return a gymnasium.Env, got {kind}")
        return env

    return make


def explain(error: BaseException) -> str:
    """An exception of the user's code in one line, with the file and line that raised it."""
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{os.path.basename(error.filename)}:{error.lineno}"
        return f"{type(error).__name__}: {error.msg} ({where})"
    trace = traceback.extract_tb(error.__traceback__)
    frames = [f for f in trace if not f.filename.startswith("<frozen") and f.filename != __file__]
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def _look_here() -> None:
    """Lets modules be found in the current directory, as `python -m` does and a script does not."""
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()


def _import(task: str, name: str) -> ModuleType:
    _look_here()
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise TaskError(
                f"unknown task '{task}': there is no module '{missing}' in {os.getcwd()} or among"
                f" the installed packages; a task is {FORMS}"
            ) from None
        raise TaskError(f"task '{task}': importing '{name}' raised {explain(error)}") from error


def _missing(owner: Any, part: str) -> str:
    what = "module" if isinstance(owner, ModuleType) else "class"
    public = [n for n in dir(owner) if not n.startswith("_") and callable(getattr(owner, n, None))]
    near = nearest(part, public) or sorted(public)[:5]
    hint = f"nearest: {', '.join(near)}" if near else "it defines no function or class"
    name = getattr(owner, "__name__", type(owner).__name__)
    return f"{what} '{name}' has no '{part}'; {hint}"
