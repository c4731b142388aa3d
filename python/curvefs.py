# -*- coding: utf-8 -*-
"""Curve's Python module, for Atoll.

One file, standard library only, Python 2.7 and 3.6 or later. It has the classes,
methods, constants and return codes of the module that Curve ships, so scripts
for Curve run unchanged:

    import curvefs
    cbd = curvefs.CBDClient()
    cbd.Init("/etc/curve/client.conf")     # mds.listen.addr is all it needs

Calls about files go to a server's API as JSON over HTTP; data go over NBD to
the address that Open is told. A client may be used by any number of threads,
and after a fork by the child as well: connections are made per process and
kept in a pool. Python's lock is released while a call waits.

Every call ends within a deadline. Return codes are negative; strerror(code)
names one, and client.last_error tells the reason of this client's last failure.

Keys of client.conf that are read (all others are ignored):

    mds.listen.addr        HOST:PORT[,HOST:PORT...], unix:/PATH or https://HOST:PORT
    atoll.timeoutMS        deadline of a call about files (20000)
    atoll.ioTimeoutMS      deadline of a read or write (45000)
    atoll.preciseOpen      true: a refused Open returns its true code, not -2
    atoll.token            bearer token, if the address asks for one
    atoll.caFile           authority that signed the server's certificates (https, nbds);
                           with it, HOST:PORT means https://HOST:PORT
    atoll.certFile         certificate and key of this client, which the server
    atoll.keyFile          may want to see where data go (nbds)
    atoll.writeback        true: a write may return before it is on disk
"""

import errno
import itertools
import json
import os
import socket
import struct
import threading
import time

try:
    import http.client as _http
    from urllib.parse import parse_qs as _parse_qs, unquote as _unquote, urlsplit as _urlsplit
    import queue as _queue
    _PY3 = True
    _INTS = (int,)
    _TEXT = str
except ImportError:
    import httplib as _http
    from urlparse import parse_qs as _parse_qs, urlsplit as _urlsplit
    from urllib import unquote as _unquote
    import Queue as _queue
    _PY3 = False
    _INTS = (int, long)  # noqa: F821
    _TEXT = unicode      # noqa: F821

try:
    import ssl as _ssl
except ImportError:
    _ssl = None

# ---------------------------------------------------------------- constants

CURVE_INODE_DIRECTORY = 0
CURVE_INODE_PAGEFILE = 1
CURVEINODE_APPENDFILE = 2
CURVE_INODE_APPENDECFILE = 3

CURVE_ERROR_OK = 0
CURVE_ERROR_EXISTS = 1
CURVE_ERROR_FAILED = 2
CURVE_ERROR_DISABLEIO = 3
CURVE_ERROR_AUTHFAIL = 4
CURVE_ERROR_DELETING = 5
CURVE_ERROR_NOTEXIST = 6
CURVE_ERROR_UNDER_SNAPSHOT = 7
CURVE_ERROR_NOT_UNDERSNAPSHOT = 8
CURVE_ERROR_DELETE_ERROR = 9
CURVE_ERROR_NOT_ALLOCATE = 10
CURVE_ERROR_NOT_SUPPORT = 11
CURVE_ERROR_NOT_EMPTY = 12
CURVE_ERROR_NO_SHRINK_BIGGER_FILE = 13
CURVE_ERROR_SESSION_NOTEXISTS = 14
CURVE_ERROR_FILE_OCCUPIED = 15
CURVE_ERROR_PARAM_ERROR = 16
CURVE_ERROR_INTERNAL_ERROR = 17
CURVE_ERROR_CRC_ERROR = 18
CURVE_ERROR_INVALID_REQUEST = 19
CURVE_ERROR_DISK_FAIL = 20
CURVE_ERROR_NO_SPACE = 21
CURVE_ERROR_NOT_ALIGNED = 22
CURVE_ERROR_BAD_FD = 23
CURVE_ERROR_LENGTH_NOT_SUPPORT = 24
CURVE_ERROR_UNKNOWN = 100

CURVE_FILE_CREATED = 0
CURVE_FILE_DELETING = 1
CURVE_FILE_CLONING = 2
CURVE_FILE_CLONEMETAINSTALLED = 3
CURVE_FILE_CLONED = 4
CURVE_FILE_BEINGCLONED = 5

CURVE_OP_READ = 0
CURVE_OP_WRITE = 1
CLUSTERIDMAX = 256

_NAMES = {
    0: "OK", 1: "EXISTS", 2: "FAILED", 3: "DISABLEIO", 4: "AUTHFAIL",
    5: "DELETING", 6: "NOTEXIST", 7: "UNDER_SNAPSHOT",
    8: "NOT_UNDERSNAPSHOT", 9: "DELETE_ERROR", 10: "NOT_ALLOCATE",
    11: "NOT_SUPPORT", 12: "NOT_EMPTY", 13: "NO_SHRINK_BIGGER_FILE",
    14: "SESSION_NOTEXISTS", 15: "FILE_OCCUPIED", 16: "PARAM_ERROR",
    17: "INTERNAL_ERROR", 18: "CRC_ERROR", 19: "INVALID_REQUEST",
    20: "DISK_FAIL", 21: "NO_SPACE", 22: "NOT_ALIGNED", 23: "BAD_FD",
    24: "LENGTH_NOT_SUPPORT", 25: "SESSION_NOT_EXIST",
    26: "STATUS_NOT_MATCH", 27: "DELETE_BEING_CLONED",
    28: "CLIENT_NOT_SUPPORT_SNAPSHOT", 29: "SNAPSTHO_FROZEN",
    100: "UNKNOWN",
}


def strerror(code):
    """The name of a return code, as strerror(-6) == 'NOTEXIST'."""
    return _NAMES.get(abs(code), "Unknown Error Code")


# ---------------------------------------------------------------- arguments

def _string(value, what):
    """A text argument as str; anything else is a TypeError."""
    if isinstance(value, str):
        return value
    if not _PY3 and isinstance(value, _TEXT):
        return value.encode("utf-8")
    if _PY3 and isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    raise TypeError("%s: want a string, not %s" % (what, type(value).__name__))


