# Checks every call and code of the curvefs module against a server. For Python
# 2.7 and 3.6 or later. Usage: table.py CONF PREFIX, where PREFIX makes the names
# of this run its own.
from __future__ import print_function

import os
import sys
import threading

import curvefs as c

CONF, PREFIX = sys.argv[1], sys.argv[2]
GIB = 1 << 30
failed, checks = [], [0]


def check(what, got, want):
    checks[0] += 1
    if got != want:
        failed.append("%s: got %r, want %r" % (what, got, want))


def user(owner, password=""):
    u = c.UserInfo_t()
    u.owner, u.password = owner, password
    return u


def raises(what, kind, fn, *args):
    try:
        fn(*args)
    except kind as e:
        check(what, isinstance(e, kind), True)
        return str(e)
    check(what, "no exception", kind.__name__)


root, alice, bob = user("root", "root_password"), user("alice"), user("bob")
home = "/home" + PREFIX
cbd = c.CBDClient()

# -- before Init, and Init
check("create before init", cbd.Create("/x", alice, 10 * GIB), -2)
check("open before init", cbd.Open("/x", alice), -2)
check("clusterid before init", cbd.GetClusterId(), "")
check("poolsets before init", cbd.ListPoolset(), [])
raises("listdir before init", RuntimeError, cbd.Listdir, "/", root)
check("read before init", cbd.Read(0, "", 0, 4096), -23)
check("close before init", cbd.Close(0), -2)
check("init of nothing", cbd.Init("/none/client.conf"), -2)
check("init", cbd.Init(CONF), 0)
check("init twice", cbd.Init("/none/client.conf"), 0)
check("cluster id", len(cbd.GetClusterId()), 36)
check("poolsets", cbd.ListPoolset(), ["default"])

# -- types of arguments
raises("user of a wrong type", TypeError, cbd.Create, "/x", "alice", 10 * GIB)
raises("name of a wrong type", TypeError, cbd.Create, 7, alice, 10 * GIB)
raises("size of a wrong type", TypeError, cbd.Create, "/x", alice, "10")
raises("negative size", OverflowError, cbd.Create, "/x", alice, -1)
raises("owner too long", TypeError, user, "x" * 256)
check("owner of 255", len(user("x" * 255).owner), 255)
raises("owner no text", TypeError, user, 5)
raises("finfo of a wrong type", TypeError, cbd.StatFile, "/x", alice, None)
raises("context of a wrong type", TypeError, cbd.Create2, "/x")
raises("fd of a wrong type", TypeError, cbd.Close, "0")

# -- the matrix of credentials: for each call, who may
check("mkdir home", cbd.Mkdir(home, alice), 0)
check("mkdir twice", cbd.Mkdir(home, alice), -1)
good = [alice, user("alice", "whatever"), root]
bad = [user("root", "wrong"), user("root"), bob, user("bob", "root_password"), user("")]


def matrix(what, call, undo=None, wants=None):
    """call(user, n) by all the bad, refused, and by all the good."""
    for n, u in enumerate(bad):
        want = -4 if wants is None else wants[n]
        check("%s by %s/%s" % (what, u.owner, u.password), call(u, n), want)
    for n, u in enumerate(good):
        check("%s by %s/%s" % (what, u.owner, u.password), call(u, n), 0)
        if undo:
            undo(u, n)


vol = home + "/v"
matrix("create", lambda u, n: cbd.Create(vol, u, 10 * GIB), lambda u, n: check("undo", cbd.Unlink(vol, u), 0))
matrix("mkdir", lambda u, n: cbd.Mkdir(home + "/d", u), lambda u, n: check("undo", cbd.Rmdir(home + "/d", u), 0))
check("create", cbd.Create(vol, alice, 10 * GIB), 0)
check("create twice", cbd.Create(vol, alice, 10 * GIB), -1)
matrix("extend", lambda u, n: cbd.Extend(vol, u, 10 * GIB))
matrix("stat", lambda u, n: cbd.StatFile(vol, u, c.FileInfo_t()))
matrix("rename", lambda u, n: cbd.Rename(u, vol, home + "/w"), lambda u, n: check("undo", cbd.Rename(u, home + "/w", vol), 0))
check("mkdir d", cbd.Mkdir(home + "/d", alice), 0)
matrix("rmdir", lambda u, n: cbd.Rmdir(home + "/d", u), lambda u, n: check("redo", cbd.Mkdir(home + "/d", alice), 0))
check("rmdir d", cbd.Rmdir(home + "/d", alice), 0)
matrix("unlink", lambda u, n: cbd.Unlink(vol, u), lambda u, n: check("undo", cbd.Recover(vol, alice, 0), 0))
for u in bad:
    raises("listdir by " + u.owner, RuntimeError, cbd.Listdir, home, u)
