package pebblefs

import (
	"context"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/medium"
)

// load builds the table from the medium's root and its log.
func (fs *FS) load(ctx context.Context) error {
	fs.mu.tree = newTree()
	if root := fs.m.Root(); root != nil {
		table, err := fs.loadRoot(ctx, root)
		if err != nil {
			return err
		}
		if fs.mu.tree, err = parseTable(table); err != nil {
			return err
		}
	}
	return fs.m.Replay(ctx, func(r medium.Record) error {
		if err := fs.replay(ctx, &r); err != nil {
			return fmt.Errorf("replay record %d at %d:%d: %w", r.Seq, r.Seg, r.Block, err)
		}
		return nil
	})
}

// loadRoot returns the table that a root holds or leads to.
func (fs *FS) loadRoot(ctx context.Context, root []byte) ([]byte, error) {
	if len(root) < 4 || le.Uint32(root) != magicParts {
		return root, nil
	}
	r, err := openFrame(root, magicParts)
	if err != nil {
		return nil, err
	}
	size, n := r.num(), r.count()
	var table []byte
	for range n {
		e := r.extent()
		if r.bad || e.blocks > partBlocks {
			return nil, fmt.Errorf("parse root of parts: %w", atoll.ErrCorrupt)
		}
		p := make([]byte, int(e.blocks)*atoll.BlockSize)
		if err := fs.m.Read(ctx, e.ordinal, e.block, p); err != nil {
			return nil, err
		}
		table = append(table, p...)
		fs.mu.parts = append(fs.mu.parts, e)
	}
	if r.end() != nil || size > uint64(len(table)) {
		return nil, fmt.Errorf("parse root of parts: %w", atoll.ErrCorrupt)
	}
	return table[:size], nil
}

// replay applies one record of the log to table and counts.
func (fs *FS) replay(ctx context.Context, r *medium.Record) error {
	fs.mu.since += int64(r.Blocks+1) * atoll.BlockSize
	switch r.Kind {
	case kindData:
		ino := fs.mu.tree.byID[r.Key]
		if ino == nil {
			return fmt.Errorf("data of unknown file %d: %w", r.Key, atoll.ErrCorrupt)
		}
		e, size, err := dataPlace(r.Record, r.Seg, r.Block)
		if err != nil {
			return err
		}
		fs.give(placed(e, ino.place(e), false)...)
		ino.grow(size)
	case kindOps:
		p := make([]byte, int(r.Blocks)*atoll.BlockSize)
		if err := fs.m.Read(ctx, r.Seg, r.Block, p); err != nil {
			return err
		}
		ops, err := parseOps(p)
		if err != nil {
			return err
		}
		for i := range ops {
			if err := fs.redo(&ops[i]); err != nil {
				return fmt.Errorf("operation %d: %w: %w", i, atoll.ErrCorrupt, err)
			}
		}
	default:
		return fmt.Errorf("record of kind %d: %w", r.Kind, atoll.ErrVersion)
	}
	return nil
}

// redo applies one operation of the log.
func (fs *FS) redo(o *op) error {
	switch o.code {
	case opExtent, opSize:
		ino := fs.mu.tree.byID[o.id]
		if ino == nil {
			return fmt.Errorf("file %d is unknown", o.id)
		}
		if o.code == opSize {
			ino.grow(o.size)
			return nil
		}
		fs.give(placed(o.ext, ino.place(o.ext), false)...)
		return nil
	}
	gone, err := fs.mu.tree.apply(o)
	if gone != nil {
		for _, e := range gone.extents {
			fs.give(delta{e.ordinal, -int(e.blocks), 0})
		}
	}
	return err
}

func (ino *inode) grow(size int64) {
	ino.logged = max(ino.logged, size)
	ino.size = ino.logged
}
