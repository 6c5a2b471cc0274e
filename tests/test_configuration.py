import pytest
import yaml

from contrastive_mm.configuration import load_run_config, parse_run, recipes
from contrastive_mm.domain import DOMAINS, load_domain
from contrastive_mm.errors import UserError
from contrastive_mm.methods import METHODS, get_method


def write(tmp_path, **values):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return f"--config={path}"


def test_a_flag_overrides_the_file_and_the_file_the_default(tmp_path):
    recipe = write(tmp_path, method="simclr", temperature=0.3, batch_size=64, learning_rate="2e-3")
    config, _ = parse_run("vision", [recipe, "--batch-size", "32"])
    assert config.method_options.temperature == 0.3
    assert config.domain_options.batch_size == 32
    assert config.trainer.learning_rate == 2e-3
    assert config.trainer.epochs == 100


def test_one_methods_options_never_become_anothers(tmp_path):
    recipe = write(tmp_path, method="simclr", temperature=0.5, batch_size=64)
    config, _ = parse_run("vision", [recipe, "--method", "moco"])
    assert config.method == "moco"
    assert config.method_options.temperature == 0.2, "MoCo's own default"
    assert config.domain_options.batch_size == 64


def test_a_misspelt_key_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"Unknown key 'temprature' in .*recipe\.yaml. Did you mean 'temperature'"):
        parse_run("vision", [write(tmp_path, method="simclr", temprature=0.1)])


def test_a_misspelt_flag_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parse_run("vision", ["--temprature", "0.1"])
    assert "--temperature" in capsys.readouterr().err


def test_a_value_of_the_wrong_kind_is_blamed_on_the_file(tmp_path):
    with pytest.raises(UserError, match=r"recipe\.yaml has a value that doesn't fit.*batch-size"):
        parse_run("vision", [write(tmp_path, batch_size="many")])
    with pytest.raises(UserError, match=r"recipe\.yaml: --flip = 3"):
        parse_run("vision", [write(tmp_path, flip=3.0)])


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [1", "not valid YAML"), ("- a\n- b", "must map option names"), ("trainer:\n  steps: 3", "nested")],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        parse_run("vision", [f"--config={path}"])


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'simclr'"):
        parse_run("vision", ["--method", "simcrl"])
    with pytest.raises(UserError, match="Did you mean 'digits-simclr'"):
        parse_run("vision", ["--config", "digits-simclar"])
    with pytest.raises(UserError, match="recipe for nlp, not for vision"):
        parse_run("vision", ["--config", str(recipes("nlp")["pydoc-simcse"])])


@pytest.mark.parametrize(("domain", "name"), [(d, name) for d in DOMAINS for name in recipes(d)])
def test_every_recipe_is_read_and_comes_back_from_the_run(tmp_path, domain, name):
    arguments = [f"--config={name}", "--data=somewhere", "--seed=7"]
    config, _ = parse_run(domain, arguments)
    config.save(tmp_path / "config.yaml")
    assert load_run_config(tmp_path / "config.yaml") == config
    assert config.trainer.seed == 7


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("method", METHODS)
def test_no_option_of_a_method_hides_one_of_a_domain(domain, method):
    config, _ = parse_run(domain, [f"--method={method}"])
    names = [set(vars(part)) for part in (config.domain_options, config.method_options, config.trainer)]
    assert not names[0] & names[1]
    assert not names[1] & names[2]
    assert not names[0] & names[2]


@pytest.mark.parametrize("domain", DOMAINS)
def test_help_lists_what_can_be_set(domain, capsys):
    with pytest.raises(SystemExit):
        parse_run(domain, ["--help"])
    said = capsys.readouterr().out
    for flag in ("--data", "--batch-size", "--epochs", "--resume", "--precision"):
        assert flag in said


def test_every_option_has_a_word_of_help():
    import dataclasses
    import inspect

    def check(options):
        # An option may be inherited, and is then written in a base.
        source = "".join(inspect.getsource(kind) for kind in options.__mro__[:-1])
        for field in dataclasses.fields(options):
            nested = field.default_factory
            if dataclasses.is_dataclass(nested):
                check(nested)
                continue
            declaration = source.split(f"    {field.name}:")[1].split("\n", 1)[1]
            assert declaration.strip().startswith('"""'), f"{options.__name__}.{field.name}"

    for domain in DOMAINS:
        check(load_domain(domain).config_class)
    for method in METHODS:
        check(get_method(method).config_class)


def parse_file(tmp_path, text, *flags, domain="vision"):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return parse_run(domain, [f"--config={path}", "--data=digits", *flags])[0]


@pytest.mark.parametrize("off", ["no", "off", "false", "False", "'no'"])
def test_a_word_is_taken_for_what_its_option_is(tmp_path, off):
    assert parse_file(tmp_path, "precision: no").trainer.precision == "no"
    assert parse_file(tmp_path, f"method: simcse\nmlp: {off}", domain="nlp").method_options.mlp is False
    assert parse_file(tmp_path, "learning_rate: 3e-4").trainer.learning_rate == 3e-4
    assert parse_file(tmp_path, "steps: null").trainer.steps is None
    assert parse_file(tmp_path, "text_column: yes", domain="nlp").domain_options.text_column == "yes"
    with pytest.raises(UserError, match="mlp = 'maybe'; it must be true or false"):
        parse_file(tmp_path, "method: simcse\nmlp: maybe", domain="nlp")
    with pytest.raises(UserError, match="batch_size has no value"):
        parse_file(tmp_path, "batch_size:")
    with pytest.raises(UserError, match="Unknown method '3'"):
        parse_file(tmp_path, "method: 3")


def test_a_recipe_without_a_method_may_have_the_options_of_the_runs(tmp_path):
    assert parse_file(tmp_path, "temperature: 0.3", "--method=simclr").method_options.temperature == 0.3
    assert parse_file(tmp_path, "temperature: 0.3").method_options.temperature == 0.3, "the domain's own method"
    with pytest.raises(UserError, match="Unknown key 'temperature'"):
        parse_file(tmp_path, "temperature: 0.3", "--method=curl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature=-1"], "--temperature = -1.0; it must be above 0"),
        (["--hidden-dim=0"], "--hidden-dim = 0; it must be at least 1"),
        (["--projection-layers=-1"], "--projection-layers = -1; it must be at least 0"),
        (["--method=moco", "--queue-size=0"], "--queue-size = 0; it must be at least 1"),
        (["--method=moco", "--momentum=1.5"], "--momentum = 1.5; it must lie between 0 and 1"),
        (["--method=curl", "--latent-dim=0"], "--latent-dim = 0"),
        (["--method=simclr-v2", "--queue-size=-1"], "--queue-size = -1; it must be at least 0"),
        (["--gradient-clip=-1"], "--gradient-clip = -1.0; it must be above 0"),
        (["--weight-decay=-1"], "--weight-decay = -1.0"),
        (["--learning-rate=inf"], "--learning-rate = inf"),
        (["--seed=-1"], "--seed = -1"),
    ],
)
def test_options_that_no_run_can_use_are_refused_at_once(flags, message):
    with pytest.raises(UserError, match=message):
        parse_run("vision", ["--data=digits", *flags])
