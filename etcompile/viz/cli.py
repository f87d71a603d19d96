"""The command `etcompile-viz` (and ``python tools/viz``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from etcompile.errors import EtcompileError
from etcompile.viz.drawing import VIEWS, draw, output_format
from etcompile.viz.errors import VizError
from etcompile.viz.load import ModelOptions, drawable_of, load
from etcompile.viz.render import FORMATS

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="etcompile-viz",
        description="Draw hidden groups, states, weights, operations and cuts of a compiled model, "
        "or the dataflow of its program.",
        epilog="examples:\n"
        "  etcompile-viz train.py:step -o graph.svg\n"
        "  etcompile-viz model.py:net --input-shape 16,64 --batch 16 --algo d_rtrl -o graph.png\n"
        "  etcompile-viz train.py:step --view program -o program.svg\n"
        "  etcompile-viz model.py:make_step -o - --format dot",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target",
        metavar="FILE.py:NAME",
        help="a compiled step, its graph, a tuple (model, *example_inputs), a model (with --input-shape), "
        "or a function without arguments that returns one of these",
    )
    parser.add_argument(
        "-o", "--output", metavar="PATH", help="where to write; '-' is standard output (NAME.svg)"
    )
    parser.add_argument(
        "--format", metavar="FORMAT", help=f"one of {', '.join(FORMATS)} (the suffix of PATH)"
    )
    parser.add_argument(
        "--view", choices=VIEWS, default="model", help="the model, or the dataflow of its program (model)"
    )
    parser.add_argument(
        "--every-layer",
        action="store_true",
        help="draw layers that repeat one by one, and not once with a count",
    )
    parser.add_argument("--algo", help="learning rule to compile a model with (d_rtrl)")
    parser.add_argument(
        "--input-shape",
        action="append",
        default=[],
        metavar="SHAPE",
        help="shape of one time step's input, such as 16,64 or 16,64:int32; repeat for several inputs",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="batch size to initialise the model's states with before compiling",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the arguments of the process by default. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        _draw(arguments)
    except EtcompileError as error:
        print(f"etcompile-viz: error: {error}", file=sys.stderr)
        return 2
    return 0


def _draw(arguments: argparse.Namespace) -> None:
    if arguments.batch is not None and arguments.batch < 1:
        raise VizError(f"--batch must be at least 1. Got {arguments.batch} instead.")
    name = arguments.target.rpartition(":")[2]
    to_stdout = arguments.output == "-"
    path = Path(arguments.output or f"{name}.{arguments.format or 'svg'}")
    # Wrong output is reported before the model is compiled, which may take a while.
    format = output_format(Path("graph.svg") if to_stdout else path, arguments.format)
    if not path.parent.is_dir():
        raise VizError(f"Cannot write {path}: there is no directory {path.parent}. Create it first.")
    options = ModelOptions(arguments.algo, arguments.input_shape, arguments.batch)
    what = drawable_of(load(arguments.target), options, name)
    drawing = draw(what, view=arguments.view, every_layer=arguments.every_layer)
    if to_stdout:
        sys.stdout.buffer.write(drawing.render(format))
    else:
        print(f"{drawing.title}: {drawing.save(path, format)}")


if __name__ == "__main__":
    raise SystemExit(main())
