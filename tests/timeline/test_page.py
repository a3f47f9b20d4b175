"""The page in a real browser: it draws, finds, zooms and pins without a script error."""

import random
import re
import shutil
import subprocess

import pytest

from toolkit.timeline import Counter, Span, Timeline, html

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no Chromium to open the page in (looked for {', '.join(NAMES)})"
)

# Runs after the page's own script; what it finds is left on the root element.
HARNESS = """
<script>
const frame = document.querySelector(".frame");
const area = frame.querySelector("canvas").getBoundingClientRect();
const press = key => frame.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const point = (type, x, y) => frame.dispatchEvent(new PointerEvent(
  type, { clientX: area.left + x, clientY: area.top + y, button: 0, bubbles: true }));
// What the browser would do before the next frame, whose time a busy machine does not promise.
const settle = () => plots.forEach(plot => { plot.resize(); plot.paint(); });
const say = (key, value) => { document.documentElement.dataset[key] = value; };
try { %s } catch (error) { say("error", "harness: " + error); }
</script>
"""


def open_page(timelines, tmp_path, script="", **settings):
    """Return the document after the page and `script` have run."""
    page = tmp_path / "page.html"
    html.write(timelines, page, **settings)
    text = page.read_text("utf-8")
    page.write_text(text.replace("</body>", HARNESS % script + "</body>"), "utf-8")
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1600",
            "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "data-error" not in done.stdout.split("<body", 1)[0], done.stdout[:400]
    return done.stdout


def found(document, key):
    return re.findall(rf'data-{key}="([^"]*)"', document)


def test_every_span_is_drawn_and_no_script_fails(step, tmp_path):
    document = open_page([step, Timeline("empty")], tmp_path)
    assert found(document, "drawn") == [str(len(step.spans)), "0"]


def test_twenty_thousand_spans(tmp_path):
    draw = random.Random(0)
    spans = []
    for at in range(20_000):
        start_s = at * 1e-3 + draw.random() * 1e-3
        spans.append(
            Span(
                f"request {at}", f"device {at % 3}", start_s, start_s + draw.expovariate(200),
                group=draw.choice(("prefill", "decode")),
            )
        )  # fmt: skip
    document = open_page(Timeline("serving", tuple(spans)), tmp_path)
    assert found(document, "drawn") == ["20000"]


def test_many_tracks_scroll_within_the_frame(tmp_path):
    spans = tuple(Span("s", f"rank {at}", 0, 1) for at in range(300))
    script = """
    settle();
    say("fits", plots[0].wide === frame.clientWidth);
    frame.scrollTop = 1e6; settle(); press("0");
    say("last", plots[0].rows.at(-1).y - frame.scrollTop < plots[0].high);
    """
    document = open_page(Timeline("many", spans), tmp_path, script)
    assert found(document, "fits") == found(document, "last") == ["true"]
    assert 0 < int(found(document, "drawn")[0]) < 300


def test_a_name_that_ends_a_script_stays_a_name(tmp_path):
    name = "</script><script>document.documentElement.dataset.error='ran'</script>"
    span = Span(name, name, 0, 1, group=name, detail={name: name})
    script = 'press("n"); say("card", document.querySelector(".pinned").textContent);'
    counter = Counter(name, ((0, 1),), unit=name)
    document = open_page(Timeline(name, (span,), (counter,)), tmp_path, script)
    assert found(document, "card")[0].count("ran") >= 3


def test_keys_zoom_pan_and_reset(step, tmp_path):
    script = """
    const range = () => plots[0].to - plots[0].from, whole = range();
    press("+"); say("zoomed", range() / whole);
    const before = plots[0].from; press("ArrowRight"); say("panned", plots[0].from > before);
    press("-"); press("-"); say("back", range() / whole);
    press("+"); press("0"); say("reset", plots[0].from === 0 && range() === whole);
    """
    document = open_page(step, tmp_path, script)
    assert found(document, "zoomed") == ["0.5"]
    assert found(document, "panned") == ["true"]
    assert found(document, "back") == ["1"]
    assert found(document, "reset") == ["true"]


def test_wheel_zooms_at_the_pointer_only_when_asked_for(step, tmp_path):
    script = """
    const range = () => plots[0].to - plots[0].from, whole = range();
    const wheel = more => frame.dispatchEvent(new WheelEvent("wheel", Object.assign(
      { deltaY: -100, clientX: area.left + 700, clientY: area.top + 60, cancelable: true }, more)));
    wheel({}); say("unfocused", range() === whole);
    const at = plots[0].ns(700); wheel({ ctrlKey: true });
    say("zoomed", range() < whole); say("still", Math.abs(plots[0].x(at) - 700) < 1);
    """
    document = open_page(step, tmp_path, script)
    assert found(document, "unfocused") == found(document, "zoomed") == ["true"]
    assert found(document, "still") == ["true"]


def test_dragging_the_ruler_zooms_to_what_was_dragged_over(step, tmp_path):
    script = """
    const from = plots[0].ns(400), to = plots[0].ns(600);
    point("pointerdown", 400, 15); point("pointermove", 500, 15); point("pointermove", 600, 15);
    point("pointerup", 600, 15);
    say("chosen", Math.abs(plots[0].from - from) < 1 && Math.abs(plots[0].to - to) < 1);
    """
    assert found(open_page(step, tmp_path, script), "chosen") == ["true"]


def test_hovering_tells_and_clicking_pins(step, tmp_path):
    script = """
    const first = plots[0].rows[1], x = plots[0].x(1e6), y = 34 + first.y + 8;
    point("pointermove", x, y);
    say("tip", document.getElementById("tip").innerText);
    point("pointerdown", x, y); point("pointerup", x, y); settle();
    """
    document = open_page(step, tmp_path, script)
    (tip,) = found(document, "tip")
    assert tip.startswith("F0")
    assert "rank 0 · measured" in tip
    assert "predicted duration" in tip
    assert "microbatch" in tip
    assert found(document, "pinned") == ["F0"]


def test_names_too_long_for_the_picture_are_told_whole(tmp_path):
    name = "a track whose name does not fit beside the picture"
    script = """
    point("pointermove", 20, 50); say("tip", document.getElementById("tip").innerText);
    """
    document = open_page(Timeline("t", (Span("s", name, 0, 1),)), tmp_path, script)
    assert name in found(document, "tip")[0]


def test_filtering_counts_and_steps_through_what_it_keeps(step, tmp_path):
    script = """
    const filter = document.getElementById("filter");
    filter.value = "B2"; filter.dispatchEvent(new Event("input"));
    say("kept", document.getElementById("found").textContent);
    press("n"); press("n"); settle();
    """
    document = open_page(step, tmp_path, script)
    assert found(document, "kept") == [f"4 of {len(step.spans)} match"]
    assert found(document, "pinned") == ["B2"]


def test_both_schemes_paint_differently(step, tmp_path):
    script = """
    const corner = scheme => {
      say("theme", scheme); readTheme(); settle();
      return plots[0].canvas.getContext("2d").getImageData(2, 60, 1, 1).data[0];
    };
    say("light", corner("light") > 200); say("dark", corner("dark") < 60);
    """
    document = open_page(step, tmp_path, script)
    assert found(document, "light") == found(document, "dark") == ["true"]
