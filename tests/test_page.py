"""Facts about the page of chat.py: what its server does and refuses, and what a person sees in a browser."""

import base64
import contextlib
import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from conftest import one_thread, python_command, save_image
from PIL import Image

import chat
import data
import transfer

ID = "0123456789abcdef" * 2
OPTIONS = dict(max_new_tokens=12, temperature=0.0, top_p=0.9, repetition_penalty=1.0)


class Gate:
    """Lets the language model take one step at a time, if it is closed."""

    def __init__(self, llm):
        self.free = threading.Event()
        self.free.set()
        self.steps = threading.Semaphore(0)
        self.taken = 0
        self.step = llm.step
        llm.step = self.gated

    def gated(self, ids, cache):
        while not self.free.is_set() and not self.steps.acquire(timeout=0.01):
            pass
        self.taken += 1
        return self.step(ids, cache)


@pytest.fixture(scope="module")
def talker(chat_models):
    folder, template = chat_models["llama"]
    return transfer.load_chat(folder, template, torch.float32)


@pytest.fixture
def page(talker, monkeypatch):
    """A page that is served, with its gate open."""
    model, _, _ = talker
    monkeypatch.setattr(model.llm, "step", model.llm.step)  # put back afterwards
    with chat.Page(0, "a model", talker, OPTIONS) as server:
        server.gate = Gate(model.llm)
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.gate.free.set()
        server.shutdown()
        thread.join()


