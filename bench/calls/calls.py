"""Prints the median time of a 4 KiB call in microseconds."""

import os
import random
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import curvefs  # noqa: E402


def main(conf, name, op, count, area):
    client = curvefs.CBDClient()
    client.Init(conf)
    user = curvefs.UserInfo_t()
    user.owner = "bench"
    fd = client.Open(name, user)
    if fd < 0:
        sys.exit("open %s: %d: %s" % (name, fd, client.last_error))
    data, clock, took = os.urandom(4096), time.perf_counter, []
    for _ in range(count):
        off = random.randrange(area // 4096) * 4096
        start = clock()
        if op == "read":
            got = client.Read(fd, "", off, 4096)
            end = clock()
            good = len(got) == 4096
        else:
            good = client.Write(fd, data, off, 4096) == 4096
            end = clock()
        if not good:
            sys.exit("%s at %d: %s" % (op, off, client.last_error))
        took.append(end - start)
    client.Close(fd)
    client.UnInit()
    print(sorted(took)[count // 2] * 1e6)


main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
