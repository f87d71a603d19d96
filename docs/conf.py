"""The documentation site, which `make docs` builds.

The names are those of https://www.sphinx-doc.org/en/master/usage/configuration.html.
"""

import logging
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import etcompile  # noqa: E402

for library in (
    "absl",
    "jax",
):  # orbax tells of each file that it writes, jax of accelerators that are not there
    logging.getLogger(library).setLevel(logging.WARNING)

project = "etcompile"
author = "the etcompile developers"
copyright = author
version = release = etcompile.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "api_pages",
    "rule_pages",
    "repository_links",
]
exclude_patterns = [
    "_build",
    "_templates",
    "benchmarks",
    "tutorials",
    "**/sg_execution_times.rst",
    "sg_execution_times.rst",
]
root_doc = "index"
templates_path = ["_templates"]
suppress_warnings = ["config.cache"]  # sphinx-gallery's settings hold functions
nitpicky = False

# -- pages ------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# -- the reference: numpydoc docstrings, from the code ------------------------------------------------------------

autosummary_generate = ["api.rst"]  # it is made a moment before
autodoc_typehints = "none"  # docstrings give types, with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# -- tutorials: run here, at each build --------------------------------------------------------------------------

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "learn",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "remove_config_comments": True,
    "capture_repr": ("_repr_html_", "__repr__"),
    "reset_modules": ("tutorial_start.fresh", "matplotlib"),
    "image_scrapers": ("matplotlib", "tutorial_start.drawings"),
    "nested_sections": False,
}

# -- what it looks like ------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = "etcompile"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"
