import pytest
import torch

from dlrm import doctor
from dlrm.doctor import Finding, check_versions, diagnose, main
from dlrm.errors import ConfigError

FITS = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": None, "fbgemm-gpu-cpu": "1.8.0"}


@pytest.mark.parametrize(
    ("change", "is_well", "words"),
    [
        ({}, True, "torch 2.13.0+cpu, torchrec 1.8.0, fbgemm-gpu-cpu 1.8.0: the pinned set"),
        ({"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None}, True, "fbgemm-gpu 1.8.0: the pinned set"),
        ({"torch": "2.14.1+cu130", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"}, True, "1.9.0: the newest set"),
        ({"torch": "2.11.0", "torchrec": "1.6.1", "fbgemm-gpu-cpu": "1.6.0"}, True, "1.6.0: the oldest set"),
        ({"torch": "2.14.0", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"}, True, "not tried. Tried: torch 2.14.1, "),
        ({"torch": "2.12.1", "torchrec": "1.7.0", "fbgemm-gpu-cpu": "1.7.0"}, True, "not tried. Tried: torch 2.14.1, "),
        ({"torch": "2.12.1"}, False, "torch 2.12 needs torchrec 1.7 and fbgemm 1.7. Remedy: pip install torch==2.13.0"),
        ({"torch": "2.14.1"}, False, "Remedy: pip install --no-deps torchrec==1.9.2 fbgemm-gpu-cpu==1.9.0"),
        ({"torchrec": "1.9.2"}, False, "Remedy: pip install --no-deps torchrec==1.8.0"),
        ({"fbgemm-gpu-cpu": "1.7.0"}, False, "Remedy: pip install --no-deps fbgemm-gpu-cpu==1.8.0"),
        (
            {"torch": "2.15.0", "torchrec": "1.9.2", "fbgemm-gpu": "1.9.0", "fbgemm-gpu-cpu": None},
            False,
            "torch 2.15 needs torchrec 1.10 and fbgemm 1.10. Remedy: pip install torch==2.14.1",
        ),
        ({"torch": "2.12.1", "torchrec": "1.9.2"}, False, "or cuda.txt), or `make setup` in a fresh checkout. Tried: "),
        ({"fbgemm-gpu": "1.8.0"}, False, "both installed"),
        ({"fbgemm-gpu-cpu": None}, False, "fbgemm-gpu-cpu (or fbgemm-gpu) not installed"),
        ({"torch": None, "torchrec": None}, False, "torch, torchrec not installed"),
    ],
)
def test_check_versions(change, is_well, words):
    finding = check_versions({**FITS, **change})
    assert (finding.name, finding.is_well) == ("versions", is_well)
    assert words in finding.text
    assert is_well or "Remedy: " in finding.text


def test_this_machine_is_well(capsys):
    names = ["python", "versions", "native parts", "kernels", "devices", "limits"]
    assert [finding.name for finding in diagnose()] == names
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines[:-1]] == ["ok  "] * 6
    assert lines[-1] == "All is well."


def test_no_native_checks_where_versions_do_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", {**FITS, "torchrec": "1.7.0"}.get)
    assert [finding.is_well for finding in diagnose()] == [True, False]
    assert main([]) == 1
    assert capsys.readouterr().out.endswith("1 of 2 checks failed.\n")


@pytest.mark.parametrize("version", [(3, 9), (3, 13)])
def test_an_unfit_python(version, monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (*version, 0, "final", 0))
    finding = diagnose()[0]
    assert (finding.name, finding.is_well) == ("python", False)
    assert "3.10 to 3.12 needed" in finding.text


@pytest.mark.parametrize(
    "error",
    [ImportError("no libfbgemm.so\nmore"), OSError("no libfbgemm.so"), RuntimeError("no libfbgemm.so"), RuntimeError()],
)
def test_a_check_that_raises_is_a_finding(error):
    def check():
        raise error

    finding = doctor._guarded("native parts", check)
    assert (finding.name, finding.is_well) == ("native parts", False)
    assert finding.text.startswith(str(error).split("\n")[0])
    assert "\n" not in finding.text
    assert "Remedy: " in finding.text


def test_a_wrong_lookup_is_told(monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    finding = doctor._guarded("native parts", doctor._check_native)
    assert not finding.is_well
    assert finding.text.startswith("FBGEMM's lookup gave [[1.0, ")


def test_a_gpu_with_the_cpu_build(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(doctor, "_version", FITS.get)
    finding = doctor._guarded("devices", doctor._check_devices)
    assert not finding.is_well
    assert finding.text.startswith("2 CUDA devices, but fbgemm-gpu-cpu is installed")


def test_report(monkeypatch, capsys):
    findings = [Finding("python", True, "3.11"), Finding("devices", False, "gone")]
    monkeypatch.setattr(doctor, "diagnose", lambda **_: findings)
    assert main([]) == 1
    assert capsys.readouterr().out == "ok    python   3.11\nFAIL  devices  gone\n1 of 2 checks failed.\n"


def test_no_gpu_beside_the_cuda_build(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", {**FITS, "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None}.get)
    monkeypatch.setattr(doctor, "_DRIVER_LIBRARY", "libno-such-driver.so.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "FAIL", "ok", "FAIL", "ok"]
    assert "libno-such-driver.so.1 of NVIDIA's driver, which is not installed. Remedy: " in lines[2]
    assert "fbgemm-gpu (CUDA) is installed, but torch finds no CUDA device. Remedy: " in lines[4]
    assert last == "2 of 6 checks failed."
    assert main(["--no_device"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "-", "ok", "-", "ok"]
    assert lines[4].endswith("left out: fbgemm-gpu (CUDA) is installed, but torch finds no CUDA device")
    assert last == "All else is well. Left out: 2 of 6 checks. Run `dlrm doctor` beside a GPU."


def test_what_fails_is_told_without_a_device_too(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_version", {**FITS, "torchrec": "1.7.0"}.get)
    assert main(["--no_device"]) == 1
    assert capsys.readouterr().out.endswith("1 of 2 checks failed.\n")


@pytest.mark.parametrize("flags", [["--fix"], ["--no_device", "--fix"]])
def test_another_flag_is_named(flags):
    with pytest.raises(ConfigError, match="--fix: not a flag"):
        main(flags)


@pytest.mark.parametrize("flags", [["-h"], ["--help"]])
def test_usage(flags, capsys):
    assert main(flags) == 0
    assert capsys.readouterr().out.startswith("usage: dlrm doctor [--no_device]\n")
