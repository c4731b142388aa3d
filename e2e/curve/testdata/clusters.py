# Checks that clients of several clusters do not meet.
from __future__ import print_function

import sys

import curvefs as c

u = c.UserInfo_t()
u.owner = "alice"
clients = []
for conf in sys.argv[1:]:
    cbd = c.CBDClient()
    assert cbd.Init(conf) == 0 and cbd.Create("/v", u, 10 << 30) == 0, cbd.last_error
    fd = cbd.Open("/v", u)
    assert fd == 0 and cbd.Write(fd, str(len(clients)) * 4096, 0, 4096) == 4096
    clients.append(cbd)
for n, cbd in enumerate(clients):
    assert cbd.Read(0, "", 0, 4096) == str(n) * 4096
    cbd.UnInit()
    assert cbd.Read(0, "", 0, 4096) == -23
    for other in clients[n + 1:]:
        assert len(other.Read(0, "", 0, 4096)) == 4096
print("GOOD")
