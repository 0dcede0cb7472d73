"""The wheel holds the package and exactly the data files that the repository holds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import exporter

ROOT = Path(__file__).resolve().parents[2]
DATA = ("profiles", "calibration")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = {"torch", "transformers", "peft", "onnx", "onnxscript", "safetensors", "tensorrt"}


def package_name(requirement: str) -> str:
    """`onnx` of ``onnx>=1.21``."""
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")


def repository_files(folder: str) -> set[str]:
    """Files of `folder` that git tracks or would add, or all of them outside a git checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if (ROOT / ".git").exists() and listing.returncode == 0:
        return {n for n in listing.stdout.split("\0") if n and (ROOT / n).is_file()}
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel that hatchling builds from this checkout, in a process of its own."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.parametrize("folder", DATA)
def test_the_wheel_has_the_data_of_the_repository(wheel, folder):
    prefix = "exporter/_data/"
    packed = {n.removeprefix(prefix) for n in wheel.namelist() if n.startswith(prefix + folder)}
    expected = repository_files(folder)
    assert expected
    assert packed == expected
    for name in expected:
        assert wheel.read(prefix + name) == (ROOT / name).read_bytes(), name


def test_the_wheel_has_the_code_and_nothing_else(wheel):
    code = {n for n in wheel.namelist() if not n.startswith("exporter/_data/")}
    info = f"medexport-{exporter.__version__}.dist-info/"
    modules = {n for n in code if not n.startswith(info)}
    assert modules == {n for n in repository_files("exporter") if n.endswith(".py")}
    assert f"{info}licenses/LICENSE" in code


def test_an_unpacked_wheel_finds_its_own_data(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "from exporter.catalog.profiles import find_model\n"
        "from exporter.core.data import data_root\n"
        "print(data_root('calibration'), find_model('smolvlm').name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    expected = f"{tmp_path / 'exporter' / '_data' / 'calibration'} smolvlm-500m"
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


def test_the_command_and_version():
    assert PROJECT["name"] == "medexport"
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", exporter.__version__)
    point = EntryPoint("medexport", PROJECT["scripts"]["medexport"], "console_scripts")
    assert callable(point.load())


def test_the_base_install_has_no_build_side_package():
    assert not {package_name(r) for r in PROJECT["dependencies"]} & HEAVY


def test_every_requirement_has_a_lower_bound_and_a_reason():
    reasons = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (r for group in lists for r in group):
        assert ">=" in requirement, requirement
        assert f"| {package_name(requirement)} |" in reasons, requirement


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("requirements.lock", ("build", "dev", "sign")), ("requirements-runtime.lock", ())],
)
def test_the_locks_cover_the_requirements_with_hashes(lock, extras):
    text = (ROOT / lock).read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-z0-9])", text)
    locked = {package_name(e): e for e in entries if "==" in e}
    assert all("--hash=sha256:" in e for e in locked.values())
    wanted = [*PROJECT["dependencies"]]
    for extra in extras:
        wanted += PROJECT["optional-dependencies"][extra]
    assert {package_name(r) for r in wanted} - {"torch"} <= locked.keys()
    # torch has another hash from each index, so the Makefile installs it; CUDA comes with it.
    assert not [n for n in locked if n == "torch" or n.startswith(("nvidia-", "cuda-"))]
    if not extras:
        assert not locked.keys() & HEAVY
