package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"github.com/atollstore/atoll/internal/atoll"
)

// submit queues o, and sends all that is queued unless another goroutine is at
// it. After an error o was never queued.
func (c *Client) submit(o *op) error {
	c.mu.Lock()
	if c.mu.err != nil {
		defer c.mu.Unlock()
		return c.mu.err
	}
	c.mu.cookie++
	o.put(c.mu.cookie)
	c.mu.pending[o.h.cookie] = o
	c.mu.queue = append(c.mu.queue, o)
	mine := !c.mu.sending
	c.mu.sending = true
	others := len(c.mu.pending) > 1
	c.mu.Unlock()
	if !mine {
		return nil
	}
	if others {
		runtime.Gosched() // let the goroutines that were woken together join in
	}
	for c.takeBatch() {
		if err := c.sendBatch(); err != nil {
			c.fail(fmt.Errorf("send to %v: %w: %w", c.addr, atoll.ErrUnreachable, err))
		}
	}
	return nil
}

// takeBatch takes what is queued, or ends the caller's duty to send.
func (c *Client) takeBatch() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.mu.queue) == 0 {
		c.mu.sending = c.mu.err != nil
		return false
	}
	c.batch, c.mu.queue = c.mu.queue, c.batch[:0]
	return true
}

// sendBatch sends the ops of the batch that were not abandoned.
func (c *Client) sendBatch() error {
	c.slices = c.slices[:0]
	for i, o := range c.batch {
		if !o.state.CompareAndSwap(opQueued, opSending) {
			c.forget(o)
			c.batch[i] = nil
			continue
		}
		c.slices = append(c.slices, o.head[:])
		if o.h.typ == cmdWrite {
			c.slices = append(c.slices, o.data)
		}
	}
	err := c.write()
	for i, o := range c.batch {
		if o != nil {
			o.state.CompareAndSwap(opSending, opSent)
		}
		c.batch[i] = nil
	}
	clear(c.slices)
	return err
}

// write sends the slices, gathered by the kernel or in memory.
func (c *Client) write() error {
	if len(c.slices) == 0 {
		return nil
	}
	select {
	case c.writing <- struct{}{}:
		defer func() { <-c.writing }()
	case <-c.dead:
		return nil
	}
	if c.gather {
		c.vec = c.slices
		_, err := c.vec.WriteTo(c.nc)
		return err
	}
	c.flat = c.flat[:0]
	for _, p := range c.slices {
		c.flat = append(c.flat, p...)
	}
	_, err := c.nc.Write(c.flat)
	if cap(c.flat) > 1<<20 {
		c.flat = nil
	}
	return err
}

// forget drops an op that will not be answered.
func (c *Client) forget(o *op) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.mu.pending, o.h.cookie)
}

// receiveLoop reads replies until the connection fails, then ends all ops.
func (c *Client) receiveLoop() {
	for {
		if err := c.receiveOne(); err != nil {
			c.fail(fmt.Errorf("receive from %v: %w: %w", c.addr, atoll.ErrUnreachable, err))
			break
		}
	}
	c.writing <- struct{}{} // the socket is closed; from here nobody reads the owners' memory
	c.mu.Lock()
	all, err := c.mu.pending, c.mu.err
	c.mu.pending = nil
	c.mu.Unlock()
	for _, o := range all {
		o.err = err
		o.finish()
	}
}

// finish hands the op back to its owner, if it is still there.
func (o *op) finish() {
	if o.state.Swap(opDone) != opAbandoned {
		o.done <- struct{}{}
	}
}

// errProtocol is a reply that makes no sense.
var errProtocol = errors.New("malformed reply")

// receiveOne reads one simple reply or one chunk.
func (c *Client) receiveOne() error {
	p, err := c.in.take(simpleBytes)
	if err != nil {
		return err
	}
	switch binary.BigEndian.Uint32(p) {
	case magicSimple:
		return c.receiveSimple(binary.BigEndian.Uint32(p[4:]), binary.BigEndian.Uint64(p[8:]))
	case magicStructured:
		flags, typ := binary.BigEndian.Uint16(p[4:]), binary.BigEndian.Uint16(p[6:])
		cookie := binary.BigEndian.Uint64(p[8:])
		if p, err = c.in.take(chunkBytes - simpleBytes); err != nil {
			return noEOF(err)
		}
		return c.receiveChunk(flags, typ, cookie, binary.BigEndian.Uint32(p))
	}
	return fmt.Errorf("%w: magic %#x", errProtocol, binary.BigEndian.Uint32(p))
}

// find returns the op of a cookie.
func (c *Client) find(cookie uint64) (*op, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.mu.pending[cookie]
	if o == nil {
		return nil, fmt.Errorf("%w: unknown cookie %d", errProtocol, cookie)
	}
	return o, nil
}

