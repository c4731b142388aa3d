package pebblefs

import (
	"context"
	"errors"
	"fmt"

	"github.com/atollstore/atoll/internal/atoll"
)

// Check compares the table with itself and with the medium's counts, which must
// be those of the table when nothing is pending; otherwise only the table is
// looked at. It ends with the medium's own check.
func (fs *FS) Check(ctx context.Context) error {
	fs.mu.Lock()
	var bad []error
	blocks := int64(0)
	links := map[uint64]int{}
	for name, ino := range fs.mu.tree.names {
		if !ino.dir {
			links[ino.id]++
			if fs.mu.tree.byID[ino.id] != ino {
				bad = append(bad, fmt.Errorf("file %s: number %d leads elsewhere: %w", name, ino.id, atoll.ErrCorrupt))
			}
		}
	}
	for id, ino := range fs.mu.tree.byID {
		end := uint64(0)
		for _, e := range ino.extents {
			if e.first < end {
				bad = append(bad, fmt.Errorf("file %d: runs overlap at block %d: %w", id, e.first, atoll.ErrCorrupt))
			}
			end = e.first + uint64(e.blocks)
			blocks += int64(e.blocks)
		}
		if links[id] != ino.links || ino.links == 0 {
			bad = append(bad, fmt.Errorf("file %d: %d names, %d counted: %w", id, links[id], ino.links, atoll.ErrCorrupt))
		}
	}
	for _, e := range fs.mu.parts {
		blocks += int64(e.blocks)
	}
	quiet := len(fs.mu.cuts) == 0 && !fs.mu.frozen && fs.mu.broken == nil
	fs.mu.Unlock()
	if live := fs.m.Stats().Live; quiet && live != blocks*atoll.BlockSize {
		bad = append(bad, fmt.Errorf("%d blocks are referenced, %d are counted: %w", blocks, live/atoll.BlockSize, atoll.ErrCorrupt))
	}
	bad = append(bad, fs.m.Check(ctx))
	return errors.Join(bad...)
}
