"""Configuration: strict reading, overrides, suggestions, and a digest of what changes results only."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from infra.config import Config, canonical_json, digest_of, load_yaml, parse, versioned
from infra.errors import ConfigError


class Kind(Enum):
    FAST = "fast"


class Adam(Config):
    name: Literal["adam"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)


class Muon(Config):
    name: Literal["muon"] = "muon"
    momentum: float = 0.95


class Phase(Config):
    steps: int = Field(default=10, ge=1)
    optimizer: Annotated[Adam | Muon, Field(discriminator="name")] = Adam()
    workers: int = Field(default=1, json_schema_extra={"versioned": False})


class Whole(Config):
    phases: list[Phase] = Field(default=[Phase()])
    folder: Path = Path("a/b")
    kind: Kind = Kind.FAST
    note: str | None = None


def test_versioned_leaves_out_what_does_not_change_results_at_any_depth() -> None:
    one, two = Whole(phases=[Phase(workers=1)]), Whole(phases=[Phase(workers=9)])
    assert versioned(one) == versioned(two)
    assert versioned(one)["phases"] == [{"steps": 10, "optimizer": {"name": "adam", "learning_rate": 1e-3}}]
    assert digest_of(versioned(one)) != digest_of(versioned(Whole(phases=[Phase(steps=11)])))


def test_canonical_json_is_one_text_per_value() -> None:
    assert canonical_json({"b": 0.1, "a": [1, "é"]}) == '{"a":[1,"é"],"b":0.1}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))


def test_overrides_reach_into_lists_and_take_yaml_values(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("phases:\n  - {steps: 5}\n  - {steps: 6}\n")
    data = load_yaml(path, ["phases.1.steps=7", "phases.0.optimizer={name: muon}", "note=null", "new.deep=1e-3"])
    assert data == {
        "phases": [{"steps": 5, "optimizer": {"name": "muon"}}, {"steps": 7}],
        "note": None,
        "new": {"deep": 0.001},
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("phases.2.steps=1", "index from 0 to 0"),
        ("phases.first=1", "must be an index"),
        ("phases", "key.key=value"),
        ("note.x=1", "has no 'x' inside"),
        ("note=[1", "not valid YAML"),
    ],
)
def test_bad_override_is_named(tmp_path: Path, override: str, says: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("phases: [{steps: 5}]\nnote: text\n")
    with pytest.raises(ConfigError, match=says):
        load_yaml(path, [override])


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(ConfigError, match="did you mean .*demo.yaml"):
        load_yaml(tmp_path / "dmeo.yaml")
    with pytest.raises(ConfigError, match="'a' is given twice.*line 2"):
        load_yaml(tmp_path / "demo.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_yaml(tmp_path / "list.yaml")
    (tmp_path / "evil.yaml").write_text("a: !!python/object/apply:os.system [ls]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_yaml(tmp_path / "evil.yaml")


def test_a_file_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: {x: 1, y: [1, 2]}\nb: {z: 1}\nc: 3\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\na: {y: [3]}\nb: null\nd: 4\n")
    assert load_yaml(tmp_path / "own.yaml", ["a.x=5"]) == {"a": {"x": 5, "y": [3]}, "b": None, "c": 3, "d": 4}
    (tmp_path / "base.yaml").write_text("extends: own.yaml\n")
    with pytest.raises(ConfigError, match=r"extends itself \(own.yaml -> base.yaml\)"):
        load_yaml(tmp_path / "own.yaml")
    (tmp_path / "base.yaml").write_text("extends: [1]\n")
    with pytest.raises(ConfigError, match=r"base.yaml: extends is \[1\]; give the name of a YAML file"):
        load_yaml(tmp_path / "base.yaml")
    (tmp_path / "base.yaml").write_text("extends: owm.yaml\n")
    with pytest.raises(ConfigError, match=r"owm.yaml does not exist; did you mean .*own.yaml"):
        load_yaml(tmp_path / "base.yaml")


def test_parse_names_every_mistake_with_its_path_and_suggests() -> None:
    data = {
        "phases": [{"stepz": 1}, {"steps": 0}, {"optimizer": {"name": "muon", "momentun": 1}}],
        "kindd": 1,
    }
    with pytest.raises(ConfigError) as caught:
        parse(Whole, data, "p.yaml")
    text = str(caught.value)
    assert text.startswith("p.yaml: 4 problems")
    assert "phases.0.stepz: unknown key; did you mean 'steps'?" in text
    assert "phases.1.steps = 0: input should be greater than or equal to 1" in text
    assert "momentun: unknown key; did you mean 'momentum'?" in text
    assert "kindd: unknown key; did you mean 'kind'?" in text
    assert caught.value.exit_code == 2


def test_parse_gives_the_model() -> None:
    assert parse(Whole, {"phases": [{"steps": 3}]}, "x").phases[0].steps == 3


def test_a_field_added_later_changes_no_key_while_it_is_at_its_default() -> None:
    class Before(Config):
        steps: int = 3

    class After(Before):
        extra: float | None = Field(default=None, json_schema_extra={"versioned": "if set"})

    assert digest_of(versioned(After())) == digest_of(versioned(Before()))
    assert versioned(After(extra=0.5)) == {"steps": 3, "extra": 0.5}
