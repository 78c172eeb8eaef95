"""The page's libraries are those of the lock, unchanged, with their licences."""

import hashlib
import json
import shutil
import subprocess

import pytest

from tests.finetune.runs import ROOT

PAGE = ROOT / "serving/server/page"
VENDOR = PAGE / "static/vendor"
PURE_LIBRARIES = {"@types/trusted-types", "argparse"}  # of types, and of a command: not in a page


def checksums(folder):
    return (folder / "SHA256SUMS").read_text()


def test_files_are_as_they_were_vendored():
    listed = {}
    for line in checksums(VENDOR).splitlines():
        digest, name = line.split("  ./")
        listed[name] = digest
    found = {}
    for file in VENDOR.rglob("*"):
        if file.is_file() and file.name != "SHA256SUMS":
            name = file.relative_to(VENDOR).as_posix()
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found == listed


def test_every_library_has_its_licence():
    lock = json.loads((PAGE / "npm/package-lock.json").read_text())
    names = {path.removeprefix("node_modules/") for path in lock["packages"] if path}
    licences = {file.stem for file in (VENDOR / "licenses").iterdir()}
    wanted = {name.removeprefix("@").replace("/", "-") for name in names - PURE_LIBRARIES}
    assert licences == wanted
    for package in lock["packages"].values():
        assert package.get("integrity", "").startswith("sha512-") or "dependencies" in package


@pytest.mark.slow  # asks the npm registry
def test_the_script_gives_the_same_files(tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    subprocess.run(["bash", "scripts/vendor_page.sh", tmp_path / "vendor"], cwd=ROOT, check=True)
    assert checksums(tmp_path / "vendor") == checksums(VENDOR)
