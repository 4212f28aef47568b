"""The page in a real browser: nothing that a run says becomes markup, everything can be found, and it opens at once."""

import base64
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_fixtures import sample, write_run

from almost_eval.report.page import write_page
from almost_eval.run.prompts import Prompt, SamplePrompts, read_prompts
from almost_eval.types import SampleRecord, Score

pytest_plugins = ["report_fixtures"]

Visit = Callable[..., Any]

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(4)",
    "\u2028</style><svg onload=alert(5)>\u2029",
    "&lt;b&gt; & \x00\x07\x1b[31m",
    "\u202egnp.exe 中文 \U0001f600",
    "</title></textarea></noscript><iframe src=https://example.com>",
)


@pytest.fixture(scope="module")
def two_models(nano_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two models and three benchmarks."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_page([nano_runs / name for name in ("hhh", "hhh-small", "truthfulqa", "mmlu")], file)
    return file


def opened(page: Any) -> Any:
    page.wait_for_selector("#rows .row")
    return page


def status(page: Any, text: str) -> None:
    page.wait_for_function("text => document.getElementById('status').textContent.startsWith(text)", arg=text)


# --- hostile data


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judged run, two plain ones and their page, in which every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    for model in HOSTILE[:2]:
        records = [
            SampleRecord(
                sample(text, group=text, cluster=text, category=text),
                {"completions": [text], "finish_reasons": [text], text: text, "loglikelihoods": [[-1.0, -2.0]]},
                Score(float(i % 2), text, {"accuracy": float(i % 2), text: 1.0}),
            )
            for i, text in enumerate(HOSTILE)
        ]
        metric = {"value": 0.5, "stderr": 0.1, "ci95": [0.4, 0.6], "n": 9, "unscored": 0}
        write_run(
            folder / f"run{len(model)}",
            records,
            task=HOSTILE[5],
            protocol=HOSTILE[0],
            model=model,
            headline=HOSTILE[1],
            asked=[SamplePrompts(t, (t, t), (Prompt(t * 9, (t, "x")),)) for t in HOSTILE],
            spec={
                "command": ["almost-eval", *HOSTILE[:4]],
                "commit": HOSTILE[2],
                "versions": {HOSTILE[2]: HOSTILE[3]},
                "template": {"name": HOSTILE[0], "digest": HOSTILE[1], "text": "".join(HOSTILE)},
                "settings": {HOSTILE[4]: HOSTILE[1]},
            },
            results={
                "metrics": dict.fromkeys(HOSTILE, metric),
                "baselines": {HOSTILE[0]: metric},
                "details": {HOSTILE[1]: 3},
                "validity": {"passed": True, "reason": None, "checks": {HOSTILE[2]: {"count": 1, "allowed": 1}}},
                "engine": {"warnings": [HOSTILE[3]]},
            },
        )
    hhh = [SampleRecord(sample("1", group=HOSTILE[1]), {}, Score(None, HOSTILE[0]))]
    metrics = {"accuracy": metric, f"accuracy/{HOSTILE[0]}": metric, "accuracy/$x^": metric}
    write_run(folder / "hhh", hhh, results={"metrics": metrics})
    systems = {"baseline": {"name": HOSTILE[0]}, "model": {"name": HOSTILE[1]}}
    review = {"review": HOSTILE[0], "winner": "1", "scores": [HOSTILE[1], 2], "lengths": [3, 4], "problem": HOSTILE[1]}
    stored: dict[str, Any] = {"order": "forward", "baseline": HOSTILE[0], "model": HOSTILE[1]}
    records = [SampleRecord(sample("q/forward", cluster="q", group=HOSTILE[0], **stored), review, Score(1.0))]
    judged = write_run(
        folder / "vicuna",
        records,
        task="vicuna",
        headline="win_rate",
        protocol=HOSTILE[0],
        spec={"settings": {"systems": systems}, "requires": "judge"},
    )
    (judged / "answers").mkdir()
    (judged / "questions.jsonl").write_text(json.dumps({"question_id": "q", "text": HOSTILE[0]}) + "\n")
    for i, name in enumerate(HOSTILE[:2]):
        row = {"question_id": "q", "model_id": name, "text": HOSTILE[1]}
        (judged / f"answers/{i}.jsonl").write_text(json.dumps(row) + "\n")
    file = folder / "report.html"
    write_page([folder / name for name in ("run34", "run30", "hhh", "vicuna")], file)
    return file


def test_hostile_data_is_text(hostile_page: Path, visit: Visit) -> None:
    page = opened(visit(hostile_page))
    n = page.locator("#benchmark option").count()
    assert n == 3
    seen = []
    for number in range(n):
        page.select_option("#benchmark", str(number))
        page.wait_for_function(
            "n => document.querySelector('#detail h3') && document.getElementById('benchmark').value == n", arg=number
        )
        page.wait_for_timeout(150)
        page.focus("#list")
        for _ in range(len(HOSTILE) if number == 0 else 1):
            seen.append(page.text_content("#detail"))
            page.keyboard.press("ArrowDown")
    assert page.locator("body script:not([type])").count() == 1  # ours
    for tag in ("img", "iframe", "svg:not(.plot)", "[onerror]", "[onmouseover]", "[onload]"):
        assert page.locator(tag).count() == 0, tag
    text = page.text_content("main")
    for piece in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[4]):
        assert piece in text
        assert any(piece in one for one in seen)
    assert "alert(1)" in page.title() or "models" in page.title()


