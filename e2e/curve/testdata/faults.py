# Checks how reads and writes end when something is wrong below. The test tells
# over standard input when it has changed what is wrong, and is told over
# standard output what to change next.
from __future__ import print_function

import sys
import time

import curvefs as c


def fault(name):
    print(name)
    sys.stdout.flush()
    sys.stdin.readline()


cbd, hasty, alice = c.CBDClient(), c.CBDClient(), c.UserInfo_t()
alice.owner = "alice"
assert cbd.Init(sys.argv[1]) == 0
assert cbd.Create("/f", alice, 10 << 30) == 0
fd = cbd.Open("/f", alice)
assert fd == 0
# Another client for what ends at the deadline; the first one's is far away.
assert hasty.Init(sys.argv[1] + ".more") == 0
while hasty.Open("/f", alice) != fd:  # in time, on a busy machine
    assert hasty.last_error, "another descriptor"
data, bad = b"x" * 4096, []
for name, read, write in (("CORRUPT", -18, -18), ("IO", -20, -20), ("NO_SPACE", -21, -21), ("READ_ONLY", -11, -11),
                          ("CONFLICT once", 4096, 4096), ("UNAVAILABLE once", 4096, 4096), ("hang up", 4096, 4096),
                          ("TIMEOUT", -2, -2), ("hang", -2, -2)):
    for what, want in (("read", read), ("write", write)):
        fault(name)
        start, client = time.time(), hasty if want == -2 else cbd
        got = client.Read(fd, "", 0, 4096) if what == "read" else client.Write(fd, data, 0, 4096)
        took = time.time() - start
        if not isinstance(got, int):
            got = len(got)
        if got != want or took > 30:
            bad.append("%s under %s: %d after %.1f s (%s), want %d" % (what, name, got, took, client.last_error, want))
fault("none")
if cbd.Write(fd, data, 0, 4096) != 4096 or cbd.Read(fd, "", 0, 4096) != data:
    bad.append("not well again: %s" % cbd.last_error)
fault("down")
start = time.time()
codes = [hasty.Read(fd, "", 0, 4096), hasty.Write(fd, data, 0, 4096), hasty.StatFile("/f", alice, c.FileInfo_t()),
         hasty.Create("/g", alice, 10 << 30), hasty.Open("/f", alice), hasty.GetClusterId(), hasty.ListPoolset(), hasty.Close(fd)]
if codes != [-2, -2, -2, -2, -2, "", [], 0]:
    bad.append("server gone: %r" % codes)
if time.time() - start > 60:
    bad.append("server gone: took %.1f s" % (time.time() - start))
print("\n".join(["BAD"] + bad if bad else ["GOOD"]))
