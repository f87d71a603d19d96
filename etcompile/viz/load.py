"""From ``FILE.py:NAME`` to a hidden-group graph: what the command line accepts."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from etcompile.errors import EtcompileError
from etcompile.viz.errors import VizError
from etcompile.viz.graph import holds_graph

__all__ = ["ModelOptions", "drawable_of", "load", "parse_shape"]

_ACCEPTED = (
    "a compiled step, its networkx graph, a tuple (model, *example_inputs), a model together with "
    "--input-shape, or a function without arguments that returns one of these"
)


@dataclass(frozen=True)
class ModelOptions:
    """How to compile a model; none of it applies to what is compiled already.

    Attributes
    ----------
    algo : str or None
        Learning rule, ``"d_rtrl"`` by default.
    input_shapes : sequence of str
        One text such as ``"16,64"`` or ``"16,64:int32"`` per input of a time step.
    batch_size : int or None
        Initialises the model's states for this batch size.
    """

    algo: str | None = None
    input_shapes: Sequence[str] = ()
    batch_size: int | None = None

    def given(self) -> list[str]:
        """The command-line options that were used."""
        options = {"--algo": self.algo, "--input-shape": self.input_shapes, "--batch": self.batch_size}
        return [name for name, value in options.items() if value]


def load(target: str) -> object:
    """Run a Python file and return the object of that name in it.

    Parameters
    ----------
    target : str
        ``FILE.py:NAME``; the name may be dotted.

    Raises
    ------
    VizError
        If there is no such file or name, or the file fails.
    """
    file, colon, name = target.rpartition(":")
    if not colon or not name or not file or name.endswith(".py"):
        raise VizError(f"Expected FILE.py:NAME, for example model.py:step. Got {target!r} instead.")
    path = Path(file)
    if not path.is_file():
        raise VizError(f"There is no file {file} (looked in {Path.cwd()}).")
    value: object = _run(path)
    for part in name.split("."):
        if not hasattr(value, part):
            raise VizError(f"{file} has no {name!r}. {_suggest(part, value)}")
        value = getattr(value, part)
    return value


def _run(path: Path) -> ModuleType:
    name = f"_drawn_{path.stem}"  # not the bare stem: that could be the name of a library
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise VizError(f"{path} is not a Python file; expected a name that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    # As for `python FILE.py`, what lies beside the file can be imported, also later by functions in it.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _failure(f"Running {path} failed", error, str(path.resolve())) from error
    return module


def _failure(what: str, error: BaseException, file: str | None) -> VizError:
    """`what`, with the last line of the user's own file in the traceback, and the error."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = own[-1].lineno if own else error.lineno if isinstance(error, SyntaxError) else None
    where = f" at {Path(file).name}:{line}" if file and line else ""
    return VizError(f"{what}{where}: {type(error).__name__}: {error}")


def _suggest(name: str, value: object) -> str:
    names = (
        [other for other in vars(value) if not other.startswith("_")] if hasattr(value, "__dict__") else []
    )
    if near := difflib.get_close_matches(name, names, n=3):
        return f"Did you mean {' or '.join(near)}?"
    drawable = [other for other in names if not isinstance(getattr(value, other), (ModuleType, type))]
    return f"It has: {', '.join(drawable[:12])}." if drawable else "It defines no name that could be drawn."


def drawable_of(value: object, options: ModelOptions, name: str) -> object:
    """What `draw` takes, of whatever `load` found; models are compiled for it.

    Parameters
    ----------
    value : object
        One of the things that the command line accepts.
    options : ModelOptions
        For models.
    name : str
        What messages call the value.

    Raises
    ------
    VizError
        If it is none of the things accepted, or options do not fit it.
    EtcompileError
        Whatever compiling the model raises.
    """
    if inspect.isroutine(value) or isinstance(value, partial):
        value = _call(value, name)
    if holds_graph(value):
        if given := options.given():
            raise VizError(
                f"{name} is compiled already, so {' and '.join(given)} cannot apply to it. Leave it "
                "out, or name the model instead."
            )
        return value
    if isinstance(value, tuple) and value:
        model, *inputs = value
        if inputs and options.input_shapes:
            raise VizError(f"{name} brings its own example inputs; leave --input-shape out.")
    else:
        model, inputs = value, []
    if isinstance(model, type):
        raise VizError(
            f"{name} is the class {model.__name__}; make an instance of it, {model.__name__}(...)."
        )
    if model is None or isinstance(
        model, (str, bytes, int, float, complex, list, tuple, dict, set, ModuleType)
    ):
        raise VizError(f"{name} must be {_ACCEPTED}. Got {type(model).__name__} instead.")
    if not inputs:
        inputs = [_example(text) for text in options.input_shapes]
    if not inputs:
        raise VizError(
            f"{name} is a {type(model).__name__}, not a compiled step. If it is a model, say what one time "
            "step takes, for example --input-shape 16,64, or name a tuple (model, example_input) in the file."
        )
    import etcompile

    return etcompile.compile(model, *inputs, algo=options.algo or "d_rtrl", batch_size=options.batch_size)


def _call(function: Callable[..., object], name: str) -> object:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise VizError(f"The function {name} needs arguments ({error}); name one that takes none.") from None
    except ValueError:  # built in, without a signature
        raise VizError(f"{name} must be {_ACCEPTED}. Got a built-in function instead.") from None
    try:
        return function()
    except EtcompileError:
        raise
    except Exception as error:
        code = getattr(function, "__code__", None)
        raise _failure(f"Calling {name}() failed", error, code and code.co_filename) from error


def parse_shape(text: str) -> tuple[tuple[int, ...], str]:
    """``"16,64:int32"`` -> ``((16, 64), "int32")``; float32 where no type is named, ``"()"`` for a scalar."""
    match = re.fullmatch(r"\s*[(\[]?\s*((?:\d+\s*[,x]?\s*)*)[)\]]?\s*(?::\s*(\w+)\s*)?", text)
    if match is None or (not match[1].strip() and "(" not in text):
        raise VizError(f"--input-shape must look like 16,64 or 16,64:int32. Got {text!r} instead.")
    return tuple(int(size) for size in re.findall(r"\d+", match[1])), match[2] or "float32"


def _example(text: str) -> object:
    import jax.numpy as jnp

    shape, dtype = parse_shape(text)
    try:
        return jnp.zeros(shape, dtype)
    except TypeError:
        raise VizError(f"--input-shape {text!r} names a type {dtype!r} that JAX does not have.") from None