def _encoded(value):
    return value.encode("utf-8", "surrogateescape") if _PY3 else value


def _short(value, what):
    """A text that fits into one of Curve's fields of 256 bytes."""
    value = _string(value, what)
    if len(_encoded(value)) > 255:
        raise TypeError("%s: longer than 255 bytes" % what)
    return value


def _unsigned(value, what, bits=64):
    if not isinstance(value, _INTS):
        raise TypeError("%s: want a whole number, not %s" % (what, type(value).__name__))
    if value < 0 or value >> bits:
        raise OverflowError("%s: %d is out of range" % (what, value))
    return value


def _integer(value, what):
    if not isinstance(value, _INTS):
        raise TypeError("%s: want a whole number, not %s" % (what, type(value).__name__))
    if not -0x80000000 <= value <= 0x7fffffff:
        raise OverflowError("%s: %d is out of range" % (what, value))
    return value


def _anything(value, what):
    return value


class _Struct(object):
    """A record whose fields take only values of their type."""
    _fields = ()

    def __init__(self):
        for name, _, first in self._fields:
            object.__setattr__(self, name, first() if callable(first) else first)

    def __setattr__(self, name, value):
        for field, check, _ in self._fields:
            if field == name:
                value = check(value, "%s.%s" % (type(self).__name__, name))
                break
        object.__setattr__(self, name, value)

    def __repr__(self):
        shown = ["%s=%r" % (f[0], getattr(self, f[0])) for f in self._fields if f[0] != "password"]
        return "<curvefs.%s %s>" % (type(self).__name__, " ".join(shown))


class UserInfo_t(_Struct):
    """Who calls: owner and password."""
    _fields = (("owner", _short, ""), ("password", _short, ""))


def _user(value, what="user"):
    if not isinstance(value, UserInfo_t):
        raise TypeError("%s: want a UserInfo_t, not %s" % (what, type(value).__name__))
    return value


class FileInfo_t(_Struct):
    """What StatFile fills in."""
    _fields = (
        ("id", _unsigned, 0), ("parentid", _unsigned, 0), ("filetype", _integer, 0),
        ("length", _unsigned, 0), ("ctime", _unsigned, 0), ("filename", _short, ""),
        ("owner", _short, ""), ("fileStatus", _integer, 0),
        ("stripeUnit", _unsigned, 0), ("stripeCount", _unsigned, 0),
    )

    # Scripts for Python 2 compare what a function returned with 0, be it a
    # code or a record; a record is no failure.
    def __lt__(self, other):
        return False

    def __le__(self, other):
        return False

    def __gt__(self, other):
        return True

    def __ge__(self, other):
        return True


class DirInfos_t(_Struct):
    """A directory with the files in it."""
    _fields = (("dirpath", _anything, None), ("userinfo", _anything, None),
               ("dirsize", _unsigned, 0), ("fileinfo", _anything, None))


class CreateContext(_Struct):
    """What Create2 takes."""
    _fields = (("name", _string, ""), ("length", _unsigned, 0), ("user", _user, UserInfo_t),
               ("poolset", _string, ""), ("stripeUnit", _unsigned, 0), ("stripeCount", _unsigned, 0))


class AioContext_t(_Struct):
    """A read or write in the background.

    AioRead and AioWrite return at once. Later, in another thread, ret becomes
    the number of bytes or a negative code, buf the bytes that were read, and
    cb(ctx) is called, if there is one.
    """
    _fields = (("offset", _unsigned, 0), ("length", _unsigned, 0), ("ret", _integer, 0),
               ("op", _integer, 0), ("cb", _anything, None), ("buf", _anything, None))


if _PY3:
    class _Data(bytes):
        """Bytes that also equal the text of the same characters.

        Scripts that came from Python 2 compare what they read with literals.
        """
        __slots__ = ()

        def __eq__(self, other):
            if isinstance(other, str):
                try:
                    other = other.encode("latin-1")
                except UnicodeEncodeError:
                    return False
            return bytes.__eq__(self, other)

        def __ne__(self, other):
            eq = self.__eq__(other)
            return eq if eq is NotImplemented else not eq

        __hash__ = bytes.__hash__
else:
    _Data = bytes


def _payload(buf):
    """What Write was given, as something that can be sent."""
    if isinstance(buf, bytes):
        return buf
    if isinstance(buf, _TEXT):
        return buf.encode("latin-1")
    view = memoryview(buf)
    return view if view.itemsize == 1 else memoryview(view.tobytes())


# ---------------------------------------------------------------- failures

class _Failure(Exception):
    """A call that ends in a code."""

    def __init__(self, code, text):
        Exception.__init__(self, text)
        self.code = code
        self.text = text


class _Broken(Exception):
    """A connection that is of no more use; another one may be."""


def _timed_out(e):
    """Whether a wait for a socket ended by its deadline."""
    return isinstance(e, socket.timeout) or getattr(e, "errno", 0) in (errno.EAGAIN, errno.EWOULDBLOCK)


# Kinds of errors that a server tags its texts with, and their codes. Those
# with None pass: the volume moves to another server, or soon answers again.
_TAGS = {
    "CORRUPT": CURVE_ERROR_CRC_ERROR, "IO": CURVE_ERROR_DISK_FAIL,
    "NO_SPACE": CURVE_ERROR_NO_SPACE, "READ_ONLY": CURVE_ERROR_NOT_SUPPORT,
    "DENIED": CURVE_ERROR_AUTHFAIL, "INVALID": CURVE_ERROR_INVALID_REQUEST,
    "TOO_LARGE": CURVE_ERROR_INVALID_REQUEST, "UNSUPPORTED": CURVE_ERROR_INVALID_REQUEST,
    "NOT_EXIST": CURVE_ERROR_FAILED, "TIMEOUT": None, "UNREACHABLE": None,
    "UNAVAILABLE": None, "FENCED": None, "CLOSED": None, "BUSY": None,
    "CONFLICT": None,
}

# The same for bare numbers of the protocol.
_ERRNOS = {
    1: CURVE_ERROR_NOT_SUPPORT, 5: CURVE_ERROR_DISK_FAIL, 22: CURVE_ERROR_INVALID_REQUEST,
    28: CURVE_ERROR_NO_SPACE, 75: CURVE_ERROR_INVALID_REQUEST, 108: None,
}