def png(colour="red", size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def question(text="And what else?", **changes):
    return json.dumps(dict(question=text, begun=False, temperature=0, max_new_tokens=12) | changes)


def send(page, path, body=b"", conversation=ID, method="POST", **headers):
    """-> http.client's answer, of which nothing has been read yet. A header of None is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=10)
    body = body.encode() if isinstance(body, str) else body
    sent = {"Host": f"127.0.0.1:{page.server_port}", "Origin": page.address, "X-Conversation": conversation,
            "Content-Length": str(len(body))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    answer.connection = connection
    return answer


def post(page, path, body=b"", conversation=ID, **headers):
    """-> the lines of an answer"""
    with send(page, path, body, conversation, **headers) as answer:
        return [json.loads(line) for line in answer]


def text_of(lines):
    return "".join(line.get("text", "") for line in lines)


# --------------------------------------------------------------------------------------- its server


def test_a_conversation_over_the_page_is_the_one_of_the_terminal(page, talker):
    conversation = chat.Conversation(*talker)
    conversation.show(Image.new("RGB", (40, 30), "red"))
    shown, end = post(page, "/picture", png())
    assert end == {"end": True}
    assert shown["preview"].startswith("data:image/jpeg;base64,")
    for text in ("a red square?", "is it red", "don't they?"):
        *pieces, end = post(page, "/ask", question(text, begun=True))
        assert end == {"end": True}
        assert all(list(piece) == ["text"] for piece in pieces)
        expected = "".join(conversation.ask(text, **OPTIONS))
        assert text_of(pieces) == expected
        assert len(pieces) > 3  # they came one by one
    assert page.conversations[ID].turns == conversation.turns
    assert post(page, "/clear") == [{"picture": True}, {"end": True}]
    assert page.conversations[ID].turns == []
    assert page.conversations[ID].picture
    post(page, "/clear", b"picture")
    assert not page.conversations[ID].picture


def test_words_come_as_soon_as_they_are_known(page):
    page.gate.free.clear()
    answer = send(page, "/ask", question())
    first = answer.readline()
    taken = page.gate.taken
    page.gate.steps.release(2)
    while page.gate.taken < taken + 2:
        time.sleep(0.01)
    assert page.gate.taken < 11
    page.gate.free.set()
    rest = answer.read().splitlines()
    assert json.loads(first)["text"]
    assert json.loads(rest[-1]) == {"end": True}


def test_a_tab_that_is_closed_ends_its_answer_and_the_next_one_is_given(page):
    page.gate.free.clear()
    answer = send(page, "/ask", question(max_new_tokens=1500))
    said = json.loads(answer.readline())["text"]
    answer.close()
    answer.connection.close()
    page.gate.free.set()
    with page.busy:
        assert page.gate.taken < 20
    lines = post(page, "/ask", question("What is it", begun=True))
    assert lines[-1] == {"end": True}
    (asked, partly), _ = page.conversations[ID].turns
    assert asked == "And what else?"
    assert partly.startswith(said.strip())
    assert len(partly) < 200


def test_two_browsers_at_once_are_answered_one_after_the_other(page, talker):
    other = ID[::-1]
    post(page, "/picture", png("blue"), other)
    page.gate.free.clear()
    first = send(page, "/ask", question())
    first.readline()
    second = send(page, "/ask", question(begun=True), other)
    assert json.loads(second.readline()) == {"waiting": True}
    page.gate.free.set()
    assert json.loads(first.read().splitlines()[-1]) == {"end": True}
    lines = [json.loads(line) for line in second]
    conversation = chat.Conversation(*talker)
    conversation.show(Image.new("RGB", (40, 30), "blue"))
    assert text_of(lines) == "".join(conversation.ask("And what else?", **OPTIONS))
    # what was read is kept of the last one alone
    assert page.conversations[other].cache is not None
    assert page.conversations[ID].cache is None


def test_a_tab_that_waits_and_is_closed_is_not_answered(page):
    page.gate.free.clear()
    first = send(page, "/ask", question())
    first.readline()
    second = send(page, "/ask", question(), ID[::-1])
    second.readline()
    second.close()
    second.connection.close()
    time.sleep(0.5)
    page.gate.free.set()
    first.read()
    assert post(page, "/clear") == [{"picture": False}, {"end": True}]
    assert ID[::-1] not in page.conversations


def test_no_more_conversations_are_kept_than_there_is_room_for(page, monkeypatch):
    """A tab whose conversation is gone is told so, and may begin anew."""
    monkeypatch.setattr(chat, "MOST_CONVERSATIONS", 2)
    for name in "abc":
        post(page, "/picture", png(), name * 32)
    assert list(page.conversations) == ["b" * 32, "c" * 32]
    (error,) = post(page, "/ask", question(begun=True), "a" * 32)
    assert "this conversation is kept no more" in error["error"]
    assert post(page, "/ask", question(), "a" * 32)[-1] == {"end": True}


@pytest.mark.parametrize("path, body, says", [
    ("/picture", b"no picture", "the picture: no picture in one of JPEG, PNG"),
    ("/picture", b"", "the picture: no picture in one of"),
    ("/picture", png()[:60], "the picture: "),
    ("/picture", png(size=(60, 50)), "the picture: 60 x 50 pixels are more than the 2,000 that are decoded"),
    ("/picture", b"x" * 5000, "0.0 MB are more than the 0.00390625 MB that are taken"),
    ("/ask", question("  "), "the question is empty"),
    ("/ask", question("a red square " * 900), "the question is too long"),
    ("/ask", question("x" * 1_900_000), "1.8 MB are more than the 0.25 MB"),
    ("/ask", b"\xff", "a question must be an object of JSON"),
    ("/ask", "[" * 100_000, "a question must be an object of JSON"),
    ("/ask", "[]", "a question must have question, begun, temperature, max_new_tokens"),
    ("/ask", "7", "a question must be an object of JSON"),
    ("/ask", question(temperature="hot"), "each of its kind"),
    ("/ask", question(temperature=float("nan")), "the temperature must be from 0 to 2"),
    ("/ask", question(more=1), "a question must have"),
    ("/ask", question(max_new_tokens=0), "max_new_tokens = 0"),
    ("/ask", question(begun=True), "this conversation is kept no more")])
def test_bad_input_is_named_and_the_conversation_goes_on(page, monkeypatch, path, body, says):
    monkeypatch.setattr(data, "MOST_PIXELS", 2000)
    monkeypatch.setattr(chat, "MOST_BYTES", 4096)
    lines = post(page, path, body)
    assert says in lines[-1]["error"]
    assert post(page, "/picture", png())[-1] == {"end": True}
    assert text_of(post(page, "/ask", question(begun=True)))


def test_what_goes_wrong_within_is_told_and_the_page_goes_on(page, capfd):
    def fails(ids, cache):
        raise RuntimeError("out of memory")

    step, page.gate.step = page.gate.step, fails
    *_, last = post(page, "/ask", question())
    assert last == {"error": "RuntimeError: out of memory"}
    assert "Traceback" in capfd.readouterr().err
    page.gate.step = step
    assert post(page, "/ask", question())[-1] == {"end": True}


@pytest.mark.parametrize("headers, status", [
    ({}, 200),
    ({"Host": "localhost:{port}", "Origin": "http://localhost:{port}"}, 200),
    ({"Host": "evil.example:{port}", "Origin": "http://evil.example:{port}"}, 403),  # DNS rebinding
    ({"Host": None}, 403),
    ({"Host": "localhost:9", "Origin": "http://localhost:9"}, 200),  # a port that is forwarded
    ({"Host": "127.0.0.1.evil.example", "Origin": "http://127.0.0.1.evil.example"}, 403),
    ({"Origin": "http://localhost:9"}, 403),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": None}, 403),
    ({"Content_Length": None}, 411),
    ({"Content_Length": "-1"}, 411),
    ({"Content_Length": "many"}, 411)])
def test_requests_of_other_pages_are_refused(page, headers, status):
    filled = {name: value and value.format(port=page.server_port) for name, value in headers.items()}
    answer = send(page, "/ask", question(), **filled)
    answer.read()
    assert answer.status == status
    if "Host" in headers:
        assert send(page, "/", method="GET", **filled).status == status
    assert (page.gate.taken > 0) == (status == 200)


def test_only_what_there_is_is_served(page):
    for path in ("/chat.py", "/../chat.py", "/favicon.ico", "/ask"):
        assert send(page, path, method="GET").status == 404
    assert send(page, "/quit").status == 404
    assert send(page, "/", method="PUT").status == 501
    (error,) = post(page, "/ask", question(), "x")
    assert "32 hexadecimal digits" in error["error"]


def test_the_page_may_run_and_load_nothing_but_its_own(page):
    answer = send(page, "/", method="GET")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    html = answer.read().decode()
    assert not re.search(r"https?://|src=|@import|url\(", html)


def test_it_listens_to_this_machine_alone(page):
    assert page.server_address[0] == "127.0.0.1"
    with contextlib.suppress(OSError):  # has this machine another address?
        own = socket.gethostbyname(socket.gethostname())
        if not own.startswith("127."):
            with pytest.raises(OSError):
                socket.create_connection((own, page.server_port), timeout=2)


def test_a_port_in_use_is_named(page, fails, chat_models):
    folder, _ = chat_models["llama"]
    port = page.server_port
    fails(chat.main, [folder, "--page", "--port", port], f"port {port} is in use", "--port")


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(chat_models):
    folder, _ = chat_models["llama"]
    command = python_command(chat.__file__, folder, "--page", "--port", 0)
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=one_thread())
    try:
        assert "loaded in" in program.stdout.readline()
        address = program.stdout.readline().split()[0]
        assert b"<!doctype html>" in urllib.request.urlopen(address, timeout=30).read()
        program.send_signal(2)
        assert program.wait(30) == 0
    finally:
        program.kill()


# --------------------------------------------------------------------------------------- in a browser


class Browser:
    """Chromium without a window, by the WebDriver protocol (W3C), which chromedriver speaks."""

    def __init__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        started = next(line for line in self.driver.stdout if "started successfully" in line)
        self.address = "http://127.0.0.1:" + re.search(r"port (\d+)", started)[1]
        self.path = "/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"args": flags, "binary": shutil.which("chromium")}
        made = self.tell("", capabilities={"alwaysMatch": {"goog:chromeOptions": options}})
        self.path += f"/{made['sessionId']}"

    def tell(self, path, method="POST", **words):
        body = json.dumps(words).encode() if method == "POST" else None
        request = urllib.request.Request(
            self.address + self.path + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        return json.load(answer)["value"]

    def chrome(self, command, **words):
        return self.tell("/goog/cdp/execute", cmd=command, params=words)

    def size(self, width, height):
        self.chrome("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                    mobile=width < 500)

    def run(self, script, *arguments):
        return self.tell("/execute/sync", script=script, args=arguments)

    def until(self, condition, *arguments, seconds=20):
        """Waits until an expression of JavaScript is true. -> its value"""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {condition}", *arguments)):
            assert time.monotonic() < deadline, f"{condition} is not so in {self.text('body')!r}"
            time.sleep(0.03)
        return value

    def find(self, selector):
        found = self.tell("/element", using="css selector", value=selector)
        return f"/element/{next(iter(found.values()))}"

    def text(self, selector):
        return self.tell(self.find(selector) + "/text", method="GET")

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map(x => x.innerText)", selector)

    def click(self, selector):
        self.tell(self.find(selector) + "/click")

    def type(self, text, selector=None):
        """Types into an element, or, like a person, into the one that has the focus."""
        if selector:
            return self.tell(self.find(selector) + "/value", text=text)
        strokes = [{"type": kind, "value": letter} for letter in text for kind in ("keyDown", "keyUp")]
        self.tell("/actions", actions=[{"type": "key", "id": "keys", "actions": strokes}])

    def chord(self, *keys):
        strokes = [{"type": "keyDown", "value": key} for key in keys]
        strokes += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self.tell("/actions", actions=[{"type": "key", "id": "keys", "actions": strokes}])

    def close(self):
        with contextlib.suppress(Exception):
            self.tell("", method="DELETE")
        self.driver.kill()
        self.driver.wait()


ENTER, SHIFT, ESCAPE, TAB = "\ue007", "\ue008", "\ue00c", "\ue004"
ANSWERED = "!document.querySelector('.coming') && document.querySelector('#stop').hidden"
needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="Chromium is not installed: apt-get install chromium chromium-driver")


@pytest.fixture(scope="module")
def chromium():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def tab(chromium, page):
    """The browser at the page, wide, and the page as `tab.page`."""
    chromium.size(1100, 700)
    chromium.tell("/url", url=page.address)
    chromium.until("document.title == 'a model'")
    chromium.page = page
    return chromium


def said_by(talker, *questions, colour=None):
    """The answers of the model to these questions, in their turn."""
    conversation = chat.Conversation(*talker)
    conversation.show(colour and Image.new("RGB", (40, 30), colour))
    return ["".join(conversation.ask(text, **OPTIONS)).strip() for text in questions]


def shown(text):
    """A text as the browser has it: without what it does not draw."""
    return re.sub(r"\s+", " ", re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)).strip()


@needs_browser
@pytest.mark.slow
def test_a_person_types_and_the_answer_comes_word_by_word(tab, talker):
    tab.page.gate.free.clear()
    tab.type("And what" + "")
    tab.chord(SHIFT, ENTER)
    tab.type("else?")
    tab.type(ENTER)
    tab.until("document.querySelector('.answer')?.innerText")
    first = tab.text(".answer.coming")
    assert tab.texts(".question") == ["And what\nelse?"]
    tab.page.gate.steps.release(3)
    tab.until("document.querySelector('.answer').innerText.length > arguments[0]", len(first))
    assert tab.page.gate.taken <= 3
    tab.page.gate.free.set()
    tab.until(ANSWERED)
    (expected,) = said_by(talker, "And what\nelse?")
    assert shown(tab.text(".answer")) == shown(expected)
    assert not tab.texts(".error")


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("how", ["button", "Escape"])
def test_an_answer_is_stopped_and_the_conversation_goes_on(tab, how):
    tab.run("document.querySelector('#length').value = 1500")
    tab.page.gate.free.clear()
    tab.type("And what else?" + ENTER)
    tab.until("document.querySelector('.answer')?.innerText")
    if how == "button":
        tab.click("#stop")
    else:
        tab.type(ESCAPE)
    tab.until("document.querySelector('.answer.stopped')")
    tab.page.gate.free.set()
    with tab.page.busy:
        assert tab.page.gate.taken < 20
    tab.run("document.querySelector('#length').value = 12")
    tab.type("is it red", "#question")
    tab.click("#send")
    tab.until(f"document.querySelectorAll('.answer').length == 2 && {ANSWERED}")
    assert not tab.texts(".error")
    (conversation,) = tab.page.conversations.values()
    assert conversation.turns[0][1] == conversation.turns[0][1].strip() != ""


DROP = """const data = new DataTransfer();
const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0));
data.items.add(new File([bytes], "blue.png", {type: "image/png"}));
if (arguments[2]) data.setData("text/plain", arguments[2]);
const options = {bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data};
return document.querySelector("main").dispatchEvent(new (arguments[1] == "drop" ? DragEvent : ClipboardEvent)(
  arguments[1], options));"""


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("how", ["button", "drop", "paste"])
def test_a_picture_comes_by_button_drop_and_paste(tab, talker, tmp_path, how):
    """It is shown, the answer is about it, and what was said before is another conversation."""
    tab.type("is it red" + ENTER)
    tab.until(f"document.querySelector('.answer') && {ANSWERED}")
    if how == "button":
        tab.type(str(save_image(tmp_path / "blue.png", colour="blue")), "#file")
    else:
        tab.run(DROP, base64.b64encode(png("blue")).decode(), how)
    tab.until("document.querySelector('#picture').naturalWidth == 40")
    assert tab.texts(".answer") == []
    tab.type("a red square?" + ENTER)
    tab.until(f"document.querySelector('.answer') && {ANSWERED}")
    (expected,) = said_by(talker, "a red square?", colour="blue")
    assert shown(tab.text(".answer")) == shown(expected)
    tab.click("#clear")
    tab.until("!document.querySelector('.answer')")
    assert tab.run("return !document.querySelector('#picture').hidden")
    tab.click("#remove")
    tab.until("document.querySelector('#picture').hidden")
    (conversation,) = tab.page.conversations.values()
    assert not conversation.picture


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("text, is_picture", [("red\t7\nblue\t8", False), ("/home/me/blue.png", True)])
def test_text_that_is_copied_with_a_picture_of_itself_is_text(tab, text, is_picture):
    """As a spreadsheet copies it; a file manager copies a file's name with the file."""
    tab.type("is it red" + ENTER)
    tab.until(f"document.querySelector('.answer') && {ANSWERED}")
    is_left_to_the_browser = tab.run(DROP, base64.b64encode(png("blue")).decode(), "paste", text)
    assert is_left_to_the_browser == (not is_picture)
    if is_picture:
        tab.until("document.querySelector('#picture').naturalWidth == 40")
    time.sleep(0.3)
    assert len(tab.texts(".answer")) == (0 if is_picture else 1)
    assert tab.run("return document.querySelector('#picture').hidden") == (not is_picture)