def test_only_our_script_may_run(hostile_page: Path, browser: Any) -> None:
    """Even where markup got in, the policy would stop it."""
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []

    def refuse(dialog: Any) -> None:
        said.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", refuse)
    page.goto(hostile_page.as_uri())
    page.wait_for_selector("#rows .row")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'alert(2)'}))")
    page.wait_for_timeout(200)
    context.close()
    assert said == []


# --- finding and reading


def test_what_the_page_says(two_models: Path, nano_runs: Path, visit: Visit) -> None:
    page = opened(visit(two_models))
    results = json.loads((nano_runs / "hhh/results.json").read_text())
    headline = page.text_content("#summary")
    assert f"{100 * results['metrics']['accuracy']['value']:.1f}" in headline
    low, high = results["metrics"]["accuracy"]["ci95"]
    assert f"{100 * low:.1f} to {100 * high:.1f}" in headline
    assert f"longer response {100 * results['baselines']['longer response']['value']:.1f}" in headline
    assert "valid" in headline
    assert "almost-eval hhh --limit 12" in page.text_content("#provenance")
    assert "513 : 694" in page.text_content("#published")
    subjects = {line["sample"]["group"] for line in map(json.loads, (nano_runs / "mmlu/samples.jsonl").open())}
    assert all(subject.replace("_", " ") in page.text_content("main") for subject in subjects)


def test_filters_and_their_counts(two_models: Path, nano_runs: Path, visit: Visit) -> None:
    page = opened(visit(two_models))
    lines = [
        {line["id"]: line["score"] for line in map(json.loads, (nano_runs / name / "samples.jsonl").open())}
        for name in ("hhh", "hhh-small")
    ]
    flipped = [id for id, score in lines[0].items() if (score > 0.5) != (lines[1][id] > 0.5)]
    wrong = [id for id in lines[0] if any(of[id] < 0.5 for of in lines)]
    status(page, f"{len(lines[0])} of {len(lines[0])} samples")
    for name, ids in (("flipped", flipped), ("wrong", wrong), ("unscored", [])):
        button = page.locator(f"[data-filter={name}]")
        assert button.locator("span").text_content() == str(len(ids))
        button.click()
        status(page, f"{len(ids)} of")
        assert button.get_attribute("aria-pressed") == "true"
    page.locator("[data-filter=wrong]").click()
    page.select_option("#run", "1")
    mine = [id for id in lines[1] if lines[1][id] < 0.5]
    status(page, f"{len(mine)} of")
    page.select_option("#group", label="honest")
    status(page, f"{sum(id.startswith('honest') for id in mine)} of")