for u in good:
    check("listdir", cbd.Listdir(home, u), ["v"])
for n, want in enumerate([-2, -2, -2, -2, -1]):
    check("open by %s/%s" % (bad[n].owner, bad[n].password), cbd.Open(vol, bad[n]), want)
fds = [cbd.Open(vol, u) for u in good]
check("descriptors count from 0", fds, [0, 1, 2])
for fd in fds:
    check("close", cbd.Close(fd), 0)
    check("close twice", cbd.Close(fd), -2)
check("close never opened", cbd.Close(99), -2)

# -- names and sizes
for path in ("home", home + "/", "/" + home, ""):
    check("create %r" % path, cbd.Create(path, alice, 10 * GIB), -16)
check("create below none", cbd.Create("/none" + PREFIX + "/x", alice, 10 * GIB), -6)
check("create below a volume", cbd.Create(vol + "/x", alice, 10 * GIB), -100)
for size in (0, 9 * GIB, 10 * GIB + 1, 10 * GIB + 4096, 21 << 40):
    check("create of %d" % size, cbd.Create(home + "/s", alice, size), -24)
check("create of 20 TiB", cbd.Create(home + "/s", alice, 20 << 40), 0)
check("unlink", cbd.Unlink(home + "/s", alice), 0)
x = c.CreateContext()
x.name, x.length, x.user = home + "/s", 10 * GIB, alice
for unit, count, want in ((1 << 20, 0, -16), (0, 4, -16), (32 << 20, 4, -16), (3 << 20, 4, -16), (1 << 20, 3, -16),
                          (2048, 4, -16), (1 << 20, 128, -16), (1 << 20, 1, -16), (1 << 20, 4, 0)):
    x.stripeUnit, x.stripeCount = unit, count
    check("stripes %d %d" % (unit, count), cbd.Create2(x), want)
f = c.FileInfo_t()
check("stat stripes", cbd.StatFile(home + "/s", alice, f), 0)
check("stripes", (f.stripeUnit, f.stripeCount), (1 << 20, 4))
x.name, x.poolset = home + "/t", "none"
check("poolset", cbd.Create2(x), -6)
check("unlink", cbd.Unlink(home + "/s", alice), 0)

# -- stat
check("stat dir", cbd.StatFile(home, alice, f), 0)
check("dir", (f.filetype, f.length, f.parentid, f.owner, f.filename), (0, 0, 0, "alice", home[1:]))
dirid = f.id
check("stat file", cbd.StatFile(vol, alice, f), 0)
check("file", (f.filetype, f.length, f.parentid, f.owner, f.filename, f.fileStatus), (1, 10 * GIB, dirid, "alice", "v", 0))
check("id and time", (f.id > 1, f.ctime > 1500000000000000), (True, True))
check("a record is no failure", (f < 0, f >= 0), (False, True))
check("stat none", cbd.StatFile(home + "/none", alice, f), -6)
check("stat /", cbd.StatFile("/", alice, f), -4)
check("stat / by root", cbd.StatFile("/", root, f), 0)

# -- extend
for size, want in ((10 * GIB, 0), (9 * GIB, -13), (10 * GIB + 4096, -100), (21 << 40, -24), (11 * GIB, 0)):
    check("extend to %d" % size, cbd.Extend(vol, alice, size), want)
check("extend dir", cbd.Extend(home, alice, 20 * GIB), -11)
check("extend none", cbd.Extend(home + "/none", alice, 20 * GIB), -6)

