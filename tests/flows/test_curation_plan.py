"""Which curation stages a configuration asks for, and what each reads."""

from data_curation.config import DataConfig
from flows.dag import curation
from tasks.catalog import stage_function

ASKED = {
    "captions": {}, "redecide": {}, "decontaminate": {"held_out_scenes": True}, "semantic": {}, "safety": {}, "recaption": {},
}  # fmt: skip


def test_further_stages_are_there_only_when_asked_for() -> None:
    usual = [spec.name for spec in curation(DataConfig())]
    assert usual == ["source", "download", "dedup", "quality", "buckets", "encode"]
    specs = {spec.name: spec for spec in curation(DataConfig.model_validate(ASKED))}
    assert list(specs) == [*usual[:4], *ASKED, *usual[4:]]
    read = [specs[name].inputs["rows"] for name in (*ASKED, "buckets")]
    assert read == ["quality", *ASKED]  # each goes on from the one before
    for spec in specs.values():
        function = stage_function(spec.function)
        function.config.model_validate(spec.config)
        assert callable(function.run)
