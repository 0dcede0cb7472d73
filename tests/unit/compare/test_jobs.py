import os
import signal
from pathlib import Path

import msgspec
import pytest

from exporter.compare import process
from exporter.compare.jobs import CaseResult, Job, JobCase, JobResult, run_job
from exporter.core.errors import EnvironmentLacks, InputRefused, MedexportError


def job(folder: Path, **changes: object) -> Job:
    base = Job(
        name="int4",
        role="speed",
        runtime="ort",
        model_dir=str(folder / "model"),
        model_sha256="0" * 64,
        threads=1,
        prompt="Describe.",
        max_new_tokens=4,
        cases=(JobCase("a", str(folder / "a.png"), "1" * 64),),
        folder=str(folder / "work"),
    )
    return msgspec.structs.replace(base, **changes)


def result_of(one: Job) -> JobResult:
    said = CaseResult("a", "text", [1], True, 5, 0.1, 0.2, 0.3, [])
    return JobResult(one.digest, 1.0, 1, 2, 3, True, {}, [said])


def pretend_python(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Let the worker be a shell script."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(path))


def test_a_refusal_in_the_worker_is_the_same_refusal_here(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"speed process of 'int4'.*config\.json"):
        run_job(job(tmp_path))


def test_a_killed_worker_is_named_with_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_python(monkeypatch, tmp_path, "echo loading weights >&2; kill -9 $$")
    with pytest.raises(EnvironmentLacks, match="SIGKILL; was memory short.*loading weights"):
        run_job(job(tmp_path))


def test_a_crash_shows_the_end_of_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_python(monkeypatch, tmp_path, "echo ZeroDivisionError: division by zero >&2; exit 1")
    with pytest.raises(MedexportError, match="code 1.*ZeroDivisionError"):
        run_job(job(tmp_path))


def test_success_without_a_result_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_python(monkeypatch, tmp_path, "exit 0")
    with pytest.raises(MedexportError, match="printed nothing"):
        run_job(job(tmp_path))


def test_a_finished_job_is_not_run_again_and_another_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_python(monkeypatch, tmp_path, "exit 7")
    done = job(tmp_path)
    Path(done.folder).mkdir()
    path = Path(done.folder) / "result.json"
    path.write_bytes(msgspec.json.encode(result_of(done)))
    assert run_job(done) == result_of(done)
    with pytest.raises(MedexportError, match="code 7"):
        run_job(msgspec.structs.replace(done, model_sha256="2" * 64))
    assert not path.exists()


def test_a_damaged_result_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_python(monkeypatch, tmp_path, "exit 7")
    folder = Path(job(tmp_path).folder)
    folder.mkdir()
    (folder / "result.json").write_text('{"job": ', encoding="utf-8")
    with pytest.raises(MedexportError, match="code 7"):
        run_job(job(tmp_path))


def test_progress_is_reported_and_an_interrupt_ends_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_python(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; echo a; sleep 60")

    def interrupt(done: int, total: int, what: str = "") -> None:
        assert (done, total, what) == (1, 1, "a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job(tmp_path), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)