# -- data
fd = cbd.Open(vol, alice)
check("open", fd, 3)
check("unlink open", cbd.Unlink(vol, alice), -15)
check("rename open", cbd.Rename(alice, vol, home + "/w"), -15)
check("chown open", cbd.ChangeOwner(vol, "bob", root), -15)
check("never written", cbd.Read(fd, "", 0, 4096) == b"\0" * 4096, True)
check("write str", cbd.Write(fd, "aaaaaaaa" * 512, 0, 4096), 4096)
check("write bytes", cbd.Write(fd, b"b" * 4096, 4096, 4096), 4096)
check("write bytearray", cbd.Write(fd, bytearray(b"c" * 8192), 8192, 8192), 8192)
check("write more than asked", cbd.Write(fd, b"d" * 9000, 16384, 8192), 8192)
check("write latin-1", cbd.Write(fd, u"\xff" * 4096, 24576, 4096), 4096)
check("write too little", cbd.Write(fd, b"d" * 4095, 0, 4096), -16)
got = cbd.Read(fd, "", 0, 28672)
check("read", bytes(got) == b"a" * 4096 + b"b" * 4096 + b"c" * 8192 + b"d" * 8192 + b"\xff" * 4096, True)
got = cbd.Read(fd, "", 0, 4096)
check("what is read equals text", (got == "a" * 4096, got != "a" * 4096, got == "b" * 4096), (True, False, False))
check("what is read equals bytes", (got == b"a" * 4096, isinstance(got, bytes), len(got)), (True, True, 4096))
check("length 0", (cbd.Read(fd, "", 0, 0) == b"", cbd.Write(fd, b"", 0, 0)), (True, 0))
for n in (512, 1024, 4095, 4097):
    check("read of %d" % n, cbd.Read(fd, "", 0, n), -22)
    check("write of %d" % n, cbd.Write(fd, b"x" * n, 0, n), -22)
    check("read at %d" % n, cbd.Read(fd, "", n, 4096), -22)
    check("write at %d" % n, cbd.Write(fd, b"x" * 4096, n, 4096), -22)
end = 11 * GIB
check("write at the end", cbd.Write(fd, b"e" * 4096, end - 4096, 4096), 4096)
check("read at the end", cbd.Read(fd, "", end - 4096, 4096) == "e" * 4096, True)
check("write beyond the end", cbd.Write(fd, b"e" * 4096, end, 4096), -2)
check("read beyond the end", cbd.Read(fd, "", end, 4096), -2)
check("read across the end", cbd.Read(fd, "", end - 4096, 8192), -2)
check("extend while open", cbd.Extend(vol, alice, 12 * GIB), 0)
check("write in the new part", cbd.Write(fd, b"f" * 4096, end, 4096), 4096)
check("read in the new part", cbd.Read(fd, "", end, 4096) == "f" * 4096, True)
big = os.urandom(1 << 20) * 20 + b"tail" * 1024
check("write 20 MiB", cbd.Write(fd, big, 1 << 30, len(big)), len(big))
check("read 20 MiB", bytes(cbd.Read(fd, "", 1 << 30, len(big))) == big, True)
check("read of a hole of 20 MiB", bytes(cbd.Read(fd, "", 2 << 30, len(big))) == b"\0" * len(big), True)
check("read of bad fd", cbd.Read(77, "", 0, 4096), -23)
check("write of bad fd", cbd.Write(77, b"x" * 4096, 0, 4096), -23)
raises("negative offset", OverflowError, cbd.Read, fd, "", -4096, 4096)
raises("offset no number", TypeError, cbd.Read, fd, "", "0", 4096)
raises("data no buffer", TypeError, cbd.Write, fd, 5, 0, 4096)

# -- in the background
done = threading.Event()
a = c.AioContext_t()
a.offset, a.length, a.buf, a.cb = 0, 4096, b"g" * 4096, lambda ctx: done.set()
check("aio write", cbd.AioWrite(fd, a), 0)
check("aio write done", done.wait(20), True)
check("aio write result", (a.ret, a.op), (4096, c.CURVE_OP_WRITE))
done.clear()
r = c.AioContext_t()
r.offset, r.length, r.cb = 0, 4096, lambda ctx: done.set()
check("aio read", cbd.AioRead(fd, r), 0)
check("aio read done", done.wait(20), True)
check("aio read result", (r.ret, r.op, r.buf == "g" * 4096), (4096, c.CURVE_OP_READ, True))
r.offset = 5
check("aio unaligned", cbd.AioRead(fd, r), -22)
r.offset = 0
check("aio bad fd", cbd.AioRead(77, r), -23)
r.length = 0
check("aio of nothing", cbd.AioRead(fd, r), 0)
raises("aio of a wrong type", TypeError, cbd.AioRead, fd, None)
many = []
for n in range(64):
    w = c.AioContext_t()
    w.offset, w.length, w.buf = (1 << 22) + n * 4096, 4096, chr(65 + n % 26) * 4096
    check("aio", cbd.AioWrite(fd, w), 0)
    many.append(w)