def _nbd_failure(number, text):
    """The exception for an error that an NBD server told."""
    code = _ERRNOS.get(number, CURVE_ERROR_INTERNAL_ERROR)
    if text.endswith("]"):
        tag = text[text.rfind("[") + 1:-1]
        if tag in _TAGS:
            code = _TAGS[tag]
        elif number == 5:
            code = CURVE_ERROR_INTERNAL_ERROR
    text = text or "error %d" % number
    if code is None:
        return _Broken(text)
    return _Failure(code, text)


# ---------------------------------------------------------------- NBD

_REQUEST = struct.Struct(">IHHQQI")
_CHUNK = struct.Struct(">IHHQI")
_SIMPLE = struct.Struct(">IIQ")
_OPTION = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")

_M_OPTION, _M_REPLY = 0x49484156454F5054, 0x3E889045565A9
_M_REQUEST, _M_SIMPLE, _M_CHUNK = 0x25609513, 0x67446698, 0x668E33EF
_CMD_READ, _CMD_WRITE, _CMD_DISC = 0, 1, 2
_FLAG_FUA, _FLAG_DF = 1, 4
_PIECE = 8 << 20       # largest request
_JOINED = 32 << 10     # up to here header and payload are sent as one string
_MSG_MORE = getattr(socket, "MSG_MORE", 0)
_WAIT_ALL = getattr(socket, "MSG_WAITALL", 0)
_NETWORK = (socket.error, EOFError, struct.error) + ((_ssl.SSLError,) if _ssl else ())


def _dial(network, addr, timeout):
    """A connected blocking socket whose every wait ends after timeout.

    The kernel keeps the time, which spares a poll for every call.
    """
    if network == "unix":
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            s.settimeout(timeout)
            s.connect(addr)
        except Exception:
            s.close()
            raise
    else:
        s = socket.create_connection(addr, timeout)
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    s.settimeout(None)
    _limit(s, timeout)
    return s


def _limit(s, timeout):
    """Let every wait of a blocking socket end after timeout."""
    limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1000000))
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


class _Conn(object):
    """One NBD connection. One thread at a time uses it."""

    def __init__(self, url, conf, timeout):
        parts = _urlsplit(url)
        scheme, _, transport = parts.scheme.partition("+")
        self.export = _unquote(parts.path[1:])
        self.tls = scheme == "nbds"
        if transport == "unix":
            self.sock = _dial("unix", _parse_qs(parts.query)["socket"][0], timeout)
        else:
            self.sock = _dial("tcp", (parts.hostname, parts.port or 10809), timeout)
        try:
            self._negotiate(parts.hostname, conf, timeout)
            if self.tls:
                self.sock.settimeout(conf.io_timeout)
            else:
                _limit(self.sock, conf.io_timeout)
        except Exception:
            self.sock.close()
            raise
        self.cookie = 0
        self.wait_all = 0 if self.tls else _WAIT_ALL
        self.more = 0 if self.tls else _MSG_MORE

    def _exactly(self, n):
        """Receive n bytes."""
        data = self.sock.recv(n)
        if len(data) == n:
            return data
        parts = []
        while True:
            if not data:
                raise EOFError("the server hung up")
            parts.append(data)
            n -= len(data)
            if n == 0:
                return b"".join(parts)
            data = self.sock.recv(min(n, 1 << 20))

    def _negotiate(self, host, conf, timeout):
        hello = self._exactly(18)
        if hello[:16] != b"NBDMAGICIHAVEOPT":
            raise _Broken("not an NBD server")
        self.sock.sendall(struct.pack(">I", 3))
        if self.tls:
            self._option(5, b"")
            self.sock.settimeout(timeout)
            self.sock = conf.wrap(self.sock, host, conf.cert_file)
        self.structured = self._option(8, b"", True) is not None
        name = _encoded(self.export)
        info = self._option(7, struct.pack(">I", len(name)) + name + b"\0\0")
        self.size, self.flags = info
        self.write_flags = _FLAG_FUA if self.flags & 8 and not conf.writeback else 0
        self.read_flags = _FLAG_DF if self.structured and self.flags & 0x80 else 0

    def _option(self, opt, data, optional=False):
        """Send an option; None if the server refuses an optional one."""
        self.sock.sendall(_OPTION.pack(_M_OPTION, opt, len(data)) + data)
        info = (0, 0)
        while True:
            magic, ropt, typ, n = _OPTION_REPLY.unpack(self._exactly(20))
            body = self._exactly(n) if n else b""
            if magic != _M_REPLY or ropt != opt:
                raise _Broken("the NBD server answers nonsense")
            if typ == 1:
                return info
            if typ & 0x80000000:
                if optional:
                    return None
                raise _nbd_failure(108, body.decode("utf-8", "replace"))
            if typ == 3 and body[:2] == b"\0\0":
                info = struct.unpack(">QH", body[2:12])

    def close(self, wait=0):
        """End the connection; with wait, the server has noticed on return."""
        try:
            if wait:
                self.sock.sendall(_REQUEST.pack(_M_REQUEST, 0, _CMD_DISC, 0, 0, 0))
                self.sock.settimeout(wait)
                while self.sock.recv(4096):
                    pass
        except Exception:
            pass
        try:
            self.sock.close()
        except Exception:
            pass

    def read(self, off, n):
        """n bytes as bytes, n <= _PIECE."""
        self.cookie = cookie = self.cookie + 1
        self.sock.sendall(_REQUEST.pack(_M_REQUEST, self.read_flags, _CMD_READ, cookie, off, n))
        if not self.structured:
            magic, number, got = _SIMPLE.unpack(self._exactly(16))
            self._expect(magic == _M_SIMPLE and got == cookie)
            if number:
                raise _nbd_failure(number, "")
            return self._data(n)
        if n <= _JOINED:
            # One system call for header and data: all answers but errors are
            # of this length, and errors are longer than a header.
            buf = self.sock.recv(28 + n)
            if len(buf) == 28 + n and buf.startswith(_CHUNK.pack(_M_CHUNK, 1, 1, cookie, 8 + n)):
                return buf[28:]
            while len(buf) < 20:
                buf += self._exactly(20 - len(buf))
            head, rest = buf[:20], buf[20:]
        else:
            head, rest = self._exactly(20), b""
        return self._chunks(head, rest, cookie, off, n)

    def _expect(self, ok):
        if not ok:
            raise _Broken("the NBD server answers nonsense")

    def _data(self, n):
        """n bytes of payload, in one piece where the kernel can."""
        data = self.sock.recv(n, self.wait_all) if self.wait_all else self.sock.recv(n)
        if len(data) == n:
            return data
        if not data:
            raise EOFError("the server hung up")
        whole = bytearray(n)
        whole[:len(data)] = data
        self._into(memoryview(whole)[len(data):])
        return bytes(whole)

    def _into(self, view):
        while len(view):
            got = self.sock.recv_into(view)
            if not got:
                raise EOFError("the server hung up")
            view = view[got:]

    def _take(self, rest, n):
        """n bytes, first of what was received already."""
        if len(rest) >= n:
            return rest[:n], rest[n:]
        return rest + self._exactly(n - len(rest)), b""

    def _chunks(self, head, rest, cookie, off, n):
        """A structured reply in general: chunks of data, holes, errors."""
        whole, failure = None, None
        while True:
            magic, flags, typ, got, length = _CHUNK.unpack(head)
            self._expect(magic == _M_CHUNK and got == cookie)
            if typ == 1:
                where, rest = self._take(rest, 8)
                at, length = struct.unpack(">Q", where)[0] - off, length - 8
                self._expect(0 <= at and at + length <= n)
                if flags & 1 and at == 0 and length == n and whole is None and not rest:
                    return self._data(n)
                whole = whole or bytearray(n)
                have = min(len(rest), length)
                whole[at:at + have], rest = rest[:have], rest[have:]
                self._into(memoryview(whole)[at + have:at + length])
            elif typ & 0x8000:
                self._expect(6 <= length <= 65536)
                body, rest = self._take(rest, length)
                number, size = struct.unpack(">IH", body[:6])
                failure = _nbd_failure(number, body[6:6 + size].decode("utf-8", "replace"))
            else:  # a hole, or nothing
                self._expect(length <= 65536)
                body, rest = self._take(rest, length)
                whole = whole or bytearray(n)
            if flags & 1:
                break
            head, rest = self._take(rest, 20)
        if failure is not None:
            raise failure
        return bytes(whole)

    def write(self, off, data, n):
        """Write n bytes, n <= _PIECE."""
        self.cookie = cookie = self.cookie + 1
        head = _REQUEST.pack(_M_REQUEST, self.write_flags, _CMD_WRITE, cookie, off, n)
        if n <= _JOINED:
            self.sock.sendall(head + (data if type(data) is bytes else data.tobytes()))
        elif self.more:
            self.sock.sendall(head, self.more)
            self.sock.sendall(data)
        else:
            self.sock.sendall(head)
            self.sock.sendall(data)
        reply = self.sock.recv(16)
        if reply == _SIMPLE.pack(_M_SIMPLE, 0, cookie):
            return
        while len(reply) < 16:
            reply += self._exactly(16 - len(reply))
        magic, number, got = _SIMPLE.unpack(reply)
        if magic == _M_SIMPLE:
            self._expect(got == cookie)
            raise _nbd_failure(number, "")
        _, flags, typ, got, length = _CHUNK.unpack(reply + self._exactly(4))
        self._expect(magic == _M_CHUNK and got == cookie and length <= 65536 and flags & 1)
        body = self._exactly(length) if length else b""
        if typ & 0x8000:
            number, size = struct.unpack(">IH", body[:6])
            raise _nbd_failure(number, body[6:6 + size].decode("utf-8", "replace"))


