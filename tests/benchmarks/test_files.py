"""The commit that results are made at, read without git."""

from benchmarks.study.files import commit


def test_the_commit_is_that_of_a_clone_and_of_a_worktree_linked_to_it(tmp_path):
    clone, linked = tmp_path / "clone", tmp_path / "linked"
    (clone / ".git" / "refs" / "heads").mkdir(parents=True)
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (clone / ".git" / "refs" / "heads" / "main").write_text("a" * 40 + "\n")
    (clone / ".git" / "packed-refs").write_text("# pack-refs\n" + "b" * 40 + " refs/heads/other\n")
    own = clone / ".git" / "worktrees" / "linked"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/other\n")
    (own / "commondir").write_text("../..\n")
    linked.mkdir()
    (linked / ".git").write_text(f"gitdir: {own}\n")
    assert (commit(clone), commit(linked)) == ("a" * 12, "b" * 12)


def test_a_copy_without_git_has_the_commit_that_its_file_names(tmp_path):
    assert commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("c" * 40)
    commit.cache_clear()
    assert commit(tmp_path) == "c" * 12