// end finishes an op.
func (c *Client) end(o *op) {
	c.forget(o)
	if o.err == nil && o.h.typ == cmdRead && o.got != int(o.h.n) {
		o.err = fmt.Errorf("read %d+%d: %w: %d bytes came: %w", o.h.off, o.h.n, errProtocol, o.got, atoll.ErrIO)
	}
	o.finish()
}

// serverError makes the error of an op.
func (o *op) serverError(code uint32, text string) error {
	return newServerError(fmt.Sprintf("%s %d+%d", commandNames[o.h.typ], o.h.off, o.h.n), code, text)
}

// receiveSimple takes in a simple reply.
func (c *Client) receiveSimple(code uint32, cookie uint64) error {
	o, err := c.find(cookie)
	if err != nil {
		return err
	}
	switch {
	case code != 0:
		o.err = o.serverError(code, "")
	case o.h.typ == cmdRead && c.p.structured || o.h.typ == cmdBlockStatus:
		return fmt.Errorf("%w: simple reply to %s", errProtocol, commandNames[o.h.typ])
	case o.h.typ == cmdRead:
		if err := c.fillData(o, o.h.off, int(o.h.n)); err != nil {
			return err
		}
	}
	c.end(o)
	return nil
}

// receiveChunk takes in one chunk of a structured reply.
func (c *Client) receiveChunk(flags, typ uint16, cookie uint64, n uint32) error {
	o, err := c.find(cookie)
	if err != nil {
		return err
	}
	if n > maxPayload+64 || !c.p.structured {
		return fmt.Errorf("%w: chunk of type %d with %d bytes", errProtocol, typ, n)
	}
	switch {
	case typ == chunkNone && n == 0:
	case typ == chunkData && n > 8 && o.h.typ == cmdRead:
		err = c.chunkData(o, int(n))
	case typ == chunkHole && n == 12 && o.h.typ == cmdRead:
		err = c.chunkHole(o)
	case typ == chunkStatus && n >= 12 && o.h.typ == cmdBlockStatus:
		err = c.chunkStatus(o, int(n))
	case typ&chunkErrBit != 0:
		err = c.chunkError(o, typ, int(n))
	default:
		err = fmt.Errorf("%w: chunk of type %d with %d bytes for %s", errProtocol, typ, n, commandNames[o.h.typ])
	}
	if err != nil {
		return noEOF(err)
	}
	if flags&chunkDone != 0 {
		c.end(o)
	}
	return nil
}

// chunkData takes in data at an offset.
func (c *Client) chunkData(o *op, n int) error {
	p, err := c.in.take(8)
	if err != nil {
		return err
	}
	return c.fillData(o, binary.BigEndian.Uint64(p), n-8)
}

// chunkHole takes in zeros at an offset.
func (c *Client) chunkHole(o *op) error {
	p, err := c.in.take(12)
	if err != nil {
		return err
	}
	off, n := binary.BigEndian.Uint64(p), int(binary.BigEndian.Uint32(p[8:]))
	dst, err := o.window(off, n)
	if err != nil {
		return err
	}
	if o.claim() {
		clear(dst)
		o.state.CompareAndSwap(opFilling, opSent)
	}
	return nil
}

// claim takes the owner's memory for filling, unless the owner is gone. The
// answer may come before the sender has noted that the request is out.
func (o *op) claim() bool {
	for {
		s := o.state.Load()
		if s == opAbandoned {
			return false
		}
		if o.state.CompareAndSwap(s, opFilling) {
			return true
		}
	}
}

// window returns the part of the op's memory for a range of the export.
func (o *op) window(off uint64, n int) ([]byte, error) {
	end := o.h.off + uint64(o.h.n)
	if off < o.h.off || off > end || uint64(n) > end-off || o.got+n > int(o.h.n) {
		return nil, fmt.Errorf("%w: %d bytes at %d for a read of %d+%d", errProtocol, n, off, o.h.off, o.h.n)
	}
	o.got += n
	at := int(off - o.h.off)
	return o.data[at : at+n], nil
}

// fillData reads n bytes into the op's memory, or away if its owner is gone.
func (c *Client) fillData(o *op, off uint64, n int) error {
	dst, err := o.window(off, n)
	if err != nil {
		return err
	}
	if !o.claim() {
		return noEOF(c.in.skip(n))
	}
	err = c.in.read(dst)
	o.state.CompareAndSwap(opFilling, opSent)
	return noEOF(err)
}

// chunkError takes in an error; further chunks may follow.
func (c *Client) chunkError(o *op, typ uint16, n int) error {
	if n < 6 || n > maxOptionData {
		return fmt.Errorf("%w: error chunk of %d bytes", errProtocol, n)
	}
	p := make([]byte, n)
	if err := c.in.read(p); err != nil {
		return err
	}
	code, length := binary.BigEndian.Uint32(p), int(binary.BigEndian.Uint16(p[4:]))
	if code == 0 || length > n-6 {
		return fmt.Errorf("%w: error chunk with code %d", errProtocol, code)
	}
	if o.err == nil {
		o.err = o.serverError(code, string(p[6:6+length]))
	}
	return nil
}