# ---------------------------------------------------------------- HTTP

class _UnixHTTP(_http.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path, timeout):
        _http.HTTPConnection.__init__(self, "localhost", timeout=timeout)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class _TLSHTTP(_http.HTTPConnection):
    """HTTP over TLS."""

    def __init__(self, where, timeout, conf):
        _http.HTTPConnection.__init__(self, where[0], where[1], timeout=timeout)
        self._conf = conf

    def connect(self):
        _http.HTTPConnection.connect(self)
        self.sock = self._conf.wrap(self.sock, self.host)


_WORKERS = 8  # threads for reads and writes in the background

# Calls that may be sent again when the answer was lost.
_REPEATABLE = frozenset(["open", "close", "stat", "listdir", "extend", "changeowner", "clusterid", "poolsets"])


class _Conf(object):
    """What is read from client.conf."""

    def __init__(self, path):
        keys = {}
        with open(path, "rb") as f:
            text = f.read()
        for line in (text.decode("utf-8", "replace") if _PY3 else text).splitlines():
            line = line.strip()
            if line and not line.startswith("#") and "=" in line:
                key, value = line.split("=", 1)
                keys[key.strip()] = value.strip()
        self.servers = [a.strip() for a in keys.get("mds.listen.addr", "").split(",") if a.strip()]
        if not self.servers:
            raise ValueError("mds.listen.addr is missing")
        self.ca_file = keys.get("atoll.caFile", "")
        for addr in self.servers:
            _address(addr, self.ca_file)
        self.timeout = self._seconds(keys, "atoll.timeoutMS", 20.0)
        self.io_timeout = self._seconds(keys, "atoll.ioTimeoutMS", 45.0)
        self.token = keys.get("atoll.token", "") or os.environ.get("ATOLL_TOKEN", "")
        self.cert_file = keys.get("atoll.certFile", "")
        self.key_file = keys.get("atoll.keyFile", "")
        self.precise = self._yes(keys, "atoll.preciseOpen")
        self.writeback = self._yes(keys, "atoll.writeback")

    @staticmethod
    def _seconds(keys, name, default):
        value = keys.get(name)
        return max(0.05, float(value) / 1000) if value else default

    @staticmethod
    def _yes(keys, name):
        return keys.get(name, "").lower() in ("1", "true", "yes", "on")

    def wrap(self, sock, host, cert_file=""):
        """TLS over a socket, with a server that proves to be host."""
        if _ssl is None:
            raise _Failure(CURVE_ERROR_FAILED, "this Python has no ssl module")
        context = _ssl.create_default_context(cafile=self.ca_file or None)
        if cert_file:
            context.load_cert_chain(cert_file, self.key_file or None)
        numeric = not _PY3 and not host.strip("0123456789.")
        if numeric:  # Python 2 looks for names only
            context.check_hostname = False
        sock = context.wrap_socket(sock, server_hostname=None if numeric else host)
        if numeric and ("IP Address", host) not in sock.getpeercert().get("subjectAltName", ()):
            sock.close()
            raise _ssl.SSLError("the server's certificate is not for %s" % host)
        return sock


