"""Methods and domains of other packages, and the page that shows how to write one."""

import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from contrastive_mm import methods, plugins
from contrastive_mm.cli import COMMANDS, main
from contrastive_mm.configuration import load_run_config, parse_run, recipes
from contrastive_mm.domain import COMMAND_NAMES, DOMAIN_REGISTRY, DOMAINS, Domain, load_domain
from contrastive_mm.errors import UserError
from contrastive_mm.methods import METHOD_REGISTRY, METHODS, Method, SimCLR, get_method
from contrastive_mm.runs import pretrain

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`([\w./]+)`:\n\n```\w+\n(.*?)```", PAGE, re.DOTALL))
GROUPS = {"method": "contrastive_mm.methods", "domain": "contrastive_mm.domains"}

METHOD = """
from dataclasses import dataclass
from contrastive_mm.methods import SimCLR, SimCLRConfig

@dataclass(frozen=True)
class Options(SimCLRConfig):
    pull: float = 1.0

class Mine(SimCLR):
    config_class = Options
"""

HOSTILE = """
class Meta(type):
    def __getattr__(cls, name):
        raise RuntimeError(f"no {name}")

class Mine(metaclass=Meta):
    pass
"""

EMPTY_DOMAIN = """
    default_method = "simclr"
    build_encoder = train_batches = evaluate = embed = save = None
"""


def call(*command, path, **options):
    """Run a command with folders on Python's path; what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The package of the page, laid out as the page says."""
    folder = tmp_path_factory.mktemp("contrastive-waves")
    for name, content in FILES.items():
        file = folder / ("contrastive_waves/symmetric.py" if name == "symmetric.py" else name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    (folder / "contrastive_waves" / "__init__.py").touch()
    return folder


@pytest.fixture(scope="module")
def site(source, tmp_path_factory):
    """The folder into which pip has installed that package."""
    target = tmp_path_factory.mktemp("site")
    quiet = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "install", *quiet, "--target", target, source, path=[])
    return target


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """Pretend that a package is installed: its module, and the folder of metadata in which entry points stand."""
    monkeypatch.setattr(plugins, "_said", set())
    before = set(sys.modules)

    def install(kind, name, code, package="tiny", place=None):
        folder = tmp_path / package
        metadata = folder / f"{package}-0.1.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        (metadata / "entry_points.txt").write_text(f"[{GROUPS[kind]}]\n{name} = {place or f'{package}_code:Mine'}\n")
        (folder / f"{package}_code.py").write_text(code)
        monkeypatch.syspath_prepend(folder)

    yield install
    for name in set(sys.modules) - before:
        if name.endswith("_code"):
            del sys.modules[name]


@pytest.fixture
def waves(offer, source, monkeypatch):
    """The page's domain, without pip."""
    monkeypatch.syspath_prepend(source)
    offer("domain", "waves", "", package="waving", place="contrastive_waves.domain:WaveDomain")


def test_the_page_shows_all_files_of_a_package():
    assert set(FILES) == {
        "symmetric.py",
        "contrastive_waves/domain.py",
        "contrastive_waves/configs/waves.yaml",
        "pyproject.toml",
    }
    assert len([line for line in FILES["contrastive_waves/domain.py"].splitlines() if line]) < 60


@pytest.mark.slow
def test_an_installed_package_trains_and_is_evaluated_from_the_command_line(site, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "contrastive_mm.cli", "waves", "--config=waves", "--output", run]
    assert "300 steps" in call(*command, path=[site, ROOT], cwd=tmp_path)
    monkeypatch.syspath_prepend(site)
    config = load_run_config(run / "config.yaml")
    assert (config.domain, config.method, config.trainer.learning_rate) == ("waves", "symmetric", 3e-3)
    assert isinstance(load_domain("waves")(config.domain_options, 0), Domain)
    assert main(["evaluate", str(run)]) == 0
    scores = json.loads((run / "evaluation.json").read_text())["scores"]
    assert scores["trained encoder"]["knn_accuracy"] > scores["untrained encoder"]["knn_accuracy"] + 0.03
    assert main(["waves", "embed", str(run), "square", "--out", str(tmp_path / "features.parquet")]) == 0
    assert set(pq.read_table(tmp_path / "features.parquet")["label"].to_pylist()) == {"square"}
    assert main(["evaluate", str(run), "--data", "sqare"]) == 2
    assert "Did you mean 'square'" in capsys.readouterr().err


