package pebblefs

import (
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/catalog"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/medium"
	"github.com/atollstore/atoll/internal/segment"
	"github.com/atollstore/atoll/internal/stream"
)

const (
	chunkBlocks = 256       // blocks of a file in one record
	flushBytes  = 1 << 20   // bytes of a file that wait in memory
	opsBytes    = 128 << 10 // operations in one record
	bulkAppends = 1 << 20   // weight of the gate that a checkpoint closes
)

// delta is a change of a segment's counts.
type delta struct {
	ordinal    atoll.Ordinal
	live, hold int
}

// give passes changes of counts on, or keeps them until the checkpoint that is
// being made is done (P3). fs.mu is held.
func (fs *FS) give(ds ...delta) {
	if fs.mu.frozen {
		fs.mu.deferred = append(fs.mu.deferred, ds...)
		return
	}
	for _, d := range ds {
		if d.live != 0 {
			fs.m.Live(d.ordinal, d.live)
		}
		if d.hold != 0 {
			fs.m.Hold(d.ordinal, d.hold)
		}
	}
}

// placed counts a run of blocks that came into a file, and those that it took
// the place of. fs.mu is held.
func placed(e extent, old []extent, held bool) []delta {
	ds := []delta{{e.ordinal, int(e.blocks), 0}}
	if held {
		ds = append(ds, delta{e.ordinal, 0, -1})
	}
	for _, o := range old {
		ds = append(ds, delta{o.ordinal, -int(o.blocks), 0})
	}
	return ds
}

// queue adds operations to what the next commit writes. fs.mu is held.
func (fs *FS) queue(ops ...op) {
	for i := range ops {
		fs.mu.pending = appendOp(fs.mu.pending, &ops[i])
		fs.mu.cuts = append(fs.mu.cuts, len(fs.mu.pending))
	}
}

// piece is a part of a file's window on its way to the log.
type piece struct {
	ino    *inode
	first  uint64
	blocks int
	last   int // bytes in the last block
	buf    *host.Buffer
}

func (p *piece) record(kind segment.Kind) segment.Record {
	return segment.Record{Kind: kind, Blocks: uint16(p.blocks), Key: p.ino.id, Aux: dataAux(p.first, p.last)}
}

// batch is what one commit takes from the pending operations.
type batch struct {
	frames [][]byte // lists of operations in whole blocks
	deltas []delta
	gone   []*inode
}

// take empties the pending operations. fs.mu is held.
func (fs *FS) take() batch {
	b := batch{deltas: fs.mu.deltas, gone: fs.mu.gone}
	start := 0
	for i, end := range fs.mu.cuts {
		if end-start >= opsBytes || i == len(fs.mu.cuts)-1 {
			p := finishFrame(append(newFrame(magicOps), fs.mu.pending[start:end]...))
			b.frames = append(b.frames, append(p, make([]byte, -len(p)&(atoll.BlockSize-1))...))
			start = end
		}
	}
	fs.mu.pending, fs.mu.cuts, fs.mu.deltas, fs.mu.gone = fs.mu.pending[:0], fs.mu.cuts[:0], nil, nil
	return b
}

// commit makes the pending operations durable, and with them p if it is not
// nil, in one append unless they are very many. It waits for its turn (P1).
func (fs *FS) commit(ctx context.Context, p *piece) error {
	if err := acquire(ctx, fs.log); err != nil {
		return err
	}
	defer func() { <-fs.log }()
	return fs.commitLocked(ctx, p)
}

// commitLocked is commit with fs.log held.
func (fs *FS) commitLocked(ctx context.Context, p *piece) error {
	fs.mu.Lock()
	err := fs.mu.broken
	var b batch
	if err == nil {
		b = fs.take()
	}
	if p != nil && p.ino.links == 0 {
		p = nil // nobody will find it again
	}
	fs.mu.Unlock()
	if err != nil {
		return err
	}
	return fs.writeBatch(ctx, &b, p)
}