def _address(addr, ca_file):
    """(network, where) of an address of mds.listen.addr."""
    if addr.startswith("unix:"):
        return "unix", addr[5:]
    scheme = "https" if ca_file else "http"
    if "://" in addr:
        scheme, addr = addr.split("://", 1)
    host, _, port = addr.rstrip("/").rpartition(":")
    if scheme not in ("http", "https") or not host or not port.isdigit():
        raise ValueError("address %r: want HOST:PORT" % addr)
    return scheme, (host.strip("[]"), int(port))


class _Shared(object):
    """What a client holds in one process: never used by a child of a fork."""

    def __init__(self, conf):
        self.pid = os.getpid()
        self.conf = conf
        self.idle = {}            # address -> connections
        self.lock = threading.Lock()
        self.work = None          # queue of the background threads

    def _connect(self, addr, timeout):
        network, where = _address(addr, self.conf.ca_file)
        if network == "unix":
            return _UnixHTTP(where, timeout)
        if network == "https":
            return _TLSHTTP(where, timeout, self.conf)
        return _http.HTTPConnection(where[0], where[1], timeout=timeout)

    @staticmethod
    def _stale(conn):
        """Whether the server has closed an idle connection."""
        try:
            conn.sock.settimeout(0)
            try:
                conn.sock.recv(1)
                return True
            except Exception:
                return False if _ssl is None or not isinstance(conn.sock, _ssl.SSLSocket) else True
        except Exception:
            return True

    def call(self, name, args):
        """The answer to a call, from whichever server answers first in order."""
        try:
            body = json.dumps(args)
        except UnicodeDecodeError as e:
            raise _Failure(CURVE_ERROR_PARAM_ERROR, "a name is not UTF-8: %s" % e)
        deadline = time.time() + self.conf.timeout
        why, pause = "no server", 0.02
        while True:
            for addr in list(self.conf.servers):
                left = deadline - time.time()
                if left <= 0:
                    raise _Failure(CURVE_ERROR_FAILED, "no answer in time: %s" % why)
                sent = False
                conn = None
                try:
                    conn = self._get(addr, left)
                    sent = True
                    return self._ask(addr, conn, name, body)
                except _Failure:
                    raise
                except Exception as e:  # http.client raises many kinds
                    why = "%s: %s" % (addr, e)
                    if conn is not None:
                        conn.close()
                    if "certificate" in str(e).lower():
                        raise _Failure(CURVE_ERROR_FAILED, why)  # which does not pass
                    if sent and name not in _REPEATABLE:
                        raise _Failure(CURVE_ERROR_FAILED, "the answer was lost: %s" % why)
            time.sleep(min(pause, max(0, deadline - time.time())))
            pause = min(pause * 2, 0.5)

    def _get(self, addr, timeout):
        idle = self.idle.setdefault(addr, [])
        while True:
            try:
                conn = idle.pop()
            except IndexError:
                break
            if self._stale(conn):
                conn.close()
                continue
            conn.sock.settimeout(timeout)
            return conn
        conn = self._connect(addr, timeout)
        conn.connect()
        return conn

    def _ask(self, addr, conn, name, body):
        headers = {"Content-Type": "application/json"}
        if self.conf.token:
            headers["Authorization"] = "Bearer " + self.conf.token
        conn.request("POST", "/curve/v1/" + name, body, headers)
        resp = conn.getresponse()
        text = resp.read()
        if resp.status != 200:
            conn.close()
            code = CURVE_ERROR_AUTHFAIL if resp.status in (401, 403) else CURVE_ERROR_FAILED
            raise _Failure(code, "%s answers %d: %s" % (addr, resp.status, text[:200].decode("utf-8", "replace")))
        answer = json.loads(text.decode("utf-8"))
        if not resp.will_close:
            self.idle[addr].append(conn)
        if answer["code"]:
            raise _Failure(-answer["code"], answer.get("message", ""))
        return answer


# ---------------------------------------------------------------- files

