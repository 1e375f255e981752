"""A real HTTP server on this machine that speaks as much of the OpenAI API as an explainer needs, and misbehaves on request."""
import contextlib, json, math, re, socket, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def words(text):
    "A crude tokenizer: words, single digits, single other characters. Joined, they are the text."
    return re.findall(r"[^\W\d]+|.", text, re.S)


def rows(prompt):
    "The tokens of the last table of an all-at-once prompt, read by its grammar: a JSON string, a tab, a word; anything else is an error."
    found = []
    for line in prompt.rstrip("\n").rsplit("\n\n", 1)[1].split("\n")[1:]:
        token, value = line.split("\t")
        assert value == "unknown", line
        found.append(json.loads(token))
    return found


def numbered(prompt):
    "The explanation, the numbered JSON strings and how many there are said to be, read by the grammar of the list prompts."
    head, *parts = prompt.split("\n\n")
    lines = [line.split("\t") for line in parts[0].split("\n")]
    assert [number for number,_ in lines] == [str(i) for i in range(1, len(lines) + 1)], "not numbered in order"
    asked = int(re.match(r"A JSON list of (\d+) ", parts[1])[1])
    assert asked == len(lines)
    return json.loads(head.removeprefix("The feature responds to: ")), [text for _,text in lines]


def level(explanation, token):
    "What this server thinks of a token: 9 if the explanation names it in single quotes, else 0."
    return 9*(f"'{token.strip()}'" in explanation and bool(token.strip()))


def distribution(k, top=10):
    "Log-probabilities in which k has .5, one less (or more) .25, and words the rest."
    return {str(k): math.log(.5), str(k - 1 if k else 1): math.log(.25), "unknown": math.log(.25)}


def chat(body):
    "The content of an honest answer to any of our chat prompts."
    system, prompt = body["messages"][0]["content"], body["messages"][-1]["content"]
    if "Complete the sentence" in system:
        lines = [line.split("\t") for line in prompt.split("\n") if line.startswith('"')]
        return f"the word '{json.loads(max(lines, key=lambda l: int(l[1]))[0]).strip()}'"
    explanation, texts = numbered(prompt)
    if "numbered fragments" not in system: return json.dumps([level(explanation, json.loads(t)) for t in texts])
    word = re.search(r"'(.*)'", explanation)
    return json.dumps([int(bool(word) and word[1] in t) for t in texts])


