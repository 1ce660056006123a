#!/usr/bin/python3
"""Build the test images from this machine's Debian packages, and push them to a registry.

    build_images.py build  --out DIR                 one OCI layout (tar) per image
    build_images.py push   --out DIR --registry http://127.0.0.1:5000 [--user NAME:PASSWORD] [--ca FILE]
    build_images.py digest --out DIR NAME:TAG        the digest of an image's index

The same inputs give the same bytes. Every image is an index for amd64 and arm64; the arm64 entry holds
a marker only, so that who picks the wrong one ends up with an image that cannot run.
"""
import argparse
import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request

EPOCH = 1_700_000_000
CREATED = "2023-11-14T22:13:20Z"

OCI = {
    "manifest": "application/vnd.oci.image.manifest.v1+json",
    "index": "application/vnd.oci.image.index.v1+json",
    "config": "application/vnd.oci.image.config.v1+json",
    "layer+gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "layer+zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
    "layer": "application/vnd.oci.image.layer.v1.tar",
}
DOCKER = {
    "manifest": "application/vnd.docker.distribution.manifest.v2+json",
    "index": "application/vnd.docker.distribution.manifest.list.v2+json",
    "config": "application/vnd.docker.container.image.v1+json",
    "layer+gzip": "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "layer": "application/vnd.docker.image.rootfs.diff.tar",
}

PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
app:x:1000:1000:app:/home/app:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
"""
GROUP = """root:x:0:
daemon:x:1:
www-data:x:33:
staff:x:50:app,www-data
app:x:1000:
nogroup:x:65534:
"""
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

LIGHTTPD_CONF = """server.document-root = "/var/www/html"
server.port = 8080
server.errorlog = "/tmp/web.log"
server.modules = ("mod_indexfile", "mod_accesslog", "mod_staticfile")
accesslog.filename = "/tmp/web.log"
index-file.names = ("index.html")
mimetype.assign = (".html" => "text/html; charset=utf-8", ".txt" => "text/plain")
"""
# Standard output may be a pipe that another user made, which cannot be opened by name: the log goes
# through a pipe of our own.
WEB_START = """#!/bin/sh
set -e
rm -f /tmp/web.log
mkfifo -m 600 /tmp/web.log
cat <>/tmp/web.log &
echo "web: listening on port 8080"
exec lighttpd -D -f /etc/lighttpd/lighttpd.conf
"""


def sha(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class Layer:
    """A tar layer in memory, with stable metadata."""

    def __init__(self):
        self.buffer = io.BytesIO()
        self.tar = tarfile.open(fileobj=self.buffer, mode="w", format=tarfile.USTAR_FORMAT)
        self.directories = set()

    def _info(self, name, mode, kind=tarfile.REGTYPE, owner=0):
        info = tarfile.TarInfo(name.lstrip("/"))
        info.mode, info.uid, info.gid, info.mtime, info.type = mode, owner, owner, EPOCH, kind
        return info

    def directory(self, name, mode=0o755, owner=0):
        name = name.strip("/")
        if not name or name in self.directories:
            return
        self.directory(os.path.dirname(name))
        self.directories.add(name)
        self.tar.addfile(self._info(name, mode, tarfile.DIRTYPE, owner))

    def file(self, name, data, mode=0o644, owner=0):
        data = data.encode() if isinstance(data, str) else data
        self.directory(os.path.dirname(name.lstrip("/")))
        info = self._info(name, mode, owner=owner)
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))

    def copy(self, path, mode=0o755):
        with open(os.path.realpath(path), "rb") as source:
            self.file(path, source.read(), mode)

    def hard_link(self, name, target):
        info = self._info(name, 0o755, tarfile.LNKTYPE)
        info.linkname = target.lstrip("/")
        self.tar.addfile(info)

    def symlink(self, name, target):
        self.directory(os.path.dirname(name.lstrip("/")))
        info = self._info(name, 0o777, tarfile.SYMTYPE)
        info.linkname = target
        self.tar.addfile(info)

    def whiteout(self, name):
        directory, base = os.path.split(name)
        self.file(os.path.join(directory, ".wh." + base), b"")

    def bytes(self):
        self.tar.close()
        return self.buffer.getvalue()


def shared_libraries(*binaries):
    found = set()
    for binary in binaries:
        text = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
        for line in text.splitlines():
            path = next((word for word in line.split() if word.startswith("/")), None)
            if path:
                found.add(path)
    return sorted(found)


def program(name):
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if not path:
        raise SystemExit("build_images: %s is not installed; see tests/images/README.md" % name)
    return path


def base_layer():
    """What every image stands on: directories, accounts, the C library."""
    layer = Layer()
    for name in ("bin", "dev", "etc", "lib", "lib64", "proc", "run", "sys", "sbin", "usr/bin", "usr/sbin",
                 "var/lib", "var/log", "var/run"):
        layer.directory(name)
    layer.directory("root", 0o700)
    layer.directory("home/app", 0o750, 1000)
    layer.directory("tmp", 0o1777)
    layer.directory("var/tmp", 0o1777)
    layer.file("etc/passwd", PASSWD)
    layer.file("etc/group", GROUP)
    layer.file("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
    layer.file("etc/motd", "the lower layer's message\n")
    for library in shared_libraries(program("busybox")):
        layer.copy(library)
    return layer.bytes()


def busybox_layer():
    busybox = program("busybox")
    layer = Layer()
    layer.directory("bin")
    with open(busybox, "rb") as source:
        layer.file("bin/busybox", source.read(), 0o755)
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for name in sorted(set(names) - {"busybox"}):
        layer.hard_link("bin/" + name, "bin/busybox")
    layer.symlink("usr/bin/env", "../../bin/env")
    layer.whiteout("etc/motd")
    return layer.bytes()


def lighttpd_layer(have):
    """Debian's lighttpd with the modules it is told to load; `have`: libraries that are there."""
    binary = program("lighttpd")
    modules = "/usr/lib/lighttpd"
    wanted = [os.path.join(modules, "mod_%s.so" % name) for name in ("indexfile", "accesslog", "staticfile")]
    wanted = [path for path in wanted if os.path.exists(path)]  # later versions build them in
    layer = Layer()
    layer.copy(binary)
    for path in wanted:
        layer.copy(path, 0o644)
    for library in shared_libraries(binary, *wanted):
        if library not in have:
            layer.copy(library)
    return layer.bytes()


