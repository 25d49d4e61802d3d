"""The report in a real browser (make test-browser): opened from a file, by click and by keyboard, at two widths."""

import contextlib
import json
import pathlib
import random
import shutil
import tempfile
import threading
import time

import pytest
import report_runs as runs

from omniopd_jax import report

pytestmark = pytest.mark.browser
selenium = pytest.importorskip("selenium", reason="make test-browser installs it")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
AXE = pathlib.Path(__file__).resolve().parents[2] / ".cache" / "axe" / "package" / "axe.min.js"
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "</script><script>window.hacked = 1",
    "\u202e\u200fdlrow",
    "\x1b[31mred\x1b[0m",
    "nul \x00 nul",
    "half \ud83d pair",
    "' onmouseover='window.hacked = 1",
    "`${window.hacked = 1}`",
    "javascript:window.hacked=1",
    "@DATA@ @SCRIPT@",
    "&lt;b&gt; &amp;",
    "]]> -->",
)


@contextlib.contextmanager
def browser(width: int = 1440, height: int = 1000, *, dark: bool = False):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
            yield driver
        finally:
            driver.quit()


@pytest.fixture(scope="module", autouse=True)
def needs():
    if not (CHROMIUM and DRIVER):
        pytest.skip("make test-browser installs Chromium")


@pytest.fixture(scope="module")
def wide():
    with browser() as driver:
        yield driver


def written(folder, *run_folders) -> pathlib.Path:
    path = pathlib.Path(folder) / "page.html"
    path.write_text(report.make([str(f) for f in run_folders]), encoding="utf-8")
    return path


def opened(driver, path, hash: str = "") -> float:
    """Opens the page and waits until it can be used; milliseconds since navigation began."""
    driver.get("about:blank")
    driver.get(f"file://{path}{hash}")
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if ready := driver.execute_script("return document.documentElement.dataset.ready"):
            return float(ready)
        time.sleep(0.02)
    raise AssertionError(f"never ready: {driver.get_log('browser')}")


