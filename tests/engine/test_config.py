"""Configurations: files, overrides, what is refused and how, and the files in configs/."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gsalign.config import Config, known_keys, load_config, save_config, validate_section
from gsalign.data.synthetic import SyntheticConfig
from gsalign.engine.config import TrainingConfig
from gsalign.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
COMMAND_LINE = "the command line"


def message(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_anything_the_defaults_are_those_of_the_sections():
    config = load_config()
    assert config == Config()
    assert config.model.image_size == config.data.image_size == (256, 128)
    assert config.run_folder == Path("logs/cargo/gsalign")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=0.25", ("optimizer", "lr"), 0.25),
        ("optimizer.lr=5e-4", ("optimizer", "lr"), 5e-4),
        ("optimizer.weight_decay_bias=null", ("optimizer", "weight_decay_bias"), None),
        ("optimizer.betas=[0.5,0.75]", ("optimizer", "betas"), (0.5, 0.75)),
        ("model.ltps.layers=[0,3]", ("model", "ltps", "layers"), (0, 3)),
        ("model.ltps.layers=[]", ("model", "ltps", "layers"), ()),
        ("model.ltps.layers=all", ("model", "ltps", "layers"), "all"),
        ("model.dam.enabled=false", ("model", "dam", "enabled"), False),
        ("model.ltps={layers: [1], eta: 0.2}", ("model", "ltps", "eta"), 0.2),
        ("training.precision=no", ("training", "precision"), "no"),
        ("training.precision='no'", ("training", "precision"), "no"),
        ("training.precision=bf16", ("training", "precision"), "bf16"),
        ("data.root=/some where/a=b", ("data", "root"), Path("/some where/a=b")),
        ("name=7", ("name",), "7"),
        ("output=somewhere", ("output",), Path("somewhere")),
    ],
)
def test_an_override_sets_its_key_and_leaves_the_others(override, key, value):
    config = load_config(None, [override])
    found = config
    for part in key:
        found = getattr(found, part)
    assert found == value and type(found) is type(value)
    default, changed = Config().model_dump(), config.model_dump()
    inner = default
    for part in key[:-1]:
        inner = inner[part]
        changed = changed[part]
    different = {name for name in inner if inner[name] != changed[name]}
    assert different <= {key[-1], "layers"}


def test_later_overrides_win_over_earlier_ones_and_these_over_the_file(tmp_path):
    path = write(tmp_path, "optimizer: {lr: 0.5, momentum: 0.5}\nname: from_file\n")
    assert load_config(path).optimizer.lr == 0.5
    config = load_config(path, ["optimizer.lr=0.25", "optimizer.lr=0.125"])
    assert config.optimizer.lr == 0.125
    assert config.optimizer.momentum == 0.5
    assert config.name == "from_file"


def test_precision_no_needs_no_quotes_in_a_file(tmp_path):
    path = write(tmp_path, "training: {precision: no}\n")
    assert load_config(path).training.precision == "no"
    assert TrainingConfig(precision="no").precision == "no"
    assert "training.precision" in message("training.precision=yes")


@pytest.mark.parametrize(
    ("override", "wrong", "near"),
    [
        ("optimizer.learning_rate=1", "'optimizer.learning_rate'", "optimizer has name, lr"),
        ("momentun=0.5", "'momentun'", "optimizer.momentum"),
        ("optimizer.momentun=0.5", "'optimizer.momentun'", "optimizer.momentum"),
        ("optimiser.lr=0.5", "'optimiser'", "optimizer"),
        ("lr=0.5", "'lr'", "optimizer.lr"),
        ("model.ltps.control_point=9", "'model.ltps.control_point'", "model.ltps.control_points"),
        ("data.augmentation.rotate=3", "'data.augmentation.rotate'", "data.augmentation.rotation"),
    ],
)
def test_an_unknown_key_is_named_with_a_known_one_like_it(override, wrong, near):
    told = message(override)
    assert f"unknown key {wrong}" in told and COMMAND_LINE in told
    assert near in told.partition(wrong)[2]
    assert "\n" not in told


def test_an_unknown_key_of_a_file_is_told_with_the_file(tmp_path):
    path = write(tmp_path, "training:\n  epoch: 3\n")
    told = message(path=path)
    assert "'training.epoch'" in told and "training.epochs" in told and str(path) in told


def test_a_key_that_is_like_none_is_told_what_there_is():
    told = message("schedule.qqqqqq=1")
    for name in ("warmup", "minimum", "step"):
        assert name in told


@pytest.mark.parametrize(
    ("override", "key", "came"),
    [
        ("optimizer.lr=fast", "optimizer.lr", "'fast'"),
        ("optimizer.lr=-1", "optimizer.lr", "-1"),
        ("optimizer.lr=.nan", "optimizer.lr", "nan"),
        ("optimizer.name=lion", "optimizer.name", "'lion'"),
        ("training.iterations=2.5", "training.iterations", "2.5"),
        ("data.image_size=[1,2,3]", "data.image_size", "[1, 2, 3]"),
        ("model.ltps.layers=some", "model.ltps.layers", "'some'"),
        ("model.ltps.control_points=5", "model.ltps.control_points", "5"),
        ("model.ltps.points_per_image=4", "model.ltps.points_per_image", "4"),
        ("model.losses.deformation_warmup=-1", "model.losses.deformation_warmup", "-1"),
        ("model.losses.deformation_warmup=.inf", "model.losses.deformation_warmup", "inf"),
        ("model.dam.enabled=perhaps", "model.dam.enabled", "'perhaps'"),
        ("kernels=fortran", "kernels", "'fortran'"),
        ("seed=-1", "seed", "-1"),
        ("optimizer=3", "optimizer", "3"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_its_key(override, key, came):
    told = message(override)
    assert f"{key}: " in told and came in told and COMMAND_LINE in told
    assert "\n" not in told and "pydantic" not in told


def test_a_weight_of_0_cannot_rise():
    told = message("model.losses.deformation=0", "model.losses.deformation_warmup=0.5")
    assert "model.losses" in told and "deformation_warmup is 0.5" in told
    assert "give deformation a weight, as the default 0.5, or set deformation_warmup to 0" in told


def test_all_faults_are_told_at_once():
    told = message("optimizer.lr=fast", "seed=x")
    assert "optimizer.lr" in told and "seed" in told


@pytest.mark.parametrize("text", ["optimizer.lr", "=3", "optimizer..lr=3", "optimizer.lr =3", ""])
def test_an_override_of_another_form_is_refused(text):
    assert repr(text) in message(text)


def test_an_override_that_is_not_yaml_is_refused():
    told = message("model.ltps.layers=[1,")
    assert "model.ltps.layers=[1," in told and "not YAML" in told and "\n" not in told


def test_files_that_are_no_configuration_are_refused(tmp_path):
    assert "does not exist" in message(path=tmp_path / "none.yaml")
    assert "cannot be read" in message(path=tmp_path)
    assert "list" in message(path=write(tmp_path, "- 1\n- 2\n"))
    assert "not YAML" in message(path=write(tmp_path, "a: [1\n"))
    assert load_config(write(tmp_path, "")) == Config()


def test_one_image_size_gives_the_other():
    size = (64, 32)
    for given in ("model", "data"):
        config = load_config(None, [f"{given}.image_size=[64,32]"])
        assert config.model.image_size == config.data.image_size == size
    told = message("model.image_size=[64,32]", "data.image_size=[128,64]")
    assert "[64, 32]" in told and "[128, 64]" in told


def test_a_run_has_one_length():
    assert "exactly one of epochs" in message("training.iterations=5")
    assert "exactly one of epochs" in message("training.epochs=null")
    config = load_config(None, ["training.epochs=null", "training.iterations=5"])
    assert (config.training.epochs, config.training.iterations) == (None, 5)


def test_what_the_best_weights_are_chosen_on_must_exist():
    assert "'everything'" in message("training.select_on=everything")
    assert "data.validation_fraction" in message("training.select_on=validation")
    config = load_config(None, ["training.select_on=validation", "data.validation_fraction=0.1"])
    assert config.training.select_on == "validation"


def test_a_saved_configuration_reads_back_equal(tmp_path):
    config = load_config(
        CONFIGS / "demo.yaml", ["model.ltps.layers=[1,2]", "output=a/b", "training.precision=no"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    document = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert document["optimizer"]["name"] == "adamw"
    # Resolved: what was left to the defaults is written too.
    assert document["training"]["select_by"] == "metric"


def test_every_known_key_can_be_named():
    keys = list(known_keys())
    assert len(keys) == len(set(keys)) > 60
    for key in ("seed", "optimizer.lr", "model.ltps.eta", "data.augmentation.flip"):
        assert key in keys


def test_a_section_alone_is_read_from_its_own_keys():
    config = validate_section(SyntheticConfig, ["train_identities=3", "image_size=[64,32]"])
    assert (config.train_identities, config.image_size) == (3, (64, 32))
    with pytest.raises(ConfigError, match=r"unknown key 'train_identites'.*train_identities"):
        validate_section(SyntheticConfig, ["train_identites=3"])
    with pytest.raises(ConfigError, match=r"night_share: .*2"):
        validate_section(SyntheticConfig, ["night_share=2"])


def read(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml")


def test_every_file_of_configs_loads():
    files = sorted(set(CONFIGS.rglob("*.yaml")) - set(CONFIGS.glob("study_*.yaml")))
    assert {"cargo", "cargo_published", "vdt", "demo"} <= {path.stem for path in files}
    for path in files:
        config = load_config(path)
        assert config.model.image_size == config.data.image_size, path


def test_cargo_is_the_loss_of_the_paper_chosen_on_held_out_people():
    config = read("cargo")
    assert config.model.losses.deformation == 0.5
    assert config.model.losses.mask == 10.0
    assert config.model.heads.published_double_pass is False
    assert config.model.ltps_layers == tuple(range(12))
    assert config.model.dam.enabled
    assert config.training.select_on == "validation"
    assert config.data.validation_fraction > 0
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 0.008)
    assert config.schedule.warmup == 2000


def test_cargo_published_leaves_the_deformation_out_and_runs_the_identity_head_twice():
    config = read("cargo_published")
    assert config.model.losses.deformation == 0.0
    assert config.model.heads.published_double_pass is True
    assert config.training.select_on == "all"
    assert config.data.singletons == "keep"
    assert config.data.validation_fraction == 0.0


def test_vdt_differs_from_cargo_in_having_neither_ltps_nor_dam():
    config, cargo = read("vdt"), read("cargo")
    assert config.model.ltps_layers == ()
    assert config.model.dam.enabled is False
    assert config.optimizer == cargo.optimizer
    assert config.schedule == cargo.schedule
    assert config.data == cargo.data


def test_demo_is_small_and_runs_on_a_cpu():
    config = read("demo")
    assert config.model.pretrained is None
    assert config.model.width <= 192 and config.model.depth <= 4
    assert config.training.precision == "no"
    assert config.training.iterations is not None