other = c.CBDClient()
cbd._drain()
check("all of them done", [w.ret for w in many], [4096] * 64)
check("close", cbd.Close(fd), 0)
check("read of closed", cbd.Read(fd, "", 0, 4096), -23)

# -- directories and renaming
check("mkdir without parent", cbd.Mkdir(home + "/p/q", alice), -6)
check("rmdir not empty", cbd.Rmdir(home, alice), -12)
check("unlink not empty", cbd.Unlink(home, alice), -12)
check("rmdir none", cbd.Rmdir(home + "/none", alice), -6)
check("unlink none", cbd.Unlink(home + "/none", alice), -6)
check("rename dir", cbd.Rename(alice, home, home + "2"), -11)
check("rename none", cbd.Rename(alice, home + "/none", home + "/w"), -6)
check("rename to itself", cbd.Rename(alice, vol, vol), -1)
check("rename into itself", cbd.Rename(alice, vol, vol + "/x"), -16)
check("rename to none", cbd.Rename(alice, vol, "/none" + PREFIX + "/x"), -6)
check("mkdir", cbd.Mkdir(home + "/d", alice), 0)
check("rename onto a dir", cbd.Rename(alice, vol, home + "/d"), -1)
check("unlink of a dir", cbd.Unlink(home + "/d", alice), 0)
check("create w", cbd.Create(home + "/w", alice, 10 * GIB), 0)
check("rename onto w", cbd.Rename(alice, vol, home + "/w"), 0)
check("stat w", (cbd.StatFile(home + "/w", alice, f), f.length), (0, 12 * GIB))
fd = cbd.Open(home + "/w", alice)
check("data moved", cbd.Read(fd, "", 4096, 4096) == "b" * 4096, True)
check("close", cbd.Close(fd), 0)
check("names", "w-" in " ".join(cbd.Listdir("/RecycleBin", root)), True)
check("listdir of a file", raises("listdir of a file", RuntimeError, cbd.Listdir, home + "/w", alice), "ListDir failed")

# -- owners
check("chown by alice", cbd.ChangeOwner(home + "/w", "bob", alice), -4)
check("chown", cbd.ChangeOwner(home + "/w", "bob", root), 0)
check("stat by alice", cbd.StatFile(home + "/w", alice, f), -4)
check("chown back", cbd.ChangeOwner(home + "/w", "alice", root), 0)
check("chown of a full dir", cbd.ChangeOwner(home, "bob", root), -12)

# -- the recycle bin
check("force elsewhere", cbd.DeleteForce(home + "/w", alice), -11)
check("unlink w", cbd.Unlink(home + "/w", alice), 0)
name = [n for n in cbd.Listdir("/RecycleBin", root) if n.startswith("w-%d-" % f.id)]
check("name in the bin", len(name), 1)
check("recover by bob", cbd.Recover(home + "/w", bob, 0), -4)
check("recover none", cbd.Recover(home + "/none", alice, 0), -6)
check("recover wrong id", cbd.Recover(home + "/w", alice, 1 << 40), -100)
check("recover takes the one last created", (cbd.Recover(home + "/w", alice), cbd.StatFile(home + "/w", alice, c.FileInfo_t())), (0, 0))
check("that is the one replaced", cbd.Unlink(home + "/w", alice), 0)
check("recover by id", cbd.Recover(home + "/w", alice, f.id), 0)
fd = cbd.Open(home + "/w", alice)
check("data back", cbd.Read(fd, "", 4096, 4096) == "b" * 4096, True)
check("close", cbd.Close(fd), 0)
check("unlink w", cbd.Unlink(home + "/w", alice), 0)
check("create w", cbd.Create(home + "/w", alice, 10 * GIB), 0)
check("recover onto", cbd.Recover(home + "/w", alice, f.id), -1)
check("recover elsewhere by id", cbd.Recover(home + "/x", alice, f.id), 0)
check("stat x", (cbd.StatFile(home + "/x", alice, f), f.length), (0, 12 * GIB))
check("unlink x", cbd.Unlink(home + "/x", alice), 0)
binned = "/RecycleBin/" + [n for n in cbd.Listdir("/RecycleBin", root) if "-%d-" % f.id in n][0]
check("force by alice", cbd.DeleteForce(binned, alice), -4)
check("force", cbd.DeleteForce(binned, root), 0)
check("force again", cbd.DeleteForce(binned, root) in (-6, -100), True)
check("recover removed", cbd.Recover(home + "/x", alice, 0), -6)

