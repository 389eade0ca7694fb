"""What a run comes to, from the artifacts of its stages."""

import json

from flows.summary import summarise
from infra.artifacts import Artifact


class Folders:
    """A store whose artifacts lie in folders of their names."""

    def __init__(self, root) -> None:
        self.root = root

    def local(self, artifact: Artifact):
        return self.root / artifact.stage


def test_scores_are_those_of_prompts_else_distances_to_held_out_pictures(tmp_path) -> None:
    made = {}
    for name, file in (("distribution", "distribution.json"), ("evaluate", "scores.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps({"scores": {"sft": {name: {"value": 1.0}}}}))
        made[name] = Artifact(kind="scores", uri="x", digest=name, stage=name)
    assert summarise(Folders(tmp_path), {})["scores"] == {}
    assert summarise(Folders(tmp_path), {"distribution": made["distribution"]})["scores"]["sft"].keys() == {
        "distribution"
    }
    assert summarise(Folders(tmp_path), made)["scores"]["sft"].keys() == {"evaluate"}