class _File(object):
    """An open volume: its addresses, its size, and idle connections to it."""

    def __init__(self, client, path, user):
        self.client = client
        self.path = path
        self.cred = {"owner": user.owner, "password": user.password}
        self.pid = os.getpid()
        self.idle = []
        self.renewing = threading.Lock()
        self.closed = False
        self.session = ""
        self.urls = ()
        self.size = 0

    def open(self, precise=False):
        answer = self.client._shared().call("open", dict(self.cred, path=self.path, precise=precise))
        self.session = answer["session"]
        self.urls = [str(u) for u in answer["urls"]]
        self.size = answer["length"]

    def connect(self, timeout=None):
        """A new connection, to the first address that works."""
        why = "no address"
        for url in self.urls:
            try:
                conn = _Conn(url, self.client._conf, timeout or self.client._conf.io_timeout)
            except _Failure as e:
                raise _Broken("%s: %s" % (url, e.text))
            except Exception as e:
                why = "%s: %s" % (url, e)
                continue
            if conn.size > self.size:
                self.size = conn.size
            return conn
        raise _Broken(why)

    def get(self, timeout=None):
        """A connection that nobody else uses now."""
        if self.pid != os.getpid():  # a child of a fork leaves its parent's alone
            self.idle, self.renewing, self.pid = [], threading.Lock(), os.getpid()
        try:
            return self.idle.pop()
        except IndexError:
            return self.connect(timeout)

    def put(self, conn):
        if self.closed or self.pid != os.getpid():
            conn.close()
        else:
            self.idle.append(conn)
            if self.closed:
                self.hang_up(0)

    def hang_up(self, wait):
        while True:
            try:
                self.idle.pop().close(wait)
            except IndexError:
                return

    def beyond(self, end):
        """Whether a volume ends before end, after looking again."""
        if end <= self.size:
            return False
        answer = self.client._shared().call("stat", dict(self.cred, path=self.path))
        size = answer["file"]["length"]
        if size != self.size:
            if size > self.size:
                self.hang_up(0)  # connections know the size they began with
            self.size = size
        return end > self.size

    def run(self, method, off, data, n):
        """Read or write, again over other connections until the deadline."""
        deadline, pause = time.time() + self.client._conf.io_timeout, 0.01
        while True:
            conn = None
            try:
                conn = self.get(max(0.05, deadline - time.time()))
                result = conn.read(off, n) if method == _CMD_READ else conn.write(off, data, n)
                self.put(conn)
                return result
            except _Failure:
                self.put(conn)
                raise
            except (_Broken,) + _NETWORK as e:
                why, late = str(e), _timed_out(e)
            if conn is not None:
                conn.close()
            if late or self.closed or time.time() >= deadline:
                raise _Failure(CURVE_ERROR_FAILED, "no answer in time: %s" % why)
            self.hang_up(0)  # the others are of the same server
            time.sleep(pause)
            pause = min(pause * 2, 0.5)
            self.renew()

    def renew(self):
        """Ask where the volume is served now, unless another thread does."""
        lock = self.renewing
        if not lock.acquire(False):
            return
        try:
            old = self.session
            self.open()
            gone = self.session if self.closed else old
            self.client._shared().call("close", dict(self.cred, path=self.path, session=gone))
        except _Failure:
            pass  # the old addresses are tried until the deadline
        finally:
            lock.release()

    def close(self):
        self.closed = True
        if self.pid == os.getpid():
            self.hang_up(1)
        else:
            self.idle = []
        try:
            self.client._shared().call("close", dict(self.cred, path=self.path, session=self.session))
        except _Failure:
            pass  # the server forgets it by itself


# ---------------------------------------------------------------- the client

