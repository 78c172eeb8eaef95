"""What the tests of the chat view do on a page."""

import json

import pytest

SHORT = {"max_tokens": 12, "seed": 7}
QUESTION = "#question"
ANSWER_MS = 60_000  # of a busy machine


def kept_in_browser(address, **values):
    """A context's option: what localStorage has when the page opens."""
    items = [{"name": name, "value": value} for name, value in values.items()]
    return {"storage_state": {"origins": [{"origin": address, "localStorage": items}]}}


def opened_chat(open_page, address, parameters=None, kept=None, **options):
    """A page with the chat view whose new conversations have these parameters.

    Args:
        kept: what else localStorage has.
    """
    setup = json.dumps({"parameters": parameters or SHORT})
    kept = kept_in_browser(address, **{"chat.setup": setup}, **(kept or {}))
    page = open_page("/", at=address, **kept, **options)
    page.wait_for_selector(QUESTION)
    return page


def ask(page, text):
    """Ask, and wait for the end of the answer, which is returned."""
    page.fill(QUESTION, text)
    page.press(QUESTION, "Enter")
    return ended_answer(page)


def ended_answer(page):
    page.wait_for_selector(".answer[aria-busy=true]", state="detached", timeout=ANSWER_MS)
    page.wait_for_selector("button.send[type=submit]", timeout=ANSWER_MS)
    return page.locator(".answer").last


def texts(page, selector):
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def requests_of(page):
    """A list to which the bodies of chat requests are added as they are sent."""
    bodies = []

    def seen(request):
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(request.post_data_json)

    page.on("request", seen)
    return bodies


def import_text(page, text, name="conversations.json"):
    file = {"name": name, "mimeType": "application/json", "buffer": text.encode()}
    page.set_input_files("input[type=file]", file)


def downloaded(page, click):
    """(name, text) of what a click downloads."""
    with page.expect_download() as waiting:
        click()
    download = waiting.value
    return download.suggested_filename, download.path().read_text(encoding="utf-8")


def tab_to(page, label, most=60):
    """Press Tab until what has the focus is called so."""
    for _ in range(most):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText"
        )
        if name.strip() == label:
            return
    pytest.fail(f"Tab does not reach {label!r}")