@needs_browser
@pytest.mark.slow
def test_a_picture_that_is_kept_no_more_goes_from_the_page_with_clear(tab, tmp_path):
    """Where chat.py was started anew, or there were too many others: else one would be shown and not seen."""
    tab.type(str(save_image(tmp_path / "blue.png", colour="blue")), "#file")
    tab.until("!document.querySelector('#picture').hidden")
    tab.page.conversations.clear()
    tab.type("is it red" + ENTER, "#question")
    assert "kept no more" in tab.until("document.querySelector('.error')?.innerText")
    tab.click("#clear")
    tab.until("!document.querySelector('.error')")
    assert tab.run("return document.querySelector('#picture').hidden")
    assert tab.text("figcaption") == "No picture yet"


@needs_browser
@pytest.mark.slow
def test_a_question_that_is_sent_while_a_picture_is_read_waits_for_it(tab, talker, tmp_path):
    """And is not asked if none comes of it; two pictures come in their turn."""
    with tab.page.busy:
        tab.type(str(save_image(tmp_path / "red.png", colour="red")), "#file")
        tab.type(str(save_image(tmp_path / "blue.png", colour="blue")), "#file")
        tab.type("a red square?" + ENTER, "#question")
        time.sleep(0.3)
    tab.until(f"document.querySelector('.answer') && {ANSWERED}")
    (expected,) = said_by(talker, "a red square?", colour="blue")
    assert tab.texts(".question") == ["a red square?"]
    assert shown(tab.text(".answer")) == shown(expected)
    (tmp_path / "none.png").write_text("no picture")
    with tab.page.busy:
        tab.type(str(tmp_path / "none.png"), "#file")
        tab.type("is it red" + ENTER, "#question")
        time.sleep(0.3)
    tab.until("document.querySelector('.error')")
    assert len(tab.texts(".question")) == 1
    assert tab.run("return question.value") == "is it red"
    tab.type(ENTER, "#question")
    tab.until(f"document.querySelectorAll('.answer').length == 2 && {ANSWERED}")