def site_layer(name):
    layer = Layer()
    layer.file("etc/lighttpd/lighttpd.conf", LIGHTTPD_CONF)
    layer.file("usr/bin/serve", WEB_START, 0o755)
    layer.directory("var/www", 0o755, 33)
    layer.directory("var/www/html", 0o755, 33)
    page = "<!doctype html>\n<title>%s</title>\n<h1>This page is served by %s</h1>\n" % (name, name)
    layer.file("var/www/html/index.html", page, owner=33)
    return layer.bytes()


def perl_layer(have):
    """Debian's perl-base and a program of a few network chores; `have`: libraries that are there."""
    binary = program("perl")
    modules = next(path for path in subprocess.run([binary, "-e", 'print join "\\n", @INC'], capture_output=True,
                                                   text=True, check=True).stdout.split() if path.endswith("perl-base"))
    layer = Layer()
    layer.copy(binary)
    objects = []
    for directory, _, names in sorted(os.walk(modules)):
        for name in sorted(names):
            path = os.path.join(directory, name)
            layer.copy(path, 0o644)
            if name.endswith(".so"):
                objects.append(path)
    for library in shared_libraries(binary, *objects):
        if library not in have:
            layer.copy(library)
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "netprobe.pl"), "rb") as source:
        layer.file("usr/bin/netprobe", source.read(), 0o755)
    return layer.bytes()


