package hosttest

import (
	"cmp"
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"slices"
)

// CrashMode says what becomes of what is not durable at a power cut.
type CrashMode uint8

const (
	// LoseUnsynced loses all that is not durable.
	LoseUnsynced CrashMode = iota
	// KeepAll loses nothing.
	KeepAll
	// Random decides for each sector, size and name alone. Some torn sectors
	// are garbage.
	Random
)

// sectorSize is what a disk writes whole, if the power holds.
const sectorSize = 512

// Crash returns the disk as it is found after a power cut now; d itself goes on
// as if nothing had happened. The copy has no locks, rules or hook. It costs
// little, for both share what neither changes. Random draws from rng, or from
// the disk's own randomness if rng is nil.
func (d *Disk) Crash(rng *rand.Rand, mode CrashMode) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	if rng == nil {
		rng = d.mu.rng
	}
	return d.crash(&cut{rng: rng, mode: mode})
}

// CrashKeep is Crash where keep says for each pending change, by its number
// from 0 to Pending()-1 in the order in which they were made, whether it is
// there as a whole. It is for trying all combinations.
func (d *Disk) CrashKeep(keep func(i int) bool) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	index := make(map[uint64]int)
	for i, seq := range d.pendingSeqs() {
		index[seq] = i
	}
	return d.crash(&cut{rng: d.mu.rng, keep: func(seq uint64) bool { return keep(index[seq]) }})
}

// Pending returns how many changes are not durable.
func (d *Disk) Pending() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.pendingSeqs())
}

// pendingSeqs returns the numbers of the pending changes in order. The parts of
// one change that was cut in two count once.
func (d *Disk) pendingSeqs() []uint64 {
	var seqs []uint64
	seen := make(map[*inode]bool)
	var add func(ino *inode)
	add = func(ino *inode) {
		if ino == nil || seen[ino] {
			return
		}
		seen[ino] = true
		for _, op := range ino.pending {
			seqs = append(seqs, op.seq)
		}
		for _, child := range ino.names {
			add(child)
		}
		for _, s := range ino.saved {
			add(s.ino)
		}
	}
	add(d.mu.root)
	for _, op := range d.mu.names {
		seqs = append(seqs, op.seq)
		for _, p := range op.parts {
			add(p.ino)
		}
	}
	slices.SortFunc(seqs, cmp.Compare)
	return slices.Compact(seqs)
}

// Clone returns a disk in the same state, pending changes included, as for a
// process that was killed: the copy has no locks, rules or hook.
func (d *Disk) Clone() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.sibling(d.mu.rng.Uint64())
	m := make(map[*inode]*inode)
	c.mu.root = cloneInode(d.mu.root, m)
	for _, op := range d.mu.names {
		parts := slices.Clone(op.parts)
		for i := range parts {
			parts[i].dir = cloneInode(parts[i].dir, m)
			parts[i].ino = cloneInode(parts[i].ino, m)
		}
		c.mu.names = append(c.mu.names, &nameOp{seq: op.seq, parts: parts})
	}
	c.mu.seq, c.mu.used, c.mu.syncs = d.mu.seq, d.mu.used, d.mu.syncs
	return c
}

// sibling returns an empty disk like d.
func (d *Disk) sibling(seed uint64) *Disk {
	c := NewDisk(seed)
	c.mu.total, c.mu.keep, c.mu.shared, c.mu.zeros = d.mu.total, d.mu.keep, d.mu.shared, d.mu.zeros
	return c
}

// cloneInode copies an inode and all below it, each once.
func cloneInode(ino *inode, m map[*inode]*inode) *inode {
	if ino == nil {
		return nil
	}
	if c := m[ino]; c != nil {
		return c
	}
	c := &inode{path: ino.path, dir: ino.dir, liveSize: ino.liveSize, safeSize: ino.safeSize, room: ino.room}
	m[ino] = c
	if !ino.dir {
		c.live, c.safe = ino.live.snapshot(), ino.safe.snapshot()
		c.pending = slices.Clone(ino.pending)
		return c
	}
	c.names = make(map[string]*inode, len(ino.names))
	for name, child := range ino.names {
		c.names[name] = cloneInode(child, m)
	}
	c.saved = make(map[string]savedName, len(ino.saved))
	for name, s := range ino.saved {
		c.saved[name] = savedName{ino: cloneInode(s.ino, m), seq: s.seq}
	}
	return c
}