class CBDClient(object):
    """A client of one cluster. Any number of them, and of threads, may be at work."""

    def __init__(self):
        self._conf = None
        self._here = None
        self._files = {}
        self._fds = itertools.count()
        self.last_error = ""

    def _shared(self):
        here = self._here
        if here is None or here.pid != os.getpid():
            here = self._here = _Shared(self._conf)
        return here

    def _fail(self, code, text):
        self.last_error = text
        return -code

    def _call(self, name, user, **args):
        """The code of a call that answers nothing else."""
        try:
            self._answer(name, user, **args)
            return 0
        except _Failure as e:
            return self._fail(e.code, e.text)

    def _answer(self, name, user, **args):
        if self._conf is None:
            raise _Failure(CURVE_ERROR_FAILED, "Init was not called")
        args["owner"], args["password"] = user.owner, user.password
        return self._shared().call(name, args)

    def Init(self, configPath):
        """Read client.conf. No server is asked. 0, or -2."""
        path = _string(configPath, "configPath")
        if self._conf is not None:
            return 0
        try:
            self._conf = _Conf(path)
        except (IOError, OSError, ValueError) as e:
            return self._fail(CURVE_ERROR_FAILED, "%s: %s" % (path, e))
        return 0

    def UnInit(self):
        """Close all files and forget the configuration."""
        if self._conf is None:
            return None
        self._drain()
        for fd in list(self._files):
            self.Close(fd)
        here, self._here = self._here, None
        if here is not None and here.pid == os.getpid():
            for conns in here.idle.values():
                while conns:
                    conns.pop().close()
        self._conf = None
        return None

    def Open(self, filename, userInfo):
        """A descriptor, 0 or more; -1 for an empty owner, -2 for all else."""
        name, user = _string(filename, "filename"), _user(userInfo)
        if self._conf is None:
            return self._fail(CURVE_ERROR_FAILED, "Init was not called")
        f = _File(self, name, user)
        try:
            f.open(self._conf.precise)
        except _Failure as e:
            return self._fail(e.code, e.text)
        try:
            f.put(f.connect())
        except (_Broken,) + _NETWORK as e:
            f.close()
            return self._fail(CURVE_ERROR_FAILED, str(e))
        fd = next(self._fds)
        self._files[fd] = f
        return fd

    def Close(self, fd):
        """0; -2 for a descriptor that is not open."""
        f = self._files.pop(_integer(fd, "fd"), None)
        if f is None:
            return self._fail(CURVE_ERROR_FAILED, "descriptor %d is not open" % fd)
        f.close()
        return 0

    def Create(self, filename, userInfo, size):
        """Make a volume of size bytes."""
        return self._call("create", _user(userInfo), path=_string(filename, "filename"), length=_unsigned(size, "size"))

    def Create2(self, context):
        """Make a volume as a CreateContext tells."""
        if not isinstance(context, CreateContext):
            raise TypeError("context: want a CreateContext, not %s" % type(context).__name__)
        return self._call("create", context.user, path=context.name, length=context.length, poolset=context.poolset,
                          stripe_unit=context.stripeUnit, stripe_count=context.stripeCount)

    def Unlink(self, filename, info):
        """Move a volume to /RecycleBin."""
        return self._call("unlink", _user(info), path=_string(filename, "filename"))

    def DeleteForce(self, filename, info):
        """Remove a file in /RecycleBin for good."""
        return self._call("deleteforce", _user(info), path=_string(filename, "filename"))

    def Recover(self, filename, info, fileId=0):
        """Take a file out of /RecycleBin: that of fileId, else the newest of the path."""
        return self._call("recover", _user(info), path=_string(filename, "filename"), file_id=_unsigned(fileId, "fileId"))

    def Rename(self, info, oldpath, newpath):
        """Rename a volume; one of the new name goes to /RecycleBin."""
        return self._call("rename", _user(info), path=_string(oldpath, "oldpath"), new_path=_string(newpath, "newpath"))

    def Extend(self, filename, info, size):
        """Make a volume size bytes long."""
        return self._call("extend", _user(info), path=_string(filename, "filename"), length=_unsigned(size, "size"))

    def ChangeOwner(self, filename, owner, info):
        """Give a file to another owner; only root may."""
        return self._call("changeowner", _user(info), path=_string(filename, "filename"), new_owner=_string(owner, "owner"))

    def Mkdir(self, dirpath, info):
        """Make a directory; its parent must be there."""
        return self._call("mkdir", _user(info), path=_string(dirpath, "dirpath"))

    def Rmdir(self, dirpath, info):
        """Remove an empty directory."""
        return self._call("rmdir", _user(info), path=_string(dirpath, "dirpath"))

    def StatFile(self, filename, info, finfo):
        """Fill finfo."""
        name, user = _string(filename, "filename"), _user(info)
        if not isinstance(finfo, FileInfo_t):
            raise TypeError("finfo: want a FileInfo_t, not %s" % type(finfo).__name__)
        try:
            _fill(finfo, self._answer("stat", user, path=name)["file"])
        except _Failure as e:
            return self._fail(e.code, e.text)
        return 0

    def Listdir(self, dirpath, info):
        """The names in a directory. RuntimeError if it cannot be listed."""
        try:
            answer = self._answer("listdir", _user(info), path=_string(dirpath, "dirpath"))
        except _Failure as e:
            self._fail(e.code, e.text)
            raise RuntimeError("ListDir failed")
        return [_native(f["filename"]) for f in answer.get("files") or []]

    def GetClusterId(self):
        """The cluster's id, "" if no server answers."""
        try:
            return str(self._answer("clusterid", UserInfo_t())["cluster"])
        except _Failure as e:
            self._fail(e.code, e.text)
            return ""

    def ListPoolset(self):
        """The names of the poolsets, [] if no server answers."""
        try:
            return [_native(p) for p in self._answer("poolsets", UserInfo_t())["poolsets"]]
        except _Failure as e:
            self._fail(e.code, e.text)
            return []

    # -- data

    def Read(self, fd, buf, offset, length):
        """length bytes from offset, or a negative code. buf is not looked at."""
        f = self._files.get(fd)
        if f is None or (offset | length) & 4095 or not 0 < length <= _PIECE or offset < 0 or offset + length > f.size:
            return self._read_odd(fd, offset, length)
        conn = None
        try:
            conn = f.get()
            data = conn.read(offset, length)
            f.put(conn)
            return _Data(data)
        except _Failure as e:
            f.put(conn)
            return self._fail(e.code, e.text)
        except (_Broken,) + _NETWORK as e:
            if conn is not None:
                conn.close()
            if _timed_out(e):
                return self._fail(CURVE_ERROR_FAILED, "no answer in time")
        try:
            return _Data(f.run(_CMD_READ, offset, None, length))
        except _Failure as e:
            return self._fail(e.code, e.text)

    def _odd(self, fd, offset, length):
        """Why a read or write is not a plain one: a code, or the file."""
        _unsigned(offset, "offset")
        _unsigned(length, "length")
        f = self._files.get(_integer(fd, "fd"))
        if length == 0:
            return None
        if f is None:
            raise _Failure(CURVE_ERROR_BAD_FD, "descriptor %d is not open" % fd)
        if (offset | length) & 4095:
            raise _Failure(CURVE_ERROR_NOT_ALIGNED, "offset %d, length %d: want multiples of 4096" % (offset, length))
        if f.beyond(offset + length):
            raise _Failure(CURVE_ERROR_FAILED, "%d bytes at %d: the volume has %d" % (length, offset, f.size))
        return f

    def _read_odd(self, fd, offset, length):
        try:
            f = self._odd(fd, offset, length)
            if f is None:
                return _Data(b"")
            parts = []
            for at in range(0, length, _PIECE):
                parts.append(f.run(_CMD_READ, offset + at, None, min(_PIECE, length - at)))
            return _Data(parts[0] if len(parts) == 1 else b"".join(parts))
        except _Failure as e:
            return self._fail(e.code, e.text)

    def Write(self, fd, buf, offset, length):
        """length, or a negative code. buf is bytes or latin-1 text of at least length."""
        data = buf if type(buf) is bytes else _payload(buf)
        f = self._files.get(fd)
        if f is None or (offset | length) & 4095 or not 0 < length <= _PIECE or offset < 0 or offset + length > f.size or len(data) != length:
            return self._write_odd(fd, data, offset, length)
        conn = None
        try:
            conn = f.get()
            conn.write(offset, data, length)
            f.put(conn)
            return length
        except _Failure as e:
            f.put(conn)
            return self._fail(e.code, e.text)
        except (_Broken,) + _NETWORK as e:
            if conn is not None:
                conn.close()
            if _timed_out(e):
                return self._fail(CURVE_ERROR_FAILED, "no answer in time")
        try:
            f.run(_CMD_WRITE, offset, data, length)
        except _Failure as e:
            return self._fail(e.code, e.text)
        return length

    def _write_odd(self, fd, data, offset, length):
        try:
            f = self._odd(fd, offset, length)
            if f is None:
                return 0
            view = memoryview(data)
            if len(view) < length:
                raise _Failure(CURVE_ERROR_PARAM_ERROR, "%d bytes to write, %d given" % (length, len(view)))
            for at in range(0, length, _PIECE):
                n = min(_PIECE, length - at)
                f.run(_CMD_WRITE, offset + at, view[at:at + n], n)
            return length
        except _Failure as e:
            return self._fail(e.code, e.text)

    # -- in the background

    def AioRead(self, fd, aioctx):
        """Begin a read; see AioContext_t. 0, or a negative code."""
        return self._aio(fd, aioctx, CURVE_OP_READ)

    def AioWrite(self, fd, aioctx):
        """Begin a write; see AioContext_t. 0, or a negative code."""
        return self._aio(fd, aioctx, CURVE_OP_WRITE)

    def _aio(self, fd, ctx, op):
        if not isinstance(ctx, AioContext_t):
            raise TypeError("aioctx: want an AioContext_t, not %s" % type(ctx).__name__)
        if ctx.length == 0:
            return 0
        if _integer(fd, "fd") not in self._files:
            return self._fail(CURVE_ERROR_BAD_FD, "descriptor %d is not open" % fd)
        if (ctx.offset | ctx.length) & 4095:
            return self._fail(CURVE_ERROR_NOT_ALIGNED, "offset %d, length %d: want multiples of 4096" % (ctx.offset, ctx.length))
        data = _payload(ctx.buf) if op == CURVE_OP_WRITE else None
        ctx.op = op
        here = self._shared()
        with here.lock:
            if here.work is None:
                here.work = _queue.Queue(1024)
                for _ in range(_WORKERS):
                    t = threading.Thread(target=self._worker, args=(here.work,))
                    t.daemon = True
                    t.start()
            work = here.work
        work.put((fd, ctx, data))
        return 0

    def _worker(self, work):
        while True:
            job = work.get()
            if job is None:
                work.task_done()
                return
            fd, ctx, data = job
            try:
                if ctx.op == CURVE_OP_READ:
                    got = self.Read(fd, None, ctx.offset, ctx.length)
                    if not isinstance(got, int):
                        ctx.buf, got = got, len(got)
                else:
                    got = self.Write(fd, data, ctx.offset, ctx.length)
                ctx.ret = got
                if callable(ctx.cb):
                    ctx.cb(ctx)
            except Exception as e:  # of the caller's callback
                self.last_error = str(e)
            finally:
                work.task_done()

    def _drain(self):
        """Wait for what runs in the background, and end its threads."""
        here = self._here
        if here is None or here.pid != os.getpid() or here.work is None:
            return
        work, here.work = here.work, None
        for _ in range(_WORKERS):
            work.put(None)
        deadline = time.time() + self._conf.io_timeout
        while work.unfinished_tasks and time.time() < deadline:
            time.sleep(0.001)


