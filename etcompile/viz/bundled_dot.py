"""Behaves like ``dot -Tformat [-Gname=value ...]``, with the Graphviz library in the wheel of pygraphviz.

Started as a program by `etcompile.viz.render`; imports nothing of etcompile, so that it starts quickly.
"""

from __future__ import annotations

import sys

import pygraphviz


def main() -> int:
    """Read DOT text from standard input, write the picture to standard output."""
    graph = pygraphviz.AGraph(string=sys.stdin.buffer.read().decode())
    format = "svg"
    for argument in sys.argv[1:]:
        if argument.startswith("-T"):
            format = argument.removeprefix("-T")
        else:
            name, _, value = argument.removeprefix("-G").partition("=")
            graph.graph_attr[name] = value
    sys.stdout.buffer.write(graph.draw(format=format, prog="dot") or b"")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
