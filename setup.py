"""Builds from a checkout without symbolic links too; all the rest is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Takes the passes from ``passes`` where git wrote the link ``etcompile/passes`` as a text file."""

    def finalize_options(self) -> None:
        super().finalize_options()
        root = Path(__file__).parent
        if (root / "etcompile" / "passes" / "__init__.py").is_file():
            return
        way_out = "git config core.symlinks true, and check out again."
        if not (root / "passes" / "__init__.py").is_file():
            raise SystemExit(
                f"the folder passes is missing, without which etcompile has no learning rule: {way_out}"
            )
        if self.editable_mode:
            raise SystemExit(
                f"etcompile/passes is no symbolic link, which an editable install needs: {way_out}"
            )
        found = ["", *(f".{name}" for name in find_packages(str(root / "passes")))]
        self.packages = [*(self.packages or []), *(f"etcompile.passes{name}" for name in found)]
        self.package_dir = {**(self.package_dir or {}), "etcompile.passes": "passes"}


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildPy})
