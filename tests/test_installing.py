"""What is installed is whole, and importing it changes nothing."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("first", ["", "import brainstate; jax.config.update('jax_enable_x64', True); "])
def test_importing_leaves_the_settings_of_jax(first):
    told = (
        "import jax; jax.config.update('jax_enable_x64', True); "
        "jax.config.update('jax_default_matmul_precision', 'highest'); "
        + first
        + "before = dict(jax.config.values); "
        "import etcompile; assert dict(jax.config.values) == before; assert jax.numpy.ones(1).dtype == 'float64'; "
        "import sys; assert not {'flax', 'equinox', 'nir'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", told], check=True, cwd=ROOT, timeout=120)


def test_the_readme_installs_what_its_first_example_imports():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    before, example = text.split("```python\n", 1)
    extras = re.search(r"pip install '\.\[([\w,]+)\]'", before)
    assert extras is not None
    wanted = [
        *project["dependencies"],
        *(p for e in extras[1].split(",") for p in project["optional-dependencies"][e]),
    ]
    installed = {re.split(r"[<>=\[ ;]", p)[0] for p in wanted} | {"etcompile"}
    imports = re.findall(r"^(?:import|from) (.*)$", example.split("```", 1)[0], re.MULTILINE)
    modules = {name.split(".")[0].split(" ")[0] for line in imports for name in line.split(", ")}
    assert modules <= installed


@pytest.fixture
def build(tmp_path):
    """Builds a checkout in which git wrote symbolic links as text files; without pyproject.toml, for setuptools of any age."""
    setuptools = pytest.importorskip("setuptools")
    tree = tmp_path / "checkout"
    tree.mkdir()
    shutil.copytree(ROOT / "etcompile", tree / "etcompile", symlinks=True)
    shutil.copytree(ROOT / "passes", tree / "passes")
    shutil.copy(ROOT / "setup.py", tree)
    (tree / "etcompile" / "passes").unlink()
    (tree / "etcompile" / "passes").write_text("../passes")

    def run(editable=False):
        spec = importlib.util.spec_from_file_location("setup_of_checkout", tree / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        packages = setuptools.find_packages(str(tree), include=["etcompile", "etcompile.*"])
        command = module.BuildPy(setuptools.Distribution({"packages": packages, "script_name": "setup.py"}))
        command.build_lib, command.editable_mode = str(tmp_path / "built"), editable
        command.finalize_options()
        command.run()
        return tmp_path / "built"

    return tree, run


def test_a_checkout_without_symbolic_links_builds_a_whole_package(build, monkeypatch):
    tree, run = build
    monkeypatch.chdir(tree)
    built = run()
    for path in [*(ROOT / "passes").rglob("*.py"), ROOT / "etcompile" / "ir" / "program.py"]:
        inside = (
            path.relative_to(ROOT)
            if "etcompile" in path.parts[-3:]
            else Path("etcompile", "passes", path.relative_to(ROOT / "passes"))
        )
        assert (built / inside).read_bytes() == path.read_bytes()


def test_what_cannot_be_whole_is_refused(build, monkeypatch):
    tree, run = build
    monkeypatch.chdir(tree)
    with pytest.raises(SystemExit, match=r"core\.symlinks true"):
        run(editable=True)
    shutil.rmtree(tree / "passes")
    with pytest.raises(SystemExit, match="passes is missing"):
        run()