@needs_browser
@pytest.mark.slow
def test_errors_are_shown_and_what_was_typed_is_not_lost(tab, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    tab.type(str(text), "#file")
    assert "the picture: no picture in one of" in tab.until("document.querySelector('.error')?.innerText")
    assert tab.text("figcaption") == "No picture yet"
    tab.run("about.most_bytes = 5")
    tab.type(str(text), "#file")
    assert "text.png: 0.0 MB are more than" in tab.until("document.querySelectorAll('.error')[1]?.innerText")
    too_long = "a red square " * 900
    tab.run("document.querySelector('#question').value = arguments[0]", too_long)
    tab.click("#send")
    assert "the question is too long" in tab.until("document.querySelectorAll('.error')[2]?.innerText")
    assert tab.run("return document.querySelector('#question').value") == too_long.strip()
    tab.run("document.querySelector('#question').value = ''")
    tab.page.conversations.clear()
    tab.run("begun = true")
    tab.type("is it red", "#question")
    tab.type(ENTER)
    assert "kept no more" in tab.until("document.querySelectorAll('.error')[3]?.innerText")
    tab.page.server_close()
    tab.click("#send")
    assert "Is it still running?" in tab.until("document.querySelectorAll('.error')[4]?.innerText")
    assert tab.run("return document.querySelector('#question').value") == "is it red"


@needs_browser
@pytest.mark.slow
def test_notes_say_who_is_next_and_what_is_forgotten(tab, monkeypatch):
    monkeypatch.setattr(chat, "CONTEXT", 110)
    with tab.page.busy:
        tab.type("is it red" + ENTER, "#question")
        tab.until("document.querySelector('.note')?.innerText.includes('you are next')")
    tab.until(f"document.querySelector('.answer').innerText && {ANSWERED}")
    assert tab.texts(".note") == []
    for count in range(2, 7):
        tab.type("And what else?" + ENTER, "#question")
        tab.until(f"document.querySelectorAll('.answer').length == {count} && {ANSWERED}")
    notes = tab.texts(".note")
    tab.size(390, 500)
    tab.until("log.scrollHeight - log.scrollTop - log.clientHeight < 2")  # the end stays in view
    assert tab.run("return log.scrollTop > 100")
    assert notes
    assert all("forgotten, the picture is not" in note for note in notes)
    assert not tab.texts(".error")


@needs_browser
@pytest.mark.slow
def test_temperature_and_length_are_what_is_asked_with(tab, monkeypatch):
    asked = []
    ask = chat.Conversation.ask
    monkeypatch.setattr(chat.Conversation, "ask", lambda self, *args, **options: asked.append(options)
                        or ask(self, *args, **options))
    assert tab.run("return document.querySelector('#length').value") == "12"
    tab.click("summary")
    tab.run("document.querySelector('#length').value = 3")
    tab.click("#temperature")  # in its middle
    tab.type("is it red", "#question")
    tab.click("#send")
    tab.until(f"document.querySelector('.answer') && {ANSWERED}")
    assert asked[0]["max_new_tokens"] == 3
    assert 0.5 <= asked[0]["temperature"] <= 1.0
    assert tab.text("#degrees") == f"{asked[0]['temperature']:g}"
    tab.run("document.querySelector('#length').value = ''")
    tab.type("is it red", "#question")
    tab.click("#send")
    time.sleep(0.2)
    assert len(asked) == 1


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("given", [
    {"temperature": 0.75, "max_new_tokens": 3000}, {"temperature": 1.9, "max_new_tokens": 2049}])
def test_what_the_command_says_is_asked_with_though_the_page_has_coarser_or_lower(tab, monkeypatch, given):
    asked = []
    ask = chat.Conversation.ask

    def briefly(self, question, **options):
        asked.append({name: options[name] for name in given})
        return ask(self, question, **options | {"max_new_tokens": 3})

    monkeypatch.setattr(chat.Conversation, "ask", briefly)
    tab.page.options = OPTIONS | given
    tab.tell("/refresh")
    tab.until("document.querySelector('#length').value == arguments[0]", given["max_new_tokens"])
    tab.type("is it red" + ENTER, "#question")
    tab.until(f"document.querySelector('.answer') && {ANSWERED}")
    tab.click("summary")
    assert asked == [given]
    assert tab.text("#degrees") == str(given["temperature"])


@needs_browser
@pytest.mark.slow
def test_everything_is_reached_by_keyboard(tab):
    """From the question on, Tab goes round."""
    reached = []
    for _ in range(12):
        reached.append(tab.run("return document.activeElement.id || document.activeElement.tagName"))
        tab.type(TAB)
    assert reached[0] == "question"
    assert {"send", "file", "clear", "SUMMARY", "log"} <= set(reached)


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width, height", [(1280, 800), (390, 700), (320, 568)])
def test_nothing_is_cut_off_on_narrow_screens(tab, tmp_path, width, height):
    tab.size(width, height)
    tab.type(str(save_image(tmp_path / "a.png", size=(900, 300))), "#file")
    tab.until("document.querySelector('#picture').naturalWidth == 640")
    tab.type("is it red " + "w" * 80 + ENTER, "#question")
    tab.until(f"document.querySelector('.answer') && {ANSWERED}")
    assert tab.run("return document.documentElement.scrollWidth") <= width
    for name in ("#picture", "#send", "#question", "label.button", "#clear", ".question", ".answer"):
        box = tab.run("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", name)
        assert 0 <= box["left"] < box["right"] <= width, name
        if name not in (".question", ".answer"):
            assert 0 <= box["top"] < box["bottom"] <= height, name


@needs_browser
@pytest.mark.slow
def test_what_a_model_or_a_person_writes_is_text_and_no_markup(tab):
    evil = "<img src=x onerror=document.title='evil'><script>document.title='evil'</script>"
    tab.type(evil + ENTER)
    tab.until(f"document.querySelector('.answer') && {ANSWERED}")
    assert tab.texts(".question") == [evil]
    tab.run("add('answer', arguments[0])", evil)
    tab.run("const s = document.createElement('script'); s.textContent = \"document.title = 'evil'\";"
            "document.body.append(s)")  # the policy of the page holds for what would get in all the same
    assert tab.run("return document.title") == "a model"
