"""Stage keys follow content: what changes results changes the key, nothing else does."""

import pytest

from infra.config import versioned
from infra.errors import ConfigError
from infra.stages import Resources, StageSpec, fan_out_here, stage_key

SPEC = StageSpec(name="pretrain-32", function="pretrain", kind="checkpoint", inputs={"data": "encode"}, runs="train")


def test_key_changes_with_every_part_that_matters() -> None:
    key = stage_key(SPEC, {"data": "d1"})
    changed = [
        SPEC.model_copy(update={"version": 2}),
        SPEC.model_copy(update={"versioned": {"steps": 2}}),
        SPEC.model_copy(update={"name": "other"}),
    ]
    keys = {key, stage_key(SPEC, {"data": "d2"})} | {stage_key(spec, {"data": "d1"}) for spec in changed}
    assert len(keys) == 5 and all(len(each) == 64 for each in keys)


def test_key_ignores_unversioned_configuration_and_input_names() -> None:
    same = SPEC.model_copy(update={"config": {"workers": 9}, "inputs": {"data": "renamed"}})
    assert stage_key(SPEC, {"data": "d1"}) == stage_key(same, {"data": "d1"})


def test_key_is_the_same_in_every_process() -> None:
    assert stage_key(SPEC, {"data": "d1"}) == "1cb2034d778d9e6cc52b527dee02574bc76f53534f5623566ab2f4ba481e8a0e"


def test_missing_role_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs inputs"):
        stage_key(SPEC, {})


def test_resources_never_enter_a_key() -> None:
    assert versioned(Resources(num_workers=4)) == {}


def test_fan_out_keeps_order() -> None:
    assert fan_out_here(abs, [-2, 1, -3]) == [2, 1, 3]