// writeBatch makes a batch durable, and with its last part p if it is not nil,
// and counts what it did. fs.log is held.
func (fs *FS) writeBatch(ctx context.Context, b *batch, p *piece) error {
	for len(b.frames) > 1 || len(b.frames) == 1 && p == nil {
		if err := fs.write(ctx, b.frames[0], nil); err != nil {
			return err
		}
		b.frames = b.frames[1:]
	}
	if p != nil {
		var frame []byte
		if len(b.frames) == 1 {
			frame = b.frames[0]
		}
		if err := fs.write(ctx, frame, p); err != nil {
			return err
		}
	}
	fs.settle(b)
	return nil
}

// settle counts what a durable batch of operations did.
func (fs *FS) settle(b *batch) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.give(b.deltas...)
	for _, ino := range b.gone {
		if ino.opens > 0 {
			ino.held = append(ino.held, ino.extents...)
		}
		for _, e := range ino.extents {
			if ino.opens > 0 {
				fs.give(delta{e.ordinal, 0, +1})
			}
			fs.give(delta{e.ordinal, -int(e.blocks), 0})
		}
	}
}

// write appends a list of operations and a piece of a file to the hot lane in
// one entry; either may be missing. After an error nobody knows whether the log
// has it, so nothing is written any more (P4).
func (fs *FS) write(ctx context.Context, frame []byte, p *piece) error {
	var e stream.Entry
	if frame != nil {
		buf := host.Alloc(len(frame))
		defer buf.Release()
		copy(buf.Bytes(), frame)
		e.Add(segment.Record{Kind: kindOps, Blocks: uint16(len(frame) / atoll.BlockSize)}, buf, buf.Bytes())
	}
	if p != nil {
		e.Add(p.record(kindData), p.buf, p.buf.Bytes())
	}
	if err := fs.m.Append(ctx, catalog.Hot, &e); err != nil {
		return fs.breaks(err)
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.mu.since += int64(e.Blocks()+1) * atoll.BlockSize
	if fs.mu.since >= fs.opts.CheckpointBytes {
		select {
		case fs.kick <- struct{}{}:
		default:
		}
	}
	if p != nil {
		ext := extent{p.first, uint32(p.blocks), e.Seg().Ordinal, e.Block(e.Records() - 1)}
		fs.give(placed(ext, p.ino.place(ext), false)...)
		p.ino.logged = max(p.ino.logged, (int64(p.first)+int64(p.blocks)-1)*atoll.BlockSize+int64(p.last))
	}
	return nil
}

// breaks notes that memory and log may differ.
func (fs *FS) breaks(err error) error {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if fs.mu.broken == nil {
		fs.mu.broken = fmt.Errorf("write file table of medium %v: %w", fs.m.Info().ID, err)
	}
	return fs.mu.broken
}

// writeBulk appends a piece of a file to the bulk lane and queues the operation
// that makes it count.
func (fs *FS) writeBulk(ctx context.Context, p *piece) error {
	if err := fs.gate.Acquire(ctx, 1); err != nil {
		return fmt.Errorf("write file %d: %w: %w", p.ino.id, atoll.ErrTimeout, err)
	}
	defer fs.gate.Release(1)
	var e stream.Entry
	e.Add(p.record(kindBulk), p.buf, p.buf.Bytes())
	if err := fs.m.Append(ctx, catalog.Bulk, &e); err != nil {
		return fs.breaks(err)
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if p.ino.links == 0 {
		return nil // removed meanwhile: the blocks are dead
	}
	ext := extent{p.first, uint32(p.blocks), e.Seg().Ordinal, e.Block(0)}
	fs.m.Hold(ext.ordinal, +1)
	fs.mu.deltas = append(fs.mu.deltas, placed(ext, p.ino.place(ext), true)...)
	p.ino.logged = max(p.ino.logged, (int64(p.first)+int64(p.blocks)-1)*atoll.BlockSize+int64(p.last))
	fs.queue(op{code: opExtent, id: p.ino.id, ext: ext}, op{code: opSize, id: p.ino.id, size: p.ino.logged})
	return nil
}

// Checkpoint stores the whole table as the root of the medium, so that the log
// before it need not be replayed. Reads and writes go on but for a moment.
func (fs *FS) Checkpoint(ctx context.Context) error {
	if err := acquire(ctx, fs.checkpoints); err != nil {
		return err
	}
	defer func() { <-fs.checkpoints }()
	mark, table, err := fs.freeze(ctx)
	if err != nil {
		return err
	}
	root, undo, err := fs.storeTable(ctx, table)
	if err == nil {
		err = fs.m.Checkpoint(ctx, mark, root)
	}
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.mu.frozen = false
	if err != nil && undo != nil {
		fs.give(undo...)
		fs.mu.parts = fs.mu.oldParts
	}
	ds := fs.mu.deferred
	fs.mu.deferred = nil
	fs.give(ds...)
	return err
}

// freeze brings log and memory to the same state and takes it, with the mark
// that it belongs to. Counts are held back from then on.
func (fs *FS) freeze(ctx context.Context) (mark medium.Mark, table []byte, err error) {
	// No bulk append may be on its way, for its blocks are not held yet.
	if err := fs.gate.Acquire(ctx, bulkAppends); err != nil {
		return mark, nil, fmt.Errorf("checkpoint: %w: %w", atoll.ErrTimeout, err)
	}
	defer fs.gate.Release(bulkAppends)
	if err := acquire(ctx, fs.log); err != nil {
		return mark, nil, err
	}
	defer func() { <-fs.log }()
	fs.mu.Lock()
	err = fs.mu.broken
	b := batch{}
	if err == nil {
		b = fs.take()
		table = fs.mu.tree.encode() // the log will say the same once b is written
	}
	fs.mu.Unlock()
	if err == nil {
		err = fs.writeBatch(ctx, &b, nil)
	}
	if err != nil {
		return mark, nil, err
	}
	mark = fs.m.Mark()
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.mu.frozen, fs.mu.since = true, 0
	return mark, table, nil
}

// storeTable returns the root for a table: the table itself, or where its parts
// are when it is long. undo takes back the counts if the root is not used.
func (fs *FS) storeTable(ctx context.Context, table []byte) (root []byte, undo []delta, err error) {
	var parts []extent
	defer func() {
		if err == nil {
			undo = fs.recount(parts)
		}
	}()
	if len(table) <= inlineTable {
		return table, nil, nil
	}
	for p := table; len(p) > 0; {
		n := min(len(p), partBlocks*atoll.BlockSize)
		blocks := (n + atoll.BlockSize - 1) / atoll.BlockSize
		buf := host.Alloc(blocks * atoll.BlockSize)
		clear(buf.Bytes()[copy(buf.Bytes(), p[:n]):])
		var e stream.Entry
		e.Add(segment.Record{Kind: kindPart, Blocks: uint16(blocks), Key: uint64(len(parts))}, buf, buf.Bytes())
		err := fs.m.Append(ctx, catalog.Bulk, &e)
		buf.Release()
		if err != nil {
			return nil, nil, err
		}
		parts = append(parts, extent{blocks: uint32(blocks), ordinal: e.Seg().Ordinal, block: e.Block(0)})
		p = p[n:]
	}
	root = appendNum(newFrame(magicParts), uint64(len(table)), uint64(len(parts)))
	for _, e := range parts {
		root = appendExtent(root, e)
	}
	return finishFrame(root), nil, nil
}

// recount lets the counts follow from the parts of the last table to those of
// the next, and returns how to take that back.
func (fs *FS) recount(parts []extent) (undo []delta) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for _, e := range parts {
		fs.m.Live(e.ordinal, int(e.blocks))
		undo = append(undo, delta{e.ordinal, -int(e.blocks), 0})
	}
	for _, e := range fs.mu.parts {
		fs.m.Live(e.ordinal, -int(e.blocks))
		undo = append(undo, delta{e.ordinal, int(e.blocks), 0})
	}
	fs.mu.oldParts, fs.mu.parts = fs.mu.parts, parts
	return undo
}
