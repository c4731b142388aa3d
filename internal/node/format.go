package node

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/host"
	"github.com/atollstore/atoll/internal/segment"
)

const (
	superFile   = "super"
	superNew    = "super.new"
	lockFile    = "lock"
	segmentsDir = "segments"
	slotsDir    = "slots"
	segSuffix   = ".seg"
)

// Identity says which disk of which cluster this is. Zero fields are chosen by
// Format; Node may stay 0 until the catalog gives a number (Assign).
type Identity struct {
	Cluster     atoll.UUID
	Node        atoll.NodeID
	Disk        atoll.UUID
	Incarnation atoll.UUID
}

// Format makes fs, an empty directory on a disk, into a node of a cluster. A
// disk that has an identity already is refused with ErrExist. The identity is
// written last, so a Format that was cut short can be repeated. Durable on
// return.
func Format(fs host.FS, id Identity) error {
	lock, err := fs.Lock(lockFile)
	if err != nil {
		return fmt.Errorf("format disk: it is in use by another process: %w", err)
	}
	defer lock.Close()
	if old, err := ReadIdentity(fs); err == nil {
		return fmt.Errorf("format disk: it is disk %v of cluster %v: %w", old.Disk, old.Cluster, atoll.ErrExist)
	} else if !errors.Is(err, atoll.ErrNotExist) {
		return fmt.Errorf("format disk: %w", err)
	}
	if id.Cluster.IsZero() {
		return fmt.Errorf("format disk: no cluster given: %w", atoll.ErrInvalid)
	}
	for _, u := range []*atoll.UUID{&id.Disk, &id.Incarnation} {
		if u.IsZero() {
			rand.Read(u[:])
		}
	}
	for _, dir := range []string{segmentsDir, slotsDir} {
		if err := fs.Mkdir(dir); err != nil {
			return fmt.Errorf("format disk: %w", err)
		}
	}
	states, err := newStateLog(fs, loadedStates{all: make(map[atoll.SegmentID]state)})
	if err == nil {
		err = states.close(true)
	}
	if err != nil {
		return fmt.Errorf("format disk: %w", err)
	}
	return writeSuper(fs, segment.Super{
		Cluster: id.Cluster, Disk: id.Disk, Incarnation: id.Incarnation, Node: id.Node, Created: time.Now().UnixNano(),
	})
}

// ReadIdentity returns the identity of the disk fs. ErrNotExist if it was never
// formatted, ErrCorrupt, ErrVersion.
func ReadIdentity(fs host.FS) (Identity, error) {
	s, err := readSuper(fs)
	return Identity{Cluster: s.Cluster, Node: s.Node, Disk: s.Disk, Incarnation: s.Incarnation}, err
}

// Assign gives the disk fs its number in the cluster. A disk that has another
// number is refused with ErrIdentity; one that is being served with ErrBusy.
// Durable on return.
func Assign(fs host.FS, id atoll.NodeID) error {
	lock, err := fs.Lock(lockFile)
	if err != nil {
		return fmt.Errorf("assign node %v: the disk is in use: %w", id, err)
	}
	defer lock.Close()
	s, err := readSuper(fs)
	if err != nil {
		return fmt.Errorf("assign node %v: %w", id, err)
	}
	return assign(fs, &s, id)
}

func assign(fs host.FS, s *segment.Super, id atoll.NodeID) error {
	if s.Node == id {
		return nil
	}
	if s.Node != 0 || id == 0 {
		return fmt.Errorf("assign node %v: the disk is node %v: %w", id, s.Node, atoll.ErrIdentity)
	}
	s.Node = id
	return writeSuper(fs, *s)
}

func readSuper(fs host.FS) (segment.Super, error) {
	p, err := readFile(fs, superFile)
	if err != nil {
		return segment.Super{}, err
	}
	return segment.ParseSuper(p)
}

// writeSuper replaces the superblock.
func writeSuper(fs host.FS, s segment.Super) error {
	err := fs.Remove(superNew)
	if err != nil && !errors.Is(err, atoll.ErrNotExist) {
		return fmt.Errorf("write superblock: %w", err)
	}
	f, err := fs.Create(superNew)
	if err != nil {
		return fmt.Errorf("write superblock: %w", err)
	}
	_, err = f.WriteAt(segment.EncodeSuper(s), 0)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = fs.Rename(superNew, superFile)
	}
	if err == nil {
		err = fs.SyncDir(".")
	}
	if err != nil {
		return fmt.Errorf("write superblock: %w", err)
	}
	return nil
}

// readFile returns a whole small file.
func readFile(fs host.FS, name string) ([]byte, error) {
	f, err := fs.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	p := make([]byte, size)
	n, err := f.ReadAt(p, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return p[:n], nil
}

func segmentPath(id atoll.SegmentID) string { return segmentsDir + "/" + id.String() + segSuffix }

// parseSegmentName is the inverse of segmentPath for a name in the directory.
func parseSegmentName(name string) (atoll.SegmentID, bool) {
	base, ok := strings.CutSuffix(name, segSuffix)
	if !ok {
		return atoll.SegmentID{}, false
	}
	id, err := atoll.ParseSegmentID(base)
	return id, err == nil
}

// compareIDs orders segments by medium, ordinal and copyset.
func compareIDs(a, b atoll.SegmentID) int {
	return cmp.Or(cmp.Compare(a.Medium, b.Medium), cmp.Compare(a.Ordinal, b.Ordinal), cmp.Compare(a.Copyset, b.Copyset))
}
