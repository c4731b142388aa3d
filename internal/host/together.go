package host

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// WriteOp is one write of Together. Its meaning is that of File.WriteVec.
type WriteOp struct {
	File    File
	Vec     [][]byte
	Off     int64
	Durable bool
	Err     error // the outcome
}

// Together writes to several files at once. Writes that go straight to disks
// are handed to the kernel in one call, which costs one sleep of the thread
// instead of one for each and lets the disks work side by side; all others are
// done one after another. It belongs to one goroutine at a time.
type Together struct {
	ctx    uintptr // of the kernel's asynchronous I/O; 0 if there is none
	tried  bool
	list   [maxTogether]*iocb
	blocks [maxTogether]iocb
	ops    [maxTogether]*WriteOp
	vecs   [maxTogether]*iovecs
	sizes  [maxTogether]int64
	events [maxTogether]ioEvent
}

// maxTogether is how many writes are in the kernel at once.
const maxTogether = 16

// iocb and ioEvent are struct iocb and io_event of linux/aio_abi.h on a
// little-endian machine.
type iocb struct {
	data   uint64
	_      uint32 // key
	rw     int32  // flags of the transfer
	opcode uint16
	_      int16 // priority
	fd     uint32
	buf    uint64
	size   uint64
	off    int64
	_      uint64 // reserved
	flags  uint32 // of the event
	event  uint32 // eventfd
}

type ioEvent struct {
	data, obj uint64
	res, res2 int64
}

const opPwritev = 8 // IOCB_CMD_PWRITEV

// Write carries out the writes and sets the Err of each.
func (t *Together) Write(ops []WriteOp) {
	for len(ops) > 0 {
		n := min(len(ops), maxTogether)
		t.write(ops[:n])
		ops = ops[n:]
	}
}

// Close gives back what the kernel keeps.
func (t *Together) Close() {
	if t.ctx != 0 {
		unix.RawSyscall(unix.SYS_IO_DESTROY, t.ctx, 0, 0)
		t.ctx = 0
	}
	t.tried = true
}

func (t *Together) write(ops []WriteOp) {
	n := 0
	if len(ops) > 1 && !(t.tried && t.ctx == 0) {
		for i := range ops {
			if ops[i].direct() {
				t.add(n, &ops[i])
				n++
			}
		}
	}
	sent := t.submit(n)
	for i := range ops {
		if op := &ops[i]; !t.has(op, sent) {
			op.Err = op.File.WriteVec(op.Vec, op.Off, op.Durable)
		}
	}
	t.await(sent)
	for i := range n {
		clear(t.vecs[i].list[:t.blocks[i].size])
		iovecPool.Put(t.vecs[i])
		t.vecs[i], t.ops[i] = nil, nil
	}
	runtime.KeepAlive(ops)
}

// has reports whether op is one of the first sent.
func (t *Together) has(op *WriteOp, sent int) bool {
	for _, o := range t.ops[:sent] {
		if o == op {
			return true
		}
	}
	return false
}

// direct reports whether the kernel can do op on its own: a write of whole
// blocks past the page cache. It notes no error; WriteVec will.
func (op *WriteOp) direct() bool {
	f, ok := op.File.(*dirFile)
	if !ok || op.Durable || len(op.Vec) == 0 || len(op.Vec) > maxIovecs || !f.direct.Load() || f.checkWrite("write", op.Off) != nil {
		return false
	}
	whole, n := vecAligned(op.Vec)
	return whole && alignedRange(op.Off, n)
}

// add prepares op as number i.
func (t *Together) add(i int, op *WriteOp) {
	v := iovecPool.Get().(*iovecs)
	_, n, size := v.fill(op.Vec)
	t.vecs[i], t.ops[i], t.sizes[i] = v, op, size
	t.blocks[i] = iocb{
		data: uint64(i), opcode: opPwritev, fd: uint32(op.File.(*dirFile).fd),
		buf: uint64(uintptr(unsafe.Pointer(&v.list[0]))), size: uint64(n), off: op.Off,
	}
	t.list[i] = &t.blocks[i]
}

// setup asks the kernel for its part, once.
func (t *Together) setup() {
	if t.tried {
		return
	}
	t.tried = true
	if unsafe.Sizeof(uintptr(0)) != 8 {
		return
	}
	var ctx uintptr
	if _, _, errno := unix.RawSyscall(unix.SYS_IO_SETUP, maxTogether, uintptr(unsafe.Pointer(&ctx)), 0); errno == 0 {
		t.ctx = ctx
	}
}

// submit starts the first n and returns how many the kernel took.
func (t *Together) submit(n int) int {
	if n < 2 { // not worth it
		return 0
	}
	if t.setup(); t.ctx == 0 {
		return 0
	}
	sent := 0
	for sent < n {
		k, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, t.ctx, uintptr(n-sent), uintptr(unsafe.Pointer(&t.list[sent])))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || k == 0 {
			break
		}
		sent += int(k)
	}
	return sent
}

// await waits for the sent writes. What went wrong or was cut short is done
// again in the plain way, which knows what to do or gives the error.
func (t *Together) await(sent int) {
	for left := sent; left > 0; {
		k, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, t.ctx, uintptr(left), uintptr(left), uintptr(unsafe.Pointer(&t.events[0])), 0, 0)
		if errno != 0 {
			if errno == unix.EINTR {
				continue
			}
			panic("host: io_getevents: " + errno.Error()) // the kernel still has our memory
		}
		for _, e := range t.events[:k] {
			op := t.ops[e.data]
			switch {
			case e.res == t.sizes[e.data]:
				op.Err = nil
			case e.res == -int64(unix.EINVAL) || e.res == -int64(unix.EAGAIN) || e.res >= 0:
				op.Err = op.File.WriteVec(op.Vec, op.Off, op.Durable)
			default:
				op.Err = wrap("write", op.File.(*dirFile).name, unix.Errno(-e.res))
			}
		}
		left -= int(k)
	}
}
