package chaos

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/atollstore/atoll/internal/atoll"
	"github.com/atollstore/atoll/internal/segment"
)

// Copies is what a comparison of the servers' disks found.
type Copies struct {
	Segments int     // with more than one sealed copy
	Bytes    int64   // compared, of all copies
	Wrong    []error // sealed copies that differ
}

// CompareCopies compares the sealed copies of each segment, byte for byte. The
// servers are stopped.
func (c *Cluster) CompareCopies() (out Copies, err error) {
	type first struct {
		on     *Server
		length atoll.BlockNo
		sum    [sha256.Size]byte
		many   bool
	}
	seen := map[string]*first{}
	for _, s := range c.Servers {
		files, err := filepath.Glob(filepath.Join(s.Disk, "segments", "*.seg"))
		if err != nil {
			return out, err
		}
		for _, path := range files {
			length, sum, err := sealedSum(path)
			if errors.Is(err, errOpen) {
				continue
			}
			if err != nil {
				return out, fmt.Errorf("compare copies: %s of %s: %w", filepath.Base(path), s.Name, err)
			}
			out.Bytes += length.Bytes()
			f := seen[filepath.Base(path)]
			if f == nil {
				seen[filepath.Base(path)] = &first{on: s, length: length, sum: sum}
				continue
			}
			if !f.many {
				f.many = true
				out.Segments++
			}
			if f.length != length || f.sum != sum {
				out.Wrong = append(out.Wrong, fmt.Errorf("segment %s differs: %d blocks on %s, %d on %s", filepath.Base(path), f.length, f.on.Name, length, s.Name))
			}
		}
	}
	return out, nil
}

var errOpen = errors.New("not sealed")

// sealedSum returns the length and the hash of a sealed segment.
func sealedSum(path string) (length atoll.BlockNo, sum [sha256.Size]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, sum, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, sum, err
	}
	p := make([]byte, blockBytes)
	if _, err := f.ReadAt(p, 0); err != nil {
		return 0, sum, errOpen
	}
	head, err := segment.ParseHeader(p)
	if err != nil {
		return 0, sum, errOpen
	}
	found := segment.Scan(f, head.Segment(), atoll.BlockNo(info.Size()/blockBytes))
	if !found.Sealed {
		return 0, sum, errOpen
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, found.Length.Bytes())); err != nil {
		return 0, sum, err
	}
	return found.Length, [sha256.Size]byte(h.Sum(nil)), nil
}
