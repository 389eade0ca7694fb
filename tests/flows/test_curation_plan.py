"""Which curation stages a configuration asks for, and what each reads."""

from data_curation.config import CURATION, DataConfig
from flows.config import LifecycleConfig
from flows.dag import curation, stage_specs
from tasks.catalog import stage_function

ASKED = {
    "captions": {}, "redecide": {}, "decontaminate": {"held_out_scenes": True}, "semantic": {}, "safety": {},
    "aesthetic": {"head": {"path": "head.safetensors"}}, "recaption": {},
}  # fmt: skip


def test_further_stages_are_there_only_when_asked_for() -> None:
    usual = [spec.name for spec in curation(DataConfig())]
    assert usual == ["source", "download", "dedup", "quality", "buckets", "encode"]
    specs = {spec.name: spec for spec in curation(DataConfig.model_validate(ASKED))}
    assert list(specs) == [*usual[:4], *ASKED, *usual[4:]]
    read = [specs[name].inputs["rows"] for name in (*ASKED, "buckets")]
    assert read == ["quality", *ASKED]  # each goes on from the one before
    assert [name for name in specs if name in CURATION] == list(CURATION)
    for spec in specs.values():
        function = stage_function(spec.function)
        function.config.model_validate(spec.config)
        assert callable(function.run)


def test_the_report_reads_every_stage_of_curation() -> None:
    data = DataConfig.model_validate(ASKED)
    report = {spec.name: spec for spec in stage_specs(LifecycleConfig(data=data))}["report"]
    assert set(CURATION) <= set(report.inputs)
    usual = {spec.name: spec for spec in stage_specs(LifecycleConfig())}["report"]
    assert not set(ASKED) & set(usual.inputs)
