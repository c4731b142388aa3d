package wire

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
)

// receive reads answers until the connection ends.
func (c *conn) receive() error {
	for {
		if len(c.done) > 0 && (c.br.Buffered() < headerSize || len(c.done) >= 64) {
			c.handBack()
		}
		if err := c.receiveOne(); err != nil {
			c.handBack()
			return err
		}
	}
}

// handBack returns finished appends in one pass.
func (c *conn) handBack() {
	for i, a := range c.done {
		a.Done <- a
		c.done[i] = nil
	}
	c.done = c.done[:0]
}

func (c *conn) receiveOne() error {
	h, body, err := c.frame()
	if err != nil {
		return err
	}
	if !h.reply {
		return fmt.Errorf("a %v that is no answer: %w", h.method, atoll.ErrCorrupt)
	}
	k := c.claim(&h)
	if k == nil {
		_, err = c.br.Discard(h.payload)
		return err
	}
	if k.app != nil {
		err = k.res.decode(h.method, body)
		c.finishAppend(k, err)
		return err
	}
	return c.receiveResult(k, &h, body)
}

// frame reads a header and a body, which is valid until the next frame.
func (c *conn) frame() (header, []byte, error) {
	if _, err := io.ReadFull(c.br, c.hdr[:]); err != nil {
		return header{}, nil, err
	}
	h, err := decodeHeader(c.hdr[:])
	if err != nil {
		return h, nil, err
	}
	c.body, err = readBody(c.br, &h, c.body)
	return h, c.body[min(h.ext, len(c.body)):], err
}

// readBody reads and checks the body of a frame into p, which is grown if
// needed.
func readBody(br *bufio.Reader, h *header, p []byte) ([]byte, error) {
	if cap(p) < h.body {
		p = make([]byte, h.body, max(h.body, 512))
	}
	p = p[:h.body]
	if _, err := io.ReadFull(br, p); err != nil {
		return p, err
	}
	if h.body == 0 {
		return p, nil
	}
	if sum := checksum(p); sum != h.bodyCRC {
		return p, fmt.Errorf("body of %v has checksum %08x, sent %08x: %w", h.method, sum, h.bodyCRC, atoll.ErrCorrupt)
	}
	return p, nil
}

// claim finds the call that h answers; nil if nobody waits for it any more.
func (c *conn) claim(h *header) *call {
	c.mu.Lock()
	defer c.mu.Unlock()
	index := uint32(h.id)
	if int64(index) >= int64(len(c.mu.calls)) {
		return nil
	}
	k := c.mu.calls[index]
	if k.id() != h.id || k.state != waiting || k.method != h.method {
		return nil
	}
	k.state = receiving
	return k
}

func (c *conn) finishAppend(k *call, err error) {
	a := k.app
	a.Err, a.Queued, a.Commit = k.res.err, k.res.queued, k.res.commit
	if err != nil {
		a.Err = c.unreachable(err)
	}
	c.link.o.metrics.called(mAppend, a.Err, k.start)
	c.mu.Lock()
	c.freeLocked(k)
	c.mu.Unlock()
	c.done = append(c.done, a)
}

// receiveResult reads the rest of an answer that someone waits for. The
// returned error ends the connection.
func (c *conn) receiveResult(k *call, h *header, body []byte) error {
	var fatal error
	if h.method != mPing {
		fatal = k.res.decode(h.method, body)
	}
	err, left := k.res.err, 0
	if fatal == nil && h.payload > 0 {
		left, err, fatal = c.payload(k, h)
	} else if fatal == nil && err == nil && len(k.dst) > 0 {
		fatal = fmt.Errorf("answer to a read has no payload: %w", atoll.ErrCorrupt)
	}
	if fatal != nil {
		err = c.unreachable(fatal)
	}
	c.mu.Lock()
	k.err = err
	c.finishLocked(k)
	c.mu.Unlock()
	if fatal == nil && left > 0 {
		_, fatal = c.br.Discard(left)
	}
	return fatal
}

// payload reads the payload of an answer to where it is wanted. left is what
// remains to be skipped, because nobody waits for it any more.
func (c *conn) payload(k *call, h *header) (left int, err, fatal error) {
	p := k.dst
	if k.method == mRead && len(p) != h.payload {
		return 0, nil, fmt.Errorf("%d bytes for a read of %d: %w", h.payload, len(p), atoll.ErrCorrupt)
	}
	if p == nil {
		k.buf = host.Alloc(h.payload)
		p = k.buf.Bytes()
	}
	c.receiving = k
	n, fatal := io.ReadFull(c.br, p)
	c.receiving = nil
	if errors.Is(fatal, errDropped) {
		return h.payload - n, atoll.ErrTimeout, nil
	}
	if fatal != nil {
		return 0, nil, fatal
	}
	if sum := checksum(p); h.sum && sum != h.dataCRC {
		return 0, nil, fmt.Errorf("payload has checksum %08x, sent %08x: %w", sum, h.dataCRC, atoll.ErrCorrupt)
	}
	return 0, nil, nil
}

// wanted reports whether the call being received is still wanted.
func (c *conn) wanted() bool {
	if c.receiving == nil {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.receiving.dropped
}

// patient reads from the connection. A passed deadline, once hello is done, only
// means "look whether the call is still wanted".
type patient struct {
	c    *conn
	conn net.Conn
}

func (r *patient) Read(p []byte) (int, error) {
	for {
		n, err := r.conn.Read(p)
		if n > 0 {
			r.c.progress.Add(1)
			r.c.link.o.metrics.got(n)
			return n, nil
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || !r.c.isUp() {
			return 0, err
		}
		r.conn.SetReadDeadline(time.Time{})
		if !r.c.wanted() {
			return 0, errDropped
		}
	}
}

func (c *conn) isUp() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.up
}
