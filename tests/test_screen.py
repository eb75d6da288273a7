import pytest

from memloc import screen, sweeps

STATUS = sweeps.Status(3, [("good_bad_ugly", "node-1.example.org", 60.0)], 0, 20, 3600.0)


@pytest.mark.parametrize(
    ("size_bytes", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2.5e9, "2.5 GB"), (3e13, "30000.0 GB")]
)
def test_sizes(size_bytes, words):
    assert screen.size(size_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172800, "2 days")],
)
def test_durations(seconds, words):
    assert screen.duration(seconds) == words


def test_columns_of_a_table_stand_below_each_other_and_rows_end_with_their_words(capsys):
    screen.print_table([("a", "long word", ""), ("bcd", "x", "y")])
    assert capsys.readouterr().out == "a    long word\nbcd  x          y\n"


def test_lines_of_progress_fit_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = screen.Progress()
    for _ in range(2):
        progress.show(STATUS)
    lines = capsys.readouterr().err.split("\033[2A")[1].split("\033[K\n")
    assert [line.lstrip("\r") for line in lines[:2]] == ["3 done, 1 running, 0 fa", "  good_bad_ugly on node"]


def test_where_there_is_no_terminal_a_line_comes_at_most_every_ten_seconds(monkeypatch, capsys):
    clock, line, progress = {}, screen.Line(), screen.Progress()
    monkeypatch.setattr("time.monotonic", lambda: clock["now"])
    for clock["now"] in (100, 109, 110):
        line.show(f"at {clock['now']}")
    line.end()
    assert capsys.readouterr().err == "at 100\nat 110\n"
    for clock["now"] in (200, 201):
        progress.show(STATUS)
    progress.end()
    assert capsys.readouterr().err == "3 done, 1 running, 0 failed, 20 waiting, about 60 min left\n"


def test_a_line_on_a_terminal_is_written_over_itself_and_taken_away(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    line = screen.Line()
    line.show("epoch 1")
    line.show("epoch 2")
    line.end()
    assert capsys.readouterr().err == "\repoch 1\033[K\repoch 2\033[K\r\033[K"