class ApiServer:
    """`with ApiServer() as server:` and then `server.url`, `server.requests`, `server.faults`.

    A fault is taken off the list by each request: "429" (with Retry-After), "hang", "cut", "drop", "refuse", "sorry", "filter",
    "empty", "short", "broken", "high", "surrogate", "error", "ok", or any other number, which is sent as a status.
    `answer` makes of a request's body the content of a message, or a dict that becomes the choice; `rejects` makes of it what is
    wrong with it, (status, error), or None."""
    def __init__(self, answer=chat, faults=(), echo=True, logprobs=True, delay=0., min_tokens=0, max_logprobs=15, usage=True, rejects=None):
        self.rejects = rejects or (lambda body: None)
        self.answer, self.faults, self.echo, self.logprobs, self.delay = answer, list(faults), echo, logprobs, delay
        self.min_tokens, self.max_logprobs, self.usage = min_tokens, max_logprobs, usage
        self.requests, self.times, self.headers, self.lock, self.busy, self.most_busy = [], [], [], threading.Lock(), 0, 0
        self.stop = threading.Event()

    def __enter__(self):
        handler = type("Handler", (Handler,), dict(api=self))
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.handle_error = lambda *args: None                            # clients that are killed hang up
        self.http.daemon_threads, self.url = True, f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(.02,), daemon=True).start()
        return self

    def __exit__(self, *args):
        self.stop.set()
        self.http.shutdown()
        self.http.server_close()

    def bodies(self): return [json.dumps(body, sort_keys=True) for _,body in self.requests]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass

    def reply(self, status, obj, **headers):
        data = obj if isinstance(obj, bytes) else json.dumps(obj).encode()
        try:
            self.send_response(status)
            for k,v in {"content-type": "application/json", "content-length": len(data), **headers}.items(): self.send_header(k.replace("_", "-"), str(v))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError): pass                   # the client did not wait

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_POST(self):
        api, body = self.api, json.loads(self.rfile.read(int(self.headers["content-length"])))
        with api.lock:
            api.requests.append((self.path.removeprefix("/v1/"), body))
            api.times.append(time.monotonic())
            api.headers.append(dict(self.headers))
            fault = api.faults.pop(0) if api.faults else "ok"
            api.busy += 1
            api.most_busy = max(api.most_busy, api.busy)
        try: self.respond(api, body, fault)
        finally:
            with api.lock: api.busy -= 1

    def respond(self, api, body, fault):
        if api.delay: api.stop.wait(api.delay)
        wrong = lambda status, text: self.reply(status, dict(error=dict(message=text, type="error")))
        if fault == "429": return self.reply(429, dict(error=dict(message="slow down")), retry_after=.2)
        if fault == "hang": return api.stop.wait(30)
        if fault == "drop": return self.hang_up()
        if fault.isdigit(): return wrong(int(fault), f"status {fault} was scripted")
        if (rejected := api.rejects(body)): return self.reply(*rejected)
        if self.path == "/v1/completions": return self.complete(api, body, wrong)
        if self.path != "/v1/chat/completions": return wrong(404, "no such page")
        if body.get("logprobs") and not api.logprobs: return wrong(400, "logprobs are not supported")
        content = api.answer(body)
        if isinstance(content, dict): return self.reply(200, dict(choices=[content]))
        contents = dict(empty="", short="[0, 1]", broken=content[:-1], high=content.replace("0", "11"), surrogate=content + " \ud83d",
                        sorry=f"I'm sorry, but I can't help with {content}.")
        content, message = contents.get(fault, content), {}
        if fault == "refuse": content, message = None, dict(refusal="I will not do that.")
        choice = dict(index=0, finish_reason="content_filter" if fault == "filter" else "stop", message=dict(role="assistant", content=content, **message))
        if body.get("logprobs"): choice["logprobs"] = dict(content=[self.spoken(t, body["top_logprobs"]) for t in words(content or "")])
        answer = dict(id="x", object="chat.completion", model=body["model"], choices=[choice])
        if fault == "error": answer = dict(error=dict(message="the model behind this went away"))
        if api.usage: answer["usage"] = dict(prompt_tokens=100, completion_tokens=10, total_tokens=110)
        data = json.dumps(answer).encode()
        self.reply(200, data[:len(data)//2] if fault == "cut" else data)

    def spoken(self, word, n):
        "A written word with its alternatives."
        others = distribution(int(word)) if word.isdigit() else {word: 0.}
        return dict(token=word, logprob=0., top_logprobs=[dict(token=t, logprob=p) for t,p in list(others.items())[:n]])

    def complete(self, api, body, wrong):
        "The prompt's own tokens with the likeliest words at each."
        if not api.echo: return wrong(404, "this is a chat model")
        if body["max_tokens"] < api.min_tokens: return wrong(400, "max_tokens must be at least 1")
        if body["logprobs"] > api.max_logprobs: return wrong(400, "too many logprobs")
        prompt, tokens = body["prompt"], words(body["prompt"]) + ["!"]*body["max_tokens"]
        explanation = prompt.rsplit("\n\n", 1)[1].split("\n")[0]
        values, at = [distribution(level(explanation, t)) for t in rows(prompt)], 0
        offsets, tops = [], []
        last = prompt.rindex("\n\n")
        for token in tokens:
            offsets.append(at)
            here = token == "unknown" and at > last and prompt[at - 1:at] == "\t"
            tops.append(values.pop(0) if here else {token: -.1, "5": -3.} if at else None)
            at += len(token)
        assert not values
        choice = dict(text=prompt, index=0, logprobs=dict(tokens=tokens, text_offset=offsets, top_logprobs=tops), finish_reason="length")
        self.reply(200, dict(choices=[choice], usage=dict(prompt_tokens=len(tokens), completion_tokens=body["max_tokens"])))


class RawServer:
    """`with RawServer(data) as server:` a socket at `server.url` that answers every request with these bytes, and hangs up, or, with
    `drip`, sends the body a byte every so many seconds, or, with `half`, says that it will send no more and stays."""
    def __init__(self, data, drip=0., half=False): self.data, self.drip, self.half, self.seen = data, drip, half, 0

    def __enter__(self):
        self.socket, self.stop = socket.create_server(("127.0.0.1", 0)), threading.Event()
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.stop.set()
        self.socket.close()

    def serve(self):
        while True:
            try: connection = self.socket.accept()[0]
            except OSError: return
            threading.Thread(target=self.one, args=(connection,), daemon=True).start()

    def one(self, connection):
        head, body, length = b"", b"", 0
        with connection, contextlib.suppress(OSError):
            while b"\r\n\r\n" not in head and not head.startswith(b"\x16") and (part := connection.recv(65536)): head += part
            head, _, body = head.partition(b"\r\n\r\n")
            if (found := re.search(rb"content-length: *(\d+)", head, re.I)): length = int(found[1])
            while len(body) < length and (part := connection.recv(65536)): body += part
            self.seen += 1
            at = self.data.find(b"\r\n\r\n") + 4 if self.drip else len(self.data)
            connection.sendall(self.data[:at])
            for i in range(at, len(self.data)):
                connection.sendall(self.data[i:i + 1])
                if self.stop.wait(self.drip): return
            if self.half:
                connection.shutdown(socket.SHUT_WR)
                self.stop.wait(5)


def http(body, status="200 OK", kind="application/json", length=None, **headers):
    "The bytes of an HTTP answer."
    body = body if isinstance(body, bytes) else body.encode()
    fields = {"content-type": kind, "content-length": len(body) if length is None else length, "connection": "close", **headers}
    head = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k,v in fields.items() if v is not None)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body
