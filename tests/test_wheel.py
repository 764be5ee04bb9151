"""What `python -m build` makes, and `pip install .` installs, works in any folder: commands, configurations, pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import quietstar_jax

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
EXTRA = ("CHANGELOG.md", "constraints.txt")  # in the sdist only
PROGRAM = """
import sys
from pathlib import Path
import quietstar_jax
from quietstar_jax.config_file import SHIPPED, call_function, read_config
assert Path(quietstar_jax.__file__).is_relative_to(sys.argv[1]), quietstar_jax.__file__
for name in sys.argv[2:]:
    if name.startswith("studies/"):
        for path in (f"configs/{name}.py", name.removeprefix("studies/")):
            assert call_function(path, "get_study").baseline
    else:
        assert read_config(name) == read_config(f"configs/{name}.py") == read_config(str(SHIPPED / f"{name}.py"))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, as it would be in site-packages; built from the sdist, and this from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__", "build")
    for name in ("quietstar_jax", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", *EXTRA):
        shutil.copy(ROOT / name, folder / "source")

    def build(kind: str, source: Path) -> None:
        program = f"from setuptools.build_meta import build_{kind}; build_{kind}('..')"
        done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    build("sdist", folder / "source")
    (archive,) = folder.glob("*.tar.gz")
    assert archive.name == f"quietstar_jax-{quietstar_jax.__version__}.tar.gz"
    with tarfile.open(archive) as file:
        file.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    assert all((unpacked / name).read_bytes() == (ROOT / name).read_bytes() for name in EXTRA)
    build("wheel", unpacked)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(site: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=cwd, env=environment)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_wheel_holds_every_file_of_the_package_and_every_configuration(site: Path) -> None:
    assert not (site / "configs").exists()  # a name that other packages use too
    package = {name for name in names(ROOT / "quietstar_jax") if not name.startswith("configs/")}
    assert names(site / "quietstar_jax") == package | {f"configs/{name}" for name in names(CONFIGS)}
    assert {"py.typed", "reports/page.css", "reports/page.js", "reports/chart.css"} <= package
    (entries,) = site.glob("*.dist-info/entry_points.txt")
    assert "quietstar = quietstar_jax.commands:main" in entries.read_text()


def test_every_configuration_is_found_from_any_folder(site: Path, tmp_path: Path) -> None:
    every = [name.removesuffix(".py") for name in names(CONFIGS)]
    every = [name for name in every if not name.endswith(("__init__", "common"))]
    assert len(every) > 15
    done = run(site, "-c", PROGRAM, str(site), *every, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_configuration_of_the_user_begins_from_a_shipped_one(site: Path, tmp_path: Path) -> None:
    text = "from quietstar_jax.configs import quickstart\ndef get_config():\n    config = quickstart.get_config()\n"
    (tmp_path / "mine.py").write_text(
        text + "    config.seed = 77\n    config.phases[0].steps = -1\n    return config\n"
    )
    done = run(site, "-m", "quietstar_jax", "train", "--config", "mine.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "config.phases[0].steps is -1" in done.stderr  # the only thing wrong with it


def test_a_name_that_is_no_configuration_is_refused_with_advice(site: Path, tmp_path: Path) -> None:
    done = run(site, "-m", "quietstar_jax", "train", "--config", "quikstart", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Did you mean quickstart?" in done.stderr
    assert (
        "controls" in run(site, "-m", "quietstar_jax", "study", "--study", "x", "--workdir", "y", cwd=tmp_path).stderr
    )