def errors(driver) -> list[str]:
    return [e["message"] for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def count(driver, selector: str) -> int:
    return driver.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def text(driver, selector: str) -> str:
    return driver.execute_script("return (document.querySelector(arguments[0]) || {}).textContent", selector)


def press(driver, keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(keys).perform()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return written(folder, runs.write(folder / "run"))


def test_curves_are_drawn_and_nothing_complains(wide, page):
    opened(wide, page)
    assert count(wide, "figure .plot canvas") == count(wide, "figure") >= 15
    painted = wide.execute_script("""return [...document.querySelectorAll("figure canvas")].filter((c) => {
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return d.some((v) => v > 0);
    }).length""")
    assert painted == count(wide, "figure") and errors(wide) == []
    assert "better" in text(wide, ".headline") and "37.5% to 75.0%" in text(wide, ".headline")


def test_the_axis_can_be_changed_and_is_kept_in_the_url(wide, page):
    opened(wide, page, "#x=usd")
    assert text(wide, "select[name=x] option:checked") == "dollars"
    wide.find_element("css selector", "select[name=x] option[value=teacher_tokens]").click()
    assert "x=teacher_tokens" in wide.current_url and errors(wide) == []


def test_three_audits_open_by_click_with_aligned_continuations(wide, page):
    opened(wide, page)
    seen = set()
    for i in (0, 3, 7):
        wide.find_elements("css selector", ".audit")[i].click()
        seen.add(text(wide, "#detail"))
        assert (
            count(wide, ".continuations li") >= 1 and "k_sem" in text(wide, "#detail") and "audit=" in wide.current_url
        )
    assert len(seen) == 3
    assert (
        count(wide, "#detail .chunk.chosen") == 1 and count(wide, "#detail .t") > 10 and count(wide, "#detail .h9") >= 1
    )
    assert count(wide, "#detail mark.differs") > 0


def test_three_audits_open_by_keyboard_alone(wide, page):
    opened(wide, page)
    seen = []
    for _ in range(3):
        press(wide, "j")
        seen.append(text(wide, "#detail h3") + text(wide, "#detail .facts"))
    assert len(set(seen)) == 3
    press(wide, "k")
    assert text(wide, "#detail h3") + text(wide, "#detail .facts") == seen[1]
    from selenium.webdriver.common.keys import Keys

    press(wide, Keys.ARROW_DOWN + Keys.ENTER)
    assert text(wide, "#detail h3") + text(wide, "#detail .facts") == seen[2]
    press(wide, "]]")
    assert "step=1" in wide.current_url


def test_a_chunk_in_the_answer_opens_its_own_audit(wide, page):
    opened(wide, page)
    before = text(wide, "#detail h3")
    wide.find_element("css selector", "#detail .chunk[role=button]:not(.chosen)").click()
    assert text(wide, "#detail h3") != before and count(wide, "#detail .chunk.chosen") == 1


def test_filter_sort_and_audit_come_back_from_the_url(wide, page):
    opened(wide, page, "#step=3&grade=right&sort=agreement&order=down&search=Problem%203&audit=3.s3-3.2")
    shown = [e.text for e in wide.find_elements("css selector", ".audit")]
    assert len(shown) == 2 and all("step 3" in s and "right" in s for s in shown)
    assert (
        text(wide, "#detail h3").startswith("Step 3, token 2")
        and text(wide, "select[name=grade] option:checked") == "right"
    )
    wide.find_element("css selector", "input[name=search]").send_keys("x")
    assert count(wide, ".audit") == 0 and "search=Problem%203x" in wide.current_url


def test_a_real_run_is_drawn_opened_by_click_and_keyboard_and_restored_from_the_url(wide, runner, tmp_path):
    """Three steps of the main command on the small world, evaluated, as it wrote them."""
    small = {"num_steps": 3, "prompts_per_step": 16, "eval.num_prompts": 32, "log.tensorboard": False}
    run = runner.begin(tmp_path / "run", small).wait()
    assert run.code == 0, run.err[-2000:]
    path = written(tmp_path, run.folder)
    opened(wide, path)
    assert count(wide, "figure .plot canvas") == count(wide, "figure") >= 12 and "3 steps" in text(wide, ".headline")
    clicked = []
    for i in (0, 5, 9):
        wide.find_elements("css selector", ".audit")[i].click()
        clicked.append(text(wide, "#detail"))
        assert count(wide, ".continuations li") >= 1 and count(wide, "#detail .chunk.chosen") == 1
    pressed = []
    for _ in range(3):
        press(wide, "j")
        pressed.append(text(wide, "#detail"))
    assert len({*clicked, *pressed}) == 6
    opened(wide, path, "#step=2&grade=wrong&sort=entropy&order=down")
    shown = [e.text for e in wide.find_elements("css selector", ".audit")]
    assert shown and all("step 2" in s and "wrong" in s for s in shown)
    assert text(wide, "select[name=step] option:checked") == "2" and errors(wide) == []


@pytest.mark.parametrize("order", ["up", "down"])
@pytest.mark.parametrize("sort", ["agreement", "entropy", "length", "weight", "pi_hat", "latency", "cost", "place"])
def test_every_sort_orders_the_list(wide, page, sort, order):
    opened(wide, page, f"#step=2&sort={sort}&order={order}")
    values = wide.execute_script(f"return Browser.shown.map(SORTS.{sort}[1])")
    assert len(values) == 32 and values == sorted(values, reverse=order == "down")


def test_ranges_filter_by_agreement_entropy_and_length(wide, page):
    opened(wide, page, "#agreementFrom=0.8&entropyTo=0.5&lengthFrom=20")
    kept = "Browser.shown.every((a) => a.k_sem / a.n >= 0.8 && a.entropy <= 0.5)"
    assert wide.execute_script(f"return Browser.shown.length > 0 && {kept}")
    opened(wide, page, "#lengthFrom=25")
    assert count(wide, ".audit") == 0 and "0 audits" in text(wide, ".count")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1440, 390])
def test_no_serious_accessibility_findings_and_nothing_wider_than_the_screen(page, width, dark):
    if not AXE.is_file():
        pytest.skip("make test-browser fetches axe-core")
    with browser(width, dark=dark) as driver:
        opened(driver, page)
        # the page's policy lets no other script run; the driver's own evaluation is outside of it
        driver.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text()})
        run = "axe.run(document, {resultTypes: ['violations']}).then((r) => arguments[0](r.violations))"
        found = driver.execute_async_script(run)
        bad = [(v["id"], v["nodes"][0]["html"][:120]) for v in found if v["impact"] in ("serious", "critical")]
        assert bad == []
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script("return document.documentElement.dataset.theme") == ("dark" if dark else "light")