def dnsmasq_layer(have):
    """Debian's dnsmasq; `have`: libraries that are there."""
    binary = program("dnsmasq")
    layer = Layer()
    layer.copy(binary)
    for library in shared_libraries(binary):
        if library not in have:
            layer.copy(library)
    return layer.bytes()


class Image:
    def __init__(self, names, layers, config, types=OCI, pack="gzip"):
        self.names, self.types = names, types
        self.blobs = {}      # digest -> bytes
        self.manifests = []  # (digest, media type, bytes), children first
        marker = Layer()
        marker.file("wrong-architecture", "arm64\n")
        entries = []
        for architecture, content in (("arm64", [marker.bytes()]), ("amd64", layers)):
            body = self._manifest(content, config, architecture, pack)
            entries.append({"mediaType": types["manifest"], "digest": sha(body), "size": len(body),
                            "platform": {"architecture": architecture, "os": "linux"}})
        index = canonical({"schemaVersion": 2, "mediaType": types["index"], "manifests": entries})
        self.manifests.append((sha(index), types["index"], index))
        self.digest = sha(index)

    def _manifest(self, layers, config, architecture, pack):
        descriptors, diff_ids = [], []
        for raw in layers:
            diff_ids.append(sha(raw))
            kind, data = "layer", raw
            if pack == "gzip":
                kind, data = "layer+gzip", gzip.compress(raw, 6, mtime=0)
            elif pack == "zstd":
                kind = "layer+zstd"
                data = subprocess.run([program("zstd"), "-q", "-c"], input=raw, capture_output=True, check=True).stdout
            self.blobs[sha(data)] = data
            descriptors.append({"mediaType": self.types[kind], "digest": sha(data), "size": len(data)})
        document = canonical({
            "architecture": architecture, "os": "linux", "created": CREATED,
            "config": dict({"Env": [PATH]}, **config),
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created": CREATED, "created_by": "build_images.py"} for _ in layers],
        })
        self.blobs[sha(document)] = document
        body = canonical({"schemaVersion": 2, "mediaType": self.types["manifest"],
                          "config": {"mediaType": self.types["config"], "digest": sha(document), "size": len(document)},
                          "layers": descriptors})
        self.manifests.append((sha(body), self.types["manifest"], body))
        return body


def all_images():
    base, box = base_layer(), busybox_layer()
    have = set(shared_libraries(program("busybox")))
    server = lighttpd_layer(have)
    web = {"User": "www-data", "Cmd": ["serve"], "WorkingDir": "/var/www/html", "StopSignal": "SIGTERM",
           "ExposedPorts": {"8080/tcp": {}}}
    web_layers = lambda name: [base, box, server, site_layer(name)]
    shell = {"Cmd": ["sh"]}
    return [
        Image(["busybox:1", "busybox:latest"], [base, box], shell),
        Image(["busybox:docker"], [base, box], shell, DOCKER),
        Image(["busybox:plain"], [base, box], shell, pack="none"),
        # What other runtimes need for the sandbox itself.
        Image(["busybox:pause"], [base, box], {"Cmd": ["sleep", "2147483647"]}),
        Image(["web:1", "web:latest"], web_layers("web:1"),
              dict(web, Labels={"org.opencontainers.image.title": "web"})),
        Image(["web:2"], web_layers("web:2"), web),
        Image(["net:1"], [base, box, perl_layer(have)], shell),
        Image(["dns:1"], [base, box, dnsmasq_layer(have)], {"Cmd": ["dnsmasq", "--keep-in-foreground"]}),
    ]


