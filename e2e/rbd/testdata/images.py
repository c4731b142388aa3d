"""Works on RBD images: a command as JSON per line in, an answer per line out."""
import json
import sys

import rados
import rbd

cluster = rados.Rados(conffile=sys.argv[1])
cluster.connect()
pool = cluster.open_ioctx("rbd")
api = rbd.RBD()


def fill(n, seed, dense):
    """n bytes; about a third of the pages are zero unless dense."""
    out = bytearray()
    while len(out) < n:
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        out += bytes(4096) if seed % 3 == 0 and not dense else bytes([seed >> 8 & 255 or 1]) * 4096
    return bytes(out[:n])


def run(c):
    op, name = c["op"], c.get("image")
    if op == "create":
        kw = {k: c[k] for k in ("stripe_unit", "stripe_count", "order", "features") if k in c}
        if "order" not in kw:
            kw["order"] = 22
        api.create(pool, name, c["size"], old_format=False, **kw)
        return {}
    if op == "clone":
        api.clone(pool, c["parent"], c["snap"], pool, name)
        return {}
    if op == "list":
        return {"images": api.list(pool)}
    with rbd.Image(pool, name, snapshot=c.get("snap") if op == "read" else None) as i:
        if op == "write":
            i.write(fill(c["n"], c["seed"], c.get("dense")), c["off"])
        elif op == "discard":
            i.discard(c["off"], c["n"])
        elif op == "resize":
            i.resize(c["size"])
        elif op == "snap":
            i.create_snap(c["snap"])
            if c.get("protect"):
                i.protect_snap(c["snap"])
        elif op == "meta":
            i.metadata_set(c["key"], c["value"])
        elif op == "info":
            return {
                "size": i.size(), "stripe_unit": i.stripe_unit(), "stripe_count": i.stripe_count(),
                "order": i.stat()["order"], "features": i.features(), "meta": dict(i.metadata_list()),
                "snaps": [[s["name"], s["size"], i.is_protected_snap(s["name"])] for s in i.list_snaps()],
            }
        elif op == "read":
            with open(c["file"], "wb") as f:
                size, off = i.size(), 0
                while off < size:
                    p = i.read(off, min(4 << 20, size - off))
                    f.write(p)
                    off += len(p)
    return {}


for line in sys.stdin:
    try:
        answer = run(json.loads(line))
    except rbd.Error as e:
        answer = {"error": str(e)}
    print(json.dumps(answer), flush=True)
