"""24 clients that write ConfigMaps, and 4 that watch them, while the server is killed.

    churn.py KUBECONFIG SEED        prints "acks N" as writes are acknowledged; ends after a line on standard input

Each writer has names of its own and knows what they must be. Whether a write whose answer was lost has been done, it
asks afterwards; so the history of each name is known exactly, and each watcher must have been told just that: every
change once, in order, over all deaths of the server. Exit 0 and a last line "ok …" if so.
"""
import base64
import http.client
import json
import os
import random
import re
import ssl
import sys
import tempfile
import threading
import time

WRITERS, WATCHERS, NAMES = 24, 4, 5
PATH = "/api/v1/namespaces/default/configmaps"
PATIENCE = 60
stop = threading.Event()
failures = []
acks = [0] * WRITERS


def fail(text):
    failures.append(text)
    stop.set()


class Server:
    def __init__(self, kubeconfig):
        with open(kubeconfig) as file:
            text = file.read()

        def field(name):
            return re.search(r"^[ -]*%s:\s*(\S+)" % name, text, re.M).group(1).strip('"')

        self.host, self.port = field("server").removeprefix("https://").rstrip("/").rsplit(":", 1)
        self.context = ssl.create_default_context(
            cadata=base64.b64decode(field("certificate-authority-data")).decode())
        with tempfile.NamedTemporaryFile() as pair:
            for name in ("client-certificate-data", "client-key-data"):
                pair.write(base64.b64decode(field(name)))
            pair.flush()
            self.context.load_cert_chain(pair.name)

    def connect(self):
        """Waits until the server takes a connection."""
        end = time.monotonic() + PATIENCE
        while True:
            connection = http.client.HTTPSConnection(self.host, int(self.port), context=self.context, timeout=PATIENCE)
            try:
                connection.connect()
                return connection
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)


class Lost(Exception):
    """The answer did not come: who knows what has happened."""


class Client:
    def __init__(self, server):
        self.server, self.connection = server, None

    def ask(self, method, path, body=None, kind="application/json"):
        try:
            if self.connection is None:
                self.connection = self.server.connect()
            self.connection.request(method, path, body and json.dumps(body), {"Content-Type": kind})
            answer = self.connection.getresponse()
            text = answer.read()
            if answer.status >= 500:
                raise Lost(text)
            return answer.status, json.loads(text)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.connection = None
            raise Lost(error) from error


def revision(value):
    return int(value["metadata"]["resourceVersion"])


def writer(server, number, seed, histories):
    chance, client = random.Random(seed * 1000 + number), Client(server)
    state, highest, turn = {}, 0, 0
    while not stop.is_set():
        turn += 1
        name = "w%d-%d" % (number, chance.randrange(NAMES))
        told = histories.setdefault(name, [])
        old, new = state.get(name), str(turn)
        data = {"data": {"n": new}}
        try:
            if old is None:
                code, answer = client.ask("POST", PATH, dict(data, metadata={"name": name}))
            elif chance.random() < 0.6:
                code, answer = client.ask("PATCH", PATH + "/" + name, data, "application/merge-patch+json")
            else:
                new = None
                code, answer = client.ask("DELETE", PATH + "/" + name)
            if code not in (200, 201):
                return fail("writer %d: %s: %d %s" % (number, name, code, answer))
            done = True
            if new is not None:
                if revision(answer) <= highest:
                    return fail("%s: resourceVersion went from %d to %d" % (name, highest, revision(answer)))
                highest = revision(answer)
        except Lost:
            # Dead servers do nothing more: what is there now is how it went.
            found = None
            while found is None and not failures:
                try:
                    code, answer = client.ask("GET", PATH + "/" + name)
                    found = answer["data"]["n"] if code == 200 else ""
                except Lost:
                    pass
            if found not in (old or "", new or ""):
                return fail("%s is %r; it was %r, or is %r" % (name, found, old, new))
            done = found == (new or "")
        if not done:
            continue
        acks[number] += 1
        kind = "DELETED" if new is None else "ADDED" if old is None else "MODIFIED"
        told.append((kind, old if new is None else new))
        state[name] = new


def watcher(server, start, seen):
    last = start
    while not failures:
        try:
            connection = server.connect()
            connection.request("GET", "%s?watch=1&allowWatchBookmarks=true&resourceVersion=%d" % (PATH, last))
            answer = connection.getresponse()
            if answer.status != 200:
                return fail("a watch from %d: %d %s" % (last, answer.status, answer.read()))
            for line in answer:
                event = json.loads(line)
                kind, value = event["type"], event["object"]
                if kind == "ERROR":
                    return fail("a watch from %d ends with %s" % (last, value))
                if revision(value) < last or (revision(value) == last and kind != "BOOKMARK"):
                    return fail("a watch went from %d to %d" % (last, revision(value)))
                last = revision(value)
                if kind == "BOOKMARK":
                    continue
                name = value["metadata"]["name"]
                seen.append((last, kind, name, value.get("data", {}).get("n")))
                if name == "end":
                    return None
        except (OSError, http.client.HTTPException, ValueError):
            continue
    return None


def main():
    server, seed = Server(sys.argv[1]), int(sys.argv[2])
    _, listed = Client(server).ask("GET", PATH)
    start = revision(listed)
    histories = [{} for _ in range(WRITERS)]
    seen = [[] for _ in range(WATCHERS)]
    watchers = [threading.Thread(target=watcher, args=(server, start, one), daemon=True) for one in seen]
    writers = [threading.Thread(target=writer, args=(server, n, seed, histories[n])) for n in range(WRITERS)]
    for thread in watchers + writers:
        thread.start()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    while not stop.wait(0.05):
        print("acks", sum(acks), flush=True)
    for thread in writers:
        thread.join()
    if not failures:
        Client(server).ask("POST", PATH, {"metadata": {"name": "end"}})
        for thread in watchers:
            thread.join(PATIENCE)
            if thread.is_alive():
                fail("a watcher was not told of the end within %d s" % PATIENCE)
    if failures:
        # Watchers wait for what will not come.
        print("\n".join(failures), file=sys.stderr, flush=True)
        os._exit(1)

    wanted = {name: told for one in histories for name, told in one.items() if told}
    for index, one in enumerate(seen):
        if one != seen[0]:
            sys.exit("watchers 0 and %d were told different things" % index)
    heard = {}
    for _, kind, name, value in seen[0]:
        if name != "end":
            heard.setdefault(name, []).append((kind, value))
    for name in wanted.keys() | heard.keys():
        if wanted.get(name) != heard.get(name):
            sys.exit("%s: written %s\ntold %s" % (name, wanted.get(name), heard.get(name)))
    _, listed = Client(server).ask("GET", PATH)
    there = {item["metadata"]["name"]: item["data"]["n"] for item in listed["items"] if "n" in item.get("data", {})}
    alive = {name: told[-1][1] for name, told in wanted.items() if told[-1][0] != "DELETED"}
    if there != alive:
        sys.exit("there: %s\nwritten: %s" % (there, alive))
    print("ok: %d writes by %d clients, told once and in order to %d watchers"
          % (sum(map(len, wanted.values())), WRITERS, WATCHERS))


main()