def _native(text):
    """A text of JSON as this Python's str."""
    return text if _PY3 else text.encode("utf-8")


def _fill(finfo, got):
    finfo.id, finfo.parentid, finfo.filetype = got["id"], got["parentid"], got["filetype"]
    finfo.length, finfo.ctime, finfo.fileStatus = got["length"], got["ctime"], got["filestatus"]
    finfo.filename, finfo.owner = _native(got["filename"]), _native(got["owner"])
    finfo.stripeUnit, finfo.stripeCount = got["stripeunit"], got["stripecount"]


# ---------------------------------------------------------------- functions
# The older interface: functions that share one client.

_global = CBDClient()


def Init(path):
    """Init of the client that the functions of this module share."""
    return _global.Init(path)


def UnInit():
    """UnInit of the shared client."""
    return _global.UnInit()


def Open4Qemu(filename):
    """Open "/PATH_OWNER_"."""
    name = _string(filename, "filename")
    path, owner = _split_owner(name)
    if path is None:
        return _global._fail(CURVE_ERROR_FAILED, "%s: want /PATH_OWNER_" % name)
    user = UserInfo_t()
    user.owner = owner
    return _global.Open(path, user)


def _split_owner(name):
    end = name.rfind("_")
    begin = name.rfind("_", 0, max(end, 0))
    if end < 0 or begin < 0:
        return None, None
    return name[:begin], name[begin + 1:end]


def Open(filename, info):
    """CBDClient.Open of the shared client."""
    return _global.Open(filename, info)


def Create(filename, info, size):
    """CBDClient.Create of the shared client."""
    return _global.Create(filename, info, size)


def Read(fd, buf, offset, length):
    """CBDClient.Read of the shared client."""
    return _global.Read(fd, buf, offset, length)


def Write(fd, buf, offset, length):
    """CBDClient.Write of the shared client."""
    return _global.Write(fd, buf, offset, length)


def AioRead(fd, aioctx):
    """CBDClient.AioRead of the shared client."""
    return _global.AioRead(fd, aioctx)


def AioWrite(fd, aioctx):
    """CBDClient.AioWrite of the shared client."""
    return _global.AioWrite(fd, aioctx)


def StatFile4Qemu(filename, finfo):
    """StatFile of "/PATH_OWNER_"."""
    name = _string(filename, "filename")
    path, owner = _split_owner(name)
    if path is None:
        return _global._fail(CURVE_ERROR_FAILED, "%s: want /PATH_OWNER_" % name)
    user = UserInfo_t()
    user.owner = owner
    return _global.StatFile(path, user, finfo)


def StatFile(filename, info, finfo):
    """CBDClient.StatFile of the shared client."""
    return _global.StatFile(filename, info, finfo)


def ChangeOwner(filename, owner, info):
    """CBDClient.ChangeOwner of the shared client."""
    return _global.ChangeOwner(filename, owner, info)


def Close(fd):
    """CBDClient.Close of the shared client."""
    return _global.Close(fd)


def Rename(info, oldpath, newpath):
    """CBDClient.Rename of the shared client."""
    return _global.Rename(info, oldpath, newpath)


def Extend(filename, info, size):
    """CBDClient.Extend of the shared client."""
    return _global.Extend(filename, info, size)


def Unlink(filename, info):
    """CBDClient.Unlink of the shared client."""
    return _global.Unlink(filename, info)


def Recover(filename, info, fileId=0):
    """CBDClient.Recover of the shared client."""
    return _global.Recover(filename, info, fileId)


def DeleteForce(filename, info):
    """CBDClient.DeleteForce of the shared client."""
    return _global.DeleteForce(filename, info)


def Listdir(dirpath, info):
    """CBDClient.Listdir of the shared client."""
    return _global.Listdir(dirpath, info)


def Mkdir(dirpath, info):
    """CBDClient.Mkdir of the shared client."""
    return _global.Mkdir(dirpath, info)


def Rmdir(dirpath, info):
    """CBDClient.Rmdir of the shared client."""
    return _global.Rmdir(dirpath, info)


def GetClusterId(buf=None, len=0):
    """The cluster's id, or -2."""
    return _global.GetClusterId() or -CURVE_ERROR_FAILED


__all__ = [_n for _n, _v in list(globals().items()) if not _n.startswith("_") and not isinstance(_v, type(os))]