# -- several clients, the shared one, and its functions
check("second client", other.Init(CONF), 0)
o = other.Open(home + "/w", alice)
check("its descriptors are its own", o, 0)
check("module before init", c.Create("/x", alice, 10 * GIB), -2)
check("module init", c.Init(CONF), 0)
check("module clusterid", c.GetClusterId(), cbd.GetClusterId())
check("module stat", c.StatFile(home + "/w", alice, f), 0)
check("module stat4qemu", c.StatFile4Qemu(home + "/w_alice_", f), 0)
g = c.Open4Qemu(home + "/w_alice_")
check("module open4qemu", g >= 0, True)
check("module open4qemu of nonsense", c.Open4Qemu("nonsense"), -2)
check("module write", c.Write(g, "h" * 4096, 0, 4096), 4096)
check("seen by the other", other.Read(o, "", 0, 4096) == "h" * 4096, True)
check("module close", c.Close(g), 0)
check("module listdir", c.Listdir(home, alice), ["w"])
check("module mkdir", (c.Mkdir(home + "/d", alice), c.Rmdir(home + "/d", alice)), (0, 0))
check("module uninit", c.UnInit(), None)
check("module after uninit", c.Create("/x", alice, 10 * GIB), -2)

# -- 100 threads
wrong = []


def work(k):
    for n in range(5):
        block = ("%02d" % k) * 2048
        at = (k * 5 + n) * 4096 + (3 << 30)
        if other.Write(o, block, at, 4096) != 4096 or other.Read(o, "", at, 4096) != block:
            wrong.append(k)
    if k % 10 == 0 and other.StatFile(home + "/w", alice, c.FileInfo_t()) != 0:
        wrong.append(k)


threads = [threading.Thread(target=work, args=(k,)) for k in range(100)]
for t in threads:
    t.start()
for t in threads:
    t.join()
check("100 threads", wrong, [])

# -- fork in the middle: the child uses what the parent opened
stop = threading.Event()


def busy():
    while not stop.is_set():
        work(3)


threads = [threading.Thread(target=busy) for _ in range(4)]
for t in threads:
    t.start()
status = []
for k in range(5):
    pid = os.fork()
    if pid == 0:
        good = all(other.Read(o, "", 3 << 30, 4096) == "00" * 2048 for _ in range(50))
        good = good and other.Write(o, "z" * 4096, (5 << 30) + k * 4096, 4096) == 4096
        good = good and other.StatFile(home + "/w", alice, c.FileInfo_t()) == 0
        os._exit(0 if good else 1)
    status.append(os.waitpid(pid, 0)[1])
stop.set()
for t in threads:
    t.join()
check("children", status, [0] * 5)
check("parent after forks", (other.Read(o, "", 5 << 30, 4096) == "z" * 4096, wrong), (True, []))
check("still mounted", other.Unlink(home + "/w", alice), -15)
check("uninit", other.UnInit(), None)
check("unlink w", cbd.Unlink(home + "/w", alice), 0)
check("rmdir home", cbd.Rmdir(home, alice), 0)
check("names of codes", [c.strerror(-n) for n in (0, 4, 24, 29, 100, 55)],
      ["OK", "AUTHFAIL", "LENGTH_NOT_SUPPORT", "SNAPSTHO_FROZEN", "UNKNOWN", "Unknown Error Code"])
cbd.UnInit()

for line in failed:
    print(line)
print("%d checks, %d failed" % (checks[0], len(failed)))
sys.exit(1 if failed else 0)
