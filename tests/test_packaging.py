"""The package installs from its folder and from a wheel, and works away from its folder.

The libraries that it needs are lent from the environment that runs the tests (a fresh torch takes minutes); the
package itself is not.
"""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

PROBE = """
import json, sys
import contrastive_mm, contrastive_mm.nlp, contrastive_mm.rl, contrastive_mm.vision
from contrastive_mm.configuration import recipes
from contrastive_mm.domain import DOMAINS
print(json.dumps({
    "places": [module.__file__ for name, module in sys.modules.items() if name.startswith("contrastive_mm")],
    "tops": [name for name in ("vision", "nlp", "rl") if name in sys.modules],
    "recipes": {domain: len(recipes(domain)) for domain in DOMAINS},
}))
"""


def call(*command, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize("kind", ["folder", "wheel"])
def test_installs_and_works_elsewhere(tmp_path, wheel, kind):
    call(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    own = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # A path line lends the libraries but not the .pth file by which an editable install is found.
    (own / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    source = wheel if kind == "wheel" else ROOT
    call(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet", source)
    found = json.loads(call(python, "-c", PROBE, cwd=tmp_path))
    assert all(place.startswith(str(own)) for place in found["places"]), "from the environment, not the checkout"
    assert found["tops"] == [], "no second copy under a generic name"
    assert all(count >= 1 for count in found["recipes"].values()), "recipes travel with the package"
    assert not any((own / name).exists() for name in ("vision", "nlp", "rl", "tests"))
    command = tmp_path / "venv" / "bin" / "contrastive-mm"
    said = call(command, "vision", "--data=digits", "--image-size=8", "--steps=2", "--output=run", cwd=tmp_path)
    assert "2 steps" in said
    assert "trained encoder" in call(command, "evaluate", "run", cwd=tmp_path)


def test_the_wheel_holds_each_file_once(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info" not in name]
    assert all(name.startswith("contrastive_mm/") for name in names)
    assert "contrastive_mm/vision/configs/digits-simclr.yaml" in names
    assert len(names) == len(set(names))
    tracked = call("git", "ls-files", "contrastive_mm", "vision", "nlp", "rl", cwd=ROOT).split()
    expected = {name if name.startswith("contrastive_mm/") else f"contrastive_mm/{name}" for name in tracked}
    assert set(names) == expected - {f"contrastive_mm/{name}" for name in ("vision", "nlp", "rl")}
