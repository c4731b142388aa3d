package host

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Reads lets the reads of many goroutines go to the kernel together. A read
// alone costs a thread two switches and, on a virtual disk, a call of the
// hypervisor; of reads that are under way together, a few go with one system
// call, and one wake-up brings the outcome of all that are done by then. Dirs
// on one disk share a Reads (DirOptions). All methods may be called
// concurrently. It runs one goroutine until Close.
type Reads struct {
	ctx   uintptr // of the kernel's asynchronous I/O
	event *os.File
	ended chan struct{}
	idle  chan struct{} // closed when no read is under way after Close

	under atomic.Int32 // reads under way, in whatever way
	deep  atomic.Int32 // reads to come that are likely to have company
	waits atomic.Bool  // some disk cannot do without
	mu    struct {
		sync.Mutex // held for memory work only
		free       []*readOp
		waiting    []*readOp
		sending    bool // somebody sends what waits
		closed     bool
	}

	// Of whoever sends, and of the goroutine.
	batch  []*readOp
	list   [readsTogether]*iocb
	events [readsTogether]ioEvent
	ops    [readsDepth]readOp
}

const (
	readsDepth    = 256       // reads in the kernel at most; others go the plain way
	readsTogether = 32        // reads of one system call
	readsAlone    = 2         // so many at once are read in the plain way, which is quicker
	readsDeep     = 16        // so many after a batch of more are taken to be many, too
	readsBytes    = 128 << 10 // longer ones too
)

// readOp is one read.
type readOp struct {
	block iocb
	p     []byte     // keeps the memory
	done  chan int64 // takes the outcome, or yourTurn
}

const (
	opPread     = 0 // IOCB_CMD_PREAD
	iocbEventfd = 1 // IOCB_FLAG_RESFD

	// Outcomes that are none of the kernel's.
	failed   = -1 << 62 // the kernel did not take it
	yourTurn = failed + 1
)

// NewReads asks the kernel for its part. It returns nil, which reads in the
// plain way, where it has none.
func NewReads() *Reads {
	if unsafe.Sizeof(uintptr(0)) != 8 {
		return nil
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil
	}
	r := &Reads{ended: make(chan struct{}), idle: make(chan struct{}), batch: make([]*readOp, 0, readsTogether)}
	r.event = os.NewFile(uintptr(fd), "eventfd")
	if _, _, errno := unix.RawSyscall(unix.SYS_IO_SETUP, readsDepth, uintptr(unsafe.Pointer(&r.ctx)), 0); errno != 0 {
		r.event.Close()
		return nil
	}
	for i := range r.ops {
		op := &r.ops[i]
		op.done = make(chan int64, 1)
		op.block = iocb{data: uint64(i), opcode: opPread, flags: iocbEventfd, event: uint32(fd)}
		r.mu.free = append(r.mu.free, op)
	}
	go r.collect()
	return r
}

// Close ends it, when the reads under way are done. Files can still be read, in
// the plain way.
func (r *Reads) Close() {
	if r == nil {
		return
	}
	r.mu.Lock()
	r.mu.closed = true
	busy := len(r.mu.free) < readsDepth
	r.mu.Unlock()
	if busy {
		<-r.idle
	}
	r.event.Close()
	<-r.ended
	unix.RawSyscall(unix.SYS_IO_DESTROY, r.ctx, 0, 0)
}

// enter counts a read and reports whether it should go together with others.
// Outcomes come many at a time, so just then few may be under way.
func (r *Reads) enter() bool {
	return r.under.Add(1) > readsAlone || r.deep.Load() > 0 && r.deep.Add(-1) >= 0
}

// leave ends what enter began.
func (r *Reads) leave() { r.under.Add(-1) }

// read fills p, aligned, from off of the file fd. It reports false when that
// must be done in the plain way, because of an error, for example, or since the
// kernel would have had to wait, which must not hold up the others.
func (r *Reads) read(fd int, p []byte, off int64) bool {
	op := r.get()
	if op == nil {
		return false
	}
	op.p = p
	op.block.fd, op.block.off, op.block.rw = uint32(fd), off, unix.RWF_NOWAIT
	if r.waits.Load() {
		op.block.rw = 0
	}
	op.block.buf, op.block.size = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), uint64(len(p))
	r.mu.Lock()
	r.mu.waiting = append(r.mu.waiting, op)
	send := !r.mu.sending
	r.mu.sending = true
	r.mu.Unlock()
	if send {
		runtime.Gosched() // let others who are about to read come along
		r.send(op)
	}
	res := <-op.done
	for res == yourTurn {
		r.send(op)
		res = <-op.done
	}
	if res == -int64(unix.EOPNOTSUPP) {
		r.waits.Store(true)
	}
	r.put(op)
	return res == int64(len(p))
}

// put takes back an op.
func (r *Reads) put(op *readOp) {
	op.p = nil
	r.mu.Lock()
	r.mu.free = append(r.mu.free, op)
	last := r.mu.closed && len(r.mu.free) == readsDepth
	r.mu.Unlock()
	if last {
		close(r.idle)
	}
}

func (r *Reads) get() *readOp {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.mu.free) - 1
	if n < 0 || r.mu.closed {
		return nil
	}
	op := r.mu.free[n]
	r.mu.free = r.mu.free[:n]
	return op
}

// send hands over all that waits. When own is done and more is there, another
// reader goes on with it.
func (r *Reads) send(own *readOp) {
	for {
		r.mu.Lock()
		n := min(len(r.mu.waiting), readsTogether)
		if n == 0 {
			r.mu.sending = false
			r.mu.Unlock()
			return
		}
		if len(own.done) > 0 {
			next := r.mu.waiting[0]
			r.mu.Unlock()
			next.done <- yourTurn
			return
		}
		r.batch = append(r.batch[:0], r.mu.waiting[:n]...)
		r.mu.waiting = append(r.mu.waiting[:0], r.mu.waiting[n:]...)
		r.mu.Unlock()
		if n > readsAlone {
			r.deep.Store(readsDeep)
		}
		r.submit(r.batch)
	}
}

// submit starts reads. Those that the kernel does not take end at once.
func (r *Reads) submit(ops []*readOp) {
	for i, op := range ops {
		r.list[i] = &op.block
	}
	for sent := 0; sent < len(ops); {
		k, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, r.ctx, uintptr(len(ops)-sent), uintptr(unsafe.Pointer(&r.list[sent])))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || k == 0 {
			for _, op := range ops[sent:] {
				op.done <- failed
			}
			return
		}
		sent += int(k)
	}
}

// collect takes the outcomes.
func (r *Reads) collect() {
	defer close(r.ended)
	var count [8]byte
	for {
		if _, err := r.event.Read(count[:]); err != nil {
			return
		}
		for n := readsTogether; n == readsTogether; {
			n = r.take()
		}
	}
}

// take takes the outcomes that are there, without waiting.
func (r *Reads) take() int {
	var none unix.Timespec
	for {
		k, _, errno := unix.RawSyscall6(unix.SYS_IO_GETEVENTS, r.ctx, 0, readsTogether, uintptr(unsafe.Pointer(&r.events[0])), uintptr(unsafe.Pointer(&none)), 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			panic("host: io_getevents: " + errno.Error()) // the kernel still has our memory
		}
		for _, e := range r.events[:k] {
			r.ops[e.data].done <- e.res
		}
		return int(k)
	}
}
