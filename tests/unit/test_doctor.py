"""`doctor` says what is there and what is broken, and exits accordingly; the hub is only knocked at."""

import re
import socket
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from command_line import call
from spectrim import doctor
from spectrim.integrations import exporters
from spectrim.machine import Rates

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package(line: str) -> str:
    return re.split(r"[^\w]", line)[0]


RATES = Rates(
    device="cpu", computing_dtype="float32", products=1e10, full_products=1e10, copied=1e10, softmax=1e9, eigen=1e-9
)


@pytest.fixture(autouse=True)
def _quick() -> Any:
    with mock.patch.object(doctor, "measure_rates", return_value=RATES):
        yield


def test_a_sound_machine(tmp_path: Path) -> None:
    answer = call("doctor", "--json", "--no-hub", "--folder", tmp_path)
    assert answer.code == 0, answer.err
    found = answer.json
    assert found["broken"] == []
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["disk"]["free"] > 0
    assert found["memory"]["total"] >= found["memory"]["available"] > 0
    assert set(found["extras"]) == set(PROJECT["project"]["optional-dependencies"]) - {"dev", "docs"}
    assert found["hub"] == {"looked": False}
    shown = call("doctor", "--no-hub", "--folder", tmp_path)
    assert "nothing that is needed is broken" in shown.out
    assert "10 Gflop/s in float32" in shown.out


def test_what_is_needed_and_missing_is_named_and_exits_4(tmp_path: Path) -> None:
    with mock.patch.object(doctor, "needed_packages", return_value=["torch", "no-such-package"]):
        answer = call("doctor", "--no-hub", "--folder", tmp_path)
    assert answer.code == 4
    assert "BROKEN: package no-such-package is missing" in answer.out


def test_a_folder_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    answer = call("doctor", "--no-hub", "--json", "--folder", tmp_path / "none")
    assert answer.code == 4
    assert "cannot be written to" in answer.json["broken"][0]


def test_a_wrong_product_is_broken() -> None:
    broken: list[str] = []
    doctor.check_product(torch.device("cpu"), broken)
    assert broken == []
    with mock.patch.object(torch, "equal", return_value=False):
        doctor.check_product(torch.device("cpu"), broken)
    assert "wrong product" in broken[0]


def test_the_hub_is_knocked_at_and_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example:81")
    with mock.patch.object(socket, "create_connection", side_effect=OSError("no route")) as knock:
        found = doctor.look_at_hub()
    assert knock.call_args.args == (("hub.example", 81),)
    assert found == {"looked": True, "reachable": False, "why": "offline: no route"}
    with mock.patch.object(socket, "create_connection"):
        assert doctor.look_at_hub()["reachable"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.look_at_hub()["why"] == "HF_HUB_OFFLINE is set"


def test_dependencies_are_those_of_the_package() -> None:
    given = ["torch>=2.4", "lm_eval>=0.4; extra == 'eval'", "rich (>=13)"]
    with mock.patch.object(doctor, "requires", return_value=given):
        assert doctor.needed_packages() == ["torch", "rich"]


# ---- what is installed and packed


@pytest.mark.parametrize("extra", doctor.EXTRAS)
def test_an_extra_brings_the_modules_that_are_looked_for(extra: str) -> None:
    base = {package(line) for line in PROJECT["project"]["dependencies"]}
    brought = {package(line): line for line in PROJECT["project"]["optional-dependencies"][extra]}
    assert set(doctor.EXTRAS[extra][0]) == set(brought) - base
    newer = [line for name, line in brought.items() if name in base]  # than the base install asks for
    told = ["transformers>=" + ".".join(map(str, exporters.FIRST))] if extra in doctor.THROUGH_EXPORTERS else []
    assert newer == told


@pytest.mark.parametrize("extra", doctor.THROUGH_EXPORTERS)
def test_a_transformers_older_than_an_extra_needs_is_told(extra: str) -> None:
    with (
        mock.patch.object(exporters, "version", return_value="5.13.1"),
        mock.patch.object(exporters, "find_spec", return_value=object()),
    ):
        answer = call("doctor", "--no-hub")
    needs = f"extra {extra}: transformers>=5.14 (5.13.1 is installed) missing (pip install 'spectrim[{extra}]')"
    assert needs in answer.out
    assert answer.code == 0  # an extra is not needed


def test_every_constraint_is_there_once() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    names = [line.split("==")[0] for line in lines if line and not line.startswith("#")]
    assert len(names) > 10
    assert sorted(set(names)) == sorted(names)


def test_all_that_the_source_archive_names_is_there() -> None:
    named = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert "src" in named
    assert [name for name in named if not (ROOT / name).exists()] == []
