"""The report in a real browser: no errors on its console, nothing wider than a phone, its script runs, its sound loads.

Skips itself where no Chromium is installed; tests/run.sh installs it where it may.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
import soundfile

from tests.commands import done

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

PHONE = 375
PROBE = """<script>addEventListener('load', () => {
  const plot = document.querySelector('.plot'), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right, clientY: box.top}));
  document.querySelector('.theme').click();
  const audio = [...document.querySelectorAll('audio')];
  const loaded = one => new Promise(done => {
    if (one.readyState) done(one.duration);
    one.onloadedmetadata = () => done(one.duration);
    one.onerror = () => done('error ' + one.error.message);
    one.load();
  });
  Promise.all(audio.map(loaded)).then(durations => console.log('FOUND ' + JSON.stringify({
    width: document.documentElement.scrollWidth, tip: document.querySelector('.tip').textContent,
    theme: document.documentElement.dataset.theme, durations})));
})</script>"""
FRAME = '<iframe src="probed.html" style="width:%dpx;height:900px;border:0"></iframe>'


@pytest.fixture
def run(tmp_path):
    lines = [{"step": n, "loss": 7 - n / 100, "codebook_losses": [6.0] * 8, "grad_norm": 1.0} for n in range(1, 91)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "samples").mkdir()
    soundfile.write(tmp_path / "samples/a.wav", np.sin(np.arange(36_000) / 20) / 2, 24_000)
    words = "A sentence that is long enough to need more than one line on the screen of a phone. " * 3
    sample = {"step": 90, "prompt": 0, "name": "row 3", "text": words, "file": "samples/a.wav", "seconds": 1.5}
    (tmp_path / "samples/samples.jsonl").write_text(json.dumps(sample) + "\n")
    return tmp_path


def console(page, until: str, *options: str) -> list[str]:
    """What the browser says on its console about a page, up to the line that has `until` in it, or for 90 s.

    The clock is the real one: sound is decoded in another process, which Chromium's virtual time does not wait for.
    """
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]
    browser = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = threading.Timer(90, os.killpg, (browser.pid, signal.SIGKILL))
    end.start()
    said = []
    for line in browser.stderr:
        said += re.findall(r':CONSOLE.*?\] "(.*)", source: ', line)
        if said and until in said[-1]:
            break
    end.cancel()
    os.killpg(browser.pid, signal.SIGKILL)
    browser.communicate()
    assert said and until in said[-1], f"the page never said {until}: {said}"
    return said


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_on_a_phone(run, colours):
    done("report", run)
    (run / "probed.html").write_text((run / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    (run / "frame.html").write_text(FRAME % PHONE)
    options = ["--blink-settings=preferredColorScheme=0"] if colours == "dark" else []
    *errors, last = console(run / "frame.html", "FOUND", *options)
    assert errors == []
    found = json.loads(last.removeprefix("FOUND "))
    assert found["width"] <= PHONE, "nothing is wider than the screen"
    assert found["tip"].startswith("step 90  training  6.1"), "the exact values under the pointer"
    assert found["theme"] == {"light": "dark", "dark": "light"}[colours], "the button turns the colours round"
    assert found["durations"] == [pytest.approx(1.5, abs=0.01)], "the sound is in the page, and plays"


def test_an_error_would_be_seen(run):
    (run / "broken.html").write_text("<script>nothing.at.all()</script>")
    (error,) = console(run / "broken.html", "nothing")
    assert "nothing is not defined" in error