def write_layout(image, out):
    name = image.names[0].replace("/", "_").replace(":", "_") + ".tar"
    digest, kind, body = image.manifests[-1]
    index = canonical({"schemaVersion": 2, "mediaType": OCI["index"], "manifests": [
        {"mediaType": kind, "digest": digest, "size": len(body),
         "annotations": {"io.containerd.image.name": "test.local/" + full,
                         "org.opencontainers.image.ref.name": full.rsplit(":", 1)[1]}}
        for full in image.names]})
    target = os.path.join(out, name)
    with tarfile.open(target + ".new", "w", format=tarfile.USTAR_FORMAT) as tar:
        def put(member, data):
            info = tarfile.TarInfo(member)
            info.size, info.mode, info.mtime = len(data), 0o644, EPOCH
            tar.addfile(info, io.BytesIO(data))
        put("oci-layout", canonical({"imageLayoutVersion": "1.0.0"}))
        put("index.json", index)
        for digest, data in sorted(image.blobs.items()):
            put("blobs/sha256/" + digest[7:], data)
        for digest, _, data in image.manifests:
            put("blobs/sha256/" + digest[7:], data)
    os.replace(target + ".new", target)
    return {"file": name, "names": image.names, "digest": image.digest,
            "manifests": [[digest, kind] for digest, kind, _ in image.manifests],
            "blobs": sorted(image.blobs)}


class Registry:
    def __init__(self, url, user, ca):
        self.url = url.rstrip("/")
        self.headers = {}
        if user:
            self.headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        handlers = [urllib.request.ProxyHandler({})]
        if ca:
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca)))
        self.opener = urllib.request.build_opener(*handlers)

    def request(self, method, url, data=None, kind=None):
        url = self.url + url if url.startswith("/") else url
        headers = dict(self.headers, **({"Content-Type": kind} if kind else {}))
        request = urllib.request.Request(url, data=data, method=method, headers=headers)
        try:
            with self.opener.open(request) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def must(self, wanted, method, url, data=None, kind=None):
        status, headers, body = self.request(method, url, data, kind)
        if status != wanted:
            raise SystemExit("build_images: %s %s: %s %s" % (method, url, status, body[:300]))
        return headers

    def push(self, entry, out):
        with tarfile.open(os.path.join(out, entry["file"])) as tar:
            read = lambda digest: tar.extractfile("blobs/sha256/" + digest[7:]).read()
            for repository in sorted({name.rsplit(":", 1)[0] for name in entry["names"]}):
                api = "/v2/" + repository
                for digest in entry["blobs"]:
                    if self.request("HEAD", "%s/blobs/%s" % (api, digest))[0] == 200:
                        continue
                    place = self.must(202, "POST", api + "/blobs/uploads/", b"")["Location"]
                    place += ("&" if "?" in place else "?") + "digest=" + digest
                    self.must(201, "PUT", place, read(digest), "application/octet-stream")
                tags = [name.rsplit(":", 1)[1] for name in entry["names"] if name.rsplit(":", 1)[0] == repository]
                for digest, kind in entry["manifests"]:
                    for reference in [digest] + (tags if digest == entry["digest"] else []):
                        self.must(201, "PUT", "%s/manifests/%s" % (api, reference), read(digest), kind)
        print("pushed", ", ".join(entry["names"]), entry["digest"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("build", "push", "digest"))
    parser.add_argument("name", nargs="?", help="NAME:TAG, for digest")
    parser.add_argument("--out", required=True)
    parser.add_argument("--registry", default="http://127.0.0.1:5000")
    parser.add_argument("--user", help="NAME:PASSWORD")
    parser.add_argument("--ca", help="certificate authority of the registry, PEM")
    options = parser.parse_args()
    listing = os.path.join(options.out, "images.json")
    if options.action == "build":
        os.makedirs(options.out, exist_ok=True)
        entries = [write_layout(image, options.out) for image in all_images()]
        with open(listing + ".new", "w") as out:
            json.dump(entries, out, indent=1)
        os.replace(listing + ".new", listing)
        for entry in entries:
            print(entry["digest"], " ".join(entry["names"]))
        return
    with open(listing) as source:
        entries = json.load(source)
    if options.action == "push":
        registry = Registry(options.registry, options.user, options.ca)
        for entry in entries:
            registry.push(entry, options.out)
        return
    for entry in entries:
        if options.name in entry["names"]:
            print(entry["digest"])
            return
    sys.exit("build_images: no image is called %s" % options.name)


if __name__ == "__main__":
    main()
