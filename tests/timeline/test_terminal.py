import io

from rich.console import Console

from toolkit.timeline import Span, Timeline, terminal


def printed(timeline, width=72, **settings):
    console = Console(width=width, color_system=None, file=io.StringIO())
    console.print(terminal.render(timeline, **settings))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_a_step_without_colour(step):
    assert printed(step) == GOLDEN


def test_with_colour_measured_blocks_are_bright_and_predicted_ones_dark():
    timeline = Timeline(
        "t", (Span("a", "t", 0, 1, "predicted", "forward"), Span("a", "t", 0, 1, group="forward"))
    )
    console = Console(width=40, color_system="truecolor", force_terminal=True, file=io.StringIO())
    console.print(terminal.render(timeline))
    text = console.file.getvalue()
    assert "48;2;0;114;178m" in text
    assert "48;2;0;57;89m" in text


def test_spans_thinner_than_a_column_are_still_seen():
    timeline = Timeline("t", (Span("long", "t", 0, 1), Span("thin", "t", 2, 2.0001)))
    assert "|" in printed(timeline).splitlines()[1]


def test_what_is_left_out_is_counted():
    spans = tuple(Span("s", "t", 0, 1) for _ in range(9))
    text = printed(Timeline("t", spans), max_slots=4)
    assert "... 5 more lines, 5 spans" in text
    many = tuple(Span("s", f"track {at}", 0, 1) for at in range(9))
    assert "... 5 more tracks" in printed(Timeline("t", many), max_lines=4)


def test_narrow_terminals_and_odd_names_do_not_break_lines():
    spans = (Span("日本\n\x1b[31m", "a track with a very long name indeed", 0, 1),)
    lines = printed(Timeline("t", spans), width=50).splitlines()
    assert all(len(line) <= 50 for line in lines)
    assert "\x1b" not in "".join(lines)


def test_empty_timelines_say_so():
    assert printed(Timeline("nothing")) == "nothing\nno spans"


def test_instants_alone_do_not_divide_by_zero():
    assert "t" in printed(Timeline("t", (Span("now", "t", 5, 5),)))


GOLDEN = """\
one step
rank 0      predicted  F0=F1=     B0~~~~F2=B1~~~F3=B2~~~~   B3~~~
            measured   F0==F1=      B0~~~~~F2=B1~~~~F3==B2~~~~~   B3~~~~
rank 1      predicted     F0=B0~~~F1=B1~~~~F2=B2~~~F3=B3~~~~
            measured       F0=B0~~~~F1=B1~~~~ F2=B2~~~~~F3=B3~~~~~
activations measured   ▃▃▃▃▃▃▃▃▃▃▃▃▃▃███████████████▅▅▅▅▅▅▅▅▅▅▅ max 4 GB
                       |0 ms         |20 ms        |40 ms        |60 ms
== forward   ~~ backward
predicted 60 ms, measured 69.4 ms (+15.7%)"""
