# Reads and writes from four threads until standard input ends; meanwhile the
# server goes and comes back. No call may fail.
from __future__ import print_function

import sys
import threading
import time

import curvefs as c

cbd, u = c.CBDClient(), c.UserInfo_t()
u.owner = "alice"
assert cbd.Init(sys.argv[1]) == 0
assert cbd.Create("/s", u, 10 << 30) == 0, cbd.last_error
fd = cbd.Open("/s", u)
assert fd == 0, cbd.last_error
stop, bad, counts, worst = threading.Event(), [], [0] * 4, [0.0] * 4


def work(k):
    while not stop.is_set():
        n = counts[k]
        block, at = ("%08d" % n) * 512, (k * 100000 + n % 100) * 4096
        start = time.time()
        wrote, got = cbd.Write(fd, block, at, 4096), cbd.Read(fd, "", at, 4096)
        worst[k] = max(worst[k], time.time() - start)
        if wrote != 4096 or got != block:
            bad.append((wrote, got if isinstance(got, int) else "other data", cbd.last_error))
        counts[k] += 1


threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
for t in threads:
    t.start()
print("running")
sys.stdout.flush()
sys.stdin.read()
stop.set()
for t in threads:
    t.join()
assert not bad, bad[:3]
assert cbd.StatFile("/s", u, c.FileInfo_t()) == 0 and cbd.Unlink("/s", u) == -15
assert cbd.Close(fd) == 0 and cbd.Unlink("/s", u) == 0, cbd.last_error
print("GOOD %d rounds, the longest took %.1f s" % (sum(counts), max(worst)))
