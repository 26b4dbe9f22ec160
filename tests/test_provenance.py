import subprocess

import pytest
import torch

from msv.provenance import commit, environment, in_history, names_code


def test_environment():
    env = environment("cpu")
    assert list(env) == ["device", "cpu", "threads", "torch", "lightning", "triton", "timm", "msv", "python", "commit"]
    assert env["device"]
    assert env["device"] == env["cpu"]
    assert env["threads"] == torch.get_num_threads()
    assert env["torch"]


def git(root, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.delenv("MSV_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("/results/*\n!/results/measured/\n*.log\n")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_commit_of_a_clean_repository(repository):
    head = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert commit(repository) == head.stdout[:12]


def test_whether_a_commit_is_in_the_history(repository, tmp_path_factory):
    first = commit(repository)
    git(repository, "checkout", "-q", "-b", "side")
    git(repository, "commit", "-q", "--allow-empty", "-m", "aside")
    aside = commit(repository)
    git(repository, "checkout", "-q", "-")
    assert in_history(first, repository) is True
    assert in_history(aside, repository) is False
    assert in_history("0123456789ab", repository) is False
    assert in_history(first, tmp_path_factory.mktemp("elsewhere")) is None


def test_results_and_ignored_files_leave_it_clean(repository):
    (repository / "results" / "measured").mkdir(parents=True)
    (repository / "results" / "measured" / "table.csv").write_text("x")
    (repository / "a.log").write_text("x")
    assert not commit(repository).endswith("+dirty")


@pytest.mark.parametrize("name", ["code.py", "new.py", "deep/results/new.py"])
def test_changed_or_new_code_is_dirty(repository, name):
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text("2")
    assert commit(repository).endswith("+dirty")


def test_a_hook_s_variables_do_not_mislead(repository, monkeypatch):
    expected = commit(repository)
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert commit(repository) == expected


def test_commit_without_a_repository_of_its_own(repository, monkeypatch):
    inside = repository / "site-packages"
    inside.mkdir()
    assert commit(inside) == "unknown"
    monkeypatch.setenv("MSV_COMMIT", "abc")
    assert commit(inside) == "abc"
    assert commit(repository / "not there") == "abc"


def test_which_commits_say_what_ran():
    assert names_code("0123456789ab")
    for other in ("", "unknown", "0123456789ab+dirty"):
        assert not names_code(other)