def test_search_and_the_exact_prompt(two_models: Path, nano_runs: Path, visit: Visit) -> None:
    page = opened(visit(two_models))
    page.select_option("#benchmark", label="MMLU · 5-shot · nano data · limit 6")
    asked = read_prompts(nano_runs / "mmlu")
    id, one = next(iter(asked.items()))
    question = one.prompts[0].text[one.prompts[0].shared :].strip().splitlines()[0]
    hits = sum(question.lower() in a.prompts[0].text[a.prompts[0].shared :].lower() for a in asked.values())
    page.keyboard.press("/")
    page.keyboard.type(question.upper())
    status(page, f"{hits} of {len(asked)}")
    page.keyboard.press("ArrowDown")  # from the search to the list
    page.keyboard.press("Home")
    assert page.text_content("#detail h3") == id
    shown = page.locator("#detail .asked pre").all_text_contents()
    assert "".join(shown) == one.prompts[0].text
    assert page.locator("#detail .choice").count() == 4
    assert page.locator("#detail .is-gold").count() == 1
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#detail .asked .copy").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == one.prompts[0].text
    page.focus("#query")
    page.keyboard.press("Escape")
    status(page, f"{len(asked)} of")


def test_with_the_keyboard_alone(two_models: Path, visit: Visit) -> None:
    page = opened(visit(two_models))
    first = page.text_content("#detail h3")
    page.focus("#list")
    page.keyboard.press("j")
    second = page.text_content("#detail h3")
    assert second != first
    active = page.get_attribute("#list", "aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
    page.keyboard.press("End")
    assert "other/" in page.text_content("#detail h3")
    page.keyboard.press("Home")
    assert page.text_content("#detail h3") == first
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"


def test_a_link_to_a_sample(two_models: Path, visit: Visit) -> None:
    page = opened(visit(two_models, hash="#sample=0/honest%2F3"))
    assert page.text_content("#detail h3") == "honest/3"
    assert page.locator("[aria-selected=true]").is_visible()


def test_the_command_is_copied(two_models: Path, visit: Visit) -> None:
    page = opened(visit(two_models))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#provenance .copy").first.click()
    assert page.evaluate("navigator.clipboard.readText()") == page.text_content("#command-0")


def test_without_javascript(two_models: Path, visit: Visit) -> None:
    page = visit(two_models, java_script_enabled=False)
    assert page.locator("#browser").is_hidden()
    assert "needs JavaScript" in page.inner_text("#samples")
    assert page.locator("table.headline tbody tr").count() == 4
    assert page.locator("svg.plot").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes_differ_and_can_be_switched(two_models: Path, visit: Visit, scheme: str) -> None:
    page = opened(visit(two_models, color_scheme=scheme))

    def paper() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    assert (paper() > 200) == (scheme == "light")
    page.click("#theme")
    assert (paper() > 200) == (scheme == "dark")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_sticks_out(two_models: Path, visit: Visit, width: int) -> None:
    page = opened(visit(two_models, viewport={"width": width, "height": 800}))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#detail").is_visible()


def test_in_print_all_is_dark_on_white(two_models: Path, visit: Visit) -> None:
    page = opened(visit(two_models, color_scheme="dark"))
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#browser").is_hidden()
    assert page.locator("nav").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"


def test_a_run_without_prompts_says_how_to_get_them(tmp_path: Path, visit: Visit) -> None:
    write_run(tmp_path / "run", [SampleRecord(sample("1"), {}, Score(1.0))])
    write_page([tmp_path / "run"], tmp_path / "report.html")
    page = opened(visit(tmp_path / "report.html"))
    assert "Repeat the command of the run" in page.text_content("#detail")


BLOB = 'class="blob" id="blob-'


@pytest.mark.parametrize("fault", ["no gzip", "cut short", "one bit", "no base64"])
def test_a_page_that_was_damaged_says_so(two_models: Path, tmp_path: Path, browser: Any, fault: str) -> None:
    last = rf'(?<={BLOB}\d">)([^<]+)(?=</script>\n<script>)'  # the index
    before, packed, after = re.split(last, two_models.read_text(), maxsplit=1)
    flipped = bytearray(base64.b64decode(packed))
    flipped[len(flipped) // 2] ^= 1
    damaged = {
        "no gzip": packed.replace("H4sI", "H4sA", 1),
        "cut short": packed[: len(packed) // 8 * 4],
        "one bit": base64.b64encode(flipped).decode(),
        "no base64": f"{packed[:40]}!{packed[41:]}",
    }
    (tmp_path / "damaged.html").write_text(before + damaged[fault] + after)
    page = browser.new_page()
    page.goto((tmp_path / "damaged.html").as_uri())
    page.wait_for_selector("#broken:not([hidden])")
    assert "The samples cannot be shown: the data in this page are damaged" in page.text_content("#broken")
    page.close()


def test_damage_in_a_chunk_is_said_too(two_models: Path, tmp_path: Path, browser: Any) -> None:
    whole = two_models.read_text()
    assert f'{BLOB}0">H4sI' in whole
    (tmp_path / "damaged.html").write_text(whole.replace(f'{BLOB}0">H4sI', f'{BLOB}0">H4sA'))
    page = browser.new_page()
    page.goto((tmp_path / "damaged.html").as_uri())
    page.wait_for_selector("#broken:not([hidden])")
    assert "the data in this page are damaged" in page.text_content("#broken")
    page.close()


def test_a_browser_that_cannot_unpack_says_so(two_models: Path, browser: Any) -> None:
    page = browser.new_page()
    page.add_init_script("delete globalThis.DecompressionStream")
    page.goto(two_models.as_uri())
    page.wait_for_selector("#broken:not([hidden])")
    assert page.text_content("#broken") == (
        "This browser is too old to unpack the samples (it has no DecompressionStream): use a newer one."
    )
    assert page.locator("#browser").is_hidden()
    assert page.locator("table.headline tbody tr").count() == 4
    page.close()


def test_without_samples(nano_runs: Path, tmp_path: Path, visit: Visit) -> None:
    done = write_page([nano_runs / "hhh"], tmp_path / "report.html", samples=False)
    assert (done.n_samples, "blob-0" in done.file.read_text()) == (0, False)
    page = visit(done.file)
    assert page.locator("#samples").count() == 0
    assert page.locator("table.headline tbody tr").count() == 1


def test_the_same_page_twice(nano_runs: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_page([nano_runs], tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "b.html"]


# --- fifteen thousand samples


@pytest.fixture(scope="module")
def whole_page(whole_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    folders = [whole_runs / task for task in ("mmlu", "truthfulqa", "hhh")]
    assert write_page(folders, file).n_samples == 15_080
    return file


@pytest.mark.slow
def test_fifteen_thousand_samples_are_less_than_four_megabytes(whole_page: Path) -> None:
    assert whole_page.stat().st_size < 4_000_000


@pytest.mark.slow
def test_fifteen_thousand_samples_open_in_two_seconds(whole_page: Path, visit: Visit) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        page = opened(visit(whole_page))
        status(page, "14,042 of 14,042 samples")
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 2


@pytest.mark.slow
def test_fifteen_thousand_samples_can_be_searched(whole_page: Path, whole_runs: Path, visit: Visit) -> None:
    page = opened(visit(whole_page))
    asked = read_prompts(whole_runs / "mmlu")
    hits = sum(
        "photosynthesis" in "\n".join([id, p.text[p.shared :], *one.choices]).lower()
        for id, one in asked.items()
        for p in one.prompts
    )
    page.focus("#query")
    page.keyboard.type("photosynthesis")
    page.wait_for_function("() => document.getElementById('status').textContent.endsWith('samples')")
    status(page, f"{hits} of 14,042 samples")
    page.focus("#list")
    page.keyboard.press("End")
    last = page.text_content("#detail h3")
    assert "".join(page.locator("#detail .asked pre").all_text_contents()) == asked[last].prompts[0].text
