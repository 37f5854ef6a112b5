"""A conversation about a picture: in the terminal, or on a page in the browser of this machine.

    python chat.py out/opt-6.7b-to-vicuna-7b-chat cat.jpg
    python chat.py out/opt-6.7b-to-vicuna-7b-chat --page     # http://127.0.0.1:8000

The model is a run of finetune.py --instruct, or any other run or BLIP-2 checkpoint whose language
model was taught to converse. `Conversation` is what both have in common.
"""

import argparse
import base64
import collections
import contextlib
import errno
import hashlib
import importlib
import io
import json
import os
import re
import select
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import data
import llm as language_models
import transfer

# ------------------------------------------------------------------------------------ a conversation

CONTEXT = 2048  # positions that a conversation takes up at most, as in the demo of VPGTrans


def common_beginning(one, other):
    """How many items two lists begin with alike."""
    for n, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return n
    return min(len(one), len(other))


class Conversation:
    """Turns about one picture, with a VisualLLM, its tokenizer and its data.ChatTemplate, as
    transfer.load_chat gives them.

    Before each answer the model reads the whole conversation, as the template writes it. What it has
    read is kept: of the next turn's ids, only those behind the longest common beginning are read (an
    encoder, as T5's, reads all anew). Where it gets too long the oldest turns are forgotten, never
    the picture."""

    def __init__(self, model, tok, template):
        self.model = model
        self.tok = tok
        self.template = template
        self.ends = transfer.answer_ends(model, tok)
        if not template.stop:  # a text, which is looked for in what is said
            self.ends += data.stop_ids(tok, template)
        self.context = min(CONTEXT, getattr(model.llm, "longest", None) or CONTEXT)
        self.picture = {}  # what the model sees of it
        self.turns = []  # [[question, answer], ...]
        self.forgotten = 0  # of the turns, so many of the first are read no more
        self.release()

    def release(self):
        """Gives back the memory of what was read; if need be it is read again."""
        self.cache = None
        self.read = []  # the ids that the cache has read

    def clear(self):
        """Forgets what was said. The picture stays."""
        self.turns = []
        self.forgotten = 0

    @torch.inference_mode()
    def show(self, image):
        """A picture (PIL), or None for none: with it a new conversation begins. If the model cannot see it,
        all is as it was."""
        self.release()
        picture = {}
        if image is not None:
            pixels = data.resize(image, self.model.image_size)[None]
            picture = self.model.see(pixels.to(self.device))
        self.clear()
        self.picture = picture

    @property
    def device(self):
        return self.model.projector.weight.device

    def ask(self, question, max_new_tokens=300, **options):
        """Yields the answer, a piece for each token, at times "". `options` are those of the LLM's
        stream: temperature, top_p, repetition_penalty.

        An answer that is closed before its end stands as it is then; a question without any is taken
        back. ValueError for an empty question, and for one that is longer than the context: then all
        is as it was."""
        question = question.encode(errors="replace").decode().strip()  # half a surrogate is no text
        if not question:
            raise ValueError("the question is empty")
        ids = self.prompt(question, max_new_tokens)
        turn = [question, ""]
        self.turns.append(turn)
        stream = self.stream(ids, min(max_new_tokens, self.context - len(ids)), options)
        texts = data.stream_text(self.tok, stream, self.template.stop)
        try:
            with contextlib.closing(stream), contextlib.closing(texts):
                for text in texts:
                    text = text if turn[1] else text.lstrip()
                    turn[1] += text
                    yield text
        finally:
            turn[1] = turn[1].rstrip()
            if not turn[1]:
                self.turns.pop()

    def prompt(self, question, max_new_tokens):
        """-> the ids that are read before the answer; the oldest turns are forgotten where they would
        leave no room for it. A quarter of the context is room enough for any: few answers are as long as
        they may be."""
        room = min(max_new_tokens, self.context // 4)
        places = self.model.num_query_tokens if self.picture else 0
        for forgotten in range(self.forgotten, len(self.turns) + 1):
            turns = [*self.turns[forgotten:], [question, None]]
            ids = data.chat_prompt_ids(self.tok, self.template, turns, places)
            if len(ids) + room <= self.context:
                break
        if len(ids) >= self.context:
            raise ValueError(f"the question is too long: with what stands around it, it takes {len(ids):,} "
                             f"tokens, and with its answer it must fit into {self.context:,}; shorten it")
        self.forgotten = forgotten
        return ids

    @torch.inference_mode()
    def embed(self, ids):
        """Ids, IMAGE where the picture goes -> (1,S,D): what the LLM reads."""
        row = torch.tensor([ids])
        if data.IMAGE in ids:
            prefix, _ = self.model.prefix(row, **self.picture)
            return prefix
        return self.model.llm.embed(row.to(self.device))

    def stream(self, ids, max_new_tokens, options):
        """Yields the ids of the answer to a prompt, of which what is not in the cache is read."""
        options = dict(max_new_tokens=max_new_tokens, stop=self.ends, **options)
        if self.tok.encoder_decoder:
            yield from self.model.llm.stream(self.embed(ids), **options)
            return
        if self.cache is None:
            self.cache = language_models.Cache(self.model.llm, 1, self.context, K=1, memory=None)
        known = common_beginning(ids[:-1], self.read)  # the last one is read for what comes next
        self.cache.cut(known)
        read = list(ids)
        try:
            for id in self.model.llm.stream(self.embed(ids[known:]), cache=self.cache, **options):
                read.append(id)
                yield id
        finally:
            self.read = read[: self.cache.used]


# ------------------------------------------------------------------------------------ in the terminal

HELP = """\
/image FILE   another picture, and a new conversation about it
/clear        forgets what was said; the picture stays
/help         shows this
/quit         ends the program, as Ctrl-D does; Ctrl-C ends an answer"""


def typed_path(text):
    """A path as people type it, or as terminals write a file that is dropped there: in quotes, or with
    backslashes."""
    text = text.strip()
    with contextlib.suppress(ValueError):  # quotes that do not end
        words = shlex.split(text)
        if len(words) == 1 and not Path(text).exists():
            text = words[0]
    return os.path.expanduser(text)


def printable(text):
    """A text without what would command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


@contextlib.contextmanager
def interrupts():
    """-> an Event that Ctrl-C sets, instead of ending what is being done."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def how_forgetful(count):
    """What a person is told when the first turns are no longer read."""
    turns = "turn is" if count == 1 else f"{count} turns are"
    return f"the conversation has got too long for the model: its first {turns} forgotten, the picture is not"


def print_answer(conversation, question, options):
    """Prints an answer as it comes, until it ends or Ctrl-C is pressed."""
    forgotten = conversation.forgotten
    said = ""
    with interrupts() as interrupted, contextlib.closing(conversation.ask(question, **options)) as answer:
        for piece in answer:
            if conversation.forgotten > forgotten:
                forgotten = conversation.forgotten
                print(f"({how_forgetful(forgotten)})")
            said += piece
            print(printable(piece), end="", flush=True)
            if interrupted.is_set():
                break
    print(" (stopped)" if interrupted.is_set() else "" if said.strip() else "(it says nothing)")


def obey(conversation, line, options):
    """Does what a line asks for. -> whether the conversation goes on"""
    word, _, rest = line.strip().partition(" ")
    if word == "/quit":
        return False
    if word == "/help":
        print(HELP)
    elif word == "/clear":
        conversation.clear()
        print("What was said is forgotten; the picture stays.")
    elif word == "/image" and not rest.strip():
        print("/image needs the name of a file.")
    elif word == "/image":
        file = typed_path(rest)
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: there is no such file")
        conversation.show(data.load_image(file))
        print(f"{file}: a new conversation begins.")
    elif word.startswith("/"):
        print(f"{word} is no command. There are:\n{HELP}")
    else:
        print_answer(conversation, line, options)
    return True


def converse(conversation, options):
    """Reads lines from the terminal and answers them, until the person leaves."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # lines can be edited, the arrow keys bring back earlier ones
    goes_on = True
    while goes_on:
        try:
            line = input("\n> ")
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\nCtrl-D or /quit ends the program.")
            continue
        try:
            goes_on = not line.strip() or obey(conversation, line, options)
        except KeyboardInterrupt:  # while a picture is read
            print("(stopped)")
        except torch.OutOfMemoryError as error:
            conversation.release()
            print(f"GPU memory ran out; /clear makes the conversation shorter ({printable(str(error))})")
        except (OSError, ValueError) as error:
            print(printable(str(error)))


# ---------------------------------------------------------------------------------------- on a page

MOST_BYTES = 32 * 2**20  # of a picture that is sent
MOST_TEXT = 256 * 2**10  # bytes of a question, and what is said with it
HOTTEST = 2  # temperature that a question may ask for
MOST_CONVERSATIONS = 16  # that are kept, one a tab; of what was read, only the last one's
PREVIEW = 640  # pixels of the longer side of the picture beside the conversation


class Upload(io.BytesIO):
    """The bytes of a picture that was sent, as data.load_image takes a file; its errors name it so."""

    def __str__(self):
        return "the picture"


def preview(image):
    """Makes a picture (PIL) small (in place). -> it as a data: URL, which all browsers show"""
    image.thumbnail((PREVIEW, PREVIEW))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class Page(ThreadingHTTPServer):
    """Serves chat.html and the conversations of its tabs, to this machine alone. One answer at a time:
    there is one model."""

    daemon_threads = True

    def __init__(self, port, name, chat, options):
        super().__init__(("127.0.0.1", port), Request)
        self.name = name
        self.chat = chat  # model, tokenizer, template
        self.options = options
        self.busy = threading.Lock()  # of the model, and of what follows
        self.conversations = collections.OrderedDict()
        self.html = (Path(__file__).parent / "chat.html").read_bytes()
        self.policy = "; ".join([
            "default-src 'none'", "img-src data:", "connect-src 'self'", "base-uri 'none'",
            "form-action 'none'", "frame-ancestors 'none'",
            f"script-src {self.digest(b'script')}", f"style-src {self.digest(b'style')}"])

    def digest(self, element):
        """What of the page the browser may run: this script, this style, nothing that got in."""
        content = re.search(b"<%b>(.*)</%b>" % (element, element), self.html, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"

    def conversation(self, id, begun):
        """The conversation of a tab. ValueError if it has `begun` and is kept no more."""
        if not re.fullmatch("[0-9a-f]{32}", id):
            raise ValueError("the name of a conversation must be 32 hexadecimal digits")
        if begun and id not in self.conversations:
            raise ValueError("this conversation is kept no more: chat.py was started anew, or there were "
                             f"{MOST_CONVERSATIONS} others since. Choose the picture again, or clear")
        if id not in self.conversations:
            self.conversations[id] = Conversation(*self.chat)
        self.conversations.move_to_end(id)
        for other in list(self.conversations)[:-1]:
            self.conversations[other].release()
        while len(self.conversations) > MOST_CONVERSATIONS:
            self.conversations.popitem(last=False)
        return self.conversations[id]

    def about(self):
        """What the page wants to know."""
        return {"model": self.name, "most_bytes": MOST_BYTES, **self.options}

    def handle_error(self, request, client_address):
        """A browser that goes away is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Gone(Exception):
    """The browser has closed the connection."""


class Request(BaseHTTPRequestHandler):
    """One request of the page. Answers are lines of JSON, sent as they come: {"text"}, {"waiting"},
    {"forgotten"}, {"preview"}, {"picture"}, {"error"}, at the end {"end": true}; the connection is closed
    behind them."""

    timeout = 60  # seconds without a byte

    def log_message(self, *_):
        """Nothing is written down of what people ask."""

    def head(self, status, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()

    def tell(self, **line):
        """Sends a line of an answer. Gone if nobody is there."""
        try:
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise Gone
            if line:
                self.wfile.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise Gone from error

    def is_allowed(self):
        """Is it a request of our page's? Not one of another page's, by a name that was made to lead here
        (DNS rebinding) or across sites. Ports may differ, where one is forwarded."""
        host = self.headers.get("Host", "")
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", host):
            return False
        return self.command == "GET" or self.headers.get("Origin") == f"http://{host}"

    def refuse(self):
        self.head(403, "text/plain")
        self.wfile.write(f"chat.py answers to http://127.0.0.1:{self.server.server_port} alone\n".encode())

    def do_GET(self):
        if not self.is_allowed():
            self.refuse()
        elif self.path == "/":
            self.head(200, "text/html; charset=utf-8")
            self.wfile.write(self.server.html)
        elif self.path == "/about":
            self.head(200, "application/json")
            self.tell(**self.server.about())
        else:
            self.head(404, "text/plain")

    def do_POST(self):
        deeds = {"/picture": self.take_picture, "/ask": self.answer, "/clear": self.clear}
        if not self.is_allowed():
            return self.refuse()
        if self.path not in deeds:
            return self.head(404, "text/plain")
        try:
            body = self.body(MOST_BYTES if self.path == "/picture" else MOST_TEXT)
            self.head(200, "application/x-ndjson")
            self.wait_for_model()
            try:
                deeds[self.path](body)
            finally:
                self.server.busy.release()
            self.tell(end=True)
        except Gone:
            pass
        except (OSError, ValueError) as error:
            self.fail(str(error))
        except Exception as error:  # out of memory, say: the page goes on, the terminal has the rest
            traceback.print_exc()
            self.fail(f"{type(error).__name__}: {error}")

    def fail(self, message):
        with contextlib.suppress(Gone):
            self.tell(error=message)

    def body(self, most):
        """The bytes that were sent. ValueError if they are more than `most`."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.head(411, "text/plain")
            raise Gone
        if int(length) > most:
            self.head(413, "application/x-ndjson")
            left = min(int(length), 8 * most)
            while left > 0:  # or browsers, still sending, would not read the answer
                left -= len(self.rfile.read(min(left, 2**16)) or bytes(left))
            raise ValueError(f"{int(length) / 2**20:.1f} MB are more than the {most / 2**20:g} MB that are "
                             "taken")
        return self.rfile.read(int(length))

    def wait_for_model(self):
        """Returns when the model is ours, which is busy while another tab gets an answer."""
        if self.server.busy.acquire(blocking=False):
            return
        self.tell(waiting=True)
        while not self.server.busy.acquire(timeout=0.2):
            self.tell()

    def conversation(self, begun=False):
        return self.server.conversation(self.headers.get("X-Conversation", ""), begun)

    def take_picture(self, body):
        image = data.load_image(Upload(body))
        self.conversation().show(image)
        self.tell(preview=preview(image))

    def clear(self, body):
        """Forgets what was said, and the picture, too, if the body says so. Tells whether there is one."""
        conversation = self.conversation()
        if body == b"picture":
            conversation.show(None)
        else:
            conversation.clear()
        self.tell(picture=bool(conversation.picture))

    def answer(self, body):
        asked = read_question(body)
        conversation = self.conversation(asked.pop("begun"))
        forgotten = conversation.forgotten
        options = self.server.options | asked
        with contextlib.closing(conversation.ask(**options)) as answer:
            for piece in answer:
                if conversation.forgotten > forgotten:
                    forgotten = conversation.forgotten
                    self.tell(forgotten=how_forgetful(forgotten))
                self.tell(**({"text": piece} if piece else {}))


def read_question(body):
    """What the page asks, as JSON -> {"question", "begun", "temperature", "max_new_tokens"}. ValueError
    if it is anything else."""
    kinds = {"question": str, "begun": bool, "temperature": (int, float), "max_new_tokens": int}
    try:
        asked = dict(json.loads(body))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"a question must be an object of JSON: {error}") from error
    if asked.keys() != kinds.keys() or not all(isinstance(asked[key], kind) for key, kind in kinds.items()):
        raise ValueError(f"a question must have {', '.join(kinds)}, each of its kind")
    if not 0 <= asked["temperature"] <= HOTTEST:  # NaN, too
        raise ValueError(f"the temperature must be from 0 to {HOTTEST}")
    return asked


def serve(port, name, chat, options):
    """The page, until Ctrl-C."""
    try:
        page = Page(port, name, chat, options)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise OSError(f"port {port} is in use; name another one with --port (0: any that is free)") from error
    with page, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{page.server_port} (Ctrl-C ends it)", flush=True)
        page.serve_forever()
    # a thread that is at an answer would be torn out of torch's code, which aborts the process
    os._exit(0)


# --------------------------------------------------------------------------------------------- command


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL",
                        help="a run's folder (out/...), or a BLIP-2 checkpoint (folder, Hub id, short name)")
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="a picture to begin with, in the terminal")
    parser.add_argument("--template", choices=sorted(data.TEMPLATES),
                        help="how a model converses that has no chat template of its own")
    parser.add_argument("--page", action="store_true", help="on a page in the browser, not in the terminal")
    parser.add_argument("--port", type=int, default=8000, help="of the page (default: %(default)s; 0: any)")
    parser.add_argument("--max-new-tokens", type=int, default=300,
                        help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="above 0: draw at random, the more so the higher (default: %(default)s, always "
                             "the most probable token)")
    parser.add_argument("--top-p", type=float, default=0.9,
                        help="draw from the most probable tokens that make up this share (default: "
                             "%(default)s)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0,
                        help="above 1: tokens that the answer has already are less probable (default: "
                             "%(default)s, as VPGTrans; MiniGPT-4 has 1.05)")
    parser.add_argument("--precision", choices=tuple(transfer.DTYPES), default="bf16",
                        help="of ViT and LLM (default: %(default)s)")
    parser.add_argument("--llm-weights", choices=("full", "int8", "nf4"),
                        help="of the LLM: as --precision says, or quantised, which takes less memory "
                             "(default: as in the run's training, else full)")
    args = parser.parse_args(argv)
    if args.page and args.image:
        parser.error("with --page, pictures are chosen on the page")
    if args.page and not 0 <= args.temperature <= HOTTEST:
        parser.error(f"with --page, --temperature must be from 0 to {HOTTEST}")
    if not 0 <= args.port < 2**16:
        parser.error("--port must be from 0 to 65535")
    return args


OF_STREAM = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")


def start(args):
    """Loads the model and begins."""
    options = {name: getattr(args, name) for name in OF_STREAM}
    language_models.check_generation(num_beams=1, **options)
    image = data.load_image(args.image) if args.image else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.time()
    dtype = transfer.DTYPES[args.precision]
    chat = transfer.load_chat(args.model, args.template, dtype, device, args.llm_weights)
    print(f"{args.model}: loaded in {time.time() - began:.1f} s", flush=True)
    if args.page:
        return serve(args.port, Path(args.model).name, chat, options)
    conversation = Conversation(*chat)
    conversation.show(image)
    print(f"{args.image or 'No picture yet: /image FILE'}. /help says what else there is.")
    converse(conversation, options)


def main(argv=None):
    sys.stdout.reconfigure(errors="replace")  # an é must not end it where stdout knows no UTF-8
    with contextlib.suppress(AttributeError):  # where standard input is no file
        sys.stdin.reconfigure(errors="replace")
    args = parse_arguments(argv)
    try:
        start(args)
    except (OSError, ValueError) as error:
        print(f"chat.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
