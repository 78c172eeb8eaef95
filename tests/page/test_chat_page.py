"""The chat view in a real browser, of a real server."""

import json

import pytest

from finetune.rows.sources import read_rows
from serving.server.fields import CHAT_TABLE, Number
from tests.page.chat_pages import (
    QUESTION,
    SHORT,
    ask,
    downloaded,
    ended_answer,
    import_text,
    opened_chat,
    requests_of,
    tab_to,
    texts,
)
from tests.serving.server.test_server_faults import running, wait_for

KEY = "of-the-test"
LONG = {"max_tokens": 1000, "temperature": 0}  # greedy answers do not end before that
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>
[a](javascript:window.hacked=3) [b](JaVaScRiPt:alert(1)) [c](data:text/html,<script>1</script>)
![picture](https://elsewhere.invalid/x.png "t") [![in](https://elsewhere.invalid/y.png)](https://a.invalid)
<svg onload=window.hacked=4> <a href="https://a.invalid" onclick="window.hacked=5">x</a>
<iframe src="https://elsewhere.invalid"></iframe><style>* { display: none }</style>
[d](https://a.invalid "onmouseover=window.hacked=6") <https://b.invalid>

| a |
|--:|
| <b onmouseover=alert(1)>b</b> |

```"><img/src=x/onerror=window.hacked=7>
</code></pre><img src=x onerror=window.hacked=8>
```
```html
<script>window.hacked = 9</script>
```
"""
HELD = """
const held = [];
const property = Object.getOwnPropertyDescriptor(IDBRequest.prototype, "onsuccess");
let isHeld = true;
window.released = false;
Object.defineProperty(IDBRequest.prototype, "onsuccess", {
  set(handler) {
    property.set.call(this, (event) => (isHeld ? held.push(() => handler(event)) : handler(event)));
  },
});
window.release = () => {
  isHeld = false;
  for (const handle of held) handle();
  setTimeout(() => { window.released = true; }, 500);
};
"""
MARKDOWN = """# A

text *a*
more

1. one
2. two

   - inner

3. three

end
===

> q
q

| a | b |
|--|--|
| 1 | 2 |

```c
int x;


# no
```

    code

    more

***
x"""


@pytest.fixture
def chat(open_page, address):
    """chat(parameters=SHORT, **context): a page of the shared server."""
    return lambda parameters=None, **options: opened_chat(open_page, address, parameters, **options)


def test_a_conversation_is_answered_reported_and_kept(chat):
    page = chat()
    assert page.title() == "GLM Foundry"
    sent = requests_of(page)
    answer = ask(page, "hello world")
    text = answer.locator(".rendered").inner_text()
    assert text and page.title() == "hello world · GLM Foundry"
    report = answer.locator(".report").inner_text()
    assert "predicted" in report and "Time" in report and "Queue" in report
    assert answer.locator(".report strong").first.inner_text() == "12"
    assert answer.locator(".ending").inner_text() == "Cut at the longest length"
    assert sent[0]["messages"] == [{"role": "user", "content": "hello world"}]
    ask(page, "and more")
    assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "user"]
    assert page.locator("[role=status]").last.inner_text().startswith("Answered: ")
    page.reload()
    page.wait_for_selector(".answer")
    assert texts(page, ".bubble") == ["hello world", "and more"]
    assert page.locator(".answer .rendered").first.inner_text() == text
    assert texts(page, ".entry-title") == ["hello world"]


def test_what_is_typed_before_the_conversations_are_read_is_asked(chat):
    """Reading them from the browser's database takes until `release()`, at first and later."""
    page = chat()
    page.add_init_script(HELD)
    sent = requests_of(page)
    for number, question in enumerate(("the first", "the second")):
        page.reload()
        page.fill(QUESTION, question)
        page.evaluate("release()")
        wait_for(lambda: page.evaluate("released"))
        # The conversation before is open again.
        wait_for(lambda count=number: page.locator(".bubble").count() == count)
        assert page.input_value(QUESTION) == question
        page.press(QUESTION, "Enter")
        ended_answer(page)
    assert [len(body["messages"]) for body in sent] == [1, 3]
    assert {body["max_tokens"] for body in sent} == {SHORT["max_tokens"]}


def test_a_stop_keeps_what_was_written(chat):
    page = chat(LONG)
    page.fill(QUESTION, "a long answer")
    page.press(QUESTION, "Enter")
    page.wait_for_selector(".answer .rendered")
    page.keyboard.press("Escape")
    answer = ended_answer(page)
    assert answer.locator(".ending").inner_text() == "Stopped"
    kept = answer.locator(".rendered").inner_text()
    assert kept and answer.locator(".report").count() == 0
    page.reload()
    page.wait_for_selector(".answer")
    assert page.locator(".answer .rendered").inner_text() == kept


@pytest.mark.slow
def test_an_answer_goes_on_beside_the_other_view_and_other_conversations(chat):
    page = chat({"max_tokens": 200, "temperature": 0})
    page.fill(QUESTION, "the first")
    page.press(QUESTION, "Enter")
    page.wait_for_selector(".answer .rendered")
    page.click("text=New conversation")
    page.wait_for_selector(".chat-empty")
    page.click("nav >> text=Live")
    page.wait_for_selector(".chat", state="detached")
    page.click("nav >> text=Chat")
    page.click(".entry-title")
    answer = ended_answer(page)
    assert answer.locator(".ending").inner_text() == "Cut at the longest length"
    assert answer.locator(".report strong").first.inner_text() == "200"


@pytest.mark.slow
def test_the_end_is_followed_until_the_reader_scrolls_up(chat):
    page = chat({"max_tokens": 250, "temperature": 0}, viewport={"width": 400, "height": 420})
    to_end = "((log) => log.scrollHeight - log.scrollTop - log.clientHeight)"
    to_end += "(document.querySelector('.chat-log'))"
    ask(page, "a long answer")
    wait_for(lambda: page.evaluate(to_end) < 2)
    assert page.locator(".to-end").count() == 0
    page.fill(QUESTION, "another one")
    page.press(QUESTION, "Enter")
    page.wait_for_selector(".answer[aria-busy=true] .rendered")
    page.locator(".chat-log").hover()
    page.mouse.wheel(0, -10_000)
    page.wait_for_selector(".to-end")
    ended_answer(page)
    assert page.evaluate("document.querySelector('.chat-log').scrollTop") == 0
    page.click(".to-end")
    wait_for(lambda: page.evaluate(to_end) < 2)


def test_edits_and_retries_are_branches(chat):
    page = chat({"max_tokens": 12, "temperature": 0})
    sent = requests_of(page)
    ask(page, "first words")
    page.locator(".question").hover()
    page.click("button[aria-label='Edit the question']")
    page.fill("textarea[aria-label='Edit the question']", "second words")
    page.keyboard.press("Enter")
    ended_answer(page)
    assert texts(page, ".bubble") == ["second words"]
    assert sent[1]["messages"] == [{"role": "user", "content": "second words"}]
    page.locator(".answer").hover()
    page.click(".answer button[aria-label='Try again']")
    ended_answer(page)
    assert texts(page, ".branches") == ["2/2", "2/2"]
    assert sent[2]["messages"] == sent[1]["messages"]
    page.click(".answer button[aria-label='Earlier version']")
    assert texts(page, ".branches") == ["2/2", "1/2"]
    page.wait_for_selector("[aria-label='Later version']:focus")
    page.click(".question button[aria-label='Earlier version']")
    assert texts(page, ".bubble") == ["first words"]
    assert texts(page, ".branches") == ["1/2"]
    page.reload()
    page.wait_for_selector(".branches")
    assert texts(page, ".bubble") == ["first words"]
    page.keyboard.press("Tab")
    page.locator(".question").hover()
    page.click("button[aria-label='Delete the question']")
    assert texts(page, ".bubble") == ["second words"]
    page.click("text=Undo")
    assert texts(page, ".bubble") == ["first words"]


@pytest.mark.slow
def test_conversations_are_renamed_found_deleted_and_brought_back(chat):
    page = chat()
    ask(page, "about rivers")
    page.click("text=New conversation")
    ask(page, "about mountains")
    page.click("button[aria-label='Rename “about mountains”']")
    page.fill(".entry-name", "Alps")
    page.keyboard.press("Enter")
    assert texts(page, ".entry-title") == ["Alps", "about rivers"]
    page.fill("input[type=search]", "MOUNTAINS")
    assert texts(page, ".entry-title") == ["Alps"]
    page.fill("input[type=search]", "")
    page.click("button[aria-label='Delete “Alps”']")
    assert texts(page, ".entry-title") == ["about rivers"]
    page.click("text=Undo")
    assert texts(page, ".entry-title") == ["Alps", "about rivers"]
    page.click("button[aria-label='Delete “Alps”']")
    page.reload()
    page.wait_for_selector(".entry")
    assert texts(page, ".entry-title") == ["about rivers"]


@pytest.mark.slow
def test_exported_conversations_are_rows_and_come_back(chat, tmp_path):
    page = chat()
    page.click("button[aria-label='Show settings']")
    page.fill("text=System prompt >> xpath=.. >> textarea", "Be brief.")
    text = ask(page, "hello world").locator(".rendered").inner_text()

    def choose(label):
        page.click("summary[aria-label='Export this conversation']")
        page.click(f"text={label}")

    name, row = downloaded(page, lambda: choose("JSON, a training row"))
    assert name == "hello-world.json"
    messages = json.loads(row)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == "Be brief."
    (tmp_path / name).write_text(row, encoding="utf-8")
    [read], _ = read_rows(tmp_path / name)
    assert [turn.content for turn in read.turns] == [message["content"] for message in messages]
    name, markdown = downloaded(page, lambda: choose("Markdown"))
    assert name == "hello-world.md" and "Be brief." in markdown and "## You" in markdown
    _, everything = downloaded(page, lambda: page.click("text=Export all"))
    _, rows = downloaded(page, lambda: page.click("text=Training rows"))
    assert rows == row
    import_text(page, everything)
    page.wait_for_selector("text=Conversations imported: 1")
    assert page.locator(".entry").count() == 2
    assert page.locator(".answer .rendered").inner_text() == text
    import_text(page, row + row, "rows.jsonl")
    page.wait_for_selector("text=Conversations imported: 2")
    assert page.locator(".answer .rendered").inner_text() == text
    import_text(page, '{"messages": [{"role": "nobody"}]}')
    page.wait_for_selector("text=unknown role")
    import_text(page, "[1]")
    page.wait_for_selector("text=no conversation")


@pytest.mark.slow
def test_settings_reach_the_request(chat):
    page = chat({"max_tokens": 5})
    sent = requests_of(page)
    page.keyboard.press("Alt+S")
    assert page.locator("#parameter-slo_s").get_attribute("placeholder") == "30"
    assert page.locator("#parameter-max_tokens").input_value() == "5"
    for name, value in {"temperature": "0.5", "top_p": "0.9", "top_k": "3"}.items():
        page.fill(f"#parameter-{name}", value)
    page.fill("#parameter-seed", "11")
    page.fill("#parameter-slo_s", "0")
    assert page.locator("#parameter-slo_s-about").inner_text() == "A number above 0"
    assert page.locator("#parameter-slo_s").get_attribute("aria-invalid") == "true"
    page.fill("#parameter-slo_s", "60")
    page.fill("text=System prompt >> xpath=.. >> textarea", "Be kind.")
    ask(page, "hello")
    body = sent[0]
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "max_tokens": 5, "seed": 11}
    assert {name: body[name] for name in wanted} == wanted
    assert body["slo_s"] == 60 and body["model"] == "m" and "tools" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be kind."}
    assert "of 60 s" in page.locator(".report").inner_text()
    page.click("text=Use for new conversations")
    page.click("text=New conversation")
    assert page.locator("#parameter-top_k").input_value() == "3"
    page.click("text=Reset")
    wait_for(lambda: page.locator("#parameter-top_k").input_value() == "")


def test_bounds_are_those_of_the_server(chat):
    page = chat()
    found = page.evaluate("import('/page/chat/parameters.js').then((it) => it.PARAMETERS)")
    for parameter in found:
        field = CHAT_TABLE.fields[parameter["name"]]
        assert isinstance(field, Number)
        assert field.above == parameter.get("above", False)
        assert (field.kind is int) == parameter.get("whole", False)
        assert field.least <= parameter["least"] and parameter["most"] <= field.most
        if parameter["name"] not in ("top_k", "seed"):
            assert (field.least, field.most) == (parameter["least"], parameter["most"])


def test_two_languages_and_two_themes(chat):
    page = chat(locale="zh-CN", color_scheme="dark")
    assert page.locator("html").get_attribute("lang") == "zh"
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.wait_for_selector("text=想了解些什么？")
    page.click(".example >> nth=0")
    assert "词元" in ended_answer(page).inner_text()
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("header >> text=☀")
    assert page.evaluate(background) != dark
    page.click("header >> text=English")
    page.wait_for_selector("text=Enter sends")
    assert "Tokens" in page.locator(".report").inner_text()
    page.reload()
    page.wait_for_selector("text=Enter sends")
    assert page.locator("html").get_attribute("data-theme") == "light"


def test_every_word_is_there_in_both_languages(chat):
    page = chat()
    missing = page.evaluate(
        """async () => {
            const { translator } = await import("/page/i18n.js");
            const source = await (await fetch("/page/chat/words.js")).text();
            const names = [...source.matchAll(/^  "([^"]+)": \\[/gm)].map((found) => found[1]);
            const [en, zh] = [translator("en"), translator("zh")];
            const absent = (name) => en(name) === name || zh(name) === name;
            return [names.length, names.filter(absent)];
        }"""
    )
    assert missing[0] > 100 and missing[1] == []


@pytest.mark.slow
def test_a_phone_has_drawers_and_no_sideways_scroll(chat):
    page = chat(**PHONE)
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    ask(page, "hello " * 40 + "x" * 200)
    import_text_through_drawer(page)
    assert page.evaluate(overflow) <= 0
    page.tap("button[aria-label='Show settings']")
    page.wait_for_selector("dialog[open] #parameter-seed")
    assert page.evaluate(overflow) <= 0
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog[open]", state="detached")
    page.tap("button[aria-label='Show conversations']")
    page.tap("dialog[open] .entry-title >> nth=1")
    page.wait_for_selector("dialog[open]", state="detached")
    assert "hello hello" in page.locator(".bubble").inner_text()


def import_text_through_drawer(page):
    wide = "| " + " | ".join(f"column {number}" for number in range(9)) + " |\n|"
    wide += "--|" * 9 + "\n\n```\n" + "y" * 300 + "\n```"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": wide}]}
    page.tap("button[aria-label='Show conversations']")
    import_text(page, json.dumps(row))
    page.wait_for_selector(".answer .wide-table")
    page.keyboard.press("Escape")


@pytest.mark.slow
def test_a_conversation_by_keyboard_alone(chat):
    page = chat()
    page.wait_for_selector("#question:focus")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended_answer(page)
    assert page.locator(".bubble").inner_text() == "one\ntwo"
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.press("ArrowUp")
    page.wait_for_selector(".edit textarea:focus")
    page.keyboard.type(" three")
    page.keyboard.press("Enter")
    ended_answer(page)
    page.wait_for_selector("#question:focus")
    assert page.locator(".bubble").inner_text() == "one\ntwo three"
    page.locator("header a").nth(1).focus()
    tab_to(page, "Earlier version")
    page.keyboard.press("Enter")
    assert page.locator(".bubble").inner_text() == "one\ntwo"
    tab_to(page, "Copy the answer")
    tab_to(page, "Try again")
    page.keyboard.press("Enter")
    ended_answer(page)
    page.locator(".chat-log").focus()
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open] >> text=Send the question")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog[open]", state="detached")
    page.keyboard.press("Alt+N")
    page.wait_for_selector(".chat-empty")
    page.wait_for_selector("#question:focus")