def test_hostile_text_everywhere_is_shown_and_runs_nothing(wide, tmp_path):
    evil = " ".join(HOSTILE)
    name = "run <img src=x onerror='window.hacked = 1'> \x1b[31m"
    cfg = runs.settings(num_steps=2)
    cfg["teacher"]["model"] = cfg["data"]["name"] = evil
    folder = runs.write(tmp_path / name, 2, 4, 1, cfg=cfg)
    texts = dict.fromkeys(("question", "answer", "chunk", "prompt_id", "prefix_end"), evil)
    texts |= {"continuations": [evil, evil + "!"], "similarity": [1.0, 0.9]}
    runs.lines(folder / "audits.jsonl", [runs.audit(t, i, **texts) for t in range(2) for i in range(4)])
    whole = {"pieces": list(HOSTILE), "entropy": [0.5] * len(HOSTILE), "tokens": len(HOSTILE), "question": evil}
    runs.lines(folder / "completions.jsonl", [runs.completion(t, 0, **whole, prompt_id=evil) for t in range(2)])
    answers = {"text": evil, "question": evil}
    runs.lines(folder / "evaluations.jsonl", [runs.evaluation(s, i, **answers) for s in (0, 2) for i in range(3)])
    path = written(tmp_path, folder)
    opened(wide, path)
    for row in wide.find_elements("css selector", ".audit")[:4]:
        row.click()
    wide.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    time.sleep(0.3)
    assert wide.execute_script("return window.hacked") is None and errors(wide) == []
    assert count(wide, "main img, main script, main iframe") == 0
    shown = text(wide, "#detail")
    visible = ("⟨U+202E⟩", "␛[31m", "nul ␀ nul", "half \ufffd pair")
    for piece in ("<script>window.hacked = 1</script>", "</script><script>", "&lt;b&gt;", *visible):
        assert piece in shown, piece
    assert "onerror=" in text(wide, "#verdict h3") and "onerror=" in wide.title


def test_a_megabyte_in_a_line_is_cut_and_counted(wide, tmp_path):
    folder = runs.write(tmp_path / "run", 2, 4, 1)
    long = {"chunk": "x" * 1_000_000, "continuations": ["y" * 1_000_000] * 4}
    runs.lines(folder / "audits.jsonl", [runs.audit(t, i, **long) for t in range(2) for i in range(4)])
    path = written(tmp_path, folder)
    assert path.stat().st_size < 500_000
    opened(wide, path)
    wide.find_elements("css selector", ".audit")[0].click()
    assert errors(wide) == [] and "characters" in text(wide, "#settings")


def test_200_steps_with_2000_audits_are_made_quickly_and_usable_within_2_seconds(wide, tmp_path):
    folder = runs.write(tmp_path / "run", 200, 0, 0, cfg=runs.settings(num_steps=200))
    rng, words = random.Random(0), [f"w{i:x}" for i in range(5_000)]
    texts = [" " + " ".join(rng.choices(words, k=50)) for _ in range(20_000)]
    audits = [
        runs.audit(t, i, chunk=rng.choice(texts), continuations=rng.choices(texts, k=10), similarity=[0.2] * 10)
        for t in range(200) for i in range(64)
    ]  # fmt: skip
    runs.lines(folder / "audits.jsonl", audits)
    pieces = [" " + w for w in words]
    whole = [runs.completion(t, r, 400, pieces=rng.sample(pieces, 400)) for t in range(200) for r in range(4)]
    runs.lines(folder / "completions.jsonl", whole)
    start = time.monotonic()
    path = written(tmp_path, folder)
    made = time.monotonic() - start
    ready = min(opened(wide, path) for _ in range(2))
    start = time.monotonic()
    wide.find_elements("css selector", ".audit")[5].click()
    assert count(wide, ".continuations li") >= 1
    clicked = time.monotonic() - start
    size = path.stat().st_size / 1e6
    print(f"made in {made:.1f} s, {size:.2f} MB, usable after {ready:.0f} ms, a click {1000 * clicked:.0f} ms")
    shown = int(text(wide, ".count").split()[0].replace(",", ""))
    assert path.stat().st_size <= 5_000_000 and 1_000 < shown <= 2_000
    assert f"{12_800 - shown:,} audits" in text(wide, "#settings")
    assert made < 20 and ready < 2000, "about 4 times what two busy cores need"


