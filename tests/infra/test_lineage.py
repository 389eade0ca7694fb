from collections.abc import Callable

import pytest

from infra.artifacts import Artifact
from infra.errors import ArtifactCorrupted, ConfigError
from infra.lineage import Graph, key_of
from infra.storage import Store, open_store


def artifact(stage: str, **inputs: Artifact) -> Artifact:
    digest = f"{abs(hash(stage)):x}".zfill(16) * 4
    facts = {"inputs": {role: each.digest for role, each in inputs.items()}}
    parents = tuple(each.digest for each in inputs.values())
    return Artifact(
        kind="checkpoint", uri=f"file:///r/{stage}/{digest}", digest=digest, stage=stage, parents=parents, facts=facts
    )


def names(artifacts: list[Artifact]) -> list[str]:
    return [each.stage for each in artifacts]


def test_ancestors_and_descendants_of_a_diamond_with_a_stranger():
    a = artifact("a")
    b, c = artifact("b", x=a), artifact("c", x=a)
    d, other = artifact("d", left=b, right=c), artifact("other")
    graph = Graph([d, other, c, b, a])  # any order

    back = names(graph.ancestors(d))
    assert sorted(back) == ["a", "b", "c", "d"]
    assert back[0] == "a"
    assert back[-1] == "d"
    forward = {each.stage: sorted(hit) for each, hit in graph.descendants([b.digest])}
    assert forward == {"d": ["left"]}


def test_a_chain_of_thousands_needs_no_recursion():
    chain = [artifact("n0")]
    for number in range(1, 3000):
        chain.append(artifact(f"n{number}", init=chain[-1]))
    graph = Graph(chain)
    assert len(graph.ancestors(chain[-1])) == 3000
    assert len(graph.descendants([chain[0].digest])) == 2999


def test_a_filter_that_changed_nothing_has_its_own_bytes_as_its_input():
    source = artifact("source")
    first = artifact("first", rows=source).model_copy(update={"digest": "d" * 64})
    same = artifact("same", rows=first).model_copy(update={"digest": "d" * 64})
    changed = artifact("changed", rows=same)
    back = artifact("back", rows=changed).model_copy(update={"digest": "d" * 64})
    made = [source, first, same, changed, back, artifact("last", rows=back)]
    dated = [each.model_copy(update={"facts": each.facts | {"finished": f"2026-01-0{day}"}})
             for day, each in enumerate(made, 1)]  # fmt: skip
    steps = names(Graph(dated[::-1]).ancestors(dated[-1]))
    assert steps == ["source", "first", "same", "changed", "back", "last"]
    assert names([each for each, _ in Graph(dated).descendants([source.digest])]) == ["first", "changed", "last"]
    assert Graph(dated).by_digest["d" * 64].stage == "back"


def test_an_input_that_was_collected_is_passed_over():
    gone = artifact("gone")
    kept = artifact("kept", data=gone)
    assert Graph([kept]).inputs(kept) == {}
    assert names(Graph([kept]).ancestors(kept)) == ["kept"]


def test_a_prefix_names_one_artifact_or_is_refused():
    first = artifact("first")
    twin = first.model_copy(update={"stage": "twin", "digest": first.digest[:40] + "0" * 24, "uri": "file:///r/twin/k"})
    graph = Graph([first, twin])
    assert graph.named(first.digest) == first
    assert graph.named(first.digest[:5]) is None  # too short to mean a digest
    with pytest.raises(ConfigError, match="begins 2 digests"):
        graph.named(first.digest[:12])


def test_key_and_single_files_on_disk_and_in_s3(store: Store, commit: Callable[..., Artifact]):
    made = commit(store, key="k" * 64, a=b"alpha")
    assert key_of(made) == "k" * 64
    assert [entry.path for entry in store.listing(made)] == ["a", "inner/c.bin"]
    assert store.read(made, "a") == b"alpha"
    with pytest.raises(ConfigError, match="has no file b; it has a, inner/c.bin"):
        store.read(made, "b")


def test_a_damaged_single_file_is_refused(tmp_path, commit: Callable[..., Artifact]):
    store = open_store(tmp_path / "root")
    made = commit(store, key="k" * 64, a=b"alpha")
    (tmp_path / "root" / "encode" / ("k" * 64) / "a").write_bytes(b"alphA")
    with pytest.raises(ArtifactCorrupted, match="a is missing or damaged"):
        store.read(made, "a")