// cut decides what survives.
type cut struct {
	rng  *rand.Rand
	mode CrashMode
	keep func(seq uint64) bool // replaces mode
}

// whole decides about a change that cannot be torn.
func (c *cut) whole(seq uint64) bool {
	switch {
	case c.keep != nil:
		return c.keep(seq)
	case c.mode == Random:
		return c.rng.Uint64()&1 == 0
	}
	return c.mode == KeepAll
}

// crash builds the disk that c leaves.
func (d *Disk) crash(c *cut) *Disk {
	after := d.sibling(c.rng.Uint64())
	names := make(map[*inode]map[string]savedName) // directories that survivors change
	for _, op := range d.mu.names {
		if !c.whole(op.seq) {
			continue
		}
		for _, p := range op.parts {
			if names[p.dir] == nil {
				names[p.dir] = maps.Clone(p.dir.saved)
			}
			save(names[p.dir], p, op.seq)
		}
	}
	b := builder{cut: c, disk: after, names: names, done: make(map[*inode]*inode)}
	after.mu.root = b.build(d.mu.root, "")
	return after
}

// builder makes the inodes of a disk after a power cut.
type builder struct {
	*cut
	disk  *Disk
	names map[*inode]map[string]savedName
	done  map[*inode]*inode
}

// build returns what is left of ino and all below it.
func (b *builder) build(ino *inode, path string) *inode {
	if made := b.done[ino]; made != nil {
		return made
	}
	if !ino.dir {
		made := b.file(ino, path)
		b.done[ino] = made
		return made
	}
	made := newDir(path)
	b.done[ino] = made
	saved := b.names[ino]
	if saved == nil {
		saved = ino.saved
	}
	for _, name := range slices.Sorted(maps.Keys(saved)) {
		child := saved[name].ino
		if child == nil {
			continue
		}
		below := name
		if path != "" {
			below = path + "/" + name
		}
		c := b.build(child, below)
		made.names[name] = c
		made.saved[name] = savedName{ino: c}
	}
	return made
}

// file returns what is left of a file.
func (b *builder) file(ino *inode, path string) *inode {
	made := &inode{path: path, safe: ino.safe.snapshot(), safeSize: ino.safeSize}
	if len(ino.pending) > 0 {
		for _, op := range ino.pending {
			b.survive(made, op)
		}
		made.safe.cut(made.safeSize)
	}
	made.live, made.liveSize = made.safe.snapshot(), made.safeSize
	made.room = made.live.room()
	b.disk.mu.used += made.room
	return made
}

// survive applies what survives of op.
func (b *builder) survive(made *inode, op fileOp) {
	torn := b.keep == nil && b.mode == Random && op.kind != opSize && b.rng.IntN(3) == 0
	switch {
	case torn:
		b.tear(&made.safe, op)
	case !b.whole(op.seq):
	case op.kind == opSize:
		if op.off < made.safeSize {
			made.safe.cut(op.off)
		}
		made.safeSize = op.off
	default:
		op.apply(&made.safe)
	}
}

// tear keeps half of the sectors of op. A third of the others are garbage.
func (b *builder) tear(p *pages, op fileOp) {
	for op.n > 0 {
		n := min(op.n, sectorSize-op.off%sectorSize)
		sector := op.part(op.off, op.off+n)
		switch fate := b.rng.IntN(6); {
		case fate < 3:
			sector.apply(p)
		case fate == 3 && op.kind == opData:
			p.writeAt(b.garbage(n), op.off)
		}
		op = op.part(op.off+n, op.off+op.n)
	}
}

// garbage returns n bytes that nobody wrote.
func (b *builder) garbage(n int64) []byte {
	var g [sectorSize]byte
	for i := 0; i < sectorSize; i += 8 {
		binary.LittleEndian.PutUint64(g[i:], b.rng.Uint64())
	}
	return g[:n]
}
