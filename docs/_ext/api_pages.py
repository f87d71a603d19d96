"""``docs/api.rst``: the reference of every public name, by what one does with it.

A public name that stands in no section is an error of the build.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

#: Title, what is in it, module, names.
SECTIONS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("Compile", "From a model to a step.", "etcompile", ("compile", "compare", "Schedule")),
    (
        "Models",
        "What is not a ``brainstate`` module becomes a model by one of these.",
        "etcompile",
        ("from_function", "from_equinox", "from_nnx", "from_linen", "from_nir", "FunctionModel"),
    ),
    (
        "The compiled step",
        "What ``compile`` returns, and what it hands out.",
        "etcompile",
        ("Step", "Executor", "Carry", "Report", "Cost", "Comparison", "TraceProgram", "Checkpoints"),
    ),
    (
        "Learners",
        "What ``step.learn`` returns.",
        "etcompile.runtime.learn",
        ("Learner",),
    ),
    (
        "Learners from rewards",
        "What ``step.learn_td`` returns; see :doc:`reinforcement`.",
        "etcompile.runtime.td_learner",
        ("TDLearner",),
    ),
    (
        "Watching a run",
        "See :doc:`long_runs`.",
        "etcompile",
        ("Dashboard", "TensorBoard", "Observer", "Observation"),
    ),
    (
        "Data",
        "What is the same at every step, and what changes.",
        "etcompile",
        ("SingleStepData", "MultiStepData", "extract_y_target"),
    ),
    (
        "Rules, passes and schedules of one's own",
        "See :doc:`write_a_pass`.",
        "etcompile",
        (
            "algorithm", "algorithm_names", "Pass", "PassManager", "parse_program", "feedback_matrix",
            "SyntheticGradient", "SequenceSchedule", "register_schedule", "WeightOperation", "weight_operation",
        ),
    ),
    (
        "Rows from outside",
        "For the compiler's own tables.",
        "etcompile.extend",
        ("register_op", "register_kind", "register_index_rule"),
    ),
    ("Parts", "See :doc:`parts`.", "etcompile.nn", ()),
    ("Pictures", "Drawings of a compiled step.", "etcompile.viz", ("draw", "Drawing", "VizError")),
    (
        "Errors and warnings",
        "Each is an ``EtcompileError`` or an ``EtcompileWarning``. Errors say where, what was got and expected, what to do.",
        "etcompile",
        (),
    ),
)  # fmt: skip


def sections() -> list[tuple[str, str, str, list[str]]]:
    """The sections, those without names filled from the code."""
    package = importlib.import_module("etcompile")
    found = []
    for title, said, module, names in SECTIONS:
        names = names or tuple(_left_to_the_code(title, importlib.import_module(module)))
        found.append((title, said, module, list(names)))
    there = {name for *_, module, names in found for name in names if module in ("etcompile", "etcompile.nn")}
    modules = {name for name in package.__all__ if inspect.ismodule(getattr(package, name))}
    missing = sorted(set(package.__all__) - there - modules)
    if missing:
        raise ExtensionError(f"public names in no section of docs/_ext/api_pages.py: {', '.join(missing)}")
    return found


def _left_to_the_code(title: str, module: Any) -> list[str]:
    if not title.startswith("Errors"):
        return sorted(module.__all__)
    public = {name: getattr(module, name) for name in module.__all__}
    wrong = (n for n, v in public.items() if inspect.isclass(v) and issubclass(v, (Exception, Warning)))
    return sorted(wrong)


def page() -> str:
    """The page, as reStructuredText."""
    lines = ["API reference", "=============", ""]
    for title, said, module, names in sections():
        lines += [title, "-" * len(title), "", said, "", f".. currentmodule:: {module}", ""]
        lines += [".. autosummary::", "   :toctree: api", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names] + [""]
    return "\n".join(lines)


def write(app: Sphinx) -> None:
    path = Path(app.srcdir) / "api.rst"
    text = page()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write, priority=100)  # before autosummary looks for what to generate
    return {"parallel_read_safe": True}