def test_two_runs_are_laid_over_each_other_and_their_settings_listed(wide, tmp_path):
    a = runs.write(tmp_path / "first")
    cut = [runs.row(t, **{"completions/truncated_fraction": 0.9}) for t in range(10)]
    b = runs.write(tmp_path / "second", 10, cfg=runs.settings(**{"optimizer.learning_rate": 5e-4}), rows=cut)
    opened(wide, written(tmp_path, a, b))
    assert count(wide, "#verdict .card") == 2 and "optimizer.learning_rate" in text(wide, "#settings table")
    assert "first, k_sem" in text(wide, "#curves") and "second, k_sem" in text(wide, "#curves")
    assert "second: truncation" in text(wide, "#health")
    lengths = "[...document.querySelectorAll('#curves figure')].find((f) => f.textContent.includes('Response length'))"
    shown = wide.execute_script(f"return {lengths}.querySelector('.legend').textContent")
    assert "first, mean 30" in shown and "second, mean 30" in shown, "a shorter run shows its own last value"
    wide.execute_script("setState({run: 1, audit: '', step: ''})")
    assert text(wide, "select[name=run] option:checked") == "second" and errors(wide) == []


@pytest.mark.parametrize("state", ["killed", "no audits", "no metrics", "missing metric", "earlier version", "grpo"])
def test_runs_in_any_state_open_without_complaint(wide, tmp_path, state):
    folder = tmp_path / "run"
    if state == "killed":
        runs.write(folder, 7, summary=False)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "lo')
    elif state == "no metrics":
        runs.write(folder, 3).joinpath("metrics.jsonl").unlink()
    elif state == "missing metric":
        runs.write(folder, rows=[{"step": t, "loss": 0.1} for t in range(5)])
    elif state == "earlier version":
        runs.write(folder)
        keep = (
            "step",
            "prompt_id",
            "sample_id",
            "peak",
            "entropy",
            "chunk",
            "continuations",
            "similarity",
            "k_sem",
            "n",
            "kept",
            "pi_bar",
            "pi_hat",
            "weight",
            "latency_s",
            "cost_usd",
        )
        runs.lines(
            folder / "audits.jsonl", [{k: runs.audit(t, i)[k] for k in keep} for t in range(5) for i in range(8)]
        )
        for name in ("completions.jsonl", "evaluations.jsonl"):
            (folder / name).unlink()
    else:
        cfg = runs.settings(**{"objective.name": "grpo"} if state == "grpo" else {})
        runs.write(folder, audits=0, completions=2, cfg=cfg)
    opened(wide, written(tmp_path, folder))
    assert errors(wide) == [] and text(wide, ".headline")
    if state != "missing metric":
        assert count(wide, ".notes li") >= 1
    if state == "killed":
        assert "7 of 20 steps" in text(wide, ".headline") and "could not be read" in text(wide, ".notes")
    if state == "earlier version":
        assert "earlier version" in text(wide, ".notes") and "computed for this page" in text(wide, "#agreement")
        wide.find_elements("css selector", ".audit")[0].click()
        assert "kept only the chunk" in text(wide, "#detail")


def test_watch_follows_a_run_and_keeps_the_state_of_the_page(wide, tmp_path):
    folder = runs.write(tmp_path / "run", 5, summary=False)
    server = report.server([str(folder)], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        wide.get(f"http://127.0.0.1:{server.server_address[1]}/#step=2")
        end = time.monotonic() + 30
        while "5 of 20" not in (text(wide, ".headline") or "") and time.monotonic() < end:
            time.sleep(0.1)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(runs.row(5)) + "\n")
        while "6 of 20" not in (text(wide, ".headline") or "") and time.monotonic() < end:
            time.sleep(0.2)
        assert "6 of 20" in text(wide, ".headline") and text(wide, "select[name=step] option:checked") == "2"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
