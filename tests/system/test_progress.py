"""What a person sees of a run, also where it goes into a pipe."""

from __future__ import annotations

from cdpo.system.progress import summary_table


def test_a_path_in_a_pipe_is_one_word(capsys):
    path = "outputs/" + "a-long-name/" * 20
    summary_table({"directory": path, "loss": 0.123456, "gap": None}, title="run")
    text = capsys.readouterr().out
    assert path in text
    assert "0.1235" in text
    assert max(map(len, text.splitlines())) < len(path) + 30