def test_an_enter_of_an_input_method_sends_nothing(chat):
    page = chat()
    sent = requests_of(page)
    page.fill(QUESTION, "ni hao")
    page.locator(QUESTION).dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    page.wait_for_timeout(100)
    assert not sent and page.locator(QUESTION).input_value() == "ni hao"


def test_hostile_text_is_inert(chat):
    page = chat()
    call = {"name": "<img src=x onerror=window.hacked=10>", "arguments": '{"code": "<script>"}'}
    rows = [
        {"role": "system", "content": HOSTILE},
        {"role": "user", "content": HOSTILE},
        {"role": "assistant", "content": HOSTILE, "tool_calls": [{"id": "1", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": HOSTILE},
        {"role": "assistant", "content": HOSTILE},
        {"role": "user", "content": "huge"},
        {"role": "assistant", "content": "# x\n" + "*_[`<&" * 40_000},
    ]
    import_text(page, json.dumps({"title": HOSTILE, "messages": rows}))
    page.wait_for_selector(".answer >> nth=1")
    page.locator("details.call summary").click()
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    shown = page.locator(".answer .rendered")
    assert shown.locator("img, script, iframe, style, svg, [onclick], [onerror]").count() == 0
    links = shown.locator("a")
    for link in links.all():
        assert link.get_attribute("href").startswith("https://")
        assert link.get_attribute("rel") == "noopener noreferrer"
        assert link.get_attribute("target") == "_blank"
    assert "picture" in texts(page, ".answer a.image")
    assert page.locator(".align-right").count() == 2 * 2
    assert page.locator(".call-result").inner_text().startswith("<img src=x onerror")


def test_hostile_files_are_read_or_refused(chat):
    page = chat()
    node = {"role": "user", "text": "round", "children": ["root", "b"]}
    circle = {"root": {"children": ["b", "b", 3, "__proto__"]}, "b": node}
    value = {"id": "../x", "parameters": {"temperature": 99, "seed": "1", "top_k": 4}}
    import_text(page, json.dumps(value | {"title": 3, "nodes": circle}))
    page.wait_for_selector(".bubble")
    assert texts(page, ".bubble") == ["round"]
    page.click("button[aria-label='Show settings']")
    assert page.locator("#parameter-top_k").input_value() == "4"
    assert page.locator("#parameter-temperature").input_value() == ""


def test_growing_markdown_is_whole_markdown(chat):
    page = chat()
    found = page.evaluate(
        """async (text) => {
            const { GrowingMarkdown, wholeMarkdown } = await import("/page/chat/markdown.js");
            const growing = new GrowingMarkdown((name) => name);
            const differing = [];
            for (let length = 1; length <= text.length; length += 1) {
                const blocks = growing.update(text.slice(0, length));
                const whole = wholeMarkdown(text.slice(0, length), (name) => name);
                if (blocks.join("") !== whole.join("")) differing.push(length);
            }
            return differing;
        }""",
        MARKDOWN,
    )
    assert found == []


def test_a_long_answer_is_shown_in_linear_time(chat):
    """The last tenth of a long text takes no more than a few times what the first one took."""
    page = chat()
    first, last = page.evaluate(
        """async () => {
            const { GrowingMarkdown } = await import("/page/chat/markdown.js");
            const text = "A paragraph of *words*.\\n\\n```python\\nx = 1\\n```\\n\\n".repeat(400);
            const growing = new GrowingMarkdown((name) => name);
            const parts = [];
            for (let part = 0; part < 10; part += 1) {
                const before = performance.now();
                for (let step = 1; step <= 40; step += 1) {
                    growing.update(text.slice(0, (text.length / 400) * (part * 40 + step)));
                }
                parts.push(performance.now() - before);
            }
            return [Math.max(parts[0], parts[1]), Math.min(parts[8], parts[9])];
        }"""
    )
    assert last < 3 * first + 20


def test_every_module_of_the_view_is_loaded_at_once(chat, address):
    """Without this list a browser finds out about one file after the other."""
    page = chat()
    loaded = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name)")
    listed = page.evaluate(
        "[...document.querySelectorAll('link[rel=modulepreload]')].map((link) => link.href)"
    )
    modules = [name for name in loaded if name.endswith(".js")]
    late = set(modules) - set(listed) - {f"{address}/page/app.js"}
    assert {name for name in late if "/live/" not in name and "uplot" not in name} == set()
    assert set(listed) <= set(modules)


def test_code_is_copied(chat):
    page = chat(permissions=["clipboard-read", "clipboard-write"])
    row = [{"role": "user", "content": "q"}, {"role": "assistant", "content": MARKDOWN}]
    import_text(page, json.dumps({"messages": row}))
    assert page.locator(".code-head span").first.inner_text() == "C"
    page.click(".code-head button >> nth=0")
    page.wait_for_selector(".code-head button:text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == "int x;\n\n\n# no"
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.click("button[aria-label='Copy the question']")
    assert page.locator("[role=status]").last.inner_text() == "Copied"


def test_a_refusal_stands_in_the_answers_place(chat):
    page = chat()
    answer = ask(page, "word " * 30_000)
    assert "no room for an answer" in answer.locator(".failure").inner_text()
    [problem] = page.watched.problems
    assert "status of 400" in problem
    page.watched.problems.clear()
    page.click("button[aria-label='Edit the question'] >> visible=true")
    page.fill("textarea[aria-label='Edit the question']", "short")
    page.keyboard.press("Enter")
    assert ended_answer(page).locator(".rendered").inner_text()


@pytest.fixture(scope="module")
def locked(tiny_folders, tmp_path_factory):
    """(a server with a key, tools, feedback and room for one answer, the file of the feedback)."""
    file = tmp_path_factory.mktemp("said") / "feedback.jsonl"
    words = ("--tools", "samples", "--feedback", file, "--api_key", KEY)
    few = ("--max_batch", 1, "--max_queue", 0)
    with running(tiny_folders["glm3"], *words, *few, endless=False) as server:
        yield server, file


@pytest.fixture
def locked_chat(open_page, locked):
    """locked_chat(parameters=SHORT): a page of that server, with its key."""

    def opened(parameters=None):
        return opened_chat(open_page, locked[0].root, parameters, kept={"key": KEY})

    return opened


@pytest.mark.slow
def test_a_server_that_is_full_says_busy(locked_chat, locked, monkeypatch):
    monkeypatch.setattr(locked[0].service.backend.engine, "stop_ids", frozenset())
    page = locked_chat({"max_tokens": 1000})
    page.fill(QUESTION, "the first")
    page.press(QUESTION, "Enter")
    page.wait_for_selector(".answer[aria-busy=true] .rendered")
    page.click("text=New conversation")
    answer = ask(page, "the second")
    assert answer.locator(".failure").inner_text().startswith("The server is busy: ")
    page.click(".entry-title >> nth=1")
    page.keyboard.press("Escape")
    ended_answer(page)
    page.click(".entry-title >> nth=1")
    wait_for(lambda: locked[0].service.backend.count() == 0)
    page.click(".failure button")
    page.wait_for_selector(".answer[aria-busy=true] .rendered")
    page.keyboard.press("Escape")
    assert ended_answer(page).locator(".rendered").inner_text()
    assert page.locator(".branches").count() == 0
    assert all("status of 429" in problem for problem in page.watched.problems)
    page.watched.problems.clear()


@pytest.mark.slow
def test_a_server_with_a_key_asks_for_it(open_page, locked):
    page = open_page("/", at=locked[0].root)
    page.fill("input[type=password]", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=The server does not take this key")
    assert all("status of 401" in problem for problem in page.watched.problems)
    page.watched.problems.clear()
    page.fill("input[type=password]", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(QUESTION)
    assert page.evaluate("localStorage.getItem('key')") is None
    page.keyboard.press("Alt+S")
    page.fill("#parameter-max_tokens", "4")
    assert ask(page, "hello").locator(".report").count() == 1
    page.click("text=Forget the key")
    page.wait_for_selector("input[type=password]")


def test_calls_of_tools_are_run_shown_and_told(locked_chat):
    page = locked_chat({"max_tokens": 40, "seed": 3})
    asked = []

    def force(route):
        """A random model calls nothing by itself: the request's own field makes it."""
        body = route.request.post_data_json
        asked.append(body)
        if "tools" in body and len(asked) == 1:
            clock = {"type": "function", "function": {"name": "clock"}}
            route.continue_(post_data=json.dumps(body | {"tool_choice": clock}))
        else:
            body.pop("tools", None)
            route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", force)
    page.click("text=Tools (3)")
    answer = ask(page, "What time is it?")
    assert answer.locator(".call-name").inner_text() == "clock"
    answer.locator("details summary").first.click()
    result = answer.locator(".call-result").inner_text()
    offered = [tool["function"]["name"] for tool in asked[0]["tools"]]
    assert offered == ["weather", "calculator", "clock"]
    assert [message["role"] for message in asked[1]["messages"]] == ["user", "assistant", "tool"]
    assert asked[1]["messages"][2]["content"] == result
    page.click("button[aria-label='Show settings']")
    page.uncheck("label.tool >> nth=0 >> input")
    page.wait_for_selector("text=Tools (2)")
    page.reload()
    page.wait_for_selector(".call-name")
    with page.expect_request("**/page/api/tools/end"):
        page.click("button[aria-label='Delete “What time is it?”']")
        page.click("[role=status] button[aria-label='Close']")


@pytest.mark.slow
def test_a_stop_ends_the_rounds_of_tools(locked_chat):
    page = locked_chat({"max_tokens": 40, "seed": 3})
    clock = {"type": "function", "function": {"name": "clock"}}

    def force(route):
        body = route.request.post_data_json
        if body["messages"][-1]["role"] == "user":  # what follows the call waits for the stop
            route.continue_(post_data=json.dumps(body | {"tool_choice": clock}))

    page.route("**/v1/chat/completions", force)
    page.click("text=Tools (3)")
    page.fill(QUESTION, "What time is it?")
    page.press(QUESTION, "Enter")
    page.wait_for_selector(".call-name")
    page.keyboard.press("Escape")
    answer = ended_answer(page)
    assert answer.locator(".ending").inner_text() == "Stopped"
    steps = answer.locator(".step").count()
    sent = requests_of(page)
    page.wait_for_timeout(300)
    assert not sent and answer.locator(".step").count() == steps


@pytest.mark.slow
def test_feedback_is_kept_corrected_and_withdrawn(locked_chat, locked):
    _, file = locked

    def kept():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    page = locked_chat()
    answer = ask(page, "hello")
    said = page.locator("[role=status]").last
    answer.locator("button[aria-label='Good answer']").click()
    page.wait_for_selector("[aria-label='Good answer'][aria-pressed=true]")
    answer.locator("button[aria-label='Correct this answer']").click()
    page.fill(".correction textarea", "A better answer.")
    page.click("text=Send the correction")
    page.wait_for_selector(".correction", state="detached")
    last = kept()[-1]
    assert (last["rating"], last["correction"]) == ("up", "A better answer.")
    assert last["messages"][0] == {"role": "user", "content": "hello"}
    assert last["report"]["output_tokens"] == SHORT["max_tokens"] and last["model"]
    page.reload()
    page.click("[aria-label='Good answer'][aria-pressed=true]")
    page.wait_for_selector("[aria-label='Good answer'][aria-pressed=false]")
    page.click("button[aria-label='Correct this answer']")
    page.click("text=Withdraw the correction")
    page.wait_for_selector(".correction", state="detached")
    assert said.inner_text() == "Feedback withdrawn"
    last = kept()[-1]
    assert (last["rating"], last["correction"]) == (None, None)
    assert len({line["id"] for line in kept()}) == 1


@pytest.mark.slow
def test_the_chat_view_is_accessible(chat, check_accessible):
    page = chat()
    check_accessible(page)
    row = [{"role": "user", "content": "q"}, {"role": "assistant", "content": HOSTILE}]
    import_text(page, json.dumps({"messages": row}))
    ask(page, "hello")
    page.keyboard.press("Alt+S")
    page.fill("#parameter-seed", "1.5")
    page.mouse.move(700, 300)
    check_accessible(page)
    page.click("header >> text=☾")
    check_accessible(page)
    page.click("header >> text=中文")
    check_accessible(page)
    page.locator(".chat-log").focus()
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    check_accessible(page)


@pytest.mark.slow
def test_the_drawers_of_a_phone_are_accessible(chat, check_accessible):
    page = chat(**PHONE, reduced_motion="reduce")
    ask(page, "hello")
    check_accessible(page)
    page.tap("button[aria-label='Show conversations']")
    page.wait_for_selector("dialog[open] .entry")
    check_accessible(page)
