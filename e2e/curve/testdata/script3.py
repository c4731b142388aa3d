#!/usr/bin/env python3
# The script of script2.py as 2to3 makes it.
import curvefs

cbd = curvefs.CBDClient()
rc = cbd.Init("./client.conf")
print("init: %d" % rc)

user = curvefs.UserInfo_t()
user.owner = "curve"
user.password = ""

dirpath = "/curve"
rc = cbd.Mkdir(dirpath, user)
print("mkdir: %d" % rc)
rc = cbd.Create(dirpath + "/volume1", user, 10 * 1024 * 1024 * 1024)
print("create: %d" % rc)
rc = cbd.Create(dirpath + "/volume1", user, 10 * 1024 * 1024 * 1024)
if rc == -curvefs.CURVE_ERROR_EXISTS:
    print("it exists")

fd = cbd.Open(dirpath + "/volume1", user)
print("fd: %d" % fd)
buf = "aaaaaaaa" * 512
print("write: %d" % cbd.Write(fd, buf, 0, 4096))
print("same: %s" % (cbd.Read(fd, "", 0, 4096) == buf))
print("close: %d" % cbd.Close(fd))

rc = cbd.Extend(dirpath + "/volume1", user, 20 * 1024 * 1024 * 1024)
print("extend: %d" % rc)
finfo = curvefs.FileInfo_t()
rc = cbd.StatFile(dirpath + "/volume1", user, finfo)
print("stat: %d" % rc)
print("type %s, length %d, name %s, owner %s" % (finfo.filetype, finfo.length, finfo.filename, finfo.owner))

rc = cbd.Rename(user, dirpath + "/volume1", dirpath + "/volume2")
print("rename: %d" % rc)
for name in cbd.Listdir(dirpath, user):
    print("entry " + name)
print("unlink: %d" % cbd.Unlink(dirpath + "/volume2", user))
print("again: %d" % cbd.Unlink(dirpath + "/volume2", user))

root = curvefs.UserInfo_t()
root.owner = "root"
root.password = "root_password"
names = cbd.Listdir("/RecycleBin", root)
print("recycled: %d" % len([n for n in names if n.startswith("volume2-")]))
for n in names:
    print("force: %d" % cbd.DeleteForce("/RecycleBin/" + n, root))
try:
    cbd.Listdir("/nothing", user)
except RuntimeError as e:
    print("error: %s" % e)
print("rmdir: %d" % cbd.Rmdir(dirpath, user))
cbd.UnInit()
curvefs.UnInit()
