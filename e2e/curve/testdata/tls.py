# Checks calls over HTTPS and data over TCP, with TLS where the addresses say so.
from __future__ import print_function

import os
import sys

import curvefs as c

cbd, u = c.CBDClient(), c.UserInfo_t()
u.owner = "alice"
assert cbd.Init(sys.argv[1]) == 0, cbd.last_error
assert cbd.Create("/tls", u, 10 << 30) == 0, cbd.last_error
fd = cbd.Open("/tls", u)
assert fd == 0, cbd.last_error
f = cbd._files[fd]
f.urls = [x for x in f.urls if "unix" not in x]
f.hang_up(1)
assert f.urls and f.urls[0].split(":")[0] == sys.argv[2], f.urls
for size in (4096, 1 << 20, 9 << 20):
    data = os.urandom(size)
    assert cbd.Write(fd, data, 8192, size) == size, cbd.last_error
    assert cbd.Read(fd, "", 8192, size) == data
    assert cbd.Read(fd, "", 1 << 30, size) == b"\0" * size
assert type(f.idle[0].sock).__name__ == sys.argv[3], f.idle[0].sock
pid = os.fork()
if pid == 0:
    os._exit(0 if cbd.Read(fd, "", 8192, 4096) == data[:4096] else 1)
assert os.waitpid(pid, 0)[1] == 0
assert cbd.Read(fd, "", 8192, 4096) == data[:4096]
assert cbd.Close(fd) == 0 and cbd.Unlink("/tls", u) == 0, cbd.last_error
print("GOOD")