@pytest.mark.slow
def test_help_lists_an_installed_domain_without_importing_it(site):
    code = (
        "import sys; from contrastive_mm.cli import main; main(['--help']); "
        "assert not {'torch', 'contrastive_waves'} & set(sys.modules)"
    )
    said = call(sys.executable, "-c", code, path=[site, ROOT])
    assert re.search(r"contrastive-mm waves --data DATA.*contrastive-waves 0\.1", said)


@pytest.mark.slow
def test_one_file_and_one_line_add_a_method_to_the_project(site, tmp_path):
    shutil.copytree(ROOT / "contrastive_mm", tmp_path / "contrastive_mm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "contrastive_mm" / "methods" / "symmetric.py").write_text(FILES["symmetric.py"])
    (line,) = re.findall(r'```python\n(    "symmetric": .*,\n)```', PAGE)
    names = tmp_path / "contrastive_mm" / "methods" / "__init__.py"
    names.write_text(names.read_text().replace("METHODS = {\n", f"METHODS = {{\n{line}"))
    code = (
        "from contrastive_mm.methods import Symmetric, SymmetricConfig; from contrastive_mm.cli import main; "
        "main(['waves', '--config=waves', '--method=symmetric', '--steps=2', '--output=run']); "
        "print(SymmetricConfig.__module__, Symmetric.config_class is SymmetricConfig)"
    )
    # The page's package is there too and offers the same name: the project's own is the one that counts.
    said = call(sys.executable, "-c", code, path=[tmp_path, site], cwd=tmp_path)
    assert "2 steps" in said
    assert "contrastive_mm.methods.symmetric True" in said
    assert "method: symmetric" in (tmp_path / "run" / "config.yaml").read_text()


def test_classes_of_all_methods_are_found_by_name():
    for name, place in METHODS.items():
        method = getattr(methods, place.partition(":")[2])
        assert get_method(name) is method
        assert getattr(methods, f"{method.__name__}Config") is method.config_class
        assert {method.__name__, method.config_class.__name__} <= set(dir(methods))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = methods.Nothing


def test_a_method_of_another_package_is_used_like_any_other(offer, waves, capsys):
    offer("method", "mine", METHOD)
    config, _ = parse_run("waves", ["--method=mine", "--pull=2", "--temperature=0.3"])
    assert (config.method, config.method_options.pull, config.method_options.temperature) == ("mine", 2.0, 0.3)
    assert issubclass(get_method("mine"), Method)
    with pytest.raises(SystemExit):
        parse_run("waves", ["--method=mine", "--help"])
    assert re.search(r"--method NAME.*\bmine\b", capsys.readouterr().out)


def test_a_misspelt_name_of_another_package_is_answered_with_the_nearest(offer, waves, capsys):
    offer("method", "gathering", METHOD)
    with pytest.raises(UserError, match="Did you mean 'gathering'"):
        get_method("gatherin")
    with pytest.raises(UserError, match=r"Did you mean 'waves'\? Known: nlp, rl, vision, waves"):
        load_domain("wave")
    assert main(["wavs"]) == 2
    assert "Did you mean 'waves'" in capsys.readouterr().err
    with pytest.raises(UserError, match="Did you mean 'waves'"):
        parse_run("waves", ["--config=wave"])
    assert set(recipes("waves")) == {"waves"}


def test_a_domain_may_have_no_recipes(offer, waves, capsys):
    offer("domain", "bare", "from contrastive_waves.domain import WaveDomain\nclass Mine(WaveDomain):\n    pass\n")
    assert recipes("bare") == {}
    with pytest.raises(SystemExit):
        parse_run("bare", ["--method=simclr", "--help"])
    assert "Recipes: none." in capsys.readouterr().out


def test_a_broken_package_is_skipped_and_named_once_where_names_are_listed(offer, capsys):
    offer("method", "mine", "import a_module_that_is_not_there\n")
    assert get_method("simclr") is SimCLR
    assert "tiny_code" not in sys.modules
    assert capsys.readouterr().err == "", "whoever asks for another name never meets it"
    for _ in range(2):
        with pytest.raises(UserError, match=r"Unknown method 'simcrl'. Did you mean 'simclr'\? Known: (?!.*mine)"):
            get_method("simcrl")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "skipped: The method 'mine' of package tiny 0.1 (tiny_code:Mine) can't be used" in said
    assert "No module named 'a_module_that_is_not_there'" in said
    assert "tiny_code.py, line 1" in said


def test_a_broken_package_that_is_asked_for_is_an_error_of_one_line(offer, waves, capsys):
    offer("method", "mine", "\n\nraise RuntimeError('no licence\\nfound')\n")
    assert main(["waves", "--method=mine"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "method 'mine' of package tiny 0.1 (tiny_code:Mine) can't be used: RuntimeError: no licence found" in said
    assert "tiny_code.py, line 3" in said


def test_a_package_that_ends_the_program_is_skipped_but_control_c_ends_it(offer, capsys):
    offer("method", "mine", "import sys\nsys.exit(3)\n")
    assert "simclr" in METHOD_REGISTRY.usable_names()
    assert "tiny_code:Mine) can't be used: SystemExit: 3" in capsys.readouterr().err
    offer("method", "stopped", "raise KeyboardInterrupt\n", package="other")
    with pytest.raises(KeyboardInterrupt):
        get_method("stopped")


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("method", "", "module 'tiny_code' has no attribute 'Mine'"),
        ("method", "Mine = len", "no subclass of contrastive_mm.methods.Method"),
        ("method", "from contrastive_mm.methods import Method as Mine", "doesn't define forward"),
        ("method", METHOD.replace("= Options", "= 3"), "config_class must be a dataclass, not 3"),
        ("method", METHOD.replace("(SimCLRConfig)", "").replace(" = 1.0", ""), "'pull' of Options has no default"),
        ("domain", METHOD, "it has no 'default_method'"),
        ("domain", HOSTILE, "RuntimeError: no default_method .*tiny_code.py, line 4"),
        ("domain", METHOD + EMPTY_DOMAIN, "Options lacks the option 'data'"),
    ],
)
def test_what_is_no_method_or_domain_is_told_why(offer, kind, code, message):
    offer(kind, "mine", code)
    look_up = {"method": get_method, "domain": load_domain}[kind]
    with pytest.raises(UserError, match=f"The {kind} 'mine' of package tiny 0.1 .*can't be used: .*{message}"):
        look_up("mine")


@pytest.mark.parametrize(("kind", "name"), [("method", "simclr"), ("domain", "vision"), ("domain", "evaluate")])
def test_no_package_can_take_a_name_of_the_project(offer, capsys, kind, name):
    offer(kind, name, METHOD)
    registry = {"method": METHOD_REGISTRY, "domain": DOMAIN_REGISTRY}[kind]
    for _ in range(2):
        assert registry.packages() == {}
        assert registry.names().count(name) == (name != "evaluate")
    assert get_method("simclr") is SimCLR
    assert "tiny_code" not in sys.modules
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"skipped: the {kind} {name!r} of package tiny 0.1, because the name is contrastive_mm's own" in said


def test_no_domain_can_take_the_name_of_a_command():
    assert set(COMMAND_NAMES) == set(COMMANDS)
    assert not set(COMMANDS) & set(DOMAINS)


def test_a_name_that_two_packages_offer_is_refused(offer, capsys):
    offer("method", "mine", METHOD)
    offer("method", "mine", METHOD, package="other")
    with pytest.raises(UserError, match=r"'mine' is offered by (tiny|other) 0\.1 and (tiny|other) 0\.1: uninstall"):
        get_method("mine")
    with pytest.raises(UserError, match=r"Known: (?!.*mine)"):
        get_method("min")
    assert "uninstall all but one" in capsys.readouterr().err


def test_two_options_of_one_name_are_refused(offer, waves):
    offer("method", "mine", METHOD.replace("pull", "seed"))
    with pytest.raises(UserError, match="'seed' of the method 'mine' has the name of one of training: rename it"):
        parse_run("waves", ["--method=mine"])


def test_a_resumed_run_gives_its_domain_what_it_saved(offer, waves, tmp_path):
    code = (
        "from contrastive_waves.domain import WaveDomain\n"
        "class Mine(WaveDomain):\n"
        "    def __init__(self, config, seed, saved=None):\n"
        "        super().__init__(config, seed)\n"
        "        self.kept = 'new' if saved is None else (saved / 'kept.txt').read_text()\n"
        "    def save(self, folder):\n"
        "        (folder / 'kept.txt').write_text(self.kept + '.')\n"
    )
    offer("domain", "kept", code)
    config, _ = parse_run("kept", ["--method=simclr", "--steps=2"])
    pretrain(config, tmp_path / "run")
    assert (tmp_path / "run" / "kept.txt").read_text() == "new."
    pretrain(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "kept.txt").read_text() == "new.."
    pretrain(config, tmp_path / "new", resume=True)
    assert (tmp_path / "new" / "kept.txt").read_text() == "new.", "nothing was saved there yet"
